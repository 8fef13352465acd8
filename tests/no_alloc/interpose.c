// Counts how often a process asks for memory, from the allocator or from the kernel, whichever thread or language asks.
// Loaded with LD_PRELOAD. For glibc, under whose own names the calls are passed on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum { QUIET = 1, LOUD = 2, TRACES_SHOWN = 5 };

static atomic_int counting;
static atomic_ulong count;
// In the thread's static block: the first use of a dynamic one would itself allocate.
static __thread int inside __attribute__((tls_model("initial-exec")));

static void trace(const char *call, size_t bytes) {
    char thread[16] = "?", line[96];
    prctl(PR_GET_NAME, thread);
    int length = snprintf(line, sizeof line, "%s of %zu bytes in thread %s\n", call, bytes, thread);
    if (write(STDERR_FILENO, line, length) < 0) return;
    void *frames[32];
    backtrace_symbols_fd(frames, backtrace(frames, 32), STDERR_FILENO);
}

static void note(const char *call, size_t bytes) {
    int mode = atomic_load(&counting);
    if (!mode || inside) return;
    int saved = errno;
    inside = 1;
    if (atomic_fetch_add(&count, 1) < TRACES_SHOWN && mode == LOUD) trace(call, bytes);
    inside = 0;
    errno = saved;
}

__attribute__((constructor)) static void load_unwinder(void) {
    void *frame;
    backtrace(&frame, 1); // its first call allocates
}

// Counting starts at zero; with `loud` the first few are shown on standard error, each with a backtrace.
void no_alloc_begin(int loud) {
    atomic_store(&count, 0);
    atomic_store(&counting, loud ? LOUD : QUIET);
}

// Counting ends; returns how many there were.
unsigned long no_alloc_end(void) {
    atomic_store(&counting, 0);
    return atomic_load(&count);
}

void *malloc(size_t bytes) {
    note("malloc", bytes);
    return __libc_malloc(bytes);
}

void *calloc(size_t items, size_t bytes) {
    note("calloc", items * bytes);
    return __libc_calloc(items, bytes);
}

void *realloc(void *old, size_t bytes) {
    note("realloc", bytes);
    return __libc_realloc(old, bytes);
}

void *memalign(size_t alignment, size_t bytes) {
    note("memalign", bytes);
    return __libc_memalign(alignment, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) {
    note("aligned_alloc", bytes);
    return __libc_memalign(alignment, bytes);
}

int posix_memalign(void **result, size_t alignment, size_t bytes) {
    note("posix_memalign", bytes);
    if (alignment % sizeof(void *) || !alignment || (alignment & (alignment - 1))) return EINVAL;
    void *memory = __libc_memalign(alignment, bytes);
    if (!memory) return ENOMEM;
    *result = memory;
    return 0;
}

void *mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset) {
    note("mmap", bytes);
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int file, off64_t offset) {
    note("mmap64", bytes);
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
}

void *mremap(void *old, size_t old_bytes, size_t bytes, int flags, ...) {
    note("mremap", bytes);
    va_list rest;
    va_start(rest, flags);
    void *target = flags & MREMAP_FIXED ? va_arg(rest, void *) : NULL;
    va_end(rest);
    return (void *)syscall(SYS_mremap, old, old_bytes, bytes, flags, target);
}

int brk(void *end) {
    note("brk", 0);
    int (*next)(void *) = (int (*)(void *))dlsym(RTLD_NEXT, "brk");
    return next(end);
}

void *sbrk(intptr_t bytes) {
    note("sbrk", bytes);
    void *(*next)(intptr_t) = (void *(*)(intptr_t))dlsym(RTLD_NEXT, "sbrk");
    return next(bytes);
}
