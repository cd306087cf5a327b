// Attention of one token: a query per head over the keys and values that came before, as a cache holds them.
#pragma once

#include <limits>
#include <type_traits>

#include "exp_kernel.h"
#include "layout.h"
#include "row_elements.h"

namespace matgptq {
namespace {

// Queries that meet a key or a value while it is in registers, with as many sums as these hold.
template <class S>
constexpr int kQueriesTogether = S::kLanes >= 16 ? 4 : 2;
constexpr int kPositionsTogether = 4;
// Vectors of a value that are summed in one pass over the positions.
constexpr int kVectorsTogether = 4;
// Keys and values are asked for so many bytes ahead, into the second-level cache: they lie on small pages, at the end of
// each of which the processor's own prefetching stops.
constexpr int64_t kCacheAheadBytes = 2048;

// Two vectors of a key or a value.
template <class S, bool Half>
MATGPTQ_INLINE void load_cached(const uint8_t* from, typename S::Floats* halves) {
    for (int64_t line = 0; line < 2 * S::kLanes * (Half ? 2 : 4); line += 64)
        __builtin_prefetch(from + kCacheAheadBytes + line, 0, 2);
    load_halves<S, Half>(from, S::kLanes, halves);
}

// scores [Queries, span] of some neighbouring positions; queries [Queries, size] in the order of vectors.
template <class S, bool Half, int Queries, int Positions>
MATGPTQ_INLINE void score_positions(const AttentionGroup& group, const uint8_t* keys, const float* queries,
                                    float* scores) {
    using Floats = typename S::Floats;
    constexpr int step = 2 * S::kLanes;
    Floats sum[Queries][kPositionsTogether];
    for (int q = 0; q < Queries; ++q)
        for (int t = 0; t < kPositionsTogether; ++t) sum[q][t] = S::broadcast(0.0f);
    for (int64_t i = 0; i < group.size; i += step)
        for (int t = 0; t < Positions; ++t) {
            Floats key[2];
            load_cached<S, Half>(keys + t * group.key_bytes + i * (Half ? 2 : 4), key);
            for (int q = 0; q < Queries; ++q)
                for (int half = 0; half < 2; ++half)
                    sum[q][t] =
                        S::fma(key[half], S::load_floats(queries + q * group.size + i + half * S::kLanes), sum[q][t]);
        }
    for (int q = 0; q < Queries; ++q) {
        float found[kPositionsTogether];
        S::sum_each(sum[q], found);
        for (int t = 0; t < Positions; ++t) scores[q * group.span + t] = found[t] * group.scale;
    }
}

template <class S, bool Half, int Queries>
void score(const AttentionGroup& group, const uint8_t* keys, const float* queries, float* scores) {
    int64_t t = 0;
    for (; t + kPositionsTogether <= group.length; t += kPositionsTogether)
        score_positions<S, Half, Queries, kPositionsTogether>(group, keys + t * group.key_bytes, queries, scores + t);
    for (; t < group.length; ++t)
        score_positions<S, Half, Queries, 1>(group, keys + t * group.key_bytes, queries, scores + t);
}

// Scores become weights, in place.
template <class S>
void weigh(const AttentionGroup& group, float* row) {
    using Floats = typename S::Floats;
    float top = row[0];
    for (int64_t t = 1; t < group.length; ++t) top = row[t] > top ? row[t] : top;
    // Behind the last position nothing counts.
    for (int64_t t = group.length; t < group.span; ++t) row[t] = -std::numeric_limits<float>::infinity();
    Floats total = S::broadcast(0.0f);
    for (int64_t t = 0; t < group.span; t += S::kLanes) {
        const Floats e = exp_not_positive<S>(S::subtract(S::load_floats(row + t), S::broadcast(top)));
        S::store(row + t, e);
        total = S::add(total, e);
    }
    const Floats share = S::broadcast(1.0f / S::sum(total));
    for (int64_t t = 0; t < group.span; t += S::kLanes) S::store(row + t, S::multiply(S::load_floats(row + t), share));
}

// Vectors of the sums [Queries, size], in the order of vectors.
template <class S, bool Half, int Queries, int Vectors>
MATGPTQ_INLINE void sum_vectors(const AttentionGroup& group, const uint8_t* values, const float* weights, float* sums) {
    using Floats = typename S::Floats;
    Floats sum[Queries][Vectors];
    for (int q = 0; q < Queries; ++q)
        for (int v = 0; v < Vectors; ++v) sum[q][v] = S::broadcast(0.0f);
    for (int64_t t = 0; t < group.length; ++t) {
        Floats value[Vectors];
        for (int v = 0; v < Vectors; v += 2)
            load_cached<S, Half>(values + t * group.value_bytes + v * S::kLanes * (Half ? 2 : 4), value + v);
        for (int q = 0; q < Queries; ++q) {
            const Floats weight = S::broadcast(weights[q * group.span + t]);
            for (int v = 0; v < Vectors; ++v) sum[q][v] = S::fma(weight, value[v], sum[q][v]);
        }
    }
    for (int q = 0; q < Queries; ++q)
        for (int v = 0; v < Vectors; ++v) S::store(sums + q * group.size + v * S::kLanes, sum[q][v]);
}

template <class S, bool Half, int Queries>
void sum_values(const AttentionGroup& group, const uint8_t* values, const float* weights, float* sums) {
    constexpr int64_t together = kVectorsTogether * S::kLanes, bytes = Half ? 2 : 4;
    int64_t i = 0;
    for (; i + together <= group.size; i += together)
        sum_vectors<S, Half, Queries, kVectorsTogether>(group, values + i * bytes, weights, sums + i);
    for (; i < group.size; i += 2 * S::kLanes)
        sum_vectors<S, Half, Queries, 2>(group, values + i * bytes, weights, sums + i);
}

// Calls step(first, count as a constant) for queries that are taken together.
template <class S, class Step>
MATGPTQ_INLINE void each_queries(int64_t queries, const Step& step) {
    int64_t q = 0;
    for (; q + kQueriesTogether<S> <= queries; q += kQueriesTogether<S>)
        step(q, std::integral_constant<int, kQueriesTogether<S>>());
    if constexpr (kQueriesTogether<S> > 2) {
        if (queries - q == 3) return step(q, std::integral_constant<int, 3>());
        if (queries - q == 2) return step(q, std::integral_constant<int, 2>());
    }
    if (q < queries) step(q, std::integral_constant<int, 1>());
}

template <class S, bool Half>
void attend_group(const AttentionGroup& group, int64_t head) {
    using Floats = typename S::Floats;
    constexpr int step = 2 * S::kLanes;
    constexpr int64_t bytes = Half ? 2 : 4;
    const int64_t size = group.size, queries = group.queries, span = group.span;
    const uint8_t* const query = group.query + head * queries * size * bytes;
    const uint8_t* const keys = group.keys + head * group.key_head_bytes;
    const uint8_t* const values = group.values + head * group.value_head_bytes;
    float* const scores = group.scores;           // [queries, span]
    float* const rows = scores + queries * span;  // [queries, size] in the order of vectors: queries, then sums
    for (int64_t i = 0; i < queries * size; i += step) {
        Floats halves[2];
        load_halves<S, Half>(query + i * bytes, S::kLanes, halves);
        for (int half = 0; half < 2; ++half) S::store(rows + i + half * S::kLanes, halves[half]);
    }
    each_queries<S>(queries, [&](int64_t q, auto count) {
        score<S, Half, count>(group, keys, rows + q * size, scores + q * span);
    });
    for (int64_t q = 0; q < queries; ++q) weigh<S>(group, scores + q * span);
    each_queries<S>(queries, [&](int64_t q, auto count) {
        sum_values<S, Half, count>(group, values, scores + q * span, rows + q * size);
    });
    // Back into the order of elements.
    for (int64_t i = 0; i < queries * size; ++i) {
        const int64_t within = i % step;
        group.out[i] = rows[i - within + (Half ? within / 2 + within % 2 * S::kLanes : within)];
    }
}

template <class S>
void fill_attention(Kernels& table) {
    table.attend[0] = attend_group<S, false>;
    table.attend[1] = attend_group<S, true>;
}

}  // namespace
}  // namespace matgptq
