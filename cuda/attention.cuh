// What the two attention kernels share: how a context is cut into parts, the tiles in shared memory, and a warp's
// online softmax on tensor cores (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace lsk {

// A call, as the kernels get it.
struct Attention {
  lsk_bf16* out;
  const lsk_bf16 *q, *keys, *values;
  const uint32_t *q_offsets, *kv_lens, *rows;
  int sequences, tokens, heads, kv_heads;
  int64_t capacity;
  float scale;    // of scores as powers of two: log2(e) included
  float bend;     // of a soft cap: a score becomes tanh_fast(bend · score) before that; 0: it does not
  int window;     // INT_MAX: none
  int splits;     // parts that a context is cut into, at most
  float* partial;  // what the parts gave: [tokens, heads, splits, size] sums, then [tokens, heads, splits] State
};

// A softmax over some of the keys, but for its sums of values (Milakov and Gimelshein's names): sums and denominator `d`
// are relative to 2^m, where `m` is the running maximum of the scores, or less by no more than Softmax::kSlack.
struct State {
  float m, d;
};

// Scratch for each multiprocessor, whose number is known by it.
constexpr size_t kScratch = 128 * 1024;

// Enqueue attention for heads of `size`, a template's, or return cudaErrorInvalidValue.
cudaError_t attention_decode(Attention call, int size, size_t scratch_bytes, cudaStream_t stream);
cudaError_t attention_prefill(Attention call, int size, size_t scratch_bytes, cudaStream_t stream);

// Adds up the parts of a call whose tiles are `tile` tokens and whose parts are `least` keys or more.
cudaError_t attention_combine(Attention call, int size, int tile, int least, cudaStream_t stream);

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

// How many parts fit the scratch, no more than `wanted` and one at least.
inline int parts_that_fit(const Attention& call, int size, size_t scratch_bytes, int64_t wanted) {
  const int64_t one = int64_t(call.tokens) * call.heads * (size * sizeof(float) + sizeof(State));
  const int64_t fit = int64_t(scratch_bytes) / one;
  const int64_t parts = wanted < fit ? wanted : fit;
  return parts > 1 ? int(parts) : 1;
}

// Tokens `first .. first + count` of one sequence, `token ..` of the block: the sequence has `left` from there on,
// `past` keys before the first one's own, and `row` of the cache.
struct Tile {
  int token, first, count, left, past, row;
};

// Finds tile `index` when each sequence is cut into tiles of `size` tokens; false: there are fewer. All lanes of a warp
// call it.
__device__ inline bool find_tile(const Attention& call, int index, int size, Tile* tile) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < call.sequences; base += 32) {
    int begin = 0, count = 0, kv_len = 0, row = 0;
    if (base + lane < call.sequences) {
      begin = int(call.q_offsets[base + lane]);
      count = int(call.q_offsets[base + lane + 1]) - begin;
      kv_len = int(call.kv_lens[base + lane]);
      row = int(call.rows[base + lane]);
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
      tile->first = (index - __shfl_sync(kWarp, through - tiles, owner)) * size;
      tile->token = begin + tile->first;
      tile->past = __shfl_sync(kWarp, kv_len, owner) - count + tile->first;
      tile->left = count - tile->first;
      tile->count = tile->left < size ? tile->left : size;
      tile->row = __shfl_sync(kWarp, row, owner);
      return true;
    }
    index -= __shfl_sync(kWarp, through, 31);
  }
  return false;
}

// A part of the keys that a tile sees, and how many parts there are: as many as `splits` and `least` keys allow.
struct Part {
  int begin, end, parts;
};

__device__ inline Part part_of(const Attention& call, const Tile& tile, int split, int least) {
  constexpr int kStep = 64;
  const int end = tile.past + tile.count;
  const int begin = tile.past + 1 > call.window ? tile.past + 1 - call.window : 0;
  const int even = (end - begin + call.splits - 1) / call.splits;
  const int length = even < least ? least : (even + kStep - 1) / kStep * kStep;
  Part part;
  part.parts = (end - begin + length - 1) / length;
  part.begin = split < part.parts ? begin + split * length : end;
  part.end = end - part.begin < length ? end : part.begin + length;
  return part;
}

__device__ inline float* partial_sums(const Attention& call, int size, int token, int head, int split) {
  return call.partial + ((int64_t(token) * call.heads + head) * call.splits + split) * size;
}

__device__ inline State* partial_state(const Attention& call, int size, int token, int head, int split) {
  float* const states = call.partial + int64_t(call.tokens) * call.heads * call.splits * size;
  return reinterpret_cast<State*>(states) + (int64_t(token) * call.heads + head) * call.splits + split;
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

  __device__ Softmax() {
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
          next[h] = fmaxf(next[h], m[t][h]);
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
          const float low = exp2_fast(scores[t][n][2 * h] * scale - m[t][h]);
          const float high = exp2_fast(scores[t][n][2 * h + 1] * scale - m[t][h]);
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

}  // namespace lsk
