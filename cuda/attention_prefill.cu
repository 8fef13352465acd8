// Attention of many tokens: a block of four warps takes a tile of queries of one head, and goes over the keys they see.
//
// Shared memory holds the queries and three tiles of keys or values. What the parts of a context come to is added up by
// way of the scratch.
#include <limits.h>
#include <math.h>

#include "attention.cuh"

namespace lsk {
namespace {

constexpr int kThreads = 128;

template <int D, int M>
struct Shape {
  static constexpr int kRows = 64 * M;
  static constexpr int kQueryBytes = kRows * D * 2, kTileBytes = kKeys<D> * D * 2;
  static constexpr int kBytes = kQueryBytes + 3 * kTileBytes;
  // Small queries stay in registers.
  static constexpr bool kHeld = D * M <= 128;
};

// With kCap, scores are capped: apart, so that the others need no register for it.
template <int D, int M, bool kCap>
__global__ void __launch_bounds__(kThreads, 2) prefill(Attention call) {
  using Shape = Shape<D, M>;
  constexpr int kRows = Shape::kRows;
  LSK_DYNAMIC_SHARED(shared);

  // The last tiles of a sequence see the most keys: they go first. Heads that share a key head follow each other, for
  // the cache.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int head = call.first_head + int(block) % call.some_heads, number = int(block) / call.some_heads;
  Tile tile;
  if (!find_tile(call, call.first_tile + number, kRows, &tile)) return;
  const int begin = first_key<D>(call, tile), end = tile.past + tile.count;

  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16 * M;  // the warp's first query in the tile
  const int kv_head = int(int64_t(head) * call.kv_heads / call.heads);
  char* const queries = shared;
  copy_tile<D, kRows, kThreads>(queries, call.q + (int64_t(tile.token) * call.heads + head) * D,
                                int64_t(call.heads) * D, tile.count, threadIdx.x);

  // Where this lane reads queries, as in Softmax::add.
  const char* const query_row = queries + (row + (lane & 15)) * D * 2;
  const int place = ((lane >> 4) ^ swizzle<D>(lane & 15)) * 16;
  const auto load = [&](int step, uint32_t(&a)[M][4]) {
#pragma unroll
    for (int t = 0; t < M; ++t) ldmatrix_x4(a[t], query_row + t * 16 * D * 2 + (step * 32 ^ place));
  };
  uint32_t held[Shape::kHeld ? D / 16 : 1][M][4];
  if constexpr (Shape::kHeld) {
    cp_async_commit();
    cp_async_wait<0>();
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

  const auto ended = [&](auto& softmax, bool first, bool done) {
    if (!first || !done) {
#pragma unroll
      for (int t = 0; t < M; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t at = int64_t(number) * kRows + row + t * 16 + h * 8 + lane / 4;
          float* const before = sums_at(call, D, at, head, 0) + lane % 4 * 2;
          State* const state = state_at(call, D, kRows, at, head, 0);
          State total = {softmax.m[t][h], softmax.d[t][h]};
          if (!first) {
            // One lane of four reads and writes it.
            const State later = total;
            if (lane % 4 == 0) total = *state;
            total.m = __shfl_sync(kWarp, total.m, lane & ~3), total.d = __shfl_sync(kWarp, total.d, lane & ~3);
            const Shares shares = add_state(&total, later);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
              const float2 old = *reinterpret_cast<const float2*>(before + n * 8);
              float* const sums = &softmax.sums[t][n][2 * h];
              sums[0] = add_sum(old.x, sums[0], shares), sums[1] = add_sum(old.y, sums[1], shares);
            }
            softmax.d[t][h] = total.d;
          }
          if (done) continue;
          if (lane % 4 == 0) *state = total;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<float2*>(before + n * 8) =
                make_float2(softmax.sums[t][n][2 * h], softmax.sums[t][n][2 * h + 1]);
          }
        }
      }
    }
    if (!done) return;
    // Through the place of the warp's own queries, so that rows are written 16 bytes at a time. All lanes have read those:
    // since then there was a barrier.
#pragma unroll
    for (int t = 0; t < M; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = row + t * 16 + h * 8 + lane / 4;
        const float factor = 1.0f / softmax.d[t][h];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<uint32_t*>(queries + at * D * 2 + (n ^ swizzle<D>(at)) * 16 + lane % 4 * 4) =
              pack_bf16(softmax.sums[t][n][2 * h] * factor, softmax.sums[t][n][2 * h + 1] * factor);
        }
      }
    }
    __syncwarp();
    constexpr int kChunks = D / 8;
#pragma unroll
    for (int i = lane; i < 16 * M * kChunks; i += 32) {
      const int at = row + i / kChunks, chunk = i % kChunks;
      if (at >= tile.count) break;
      *reinterpret_cast<uint4*>(call.out + (int64_t(tile.token + at) * call.heads + head) * D + chunk * 8) =
          *reinterpret_cast<const uint4*>(queries + at * D * 2 + (chunk ^ swizzle<D>(at)) * 16);
    }
  };
  char* const tiles = shared + Shape::kQueryBytes;
  attend<D, M, kThreads, kCap, true>(call, tiles, tile.pages, kv_head, begin, end, tile.past + row, query, ended);
}

template <int D, int M>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  constexpr int kRows = Shape<D, M>::kRows;
  call.places = 1;
  const int64_t tiles = (call.tokens + int64_t(call.sequences) * (kRows - 1)) / kRows;
  return in_pieces(call, D, kRows, tiles, 1, scratch_bytes, [&](const Attention& call) {
    if (int64_t(call.tiles) * call.some_heads > INT_MAX) return cudaErrorInvalidValue;
    return lsk_launch(call.bend > 0.0f ? prefill<D, M, true> : prefill<D, M, false>,
                      dim3(unsigned(call.tiles * call.some_heads)), dim3(kThreads), Shape<D, M>::kBytes, stream, call);
  });
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
