/* An engine that pulls layers and works on them itself: here it adds up the bytes of every tensor.
 *
 *     embed MODEL_FOLDER [PASSES]
 *
 * It holds two layers at once, as an engine does that computes one while it prepares the next, and looks tensors up by
 * number. On the CPU device a tensor's memory is RAM; embed_cuda.cu does the same on a GPU.
 */
#include <layer_streamer.h>

#include <stdio.h>
#include <stdlib.h>

#define HELD 2

static int failed(const char *what)
{
    fprintf(stderr, "error: %s: %s\n", what, ls_last_error());
    return 1;
}

static void say(void *user, int32_t level, const char *message)
{
    const char *matters = level >= LS_LOG_ERROR ? "error: " : level == LS_LOG_WARNING ? "warning: " : "";
    (void)user;
    fprintf(stderr, "%s%s\n", matters, message);
}

/* The engine's own work on a layer. */
static ls_status work(ls_streamer streamer, ls_layer layer)
{
    size_t unit = 0;
    ls_unit_info info;
    ls_status status = ls_layer_index(layer, &unit);
    if (status != LS_OK || (status = ls_streamer_unit(streamer, unit, &info)) != LS_OK) {
        return status;
    }
    uint64_t sum = 0;
    for (size_t index = 0; index < info.tensors; index++) {
        ls_tensor tensor;
        if ((status = ls_layer_tensor_at(layer, index, &tensor)) != LS_OK) {
            return status;
        }
        if (tensor.dtype != LS_BF16) {
            fprintf(stderr, "%s: this example takes checkpoints of BF16\n", info.name);
            return LS_UNSUPPORTED;
        }
        size_t bytes = 2;
        for (uint32_t dim = 0; dim < tensor.rank; dim++) {
            bytes *= tensor.shape[dim];
        }
        const unsigned char *data = (const unsigned char *)tensor.data;
        for (size_t at = 0; at < bytes; at++) {
            sum += data[at];
        }
    }
    printf("%s: %lu tensors, %lu bytes, sum %llu\n", info.name, (unsigned long)info.tensors, (unsigned long)info.bytes,
           (unsigned long long)sum);
    return LS_OK;
}

static ls_status pass(ls_streamer streamer, ls_stream stream)
{
    size_t units = 0;
    size_t taken = 0;
    ls_layer held[HELD];
    ls_status status = ls_streamer_unit_count(streamer, &units);
    size_t done = 0;
    for (; status == LS_OK && done < units; done++) {
        while (status == LS_OK && taken < units && taken < done + HELD) {
            status = ls_next_layer(streamer, stream, &held[taken % HELD]);
            taken += status == LS_OK;
        }
        if (status == LS_OK) {
            status = work(streamer, held[done % HELD]);
        }
        if (status != LS_OK) {
            break;
        }
        status = ls_release_layer(held[done % HELD], stream);
    }
    /* After an error: what is held must be released before the streamer can be closed. */
    for (; done < taken; done++) {
        ls_release_layer(held[done % HELD], stream);
    }
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: embed MODEL_FOLDER [PASSES]\n");
        return 2;
    }
    int passes = argc > 2 ? atoi(argv[2]) : 1;
    ls_device device;
    ls_stream stream;
    ls_checkpoint checkpoint;
    ls_streamer streamer;
    ls_streamer_options options;
    if (ls_device_cpu(&device) != LS_OK || ls_stream_open(device, &stream) != LS_OK) {
        return failed("device");
    }
    if (ls_checkpoint_open(argv[1], &checkpoint) != LS_OK) {
        ls_stream_close(stream);
        ls_device_close(device);
        return failed("checkpoint");
    }
    if (ls_streamer_options_init(&options, sizeof options) != LS_OK) {
        return failed("options");
    }
    options.n_gpu = HELD;
    options.log = say;
    ls_status status = ls_streamer_open(device, checkpoint, &options, &streamer);
    /* The streamer keeps what it needs of both. */
    ls_checkpoint_close(checkpoint);
    ls_device_close(device);
    if (status != LS_OK) {
        failed("streamer");
    } else {
        while (passes-- > 0 && status == LS_OK) {
            status = pass(streamer, stream);
        }
        if (status != LS_OK) {
            failed("pass");
        }
        ls_stats stats;
        stats.size = sizeof stats;
        if (ls_streamer_stats(streamer, &stats) == LS_OK) {
            fprintf(stderr, "%llu layers, %llu bytes from disk\n", (unsigned long long)stats.compute.units,
                    (unsigned long long)(stats.direct_bytes + stats.buffered_bytes));
        }
        ls_streamer_close(streamer);
    }
    ls_stream_close(stream);
    return status == LS_OK ? 0 : 1;
}
