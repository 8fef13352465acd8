// Small kernels on rows: lookups, addition, a row repeated, the greatest element.
#include "elementwise.cuh"

namespace {

constexpr int kBlock = 256;

// out[r] = table[indices[r]], one row a block.
template <typename In, int N>
__global__ void __launch_bounds__(kBlock)
    look_up(float* out, const In* table, const uint32_t* indices, int64_t hidden, int64_t most) {
  const int64_t index = indices[blockIdx.x];
  table += (index < most ? index : most) * hidden;
  out += int64_t(blockIdx.x) * hidden;
#pragma unroll 4
  for (int64_t column = int64_t(threadIdx.x) * N; column < hidden; column += kBlock * N) {
    float values[N];
    widen(load<N>(table + column), values);
    store(out + column, narrow<float>(values));
  }
}

template <typename In>
cudaError_t launch_look_up(float* out, const In* table, const uint32_t* indices, int64_t rows, int64_t hidden,
                           int64_t most, cudaStream_t stream) {
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = hidden % 4 == 0 && aligned_for<4>(out) && aligned_for<4>(table);
  return lsk_launch(wide ? look_up<In, 4> : look_up<In, 1>, dim3(unsigned(rows)), dim3(kBlock), 0, stream, out, table,
                    indices, hidden, most);
}

template <int N>
struct Add {
  struct Loaded {
    Vec<float, N> x;
    Vec<lsk_bf16, N> y;
  };
  using Single = Add<1>;
  static constexpr int kPer = N;
  float* x;
  const lsk_bf16* y;

  Add(float* x, const lsk_bf16* y) : x(x), y(y) {}
  template <int M>
  __device__ explicit Add(const Add<M>& other) : x(other.x), y(other.y) {}

  __device__ Loaded load(size_t i) const { return {::load<N>(x + i), ::load<N>(y + i)}; }
  __device__ void finish(size_t i, Loaded loaded) const {
#pragma unroll
    for (int k = 0; k < N; ++k) loaded.x.at[k] += widen(loaded.y.at[k]);
    store(x + i, loaded.x);
  }
};

// Each thread writes its columns of every row that blockIdx.y stands for.
template <typename Out, int N>
__global__ void __launch_bounds__(kBlock)
    broadcast_row(Out* out, const lsk_bf16* bias, int64_t rows, int64_t columns) {
  const int64_t column = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * N;
  if (column >= columns) return;
  float wide[N];
  widen(load<N>(bias + column), wide);
  const Vec<Out, N> values = narrow<Out>(wide);
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) store(out + row * columns + column, values);
}

template <typename Out>
cudaError_t launch_broadcast_row(Out* out, const lsk_bf16* bias, int64_t rows, int64_t columns, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(Out);
  constexpr int64_t kMostRows = 256;
  const bool wide = columns % N == 0 && aligned_for<N>(out) && aligned_for<N>(bias);
  const int64_t each = kBlock * (wide ? N : 1);
  const dim3 grid(unsigned((columns + each - 1) / each), unsigned(rows < kMostRows ? rows : kMostRows));
  return lsk_launch(wide ? broadcast_row<Out, N> : broadcast_row<Out, 1>, grid, dim3(kBlock), 0, stream, out, bias, rows,
                    columns);
}

constexpr int kGreatestBlock = 1024;

constexpr unsigned kNoIndex = 0xffffffffu;

// A value and where it stands. No index: nothing was seen yet.
struct Greatest {
  float value;
  unsigned index;

  // Nothing is greater than a NaN, so that one stays.
  __device__ void see(float other, unsigned at) {
    if (isnan(other) || other > value || (other == value && at < index)) value = other, index = at;
  }
};

__device__ inline Greatest greatest_of_warp(Greatest best) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const float value = __shfl_xor_sync(kWarp, best.value, distance);
    best.see(value, __shfl_xor_sync(kWarp, best.index, distance));
  }
  return best;
}

// One row a block.
template <int N>
__global__ void __launch_bounds__(kGreatestBlock) argmax(uint32_t* out, const float* x, int64_t columns) {
  x += int64_t(blockIdx.x) * columns;
  Greatest best = {-INFINITY, kNoIndex};
#pragma unroll 4
  for (int64_t column = int64_t(threadIdx.x) * N; column < columns; column += kGreatestBlock * N) {
    const Vec<float, N> values = load<N>(x + column);
#pragma unroll
    for (int k = 0; k < N; ++k) best.see(values.at[k], unsigned(column + k));
  }
  best = greatest_of_warp(best);
  LSK_SHARED(Greatest, of_warps, kGreatestBlock / 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = greatest_of_warp(of_warps[lane]);
  if (lane == 0) out[blockIdx.x] = isnan(best.value) ? kNoIndex : best.index;
}

}  // namespace

cudaError_t lsk_embed(float* out, const void* table_bf16, const uint32_t* ids, int64_t tokens, int64_t hidden,
                      int64_t vocab, cudaStream_t stream) {
  return launch_look_up(out, static_cast<const lsk_bf16*>(table_bf16), ids, tokens, hidden, vocab - 1, stream);
}

cudaError_t lsk_gather(float* out, const float* x, const uint32_t* indices, int64_t rows, int64_t hidden,
                       cudaStream_t stream) {
  return launch_look_up(out, x, indices, rows, hidden, INT64_MAX, stream);
}

cudaError_t lsk_add(float* x, const lsk_bf16* y, size_t n, cudaStream_t stream) {
  if (aligned_for<4>(x) && aligned_for<4>(y)) return launch_elementwise(Add<4>(x, y), n, stream);
  return launch_elementwise(Add<1>(x, y), n, stream);
}

cudaError_t lsk_broadcast_row(void* out, int out_dtype, const lsk_bf16* bias, int64_t rows, int64_t columns,
                              cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  switch (out_dtype) {
    case LSK_F32: return launch_broadcast_row(static_cast<float*>(out), bias, rows, columns, stream);
    case LSK_BF16: return launch_broadcast_row(static_cast<lsk_bf16*>(out), bias, rows, columns, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t lsk_argmax(uint32_t* out, const float* x, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  // Without columns there is no x to look at.
  if (columns <= 0 || columns >= int64_t(kNoIndex)) return cudaErrorInvalidValue;
  const bool wide = columns % 4 == 0 && aligned_for<4>(x);
  return lsk_launch(wide ? argmax<4> : argmax<1>, dim3(unsigned(rows)), dim3(kGreatestBlock), 0, stream, out, x,
                    columns);
}

static const Loader loader([] {
  return load_kernels(look_up<lsk_bf16, 4>, look_up<lsk_bf16, 1>, look_up<float, 4>, look_up<float, 1>,
                      elementwise<Add<4>>, elementwise<Add<1>>, broadcast_row<float, 4>, broadcast_row<float, 1>,
                      broadcast_row<lsk_bf16, 8>, broadcast_row<lsk_bf16, 1>, argmax<4>, argmax<1>);
});
