//! The kernels by the C API: each computes what the method in Rust does, bit for bit, and what it writes may not be what it
//! reads.

mod common;

use std::{ffi::CStr, fs, mem, path::Path};

use layer_streamer::{
    DType, Result,
    capi::{ls_status::*, *},
    device::{Cpu, CpuStream, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::{AttentionMask, Kernels, Ragged, RopeLayout, call::Call},
};

fn message() -> String {
    // SAFETY: it is never NULL, and the library's until the next failure.
    unsafe { CStr::from_ptr(ls_last_error()) }.to_str().unwrap().to_owned()
}

/// What a call wrote, if it succeeded.
fn made<T>(call: impl FnOnce(*mut T) -> ls_status) -> T {
    let mut to = mem::MaybeUninit::uninit();
    assert_eq!(call(to.as_mut_ptr()), LS_OK, "{}", message());
    // SAFETY: a call that succeeds writes its result.
    unsafe { to.assume_init() }
}

/// A tensor of F32 or U32 in memory of its own.
#[derive(Clone, Debug, PartialEq)]
struct Tensor {
    words: Vec<u32>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Tensor {
    fn get(&self) -> TensorRef<'_, Cpu> {
        let ptr = DevicePtr::new(self.words.as_ptr().cast_mut().cast());
        // SAFETY: the vector holds the tensor, and is borrowed as long as it.
        unsafe { TensorRef::from_raw(ptr, self.dtype, Shape::new(&self.shape).unwrap()) }
    }

    fn out(&mut self) -> TensorMut<'_, Cpu> {
        let ptr = DevicePtr::new(self.words.as_mut_ptr().cast());
        // SAFETY: the vector holds the tensor, and is borrowed mutably as long as it.
        unsafe { TensorMut::from_raw(ptr, self.dtype, Shape::new(&self.shape).unwrap()) }
    }

    fn c(&mut self) -> ls_tensor {
        let dtype = if self.dtype == DType::U32 { ls_dtype::LS_U32 } else { ls_dtype::LS_F32 };
        let mut shape = [0; 8];
        shape[..self.shape.len()].copy_from_slice(&self.shape);
        let (data, rank) = (self.words.as_mut_ptr().cast(), self.shape.len() as u32);
        ls_tensor { data, dtype: dtype as i32, rank, shape }
    }
}

fn floats(shape: &[usize]) -> Tensor {
    let words = (0..shape.iter().product()).map(|_| (fastrand::f32() * 2.0 - 1.0).to_bits()).collect();
    Tensor { words, dtype: DType::F32, shape: shape.to_vec() }
}

fn numbers(words: &[u32]) -> Tensor {
    Tensor { words: words.to_vec(), dtype: DType::U32, shape: vec![words.len()] }
}

/// Streams of the CPU device, and which kernels were tried.
struct Both {
    rust: CpuStream,
    c: ls_stream,
    tried: Vec<&'static str>,
}

impl Both {
    /// Runs a kernel on two copies of `tensors`, then with each that it wrote in the place of each other.
    fn run<const N: usize>(
        &mut self,
        name: &'static str,
        tensors: [Tensor; N],
        rust: impl Fn(&CpuStream, [&mut Tensor; N]) -> Result<()>,
        c: impl Fn(ls_stream, [&ls_tensor; N]) -> ls_status,
    ) {
        let (mut by_rust, mut by_c) = (tensors.clone(), tensors.clone());
        rust(&self.rust, by_rust.each_mut()).unwrap();
        let views = by_c.each_mut().map(Tensor::c);
        assert_eq!(c(self.c, views.each_ref()), LS_OK, "{name}: {}", message());
        assert_eq!(by_c, by_rust, "{name}");
        let written: Vec<_> = (0..N).filter(|&i| by_rust[i] != tensors[i]).collect();
        assert!(!written.is_empty(), "{name} writes nothing");
        for (to, from) in
            written.iter().flat_map(|&to| (0..N).map(move |from| (to, from))).filter(|(to, from)| to != from)
        {
            let mut mixed = views;
            mixed[to].data = views[from].data;
            assert_eq!(c(self.c, mixed.each_ref()), LS_KERNEL, "{name}: {to} lies on {from}");
            assert_eq!(message(), format!("{name}: what is written overlaps what is read"));
        }
        assert_eq!(by_c, by_rust, "{name} wrote something and refused");
        self.tried.push(name);
    }

    fn element_by_element(&mut self) {
        // SAFETY, here and below: the tensors are there, and each is as large as its view says.
        let (x, y, w) = (floats(&[3, 6]), floats(&[3, 6]), floats(&[6]));
        self.run(
            "cast",
            [x.clone(), y.clone()],
            |s, [x, out]| Cpu.cast(s, x.get(), out.out()),
            |s, [x, out]| unsafe { ls_cast(s, x, out) },
        );
        self.run(
            "rms_norm",
            [x.clone(), w.clone(), y.clone()],
            |s, [x, w, out]| Cpu.rms_norm(s, x.get(), w.get(), 1.0, 1e-5, out.out()),
            |s, [x, w, out]| unsafe { ls_rms_norm(s, x, w, 1.0, 1e-5, out) },
        );
        self.run(
            "add_rms_norm",
            [x.clone(), y.clone(), w.clone(), floats(&[3, 6])],
            |s, [x, y, w, out]| Cpu.add_rms_norm(s, x.out(), y.get(), w.get(), 1.0, 1e-5, out.out()),
            |s, [x, y, w, out]| unsafe { ls_add_rms_norm(s, x, y, w, 1.0, 1e-5, out) },
        );
        self.run(
            "rms_norm_in_place",
            [x.clone(), w],
            |s, [x, w]| Cpu.rms_norm_in_place(s, x.out(), w.get(), 1.0, 1e-5),
            |s, [x, w]| unsafe { ls_rms_norm_in_place(s, x, w, 1.0, 1e-5) },
        );
        self.run(
            "swiglu",
            [x.clone(), y.clone()],
            |s, [x, y]| Cpu.swiglu(s, x.out(), y.get()),
            |s, [x, y]| unsafe { ls_swiglu(s, x, y) },
        );
        self.run(
            "geglu",
            [x.clone(), y.clone()],
            |s, [x, y]| Cpu.geglu(s, x.out(), y.get()),
            |s, [x, y]| unsafe { ls_geglu(s, x, y) },
        );
        self.run("scale", [x.clone()], |s, [x]| Cpu.scale(s, x.out(), 2.5), |s, [x]| unsafe { ls_scale(s, x, 2.5) });
        self.run(
            "soft_cap",
            [x.clone()],
            |s, [x]| Cpu.soft_cap(s, x.out(), 0.5),
            |s, [x]| unsafe { ls_soft_cap(s, x, 0.5) },
        );
        self.run("add", [x, y], |s, [x, y]| Cpu.add(s, x.out(), y.get()), |s, [x, y]| unsafe { ls_add(s, x, y) });
    }

    fn rows(&mut self) {
        let (table, ids, out) = (floats(&[5, 4]), numbers(&[4, 0, 2]), floats(&[3, 4]));
        self.run(
            "embed",
            [table.clone(), ids.clone(), out.clone()],
            |s, [x, ids, out]| Cpu.embed(s, x.get(), ids.get(), out.out()),
            |s, [x, ids, out]| unsafe { ls_embed(s, x, ids, out) },
        );
        self.run(
            "gather",
            [table.clone(), ids, out],
            |s, [x, ids, out]| Cpu.gather(s, x.get(), ids.get(), out.out()),
            |s, [x, ids, out]| unsafe { ls_gather(s, x, ids, out) },
        );
        self.run(
            "argmax",
            [table, numbers(&[9; 5])],
            |s, [x, out]| Cpu.argmax(s, x.get(), out.out()),
            |s, [x, out]| unsafe { ls_argmax(s, x, out) },
        );
        self.run(
            "linear",
            [floats(&[2, 4]), floats(&[3, 4]), floats(&[3]), floats(&[2, 3])],
            |s, [x, w, b, out]| Cpu.linear(s, x.get(), w.get(), Some(b.get()), out.out()),
            |s, [x, w, b, out]| unsafe { ls_linear(s, x, w, b, out) },
        );
        self.run(
            "linear",
            [floats(&[2, 4]), floats(&[3, 4]), floats(&[2, 3])],
            |s, [x, w, out]| Cpu.linear(s, x.get(), w.get(), None, out.out()),
            |s, [x, w, out]| unsafe { ls_linear(s, x, w, std::ptr::null(), out) },
        );
    }

    fn attention(&mut self) {
        fn ragged<'a>([offsets, lens, pages]: [&'a Tensor; 3]) -> Ragged<'a, Cpu> {
            Ragged { q_offsets: offsets.get(), kv_lens: lens.get(), pages: pages.get() }
        }
        let (q, cache) = (floats(&[3, 4, 6]), floats(&[3, 2, LS_PAGE, 6]));
        let [offsets, lens] = [numbers(&[0, 1, 3]), numbers(&[70, 2])];
        // Of the second sequence's two, one is behind its last token.
        let pages = Tensor { shape: vec![2, 2], ..numbers(&[1, 2, 0, 9]) };
        for (layout, code, half) in
            [(RopeLayout::Halves, 0, 3), (RopeLayout::Interleaved, 1, 2), (RopeLayout::ToHalves, 2, 3)]
        {
            self.run(
                "rope",
                [q.clone(), numbers(&[7, 8, 0]), floats(&[half]), floats(&[3, 4, 6])],
                |s, [x, p, f, out]| Cpu.rope(s, x.get(), p.get(), f.get(), 1.25, layout, out.out()),
                |s, [x, p, f, out]| unsafe { ls_rope(s, x, p, f, 1.25, code, out) },
            );
        }
        let batch = |offsets: &ls_tensor, lens: &ls_tensor, pages: &ls_tensor| ls_ragged {
            q_offsets: *offsets,
            kv_lens: *lens,
            pages: *pages,
        };
        self.run(
            "append_kv",
            [floats(&[3, 2, 6]), offsets.clone(), lens.clone(), pages.clone(), cache.clone()],
            |s, [x, a, b, c, cache]| Cpu.append_kv(s, x.get(), ragged([a, b, c]), cache.out()),
            |s, [x, a, b, c, cache]| unsafe { ls_append_kv(s, x, &batch(a, b, c), cache) },
        );
        for (window, soft_cap) in [(None, None), (Some(2), None), (None, Some(0.5))] {
            let mask = AttentionMask { scale: 0.4, window, soft_cap };
            let tensors =
                [q.clone(), cache.clone(), floats(&[3, 2, LS_PAGE, 6]), offsets.clone(), lens.clone(), pages.clone()];
            let [t0, t1, t2, t3, t4, t5] = tensors;
            self.run(
                "attention",
                [t0, t1, t2, t3, t4, t5, floats(&[3, 4, 6])],
                |s, [q, k, v, a, b, c, out]| {
                    Cpu.attention(s, q.get(), k.get(), v.get(), ragged([a, b, c]), mask, out.out())
                },
                |s, [q, k, v, a, b, c, out]| unsafe {
                    ls_attention(s, q, k, v, &batch(a, b, c), 0.4, window.unwrap_or(0), soft_cap.unwrap_or(0.0), out)
                },
            );
        }
    }
}

#[test]
fn every_kernel_computes_by_c_what_it_does_by_rust_and_refuses_what_overlaps() {
    // SAFETY: the places are this function's.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let stream = made(|to| ls_stream_open(device, to));
        assert_eq!(ls_stream_prepare(stream), LS_OK);
        let mut both = Both { rust: Cpu.stream().unwrap(), c: stream, tried: Vec::new() };
        both.element_by_element();
        both.rows();
        both.attention();
        for name in Call::<Cpu>::NAMES {
            assert!(both.tried.contains(name), "{name} was not tried");
        }
        assert_eq!((ls_stream_close(stream), ls_device_close(device)), (LS_OK, LS_OK));
    }
}

#[test]
fn the_header_declares_every_kernel() {
    let header = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/layer_streamer.h")).unwrap();
    for name in Call::<Cpu>::NAMES {
        assert!(header.contains(&format!("\nls_status ls_{name}(")), "there is no ls_{name}");
    }
}

/// What C is told of a device's kernels is what Rust is told.
fn check_told<D: Kernels>(handle: ls_device, device: &D, heads: [usize; 2]) {
    // SAFETY: the places are this function's.
    let scratch = made(|to| unsafe { ls_device_scratch_bytes(handle, to) });
    assert_eq!(scratch, device.scratch_bytes());
    for size in heads {
        match device.check_head_size(size) {
            Ok(()) => assert_eq!(ls_device_check_head_size(handle, size), LS_OK),
            Err(error) => {
                assert_eq!(ls_device_check_head_size(handle, size), LS_KERNEL);
                assert_eq!(message(), error.to_string());
            }
        }
    }
}

#[test]
fn a_device_says_which_heads_and_how_much_memory_its_kernels_take() {
    // SAFETY: the place is this function's.
    let cpu = made(|to| unsafe { ls_device_cpu(to) });
    check_told(cpu, &Cpu, [64, 80]);
    assert_eq!(ls_device_check_head_size(cpu, 80), LS_OK);
    assert_eq!((ls_device_close(cpu), ls_device_check_head_size(cpu, 64)), (LS_OK, LS_CLOSED));
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_says_which_heads_and_how_much_memory_its_kernels_take() {
    let Some(device) = common::gpu() else { return };
    // SAFETY: the place is this function's.
    let gpu = made(|to| unsafe { ls_device_cuda(0, to) });
    check_told(gpu, &device, [64, 80]);
    assert_eq!((ls_device_check_head_size(gpu, 80), ls_device_close(gpu)), (LS_KERNEL, LS_OK));
}
