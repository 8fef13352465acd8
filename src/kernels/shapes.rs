//! What each kernel demands of its tensors, written once for all devices. Each check returns the dimensions that the kernel
//! works with.

use super::{AttentionMask, Kernels, Precision, Ragged};
use crate::{
    device::{StreamId, TensorRef},
    dtype::DType,
    error::{Error, Result},
};

/// [`Error::Kernel`] with `cause`, unless `holds`.
pub(super) fn check(kernel: &'static str, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Kernel { kernel, cause: cause() }) }
}

/// One call of a kernel, for holding its tensors against it.
#[derive(Clone, Copy)]
pub(super) struct Call {
    kernel: &'static str,
    precision: Precision,
    stream: StreamId,
}

impl Call {
    pub(super) fn new<D: Kernels>(kernel: &'static str, device: &D, stream: &D::Stream) -> Self {
        Self { kernel, precision: device.precision(), stream: device.stream_id(stream) }
    }

    fn check(self, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
        check(self.kernel, holds, cause)
    }

    /// Checks that a tensor is of this type and shape, and may be used on this stream.
    fn expect<D: Kernels>(self, what: &str, tensor: TensorRef<'_, D>, dtype: DType, shape: &[usize]) -> Result<()> {
        tensor.check_stream(self.kernel, self.stream)?;
        self.check((tensor.dtype(), tensor.shape()) == (dtype, shape), || {
            format!("{what} is {} {:?}, expected {dtype} {shape:?}", tensor.dtype(), tensor.shape())
        })
    }

    /// The dimensions of a tensor that must have `N` of them.
    fn dims<const N: usize, D>(self, what: &str, tensor: TensorRef<'_, D>, names: &str) -> Result<[usize; N]> {
        let cause = || format!("{what} is {:?}, expected {names}", tensor.shape());
        tensor.shape().try_into().map_err(|_| Error::Kernel { kernel: self.kernel, cause: cause() })
    }

    fn weight<D: Kernels>(self, tensor: TensorRef<'_, D>) -> Result<()> {
        tensor.check_stream(self.kernel, self.stream)?;
        let holds = match self.precision.weight {
            Some(dtype) => tensor.dtype() == dtype,
            None => matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16),
        };
        self.check(holds, || format!("weights of type {}; convert them on arrival", tensor.dtype()))
    }
}

pub(super) fn cast<D: Kernels>(call: Call, x: TensorRef<'_, D>, out: TensorRef<'_, D>) -> Result<()> {
    x.check_stream(call.kernel, call.stream)?;
    call.check(x.dtype() == out.dtype() || x.dtype().converts_to(out.dtype()), || {
        format!("no conversion from {} to {}", x.dtype(), out.dtype())
    })?;
    call.expect("out", out, out.dtype(), x.shape())
}

/// Rows and width of the table.
pub(super) fn lookup<D: Kernels>(
    call: Call,
    table: TensorRef<'_, D>,
    indices: TensorRef<'_, D>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 2]> {
    let [rows, width] = call.dims("the table", table, "[V, H]")?;
    call.expect("indices", indices, DType::U32, &[indices.elements()])?;
    call.expect("out", out, DType::F32, &[indices.elements(), width])?;
    call.check(rows > 0 || indices.elements() == 0, || "the table has no rows".into())?;
    Ok([rows, width])
}

pub(super) fn embed<D: Kernels>(
    call: Call,
    table: TensorRef<'_, D>,
    ids: TensorRef<'_, D>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 2]> {
    call.weight(table)?;
    lookup(call, table, ids, out)
}

pub(super) fn gather<D: Kernels>(
    call: Call,
    x: TensorRef<'_, D>,
    indices: TensorRef<'_, D>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 2]> {
    call.expect("x", x, DType::F32, x.shape())?;
    lookup(call, x, indices, out)
}

/// Rows and their width.
pub(super) fn rms_norm_in_place<D: Kernels>(
    call: Call,
    x: TensorRef<'_, D>,
    scale: TensorRef<'_, D>,
) -> Result<[usize; 2]> {
    call.expect("x", x, DType::F32, x.shape())?;
    norm_rows(call, x, scale)
}

fn norm_rows<D: Kernels>(call: Call, x: TensorRef<'_, D>, scale: TensorRef<'_, D>) -> Result<[usize; 2]> {
    call.weight(scale)?;
    let width = scale.elements();
    call.check(x.shape().last() == Some(&width), || format!("{width} weights for rows of {:?}", x.shape()))?;
    Ok([x.elements() / width.max(1), width])
}

/// Rows and their width.
pub(super) fn rms_norm<D: Kernels>(
    call: Call,
    x: TensorRef<'_, D>,
    scale: TensorRef<'_, D>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 2]> {
    call.expect("x", x, DType::F32, x.shape())?;
    let rows = norm_rows(call, x, scale)?;
    call.expect("out", out, call.precision.activation, x.shape())?;
    Ok(rows)
}

pub(super) fn add<D: Kernels>(call: Call, x: TensorRef<'_, D>, y: TensorRef<'_, D>) -> Result<()> {
    call.expect("x", x, DType::F32, y.shape())?;
    call.expect("y", y, call.precision.activation, x.shape())
}

/// `[T, K, N]`
pub(super) fn linear<D: Kernels>(
    call: Call,
    x: TensorRef<'_, D>,
    matrix: TensorRef<'_, D>,
    bias: Option<TensorRef<'_, D>>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 3]> {
    let (&[tokens, k], &[n, matrix_k]) = (x.shape(), matrix.shape()) else {
        let cause = format!("x is {:?} and weight {:?}, expected [T, K] and [N, K]", x.shape(), matrix.shape());
        return Err(Error::Kernel { kernel: call.kernel, cause });
    };
    call.check(k == matrix_k, || format!("x is {:?} but weight {:?}", x.shape(), matrix.shape()))?;
    call.expect("x", x, call.precision.activation, x.shape())?;
    call.weight(matrix)?;
    let to = if out.dtype() == DType::F32 { DType::F32 } else { call.precision.activation };
    call.expect("out", out, to, &[tokens, n])?;
    if let Some(bias) = bias {
        call.weight(bias)?;
        call.check(bias.elements() == n, || format!("{} biases for {n} columns", bias.elements()))?;
    }
    Ok([tokens, k, n])
}

/// `[T, heads, D]`
pub(super) fn rope<D: Kernels>(
    call: Call,
    x: TensorRef<'_, D>,
    positions: TensorRef<'_, D>,
    inv_freq: TensorRef<'_, D>,
    out: TensorRef<'_, D>,
) -> Result<[usize; 3]> {
    let [tokens, heads, size] = call.dims("x", x, "[T, heads, D]")?;
    let half = inv_freq.elements();
    call.expect("x", x, DType::F32, x.shape())?;
    call.check(size == 2 * half, || format!("{half} frequencies for heads of {size}"))?;
    call.expect("positions", positions, DType::U32, &[tokens])?;
    call.expect("inv_freq", inv_freq, DType::F32, &[half])?;
    call.expect("out", out, call.precision.activation, x.shape())?;
    Ok([tokens, heads, size])
}

pub(super) fn swiglu<D: Kernels>(call: Call, gate: TensorRef<'_, D>, up: TensorRef<'_, D>) -> Result<()> {
    call.expect("gate", gate, call.precision.activation, up.shape())?;
    call.expect("up", up, call.precision.activation, up.shape())
}

/// What attention and the writing of the cache work with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cached {
    pub(super) sequences: usize,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) rows: usize,
    pub(super) kv_heads: usize,
    pub(super) capacity: usize,
    pub(super) size: usize,
}

/// `block [T, heads, D]` beside `cache [rows, G, capacity, D]`.
fn cached<D: Kernels>(
    call: Call,
    (what, block): (&str, TensorRef<'_, D>),
    batch: Ragged<'_, D>,
    cache: TensorRef<'_, D>,
) -> Result<Cached> {
    let [tokens, heads, size] = call.dims(what, block, "[T, heads, D]")?;
    let [rows, kv_heads, capacity, cache_size] = call.dims("the cache", cache, "[rows, G, capacity, D]")?;
    call.check(size == cache_size && kv_heads > 0 && heads.is_multiple_of(kv_heads), || {
        format!("{what} is {:?} but the cache {:?}", block.shape(), cache.shape())
    })?;
    call.expect(what, block, call.precision.activation, block.shape())?;
    call.expect("the cache", cache, call.precision.cache, cache.shape())?;
    let sequences = batch.kv_lens.elements();
    call.expect("offsets", batch.q_offsets, DType::U32, &[sequences + 1])?;
    call.expect("lengths", batch.kv_lens, DType::U32, &[sequences])?;
    call.expect("rows", batch.rows, DType::U32, &[sequences])?;
    Ok(Cached { sequences, tokens, heads, rows, kv_heads, capacity, size })
}

pub(super) fn append_kv<D: Kernels>(
    call: Call,
    block: TensorRef<'_, D>,
    batch: Ragged<'_, D>,
    cache: TensorRef<'_, D>,
) -> Result<Cached> {
    let cached = cached(call, ("block", block), batch, cache)?;
    call.check(cached.heads == cached.kv_heads, || {
        format!("block is {:?} but the cache {:?}", block.shape(), cache.shape())
    })?;
    Ok(cached)
}

pub(super) fn attention<D: Kernels>(
    call: Call,
    q: TensorRef<'_, D>,
    keys: TensorRef<'_, D>,
    values: TensorRef<'_, D>,
    batch: Ragged<'_, D>,
    mask: AttentionMask,
    out: TensorRef<'_, D>,
) -> Result<Cached> {
    call.check(mask.window != Some(0), || "a window of 0, in which a token does not see itself".into())?;
    let cached = cached(call, ("q", q), batch, keys)?;
    call.expect("values", values, call.precision.cache, keys.shape())?;
    call.expect("out", out, call.precision.activation, q.shape())?;
    Ok(cached)
}

/// Rows and columns.
pub(super) fn argmax<D: Kernels>(call: Call, x: TensorRef<'_, D>, out: TensorRef<'_, D>) -> Result<[usize; 2]> {
    let [rows, columns] = call.dims("x", x, "[R, V]")?;
    call.expect("x", x, DType::F32, x.shape())?;
    call.expect("out", out, DType::U32, &[rows])?;
    call.check(rows == 0 || columns > 0, || format!("x is {:?}: rows without an element", x.shape()))?;
    Ok([rows, columns])
}
