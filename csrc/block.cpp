// Tokens through a transformer block, as two calls, and through all of them, as one: see matgptq.h.
#include <cstring>
#include <functional>
#include <new>

#include "buffer.h"
#include "elements.h"
#include "kv_caches.h"
#include "matgptq.h"
#include "row_steps.h"
#include "threads.h"
#include "weight.h"

using namespace matgptq;

namespace {

using Vector = Buffer<uint8_t>;  // of the block's dtype

int64_t out_of(const matgptq_block& block, int product) { return block.products[product].weight->out_features; }

// The products first..last of each row of x, side by side in y.
int multiply(const matgptq_block& block, int first, int last, const void* x, int64_t rows, void* y, int num_threads) {
    matgptq_product products[3];
    int64_t total = 0;
    for (int i = first; i <= last; ++i) {
        matgptq_product& product = products[i - first] = block.products[i];
        product.y = static_cast<char*>(y) + total * element_bytes(block.dtype);
        total += out_of(block, i);
    }
    for (int i = first; i <= last; ++i) products[i - first].y_stride = total;
    const int64_t in = block.products[first].weight->in_features;
    return matgptq_matmul(x, block.dtype, in, rows, in, products, last - first + 1, block.dtype, block.activations,
                          num_threads);
}

// Rows of less cost more to hand over than what is done to them between products.
constexpr int64_t kBytesPerPiece = 16 << 10;

// Rows that lie so many bytes apart.
struct Rows {
    void* data;
    int64_t stride_bytes;
    void* operator[](int64_t row) const { return static_cast<char*>(data) + row * stride_bytes; }
};

void for_rows(int64_t rows, int64_t row_bytes, int num_threads, const std::function<void(int64_t)>& step) {
    parallel_for(rows, 1 + kBytesPerPiece / row_bytes, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) step(row);
    });
}

// A vector per head to the last position of a sequence; strides in elements.
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
    if (block->gate != MATGPTQ_SILU && block->gate != MATGPTQ_GELU_TANH) return MATGPTQ_E_ARGUMENT;
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

int finish(const matgptq_block* block, void* x_, int64_t sequences, const void* from, bool append_first,
           const matgptq_kv_cache* const* caches, int64_t layer, const int64_t* lengths, int num_threads) {
    try {
        const int dtype = block->dtype;
        const int64_t bytes = element_bytes(dtype), hidden = block->hidden, size = block->size;
        const int64_t query = out_of(*block, MATGPTQ_QUERY), keys = out_of(*block, MATGPTQ_KEY);
        const int64_t heads = query / size, key_heads = keys / size, mlp = out_of(*block, MATGPTQ_UP);
        Vector attended;
        if (append_first)
            for (int64_t i = 0; i < sequences; ++i) {
                const char* const key = static_cast<const char*>(from) + (i * (query + 2 * keys) + query) * bytes;
                const matgptq_kv_cache& cache = caches[i][layer];
                append(key, cache.keys, lengths[i], size, key_heads, cache.key_head_stride, cache.key_stride, bytes);
                append(key + keys * bytes, cache.values, lengths[i], size, key_heads, cache.value_head_stride,
                       cache.value_stride, bytes);
            }
        if (caches) {
            attended = allocate<uint8_t>(sequences * query * bytes);
            if (const int status = matgptq_attend(from, query + 2 * keys, sequences, caches, layer, lengths,
                                                  attended.get(), heads, key_heads, size, block->scale, dtype, num_threads))
                return status;
            from = attended.get();
        }
        const Vector update_ = allocate<uint8_t>(sequences * hidden * bytes);
        const Vector normed_ = allocate<uint8_t>(sequences * hidden * bytes);
        const Vector gate_up_ = allocate<uint8_t>(sequences * 2 * mlp * bytes);
        const Vector product_ = allocate<uint8_t>(sequences * mlp * bytes);
        const Rows x{x_, hidden * bytes}, update{update_.get(), hidden * bytes}, normed{normed_.get(), hidden * bytes};
        const Rows gate_up{gate_up_.get(), 2 * mlp * bytes}, product{product_.get(), mlp * bytes};
        if (const int status = multiply(*block, MATGPTQ_OUTPUT, MATGPTQ_OUTPUT, from, sequences, update[0], num_threads))
            return status;
        const bool from_one = block->norms_from_one != 0;
        for_rows(sequences, hidden * bytes, num_threads, [&](int64_t row) {
            if (block->attention_norm)
                rms_norm(update[row], nullptr, block->attention_norm, block->attention_eps, update[row], 1, hidden,
                         from_one, dtype);
            rms_norm(x[row], update[row], block->second_norm, block->second_eps, normed[row], 1, hidden, from_one, dtype);
        });
        if (const int status = multiply(*block, MATGPTQ_GATE, MATGPTQ_UP, normed[0], sequences, gate_up[0], num_threads))
            return status;
        for_rows(sequences, mlp * bytes, num_threads, [&](int64_t row) {
            gated_product(gate_up[row], static_cast<char*>(gate_up[row]) + mlp * bytes, product[row], mlp,
                          block->gate, dtype);
        });
        if (const int status = multiply(*block, MATGPTQ_DOWN, MATGPTQ_DOWN, product[0], sequences, update[0], num_threads))
            return status;
        for_rows(sequences, hidden * bytes, num_threads, [&](int64_t row) {
            if (block->mlp_norm)
                rms_norm(update[row], nullptr, block->mlp_norm, block->mlp_eps, update[row], 1, hidden, from_one, dtype);
            add(x[row], update[row], hidden, dtype);
        });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

}  // namespace

extern "C" int matgptq_block_start(const matgptq_block* block, const void* x_, int64_t sequences, const void* cosine_,
                                   const void* sine_, void* qkv_, int num_threads) {
    if (const int status = refusal(block)) return status;
    if (!x_ || sequences < 1 || !cosine_ || !sine_ || !qkv_) return MATGPTQ_E_ARGUMENT;
    try {
        const int dtype = block->dtype;
        const int64_t bytes = element_bytes(dtype), hidden = block->hidden, size = block->size;
        const int64_t query = out_of(*block, MATGPTQ_QUERY), keys = out_of(*block, MATGPTQ_KEY);
        const int64_t heads = query / size, key_heads = keys / size;
        const bool from_one = block->norms_from_one != 0;
        const Vector normed_ = allocate<uint8_t>(sequences * hidden * bytes);
        // Without an update the norm does not write to x; cosine and sine are only read.
        const Rows x{const_cast<void*>(x_), hidden * bytes}, normed{normed_.get(), hidden * bytes};
        const Rows cosine{const_cast<void*>(cosine_), size * bytes}, sine{const_cast<void*>(sine_), size * bytes};
        const Rows qkv{qkv_, (query + 2 * keys) * bytes};
        for_rows(sequences, hidden * bytes, num_threads, [&](int64_t row) {
            rms_norm(x[row], nullptr, block->first_norm, block->first_eps, normed[row], 1, hidden, from_one, dtype);
        });
        if (const int status = multiply(*block, MATGPTQ_QUERY, MATGPTQ_VALUE, normed[0], sequences, qkv_, num_threads))
            return status;
        for_rows(sequences, (query + keys) * bytes, num_threads, [&](int64_t row) {
            void* const queries = qkv[row];
            void* const key = static_cast<char*>(queries) + query * bytes;
            if (block->query_norm)
                rms_norm(queries, nullptr, block->query_norm, block->query_eps, queries, heads, size, from_one, dtype);
            if (block->key_norm)
                rms_norm(key, nullptr, block->key_norm, block->key_eps, key, key_heads, size, from_one, dtype);
            rotate(queries, cosine[row], sine[row], heads + key_heads, size, dtype);
        });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

extern "C" int matgptq_block_finish(const matgptq_block* block, void* x, int64_t sequences, const void* from, int append,
                                    const matgptq_kv_cache* const* caches, int64_t layer, const int64_t* lengths,
                                    int num_threads) {
    if (const int status = refusal(block)) return status;
    if (!x || sequences < 1 || !from || (append && !caches)) return MATGPTQ_E_ARGUMENT;
    if (caches && !are_readable(caches, layer, lengths, sequences)) return MATGPTQ_E_ARGUMENT;
    int status = MATGPTQ_OK;
    with_threads(num_threads, [&] {
        status = finish(block, x, sequences, from, append != 0, caches, layer, lengths, num_threads);
    });
    return status;
}

extern "C" int matgptq_blocks(const matgptq_block* const* blocks, int count, void* x, int64_t sequences,
                              const void* cosine, const void* sine, const matgptq_kv_cache* const* caches,
                              const int64_t* lengths, int num_threads) {
    if (count < 0 || sequences < 1 || (count && (!blocks || !caches))) return MATGPTQ_E_ARGUMENT;
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
                const int64_t total = out_of(block, MATGPTQ_QUERY) + 2 * out_of(block, MATGPTQ_KEY);
                const Vector qkv = allocate<uint8_t>(sequences * total * element_bytes(block.dtype));
                status = matgptq_block_start(&block, x, sequences, cosine, sine, qkv.get(), num_threads);
                if (!status)
                    status = matgptq_block_finish(&block, x, sequences, qkv.get(), 1, caches, i, lengths, num_threads);
            }
        } catch (const std::bad_alloc&) {
            status = MATGPTQ_E_MEMORY;
        }
    });
    return status;
}
