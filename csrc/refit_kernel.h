// What the refit of group scales needs to know of each row, written once over the vector operations of an instruction
// set. The job is specified in matgptq.h.
//
// Rows lie in lanes, as in the sweep, so that every instruction set adds in the same order. A few columns of the Hessian
// meet a tile of rows: a register-tiled product whose sums are used on the spot and never written.
#pragma once

#include "layout.h"
#include "matgptq.h"

namespace matgptq {

// What one thread works with; all are [..., lanes of a tile].
struct RefitTile {
    const matgptq_refit_job* job;
    int vectors;        // of rows
    float* current;     // [in]
    float* difference;  // [in]
    float* system;      // [groups][groups], filled where the first group is not after the second
    float* slope;       // [groups]
    float* errors;
};

namespace {

// Of rows. Few, because a tile is read from the second cache once for some columns.
constexpr int kRefitVectors = 3;

// Of the Hessian at a time: sums fill 24 of 32 registers, or 12 of 16.
template <class S>
constexpr int kRefitColumns = S::kSweepVectors >= 4 ? 8 : 4;

// On the diagonal, where columns meet each other: as many whatever the instruction set, for equal sums.
constexpr int kFormColumns = 8;

template <class S, int Columns, int Vectors>
struct RefitSums {
    using Floats = typename S::Floats;
    static constexpr int lanes = Vectors * S::kLanes;
    Floats sum[Columns][Vectors];

    // sum[c] = sum over k in [first, last) of rows[k] * H[k][c], in the order of k. `columns` is row c = 0 of a matrix of
    // `in` columns, which is symmetric: its rows are its columns.
    MATGPTQ_INLINE void couple(const float* columns, int64_t in, const float* rows, int64_t first, int64_t last) {
        for (int c = 0; c < Columns; ++c)
            for (int v = 0; v < Vectors; ++v) sum[c][v] = S::broadcast(0.0f);
        const float* x = rows + first * lanes;
        for (int64_t k = first; k < last; ++k, x += lanes) {
            Floats row[Vectors];
            for (int v = 0; v < Vectors; ++v) row[v] = S::load_floats(x + v * S::kLanes);
            for (int c = 0; c < Columns; ++c) {
                const Floats m = S::broadcast(columns[c * in + k]);
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
void refit_some(const RefitTile& tile, int64_t column) {
    constexpr int lanes = Vectors * S::kLanes;
    const matgptq_refit_job& job = *tile.job;
    const int64_t in = job.in_features, size = job.group_size, groups = in / size, group = column / size;
    const float* columns = job.hessian + column * in;
    const float* current = tile.current + column * lanes;
    RefitSums<S, Columns, Vectors> sums;
    sums.couple(columns, in, tile.difference, 0, in);
    sums.collect(current, tile.slope + group * lanes);
    sums.collect(tile.difference + column * lanes, tile.errors);
    for (int64_t g = 0; g <= group; ++g) {
        sums.couple(columns, in, tile.current, g * size, (g + 1) * size);
        sums.collect(current, tile.system + (g * groups + group) * lanes);
    }
}

// As many columns as a step takes, or as are left.
template <class S, int Vectors, int Columns = kRefitColumns<S>>
void refit_columns(const RefitTile& tile, int64_t column, int64_t left) {
    if constexpr (Columns > 1)
        if (left < Columns) return refit_columns<S, Vectors, Columns - 1>(tile, column, left);
    refit_some<S, Columns, Vectors>(tile, column);
}

// All columns of one tile of rows; the sums there begin at zero.
template <class S, int Vectors = kRefitVectors>
void refit_tile(const RefitTile& tile) {
    if constexpr (Vectors > 1)
        if (tile.vectors < Vectors) return refit_tile<S, Vectors - 1>(tile);
    const matgptq_refit_job& job = *tile.job;
    for (int64_t begin = 0; begin < job.in_features; begin += job.group_size)
        for (int64_t column = begin; column < begin + job.group_size; column += kRefitColumns<S>)
            refit_columns<S, Vectors>(tile, column, begin + job.group_size - column);
}

template <class S, int Vectors, int Columns = kRefitColumns<S>>
void form_columns(const RefitTile& tile, int64_t column, int64_t left) {
    if constexpr (Columns > 1)
        if (left < Columns) return form_columns<S, Vectors, Columns - 1>(tile, column, left);
    static_assert(kFormColumns % kRefitColumns<S> == 0, "all columns of a step meet the same part of the diagonal");
    const int64_t in = tile.job->in_features, begin = column - column % kFormColumns;
    const float* hessian = tile.job->hessian + column * in;
    RefitSums<S, Columns, Vectors> sums, own;
    sums.couple(hessian, in, tile.difference, 0, begin);
    own.couple(hessian, in, tile.difference, begin, begin + kFormColumns < in ? begin + kFormColumns : in);
    for (int c = 0; c < Columns; ++c)  // what is before the diagonal's part stands for what is after it, too
        for (int v = 0; v < Vectors; ++v)
            sums.sum[c][v] = S::add(own.sum[c][v], S::add(sums.sum[c][v], sums.sum[c][v]));
    sums.collect(tile.difference + column * Vectors * S::kLanes, tile.errors);
}

// The errors alone, by half of the products.
template <class S, int Vectors = kRefitVectors>
void form_tile(const RefitTile& tile) {
    if constexpr (Vectors > 1)
        if (tile.vectors < Vectors) return form_tile<S, Vectors - 1>(tile);
    const int64_t in = tile.job->in_features;
    for (int64_t column = 0; column < in; column += kRefitColumns<S>) form_columns<S, Vectors>(tile, column, in - column);
}

template <class S>
void fill_refit(Kernels& table) {
    table.refit = refit_tile<S>;
    table.forms = form_tile<S>;
    table.refit_lanes = S::kLanes;
}

}  // namespace
}  // namespace matgptq
