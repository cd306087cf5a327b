// Threads: those of a team that was lent (matgptq_set_team), or of a small pool whose workers sleep when idle.
#pragma once

#include <cstdint>
#include <functional>

#include "matgptq.h"

namespace matgptq {

// Splits [0, count) into pieces of about `grain` or more and runs `work(begin, end)` on them, on up to `num_threads`
// threads including the caller. Pieces are handed out as threads become free: on a shared machine equal shares would
// wait for the slowest. A caller that finds the pool busy works alone. Where `work` throws std::bad_alloc on any of them, so
// does this.
void parallel_for(int64_t count, int64_t grain, int num_threads, const std::function<void(int64_t, int64_t)>& work);

// Runs `body`, which must not throw, on the calling thread while `num_threads` - 1 others stand by: each parallel_for in it
// is theirs at once, for a fraction of what it costs to start and stop them. For a row of short ones.
void with_threads(int num_threads, const std::function<void()>& body);

}  // namespace matgptq
