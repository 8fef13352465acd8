// Sums of products, as tensor cores' twin in mma.cuh adds them up: for the emulated cuBLAS, of which only the order matters.
#include <stddef.h>
#include <string.h>

typedef float Four __attribute__((vector_size(16)));

// sums[j * rows + i] = a[i] · b[j], for `rows` vectors at a and `columns` at b, of `depth` numbers each, a multiple of 16. Of each sixteen
// come first what a lane multiplies, then the next lane. With `rough` a sum loses its lower half after each sixteen.
extern "C" void lsk_emulated_product(const float* a, const float* b, float* sums, size_t rows, size_t columns, size_t depth,
                                     bool rough) {
  for (size_t j = 0; j < columns; ++j) {
    for (size_t i = 0; i < rows; ++i) {
      float sum = 0.0f;
      for (size_t k = 0; k < depth; k += 16) {
        Four lanes = {};
        for (size_t lane = 0; lane < 4; ++lane) {
          Four x, y;
          memcpy(&x, a + i * depth + k + lane * 4, sizeof(x));
          memcpy(&y, b + j * depth + k + lane * 4, sizeof(y));
          lanes += x * y;
        }
        sum += lanes[0] + lanes[1] + lanes[2] + lanes[3];
        if (rough) {
          unsigned bits;
          memcpy(&bits, &sum, sizeof(bits));
          bits &= 0xffff0000u;
          memcpy(&sum, &bits, sizeof(sum));
        }
      }
      sums[j * rows + i] = sum;
    }
  }
}
