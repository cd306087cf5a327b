// Products of a few rows with a dense weight, which is read as it lies in memory: what an output head consists of.
#pragma once

#include <cstring>

#include "layout.h"
#include "matgptq.h"
#include "row_elements.h"

namespace matgptq {
namespace {

// A chunk of 32 columns fills two vectors of 16 sums: even and odd columns of a bfloat16 weight, the first and the last
// 16 of another one.

// Asked for at least so far ahead.
constexpr int64_t kAheadBytes = 8192;

template <class S, int Dtype, int Rows, int Count>
MATGPTQ_INLINE void dense_block(const DenseWeight& weight, const uint8_t* first, const float* x, int64_t x_step,
                                float* out, int64_t out_step) {
    using Floats = typename S::Floats;
    constexpr int parts = kDenseColumns / 2 / S::kLanes;
    constexpr int chunk_bytes = kDenseColumns * (Dtype == MATGPTQ_FLOAT32 ? 4 : 2);
    Floats sum[Count][Rows][parts][2];
    for (int w = 0; w < Count; ++w)
        for (int b = 0; b < Rows; ++b)
            for (int part = 0; part < parts; ++part)
                for (int half = 0; half < 2; ++half) sum[w][b][part][half] = S::broadcast(0.0f);
    const auto multiply = [&](const uint8_t* chunk, int64_t step, const float* values) MATGPTQ_LAMBDA_INLINE {
        for (int part = 0; part < parts; ++part)
            for (int w = 0; w < Count; ++w) {
                Floats columns[2];
                const uint8_t* from = chunk + w * step;
                if constexpr (Dtype == MATGPTQ_FLOAT16) {
                    const uint16_t* values = reinterpret_cast<const uint16_t*>(from) + part * S::kLanes;
                    columns[0] = S::load_half(values);
                    columns[1] = S::load_half(values + kDenseColumns / 2);
                } else {
                    load_halves<S, Dtype == MATGPTQ_BFLOAT16>(from + part * 4 * S::kLanes, kDenseColumns / 2, columns);
                }
                for (int b = 0; b < Rows; ++b)
                    for (int half = 0; half < 2; ++half)
                        sum[w][b][part][half] =
                            S::fma(columns[half],
                                   S::load_floats(values + b * x_step + half * (kDenseColumns / 2) + part * S::kLanes),
                                   sum[w][b][part][half]);
            }
    };
    const int64_t whole = weight.columns / kDenseColumns;
    const uint8_t* next = first + (Count * weight.row_bytes > kAheadBytes ? Count * weight.row_bytes : kAheadBytes);
    for (int64_t c = 0; c < whole; ++c) {
        // What comes next, into the second-level cache and in the order of addresses: so memory is read fastest, and
        // not in the order in which rows side by side are.
        for (int line = 0; line < Count * chunk_bytes; line += 64)
            __builtin_prefetch(next + c * (Count * chunk_bytes) + line, 0, 2);
        multiply(first + c * chunk_bytes, weight.row_bytes, x + c * kDenseColumns);
    }
    if (const int64_t left = weight.columns % kDenseColumns) {
        alignas(64) uint8_t last[Count][chunk_bytes] = {};
        for (int w = 0; w < Count; ++w)
            std::memcpy(last[w], first + w * weight.row_bytes + whole * chunk_bytes,
                        static_cast<size_t>(left * (chunk_bytes / kDenseColumns)));
        multiply(last[0], chunk_bytes, x + whole * kDenseColumns);
    }
    // One order of all sums, whatever the length of a vector.
    for (int w = 0; w < Count; ++w)
        for (int b = 0; b < Rows; ++b) {
            Floats total[parts];
            for (int part = 0; part < parts; ++part) total[part] = S::add(sum[w][b][part][0], sum[w][b][part][1]);
            for (int step = parts / 2; step; step /= 2)
                for (int part = 0; part < step; ++part) total[part] = S::add(total[part], total[part + step]);
            out[b * out_step + w] = S::sum(total[0]);
        }
}

template <class S, int Dtype, int Rows>
void dense_product(const DenseWeight& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t x_step,
                   float* out, int64_t out_step) {
    // As many rows together as leave their sums in registers.
    constexpr int registers = S::kLanes == 8 ? 8 : 16;
    constexpr int sums = Rows * kDenseColumns / S::kLanes;
    constexpr int count = registers / sums > 4 ? 4 : registers / sums > 1 ? registers / sums : 1;
    const uint8_t* at = weight.rows + row_begin * weight.row_bytes;
    int64_t row = row_begin;
    for (; row + count <= row_end; row += count, at += count * weight.row_bytes, out += count)
        dense_block<S, Dtype, Rows, count>(weight, at, x, x_step, out, out_step);
    for (; row < row_end; ++row, at += weight.row_bytes, ++out)
        dense_block<S, Dtype, Rows, 1>(weight, at, x, x_step, out, out_step);
}

template <class S, int Dtype>
void fill_dense_of(DenseKernel (&of_rows)[3]) {
    of_rows[0] = dense_product<S, Dtype, 1>;
    of_rows[1] = dense_product<S, Dtype, 2>;
    of_rows[2] = dense_product<S, Dtype, 4>;
}

template <class S>
void fill_dense(Kernels& table) {
    fill_dense_of<S, MATGPTQ_FLOAT32>(table.dense[MATGPTQ_FLOAT32]);
    fill_dense_of<S, MATGPTQ_BFLOAT16>(table.dense[MATGPTQ_BFLOAT16]);
    fill_dense_of<S, MATGPTQ_FLOAT16>(table.dense[MATGPTQ_FLOAT16]);
}

}  // namespace
}  // namespace matgptq
