//! What the runtime hands out, freed on drop.
//!
//! **Invariant**: a handle is made on its device and freed once. Once the context is lost nothing is freed: the calls would
//! fail, and the driver frees all of it with the process.

use std::{
    any::Any,
    ffi::{CStr, c_int, c_uint, c_void},
    ptr,
    sync::OnceLock,
};

use super::{
    Cuda,
    sys::{self, cudaError as Code},
};
use crate::{
    device::{Device, DevicePtr},
    error::{Error, Result},
    layout::DEVICE_ALIGN,
};

impl Cuda {
    /// Frees something, unless the context is lost. Nothing can be done about an error in a drop.
    fn free(&self, free: impl FnOnce() -> Code) {
        let _ = self.call(String::new, free);
    }
}

/// Device memory. Dropping it waits for the device, as `cudaFree` does.
pub struct CudaMemory {
    cuda: Cuda,
    start: *mut c_void,
}

// SAFETY: an address that any thread may free; only the device follows it.
unsafe impl Send for CudaMemory {}
// SAFETY: a shared reference only reads the address.
unsafe impl Sync for CudaMemory {}

impl CudaMemory {
    pub(super) fn new(cuda: &Cuda, what: &'static str, bytes: usize) -> Result<Self> {
        cuda.bind_thread()?;
        let mut start = ptr::null_mut();
        // SAFETY: the result goes to a local. CUDA aligns to 256 bytes at least.
        match unsafe { sys::cudaMalloc(&mut start, bytes.max(DEVICE_ALIGN)) } {
            Code::cudaSuccess => Ok(Self { cuda: cuda.clone(), start }),
            code => {
                let free = (code == Code::cudaErrorMemoryAllocation).then(|| cuda.memory().ok()).flatten();
                let remedy = free.map(|(free, total)| {
                    format!(
                        "{free} of the GPU's {total} bytes are free: use smaller settings, or end what else uses it"
                    )
                });
                Err(cuda.fault(format!("reserve {bytes} bytes of device memory for {what}"), code, remedy))
            }
        }
    }

    pub(super) fn address(&self) -> DevicePtr {
        DevicePtr::new(self.start.cast())
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // SAFETY: it came from cudaMalloc, and is freed here only.
        self.cuda.free(|| unsafe { sys::cudaFree(self.start) });
    }
}

/// Host memory that is locked and known to every device.
pub struct CudaRegistration {
    cuda: Cuda,
    start: *mut c_void,
}

// SAFETY: an address that any thread may hand back.
unsafe impl Send for CudaRegistration {}

impl CudaRegistration {
    /// # Safety
    /// The memory outlives the registration.
    pub(super) unsafe fn new(cuda: &Cuda, host: *mut u8, bytes: usize) -> Result<Self> {
        cuda.bind_thread()?;
        let start = host.cast();
        // SAFETY: the caller promised memory of that length, which outlives the registration.
        match unsafe { sys::cudaHostRegister(start, bytes, sys::cudaHostRegisterPortable as c_uint) } {
            Code::cudaSuccess => Ok(Self { cuda: cuda.clone(), start }),
            code => {
                let remedy = match code {
                    Code::cudaErrorHostMemoryAlreadyRegistered => "it is registered already: register it once",
                    _ => {
                        "the system locks no more memory: use a smaller n_cpu_pinned, or raise RLIMIT_MEMLOCK (ulimit -l) \
                         or the container's memory limit"
                    }
                };
                Err(cuda.fault(format!("register {bytes} bytes of host memory"), code, Some(remedy.into())))
            }
        }
    }
}

impl Drop for CudaRegistration {
    fn drop(&mut self) {
        // SAFETY: it was registered, and is unregistered here only.
        self.cuda.free(|| unsafe { sys::cudaHostUnregister(self.start) });
    }
}

/// A stream that does not wait for the default stream, or the caller's own.
pub struct CudaStream {
    cuda: Cuda,
    raw: sys::cudaStream_t,
    owned: bool,
    /// Marks the end of the work when the stream is drained.
    end: CudaEvent,
    /// What kernels keep per stream, so that no two streams share anything.
    pub(crate) math: OnceLock<Box<dyn Any + Send>>,
}

// SAFETY: a handle that any thread may use; the rest is Send.
unsafe impl Send for CudaStream {}

impl CudaStream {
    pub(super) fn new(cuda: &Cuda, _name: &CStr) -> Result<Self> {
        let end = CudaEvent::new(cuda)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the result goes to a local.
        let create = || unsafe { sys::cudaStreamCreateWithFlags(&mut raw, sys::cudaStreamNonBlocking as c_uint) };
        cuda.call(|| "create a stream".into(), create)?;
        #[cfg(feature = "nvtx")]
        // SAFETY: a stream that was created just now; NVTX has the same type under a name of its own.
        unsafe {
            nvtx_sys::name_cuda_stream_ascii(raw.cast(), _name);
        }
        Ok(Self { cuda: cuda.clone(), raw, owned: true, end, math: OnceLock::new() })
    }

    /// # Safety
    /// The stream exists until this is dropped.
    pub(super) unsafe fn borrow(cuda: &Cuda, raw: sys::cudaStream_t) -> Result<Self> {
        let unsupported = |what: &str, remedy: &str| Error::Unsupported { what: what.into(), remedy: remedy.into() };
        if raw.addr() == PER_THREAD {
            let remedy = "it is another stream in every thread: pass one made with cudaStreamCreateWithFlags";
            return Err(unsupported("the per-thread default stream", remedy));
        }
        let mut status = sys::cudaStreamCaptureStatus::cudaStreamCaptureStatusNone;
        // SAFETY: the stream exists, and the result goes to a local.
        let ask = || unsafe { sys::cudaStreamIsCapturing(raw, &mut status) };
        cuda.call(|| "use the caller's stream".into(), ask)?;
        if status != sys::cudaStreamCaptureStatus::cudaStreamCaptureStatusNone {
            let remedy = "layers cannot be streamed into a graph: end the capture first";
            return Err(unsupported("a stream that is capturing", remedy));
        }
        let stream = Self { cuda: cuda.clone(), raw, owned: false, end: CudaEvent::new(cuda)?, math: OnceLock::new() };
        // A stream of another device refuses this device's events: better now than in the first pass.
        cuda.record(&stream.end, &stream)?;
        Ok(stream)
    }

    /// The `cudaStream_t`.
    pub fn as_ptr(&self) -> *mut c_void {
        self.raw.cast()
    }

    pub(crate) fn raw(&self) -> sys::cudaStream_t {
        self.raw
    }

    pub(super) fn end(&self) -> &CudaEvent {
        &self.end
    }
}

/// `cudaStreamPerThread`, a cast in the header that bindgen passes over.
const PER_THREAD: usize = 2;

impl Drop for CudaStream {
    fn drop(&mut self) {
        drop(self.math.take());
        if self.owned {
            // SAFETY: created by us, destroyed here only; work that is under way is finished first.
            self.cuda.free(|| unsafe { sys::cudaStreamDestroy(self.raw) });
        }
    }
}

/// An event, without timing unless it was made for that; a thread that waits for it sleeps.
pub struct CudaEvent {
    cuda: Cuda,
    raw: sys::cudaEvent_t,
}

// SAFETY: a handle that any thread may use.
unsafe impl Send for CudaEvent {}
// SAFETY: the runtime's calls on one event may come from several threads.
unsafe impl Sync for CudaEvent {}

impl CudaEvent {
    pub(super) fn new(cuda: &Cuda) -> Result<Self> {
        Self::with(cuda, sys::cudaEventDisableTiming)
    }

    pub(super) fn timed(cuda: &Cuda) -> Result<Self> {
        Self::with(cuda, 0)
    }

    fn with(cuda: &Cuda, timing: c_int) -> Result<Self> {
        cuda.bind_thread()?;
        let flags = (timing | sys::cudaEventBlockingSync) as c_uint;
        let mut raw = ptr::null_mut();
        // SAFETY: the result goes to a local.
        cuda.call(|| "create an event".into(), || unsafe { sys::cudaEventCreateWithFlags(&mut raw, flags) })?;
        Ok(Self { cuda: cuda.clone(), raw })
    }

    pub(super) fn raw(&self) -> sys::cudaEvent_t {
        self.raw
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed here only; the runtime lets a pending record finish.
        self.cuda.free(|| unsafe { sys::cudaEventDestroy(self.raw) });
    }
}
