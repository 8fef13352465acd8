// Tensor cores and the copies that feed them. This file and bits.cuh have all inline assembly there is. Each function has a
// plain twin, for the same sources compiled for the host, which gives every lane what the instruction gives it (PTX ISA 8,
// "Matrix Fragments for mma.m16n8k16" and "ldmatrix").
//
// With `g = lane / 4` and `c = lane % 4 * 2`, a lane holds these elements, two to a register:
//   A [16][16]: a[0] (g, c), a[1] (g + 8, c), a[2] (g, c + 8), a[3] (g + 8, c + 8), and the column after each
//   B [16][8]:  b[0] (c, g), b[1] (c + 8, g), and the row after each
//   C [16][8]:  (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)
#pragma once

#include "common.cuh"

// x, which the compiler takes for another number: so it does not compute what depends on it ahead of a loop, to keep it in
// registers.
__device__ inline int afresh(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^x, to within two units in the last place; subnormal results are 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x, to within one unit in the last place; that of infinity is 0.
__device__ inline float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// tanh(x / (2 · log2(e))), to within 3e-7: near 0 that is much of it.
__device__ inline float tanh_fast(float x) { return 1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(x)); }

// c += A · B.
__device__ inline void mma_16x8x16_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif !defined(__CUDACC__)
  // Of the two rows and the column that a lane holds elements of, those that meet each other.
  typedef float Four __attribute__((vector_size(16)));
  const auto widen = [](uint32_t first, uint32_t second) {
    const uint32_t wide[4] = {first << 16, first & 0xffff0000u, second << 16, second & 0xffff0000u};
    Four to;
    memcpy(&to, wide, sizeof(to));
    return to;
  };
  struct Held {
    Four upper, lower, column;
  };
  const Held held = {widen(a[0], a[2]), widen(a[1], a[3]), widen(b0, b1)};
  const int lane = int(threadIdx.x) % 32, row = lane / 4 * 4, column = lane % 4 * 8;
  const auto of = emulation::exchange("mma", kWarp, 0xfu << row | 0xffu << column, held);
  for (int j = 0; j < 2; ++j) {
    Four upper = {}, lower = {};
    for (int quad = 0; quad < 4; ++quad) {
      upper += of[row + quad].upper * of[column + j * 4 + quad].column;
      lower += of[row + quad].lower * of[column + j * 4 + quad].column;
    }
    c[j] += upper[0] + upper[1] + upper[2] + upper[3];
    c[2 + j] += lower[0] + lower[1] + lower[2] + lower[3];
  }
#endif
}

// Four 8 × 8 matrices of bf16 from shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, and
// gets elements c and c + 1 of row g of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDA_ARCH__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::check_shared_row(row, "ldmatrix");
  const int lane = int(threadIdx.x) % 32;
  const auto rows = emulation::exchange("ldmatrix", kWarp, 0x01010101u << lane / 4, static_cast<const char*>(row));
  for (int i = 0; i < 4; ++i) memcpy(&r[i], rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
#endif
}

// The same, each matrix transposed: a lane gets elements g of rows c and c + 1.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef __CUDA_ARCH__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::check_shared_row(row, "ldmatrix");
  const int lane = int(threadIdx.x) % 32, first = lane % 4 * 2;
  const auto rows = emulation::exchange("ldmatrix", kWarp, 0x03030303u << first, static_cast<const char*>(row));
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) memcpy(&pair[j], rows[i * 8 + first + j] + lane / 4 * 2, 2);
    memcpy(&r[i], pair, 4);
  }
#endif
}

// Starts a copy of 16 bytes from global to shared memory, of zeros instead unless `valid`; `global` is then not read.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef __CUDA_ARCH__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::copy_async(shared, global, valid);
#endif
}

// Ends a group of copies. Groups complete in order; an empty one is complete.
__device__ inline void cp_async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::commit_copies();
#endif
}

// Waits until at most `PENDING` of this thread's groups are incomplete. Other threads see them after the next barrier.
template <int PENDING>
__device__ inline void cp_async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#elif !defined(__CUDACC__)
  emulation::wait_for_copies(PENDING);
#endif
}
