// Inside view of a weight, shared by packing and kernels. The layout itself is specified in matgptq.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Of the vector code that is compiled once per instruction set.
#define MATGPTQ_INLINE inline __attribute__((always_inline))
#define MATGPTQ_LAMBDA_INLINE __attribute__((always_inline))

namespace matgptq {

// use(0), ..., use(N - 1) with constants, for arrays that are to stay in registers: compilers unroll plain loops after
// they have decided about those.
template <class F, int... I>
MATGPTQ_INLINE void each_of(F&& use, std::integer_sequence<int, I...>) {
    (use(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
MATGPTQ_INLINE void each(F&& use) {
    each_of(use, std::make_integer_sequence<int, N>{});
}

constexpr int kTileRows = 16;
constexpr int kChunkColumns = 32;
constexpr int kChunkBytes = kTileRows * kChunkColumns / 8;
constexpr int kMinBits = 2;
constexpr int kParentBits = 8;
constexpr int kWidths = kParentBits - kMinBits + 1;
// Int8 digits that stand for one exact activation; see quantize_panel.
constexpr int kDigits = 3;
// A batch is cut into panels of 1, 2, 4 or 8 rows; the last one is padded with zeros. Exact rows have several sums each,
// which leaves registers for fewer of them.
constexpr int kPanelSizes = 4;
constexpr int kMaxPanel = 8;
constexpr int kMaxExactPanel = 4;
// What is asked for of a stream before it is needed.
constexpr int64_t kChunksAhead = 64;

// static: a copy compiled for one instruction set must not be linked into another.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline uint8_t slice_code(uint8_t q, int bits) {
    if (bits == kParentBits) return q;
    const int u = (q + (1 << (7 - bits))) >> (8 - bits);
    const int top = (1 << bits) - 1;
    return static_cast<uint8_t>(u < top ? u : top);
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31;
    const uint32_t mantissa = half & 1023;
    uint32_t word;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&word, &value, 4);
        word |= sign;
    } else if (exponent == 31) {
        word = sign | 0x7F800000 | mantissa << 13;
    } else {
        word = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    std::memcpy(&value, &word, 4);
    return value;
}

struct ScaleSet {
    const void* data = nullptr;  // [tiles, groups, 16], float or float16
    bool half = false;
};

// What kernels need to know of one weight at one width.
struct WeightView {
    const uint8_t* planes;  // most significant first; or fields, see fields.h
    int64_t plane_stride;   // bytes
    int64_t chunks;         // per tile
    int64_t groups;
    int64_t group_chunks;  // chunks per scale
    int64_t block_chunks;  // chunks per activation block: 1, 2 or 4, divides group_chunks unless there is one group
    ScaleSet scales;
};

// One panel of activations: x = scale * sum of digits[d] * 256^d.
struct Panel {
    const int8_t* codes;  // [columns/4, rows, digits, 4]
    const float* scales;  // [blocks, rows]
    const int32_t* sums;  // [blocks, rows, digits], of the codes, negative
};

// Products of the tiles [tile_begin, tile_end) with a panel, into out [tiles, rows, 16].
using ProductKernel = void (*)(const WeightView&, const Panel&, int64_t tile_begin, int64_t tile_end, float* out);
// Where a tile's chunk of weights goes: rows row_begin..row_end-1 of it, `count` of its 32 columns.
struct ChunkTarget {
    void* out;           // first of the rows
    int64_t row_bytes;   // from row to row
    int row_begin, row_end;
    int count;
    bool bfloat16;
};
// One tile's chunk times `scales` [16], in which the slice's own factor 2^(8-r) is included.
using DequantizeKernel = void (*)(const WeightView&, int64_t tile, int64_t chunk, const float* scales,
                                  const ChunkTarget&);
// x [rows, columns] to a panel; columns is a multiple of 32, blocks of `block` columns.
using QuantizeKernel = void (*)(const float* x, int rows, int64_t columns, int64_t block, int8_t* codes, float* scales,
                                int32_t* sums);

// Matrix units, where a processor has them, multiply the digits of 16 rows of activations and the codes of the 16 rows of a
// tile at once, `step` columns at a time: half of an activation block of 128 columns, else the whole.
constexpr int kMatrixRows = 16;
constexpr int kAttentionStep = 64;
constexpr int kMatrixRowStep = 4;  // fewer rows, in multiples of it, take less time
// Some blocks of columns of one panel and one tile.
struct MatrixProduct {
    const int8_t* activations;       // [blocks, steps, digits, 16, step]
    const float* activation_scales;  // [blocks, 16]
    const int8_t* weights;           // [blocks, steps, step/4, 16, 4]: u_r - 2^(r-1)
    const float* weight_scales;      // [blocks, 16], in which the slice's own factor 2^(8-r) is included
    int64_t blocks;
    int step, steps;  // columns, per block
    float* totals;    // [16 rows of activations, 16 rows of weights]
    bool first;       // else products are added to totals
};
// Where totals go, with `bias` (of the tile, or null).
struct MatrixTarget {
    void* y;
    int64_t row_bytes;  // from row to row
    int rows, columns;  // that there are
    const float* bias;
    bool bfloat16;
};
// Attention of neighbouring tokens of one sequence, of the queries that share one head of keys; bfloat16, distances in
// bytes.
struct TokenAttention {
    const uint8_t* query;  // [tokens, queries, size], tokens query_bytes apart
    int64_t query_bytes;
    const uint8_t *keys, *values;  // of that head
    int64_t key_bytes, value_bytes;
    float* out;       // [tokens, queries, size]
    uint8_t* memory;  // as many bytes as the kernel says, on a cache line
    int64_t tokens, queries, size;
    int64_t length;  // positions that the first token sees; each one more than the one before
    float scale;
};
struct MatrixKernels {
    // Prepares the calling thread for products of that step and so many rows; finish returns the units to others.
    void (*begin)(int step, int rows);
    void (*finish)();
    // Weights and their scales of `blocks` blocks of a tile, as in MatrixProduct.
    void (*unpack[kWidths][2])(const WeightView&, int64_t tile, int64_t block, int64_t blocks, int8_t* weights,
                                 float* weight_scales);
    // x [rows, columns], columns a multiple of the block, as in MatrixProduct; [exact ? 1 : 0].
    void (*quantize[2])(const float* x, int rows, int64_t columns, int step, int steps, int8_t* codes, float* scales);
    // The first rows alone; [exact ? 1 : 0][rows / kMatrixRowStep - 1].
    void (*multiply[2][kMatrixRows / kMatrixRowStep])(const MatrixProduct&);
    void (*store)(const float* totals, const MatrixTarget&);
    // Attention, behind `begin` with kAttentionStep and kMatrixRows; query, keys and values are not asked for.
    int64_t (*attention_bytes)(const TokenAttention&);
    void (*attend)(const TokenAttention&);
};

// Sum of the 64-bit words of a multiple of 256 bytes.
using ReadKernel = uint64_t (*)(const uint8_t* memory, int64_t bytes);

// A dense weight as it lies in memory.
constexpr int kDenseColumns = 32;  // multiplied together
struct DenseWeight {
    const uint8_t* rows;
    int64_t row_bytes;  // from row to row
    int64_t columns;
};
// x [panel rows, columns, padded] (rows x_step apart, in the order of load_halves) times the rows [row_begin, row_end),
// into out [panel rows, row_end - row_begin] (rows out_step apart).
using DenseKernel = void (*)(const DenseWeight&, int64_t row_begin, int64_t row_end, const float* x, int64_t x_step,
                             float* out, int64_t out_step);

// One token's attention; see matgptq_attend. Distances in bytes.
struct AttentionGroup {
    const uint8_t *query, *keys, *values;
    float* out;       // [queries, size]
    float* scores;    // room for [queries, span + size]
    int64_t queries;  // heads that share a head of keys
    int64_t size, length;
    int64_t span;  // length, as a multiple of 16
    int64_t key_head_bytes, key_bytes, value_head_bytes, value_bytes;
    float scale;
};
// Of the queries that share one head of keys.
using AttentionKernel = void (*)(const AttentionGroup&, int64_t key_head);

// An activation in place, for a multiple of 16 values.
using ActivationKernel = void (*)(float* x, int64_t size);

struct SweepPlan;
using SweepKernel = void (*)(const SweepPlan&, int64_t tile_begin, int64_t tile_end);
struct RefitTile;
using RefitKernel = void (*)(const RefitTile&);

struct Kernels {
    const char* name;
    ProductKernel product[kWidths][2][2][kPanelSizes];  // [bits - 2][resident ? 1 : 0][exact ? 1 : 0][log2 of rows]
    DequantizeKernel dequantize[kWidths][2];
    QuantizeKernel quantize[2];  // [exact ? 1 : 0]
    const MatrixKernels* matrix;  // or null
    ReadKernel read;
    DenseKernel dense[3][3];  // [dtype of the weight][log2 of panel rows]
    ActivationKernel activation[2];  // [matgptq_activation]
    AttentionKernel attend[2];  // [bfloat16 ? 1 : 0]
    SweepKernel sweep;
    int sweep_lanes;  // rows per vector of the sweep
    RefitKernel refit, forms;
    int refit_lanes;  // rows per vector
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dot_kernels();

const Kernels& kernels();

}  // namespace matgptq
