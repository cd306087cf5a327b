// Drives attention of tokens that are the last of their sequences: tokens and heads of keys over threads.
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

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
// Tokens of a sequence that matrix units take together; with more there would be fewer pieces for threads.
constexpr int64_t kTokensTogether = 16;

// Neighbouring tokens of one sequence, or one token.
struct Run {
    int64_t first, tokens;
};

// What does not change during a call of matgptq_attend.
struct Attention {
    const uint8_t* query;
    int64_t query_bytes;
    const matgptq_kv_cache* const* caches;
    int64_t layer;
    const int64_t* lengths;
    void* out;
    int64_t key_heads, queries, size;
    float scale;
    int dtype;

    TokenAttention tokens(const Run& run, int64_t head) const {
        const int64_t bytes = element_bytes(dtype);
        const matgptq_kv_cache& cache = caches[run.first][layer];
        return {query + run.first * query_bytes + head * queries * size * bytes,
                query_bytes,
                static_cast<const uint8_t*>(cache.keys) + head * cache.key_head_stride * bytes,
                static_cast<const uint8_t*>(cache.values) + head * cache.value_head_stride * bytes,
                cache.key_stride * bytes,
                cache.value_stride * bytes,
                nullptr,
                nullptr,
                run.tokens,
                queries,
                size,
                lengths[run.first],
                scale};
    }

    void write(const float* result, int64_t token, int64_t head) const {
        const int64_t at = (token * key_heads + head) * queries * size;
        for (int64_t i = 0; i < queries * size; ++i) write_float(out, dtype, at + i, result[i]);
    }
};

void attend_alone(const Attention& all, int64_t token, int64_t head, float* scores, float* result) {
    const int64_t bytes = element_bytes(all.dtype), length = all.lengths[token];
    const matgptq_kv_cache& cache = all.caches[token][all.layer];
    const AttentionGroup group{all.query + token * all.query_bytes, static_cast<const uint8_t*>(cache.keys),
                               static_cast<const uint8_t*>(cache.values), result, scores, all.queries, all.size, length,
                               ceil_div(length, 16) * 16, cache.key_head_stride * bytes, cache.key_stride * bytes,
                               cache.value_head_stride * bytes, cache.value_stride * bytes, all.scale};
    kernels().attend[all.dtype == MATGPTQ_BFLOAT16](group, head);
    all.write(result, token, head);
}

std::vector<Run> find_runs(const Attention& all, int64_t sequences) {
    const bool together = all.dtype == MATGPTQ_BFLOAT16 && kernels().matrix;
    std::vector<Run> runs;
    for (int64_t i = 0; i < sequences; ++i) {
        const bool next = together && i && all.caches[i] == all.caches[i - 1] && all.lengths[i] == all.lengths[i - 1] + 1;
        if (next && runs.back().tokens < kTokensTogether) ++runs.back().tokens;
        else runs.push_back({i, 1});
    }
    return runs;
}

// Pieces, run by run and head by head.
void attend_pieces(const Attention& all, const std::vector<Run>& runs, int64_t begin, int64_t end) {
    int64_t floats = 0, bytes = 0;
    bool units = false;
    for (int64_t piece = begin; piece < end; ++piece) {
        const Run& run = runs[static_cast<size_t>(piece / all.key_heads)];
        const int64_t result = run.tokens * all.queries * all.size;
        if (run.tokens > 1) {
            units = true;
            floats = std::max(floats, result);
            bytes = std::max(bytes, kernels().matrix->attention_bytes(all.tokens(run, 0)));
        } else {
            const int64_t scores = all.queries * (ceil_div(all.lengths[run.first], 16) * 16 + all.size);
            floats = std::max(floats, result + scores);
        }
    }
    const Buffer<float> result = allocate<float>(floats);
    const Buffer<uint8_t> memory = allocate<uint8_t>(bytes);
    if (units) kernels().matrix->begin(kAttentionStep, kMatrixRows);
    for (int64_t piece = begin; piece < end; ++piece) {
        const Run& run = runs[static_cast<size_t>(piece / all.key_heads)];
        const int64_t head = piece % all.key_heads, of_token = all.queries * all.size;
        if (run.tokens == 1) {
            attend_alone(all, run.first, head, result.get() + of_token, result.get());
            continue;
        }
        TokenAttention job = all.tokens(run, head);
        job.out = result.get();
        job.memory = memory.get();
        kernels().matrix->attend(job);
        for (int64_t i = 0; i < run.tokens; ++i) all.write(result.get() + i * of_token, run.first + i, head);
    }
    if (units) kernels().matrix->finish();
}

}  // namespace

extern "C" int matgptq_attend(const void* query, int64_t query_stride, int64_t sequences,
                              const matgptq_kv_cache* const* caches, int64_t layer, const int64_t* lengths, void* out,
                              int64_t heads, int64_t key_heads, int64_t size, float scale, int dtype, int num_threads) {
    if (dtype != MATGPTQ_FLOAT32 && dtype != MATGPTQ_BFLOAT16) return MATGPTQ_E_ARGUMENT;
    if (sequences < 1 || heads < 1 || key_heads < 1 || heads % key_heads) return MATGPTQ_E_ARGUMENT;
    if (size < 1 || size % MATGPTQ_ATTEND_UNIT) return MATGPTQ_E_ARGUMENT;
    if (!query || !out || !are_readable(caches, layer, lengths, sequences)) return MATGPTQ_E_ARGUMENT;
    const int64_t bytes = element_bytes(dtype);
    const Attention all{static_cast<const uint8_t*>(query), query_stride * bytes, caches, layer, lengths, out, key_heads,
                        heads / key_heads, size, scale, dtype};
    try {
        const std::vector<Run> runs = find_runs(all, sequences);
        const auto count = static_cast<int64_t>(runs.size());
        const int64_t positions = std::accumulate(lengths, lengths + sequences, int64_t{0});
        const int64_t grain = 1 + kBytesPerPiece / (2 * ceil_div(positions, count) * size * bytes);
        parallel_for(count * key_heads, grain, num_threads,
                     [&](int64_t begin, int64_t end) { attend_pieces(all, runs, begin, end); });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}
