// A token through a transformer block, as two calls, and through all of them, as one: see matgptq.h.
#include <cstring>
#include <new>

#include "buffer.h"
#include "elements.h"
#include "matgptq.h"
#include "row_steps.h"
#include "threads.h"
#include "weight.h"

using namespace matgptq;

namespace {

using Vector = Buffer<uint8_t>;  // of the block's dtype

int64_t out_of(const matgptq_block& block, int product) { return block.products[product].weight->out_features; }

// The products first..last of x, side by side in y.
int multiply(const matgptq_block& block, int first, int last, const void* x, void* y, int num_threads) {
    matgptq_product products[3];
    int64_t total = 0;
    for (int i = first; i <= last; ++i) {
        matgptq_product& product = products[i - first] = block.products[i];
        product.y = static_cast<char*>(y) + total * element_bytes(block.dtype);
        product.y_stride = 0;  // one row
        total += out_of(block, i);
    }
    const int64_t in = block.products[first].weight->in_features;
    return matgptq_matmul(x, block.dtype, in, 1, in, products, last - first + 1, block.dtype, block.activations,
                          num_threads);
}

// A vector per head to the last of the positions; strides in elements.
void append(const void* vectors, void* positions, int64_t length, int64_t size, int64_t heads, int64_t head_stride,
            int64_t stride, int64_t bytes) {
    for (int64_t head = 0; head < heads; ++head)
        std::memcpy(static_cast<char*>(positions) + (head * head_stride + (length - 1) * stride) * bytes,
                    static_cast<const char*>(vectors) + head * size * bytes, static_cast<size_t>(size * bytes));
}

int refusal(const matgptq_block* block) {
    if (!block || (block->dtype != MATGPTQ_FLOAT32 && block->dtype != MATGPTQ_BFLOAT16)) return MATGPTQ_E_ARGUMENT;
    if (block->hidden < 1 || block->size < 2 || block->size % 2 || !block->first_norm || !block->second_norm)
        return MATGPTQ_E_ARGUMENT;
    for (const matgptq_product& product : block->products)
        if (!product.weight) return MATGPTQ_E_ARGUMENT;
    const int64_t heads = out_of(*block, MATGPTQ_QUERY), keys = out_of(*block, MATGPTQ_KEY), mlp = out_of(*block, MATGPTQ_UP);
    const int64_t hidden = block->hidden;
    const int64_t shapes[7][2] = {{heads, hidden}, {keys, hidden}, {keys, hidden}, {hidden, heads},
                                  {mlp, hidden},   {mlp, hidden},  {hidden, mlp}};
    for (int i = 0; i < 7; ++i)
        if (out_of(*block, i) != shapes[i][0] || block->products[i].weight->in_features != shapes[i][1])
            return MATGPTQ_E_SHAPE;
    return keys % block->size || heads % keys ? MATGPTQ_E_SHAPE : MATGPTQ_OK;
}

int finish(const matgptq_block* block, void* x, const void* query, const void* key, const void* value,
           const matgptq_kv_cache* cache, int64_t length, int num_threads) {
    try {
        const int dtype = block->dtype;
        const int64_t bytes = element_bytes(dtype), hidden = block->hidden, size = block->size;
        const int64_t heads = out_of(*block, MATGPTQ_QUERY) / size, key_heads = out_of(*block, MATGPTQ_KEY) / size;
        const int64_t mlp = out_of(*block, MATGPTQ_UP);
        Vector attended;
        if (key) {
            append(key, cache->keys, length, size, key_heads, cache->key_head_stride, cache->key_stride, bytes);
            append(value, cache->values, length, size, key_heads, cache->value_head_stride, cache->value_stride, bytes);
        }
        if (cache) {
            attended = allocate<uint8_t>(heads * size * bytes);
            if (const int status = matgptq_attend(query, cache->keys, cache->values, attended.get(), heads, key_heads, size,
                                                  length, cache->key_head_stride, cache->key_stride, cache->value_head_stride,
                                                  cache->value_stride, block->scale, dtype, num_threads))
                return status;
            query = attended.get();
        }
        const Vector update = allocate<uint8_t>(hidden * bytes), normed = allocate<uint8_t>(hidden * bytes);
        const Vector gate_up = allocate<uint8_t>(2 * mlp * bytes), product = allocate<uint8_t>(mlp * bytes);
        if (const int status = multiply(*block, MATGPTQ_OUTPUT, MATGPTQ_OUTPUT, query, update.get(), num_threads))
            return status;
        rms_norm(x, update.get(), block->second_norm, block->second_eps, normed.get(), 1, hidden, dtype);
        if (const int status = multiply(*block, MATGPTQ_GATE, MATGPTQ_UP, normed.get(), gate_up.get(), num_threads))
            return status;
        silu_product(gate_up.get(), gate_up.get() + mlp * bytes, product.get(), mlp, dtype);
        if (const int status = multiply(*block, MATGPTQ_DOWN, MATGPTQ_DOWN, product.get(), update.get(), num_threads))
            return status;
        add(x, update.get(), hidden, dtype);
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

}  // namespace

extern "C" int matgptq_block_start(const matgptq_block* block, const void* x, const void* cosine, const void* sine,
                                   void* qkv, int num_threads) {
    if (const int status = refusal(block)) return status;
    if (!x || !cosine || !sine || !qkv) return MATGPTQ_E_ARGUMENT;
    try {
        const int dtype = block->dtype;
        const int64_t bytes = element_bytes(dtype), size = block->size;
        const Vector normed = allocate<uint8_t>(block->hidden * bytes);
        // Without an update it does not write to x.
        rms_norm(const_cast<void*>(x), nullptr, block->first_norm, block->first_eps, normed.get(), 1, block->hidden, dtype);
        if (const int status = multiply(*block, MATGPTQ_QUERY, MATGPTQ_VALUE, normed.get(), qkv, num_threads)) return status;
        const int64_t heads = out_of(*block, MATGPTQ_QUERY) / size, key_heads = out_of(*block, MATGPTQ_KEY) / size;
        void* const key = static_cast<char*>(qkv) + heads * size * bytes;
        if (block->query_norm) rms_norm(qkv, nullptr, block->query_norm, block->query_eps, qkv, heads, size, dtype);
        if (block->key_norm) rms_norm(key, nullptr, block->key_norm, block->key_eps, key, key_heads, size, dtype);
        rotate(qkv, cosine, sine, heads + key_heads, size, dtype);
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

extern "C" int matgptq_block_finish(const matgptq_block* block, void* x, const void* query, const void* key,
                                    const void* value, const matgptq_kv_cache* cache, int64_t length, int num_threads) {
    if (const int status = refusal(block)) return status;
    if (!x || !query || (key && (!value || !cache))) return MATGPTQ_E_ARGUMENT;
    if (cache && (!cache->keys || !cache->values || length < 1)) return MATGPTQ_E_ARGUMENT;
    int status = MATGPTQ_OK;
    with_threads(num_threads, [&] { status = finish(block, x, query, key, value, cache, length, num_threads); });
    return status;
}

extern "C" int matgptq_blocks(const matgptq_block* const* blocks, int count, void* x, const void* cosine,
                              const void* sine, const matgptq_kv_cache* caches, int64_t length, int num_threads) {
    if (count < 0 || (count && (!blocks || !caches))) return MATGPTQ_E_ARGUMENT;
    for (int i = 0; i < count; ++i) {
        if (const int status = refusal(blocks[i])) return status;
        if (blocks[i]->dtype != blocks[0]->dtype) return MATGPTQ_E_ARGUMENT;
        if (blocks[i]->hidden != blocks[0]->hidden) return MATGPTQ_E_SHAPE;
    }
    int status = MATGPTQ_OK;
    with_threads(num_threads, [&] {
        try {
            for (int i = 0; i < count && !status; ++i) {
                const matgptq_block& block = *blocks[i];
                const int64_t query = out_of(block, MATGPTQ_QUERY), keys = out_of(block, MATGPTQ_KEY);
                const int64_t bytes = element_bytes(block.dtype);
                const Vector qkv = allocate<uint8_t>((query + 2 * keys) * bytes);
                const void* const key = qkv.get() + query * bytes;
                const void* const value = qkv.get() + (query + keys) * bytes;
                status = matgptq_block_start(&block, x, cosine, sine, qkv.get(), num_threads);
                if (!status) status = matgptq_block_finish(&block, x, qkv.get(), key, value, caches + i, length, num_threads);
            }
        } catch (const std::bad_alloc&) {
            status = MATGPTQ_E_MEMORY;
        }
    });
    return status;
}
