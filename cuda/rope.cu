// Rotary position embedding (Su et al. 2021, arXiv:2104.09864), from F32 to BF16. Sine and cosine are computed once for a
// token and a frequency, whatever the number of heads, while the first elements are on their way.
#include "common.cuh"

namespace {

constexpr int kBlock = 256, kUnroll = 2;

// Tokens whose sines a block computes at most.
constexpr int64_t kMostTokens = 16;

struct Rope {
  lsk_bf16* out;
  const float* x;
  const uint32_t* positions;
  const float* inv_freq;
  float scale;
  int64_t tokens;
  int heads, size, half, each;  // `half` pairs a head, `each` tokens a block
};

// Of an F32 angle up to 2^32, to 1e-6. Its turns are taken off in double precision: sincosf does that for great angles with
// a table in local memory.
__device__ inline void sine_and_cosine(float angle, float* sine, float* cosine) {
  const double turns = double(angle) * 0.15915494309189535;
  sincospif(2.0f * float(turns - rint(turns)), sine, cosine);
}

// A thread takes N pairs at once: half and size are multiples of N.
template <int N, bool kInterleaved>
__global__ void __launch_bounds__(kBlock) rope(Rope call) {
  LSK_DYNAMIC_SHARED(shared);
  const int half = call.half, packs = half / N;
  const int64_t first = int64_t(blockIdx.x) * call.each, begin = first * call.heads * call.size;
  const int tokens = int(call.tokens - first < call.each ? call.tokens - first : call.each);
  float* const cosines = reinterpret_cast<float*>(shared);
  float* const sines = cosines + call.each * half;
  const int items = tokens * call.heads * packs;
  // The second elements of the pairs lie this far from the first.
  const int apart = kInterleaved ? N : half;
  bool ready = false;
  for (int base = 0; base < items; base += kBlock * kUnroll) {
    Vec<float, N> low[kUnroll], high[kUnroll];
    int place[kUnroll], angle[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int item = base + i * kBlock + int(threadIdx.x);
      if (item < items) {
        const int row = int(unsigned(item) / unsigned(packs)), pack = item - row * packs;
        angle[i] = int(unsigned(row) / unsigned(call.heads)) * half + pack * N;
        place[i] = row * call.size + pack * N * (kInterleaved ? 2 : 1);
        low[i] = load<N>(call.x + begin + place[i]);
        high[i] = load<N>(call.x + begin + place[i] + apart);
      }
    }
    if (!ready) {
      for (int i = threadIdx.x; i < tokens * half; i += kBlock) {
        const int token = int(unsigned(i) / unsigned(half));
        sine_and_cosine(float(call.positions[first + token]) * call.inv_freq[i - token * half], &sines[i], &cosines[i]);
        sines[i] *= call.scale, cosines[i] *= call.scale;
      }
      __syncthreads();
      ready = true;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * kBlock + int(threadIdx.x) < items) {
        const Vec<float, N> cosine = load<N>(cosines + angle[i]), sine = load<N>(sines + angle[i]);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          // Interleaved, the 2 · N elements are N pairs side by side.
          float& first_of = kInterleaved ? (2 * k < N ? low[i] : high[i]).at[2 * k % N] : low[i].at[k];
          float& second_of = kInterleaved ? (2 * k + 1 < N ? low[i] : high[i]).at[(2 * k + 1) % N] : high[i].at[k];
          const float a = first_of, b = second_of;
          first_of = a * cosine.at[k] - b * sine.at[k];
          second_of = b * cosine.at[k] + a * sine.at[k];
        }
        store(call.out + begin + place[i], narrow<lsk_bf16>(low[i].at));
        store(call.out + begin + place[i] + apart, narrow<lsk_bf16>(high[i].at));
      }
    }
  }
  // What is in no pair is passed on.
  const int others = call.size / N - 2 * packs, copies = tokens * call.heads * others;
  for (int i = threadIdx.x; i < copies; i += kBlock) {
    const int row = int(unsigned(i) / unsigned(others));
    const int64_t at = begin + int64_t(row) * call.size + (2 * packs + i - row * others) * N;
    store(call.out + at, narrow<lsk_bf16>(load<N>(call.x + at).at));
  }
}

template <int N>
cudaError_t launch(Rope call, bool interleaved, cudaStream_t stream) {
  // As many tokens as give every thread its share of pairs, those counted in that do not turn.
  const int64_t share = kBlock * kUnroll / (int64_t(call.heads) * ((call.size + 2 * N - 1) / (2 * N)));
  call.each = int(share < 1 ? 1 : share < kMostTokens ? share : kMostTokens);
  const size_t shared_bytes = size_t(call.each) * call.half * 2 * sizeof(float);
  const dim3 grid(unsigned((call.tokens + call.each - 1) / call.each));
  return lsk_launch(interleaved ? rope<N, true> : rope<N, false>, grid, dim3(kBlock), shared_bytes, stream, call);
}

}  // namespace

cudaError_t lsk_rope(lsk_bf16* out, const float* x, const uint32_t* positions, const float* inv_freq, float scale,
                     int64_t tokens, int heads, int size, int half, int interleaved, cudaStream_t stream) {
  // The sines of a token must fit shared memory.
  const bool valid = size >= 0 && size <= 4096 && half >= 0 && half <= size / 2 && heads >= 0 && heads <= 65536;
  if (!valid) return cudaErrorInvalidValue;
  if (tokens == 0 || heads == 0 || size == 0) return cudaSuccess;
  const Rope call = {out, x, positions, inv_freq, scale, tokens, heads, size, half, 1};
  const bool wide = size % 4 == 0 && half % 4 == 0 && aligned_for<4>(x) && aligned_for<4>(out);
  return wide ? launch<4>(call, interleaved != 0, stream) : launch<1>(call, interleaved != 0, stream);
}

static const Loader loader([] {
  return load_kernels(rope<4, false>, rope<4, true>, rope<1, false>, rope<1, true>);
});
