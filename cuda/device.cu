// The kernels as a whole, and what the runtime's headers spell differently from version to version, in one spelling.
#include <cstring>

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
  for (const Loader* of_file = Loader::first; of_file != nullptr; of_file = of_file->next) {
    const cudaError_t error = of_file->load();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
