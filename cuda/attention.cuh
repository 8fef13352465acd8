// What the two attention kernels share: how a context is cut into parts, the tiles in shared memory, and a warp's
// online softmax on tensor cores (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).
//
// What a query comes to has the same bits by either kernel, in whatever company. A part of the context begins at a
// multiple of kPart, a tile of keys at one of kKeys. The tiles of a part are added up one after the other, by one warp;
// then the parts are. Keys that a query does not see change no bit.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace lsk {

// A call, as the kernels get it.
struct Attention {
  lsk_bf16* out;
  const lsk_bf16 *q, *keys, *values;
  const uint32_t *q_offsets, *kv_lens, *pages;
  int sequences, sequence_pages, tokens, heads, kv_heads;
  float scale;    // of scores as powers of two: log2(e) included
  float bend;     // of a soft cap: a score becomes tanh_fast(bend · score) before that; 0: it does not
  int window;     // INT_MAX: none
  int first_tile, tiles;       // of this launch
  int first_head, some_heads;  // of this launch of decode
  int places;                  // in decode's scratch, of each token and head: one for each part
  int blocks;                  // of prefill
  float* scratch;
};

// A softmax over some of the keys, but for its sums of values (Milakov and Gimelshein's names): sums and denominator `d`
// are relative to 2^m, where `m` is the running maximum of the scores, or less by no more than Softmax::kSlack.
struct State {
  float m, d;
};

// Scratch for each multiprocessor, whose number is known by it: what two blocks of prefill keep.
constexpr size_t kScratch = 136 * 1024;

// Keys of a part.
constexpr int kPart = 512;

// Keys of a tile, for heads of a size: a tile lies in one page.
template <int D>
constexpr int kKeys = D > 128 ? 32 : 64;

static_assert(LSK_PAGE % kKeys<128> == 0 && LSK_PAGE % kKeys<256> == 0 && kPart % LSK_PAGE == 0);

// Enqueue attention for heads of `size`, a template's, or return cudaErrorInvalidValue.
cudaError_t attention_decode(Attention call, int size, size_t scratch_bytes, cudaStream_t stream);
cudaError_t attention_prefill(Attention call, int size, size_t scratch_bytes, cudaStream_t stream);

// Calls `launch` with the head size as a type, of those that there are kernels for.
template <typename Launch>
inline cudaError_t with_size(int size, Launch launch) {
  switch (size) {
    case 32: return launch(std::integral_constant<int, 32>());
    case 64: return launch(std::integral_constant<int, 64>());
    case 96: return launch(std::integral_constant<int, 96>());
    case 128: return launch(std::integral_constant<int, 128>());
    case 256: return launch(std::integral_constant<int, 256>());
    default: return cudaErrorInvalidValue;
  }
}

// The same with each of them, up to the first error.
template <typename Launch>
inline cudaError_t with_sizes(Launch launch) {
  for (const int size : {32, 64, 96, 128, 256}) {
    const cudaError_t error = with_size(size, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Some tokens of one sequence, `token .. token + count` of the block: the sequence has `past` keys before the first one's
// own, and its pages are from `pages` on in the table.
struct Tile {
  int token, count, past, pages;
};

// Finds tile `index` when each sequence is cut into tiles of `size` tokens; false: there are fewer. All lanes of a warp
// call it.
__device__ inline bool find_tile(const Attention& call, int index, int size, Tile* tile) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < call.sequences; base += 32) {
    int begin = 0, count = 0, kv_len = 0;
    if (base + lane < call.sequences) {
      begin = int(call.q_offsets[base + lane]);
      count = int(call.q_offsets[base + lane + 1]) - begin;
      kv_len = int(call.kv_lens[base + lane]);
    }
    const int tiles = (count + size - 1) / size;
    int through = tiles;  // tiles of this lane's sequence and those before it
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kWarp, through, distance);
      if (lane >= distance) through += before;
    }
    const unsigned after = __ballot_sync(kWarp, index < through);
    if (after != 0) {
      const int owner = __ffs(int(after)) - 1;
      begin = __shfl_sync(kWarp, begin, owner);
      count = __shfl_sync(kWarp, count, owner);
      const int first = (index - __shfl_sync(kWarp, through - tiles, owner)) * size;
      tile->token = begin + first;
      tile->past = __shfl_sync(kWarp, kv_len, owner) - count + first;
      tile->count = count - first < size ? count - first : size;
      tile->pages = (base + owner) * call.sequence_pages;
      return true;
    }
    index -= __shfl_sync(kWarp, through, 31);
  }
  return false;
}

// The keys that a tile sees: from the first tile of keys on that any of its queries sees.
template <int D>
__device__ inline int first_key(const Attention& call, const Tile& tile) {
  return tile.past + 1 > call.window ? (tile.past + 1 - call.window) / kKeys<D> * kKeys<D> : 0;
}

// What sums are multiplied by when a later part is added to those before it. Those of no keys are 0, and their share is -0:
// -0 is what changes no number that it is added to.
struct Shares {
  float before, later;
};

// Adds a later part's state. A part of which the query sees nothing leaves it as it is.
__device__ inline Shares add_state(State* before, State later) {
  if (later.d == 0.0f) return {1.0f, -0.0f};
  if (before->d == 0.0f) {
    *before = later;
    return {-0.0f, 1.0f};
  }
  const float m = fmaxf(before->m, later.m);
  const Shares shares = {exp2_fast(before->m - m), exp2_fast(later.m - m)};
  *before = {m, fmaf(later.d, shares.later, before->d * shares.before)};
  return shares;
}

__device__ inline float add_sum(float before, float later, Shares shares) {
  return fmaf(later, shares.later, before * shares.before);
}

// A tile in shared memory is rows of D elements without padding. Chunks of 16 bytes change places within a row, so that
// the same chunk of eight consecutive rows, which is what ldmatrix reads, lies in eight different groups of banks.
template <int D>
__device__ inline int swizzle(int row) {
  return D % 64 == 0 ? row & 7 : row >> 1 & 3;
}

// Starts the copy of `ROWS` rows by `THREADS` threads, of which this is `thread`; rows from `valid` on become zeros.
template <int D, int ROWS, int THREADS>
__device__ inline void copy_tile(char* tile, const lsk_bf16* source, int64_t stride, int valid, int thread) {
  // Neighbours copy up to 128 bytes of a row, then the same of the rows below and to the right: the addresses differ by
  // constants, for the swizzle stays within them.
  constexpr int kAcross = D % 64 == 0 ? 8 : 4, kDown = THREADS / kAcross;
  const int first = int(unsigned(thread) / kAcross), chunk = int(unsigned(thread) % kAcross);
  source += first * stride + chunk * 8;
  tile += first * D * 2;
  valid -= first;
#pragma unroll
  for (int row = 0; row < ROWS; row += kDown) {
    const int place = (chunk ^ (kDown % 8 == 0 ? swizzle<D>(first) : swizzle<D>(first + row))) * 16;
#pragma unroll
    for (int right = 0; right < D / 8; right += kAcross) {
      cp_async_16(tile + row * D * 2 + place + right * 16, source + row * stride + right * 8, row < valid);
    }
  }
}

// The softmax of M × 16 queries, held by one warp, over keys that come in tiles of KEYS.
template <int D, int M, int KEYS>
struct Softmax {
  // Sums lag behind the greatest score by at most 2^kSlack, so that they are hardly ever multiplied.
  static constexpr float kSlack = 8.0f;

  float sums[M][D / 8][4];
  float m[M][2], d[M][2];  // of each query, as in State

  __device__ Softmax() { clear(); }

  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < M; ++t) {
      m[t][0] = m[t][1] = -1e30f;
      d[t][0] = d[t][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) sums[t][n][0] = sums[t][n][1] = sums[t][n][2] = sums[t][n][3] = 0.0f;
    }
  }

  // scores = q · keysᵀ; `query(step, a)` gives elements 16 · step .. of the queries.
  template <typename Query>
  __device__ static void score(float (&scores)[M][KEYS / 8][4], Query query, const char* keys) {
    const int lane = threadIdx.x % 32, row = (lane & 7) + (lane >> 4) * 8;
    const int place = ((lane >> 3 & 1) ^ swizzle<D>(row)) * 16;
    keys += row * D * 2;
#pragma unroll
    for (int t = 0; t < M; ++t) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) scores[t][n][0] = scores[t][n][1] = scores[t][n][2] = scores[t][n][3] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[M][4];
      query(step, a);
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + n * 16 * D * 2 + (step * 32 ^ place));
#pragma unroll
        for (int t = 0; t < M; ++t) {
          mma_16x8x16_bf16(scores[t][2 * n], a[t], b[0], b[1]);
          mma_16x8x16_bf16(scores[t][2 * n + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  // A soft cap, but for the factor that is in Attention::scale. It comes before the mask, which it would lift.
  __device__ static void cap(float (&scores)[M][KEYS / 8][4], float bend) {
#pragma unroll
    for (int t = 0; t < M; ++t) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][n][i] = tanh_fast(scores[t][n][i] * bend);
      }
    }
  }

  // Turns scores into weights, and lowers the sums if a score outgrew them. A masked score is -infinity.
  __device__ void weigh(float (&scores)[M][KEYS / 8][4], uint32_t (&weights)[M][KEYS / 16][4], float scale) {
#pragma unroll
    for (int t = 0; t < M; ++t) {
      float next[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = scores[t][0][2 * h];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) most = fmaxf(most, fmaxf(scores[t][n][2 * h], scores[t][n][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(kWarp, most, 1));
        next[h] = fmaxf(most, __shfl_xor_sync(kWarp, most, 2)) * scale;
      }
      if (__ballot_sync(kWarp, next[0] > m[t][0] + kSlack || next[1] > m[t][1] + kSlack) != 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Each query for itself: others are multiplied by 1.
          next[h] = next[h] > m[t][h] + kSlack ? next[h] : m[t][h];
          const float factor = exp2_fast(m[t][h] - next[h]);
          m[t][h] = next[h];
          d[t][h] *= factor;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            sums[t][n][2 * h] *= factor;
            sums[t][n][2 * h + 1] *= factor;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float low = exp2_fast(fmaf(scores[t][n][2 * h], scale, -m[t][h]));
          const float high = exp2_fast(fmaf(scores[t][n][2 * h + 1], scale, -m[t][h]));
          d[t][h] += low + high;
          weights[t][n / 2][n % 2 * 2 + h] = pack_bf16(low, high);
        }
      }
    }
  }

  // sums += weights · values.
  __device__ void add(const uint32_t (&weights)[M][KEYS / 16][4], const char* values) {
    const int lane = threadIdx.x % 32, row = lane & 15;
    const int place = ((lane >> 4) ^ swizzle<D>(row)) * 16;
    values += row * D * 2;
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + k * 16 * D * 2 + (n * 32 ^ place));
#pragma unroll
        for (int t = 0; t < M; ++t) {
          mma_16x8x16_bf16(sums[t][2 * n], weights[t][k], b[0], b[1]);
          mma_16x8x16_bf16(sums[t][2 * n + 1], weights[t][k], b[2], b[3]);
        }
      }
    }
  }

  // Adds up the sums of weights, of which each lane has a part until then.
  __device__ void finish() {
#pragma unroll
    for (int t = 0; t < M; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        d[t][h] += __shfl_xor_sync(kWarp, d[t][h], 1);
        d[t][h] += __shfl_xor_sync(kWarp, d[t][h], 2);
      }
    }
  }
};

// Waits for all threads that share tiles.
template <int THREADS>
__device__ inline void wait_for_all() {
  if constexpr (THREADS == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Goes over keys `begin .. end` of a sequence and a key head, which begin with a tile; the sequence's pages are from
// `pages` on in the table. At the end of each part it calls `ended` with the softmax, where the next part begins, and
// whether there is none. THREADS threads share the three tiles from `tiles` on: while one is multiplied, the next two are
// on their way. The warp's queries are `query(step, a)`; their own keys are `own` and, if `kRise`, those behind it.
template <int D, int M, int THREADS, bool kCap, bool kRise, typename Query, typename Ended>
__device__ inline void attend(const Attention& call, char* tiles, int pages, int kv_head, int begin, int end, int own,
                              Query query, Ended ended) {
  constexpr int kKeys = lsk::kKeys<D>, kTileBytes = kKeys * D * 2;
  const int lane = int(threadIdx.x) % 32;
  constexpr int kMore = kRise ? 16 * M - 1 : 0;  // positions behind the first query's own, of the last
  // Every register counts here: a warp's sums and scores take 192 of 255.
  const auto page_of = [&](int key) { return key < end ? call.pages[pages + key / LSK_PAGE] : 0; };
  const auto copy = [&](int to, const lsk_bf16* from, uint32_t page, int key) {
    if (key < end) {
      // There is no memory for more rows than 32 bits count.
      const uint32_t row = (page * call.kv_heads + kv_head) * LSK_PAGE + (kKeys == LSK_PAGE ? 0 : key % LSK_PAGE);
      copy_tile<D, kKeys, THREADS>(tiles + to, from + uint64_t(row) * D, D, end - key, int(threadIdx.x) % THREADS);
    }
    cp_async_commit();
  };
  // The third tile is where these two are not.
  int key_tile = 0, value_tile = kTileBytes;
  uint32_t page = page_of(begin);
  copy(key_tile, call.keys, page, begin);
  copy(value_tile, call.values, page, begin);
  // Of the next tile: it is read long before it is needed.
  page = page_of(begin + kKeys);

  Softmax<D, M, kKeys> softmax;
  int key = begin;
  // A loop of its own for each part: what ends one takes no registers from the others.
  do {
    const int next = key / kPart * kPart + kPart, part_end = next < end ? next : end;
    for (; key < part_end; key += kKeys) {
      const int over = own - key;  // of the first query over the first key
      const bool seen = over + kMore >= 0 && over - (kKeys - 1) < call.window;
      uint32_t weights[M][kKeys / 16][4];
      // The keys are here; every warp is done with the values before.
      cp_async_wait<1>();
      wait_for_all<THREADS>();
      const int free_tile = 3 * kTileBytes - key_tile - value_tile;
      copy(free_tile, call.keys, page, key + kKeys);
      if (seen) {
        float scores[M][kKeys / 8][4];
        softmax.score(scores, query, tiles + key_tile);
        if constexpr (kCap) softmax.cap(scores, call.bend);
        // Of this lane's first query over its first key.
        const int ahead = over + (kRise ? lane / 4 : 0) - lane % 4 * 2;
        if (over < kKeys - 1 || over + kMore >= call.window) {
#pragma unroll
          for (int t = 0; t < M; ++t) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int behind = ahead + (kRise ? t * 16 + i / 2 * 8 : 0) - n * 8 - i % 2;
                if (behind < 0 || behind >= call.window) scores[t][n][i] = -INFINITY;
              }
            }
          }
        }
        softmax.weigh(scores, weights, call.scale);
      }
      // The values are here; every warp is done with the keys.
      cp_async_wait<1>();
      wait_for_all<THREADS>();
      copy(key_tile, call.values, page, key + kKeys);
      page = page_of(key + 2 * kKeys);
      if (seen) softmax.add(weights, tiles + value_tile);
      value_tile = key_tile, key_tile = free_tile;
    }
    softmax.finish();
    ended(softmax, key, key >= end);
    softmax.clear();
  } while (key < end);
}

}  // namespace lsk
