//! The device that was chosen at run time, behind one type: everything above is compiled once.
#![allow(unreachable_patterns, reason = "a build without CUDA has one device")]

#[cfg(not(feature = "cuda"))]
use std::convert::Infallible;
use std::{ffi::CStr, time::Duration};

#[cfg(feature = "cuda")]
use crate::device::{CudaEvent, CudaMemory, CudaRegistration, CudaStream};
use crate::{
    device::{Cpu, CpuEvent, CpuMemory, CpuStream, Cuda, Device, DevicePtr, StreamId},
    dtype::DType,
    error::{Error, Result},
    kernels::{Kernels, Precision, call::Call},
    packed::Parts,
    quantised::{INPUTS, Recipe},
};

/// Something of the CPU's or of a GPU's.
#[derive(Clone)]
pub(super) enum Any<C, G> {
    Cpu(C),
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "there is none"))]
    Cuda(G),
}

pub(super) type AnyDevice = Any<Cpu, Cuda>;
#[cfg(feature = "cuda")]
pub(super) type AnyStream = Any<CpuStream, CudaStream>;
#[cfg(not(feature = "cuda"))]
pub(super) type AnyStream = Any<CpuStream, Infallible>;
#[cfg(feature = "cuda")]
type AnyEvent = Any<CpuEvent, CudaEvent>;
#[cfg(not(feature = "cuda"))]
type AnyEvent = Any<CpuEvent, Infallible>;
#[cfg(feature = "cuda")]
type AnyMemory = Any<CpuMemory, CudaMemory>;
#[cfg(not(feature = "cuda"))]
type AnyMemory = Any<CpuMemory, Infallible>;
#[cfg(feature = "cuda")]
type AnyRegistration = Any<(), CudaRegistration>;
#[cfg(not(feature = "cuda"))]
type AnyRegistration = Any<(), Infallible>;

/// Calls whichever device it is, with parts of its own kind.
macro_rules! on {
    ($self:ident $(, $part:ident)* => |$device:ident| $call:expr) => {
        match ($self, $($part,)*) {
            (Any::Cpu($device), $(Any::Cpu($part),)*) => $call,
            #[cfg(feature = "cuda")]
            (Any::Cuda($device), $(Any::Cuda($part),)*) => $call,
            _ => mixed(),
        }
    };
}

/// The same where what comes back is a part of the device's.
macro_rules! make {
    ($self:ident => |$device:ident| $call:expr) => {
        match $self {
            Any::Cpu($device) => $call.map(Any::Cpu),
            #[cfg(feature = "cuda")]
            Any::Cuda($device) => $call.map(Any::Cuda),
            _ => mixed(),
        }
    };
}

#[cold]
fn mixed<T>() -> Result<T> {
    let cause = "belongs to another device than what it is used with".into();
    Err(Error::Setting { name: "stream", cause })
}

impl AnyDevice {
    /// Whether the two are the same device.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Any::Cpu(_), Any::Cpu(_)) => true,
            #[cfg(feature = "cuda")]
            (Any::Cuda(a), Any::Cuda(b)) => a.ordinal() == b.ordinal(),
            _ => false,
        }
    }
}

// SAFETY: each part is a device's, and is used with that device alone.
unsafe impl Device for AnyDevice {
    type Stream = AnyStream;
    type Event = AnyEvent;
    type Memory = AnyMemory;
    type Registration = AnyRegistration;

    fn describe(&self) -> String {
        match self {
            Any::Cpu(device) => device.describe(),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.describe(),
            _ => String::new(),
        }
    }

    fn bind_thread(&self) -> Result<()> {
        on!(self => |device| device.bind_thread())
    }

    fn memory_is_ram(&self) -> bool {
        match self {
            Any::Cpu(device) => device.memory_is_ram(),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.memory_is_ram(),
            _ => false,
        }
    }

    fn dequantises_to(&self, dtype: DType) -> bool {
        match self {
            Any::Cpu(device) => device.dequantises_to(dtype),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.dequantises_to(dtype),
            _ => false,
        }
    }

    fn free_memory(&self) -> Result<usize> {
        on!(self => |device| device.free_memory())
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<AnyMemory> {
        make!(self => |device| device.allocate(what, bytes))
    }

    fn address(&self, memory: &AnyMemory) -> DevicePtr {
        match (self, memory) {
            (Any::Cpu(device), Any::Cpu(memory)) => device.address(memory),
            #[cfg(feature = "cuda")]
            (Any::Cuda(device), Any::Cuda(memory)) => device.address(memory),
            _ => unreachable!("memory is asked of the device that made it"),
        }
    }

    unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<AnyRegistration> {
        // SAFETY: the memory outlives the registration, as the caller promised.
        make!(self => |device| unsafe { device.register(host, bytes) })
    }

    fn stream(&self) -> Result<AnyStream> {
        make!(self => |device| device.stream())
    }

    fn named_stream(&self, name: &CStr) -> Result<AnyStream> {
        make!(self => |device| device.named_stream(name))
    }

    fn stream_id(&self, stream: &AnyStream) -> StreamId {
        match (self, stream) {
            (Any::Cpu(device), Any::Cpu(stream)) => device.stream_id(stream),
            #[cfg(feature = "cuda")]
            (Any::Cuda(device), Any::Cuda(stream)) => device.stream_id(stream),
            // Which every use of it refuses.
            _ => StreamId::CALLER,
        }
    }

    fn event(&self) -> Result<AnyEvent> {
        make!(self => |device| device.event())
    }

    fn timed_event(&self) -> Result<Option<AnyEvent>> {
        match self {
            Any::Cpu(device) => Ok(device.timed_event()?.map(Any::Cpu)),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => Ok(device.timed_event()?.map(Any::Cuda)),
            _ => mixed(),
        }
    }

    fn elapsed(&self, from: &AnyEvent, to: &AnyEvent) -> Result<Duration> {
        on!(self, from, to => |device| device.elapsed(from, to))
    }

    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, stream: &AnyStream) -> Result<()> {
        // SAFETY: both ranges stay valid until the copy is done, and nobody writes them meanwhile, as the caller promised.
        on!(self, stream => |device| unsafe { device.copy_to_device(to, from, bytes, stream) })
    }

    unsafe fn copy_to_host(&self, to: *mut u8, from: DevicePtr, bytes: usize, stream: &AnyStream) -> Result<()> {
        // SAFETY: both ranges stay valid until the copy is done, and nobody writes them meanwhile, as the caller promised.
        on!(self, stream => |device| unsafe { device.copy_to_host(to, from, bytes, stream) })
    }

    unsafe fn copy_on_device(&self, to: DevicePtr, from: DevicePtr, bytes: usize, stream: &AnyStream) -> Result<()> {
        // SAFETY: both ranges are on this device, apart, and valid until the copy is done, as the caller promised.
        on!(self, stream => |device| unsafe { device.copy_on_device(to, from, bytes, stream) })
    }

    unsafe fn cast_raw(
        &self,
        to: (DevicePtr, DType),
        from: (DevicePtr, DType),
        elements: usize,
        stream: &AnyStream,
    ) -> Result<()> {
        // SAFETY: both ranges are on this device, apart, and valid until the cast is done, as the caller promised.
        on!(self, stream => |device| unsafe { device.cast_raw(to, from, elements, stream) })
    }

    unsafe fn dequantise_raw(
        &self,
        to: (DevicePtr, DType),
        from: [DevicePtr; INPUTS],
        recipe: &Recipe,
        stream: &AnyStream,
    ) -> Result<()> {
        // SAFETY: the caller's promises are those of the device's own.
        on!(self, stream => |device| unsafe { device.dequantise_raw(to, from, recipe, stream) })
    }

    unsafe fn unpack_raw(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        parts: Parts<'_>,
        report: *mut u32,
        stream: &AnyStream,
    ) -> Result<()> {
        // SAFETY: both ranges are on this device, apart, and valid until the weights are decoded, and it knows the word, as the caller
        // promised.
        on!(self, stream => |device| unsafe { device.unpack_raw(to, from, parts, report, stream) })
    }

    fn record(&self, event: &AnyEvent, stream: &AnyStream) -> Result<()> {
        on!(self, event, stream => |device| device.record(event, stream))
    }

    fn wait(&self, stream: &AnyStream, event: &AnyEvent) -> Result<()> {
        on!(self, stream, event => |device| device.wait(stream, event))
    }

    fn query(&self, event: &AnyEvent) -> Result<bool> {
        on!(self, event => |device| device.query(event))
    }

    fn synchronize(&self, event: &AnyEvent) -> Result<()> {
        on!(self, event => |device| device.synchronize(event))
    }

    fn drain(&self, stream: &AnyStream) -> Result<()> {
        on!(self, stream => |device| device.drain(stream))
    }
}

impl Kernels for AnyDevice {
    fn precision(&self) -> Precision {
        match self {
            Any::Cpu(device) => device.precision(),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.precision(),
            _ => unreachable!("there is no such device"),
        }
    }

    fn prepare(&self, stream: &AnyStream) -> Result<()> {
        on!(self, stream => |device| device.prepare(stream))
    }

    fn check_head_size(&self, size: usize) -> Result<()> {
        on!(self => |device| device.check_head_size(size))
    }

    fn product_rows(&self, tokens: usize) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.product_rows(tokens),
            _ => tokens,
        }
    }

    fn block_tokens(&self, token_bytes: usize) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.block_tokens(token_bytes),
            _ => Cpu.block_tokens(token_bytes),
        }
    }

    fn scratch_bytes(&self) -> usize {
        match self {
            Any::Cpu(device) => device.scratch_bytes(),
            #[cfg(feature = "cuda")]
            Any::Cuda(device) => device.scratch_bytes(),
            _ => 0,
        }
    }

    fn compute(&self, stream: &AnyStream, call: Call<'_, AnyDevice>) -> Result<()> {
        // SAFETY: C gives a device tensors of its own memory alone, and so does a model that was opened on it.
        on!(self, stream => |device| device.compute(stream, unsafe { call.of_device() }))
    }
}
