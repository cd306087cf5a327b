// Kernels for products and dequantization, written once over a small set of vector operations (`S`) and compiled once
// per instruction set. S provides: kLanes (int32 lanes, one matrix row each), Bytes / Ints / Floats, and the
// operations used below; 16 / kLanes vectors cover the rows of a tile.
#pragma once

#include <cmath>
#include <cstring>

#include "elements.h"
#include "fields.h"
#include "layout.h"

namespace matgptq {
namespace {

// ---- a chunk of codes ---------------------------------------------------------------------------------------------
template <int Bits, bool Resident>
constexpr int vectors_read() {
    return Resident && Bits < kParentBits ? Bits + 1 : Bits;
}

// Each plane is a stream of its own and hardware prefetchers stop at 4 KB, also inside a huge page.
template <int Vectors>
MATGPTQ_INLINE void prefetch(const WeightView& weight, int64_t offset) {
    for (int p = 0; p < Vectors; ++p)
        __builtin_prefetch(weight.planes + p * weight.plane_stride + offset + kChunksAhead * kChunkBytes, 0, 2);
}

// u_r of 32 columns: bytes[k] holds columns 4k..4k+3 of one row in each lane.
template <class S, int Bits, bool Resident>
MATGPTQ_INLINE void unpack(const WeightView& weight, int64_t offset, typename S::Bytes* bytes) {
    constexpr int vectors = vectors_read<Bits, Resident>();
    typename S::Bytes v[kParentBits + 1];
    for (int p = 0; p < vectors; ++p) v[p] = S::load(weight.planes + p * weight.plane_stride + offset);
    if constexpr (vectors > Bits) {
        // A parent is rounded here: its plane r is added to the number above it, which stays as it is where it is all
        // ones. Two steps a plane, where bytes would take sixteen.
        typename S::Bytes carry[Bits];
        carry[Bits - 1] = v[Bits];
        for (int p = Bits - 1; p > 0; --p) carry[p - 1] = S::both(v[p], carry[p]);
        const auto full = S::both(v[0], carry[0]);
        for (int p = 0; p < Bits; ++p) v[p] = S::add_carry(v[p], carry[p], full);
    }
    if constexpr (Resident) planes_to_fields<S, Bits>(v);
    fields_to_bytes<S, Bits>(v, bytes);
}

template <class S>
MATGPTQ_INLINE typename S::Floats load_scales(const ScaleSet& scales, int64_t index) {
    return scales.half ? S::load_half(static_cast<const uint16_t*>(scales.data) + index)
                       : S::load_floats(static_cast<const float*>(scales.data) + index);
}

// ---- products -----------------------------------------------------------------------------------------------------
// Rows of activations as int8 digits in base 256, lowest first: one where they are rounded to 8 bits, else several. Sums of
// a block are integers, so that they are the same in any order; they meet in float, where multiplying by 256 is exact.
template <class S, int Bits, bool Resident, int Rows, int Digits>
void product(const WeightView& weight, const Panel& panel, int64_t tile_begin, int64_t tile_end, float* out) {
    using Floats = typename S::Floats;
    using Ints = typename S::Ints;
    constexpr int parts = kTileRows / S::kLanes;
    constexpr int lines = Rows * Digits;
    // Enough independent sums to cover the latency of the dot product.
    constexpr int chains = lines == 1 ? 4 : lines <= 4 ? 2 : 1;
    const Floats unit = S::broadcast(static_cast<float>(1 << (kParentBits - Bits)));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        Floats total[parts][Rows];
        for (int part = 0; part < parts; ++part)
            for (int b = 0; b < Rows; ++b) total[part][b] = S::broadcast(0.0f);
        int64_t offset = tile * weight.chunks * kChunkBytes;
        const int8_t* codes = panel.codes;
        const float* scales = panel.scales;
        const int32_t* sums = panel.sums;
        for (int64_t group = 0; group < weight.groups; ++group) {
            const int64_t scale_index = (tile * weight.groups + group) * kTileRows;
            Floats scale[parts];
            for (int part = 0; part < parts; ++part)
                scale[part] = S::multiply(load_scales<S>(weight.scales, scale_index + part * S::kLanes), unit);
            for (int64_t left = weight.group_chunks; left > 0; left -= weight.block_chunks) {
                const int64_t chunks = left < weight.block_chunks ? left : weight.block_chunks;
                for (int part = 0; part < parts; ++part) {
                    Ints sum[lines][chains];
                    each<lines>([&](auto l) MATGPTQ_LAMBDA_INLINE {
                        sum[l][0] = S::template dot_start<Bits>(sums + l);
                        each<chains - 1>([&](auto i) MATGPTQ_LAMBDA_INLINE { sum[l][i + 1] = S::zero(); });
                    });
                    for (int64_t c = 0; c < chunks; ++c) {
                        const int64_t at = offset + c * kChunkBytes;
                        if (part == 0) prefetch<vectors_read<Bits, Resident>()>(weight, at);
                        typename S::Bytes bytes[8];
                        unpack<S, Bits, Resident>(weight, at + part * 4 * S::kLanes, bytes);
                        const int8_t* x = codes + c * kChunkColumns * lines;
                        each<8>([&](auto k) MATGPTQ_LAMBDA_INLINE {
                            each<lines>([&](auto l) MATGPTQ_LAMBDA_INLINE {
                                auto& chain = sum[l][k % chains];
                                chain = S::template dot<Bits>(chain, bytes[k], x + (k * lines + l) * 4);
                            });
                        });
                    }
                    each<lines>([&](auto l) MATGPTQ_LAMBDA_INLINE {
                        each<chains - 1>(
                            [&](auto i) MATGPTQ_LAMBDA_INLINE { sum[l][0] = S::add(sum[l][0], sum[l][i + 1]); });
                    });
                    each<Rows>([&](auto b) MATGPTQ_LAMBDA_INLINE {
                        Floats value = S::to_floats(sum[(b + 1) * Digits - 1][0]);
                        each<Digits - 1>([&](auto d) MATGPTQ_LAMBDA_INLINE {
                            value = S::fma(value, S::broadcast(256.0f), S::to_floats(sum[(b + 1) * Digits - 2 - d][0]));
                        });
                        const Floats step = S::multiply(scale[part], S::broadcast(scales[b]));
                        // Not a fused multiply-add: the scalar kernel must give the same bits.
                        total[part][b] = S::add(total[part][b], S::multiply(value, step));
                    });
                }
                offset += chunks * kChunkBytes;
                codes += chunks * kChunkColumns * lines;
                scales += Rows;
                sums += lines;
            }
        }
        for (int b = 0; b < Rows; ++b)
            for (int part = 0; part < parts; ++part)
                S::store(out + ((tile - tile_begin) * Rows + b) * kTileRows + part * S::kLanes, total[part][b]);
    }
}

// ---- dequantization -----------------------------------------------------------------------------------------------
MATGPTQ_INLINE void scale_levels(const int8_t* levels, int count, float scale, void* out, bool bfloat16) {
    if (!bfloat16) {
        float* to = static_cast<float*>(out);
        for (int i = 0; i < count; ++i) {
            const float value = static_cast<float>(levels[i]) * scale;
            std::memcpy(to + i, &value, 4);  // `out` may be unaligned
        }
        return;
    }
    unsigned char* to = static_cast<unsigned char*>(out);
    for (int i = 0; i < count; ++i) {
        const float value = static_cast<float>(levels[i]) * scale;
        const uint16_t half = to_bfloat16(value);
        std::memcpy(to + 2 * i, &half, 2);
    }
}

template <class S, int Bits, bool Resident>
void dequantize_chunk(const WeightView& weight, int64_t tile, int64_t chunk, const float* scales,
                      const ChunkTarget& target) {
    constexpr int parts = kTileRows / S::kLanes;
    alignas(64) uint8_t words[8][kTileRows * 4];
    alignas(64) int8_t levels[kTileRows * kChunkColumns];
    for (int part = 0; part < parts; ++part) {
        typename S::Bytes bytes[8];
        unpack<S, Bits, Resident>(weight, (tile * weight.chunks + chunk) * kChunkBytes + part * 4 * S::kLanes, bytes);
        for (int k = 0; k < 8; ++k)
            S::store_bytes(words[k] + part * 4 * S::kLanes, S::template center<(1 << (Bits - 1))>(bytes[k]));
    }
    S::transpose_words(words, levels);
    char* out = static_cast<char*>(target.out);
    for (int row = target.row_begin; row < target.row_end; ++row, out += target.row_bytes) {
        const int8_t* from = levels + row * kChunkColumns;
        if (target.count == kChunkColumns)
            S::scale_chunk_row(from, scales[row], out, target.bfloat16);
        else
            scale_levels(from, target.count, scales[row], out, target.bfloat16);
    }
}

// ---- activations to digits ----------------------------------------------------------------------------------------
// One digit: to 8 bits, the largest magnitude of a block being 127. Three: a fixed-point number of 23 bits and sign. Its
// scale is a power of two, so that nothing is rounded but what lies below the last digit: a bfloat16 from 2^14 below the
// largest on, a float32 as where float32 adds it to the largest.
// Of the `count` columns of one block of a row: gives its scale, and each digit's `digits` (of 128) to write(d, digits, the
// negative of their sum).
template <int Digits, class Write>
MATGPTQ_INLINE float block_digits(const float* values, int count, Write&& write) {
    alignas(64) int32_t number[128];
    alignas(64) int8_t digits[128];
    // Magnitudes as integers: they order like the floats, and infinity and NaN come out on top.
    int32_t top = 0;
    for (int i = 0; i < count; ++i) {
        int32_t word;
        std::memcpy(&word, values + i, 4);
        word &= 0x7FFFFFFF;
        top = word > top ? word : top;
    }
    float scale;
    if (top >= 0x7F800000) {
        // An infinite x leaves sign * infinity for each weight; zeros beside it become NaN as 0 * inf should.
        for (int i = 0; i < count; ++i) number[i] = __builtin_isinf(values[i]) ? (values[i] > 0 ? 1 : -1) : 0;
        std::memcpy(&scale, &top, 4);
    } else if (top < 0x0F800000) {  // 2^-96: scales would be subnormal, or their reciprocals overflow
        scale = 0.0f;
        std::memset(number, 0, sizeof number);
    } else {
        float inverse;
        if constexpr (Digits == 1) {
            float amax;
            std::memcpy(&amax, &top, 4);
            inverse = 127.0f / amax;
            scale = amax / 127.0f;
        } else {
            // The highest digit is at most 127, also when those below it are rounded up to it.
            const int32_t below = (top & 0x7FFFFF) < 0x7EFE00 ? 22 : 21;  // bits behind the leading one
            const int32_t exponent = (top >> 23) - 127;
            const int32_t down = (127 + exponent - below) << 23, up = (127 + below - exponent) << 23;
            std::memcpy(&scale, &down, 4);
            std::memcpy(&inverse, &up, 4);
        }
        for (int i = 0; i < count; ++i) number[i] = static_cast<int32_t>(std::rint(values[i] * inverse));
    }
    for (int d = 0; d < Digits; ++d) {
        int32_t sum = 0;
        for (int i = 0; i < count; ++i) {
            digits[i] = static_cast<int8_t>(number[i] & 255);
            sum -= digits[i];
            number[i] = (number[i] + 128) >> 8;  // what the digits above it stand for
        }
        write(d, digits, sum);
    }
    return scale;
}

template <int Digits>
void quantize_panel(const float* x, int rows, int64_t columns, int64_t block, int8_t* codes, float* scales,
                    int32_t* sums) {
    const int lines = rows * Digits;
    for (int b = 0; b < rows; ++b) {
        const float* row = x + b * columns;
        int64_t index = 0;
        for (int64_t begin = 0; begin < columns; begin += block, ++index) {
            const int count = static_cast<int>(columns - begin < block ? columns - begin : block);
            scales[index * rows + b] =
                block_digits<Digits>(row + begin, count, [&](int d, const int8_t* digits, int32_t sum) {
                    const int line = b * Digits + d;
                    sums[index * lines + line] = sum;
                    int8_t* to = codes + begin * lines + line * 4;
                    if (lines == 1) {
                        std::memcpy(to, digits, static_cast<size_t>(count));
                    } else {
                        for (int i = 0; i < count; i += 4) std::memcpy(to + i * lines, digits + i, 4);
                    }
                });
        }
    }
}

inline uint64_t read_words(const uint8_t* memory, int64_t bytes) {
    uint64_t sum[32] = {};
    for (int64_t i = 0; i < bytes; i += 256) {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(memory + i + 2048 + 64 * line, 0, 3);
        uint64_t words[32];
        std::memcpy(words, memory + i, 256);
        for (int k = 0; k < 32; ++k) sum[k] += words[k];
    }
    for (int k = 1; k < 32; ++k) sum[0] += sum[k];
    return sum[0];
}

// ---- table --------------------------------------------------------------------------------------------------------
template <class S, int Bits, bool Resident>
void fill_width(Kernels& table) {
    auto& kernel = table.product[Bits - kMinBits][Resident ? 1 : 0];
    kernel[0][0] = product<S, Bits, Resident, 1, 1>;
    kernel[0][1] = product<S, Bits, Resident, 2, 1>;
    kernel[0][2] = product<S, Bits, Resident, 4, 1>;
    kernel[0][3] = product<S, Bits, Resident, 8, 1>;
    kernel[1][0] = product<S, Bits, Resident, 1, kDigits>;
    kernel[1][1] = product<S, Bits, Resident, 2, kDigits>;
    kernel[1][2] = product<S, Bits, Resident, 4, kDigits>;
    table.dequantize[Bits - kMinBits][Resident ? 1 : 0] = dequantize_chunk<S, Bits, Resident>;
}

template <class S>
void fill_products(Kernels& table) {
    each<kWidths>([&](auto w) {
        fill_width<S, kMinBits + w, false>(table);
        fill_width<S, kMinBits + w, true>(table);
    });
    table.quantize[0] = quantize_panel<1>;
    table.quantize[1] = quantize_panel<kDigits>;
    table.read = read_words;
}

}  // namespace
}  // namespace matgptq
