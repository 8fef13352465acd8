// Products of few rows: out [tokens, n] = x [tokens, k] · weight [n, k]ᵀ + bias. Reading the weight is all the time they take.
//
// A block is a warp that takes some rows of the weight and some tokens, and goes over all columns from the first to the last, while
// those to come are on their way to shared memory. So an element's sum has one order, sixteen columns at a time; src/kernels/product.rs
// tells why that matters.
#include <limits.h>

#include "mma.cuh"

namespace {

// Columns of a stage: 256 bytes of a row.
constexpr int kDepth = 128, kChunks = kDepth / 8;

struct Product {
  void* out;
  const lsk_bf16 *x, *weight, *bias;  // bias: or null
  int64_t n;
  int k, tokens;
};

// Tokens of a block.
constexpr int kTokens = LSK_FEW_ROWS;

// A block of M × 16 rows of the weight. With small ones a multiprocessor has few, so each looks further ahead.
template <int M>
struct Shape {
  static constexpr int kRows = 16 * M, kStages = M == 1 ? 8 : 3;
  static constexpr int kWeightBytes = kRows * kDepth * 2, kStageBytes = kWeightBytes + kTokens * kDepth * 2;
  static constexpr int kBytes = kStages * kStageBytes;
};

// What a lane copies of ROWS rows: the same chunk of some of them. What comes of rows behind the last is not stored: others are
// copied in their place, which are on their way anyway. Were it always the same row, blocks would wait for each other's reading.
template <typename Offset, int ROWS, bool kAligned>
struct Copier {
  static constexpr int kDown = 32 / kChunks, kRows = ROWS / kDown;
  const lsk_bf16* source;
  int k, column;
  Offset rows[kRows];

  // Row `r` that there is not is row `instead(r)` of those from `others` on.
  template <typename Instead>
  __device__ Copier(const lsk_bf16* source, int64_t count, int k, const lsk_bf16* others, Instead instead)
      : source(source), k(k), column(int(threadIdx.x) % kChunks * 8) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = int(threadIdx.x) / kChunks + i * kDown;
      rows[i] = row < count ? Offset(row) * k : Offset(others - source) + Offset(instead(row)) * k;
      rows[i] += column;
    }
  }

  // Starts the copy of the stage that begins with column `from`. Columns behind the last become zeros. Chunks change places within
  // a row, so that the same chunk of eight rows lies in eight different groups of banks.
  __device__ void start(char* tile, int from) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = int(threadIdx.x) / kChunks + i * kDown;
      char* const to = tile + row * kDepth * 2 + (column / 8 ^ (row & 7)) * 16;
      if constexpr (kAligned) {
        cp_async_16(to, source + rows[i] + from, from + column < k);
      } else {
        for (int j = 0; j < 8; ++j) {
          const bool there = from + column + j < k;
          reinterpret_cast<lsk_bf16*>(to)[j] = there ? source[rows[i] + from + j] : lsk_bf16(0.0f);
        }
      }
    }
  }
};

// Adds a stage's columns to the sums.
template <int M>
__device__ inline void add_stage(float (&sums)[kTokens / 8][M][4], const char* weight, const char* x) {
  const int lane = int(threadIdx.x), row = lane & 15, token = (lane & 7) + (lane >> 4) * 8;
  const char *const weight_row = weight + row * kDepth * 2, *const x_row = x + token * kDepth * 2;
  const int weight_place = ((lane >> 4) ^ (row & 7)) * 16, x_place = ((lane >> 3 & 1) ^ (token & 7)) * 16;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t b[4];
    ldmatrix_x4(b, x_row + (step * 32 ^ x_place));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t a[4];
      ldmatrix_x4(a, weight_row + m * 16 * kDepth * 2 + (step * 32 ^ weight_place));
      mma_16x8x16_bf16(sums[0][m], a, b[0], b[1]);
      mma_16x8x16_bf16(sums[1][m], a, b[2], b[3]);
    }
  }
}

template <typename Out, int M, bool kAligned>
__global__ void __launch_bounds__(32) few_rows(Product call) {
  using Shape = Shape<M>;
  LSK_DYNAMIC_SHARED(shared);
  const int64_t first = int64_t(blockIdx.x) * Shape::kRows;
  const int k = call.k;
  const int first_token = int(blockIdx.y) * kTokens;
  const int rows = int(call.n - first < Shape::kRows ? call.n - first : Shape::kRows);
  const lsk_bf16 *const weight_rows = call.weight + first * k, *const tokens = call.x + int64_t(first_token) * k;
  const auto last = [&](int row) { return row < rows ? row : rows - 1; };
  const Copier<int, Shape::kRows, kAligned> weight(weight_rows, rows, k, weight_rows, last);
  const Copier<int64_t, kTokens, kAligned> x(tokens, call.tokens - first_token, k, weight_rows, last);
  const auto copy = [&](int place, int from) {
    if (from < k) {
      weight.start(shared + place, from);
      x.start(shared + place + Shape::kWeightBytes, from);
    }
    cp_async_commit();
  };
  const auto next = [](int place) { return place + Shape::kStageBytes < Shape::kBytes ? place + Shape::kStageBytes : 0; };
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) copy(stage * Shape::kStageBytes, stage * kDepth);
  float sums[kTokens / 8][M][4] = {};
  int place = 0, free_place = Shape::kBytes - Shape::kStageBytes;
  for (int from = 0; from < k; from += kDepth) {
    // The stage is here; all lanes are done with the one before, whose place is free.
    cp_async_wait<Shape::kStages - 2>();
    __syncwarp();
    copy(free_place, from + (Shape::kStages - 1) * kDepth);
    add_stage<M>(sums, shared + place, shared + place + Shape::kWeightBytes);
    free_place = place, place = next(place);
  }
  Out* const out = static_cast<Out*>(call.out);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first + m * 16 + h * 8 + threadIdx.x / 4;
      if (row >= call.n) continue;
      const float bias = call.bias == nullptr ? 0.0f : widen(call.bias[row]);
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i) {
        const int token = first_token + i / 2 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
        if (token >= call.tokens) continue;
        Out sum;
        narrow(sums[i / 2][m][2 * h + i % 2], &sum);
        // cuBLAS rounds a sum before it adds to it, too.
        if (call.bias != nullptr) narrow(widen(sum) + bias, &sum);
        out[token * call.n + row] = sum;
      }
    }
  }
}

// Rows of a weight from which on there are more of them than multiprocessors want, so that a warp takes twice as many.
constexpr int64_t kMany = 8192;

template <typename Out, int M>
cudaError_t launch(const Product& call, cudaStream_t stream) {
  using Shape = Shape<M>;
  const int64_t blocks = (call.n + Shape::kRows - 1) / Shape::kRows;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const dim3 grid(unsigned(blocks), unsigned(call.tokens + kTokens - 1) / kTokens);
  const bool aligned = call.k % 8 == 0 && aligned_for<8>(call.x) && aligned_for<8>(call.weight);
  return lsk_launch(aligned ? few_rows<Out, M, true> : few_rows<Out, M, false>, grid, dim3(32), Shape::kBytes,
                    stream, call);
}

template <typename Out>
cudaError_t launch_to(const Product& call, cudaStream_t stream) {
  return call.n >= kMany ? launch<Out, 2>(call, stream) : launch<Out, 1>(call, stream);
}

template <typename Out>
cudaError_t load_to() {
  return load_kernels(few_rows<Out, 1, true>, few_rows<Out, 1, false>, few_rows<Out, 2, true>, few_rows<Out, 2, false>);
}

// One block, so that the answer needs no beginning.
constexpr int kComparing = 1024;

template <typename T>
__global__ void __launch_bounds__(kComparing) compare(uint32_t* differ, const T* a, const T* b, size_t n) {
  int found = 0;
  for (size_t i = threadIdx.x; i < n; i += kComparing) {
    const float x = widen(a[i]), y = widen(b[i]);
    // Not their bits: NaNs are of many kinds.
    found |= x == y ? signbit(x) != signbit(y) : x == x || y == y;
  }
  LSK_SHARED(uint32_t, votes, kComparing / 32);
  const unsigned vote = __ballot_sync(kWarp, found);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = vote;
  __syncthreads();
  if (threadIdx.x != 0) return;
  uint32_t all = 0;
  for (int warp = 0; warp < kComparing / 32; ++warp) all |= votes[warp];
  *differ = all != 0;
}

}  // namespace

cudaError_t lsk_few_rows(void* out, int out_dtype, const lsk_bf16* x, const lsk_bf16* weight, const lsk_bf16* bias,
                         int tokens, int64_t n, int64_t k, cudaStream_t stream) {
  // A block's elements of the weight are counted with `int`.
  const bool valid = tokens >= 0 && tokens <= 65535 * kTokens && n >= 0 && k >= 0 && k <= INT_MAX / 64;
  if (!valid) return cudaErrorInvalidValue;
  if (tokens == 0 || n == 0) return cudaSuccess;
  const Product call = {out, x, weight, bias, n, int(k), tokens};
  switch (out_dtype) {
    case LSK_F32: return launch_to<float>(call, stream);
    case LSK_BF16: return launch_to<lsk_bf16>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t lsk_compare(uint32_t* differ, const void* a, const void* b, int dtype, size_t n, cudaStream_t stream) {
  const auto launch = [&](auto kernel, auto a, auto b) {
    return lsk_launch(kernel, dim3(1), dim3(kComparing), 0, stream, differ, a, b, n);
  };
  switch (dtype) {
    case LSK_F32: return launch(compare<float>, static_cast<const float*>(a), static_cast<const float*>(b));
    case LSK_BF16: return launch(compare<lsk_bf16>, static_cast<const lsk_bf16*>(a), static_cast<const lsk_bf16*>(b));
    default: return cudaErrorInvalidValue;
  }
}

static const Loader loader([] {
  const cudaError_t error = load_to<float>();
  if (error != cudaSuccess) return error;
  const cudaError_t later = load_to<lsk_bf16>();
  return later != cudaSuccess ? later : load_kernels(compare<float>, compare<lsk_bf16>);
});
