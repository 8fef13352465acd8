//! What a decoder computes, as operations that a device enqueues on a stream.
//!
//! Shapes are written slowest dimension first. `T` counts tokens of all sequences of a batch, one after the other. The residual
//! stream, the logits, and queries and keys until they are rotated are F32; what other activations, weights and the KV cache
//! are is the device's [`Precision`]; everything accumulates in F32. Outputs never overlap inputs. A kernel checks that its
//! tensors fit together and returns [`crate::Error::Kernel`] if not, before it touches any.

mod cpu;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda;
mod shapes;

#[cfg(cuda_emulated)]
pub(crate) use cpu::product;

use crate::{
    device::{Device, TensorMut, TensorRef},
    dtype::DType,
    error::Result,
};

/// The types that a device computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Every activation but those that are always F32: the residual stream, the logits, queries and keys before
    /// [`rope`](Kernels::rope).
    pub activation: DType,
    /// The KV cache.
    pub cache: DType,
    /// Weights, converted on arrival where they are stored otherwise; `None`: as stored, F32, F16 or BF16.
    pub weight: Option<DType>,
}

/// Which elements of a head make a pair that rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Elements `i` and `i + D/2`, as checkpoints in Hugging Face's layout have it.
    Halves,
    /// Elements `2i` and `2i + 1`, as in the paper and in Meta's own checkpoints.
    Interleaved,
}

/// One block of tokens of several sequences, and where their keys and values lie.
///
/// Sequence `i` of the batch owns tokens `q_offsets[i]..q_offsets[i + 1]` of the block, the last of the `kv_lens[i]` tokens
/// that it has in the cache by then, and row `rows[i]` of the cache. All three are U32, in device memory.
pub struct Ragged<'a, D> {
    /// `[S + 1]`: where each sequence's tokens begin; the last is `T`.
    pub q_offsets: TensorRef<'a, D>,
    /// `[S]`: tokens in the cache, those of this block included.
    pub kv_lens: TensorRef<'a, D>,
    /// `[S]`: which row of the cache.
    pub rows: TensorRef<'a, D>,
}

// Not derived, which would demand it of the device.
impl<D> Clone for Ragged<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for Ragged<'_, D> {}

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
    /// The types of activations, cache and weights.
    fn precision(&self) -> Precision;

    /// Makes `stream` ready for kernels: whatever they need beyond their arguments is reserved here, not in a pass. Called once
    /// per stream before its first kernel; calling it again does nothing.
    fn prepare(&self, _stream: &Self::Stream) -> Result<()> {
        Ok(())
    }

    /// Whether [`attention`](Self::attention) computes heads of `size`, or why not: asked before anything is loaded.
    fn check_head_size(&self, _size: usize) -> Result<()> {
        Ok(())
    }

    /// Converts `x` into `out`, of the same shape: F32, F16, BF16 or F8E4M3 → F32 or BF16.
    fn cast(&self, stream: &Self::Stream, x: TensorRef<'_, Self>, out: TensorMut<'_, Self>) -> Result<()>;

    /// Looks up rows: `out[t] = table[ids[t]]`, with `table [V, H]` a weight, `ids [T]` U32, `out [T, H]` F32. Ids from `V` on
    /// are the caller's error: what they give is unspecified.
    fn embed(
        &self,
        stream: &Self::Stream,
        table: TensorRef<'_, Self>,
        ids: TensorRef<'_, Self>,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// Root mean square norm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467):
    /// `out = x / sqrt(mean(x²) + eps) · weight`, with `x [.., H]` F32 (the residual stream), `weight [H]` and `out [.., H]` an
    /// activation, rounded once.
    fn rms_norm(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_, Self>,
        weight: TensorRef<'_, Self>,
        eps: f32,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// `residual += y`, then the norm of it: [`add`](Self::add) and [`rms_norm`](Self::rms_norm), which a device may do in one
    /// go.
    fn add_rms_norm(
        &self,
        stream: &Self::Stream,
        mut residual: TensorMut<'_, Self>,
        y: TensorRef<'_, Self>,
        weight: TensorRef<'_, Self>,
        eps: f32,
        out: TensorMut<'_, Self>,
    ) -> Result<()> {
        self.add(stream, residual.borrow(), y)?;
        self.rms_norm(stream, residual.as_ref(), weight, eps, out)
    }

    /// The norm of `x [.., H]`, F32, in place, for each head of a query or key.
    fn rms_norm_in_place(
        &self,
        stream: &Self::Stream,
        x: TensorMut<'_, Self>,
        weight: TensorRef<'_, Self>,
        eps: f32,
    ) -> Result<()>;

    /// `out = x · weightᵀ + bias`, with activations `x [T, K]` and `out [T, N]`, `weight [N, K]`, `bias [N]`. `out` may be F32
    /// instead, for logits and for what [`rope`](Self::rope) takes.
    fn linear(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_, Self>,
        weight: TensorRef<'_, Self>,
        bias: Option<TensorRef<'_, Self>>,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair `i` of a head, by `layout`, turns by
    /// `positions[t] · inv_freq[i]`. `x [T, heads, D]` F32, `positions [T]` U32, `inv_freq [D/2]` F32, and `out [T, heads, D]`
    /// an activation: queries and keys are rounded here, once, since attention makes more of their errors than any other part.
    fn rope(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_, Self>,
        positions: TensorRef<'_, Self>,
        inv_freq: TensorRef<'_, Self>,
        layout: RopeLayout,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// `gate = silu(gate) · up` in place (Shazeer 2020, arXiv:2002.05202), activations of one shape.
    fn swiglu(&self, stream: &Self::Stream, gate: TensorMut<'_, Self>, up: TensorRef<'_, Self>) -> Result<()>;

    /// `x += y`, of one shape: `x` F32 (the residual stream), `y` an activation.
    fn add(&self, stream: &Self::Stream, x: TensorMut<'_, Self>, y: TensorRef<'_, Self>) -> Result<()>;

    /// Writes the block's keys or values `[T, G, D]` to their places in one layer's `cache [rows, G, capacity, D]`.
    fn append_kv(
        &self,
        stream: &Self::Stream,
        block: TensorRef<'_, Self>,
        batch: Ragged<'_, Self>,
        cache: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// Causal attention of the block's queries over the cache, grouped heads (Ainslie et al. 2023, arXiv:2305.13245): query
    /// head `h` of `HQ` uses key head `h · G / HQ`. `q` and `out [T, HQ, D]`, `keys` and `values [rows, G, capacity, D]`.
    #[allow(clippy::too_many_arguments, reason = "attention has that many")]
    fn attention(
        &self,
        stream: &Self::Stream,
        q: TensorRef<'_, Self>,
        keys: TensorRef<'_, Self>,
        values: TensorRef<'_, Self>,
        batch: Ragged<'_, Self>,
        mask: AttentionMask,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// Copies rows of the residual stream: `out[i] = x[indices[i]]`, with `x [T, H]` F32, `indices [R]` U32, `out [R, H]` F32.
    fn gather(
        &self,
        stream: &Self::Stream,
        x: TensorRef<'_, Self>,
        indices: TensorRef<'_, Self>,
        out: TensorMut<'_, Self>,
    ) -> Result<()>;

    /// The index of each row's greatest element, the first if there are several: `x [R, V]` F32, `out [R]` U32.
    fn argmax(&self, stream: &Self::Stream, x: TensorRef<'_, Self>, out: TensorMut<'_, Self>) -> Result<()>;

    /// Memory that the kernels take for themselves at most, in bytes.
    fn scratch_bytes(&self) -> usize;
}
