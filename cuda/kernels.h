/* The kernels' launchers, as Rust sees them.
 *
 * Each enqueues on `stream` and returns: no wait, no allocation, no output. All pointers are device addresses, aligned for
 * their elements; a size of zero is a success that launches nothing; tensors are row-major, slowest dimension first. The
 * symbols are hidden: they are this library's own. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
#include <cuda_bf16.h>
typedef __nv_bfloat16 lsk_bf16;
extern "C" {
#else
typedef uint16_t lsk_bf16;
#endif

/* Element types, for lsk_cast and lsk_expand. */
#define LSK_F32 0
#define LSK_F16 1
#define LSK_BF16 2
#define LSK_F8E4M3 3
#define LSK_U8 17 /* of quantised scales alone */

/* Types of quantised weights in blocks, for lsk_expand. */
#define LSK_Q4_0 4
#define LSK_Q4_1 5
#define LSK_Q5_0 6
#define LSK_Q5_1 7
#define LSK_Q8_0 8
#define LSK_Q2_K 9
#define LSK_Q3_K 10
#define LSK_Q4_K 11
#define LSK_Q5_K 12
#define LSK_Q6_K 13
#define LSK_IQ4_NL 14
#define LSK_IQ4_XS 15
#define LSK_MXFP4 16

/* out[i] = x[i], any element type to LSK_F32 or LSK_BF16, rounded to nearest even. */
cudaError_t lsk_cast(void* out, int out_dtype, const void* x, int x_dtype, size_t n, cudaStream_t stream);

/* The same of n weights in whole blocks, of a type of blocks. They are read byte by byte where they are not aligned to 16. */
cudaError_t lsk_expand(void* out, int out_dtype, const void* blocks, int type, size_t n, cudaStream_t stream);

/* How a matrix [rows, columns] is made of several tensors: src/quantised tells the formats. */
typedef struct {
  int scheme;  /* one of those below */
  int scale;   /* the type of scales: LSK_F32, LSK_F16 or LSK_BF16, or LSK_U8 where scales are quantised too */
  int64_t rows;
  int64_t columns;
  int64_t block_rows; /* rows and columns that have one scale; of LSK_NF4 the latter counts weights, row after row */
  int64_t block_columns;
  int zeros;    /* there are zeros; else each is 8 */
  int order;    /* there is an order of the columns' groups */
  int zero;     /* added to stored zeros, of four bits */
  float offset; /* added to scales that are quantised */
} lsk_recipe;
#define LSK_FP8 0
#define LSK_ROWS 1
#define LSK_GPTQ 2
#define LSK_AWQ 3
#define LSK_NF4 4

/* Makes the matrix, row-major, of four tensors in the scheme's order, of which there need not be all, each on a multiple of 16
 * bytes. out_dtype: LSK_F32 or LSK_BF16. */
cudaError_t lsk_dequantise(void* out, int out_dtype, const void* const inputs[4], const lsk_recipe* recipe,
                           cudaStream_t stream);

/* Decodes packed weights (docs/packed.md): `parts` of them lie one behind the other at `packed`, each of part_weights weights
 * but the last, `weights` in all. `lengths` [parts], their bytes, and `table` [13] are the host's, and read before the call
 * returns. out and packed are aligned to 16. Where a block is corrupt, its weights are any, and 1 is stored to *report, the
 * host's word too, which the device knows; nothing outside the part is read. */
cudaError_t lsk_unpack(lsk_bf16* out, const void* packed, const uint32_t* lengths, int64_t parts, int64_t part_weights,
                       int64_t weights, const uint8_t* table, uint32_t* report, cudaStream_t stream);

/* out[t] = table[ids[t]]: table [vocab, hidden] of bf16, out [tokens, hidden]. */
cudaError_t lsk_embed(float* out, const void* table_bf16, const uint32_t* ids, int64_t tokens, int64_t hidden,
                      int64_t vocab, cudaStream_t stream);

/* out[i] = x[indices[i]]: x [.., hidden], out [rows, hidden]. */
cudaError_t lsk_gather(float* out, const float* x, const uint32_t* indices, int64_t rows, int64_t hidden,
                       cudaStream_t stream);

/* out = x / sqrt(mean(x^2) + eps) * (offset + weight) over each row: x, out [rows, hidden], weight [hidden]. */
cudaError_t lsk_rms_norm(lsk_bf16* out, const float* x, const lsk_bf16* weight, float offset, float eps, int64_t rows,
                         int64_t hidden, cudaStream_t stream);

/* residual += y, then out = the norm of residual, in one kernel. */
cudaError_t lsk_add_rms_norm(lsk_bf16* out, float* residual, const lsk_bf16* y, const lsk_bf16* weight, float offset,
                             float eps, int64_t rows, int64_t hidden, cudaStream_t stream);

/* The norm in place: x [rows, size], most often heads. */
cudaError_t lsk_rms_norm_in_place(float* x, const lsk_bf16* weight, float offset, float eps, int64_t rows, int64_t size,
                                  cudaStream_t stream);

/* x += y. */
cudaError_t lsk_add(float* x, const lsk_bf16* y, size_t n, cudaStream_t stream);

/* Tokens and rows of the weight that a block of lsk_few_rows takes, the latter or twice as many. */
#define LSK_FEW_ROWS 16

/* out = x · weightᵀ + bias: x [tokens, k], weight [n, k], bias [n] or null, out [tokens, n] of LSK_F32 or LSK_BF16, rounded before the
 * bias is added and after. An element is added up from the first column to the last, sixteen at a time, whatever the sizes are. Up to a million tokens; each LSK_FEW_ROWS of them read the whole weight. */
cudaError_t lsk_few_rows(void* out, int out_dtype, const lsk_bf16* x, const lsk_bf16* weight, const lsk_bf16* bias,
                         int tokens, int64_t n, int64_t k, cudaStream_t stream);

/* Stores to *differ, which is the device's, whether any of n elements of LSK_F32 or LSK_BF16 differ: 1, or 0. A NaN is like any
 * other. */
cudaError_t lsk_compare(uint32_t* differ, const void* a, const void* b, int dtype, size_t n, cudaStream_t stream);

/* out[r] = bias: out [rows, columns] of LSK_F32 or LSK_BF16, what a product with beta = 1 is added to. */
cudaError_t lsk_broadcast_row(void* out, int out_dtype, const lsk_bf16* bias, int64_t rows, int64_t columns,
                              cudaStream_t stream);

/* Which elements of a head are a pair: i and i + half; 2i and 2i + 1; 2i and 2i + 1, which become i and i + half. */
#define LSK_HALVES 0
#define LSK_INTERLEAVED 1
#define LSK_TO_HALVES 2

/* Rotary embedding: x, out [tokens, heads, size], positions [tokens], inv_freq [half]. The first 2 * half elements of a
 * head turn and become `scale` times as long, the others are passed on. `layout` is one of those above. */
cudaError_t lsk_rope(lsk_bf16* out, const float* x, const uint32_t* positions, const float* inv_freq, float scale,
                     int64_t tokens, int heads, int size, int half, int layout, cudaStream_t stream);

/* gate = silu(gate) * up. */
cudaError_t lsk_swiglu(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream);

/* gate = gelu(gate) * up, the form with a hyperbolic tangent. */
cudaError_t lsk_geglu(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream);

/* x *= factor: LSK_F32 or LSK_BF16. */
cudaError_t lsk_scale(void* x, int dtype, float factor, size_t n, cudaStream_t stream);

/* x = cap * tanh(x / cap). */
cudaError_t lsk_soft_cap(float* x, float cap, size_t n, cudaStream_t stream);

/* Tokens of a page of the KV cache. */
#define LSK_PAGE 64

/* Puts a block's keys or values [tokens, kv_heads, size] where they belong in cache [.., kv_heads, LSK_PAGE, size].
 * Sequence i owns tokens q_offsets[i] .. q_offsets[i + 1], the last of the kv_lens[i] that it has; token t of those lies in
 * page pages[i, t / LSK_PAGE]: pages [sequences, sequence_pages]. */
cudaError_t lsk_append_kv(lsk_bf16* cache, const lsk_bf16* block, const uint32_t* q_offsets, const uint32_t* kv_lens,
                          const uint32_t* pages, int sequences, int sequence_pages, int tokens, int kv_heads, int size,
                          cudaStream_t stream);

/* out[r] = the index of the greatest of x[r], the first of equals, or UINT32_MAX if there is a NaN: x [rows, columns]. */
cudaError_t lsk_argmax(uint32_t* out, const float* x, int64_t rows, int64_t columns, cudaStream_t stream);

/* Causal attention with grouped heads: q, out [tokens, heads, size], keys, values [.., kv_heads, LSK_PAGE, size],
 * sequences as in lsk_append_kv. Head sizes 32, 64, 96, 128 and 256, others are cudaErrorInvalidValue. window 0: none.
 * soft_cap 0: none, others are exact to 3e-7 of themselves. A token's result has the same bits whatever else the call has.
 * With less scratch fewer blocks work at a time, or there are more launches; cudaErrorInvalidValue where not even one block,
 * or the heads of one token that share a key head, have room, which contexts of up to 512 never ask. */
cudaError_t lsk_attention(lsk_bf16* out, const lsk_bf16* q, const lsk_bf16* keys, const lsk_bf16* values,
                          const uint32_t* q_offsets, const uint32_t* kv_lens, const uint32_t* pages, int sequences,
                          int sequence_pages, int tokens, int heads, int kv_heads, int size, float scale,
                          int64_t window, float soft_cap, void* scratch, size_t scratch_bytes, cudaStream_t stream);

/* The scratch, in bytes, that lsk_attention should have on a device with so many multiprocessors. */
size_t lsk_attention_scratch(int multiprocessors);

/* Loads all kernels onto this thread's device. Left to itself the runtime loads each when it is first launched, which
 * allocates. */
cudaError_t lsk_load(void);

/* The name of a device, cut to fit `bytes` with its terminating zero. */
cudaError_t lsk_device_name(char* name, size_t bytes, int ordinal);

#ifdef __cplusplus
}
#endif
