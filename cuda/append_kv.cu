// Writes a block's keys or values to their places in the cache.
#include "common.cuh"

namespace {

constexpr int kBlock = 256;

struct Append {
  lsk_bf16* cache;
  const lsk_bf16* block;
  const uint32_t *q_offsets, *kv_lens, *pages;
  int sequences, sequence_pages, kv_heads;
  int64_t items;
  int size;
};

// One thread for each N elements of the block; size is a multiple of N.
template <int N>
__global__ void __launch_bounds__(kBlock) append_kv(Append call) {
  const int64_t item = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (item >= call.items) return;
  const Vec<lsk_bf16, N> values = load<N>(call.block + item * N);
  const int packs = call.size / N;
  const int64_t head = item / packs;
  const int column = int(item - head * packs) * N, kv_head = int(head % call.kv_heads);
  const unsigned token = unsigned(head / call.kv_heads);
  // The last sequence that begins at the token or before it; one without tokens begins where the next does.
  int sequence = 0, after = call.sequences;
  while (after - sequence > 1) {
    const int middle = (sequence + after) / 2;
    if (call.q_offsets[middle] <= token) sequence = middle;
    else after = middle;
  }
  const unsigned place = call.kv_lens[sequence] - (call.q_offsets[sequence + 1] - token);
  const int64_t page = call.pages[int64_t(sequence) * call.sequence_pages + place / LSK_PAGE];
  const int64_t row = (page * call.kv_heads + kv_head) * LSK_PAGE + place % LSK_PAGE;
  store(call.cache + row * call.size + column, values);
}

template <int N>
cudaError_t launch(Append call, int tokens, cudaStream_t stream) {
  call.items = int64_t(tokens) * call.kv_heads * (call.size / N);
  return lsk_launch(append_kv<N>, dim3(unsigned((call.items + kBlock - 1) / kBlock)), dim3(kBlock), 0, stream, call);
}

}  // namespace

cudaError_t lsk_append_kv(lsk_bf16* cache, const lsk_bf16* block, const uint32_t* q_offsets, const uint32_t* kv_lens,
                          const uint32_t* pages, int sequences, int sequence_pages, int tokens, int kv_heads, int size,
                          cudaStream_t stream) {
  if (tokens == 0 || kv_heads == 0 || size == 0) return cudaSuccess;
  const Append call = {cache, block, q_offsets, kv_lens, pages, sequences, sequence_pages, kv_heads, 0, size};
  if (size % 8 == 0 && aligned_for<8>(cache) && aligned_for<8>(block)) return launch<8>(call, tokens, stream);
  return launch<1>(call, tokens, stream);
}

static const Loader loader([] { return load_kernels(append_kv<8>, append_kv<1>); });
