// Attention of one token: a query per head over the keys and values that came before, as a cache holds them.
#pragma once

#include <limits>

#include "exp_kernel.h"
#include "layout.h"
#include "row_elements.h"

namespace matgptq {
namespace {

template <class S, bool Half>
void attend_group(const AttentionGroup& group, int64_t head) {
    using Floats = typename S::Floats;
    constexpr int step = 2 * S::kLanes;
    constexpr int64_t bytes = Half ? 2 : 4;
    const int64_t size = group.size, length = group.length, queries = group.queries;
    const uint8_t* const query = group.query + head * queries * size * bytes;
    const uint8_t* const keys = group.keys + head * group.key_head_bytes;
    const uint8_t* const values = group.values + head * group.value_head_bytes;
    const int64_t span = group.span;
    float* const scores = group.scores;           // [queries, span]
    float* const sums = scores + queries * span;  // [queries, size], in the order of vectors
    for (int64_t t = 0; t < length; ++t) {
        const uint8_t* key = keys + t * group.key_bytes;
        for (int64_t q = 0; q < queries; ++q) {
            Floats even = S::broadcast(0.0f), odd = S::broadcast(0.0f);
            for (int64_t i = 0; i < size; i += step) {
                Floats k[2], x[2];
                load_halves<S, Half>(key + i * bytes, S::kLanes, k);
                load_halves<S, Half>(query + (q * size + i) * bytes, S::kLanes, x);
                even = S::fma(k[0], x[0], even);
                odd = S::fma(k[1], x[1], odd);
            }
            scores[q * span + t] = S::sum(S::add(even, odd)) * group.scale;
        }
    }
    for (int64_t q = 0; q < queries; ++q) {
        float* row = scores + q * span;
        float top = row[0];
        for (int64_t t = 1; t < length; ++t) top = row[t] > top ? row[t] : top;
        // Behind the last position nothing counts.
        for (int64_t t = length; t < span; ++t) row[t] = -std::numeric_limits<float>::infinity();
        Floats total = S::broadcast(0.0f);
        for (int64_t t = 0; t < span; t += S::kLanes) {
            const Floats e = exp_not_positive<S>(S::subtract(S::load_floats(row + t), S::broadcast(top)));
            S::store(row + t, e);
            total = S::add(total, e);
        }
        const Floats share = S::broadcast(1.0f / S::sum(total));
        for (int64_t t = 0; t < span; t += S::kLanes) S::store(row + t, S::multiply(S::load_floats(row + t), share));
        for (int64_t i = 0; i < size; ++i) sums[q * size + i] = 0.0f;
    }
    for (int64_t t = 0; t < length; ++t) {
        const uint8_t* value = values + t * group.value_bytes;
        for (int64_t i = 0; i < size; i += step) {
            Floats v[2];
            load_halves<S, Half>(value + i * bytes, S::kLanes, v);
            for (int64_t q = 0; q < queries; ++q) {
                const Floats weight = S::broadcast(scores[q * span + t]);
                float* sum = sums + q * size + i;
                S::store(sum, S::fma(weight, v[0], S::load_floats(sum)));
                S::store(sum + S::kLanes, S::fma(weight, v[1], S::load_floats(sum + S::kLanes)));
            }
        }
    }
    // Back into the order of elements.
    for (int64_t q = 0; q < queries; ++q)
        for (int64_t i = 0; i < size; ++i) {
            const int64_t within = i % step;
            const int64_t place = Half ? within / 2 + within % 2 * S::kLanes : within;
            group.out[q * size + i] = sums[q * size + i - within + place];
        }
}

template <class S>
void fill_attention(Kernels& table) {
    table.attend[0] = attend_group<S, false>;
    table.attend[1] = attend_group<S, true>;
}

}  // namespace
}  // namespace matgptq
