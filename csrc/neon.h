// NEON on AArch64: four rows per register, a tile in four parts. With the dot products of bytes where the compiler is told
// of them.
#pragma once

#include <arm_neon.h>

#include "layout.h"
#include "product_kernels.h"

namespace matgptq {
namespace {

struct Neon {
    static constexpr int kLanes = 4;
    static constexpr int kSweepVectors = 4;
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    using Mask = uint32x4_t;

    static MATGPTQ_INLINE Bytes load(const uint8_t* p) { return vld1q_u8(p); }
    static MATGPTQ_INLINE void store_bytes(uint8_t* p, Bytes v) { vst1q_u8(p, v); }
    template <int M>
    static MATGPTQ_INLINE Bytes mask(Bytes v) {
        return vandq_u8(v, vdupq_n_u8(M));
    }
    template <int K, int M>
    static MATGPTQ_INLINE Bytes shift_mask(Bytes v) {
        return mask<M>(vshrq_n_u8(v, K));
    }
    template <int K, int M>
    static MATGPTQ_INLINE void interleave(Bytes high, Bytes low, Bytes& first, Bytes& second) {
        const Bytes select = vdupq_n_u8(M);
        first = vbslq_u8(select, low, vshlq_n_u8(high, K));
        second = vbslq_u8(select, vshrq_n_u8(low, K), high);
    }
    static MATGPTQ_INLINE Bytes both(Bytes a, Bytes b) { return vandq_u8(a, b); }
    static MATGPTQ_INLINE Bytes add_carry(Bytes v, Bytes carry, Bytes full) {
        return vorrq_u8(veorq_u8(v, carry), full);
    }
    template <int Zero>
    static MATGPTQ_INLINE Bytes center(Bytes v) {
        return vsubq_u8(v, vdupq_n_u8(Zero));
    }
    static MATGPTQ_INLINE Ints zero() { return vdupq_n_s32(0); }
    // Levels are centred in `dot`, so no correction is due.
    template <int Bits>
    static MATGPTQ_INLINE Ints dot_start(const int32_t*) {
        return vdupq_n_s32(0);
    }
    template <int Bits>
    static MATGPTQ_INLINE Ints dot(Ints sum, Bytes u, const int8_t* x) {
        const int8x16_t level = vreinterpretq_s8_u8(center<(1 << (Bits - 1))>(u));
        int32_t four;
        std::memcpy(&four, x, 4);
        const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, level, xs);
#else
        // Single products reach 128 * 128, which int16 holds; their pairs are summed in int32.
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(level), vget_low_s8(xs)));
        const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(level), vget_high_s8(xs)));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
    static MATGPTQ_INLINE Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
    static MATGPTQ_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static MATGPTQ_INLINE Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
    static MATGPTQ_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
    static MATGPTQ_INLINE Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
    static MATGPTQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static MATGPTQ_INLINE Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
    static MATGPTQ_INLINE Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
    static MATGPTQ_INLINE Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
    static MATGPTQ_INLINE Floats ceil(Floats a) { return vrndpq_f32(a); }
    static MATGPTQ_INLINE Floats floor(Floats a) { return vrndmq_f32(a); }
    static MATGPTQ_INLINE Mask less(Floats a, Floats b) { return vcltq_f32(a, b); }
    static MATGPTQ_INLINE Floats select(Mask m, Floats a, Floats b) { return vbslq_f32(m, a, b); }
    static MATGPTQ_INLINE Floats broadcast(float v) { return vdupq_n_f32(v); }
    static MATGPTQ_INLINE Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
    static MATGPTQ_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
    static MATGPTQ_INLINE Floats load_half(const uint16_t* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    // Even and odd elements of 8 bfloat16.
    static MATGPTQ_INLINE void load_pairs(const uint8_t* p, Floats& even, Floats& odd) {
        const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(p));
        even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
        odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xFFFF0000u)));
    }
    // Of an integer n, given as n + 1.5 * 2^23.
    static MATGPTQ_INLINE Floats power_of_two(Floats shifted) {
        const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
        return vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(0x3F800000)));
    }
    // By halves: lanes i and i + 2, then the two.
    static MATGPTQ_INLINE float sum(Floats v) {
        const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static MATGPTQ_INLINE void sum_each(const Floats (&v)[4], float* out) {
        for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
    }
    static MATGPTQ_INLINE void store(float* p, Floats v) { vst1q_f32(p, v); }

    static MATGPTQ_INLINE void scale_chunk_row(const int8_t* levels, float scale, void* out, bool bfloat16) {
        scale_levels(levels, kChunkColumns, scale, out, bfloat16);
    }
    static MATGPTQ_INLINE void transpose_words(const uint8_t (*words)[kTileRows * 4], int8_t* out) {
        for (int row = 0; row < kTileRows; ++row)
            for (int k = 0; k < 8; ++k) std::memcpy(out + row * kChunkColumns + 4 * k, words[k] + 4 * row, 4);
    }
};

}  // namespace
}  // namespace matgptq
