//! What each kernel demands of its tensors, written once for all devices. Each check returns the dimensions that the kernel
//! works with.

use super::{AttentionMask, Precision, Ragged};
use crate::{
    device::TensorRef,
    dtype::DType,
    error::{Error, Result},
};

/// [`Error::Kernel`] with `cause`, unless `holds`.
pub(super) fn check(kernel: &'static str, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Kernel { kernel, cause: cause() }) }
}

/// Checks that a tensor is of this type and shape.
fn expect(kernel: &'static str, what: &str, tensor: TensorRef<'_>, dtype: DType, shape: &[usize]) -> Result<()> {
    check(kernel, (tensor.dtype(), tensor.shape()) == (dtype, shape), || {
        format!("{what} is {} {:?}, expected {dtype} {shape:?}", tensor.dtype(), tensor.shape())
    })
}

/// The dimensions of a tensor that must have `N` of them.
fn dims<const N: usize>(kernel: &'static str, what: &str, tensor: TensorRef<'_>, names: &str) -> Result<[usize; N]> {
    tensor
        .shape()
        .try_into()
        .map_err(|_| Error::Kernel { kernel, cause: format!("{what} is {:?}, expected {names}", tensor.shape()) })
}

fn weight(kernel: &'static str, precision: Precision, tensor: TensorRef<'_>) -> Result<()> {
    let holds = match precision.weight {
        Some(dtype) => tensor.dtype() == dtype,
        None => matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16),
    };
    check(kernel, holds, || format!("weights of type {}; convert them on arrival", tensor.dtype()))
}

pub(super) fn cast(x: TensorRef<'_>, out: TensorRef<'_>) -> Result<()> {
    check("cast", x.dtype() == out.dtype() || x.dtype().converts_to(out.dtype()), || {
        format!("no conversion from {} to {}", x.dtype(), out.dtype())
    })?;
    expect("cast", "out", out, out.dtype(), x.shape())
}

/// Rows and width of the table.
pub(super) fn lookup(
    kernel: &'static str,
    table: TensorRef<'_>,
    indices: TensorRef<'_>,
    out: TensorRef<'_>,
) -> Result<[usize; 2]> {
    let [rows, width] = dims(kernel, "the table", table, "[V, H]")?;
    expect(kernel, "indices", indices, DType::U32, &[indices.elements()])?;
    expect(kernel, "out", out, DType::F32, &[indices.elements(), width])?;
    check(kernel, rows > 0 || indices.elements() == 0, || "the table has no rows".into())?;
    Ok([rows, width])
}

pub(super) fn embed(
    precision: Precision,
    table: TensorRef<'_>,
    ids: TensorRef<'_>,
    out: TensorRef<'_>,
) -> Result<[usize; 2]> {
    weight("embed", precision, table)?;
    lookup("embed", table, ids, out)
}

pub(super) fn gather(x: TensorRef<'_>, indices: TensorRef<'_>, out: TensorRef<'_>) -> Result<[usize; 2]> {
    expect("gather", "x", x, DType::F32, x.shape())?;
    lookup("gather", x, indices, out)
}

/// Rows and their width.
pub(super) fn rms_norm_in_place(precision: Precision, x: TensorRef<'_>, scale: TensorRef<'_>) -> Result<[usize; 2]> {
    expect("rms_norm", "x", x, DType::F32, x.shape())?;
    norm_rows(precision, x, scale)
}

fn norm_rows(precision: Precision, x: TensorRef<'_>, scale: TensorRef<'_>) -> Result<[usize; 2]> {
    weight("rms_norm", precision, scale)?;
    let width = scale.elements();
    check("rms_norm", x.shape().last() == Some(&width), || format!("{width} weights for rows of {:?}", x.shape()))?;
    Ok([x.elements() / width.max(1), width])
}

/// Rows and their width.
pub(super) fn rms_norm(
    precision: Precision,
    x: TensorRef<'_>,
    scale: TensorRef<'_>,
    out: TensorRef<'_>,
) -> Result<[usize; 2]> {
    expect("rms_norm", "x", x, DType::F32, x.shape())?;
    let rows = norm_rows(precision, x, scale)?;
    expect("rms_norm", "out", out, precision.activation, x.shape())?;
    Ok(rows)
}

pub(super) fn add(precision: Precision, x: TensorRef<'_>, y: TensorRef<'_>) -> Result<()> {
    expect("add", "x", x, DType::F32, y.shape())?;
    expect("add", "y", y, precision.activation, x.shape())
}

/// `[T, K, N]`
pub(super) fn linear(
    precision: Precision,
    x: TensorRef<'_>,
    matrix: TensorRef<'_>,
    bias: Option<TensorRef<'_>>,
    out: TensorRef<'_>,
) -> Result<[usize; 3]> {
    let (&[tokens, k], &[n, matrix_k]) = (x.shape(), matrix.shape()) else {
        let cause = format!("x is {:?} and weight {:?}, expected [T, K] and [N, K]", x.shape(), matrix.shape());
        return Err(Error::Kernel { kernel: "linear", cause });
    };
    check("linear", k == matrix_k, || format!("x is {:?} but weight {:?}", x.shape(), matrix.shape()))?;
    expect("linear", "x", x, precision.activation, x.shape())?;
    weight("linear", precision, matrix)?;
    let to = if out.dtype() == DType::F32 { DType::F32 } else { precision.activation };
    expect("linear", "out", out, to, &[tokens, n])?;
    if let Some(bias) = bias {
        weight("linear", precision, bias)?;
        check("linear", bias.elements() == n, || format!("{} biases for {n} columns", bias.elements()))?;
    }
    Ok([tokens, k, n])
}

/// `[T, heads, D]`
pub(super) fn rope(
    precision: Precision,
    x: TensorRef<'_>,
    positions: TensorRef<'_>,
    inv_freq: TensorRef<'_>,
    out: TensorRef<'_>,
) -> Result<[usize; 3]> {
    let [tokens, heads, size] = dims("rope", "x", x, "[T, heads, D]")?;
    let half = inv_freq.elements();
    expect("rope", "x", x, DType::F32, x.shape())?;
    check("rope", size == 2 * half, || format!("{half} frequencies for heads of {size}"))?;
    expect("rope", "positions", positions, DType::U32, &[tokens])?;
    expect("rope", "inv_freq", inv_freq, DType::F32, &[half])?;
    expect("rope", "out", out, precision.activation, x.shape())?;
    Ok([tokens, heads, size])
}

pub(super) fn swiglu(precision: Precision, gate: TensorRef<'_>, up: TensorRef<'_>) -> Result<()> {
    expect("swiglu", "gate", gate, precision.activation, up.shape())?;
    expect("swiglu", "up", up, precision.activation, up.shape())
}

/// What attention and the writing of the cache work with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cached {
    pub(super) sequences: usize,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) rows: usize,
    pub(super) groups: usize,
    pub(super) capacity: usize,
    pub(super) size: usize,
}

/// `block [T, heads, D]` beside `cache [rows, G, capacity, D]`.
fn cached(
    kernel: &'static str,
    precision: Precision,
    (what, block): (&str, TensorRef<'_>),
    batch: Ragged<'_>,
    cache: TensorRef<'_>,
) -> Result<Cached> {
    let [tokens, heads, size] = dims(kernel, what, block, "[T, heads, D]")?;
    let [rows, groups, capacity, cache_size] = dims(kernel, "the cache", cache, "[rows, G, capacity, D]")?;
    check(kernel, size == cache_size && groups > 0 && heads.is_multiple_of(groups), || {
        format!("{what} is {:?} but the cache {:?}", block.shape(), cache.shape())
    })?;
    expect(kernel, what, block, precision.activation, block.shape())?;
    expect(kernel, "the cache", cache, precision.cache, cache.shape())?;
    let sequences = batch.kv_lens.elements();
    expect(kernel, "offsets", batch.q_offsets, DType::U32, &[sequences + 1])?;
    expect(kernel, "lengths", batch.kv_lens, DType::U32, &[sequences])?;
    expect(kernel, "rows", batch.rows, DType::U32, &[sequences])?;
    Ok(Cached { sequences, tokens, heads, rows, groups, capacity, size })
}

pub(super) fn append_kv(
    precision: Precision,
    block: TensorRef<'_>,
    batch: Ragged<'_>,
    cache: TensorRef<'_>,
) -> Result<Cached> {
    let cached = cached("append_kv", precision, ("block", block), batch, cache)?;
    check("append_kv", cached.heads == cached.groups, || {
        format!("block is {:?} but the cache {:?}", block.shape(), cache.shape())
    })?;
    Ok(cached)
}

pub(super) fn attention(
    precision: Precision,
    q: TensorRef<'_>,
    keys: TensorRef<'_>,
    values: TensorRef<'_>,
    batch: Ragged<'_>,
    mask: AttentionMask,
    out: TensorRef<'_>,
) -> Result<Cached> {
    check("attention", mask.window != Some(0), || "a window of 0, in which a token does not see itself".into())?;
    let cached = cached("attention", precision, ("q", q), batch, keys)?;
    expect("attention", "values", values, precision.cache, keys.shape())?;
    expect("attention", "out", out, precision.activation, q.shape())?;
    Ok(cached)
}

/// Rows and columns.
pub(super) fn argmax(x: TensorRef<'_>, out: TensorRef<'_>) -> Result<[usize; 2]> {
    let [rows, columns] = dims("argmax", "x", x, "[R, V]")?;
    expect("argmax", "x", x, DType::F32, x.shape())?;
    expect("argmax", "out", out, DType::U32, &[rows])?;
    check("argmax", rows == 0 || columns > 0, || format!("x is {:?}: rows without an element", x.shape()))?;
    Ok([rows, columns])
}
