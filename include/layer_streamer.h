/*
 * layer-streamer: runs transformers whose weights do not fit on the GPU. Weights flow disk -> RAM -> pinned RAM -> GPU, layer
 * by layer, while the layers that have arrived compute on the host's own stream.
 *
 * Rules of every function, where its comment says nothing else:
 * - It returns an ls_status, LS_OK being 0. What went wrong is in ls_last_error(), per thread. Results are written last, and
 *   only if it succeeds.
 * - A pointer must not be NULL (LS_NULL), unless its comment says that it may be; `user` pointers may be anything. What a
 *   pointer argument points to is used during the call only, and copied where it is needed later.
 * - Handles are plain values that may be copied. Zeroed they stand for nothing. After its close a handle is refused with
 *   LS_CLOSED, for good. What has been opened must be closed, in any order.
 * - One handle is used by one call at a time, from any thread; a second call gets LS_BUSY at once, and so does a callback
 *   that calls back. Different handles are independent of one another. Only ls_cancel, ls_streamer_stats and their kin for
 *   models may be called at any time, though not from a signal handler. A program that forks does not use the library in the child.
 * - Sizes, offsets and lengths are bytes where nothing else is said. Texts are UTF-8 (paths: as the system has them) and end
 *   with a zero.
 * - Enumerations are passed as int32_t, so that a value which this version does not know is an error (LS_INVALID).
 * - A panic inside the library is a bug: it is returned as LS_PANICKED, and makes the handle refuse all but its close.
 *
 * With CUDA the thread's current device must be that of the handles it uses; functions that allocate or launch set it.
 *
 * A library built with feature nvtx (cargo cinstall --features nvtx) shows its work to tools that listen to NVTX, such as nsys;
 * there is nothing to call.
 */


#ifndef LAYER_STREAMER_H
#define LAYER_STREAMER_H

/* Made by cbindgen from src/capi: do not edit. */

#include <stddef.h>
#include <stdint.h>

// Version of this header: programs compiled with one run with any library of the same major and minor number.
#define LS_VERSION_MAJOR 0

// See LS_VERSION_MAJOR.
#define LS_VERSION_MINOR 1

// See LS_VERSION_MAJOR.
#define LS_VERSION_PATCH 0

// Tokens of a page of the KV cache.
#define LS_PAGE 64

// What an ls_token_fn returns to end a sequence.
#define LS_END 1

// How a call ended. New codes are added at the end; a code never changes its meaning.
enum ls_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // It did what was asked.
    LS_OK = 0,
    // A pointer was NULL that must not be.
    LS_NULL = 1,
    // An argument or setting is out of range; the message names it.
    LS_INVALID = 2,
    // The handle is not open: it never was, or was closed, or is a layer that was released.
    LS_CLOSED = 3,
    // The handle is in use by another thread, or by the call whose callback this was called from.
    LS_BUSY = 4,
    // A bug in the library. The handle can only be closed; others are not affected.
    LS_PANICKED = 5,
    // A callback returned that it failed.
    LS_CALLBACK = 6,
    // A file could not be opened or read.
    LS_IO = 7,
    // A checkpoint is malformed, or lacks what was asked for.
    LS_CHECKPOINT = 8,
    // A unit could not be read while it streamed.
    LS_READ = 9,
    // Memory could not be had.
    LS_MEMORY = 10,
    // A thread could not be started.
    LS_THREAD = 11,
    // There is no tensor of that name; the message lists those there are.
    LS_NO_TENSOR = 12,
    // Layers are held: more than the settings allow, or any at all where none may be.
    LS_LAYERS_HELD = 13,
    // The pass was cancelled.
    LS_CANCELLED = 14,
    // A kernel was given tensors that do not fit together.
    LS_KERNEL = 15,
    // CUDA failed.
    LS_CUDA = 16,
    // This build or machine cannot do it.
    LS_UNSUPPORTED = 17,
    // Device or disk did not answer when a streamer was closed, which it is nevertheless. What it may still use stays reserved: memory
    // that was lent must not be freed or used before the process ends, and the library must not be unloaded: a thread of it may be
    // in a call that does not return.
    LS_LEAKED = 18,
    // A budget is less than the least that will do; the message says how much that is, and so do ls_streamer_plan and
    // ls_model_plan.
    LS_TOO_LITTLE = 19,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_status ls_status;
#else
typedef int32_t ls_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What happens to a request. All but LS_EVENT_TOKEN end the answer: nothing comes after them.
enum ls_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // A new token.
    LS_EVENT_TOKEN = 0,
    // One of its stop tokens came.
    LS_EVENT_STOP = 1,
    // It has as many tokens as it may.
    LS_EVENT_MOST = 2,
    // It fills the context.
    LS_EVENT_CONTEXT = 3,
    // By ls_engine_cancel, by LS_END, or since the engine was closed.
    LS_EVENT_CANCELLED = 4,
    // The pass failed; the engine goes on.
    LS_EVENT_FAILED = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_event_kind ls_event_kind;
#else
typedef int32_t ls_event_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element types. The names are those of the safetensors format; from LS_Q4_0 on, types of quantised weights in blocks, those of GGUF
// files.
enum ls_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Where a type to convert to is asked for: none.
    LS_AS_STORED = 0,
    LS_BOOL = 1,
    LS_U8 = 2,
    LS_I8 = 3,
    LS_F8_E4M3 = 4,
    LS_F8_E5M2 = 5,
    LS_U16 = 6,
    LS_I16 = 7,
    LS_F16 = 8,
    LS_BF16 = 9,
    LS_U32 = 10,
    LS_I32 = 11,
    LS_F32 = 12,
    LS_U64 = 13,
    LS_I64 = 14,
    LS_F64 = 15,
    LS_Q4_0 = 16,
    LS_Q4_1 = 17,
    LS_Q5_0 = 18,
    LS_Q5_1 = 19,
    LS_Q8_0 = 20,
    LS_Q2_K = 21,
    LS_Q3_K = 22,
    LS_Q4_K = 23,
    LS_Q5_K = 24,
    LS_Q6_K = 25,
    LS_IQ4_NL = 26,
    LS_IQ4_XS = 27,
    LS_MXFP4 = 28,
    LS_F8_64 = 29,
    LS_U4_32 = 30,
    LS_U4_128 = 31,
    LS_NF4_64 = 32,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_dtype ls_dtype;
#else
typedef int32_t ls_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where a unit is kept between passes.
enum ls_tier
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // On disk: read in every pass.
    LS_TIER_DISK = 0,
    // In pageable RAM: read once.
    LS_TIER_RAM = 1,
    // In pinned RAM: read once.
    LS_TIER_PINNED = 2,
    // On the device: read and transferred once.
    LS_TIER_GPU = 3,
    // On the device, with packed and quantised tensors as they are stored: read and transferred once, unpacked in every pass.
    LS_TIER_GPU_PACKED = 4,
    // In pinned RAM, packed there while the first passes go by.
    LS_TIER_PINNED_PACKED = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_tier ls_tier;
#else
typedef int32_t ls_tier;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Who reads from disk.
enum ls_reader
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // The first of the others that the system allows.
    LS_READER_AUTO = 0,
    // io_uring with registered buffers.
    LS_READER_URING_FIXED = 1,
    // io_uring without them.
    LS_READER_URING = 2,
    // A few threads in pread.
    LS_READER_PREAD = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_reader ls_reader;
#else
typedef int32_t ls_reader;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Whether reads go past the page cache.
enum ls_cache
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // What the page cache holds is taken from there, everything else is read past it. On the CPU a whole unit that it holds, and that
    // is kept and used as it is stored, is used there, by a mapping, in memory that must not be written: whoever cuts such a file
    // short meanwhile, or a disk that fails, ends the process (SIGBUS).
    LS_CACHE_AUTO = 0,
    // Past the page cache where the file system allows it.
    LS_CACHE_DIRECT = 1,
    // Through the page cache.
    LS_CACHE_BUFFERED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_cache ls_cache;
#else
typedef int32_t ls_cache;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Whether a budget may have units that are stored plain packed where they are kept in pinned RAM.
enum ls_pack
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // A model's layers, where passes are expected to be faster for it. A streamer's units are not.
    LS_PACK_AUTO = 0,
    // They are kept as they are stored.
    LS_PACK_NEVER = 1,
    // All of them are packed.
    LS_PACK_ALWAYS = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_pack ls_pack;
#else
typedef int32_t ls_pack;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How much a line of the log matters.
enum ls_log_level
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // For whoever wonders what it does.
    LS_LOG_INFO = 0,
    // Something is slower, or costs more, than it need be.
    LS_LOG_WARNING = 1,
    // Something failed. Some call returns the same as its status, now or when it is the unit's turn.
    LS_LOG_ERROR = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_log_level ls_log_level;
#else
typedef int32_t ls_log_level;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Which elements of a head make a pair that rotates.
enum ls_rope_layout
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Elements i and i + half, of `half` frequencies, as checkpoints in Hugging Face's layout have it.
    LS_ROPE_HALVES = 0,
    // Elements 2i and 2i + 1, as in Meta's own checkpoints.
    LS_ROPE_INTERLEAVED = 1,
    // Elements 2i and 2i + 1, which become i and i + half: what follows adds in the order of a checkpoint with halves, from one
    // whose rows of queries and keys are interleaved, as in GGUF files of Llama models.
    LS_ROPE_TO_HALVES = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ls_rope_layout ls_rope_layout;
#else
typedef int32_t ls_rope_layout;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A checkpoint: a table that says where each tensor lies. Zeroed: none.
typedef struct ls_checkpoint {
    // The library's.
    uint64_t id;
} ls_checkpoint;

// A tensor in a file.
typedef struct ls_stored_tensor {
    // Full name, such as "model.layers.0.mlp.up_proj.weight".
    const char *name;
    // The file that holds the bytes.
    const char *file;
    // First byte, from the start of the file.
    uint64_t offset;
    // Dimensions, slowest first.
    const size_t *shape;
    // How many dimensions; 0 for a scalar.
    size_t rank;
    // An ls_dtype.
    int32_t dtype;
} ls_stored_tensor;

// Where layers arrive and kernels run. Zeroed: none.
typedef struct ls_device {
    // The library's.
    uint64_t id;
} ls_device;

// The types that a device's kernels compute with.
typedef struct ls_precision {
    // ls_dtype of activations, but for those that are always F32.
    int32_t activation;
    // ls_dtype of the KV cache.
    int32_t cache;
    // ls_dtype that weights must have, to be converted on arrival; LS_AS_STORED if F32, F16 and BF16 will do.
    int32_t weight;
} ls_precision;

// A queue of a device's work that runs in order. Zeroed: none.
typedef struct ls_stream {
    // The library's.
    uint64_t id;
} ls_stream;

// A tensor of a unit.
typedef struct ls_unit_tensor {
    // The name under which it is found in the layer; unique in the unit.
    const char *name;
    // The checkpoint's name for it.
    const char *stored;
    // The ls_dtype that it is converted to on arrival (F32, F16, BF16, F8_E4M3 or blocks to F32 or BF16), or LS_AS_STORED.
    int32_t dtype;
    // Of a weight that may be quantised, as the quantization_config in the folder's config.json says: its rows, such as 11008 of
    // "model.layers.0.mlp.up_proj.weight". It is then found in whatever tensors hold it, and arrives as one matrix of F32 or BF16;
    // with LS_AS_STORED and the CPU device, of the type of blocks that holds the same numbers. 0: only the tensor of this name will do.
    size_t rows;
    // Its columns.
    size_t columns;
} ls_unit_tensor;

// Tensors that travel together, and are handed over as one layer.
typedef struct ls_unit {
    // For messages.
    const char *name;
    // Its tensors.
    const struct ls_unit_tensor *tensors;
    // How many.
    size_t count;
    // An ls_tier.
    int32_t tier;
} ls_unit;

// How far a pass has come.
typedef struct ls_progress {
    // Passes completed before this one.
    uint64_t passes;
    // Units of this pass handed over so far.
    size_t done;
    // Units of a pass.
    size_t units;
    // Bytes of this unit, as stored.
    size_t bytes;
} ls_progress;

// Called for every unit handed over, in the thread that takes it. It must not call the streamer (LS_BUSY), and must return:
// neither longjmp nor an exception may leave it.
typedef void (*ls_progress_fn)(void *user, const struct ls_progress *progress);

// Told what happens, as one line without a newline; `level` is an ls_log_level, `message` is the library's and lasts for the
// call. Once opened: what memory is taken, who reads and why no faster reader does, files that are read through the page
// cache alone and why. Later: rewinds, passes that were cancelled, errors where they happen, memory that cannot be given
// back. Nothing in a pass that goes well, and no line about a rewind or a cancel allocates.
//
// Called from any thread, also from several at once, until the close returns (or the open, if that fails). It must not call
// the streamer or model that tells it, but for ls_cancel and ls_model_cancel. The rest is as for ls_progress_fn.
typedef void (*ls_log_fn)(void *user, int32_t level, const char *message);

// What a streamer is opened with. Fill it with ls_streamer_options_init, then change what should differ.
//
// A stage that buffers n units owns n + 1 slots of the largest unit's size, the extra one being what its consumer holds.
typedef struct ls_streamer_options {
    // sizeof(ls_streamer_options), by which the library knows the caller's version of it.
    size_t size;
    // Units buffered ahead on the device, at least 1; also how many layers may be held at once.
    size_t n_gpu;
    // Units buffered in pinned RAM; 0 skips the stage.
    size_t n_cpu_pinned;
    // Units buffered in pageable RAM; 0 skips the stage.
    size_t n_cpu;
    // Units handed over at once from the device's buffer; 0 means one by one; at most n_gpu.
    size_t batch_gpu;
    // The same from pinned RAM; at most n_cpu_pinned.
    size_t batch_cpu_pinned;
    // The same from pageable RAM; at most n_cpu.
    size_t batch_cpu;
    // An ls_reader.
    int32_t reader;
    // An ls_cache.
    int32_t cache;
    // The units. NULL: one per layer of the checkpoint, "model.layers.N" or whatever its
    // decoder's layers are called, of all tensors under that, named by what follows it.
    const struct ls_unit *units;
    // How many units.
    size_t unit_count;
    // Where units are kept between passes, as in "0-7=pinned,8-11=gpu,12=ram", by their numbers from 0; the others, and all if it
    // is NULL, are kept where their `tier` says, or stay on disk.
    const char *tiers;
    // May be NULL.
    ls_progress_fn progress;
    // What `progress` is given.
    void *progress_user;
    // May be NULL.
    ls_log_fn log;
    // What `log` is given.
    void *log_user;
    // Memory of the caller's for slots and kept units in pageable RAM, as much as ls_streamer_memory says or more, on a boundary
    // of 4096 bytes; NULL: the library's own. What is lent is the streamer's until that is closed (for good if
    // the close says LS_LEAKED). It should be present: first touch is slower than a disk.
    void *ram_memory;
    // Its length in bytes.
    size_t ram_bytes;
    // The same for pinned RAM. With CUDA the caller has pinned it (cudaHostAlloc, cudaHostRegister).
    void *pinned_memory;
    // Its length in bytes.
    size_t pinned_bytes;
    // The same on the device, on a boundary of 256 bytes.
    void *gpu_memory;
    // Its length in bytes.
    size_t gpu_bytes;
    // How much RAM may be used, in bytes: the library then chooses the numbers above and where units are kept, so that a pass
    // takes the least time; `tiers` and the memory above are left NULL. SIZE_MAX: what is free, less a reserve; 0: no budget.
    // LS_TOO_LITTLE if it is less than the least that will do. What comes of it is asked by ls_streamer_plan. To a streamer it is for its slots and
    // units alone: leave out what you load or allocate besides, and expect to hold one layer at a time (n_gpu 1). To a model
    // it is for everything.
    size_t host_budget;
    // The same of a GPU's own memory; 0 or SIZE_MAX: what is free there, less a reserve. Of a device that computes in RAM: 0.
    size_t device_budget;
    // A file for a picture of what every stage did and waited for: FILE.html opens in any browser, FILE.json in Perfetto. NULL:
    // none. The open fails with LS_INVALID or LS_IO where the file cannot be written; the close writes it, in one piece, and
    // returns LS_IO if that fails, with everything closed all the same. What is recorded takes some 9 MB of RAM, beside the
    // budget; where a run is so long that this is full, the oldest events make way.
    const char *trace;
    // An ls_pack, in a whole word; other than LS_PACK_AUTO only with a budget.
    uint64_t pack;
} ls_streamer_options;

// What a streamer takes. Set `size` before the call.
typedef struct ls_memory {
    // sizeof(ls_memory).
    size_t size;
    // Bytes of slots and kept units in pageable RAM.
    size_t ram;
    // The same in pinned RAM.
    size_t pinned;
    // The same on the device.
    size_t gpu;
    // Bytes on the device that cannot be lent: blocks for tensors that are converted on arrival.
    size_t staging;
} ls_memory;

// What a streamer or a model would choose and take. Set `size` before the call.
typedef struct ls_placement {
    // sizeof(ls_placement).
    size_t size;
    // As in ls_streamer_options, and so the next five.
    size_t n_gpu;
    // Units buffered in pinned RAM.
    size_t n_cpu_pinned;
    // Units buffered in pageable RAM.
    size_t n_cpu;
    // Units handed over at once from the device's buffer.
    size_t batch_gpu;
    // The same from pinned RAM.
    size_t batch_cpu_pinned;
    // The same from pageable RAM.
    size_t batch_cpu;
    // How many units a pass has.
    size_t units;
    // How many of them are read from disk in every pass.
    size_t units_disk;
    // How many are kept in pageable RAM.
    size_t units_ram;
    // How many are kept in pinned RAM.
    size_t units_pinned;
    // How many are kept on the device.
    size_t units_gpu;
    // Bytes of RAM that are taken in all; of a device that computes in RAM also what it takes there.
    size_t host_bytes;
    // Bytes of the device's own memory that are taken in all.
    size_t device_bytes;
    // With LS_TOO_LITTLE, where RAM is too little: the least that will do. Else 0.
    size_t least_host_bytes;
    // The same of the device's own memory.
    size_t least_device_bytes;
    // How many units are kept on the device with packed and quantised tensors as they are stored.
    size_t units_gpu_packed;
    // How many are kept in pinned RAM, packed there.
    size_t units_pinned_packed;
} ls_placement;

// Streams the units of a checkpoint to a device, pass after pass. Zeroed: none.
typedef struct ls_streamer {
    // The library's.
    uint64_t id;
} ls_streamer;

// What is known of a unit.
typedef struct ls_unit_info {
    // Its name; the streamer's, until that is closed.
    const char *name;
    // How many tensors it has.
    size_t tensors;
    // What they take in their files, in bytes.
    size_t bytes;
} ls_unit_info;

// Counts of one stage since the streamer was opened.
typedef struct ls_stage_stats {
    // Whole units handed on.
    uint64_t units;
    // Bytes moved; for compute, the bytes of the units it was given.
    uint64_t bytes;
    // Nanoseconds at work.
    uint64_t busy_ns;
    // Nanoseconds waiting for the stage before.
    uint64_t starved_ns;
    // Nanoseconds waiting for the stage after.
    uint64_t blocked_ns;
} ls_stage_stats;

// Counts since the streamer was opened. Set `size` before the call.
typedef struct ls_stats {
    // sizeof(ls_stats).
    size_t size;
    // Disk to the first host slot.
    struct ls_stage_stats read;
    // Pageable RAM to pinned RAM.
    struct ls_stage_stats pin;
    // Host to device.
    struct ls_stage_stats transfer;
    // Whatever the caller does from taking a layer to releasing it.
    struct ls_stage_stats compute;
    // Bytes read past the page cache.
    uint64_t direct_bytes;
    // Bytes read through the page cache.
    uint64_t buffered_bytes;
    // The ls_reader that reads.
    uint64_t reader;
    // Bytes of tensors used where the page cache has them, pass after pass.
    uint64_t mapped_bytes;
} ls_stats;

// Tensors that were loaded once and stay on the device. Zeroed: none.
typedef struct ls_statics {
    // The library's.
    uint64_t id;
} ls_statics;

// A tensor in device memory, row-major and without gaps.
typedef struct ls_tensor {
    // Device memory, on the CPU device RAM. What the library hands out begins on a boundary of 256 bytes; on the CPU device, where
    // layers are used where they were read to, it is aligned for its type. Kernels take what is.
    void *data;
    // An ls_dtype.
    int32_t dtype;
    // How many dimensions, at most 8; 0 for a scalar.
    uint32_t rank;
    // Dimensions, slowest first; those from `rank` on are not looked at.
    size_t shape[8];
} ls_tensor;

// A unit on the device. Zeroed: none.
typedef struct ls_layer {
    // The library's.
    uint64_t id;
} ls_layer;

// Called by ls_run_pass for each layer in order. It enqueues its work on the stream that ls_run_pass was given, and returns
// 0; anything else ends the pass with LS_CALLBACK. `layer` is released when it returns.
//
// In it ls_layer_index, ls_layer_check_cancelled, ls_layer_tensor, ls_layer_tensor_at, ls_streamer_unit and its kin,
// ls_streamer_stats, kernels on the stream and ls_cancel may be called; any other call on the streamer returns LS_BUSY. Neither
// longjmp nor an exception may leave it.
typedef int32_t (*ls_layer_fn)(void *user, struct ls_layer layer);

// One block of tokens of several sequences, and where their keys and values lie: sequence i owns tokens q_offsets[i] to
// q_offsets[i + 1] of the block, the last of the kv_lens[i] tokens that it has in the cache by then. Token t of those lies in page
// pages[i, t / LS_PAGE] of the cache, at place t % LS_PAGE. All three are U32, in device memory; a page that the cache does not
// have is the caller's error. Several sequences may have a page in common, to which none of them writes then.
typedef struct ls_ragged {
    // [S + 1]: where each sequence's tokens begin; the last is T.
    struct ls_tensor q_offsets;
    // [S]: tokens in the cache, those of this block included.
    struct ls_tensor kv_lens;
    // [S, P]: the pages of each sequence, in the order of its tokens; those behind its last token may be any.
    struct ls_tensor pages;
} ls_ragged;

// How tokens are drawn. Fill it with ls_sampling_init, whose values have no effect, or with ls_model_suggested_sampling, then change
// what should differ. Both penalties come first, then the others in the order of the fields.
typedef struct ls_sampling {
    // sizeof(ls_sampling).
    size_t size;
    // By which logits are divided; 0: the most likely token. By default 1.
    double temperature;
    // Keeps the so many most likely tokens, and those as likely as the last of them; 0, the default: all.
    size_t top_k;
    // Keeps the most likely tokens that together reach this probability, and at least one. From 0 to 1, by default 1.
    double top_p;
    // Keeps tokens whose probability is so many times the largest one, or more. From 0, the default, to 1.
    double min_p;
    // Positive logits of tokens that the sequence has are divided by it, others multiplied. Above 0, by default 1.
    double repetition_penalty;
    // Subtracted from the logits of tokens that this call has chosen for the sequence. From -2 to 2, by default 0.
    double presence_penalty;
    // The same seed gives the same tokens, whatever else is in the batch. By default 0.
    uint64_t seed;
} ls_sampling;

// What a model is opened with. Fill it with ls_model_options_init, then change what should differ.
typedef struct ls_model_options {
    // sizeof(ls_model_options).
    size_t size;
    // Rows of the KV cache: how many sequences it holds.
    size_t batch;
    // Tokens that each may have; 0, the default: 512, or as many as the model takes if that is less.
    size_t context;
    // How its layers are streamed; NULL: the defaults. There `units` and memory must be NULL.
    const struct ls_streamer_options *streamer;
} ls_model_options;

// A model with its memory on a device. Zeroed: none.
typedef struct ls_model {
    // The library's.
    uint64_t id;
} ls_model;

// What is known of a model. Set `size` before the call.
typedef struct ls_model_info {
    // sizeof(ls_model_info).
    size_t size;
    // Tokens in the vocabulary.
    size_t vocab;
    // Width of the residual stream.
    size_t hidden;
    // Layers.
    size_t layers;
    // Tokens that the model was made for.
    size_t max_positions;
    // Tokens that a row of the KV cache holds.
    size_t context;
    // Rows of the KV cache.
    size_t batch;
} ls_model_info;

// New tokens of one sequence.
typedef struct ls_sequence {
    // Its row in the KV cache.
    size_t row;
    // The tokens that follow what the cache holds.
    const uint32_t *tokens;
    // How many; at least one.
    size_t count;
} ls_sequence;

// Given each new token of each sequence. It returns 0 to go on, LS_END to end this sequence; anything else ends the call with
// LS_CALLBACK. It must not call the model (LS_BUSY), but for ls_model_cancel. Neither longjmp nor an exception may leave it.
typedef int32_t (*ls_token_fn)(void *user, size_t row, uint32_t token);

// What an engine allows. Fill it with ls_engine_options_init, then change what should differ.
typedef struct ls_engine_options {
    // sizeof(ls_engine_options).
    size_t size;
    // The most requests beside those that have a row of the KV cache; one more is refused with LS_BUSY. By default 1024.
    size_t waiting;
    // By how much of its time a pass may take longer so that prompts go on, while other sequences are being continued: 0.5, the
    // default, is half as long again.
    double delay;
} ls_engine_options;

// A prompt that is to be continued. Fill it with ls_request_init, then set the prompt and what should differ. All of it is read
// before ls_engine_submit returns.
typedef struct ls_request {
    // sizeof(ls_request).
    size_t size;
    // The prompt's tokens.
    const uint32_t *prompt;
    // How many; at least one.
    size_t count;
    // The most new tokens; by default 256.
    size_t most;
    // Tokens that end the answer, and are not part of it; NULL, the default: the model's own.
    const uint32_t *stop;
    // How many.
    size_t stop_count;
    // How tokens are drawn; NULL, the default: the most likely one is taken.
    const struct ls_sampling *sampling;
    // Sequences of the same seed with different numbers draw differently. By default 0.
    uint64_t number;
    // Of those that wait the greatest is next, and of equal ones the first. From -2³¹ to 2³¹ - 1, by default 0.
    int64_t priority;
} ls_request;

// A model that continues any number of sequences at once, on a thread of its own. Zeroed: none.
typedef struct ls_engine {
    // The library's.
    uint64_t id;
} ls_engine;

// Something that happens to a request.
typedef struct ls_event {
    // Which.
    ls_event_kind kind;
    // Of LS_EVENT_TOKEN the new token, of LS_EVENT_STOP the one that stopped; else 0.
    uint32_t token;
    // Of LS_EVENT_FAILED why; else LS_OK.
    ls_status status;
    // The same in words, until the callback returns; else NULL.
    const char *message;
} ls_event;

// Given each event of a request, by the engine's thread, which waits for it: be quick. It returns 0 to go on, anything else cancels
// the request. It may submit and cancel requests, but not close the engine (LS_BUSY). Neither longjmp nor an exception may leave it.
typedef int32_t (*ls_event_fn)(void *user, const struct ls_event *event);

// What an engine did and does. Set `size` before the call.
typedef struct ls_engine_stats {
    // sizeof(ls_engine_stats).
    size_t size;
    // Requests that wait for a row of the KV cache.
    size_t waiting;
    // Sequences that have one.
    size_t running;
    // Requests that have ended, however.
    uint64_t ended;
    // Passes over the layers.
    uint64_t passes;
    // Tokens of prompts that were computed.
    uint64_t prompt_tokens;
    // Tokens of prompts that were there already, of another sequence that begins the same.
    uint64_t reused_tokens;
    // Tokens that were chosen.
    uint64_t new_tokens;
    // How often a sequence gave back its place since the cache was full.
    uint64_t put_back;
} ls_engine_stats;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the library that is running: `major << 16 | minor << 8 | patch`. From any thread.
uint32_t ls_version(void);

// The name of a status, as in "LS_BUSY"; "unknown" for a number that is none. From any thread; the text is static.
const char *ls_status_name(int32_t status);

// The message of the last call that failed in this thread, and "" before the first. It says what was tried, on what, why it
// failed, and what to do. The text is the library's, UTF-8, and stays until the next call of this thread that fails.
const char *ls_last_error(void);

// Opens a Hugging Face folder: model.safetensors, or else model.safetensors.index.json with its shards; or a GGUF file, whose
// tensors have the folder's names then. Headers are read and checked, no weights. What cannot be read of it is an error for
// those who ask for such a tensor. Close the checkpoint with ls_checkpoint_close.
ls_status ls_checkpoint_open(const char *folder,
                             struct ls_checkpoint *checkpoint);

// Takes the caller's own table of `count` tensors, for weights in files of any layout. Tensors must lie inside their files
// and must not overlap; names must be unique. Everything is copied.
ls_status ls_checkpoint_from_table(const struct ls_stored_tensor *tensors,
                                   size_t count,
                                   struct ls_checkpoint *checkpoint);

// Closes a checkpoint. What was made from it stays.
ls_status ls_checkpoint_close(struct ls_checkpoint checkpoint);

// How many tensors there are.
ls_status ls_checkpoint_tensor_count(struct ls_checkpoint checkpoint, size_t *count);

// Tensor number `index` in the order of names. What `tensor` points to is the checkpoint's, until that is closed.
ls_status ls_checkpoint_tensor_at(struct ls_checkpoint checkpoint, size_t index, struct ls_stored_tensor *tensor);

// The tensor called `name`, or LS_NO_TENSOR. What `tensor` points to is the checkpoint's, until that is closed.
ls_status ls_checkpoint_tensor(struct ls_checkpoint checkpoint, const char *name, struct ls_stored_tensor *tensor);

// Writes how many bytes a tensor takes in its file: fewer than its type and shape say, if it is packed there; else as many.
ls_status ls_checkpoint_stored_bytes(struct ls_checkpoint checkpoint,
                                     const char *name,
                                     size_t *bytes);

// Bytes of one element of an ls_dtype, or of one block of ls_dtype_block elements; 0 for a number that is none. From any thread.
size_t ls_dtype_size(int32_t dtype);

// Elements of one block of an ls_dtype: 1 where each is stored by itself; 0 for a number that is none. From any thread.
size_t ls_dtype_block(int32_t dtype);

// The CPU as a device: its memory is RAM, and a stream runs each piece of work in the thread that enqueues it.
ls_status ls_device_cpu(struct ls_device *device);

// GPU number `ordinal`, counted from 0 as CUDA_VISIBLE_DEVICES leaves them. It becomes this thread's current device.
// LS_UNSUPPORTED in a library built without CUDA, LS_CUDA where there is no driver or no such GPU.
ls_status ls_device_cuda(uint32_t ordinal, struct ls_device *device);

// Closes a device. What was made on it stays.
ls_status ls_device_close(struct ls_device device);

// One line for people: what device this is. The text is the device's, until that is closed.
ls_status ls_device_describe(struct ls_device device, const char **description);

// The types that the device's kernels compute with.
ls_status ls_device_precision(struct ls_device device, struct ls_precision *precision);

// Whether ls_attention computes heads of `size` elements on the device: LS_KERNEL if not, and ls_last_error says which it does.
ls_status ls_device_check_head_size(struct ls_device device,
                                    size_t size);

// The device memory, in bytes, that kernels take at most for themselves on each stream that was prepared; on the CPU device RAM,
// whatever the number of streams.
ls_status ls_device_scratch_bytes(struct ls_device device,
                                  size_t *bytes);

// A new stream of the device.
ls_status ls_stream_open(struct ls_device device, struct ls_stream *stream);

// The caller's own stream of a CUDA device: `cuda_stream` is a cudaStream_t (the legacy default stream is written
// cudaStreamLegacy). It stays the caller's, and must exist until this handle is closed. LS_UNSUPPORTED for a device without
// such streams, for cudaStreamPerThread, and for a stream that is capturing a graph.
ls_status ls_stream_from_cuda(struct ls_device device,
                              void *cuda_stream,
                              struct ls_stream *stream);

// Closes a stream. Work that is on it is finished; a caller's own stream is left as it is.
ls_status ls_stream_close(struct ls_stream stream);

// Waits until all work that was enqueued on the stream is done.
ls_status ls_stream_synchronize(struct ls_stream stream);

// The cudaStream_t behind a stream of a CUDA device, for the caller's own kernels; LS_UNSUPPORTED on others. It lives until
// the stream is closed.
ls_status ls_stream_to_cuda(struct ls_stream stream,
                            void **cuda_stream);

// What a streamer with these options needs of memory that is lent to it; nothing is reserved or read. `options` may be NULL:
// the defaults. Set `memory->size` to sizeof(ls_memory) before. Device memory that a streamer reserves itself on the CPU may
// have slots for layers that are kept there too, until the memory they are kept in is present: n_gpu + 1 of the largest.
ls_status ls_streamer_memory(struct ls_checkpoint checkpoint,
                             const struct ls_streamer_options *options,
                             struct ls_memory *memory);

// Fills `options`, which is `size` bytes long (sizeof(ls_streamer_options)), with the defaults: two units ahead on the device
// and four in pinned RAM, which the disk fills directly; one unit per layer, all on disk.
ls_status ls_streamer_options_init(struct ls_streamer_options *options,
                                   size_t size);

// What ls_streamer_open with these arguments would choose and take, within its budgets if there are any; nothing is reserved or
// read. `options` may be NULL: the defaults. Set `placement->size` to sizeof(ls_placement) before. `tiers` may be NULL, or has room for `room` ls_tier: those of the
// first so many units.
//
// LS_TOO_LITTLE if a budget is less than the least that will do, which `placement` then tells.
ls_status ls_streamer_plan(struct ls_device device,
                           struct ls_checkpoint checkpoint,
                           const struct ls_streamer_options *options,
                           struct ls_placement *placement,
                           int32_t *tiers,
                           size_t room);

// Plans, reserves, registers, opens files, starts the threads; the first units are being read when this returns. Device and
// checkpoint may be closed before the streamer is. `options` may be NULL: the defaults.
//
// The streamer is used by one thread at a time (another gets LS_BUSY), not always the same; with CUDA its device must be the
// thread's current one. Only ls_cancel and ls_streamer_stats may be called beside another call.
ls_status ls_streamer_open(struct ls_device device,
                           struct ls_checkpoint checkpoint,
                           const struct ls_streamer_options *options,
                           struct ls_streamer *streamer);

// Stops the threads, waits until the device is done with the layers that were released, frees everything. LS_LAYERS_HELD,
// and nothing happens, while layers are held. LS_LEAKED where the device does not answer: the handle is closed, but memory that
// was lent must stay. LS_IO where only the trace could not be written.
ls_status ls_streamer_close(struct ls_streamer streamer);

// Cancels the pass under way, or, between passes, the next one: the call that waits for a layer, or the next that asks for
// one, returns LS_CANCELLED; so does ls_statics_load while it waits for the disk. Layers that are held stay usable. After ls_rewind, or with the next ls_run_pass, a new pass
// begins. From any thread, also while another call uses the streamer, also from a callback.
ls_status ls_cancel(struct ls_streamer streamer);

// Goes back to the first unit: after an error, after a cancel, or in the middle of a pass. No thread or memory is made anew.
// LS_LAYERS_HELD while layers are held.
ls_status ls_rewind(struct ls_streamer streamer);

// Whether no packed weights were found corrupt so far, or LS_CHECKPOINT with the tensor that is. A device finds out when it unpacks them,
// and nobody waits for that: ask when the work of a pass is done, before its results are used.
ls_status ls_streamer_check_arrivals(struct ls_streamer streamer);

// How many units a pass has.
ls_status ls_streamer_unit_count(struct ls_streamer streamer, size_t *count);

// What is known of unit number `unit`.
ls_status ls_streamer_unit(struct ls_streamer streamer, size_t unit, struct ls_unit_info *info);

// The number of the tensor called `name` in unit number `unit`, for ls_layer_tensor_at: looked up once, it holds in every
// pass. Numbers follow the names' order. LS_NO_TENSOR if there is none.
ls_status ls_streamer_tensor_index(struct ls_streamer streamer,
                                   size_t unit,
                                   const char *name,
                                   size_t *index);

// The name of tensor number `index` of unit number `unit`; the streamer's, until that is closed.
ls_status ls_streamer_tensor_name(struct ls_streamer streamer, size_t unit, size_t index, const char **name);

// Counts since the streamer was opened, from any thread at any time. Set `stats->size` to sizeof(ls_stats) before.
ls_status ls_streamer_stats(struct ls_streamer streamer, struct ls_stats *stats);

// Loads tensors that stay on the device until ls_statics_close, each stored by itself. Call it before the first pass: it reads
// beside the pipeline.
// The streamer may be closed before they are.
ls_status ls_statics_load(struct ls_streamer streamer,
                          const struct ls_unit_tensor *tensors,
                          size_t count,
                          struct ls_statics *statics);

// The static tensor called `name`. Its memory is the library's, until ls_statics_close.
ls_status ls_statics_tensor(struct ls_statics statics, const char *name, struct ls_tensor *tensor);

// Frees static tensors. The device must be done with them.
ls_status ls_statics_close(struct ls_statics statics);

// How many bytes a tensor has: the product of its dimensions, divided by ls_dtype_block, times ls_dtype_size. LS_INVALID where that is no tensor.
ls_status ls_tensor_bytes(const struct ls_tensor *tensor,
                          size_t *bytes);

// Waits until the next unit is on its way to the device and orders `stream` after its arrival; the thread does not wait for
// the device. On the CPU device it has arrived when this returns. After a pass's last unit comes the first of the next pass.
// Up to n_gpu layers may be held at once, and released in any order. Allocates nothing.
//
// LS_READ if the unit could not be read: every unit before it was handed over, and the error stays until ls_rewind.
// LS_LAYERS_HELD if n_gpu are held already. LS_CANCELLED after ls_cancel, until ls_rewind.
ls_status ls_next_layer(struct ls_streamer streamer,
                        struct ls_stream stream,
                        struct ls_layer *layer);

// Gives a layer back: its memory is filled again once the work now on `stream`, which need not be the one that it was taken
// with, is done. Allocates nothing.
ls_status ls_release_layer(struct ls_layer layer,
                           struct ls_stream stream);

// The layer's number in the pass, from 0.
ls_status ls_layer_index(struct ls_layer layer, size_t *index);

// LS_CANCELLED if the layer's pass was cancelled, for work on a layer that takes long: nothing else ends it early.
ls_status ls_layer_check_cancelled(struct ls_layer layer);

// The layer's tensor called `name`, or LS_NO_TENSOR. Its memory is the library's: to be read, by work on the layer's stream,
// until the layer is released.
ls_status ls_layer_tensor(struct ls_layer layer,
                          const char *name,
                          struct ls_tensor *tensor);

// The same by the number that ls_streamer_tensor_index found.
ls_status ls_layer_tensor_at(struct ls_layer layer, size_t index, struct ls_tensor *tensor);

// Runs one pass: `layer_fn` is called with `user` for each unit in order. A pass that was begun before is abandoned. After an
// error the next pass starts afresh at the first unit. The thread never waits for the device.
//
// LS_CALLBACK if `layer_fn` returned anything but 0, LS_LAYERS_HELD if layers are held; else as ls_next_layer.
ls_status ls_run_pass(struct ls_streamer streamer,
                      struct ls_stream stream,
                      ls_layer_fn layer_fn,
                      void *user);

// Reserves what kernels need per stream beyond their arguments (on a GPU it opens cuBLAS). Call it once per stream before its
// first kernel; calling it again does nothing.
ls_status ls_stream_prepare(struct ls_stream stream);

// Converts `x` into `out`, of the same shape: F32, F16, BF16, F8_E4M3 or blocks to F32 or BF16.
ls_status ls_cast(struct ls_stream stream, const struct ls_tensor *x, const struct ls_tensor *out);

// Looks up rows: out[t] = table[ids[t]], with `table` [V, H] a weight, `ids` [T] U32, `out` [T, H] F32. Ids from V on are the
// caller's error: what they give is unspecified.
ls_status ls_embed(struct ls_stream stream,
                   const struct ls_tensor *table,
                   const struct ls_tensor *ids,
                   const struct ls_tensor *out);

// Root mean square norm over the last dimension: out = x / sqrt(mean(x²) + eps) · (offset + weight), with `x` [.., H] F32 (the
// residual stream), `weight` [H] and `out` [.., H] an activation. `offset` is 0 for most models, and 1 for Gemma.
ls_status ls_rms_norm(struct ls_stream stream,
                      const struct ls_tensor *x,
                      const struct ls_tensor *weight,
                      float offset,
                      float eps,
                      const struct ls_tensor *out);

// residual += y, then out = the norm of it, as ls_add and ls_rms_norm in one go: `residual` [.., H] F32, `y` and `out` [.., H]
// activations, `weight` [H].
ls_status ls_add_rms_norm(struct ls_stream stream,
                          const struct ls_tensor *residual,
                          const struct ls_tensor *y,
                          const struct ls_tensor *weight,
                          float offset,
                          float eps,
                          const struct ls_tensor *out);

// The norm of `x` [.., H], F32, in place, for each head of a query or key, or for all of a token's at once.
ls_status ls_rms_norm_in_place(struct ls_stream stream,
                               const struct ls_tensor *x,
                               const struct ls_tensor *weight,
                               float offset,
                               float eps);

// residual += y, of one shape: `residual` F32, `y` an activation.
ls_status ls_add(struct ls_stream stream, const struct ls_tensor *residual, const struct ls_tensor *y);

// gate = silu(gate) · up in place, activations of one shape.
ls_status ls_swiglu(struct ls_stream stream, const struct ls_tensor *gate, const struct ls_tensor *up);

// gate = gelu(gate) · up in place, with gelu(x) = x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), activations of one shape.
ls_status ls_geglu(struct ls_stream stream,
                   const struct ls_tensor *gate,
                   const struct ls_tensor *up);

// x *= factor in place: `x` an activation, or F32.
ls_status ls_scale(struct ls_stream stream, const struct ls_tensor *x, float factor);

// x = cap · tanh(x / cap) in place, F32; `cap` is above 0.
ls_status ls_soft_cap(struct ls_stream stream, const struct ls_tensor *x, float cap);

// Rotary position embedding: pair i of a head, by `layout` (an ls_rope_layout), turns by positions[t] · inv_freq[i] and becomes
// `scale` times as long, 1 for most models. The first 2 · half elements of a head are in pairs, up to all D; the others are
// passed on as they are. `x` [T, heads, D] F32, `positions` [T] U32, `inv_freq` [half] F32, and `out` [T, heads, D] an activation.
ls_status ls_rope(struct ls_stream stream,
                  const struct ls_tensor *x,
                  const struct ls_tensor *positions,
                  const struct ls_tensor *inv_freq,
                  float scale,
                  int32_t layout,
                  const struct ls_tensor *out);

// Copies rows of the residual stream: out[i] = x[indices[i]], with `x` [T, H] F32, `indices` [R] U32, `out` [R, H] F32.
ls_status ls_gather(struct ls_stream stream,
                    const struct ls_tensor *x,
                    const struct ls_tensor *indices,
                    const struct ls_tensor *out);

// The index of each row's greatest element, the first if there are several, or UINT32_MAX of a row with a NaN: `x` [R, V] F32,
// `out` [R] U32.
ls_status ls_argmax(struct ls_stream stream,
                    const struct ls_tensor *x,
                    const struct ls_tensor *out);

// out = x · weightᵀ + bias, with activations `x` [T, K] and `out` [T, N], `weight` [N, K], `bias` [N]. `bias` may be NULL. `out`
// may be F32 instead, for logits and for what ls_rope takes. On a GPU the first product of a shape with more than 16 rows waits for
// the stream; rows in multiples of 128 make few shapes.
ls_status ls_linear(struct ls_stream stream,
                    const struct ls_tensor *x,
                    const struct ls_tensor *weight,
                    const struct ls_tensor *bias,
                    const struct ls_tensor *out);

// Writes the block's keys or values [T, G, D] to their places in one layer's `cache` [pages, G, LS_PAGE, D].
ls_status ls_append_kv(struct ls_stream stream,
                       const struct ls_tensor *block,
                       const struct ls_ragged *batch,
                       const struct ls_tensor *cache);

// Causal attention of the block's queries over the cache, with grouped heads: query head h of HQ uses key head h · G / HQ.
// `q` and `out` [T, HQ, D], `keys` and `values` [pages, G, LS_PAGE, D]. Scores are multiplied by `scale`, usually
// 1 / sqrt(D). Each token sees itself and window - 1 before it; `window` 0: all before it. Scaled scores become
// soft_cap · tanh(score / soft_cap) before the softmax; `soft_cap` 0: they stay as they are.
ls_status ls_attention(struct ls_stream stream,
                       const struct ls_tensor *q,
                       const struct ls_tensor *keys,
                       const struct ls_tensor *values,
                       const struct ls_ragged *batch,
                       float scale,
                       size_t window,
                       float soft_cap,
                       const struct ls_tensor *out);

// Fills `sampling`, which is `size` bytes long (sizeof(ls_sampling)), with values that have no effect.
ls_status ls_sampling_init(struct ls_sampling *sampling, size_t size);

// Fills `options`, which is `size` bytes long (sizeof(ls_model_options)), with the defaults.
ls_status ls_model_options_init(struct ls_model_options *options, size_t size);

// What ls_model_open with these arguments would choose and take; nothing is reserved and no weight is read. Else as
// ls_streamer_plan, with all of the model's memory: weights, KV cache, activations. `options` may be NULL: the defaults; and
// `tiers` may be NULL.
ls_status ls_model_plan(struct ls_device device,
                        const char *folder,
                        const struct ls_model_options *options,
                        struct ls_placement *placement,
                        int32_t *tiers,
                        size_t room);

// Opens a Hugging Face folder or a GGUF file (of a family that docs/models.md names), reserves everything, loads what stays on the
// device, and starts streaming. `options` may be NULL: the defaults. The device may be closed before the model is.
//
// The model is used by one thread at a time (another gets LS_BUSY), not always the same. Only ls_model_cancel and
// ls_model_stats may be called beside another call.
ls_status ls_model_open(struct ls_device device,
                        const char *folder,
                        const struct ls_model_options *options,
                        struct ls_model *model);

// Closes a model: stops its threads and frees its memory. LS_LEAKED where the device does not answer: the handle is closed, but
// what the device may still use stays reserved. LS_IO where only the trace could not be written.
ls_status ls_model_close(struct ls_model model);

// What is known of the model. Set `info->size` to sizeof(ls_model_info) before.
ls_status ls_model_describe(struct ls_model model, struct ls_model_info *info);

// Runs the tokens of `count` sequences through the model, after what the KV cache holds of them, and keeps their keys and
// values. ls_model_logits then has what comes next, for a host that chooses tokens by itself. LS_CANCELLED after
// ls_model_cancel. After an error the cache is as it was before. What a token comes to depends on the tokens before it in its
// sequence and on nothing else, to the last bit.
ls_status ls_model_forward(struct ls_model model,
                           const struct ls_sequence *sequences,
                           size_t count);

// Writes the logits of the last token of each sequence that went through the model last, in their order: a row of F32 as long
// as the vocabulary for each. `room` is how many floats `logits` has room for: sequences · vocab or more. LS_INVALID if it is
// less, or where no pass that succeeded went before.
ls_status ls_model_logits(struct ls_model model,
                          float *logits,
                          size_t room);

// Runs the tokens of `count` sequences through the model in one pass, after what the KV cache holds of them, and continues
// each by the most likely token, again and again, until one of the model's stop tokens comes, or it has `most` new tokens, or
// it fills the context. `token_fn` is called with `user`, in this thread, for each new token but the one that stops.
//
// The last new token of a sequence is not in the KV cache yet: to go on later, give it as the first of the next tokens.
// LS_CANCELLED after ls_model_cancel; the cache is then as it was before the pass that was cancelled.
ls_status ls_model_generate(struct ls_model model,
                            const struct ls_sequence *sequences,
                            size_t count,
                            size_t most,
                            ls_token_fn token_fn,
                            void *user);

// As ls_model_generate, by tokens that are drawn as `sampling` says. The repetition penalty counts all tokens that the KV cache
// holds of a sequence, and the new ones; the presence penalty counts those that this call chooses. A draw depends on the seed, the
// row, and the number of tokens before it alone: to draw others for the same prompt in the same row, change the seed. LS_INVALID
// for a value out of range, or for logits that are not numbers.
ls_status ls_model_sample(struct ls_model model,
                          const struct ls_sequence *sequences,
                          size_t count,
                          size_t most,
                          const struct ls_sampling *sampling,
                          ls_token_fn token_fn,
                          void *user);

// What the model's generation_config.json suggests to those who sample; what it leaves out has no effect. Set `sampling->size` to
// sizeof(ls_sampling) before.
ls_status ls_model_suggested_sampling(struct ls_model model,
                                      struct ls_sampling *sampling);

// How many tokens row `row` of the KV cache holds.
ls_status ls_model_length(struct ls_model model, size_t row, size_t *length);

// Forgets all tokens of row `row` of the KV cache from number `length` on.
ls_status ls_model_truncate(struct ls_model model, size_t row, size_t length);

// Cancels the pass under way, or, between passes, the next one. From any thread, also while another call uses the model.
ls_status ls_model_cancel(struct ls_model model);

// Counts since the model was opened, from any thread at any time. Set `stats->size` to sizeof(ls_stats) before.
ls_status ls_model_stats(struct ls_model model, struct ls_stats *stats);

// Fills `options`, which is `size` bytes long (sizeof(ls_engine_options)), with the defaults.
ls_status ls_engine_options_init(struct ls_engine_options *options, size_t size);

// Fills `request`, which is `size` bytes long (sizeof(ls_request)), with the defaults.
ls_status ls_request_init(struct ls_request *request, size_t size);

// Makes an engine of a model, which it takes over: its handle is closed, whatever this returns, and its KV cache emptied; it has as
// many sequences at once as ls_model_options.batch says. `options` may be NULL: the defaults. LS_INVALID, and the model stays, if it
// was opened with a trace.
//
// An engine may be used by any number of threads at once.
ls_status ls_engine_open(struct ls_model model,
                         const struct ls_engine_options *options,
                         struct ls_engine *engine);

// Cancels all requests, waits until each has been told so, and frees everything. LS_BUSY from inside a callback.
ls_status ls_engine_close(struct ls_engine engine);

// Lets all requests end, then closes the engine. LS_BUSY from inside a callback.
ls_status ls_engine_finish(struct ls_engine engine);

// Hands in a request; `event_fn` is called with `user` for each of its events. `ticket` may be NULL: what the request can be cancelled by,
// never 0; it is written when the call returns, before which callbacks may come. LS_INVALID names what is wrong with the request; LS_BUSY
// if too many wait.
ls_status ls_engine_submit(struct ls_engine engine,
                           const struct ls_request *request,
                           ls_event_fn event_fn,
                           void *user,
                           uint64_t *ticket);

// Ends a request at the end of the pass that runs; its last event is LS_EVENT_CANCELLED. One that has ended stays as it is.
ls_status ls_engine_cancel(struct ls_engine engine,
                           uint64_t ticket);

// What the engine did, and does now. Set `stats->size` to sizeof(ls_engine_stats) before.
ls_status ls_engine_describe(struct ls_engine engine, struct ls_engine_stats *stats);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LAYER_STREAMER_H */
