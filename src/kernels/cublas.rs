//! cuBLAS, opened at run time: nothing of it is needed to build, nor to run without products.
//!
//! That is why its few types and numbers are written down here and not bound by `cuda-sys`: a toolkit that can build the crate
//! may have no `cublas_api.h`, as the one of `ci/cuda-toolkit` has none.

#[cfg(cuda_emulated)]
mod emulated;

use std::{
    ffi::{CStr, c_char, c_int, c_void},
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
const NAMES: [&CStr; 2] = [c"libcublas.so.13", c"libcublas.so.12"];

/// What NVIDIA recommends for Hopper (cuBLAS documentation, `cublasSetWorkspace`), and more than for any other.
pub(super) const WORKSPACE: usize = 32 << 20;

type CublasHandle = *mut c_void;
type Status = c_int;

// From cublas_api.h and library_types.h, where these numbers are part of the binary interface.
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const GEMM_DEFAULT: c_int = -1;
/// Partial sums are added up as F32, not as the output's type.
const DISALLOW_REDUCED_PRECISION_REDUCTION: c_int = 16;

/// Declares the functions with their C signatures, and how to find them.
macro_rules! library {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        #[derive(Clone, Copy)]
        struct Library { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Library {
            /// # Safety
            /// `symbol` finds functions of a cuBLAS that stays open.
            unsafe fn find(symbol: impl Fn(&'static CStr) -> *mut c_void) -> Result<Self, &'static CStr> {
                $(
                    let $field = symbol($symbol);
                    if $field.is_null() {
                        return Err($symbol);
                    }
                )*
                // SAFETY: the functions have these types in every cuBLAS since 11.4.
                Ok(unsafe { Self {
                    $($field: std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>($field),)*
                } })
            }
        }
    };
}
library! {
    create = c"cublasCreate_v2": fn(*mut CublasHandle) -> Status;
    destroy = c"cublasDestroy_v2": fn(CublasHandle) -> Status;
    set_stream = c"cublasSetStream_v2": fn(CublasHandle, *mut c_void) -> Status;
    set_workspace = c"cublasSetWorkspace_v2": fn(CublasHandle, *mut c_void, usize) -> Status;
    set_math_mode = c"cublasSetMathMode": fn(CublasHandle, c_int) -> Status;
    status_name = c"cublasGetStatusName": fn(Status) -> *const c_char;
    status_string = c"cublasGetStatusString": fn(Status) -> *const c_char;
    gemm = c"cublasGemmEx": fn(
        CublasHandle, c_int, c_int, c_int, c_int, c_int,
        *const f32, *const c_void, c_int, c_int, *const c_void, c_int, c_int,
        *const f32, *mut c_void, c_int, c_int, c_int, c_int
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

/// One stream's cuBLAS.
///
/// **Invariant**: the handle is made on the stream's device and destroyed once, before the workspace is freed and before the
/// stream is, whose part this is.
pub(super) struct Cublas {
    cuda: Cuda,
    library: Library,
    handle: CublasHandle,
    _workspace: CudaMemory,
}

// SAFETY: a handle may be used by any thread, one at a time.
unsafe impl Send for Cublas {}

impl Cublas {
    pub(super) fn new(cuda: &Cuda, stream: &CudaStream) -> Result<Self> {
        let library = Library::open()?;
        let workspace = cuda.allocate("cuBLAS's workspace", WORKSPACE)?;
        let mut handle = ptr::null_mut();
        // SAFETY: the result goes to a local.
        library.check(|| "start cuBLAS".into(), unsafe { (library.create)(&mut handle) })?;
        let start = cuda.address(&workspace).as_ptr().cast();
        let cublas = Self { cuda: cuda.clone(), library, handle, _workspace: workspace };
        let set = |status| library.check(|| "set up cuBLAS".into(), status);
        // SAFETY: handle and stream exist. Setting the stream takes the workspace away, so that comes first.
        unsafe {
            set((library.set_stream)(handle, stream.as_ptr()))?;
            set((library.set_workspace)(handle, start, WORKSPACE))?;
            set((library.set_math_mode)(handle, DISALLOW_REDUCED_PRECISION_REDUCTION))?;
        }
        Ok(cublas)
    }

    /// `out [T, N] = x [T, K] · weight [N, K]ᵀ + beta · out`, of BF16; `out` may be F32.
    ///
    /// # Safety
    /// The tensors are on the handle's device for as long as its stream works on them.
    pub(super) unsafe fn product(
        &self,
        [tokens, k, n]: [usize; 3],
        (x, weight): (DevicePtr, DevicePtr),
        beta: f32,
        (out, dtype): (DevicePtr, DType),
    ) -> Result<()> {
        let operation = || format!("multiply [{tokens}, {k}] by [{n}, {k}] transposed");
        let [Ok(columns), Ok(rows), Ok(depth)] = [n, tokens, k].map(c_int::try_from) else {
            return Err(Error::Kernel { kernel: "linear", cause: format!("cannot {}: too large", operation()) });
        };
        let out_type = if dtype == DType::F32 { CUDA_R_32F } else { CUDA_R_16BF };
        let [x, weight, out] = [x, weight, out].map(|at| at.as_ptr().cast::<c_void>());
        let mut status = 0;
        // Row-major is the transpose of cuBLAS's column-major: outᵀ [N, T] = weight · xᵀ.
        // SAFETY: the handle is open, and the caller promises that the tensors are on its device while its stream works on them;
        // `&1.0` and `&beta` are read before the call returns.
        let product = || unsafe {
            status = (self.library.gemm)(
                self.handle,
                OP_T,
                OP_N,
                columns,
                rows,
                depth,
                &1.0,
                weight,
                CUDA_R_16BF,
                depth.max(1),
                x,
                CUDA_R_16BF,
                depth.max(1),
                &beta,
                out,
                out_type,
                columns,
                COMPUTE_32F,
                GEMM_DEFAULT,
            );
            cudaError::cudaSuccess
        };
        self.cuda.call(operation, product)?;
        self.library.check(operation, status)
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        let destroy = || {
            // SAFETY: destroyed here only, while the context is there.
            unsafe { (self.library.destroy)(self.handle) };
            cudaError::cudaSuccess
        };
        // Nothing can be done about an error in a drop.
        let _ = self.cuda.call(String::new, destroy);
    }
}
