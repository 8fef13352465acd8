// Attention of a few tokens: reading the cache is all the time it takes. A block takes one token, the query heads that
// share a key head (up to 16, which are the rows of a tensor core's tile), and a part of the context. Each warp goes
// over tiles of keys of its own, several of which are on their way. Then the warps' sums are added up, and the parts'
// by another kernel.
#include <limits.h>
#include <math.h>

#include "attention.cuh"

namespace lsk {
namespace {

// Query heads of a block, at most.
constexpr int kHeads = 16;

// Keys that are worth a part of their own.
constexpr int kLeast = 128;

template <int D>
struct Shape {
  static constexpr int kWarps = D > 128 ? 2 : 4, kThreads = kWarps * 32;
  static constexpr int kKeys = D > 64 ? 16 : 32, kStages = 3;
  static constexpr int kTileBytes = kKeys * D * 2, kWarpBytes = kStages * 2 * kTileBytes;
  static constexpr int kBytes = kWarps * kWarpBytes;
  // Blocks that a multiprocessor of an H100 holds: 227 KiB of shared memory, a KiB of each block is the system's.
  static constexpr int kResident = 227 * 1024 / (kBytes + 1024);
  // Rows of sums in shared memory, padded so that eight of them lie in different banks.
  static constexpr int kStride = D + 8;
  static_assert(kHeads * (kStride * sizeof(float) + sizeof(State)) <= kWarpBytes, "sums take the place of tiles");
};

// With kCap, scores are capped: apart, so that the others need no register for it.
template <int D, bool kCap>
__global__ void __launch_bounds__(Shape<D>::kThreads) decode(Attention call) {
  using Shape = Shape<D>;
  constexpr int kKeys = Shape::kKeys, kStages = Shape::kStages;
  LSK_DYNAMIC_SHARED(shared);

  const int share = call.heads / call.kv_heads, chunks = (share + kHeads - 1) / kHeads;
  const int split = int(blockIdx.x % call.splits);
  int block = int(blockIdx.x / call.splits);
  const int chunk = block % chunks, kv_head = block / chunks % call.kv_heads, token = block / chunks / call.kv_heads;
  const int head = kv_head * share + chunk * kHeads, heads = min(share - chunk * kHeads, kHeads);
  Tile tile;
  if (!find_tile(call, token, 1, &tile)) return;
  const Part part = part_of(call, tile, split, kLeast);
  if (part.begin >= part.end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t cache = (int64_t(tile.row) * call.kv_heads + kv_head) * call.capacity * D;
  char* const tiles = shared + warp * Shape::kWarpBytes;
  const auto copy = [&](int stage, int key) {
    if (key < part.end) {
      char* const to = tiles + stage * 2 * Shape::kTileBytes;
      const int64_t from = cache + int64_t(key) * D;
      copy_tile<D, kKeys, 32>(to, call.keys + from, D, part.end - key, lane);
      copy_tile<D, kKeys, 32>(to + Shape::kTileBytes, call.values + from, D, part.end - key, lane);
    }
    cp_async_commit();
  };
  constexpr int kStep = Shape::kWarps * kKeys;
  const int begin = part.begin + warp * kKeys;
  for (int stage = 0; stage < kStages - 1; ++stage) copy(stage, begin + stage * kStep);

  uint32_t held[D / 16][4];
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane % 4 * 2;
      held[step][i] = 0;
      if (row < heads) {
        held[step][i] = *reinterpret_cast<const uint32_t*>(
            call.q + (int64_t(tile.token) * call.heads + head + row) * D + column);
      }
    }
  }
  const auto query = [&](int step, uint32_t(&a)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = held[step][i];
  };

  Softmax<D, 1, kKeys> softmax;
  int stage = 0, free_stage = kStages - 1;
  for (int key = begin; key < part.end; key += kStep) {
    // This tile is here; every lane is done with the one before.
    cp_async_wait<kStages - 2>();
    __syncwarp();
    copy(free_stage, key + (kStages - 1) * kStep);
    const char* const keys = tiles + stage * 2 * Shape::kTileBytes;
    float scores[1][kKeys / 8][4];
    uint32_t weights[1][kKeys / 16][4];
    softmax.score(scores, query, keys);
    if constexpr (kCap) softmax.cap(scores, call.bend);
    if (key + kKeys > part.end) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key + n * 8 + lane % 4 * 2 + i % 2 >= part.end) scores[0][n][i] = -INFINITY;
        }
      }
    }
    softmax.weigh(scores, weights, call.scale);
    softmax.add(weights, keys + Shape::kTileBytes);
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  softmax.finish();

  // Add up what the warps have, through their own tiles' place. No copy to it is on its way: every one was waited for.
  __syncwarp();
  float* const rows = reinterpret_cast<float*>(tiles);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = h * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(rows + row * Shape::kStride + n * 8 + lane % 4 * 2) =
          make_float2(softmax.sums[0][n][2 * h], softmax.sums[0][n][2 * h + 1]);
    }
    if (lane % 4 == 0) {
      reinterpret_cast<State*>(rows + kHeads * Shape::kStride)[row] = {softmax.m[0][h], softmax.d[0][h]};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * D / 4; i += Shape::kThreads) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    const auto sums_of = [&](int w) { return reinterpret_cast<const float*>(shared + w * Shape::kWarpBytes); };
    State states[Shape::kWarps], total = {-1e30f, 0.0f};
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      states[w] = reinterpret_cast<const State*>(sums_of(w) + kHeads * Shape::kStride)[row];
      total.m = fmaxf(total.m, states[w].m);
    }
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      const float factor = exp2_fast(states[w].m - total.m);
      const float4 other = *reinterpret_cast<const float4*>(sums_of(w) + row * Shape::kStride + column);
      total.d += factor * states[w].d;
      sums.x += factor * other.x, sums.y += factor * other.y, sums.z += factor * other.z, sums.w += factor * other.w;
    }
    if (part.parts > 1) {
      *reinterpret_cast<float4*>(partial_sums(call, D, tile.token, head + row, split) + column) = sums;
      if (column == 0) *partial_state(call, D, tile.token, head + row, split) = total;
    } else {
      const float factor = 1.0f / total.d;
      *reinterpret_cast<uint2*>(call.out + (int64_t(tile.token) * call.heads + head + row) * D + column) =
          make_uint2(pack_bf16(sums.x * factor, sums.y * factor), pack_bf16(sums.z * factor, sums.w * factor));
    }
  }
}

template <int D>
struct Combine {
  static constexpr int kLanes = D / 4;                    // threads for a part
  static constexpr int kParts = D == 96 ? 8 : 256 / kLanes;  // parts at a time
  static constexpr int kThreads = kLanes * kParts;
  static constexpr int kBytes = kParts * (D + 4) * sizeof(float);
};

// Adds up the parts of a token's head.
template <int D>
__global__ void __launch_bounds__(Combine<D>::kThreads) combine(Attention call, int size, int least) {
  constexpr int kLanes = Combine<D>::kLanes, kParts = Combine<D>::kParts, kStride = D + 4;
  LSK_DYNAMIC_SHARED(shared);
  const int token = int(blockIdx.x / call.heads), head = int(blockIdx.x % call.heads);
  Tile tile;
  if (!find_tile(call, token, 1, &tile)) return;
  // Its parts are those of the tile that it was in.
  const int before = tile.first % size;
  tile.past -= before;
  tile.count = before + min(size - before, tile.left);
  const int parts = part_of(call, tile, 0, least).parts;
  if (parts == 1) return;

  const State* const states = partial_state(call, D, token, head, 0);
  const int lane = threadIdx.x % 32, column = threadIdx.x % kLanes * 4, which = threadIdx.x / kLanes;
  float m = -1e30f;
  for (int part = lane; part < parts; part += 32) m = fmaxf(m, states[part].m);
  for (int distance = 16; distance > 0; distance /= 2) m = fmaxf(m, __shfl_xor_sync(kWarp, m, distance));
  float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float d = 0.0f;
#pragma unroll 4
  for (int part = which; part < parts; part += kParts) {
    const State state = states[part];
    const float4 other = *reinterpret_cast<const float4*>(partial_sums(call, D, token, head, part) + column);
    const float factor = exp2_fast(state.m - m);
    d += factor * state.d;
    sums.x += factor * other.x, sums.y += factor * other.y, sums.z += factor * other.z, sums.w += factor * other.w;
  }
  float* const rows = reinterpret_cast<float*>(shared);
  *reinterpret_cast<float4*>(rows + which * kStride + column) = sums;
  if (column == 0) rows[which * kStride + D] = d;
  __syncthreads();
  if (which > 0) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) {
    const float4 other = *reinterpret_cast<const float4*>(rows + i * kStride + column);
    d += rows[i * kStride + D];
    sums.x += other.x, sums.y += other.y, sums.z += other.z, sums.w += other.w;
  }
  const float factor = 1.0f / d;
  *reinterpret_cast<uint2*>(call.out + (int64_t(token) * call.heads + head) * D + column) =
      make_uint2(pack_bf16(sums.x * factor, sums.y * factor), pack_bf16(sums.z * factor, sums.w * factor));
}

template <int D>
cudaError_t launch_combine(Attention call, int tile, int least, cudaStream_t stream) {
  if (int64_t(call.tokens) * call.heads > INT_MAX) return cudaErrorInvalidValue;
  return lsk_launch(combine<D>, dim3(unsigned(call.tokens * call.heads)), dim3(Combine<D>::kThreads),
                    Combine<D>::kBytes, stream, call, tile, least);
}

template <int D>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  const int64_t chunks = (call.heads / call.kv_heads + kHeads - 1) / kHeads;
  const int64_t blocks = call.tokens * chunks * call.kv_heads;
  // One wave of equal parts if there are few of them, four if rounding would leave much of one idle.
  const int64_t wave = int64_t(scratch_bytes / kScratch) * Shape<D>::kResident;
  const int64_t parts = (blocks * 4 <= wave ? wave : wave * 4) / blocks, most = (call.capacity + kLeast - 1) / kLeast;
  call.splits = parts_that_fit(call, D, scratch_bytes, parts < most ? parts : most);
  if (blocks * call.splits > INT_MAX) return cudaErrorInvalidValue;
  const cudaError_t error =
      lsk_launch(call.bend > 0.0f ? decode<D, true> : decode<D, false>, dim3(unsigned(blocks * call.splits)),
                 dim3(Shape<D>::kThreads), Shape<D>::kBytes, stream, call);
  if (error != cudaSuccess) return error;
  return attention_combine(call, D, 1, kLeast, stream);
}

}  // namespace

cudaError_t attention_combine(Attention call, int size, int tile, int least, cudaStream_t stream) {
  if (call.splits == 1) return cudaSuccess;
  return with_size(size, [&](auto d) { return launch_combine<decltype(d)::value>(call, tile, least, stream); });
}

cudaError_t attention_decode(Attention call, int size, size_t scratch_bytes, cudaStream_t stream) {
  return with_size(size, [&](auto d) { return launch<decltype(d)::value>(call, scratch_bytes, stream); });
}

}  // namespace lsk

size_t lsk_attention_scratch(int multiprocessors) {
  return multiprocessors > 0 ? size_t(multiprocessors) * lsk::kScratch : 0;
}

cudaError_t lsk_attention(lsk_bf16* out, const lsk_bf16* q, const lsk_bf16* keys, const lsk_bf16* values,
                          const uint32_t* q_offsets, const uint32_t* kv_lens, const uint32_t* rows, int sequences,
                          int tokens, int heads, int kv_heads, int64_t capacity, int size, float scale, int64_t window,
                          float soft_cap, void* scratch, size_t scratch_bytes, cudaStream_t stream) {
  constexpr float kLog2E = 1.44269504088896341f;
  // With a cap, scores become cap · tanh(scale / cap · score).
  const float bend = soft_cap != 0.0f ? scale / soft_cap * 2.0f * kLog2E : 0.0f;
  // A greatest score is found before it is scaled, so the scale keeps order.
  const bool valid = sequences >= 0 && tokens >= 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 &&
                     capacity >= 0 && capacity <= INT_MAX && scale > 0.0f && window >= 0 && soft_cap >= 0.0f &&
                     isfinite(bend);
  if (!valid) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  lsk::Attention call = {};
  call.out = out;
  call.q = q, call.keys = keys, call.values = values;
  call.q_offsets = q_offsets, call.kv_lens = kv_lens, call.rows = rows;
  call.sequences = sequences, call.tokens = tokens, call.heads = heads, call.kv_heads = kv_heads;
  call.capacity = capacity;
  call.scale = (soft_cap > 0.0f ? soft_cap : scale) * kLog2E, call.bend = bend;
  call.window = window == 0 || window > INT_MAX ? INT_MAX : int(window);
  call.splits = 1;
  call.partial = static_cast<float*>(scratch);
  if (scratch == nullptr) scratch_bytes = 0;
  return tokens <= (sequences > 8 ? sequences : 8) ? lsk::attention_decode(call, size, scratch_bytes, stream)
                                                   : lsk::attention_prefill(call, size, scratch_bytes, stream);
}

static const Loader loader([] {
  return lsk::with_sizes([](auto d) {
    constexpr int D = decltype(d)::value;
    return load_kernels(lsk::decode<D, false>, lsk::decode<D, true>, lsk::combine<D>);
  });
});
