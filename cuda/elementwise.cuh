// Kernels that treat every element alike. As fast as memory: each thread has several accesses under way, the widest of
// them 16 bytes, and neighbours access neighbours.
//
// An operation has `kPer` elements that it takes at once, `Loaded`, what it reads of them, `load(i)`, which reads those from
// element `i` on, `finish(i, loaded)`, which computes and writes, and `Single`, itself for one element.
#pragma once

#include "common.cuh"

constexpr int kElementBlock = 256, kElementUnroll = 4;

template <typename Operation>
__global__ void __launch_bounds__(kElementBlock) elementwise(Operation operation, size_t n) {
  constexpr int kPer = Operation::kPer;
  const size_t packs = n / kPer;
  const size_t first = size_t(blockIdx.x) * (kElementBlock * kElementUnroll) + threadIdx.x;
  typename Operation::Loaded loaded[kElementUnroll];
#pragma unroll
  for (int i = 0; i < kElementUnroll; ++i) {
    const size_t pack = first + i * kElementBlock;
    if (pack < packs) loaded[i] = operation.load(pack * kPer);
  }
#pragma unroll
  for (int i = 0; i < kElementUnroll; ++i) {
    const size_t pack = first + i * kElementBlock;
    if (pack < packs) operation.finish(pack * kPer, loaded[i]);
  }
  if constexpr (kPer > 1) {
    const size_t rest = packs * kPer + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) {
      const typename Operation::Single single(operation);
      single.finish(rest, single.load(rest));
    }
  }
}

template <typename Operation>
inline cudaError_t launch_elementwise(const Operation& operation, size_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr size_t kEach = size_t(kElementBlock) * kElementUnroll * Operation::kPer;
  return lsk_launch(elementwise<Operation>, dim3(unsigned((n + kEach - 1) / kEach)), dim3(kElementBlock), 0, stream,
                    operation, n);
}
