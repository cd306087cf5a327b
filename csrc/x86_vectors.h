// What the instruction sets of x86 share.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace matgptq {
namespace {

// The end of a sum over lanes, the same for both lengths of vectors: lanes i and i + 4, then i and i + 2, then the two.
MATGPTQ_INLINE float sum_by_halves(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The same of a, b, c and d side by side, once four lanes of each are left.
MATGPTQ_INLINE __m128 sum_by_halves(__m128 a, __m128 b, __m128 c, __m128 d) {
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// The 8x8 bit matrix that makes gf2p8affine shift each byte right by `shift` and mask it: one step instead of two.
constexpr long long shift_mask_matrix(int shift, int mask) {
    unsigned long long matrix = 0;
    for (int bit = 0; bit < 8; ++bit)
        if ((mask >> bit & 1) && bit + shift < 8)
            matrix |= static_cast<unsigned long long>(1u << (bit + shift)) << (8 * (7 - bit));
    return static_cast<long long>(matrix);
}

}  // namespace
}  // namespace matgptq
