// Conversion between element types, for tensors that are stored in another type than they are computed with.
#include "elementwise.cuh"

namespace {

// The wider side's accesses are 16 bytes.
template <typename Out, typename In>
constexpr int kWide = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

template <typename Out, typename In, int N>
struct Cast {
  using Loaded = Vec<In, N>;
  using Single = Cast<Out, In, 1>;
  static constexpr int kPer = N;
  Out* out;
  const In* x;

  Cast(Out* out, const In* x) : out(out), x(x) {}
  template <int M>
  __device__ explicit Cast(const Cast<Out, In, M>& other) : out(other.out), x(other.x) {}

  __device__ Loaded load(size_t i) const { return ::load<N>(x + i); }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    float values[N];
    widen(loaded, values);
    store(out + i, narrow<Out>(values));
  }
};

template <typename Out, typename In>
cudaError_t launch(void* out_pointer, const void* x_pointer, size_t n, cudaStream_t stream) {
  Out* const out = static_cast<Out*>(out_pointer);
  const In* const x = static_cast<const In*>(x_pointer);
  constexpr int kPer = kWide<Out, In>;
  if (aligned_for<kPer>(out) && aligned_for<kPer>(x)) return launch_elementwise(Cast<Out, In, kPer>(out, x), n, stream);
  return launch_elementwise(Cast<Out, In, 1>(out, x), n, stream);
}

template <typename Out>
cudaError_t launch_to(void* out, const void* x, int x_dtype, size_t n, cudaStream_t stream) {
  switch (x_dtype) {
    case LSK_F32: return launch<Out, float>(out, x, n, stream);
    case LSK_F16: return launch<Out, __half>(out, x, n, stream);
    case LSK_BF16: return launch<Out, __nv_bfloat16>(out, x, n, stream);
    case LSK_F8E4M3: return launch<Out, __nv_fp8_e4m3>(out, x, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename Out, typename In>
cudaError_t load_pair() {
  return load_kernels(elementwise<Cast<Out, In, kWide<Out, In>>>, elementwise<Cast<Out, In, 1>>);
}

template <typename Out, typename... Ins>
cudaError_t load_to() {
  cudaError_t error = cudaSuccess;
  (void)(((error = load_pair<Out, Ins>()) == cudaSuccess) && ...);
  return error;
}

}  // namespace

cudaError_t lsk_cast(void* out, int out_dtype, const void* x, int x_dtype, size_t n, cudaStream_t stream) {
  switch (out_dtype) {
    case LSK_F32: return launch_to<float>(out, x, x_dtype, n, stream);
    case LSK_BF16: return launch_to<__nv_bfloat16>(out, x, x_dtype, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

static const Loader loader([] {
  const cudaError_t error = load_to<float, float, __half, __nv_bfloat16, __nv_fp8_e4m3>();
  return error != cudaSuccess ? error : load_to<__nv_bfloat16, float, __half, __nv_bfloat16, __nv_fp8_e4m3>();
});
