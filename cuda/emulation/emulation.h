// What cuda/*.cu need of CUDA when the host's compiler compiles them: cuda/common.cuh includes it in place of
// <cuda_runtime.h>. The threads of a block are fibres, which run on one thread of the host, one at a time.
//
// Everything is as adverse as CUDA allows. A thread runs until it can't go on; lanes of a warp wait only for those whose
// values they get, so that a shuffle orders nothing else; copies to shared memory happen when they are waited for, not
// before; shared memory is NaN until it is written, and touches memory that is not there. So a barrier that is missing
// shows in what is computed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "launch.h"

// Shared variables are named by the macros of common.cuh; this alone would give every thread its own.
#undef __shared__
#define __launch_bounds__(...)

// Of the thread that runs now.
#define LSK_OF_THREAD __attribute__((tls_model("initial-exec")))
extern __thread uint3 threadIdx LSK_OF_THREAD, blockIdx LSK_OF_THREAD;
extern __thread dim3 blockDim LSK_OF_THREAD, gridDim LSK_OF_THREAD;

namespace emulation {

extern __thread int lane LSK_OF_THREAD;

// A launch.
struct Grid {
  dim3 size, block;
  size_t shared_bytes;
  const void* kernel;
  const char* parameters;  // their types, for messages

  virtual ~Grid() = default;
  // Runs the current thread.
  virtual void run() const = 0;
};

// Their names, somewhere in a sentence.
template <typename... Parameters>
const char* names() {
  return __PRETTY_FUNCTION__;
}

template <typename... Parameters>
struct GridOf final : Grid {
  void (*function)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> arguments;
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "parameters take 4 KiB at most");

  template <typename... Arguments>
  explicit GridOf(void (*function)(Parameters...), Arguments&&... arguments)
      : function(function), arguments(std::forward<Arguments>(arguments)...) {
    parameters = names<Parameters...>();
  }
  void run() const override { std::apply(function, arguments); }
};

// Whether a real device takes such a launch, and what it says if not.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
cudaError_t allow_shared(const void* kernel, int bytes);

void sync_block(const char* file, int line);

// The block's dynamic shared memory, and the static variable that `tag` stands for.
char* dynamic_shared();
void* static_shared(const void* tag, size_t bytes);

// Ends the launch unless `row`, 16 bytes, lies in dynamic shared memory, aligned.
void check_shared_row(const void* row, const char* what);

// cp.async and its groups, of this thread.
void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// What the lanes of a warp have put up at one of its operations. Stays until this lane's next one.
constexpr size_t kEntry = 64;
template <typename T>
struct Entries {
  const char* entries;
  const T& operator[](int lane) const { return *reinterpret_cast<const T*>(entries + lane * kEntry); }
};

// Puts a value up at this lane's next operation `what`, and waits for the lanes of the set `needed` to do so.
const char* offer(const char* what, unsigned mask, unsigned needed, const void* value, size_t bytes, const char* file,
                  int line);

template <typename T>
Entries<T> exchange(const char* what, unsigned mask, unsigned needed, const T& mine,
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= kEntry && alignof(T) <= kEntry && std::is_trivially_copyable<T>::value, "must fit");
  return {offer(what, mask, needed, &mine, sizeof(T), file, line)};
}

}  // namespace emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::sync_block(file, line);
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::exchange("__syncwarp", mask, ~0u, 0, file, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulation::exchange("__shfl_sync", mask, 1u << (from & 31), value, file, line)[from & 31];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const int from = (emulation::lane ^ bits) & 31;
  return emulation::exchange("__shfl_xor_sync", mask, 1u << from, value, file, line)[from];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int lane = emulation::lane, from = distance > unsigned(lane) ? lane : lane - int(distance);
  return emulation::exchange("__shfl_up_sync", mask, 1u << from, value, file, line)[from];
}

inline unsigned __ballot_sync(unsigned mask, int vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const auto votes = emulation::exchange("__ballot_sync", mask, ~0u, vote != 0, file, line);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= unsigned(votes[lane]) << lane;
  return all;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
// The host's compiler makes one instruction of a product and a sum no more than it is allowed to for C++17.
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

// Without a cache, hints for it mean nothing.
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

inline int min(int a, int b) { return a < b ? a : b; }

namespace emulation {

// PTX prmt, without a mode.
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t from = uint64_t(high) << 32 | low;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = which >> 4 * i & 15, byte = uint32_t(from >> 8 * (nibble & 7)) & 0xff;
    to |= (nibble < 8 ? byte : byte >> 7 ? 0xff : 0) << 8 * i;
  }
  return to;
}

// PTX lop3.
inline uint32_t logic(int table, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t to = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) to |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return to;
}

}  // namespace emulation

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(sin(M_PI * double(x)));
  *cosine = float(cos(M_PI * double(x)));
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  return kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const cudaError_t error = emulation::check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  auto* const grid = new emulation::GridOf<Parameters...>(kernel, std::forward<Arguments>(arguments)...);
  grid->size = config->gridDim;
  grid->block = config->blockDim;
  grid->shared_bytes = config->dynamicSmemBytes;
  grid->kernel = reinterpret_cast<const void*>(kernel);
  return emulation_enqueue(config->stream, static_cast<emulation::Grid*>(grid));
}
