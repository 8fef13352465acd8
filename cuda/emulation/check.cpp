// What the emulation promises, by kernels that are wrong on purpose. Called by tests/cuda_emulation_kernels.rs.
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>

#include "common.cuh"
#include "mma.cuh"

namespace {

constexpr int kBlock = 96;

// --- Right: what the others are variants of.

__global__ void right(float* x) {
  LSK_SHARED(float, sums, kBlock / 32);
  LSK_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x), lane = i % 32;
  values[i] = x[i];
  __syncwarp();
  const float sum = sum_over_lanes(values[i / 32 * 32 + (lane + 1) % 32], 32);
  if (lane == 0) sums[i / 32] = sum;
  __syncthreads();
  x[i] = sums[(i / 32 + 1) % (kBlock / 32)];
}

// --- Barriers and shuffles.

__global__ void lane_has_exited(float* x) {
  if (threadIdx.x == 37) return;
  x[threadIdx.x] = sum_over_lanes(x[threadIdx.x], 32);
}

__global__ void lane_waits_for_block(float* x) {
  if (threadIdx.x == 37) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  x[threadIdx.x] = 0;
}

__global__ void barriers_differ(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    x[threadIdx.x] = 0;
    __syncthreads();
  }
}

__global__ void operations_differ(float* x) {
  const int other = threadIdx.x % 2 == 0 ? __shfl_sync(kWarp, 1, 0) : int(__ballot_sync(kWarp, 1));
  x[threadIdx.x] = float(other);
}

__global__ void not_all_lanes(float* x) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 3);
}

// --- Memory.

__global__ void no_memory(float* x) { x[int64_t(threadIdx.x) << 45] = 1; }

__global__ void beyond_dynamic(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  shared[kBlock * 4 + 8 + threadIdx.x] = char(x[0]);
}

__global__ void before_dynamic(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  shared[-1 - int(threadIdx.x)] = char(x[0]);
}

__global__ void beyond_static(float* x) {
  LSK_SHARED(float, values, kBlock);
  values[threadIdx.x + 1] = x[0];
}

__global__ void unaligned_copy(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  cp_async_16(shared, reinterpret_cast<char*>(x) + 4, true);
}

__global__ void copy_beyond(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  cp_async_16(shared + (threadIdx.x + 1) * 16, x, true);
}

__global__ void matrix_beyond(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  uint32_t r[4];
  ldmatrix_x4(r, shared + (threadIdx.x + 1) * 16);
  x[threadIdx.x] = float(r[0]);
}

// Copies that nobody waits for are carried out all the same.
__global__ void copy_from_nowhere(float*) {
  LSK_DYNAMIC_SHARED(shared);
  cp_async_16(shared, reinterpret_cast<char*>(int64_t(threadIdx.x + 1) << 12), true);
}

__global__ void traps(float*) { __builtin_trap(); }

__global__ void endless(float* x, int depth) {
  volatile float held[1024];
  held[depth % 1024] = x[0];
  if (depth >= 0) endless(x, depth + 1);
  x[1] = held[depth % 1024];
}

__global__ void overflows(float* x) { endless(x, 0); }

// --- Missing barriers: these read NaN.

__global__ void no_sync_warp(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x);
  values[i] = x[i];
  x[i] = values[i / 32 * 32 + (i + 1) % 32];
}

// A shuffle orders nothing but itself.
__global__ void shuffle_for_sync_warp(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  const int i = int(threadIdx.x);
  values[i] = x[i];
  const float other = __shfl_xor_sync(kWarp, 0.0f, 16);
  x[i] = values[i / 32 * 32 + (i + 1) % 32] + values[i / 32 * 32 + (i + 31) % 32] + other;
}

__global__ void no_sync_threads(float* x) {
  LSK_SHARED(float, values, kBlock);
  const int i = int(threadIdx.x);
  values[i] = x[i];
  __syncwarp();
  x[i] = values[(i + 32) % kBlock];
}

template <int kPending>
__global__ void waits_for_copies(float* x) {
  LSK_DYNAMIC_SHARED(shared);
  const int i = int(threadIdx.x);
  cp_async_16(shared + i * 32, x, true);
  cp_async_commit();
  cp_async_16(shared + i * 32 + 16, x, false);
  cp_async_commit();
  cp_async_wait<kPending>();
  const auto* const copied = reinterpret_cast<const float*>(shared + i * 32);
  x[i] = kPending == 2 ? copied[3] : copied[4];
}

// --- The table.

struct Case {
  const char* name;
  void (*kernel)(float*);
  int threads;
  size_t shared_bytes;
  cudaError_t error;
  bool nan;
};

constexpr cudaError_t kLaunch = cudaErrorLaunchFailure, kAddress = cudaErrorIllegalAddress;

const Case kCases[] = {
    {"lane_has_exited", lane_has_exited, kBlock, 0, kLaunch, false},
    {"lane_waits_for_block", lane_waits_for_block, kBlock, 0, kLaunch, false},
    {"barriers_differ", barriers_differ, kBlock, 0, kLaunch, false},
    {"operations_differ", operations_differ, kBlock, 0, kLaunch, false},
    {"not_all_lanes", not_all_lanes, kBlock, 0, kLaunch, false},
    {"a part of a warp", right, 80, kBlock * 4, kLaunch, false},
    {"no_memory", no_memory, kBlock, 0, kAddress, false},
    {"beyond_dynamic", beyond_dynamic, kBlock, kBlock * 4, kAddress, false},
    {"beyond_dynamic by a byte", beyond_dynamic, 1, kBlock * 4 + 8, kAddress, false},
    {"before_dynamic", before_dynamic, kBlock, kBlock * 4, kAddress, false},
    {"beyond_static", beyond_static, kBlock, 0, kAddress, false},
    {"unaligned_copy", unaligned_copy, kBlock, 16, cudaErrorMisalignedAddress, false},
    {"copy_beyond", copy_beyond, kBlock, kBlock * 16, kAddress, false},
    {"matrix_beyond", matrix_beyond, kBlock, kBlock * 16, kAddress, false},
    {"copy_from_nowhere", copy_from_nowhere, kBlock, 16, kAddress, false},
    {"traps", traps, kBlock, 0, kLaunch, false},
    {"overflows", overflows, 1, 0, kAddress, false},
    {"no_sync_warp", no_sync_warp, kBlock, kBlock * 4, cudaSuccess, true},
    {"shuffle_for_sync_warp", shuffle_for_sync_warp, kBlock, kBlock * 4, cudaSuccess, true},
    {"no_sync_threads", no_sync_threads, kBlock, 0, cudaSuccess, true},
    {"waits_for_copies<2>", waits_for_copies<2>, kBlock, kBlock * 32, cudaSuccess, true},
    {"waits_for_copies<1>", waits_for_copies<1>, kBlock, kBlock * 32, cudaSuccess, true},
    {"waits_for_copies<0>", waits_for_copies<0>, kBlock, kBlock * 32, cudaSuccess, false},
};

cudaError_t run(void (*kernel)(float*), int threads, size_t shared_bytes, float* x, uint64_t seed) {
  auto* const grid = new emulation::GridOf<float*>(kernel, x);
  grid->size = dim3(3);
  grid->block = dim3(threads);
  grid->shared_bytes = shared_bytes;
  grid->kernel = reinterpret_cast<const void*>(kernel);
  return emulation_run(static_cast<emulation::Grid*>(grid), seed);
}

template <int kBytes>
__global__ void wants_shared(float*) {}

// What a real device refuses to launch.
bool refuses() {
  const auto launch = [](dim3 grid, dim3 block, size_t shared_bytes) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    return emulation::check_launch(config, reinterpret_cast<const void*>(&wants_shared<0>));
  };
  return launch(dim3(1), dim3(1024), 48 << 10) == cudaSuccess &&
         launch(dim3(1), dim3(32, 33), 0) == cudaErrorInvalidConfiguration &&
         launch(dim3(1), dim3(0), 0) == cudaErrorInvalidConfiguration &&
         launch(dim3(0), dim3(32), 0) == cudaErrorInvalidConfiguration &&
         launch(dim3(1, 65536), dim3(32), 0) == cudaErrorInvalidConfiguration &&
         launch(dim3(1u << 31), dim3(32), 0) == cudaErrorInvalidConfiguration &&
         launch(dim3(1), dim3(32), (48 << 10) + 1) == cudaErrorInvalidValue &&
         cudaFuncSetAttribute(wants_shared<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) ==
             cudaErrorInvalidValue;
}

}  // namespace

// Runs them all in the order of a seed. The first that did what it must not is told in `wrong`, of so many bytes; 0 if
// there is none.
extern "C" int emulation_check(uint64_t seed, char* wrong, size_t bytes) {
  if (!refuses()) return snprintf(wrong, bytes, "a launch that no device takes was taken, or the other way round");
  for (const Case& c : kCases) {
    alignas(16) float x[kBlock];
    for (float& value : x) value = 1;
    const cudaError_t error = run(c.kernel, c.threads, c.shared_bytes, x, seed);
    bool nan = false;
    for (const float value : x) nan |= isnan(value);
    // A launch that failed leaves nothing behind: each of three blocks sums the 32 values of a warp.
    for (float& value : x) value = 1;
    const cudaError_t after = run(right, kBlock, kBlock * 4, x, seed);
    const float* const odd = std::find_if(x, x + kBlock, [](float value) { return value != 32 * 32 * 32; });
    if (error == c.error && nan == c.nan && after == cudaSuccess && odd == x + kBlock) continue;
    int said = snprintf(wrong, bytes, "%s: error %d, expected %d; NaN %d, expected %d; right after it: error %d", c.name,
                        int(error), int(c.error), nan, c.nan, int(after));
    if (odd != x + kBlock) said += snprintf(wrong + said, bytes - said, ", x[%td] is %g", odd - x, double(*odd));
    return said;
  }
  return 0;
}
