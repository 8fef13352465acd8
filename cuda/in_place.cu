// What changes each element of one tensor by a number: a factor, and a soft cap (Gemma 2's report, arXiv:2408.00118).
#include "elementwise.cuh"

namespace {

struct Scale {
  float factor;
  __device__ float operator()(float x) const { return x * factor; }
};

struct SoftCap {
  float cap;
  __device__ float operator()(float x) const { return cap * tanhf(x / cap); }
};

// x = change(x).
template <typename Change, typename T, int N>
struct InPlace {
  using Loaded = Vec<T, N>;
  using Single = InPlace<Change, T, 1>;
  static constexpr int kPer = N;
  T* x;
  Change change;

  InPlace(T* x, Change change) : x(x), change(change) {}
  template <int M>
  __device__ explicit InPlace(const InPlace<Change, T, M>& other) : x(other.x), change(other.change) {}

  __device__ Loaded load(size_t i) const { return ::load<N>(x + i); }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    float values[N];
    widen(loaded, values);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = change(values[k]);
    store(x + i, narrow<T>(values));
  }
};

// Accesses are 16 bytes.
template <typename Change, typename T>
using Wide = InPlace<Change, T, 16 / sizeof(T)>;

template <typename T, typename Change>
cudaError_t launch(void* pointer, Change change, size_t n, cudaStream_t stream) {
  T* const x = static_cast<T*>(pointer);
  if (aligned_for<Wide<Change, T>::kPer>(x)) return launch_elementwise(Wide<Change, T>(x, change), n, stream);
  return launch_elementwise(InPlace<Change, T, 1>(x, change), n, stream);
}

template <typename Change, typename T>
cudaError_t load_both() {
  return load_kernels(elementwise<Wide<Change, T>>, elementwise<InPlace<Change, T, 1>>);
}

}  // namespace

cudaError_t lsk_scale(void* x, int dtype, float factor, size_t n, cudaStream_t stream) {
  switch (dtype) {
    case LSK_F32: return launch<float>(x, Scale{factor}, n, stream);
    case LSK_BF16: return launch<lsk_bf16>(x, Scale{factor}, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t lsk_soft_cap(float* x, float cap, size_t n, cudaStream_t stream) {
  return launch<float>(x, SoftCap{cap}, n, stream);
}

static const Loader loader([] {
  cudaError_t error = load_both<Scale, float>();
  if (error == cudaSuccess) error = load_both<Scale, lsk_bf16>();
  return error == cudaSuccess ? load_both<SoftCap, float>() : error;
});
