// As embed.c, on a GPU: the engine brings its own stream and its own kernel, and never waits for the device inside a pass.
//
//     embed_cuda MODEL_FOLDER [PASSES]
#include <layer_streamer.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#define CUDA(call)                                                                                  \
    do {                                                                                            \
        cudaError_t code = (call);                                                                  \
        if (code != cudaSuccess) {                                                                  \
            std::fprintf(stderr, "error: %s: %s\n", #call, cudaGetErrorString(code));               \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

#define LS(call)                                                                                    \
    do {                                                                                            \
        if ((call) != LS_OK) {                                                                      \
            std::fprintf(stderr, "error: %s: %s\n", #call, ls_last_error());                        \
            std::exit(1);                                                                           \
        }                                                                                           \
    } while (0)

// The engine's own kernel.
__global__ void add_up(const unsigned char *data, size_t bytes, unsigned long long *sum)
{
    unsigned long long part = 0;
    for (size_t at = blockIdx.x * size_t(blockDim.x) + threadIdx.x; at < bytes; at += size_t(gridDim.x) * blockDim.x) {
        part += data[at];
    }
    atomicAdd(sum, part);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        std::fprintf(stderr, "usage: embed_cuda MODEL_FOLDER [PASSES]\n");
        return 2;
    }
    int passes = argc > 2 ? std::atoi(argv[2]) : 1;
    ls_device device;
    ls_checkpoint checkpoint;
    ls_streamer streamer;
    ls_stream stream;
    LS(ls_device_cuda(0, &device));
    cudaStream_t own;
    CUDA(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    LS(ls_stream_from_cuda(device, own, &stream));
    LS(ls_checkpoint_open(argv[1], &checkpoint));
    LS(ls_streamer_open(device, checkpoint, nullptr, &streamer));
    LS(ls_checkpoint_close(checkpoint));
    LS(ls_device_close(device));

    size_t units = 0;
    LS(ls_streamer_unit_count(streamer, &units));
    std::vector<ls_unit_info> infos(units);
    for (size_t unit = 0; unit < units; unit++) {
        LS(ls_streamer_unit(streamer, unit, &infos[unit]));
    }
    unsigned long long *sums = nullptr;
    CUDA(cudaMalloc(&sums, units * sizeof *sums));
    std::vector<unsigned long long> found(units);
    for (int pass = 0; pass < passes; pass++) {
        CUDA(cudaMemsetAsync(sums, 0, units * sizeof *sums, own));
        for (size_t unit = 0; unit < units; unit++) {
            ls_layer layer;
            LS(ls_next_layer(streamer, stream, &layer));
            for (size_t index = 0; index < infos[unit].tensors; index++) {
                ls_tensor tensor;
                LS(ls_layer_tensor_at(layer, index, &tensor));
                if (tensor.dtype != LS_BF16) {
                    std::fprintf(stderr, "%s: this example takes checkpoints of BF16\n", infos[unit].name);
                    return 1;
                }
                size_t bytes = 2;
                for (uint32_t dim = 0; dim < tensor.rank; dim++) {
                    bytes *= tensor.shape[dim];
                }
                add_up<<<64, 256, 0, own>>>(static_cast<const unsigned char *>(tensor.data), bytes, sums + unit);
                CUDA(cudaGetLastError());
            }
            // It is filled again when the kernels above are done, not before.
            LS(ls_release_layer(layer, stream));
        }
        CUDA(cudaMemcpyAsync(found.data(), sums, units * sizeof *sums, cudaMemcpyDeviceToHost, own));
        CUDA(cudaStreamSynchronize(own));
        for (size_t unit = 0; unit < units; unit++) {
            std::printf("%s: %zu tensors, %zu bytes, sum %llu\n", infos[unit].name, infos[unit].tensors, infos[unit].bytes,
                        found[unit]);
        }
    }
    LS(ls_streamer_close(streamer));
    LS(ls_stream_close(stream));
    CUDA(cudaFree(sums));
    CUDA(cudaStreamDestroy(own));
    return 0;
}
