// Where the two sides of the emulated CUDA runtime meet: streams and memory belong to the runtime, what happens inside a
// launch belongs to the kernels' side.
#pragma once

#include <stdint.h>

#include <cuda_runtime_api.h>

extern "C" {

// The runtime's: gives a launch to a stream, and owns `grid` from then on. Returns the launch's error.
cudaError_t emulation_enqueue(cudaStream_t stream, void* grid);

// The kernels': runs all blocks of a launch, and frees it. Any number of threads may do so at a time. The order of blocks
// and threads comes from the seed: 0 and other multiples of 4 go forward, one more goes backward, the rest are random.
// Returns cudaSuccess, or the error that loses the context: cudaErrorIllegalAddress for an access to memory that is not
// there, cudaErrorLaunchFailure for a barrier or shuffle that can never complete or is used wrongly, or another trap. A
// line on stderr says what and where.
cudaError_t emulation_run(void* grid, uint64_t seed);

// Frees a launch that never ran.
void emulation_discard(void* grid);

}
