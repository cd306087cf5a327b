// The portable kernels: one row per "vector" of four bytes in a 32-bit word. Also what the SIMD kernels are compared
// with.
#include <cmath>

#include "kernel_table.h"

namespace matgptq {
namespace {

struct Scalar {
    static constexpr int kLanes = 1;
    static constexpr int kSweepVectors = 1;
    using Bytes = uint32_t;
    using Ints = int32_t;
    using Floats = float;
    using Mask = bool;

    static Bytes load(const uint8_t* p) {
        Bytes v;
        std::memcpy(&v, p, 4);
        return v;
    }
    static void store_bytes(uint8_t* p, Bytes v) { std::memcpy(p, &v, 4); }
    static constexpr uint32_t splat(int byte) { return 0x01010101u * static_cast<uint32_t>(byte); }
    template <int M>
    static Bytes mask(Bytes v) {
        return v & splat(M);
    }
    template <int K, int M>
    static Bytes shift_mask(Bytes v) {
        return (v >> K) & splat(M);
    }
    template <int K, int M>
    static void interleave(Bytes high, Bytes low, Bytes& first, Bytes& second) {
        first = (low & splat(M)) | ((high << K) & ~splat(M));
        second = ((low >> K) & splat(M)) | (high & ~splat(M));
    }
    static Bytes both(Bytes a, Bytes b) { return a & b; }
    static Bytes add_carry(Bytes v, Bytes carry, Bytes full) { return (v ^ carry) | full; }
    template <int Zero>
    static Bytes center(Bytes v) {
        Bytes out = 0;
        for (int i = 0; i < 4; ++i) out |= ((((v >> (8 * i)) & 255) - Zero) & 255) << (8 * i);
        return out;
    }
    static Ints zero() { return 0; }
    template <int Bits>
    static Ints dot_start(const int32_t* sum) {
        return *sum * (1 << (Bits - 1));
    }
    template <int Bits>
    static Ints dot(Ints sum, Bytes u, const int8_t* x) {
        for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>((u >> (8 * i)) & 255) * x[i];
        return sum;
    }
    static Ints add(Ints a, Ints b) { return a + b; }
    static Floats add(Floats a, Floats b) { return a + b; }
    static Floats subtract(Floats a, Floats b) { return a - b; }
    static Floats multiply(Floats a, Floats b) { return a * b; }
    static Floats divide(Floats a, Floats b) { return a / b; }
    static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
    static Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }
    static Floats min(Floats a, Floats b) { return a < b ? a : b; }
    static Floats max(Floats a, Floats b) { return a > b ? a : b; }
    static Floats ceil(Floats a) { return std::ceil(a); }
    static Floats floor(Floats a) { return std::floor(a); }
    static Mask less(Floats a, Floats b) { return a < b; }
    static Floats select(Mask m, Floats a, Floats b) { return m ? a : b; }
    static Floats broadcast(float v) { return v; }
    static Floats to_floats(Ints v) { return static_cast<float>(v); }
    static Floats load_floats(const float* p) { return *p; }
    static Floats load_half(const uint16_t* p) { return half_to_float(*p); }
    static void load_pairs(const uint8_t* p, Floats& even, Floats& odd) {
        uint32_t word;
        std::memcpy(&word, p, 4);
        const uint32_t low = word << 16, high = word & 0xFFFF0000u;
        std::memcpy(&even, &low, 4);
        std::memcpy(&odd, &high, 4);
    }
    static Floats power_of_two(Floats shifted) {
        uint32_t word;
        std::memcpy(&word, &shifted, 4);
        word = (word << 23) + 0x3F800000u;
        std::memcpy(&shifted, &word, 4);
        return shifted;
    }
    static float sum(Floats v) { return v; }
    static void sum_each(const Floats (&v)[4], float* out) { std::memcpy(out, v, sizeof v); }
    static void store(float* p, Floats v) { *p = v; }

    static void scale_chunk_row(const int8_t* levels, float scale, void* out, bool bfloat16) {
        scale_levels(levels, kChunkColumns, scale, out, bfloat16);
    }
    static void transpose_words(const uint8_t (*words)[kTileRows * 4], int8_t* out) {
        for (int row = 0; row < kTileRows; ++row)
            for (int k = 0; k < 8; ++k) std::memcpy(out + row * kChunkColumns + 4 * k, words[k] + 4 * row, 4);
    }
};

}  // namespace

const Kernels* scalar_kernels() {
    static const Kernels table = make_kernels<Scalar>("scalar");
    return &table;
}

}  // namespace matgptq
