//! What a decoder computes, as operations that a device enqueues on a stream.
//!
//! Shapes are written slowest dimension first. `T` counts tokens of all sequences of a batch, one after the other. The residual
//! stream, the logits, and queries and keys until they are rotated are F32; what other activations, weights and the KV cache
//! are is the device's [`Precision`]; everything accumulates in F32. Outputs never overlap inputs. A kernel checks that its
//! tensors fit together and returns [`crate::Error::Kernel`] if not, before it touches any.

pub mod call;
mod cpu;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda;
mod fit;
#[cfg(feature = "cuda")]
mod product;
mod table;

use call::{Call, argument, fit, methods};
use fit::{Dim, Fit, Pattern, Type};
use table::kernels;

use crate::{
    device::{Device, TensorMut, TensorRef},
    dtype::DType,
    error::Result,
};

/// Tokens of a page of the KV cache, on every device: whole tiles of keys, of which devices go through some at a time.
pub const PAGE: usize = 64;

/// The types that a device computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Every activation but those that are always F32: the residual stream, the logits, queries and keys before
    /// [`rope`](Kernels::rope).
    pub activation: DType,
    /// The KV cache.
    pub cache: DType,
    /// Weights, converted on arrival where they are stored otherwise; `None`: as stored, F32, F16 or BF16, and those of
    /// [`linear`](Kernels::linear) and [`embed`](Kernels::embed) in blocks of quantised weights too.
    pub weight: Option<DType>,
}

/// Which elements of a head make a pair that rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Elements `i` and `i + half`, of `half` frequencies, as checkpoints in Hugging Face's layout have it.
    Halves,
    /// Elements `2i` and `2i + 1`, as in the paper and in Meta's own checkpoints.
    Interleaved,
    /// Elements `2i` and `2i + 1`, which become `i` and `i + half`: what follows adds in the order of a checkpoint with halves,
    /// and computes its bits, from one whose rows of queries and keys are interleaved, as in GGUF files of Llama models.
    ToHalves,
}

/// One block of tokens of several sequences, and where their keys and values lie.
///
/// Sequence `i` of the batch owns tokens `q_offsets[i]..q_offsets[i + 1]` of the block, the last of the `kv_lens[i]` tokens
/// that it has in the cache by then. Token `t` of those lies in page `pages[i, t / PAGE]` of the cache, at place `t % PAGE`
/// (see [`PAGE`]). All three are U32, in device memory. Several sequences may have a page in common, to which none of them
/// writes then.
pub struct Ragged<'a, D> {
    /// `[S + 1]`: where each sequence's tokens begin; the last is `T`.
    pub q_offsets: TensorRef<'a, D>,
    /// `[S]`: tokens in the cache, those of this block included.
    pub kv_lens: TensorRef<'a, D>,
    /// `[S, P]`: the pages of each sequence, in the order of its tokens; those behind its last token may be any.
    pub pages: TensorRef<'a, D>,
}

// Not derived, which would demand it of the device.
impl<D> Clone for Ragged<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for Ragged<'_, D> {}

#[cfg(feature = "capi")]
impl<'a, D: Device> Ragged<'a, D> {
    /// The same batch, by the name of another type of device.
    ///
    /// # Safety
    /// It is in that device's memory.
    pub(crate) unsafe fn of_device<E: Device>(self) -> Ragged<'a, E> {
        // SAFETY: the caller promises that all three are in that device's memory.
        let of = |tensor: TensorRef<'a, D>| unsafe { tensor.of_device() };
        Ragged { q_offsets: of(self.q_offsets), kv_lens: of(self.kv_lens), pages: of(self.pages) }
    }
}

/// How attention is masked and scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionMask {
    /// What scores are multiplied by, usually `1 / sqrt(head size)`.
    pub scale: f32,
    /// Each token sees itself and this many less one before it; `None`: all before it.
    pub window: Option<usize>,
    /// Scaled scores become `cap · tanh(score / cap)` before the softmax (Gemma 2's report, arXiv:2408.00118); `None`: they
    /// stay as they are.
    pub soft_cap: Option<f32>,
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

    /// How many rows [`linear`](Self::linear) should be given where there are so many tokens; those that are missing may be any. The fewer
    /// sizes there are, the fewer shapes have their first product.
    fn product_rows(&self, tokens: usize) -> usize {
        tokens
    }

    /// What the bits of results depend on, in words: devices that say the same compute the same, by the same build.
    fn arithmetic(&self) -> String {
        self.describe()
    }

    /// How many tokens should go through a layer at once, at most, where the activations of each take so many bytes. Each block of so many
    /// reads all weights.
    fn block_tokens(&self, token_bytes: usize) -> usize;

    /// Memory that the kernels take for themselves at most, in bytes.
    fn scratch_bytes(&self) -> usize;

    /// Enqueues a kernel on `stream`. The methods below are what to call: they check their arguments, then call this.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) for what this device cannot compute, or the device's own.
    fn compute(&self, stream: &Self::Stream, call: Call<'_, Self>) -> Result<()>;

    kernels!(methods);
}
