// Judges candidate scales of every group by the error that joint rounding would leave.
//
// The error of one weight depends only on its position p = w / s, through a piecewise parabola with at most 256 pieces.
// A uniform table leads to the piece at once, instead of the eight steps of a binary search.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "matgptq.h"
#include "threads.h"

namespace {

constexpr float kLow = -136.0f, kHigh = 136.0f;  // beyond, the first and the last piece serve
constexpr float kPerUnit = 16.0f;
constexpr int kBuckets = static_cast<int>((kHigh - kLow) * kPerUnit) + 1;

struct Pieces {
    const matgptq_search_job* job;
    std::vector<uint16_t> first;  // [kBuckets] first piece that a position in the bucket can belong to

    explicit Pieces(const matgptq_search_job* given) : job(given), first(kBuckets) {
        int piece = 0;
        for (int b = 0; b < kBuckets; ++b) {
            const float begin = kLow + static_cast<float>(b) / kPerUnit;
            while (piece < job->num_pieces - 1 && job->breakpoints[piece] < begin) ++piece;
            first[b] = static_cast<uint16_t>(piece);
        }
    }

    // Squared distance to the piece's mean level plus the spread of its levels, both in steps of the parent's grid.
    float error(float position) const {
        const float inside = std::min(std::max(kLow, position), kHigh);  // in this order also for a NaN
        int piece = first[static_cast<int>((inside - kLow) * kPerUnit)];
        while (piece < job->num_pieces - 1 && position > job->breakpoints[piece]) ++piece;
        const float distance = position - job->mean_level[piece];
        return distance * distance + job->spread[piece];
    }
};

}  // namespace

extern "C" int matgptq_search_scales(const matgptq_search_job* job) {
    if (!job || job->rows < 0 || job->in_features < 0 || job->group_size < 1 || job->num_candidates < 1)
        return MATGPTQ_E_ARGUMENT;
    if (job->num_pieces < 1 || job->num_pieces > 256) return MATGPTQ_E_ARGUMENT;
    if (job->in_features % job->group_size) return MATGPTQ_E_GROUP;
    if (job->rows == 0 || job->in_features == 0) return MATGPTQ_OK;
    if (!job->weight || !job->importance || !job->candidates || !job->mean_level || !job->spread || !job->best)
        return MATGPTQ_E_ARGUMENT;
    if (job->num_pieces > 1 && !job->breakpoints) return MATGPTQ_E_ARGUMENT;
    try {
        const Pieces pieces(job);
        const int64_t groups = job->in_features / job->group_size;
        matgptq::parallel_for(job->rows, 4, job->num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                for (int64_t group = 0; group < groups; ++group) {
                    const float* weight = job->weight + row * job->in_features + group * job->group_size;
                    const float* importance = job->importance + group * job->group_size;
                    float lowest = std::numeric_limits<float>::infinity();
                    int32_t best = 0;
                    for (int c = 0; c < job->num_candidates; ++c) {
                        const float scale = job->candidates[(c * job->rows + row) * groups + group];
                        const float inverse = 1.0f / scale;
                        float sum = 0.0f;
                        for (int64_t j = 0; j < job->group_size; ++j)
                            sum += importance[j] * pieces.error(weight[j] * inverse);
                        sum *= scale * scale;
                        if (sum < lowest) {
                            lowest = sum;
                            best = c;
                        }
                    }
                    job->best[row * groups + group] = best;
                }
        });
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
    return MATGPTQ_OK;
}
