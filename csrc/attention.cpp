// Drives attention of one token: heads of keys over threads.
#include <new>

#include "buffer.h"
#include "elements.h"
#include "layout.h"
#include "matgptq.h"
#include "threads.h"

using namespace matgptq;

namespace {

// Below this, handing heads over costs more than their keys and values.
constexpr int64_t kBytesPerPiece = 64 << 10;

}  // namespace

extern "C" int matgptq_attend(const void* query, const void* keys, const void* values, void* out, int64_t heads,
                              int64_t key_heads, int64_t size, int64_t length, int64_t key_head_stride,
                              int64_t key_stride, int64_t value_head_stride, int64_t value_stride, float scale, int dtype,
                              int num_threads) {
    if (dtype != MATGPTQ_FLOAT32 && dtype != MATGPTQ_BFLOAT16) return MATGPTQ_E_ARGUMENT;
    if (heads < 1 || key_heads < 1 || heads % key_heads || length < 1 || size < 1 || size % MATGPTQ_ATTEND_UNIT)
        return MATGPTQ_E_ARGUMENT;
    if (!query || !keys || !values || !out) return MATGPTQ_E_ARGUMENT;
    try {
        const int64_t bytes = element_bytes(dtype), queries = heads / key_heads;
        const int64_t span = ceil_div(length, 16) * 16;
        const Buffer<float> scores = allocate<float>(heads * (span + size));
        const Buffer<float> result = allocate<float>(heads * size);
        const AttentionGroup group{static_cast<const uint8_t*>(query), static_cast<const uint8_t*>(keys),
                                   static_cast<const uint8_t*>(values), result.get(), scores.get(), queries, size, length,
                                   span, key_head_stride * bytes, key_stride * bytes, value_head_stride * bytes,
                                   value_stride * bytes, scale};
        const int64_t grain = 1 + kBytesPerPiece / (2 * length * size * bytes);
        parallel_for(key_heads, grain, num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t head = begin; head < end; ++head) kernels().attend[dtype == MATGPTQ_BFLOAT16](group, head);
        });
        for (int64_t i = 0; i < heads * size; ++i) write_float(out, dtype, i, result[static_cast<size_t>(i)]);
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}
