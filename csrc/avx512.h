// AVX-512 with BW, VL, VNNI and GFNI (Ice Lake, Zen 4 and later): a tile's 16 rows in one register.
#pragma once

#include <immintrin.h>

#include "layout.h"
#include "product_kernels.h"
#include "x86_vectors.h"

namespace matgptq {
namespace {

struct Avx512 {
    static constexpr int kLanes = 16;
    static constexpr int kSweepVectors = 4;
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    using Mask = __mmask16;

    static MATGPTQ_INLINE Bytes load(const uint8_t* p) { return _mm512_load_si512(p); }
    static MATGPTQ_INLINE void store_bytes(uint8_t* p, Bytes v) { _mm512_store_si512(p, v); }
    template <int M>
    static MATGPTQ_INLINE Bytes splat() {
        return _mm512_set1_epi8(static_cast<char>(M));
    }
    template <int M>
    static MATGPTQ_INLINE Bytes mask(Bytes v) {
        return _mm512_and_si512(v, splat<M>());
    }
    template <int K, int M>
    static MATGPTQ_INLINE Bytes shift_mask(Bytes v) {
        return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(shift_mask_matrix(K, M)), 0);
    }
    // Bits that 16-bit shifts carry across bytes fall outside the mask.
    template <int K, int M>
    static MATGPTQ_INLINE void interleave(Bytes high, Bytes low, Bytes& first, Bytes& second) {
        first = _mm512_ternarylogic_epi64(splat<M>(), low, _mm512_slli_epi16(high, K), 0xCA);
        second = _mm512_ternarylogic_epi64(splat<M>(), _mm512_srli_epi16(low, K), high, 0xCA);
    }
    static MATGPTQ_INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
    static MATGPTQ_INLINE Bytes add_carry(Bytes v, Bytes carry, Bytes full) {
        return _mm512_ternarylogic_epi64(v, carry, full, 0xBE);  // (v ^ carry) | full
    }
    template <int Zero>
    static MATGPTQ_INLINE Bytes center(Bytes v) {
        return _mm512_sub_epi8(v, splat<Zero>());
    }
    static MATGPTQ_INLINE Ints zero() { return _mm512_setzero_si512(); }
    template <int Bits>
    static MATGPTQ_INLINE Ints dot_start(const int32_t* sum) {
        return _mm512_slli_epi32(_mm512_set1_epi32(*sum), Bits - 1);
    }
    template <int Bits>
    static MATGPTQ_INLINE Ints dot(Ints sum, Bytes u, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(four));
    }
    static MATGPTQ_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static MATGPTQ_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static MATGPTQ_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static MATGPTQ_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static MATGPTQ_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static MATGPTQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static MATGPTQ_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
    static MATGPTQ_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static MATGPTQ_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static MATGPTQ_INLINE Floats ceil(Floats a) {
        return _mm512_roundscale_ps(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    }
    static MATGPTQ_INLINE Floats floor(Floats a) {
        return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    }
    static MATGPTQ_INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static MATGPTQ_INLINE Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m, b, a); }
    static MATGPTQ_INLINE Floats broadcast(float v) { return _mm512_set1_ps(v); }
    static MATGPTQ_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    static MATGPTQ_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
    static MATGPTQ_INLINE Floats load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // Even and odd elements of 32 bfloat16.
    static MATGPTQ_INLINE void load_pairs(const uint8_t* p, Floats& even, Floats& odd) {
        const __m512i words = _mm512_loadu_si512(p);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    // Of an integer n, given as n + 1.5 * 2^23.
    static MATGPTQ_INLINE Floats power_of_two(Floats shifted) {
        const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3F800000)));
    }
    static MATGPTQ_INLINE float sum(Floats v) {
        return sum_by_halves(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
    }
    // In the order of `sum`: quarters 0 and 2, 1 and 3 of each, then these two, then inside of them.
    static MATGPTQ_INLINE void sum_each(const Floats (&v)[4], float* out) {
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xEE));
        const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xEE));
        const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
        const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x0E));
        const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x01));
        const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one)));
    }
    static MATGPTQ_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }

    static MATGPTQ_INLINE void scale_chunk_row(const int8_t* levels, float scale, void* out, bool bfloat16) {
        const __m512 factor = _mm512_set1_ps(scale);
        __m512 value[2];
        for (int half = 0; half < 2; ++half) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(levels + 16 * half));
            value[half] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), factor);
            if (!bfloat16) _mm512_storeu_ps(static_cast<char*>(out) + 64 * half, value[half]);
        }
        if (bfloat16) _mm512_storeu_si512(out, to_bfloat16(value[0], value[1]));
    }
    // Round half to even; NaN (an infinite scale times 0) keeps a mantissa bit.
    static MATGPTQ_INLINE __m512i to_bfloat16(__m512 low, __m512 high) {
        __m512i word[2] = {_mm512_castps_si512(low), _mm512_castps_si512(high)};
        for (auto& w : word) {
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
            const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(0x7FFF)), odd);
            const __m512 value = _mm512_castsi512_ps(w);
            const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
            w = _mm512_mask_or_epi32(rounded, nan, w, _mm512_set1_epi32(0x400000));
        }
        alignas(64) static const uint16_t upper_halves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                              23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                              45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        return _mm512_permutex2var_epi16(word[0], _mm512_load_si512(upper_halves), word[1]);
    }
    // 8 registers of 16 words to 16 rows of 8 words: 4x4 transposes inside 128-bit lanes, then each lane to its row.
    static MATGPTQ_INLINE void transpose_words(const uint8_t (*words)[kTileRows * 4], int8_t* out) {
        for (int half = 0; half < 2; ++half) {
            const __m512i a = _mm512_load_si512(words[4 * half]), b = _mm512_load_si512(words[4 * half + 1]);
            const __m512i c = _mm512_load_si512(words[4 * half + 2]), d = _mm512_load_si512(words[4 * half + 3]);
            const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
            const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
            const __m512i row[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0),
                                    _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
            for (int i = 0; i < 4; ++i) {
                int8_t* to = out + i * kChunkColumns + 16 * half;
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(row[i]));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * kChunkColumns), _mm512_extracti32x4_epi32(row[i], 1));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * kChunkColumns), _mm512_extracti32x4_epi32(row[i], 2));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 12 * kChunkColumns), _mm512_extracti32x4_epi32(row[i], 3));
            }
        }
    }
};

}  // namespace
}  // namespace matgptq
