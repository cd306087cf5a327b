#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace matgptq {
namespace {

struct Task {
    const std::function<void(int64_t, int64_t)>* work;
    int64_t count;
    int64_t piece;
    std::atomic<int64_t> next{0};
    const std::thread::id caller = std::this_thread::get_id();
    std::chrono::steady_clock::time_point done;  // when the caller found nothing left; only `share` notes it

    void share() {
        run();
        if (std::this_thread::get_id() == caller) done = std::chrono::steady_clock::now();
    }

    void run() {
        for (;;) {
            const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= count) return;
            (*work)(begin, begin + piece < count ? begin + piece : count);
        }
    }
};

// A lent team comes back when all of its threads have run, also one that found nothing to do; on a processor that another
// program holds that takes milliseconds, many times what a product does. Where waiting is most of some calls in a row,
// the pool, which waits for nobody who is late, takes the next ones, more of them each time.
struct Patience {
    using Clock = std::chrono::steady_clock;
    static constexpr int kJudged = 32;    // calls
    static constexpr int kBearable = 3;   // waiting, in units of work
    static constexpr int kFewest = 64, kMost = 4096;
    int rest = 0;        // calls that are the pool's
    int next = kFewest;  // rest after the next verdict
    int calls = 0;
    Clock::duration worked{0}, waited{0};

    // Started, the caller's own share done, all back now.
    void judge(Clock::time_point started, Clock::time_point done) {
        worked += done - started;
        waited += Clock::now() - done;
        if (++calls < kJudged) return;
        const bool late = waited > kBearable * worked;
        rest = late ? next : 0;
        next = !late ? kFewest : next * 2 < kMost ? next * 2 : kMost;
        calls = 0;
        worked = waited = Clock::duration{0};
    }
};

class Pool {
  public:
    std::mutex busy;    // held by the caller whose task runs
    Patience patience;  // of that caller, with a lent team

    void run(Task& task, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < helpers) {
                const int index = static_cast<int>(workers_.size());
                workers_.emplace_back([this, index] { serve(index); });
            }
            task_ = &task;
            wanted_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        task.run();
        std::unique_lock<std::mutex> lock(mutex_);
        // A worker that has not woken by now has nothing left to do.
        task_ = nullptr;
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void serve(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (!task_ || index >= wanted_) continue;
            Task* task = task_;
            ++active_;
            lock.unlock();
            task->run();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Task* task_ = nullptr;
    int wanted_ = 0;
    int active_ = 0;
    uint64_t generation_ = 0;
};

std::atomic<matgptq_team> team{nullptr};
std::atomic<int64_t> team_owner{0};  // the process that lent it

int64_t process() {
#if defined(_WIN32)
    return 0;
#else
    return getpid();
#endif
}

// An OpenMP runtime does not survive a fork: a child would wait for threads that only its parent has.
matgptq_team usable_team() { return team_owner.load() == process() ? team.load() : nullptr; }

// Never destroyed: joining threads while a process exits, or in a child after fork, can only hang. A forked child has
// none of its parent's threads and gets a pool of its own.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static int64_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (!current || owner != process()) {
        owner = process();
        current = new Pool;
    }
    return *current;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& work) {
    if (count <= 0) return;
    const int64_t pieces = (count + grain - 1) / grain;
    const int threads = static_cast<int>(num_threads < pieces ? num_threads : pieces);
    if (threads <= 1) {
        work(0, count);
        return;
    }
    Task task;
    task.work = &work;
    task.count = count;
    // As many for each thread, four at most: with a piece more for one of them the others would wait for it.
    const int64_t each = pieces / threads < 4 ? pieces / threads : 4;
    task.piece = (count + threads * each - 1) / (threads * each);
    Pool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
    if (!lock.owns_lock()) {
        work(0, count);
        return;
    }
    const matgptq_team borrowed = usable_team();
    if (!borrowed || shared.patience.rest > 0) {
        if (shared.patience.rest > 0) --shared.patience.rest;
        shared.run(task, threads - 1);
        return;
    }
    const auto started = std::chrono::steady_clock::now();
    // All threads, also for fewer pieces: a runtime ends the threads that a smaller team leaves out.
    borrowed([](void* data) { static_cast<Task*>(data)->share(); }, &task, static_cast<unsigned>(num_threads), 0);
    shared.patience.judge(started, task.done);
}

}  // namespace matgptq

extern "C" void matgptq_set_team(matgptq_team borrowed) {
    matgptq::Pool& shared = matgptq::pool();
    std::lock_guard<std::mutex> lock(shared.busy);
    shared.patience = {};
    matgptq::team_owner.store(matgptq::process());
    matgptq::team.store(borrowed);
}
