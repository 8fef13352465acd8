// Instructions on the bits and bytes of words, for the kernels that decode weights.
#pragma once

#include "common.cuh"

// Four of the eight bytes of `low` and `high`, as the lower nibbles of `which` say. Nibbles of 8 and more give
// eight times the highest bit of byte 0 to 7.
__device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t which) {
#ifdef __CUDA_ARCH__
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(which));
  return bytes;
#elif !defined(__CUDACC__)
  return emulation::permute(low, high, which);
#else
  return 0;
#endif
}

// Any function of three bits, for each bit of three words, by what it makes of 0xf0, 0xcc and 0xaa. Left to itself the
// compiler takes two instructions where one will do.
template <int kTable>
__device__ inline uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(bits) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return bits;
#elif !defined(__CUDACC__)
  return emulation::logic(kTable, a, b, c);
#else
  return 0;
#endif
}

// The bits of `chosen` where `mask` has ones, those of `other` elsewhere.
__device__ inline uint32_t choose(uint32_t mask, uint32_t chosen, uint32_t other) {
  return logic<(0xf0 & 0xcc) | (0x0f & 0xaa)>(mask, chosen, other);
}

// The bits that either has, of those that `mask` has.
__device__ inline uint32_t join(uint32_t mask, uint32_t one, uint32_t other) {
  return logic<0xf0 & (0xcc | 0xaa)>(mask, one, other);
}
