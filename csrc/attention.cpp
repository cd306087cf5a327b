// Drives attention of tokens that are the last of their sequences: sequences and heads of keys over threads.
#include <atomic>
#include <new>

#include "buffer.h"
#include "elements.h"
#include "kv_caches.h"
#include "layout.h"
#include "matgptq.h"
#include "threads.h"

using namespace matgptq;

namespace {

// Below this, handing heads over costs more than their keys and values.
constexpr int64_t kBytesPerPiece = 64 << 10;

}  // namespace

extern "C" int matgptq_attend(const void* query, int64_t query_stride, int64_t sequences,
                              const matgptq_kv_cache* const* caches, int64_t layer, const int64_t* lengths, void* out,
                              int64_t heads, int64_t key_heads, int64_t size, float scale, int dtype, int num_threads) {
    if (dtype != MATGPTQ_FLOAT32 && dtype != MATGPTQ_BFLOAT16) return MATGPTQ_E_ARGUMENT;
    if (sequences < 1 || heads < 1 || key_heads < 1 || heads % key_heads) return MATGPTQ_E_ARGUMENT;
    if (size < 1 || size % MATGPTQ_ATTEND_UNIT) return MATGPTQ_E_ARGUMENT;
    if (!query || !out || !are_readable(caches, layer, lengths, sequences)) return MATGPTQ_E_ARGUMENT;
    int64_t longest = 0, positions = 0;
    for (int64_t i = 0; i < sequences; ++i) {
        if (lengths[i] > longest) longest = lengths[i];
        positions += lengths[i];
    }
    const int64_t bytes = element_bytes(dtype), queries = heads / key_heads;
    const int64_t grain = 1 + kBytesPerPiece / (2 * ceil_div(positions, sequences) * size * bytes);
    std::atomic<bool> out_of_memory{false};
    const auto attend = [&](int64_t begin, int64_t end) {
        const Buffer<float> scores = allocate<float>(queries * (ceil_div(longest, 16) * 16 + size));
        const Buffer<float> result = allocate<float>(queries * size);
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t sequence = piece / key_heads, head = piece % key_heads, length = lengths[sequence];
            const matgptq_kv_cache& cache = caches[sequence][layer];
            const AttentionGroup group{static_cast<const uint8_t*>(query) + sequence * query_stride * bytes,
                                       static_cast<const uint8_t*>(cache.keys), static_cast<const uint8_t*>(cache.values),
                                       result.get(), scores.get(), queries, size, length, ceil_div(length, 16) * 16,
                                       cache.key_head_stride * bytes, cache.key_stride * bytes,
                                       cache.value_head_stride * bytes, cache.value_stride * bytes, scale};
            kernels().attend[dtype == MATGPTQ_BFLOAT16](group, head);
            const int64_t at = piece * queries * size;
            for (int64_t i = 0; i < queries * size; ++i) write_float(out, dtype, at + i, result[static_cast<size_t>(i)]);
        }
    };
    // An exception must not leave a thread that is not the caller's.
    parallel_for(sequences * key_heads, grain, num_threads, [&](int64_t begin, int64_t end) {
        try {
            attend(begin, end);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    });
    return out_of_memory ? MATGPTQ_E_MEMORY : MATGPTQ_OK;
}
