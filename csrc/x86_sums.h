// The end of a sum over the lanes of a vector, the same for both lengths of x86 vectors.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace matgptq {
namespace {

// Lanes i and i + 4, then i and i + 2, then the two.
MATGPTQ_INLINE float sum_by_halves(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace matgptq
