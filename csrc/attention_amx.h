// Attention of neighbouring tokens of one sequence, with matrix units for bfloat16: queries of all heads that share one of
// keys meet a key together. Weights are the sum of two bfloat16 numbers, so that their rounding is no more than float32's
// sums lose anyway.
#pragma once

#include "avx512.h"
#include "exp_kernel.h"
#include "layout.h"

namespace matgptq {
namespace {

constexpr int64_t kTileSide = 16;       // rows of a tile, and float32 sums in one
constexpr int64_t kTileFactors = 32;    // bfloat16 numbers in a row of one
constexpr int64_t kTileBytes = 1 << 10;
constexpr int kTilesTogether = 4;       // of queries, or of sums

// Where the parts of TokenAttention::memory begin.
struct TokenMemory {
    int64_t rows, span;  // queries and positions, as multiples of a tile's side and of its factors
    int64_t queries, scores, keys, values, sums, totals, end;

    explicit TokenMemory(const TokenAttention& job)
        : rows(ceil_div(job.tokens * job.queries, kTileSide) * kTileSide),
          span(ceil_div(job.length + job.tokens - 1, kTileFactors) * kTileFactors) {
        queries = 0;
        scores = queries + rows * job.size * 2;
        keys = scores + rows * span * 4;
        values = keys + job.size / kTileFactors * kTileBytes;
        sums = values + span / kTileFactors * (job.size / kTileSide) * kTileBytes;
        totals = sums + kTilesTogether * kTileBytes;
        end = totals + rows * 4;
    }
};

int64_t token_attention_bytes(const TokenAttention& job) { return TokenMemory(job).end; }

// 16 rows of 16 words each become columns.
MATGPTQ_INLINE void transpose(__m512i* rows) {
    __m512i pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; ++half) {
            fours[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
            fours[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
        }
    // fours[4 r + c], lane l: column 4 l + c of rows 4 r to 4 r + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
    }
}

// Tiles [size / 32] of the keys of 16 positions from `first` on: pairs of elements, and the positions beside each other.
void pack_keys(const TokenAttention& job, int64_t positions, int64_t first, uint8_t* tiles) {
    const int64_t there = positions - first;
    for (int64_t i = 0; i < job.size; i += kTileFactors, tiles += kTileBytes) {
        __m512i rows[16];
        for (int t = 0; t < 16; ++t)
            rows[t] = t < there ? _mm512_loadu_si512(job.keys + (first + t) * job.key_bytes + i * 2)
                                : _mm512_setzero_si512();
        transpose(rows);
        for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(tiles + pair * 64, rows[pair]);
    }
}

// Tiles [size / 16] of the values of 32 positions from `first` on: pairs of positions, and the elements beside each other.
void pack_values(const TokenAttention& job, int64_t positions, int64_t first, uint8_t* tiles) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t pair = 0; pair < kTileSide; ++pair) {
        const int64_t at = first + 2 * pair;
        const uint8_t* const row = job.values + at * job.value_bytes;
        for (int64_t i = 0; i < job.size; i += kTileFactors) {
            const __m512i one = at < positions ? _mm512_loadu_si512(row + i * 2) : _mm512_setzero_si512();
            const __m512i next =
                at + 1 < positions ? _mm512_loadu_si512(row + job.value_bytes + i * 2) : _mm512_setzero_si512();
            uint8_t* const to = tiles + i / kTileSide * kTileBytes + pair * 64;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(one, low, next));
            _mm512_store_si512(to + kTileBytes, _mm512_permutex2var_epi16(one, high, next));
        }
    }
}

// Scores of some tiles of queries with 16 positions.
template <int Tiles>
MATGPTQ_INLINE void score_tiles(const uint8_t* queries, const uint8_t* keys, int64_t size, float* scores, int64_t span) {
    const int64_t row_bytes = size * 2, tile_bytes = kTileSide * row_bytes;
    _tile_zero(0);
    if constexpr (Tiles > 1) _tile_zero(1);
    if constexpr (Tiles > 2) _tile_zero(2);
    if constexpr (Tiles > 3) _tile_zero(3);
    for (int64_t i = 0; i < size; i += kTileFactors, queries += 64, keys += kTileBytes) {
        _tile_loadd(7, keys, 64);
        _tile_loadd(4, queries, row_bytes);
        _tile_dpbf16ps(0, 4, 7);
        if constexpr (Tiles > 1) {
            _tile_loadd(5, queries + tile_bytes, row_bytes);
            _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (Tiles > 2) {
            _tile_loadd(6, queries + 2 * tile_bytes, row_bytes);
            _tile_dpbf16ps(2, 6, 7);
        }
        if constexpr (Tiles > 3) {
            _tile_loadd(4, queries + 3 * tile_bytes, row_bytes);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, scores, span * 4);
    if constexpr (Tiles > 1) _tile_stored(1, scores + kTileSide * span, span * 4);
    if constexpr (Tiles > 2) _tile_stored(2, scores + 2 * kTileSide * span, span * 4);
    if constexpr (Tiles > 3) _tile_stored(3, scores + 3 * kTileSide * span, span * 4);
}

void score_positions(const uint8_t* queries, const uint8_t* keys, int64_t size, float* scores, int64_t rows, int64_t span) {
    for (int64_t left = rows / kTileSide; left > 0; left -= kTilesTogether) {
        if (left >= 4) score_tiles<4>(queries, keys, size, scores, span);
        else if (left == 3) score_tiles<3>(queries, keys, size, scores, span);
        else if (left == 2) score_tiles<2>(queries, keys, size, scores, span);
        else score_tiles<1>(queries, keys, size, scores, span);
        queries += kTilesTogether * kTileSide * size * 2;
        scores += kTilesTogether * kTileSide * span;
    }
}

// A row's scores become weights in their place, for each 32 positions the larger parts and then the smaller ones; their sum.
float weigh_tokens(float* row, int64_t seen, int64_t span, float scale_) {
    const __m512 scale = _mm512_set1_ps(scale_);
    const auto counts = [&](int64_t t) {
        return t + 16 <= seen ? static_cast<__mmask16>(0xffff)
                              : static_cast<__mmask16>(t < seen ? (1u << (seen - t)) - 1 : 0);
    };
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < seen; t += 16)
        top = _mm512_mask_max_ps(top, counts(t), _mm512_mul_ps(_mm512_loadu_ps(row + t), scale), top);
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < span; t += kTileFactors) {
        __m256i larger[2], smaller[2];
        for (int half = 0; half < 2; ++half) {
            const int64_t at = t + 16 * half;
            const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(row + at), scale);
            const __m512 e = _mm512_maskz_mov_ps(counts(at), exp_not_positive<Avx512>(_mm512_sub_ps(score, top)));
            total = _mm512_add_ps(total, e);
            const __m512i kept = _mm512_and_si512(_mm512_castps_si512(e), _mm512_set1_epi32(~0xffff));
            larger[half] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
            const __m512i rest = _mm512_castps_si512(_mm512_sub_ps(e, _mm512_castsi512_ps(kept)));
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(rest, 16), _mm512_set1_epi32(1));
            const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(0x7fff)), odd);
            smaller[half] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        }
        for (int half = 0; half < 2; ++half) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + t) + half, larger[half]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + t) + 2 + half, smaller[half]);
        }
    }
    return _mm512_reduce_add_ps(total);
}

// Sums of 16 queries and 32 elements, as four tiles: of the larger and of the smaller parts for each 16 elements.
void sum_tiles(const float* weights, int64_t span, const uint8_t* values, int64_t position_bytes, uint8_t* sums) {
    const uint8_t* part = reinterpret_cast<const uint8_t*>(weights);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < span; t += kTileFactors, part += 128, values += position_bytes) {
        _tile_loadd(4, part, span * 4);
        _tile_loadd(5, part + 64, span * 4);
        _tile_loadd(6, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, values + kTileBytes, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileBytes, 64);
    _tile_stored(2, sums + 2 * kTileBytes, 64);
    _tile_stored(3, sums + 3 * kTileBytes, 64);
}

// Between `begin(64, 16)` and `finish()`.
void attend_tokens(const TokenAttention& job) {
    const TokenMemory at(job);
    const int64_t size = job.size, rows = at.rows, span = at.span, count = job.tokens * job.queries;
    const int64_t positions = job.length + job.tokens - 1, token_bytes = job.queries * size * 2;
    uint8_t* const queries = job.memory + at.queries;
    float* const scores = reinterpret_cast<float*>(job.memory + at.scores);
    uint8_t *const keys = job.memory + at.keys, *const values = job.memory + at.values, *const sums = job.memory + at.sums;
    float* const totals = reinterpret_cast<float*>(job.memory + at.totals);
    for (int64_t token = 0; token < job.tokens; ++token)
        std::memcpy(queries + token * token_bytes, job.query + token * job.query_bytes, static_cast<size_t>(token_bytes));
    std::memset(queries + count * size * 2, 0, static_cast<size_t>((rows - count) * size * 2));
    for (int64_t t = 0; t < span; t += kTileSide) {
        pack_keys(job, positions, t, keys);
        score_positions(queries, keys, size, scores + t, rows, span);
    }
    for (int64_t row = 0; row < count; ++row)
        totals[row] = weigh_tokens(scores + row * span, job.length + row / job.queries, span, job.scale);
    const int64_t position_bytes = size / kTileSide * kTileBytes;
    for (int64_t t = 0; t < span; t += kTileFactors)
        pack_values(job, positions, t, values + t / kTileFactors * position_bytes);
    for (int64_t first = 0; first < count; first += kTileSide)
        for (int64_t i = 0; i < size; i += kTileFactors) {
            sum_tiles(scores + first * span, span, values + i / kTileSide * kTileBytes, position_bytes, sums);
            for (int64_t row = first; row < count && row < first + kTileSide; ++row) {
                const __m512 share = _mm512_set1_ps(1.0f / totals[row]);
                for (int half = 0; half < 2; ++half) {
                    const uint8_t* const from = sums + 2 * half * kTileBytes + (row - first) * 64;
                    const __m512 sum = _mm512_add_ps(_mm512_load_ps(from), _mm512_load_ps(from + kTileBytes));
                    _mm512_storeu_ps(job.out + row * size + i + half * kTileSide, _mm512_mul_ps(sum, share));
                }
            }
        }
}

}  // namespace
}  // namespace matgptq
