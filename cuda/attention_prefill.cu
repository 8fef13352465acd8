// Attention of many tokens: a block of four warps takes a tile of queries of one head, and goes over the keys they see;
// then it takes another.
//
// Shared memory holds the queries, three tiles of keys or values, and what the block works on. What the parts of a context come to is added up by
// way of the block's place in the scratch.
#include <limits.h>
#include <math.h>

#include "attention.cuh"

namespace lsk {
namespace {

constexpr int kThreads = 128;

// What a block works on, in shared memory: a thread has no registers for what it needs at the end alone.
struct Item {
  int round, token, count, head, begin;
};

template <int D, int M>
struct Shape {
  static constexpr int kRows = 64 * M;
  static constexpr int kQueryBytes = kRows * D * 2, kTileBytes = kKeys<D> * D * 2;
  static constexpr int kItem = kQueryBytes + 3 * kTileBytes, kBytes = kItem + 16 * int((sizeof(Item) + 15) / 16);
  // Small queries stay in registers.
  static constexpr bool kHeld = D * M <= 128;
};

// What a block keeps of the parts so far: each thread its own sums and states, 16 bytes beside those of its neighbours.
template <int D, int M>
constexpr int kKept = (D / 8 + 1) * M * kThreads;

template <int D, int M>
__device__ inline float4* kept_by_thread(const Attention& call) {
  return reinterpret_cast<float4*>(call.scratch) + int64_t(blockIdx.x) * kKept<D, M> + afresh(int(threadIdx.x));
}

template <int D, int M, typename Softmax>
__device__ inline void keep(float4* kept, const Softmax& softmax) {
#pragma unroll
  for (int t = 0; t < M; ++t) {
    kept[(M * D / 8 + t) * kThreads] = make_float4(softmax.m[t][0], softmax.d[t][0], softmax.m[t][1], softmax.d[t][1]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float* const sums = softmax.sums[t][n];
      kept[(t * D / 8 + n) * kThreads] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }
}

// Adds the part that ended to those that were kept.
template <int D, int M, typename Softmax>
__device__ inline void add_to_kept(const float4* kept, Softmax& softmax) {
  // So many loads at a time, for which there are registers.
  constexpr int kLoads = D % 64 == 0 ? 8 : 4;
#pragma unroll
  for (int t = 0; t < M; ++t) {
    Shares shares[2];
    const float4 states = kept[(M * D / 8 + t) * kThreads];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      State total = h == 0 ? State{states.x, states.y} : State{states.z, states.w};
      shares[h] = add_state(&total, {softmax.m[t][h], softmax.d[t][h]});
      softmax.m[t][h] = total.m, softmax.d[t][h] = total.d;
    }
#pragma unroll
    for (int first = 0; first < D / 8; first += kLoads) {
      // Where nothing was kept there is nothing to add. The branch also keeps one round's loads behind the sums of the
      // round before: there are no registers for more.
      if (__ballot_sync(kWarp, states.y != 0.0f || states.w != 0.0f) == 0) continue;
      float4 before[kLoads];
#pragma unroll
      for (int n = 0; n < kLoads; ++n) before[n] = kept[(t * D / 8 + first + n) * kThreads];
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        float* const sums = softmax.sums[t][first + n];
        sums[0] = add_sum(before[n].x, sums[0], shares[0]), sums[1] = add_sum(before[n].y, sums[1], shares[0]);
        sums[2] = add_sum(before[n].z, sums[2], shares[1]), sums[3] = add_sum(before[n].w, sums[3], shares[1]);
      }
    }
  }
}

// Writes what the warp's queries came to by way of `staging`, the place of the tile's queries: so rows are written 16 bytes
// at a time.
template <int D, int M, typename Softmax>
__device__ inline void write_rows(const Attention& call, const Item* item, char* staging, const Softmax& softmax) {
  const int thread = afresh(int(threadIdx.x)), lane = thread % 32, row = thread / 32 * 16 * M;
#pragma unroll
  for (int t = 0; t < M; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = row + t * 16 + h * 8 + lane / 4;
      const float factor = 1.0f / softmax.d[t][h];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<uint32_t*>(staging + at * D * 2 + (n ^ swizzle<D>(at)) * 16 + lane % 4 * 4) =
            pack_bf16(softmax.sums[t][n][2 * h] * factor, softmax.sums[t][n][2 * h + 1] * factor);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = D / 8;
  const int token = item->token, count = item->count, head = item->head;
#pragma unroll
  for (int i = lane; i < 16 * M * kChunks; i += 32) {
    const int at = row + i / kChunks, chunk = i % kChunks;
    if (at >= count) break;
    *reinterpret_cast<uint4*>(call.out + (int64_t(token + at) * call.heads + head) * D + chunk * 8) =
        *reinterpret_cast<const uint4*>(staging + at * D * 2 + (chunk ^ swizzle<D>(at)) * 16);
  }
}

// A block's whole work on a tile and a head.
template <int D, int M, bool kCap>
__device__ inline void attend_tile(const Attention& call, const Tile& tile, int head, const Item* item, char* shared) {
  using Shape = Shape<D, M>;
  const int begin = first_key<D>(call, tile), end = tile.past + tile.count;
  const int thread = afresh(int(threadIdx.x));
  const int lane = thread % 32, row = thread / 32 * 16 * M;  // the warp's first query in the tile
  const int kv_head = int(int64_t(head) * call.kv_heads / call.heads);
  char* const queries = shared;
  copy_tile<D, Shape::kRows, kThreads>(queries, call.q + (int64_t(tile.token) * call.heads + head) * D,
                                       int64_t(call.heads) * D, tile.count, int(threadIdx.x));

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
  const auto ended = [&](auto& softmax, int next, bool done) {
    if ((next - 1) / kPart != item->begin / kPart) add_to_kept<D, M>(kept_by_thread<D, M>(call), softmax);
    if (!done) return keep<D, M>(kept_by_thread<D, M>(call), softmax);
    // All lanes have read the warp's queries: since then there was a barrier.
    write_rows<D, M>(call, item, queries, softmax);
  };
  attend<D, M, kThreads, kCap, true>(call, shared + Shape::kQueryBytes, tile.pages, kv_head, begin, end, tile.past + row,
                                     query, ended);
}

// With kCap, scores are capped: apart, so that the others need no register for it.
template <int D, int M, bool kCap>
__global__ void __launch_bounds__(kThreads, 2) prefill(Attention call) {
  LSK_DYNAMIC_SHARED(shared);
  const int block = int(blockIdx.x), all = call.tiles * call.heads;
  Item* const item = reinterpret_cast<Item*>(shared + Shape<D, M>::kItem);
  // The last tiles of a sequence see the most keys: they go first. Every second round goes backwards, so that blocks have
  // about as much to do. Heads that share a key head follow each other, for the cache.
  for (int round = 0; round * call.blocks < all; ++round) {
    const int left = all - 1 - round * call.blocks - (round % 2 == 0 ? block : call.blocks - 1 - block);
    Tile tile;
    if (left < 0 || !find_tile(call, left / call.heads, Shape<D, M>::kRows, &tile)) continue;
    // All warps are done with the item before.
    __syncthreads();
    if (threadIdx.x == 0) *item = {round, tile.token, tile.count, left % call.heads, first_key<D>(call, tile)};
    attend_tile<D, M, kCap>(call, tile, left % call.heads, item, shared);
    // Since it was written there were barriers.
    round = item->round;
  }
}

template <int D, int M>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  constexpr int kRows = Shape<D, M>::kRows;
  constexpr size_t kKeptBytes = kKept<D, M> * sizeof(float4);
  static_assert(2 * kKeptBytes <= kScratch);
  const int64_t tiles = (call.tokens + int64_t(call.sequences) * (kRows - 1)) / kRows, all = tiles * call.heads;
  int64_t blocks = all;
  // A context of one part takes no scratch.
  if (call.sequence_pages > kPart / LSK_PAGE) {
    const int64_t resident = int64_t(scratch_bytes / kScratch) * 2, room = int64_t(scratch_bytes / kKeptBytes);
    const int64_t most = resident > 0 ? resident : room;
    if (most == 0) return cudaErrorInvalidValue;
    if (blocks > most) blocks = most;
  }
  if (all + blocks > INT_MAX) return cudaErrorInvalidValue;
  call.tiles = int(tiles), call.blocks = int(blocks);
  return lsk_launch(call.bend > 0.0f ? prefill<D, M, true> : prefill<D, M, false>, dim3(unsigned(blocks)),
                    dim3(kThreads), Shape<D, M>::kBytes, stream, call);
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
