// Packing of parent codes into bit planes, and where they live. The layout is specified in matgptq.h.
#include "weight.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "fields.h"
#include "threads.h"

namespace matgptq {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kDefaultBlock = 64 << 20;

int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

void* take_block(int64_t bytes, bool huge) {
    const size_t alignment = huge ? kHugePage : 64;
#if defined(_WIN32)
    return _aligned_malloc(static_cast<size_t>(bytes), alignment);
#else
    void* block = nullptr;
    if (posix_memalign(&block, alignment, static_cast<size_t>(bytes))) return nullptr;
#if defined(__linux__)
    if (huge) madvise(block, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    return block;
#endif
}

void free_block(void* block) {
#if defined(_WIN32)
    _aligned_free(block);
#else
    std::free(block);
#endif
}

// The float16 equal to `value`, if there is one.
bool to_half(float value, uint16_t* half) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000);
    const uint32_t magnitude = word & 0x7FFFFFFF;
    if (magnitude == 0) {
        *half = sign;
        return true;
    }
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    const uint32_t mantissa = magnitude & 0x7FFFFF;
    if (exponent > 15 || exponent < -24) return false;
    if (exponent >= -14) {
        if (mantissa & 0x1FFF) return false;
        *half = static_cast<uint16_t>(sign | (exponent + 15) << 10 | mantissa >> 13);
        return true;
    }
    const uint32_t full = mantissa | 0x800000;
    const int drop = 13 + (-14 - exponent);
    if (full & ((1u << drop) - 1)) return false;
    *half = static_cast<uint16_t>(sign | full >> drop);
    return true;
}

// Byte i of the result holds bit i of the eight input bytes (Hacker's Delight, 7-3).
uint64_t transpose_bits(uint64_t x) {
    uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
    x ^= t ^ (t << 7);
    t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
    x ^= t ^ (t << 14);
    t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
    return x ^ t ^ (t << 28);
}

// Eight bytes of a plane at a time; see fields.h.
struct Words {
    using Bytes = uint64_t;
    static constexpr uint64_t splat(int byte) { return 0x0101010101010101ull * static_cast<uint64_t>(byte); }
    template <int K, int M>
    static void interleave(Bytes high, Bytes low, Bytes& first, Bytes& second) {
        first = (low & splat(M)) | ((high << K) & ~splat(M));
        second = ((low >> K) & splat(M)) | (high & ~splat(M));
    }
};

using Arrange = void (*)(uint64_t*);
constexpr Arrange kArrange[kWidths] = {planes_to_fields<Words, 2>, planes_to_fields<Words, 3>, planes_to_fields<Words, 4>,
                                       planes_to_fields<Words, 5>, planes_to_fields<Words, 6>, planes_to_fields<Words, 7>,
                                       planes_to_fields<Words, 8>};

void pack_tile(const uint8_t* codes, int64_t codes_stride, const matgptq_weight& weight, uint8_t* planes,
               int64_t tile) {
    constexpr int words = kChunkBytes / 8;
    uint8_t table[256];
    for (int q = 0; q < 256; ++q)
        table[q] = weight.slice_bits ? slice_code(static_cast<uint8_t>(q), weight.slice_bits) : static_cast<uint8_t>(q);
    for (int64_t chunk = 0; chunk < weight.chunks; ++chunk) {
        uint8_t cut[kParentBits][kChunkBytes] = {};  // planes of the chunk
        const int64_t begin = chunk * kChunkColumns;
        for (int i = 0; i < kTileRows; ++i) {
            const int64_t row = tile * kTileRows + i;
            if (row >= weight.out_features) break;
            const int64_t left = weight.in_features - begin;
            const uint8_t* from = codes + row * codes_stride + begin;
            uint8_t row_codes[kChunkColumns] = {};
            for (int c = 0; c < kChunkColumns && c < left; ++c) row_codes[c] = table[from[c]];
            for (int b = 0; b < 4; ++b) {
                uint64_t eight = 0;
                for (int k = 0; k < 8; ++k) eight |= static_cast<uint64_t>(row_codes[4 * k + b]) << (8 * k);
                eight = transpose_bits(eight);
                for (int p = 0; p < weight.num_planes; ++p)
                    cut[p][4 * i + b] = static_cast<uint8_t>(eight >> (8 * (weight.num_planes - 1 - p)));
            }
        }
        if (weight.slice_bits)
            for (int w = 0; w < words; ++w) {
                uint64_t word[kParentBits];
                for (int p = 0; p < weight.num_planes; ++p) std::memcpy(word + p, cut[p] + 8 * w, 8);
                kArrange[weight.slice_bits - kMinBits](word);
                for (int p = 0; p < weight.num_planes; ++p) std::memcpy(cut[p] + 8 * w, word + p, 8);
            }
        uint8_t* to = planes + (tile * weight.chunks + chunk) * kChunkBytes;
        for (int p = 0; p < weight.num_planes; ++p) std::memcpy(to + p * weight.plane_stride, cut[p], kChunkBytes);
    }
}

}  // namespace

Blocks::~Blocks() {
    for (void* block : blocks_) free_block(block);
}

uint8_t* Blocks::take(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes = round_up(bytes, 64);
    if (bytes > left_) {
        // A small weight on its own would waste most of a huge page.
        const bool huge = bytes >= kHugePage / 2 || block_bytes_ > 0;
        const int64_t size = huge ? round_up(bytes > block_bytes_ ? bytes : block_bytes_, kHugePage) : bytes;
        void* block = take_block(size, huge);
        if (!block) return nullptr;
        blocks_.push_back(block);
        free_ = static_cast<uint8_t*>(block);
        left_ = size;
    }
    uint8_t* piece = free_;
    free_ += bytes;
    left_ -= bytes;
    taken_ += bytes;
    std::memset(piece, 0, static_cast<size_t>(bytes));
    return piece;
}

}  // namespace matgptq

using namespace matgptq;

WeightView matgptq_weight::view(int bits) const {
    WeightView view;
    view.planes = planes;
    view.plane_stride = plane_stride;
    view.chunks = chunks;
    view.groups = groups;
    view.group_chunks = groups == 1 ? chunks : group_size / kChunkColumns;
    view.block_chunks = 4;
    if (groups > 1)
        while (view.group_chunks % view.block_chunks) view.block_chunks /= 2;
    view.scales = scales[bits - kMinBits];
    return view;
}

extern "C" matgptq_arena* matgptq_arena_create(int64_t block_bytes) {
    try {
        return new matgptq_arena{std::make_shared<Blocks>(block_bytes > 0 ? block_bytes : kDefaultBlock)};
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

extern "C" void matgptq_arena_free(matgptq_arena* arena) { delete arena; }

extern "C" int64_t matgptq_arena_bytes(const matgptq_arena* arena) { return arena ? arena->blocks->taken() : 0; }

extern "C" int matgptq_pack(const uint8_t* codes, int64_t codes_stride, int64_t out_features, int64_t in_features,
                            int64_t group_size, int slice_bits, int num_widths, const int* widths,
                            const float* const* scales, matgptq_arena* arena, int num_threads, matgptq_weight** out) {
    if (!out) return MATGPTQ_E_ARGUMENT;
    *out = nullptr;
    if (!codes || !widths || !scales || out_features <= 0 || in_features <= 0 || num_widths <= 0)
        return MATGPTQ_E_ARGUMENT;
    if (slice_bits && (slice_bits < kMinBits || slice_bits > kParentBits)) return MATGPTQ_E_BITS;
    if (slice_bits && (num_widths != 1 || widths[0] != slice_bits)) return MATGPTQ_E_BITS;
    for (int i = 0; i < num_widths; ++i) {
        if (widths[i] < kMinBits || widths[i] > kParentBits) return MATGPTQ_E_BITS;
        if (!scales[i]) return MATGPTQ_E_ARGUMENT;
    }
    if (group_size <= 0 || (group_size != in_features && (group_size % kChunkColumns || in_features % group_size)))
        return MATGPTQ_E_GROUP;
    try {
        std::unique_ptr<matgptq_weight> weight(new matgptq_weight());
        weight->out_features = out_features;
        weight->in_features = in_features;
        weight->group_size = group_size;
        weight->tiles = ceil_div(out_features, kTileRows);
        weight->chunks = ceil_div(in_features, kChunkColumns);
        weight->groups = in_features / group_size;
        weight->slice_bits = slice_bits;
        weight->num_planes = slice_bits ? slice_bits : kParentBits;
        weight->plane_bytes = weight->tiles * weight->chunks * kChunkBytes;
        // Planes a multiple of 4 KB apart would fall into the same cache sets.
        weight->plane_stride = weight->plane_bytes + (weight->plane_bytes % 4096 ? 0 : 9 * 64);

        const int64_t scale_count = weight->tiles * weight->groups * kTileRows;
        bool half[kWidths];
        int source[kWidths];
        int64_t total = weight->num_planes * weight->plane_stride;
        for (int i = 0; i < num_widths; ++i) {
            source[i] = i;
            for (int j = 0; j < i; ++j)
                if (scales[j] == scales[i]) source[i] = source[j];
            if (source[i] != i) continue;
            half[i] = true;
            uint16_t ignored;
            for (int64_t k = 0; k < out_features * weight->groups && half[i]; ++k)
                half[i] = to_half(scales[i][k], &ignored);
            total += round_up(scale_count * (half[i] ? 2 : 4), 64);
        }
        weight->memory = arena ? arena->blocks : std::make_shared<Blocks>(0);
        uint8_t* memory = weight->memory->take(total);
        if (!memory) return MATGPTQ_E_MEMORY;
        weight->bytes = total;
        weight->planes = memory;
        parallel_for(weight->tiles, 4, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile) pack_tile(codes, codes_stride, *weight, memory, tile);
        });

        uint8_t* place = memory + weight->num_planes * weight->plane_stride;
        for (int i = 0; i < num_widths; ++i) {
            ScaleSet& set = weight->scales[widths[i] - kMinBits];
            if (source[i] != i) {
                set = weight->scales[widths[source[i]] - kMinBits];
                continue;
            }
            set.data = place;
            set.half = half[i];
            for (int64_t row = 0; row < out_features; ++row)
                for (int64_t g = 0; g < weight->groups; ++g) {
                    const float scale = scales[i][row * weight->groups + g];
                    const int64_t at = (row / kTileRows * weight->groups + g) * kTileRows + row % kTileRows;
                    if (half[i])
                        to_half(scale, reinterpret_cast<uint16_t*>(place) + at);
                    else
                        reinterpret_cast<float*>(place)[at] = scale;
                }
            place += round_up(scale_count * (half[i] ? 2 : 4), 64);
        }
        *out = weight.release();
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

extern "C" void matgptq_weight_free(matgptq_weight* weight) { delete weight; }

extern "C" int64_t matgptq_weight_bytes(const matgptq_weight* weight) {
    return weight ? weight->bytes : static_cast<int64_t>(MATGPTQ_E_ARGUMENT);
}

extern "C" int64_t matgptq_weight_bytes_read(const matgptq_weight* weight, int bits) {
    if (!weight) return MATGPTQ_E_ARGUMENT;
    if (!weight->serves(bits)) return MATGPTQ_E_BITS;
    const int64_t scale_bytes = weight->scales[bits - kMinBits].half ? 2 : 4;
    return weight->planes_read(bits) * weight->plane_bytes + weight->tiles * weight->groups * kTileRows * scale_bytes;
}
