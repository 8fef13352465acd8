// Gated activations, in place of the gate: silu(gate) * up and gelu(gate) * up (Shazeer 2020, arXiv:2002.05202).
#include "elementwise.cuh"

namespace {

// Both are x / (1 + e^-f(x)): silu with f(x) = x, and gelu, in its form with a hyperbolic tangent (Hendrycks and Gimpel
// 2016, arXiv:1606.08415), since (1 + tanh(z)) / 2 = 1 / (1 + e^-2z), with f(x) = 2 √(2/π) (x + 0.044715 x³).
struct Silu {
  __device__ static float exponent(float x) { return x; }
};

struct Gelu {
  __device__ static float exponent(float x) { return 1.59576912160573f * (x + 0.044715f * x * x * x); }
};

template <typename Activation, int N>
struct Gated {
  struct Loaded {
    Vec<lsk_bf16, N> gate, up;
  };
  using Single = Gated<Activation, 1>;
  static constexpr int kPer = N;
  lsk_bf16* gate;
  const lsk_bf16* up;

  Gated(lsk_bf16* gate, const lsk_bf16* up) : gate(gate), up(up) {}
  template <int M>
  __device__ explicit Gated(const Gated<Activation, M>& other) : gate(other.gate), up(other.up) {}

  __device__ Loaded load(size_t i) const { return {::load<N>(gate + i), ::load<N>(up + i)}; }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    float gates[N], ups[N];
    widen(loaded.gate, gates);
    widen(loaded.up, ups);
#pragma unroll
    for (int k = 0; k < N; ++k) gates[k] *= ups[k] / (1.0f + expf(-Activation::exponent(gates[k])));
    store(gate + i, narrow<lsk_bf16>(gates));
  }
};

template <typename Activation>
cudaError_t launch(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream) {
  if (aligned_for<8>(gate) && aligned_for<8>(up)) {
    return launch_elementwise(Gated<Activation, 8>(gate, up), n, stream);
  }
  return launch_elementwise(Gated<Activation, 1>(gate, up), n, stream);
}

}  // namespace

cudaError_t lsk_swiglu(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream) {
  return launch<Silu>(gate, up, n, stream);
}

cudaError_t lsk_geglu(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream) {
  return launch<Gelu>(gate, up, n, stream);
}

static const Loader loader([] {
  return load_kernels(elementwise<Gated<Silu, 8>>, elementwise<Gated<Silu, 1>>, elementwise<Gated<Gelu, 8>>,
                      elementwise<Gated<Gelu, 1>>);
});
