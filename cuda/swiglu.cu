// silu(gate) * up, in place of gate (Shazeer 2020, arXiv:2002.05202).
#include "elementwise.cuh"

namespace {

template <int N>
struct Swiglu {
  struct Loaded {
    Vec<lsk_bf16, N> gate, up;
  };
  using Single = Swiglu<1>;
  static constexpr int kPer = N;
  lsk_bf16* gate;
  const lsk_bf16* up;

  Swiglu(lsk_bf16* gate, const lsk_bf16* up) : gate(gate), up(up) {}
  template <int M>
  __device__ explicit Swiglu(const Swiglu<M>& other) : gate(other.gate), up(other.up) {}

  __device__ Loaded load(size_t i) const { return {::load<N>(gate + i), ::load<N>(up + i)}; }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    float gates[N], ups[N];
    widen(loaded.gate, gates);
    widen(loaded.up, ups);
#pragma unroll
    for (int k = 0; k < N; ++k) gates[k] *= ups[k] / (1.0f + expf(-gates[k]));
    store(gate + i, narrow<lsk_bf16>(gates));
  }
};

}  // namespace

cudaError_t lsk_swiglu(lsk_bf16* gate, const lsk_bf16* up, size_t n, cudaStream_t stream) {
  if (aligned_for<8>(gate) && aligned_for<8>(up)) return launch_elementwise(Swiglu<8>(gate, up), n, stream);
  return launch_elementwise(Swiglu<1>(gate, up), n, stream);
}

static const Loader loader([] { return load_kernels(elementwise<Swiglu<8>>, elementwise<Swiglu<1>>); });
