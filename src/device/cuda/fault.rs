//! CUDA's error codes as [`Error`]s, with what to do about them.

use std::ffi::{CStr, c_char};

use super::sys::{self, cudaError as Code};
use crate::error::Error;

/// Whether the code means that the context is lost: the runtime's header says of these that every later call returns the
/// same, and of the last two that the hardware failed or the runtime is gone.
pub(super) fn ends_context(code: Code) -> bool {
    matches!(
        code,
        Code::cudaErrorIllegalAddress
            | Code::cudaErrorLaunchTimeout
            | Code::cudaErrorAssert
            | Code::cudaErrorHardwareStackError
            | Code::cudaErrorIllegalInstruction
            | Code::cudaErrorMisalignedAddress
            | Code::cudaErrorInvalidAddressSpace
            | Code::cudaErrorInvalidPc
            | Code::cudaErrorLaunchFailure
            | Code::cudaErrorMpsClientTerminated
            | Code::cudaErrorExternalDevice
            | Code::cudaErrorECCUncorrectable
            | Code::cudaErrorNvlinkUncorrectable
            | Code::cudaErrorContextIsDestroyed
            | Code::cudaErrorCudartUnloading
    ) || NAMELESS.contains(&code.0)
}

/// `cudaErrorContained` and `cudaErrorTensorMemoryLeak`, for which older toolkits have no names.
const NAMELESS: [u32; 2] = [226, 721];

/// The error of an operation that returned `code`, with the remedy that belongs to the code unless there is a better one.
pub(super) fn error(operation: String, code: Code, remedy: Option<String>) -> Error {
    // SAFETY: both take any code, and return strings that are never freed.
    let (name, message) = unsafe { (text(sys::cudaGetErrorName(code)), text(sys::cudaGetErrorString(code))) };
    Error::Cuda { operation, name, message, remedy: remedy.unwrap_or_else(|| self::remedy(code).into()) }
}

/// # Safety
/// `string` is null, or a string that is never freed.
unsafe fn text(string: *const c_char) -> &'static str {
    if string.is_null() {
        return "unknown error";
    }
    // SAFETY: the caller promised a terminated text that is never freed.
    unsafe { CStr::from_ptr(string) }.to_str().unwrap_or("unknown error")
}

fn remedy(code: Code) -> &'static str {
    match code {
        code if ends_context(code) => {
            "work enqueued earlier has failed and its context on the GPU is lost: find the kernel with compute-sanitizer, \
             and start the process anew"
        }
        Code::cudaErrorMemoryAllocation => "use smaller settings, or end what else uses the GPU",
        Code::cudaErrorDevicesUnavailable => "another process has the GPU for itself: end it, or choose another GPU",
        Code::cudaErrorNoKernelImageForDevice
        | Code::cudaErrorInvalidDeviceFunction
        | Code::cudaErrorUnsupportedPtxVersion => {
            "this build has no kernels for this GPU: build with its architecture in LAYER_STREAMER_CUDA_ARCHS"
        }
        Code::cudaErrorSystemNotReady | Code::cudaErrorSystemDriverMismatch => {
            "the driver was updated or is still starting: restart the machine, or wait for it"
        }
        Code::cudaErrorStreamCaptureUnsupported
        | Code::cudaErrorStreamCaptureInvalidated
        | Code::cudaErrorStreamCaptureIsolation
        | Code::cudaErrorStreamCaptureImplicit => "layers cannot be streamed into a graph: end the capture first",
        Code::cudaErrorInvalidResourceHandle => "the stream belongs to another GPU, or was destroyed",
        _ => "",
    }
}
