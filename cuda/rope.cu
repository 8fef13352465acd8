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

// Of N pairs that lie side by side, the first elements and the second ones.
template <int N>
__device__ inline void part(Vec<float, N>& low, Vec<float, N>& high) {
  const Vec<float, N> pairs[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) (i % 2 == 0 ? low : high).at[i / 2] = pairs[i / N].at[i % N];
}

// And back.
template <int N>
__device__ inline void join(Vec<float, N>& low, Vec<float, N>& high) {
  const Vec<float, N> parts[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) (i < N ? low : high).at[i % N] = parts[i % 2].at[i / 2];
}

// A thread takes N pairs at once: half and size are multiples of N.
template <int N, int kLayout>
__global__ void __launch_bounds__(kBlock) rope(Rope call) {
  LSK_DYNAMIC_SHARED(shared);
  const int half = call.half, packs = half / N;
  const int64_t first = int64_t(blockIdx.x) * call.each, begin = first * call.heads * call.size;
  const int tokens = int(call.tokens - first < call.each ? call.tokens - first : call.each);
  float* const cosines = reinterpret_cast<float*>(shared);
  float* const sines = cosines + call.each * half;
  const int items = tokens * call.heads * packs;
  constexpr bool kPairs = kLayout != LSK_HALVES, kToPairs = kLayout == LSK_INTERLEAVED;
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
        place[i] = row * call.size + pack * N;
        const float* const from = call.x + begin + place[i] + (kPairs ? pack * N : 0);
        low[i] = load<N>(from);
        high[i] = load<N>(from + (kPairs ? N : half));
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
        if (kPairs) part(low[i], high[i]);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float a = low[i].at[k], b = high[i].at[k];
          low[i].at[k] = a * cosine.at[k] - b * sine.at[k];
          high[i].at[k] = b * cosine.at[k] + a * sine.at[k];
        }
        if (kToPairs) join(low[i], high[i]);
        lsk_bf16* const to = call.out + begin + place[i] + (kToPairs ? place[i] % call.size : 0);
        store(to, narrow<lsk_bf16>(low[i].at));
        store(to + (kToPairs ? N : half), narrow<lsk_bf16>(high[i].at));
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
cudaError_t launch(Rope call, int layout, cudaStream_t stream) {
  constexpr decltype(&rope<N, LSK_HALVES>) kKernels[] = {rope<N, LSK_HALVES>, rope<N, LSK_INTERLEAVED>, rope<N, LSK_TO_HALVES>};
  // As many tokens as give every thread its share of pairs, those counted in that do not turn.
  const int64_t share = kBlock * kUnroll / (int64_t(call.heads) * ((call.size + 2 * N - 1) / (2 * N)));
  call.each = int(share < 1 ? 1 : share < kMostTokens ? share : kMostTokens);
  const size_t shared_bytes = size_t(call.each) * call.half * 2 * sizeof(float);
  const dim3 grid(unsigned((call.tokens + call.each - 1) / call.each));
  return lsk_launch(kKernels[layout], grid, dim3(kBlock), shared_bytes, stream, call);
}

}  // namespace

cudaError_t lsk_rope(lsk_bf16* out, const float* x, const uint32_t* positions, const float* inv_freq, float scale,
                     int64_t tokens, int heads, int size, int half, int layout, cudaStream_t stream) {
  // The sines of a token must fit shared memory.
  const bool valid = size >= 0 && size <= 4096 && half >= 0 && half <= size / 2 && heads >= 0 && heads <= 65536 && layout >= LSK_HALVES &&
                     layout <= LSK_TO_HALVES;
  if (!valid) return cudaErrorInvalidValue;
  if (tokens == 0 || heads == 0 || size == 0) return cudaSuccess;
  const Rope call = {out, x, positions, inv_freq, scale, tokens, heads, size, half, 1};
  const bool wide = size % 4 == 0 && half % 4 == 0 && aligned_for<4>(x) && aligned_for<4>(out);
  return wide ? launch<4>(call, layout, stream) : launch<1>(call, layout, stream);
}

static const Loader loader([] {
  return load_kernels(rope<4, LSK_HALVES>, rope<4, LSK_INTERLEAVED>, rope<4, LSK_TO_HALVES>, rope<1, LSK_HALVES>, rope<1, LSK_INTERLEAVED>,
                      rope<1, LSK_TO_HALVES>);
});
