//! The kernels, on tensors in device memory and a stream.
#![allow(rustdoc::broken_intra_doc_links, reason = "brackets are shapes in C's comments, not links")]

use super::{
    any::AnyDevice,
    device::{Queue, STREAMS, ls_stream},
    ffi::{Failure, Result, ffi, ls_status, place},
    handles::Entered,
    layers::ls_tensor,
    options::choose,
};
use crate::{
    device::{Device, TensorMut, TensorRef},
    kernels::{AttentionMask, Kernels, Ragged, RopeLayout},
};

/// Which elements of a head make a pair that rotates.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_rope_layout {
    /// Elements i and i + D/2, as checkpoints in Hugging Face's layout have it.
    LS_ROPE_HALVES = 0,
    /// Elements 2i and 2i + 1, as in Meta's own checkpoints.
    LS_ROPE_INTERLEAVED = 1,
}

/// One block of tokens of several sequences, and where their keys and values lie: sequence i owns tokens q_offsets[i] to
/// q_offsets[i + 1] of the block, the last of the kv_lens[i] tokens that it has in the cache by then, and row rows[i] of the
/// cache. All three are U32, in device memory; a row that the cache does not have is the caller's error.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_ragged {
    /// [S + 1]: where each sequence's tokens begin; the last is T.
    pub q_offsets: ls_tensor,
    /// [S]: tokens in the cache, those of this block included.
    pub kv_lens: ls_tensor,
    /// [S]: which row of the cache.
    pub rows: ls_tensor,
}

impl ls_ragged {
    /// # Safety
    /// As [`ls_tensor::read`].
    unsafe fn read<'a>(&self) -> Result<Ragged<'a, AnyDevice>> {
        // SAFETY: the caller's.
        let read = |tensor: &ls_tensor, name| unsafe { tensor.read(name) };
        Ok(Ragged {
            q_offsets: read(&self.q_offsets, "q_offsets")?,
            kv_lens: read(&self.kv_lens, "kv_lens")?,
            rows: read(&self.rows, "rows")?,
        })
    }
}

/// What arguments point to, all of them checked before any is looked into.
///
/// # Safety
/// Each is NULL or points to a tensor.
unsafe fn given<const N: usize>(tensors: [(*const ls_tensor, &str); N]) -> Result<[ls_tensor; N]> {
    for (tensor, name) in tensors {
        place(tensor, name)?;
    }
    // SAFETY: the caller's; none is NULL.
    Ok(tensors.map(|(tensor, _)| unsafe { *tensor }))
}

/// What a kernel writes must not be what it reads.
fn apart(out: &TensorMut<'_, AnyDevice>, inputs: &[TensorRef<'_, AnyDevice>]) -> Result<()> {
    let range = |tensor: TensorRef<'_, AnyDevice>| {
        let start = tensor.ptr().as_ptr().addr();
        start..start.saturating_add(tensor.bytes())
    };
    let written = range(out.as_ref());
    let meets = |read: std::ops::Range<usize>| read.start < written.end && written.start < read.end;
    if inputs.iter().any(|input| meets(range(*input))) {
        return Err(Failure::new(ls_status::LS_KERNEL, "what is written overlaps what is read"));
    }
    Ok(())
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

/// Converts `x` into `out`, of the same shape: F32, F16, BF16 or F8_E4M3 to F32 or BF16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_cast(stream: ls_stream, x: *const ls_tensor, out: *const ls_tensor) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, out] = given([(x, "x"), (out, "out")])?;
        let x = x.read("x")?;
        let out = out.write("out")?;
        apart(&out, &[x])?;
        let queue = queue(stream)?;
        Ok(queue.device.cast(&queue.stream, x, out)?)
    })
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
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [table, ids, out] = given([(table, "table"), (ids, "ids"), (out, "out")])?;
        let table = table.read("table")?;
        let ids = ids.read("ids")?;
        let out = out.write("out")?;
        apart(&out, &[table, ids])?;
        let queue = queue(stream)?;
        Ok(queue.device.embed(&queue.stream, table, ids, out)?)
    })
}

/// Root mean square norm over the last dimension: out = x / sqrt(mean(x²) + eps) · weight, with `x` [.., H] F32 (the residual
/// stream), `weight` [H] and `out` [.., H] an activation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rms_norm(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    eps: f32,
    out: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, weight, out] = given([(x, "x"), (weight, "weight"), (out, "out")])?;
        let x = x.read("x")?;
        let weight = weight.read("weight")?;
        let out = out.write("out")?;
        apart(&out, &[x, weight])?;
        let queue = queue(stream)?;
        Ok(queue.device.rms_norm(&queue.stream, x, weight, eps, out)?)
    })
}

/// The norm of `x` [.., H], F32, in place, for each head of a query or key.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rms_norm_in_place(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    eps: f32,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, weight] = given([(x, "x"), (weight, "weight")])?;
        let x = x.write("x")?;
        let weight = weight.read("weight")?;
        apart(&x, &[weight])?;
        let queue = queue(stream)?;
        Ok(queue.device.rms_norm_in_place(&queue.stream, x, weight, eps)?)
    })
}

/// residual += y, of one shape: `residual` F32, `y` an activation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_add(stream: ls_stream, residual: *const ls_tensor, y: *const ls_tensor) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [residual, y] = given([(residual, "residual"), (y, "y")])?;
        let residual = residual.write("residual")?;
        let y = y.read("y")?;
        apart(&residual, &[y])?;
        let queue = queue(stream)?;
        Ok(queue.device.add(&queue.stream, residual, y)?)
    })
}

/// gate = silu(gate) · up in place, activations of one shape.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_swiglu(stream: ls_stream, gate: *const ls_tensor, up: *const ls_tensor) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [gate, up] = given([(gate, "gate"), (up, "up")])?;
        let gate = gate.write("gate")?;
        let up = up.read("up")?;
        apart(&gate, &[up])?;
        let queue = queue(stream)?;
        Ok(queue.device.swiglu(&queue.stream, gate, up)?)
    })
}

/// Rotary position embedding: pair i of a head, by `layout` (an ls_rope_layout), turns by positions[t] · inv_freq[i].
/// `x` [T, heads, D] F32, `positions` [T] U32, `inv_freq` [D/2] F32, and `out` [T, heads, D] an activation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_rope(
    stream: ls_stream,
    x: *const ls_tensor,
    positions: *const ls_tensor,
    inv_freq: *const ls_tensor,
    layout: i32,
    out: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, positions, inv_freq, out] =
            given([(x, "x"), (positions, "positions"), (inv_freq, "inv_freq"), (out, "out")])?;
        let layout = choose(layout, &[RopeLayout::Halves, RopeLayout::Interleaved], "layout")?;
        let x = x.read("x")?;
        let positions = positions.read("positions")?;
        let inv_freq = inv_freq.read("inv_freq")?;
        let out = out.write("out")?;
        apart(&out, &[x, positions, inv_freq])?;
        let queue = queue(stream)?;
        Ok(queue.device.rope(&queue.stream, x, positions, inv_freq, layout, out)?)
    })
}

/// Copies rows of the residual stream: out[i] = x[indices[i]], with `x` [T, H] F32, `indices` [R] U32, `out` [R, H] F32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_gather(
    stream: ls_stream,
    x: *const ls_tensor,
    indices: *const ls_tensor,
    out: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, indices, out] = given([(x, "x"), (indices, "indices"), (out, "out")])?;
        let x = x.read("x")?;
        let indices = indices.read("indices")?;
        let out = out.write("out")?;
        apart(&out, &[x, indices])?;
        let queue = queue(stream)?;
        Ok(queue.device.gather(&queue.stream, x, indices, out)?)
    })
}

/// The index of each row's greatest element, the first if there are several: `x` [R, V] F32, `out` [R] U32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_argmax(stream: ls_stream, x: *const ls_tensor, out: *const ls_tensor) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, out] = given([(x, "x"), (out, "out")])?;
        let x = x.read("x")?;
        let out = out.write("out")?;
        apart(&out, &[x])?;
        let queue = queue(stream)?;
        Ok(queue.device.argmax(&queue.stream, x, out)?)
    })
}

/// out = x · weightᵀ + bias, with activations `x` [T, K] and `out` [T, N], `weight` [N, K], `bias` [N]. `bias` may be NULL. `out`
/// may be F32 instead, for logits and for what ls_rope takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_linear(
    stream: ls_stream,
    x: *const ls_tensor,
    weight: *const ls_tensor,
    bias: *const ls_tensor,
    out: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [x, weight, out] = given([(x, "x"), (weight, "weight"), (out, "out")])?;
        let (x, weight, out) = (x.read("x")?, weight.read("weight")?, out.write("out")?);
        let bias = if bias.is_null() { None } else { Some(given([(bias, "bias")])?[0].read("bias")?) };
        apart(&out, &[x, weight, bias.unwrap_or(x)])?;
        let queue = queue(stream)?;
        Ok(queue.device.linear(&queue.stream, x, weight, bias, out)?)
    })
}

/// Writes the block's keys or values [T, G, D] to their places in one layer's `cache` [rows, G, capacity, D].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_append_kv(
    stream: ls_stream,
    block: *const ls_tensor,
    batch: *const ls_ragged,
    cache: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [block, cache] = given([(block, "block"), (cache, "cache")])?;
        let batch = place(batch, "batch")?.as_ref().read()?;
        let (block, cache) = (block.read("block")?, cache.write("cache")?);
        apart(&cache, &[block, batch.q_offsets, batch.kv_lens, batch.rows])?;
        let queue = queue(stream)?;
        Ok(queue.device.append_kv(&queue.stream, block, batch, cache)?)
    })
}

/// Causal attention of the block's queries over the cache, with grouped heads: query head h of HQ uses key head h · G / HQ.
/// `q` and `out` [T, HQ, D], `keys` and `values` [rows, G, capacity, D]. Scores are multiplied by `scale`, usually
/// 1 / sqrt(D). Each token sees itself and window - 1 before it; `window` 0: all before it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_attention(
    stream: ls_stream,
    q: *const ls_tensor,
    keys: *const ls_tensor,
    values: *const ls_tensor,
    batch: *const ls_ragged,
    scale: f32,
    window: usize,
    out: *const ls_tensor,
) -> ls_status {
    // SAFETY: the module's invariant.
    ffi(|| unsafe {
        let [q, keys, values, out] = given([(q, "q"), (keys, "keys"), (values, "values"), (out, "out")])?;
        let batch = place(batch, "batch")?.as_ref().read()?;
        let (q, keys, values) = (q.read("q")?, keys.read("keys")?, values.read("values")?);
        let out = out.write("out")?;
        apart(&out, &[q, keys, values, batch.q_offsets, batch.kv_lens, batch.rows])?;
        let mask = AttentionMask { scale, window: (window > 0).then_some(window) };
        let queue = queue(stream)?;
        Ok(queue.device.attention(&queue.stream, q, keys, values, batch, mask, out)?)
    })
}
