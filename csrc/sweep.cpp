// Drives the column sweep: the cells of a set of widths, the coupling in panels, rows over threads.
#include <cstring>
#include <memory>
#include <new>

#include "buffer.h"
#include "matgptq.h"
#include "sweep_kernel.h"
#include "threads.h"

using namespace matgptq;

namespace {

void plan_cells(SweepPlan& plan) {
    const matgptq_sweep_job& job = *plan.job;
    int parent_of[256] = {};
    for (int r = 0; r < plan.num_lower; ++r) {
        int count = 0;
        int cell_of[256];
        uint8_t last = 0;
        for (int q = 0; q < 256; ++q) {
            const uint8_t u = slice_code(static_cast<uint8_t>(q), job.widths[r]);
            if (q == 0 || parent_of[q] != parent_of[q - 1] || u != last) {
                SweepCell& cell = plan.cells[r][count++];
                cell.parent = parent_of[q];
                cell.level = static_cast<float>((u << (kParentBits - job.widths[r])) - 128);
                cell.low = static_cast<float>(q - 128);
            }
            plan.cells[r][count - 1].high = static_cast<float>(q - 128);
            cell_of[q] = count - 1;
            last = u;
        }
        std::memcpy(parent_of, cell_of, sizeof cell_of);
        plan.cell_count[r] = count;
    }
}

}  // namespace

extern "C" int matgptq_sweep(const matgptq_sweep_job* job) {
    if (!job || job->rows < 0 || job->in_features < 0 || job->num_groups < 0) return MATGPTQ_E_ARGUMENT;
    if (job->num_widths < 1 || job->num_widths > kWidths || !job->widths || !job->weights) return MATGPTQ_E_BITS;
    for (int r = 0; r < job->num_widths; ++r)
        if (job->widths[r] < kMinBits || job->widths[r] > kParentBits || (r && job->widths[r] <= job->widths[r - 1]))
            return MATGPTQ_E_BITS;
    if (job->mode < MATGPTQ_SWEEP_RESIDUAL || job->mode > MATGPTQ_SWEEP_MEAN) return MATGPTQ_E_ARGUMENT;
    if (job->rows == 0 || job->in_features == 0) return MATGPTQ_OK;
    if (!job->base || !job->coupling || !job->scales || !job->group_of || !job->codes) return MATGPTQ_E_ARGUMENT;
    const int64_t in = job->in_features;
    for (int64_t j = 0; j < in; ++j)
        if (job->group_of[j] < 0 || job->group_of[j] >= job->num_groups) return MATGPTQ_E_GROUP;
    try {
        std::unique_ptr<SweepPlan> plan(new SweepPlan());
        plan->job = job;
        plan->copies = job->mode == MATGPTQ_SWEEP_MEAN ? 1 : job->num_widths;
        const bool has_parent = job->widths[job->num_widths - 1] == kParentBits;
        plan->num_lower = job->num_widths - (has_parent ? 1 : 0);
        plan->parent_counts = has_parent && job->weights[job->num_widths - 1] > 0;
        plan_cells(*plan);

        const int64_t panels = ceil_div(in, kSweepBlock);
        const Buffer<float> packed = allocate<float>(sweep_panel_offset(panels));
        parallel_for(panels, 1, job->num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                float* to = packed.get() + sweep_panel_offset(p);
                const int64_t first = p * kSweepBlock;
                const int64_t width = in - first < kSweepBlock ? in - first : kSweepBlock;
                for (int64_t j = 0; j < first + kSweepBlock; ++j, to += kSweepBlock) {
                    const int64_t start = j < first ? 0 : j - first + 1;
                    std::memset(to, 0, sizeof(float) * kSweepBlock);
                    if (j < in && start < width)
                        std::memcpy(to + start, job->coupling + j * in + first + start,
                                    sizeof(float) * static_cast<size_t>(width - start));
                }
            }
        });
        plan->panels = packed.get();
        const Kernels& table = kernels();
        const int64_t tile_rows = table.sweep_lanes * sweep_row_vectors(plan->copies);
        parallel_for(ceil_div(job->rows, tile_rows), 1, job->num_threads,
                     [&](int64_t begin, int64_t end) { table.sweep(*plan, begin, end); });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}
