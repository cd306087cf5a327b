#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace matgptq {
namespace {

// What the threads of a call do together; `share` is run by each of them.
struct Shared {
    const std::thread::id caller = std::this_thread::get_id();
    std::chrono::steady_clock::time_point done;  // when the caller had done its own

    virtual void share(bool calling) = 0;

    void enter() {
        const bool calling = std::this_thread::get_id() == caller;
        share(calling);
        if (calling) done = std::chrono::steady_clock::now();
    }

  protected:
    ~Shared() = default;
};

struct Task final : Shared {
    const std::function<void(int64_t, int64_t)>* work;
    int64_t count;
    int64_t piece;
    std::atomic<int64_t> next{0};

    void share(bool) override { run(); }

    void run() {
        for (;;) {
            const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= count) return;
            (*work)(begin, begin + piece < count ? begin + piece : count);
        }
    }
};

// Waits for something that should come at once; a thread that is disappointed lets others have the processor.
class Wait {
  public:
    void once() {
        if (++pauses_ > kPatient) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

  private:
    static constexpr int kPatient = 4096;
    int pauses_ = 0;
};

// Threads that stand by while their caller runs a body, for the tasks in it.
struct Standby final : Shared {
    const std::function<void()>* body;
    std::atomic<Task*> task{nullptr};
    std::atomic<uint32_t> posted{0};  // tasks so far
    std::atomic<int> active{0};
    std::atomic<bool> over{false};

    void share(bool calling) override;

    // By the caller. A thread that comes late finds no task: it is not waited for.
    void run(Task& one) {
        task = &one;
        ++posted;
        one.run();
        task = nullptr;
        for (Wait wait; active;) wait.once();
    }

  private:
    void stand_by() {
        for (uint32_t seen = 0;;) {
            for (Wait wait; posted == seen; wait.once())
                if (over) return;
            seen = posted;
            // In this order: either the caller sees this thread, or this thread sees that the task is over.
            ++active;
            if (Task* const one = task) one->run();
            --active;
        }
    }
};

thread_local Standby* standing_by = nullptr;

void Standby::share(bool calling) {
    if (!calling) {
        stand_by();
        return;
    }
    standing_by = this;
    (*body)();
    standing_by = nullptr;
    over = true;
}

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

    void run(Shared& task, int helpers) {
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
        task.enter();
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
            Shared* task = task_;
            ++active_;
            lock.unlock();
            task->enter();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Shared* task_ = nullptr;
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

// Whether all threads, this one among them, have entered what they share; not if they are busy with something else.
bool share_out(Shared& shared, int num_threads, int wanted) {
    Pool& threads = pool();
    std::unique_lock<std::mutex> lock(threads.busy, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    const matgptq_team borrowed = usable_team();
    if (!borrowed || threads.patience.rest > 0) {
        if (threads.patience.rest > 0) --threads.patience.rest;
        threads.run(shared, wanted - 1);
        return true;
    }
    const auto started = std::chrono::steady_clock::now();
    // All threads, also for fewer pieces: a runtime ends the threads that a smaller team leaves out.
    borrowed([](void* data) { static_cast<Shared*>(data)->enter(); }, &shared, static_cast<unsigned>(num_threads), 0);
    threads.patience.judge(started, shared.done);
    return true;
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
    // An exception must not leave a thread that is not the caller's.
    std::atomic<bool> out_of_memory{false};
    const std::function<void(int64_t, int64_t)> guarded = [&](int64_t begin, int64_t end) {
        try {
            work(begin, end);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    };
    Task task;
    task.work = &guarded;
    task.count = count;
    // As many for each thread, four at most: with a piece more for one of them the others would wait for it.
    const int64_t each = pieces / threads < 4 ? pieces / threads : 4;
    task.piece = (count + threads * each - 1) / (threads * each);
    if (standing_by) standing_by->run(task);
    else if (!share_out(task, num_threads, threads)) work(0, count);
    if (out_of_memory) throw std::bad_alloc();
}

void with_threads(int num_threads, const std::function<void()>& body) {
    Standby standby;
    standby.body = &body;
    if (num_threads <= 1 || standing_by || !share_out(standby, num_threads, num_threads)) body();
}

}  // namespace matgptq

extern "C" void matgptq_set_team(matgptq_team borrowed) {
    matgptq::Pool& shared = matgptq::pool();
    std::lock_guard<std::mutex> lock(shared.busy);
    shared.patience = {};
    matgptq::team_owner.store(matgptq::process());
    matgptq::team.store(borrowed);
}
