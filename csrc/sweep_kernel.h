// The solver's column sweep, written once over the vector operations of product_kernels.h. The job is specified in
// matgptq.h.
//
// A thread takes a tile of rows (one per lane) and walks the columns in blocks. The trail of a block is brought up to
// date from all earlier residuals at once by a register-tiled product (left-looking, so each trail element is
// written once per block of residuals instead of once per column); inside a block the same product catches up six
// columns at a time, and only within those six does each column wait for the one before it.
#pragma once

#include <cstring>
#include <new>

#include "layout.h"
#include "matgptq.h"

namespace matgptq {

constexpr int kSweepBlock = 48;
constexpr int kSweepStep = 6;    // divides kSweepBlock
constexpr int kSweepDepth = 96;  // residual columns per pass: what is reused stays in the first-level cache
constexpr int kMaxCells = 256;

// Codes between two neighbouring boundaries of a set of widths share one cell; each added width splits some cells.
struct SweepCell {
    int parent;   // cell of the next narrower width that this one lies in
    float level;  // v_r - 128 of this width
    float low;    // first and last code of the cell, minus 128
    float high;
};

struct SweepPlan {
    const matgptq_sweep_job* job;
    int copies;
    int num_lower;  // widths below 8
    bool parent_counts;  // width 8 is there and its weight is not zero
    int cell_count[kWidths];
    SweepCell cells[kWidths][kMaxCells];
    // Coupling in panels of kSweepBlock columns: panel p holds rows 0 .. kSweepBlock*(p+1)-1, zeros at k <= j.
    const float* panels;
};

inline static int64_t sweep_panel_offset(int64_t panel) {
    return panel * (panel + 1) / 2 * kSweepBlock * kSweepBlock;
}
inline static int sweep_row_vectors(int copies) { return copies <= 3 ? 4 : 2; }

namespace {

template <class S, int Vectors>
MATGPTQ_INLINE void subtract_product(const float* residuals, int64_t residual_stride, const float* panel, int depth,
                                     float* trail, int64_t trail_stride) {
    using Floats = typename S::Floats;
    Floats sum[kSweepStep][Vectors];
    for (int k = 0; k < kSweepStep; ++k)
        for (int v = 0; v < Vectors; ++v) sum[k][v] = S::load_floats(trail + k * trail_stride + v * S::kLanes);
    for (int i = 0; i < depth; ++i) {
        Floats residual[Vectors];
        for (int v = 0; v < Vectors; ++v) residual[v] = S::load_floats(residuals + v * S::kLanes);
        for (int k = 0; k < kSweepStep; ++k) {
            const Floats m = S::broadcast(panel[k]);
            for (int v = 0; v < Vectors; ++v) sum[k][v] = S::fnma(residual[v], m, sum[k][v]);
        }
        residuals += residual_stride;
        panel += kSweepBlock;
    }
    for (int k = 0; k < kSweepStep; ++k)
        for (int v = 0; v < Vectors; ++v) S::store(trail + k * trail_stride + v * S::kLanes, sum[k][v]);
}

// Six columns at `trail` minus the product of `depth` residual columns with a panel, for all vectors of a column.
template <class S>
void catch_up(const float* residuals, const float* panel, int depth, float* trail, int vectors) {
    const int64_t stride = static_cast<int64_t>(vectors) * S::kLanes;
    int v = 0;
    if constexpr (S::kSweepVectors >= 4)
        for (; v + 4 <= vectors; v += 4)
            subtract_product<S, 4>(residuals + v * S::kLanes, stride, panel, depth, trail + v * S::kLanes, stride);
    if constexpr (S::kSweepVectors >= 2)
        for (; v + 2 <= vectors; v += 2)
            subtract_product<S, 2>(residuals + v * S::kLanes, stride, panel, depth, trail + v * S::kLanes, stride);
    for (; v < vectors; ++v)
        subtract_product<S, 1>(residuals + v * S::kLanes, stride, panel, depth, trail + v * S::kLanes, stride);
}

// The best code, minus 128, for each lane of RowVectors vectors. x and scale: [widths][RowVectors].
template <class S, int RowVectors>
MATGPTQ_INLINE void choose_codes(const SweepPlan& plan, const typename S::Floats (*x)[RowVectors], const float* scales,
                                 const float* inverse, float* costs, typename S::Floats* best) {
    using Floats = typename S::Floats;
    constexpr int lanes = S::kLanes;
    constexpr int row = RowVectors * lanes;
    const int lower = plan.num_lower;
    const matgptq_sweep_job& job = *plan.job;
    const Floats zero = S::broadcast(0.0f);
    Floats least[RowVectors];
    for (int t = 0; t < RowVectors; ++t) {
        least[t] = S::broadcast(__builtin_inff());
        best[t] = zero;
    }
    // Of equal candidates the lowest wins: round half down, compare strictly, visit in ascending order.
    Floats nearest[RowVectors], x8[RowVectors], scale8[RowVectors];
    for (int t = 0; t < RowVectors; ++t) nearest[t] = x8[t] = scale8[t] = zero;
    Floats weight8 = zero;
    if (plan.parent_counts) {
        weight8 = S::broadcast(job.weights[lower]);
        const Floats half = S::broadcast(0.5f);
        for (int t = 0; t < RowVectors; ++t) {
            x8[t] = x[lower][t];
            scale8[t] = S::load_floats(scales + lower * row + t * lanes);
            nearest[t] = S::ceil(S::subtract(S::multiply(x8[t], S::load_floats(inverse + t * lanes)), half));
        }
    }
    if (lower == 0) {
        for (int t = 0; t < RowVectors; ++t)
            best[t] = plan.parent_counts
                          ? S::min(S::max(nearest[t], S::broadcast(-128.0f)), S::broadcast(127.0f))
                          : S::broadcast(-128.0f);
        return;
    }
    float* from = costs;
    float* to = costs + static_cast<int64_t>(kMaxCells) * row;
    for (int t = 0; t < RowVectors; ++t) S::store(from + t * lanes, zero);
    for (int r = 0; r < lower; ++r) {
        const Floats weight = S::broadcast(job.weights[r]);
        Floats target[RowVectors], scale[RowVectors];
        for (int t = 0; t < RowVectors; ++t) {
            target[t] = x[r][t];
            scale[t] = S::load_floats(scales + r * row + t * lanes);
        }
        const SweepCell* cell = plan.cells[r];
        const int count = plan.cell_count[r];
        if (r + 1 < lower) {
            for (int i = 0; i < count; ++i, ++cell) {
                const Floats level = S::broadcast(cell->level);
                for (int t = 0; t < RowVectors; ++t) {
                    const Floats error = S::fnma(scale[t], level, target[t]);
                    const Floats parent = S::load_floats(from + cell->parent * row + t * lanes);
                    S::store(to + i * row + t * lanes, S::fma(S::multiply(weight, error), error, parent));
                }
            }
            float* swap = from;
            from = to;
            to = swap;
        } else if (plan.parent_counts) {
            for (int i = 0; i < count; ++i, ++cell) {
                const Floats level = S::broadcast(cell->level);
                const Floats low = S::broadcast(cell->low), high = S::broadcast(cell->high);
                for (int t = 0; t < RowVectors; ++t) {
                    const Floats error = S::fnma(scale[t], level, target[t]);
                    Floats cost = S::load_floats(from + cell->parent * row + t * lanes);
                    cost = S::fma(S::multiply(weight, error), error, cost);
                    // Inside a cell only the parent's own term varies, and it has one minimum.
                    const Floats code = S::min(S::max(nearest[t], low), high);
                    const Floats error8 = S::fnma(scale8[t], code, x8[t]);
                    cost = S::fma(S::multiply(weight8, error8), error8, cost);
                    best[t] = S::select(S::less(cost, least[t]), code, best[t]);
                    least[t] = S::min(cost, least[t]);
                }
            }
        } else {
            for (int i = 0; i < count; ++i, ++cell) {
                const Floats level = S::broadcast(cell->level);
                const Floats low = S::broadcast(cell->low);
                for (int t = 0; t < RowVectors; ++t) {
                    const Floats error = S::fnma(scale[t], level, target[t]);
                    Floats cost = S::load_floats(from + cell->parent * row + t * lanes);
                    cost = S::fma(S::multiply(weight, error), error, cost);
                    best[t] = S::select(S::less(cost, least[t]), low, best[t]);
                    least[t] = S::min(cost, least[t]);
                }
            }
        }
    }
}

// v_r - 128 for centred codes.
template <class S>
MATGPTQ_INLINE typename S::Floats level_of(typename S::Floats code, int bits) {
    if (bits == kParentBits) return code;
    const float step = static_cast<float>(1 << (kParentBits - bits));
    const float top = static_cast<float>((1 << (bits - 1)) - 1);
    const auto shifted = S::fma(code, S::broadcast(1.0f / step), S::broadcast(0.5f));
    return S::multiply(S::min(S::floor(shifted), S::broadcast(top)), S::broadcast(step));
}

template <class S, int RowVectors>
void sweep_tiles(const SweepPlan& plan, int64_t tile_begin, int64_t tile_end) {
    using Floats = typename S::Floats;
    constexpr int lanes = S::kLanes;
    constexpr int tile_rows = RowVectors * lanes;
    const matgptq_sweep_job& job = *plan.job;
    const int64_t in = job.in_features, rows = job.rows, groups = job.num_groups;
    const int copies = plan.copies, widths = job.num_widths;
    const int vectors = copies * RowVectors;
    const int64_t column = static_cast<int64_t>(vectors) * lanes;

    const int64_t residual_count = in * column;
    const int64_t block_count = kSweepBlock * column;
    const int64_t scale_count = groups * widths * tile_rows;
    float* const memory = static_cast<float*>(::operator new(
        sizeof(float) * static_cast<size_t>(residual_count + 2 * block_count + scale_count + groups * tile_rows +
                                            2 * kMaxCells * tile_rows + kSweepBlock * tile_rows),
        std::align_val_t(64)));
    float* const residuals = memory;                      // [in, vectors, lanes]
    float* const trail = residuals + residual_count;      // [block, vectors, lanes]
    float* const base = trail + block_count;              // [block, vectors, lanes]
    float* const scales = base + block_count;             // [groups, widths, rows]
    float* const inverses = scales + scale_count;         // [groups, rows], of width 8
    float* const costs = inverses + groups * tile_rows;   // [2, cells, rows]
    float* const chosen = costs + 2 * kMaxCells * tile_rows;  // [block, rows]

    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        const int64_t first_row = tile * tile_rows;
        const int64_t live = rows - first_row < tile_rows ? rows - first_row : tile_rows;
        for (int r = 0; r < widths; ++r)
            for (int64_t i = 0; i < tile_rows; ++i)
                for (int64_t g = 0; g < groups; ++g) {
                    const float scale = i < live ? job.scales[(r * rows + first_row + i) * groups + g] : 1.0f;
                    scales[(g * widths + r) * tile_rows + i] = scale;
                    if (r + 1 == widths) inverses[g * tile_rows + i] = 1.0f / scale;
                }

        for (int64_t begin = 0, panel_index = 0; begin < in; begin += kSweepBlock, ++panel_index) {
            const int64_t count = in - begin < kSweepBlock ? in - begin : kSweepBlock;
            const float* const panel = plan.panels + sweep_panel_offset(panel_index);
            if (live < tile_rows || count < kSweepBlock) std::memset(base, 0, sizeof(float) * block_count);
            if (!job.trail || live < tile_rows || count < kSweepBlock)
                std::memset(trail, 0, sizeof(float) * block_count);
            for (int r = 0; r < copies; ++r)
                for (int64_t i = 0; i < live; ++i) {
                    const int64_t at = (r * rows + first_row + i) * in + begin;
                    float* to = base + r * tile_rows + i;
                    for (int64_t k = 0; k < count; ++k) to[k * column] = job.base[at + k];
                    if (job.trail) {
                        to = trail + r * tile_rows + i;
                        for (int64_t k = 0; k < count; ++k) to[k * column] = job.trail[at + k];
                    }
                }

            for (int64_t from = 0; from < begin; from += kSweepDepth) {
                const int depth = static_cast<int>(begin - from < kSweepDepth ? begin - from : kSweepDepth);
                for (int k = 0; k < count; k += kSweepStep)
                    catch_up<S>(residuals + from * column, panel + from * kSweepBlock + k, depth, trail + k * column,
                                vectors);
            }

            for (int step = 0; step < count; step += kSweepStep) {
                catch_up<S>(residuals + begin * column, panel + begin * kSweepBlock + step, step,
                            trail + step * column, vectors);
                const int end = step + kSweepStep < count ? step + kSweepStep : static_cast<int>(count);
                for (int k = step; k < end; ++k) {
                    const int64_t group = job.group_of[begin + k];
                    const float* const scale = scales + group * widths * tile_rows;
                    Floats x[kWidths][RowVectors], code[RowVectors];
                    for (int r = 0; r < copies; ++r)
                        for (int t = 0; t < RowVectors; ++t) {
                            const int64_t at = k * column + (r * RowVectors + t) * lanes;
                            x[r][t] = S::add(S::load_floats(base + at), S::load_floats(trail + at));
                        }
                    for (int r = copies; r < widths; ++r)
                        for (int t = 0; t < RowVectors; ++t) x[r][t] = x[0][t];
                    choose_codes<S, RowVectors>(plan, x, scale, inverses + group * tile_rows, costs, code);

                    for (int t = 0; t < RowVectors; ++t) S::store(chosen + k * tile_rows + t * lanes, code[t]);
                    float* const residual = residuals + (begin + k) * column;
                    if (job.mode == MATGPTQ_SWEEP_MEAN) {
                        for (int t = 0; t < RowVectors; ++t) {
                            Floats sum = S::broadcast(0.0f);
                            for (int r = 0; r < widths; ++r)
                                sum = S::fma(S::load_floats(scale + r * tile_rows + t * lanes),
                                             level_of<S>(code[t], job.widths[r]), sum);
                            S::store(residual + t * lanes,
                                     S::fnma(sum, S::broadcast(1.0f / static_cast<float>(widths)), x[0][t]));
                        }
                    } else {
                        for (int r = 0; r < widths; ++r)
                            for (int t = 0; t < RowVectors; ++t) {
                                const Floats level = level_of<S>(code[t], job.widths[r]);
                                const Floats s = S::load_floats(scale + r * tile_rows + t * lanes);
                                const int64_t at = (r * RowVectors + t) * lanes;
                                const Floats c =
                                    job.mode == MATGPTQ_SWEEP_RESIDUAL
                                        ? S::fnma(s, level, x[r][t])
                                        : S::subtract(S::multiply(s, level), S::load_floats(base + k * column + at));
                                S::store(residual + at, c);
                            }
                    }
                    const float* const coupling = panel + (begin + k) * kSweepBlock;
                    for (int later = k + 1; later < end; ++later) {
                        const Floats m = S::broadcast(coupling[later]);
                        for (int v = 0; v < vectors; ++v) {
                            float* const at = trail + later * column + v * lanes;
                            S::store(at, S::fnma(S::load_floats(residual + v * lanes), m, S::load_floats(at)));
                        }
                    }
                }
            }
            for (int64_t i = 0; i < live; ++i) {
                uint8_t* const to = job.codes + (first_row + i) * in + begin;
                for (int64_t k = 0; k < count; ++k)
                    to[k] = static_cast<uint8_t>(static_cast<int>(chosen[k * tile_rows + i]) + 128);
            }
        }
    }
    ::operator delete(memory, std::align_val_t(64));
}

template <class S>
void sweep_any(const SweepPlan& plan, int64_t tile_begin, int64_t tile_end) {
    if (sweep_row_vectors(plan.copies) == 4)
        sweep_tiles<S, 4>(plan, tile_begin, tile_end);
    else
        sweep_tiles<S, 2>(plan, tile_begin, tile_end);
}

template <class S>
void fill_sweep(Kernels& table) {
    table.sweep = sweep_any<S>;
    table.sweep_lanes = S::kLanes;
}

}  // namespace
}  // namespace matgptq
