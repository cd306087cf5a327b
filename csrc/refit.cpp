// Drives the refit's sums: tiles of rows over threads, rows into lanes and results back.
#include <algorithm>
#include <new>

#include "buffer.h"
#include "matgptq.h"
#include "refit_kernel.h"
#include "threads.h"

using namespace matgptq;

namespace {

// `count` rows, each in a lane; lanes that are left over hold zeros.
void into_lanes(const float* rows, int64_t count, int64_t columns, int64_t lanes, float* to) {
    for (int64_t k = 0; k < columns; ++k)
        for (int64_t r = 0; r < lanes; ++r) to[k * lanes + r] = r < count ? rows[r * columns + k] : 0.0f;
}

void out_of_lanes(const matgptq_refit_job& job, const RefitTile& tile, int64_t first, int64_t count, int64_t lanes) {
    const int64_t groups = job.in_features / job.group_size;
    for (int64_t r = 0; r < count; ++r) {
        float* system = job.system + (first + r) * groups * groups;
        for (int64_t g = 0; g < groups; ++g) {
            job.slope[(first + r) * groups + g] = tile.slope[g * lanes + r];
            for (int64_t h = g; h < groups; ++h)
                system[g * groups + h] = system[h * groups + g] = tile.system[(g * groups + h) * lanes + r];
        }
    }
}

}  // namespace

extern "C" int matgptq_refit(const matgptq_refit_job* job) {
    if (!job || job->rows < 0 || job->in_features < 0 || job->group_size < 1) return MATGPTQ_E_ARGUMENT;
    if (job->in_features % job->group_size) return MATGPTQ_E_GROUP;
    if (job->rows == 0 || job->in_features == 0) return MATGPTQ_OK;
    const bool all = job->current;
    if (!job->difference || !job->hessian || !job->errors || (all && (!job->system || !job->slope)))
        return MATGPTQ_E_ARGUMENT;
    const Kernels& table = kernels();
    const int64_t in = job->in_features, groups = in / job->group_size;
    const int64_t most = kRefitVectors * table.refit_lanes, sums = groups * groups + groups + 1;
    try {
        parallel_for(ceil_div(job->rows, most), 1, job->num_threads, [&](int64_t begin, int64_t end) {
            const Buffer<float> memory = allocate<float>((2 * in + sums) * most);
            for (int64_t first = begin * most; first < std::min(end * most, job->rows); first += most) {
                const int64_t count = std::min(most, job->rows - first);
                RefitTile tile;
                tile.job = job;
                tile.vectors = static_cast<int>(ceil_div(count, table.refit_lanes));
                const int64_t lanes = tile.vectors * table.refit_lanes;
                tile.current = memory.get();
                tile.difference = tile.current + in * lanes;
                tile.system = tile.difference + in * lanes;
                tile.slope = tile.system + groups * groups * lanes;
                tile.errors = tile.slope + groups * lanes;
                if (all) into_lanes(job->current + first * in, count, in, lanes, tile.current);
                into_lanes(job->difference + first * in, count, in, lanes, tile.difference);
                std::fill(tile.system, tile.errors + lanes, 0.0f);
                (all ? table.refit : table.forms)(tile);
                if (all) out_of_lanes(*job, tile, first, count, lanes);
                std::copy(tile.errors, tile.errors + count, job->errors + first);
            }
        });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}
