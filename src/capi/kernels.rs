//! The kernels, on tensors in device memory and a stream. Each is one declaration, of which the header is made, and one macro
//! call, which does the rest by the method of [`Kernels`].
#![allow(rustdoc::broken_intra_doc_links, reason = "brackets are shapes in C's comments, not links")]

use super::{
    any::AnyDevice,
    device::{Queue, STREAMS, ls_stream},
    ffi::{Result, ffi, ls_status, place},
    handles::Entered,
    layers::ls_tensor,
    options::choose,
};
use crate::{
    device::{Device, TensorMut, TensorRef},
    kernels::{AttentionMask, Kernels, PAGE, Ragged, RopeLayout},
};

/// Which elements of a head make a pair that rotates.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_rope_layout {
    /// Elements i and i + half, of `half` frequencies, as checkpoints in Hugging Face's layout have it.
    LS_ROPE_HALVES = 0,
    /// Elements 2i and 2i + 1, as in Meta's own checkpoints.
    LS_ROPE_INTERLEAVED = 1,
    /// Elements 2i and 2i + 1, which become i and i + half: what follows adds in the order of a checkpoint with halves, from one
    /// whose rows of queries and keys are interleaved, as in GGUF files of Llama models.
    LS_ROPE_TO_HALVES = 2,
}

/// Tokens of a page of the KV cache.
pub const LS_PAGE: usize = 64;
const _: () = assert!(LS_PAGE == PAGE);

/// One block of tokens of several sequences, and where their keys and values lie: sequence i owns tokens q_offsets[i] to
/// q_offsets[i + 1] of the block, the last of the kv_lens[i] tokens that it has in the cache by then. Token t of those lies in page
/// pages[i, t / LS_PAGE] of the cache, at place t % LS_PAGE. All three are U32, in device memory; a page that the cache does not
/// have is the caller's error. Several sequences may have a page in common, to which none of them writes then.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_ragged {
    /// [S + 1]: where each sequence's tokens begin; the last is T.
    pub q_offsets: ls_tensor,
    /// [S]: tokens in the cache, those of this block included.
    pub kv_lens: ls_tensor,
    /// [S, P]: the pages of each sequence, in the order of its tokens; those behind its last token may be any.
    pub pages: ls_tensor,
}

/// An argument of a kernel, and how C passes it.
trait Argument: Sized {
    /// What C passes.
    type C: Copy;

    /// Checks a pointer before any is followed.
    fn check(c: Self::C, name: &'static str) -> Result<()>;

    /// # Safety
    /// Where `C` is a pointer, it points to a structure, and the memory of each tensor in that is there and ordered with the
    /// kernel's stream.
    unsafe fn read(c: Self::C, name: &'static str) -> Result<Self>;
}

impl Argument for TensorRef<'_, AnyDevice> {
    type C = *const ls_tensor;

    fn check(c: *const ls_tensor, name: &'static str) -> Result<()> {
        place(c, name).map(drop)
    }

    unsafe fn read(c: *const ls_tensor, name: &'static str) -> Result<Self> {
        // SAFETY: the caller promises that `c` points to a tensor whose memory is there and ordered with the kernel's stream.
        unsafe { (*c).read(name) }
    }
}

impl Argument for TensorMut<'_, AnyDevice> {
    type C = *const ls_tensor;

    fn check(c: *const ls_tensor, name: &'static str) -> Result<()> {
        place(c, name).map(drop)
    }

    unsafe fn read(c: *const ls_tensor, name: &'static str) -> Result<Self> {
        // SAFETY: the caller promises that `c` points to a tensor whose memory is there and ordered with the kernel's stream.
        unsafe { (*c).write(name) }
    }
}

/// NULL: none.
impl Argument for Option<TensorRef<'_, AnyDevice>> {
    type C = *const ls_tensor;

    fn check(c: *const ls_tensor, name: &'static str) -> Result<()> {
        if c.is_null() { Ok(()) } else { place(c, name).map(drop) }
    }

    unsafe fn read(c: *const ls_tensor, name: &'static str) -> Result<Self> {
        // SAFETY: the caller promises that `c`, unless it is NULL, points to a tensor whose memory is there and ordered with the
        // kernel's stream.
        unsafe { c.as_ref().map(|tensor| tensor.read(name)).transpose() }
    }
}

impl Argument for Ragged<'_, AnyDevice> {
    type C = *const ls_ragged;

    fn check(c: *const ls_ragged, name: &'static str) -> Result<()> {
        place(c, name).map(drop)
    }

    unsafe fn read(c: *const ls_ragged, _: &'static str) -> Result<Self> {
        // SAFETY: the caller promises that `c` points to three tensors whose memory is there and ordered with the kernel's stream.
        unsafe {
            Ok(Ragged {
                q_offsets: (*c).q_offsets.read("q_offsets")?,
                kv_lens: (*c).kv_lens.read("kv_lens")?,
                pages: (*c).pages.read("pages")?,
            })
        }
    }
}

/// Arguments that are plain values.
macro_rules! values {
    ($($type:ty: |$c:ident: $of:ty, $name:ident| $read:expr;)*) => { $(
        impl Argument for $type {
            type C = $of;

            fn check(_: $of, _: &'static str) -> Result<()> {
                Ok(())
            }

            unsafe fn read($c: $of, $name: &'static str) -> Result<Self> {
                $read
            }
        }
    )* };
}
values! {
    f32: |c: f32, _name| Ok(c);
    RopeLayout: |c: i32, name| choose(c, &[RopeLayout::Halves, RopeLayout::Interleaved, RopeLayout::ToHalves], name);
    AttentionMask: |c: (f32, usize, f32), _name| Ok(Self {
        scale: c.0,
        window: (c.1 > 0).then_some(c.1),
        soft_cap: (c.2 != 0.0).then_some(c.2),
    });
}

/// What C passed as an argument of type `A`, checked.
struct Given<A: Argument>(A::C, &'static str);

impl<A: Argument> Given<A> {
    fn new(c: A::C, name: &'static str) -> Result<Self> {
        A::check(c, name)?;
        Ok(Self(c, name))
    }

    /// # Safety
    /// As [`Argument::read`].
    unsafe fn read(self) -> Result<A> {
        // SAFETY: the caller promises what `Argument::read` asks for.
        unsafe { A::read(self.0, self.1) }
    }
}

/// Calls a kernel with what C passed. Which arguments are read, written or may be NULL follows from the method's types. All
/// pointers are checked before any is followed.
macro_rules! kernel {
    ($stream:ident, $name:ident($($argument:ident),+)) => {
        ffi(|| {
            $(let $argument = Given::new($argument, stringify!($argument))?;)+
            // SAFETY: none that must not be is NULL, and the header asks that each points to tensors whose memory is there until
            // the kernel is done, and that nothing uses it meanwhile that is not ordered against `stream`.
            $(let $argument = unsafe { $argument.read()? };)+
            let queue = queue($stream)?;
            Ok(queue.device.$name(&queue.stream, $($argument),+)?)
        })
    };
}

/// The stream, with its device made this thread's.
fn queue(stream: ls_stream) -> Result<Entered<'static, Queue>> {
    let queue = STREAMS.enter_lent(stream.id)?;
    queue.device.bind_thread()?;
    Ok(queue)
}

/// Reserves what kernels need per stream beyond their arguments (on a GPU it opens cuBLAS). Call it once per stream before its
/// first kernel; calling it again does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn ls_stream_prepare(stream: ls_stream) -> ls_status {
    ffi(|| {
        let queue = queue(stream)?;
        Ok(queue.device.prepare(&queue.stream)?)
    })
}

/// Converts `x` into `out`, of the same shape: F32, F16, BF16, F8_E4M3 or blocks to F32 or BF16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_cast(stream: ls_stream, x: *const ls_tensor, out: *const ls_tensor) -> ls_status {
    kernel!(stream, cast(x, out))
}

/// Looks up rows: out[t] = table[ids[t]], with `table` [V, H] a weight, `ids` [T] U32, `out` [T, H] F32. Ids from V on are the
/// caller's error: what they give is unspecified.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_embed(
    stream: ls_stream,
    table: *const ls_tensor,
    ids: *const ls_tensor,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, embed(table, ids, out))
}

/// Root mean square norm over the last dimension: out = x / sqrt(mean(x²) + eps) · (offset + weight), with `x` [.., H] F32 (the
/// residual stream), `weight` [H] and `out` [.., H] an activation. `offset` is 0 for most models, and 1 for Gemma.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rms_norm(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    offset: f32,
    eps: f32,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, rms_norm(x, weight, offset, eps, out))
}

/// residual += y, then out = the norm of it, as ls_add and ls_rms_norm in one go: `residual` [.., H] F32, `y` and `out` [.., H]
/// activations, `weight` [H].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_add_rms_norm(
    stream: ls_stream,
    residual: *const ls_tensor,
    y: *const ls_tensor,
    weight: *const ls_tensor,
    offset: f32,
    eps: f32,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, add_rms_norm(residual, y, weight, offset, eps, out))
}

/// The norm of `x` [.., H], F32, in place, for each head of a query or key, or for all of a token's at once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rms_norm_in_place(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    offset: f32,
    eps: f32,
) -> ls_status {
    kernel!(stream, rms_norm_in_place(x, weight, offset, eps))
}

/// residual += y, of one shape: `residual` F32, `y` an activation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_add(stream: ls_stream, residual: *const ls_tensor, y: *const ls_tensor) -> ls_status {
    kernel!(stream, add(residual, y))
}

/// gate = silu(gate) · up in place, activations of one shape.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_swiglu(stream: ls_stream, gate: *const ls_tensor, up: *const ls_tensor) -> ls_status {
    kernel!(stream, swiglu(gate, up))
}

/// gate = gelu(gate) · up in place, with gelu(x) = x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), activations of one shape.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_geglu(stream: ls_stream, gate: *const ls_tensor, up: *const ls_tensor) -> ls_status {
    kernel!(stream, geglu(gate, up))
}

/// x *= factor in place: `x` an activation, or F32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_scale(stream: ls_stream, x: *const ls_tensor, factor: f32) -> ls_status {
    kernel!(stream, scale(x, factor))
}

/// x = cap · tanh(x / cap) in place, F32; `cap` is above 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_soft_cap(stream: ls_stream, x: *const ls_tensor, cap: f32) -> ls_status {
    kernel!(stream, soft_cap(x, cap))
}

/// Rotary position embedding: pair i of a head, by `layout` (an ls_rope_layout), turns by positions[t] · inv_freq[i] and becomes
/// `scale` times as long, 1 for most models. The first 2 · half elements of a head are in pairs, up to all D; the others are
/// passed on as they are. `x` [T, heads, D] F32, `positions` [T] U32, `inv_freq` [half] F32, and `out` [T, heads, D] an activation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rope(
    stream: ls_stream,
    x: *const ls_tensor,
    positions: *const ls_tensor,
    inv_freq: *const ls_tensor,
    scale: f32,
    layout: i32,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, rope(x, positions, inv_freq, scale, layout, out))
}

/// Copies rows of the residual stream: out[i] = x[indices[i]], with `x` [T, H] F32, `indices` [R] U32, `out` [R, H] F32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_gather(
    stream: ls_stream,
    x: *const ls_tensor,
    indices: *const ls_tensor,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, gather(x, indices, out))
}

/// The index of each row's greatest element, the first if there are several, or UINT32_MAX of a row with a NaN: `x` [R, V] F32,
/// `out` [R] U32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_argmax(stream: ls_stream, x: *const ls_tensor, out: *const ls_tensor) -> ls_status {
    kernel!(stream, argmax(x, out))
}

/// out = x · weightᵀ + bias, with activations `x` [T, K] and `out` [T, N], `weight` [N, K], `bias` [N]. `bias` may be NULL. `out`
/// may be F32 instead, for logits and for what ls_rope takes. On a GPU the first product of a shape with more than 16 rows waits for
/// the stream; rows in multiples of 128 make few shapes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_linear(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    bias: *const ls_tensor,
    out: *const ls_tensor,
) -> ls_status {
    kernel!(stream, linear(x, weight, bias, out))
}

/// Writes the block's keys or values [T, G, D] to their places in one layer's `cache` [pages, G, LS_PAGE, D].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_append_kv(
    stream: ls_stream,
    block: *const ls_tensor,
    batch: *const ls_ragged,
    cache: *const ls_tensor,
) -> ls_status {
    kernel!(stream, append_kv(block, batch, cache))
}

/// Causal attention of the block's queries over the cache, with grouped heads: query head h of HQ uses key head h · G / HQ.
/// `q` and `out` [T, HQ, D], `keys` and `values` [pages, G, LS_PAGE, D]. Scores are multiplied by `scale`, usually
/// 1 / sqrt(D). Each token sees itself and window - 1 before it; `window` 0: all before it. Scaled scores become
/// soft_cap · tanh(score / soft_cap) before the softmax; `soft_cap` 0: they stay as they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_attention(
    stream: ls_stream,
    q: *const ls_tensor,
    keys: *const ls_tensor,
    values: *const ls_tensor,
    batch: *const ls_ragged,
    scale: f32,
    window: usize,
    soft_cap: f32,
    out: *const ls_tensor,
) -> ls_status {
    let mask = (scale, window, soft_cap);
    kernel!(stream, attention(q, keys, values, batch, mask, out))
}
