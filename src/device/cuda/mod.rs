//! NVIDIA GPUs through the CUDA runtime: raw asynchronous copies between registered host memory and the card, on streams
//! that nothing else waits for.
//!
//! Memory, streams and events keep the device alive and are freed on drop. A fault in a kernel loses the context: the
//! first call that sees it keeps the error, every later one returns that same error without asking CUDA, and nothing is
//! freed any more.

#[cfg(cuda_emulated)]
pub mod emulation;
mod fault;
mod handles;
pub(crate) mod sys;

use std::{
    ffi::{CStr, c_int, c_void},
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

pub use handles::{CudaEvent, CudaMemory, CudaRegistration, CudaStream};
use sys::{cudaDeviceAttr as Attribute, cudaError as Code};

use crate::{
    device::{Device, DevicePtr, StreamId},
    dtype::DType,
    error::{Error, Result},
    packed::Parts,
    quantised::{INPUTS, Recipe, Scheme},
};

/// One GPU. Cloning gives another handle of the same.
#[derive(Clone)]
pub struct Cuda(Arc<CudaState>);

struct CudaState {
    ordinal: c_int,
    name: String,
    capability: (i32, i32),
    multiprocessors: i32,
    /// The error that lost the context.
    dead: OnceLock<Error>,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({})", self.0.ordinal)
    }
}

impl Cuda {
    /// Makes GPU `ordinal`, counted from 0 as `CUDA_VISIBLE_DEVICES` leaves them, ready for use, and this thread's.
    ///
    /// # Errors
    /// [`Error::Cuda`] without a driver or a GPU, with too old a driver, or for an ordinal beyond the last;
    /// [`Error::Unsupported`] for a GPU older than Ampere (sm_80).
    pub fn new(ordinal: u32) -> Result<Self> {
        let operation = || format!("use cuda:{ordinal}");
        let mut count = 0;
        // SAFETY: the result goes to a local.
        let counted = unsafe { sys::cudaGetDeviceCount(&mut count) };
        if counted != Code::cudaSuccess {
            return Err(fault::error(operation(), counted, no_gpu(counted)));
        }
        let ordinal = match c_int::try_from(ordinal) {
            Ok(ordinal) if ordinal < count => ordinal,
            _ => {
                let there =
                    if count == 1 { "cuda:0 is the only GPU".into() } else { format!("there are {count} GPUs") };
                return Err(fault::error(operation(), Code::cudaErrorInvalidDevice, Some(there)));
            }
        };
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the result goes to a local.
            let code = unsafe { sys::cudaDeviceGetAttribute(&mut value, attribute, ordinal) };
            if code == Code::cudaSuccess { Ok(value) } else { Err(fault::error(operation(), code, None)) }
        };
        let mut name = [0u8; 256];
        // SAFETY: the name, cut to fit, goes to the array.
        let named = unsafe { sys::lsk_device_name(name.as_mut_ptr().cast(), name.len(), ordinal) };
        if named != Code::cudaSuccess {
            return Err(fault::error(operation(), named, None));
        }
        let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        let capability = (
            attribute(Attribute::cudaDevAttrComputeCapabilityMajor)?,
            attribute(Attribute::cudaDevAttrComputeCapabilityMinor)?,
        );
        if capability < (8, 0) {
            let what = format!("cuda:{ordinal} ({name}, sm_{}{})", capability.0, capability.1);
            return Err(Error::Unsupported { what, remedy: "it takes sm_80 (Ampere) or newer".into() });
        }
        let multiprocessors = attribute(Attribute::cudaDevAttrMultiProcessorCount)?;
        let cuda = Self(Arc::new(CudaState { ordinal, name, capability, multiprocessors, dead: OnceLock::new() }));
        cuda.bind_thread()?;
        // SAFETY: freeing nothing is allowed, and makes the runtime create the context.
        cuda.call(operation, || unsafe { sys::cudaFree(std::ptr::null_mut()) })?;
        // Left to itself the runtime loads a kernel at its first launch, and may wait for the whole device there.
        // SAFETY: it takes nothing.
        cuda.call(|| "load the kernels".into(), || unsafe { sys::lsk_load() })?;
        Ok(cuda)
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal as u32
    }

    /// What it is, without its number.
    #[cfg(feature = "model")]
    pub(crate) fn model(&self) -> String {
        let CudaState { name, capability: (major, minor), multiprocessors, .. } = &*self.0;
        format!("{name} (sm_{major}{minor}, {multiprocessors} multiprocessors)")
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors as usize
    }

    /// Device memory in bytes: free, and in all. Other processes count.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind_thread()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the results go to locals.
        self.call(|| "ask for free memory".into(), || unsafe { sys::cudaMemGetInfo(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// A stream of the caller's, a `cudaStream_t`, to enqueue on. It is not destroyed on drop.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for the per-thread default stream, which is another stream in every thread, and for a stream
    /// that is capturing a graph; [`Error::Cuda`] for a stream of another GPU.
    ///
    /// # Safety
    /// The stream exists until this handle is dropped.
    pub unsafe fn stream_from_raw(&self, raw: *mut c_void) -> Result<CudaStream> {
        // SAFETY: the caller promised that the stream is one of this device and outlives the handle.
        unsafe { CudaStream::borrow(self, raw.cast()) }
    }

    /// Calls CUDA, unless the context is lost. Whatever loses it is kept.
    pub(crate) fn call(&self, operation: impl FnOnce() -> String, call: impl FnOnce() -> Code) -> Result<()> {
        self.alive()?;
        match call() {
            Code::cudaSuccess => Ok(()),
            code => Err(self.fault(operation(), code, None)),
        }
    }

    /// The error of a call that returned `code`; the first one, if the context was lost meanwhile.
    fn fault(&self, operation: String, code: Code, remedy: Option<String>) -> Error {
        let error = fault::error(operation, code, remedy);
        if fault::ends_context(code) { self.0.dead.get_or_init(|| error).clone() } else { error }
    }

    /// Whether the context is still there; the error that lost it if not.
    pub(crate) fn alive(&self) -> Result<()> {
        self.0.dead.get().map_or(Ok(()), |error| Err(error.clone()))
    }
}

/// What to do where the runtime finds no GPU.
fn no_gpu(code: Code) -> Option<String> {
    let (mut driver, mut runtime) = (0, 0);
    // SAFETY: the results go to locals; without a driver its version is 0.
    unsafe {
        let _ = sys::cudaDriverGetVersion(&mut driver);
        let _ = sys::cudaRuntimeGetVersion(&mut runtime);
    }
    let version = |number: c_int| format!("{}.{}", number / 1000, number % 1000 / 10);
    let (serves, needed) = (version(driver), version(runtime));
    match code {
        Code::cudaErrorInsufficientDriver if driver == 0 => Some("no usable GPU: there is no NVIDIA driver".into()),
        Code::cudaErrorInsufficientDriver => Some(format!(
            "the driver serves CUDA {serves}, this build needs {needed}: update the driver, or build with CUDA {serves}"
        )),
        Code::cudaErrorNoDevice => Some("no usable GPU: there is none, or CUDA_VISIBLE_DEVICES hides it".into()),
        _ => None,
    }
}

/// The type's code in `kernels.h`. Types that cannot be converted have one that the launcher refuses.
pub(crate) fn code_of(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => sys::LSK_F32,
        DType::F16 => sys::LSK_F16,
        DType::BF16 => sys::LSK_BF16,
        DType::F8E4M3 => sys::LSK_F8E4M3,
        DType::Q4_0 => sys::LSK_Q4_0,
        DType::Q4_1 => sys::LSK_Q4_1,
        DType::Q5_0 => sys::LSK_Q5_0,
        DType::Q5_1 => sys::LSK_Q5_1,
        DType::Q8_0 => sys::LSK_Q8_0,
        DType::Q2_K => sys::LSK_Q2_K,
        DType::Q3_K => sys::LSK_Q3_K,
        DType::Q4_K => sys::LSK_Q4_K,
        DType::Q5_K => sys::LSK_Q5_K,
        DType::Q6_K => sys::LSK_Q6_K,
        DType::IQ4_NL => sys::LSK_IQ4_NL,
        DType::IQ4_XS => sys::LSK_IQ4_XS,
        DType::MXFP4 => sys::LSK_MXFP4,
        _ => -1,
    }
}

// SAFETY: CUDA's own rules; its memory is freed once the work before is done, and handles tell streams apart.
unsafe impl Device for Cuda {
    type Stream = CudaStream;
    type Event = CudaEvent;
    type Memory = CudaMemory;
    type Registration = CudaRegistration;

    fn describe(&self) -> String {
        let CudaState { ordinal, name, capability: (major, minor), .. } = &*self.0;
        let memory = self.memory().map(|(_, total)| format!(", {:.1} GiB", total as f64 / f64::from(1 << 30)));
        format!("cuda:{ordinal} ({name}, sm_{major}{minor}{})", memory.unwrap_or_default())
    }

    fn bind_thread(&self) -> Result<()> {
        let ordinal = self.0.ordinal;
        // SAFETY: any ordinal may be asked for.
        self.call(|| format!("make cuda:{ordinal} the thread's device"), || unsafe { sys::cudaSetDevice(ordinal) })
    }

    fn memory_is_ram(&self) -> bool {
        false
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.memory()?.0)
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<CudaMemory> {
        CudaMemory::new(self, what, bytes)
    }

    fn address(&self, memory: &CudaMemory) -> DevicePtr {
        memory.address()
    }

    unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<CudaRegistration> {
        // SAFETY: the caller promised that the memory outlives the registration.
        unsafe { CudaRegistration::new(self, host, bytes) }
    }

    fn stream(&self) -> Result<CudaStream> {
        self.named_stream(c"layer-streamer compute")
    }

    fn named_stream(&self, name: &CStr) -> Result<CudaStream> {
        CudaStream::new(self, name)
    }

    fn stream_id(&self, stream: &CudaStream) -> StreamId {
        StreamId::of_handle(stream.raw().addr())
    }

    fn event(&self) -> Result<CudaEvent> {
        CudaEvent::new(self)
    }

    fn timed_event(&self) -> Result<Option<CudaEvent>> {
        CudaEvent::timed(self).map(Some)
    }

    fn elapsed(&self, from: &CudaEvent, to: &CudaEvent) -> Result<Duration> {
        let mut milliseconds = 0.0f32;
        // SAFETY: both handles are valid until dropped, and the result goes to a local.
        let elapsed = || unsafe { sys::cudaEventElapsedTime(&mut milliseconds, from.raw(), to.raw()) };
        self.call(|| "ask for the time between two events".into(), elapsed)?;
        Ok(Duration::try_from_secs_f64(f64::from(milliseconds) / 1e3).unwrap_or_default())
    }

    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, stream: &CudaStream) -> Result<()> {
        let (to, kind) = (to.as_ptr().cast(), sys::cudaMemcpyKind::cudaMemcpyHostToDevice);
        let operation = || format!("copy {bytes} bytes to the device");
        // SAFETY: both ranges are valid until the copy is done, as the caller promised.
        self.call(operation, || unsafe { sys::cudaMemcpyAsync(to, from.cast(), bytes, kind, stream.raw()) })
    }

    unsafe fn copy_to_host(&self, to: *mut u8, from: DevicePtr, bytes: usize, stream: &CudaStream) -> Result<()> {
        let (from, kind) = (from.as_ptr().cast(), sys::cudaMemcpyKind::cudaMemcpyDeviceToHost);
        let operation = || format!("copy {bytes} bytes from the device");
        // SAFETY: both ranges are valid until the copy is done, as the caller promised.
        self.call(operation, || unsafe { sys::cudaMemcpyAsync(to.cast(), from, bytes, kind, stream.raw()) })
    }

    unsafe fn copy_on_device(&self, to: DevicePtr, from: DevicePtr, bytes: usize, stream: &CudaStream) -> Result<()> {
        let (to, from) = (to.as_ptr().cast(), from.as_ptr().cast());
        let (operation, kind) =
            (|| format!("copy {bytes} bytes on the device"), sys::cudaMemcpyKind::cudaMemcpyDeviceToDevice);
        // SAFETY: both ranges are on the device and valid until the copy is done, as the caller promised.
        self.call(operation, || unsafe { sys::cudaMemcpyAsync(to, from, bytes, kind, stream.raw()) })
    }

    unsafe fn cast_raw(
        &self,
        (to, to_type): (DevicePtr, DType),
        (from, from_type): (DevicePtr, DType),
        elements: usize,
        stream: &CudaStream,
    ) -> Result<()> {
        let (to, from) = (to.as_ptr().cast::<c_void>(), from.as_ptr().cast::<c_void>());
        let operation = || format!("convert {elements} elements from {from_type} to {to_type}");
        let launcher = if from_type.is_blocks() { sys::lsk_expand } else { sys::lsk_cast };
        // SAFETY: both ranges are on the device, apart and valid until the cast is done, as the caller promised.
        let launch = || unsafe { launcher(to, code_of(to_type), from, code_of(from_type), elements, stream.raw()) };
        self.call(operation, launch)
    }

    fn dequantises_to(&self, dtype: DType) -> bool {
        !dtype.is_blocks()
    }

    unsafe fn dequantise_raw(
        &self,
        (to, to_type): (DevicePtr, DType),
        from: [DevicePtr; INPUTS],
        recipe: &Recipe,
        stream: &CudaStream,
    ) -> Result<()> {
        let Recipe { rows, columns, block: [block_rows, block_columns], scale, scheme } = *recipe;
        let (scheme, zeros, order, zero, offset) = match scheme {
            Scheme::Fp8 => (sys::LSK_FP8, false, false, 0, 0),
            Scheme::Rows { zeros, order } => (sys::LSK_ROWS, zeros, order, 0, 0),
            Scheme::Gptq { zero, order } => (sys::LSK_GPTQ, true, order, zero, 0),
            Scheme::Awq => (sys::LSK_AWQ, true, false, 0, 0),
            Scheme::Nf4 { offset, .. } => (sys::LSK_NF4, false, false, 0, offset.unwrap_or(0)),
        };
        let recipe = sys::lsk_recipe {
            scheme,
            scale: if scale == DType::U8 { sys::LSK_U8 } else { code_of(scale) },
            rows: rows as i64,
            columns: columns as i64,
            block_rows: block_rows as i64,
            block_columns: block_columns as i64,
            zeros: zeros.into(),
            order: order.into(),
            zero: zero.into(),
            offset: f32::from_bits(offset),
        };
        let inputs = from.map(|input| input.as_ptr().cast_const().cast::<c_void>());
        let (to, operation) = (to.as_ptr().cast(), || format!("dequantise a matrix [{rows}, {columns}] to {to_type}"));
        let to_type = code_of(to_type);
        // SAFETY: all ranges are on the device, apart and valid until the matrix is made, as the caller promised; the launcher reads
        // recipe and addresses before it returns.
        let launch = || unsafe { sys::lsk_dequantise(to, to_type, inputs.as_ptr(), &raw const recipe, stream.raw()) };
        self.call(operation, launch)
    }

    unsafe fn unpack_raw(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        parts: Parts<'_>,
        report: *mut u32,
        stream: &CudaStream,
    ) -> Result<()> {
        let Parts { ref table, part, weights, lengths } = parts;
        let (to, from, table) = (to.as_ptr().cast(), from.as_ptr().cast(), table.0.as_ptr());
        let (lengths, count) = (lengths.as_ptr(), lengths.len() as i64);
        // SAFETY: both ranges are on the device, apart and valid until the weights are there, and the device knows the report, as
        // the caller promised; the launcher reads lengths and table before it returns.
        let launch = || unsafe {
            sys::lsk_unpack(to, from, lengths, count, part as i64, weights as i64, table, report, stream.raw())
        };
        self.call(|| format!("unpack {weights} weights"), launch)
    }

    fn record(&self, event: &CudaEvent, stream: &CudaStream) -> Result<()> {
        // SAFETY: both handles are valid until dropped.
        self.call(|| "record an event".into(), || unsafe { sys::cudaEventRecord(event.raw(), stream.raw()) })
    }

    fn wait(&self, stream: &CudaStream, event: &CudaEvent) -> Result<()> {
        // SAFETY: both handles are valid until dropped.
        let wait = || unsafe { sys::cudaStreamWaitEvent(stream.raw(), event.raw(), 0) };
        self.call(|| "make a stream wait for an event".into(), wait)
    }

    fn query(&self, event: &CudaEvent) -> Result<bool> {
        self.alive()?;
        // SAFETY: the handle is valid until dropped.
        match unsafe { sys::cudaEventQuery(event.raw()) } {
            Code::cudaSuccess => Ok(true),
            Code::cudaErrorNotReady => Ok(false),
            code => Err(self.fault("query an event".into(), code, None)),
        }
    }

    fn synchronize(&self, event: &CudaEvent) -> Result<()> {
        // SAFETY: the handle is valid until dropped.
        self.call(|| "wait for an event".into(), || unsafe { sys::cudaEventSynchronize(event.raw()) })
    }

    fn drain(&self, stream: &CudaStream) -> Result<()> {
        self.record(stream.end(), stream)?;
        self.synchronize(stream.end())
    }
}
