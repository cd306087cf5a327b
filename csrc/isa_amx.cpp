// AVX-512 and the matrix units of Intel's Xeons from Sapphire Rapids on: many rows of activations meet in these, all else is
// AVX-512's.
#include "layout.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__GFNI__)

#include "attention_amx.h"
#include "avx512.h"

namespace matgptq {
namespace {

// Tile registers: two sets of sums, so that one is read while the other fills, and what is multiplied.
constexpr int kActivations = 6, kWeights = 7;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

void begin(int step, int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = static_cast<uint8_t>(rows);
        config.row_bytes[tile] = 64;
    }
    config.row_bytes[kActivations] = static_cast<uint16_t>(step);
    config.rows[kWeights] = static_cast<uint8_t>(step / 4);
    // GCC 12 takes only its first bytes to be read by that instruction.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

void finish() { _tile_release(); }

template <int Bits, bool Resident>
void unpack_blocks(const WeightView& weight, int64_t tile, int64_t block, int64_t blocks, int8_t* weights,
                   float* weight_scales) {
    const __m512 unit = _mm512_set1_ps(static_cast<float>(1 << (kParentBits - Bits)));
    for (int64_t b = block; b < block + blocks; ++b, weight_scales += kTileRows) {
        const int64_t group = b * weight.block_chunks / weight.group_chunks;
        const __m512 scale = load_scales<Avx512>(weight.scales, (tile * weight.groups + group) * kTileRows);
        _mm512_store_ps(weight_scales, _mm512_mul_ps(scale, unit));
        for (int64_t c = b * weight.block_chunks; c < (b + 1) * weight.block_chunks; ++c, weights += 8 * 64) {
            if (c >= weight.chunks) {  // behind the only group's last columns
                std::memset(weights, 0, 8 * 64);
                continue;
            }
            const int64_t at = (tile * weight.chunks + c) * kChunkBytes;
            prefetch<vectors_read<Bits, Resident>()>(weight, at);
            __m512i bytes[8];
            unpack<Avx512, Bits, Resident>(weight, at, bytes);
            for (int k = 0; k < 8; ++k)
                _mm512_store_si512(weights + 64 * k, Avx512::center<(1 << (Bits - 1))>(bytes[k]));
        }
    }
}

template <int Digits>
void quantize_rows(const float* x, int rows, int64_t columns, int step, int steps, int8_t* codes, float* scales) {
    const int64_t block = static_cast<int64_t>(step) * steps;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t b = 0; b < columns / block; ++b)
            scales[b * kMatrixRows + row] = block_digits<Digits>(
                x + row * columns + b * block, static_cast<int>(block), [&](int d, const int8_t* digits, int32_t) {
                    for (int s = 0; s < steps; ++s)
                        std::memcpy(codes + (((b * steps + s) * Digits + d) * kMatrixRows + row) * step,
                                    digits + s * step, static_cast<size_t>(step));
                });
}

// One block's integer products, of digit d into sums [d, 16, 16]. Registers are named by literals, which this needs twice.
#define MATGPTQ_BLOCK_SUMS(first, second, third)                                        \
    _tile_zero(first);                                                                  \
    if constexpr (Digits > 1) _tile_zero(second);                                       \
    if constexpr (Digits > 1) _tile_zero(third);                                        \
    for (int s = 0; s < steps; ++s, weights += 16 * step) {                             \
        _tile_loadd(7, weights, 64);                                                    \
        _tile_loadd(6, activations, step);                                              \
        _tile_dpbssd(first, 6, 7);                                                      \
        activations += 16 * step;                                                       \
        if constexpr (Digits > 1) {                                                     \
            _tile_loadd(6, activations, step);                                          \
            _tile_dpbssd(second, 6, 7);                                                 \
            _tile_loadd(6, activations + 16 * step, step);                              \
            _tile_dpbssd(third, 6, 7);                                                  \
            activations += 2 * 16 * step;                                               \
        }                                                                               \
    }                                                                                   \
    _tile_stored(first, sums, 64);                                                      \
    if constexpr (Digits > 1) _tile_stored(second, sums + 256, 64);                     \
    if constexpr (Digits > 1) _tile_stored(third, sums + 512, 64)

template <int Digits, int Set>
MATGPTQ_INLINE void block_sums(const int8_t* activations, const int8_t* weights, int step, int steps, int32_t* sums) {
    static_assert(Digits == 1 || Digits == 3);
    if constexpr (Set == 0) {
        MATGPTQ_BLOCK_SUMS(0, 1, 2);
    } else {
        MATGPTQ_BLOCK_SUMS(3, 4, 5);
    }
}

// As `product` ends a block: the same operations in the same order.
template <int Digits, int Rows>
MATGPTQ_INLINE void add_block(const int32_t* sums, const float* activation_scales, __m512 weight_scale, __m512* total) {
    each<Rows>([&](auto row) MATGPTQ_LAMBDA_INLINE {
        const int32_t* const of_row = sums + (Digits - 1) * 256 + row * kTileRows;
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(of_row));
        each<Digits - 1>([&](auto d) MATGPTQ_LAMBDA_INLINE {
            value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f),
                                    _mm512_cvtepi32_ps(_mm512_load_si512(of_row - (d + 1) * 256)));
        });
        const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(activation_scales[row]));
        total[row] = _mm512_add_ps(total[row], _mm512_mul_ps(value, scale));
    });
}

template <int Digits, int Rows>
void multiply(const MatrixProduct& job) {
    const int64_t activation_bytes = static_cast<int64_t>(job.steps) * Digits * kMatrixRows * job.step;
    const int64_t weight_bytes = static_cast<int64_t>(job.steps) * kTileRows * job.step;
    alignas(64) int32_t sums[2][Digits * 256];
    __m512 total[Rows];
    each<Rows>([&](auto row) MATGPTQ_LAMBDA_INLINE {
        total[row] = job.first ? _mm512_setzero_ps() : _mm512_load_ps(job.totals + row * kTileRows);
    });
    // A block's sums are finished while the units are at the next one's.
    const auto start = [&](int64_t b) MATGPTQ_LAMBDA_INLINE {
        const int8_t* const activations = job.activations + b * activation_bytes;
        const int8_t* const weights = job.weights + b * weight_bytes;
        if (b % 2 == 0)
            block_sums<Digits, 0>(activations, weights, job.step, job.steps, sums[0]);
        else
            block_sums<Digits, 1>(activations, weights, job.step, job.steps, sums[1]);
    };
    start(0);
    for (int64_t b = 0; b < job.blocks; ++b) {
        if (b + 1 < job.blocks) start(b + 1);
        add_block<Digits, Rows>(sums[b % 2], job.activation_scales + b * kMatrixRows,
                          _mm512_load_ps(job.weight_scales + b * kTileRows), total);
    }
    each<Rows>([&](auto row) MATGPTQ_LAMBDA_INLINE { _mm512_store_ps(job.totals + row * kTileRows, total[row]); });
}

void store(const float* totals, const MatrixTarget& to) {
    const __mmask16 there = static_cast<__mmask16>((1u << to.columns) - 1);
    char* y = static_cast<char*>(to.y);
    for (int row = 0; row < to.rows; ++row, y += to.row_bytes) {
        __m512 value = _mm512_load_ps(totals + row * kTileRows);
        if (to.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, to.bias));
        if (to.bfloat16)
            _mm256_mask_storeu_epi16(y, there, _mm512_castsi512_si256(Avx512::to_bfloat16(value, value)));
        else
            _mm512_mask_storeu_ps(y, there, value);
    }
}

MatrixKernels make_matrix_kernels() {
    MatrixKernels table{};
    table.begin = begin;
    table.finish = finish;
    each<kWidths>([&](auto w) {
        table.unpack[w][0] = unpack_blocks<kMinBits + w, false>;
        table.unpack[w][1] = unpack_blocks<kMinBits + w, true>;
    });
    table.quantize[0] = quantize_rows<1>;
    table.quantize[1] = quantize_rows<kDigits>;
    each<kMatrixRows / kMatrixRowStep>([&](auto i) {
        constexpr int rows = (i + 1) * kMatrixRowStep;
        table.multiply[0][i] = multiply<1, rows>;
        table.multiply[1][i] = multiply<kDigits, rows>;
    });
    table.store = store;
    table.attention_bytes = token_attention_bytes;
    table.attend = attend_tokens;
    return table;
}

}  // namespace

const Kernels* amx_kernels() {
    static const MatrixKernels matrix = make_matrix_kernels();
    static const Kernels table = [] {
        Kernels kernels = *avx512_kernels();
        kernels.name = "amx";
        kernels.matrix = &matrix;
        return kernels;
    }();
    return &table;
}

}  // namespace matgptq

#else

const matgptq::Kernels* matgptq::amx_kernels() { return nullptr; }

#endif
