// Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467): of the residual stream, alone or after something was
// added to it, and of each head of a query or key, or of all of a token's together, in place.
#include "common.cuh"

namespace {

// A row of at most this many elements is kept in the registers of one block: four times four a thread.
constexpr int kVecs = 4, kMostInRegisters = 1024 * kVecs * 4;

// Threads of a block when several rows share it, one warp to a row.
constexpr int kWarps = 4;

// The sum over the threads of a row: a warp, or a whole block if `blockDim.x` is more.
__device__ inline float sum_over_row(float x) {
  x = sum_over_lanes(x, 32);
  if (blockDim.x == 32) return x;
  LSK_SHARED(float, sums, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  return sum_over_lanes(lane < int(blockDim.x / 32) ? sums[lane] : 0.0f, 32);
}

template <typename Out>
struct Norm {
  Out* out;  // may be x: a thread writes what it alone has read, and after that
  const float* x;
  float* sum;  // where x + y goes, x itself; not used without y
  const lsk_bf16 *y, *weight;
  float offset, eps;
  int64_t rows, hidden;
};

// One row for each value of threadIdx.y, read once: hidden is a multiple of 4.
template <typename Out, bool kAdd>
__global__ void __launch_bounds__(1024) norm(Norm<Out> call) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < call.rows;
  const int hidden = live ? int(call.hidden) : 0;
  const int64_t begin = row * call.hidden;
  Vec<float, 4> x[kVecs];
  Vec<lsk_bf16, 4> y[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = int(i * blockDim.x + threadIdx.x) * 4;
    if (column < hidden) {
      x[i] = load<4>(call.x + begin + column);
      if (kAdd) y[i] = load<4>(call.y + begin + column);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = int(i * blockDim.x + threadIdx.x) * 4;
    if (column < hidden) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (kAdd) x[i].at[k] += widen(y[i].at[k]);
        squares += x[i].at[k] * x[i].at[k];
      }
      if (kAdd) store(call.sum + begin + column, x[i]);
    }
  }
  const float factor = 1.0f / sqrtf(sum_over_row(squares) / float(call.hidden) + call.eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int column = int(i * blockDim.x + threadIdx.x) * 4;
    if (column < hidden) {
      float scaled[4];
      widen(load<4>(call.weight + column), scaled);
#pragma unroll
      for (int k = 0; k < 4; ++k) scaled[k] = (call.offset + scaled[k]) * (x[i].at[k] * factor);
      store(call.out + begin + column, narrow<Out>(scaled));
    }
  }
}

// Any row, read twice.
template <typename Out, bool kAdd>
__global__ void __launch_bounds__(1024) norm_any(Norm<Out> call) {
  const int64_t begin = int64_t(blockIdx.x) * call.hidden;
  float squares = 0.0f;
#pragma unroll 4
  for (int64_t column = threadIdx.x; column < call.hidden; column += blockDim.x) {
    float x = call.x[begin + column];
    if (kAdd) {
      x += widen(call.y[begin + column]);
      call.sum[begin + column] = x;
    }
    squares += x * x;
  }
  const float factor = 1.0f / sqrtf(sum_over_row(squares) / float(call.hidden) + call.eps);
  const float* const source = kAdd ? call.sum : call.x;
#pragma unroll 4
  for (int64_t column = threadIdx.x; column < call.hidden; column += blockDim.x) {
    const float weight = call.offset + widen(call.weight[column]);
    narrow(source[begin + column] * factor * weight, &call.out[begin + column]);
  }
}

template <bool kAdd, typename Out>
cudaError_t launch(const Norm<Out>& call, cudaStream_t stream) {
  if (call.rows == 0 || call.hidden == 0) return cudaSuccess;
  const bool wide = call.hidden % 4 == 0 && call.hidden <= kMostInRegisters && aligned_for<4>(call.x) &&
                    aligned_for<4>(call.out) && aligned_for<4>(call.weight) && (!kAdd || aligned_for<4>(call.y));
  const unsigned threads = unsigned(((wide ? call.hidden : 4096) + 32 * kVecs * 4 - 1) / (32 * kVecs * 4) * 32);
  if (!wide) return lsk_launch(norm_any<Out, kAdd>, dim3(unsigned(call.rows)), dim3(threads), 0, stream, call);
  const unsigned rows = threads == 32 ? kWarps : 1;
  const dim3 grid(unsigned((call.rows + rows - 1) / rows));
  return lsk_launch(norm<Out, kAdd>, grid, dim3(threads, rows), 0, stream, call);
}

constexpr int kHeadBlock = 256;

// `lanes` neighbours, a power of two, share a row of up to 8 · lanes elements, a multiple of 4.
__global__ void __launch_bounds__(kHeadBlock)
    norm_heads(float* x, const lsk_bf16* weight, float offset, float eps, int64_t rows, int size, int lanes) {
  const int lane = int(threadIdx.x) % lanes;
  const int64_t row = (int64_t(blockIdx.x) * kHeadBlock + threadIdx.x) / lanes;
  x += row * size;
  Vec<float, 4> values[2];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = (i * lanes + lane) * 4;
    if (row < rows && column < size) values[i] = load<4>(x + column);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row < rows && (i * lanes + lane) * 4 < size) {
#pragma unroll
      for (int k = 0; k < 4; ++k) squares += values[i].at[k] * values[i].at[k];
    }
  }
  const float factor = 1.0f / sqrtf(sum_over_lanes(squares, lanes) / float(size) + eps);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = (i * lanes + lane) * 4;
    if (row < rows && column < size) {
      const Vec<lsk_bf16, 4> scale = load<4>(weight + column);
#pragma unroll
      for (int k = 0; k < 4; ++k) values[i].at[k] *= factor * (offset + widen(scale.at[k]));
      store(x + column, values[i]);
    }
  }
}

}  // namespace

cudaError_t lsk_rms_norm(lsk_bf16* out, const float* x, const lsk_bf16* weight, float offset, float eps, int64_t rows,
                         int64_t hidden, cudaStream_t stream) {
  return launch<false>(Norm<lsk_bf16>{out, x, nullptr, nullptr, weight, offset, eps, rows, hidden}, stream);
}

cudaError_t lsk_add_rms_norm(lsk_bf16* out, float* residual, const lsk_bf16* y, const lsk_bf16* weight, float offset,
                             float eps, int64_t rows, int64_t hidden, cudaStream_t stream) {
  return launch<true>(Norm<lsk_bf16>{out, residual, residual, y, weight, offset, eps, rows, hidden}, stream);
}

cudaError_t lsk_rms_norm_in_place(float* x, const lsk_bf16* weight, float offset, float eps, int64_t rows, int64_t size,
                                  cudaStream_t stream) {
  const bool heads = size % 4 == 0 && size <= 256 && aligned_for<4>(x) && aligned_for<4>(weight);
  if (!heads) return launch<false>(Norm<float>{x, x, nullptr, nullptr, weight, offset, eps, rows, size}, stream);
  if (rows == 0 || size == 0) return cudaSuccess;
  int lanes = 1;
  while (lanes * 8 < size) lanes *= 2;
  const int64_t each = kHeadBlock / lanes;
  const dim3 grid(unsigned((rows + each - 1) / each));
  return lsk_launch(norm_heads, grid, dim3(kHeadBlock), 0, stream, x, weight, offset, eps, rows, int(size), lanes);
}

static const Loader loader([] {
  return load_kernels(norm<lsk_bf16, false>, norm<lsk_bf16, true>, norm<float, false>, norm_any<lsk_bf16, false>,
                      norm_any<lsk_bf16, true>, norm_any<float, false>, norm_heads);
});
