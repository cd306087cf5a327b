/* matgptq: products with nested (Matryoshka) weights, and the solver's column sweep and scale search, on CPUs.
 *
 * This header is the specification. It knows nothing of Python or torch; all memory that crosses it belongs to the
 * caller except the two opaque types. Every function may be called from several threads at once; functions that take
 * `num_threads` run on the team that matgptq_set_team lent, or on a pool of the library's own that sleeps when idle
 * (0 or 1: the calling thread alone).
 *
 * A nested weight. Parent codes q are uint8 [out, in]. The slice of width r (2..8) is
 *     u_r(q) = min((q + 2^(7-r)) >> (8-r), 2^r - 1)  for r < 8,     u_8(q) = q
 * and stands for the weight  w_r = s_r * (u_r - 2^(r-1)) * 2^(8-r), with one float scale s_r per row and group of
 * `group_size` neighbouring input columns. Scales may be negative, zero or fractional, and may differ per width.
 *
 * Functions that return int give MATGPTQ_OK or a negative MATGPTQ_E_*; matgptq_message() puts it in words.
 */
#ifndef MATGPTQ_H
#define MATGPTQ_H

#include <stdint.h>

#if defined(_WIN32)
#define MATGPTQ_API __declspec(dllexport)
#else
#define MATGPTQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a signature or struct below changes. */
#define MATGPTQ_ABI_VERSION 12

enum matgptq_status {
    MATGPTQ_OK = 0,
    MATGPTQ_E_ARGUMENT = -1,   /* a null pointer, a negative size, an unknown enum value */
    MATGPTQ_E_BITS = -2,       /* width outside 2..8, or one this weight does not hold */
    MATGPTQ_E_GROUP = -3,      /* group_size is neither in_features nor a multiple of 32 that divides it */
    MATGPTQ_E_SHAPE = -4,      /* in_features of a product differs from that of x, or rows out of range */
    MATGPTQ_E_MEMORY = -5,     /* allocation failed */
    MATGPTQ_E_ISA = -6         /* the named instruction set is not compiled in or not on this CPU */
};

/* Of what crosses this interface; MATGPTQ_FLOAT16 of dense weights alone. */
enum matgptq_dtype { MATGPTQ_FLOAT32 = 0, MATGPTQ_BFLOAT16 = 1, MATGPTQ_FLOAT16 = 2 };

/* Activations are multiplied in blocks of columns: the group if it has 32, 64 or 128 columns, else the largest of 128, 64,
 * 32 that divides it (128 for one group per row; the last block may be shorter). Sums of a block are integers and thereby
 * exact; blocks are summed in float32, in one order. So results are equal to the bit on every instruction set. A block
 * whose largest magnitude is below 2^-96 reads as zero. NaN gives NaN, and infinity gives infinity or NaN. */
enum matgptq_activations {
    MATGPTQ_EXACT = 0, /* x enters as numbers of 23 bits and a sign, with one power of two per row and block: bfloat16 is
                          not rounded unless it is 2^14 times smaller than the largest of its block, float32 by at most
                          2^-22 of that largest one, which is what sums in float32 round by */
    MATGPTQ_INT8 = 1   /* x is rounded to int8 inside the call, symmetric, one float scale per row and block */
};

MATGPTQ_API int matgptq_abi_version(void);
MATGPTQ_API const char *matgptq_message(int status);

/* The instruction set in use: "amx" (avx512 with matrix units for many rows), "avx512", "avx_vnni", "avx2", "neon_dot",
 * "neon" or "scalar"; chosen at the first call, the best this CPU has. matgptq_set_isa forces one (for tests and
 * measurements); no other call may be running meanwhile. */
MATGPTQ_API const char *matgptq_isa(void);
MATGPTQ_API int matgptq_set_isa(const char *name);
/* "intel", "amd" or "other": who made this CPU, on which the speed of other libraries depends. */
MATGPTQ_API const char *matgptq_cpu_vendor(void);

/* Lend the threads of an OpenMP runtime: `team` calls work(data) on `num_threads` threads, the caller among them, and
 * returns when all are back; it has the signature of GOMP_parallel, which both libgomp and LLVM's runtime export. Threads
 * of two pools on the same processors wait for one another: those of OpenMP spin for milliseconds after each use. Null:
 * the library's own pool again. A forked child has its own pool in any case. No other call may be running meanwhile. */
typedef void (*matgptq_team)(void (*work)(void *data), void *data, unsigned num_threads, unsigned flags);
MATGPTQ_API void matgptq_set_team(matgptq_team team);

/* ---- memory ------------------------------------------------------------------------------------------------------
 * An arena hands out 64-byte aligned pieces of large blocks that are aligned to 2 MB and advised for huge pages
 * (4 KB pages cost a factor of 1.6 and more on cold weights). Weights keep the memory alive: the arena may be freed
 * first. Its blocks return to the system when the arena and all its weights are freed. */
typedef struct matgptq_arena matgptq_arena;
MATGPTQ_API matgptq_arena *matgptq_arena_create(int64_t block_bytes); /* 0: 64 MB blocks; NULL when out of memory */
MATGPTQ_API void matgptq_arena_free(matgptq_arena *arena);
MATGPTQ_API int64_t matgptq_arena_bytes(const matgptq_arena *arena); /* bytes handed out so far */

/* ---- weights -----------------------------------------------------------------------------------------------------
 * Two forms: the resident parent (8 bit planes; serves every width that it has scales for, a product of width r < 8
 * reads r+1 planes) and the packed slice (the r planes of u_r, already rounded; serves r alone).
 *
 * Layout, for readers of the kernels: rows in tiles of 16, columns in chunks of 32; both padded. Plane p (0 = most
 * significant) is one matrix-wide array; a tile's chunk is 64 bytes of it: 16 little-endian 32-bit words, one per
 * row, in which column 4k+b (k 0..7, b 0..3) is bit k of byte b. In a packed slice the planes of each chunk have exchanged
 * bits, so that they are whole fields of 2, 4 or 8 bits as far as there are (csrc/fields.h). Scales are [tiles, groups, 16],
 * float16 where every scale of a width is a float16 exactly, else float32. */
typedef struct matgptq_weight matgptq_weight;

/* codes:      uint8 [out_features, in_features], rows `codes_stride` bytes apart. Parent codes in both forms.
 * group_size: columns per scale: in_features, or a multiple of 32 that divides in_features.
 * slice_bits: 0 for the resident parent, else the one width (2..8) to keep.
 * num_widths, widths, scales: the widths served and, for each, float32 scales [out_features, in_features/group_size],
 *             contiguous; equal pointers are stored once. For a packed slice exactly one width, equal to slice_bits.
 * arena:      where to put it, or NULL for a block of its own.
 * out:        receives the weight; everything is copied, the inputs may go. */
MATGPTQ_API int matgptq_pack(const uint8_t *codes, int64_t codes_stride, int64_t out_features, int64_t in_features,
                             int64_t group_size, int slice_bits, int num_widths, const int *widths,
                             const float *const *scales, matgptq_arena *arena, int num_threads,
                             matgptq_weight **out);
MATGPTQ_API void matgptq_weight_free(matgptq_weight *weight);
/* Bytes that stay in memory for the weight. */
MATGPTQ_API int64_t matgptq_weight_bytes(const matgptq_weight *weight);
/* Bytes (planes and scales) that one product of width `bits` reads, or a negative status. */
MATGPTQ_API int64_t matgptq_weight_bytes_read(const matgptq_weight *weight, int bits);

/* ---- products ----------------------------------------------------------------------------------------------------
 * y = x * W_bits^T + bias for each product; all share x.
 * x:    [batch, in_features] of x_dtype, rows x_stride elements apart, any alignment that the type itself allows
 *       or none. batch may be 0.
 * y:    [batch, out_features] of y_dtype, rows y_stride elements apart. Must not overlap x.
 * bias: float32 [out_features] or NULL.
 * Non-finite activations propagate. */
typedef struct {
    const matgptq_weight *weight;
    int bits;
    const float *bias;
    void *y;
    int64_t y_stride;
} matgptq_product;

MATGPTQ_API int matgptq_matmul(const void *x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                               const matgptq_product *products, int num_products, int y_dtype, int activations,
                               int num_threads);

/* Rows row_begin..row_end-1 of W_bits into out [row_end-row_begin, in_features] of `dtype`, rows out_stride elements
 * apart. The product s * level is formed in float32 and rounded once. */
MATGPTQ_API int matgptq_dequantize(const matgptq_weight *weight, int bits, int64_t row_begin, int64_t row_end,
                                   void *out, int dtype, int64_t out_stride, int num_threads);

/* y = x * W^T + bias for a dense weight that is read as it lies in memory, such as an output head, for few rows of x.
 * x, y, bias: as above. W: [out_features, in_features] of weight_dtype, rows weight_stride elements apart, aligned to its
 * elements. Sums are float32, fused and in one order on every instruction set but the scalar one, which does not fuse
 * them. Non-finite values propagate. */
MATGPTQ_API int matgptq_dense(const void *x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                              const void *weight, int weight_dtype, int64_t weight_stride, int64_t out_features,
                              const float *bias, void *y, int y_dtype, int64_t y_stride, int num_threads);

/* Reads `bytes` bytes and returns the sum of their 64-bit words: the fastest read of memory that these kernels could
 * hope for, to state their speed as a share of it. */
MATGPTQ_API uint64_t matgptq_read(const void *memory, int64_t bytes, int num_threads);

/* ---- the solver's column sweep -----------------------------------------------------------------------------------
 * For every row on its own, and columns j = 0 .. in_features-1 in order, with copies r = 0 .. num_widths-1 (one shared
 * copy in the mean mode):
 *     x_r = base_r[j] + trail_r[j]
 *     q   = the code 0..255 that minimises  sum_r weights[r] * (x_r - s_r * (v_r(q) - 128))^2 ; the lowest of equals
 *     w_r = s_r * (v_r(q) - 128)
 *     c_r = x_r - w_r                     MATGPTQ_SWEEP_RESIDUAL (GPTQ)
 *         = w_r - base_r[j]               MATGPTQ_SWEEP_CHANGE   (coordinate descent)
 *         = x - mean over r of w_r        MATGPTQ_SWEEP_MEAN     (the published baseline)
 *     trail_r[k] -= c_r * coupling[j][k]  for k > j
 * where v_r(q) = u_r(q) * 2^(8-r). */
enum matgptq_sweep_mode { MATGPTQ_SWEEP_RESIDUAL = 0, MATGPTQ_SWEEP_CHANGE = 1, MATGPTQ_SWEEP_MEAN = 2 };

typedef struct {
    int64_t rows, in_features, num_groups;
    int num_widths;          /* 1..7 */
    const int *widths;       /* [num_widths], ascending, 2..8 */
    const float *weights;    /* [num_widths], not negative */
    const float *base;       /* [copies, rows, in]; copies = num_widths, or 1 in the mean mode */
    const float *trail;      /* [copies, rows, in] or NULL for zeros; not written */
    const float *coupling;   /* [in, in] row-major; only elements k > j of row j are read */
    const float *scales;     /* [num_widths, rows, num_groups], not zero */
    const int32_t *group_of; /* [in], group of each column in processing order */
    uint8_t *codes;          /* [rows, in], written */
    int mode;
    int num_threads;
} matgptq_sweep_job;

MATGPTQ_API int matgptq_sweep(const matgptq_sweep_job *job);

/* ---- the solver's scale search -----------------------------------------------------------------------------------
 * For every row and group, the candidate scale s (the first of equals) with the smallest
 *     s^2 * sum_j importance[j] * error(weight[j] / s),   j over the group's columns,
 * where error(p) = (p - mean_level[k])^2 + spread[k] on piece k: breakpoints[k-1] < p <= breakpoints[k]. */
typedef struct {
    int64_t rows, in_features, group_size;
    int num_candidates;
    int num_pieces;           /* 1..256 */
    const float *weight;      /* [rows, in_features] */
    const float *importance;  /* [in_features] */
    const float *candidates;  /* [num_candidates, rows, groups], not zero */
    const float *breakpoints; /* [num_pieces - 1], ascending */
    const float *mean_level;  /* [num_pieces] */
    const float *spread;      /* [num_pieces] */
    int32_t *best;            /* [rows, groups], written: index of the best candidate */
    int num_threads;
} matgptq_search_job;

MATGPTQ_API int matgptq_search_scales(const matgptq_search_job *job);

/* ---- the solver's refit ------------------------------------------------------------------------------------------
 * For every row with weights w, present slice c and difference d = w - c, and groups g, h of its columns, in float32:
 *     system[g][h] = sum over i in g, j in h of c_i H_ij c_j
 *     slope[g]     = sum over all i, j in g of d_i H_ij c_j
 *     error        = sum over all i, j of d_i H_ij d_j
 * Sums have one order, whatever the instruction set and the number of threads; all but the scalar code fuse them.
 * With `current` NULL only the errors are computed, in half of the time or less. */
typedef struct {
    int64_t rows, in_features, group_size;
    const float *difference; /* [rows, in_features] */
    const float *current;    /* [rows, in_features] or NULL */
    const float *hessian;    /* [in_features, in_features], symmetric */
    float *system;           /* [rows, groups, groups], written */
    float *slope;            /* [rows, groups], written */
    float *errors;           /* [rows], written */
    int num_threads;
} matgptq_refit_job;

MATGPTQ_API int matgptq_refit(const matgptq_refit_job *job);

/* ---- tokens through a transformer block ----------------------------------------------------------------------------
 * Between the products of a block there are some thirty small operations, which for one token take an interpreter longer
 * than the products of a small model. Here a block is two calls, between which keys and values join a cache; or all
 * blocks are one call, which writes them into it. One token of each of `sequences` sequences (1 or more) goes through,
 * x [sequences, hidden]; sequences are independent of one another, to the bit. Neighbouring ones may be tokens of one
 * sequence, with its cache and a length more each: keys and values of all are written before any of them attends, which they
 * may do together. Then a later one's value that is not finite reaches the earlier ones, too. */

/* Keys and values of a layer and a sequence: key heads x positions, distances in elements, rows of `size` adjacent ones. */
typedef struct {
    void *keys, *values;
    int64_t key_head_stride, key_stride, value_head_stride, value_stride;
} matgptq_kv_cache;

/* out = softmax(scale * query * keys^T) * values for one token of each sequence. query: [sequences, heads, size], sequences
 * query_stride elements apart; out: the same, contiguous. caches [sequences][layer + 1 or more], of which `layer` is read,
 * have key_heads heads and lengths [sequences] positions; heads is a multiple of key_heads, neighbouring heads share one of
 * them; size is a multiple of MATGPTQ_ATTEND_UNIT. Computed in float32 and rounded once; the order of sums depends on the
 * instruction set. */
#define MATGPTQ_ATTEND_UNIT 32
MATGPTQ_API int matgptq_attend(const void *query, int64_t query_stride, int64_t sequences,
                               const matgptq_kv_cache *const *caches, int64_t layer, const int64_t *lengths, void *out,
                               int64_t heads, int64_t key_heads, int64_t size, float scale, int dtype, int num_threads);

/* A block of the plain kind:  x += output(attention(rotary(query, key), value));  x += down(activation(gate) * up),  both
 * from an RMS norm of x, and what is added may go through a norm of its own. Vectors are of `dtype` and rounded to it where
 * transformers rounds them; products sum in float32. The struct and what it points to must stay as they are during a call,
 * and may serve several at once. */
enum matgptq_activation { MATGPTQ_SILU = 0, MATGPTQ_GELU_TANH = 1 };
enum { MATGPTQ_QUERY, MATGPTQ_KEY, MATGPTQ_VALUE, MATGPTQ_OUTPUT, MATGPTQ_GATE, MATGPTQ_UP, MATGPTQ_DOWN };
typedef struct {
    int dtype;
    int activations;
    int gate;              /* matgptq_activation */
    int norms_from_one;    /* not 0: all norms multiply by 1 + weight, and round only the result */
    int64_t hidden;        /* of x */
    int64_t size;          /* of a head; even */
    float scale;           /* of attention's scores */
    float first_eps, second_eps, query_eps, key_eps, attention_eps, mlp_eps;
    const void *first_norm, *second_norm;  /* [hidden], weights of the norms before attention and before the MLP */
    const void *query_norm, *key_norm;     /* [size], of norms of each head, or NULL */
    const void *attention_norm, *mlp_norm; /* [hidden], of norms of what attention and MLP add, or NULL */
    matgptq_product products[7];           /* y and y_stride are not read */
} matgptq_block;

/* qkv [sequences, heads + 2 * key heads, size] = query, key and value of x, side by side, the first two normed (if they
 * have norms) and rotated by cosine and sine [sequences, size]. */
MATGPTQ_API int matgptq_block_start(const matgptq_block *block, const void *x, int64_t sequences, const void *cosine,
                                    const void *sine, void *qkv, int num_threads);

/* The rest of the block: x in place. With caches (and layer and lengths, as for matgptq_attend) `from` is what
 * matgptq_block_start gave: its query attends, and if `append` is not 0 its keys and values are written to the last
 * positions before. Where caches is NULL, `from` [sequences, heads, size] is what attention gave. */
MATGPTQ_API int matgptq_block_finish(const matgptq_block *block, void *x, int64_t sequences, const void *from,
                                     int append, const matgptq_kv_cache *const *caches, int64_t layer,
                                     const int64_t *lengths, int num_threads);
/* x through blocks of one dtype and hidden size, one after the other, in place. caches [sequences][count], lengths
 * [sequences]: the last positions are written. After an error x and these positions are undefined. */
MATGPTQ_API int matgptq_blocks(const matgptq_block *const *blocks, int count, void *x, int64_t sequences,
                               const void *cosine, const void *sine, const matgptq_kv_cache *const *caches,
                               const int64_t *lengths, int num_threads);

#ifdef __cplusplus
}
#endif
#endif
