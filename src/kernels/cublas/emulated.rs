//! The part of cuBLASLt that the crate uses, on the emulated runtime: products of BF16, added up in F32.
//!
//! There are two algorithms. The second adds up as the emulated tensor cores do. The first loses the lower half of each sum on its
//! way, so that no trial can miss it.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    slice,
    sync::atomic::Ordering::AcqRel,
};

use half::bf16;

use super::{Algorithm, Heuristic};
use crate::device::{
    cuda::emulation::{CURRENT, DEVICE, PRODUCTS, current, runtime::StreamHandle},
    cuda::sys::cudaError,
    streams::Along,
};

// Of cublas_api.h, cublasLt.h and library_types.h.
const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const EXECUTION_FAILED: c_int = 13;
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const DESC_TRANSA: c_int = 3;

/// The first numbers of the two algorithms.
const ROUGH: u64 = 1;
const IN_ORDER: u64 = 2;

/// A handle: of one device.
struct LtHandle {
    device: usize,
}

/// What a product does with its factors.
struct ProductHandle {
    transpose_a: c_int,
    types: (c_int, c_int),
}

/// A matrix of `columns` vectors of `rows` elements, so many elements apart.
struct MatrixHandle {
    dtype: c_int,
    rows: usize,
    columns: usize,
    apart: usize,
}

/// The function of that name, as `dlsym` would find it.
pub(super) fn symbol(name: &CStr) -> *mut c_void {
    match name.to_bytes() {
        b"cublasLtCreate" => create as *mut c_void,
        b"cublasLtDestroy" => destroy as *mut c_void,
        b"cublasLtGetStatusName" => status_name as *mut c_void,
        b"cublasLtGetStatusString" => status_string as *mut c_void,
        b"cublasLtMatmulDescCreate" => create_product as *mut c_void,
        b"cublasLtMatmulDescSetAttribute" => set_product as *mut c_void,
        b"cublasLtMatmulDescDestroy" => destroy_as::<ProductHandle> as *mut c_void,
        b"cublasLtMatrixLayoutCreate" => create_matrix as *mut c_void,
        b"cublasLtMatrixLayoutDestroy" => destroy_as::<MatrixHandle> as *mut c_void,
        b"cublasLtMatmulPreferenceCreate" => create_preference as *mut c_void,
        b"cublasLtMatmulPreferenceSetAttribute" => set_preference as *mut c_void,
        b"cublasLtMatmulPreferenceDestroy" => destroy_as::<()> as *mut c_void,
        b"cublasLtMatmulAlgoGetHeuristic" => algorithms as *mut c_void,
        b"cublasLtMatmul" => multiply as *mut c_void,
        _ => std::ptr::null_mut(),
    }
}

/// Hands out a new handle.
///
/// # Safety
/// A program gives the place for it.
unsafe fn hand_out<T>(to: *mut *mut c_void, handle: T) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { to.write(Box::into_raw(Box::new(handle)).cast()) };
    SUCCESS
}

unsafe extern "C" fn destroy_as<T>(handle: *mut c_void) -> c_int {
    // SAFETY: `hand_out` made it of this type, and a program destroys it once.
    drop(unsafe { Box::from_raw(handle.cast::<T>()) });
    SUCCESS
}

unsafe extern "C" fn create(to: *mut *mut c_void) -> c_int {
    if current().alive().is_err() {
        return EXECUTION_FAILED;
    }
    PRODUCTS.fetch_add(1, AcqRel);
    // SAFETY: a program gives the place for the handle.
    unsafe { hand_out(to, LtHandle { device: CURRENT.get() }) }
}

unsafe extern "C" fn destroy(handle: *mut c_void) -> c_int {
    PRODUCTS.fetch_sub(1, AcqRel);
    // SAFETY: `create` made it, and a program destroys it once.
    unsafe { destroy_as::<LtHandle>(handle) }
}

unsafe extern "C" fn create_product(to: *mut *mut c_void, compute: c_int, scale: c_int) -> c_int {
    // SAFETY: a program gives the place for the handle.
    unsafe { hand_out(to, ProductHandle { transpose_a: OP_N, types: (compute, scale) }) }
}

unsafe extern "C" fn set_product(of: *mut c_void, attribute: c_int, value: *const c_void, bytes: usize) -> c_int {
    if attribute != DESC_TRANSA || bytes != size_of::<c_int>() {
        return INVALID_VALUE;
    }
    // SAFETY: `create_product` made the handle, which one thread uses at a time; a program gives so many bytes.
    unsafe { (*of.cast::<ProductHandle>()).transpose_a = value.cast::<c_int>().read() };
    SUCCESS
}

unsafe extern "C" fn create_matrix(to: *mut *mut c_void, dtype: c_int, rows: u64, columns: u64, apart: i64) -> c_int {
    let [rows, columns] = [rows, columns].map(|size| size as usize);
    match usize::try_from(apart) {
        // SAFETY: a program gives the place for the handle.
        Ok(apart) if apart >= rows.max(1) => unsafe { hand_out(to, MatrixHandle { dtype, rows, columns, apart }) },
        _ => INVALID_VALUE,
    }
}

unsafe extern "C" fn create_preference(to: *mut *mut c_void) -> c_int {
    // SAFETY: a program gives the place for the handle.
    unsafe { hand_out(to, ()) }
}

extern "C" fn set_preference(_of: *mut c_void, _attribute: c_int, _value: *const c_void, _bytes: usize) -> c_int {
    SUCCESS
}

unsafe extern "C" fn algorithms(
    _handle: *mut c_void,
    _product: *mut c_void,
    _a: *mut c_void,
    _b: *mut c_void,
    _c: *mut c_void,
    _d: *mut c_void,
    _preference: *mut c_void,
    most: c_int,
    to: *mut Heuristic,
    count: *mut c_int,
) -> c_int {
    let both = [ROUGH, IN_ORDER].map(|number| {
        let algorithm = [number, 0, 0, 0, 0, 0, 0, 0];
        Heuristic { algorithm, workspace: 0, state: SUCCESS, waves: 1.0, reserved: [0; 4] }
    });
    let some = &both[..both.len().min(usize::try_from(most).unwrap_or(0))];
    // SAFETY: a program gives room for `most` results, and a place for their number.
    unsafe {
        slice::from_raw_parts_mut(to, some.len()).copy_from_slice(some);
        count.write(some.len() as c_int);
    }
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

/// A matrix where it lies.
#[derive(Clone, Copy)]
struct Matrix {
    start: *mut c_void,
    rows: usize,
    columns: usize,
    apart: usize,
}

impl Matrix {
    fn new(start: *const c_void, of: &MatrixHandle) -> Self {
        Self { start: start.cast_mut(), rows: of.rows, columns: of.columns, apart: of.apart }
    }

    fn elements(&self) -> usize {
        if self.rows * self.columns == 0 { 0 } else { (self.columns - 1) * self.apart + self.rows }
    }

    /// Whether it lies in memory of the stream's device.
    fn on(&self, stream: &StreamHandle, element: usize) -> bool {
        self.elements() == 0 || stream.reaches(self.start.addr(), self.elements() * element)
    }

    /// Its vectors as F32, each in whole sixteens, zeros behind its end. Of each sixteen come first what an emulated lane multiplies,
    /// then the next lane.
    ///
    /// # Safety
    /// It is a matrix of BF16 that nobody writes.
    unsafe fn sixteens(&self) -> Vec<f32> {
        const LANES: [usize; 16] = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15];
        let mut all = Vec::with_capacity(self.columns * self.rows.next_multiple_of(16));
        for column in 0..self.columns {
            // SAFETY: the column lies in the matrix, which nobody writes.
            let column =
                unsafe { slice::from_raw_parts(self.start.cast::<bf16>().add(column * self.apart), self.rows) };
            let at = |i: usize| column.get(i).map_or(0.0, |x| x.to_f32());
            (0..self.rows).step_by(16).for_each(|first| all.extend(LANES.map(|lane| at(first + lane))));
        }
        all
    }
}

unsafe extern "C" {
    /// Of `cuda/emulation/product.cpp`, which a compiler makes quick in any profile.
    fn lsk_emulated_product(
        a: *const f32,
        b: *const f32,
        sums: *mut f32,
        rows: usize,
        columns: usize,
        depth: usize,
        rough: bool,
    );
}

/// `c = aᵀ · b + beta · c`.
///
/// # Safety
/// The matrices are what their sizes say; nobody else uses `c`.
unsafe fn product([a, b, c]: [Matrix; 3], wide: bool, beta: f32, algorithm: u64) {
    // SAFETY: the two are matrices that nobody writes, by what this function asks of its caller.
    let (left, right) = unsafe { (a.sixteens(), b.sixteens()) };
    let mut sums = vec![0f32; c.rows * c.columns];
    let (depth, rough) = (a.rows.next_multiple_of(16), algorithm == ROUGH);
    // SAFETY: both have so many vectors of `depth` numbers, and there is a sum for each two.
    unsafe {
        lsk_emulated_product(left.as_ptr(), right.as_ptr(), sums.as_mut_ptr(), c.rows, c.columns, depth, rough);
    }
    for column in 0..c.columns {
        for row in 0..c.rows {
            let sum = sums[column * c.rows + row];
            let at = column * c.apart + row;
            // What is multiplied by nothing is not read: it may be NaN.
            let add = |sum: f32, before: f32| if beta == 0.0 { sum } else { sum + beta * before };
            // SAFETY: `at` is inside the matrix `c`, which nobody else uses.
            unsafe {
                if wide {
                    let to = c.start.cast::<f32>().add(at);
                    to.write(add(sum, to.read()));
                } else {
                    // Rounded before it is added to, and after, as cuBLAS does.
                    let to = c.start.cast::<bf16>().add(at);
                    to.write(bf16::from_f32(add(bf16::from_f32(sum).to_f32(), to.read().to_f32())));
                }
            }
        }
    }
}

unsafe extern "C" fn multiply(
    handle: *mut c_void,
    product_of: *mut c_void,
    alpha: *const f32,
    a: *const c_void,
    a_of: *mut c_void,
    b: *const c_void,
    b_of: *mut c_void,
    beta: *const f32,
    c: *const c_void,
    c_of: *mut c_void,
    d: *mut c_void,
    d_of: *mut c_void,
    algorithm: *const Algorithm,
    workspace: *mut c_void,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> c_int {
    // SAFETY: the functions above made the handles, and a program gives factors and algorithm.
    let (handle, asked, [a_of, b_of, c_of], [alpha, beta], algorithm) = unsafe {
        let matrices = [a_of, b_of, c_of].map(|of| &*of.cast::<MatrixHandle>());
        let asked = &*product_of.cast::<ProductHandle>();
        (&*handle.cast::<LtHandle>(), asked, matrices, [*alpha, *beta], (*algorithm)[0])
    };
    let wide = c_of.dtype == CUDA_R_32F;
    if (asked.transpose_a, asked.types, alpha) != (OP_T, (COMPUTE_32F, CUDA_R_32F), 1.0)
        || (a_of.dtype, b_of.dtype) != (CUDA_R_16BF, CUDA_R_16BF)
        || !(wide || c_of.dtype == CUDA_R_16BF)
        || (a_of.rows, a_of.columns, b_of.columns) != (b_of.rows, c_of.rows, c_of.columns)
        || !(std::ptr::eq(c, d) && std::ptr::eq(c_of, d_of.cast()))
        || !(ROUGH..=IN_ORDER).contains(&algorithm)
    {
        return INVALID_VALUE;
    }
    let [a, b, c] = [(a, a_of), (b, b_of), (c, c_of)].map(|(start, of)| Matrix::new(start, of));
    // SAFETY: the stream was created, or is null; streams are never given back.
    let Ok(stream) = (unsafe { StreamHandle::of(stream) }) else { return EXECUTION_FAILED };
    let own = std::ptr::eq(stream.device(), &DEVICE[handle.device]);
    if !own || !stream.reaches(workspace.addr(), workspace_bytes) || !workspace.addr().is_multiple_of(256) {
        return INVALID_VALUE;
    }
    let size = if wide { 4 } else { 2 };
    let there = a.on(stream, 2) && b.on(stream, 2) && c.on(stream, size);
    let matrices = Along([a, b, c]);
    stream.run(move || {
        let Along(matrices) = { matrices };
        if !there {
            return Err(cudaError::cudaErrorIllegalAddress);
        }
        // SAFETY: they lie in device memory, as was found above, ordered by the stream.
        unsafe { product(matrices, wide, beta, algorithm) };
        Ok(())
    });
    SUCCESS
}
