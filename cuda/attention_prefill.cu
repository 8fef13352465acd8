// Attention of many tokens: a block of four warps takes a tile of queries of one head, and goes over the keys they see.
//
// Shared memory holds the queries and three tiles of keys or values: while one is multiplied, the next two are on
// their way.
#include <limits.h>
#include <math.h>

#include "attention.cuh"

namespace lsk {
namespace {

constexpr int kThreads = 128;

// Keys that are worth a part of their own.
constexpr int kLeast = 256;

template <int D, int M>
struct Shape {
  static constexpr int kRows = 64 * M;
  static constexpr int kKeys = D > 128 ? 32 : 64;
  static constexpr int kQueryBytes = kRows * D * 2, kTileBytes = kKeys * D * 2;
  static constexpr int kBytes = kQueryBytes + 3 * kTileBytes;
  // Small queries stay in registers.
  static constexpr bool kHeld = D * M <= 128;
};

// With kCap, scores are capped: apart, so that the others need no register for it.
template <int D, int M, bool kCap>
__global__ void __launch_bounds__(kThreads, 2) prefill(Attention call) {
  using Shape = Shape<D, M>;
  constexpr int kKeys = Shape::kKeys, kRows = Shape::kRows;
  LSK_DYNAMIC_SHARED(shared);

  // The last tiles of a sequence see the most keys: they go first. Heads that share a key head follow each other, for
  // the cache.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int split = int(block % call.splits), head = int(block / call.splits % call.heads);
  Tile tile;
  if (!find_tile(call, int(block / call.splits / call.heads), kRows, &tile)) return;
  const Part part = part_of(call, tile, split, kLeast);
  if (part.begin >= part.end) return;

  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16 * M;  // the warp's first query in the tile
  const int kv_head = int(int64_t(head) * call.kv_heads / call.heads);
  const int64_t cache = (int64_t(tile.row) * call.kv_heads + kv_head) * call.capacity * D;
  // Every register counts here: a warp's sums and scores take 192 of 255.
  const lsk_bf16* const keys = call.keys + cache;
  const int64_t values = call.values - call.keys;
  const auto copy = [&](int to, const lsk_bf16* from, int key) {
    if (key < part.end) {
      copy_tile<D, kKeys, kThreads>(shared + to, from + int64_t(key) * D, D, part.end - key, threadIdx.x);
    }
    cp_async_commit();
  };
  char* const queries = shared;
  // The third tile is where these two are not.
  int key_tile = Shape::kQueryBytes, value_tile = key_tile + Shape::kTileBytes;
  constexpr int kTiles = 3 * (Shape::kQueryBytes + Shape::kTileBytes);
  copy_tile<D, kRows, kThreads>(queries, call.q + (int64_t(tile.token) * call.heads + head) * D,
                                int64_t(call.heads) * D, tile.count, threadIdx.x);
  copy(key_tile, keys, part.begin);
  copy(value_tile, keys + values, part.begin);

  // Where this lane reads queries, as in Softmax::add.
  const char* const query_row = queries + (row + (lane & 15)) * D * 2;
  const int place = ((lane >> 4) ^ swizzle<D>(lane & 15)) * 16;
  const auto load = [&](int step, uint32_t(&a)[M][4]) {
#pragma unroll
    for (int t = 0; t < M; ++t) ldmatrix_x4(a[t], query_row + t * 16 * D * 2 + (step * 32 ^ place));
  };
  uint32_t held[Shape::kHeld ? D / 16 : 1][M][4];
  if constexpr (Shape::kHeld) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) load(step, held[step]);
  }
  const auto query = [&](int step, uint32_t(&a)[M][4]) {
    if constexpr (Shape::kHeld) {
#pragma unroll
      for (int t = 0; t < M; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[t][i] = held[step][t][i];
      }
    } else {
      load(step, a);
    }
  };

  Softmax<D, M, kKeys> softmax;
  const int first = tile.past + row, last = first + 16 * M - 1;  // the own keys of the warp's first and last query
  for (int key = part.begin; key < part.end; key += kKeys) {
    const bool seen = key <= last && key + kKeys - 1 > first - call.window;
    uint32_t weights[M][kKeys / 16][4];
    // The keys are here; every warp is done with the values before.
    cp_async_wait<1>();
    __syncthreads();
    const int free_tile = kTiles - key_tile - value_tile;
    copy(free_tile, keys, key + kKeys);
    if (seen) {
      float scores[M][kKeys / 8][4];
      softmax.score(scores, query, shared + key_tile);
      if constexpr (kCap) softmax.cap(scores, call.bend);
      const int ahead = first + lane / 4 - key - lane % 4 * 2;  // of this lane's first query over its first key
      if (key + kKeys - 1 > first || key <= last - call.window) {
#pragma unroll
        for (int t = 0; t < M; ++t) {
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int behind = ahead + t * 16 + i / 2 * 8 - n * 8 - i % 2;
              if (behind < 0 || behind >= call.window) scores[t][n][i] = -INFINITY;
            }
          }
        }
      }
      softmax.weigh(scores, weights, call.scale);
    }
    // The values are here; every warp is done with the keys.
    cp_async_wait<1>();
    __syncthreads();
    copy(key_tile, keys + values, key + kKeys);
    if (seen) softmax.add(weights, shared + value_tile);
    value_tile = key_tile, key_tile = free_tile;
  }
  softmax.finish();

  if (part.parts > 1) {
#pragma unroll
    for (int t = 0; t < M; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int query = row + t * 16 + h * 8 + lane / 4;
        if (query >= tile.count) continue;
        float* const sums = partial_sums(call, D, tile.token + query, head, split) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<float2*>(sums + n * 8) =
              make_float2(softmax.sums[t][n][2 * h], softmax.sums[t][n][2 * h + 1]);
        }
        if (lane % 4 == 0) {
          *partial_state(call, D, tile.token + query, head, split) = {softmax.m[t][h], softmax.d[t][h]};
        }
      }
    }
    return;
  }
  // Through the place of the warp's own queries, so that rows are written 16 bytes at a time. All lanes have read those:
  // since then there was a barrier.
#pragma unroll
  for (int t = 0; t < M; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row + t * 16 + h * 8 + lane / 4;
      const float factor = 1.0f / softmax.d[t][h];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<uint32_t*>(queries + query * D * 2 + (n ^ swizzle<D>(query)) * 16 + lane % 4 * 4) =
            pack_bf16(softmax.sums[t][n][2 * h] * factor, softmax.sums[t][n][2 * h + 1] * factor);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = lane; i < 16 * M * kChunks; i += 32) {
    const int query = row + i / kChunks, chunk = i % kChunks;
    if (query >= tile.count) break;
    *reinterpret_cast<uint4*>(call.out + (int64_t(tile.token + query) * call.heads + head) * D + chunk * 8) =
        *reinterpret_cast<const uint4*>(queries + query * D * 2 + (chunk ^ swizzle<D>(query)) * 16);
  }
}

template <int D, int M>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  constexpr int kRows = Shape<D, M>::kRows;
  const int64_t tiles = (call.tokens + int64_t(call.sequences) * (kRows - 1)) / kRows, blocks = tiles * call.heads;
  // Contexts are cut where a short block of tokens would leave multiprocessors idle, which hold two blocks each.
  const int64_t parts = int64_t(scratch_bytes / kScratch) * 2 / blocks, most = (call.capacity + kLeast - 1) / kLeast;
  call.splits = parts_that_fit(call, D, scratch_bytes, parts < most ? parts : most);
  if (blocks * call.splits > INT_MAX) return cudaErrorInvalidValue;
  const cudaError_t error =
      lsk_launch(call.bend > 0.0f ? prefill<D, M, true> : prefill<D, M, false>,
                 dim3(unsigned(blocks * call.splits)), dim3(kThreads), Shape<D, M>::kBytes, stream, call);
  if (error != cudaSuccess) return error;
  return attention_combine(call, D, kRows, kLeast, stream);
}

// Two times 16 queries a warp, unless sequences are too short for it or heads too large.
template <int D>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  if constexpr (D <= 128) {
    if (call.tokens > int64_t(call.sequences) * 64) return launch<D, 2>(call, scratch_bytes, stream);
  }
  return launch<D, 1>(call, scratch_bytes, stream);
}

}  // namespace

cudaError_t attention_prefill(Attention call, int size, size_t scratch_bytes, cudaStream_t stream) {
  return with_size(size, [&](auto d) { return launch<decltype(d)::value>(call, scratch_bytes, stream); });
}

}  // namespace lsk

static const Loader loader([] {
  return lsk::with_sizes([](auto d) {
    constexpr int D = decltype(d)::value;
    // Of large heads there are none with M = 2, as above.
    constexpr int kMost = D <= 128 ? 2 : 1;
    return load_kernels(lsk::prefill<D, 1, false>, lsk::prefill<D, 1, true>, lsk::prefill<D, kMost, false>,
                        lsk::prefill<D, kMost, true>);
  });
});
