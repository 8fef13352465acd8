// What every kernel shares: the one way to launch, wide accesses, conversions, reductions.
#pragma once

#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
// For tests without a GPU: threads, barriers and shuffles on the host.
#include "emulation.h"
#endif

#include "kernels.h"

// All lanes of a warp.
constexpr unsigned kWarp = 0xffffffffu;

// Names a block's dynamic shared memory, aligned for any access, and an array of its static shared memory.
#ifdef __CUDACC__
#define LSK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]
#define LSK_SHARED(type, name, count) __shared__ type name[count]
#else
#define LSK_DYNAMIC_SHARED(name) char* const name = emulation::dynamic_shared()
#define LSK_SHARED(type, name, count) \
  static const char name##_tag = 0;   \
  type* const name = reinterpret_cast<type*>(emulation::static_shared(&name##_tag, sizeof(type) * (count)))
#endif

// Launches `kernel`, and returns this launch's own error: cudaGetLastError would hand over somebody else's, and clear it.
template <typename... Parameters, typename... Arguments>
inline cudaError_t lsk_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                              cudaStream_t stream, Arguments&&... arguments) {
  // More shared memory than every device has must be asked for.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Has a kernel loaded now: left to itself the runtime does so when it is first launched, which allocates.
template <typename... Parameters>
inline cudaError_t load_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// The same for several, up to the first error.
template <typename... Kernels>
inline cudaError_t load_kernels(Kernels... kernels) {
  cudaError_t error = cudaSuccess;
  (void)(((error = load_kernel(kernels)) == cudaSuccess) && ...);
  return error;
}

// A file's kernels, for lsk_load. Each file that has kernels defines one, at the end; all are linked in a list before main.
struct Loader {
  inline static const Loader* first = nullptr;
  cudaError_t (*const load)();
  const Loader* const next;

  explicit Loader(cudaError_t (*load)()) : load(load), next(first) { first = this; }
};

// N elements that are read and written in one go.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

template <int N, typename T>
__device__ inline Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N, typename T>
__device__ inline void store(T* to, const Vec<T, N>& values) {
  *reinterpret_cast<Vec<T, N>*>(to) = values;
}

// Whether elements from here on may be accessed N at a time.
template <int N, typename T>
inline bool aligned_for(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * N) == 0;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

template <typename T, int N>
__device__ inline void widen(const Vec<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(from.at[i]);
}

// Two at a time, as the hardware converts them.
template <int N>
__device__ inline void widen(const Vec<__nv_fp8_e4m3, N>& from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen(from.at[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(from.at[i].__x | unsigned(from.at[i + 1].__x) << 8);
      const float2 wide = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      to[i] = wide.x, to[i + 1] = wide.y;
    }
  }
}

__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

template <typename T, int N>
__device__ inline Vec<T, N> narrow(const float (&from)[N]) {
  Vec<T, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(from[i], &to.at[i]);
  return to;
}

// Two floats, rounded to bf16: `low` in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Eight neighbours, 16 bytes at a time.
__device__ inline void store_eight(float* to, const float (&values)[8]) {
  store(to, Vec<float, 4>{values[0], values[1], values[2], values[3]});
  store(to + 4, Vec<float, 4>{values[4], values[5], values[6], values[7]});
}

__device__ inline void store_eight(__nv_bfloat16* to, const float (&values)[8]) {
  Vec<uint32_t, 4> pairs;
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs.at[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  store(reinterpret_cast<uint32_t*>(to), pairs);
}

// The sum over `lanes` neighbours, a power of two. All lanes of the warp call it.
__device__ inline float sum_over_lanes(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWarp, x, distance);
  return x;
}
