//! cuBLASLt, opened at run time: nothing of it is needed to build, nor to run without products of many rows.
//!
//! That is why its few types and numbers are written down here and not bound by `cuda-sys`: a toolkit that can build the crate
//! may have no `cublasLt.h`, as the one of `ci/cuda-toolkit` has none.

#[cfg(cuda_emulated)]
mod emulated;

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::MaybeUninit,
    ptr,
    sync::OnceLock,
};

use crate::{
    device::{
        CudaMemory, CudaStream, Device, DevicePtr,
        cuda::{Cuda, sys::cudaError},
    },
    dtype::DType,
    error::{Error, Result},
};

#[cfg(not(cuda_emulated))]
/// Newest first. Any of them works beside the runtime in this binary: what they share is the driver's.
const NAMES: [&CStr; 2] = [c"libcublasLt.so.13", c"libcublasLt.so.12"];

/// Algorithms that split no sum take next to nothing.
pub(super) const WORKSPACE: usize = 1 << 20;

/// How many algorithms are asked for, the best first by what cuBLAS believes.
const MOST_ALGORITHMS: usize = 8;

type Status = c_int;

// From cublasLt.h, cublas_api.h and library_types.h, where these numbers are part of the binary interface.
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const OP_T: c_int = 1;
const DESC_TRANSA: c_int = 3;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
/// Of the first factor, then of the second, of what is added, and of the result.
const PREF_MIN_ALIGNMENT_BYTES: [c_int; 4] = [5, 6, 7, 8];
const REDUCTION_SCHEME_NONE: u32 = 0;

/// `cublasLtMatmulAlgo_t`
pub(super) type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// Declares the functions with their C signatures, and how to find them.
macro_rules! library {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        #[derive(Clone, Copy)]
        struct Library { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Library {
            /// # Safety
            /// `symbol` finds functions of a cuBLASLt that stays open.
            unsafe fn find(symbol: impl Fn(&'static CStr) -> *mut c_void) -> Result<Self, &'static CStr> {
                $(
                    let $field = symbol($symbol);
                    if $field.is_null() {
                        return Err($symbol);
                    }
                )*
                // SAFETY: the functions have these types in every cuBLASLt since 11.4.
                Ok(unsafe { Self {
                    $($field: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>($field),)*
                } })
            }
        }
    };
}
library! {
    create = c"cublasLtCreate": fn(*mut *mut c_void) -> Status;
    destroy = c"cublasLtDestroy": fn(*mut c_void) -> Status;
    status_name = c"cublasLtGetStatusName": fn(Status) -> *const c_char;
    status_string = c"cublasLtGetStatusString": fn(Status) -> *const c_char;
    create_product = c"cublasLtMatmulDescCreate": fn(*mut *mut c_void, c_int, c_int) -> Status;
    set_product = c"cublasLtMatmulDescSetAttribute": fn(*mut c_void, c_int, *const c_void, usize) -> Status;
    destroy_product = c"cublasLtMatmulDescDestroy": fn(*mut c_void) -> Status;
    create_matrix = c"cublasLtMatrixLayoutCreate": fn(*mut *mut c_void, c_int, u64, u64, i64) -> Status;
    destroy_matrix = c"cublasLtMatrixLayoutDestroy": fn(*mut c_void) -> Status;
    create_preference = c"cublasLtMatmulPreferenceCreate": fn(*mut *mut c_void) -> Status;
    set_preference = c"cublasLtMatmulPreferenceSetAttribute": fn(*mut c_void, c_int, *const c_void, usize) -> Status;
    destroy_preference = c"cublasLtMatmulPreferenceDestroy": fn(*mut c_void) -> Status;
    algorithms = c"cublasLtMatmulAlgoGetHeuristic": fn(
        *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void,
        c_int, *mut Heuristic, *mut c_int
    ) -> Status;
    multiply = c"cublasLtMatmul": fn(
        *mut c_void, *mut c_void, *const f32, *const c_void, *mut c_void, *const c_void, *mut c_void,
        *const f32, *const c_void, *mut c_void, *mut c_void, *mut c_void,
        *const Algorithm, *mut c_void, usize, *mut c_void
    ) -> Status;
}

impl Library {
    /// The library, opened once for the process and never closed.
    fn open() -> Result<Self> {
        static OPENED: OnceLock<Result<Library>> = OnceLock::new();
        OPENED.get_or_init(Self::try_open).clone()
    }

    #[cfg(cuda_emulated)]
    fn try_open() -> Result<Self> {
        // SAFETY: the symbols are functions of this program, which stay as long as it runs.
        Ok(unsafe { Self::find(emulated::symbol) }.expect("the emulation has them all"))
    }

    #[cfg(not(cuda_emulated))]
    fn try_open() -> Result<Self> {
        let mut causes = Vec::new();
        for name in NAMES {
            // SAFETY: the name ends with a zero; what the library runs when it is opened is NVIDIA's.
            let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            if library.is_null() {
                // SAFETY: after a failure it is a string, until this thread's next call.
                causes.push(unsafe { text(libc::dlerror()) }.to_string_lossy().into_owned());
                continue;
            }
            // SAFETY: it is never closed, and the names end with a zero.
            match unsafe { Self::find(|symbol| libc::dlsym(library, symbol.as_ptr())) } {
                Ok(found) => return Ok(found),
                Err(symbol) => causes.push(format!("{name:?} has no {symbol:?}")),
            }
        }
        Err(Error::Unsupported {
            what: format!("a matrix product on CUDA without cuBLAS ({})", causes.join("; ")),
            remedy: "install cuBLAS 12 or 13 (PyTorch brings it: nvidia/cublas/lib or nvidia/cu13/lib in site-packages), and \
                     start with LD_LIBRARY_PATH naming its folder"
                .into(),
        })
    }

    /// An error, unless the call went well.
    fn check(&self, operation: impl FnOnce() -> String, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: both take any status, and return strings that are never freed.
        let [name, message] = unsafe { [text((self.status_name)(status)), text((self.status_string)(status))] }
            .map(|text| text.to_str().unwrap_or("unknown status"));
        let remedy = match name {
            "CUBLAS_STATUS_NOT_INITIALIZED" | "CUBLAS_STATUS_ALLOC_FAILED" => {
                "the GPU's memory may be full: use smaller settings; or this cuBLAS is newer than the driver"
            }
            "CUBLAS_STATUS_ARCH_MISMATCH" => "this cuBLAS does not know the GPU: use a newer one",
            _ => "",
        };
        Err(Error::Cuda { operation: operation(), name, message, remedy: remedy.into() })
    }
}

/// # Safety
/// `string` is null, or a string that is never freed.
unsafe fn text(string: *const c_char) -> &'static CStr {
    // SAFETY: it is not null, so it is a string that is never freed, as the caller promises.
    if string.is_null() { c"unknown status" } else { unsafe { CStr::from_ptr(string) } }
}

/// Something of cuBLASLt's.
///
/// **Invariant**: made by the library, and destroyed here, once.
struct Handle {
    at: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void) -> Status,
}

// SAFETY: a handle may be used by any thread, one at a time.
unsafe impl Send for Handle {}

impl Handle {
    fn new(
        library: &Library,
        destroy: unsafe extern "C" fn(*mut c_void) -> Status,
        create: impl FnOnce(*mut *mut c_void) -> Status,
    ) -> Result<Self> {
        let mut at = ptr::null_mut();
        library.check(|| "set up cuBLAS".into(), create(&mut at))?;
        Ok(Self { at, destroy })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: destroyed here only. Nothing can be done about an error in a drop.
        let _ = unsafe { (self.destroy)(self.at) };
    }
}

/// What a product's tensors are: rows, K, N, the type of `out`, and the boundaries that `weight`, `x` and `out` begin on, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) sizes: [usize; 3],
    pub(super) out: DType,
    pub(super) aligned: [u32; 3],
}

/// Where a product's tensors are.
#[derive(Clone, Copy)]
pub(super) struct Tensors {
    pub(super) x: DevicePtr,
    pub(super) weight: DevicePtr,
    pub(super) out: DevicePtr,
}

/// A shape, as cuBLASLt is told of it: the product, then `weight`, `x` and `out`. Row-major is the transpose of cuBLAS's column-major:
/// outᵀ [N, T] = weight · xᵀ.
pub(super) struct Description {
    shape: Shape,
    product: Handle,
    matrices: [Handle; 3],
}

/// One stream's cuBLASLt.
///
/// **Invariant**: the handle is made on the stream's device, and destroyed before the workspace is freed.
pub(super) struct Cublas {
    cuda: Cuda,
    library: Library,
    handle: Handle,
    workspace: CudaMemory,
}

impl Cublas {
    pub(super) fn new(cuda: &Cuda) -> Result<Self> {
        let library = Library::open()?;
        let workspace = cuda.allocate("cuBLAS's workspace", WORKSPACE)?;
        // SAFETY: the result goes to a local.
        let handle = Handle::new(&library, library.destroy, |to| unsafe { (library.create)(to) })?;
        Ok(Self { cuda: cuda.clone(), library, handle, workspace })
    }

    pub(super) fn describe(&self, shape: Shape) -> Result<Description> {
        let (library, [rows, k, n]) = (&self.library, shape.sizes);
        if shape.sizes.iter().any(|size| c_int::try_from(*size).is_err()) {
            return Err(Error::Kernel { kernel: "linear", cause: format!("cannot {}: too large", shape.operation()) });
        }
        // SAFETY: the result goes to a local.
        let create = |to| unsafe { (library.create_product)(to, COMPUTE_32F, CUDA_R_32F) };
        let product = Handle::new(library, library.destroy_product, create)?;
        // SAFETY: the product was made, and the attribute is a c_int.
        let set =
            unsafe { (library.set_product)(product.at, DESC_TRANSA, ptr::from_ref(&OP_T).cast(), size_of::<c_int>()) };
        library.check(|| "set up cuBLAS".into(), set)?;
        let matrix = |dtype, rows: usize, columns: usize| {
            // SAFETY: the result goes to a local.
            let create =
                |to| unsafe { (library.create_matrix)(to, dtype, rows as u64, columns as u64, rows.max(1) as i64) };
            Handle::new(library, library.destroy_matrix, create)
        };
        let out = if shape.out == DType::F32 { CUDA_R_32F } else { CUDA_R_16BF };
        let matrices = [matrix(CUDA_R_16BF, k, n)?, matrix(CUDA_R_16BF, k, rows)?, matrix(out, n, rows)?];
        Ok(Description { shape, product, matrices })
    }

    /// Algorithms that split no sum, the fastest first by what cuBLAS believes. None where it has none.
    pub(super) fn algorithms(&self, of: &Description) -> Result<Vec<Algorithm>> {
        let library = &self.library;
        // SAFETY: the result goes to a local.
        let create = |to| unsafe { (library.create_preference)(to) };
        let preference = Handle::new(library, library.destroy_preference, create)?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference was made, and the value is so many bytes long, which are copied.
            let status = unsafe { (library.set_preference)(preference.at, attribute, value, bytes) };
            library.check(|| "set up cuBLAS".into(), status)
        };
        set(PREF_MAX_WORKSPACE_BYTES, ptr::from_ref(&WORKSPACE).cast(), size_of::<usize>())?;
        set(PREF_REDUCTION_SCHEME_MASK, ptr::from_ref(&REDUCTION_SCHEME_NONE).cast(), size_of::<u32>())?;
        let [weight, x, out] = of.shape.aligned;
        for (attribute, aligned) in PREF_MIN_ALIGNMENT_BYTES.into_iter().zip([weight, x, out, out]) {
            set(attribute, ptr::from_ref(&aligned).cast(), size_of::<u32>())?;
        }
        let mut found = [MaybeUninit::<Heuristic>::uninit(); MOST_ALGORITHMS];
        let mut count = 0;
        let [weight, x, out] = of.matrices.each_ref().map(|matrix| matrix.at);
        // SAFETY: all handles were made; there is room for so many results.
        let _none = unsafe {
            (library.algorithms)(
                self.handle.at,
                of.product.at,
                weight,
                x,
                out,
                out,
                preference.at,
                MOST_ALGORITHMS as c_int,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        };
        // SAFETY: the first `count` were written.
        let found = found[..count.max(0) as usize].iter().map(|found| unsafe { found.assume_init() });
        Ok(found.filter(|found| found.state == 0).map(|found| found.algorithm).collect())
    }

    /// `out = x · weightᵀ + beta · out`.
    ///
    /// # Safety
    /// The tensors are of this shape and on the handle's device, for as long as the stream works on them, which is this handle's.
    pub(super) unsafe fn multiply(
        &self,
        of: &Description,
        algorithm: &Algorithm,
        beta: f32,
        tensors: Tensors,
        stream: &CudaStream,
    ) -> Result<()> {
        let Tensors { x, weight, out } = tensors;
        let [x, weight, out] = [x, weight, out].map(|at| at.as_ptr().cast::<c_void>());
        let [weight_matrix, x_matrix, out_matrix] = of.matrices.each_ref().map(|matrix| matrix.at);
        let workspace = self.cuda.address(&self.workspace).as_ptr().cast();
        let mut status = 0;
        // SAFETY: all handles were made, and the caller promises that the tensors are what they tell, on their device while the stream
        // works on them; `&1.0` and `&beta` are read before the call returns. The workspace is used by this stream alone.
        let multiply = || unsafe {
            status = (self.library.multiply)(
                self.handle.at,
                of.product.at,
                &1.0,
                weight,
                weight_matrix,
                x,
                x_matrix,
                &beta,
                out,
                out_matrix,
                out,
                out_matrix,
                algorithm,
                workspace,
                WORKSPACE,
                stream.as_ptr(),
            );
            cudaError::cudaSuccess
        };
        self.cuda.call(|| of.shape.operation(), multiply)?;
        self.library.check(|| of.shape.operation(), status)
    }
}

impl Shape {
    pub(super) fn operation(self) -> String {
        let [tokens, k, n] = self.sizes;
        format!("multiply [{tokens}, {k}] by [{n}, {k}] transposed")
    }
}
