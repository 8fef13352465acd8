//! The part of cuBLAS that the crate uses, on the emulated runtime: products of BF16, added up in F32.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    slice,
    sync::atomic::Ordering::AcqRel,
};

use half::bf16;

use crate::device::{
    cuda::emulation::{CURRENT, DEVICE, PRODUCTS, current, runtime::StreamHandle},
    cuda::sys::cudaError,
    streams::Along,
};

// Of cublas_api.h and library_types.h.
const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const EXECUTION_FAILED: c_int = 13;
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;

/// A handle: of one device, with the stream that it enqueues on.
struct ProductHandle {
    device: usize,
    stream: *mut c_void,
}

/// The function of that name, as `dlsym` would find it.
pub(super) fn symbol(name: &CStr) -> *mut c_void {
    match name.to_bytes() {
        b"cublasCreate_v2" => create as *mut c_void,
        b"cublasDestroy_v2" => destroy as *mut c_void,
        b"cublasSetStream_v2" => set_stream as *mut c_void,
        b"cublasSetWorkspace_v2" => set_workspace as *mut c_void,
        b"cublasSetMathMode" => set_math_mode as *mut c_void,
        b"cublasGetStatusName" => status_name as *mut c_void,
        b"cublasGetStatusString" => status_string as *mut c_void,
        b"cublasGemmEx" => gemm as *mut c_void,
        _ => std::ptr::null_mut(),
    }
}

unsafe extern "C" fn create(to: *mut *mut c_void) -> c_int {
    if current().alive().is_err() {
        return EXECUTION_FAILED;
    }
    PRODUCTS.fetch_add(1, AcqRel);
    let handle = Box::new(ProductHandle { device: CURRENT.get(), stream: std::ptr::null_mut() });
    // SAFETY: a program gives the place for the handle.
    unsafe { to.write(Box::into_raw(handle).cast()) };
    SUCCESS
}

unsafe extern "C" fn destroy(handle: *mut c_void) -> c_int {
    PRODUCTS.fetch_sub(1, AcqRel);
    // SAFETY: `create` made it, and a program destroys it once.
    drop(unsafe { Box::from_raw(handle.cast::<ProductHandle>()) });
    SUCCESS
}

unsafe extern "C" fn set_stream(handle: *mut c_void, stream: *mut c_void) -> c_int {
    // SAFETY: `create` made the handle, which one thread uses at a time; the stream was created, or is null.
    let (handle, found) = unsafe { (&mut *handle.cast::<ProductHandle>(), StreamHandle::of(stream)) };
    match found {
        Ok(found) if std::ptr::eq(found.device(), &DEVICE[handle.device]) => {
            handle.stream = stream;
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

unsafe extern "C" fn set_workspace(handle: *mut c_void, start: *mut c_void, bytes: usize) -> c_int {
    // SAFETY: `create` made the handle, and its stream was created or is null.
    let stream = unsafe { StreamHandle::of((*handle.cast::<ProductHandle>()).stream) };
    let there = stream.is_ok_and(|stream| stream.reaches(start.addr(), bytes));
    if there && start.addr().is_multiple_of(256) { SUCCESS } else { INVALID_VALUE }
}

extern "C" fn set_math_mode(_handle: *mut c_void, _mode: c_int) -> c_int {
    SUCCESS
}

extern "C" fn status_name(status: c_int) -> *const c_char {
    let name = match status {
        SUCCESS => c"CUBLAS_STATUS_SUCCESS",
        INVALID_VALUE => c"CUBLAS_STATUS_INVALID_VALUE",
        _ => c"CUBLAS_STATUS_EXECUTION_FAILED",
    };
    name.as_ptr()
}

extern "C" fn status_string(status: c_int) -> *const c_char {
    let text = match status {
        SUCCESS => c"success",
        INVALID_VALUE => c"an unsupported value or parameter was passed to the function",
        _ => c"the function failed to launch on the GPU",
    };
    text.as_ptr()
}

/// A matrix of `columns` vectors of `rows` elements, so many elements apart.
#[derive(Clone, Copy)]
struct Matrix {
    start: *mut c_void,
    rows: usize,
    columns: usize,
    apart: usize,
}

impl Matrix {
    fn elements(&self) -> usize {
        if self.rows * self.columns == 0 { 0 } else { (self.columns - 1) * self.apart + self.rows }
    }

    /// Whether it lies in memory of the stream's device.
    fn on(&self, stream: &StreamHandle, element: usize) -> bool {
        self.elements() == 0 || stream.reaches(self.start.addr(), self.elements() * element)
    }

    /// Its elements as F32, without gaps.
    ///
    /// # Safety
    /// It is a matrix of BF16 that nobody writes.
    unsafe fn widened(&self) -> Vec<f32> {
        let column = |column: usize| {
            // SAFETY: the column lies in the matrix, which nobody writes.
            unsafe { slice::from_raw_parts(self.start.cast::<bf16>().add(column * self.apart), self.rows) }
        };
        (0..self.columns).flat_map(|at| column(at).iter().map(|x| x.to_f32())).collect()
    }
}

/// `c = aᵀ · b + beta · c`.
///
/// # Safety
/// The matrices are what their sizes say; nobody else uses `c`.
unsafe fn product([a, b, c]: [Matrix; 3], wide: bool, beta: f32) {
    // SAFETY: the two are matrices that nobody writes, by what this function asks of its caller.
    let (left, right) = unsafe { (a.widened(), b.widened()) };
    let mut sums = vec![0f32; c.rows * c.columns];
    crate::kernels::product([c.columns, a.rows, c.rows], &right, &left, &mut sums);
    for (column, sums) in sums.chunks(c.rows).enumerate() {
        for (row, sum) in sums.iter().enumerate() {
            let at = column * c.apart + row;
            // What is multiplied by nothing is not read: it may be NaN.
            let add = |before: f32| if beta == 0.0 { *sum } else { sum + beta * before };
            // SAFETY: `at` is inside the matrix `c`, which nobody else uses.
            unsafe {
                if wide {
                    let to = c.start.cast::<f32>().add(at);
                    to.write(add(to.read()));
                } else {
                    let to = c.start.cast::<bf16>().add(at);
                    to.write(bf16::from_f32(add(to.read().to_f32())));
                }
            }
        }
    }
}

unsafe extern "C" fn gemm(
    handle: *mut c_void,
    transpose_a: c_int,
    transpose_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const f32,
    a: *const c_void,
    a_type: c_int,
    a_apart: c_int,
    b: *const c_void,
    b_type: c_int,
    b_apart: c_int,
    beta: *const f32,
    c: *mut c_void,
    c_type: c_int,
    c_apart: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> c_int {
    // SAFETY: `create` made the handle, and a program gives both factors.
    let (handle, alpha, beta) = unsafe { (&*handle.cast::<ProductHandle>(), *alpha, *beta) };
    let asked = (transpose_a, transpose_b, a_type, b_type, compute, alpha);
    let wide = c_type == CUDA_R_32F;
    let sizes = [m, n, k, a_apart, b_apart, c_apart].map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    let [m, n, k, a_apart, b_apart, c_apart] = sizes;
    if asked != (OP_T, OP_N, CUDA_R_16BF, CUDA_R_16BF, COMPUTE_32F, 1.0)
        || !(wide || c_type == CUDA_R_16BF)
        || sizes.contains(&usize::MAX)
        || [a_apart, b_apart].iter().any(|apart| *apart < k.max(1))
        || c_apart < m.max(1)
    {
        return INVALID_VALUE;
    }
    let a = Matrix { start: a.cast_mut(), rows: k, columns: m, apart: a_apart };
    let b = Matrix { start: b.cast_mut(), rows: k, columns: n, apart: b_apart };
    let c = Matrix { start: c, rows: m, columns: n, apart: c_apart };
    // SAFETY: the handle's stream was created, or is null; streams are never given back.
    let Ok(stream) = (unsafe { StreamHandle::of(handle.stream) }) else { return EXECUTION_FAILED };
    let size = if wide { 4 } else { 2 };
    let there = a.on(stream, 2) && b.on(stream, 2) && c.on(stream, size);
    let matrices = Along([a, b, c]);
    stream.run(move || {
        let Along(matrices) = { matrices };
        if !there {
            return Err(cudaError::cudaErrorIllegalAddress);
        }
        if m * n > 0 {
            // SAFETY: they lie in device memory, as was found above, ordered by the stream.
            unsafe { product(matrices, wide, beta) };
        }
        Ok(())
    });
    SUCCESS
}
