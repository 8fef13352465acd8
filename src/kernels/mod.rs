//! What a decoder computes, as operations that a device enqueues on a stream.
//!
//! Shapes are written slowest dimension first. `T` counts tokens of all sequences of a batch, one after the other. Activations
//! are F32; weights are F32, F16 or BF16 and are widened exactly; everything accumulates in F32. Outputs never overlap inputs.
//! A kernel checks that its tensors fit together and returns [`Error::Kernel`] if not, before it touches any.

mod cpu;

use crate::{
    device::{Device, TensorMut, TensorRef},
    dtype::DType,
    error::{Error, Result},
};

/// One block of tokens of several sequences, and where their keys and values lie.
///
/// Sequence `i` of the batch owns tokens `q_offsets[i]..q_offsets[i + 1]` of the block, the last of the `kv_lens[i]` tokens
/// that it has in the cache by then, and row `rows[i]` of the cache. All three are U32, in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Ragged<'a> {
    /// `[S + 1]`: where each sequence's tokens begin; the last is `T`.
    pub q_offsets: TensorRef<'a>,
    /// `[S]`: tokens in the cache, those of this block included.
    pub kv_lens: TensorRef<'a>,
    /// `[S]`: which row of the cache.
    pub rows: TensorRef<'a>,
}

/// How attention is masked and scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionMask {
    /// What scores are multiplied by, usually `1 / sqrt(head size)`.
    pub scale: f32,
    /// Each token sees itself and this many less one before it; `None`: all before it.
    pub window: Option<usize>,
}

/// A device that computes.
pub trait Kernels: Device {
    /// Converts `x` into `out`, of the same shape: F32, F16, BF16 or F8E4M3 → F32 or BF16.
    fn cast(&self, stream: &Self::Stream, x: TensorRef<'_>, out: TensorMut<'_>) -> Result<()>;

    /// Looks up rows: `out[t] = table[ids[t]]`, with `table [V, H]`, `ids [T]` U32, `out [T, H]`. Ids from `V` on are the
    /// caller's error: what they give is unspecified.
    fn embed(&self, stream: &Self::Stream, table: TensorRef<'_>, ids: TensorRef<'_>, out: TensorMut<'_>) -> Result<()>;

    /// Root mean square norm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467):
    /// `out = x / sqrt(mean(x²) + eps) · weight`, with `x` and `out [.., H]`, `weight [H]`.
    fn rms_norm(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_>,
        weight: TensorRef<'_>,
        eps: f32,
        out: TensorMut<'_>,
    ) -> Result<()>;

    /// The same in place, for the norm of each head of a query or key.
    fn rms_norm_in_place(&self, stream: &Self::Stream, x: TensorMut<'_>, weight: TensorRef<'_>, eps: f32)
    -> Result<()>;

    /// `out = x · weightᵀ + bias`, with `x [T, K]`, `weight [N, K]`, `bias [N]`, `out [T, N]`.
    fn linear(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_>,
        weight: TensorRef<'_>,
        bias: Option<TensorRef<'_>>,
        out: TensorMut<'_>,
    ) -> Result<()>;

    /// Rotary position embedding in place (Su et al. 2021, arXiv:2104.09864), halves layout as in Llama and Qwen: elements `i`
    /// and `i + D/2` of a head turn by `positions[t] · inv_freq[i]`. `x [T, heads, D]`, `positions [T]` U32, `inv_freq [D/2]`.
    fn rope(
        &self,
        stream: &Self::Stream,
        x: TensorMut<'_>,
        positions: TensorRef<'_>,
        inv_freq: TensorRef<'_>,
    ) -> Result<()>;

    /// `gate = silu(gate) · up` in place (Shazeer 2020, arXiv:2002.05202), both `[T, F]`.
    fn swiglu(&self, stream: &Self::Stream, gate: TensorMut<'_>, up: TensorRef<'_>) -> Result<()>;

    /// `x += y`, of one shape.
    fn add(&self, stream: &Self::Stream, x: TensorMut<'_>, y: TensorRef<'_>) -> Result<()>;

    /// Writes the block's keys or values `[T, G, D]` to their places in one layer's `cache [rows, G, capacity, D]`.
    fn append_kv(
        &self,
        stream: &Self::Stream,
        block: TensorRef<'_>,
        batch: Ragged<'_>,
        cache: TensorMut<'_>,
    ) -> Result<()>;

    /// Causal attention of the block's queries over the cache, grouped heads (Ainslie et al. 2023, arXiv:2305.13245): query
    /// head `h` of `HQ` uses key head `h · G / HQ`. `q` and `out [T, HQ, D]`, `keys` and `values [rows, G, capacity, D]`.
    #[allow(clippy::too_many_arguments, reason = "attention has that many")]
    fn attention(
        &self,
        stream: &Self::Stream,
        q: TensorRef<'_>,
        keys: TensorRef<'_>,
        values: TensorRef<'_>,
        batch: Ragged<'_>,
        mask: AttentionMask,
        out: TensorMut<'_>,
    ) -> Result<()>;

    /// Copies rows: `out[i] = x[indices[i]]`, with `x [T, H]`, `indices [R]` U32, `out [R, H]`.
    fn gather(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_>,
        indices: TensorRef<'_>,
        out: TensorMut<'_>,
    ) -> Result<()> {
        self.embed(stream, x, indices, out)
    }

    /// The index of each row's greatest element, the first if there are several: `x [R, V]`, `out [R]` U32.
    fn argmax(&self, stream: &Self::Stream, x: TensorRef<'_>, out: TensorMut<'_>) -> Result<()>;

    /// Memory that the kernels take for themselves at most, in bytes.
    fn scratch_bytes(&self) -> usize;
}

/// [`Error::Kernel`] with `cause`, unless `holds`.
fn check(kernel: &'static str, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Kernel { kernel, cause: cause() }) }
}

/// Checks that `tensor` is of this type and shape.
fn expect(kernel: &'static str, what: &str, got: (DType, &[usize]), dtype: DType, shape: &[usize]) -> Result<()> {
    check(kernel, got == (dtype, shape), || format!("{what} is {} {:?}, expected {dtype} {shape:?}", got.0, got.1))
}
