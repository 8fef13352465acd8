/* Continues a prompt, given as token ids, with a model that is streamed layer by layer; prints the new ids.
 *
 *     generate MODEL_FOLDER 1,2,3 [NEW_TOKENS [cpu|cuda:N]]
 */
#include <layer_streamer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(const char *what)
{
    fprintf(stderr, "error: %s: %s\n", what, ls_last_error());
    return 1;
}

static int32_t print_token(void *user, size_t row, uint32_t token)
{
    size_t *count = (size_t *)user;
    (void)row;
    printf("%s%lu", *count > 0 ? "," : "", (unsigned long)token);
    *count += 1;
    return fflush(stdout) == 0 ? 0 : LS_END;
}

static size_t parse(const char *text, uint32_t *ids, size_t most)
{
    size_t count = 0;
    while (*text != '\0' && count < most) {
        char *end;
        ids[count] = (uint32_t)strtoul(text, &end, 10);
        if (end == text) {
            return 0;
        }
        count += 1;
        text = *end == ',' ? end + 1 : end;
    }
    return count;
}

int main(int argc, char **argv)
{
    static uint32_t prompt[4096];
    const char *on = argc > 4 ? argv[4] : "cpu";
    size_t new_tokens = argc > 3 ? (size_t)strtoul(argv[3], NULL, 10) : 32;
    size_t count = argc > 2 ? parse(argv[2], prompt, sizeof prompt / sizeof *prompt) : 0;
    if (count == 0) {
        fprintf(stderr, "usage: generate MODEL_FOLDER 1,2,3 [NEW_TOKENS [cpu|cuda:N]]\n");
        return 2;
    }

    ls_device device;
    if (strncmp(on, "cuda", 4) == 0 ? ls_device_cuda(on[4] == ':' ? (uint32_t)atoi(on + 5) : 0, &device) != LS_OK
                                    : ls_device_cpu(&device) != LS_OK) {
        return failed("device");
    }
    ls_model_options options;
    if (ls_model_options_init(&options, sizeof options) != LS_OK) {
        return failed("options");
    }
    options.context = count + new_tokens;
    ls_model model;
    if (ls_model_open(device, argv[1], &options, &model) != LS_OK) {
        ls_device_close(device);
        return failed("model");
    }

    size_t printed = 0;
    ls_sequence sequence = {0, prompt, count};
    ls_status status = ls_model_generate(model, &sequence, 1, new_tokens, print_token, &printed);
    printf("\n");
    if (status != LS_OK) {
        failed("generate");
    }
    ls_model_close(model);
    ls_device_close(device);
    return status == LS_OK ? 0 : 1;
}
