// The kernels as a whole, and what the runtime's headers spell differently from version to version, in one spelling.
#include <cstring>
#include <initializer_list>

#include "common.cuh"

cudaError_t lsk_device_name(char* name, size_t bytes, int ordinal) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess || bytes == 0) return error;
  std::strncpy(name, properties.name, bytes - 1);
  name[bytes - 1] = 0;
  return cudaSuccess;
}

cudaError_t lsk_load() {
  for (const auto load : {load_append_kv, load_attention_decode, load_attention_prefill, load_cast, load_norm,
                          load_rope, load_rows, load_swiglu}) {
    const cudaError_t error = load();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
