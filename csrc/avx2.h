// AVX2 with FMA and F16C: eight rows per register, a tile in two parts. Where the compiler is told of them, with the dot
// products of VNNI and with GFNI.
#pragma once

#include <immintrin.h>

#include "layout.h"
#include "product_kernels.h"
#include "x86_vectors.h"

namespace matgptq {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    static constexpr int kSweepVectors = 2;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    using Mask = __m256;

    static MATGPTQ_INLINE Bytes load(const uint8_t* p) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
    }
    static MATGPTQ_INLINE void store_bytes(uint8_t* p, Bytes v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
    }
    template <int M>
    static MATGPTQ_INLINE Bytes splat() {
        return _mm256_set1_epi8(static_cast<char>(M));
    }
    template <int M>
    static MATGPTQ_INLINE Bytes mask(Bytes v) {
        return _mm256_and_si256(v, splat<M>());
    }
    template <int K, int M>
    static MATGPTQ_INLINE Bytes shift_mask(Bytes v) {
#if defined(__GFNI__)
        return _mm256_gf2p8affine_epi64_epi8(v, _mm256_set1_epi64x(shift_mask_matrix(K, M)), 0);
#else
        return mask<M>(_mm256_srli_epi16(v, K));
#endif
    }
    // Exchanging the odd fields of `low` with the even ones of `high` takes six steps; there is no three-input select.
    template <int K, int M>
    static MATGPTQ_INLINE void interleave(Bytes high, Bytes low, Bytes& first, Bytes& second) {
        const Bytes swap = mask<M>(_mm256_xor_si256(_mm256_srli_epi16(low, K), high));
        second = _mm256_xor_si256(high, swap);
        first = _mm256_xor_si256(low, _mm256_slli_epi16(swap, K));
    }
    static MATGPTQ_INLINE Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
    static MATGPTQ_INLINE Bytes add_carry(Bytes v, Bytes carry, Bytes full) {
        return _mm256_or_si256(_mm256_xor_si256(v, carry), full);
    }
    template <int Zero>
    static MATGPTQ_INLINE Bytes center(Bytes v) {
        return _mm256_sub_epi8(v, splat<Zero>());
    }
    static MATGPTQ_INLINE Ints zero() { return _mm256_setzero_si256(); }
    template <int Bits>
    static MATGPTQ_INLINE Ints dot_start(const int32_t* sum) {
        return _mm256_slli_epi32(_mm256_set1_epi32(*sum), Bits - 1);
    }
    template <int Bits>
    static MATGPTQ_INLINE Ints dot(Ints sum, Bytes u, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        const __m256i xs = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
        return _mm256_dpbusd_avx_epi32(sum, u, xs);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpbusd_epi32(sum, u, xs);
#else
        if constexpr (Bits < 8) {
            // Pairs reach 2 * 127 * 128 at most, which int16 holds.
            return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, xs), _mm256_set1_epi16(1)));
        } else {
            const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                                   _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
            const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(xs, 8));
            return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
        }
#endif
    }
    static MATGPTQ_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static MATGPTQ_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static MATGPTQ_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static MATGPTQ_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static MATGPTQ_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static MATGPTQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static MATGPTQ_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
    static MATGPTQ_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static MATGPTQ_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static MATGPTQ_INLINE Floats ceil(Floats a) { return _mm256_ceil_ps(a); }
    static MATGPTQ_INLINE Floats floor(Floats a) { return _mm256_floor_ps(a); }
    static MATGPTQ_INLINE Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    static MATGPTQ_INLINE Floats select(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
    static MATGPTQ_INLINE Floats broadcast(float v) { return _mm256_set1_ps(v); }
    static MATGPTQ_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
    static MATGPTQ_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
    static MATGPTQ_INLINE Floats load_half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    // Even and odd elements of 16 bfloat16.
    static MATGPTQ_INLINE void load_pairs(const uint8_t* p, Floats& even, Floats& odd) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
    // Of an integer n, given as n + 1.5 * 2^23.
    static MATGPTQ_INLINE Floats power_of_two(Floats shifted) {
        const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3F800000)));
    }
    static MATGPTQ_INLINE float sum(Floats v) { return sum_by_halves(v); }
    static MATGPTQ_INLINE void sum_each(const Floats (&v)[4], float* out) {
        __m128 four[4];
        for (int i = 0; i < 4; ++i) four[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
        _mm_storeu_ps(out, sum_by_halves(four[0], four[1], four[2], four[3]));
    }
    static MATGPTQ_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }

    static MATGPTQ_INLINE void scale_chunk_row(const int8_t* levels, float scale, void* out, bool bfloat16) {
        scale_levels(levels, kChunkColumns, scale, out, bfloat16);
    }
    static MATGPTQ_INLINE void transpose_words(const uint8_t (*words)[kTileRows * 4], int8_t* out) {
        for (int part = 0; part < 2; ++part)
            for (int half = 0; half < 2; ++half) {
                __m256i r[4];
                for (int i = 0; i < 4; ++i) r[i] = load(words[4 * half + i] + 32 * part);
                const __m256i ab0 = _mm256_unpacklo_epi32(r[0], r[1]), ab1 = _mm256_unpackhi_epi32(r[0], r[1]);
                const __m256i cd0 = _mm256_unpacklo_epi32(r[2], r[3]), cd1 = _mm256_unpackhi_epi32(r[2], r[3]);
                const __m256i row[4] = {_mm256_unpacklo_epi64(ab0, cd0), _mm256_unpackhi_epi64(ab0, cd0),
                                        _mm256_unpacklo_epi64(ab1, cd1), _mm256_unpackhi_epi64(ab1, cd1)};
                for (int i = 0; i < 4; ++i) {
                    int8_t* to = out + (8 * part + i) * kChunkColumns + 16 * half;
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(row[i]));
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * kChunkColumns),
                                     _mm256_extracti128_si256(row[i], 1));
                }
            }
    }
};

}  // namespace
}  // namespace matgptq
