// Kernels for products and dequantization, written once over a small set of vector operations (`S`) and compiled once
// per instruction set. S provides: kLanes (int32 lanes, one matrix row each), Bytes / Ints / Floats, and the
// operations used below. kParts vectors cover the 16 rows of a tile.
#pragma once

#include <cstring>

#include "elements.h"
#include "layout.h"

namespace matgptq {
namespace {

// ---- bit planes to bytes ------------------------------------------------------------------------------------------
// A butterfly: planes are paired into 2-bit fields, those into nibbles, those into bytes. Per 512 weights it costs 18
// to 48 two-operand steps for 2 to 8 planes and needs no shuffles, so the ports that shuffle stay free and the same
// layout serves every vector length. nibbles[j] holds registers k = j (low nibble) and k = j + 4 (high nibble).
template <class S, int Count>
MATGPTQ_INLINE void planes_to_nibbles(const typename S::Bytes* plane, typename S::Bytes* nibbles) {
    using Bytes = typename S::Bytes;
    if constexpr (Count == 1) {
        nibbles[0] = S::template mask<0x11>(plane[0]);
        nibbles[1] = S::template shift_mask<1, 0x11>(plane[0]);
        nibbles[2] = S::template shift_mask<2, 0x11>(plane[0]);
        nibbles[3] = S::template shift_mask<3, 0x11>(plane[0]);
    } else if constexpr (Count == 2) {
        Bytes even, odd;
        S::template interleave<1, 0x55>(plane[0], plane[1], even, odd);
        nibbles[0] = S::template mask<0x33>(even);
        nibbles[2] = S::template shift_mask<2, 0x33>(even);
        nibbles[1] = S::template mask<0x33>(odd);
        nibbles[3] = S::template shift_mask<2, 0x33>(odd);
    } else {
        static_assert(Count == 3 || Count == 4, "");
        Bytes high_even, high_odd, low_even, low_odd;
        if constexpr (Count == 3) {
            high_even = S::template mask<0x55>(plane[0]);
            high_odd = S::template shift_mask<1, 0x55>(plane[0]);
        } else {
            S::template interleave<1, 0x55>(plane[0], plane[1], high_even, high_odd);
        }
        S::template interleave<1, 0x55>(plane[Count - 2], plane[Count - 1], low_even, low_odd);
        S::template interleave<2, 0x33>(high_even, low_even, nibbles[0], nibbles[2]);
        S::template interleave<2, 0x33>(high_odd, low_odd, nibbles[1], nibbles[3]);
    }
}

template <class S, int Planes>
MATGPTQ_INLINE void planes_to_bytes(const typename S::Bytes* plane, typename S::Bytes* bytes) {
    using Bytes = typename S::Bytes;
    if constexpr (Planes <= 4) {
        Bytes nibbles[4];
        planes_to_nibbles<S, Planes>(plane, nibbles);
        for (int j = 0; j < 4; ++j) {
            bytes[j] = S::template mask<0x0F>(nibbles[j]);
            bytes[j + 4] = S::template shift_mask<4, 0x0F>(nibbles[j]);
        }
    } else {
        Bytes high[4], low[4];
        planes_to_nibbles<S, Planes - 4>(plane, high);
        planes_to_nibbles<S, 4>(plane + Planes - 4, low);
        for (int j = 0; j < 4; ++j) S::template interleave<4, 0x0F>(high[j], low[j], bytes[j], bytes[j + 4]);
    }
}

template <int Bits, bool Resident>
constexpr int planes_read() {
    return Resident && Bits < kParentBits ? Bits + 1 : Bits;
}

template <class S, int Planes>
MATGPTQ_INLINE void load_planes(const WeightView& weight, int64_t offset, typename S::Bytes* plane) {
    for (int p = 0; p < Planes; ++p) plane[p] = S::load(weight.planes + p * weight.plane_stride + offset);
}

// Each plane is a stream of its own and hardware prefetchers stop at 4 KB, also inside a huge page.
constexpr int64_t kAhead = 64 * kChunkBytes;
template <int Planes>
MATGPTQ_INLINE void prefetch_planes(const WeightView& weight, int64_t offset, int64_t ahead = kAhead) {
    for (int p = 0; p < Planes; ++p)
        __builtin_prefetch(weight.planes + p * weight.plane_stride + offset + ahead, 0, 2);
}

// The planes of u_r, or with Signed of u_r - 2^(r-1) in two's complement, which has the first one inverted. Those of a
// resident parent are rounded here: its plane r is added to the number above it, which stays as it is where it is all
// ones. Two steps a plane, where bytes would take sixteen.
template <class S, int Bits, bool Resident, bool Signed = false>
MATGPTQ_INLINE void load_slice(const WeightView& weight, int64_t offset, typename S::Bytes* plane) {
    load_planes<S, planes_read<Bits, Resident>()>(weight, offset, plane);
    if constexpr (planes_read<Bits, Resident>() > Bits) {
        typename S::Bytes carry[Bits];
        carry[Bits - 1] = plane[Bits];
        for (int p = Bits - 1; p > 0; --p) carry[p - 1] = S::both(plane[p], carry[p]);
        const auto full = S::both(plane[0], carry[0]);
        for (int p = 1; p < Bits; ++p) plane[p] = S::add_carry(plane[p], carry[p], full);
        if constexpr (Signed) plane[0] = S::neither(plane[0], carry[0]);
        else plane[0] = S::add_carry(plane[0], carry[0], full);
    } else if constexpr (Signed) {
        plane[0] = S::neither(plane[0], plane[0]);
    }
}

// u_r of 32 columns: bytes[k] holds columns 4k..4k+3 of one row in each lane.
template <class S, int Bits, bool Resident>
MATGPTQ_INLINE void unpack(const WeightView& weight, int64_t offset, typename S::Bytes* bytes) {
    typename S::Bytes plane[kParentBits + 1];
    load_slice<S, Bits, Resident>(weight, offset, plane);
    planes_to_bytes<S, Bits>(plane, bytes);
}

template <class S>
MATGPTQ_INLINE typename S::Floats load_scales(const ScaleSet& scales, int64_t index) {
    return scales.half ? S::load_half(static_cast<const uint16_t*>(scales.data) + index)
                       : S::load_floats(static_cast<const float*>(scales.data) + index);
}

// ---- int8 activations ---------------------------------------------------------------------------------------------
template <class S, int Bits, bool Resident, int Rows>
void int8_product(const WeightView& weight, const Panel& panel, int64_t tile_begin, int64_t tile_end, float* out) {
    using Floats = typename S::Floats;
    using Ints = typename S::Ints;
    constexpr int parts = kTileRows / S::kLanes;
    constexpr int planes = planes_read<Bits, Resident>();
    constexpr int zero = 1 << (Bits - 1);
    // Enough independent sums to cover the latency of the dot product.
    constexpr int chains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
    const Floats unit = S::broadcast(static_cast<float>(1 << (kParentBits - Bits)));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        Floats total[parts][Rows];
        for (int part = 0; part < parts; ++part)
            for (int b = 0; b < Rows; ++b) total[part][b] = S::broadcast(0.0f);
        int64_t block = 0;
        int64_t offset = tile * weight.chunks * kChunkBytes;
        const int8_t* codes = panel.codes;
        for (int64_t group = 0; group < weight.groups; ++group) {
            const int64_t scale_index = (tile * weight.groups + group) * kTileRows;
            Floats scale[parts];
            for (int part = 0; part < parts; ++part)
                scale[part] = S::multiply(load_scales<S>(weight.scales, scale_index + part * S::kLanes), unit);
            for (int64_t left = weight.group_chunks; left > 0; left -= weight.block_chunks, ++block) {
                const int64_t chunks = left < weight.block_chunks ? left : weight.block_chunks;
                for (int part = 0; part < parts; ++part) {
                    Ints sum[Rows][chains];
                    each<Rows>([&](auto b) MATGPTQ_LAMBDA_INLINE {
                        sum[b][0] = S::dot_start(-zero * panel.block_sums[block * Rows + b]);
                        each<chains - 1>([&](auto i) MATGPTQ_LAMBDA_INLINE { sum[b][i + 1] = S::zero(); });
                    });
                    for (int64_t c = 0; c < chunks; ++c) {
                        const int64_t at = offset + c * kChunkBytes;
                        if (part == 0) prefetch_planes<planes>(weight, at);
                        typename S::Bytes bytes[8];
                        unpack<S, Bits, Resident>(weight, at + part * 4 * S::kLanes, bytes);
                        const int8_t* x = codes + c * kChunkColumns * Rows;
                        each<8>([&](auto k) MATGPTQ_LAMBDA_INLINE {
                            each<Rows>([&](auto b) MATGPTQ_LAMBDA_INLINE {
                                sum[b][k % chains] =
                                    S::template dot<Bits>(sum[b][k % chains], bytes[k], x + (k * Rows + b) * 4);
                            });
                        });
                    }
                    each<Rows>([&](auto b) MATGPTQ_LAMBDA_INLINE {
                        each<chains - 1>(
                            [&](auto i) MATGPTQ_LAMBDA_INLINE { sum[b][0] = S::add(sum[b][0], sum[b][i + 1]); });
                        const Floats step = S::multiply(scale[part], S::broadcast(panel.block_scales[block * Rows + b]));
                        // Not a fused multiply-add: the scalar kernel must give the same bits.
                        total[part][b] = S::add(total[part][b], S::multiply(S::to_floats(sum[b][0]), step));
                    });
                }
                offset += chunks * kChunkBytes;
                codes += chunks * kChunkColumns * Rows;
            }
        }
        for (int b = 0; b < Rows; ++b)
            for (int part = 0; part < parts; ++part)
                S::store(out + ((tile - tile_begin) * Rows + b) * kTileRows + part * S::kLanes, total[part][b]);
    }
}

// ---- exact activations --------------------------------------------------------------------------------------------
template <class S, int Bits, bool Resident, int Rows, int Chains>
MATGPTQ_INLINE void exact_chunk(const WeightView& weight, int64_t offset, const float* x, typename S::Floats* sum,
                                const typename S::Levels& levels) {
    if constexpr (S::kNibbleTable && Bits <= 4) {
        // A table look-up by nibble gives the level at once: the zero point is in the table.
        typename S::Bytes plane[kParentBits + 1], nibbles[4];
        load_slice<S, Bits, Resident>(weight, offset, plane);
        planes_to_nibbles<S, Bits>(plane, nibbles);
        for (int j = 0; j < 4; ++j)
            S::for_each_nibble(nibbles[j], levels, [&](int byte, int high, typename S::Floats level) {
                const float* at = x + (4 * (j + 4 * high) + byte) * Rows;
                for (int b = 0; b < Rows; ++b) {
                    auto& chain = sum[b * Chains + byte % Chains];
                    chain = S::fma(level, S::broadcast(at[b]), chain);
                }
            });
    } else {
        typename S::Bytes bytes[8];
        unpack<S, Bits, Resident>(weight, offset, bytes);
        for (int k = 0; k < 8; ++k)
            S::for_each_byte(bytes[k], levels, [&](int byte, typename S::Floats level) {
                const float* at = x + (4 * k + byte) * Rows;
                for (int b = 0; b < Rows; ++b) {
                    auto& chain = sum[b * Chains + byte % Chains];
                    chain = S::fma(level, S::broadcast(at[b]), chain);
                }
            });
    }
}

template <class S, int Bits, bool Resident, int Rows>
void exact_product(const WeightView& weight, const Panel& panel, int64_t tile_begin, int64_t tile_end, float* out) {
    using Floats = typename S::Floats;
    constexpr int parts = kTileRows / S::kLanes;
    constexpr int planes = planes_read<Bits, Resident>();
    constexpr int chains = Rows <= 2 ? 4 : Rows == 4 ? 2 : 1;
    const Floats unit = S::broadcast(static_cast<float>(1 << (kParentBits - Bits)));
    const typename S::Levels levels = S::template make_levels<Bits>();
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        Floats total[parts][Rows];
        for (int part = 0; part < parts; ++part)
            for (int b = 0; b < Rows; ++b) total[part][b] = S::broadcast(0.0f);
        int64_t offset = tile * weight.chunks * kChunkBytes;
        const float* x = panel.values;
        for (int64_t group = 0; group < weight.groups; ++group) {
            const int64_t scale_index = (tile * weight.groups + group) * kTileRows;
            // Sums are flushed per block also inside a long group: shorter float sums, smaller error.
            for (int64_t left = weight.group_chunks; left > 0; left -= weight.block_chunks) {
                const int64_t chunks = left < weight.block_chunks ? left : weight.block_chunks;
                for (int part = 0; part < parts; ++part) {
                    Floats sum[Rows * chains];
                    for (int i = 0; i < Rows * chains; ++i) sum[i] = S::broadcast(0.0f);
                    for (int64_t c = 0; c < chunks; ++c) {
                        const int64_t at = offset + c * kChunkBytes;
                        if (part == 0) prefetch_planes<planes>(weight, at);
                        exact_chunk<S, Bits, Resident, Rows, chains>(weight, at + part * 4 * S::kLanes,
                                                                     x + c * kChunkColumns * Rows, sum, levels);
                    }
                    const Floats scale =
                        S::multiply(load_scales<S>(weight.scales, scale_index + part * S::kLanes), unit);
                    for (int b = 0; b < Rows; ++b) {
                        Floats block = sum[b * chains];
                        for (int i = 1; i < chains; ++i) block = S::add(block, sum[b * chains + i]);
                        total[part][b] = S::fma(block, scale, total[part][b]);
                    }
                }
                offset += chunks * kChunkBytes;
                x += chunks * kChunkColumns * Rows;
            }
        }
        for (int b = 0; b < Rows; ++b)
            for (int part = 0; part < parts; ++part)
                S::store(out + ((tile - tile_begin) * Rows + b) * kTileRows + part * S::kLanes, total[part][b]);
    }
}

// ---- exact activations, one row, few planes -----------------------------------------------------------------------
// A level is a sum of signed bits, so a product is, plane by plane, the sum of those x whose bit is set. Four columns
// have 16 such sums: a table that depends on x alone, is made once per call and serves all rows and planes of a weight.
// A nibble of a plane as it lies in memory looks up four columns at once; 512 weights of r bits take 23 r steps, where
// exact_product takes 96 and the butterfly.
template <class S>
bool tabulate_panel(const float* x, int64_t columns, float* tables) {
    int32_t top = 0;
    for (int64_t i = 0; i < columns; ++i) {
        int32_t word;
        std::memcpy(&word, x + i, 4);
        word &= 0x7FFFFFFF;
        top = word > top ? word : top;
    }
    // Below 2^100 no partial sum overflows. NaN and infinity, which come out on top, must meet also the levels that are
    // 0, and sums leave those out.
    if (top >= 0x71800000) return false;
    // The columns of nibble 2b + h of a word are 16h + b + 4i.
    for (int64_t c = 0; c < columns; c += kChunkColumns)
        for (int nibble = 0; nibble < 8; ++nibble, tables += 16)
            S::store(tables, S::subset_sums(x + c + 16 * (nibble & 1) + nibble / 2));
    return true;
}

// Neighbouring tiles together: each table, which comes from the second-level cache, serves them all.
template <class S, int Bits, bool Resident, int Tiles>
MATGPTQ_INLINE void table_product(const WeightView& weight, const Panel& panel, int64_t tile, float* out) {
    static_assert(S::kLanes == kTileRows, "");
    using Floats = typename S::Floats;
    constexpr int planes = planes_read<Bits, Resident>();
    const int64_t tile_bytes = weight.chunks * kChunkBytes;
    Floats total[Tiles], place[Bits];
    // Place values of the planes in w_r. Multiplying by them at each look-up, not once per block, makes it a fused
    // multiply-add, which more units can do than a plain addition of 512 bits.
    for (int p = 0; p < Bits; ++p) place[p] = S::broadcast(static_cast<float>(p ? 128 >> p : -128));
    for (int t = 0; t < Tiles; ++t) total[t] = S::broadcast(0.0f);
    int64_t offset = tile * tile_bytes;
    // Near its end a tile's stream jumps over those that are read beside it.
    const int64_t jump = offset + tile_bytes - kAhead;
    const float* table = panel.tables;
    for (int64_t group = 0; group < weight.groups; ++group) {
        for (int64_t left = weight.group_chunks; left > 0; left -= weight.block_chunks) {
            const int64_t chunks = left < weight.block_chunks ? left : weight.block_chunks;
            Floats sum[Tiles][Bits];
            for (int t = 0; t < Tiles; ++t)
                for (int p = 0; p < Bits; ++p) sum[t][p] = S::broadcast(0.0f);
            for (int64_t c = 0; c < chunks; ++c, offset += kChunkBytes) {
                const int64_t ahead = offset < jump ? kAhead : kAhead + (Tiles - 1) * tile_bytes;
                typename S::Bytes plane[Tiles][kParentBits + 1];
                for (int t = 0; t < Tiles; ++t) {
                    prefetch_planes<planes>(weight, offset + t * tile_bytes, ahead);
                    load_slice<S, Bits, Resident, true>(weight, offset + t * tile_bytes, plane[t]);
                }
                for (int nibble = 0; nibble < 8; ++nibble, table += 16) {
                    const Floats sums = S::load_floats(table);
                    for (int t = 0; t < Tiles; ++t)
                        for (int p = 0; p < Bits; ++p) {
                            sum[t][p] = S::fma(S::look_up(plane[t][p], sums), place[p], sum[t][p]);
                            plane[t][p] = S::next_nibble(plane[t][p]);
                        }
                }
            }
            for (int t = 0; t < Tiles; ++t) {
                Floats block = sum[t][0];
                for (int p = 1; p < Bits; ++p) block = S::add(block, sum[t][p]);
                const int64_t scale_index = ((tile + t) * weight.groups + group) * kTileRows;
                total[t] = S::fma(block, load_scales<S>(weight.scales, scale_index), total[t]);
            }
        }
    }
    for (int t = 0; t < Tiles; ++t) S::store(out + t * kTileRows, total[t]);
}

template <class S, int Bits, bool Resident>
void exact_row(const WeightView& weight, const Panel& panel, int64_t tile_begin, int64_t tile_end, float* out) {
    if (!panel.tables) return exact_product<S, Bits, Resident, 1>(weight, panel, tile_begin, tile_end, out);
    int64_t tile = tile_begin;
    for (; tile + 2 <= tile_end; tile += 2, out += 2 * kTileRows)
        table_product<S, Bits, Resident, 2>(weight, panel, tile, out);
    if (tile < tile_end) table_product<S, Bits, Resident, 1>(weight, panel, tile, out);
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

// ---- activations to int8 ------------------------------------------------------------------------------------------
void quantize_panel(const float* x, int rows, int64_t columns, int64_t block, int8_t* codes, float* block_scales,
                    int32_t* block_sums) {
    alignas(64) int8_t rounded[128];
    for (int b = 0; b < rows; ++b) {
        const float* row = x + b * columns;
        int64_t index = 0;
        for (int64_t begin = 0; begin < columns; begin += block, ++index) {
            const int count = static_cast<int>(columns - begin < block ? columns - begin : block);
            const float* values = row + begin;
            // Magnitudes as integers: they order like the floats, and infinity and NaN come out on top.
            int32_t top = 0;
            for (int i = 0; i < count; ++i) {
                int32_t word;
                std::memcpy(&word, values + i, 4);
                word &= 0x7FFFFFFF;
                top = word > top ? word : top;
            }
            int32_t sum = 0;
            float scale;
            if (top >= 0x7F800000) {
                // An infinite x leaves sign * infinity for each weight; zeros beside it become NaN as 0 * inf should.
                for (int i = 0; i < count; ++i) {
                    rounded[i] = __builtin_isinf(values[i]) ? (values[i] > 0 ? 1 : -1) : 0;
                    sum += rounded[i];
                }
                std::memcpy(&scale, &top, 4);
            } else if (top < 0x0D800000) {  // 2^-100: 127 / amax would overflow
                scale = 0.0f;
                std::memset(rounded, 0, sizeof rounded);
            } else {
                float amax;
                std::memcpy(&amax, &top, 4);
                const float inverse = 127.0f / amax;
                scale = amax / 127.0f;
                for (int i = 0; i < count; ++i) {
                    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, in any vector length.
                    const float shifted = values[i] * inverse + 12582912.0f;
                    int32_t word;
                    std::memcpy(&word, &shifted, 4);
                    const int32_t code = word - 0x4B400000;
                    rounded[i] = static_cast<int8_t>(code);
                    sum += code;
                }
            }
            block_scales[index * rows + b] = scale;
            block_sums[index * rows + b] = sum;
            int8_t* to = codes + begin * rows + b * 4;
            if (rows == 1) {
                std::memcpy(to, rounded, static_cast<size_t>(count));
            } else {
                for (int i = 0; i < count; i += 4) std::memcpy(to + i * rows, rounded + i, 4);
            }
        }
    }
}

uint64_t read_words(const uint8_t* memory, int64_t bytes) {
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
    constexpr int w = Bits - kMinBits;
    constexpr int form = Resident ? 1 : 0;
    table.exact[w][form][0] = exact_product<S, Bits, Resident, 1>;
    table.exact[w][form][1] = exact_product<S, Bits, Resident, 2>;
    table.exact[w][form][2] = exact_product<S, Bits, Resident, 4>;
    table.exact[w][form][3] = exact_product<S, Bits, Resident, 8>;
    if constexpr (S::kNibbleTable && Bits <= kTableBits) table.exact[w][form][0] = exact_row<S, Bits, Resident>;
    table.int8[w][form][0] = int8_product<S, Bits, Resident, 1>;
    table.int8[w][form][1] = int8_product<S, Bits, Resident, 2>;
    table.int8[w][form][2] = int8_product<S, Bits, Resident, 4>;
    table.int8[w][form][3] = int8_product<S, Bits, Resident, 8>;
    table.dequantize[w][form] = dequantize_chunk<S, Bits, Resident>;
}

template <class S>
void fill_products(Kernels& table) {
    fill_width<S, 2, false>(table);
    fill_width<S, 3, false>(table);
    fill_width<S, 4, false>(table);
    fill_width<S, 5, false>(table);
    fill_width<S, 6, false>(table);
    fill_width<S, 7, false>(table);
    fill_width<S, 8, false>(table);
    fill_width<S, 2, true>(table);
    fill_width<S, 3, true>(table);
    fill_width<S, 4, true>(table);
    fill_width<S, 5, true>(table);
    fill_width<S, 6, true>(table);
    fill_width<S, 7, true>(table);
    // The parent itself is read the same way in both forms.
    table.dequantize[6][1] = table.dequantize[6][0];
    for (int i = 0; i < kPanelSizes; ++i) {
        table.exact[6][1][i] = table.exact[6][0][i];
        table.int8[6][1][i] = table.int8[6][0][i];
    }
    table.quantize = quantize_panel;
    if constexpr (S::kNibbleTable) table.tabulate = tabulate_panel<S>;
    table.read = read_words;
}

}  // namespace
}  // namespace matgptq
