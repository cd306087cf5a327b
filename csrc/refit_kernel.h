// What the refit of group scales needs to know of each row, written once over the vector operations of an instruction
// set. The job is specified in matgptq.h.
//
// Rows lie in lanes, as in the sweep, so that every instruction set adds in the same order. A strip of columns of the
// Hessian meets a tile of rows: a register-tiled product whose sums are used on the spot and never written.
#pragma once

#include "layout.h"
#include "matgptq.h"

namespace matgptq {

constexpr int kRefitStrip = 4;  // columns of the Hessian at a time

// What one thread works with; all but the strip are [..., lanes of a tile].
struct RefitTile {
    const matgptq_refit_job* job;
    int vectors;        // of rows
    float* current;     // [in]
    float* difference;  // [in]
    float* system;      // [groups][groups], filled where the first group is not after the second
    float* slope;       // [groups]
    float* errors;
    float* strip;  // [in][kRefitStrip]
};

namespace {

// Four columns of these fill 24 of 32 registers with sums, or 12 of 16.
template <class S>
constexpr int kRefitVectors = S::kSweepVectors >= 4 ? 6 : 3;

template <class S, int Columns, int Vectors>
struct RefitSums {
    using Floats = typename S::Floats;
    static constexpr int lanes = Vectors * S::kLanes;
    Floats sum[Columns][Vectors];

    // sum[c] = sum over k in [first, last) of rows[k] * H[k][c], in the order of k.
    MATGPTQ_INLINE void couple(const float* strip, const float* rows, int64_t first, int64_t last) {
        for (int c = 0; c < Columns; ++c)
            for (int v = 0; v < Vectors; ++v) sum[c][v] = S::broadcast(0.0f);
        const float* x = rows + first * lanes;
        const float* h = strip + first * kRefitStrip;
        for (int64_t k = first; k < last; ++k, x += lanes, h += kRefitStrip) {
            Floats row[Vectors];
            for (int v = 0; v < Vectors; ++v) row[v] = S::load_floats(x + v * S::kLanes);
            for (int c = 0; c < Columns; ++c) {
                const Floats m = S::broadcast(h[c]);
                for (int v = 0; v < Vectors; ++v) sum[c][v] = S::fma(row[v], m, sum[c][v]);
            }
        }
    }

    // into += sum over c of sum[c] * rows[c], in the order of c.
    MATGPTQ_INLINE void collect(const float* rows, float* into) const {
        for (int v = 0; v < Vectors; ++v) {
            Floats total = S::load_floats(into + v * S::kLanes);
            for (int c = 0; c < Columns; ++c)
                total = S::fma(sum[c][v], S::load_floats(rows + c * lanes + v * S::kLanes), total);
            S::store(into + v * S::kLanes, total);
        }
    }
};

template <class S, int Columns, int Vectors>
void refit_strip(const RefitTile& tile, int64_t column) {
    constexpr int lanes = Vectors * S::kLanes;
    const matgptq_refit_job& job = *tile.job;
    const int64_t size = job.group_size, groups = job.in_features / size, group = column / size;
    const float* current = tile.current + column * lanes;
    RefitSums<S, Columns, Vectors> sums;
    sums.couple(tile.strip, tile.difference, 0, job.in_features);
    sums.collect(current, tile.slope + group * lanes);
    sums.collect(tile.difference + column * lanes, tile.errors);
    for (int64_t g = 0; g <= group; ++g) {
        sums.couple(tile.strip, tile.current, g * size, (g + 1) * size);
        sums.collect(current, tile.system + (g * groups + group) * lanes);
    }
}

template <class S, int Vectors, int Columns = kRefitStrip>
void refit_columns(const RefitTile& tile, int64_t column, int64_t columns) {
    if constexpr (Columns > 1)
        if (columns < Columns) return refit_columns<S, Vectors, Columns - 1>(tile, column, columns);
    refit_strip<S, Columns, Vectors>(tile, column);
}

// The first `depth` elements of some columns of the Hessian, side by side.
inline void pack_strip(const RefitTile& tile, int64_t column, int64_t columns, int64_t depth) {
    const int64_t in = tile.job->in_features;
    const float* from = tile.job->hessian + column * in;  // symmetric: rows are columns
    if (columns == kRefitStrip) {
        for (int64_t k = 0; k < depth; ++k) {
            tile.strip[4 * k] = from[k];
            tile.strip[4 * k + 1] = from[in + k];
            tile.strip[4 * k + 2] = from[2 * in + k];
            tile.strip[4 * k + 3] = from[3 * in + k];
        }
    } else {
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t k = 0; k < depth; ++k) tile.strip[kRefitStrip * k + c] = from[c * in + k];
    }
}

// All columns of one tile of rows; the sums there begin at zero.
template <class S, int Vectors = kRefitVectors<S>>
void refit_tile(const RefitTile& tile) {
    if constexpr (Vectors > 1)
        if (tile.vectors < Vectors) return refit_tile<S, Vectors - 1>(tile);
    const matgptq_refit_job& job = *tile.job;
    for (int64_t begin = 0; begin < job.in_features; begin += job.group_size)
        for (int64_t column = begin; column < begin + job.group_size; column += kRefitStrip) {
            const int64_t left = begin + job.group_size - column;
            const int64_t columns = left < kRefitStrip ? left : kRefitStrip;
            pack_strip(tile, column, columns, job.in_features);
            refit_columns<S, Vectors>(tile, column, columns);
        }
}

template <class S, int Vectors, int Columns = kRefitStrip>
void form_columns(const RefitTile& tile, int64_t column, int64_t columns) {
    if constexpr (Columns > 1)
        if (columns < Columns) return form_columns<S, Vectors, Columns - 1>(tile, column, columns);
    RefitSums<S, Columns, Vectors> sums, own;
    sums.couple(tile.strip, tile.difference, 0, column);
    own.couple(tile.strip, tile.difference, column, column + Columns);
    for (int c = 0; c < Columns; ++c)  // what is before the diagonal stands for what is after it, too
        for (int v = 0; v < Vectors; ++v)
            sums.sum[c][v] = S::add(own.sum[c][v], S::add(sums.sum[c][v], sums.sum[c][v]));
    sums.collect(tile.difference + column * Vectors * S::kLanes, tile.errors);
}

// The errors alone, by half of the products.
template <class S, int Vectors = kRefitVectors<S>>
void form_tile(const RefitTile& tile) {
    if constexpr (Vectors > 1)
        if (tile.vectors < Vectors) return form_tile<S, Vectors - 1>(tile);
    const int64_t in = tile.job->in_features;
    for (int64_t column = 0; column < in; column += kRefitStrip) {
        const int64_t columns = in - column < kRefitStrip ? in - column : kRefitStrip;
        pack_strip(tile, column, columns, column + columns);
        form_columns<S, Vectors>(tile, column, columns);
    }
}

template <class S>
void fill_refit(Kernels& table) {
    table.refit = refit_tile<S>;
    table.forms = form_tile<S>;
    table.refit_lanes = S::kLanes;
    table.refit_vectors = kRefitVectors<S>;
}

}  // namespace
}  // namespace matgptq
