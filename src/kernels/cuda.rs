//! The kernels on CUDA: the launchers of `cuda/kernels.h`, and products by cuBLAS.
//!
//! **Invariant** for every `unsafe` here: a tensor view of a CUDA device stands for aligned, allocated device memory that is
//! ordered with the stream, as its constructor demanded, and the checks that made a [`Call`] found its tensors to fit together.

use std::{ffi::c_int, ops::RangeInclusive};

use super::{
    Kernels, PAGE, Precision, RopeLayout,
    call::*,
    cublas::Tensors,
    fit::check,
    product::{self, Product, Products},
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

const _: () = assert!(sys::LSK_PAGE as usize == PAGE);

/// Caps of scores whose hyperbolic tangent, which is off by 3e-7, gives no score that is off by more than BF16 rounds.
const SOFT_CAPS: RangeInclusive<f32> = 1e-4..=1e4;

/// What a stream that was prepared has of its own.
struct Math {
    products: Products,
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

    fn linear(&self, stream: &CudaStream, call: Linear<'_, Cuda>) -> Result<()> {
        let Linear { x, weight, bias, out, T, K, N } = call;
        let products = &math("linear", stream)?.products;
        if T * N == 0 {
            return Ok(());
        }
        let tensors = Tensors { x: x.ptr(), weight: weight.ptr(), out: out.ptr() };
        let product = Product { sizes: [T, K, N], tensors, out: out.dtype(), bias: bias.map(|bias| bias.ptr()) };
        // SAFETY: the checks found `x` [T, K], `weight` [N, K] and N biases in BF16 and `out` [T, N]; all are device memory whose use
        // `stream` orders, which is the stream of `products`.
        unsafe { products.enqueue(product, stream) }
    }

    fn attention(&self, stream: &CudaStream, call: Attention<'_, Cuda>) -> Result<()> {
        let Attention { q, keys, values, batch, mask, out, T, HQ, D, S, P, G, .. } = call;
        self.check_head_size(D)?;
        let (cap, known) = (mask.soft_cap.unwrap_or(0.0), mask.soft_cap.is_none_or(|cap| SOFT_CAPS.contains(&cap)));
        check("attention", known, || {
            let (least, most) = SOFT_CAPS.into_inner();
            format!("a soft cap of {cap} on a GPU, which computes those from {least} to {most}; use the CPU device")
        })?;
        let int = |dimension| int("attention", dimension);
        let [sequences, tokens, heads, kv_heads, size] = [int(S)?, int(T)?, int(HQ)?, int(G)?, int(D)?];
        let sequence_pages = int(P)?;
        let window = mask.window.map_or(0, |window| window as i64);
        let scratch = self.address(&math("attention", stream)?.scratch).as_ptr();
        // SAFETY: the checks found the tensors to be what the launcher asks for; each is device memory whose use `stream` orders,
        // and so is the scratch, which no other stream uses and which is as long as is said.
        self.launch("attention", || unsafe {
            sys::lsk_attention(
                to(&out),
                at(q),
                at(keys),
                at(values),
                at(batch.q_offsets),
                at(batch.kv_lens),
                at(batch.pages),
                sequences,
                sequence_pages,
                tokens,
                heads,
                kv_heads,
                size,
                mask.scale,
                window,
                cap,
                scratch.cast(),
                self.attention_scratch(),
                stream.raw(),
            )
        })
    }
}

/// How many rows of `width` elements there are.
fn rows(tensor: TensorRef<'_, Cuda>, width: usize) -> i64 {
    (tensor.elements() / width.max(1)) as i64
}

fn math<'a>(kernel: &'static str, stream: &'a CudaStream) -> Result<&'a Math> {
    let math = stream.math.get().and_then(|math| math.downcast_ref());
    math.ok_or_else(|| Error::Kernel {
        kernel,
        cause: "the stream was not prepared; call Kernels::prepare first".into(),
    })
}

/// Tokens that go through a layer at once in any case.
const LEAST_BLOCK: usize = 256;

impl Kernels for Cuda {
    fn precision(&self) -> Precision {
        PRECISION
    }

    /// Which of several it is does not matter, nor how much memory is left.
    fn arithmetic(&self) -> String {
        self.model()
    }

    /// Starts cuBLAS for this stream, with a workspace of its own, and reserves what attention needs. The crate's own kernels
    /// are loaded with the device. The first product of a shape waits for the stream, while algorithms of cuBLAS are tried. cuBLAS
    /// loads each of its kernels when a product first needs it, which may allocate device memory. So may the first pass of a new
    /// shape, and none after it.
    fn prepare(&self, stream: &CudaStream) -> Result<()> {
        if stream.math.get().is_none() {
            self.bind_thread()?;
            let scratch = self.allocate("attention's scratch", self.attention_scratch())?;
            let math = Math { products: Products::new(self)?, scratch };
            stream.math.get_or_init(|| Box::new(math));
        }
        Ok(())
    }

    fn check_head_size(&self, size: usize) -> Result<()> {
        check("attention", HEAD_SIZES.contains(&size), || {
            format!("heads of {size} on a GPU, which computes those of {HEAD_SIZES:?}; use the CPU device")
        })
    }

    fn product_rows(&self, tokens: usize) -> usize {
        product::rows(tokens)
    }

    /// As many as cuBLAS takes at once, unless their activations would take more than a 64th of the GPU's memory.
    fn block_tokens(&self, token_bytes: usize) -> usize {
        let room = self.memory().map_or(0, |(_, total)| total / 64) / token_bytes.max(1);
        if room == 0 { LEAST_BLOCK } else { (1 << room.ilog2()).clamp(LEAST_BLOCK, product::MOST_ROWS) }
    }

    fn scratch_bytes(&self) -> usize {
        product::SCRATCH + self.attention_scratch()
    }

    fn compute(&self, stream: &CudaStream, call: Call<'_, Cuda>) -> Result<()> {
        let (name, on) = (call.name(), stream.raw());
        let int = |dimension| int(name, dimension);
        // SAFETY: only the checks make a `Call`: its tensors have the types and sizes that its row says, which is what launchers
        // ask for. Each is allocated and aligned device memory whose use `stream` orders, as whoever made the tensor promised.
        unsafe {
            match call {
                Call::Cast(Cast { x, out }) if x.dtype() == out.dtype() => {
                    self.copy_on_device(out.ptr(), x.ptr(), x.bytes(), stream)
                }
                Call::Cast(Cast { x, out }) => {
                    self.cast_raw((out.ptr(), out.dtype()), (x.ptr(), x.dtype()), x.elements(), stream)
                }
                Call::Embed(Embed { table, ids, out, T, H, V }) => {
                    self.launch(name, || sys::lsk_embed(to(&out), at(table), at(ids), T as i64, H as i64, V as i64, on))
                }
                Call::RmsNorm(RmsNorm { x, weight, offset, eps, out, H }) => self.launch(name, || {
                    sys::lsk_rms_norm(to(&out), at(x), at(weight), offset, eps, rows(x, H), H as i64, on)
                }),
                Call::AddRmsNorm(AddRmsNorm { residual: x, y, weight, offset, eps, out, H }) => {
                    self.launch(name, || {
                        sys::lsk_add_rms_norm(
                            to(&out),
                            to(&x),
                            at(y),
                            at(weight),
                            offset,
                            eps,
                            rows(y, H),
                            H as i64,
                            on,
                        )
                    })
                }
                Call::RmsNormInPlace(RmsNormInPlace { x, weight, offset, eps, H }) => self.launch(name, || {
                    sys::lsk_rms_norm_in_place(to(&x), at(weight), offset, eps, rows(x.as_ref(), H), H as i64, on)
                }),
                Call::Linear(call) => self.linear(stream, call),
                Call::Rope(Rope { x, positions, inv_freq, scale, layout, out, T, heads, D, half }) => {
                    let (x, positions, inv_freq) = (at(x), at(positions), at(inv_freq));
                    let (heads, size, half) = (int(heads)?, int(D)?, int(half)?);
                    let layout = match layout {
                        RopeLayout::Halves => sys::LSK_HALVES,
                        RopeLayout::Interleaved => sys::LSK_INTERLEAVED,
                        RopeLayout::ToHalves => sys::LSK_TO_HALVES,
                    } as c_int;
                    self.launch(name, || {
                        sys::lsk_rope(to(&out), x, positions, inv_freq, scale, T as i64, heads, size, half, layout, on)
                    })
                }
                Call::Swiglu(Swiglu { gate, up }) => {
                    self.launch(name, || sys::lsk_swiglu(to(&gate), at(up), up.elements(), on))
                }
                Call::Geglu(Geglu { gate, up }) => {
                    self.launch(name, || sys::lsk_geglu(to(&gate), at(up), up.elements(), on))
                }
                Call::Scale(Scale { x, factor }) => {
                    self.launch(name, || sys::lsk_scale(to(&x), code_of(x.dtype()), factor, x.elements(), on))
                }
                Call::SoftCap(SoftCap { x, cap }) => {
                    self.launch(name, || sys::lsk_soft_cap(to(&x), cap, x.elements(), on))
                }
                Call::Add(Add { residual, y }) => {
                    self.launch(name, || sys::lsk_add(to(&residual), at(y), y.elements(), on))
                }
                Call::AppendKv(AppendKv { block, batch, cache, T, G, D, S, P, .. }) => {
                    let [offsets, lens, pages] = [batch.q_offsets, batch.kv_lens, batch.pages].map(at);
                    let (s, p, t, g, d) = (int(S)?, int(P)?, int(T)?, int(G)?, int(D)?);
                    let (to, block) = (to(&cache), at(block));
                    self.launch(name, || sys::lsk_append_kv(to, block, offsets, lens, pages, s, p, t, g, d, on))
                }
                Call::Attention(call) => self.attention(stream, call),
                Call::Gather(Gather { x, indices, out, H, R, .. }) => {
                    self.launch(name, || sys::lsk_gather(to(&out), at(x), at(indices), R as i64, H as i64, on))
                }
                Call::Argmax(Argmax { x, out, R, V }) => {
                    self.launch(name, || sys::lsk_argmax(to(&out), at(x), R as i64, V as i64, on))
                }
            }
        }
    }
}
