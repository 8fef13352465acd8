//! The kernels on CUDA: the launchers of `cuda/kernels.h`, and products by cuBLAS.
//!
//! **Invariant** for every `unsafe` here: a tensor view of a CUDA device stands for aligned, allocated device memory that is
//! ordered with the stream, as its constructor demanded, and `shapes` has found the tensors of a launch to fit together.

use std::ffi::c_int;

use super::{
    AttentionMask, Kernels, Precision, Ragged, RopeLayout,
    cublas::{Cublas, WORKSPACE},
    shapes::{self, Cached, Call, check},
};
use crate::{
    device::{
        Cuda, CudaMemory, CudaStream, Device, TensorMut, TensorRef,
        cuda::{
            code_of,
            sys::{self, cudaError},
        },
    },
    dtype::DType,
    error::{Error, Result},
};

/// Everything is BF16 but what is F32 on every device.
const PRECISION: Precision = Precision { activation: DType::BF16, cache: DType::BF16, weight: Some(DType::BF16) };

/// Head sizes that attention is compiled for.
const HEAD_SIZES: [usize; 5] = [32, 64, 96, 128, 256];

/// What a stream that was prepared has of its own.
struct Math {
    cublas: Cublas,
    scratch: CudaMemory,
}

/// The address of a tensor, for a launcher.
fn at<T>(tensor: TensorRef<'_, Cuda>) -> *mut T {
    tensor.ptr().as_ptr().cast()
}

/// The same of a tensor that is written.
fn to<T>(tensor: &TensorMut<'_, Cuda>) -> *mut T {
    tensor.ptr().as_ptr().cast()
}

/// A dimension, as launchers take it that count with `int`.
fn int(kernel: &'static str, dimension: usize) -> Result<c_int> {
    c_int::try_from(dimension).map_err(|_| Error::Kernel { kernel, cause: format!("a dimension of {dimension}") })
}

impl Cuda {
    fn launch(&self, kernel: &'static str, launch: impl FnOnce() -> cudaError) -> Result<()> {
        self.call(|| format!("run {kernel}"), launch)
    }

    fn attention_scratch(&self) -> usize {
        // SAFETY: a calculation that touches no memory.
        unsafe { sys::lsk_attention_scratch(self.multiprocessors() as c_int) }
    }
}

fn math<'a>(kernel: &'static str, stream: &'a CudaStream) -> Result<&'a Math> {
    let math = stream.math.get().and_then(|math| math.downcast_ref());
    math.ok_or_else(|| Error::Kernel {
        kernel,
        cause: "the stream was not prepared; call Kernels::prepare first".into(),
    })
}

impl Kernels for Cuda {
    fn precision(&self) -> Precision {
        PRECISION
    }

    /// Starts cuBLAS for this stream, with a workspace of its own, and reserves what attention needs. The crate's own kernels
    /// are loaded with the device. cuBLAS loads each of its kernels when a product first needs it, which may allocate device
    /// memory: so may the first pass of a new shape, and none after it.
    fn prepare(&self, stream: &CudaStream) -> Result<()> {
        if stream.math.get().is_none() {
            self.bind_thread()?;
            let scratch = self.allocate("attention's scratch", self.attention_scratch())?;
            let math = Math { cublas: Cublas::new(self, stream)?, scratch };
            stream.math.get_or_init(|| Box::new(math));
        }
        Ok(())
    }

    fn check_head_size(&self, size: usize) -> Result<()> {
        check("attention", HEAD_SIZES.contains(&size), || {
            format!("heads of {size} on a GPU, which computes those of {HEAD_SIZES:?}; use the CPU device")
        })
    }

    fn cast(&self, stream: &CudaStream, x: TensorRef<'_, Cuda>, out: TensorMut<'_, Cuda>) -> Result<()> {
        shapes::cast(Call::new("cast", self, stream), x, out.as_ref())?;
        // SAFETY: `shapes::cast` found the tensors to fit together; each is device memory that is ordered with `stream`.
        unsafe {
            if x.dtype() == out.dtype() {
                self.copy_on_device(out.ptr(), x.ptr(), x.bytes(), stream)
            } else {
                self.cast_raw((out.ptr(), out.dtype()), (x.ptr(), x.dtype()), x.elements(), stream)
            }
        }
    }

    fn embed(
        &self,
        stream: &CudaStream,
        table: TensorRef<'_, Cuda>,
        ids: TensorRef<'_, Cuda>,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let [vocab, hidden] =
            shapes::embed(Call::new("embed", self, stream), table, ids, out.as_ref())?.map(|n| n as i64);
        let tokens = ids.elements() as i64;
        // SAFETY: `shapes::embed` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("embed", || unsafe {
            sys::lsk_embed(to(&out), at(table), at(ids), tokens, hidden, vocab, stream.raw())
        })
    }

    fn gather(
        &self,
        stream: &CudaStream,
        x: TensorRef<'_, Cuda>,
        indices: TensorRef<'_, Cuda>,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let [_, hidden] = shapes::gather(Call::new("gather", self, stream), x, indices, out.as_ref())?;
        let rows = indices.elements() as i64;
        // SAFETY: `shapes::gather` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("gather", || unsafe {
            sys::lsk_gather(to(&out), at(x), at(indices), rows, hidden as i64, stream.raw())
        })
    }

    fn rms_norm(
        &self,
        stream: &CudaStream,
        x: TensorRef<'_, Cuda>,
        weight: TensorRef<'_, Cuda>,
        eps: f32,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let [rows, hidden] =
            shapes::rms_norm(Call::new("rms_norm", self, stream), x, weight, out.as_ref())?.map(|n| n as i64);
        // SAFETY: `shapes::rms_norm` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("rms_norm", || unsafe {
            sys::lsk_rms_norm(to(&out), at(x), at(weight), eps, rows, hidden, stream.raw())
        })
    }

    fn add_rms_norm(
        &self,
        stream: &CudaStream,
        residual: TensorMut<'_, Cuda>,
        y: TensorRef<'_, Cuda>,
        weight: TensorRef<'_, Cuda>,
        eps: f32,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        shapes::add(Call::new("add", self, stream), residual.as_ref(), y)?;
        let [rows, hidden] =
            shapes::rms_norm(Call::new("rms_norm", self, stream), residual.as_ref(), weight, out.as_ref())?
                .map(|n| n as i64);
        // SAFETY: `shapes::rms_norm` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("add_rms_norm", || unsafe {
            sys::lsk_add_rms_norm(to(&out), to(&residual), at(y), at(weight), eps, rows, hidden, stream.raw())
        })
    }

    fn rms_norm_in_place(
        &self,
        stream: &CudaStream,
        x: TensorMut<'_, Cuda>,
        weight: TensorRef<'_, Cuda>,
        eps: f32,
    ) -> Result<()> {
        let [rows, size] =
            shapes::rms_norm_in_place(Call::new("rms_norm", self, stream), x.as_ref(), weight)?.map(|n| n as i64);
        // SAFETY: `shapes::rms_norm_in_place` found the tensors to fit together; each is device memory that is ordered with
        // `stream`.
        self.launch("rms_norm_in_place", || unsafe {
            sys::lsk_rms_norm_heads(to(&x), at(weight), eps, rows, size, stream.raw())
        })
    }

    fn linear(
        &self,
        stream: &CudaStream,
        x: TensorRef<'_, Cuda>,
        weight: TensorRef<'_, Cuda>,
        bias: Option<TensorRef<'_, Cuda>>,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let [tokens, k, n] = shapes::linear(Call::new("linear", self, stream), x, weight, bias, out.as_ref())?;
        let math = math("linear", stream)?;
        if tokens * n == 0 {
            return Ok(());
        }
        if let Some(bias) = bias {
            // SAFETY: `shapes::linear` found the tensors to fit together; each is device memory that is ordered with `stream`.
            self.launch("linear", || unsafe {
                sys::lsk_broadcast_row(to(&out), code_of(out.dtype()), at(bias), tokens as i64, n as i64, stream.raw())
            })?;
        }
        let beta = if bias.is_some() { 1.0 } else { 0.0 };
        // SAFETY: `shapes::linear` found the tensors to fit together; each is device memory that is ordered with `stream`.
        unsafe { math.cublas.product([tokens, k, n], (x.ptr(), weight.ptr()), beta, (out.ptr(), out.dtype())) }
    }

    fn rope(
        &self,
        stream: &CudaStream,
        x: TensorRef<'_, Cuda>,
        positions: TensorRef<'_, Cuda>,
        inv_freq: TensorRef<'_, Cuda>,
        layout: RopeLayout,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let [tokens, heads, size] =
            shapes::rope(Call::new("rope", self, stream), x, positions, inv_freq, out.as_ref())?;
        let (heads, size) = (int("rope", heads)?, int("rope", size)?);
        let interleaved = c_int::from(layout == RopeLayout::Interleaved);
        // SAFETY: `shapes::rope` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("rope", || unsafe {
            sys::lsk_rope(
                to(&out),
                at(x),
                at(positions),
                at(inv_freq),
                tokens as i64,
                heads,
                size,
                interleaved,
                stream.raw(),
            )
        })
    }

    fn swiglu(&self, stream: &CudaStream, gate: TensorMut<'_, Cuda>, up: TensorRef<'_, Cuda>) -> Result<()> {
        shapes::swiglu(Call::new("swiglu", self, stream), gate.as_ref(), up)?;
        // SAFETY: `shapes::swiglu` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("swiglu", || unsafe { sys::lsk_swiglu(to(&gate), at(up), up.elements(), stream.raw()) })
    }

    fn add(&self, stream: &CudaStream, x: TensorMut<'_, Cuda>, y: TensorRef<'_, Cuda>) -> Result<()> {
        shapes::add(Call::new("add", self, stream), x.as_ref(), y)?;
        // SAFETY: `shapes::add` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("add", || unsafe { sys::lsk_add(to(&x), at(y), y.elements(), stream.raw()) })
    }

    fn append_kv(
        &self,
        stream: &CudaStream,
        block: TensorRef<'_, Cuda>,
        batch: Ragged<'_, Cuda>,
        cache: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let of = shapes::append_kv(Call::new("append_kv", self, stream), block, batch, cache.as_ref())?;
        let [sequences, tokens, kv_heads, size] = dimensions("append_kv", &of)?;
        // SAFETY: `shapes::append_kv` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("append_kv", || unsafe {
            sys::lsk_append_kv(
                to(&cache),
                at(block),
                at(batch.q_offsets),
                at(batch.kv_lens),
                at(batch.rows),
                sequences,
                tokens,
                kv_heads,
                of.capacity as i64,
                size,
                stream.raw(),
            )
        })
    }

    fn attention(
        &self,
        stream: &CudaStream,
        q: TensorRef<'_, Cuda>,
        keys: TensorRef<'_, Cuda>,
        values: TensorRef<'_, Cuda>,
        batch: Ragged<'_, Cuda>,
        mask: AttentionMask,
        out: TensorMut<'_, Cuda>,
    ) -> Result<()> {
        let of = shapes::attention(Call::new("attention", self, stream), q, keys, values, batch, mask, out.as_ref())?;
        self.check_head_size(of.size)?;
        let [sequences, tokens, kv_heads, size] = dimensions("attention", &of)?;
        let (heads, window) = (int("attention", of.heads)?, mask.window.map_or(0, |window| window as i64));
        let scratch = self.address(&math("attention", stream)?.scratch).as_ptr();
        // SAFETY: `shapes::attention` found the tensors to fit together; each is device memory that is ordered with `stream`,
        // and so is the scratch, which no other stream uses and which is as long as is said.
        self.launch("attention", || unsafe {
            sys::lsk_attention(
                to(&out),
                at(q),
                at(keys),
                at(values),
                at(batch.q_offsets),
                at(batch.kv_lens),
                at(batch.rows),
                sequences,
                tokens,
                heads,
                kv_heads,
                of.capacity as i64,
                size,
                mask.scale,
                window,
                scratch.cast(),
                self.attention_scratch(),
                stream.raw(),
            )
        })
    }

    fn argmax(&self, stream: &CudaStream, x: TensorRef<'_, Cuda>, out: TensorMut<'_, Cuda>) -> Result<()> {
        let [rows, columns] = shapes::argmax(Call::new("argmax", self, stream), x, out.as_ref())?.map(|n| n as i64);
        // SAFETY: `shapes::argmax` found the tensors to fit together; each is device memory that is ordered with `stream`.
        self.launch("argmax", || unsafe { sys::lsk_argmax(to(&out), at(x), rows, columns, stream.raw()) })
    }

    fn scratch_bytes(&self) -> usize {
        WORKSPACE + self.attention_scratch()
    }
}

/// Sequences, tokens, key heads and head size.
fn dimensions(kernel: &'static str, of: &Cached) -> Result<[c_int; 4]> {
    Ok([int(kernel, of.sequences)?, int(kernel, of.tokens)?, int(kernel, of.kv_heads)?, int(kernel, of.size)?])
}
