// A tool for NVTX, loaded through NVTX_INJECTION64_PATH: keeps every call in memory that it has from the start, and writes a
// line for each to the file named by LAYER_STREAMER_NVTX_OUT when the process ends. It never allocates.
//
// With -DREFUSES it finds that it cannot work here, as a tool of another version may. With -DCUDA_CALLS it also keeps the copies
// and launches that the process asks the CUDA runtime for, which it learns from CUPTI.
#define _GNU_SOURCE
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>
#ifdef CUDA_CALLS
#include <cuda_runtime_api.h>
#include <cupti.h>
#endif

#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { CALLS = 1 << 17, STRINGS = 1 << 12, DOMAINS = 8, TEXT = 80 };

typedef struct {
    char text[TEXT];
} String;

typedef struct {
    const char *kind;
    uint64_t nanos, payload, range;
    uint32_t category;
    int thread, has_payload;
    const void *domain;
    String message;
} Call;

static Call calls[CALLS];
static String strings[STRINGS], domains[DOMAINS];
static atomic_size_t call_count, string_count, domain_count;
static _Atomic uint64_t range_count;

static void copy(String *to, const char *from) {
    snprintf(to->text, TEXT, "%s", from ? from : "");
}

// The next of an array's entries, or NULL.
static void *next(void *array, size_t size, atomic_size_t *count, size_t most) {
    size_t index = atomic_fetch_add(count, 1);
    return index < most ? (char *)array + index * size : NULL;
}

static Call *note(const char *kind, const void *domain) {
    static Call lost;
    Call *call = next(calls, sizeof *calls, &call_count, CALLS);
    if (!call) return &lost;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    call->nanos = (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    call->thread = gettid();
    call->kind = kind;
    call->domain = domain;
    return call;
}

static Call *note_event(const char *kind, const void *domain, const nvtxEventAttributes_t *event) {
    Call *call = note(kind, domain);
    call->category = event->category;
    if (event->messageType == NVTX_MESSAGE_TYPE_REGISTERED) {
        call->message = *(const String *)event->message.registered;
    } else if (event->messageType == NVTX_MESSAGE_TYPE_ASCII) {
        copy(&call->message, event->message.ascii);
    }
    call->has_payload = event->payloadType == NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
    call->payload = call->has_payload ? event->payload.ullValue : 0;
    return call;
}

static void name_thread(uint32_t thread, const char *name) {
    Call *call = note("thread", NULL);
    call->range = thread;
    copy(&call->message, name);
}

static void name_stream(void *stream, const char *name) {
    Call *call = note("stream", NULL);
    call->range = (uintptr_t)stream;
    copy(&call->message, name);
}

static nvtxDomainHandle_t create_domain(const char *name) {
    String *domain = next(domains, sizeof *domains, &domain_count, DOMAINS);
    if (domain) copy(domain, name);
    note("domain", domain);
    return (nvtxDomainHandle_t)domain;
}

static nvtxStringHandle_t register_string(nvtxDomainHandle_t domain, const char *text) {
    String *string = next(strings, sizeof *strings, &string_count, STRINGS);
    if (string) copy(string, text);
    copy(&note("string", domain)->message, text);
    return (nvtxStringHandle_t)string;
}

static void name_category(nvtxDomainHandle_t domain, uint32_t category, const char *name) {
    Call *call = note("category", domain);
    call->category = category;
    copy(&call->message, name);
}

static void mark(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *event) {
    note_event("mark", domain, event);
}

static nvtxRangeId_t start(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *event) {
    uint64_t range = atomic_fetch_add(&range_count, 1) + 1;
    note_event("start", domain, event)->range = range;
    return range;
}

static void end(nvtxDomainHandle_t domain, nvtxRangeId_t range) {
    note("end", domain)->range = range;
}

static int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t *event) {
    note_event("push", domain, event);
    return 0;
}

static int pop(nvtxDomainHandle_t domain) {
    note("pop", domain);
    return 0;
}

#ifdef CUDA_CALLS
static void CUPTIAPI on_cuda_call(void *user, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void *what) {
    (void)user, (void)domain;
    const CUpti_CallbackData *data = what;
    if (data->callbackSite != CUPTI_API_ENTER) return;
    if (!strstr(data->functionName, "Memcpy") && !strstr(data->functionName, "LaunchKernel")) return;
    Call *call = note("cuda", NULL);
    copy(&call->message, data->functionName);
    if (id == CUPTI_RUNTIME_TRACE_CBID_cudaMemcpyAsync_v3020) {
        call->has_payload = 1;
        call->payload = ((const cudaMemcpyAsync_v3020_params *)data->functionParams)->count;
    }
}

static int watch_cuda(void) {
    CUpti_SubscriberHandle subscriber;
    return cuptiSubscribe(&subscriber, on_cuda_call, NULL) == CUPTI_SUCCESS &&
           cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_RUNTIME_API) == CUPTI_SUCCESS;
}
#endif

static void put(NvtxFunctionTable table, unsigned size, unsigned index, void (*function)(void)) {
    if (index < size) *table[index] = function;
}

// What NVTX calls first; 0 says that the tool cannot work.
__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table) {
#ifdef REFUSES
    (void)get_table;
    return 0;
#endif
#ifdef CUDA_CALLS
    if (!watch_cuda()) return 0;
#endif
    const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable table;
    unsigned size;
    if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size)) return 0;
    put(table, size, NVTX_CBID_CORE_NameOsThreadA, (NvtxFunctionPointer)name_thread);
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    put(table, size, NVTX_CBID_CORE2_DomainMarkEx, (NvtxFunctionPointer)mark);
    put(table, size, NVTX_CBID_CORE2_DomainRangeStartEx, (NvtxFunctionPointer)start);
    put(table, size, NVTX_CBID_CORE2_DomainRangeEnd, (NvtxFunctionPointer)end);
    put(table, size, NVTX_CBID_CORE2_DomainRangePushEx, (NvtxFunctionPointer)push);
    put(table, size, NVTX_CBID_CORE2_DomainRangePop, (NvtxFunctionPointer)pop);
    put(table, size, NVTX_CBID_CORE2_DomainNameCategoryA, (NvtxFunctionPointer)name_category);
    put(table, size, NVTX_CBID_CORE2_DomainRegisterStringA, (NvtxFunctionPointer)register_string);
    put(table, size, NVTX_CBID_CORE2_DomainCreateA, (NvtxFunctionPointer)create_domain);
    if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CUDART, &table, &size)) {
        put(table, size, NVTX_CBID_CUDART_NameCudaStreamA, (NvtxFunctionPointer)name_stream);
    }
    return 1;
}

__attribute__((destructor)) static void write_calls(void) {
    const char *path = getenv("LAYER_STREAMER_NVTX_OUT");
    FILE *out = path ? fopen(path, "w") : NULL;
    if (!out) return;
    size_t count = atomic_load(&call_count);
    for (size_t i = 0; i < count && i < CALLS; i++) {
        Call *call = &calls[i];
        fprintf(out, "%" PRIu64 "\t%d\t%s\t%s\t%u\t%s\t", call->nanos, call->thread, call->kind,
                call->domain ? ((const String *)call->domain)->text : "", call->category, call->message.text);
        if (call->has_payload) fprintf(out, "%" PRIu64, call->payload);
        fprintf(out, "\t%" PRIu64 "\n", call->range);
    }
    fprintf(out, "%zu\tcalls\n", count);
    fclose(out);
}
