//! The seam between the pipeline and whatever computes: memory, streams, events, copies, and the arrival cast.
//!
//! The rules are CUDA's. Work enqueued on a stream runs in order; streams are ordered against one another only by events. An
//! event is a counter of records: a wait captures the record that is newest **when the wait is called**, and an event that
//! was never recorded counts as complete. Enqueuing may return before the work is done (`cuda`) or after (`cpu`).

#[cfg(test)]
pub(crate) mod async_cpu;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda/absent.rs"]
mod cuda;
pub(crate) mod pool;
#[cfg(any(test, cuda_emulated))]
pub(crate) mod streams;
mod tensor;

use std::{ffi::CStr, time::Duration};

pub use cpu::{Cpu, CpuEvent, CpuMemory, CpuStream};
pub use cuda::Cuda;
#[cfg(feature = "cuda")]
pub use cuda::{CudaEvent, CudaMemory, CudaRegistration, CudaStream};
pub use tensor::{DevicePtr, StreamId, TensorMut, TensorRef, download, upload};

pub use crate::shape::Shape;
use crate::{
    dtype::DType,
    error::Result,
    packed::Parts,
    quantised::{INPUTS, Recipe},
};

/// What the pipeline needs of a device, and no more. Cloning gives another handle of the same device.
///
/// Errors are the device's own: an operation that fails has not happened, and the caller does not count on what follows it.
///
/// # Safety
/// Safe code reads and writes what an implementation hands out. So [`address`](Device::address) is where at least as many bytes
/// lie as were asked for, aligned, until the memory is dropped and work that was enqueued before is done; streams run in order,
/// waits and records order them as the module says, and [`synchronize`](Device::synchronize) returns no sooner than the record
/// is reached. When [`drain`](Device::drain) returns, the stream's work is done; when it fails, that touches host memory no more.
/// No two open streams have one [`stream_id`](Device::stream_id), unless all work is done when its call returns.
pub unsafe trait Device: Clone + Send + Sync + 'static {
    /// A queue of work that runs in order.
    type Stream: Send;
    /// A marker in a stream that other streams and threads can wait for.
    type Event: Send + Sync;
    /// Device memory, freed on drop.
    type Memory: Send + Sync;
    /// Host memory made known to the device, forgotten on drop.
    type Registration: Send;

    /// One line for people: what device this is.
    fn describe(&self) -> String;

    /// Makes the device current for this thread. Every pipeline thread calls it first.
    fn bind_thread(&self) -> Result<()>;

    /// Whether the device computes in RAM: its memory counts as RAM then, and an address of the host's is one of the device's.
    fn memory_is_ram(&self) -> bool;

    /// Bytes free in the device's own memory. Not asked where that is RAM.
    fn free_memory(&self) -> Result<usize>;

    /// Reserves `bytes` of device memory, aligned to [`crate::plan::DEVICE_ALIGN`] and present; `what` is for messages.
    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Self::Memory>;

    /// Where the memory starts.
    fn address(&self, memory: &Self::Memory) -> DevicePtr;

    /// Makes host memory known to the device, so that copies from it run at full speed and without blocking the caller.
    ///
    /// # Safety
    /// The memory outlives the registration.
    unsafe fn register(&self, host: *mut u8, bytes: usize) -> Result<Self::Registration>;

    /// A new stream.
    fn stream(&self) -> Result<Self::Stream>;

    /// A new stream of the pipeline's own, which tools show as `name` (feature `nvtx`).
    fn named_stream(&self, _name: &CStr) -> Result<Self::Stream> {
        self.stream()
    }

    /// Which stream it is.
    fn stream_id(&self, stream: &Self::Stream) -> StreamId;

    /// A new event.
    fn event(&self) -> Result<Self::Event>;

    /// A new event that also tells when it was reached, for [`elapsed`](Device::elapsed). `None` for a device whose work is done
    /// when a call returns: the host's clock tells as much.
    fn timed_event(&self) -> Result<Option<Self::Event>> {
        Ok(None)
    }

    /// The time between the newest records of two [timed](Device::timed_event) events, both of which were reached; zero where
    /// `to` was reached first.
    fn elapsed(&self, _from: &Self::Event, _to: &Self::Event) -> Result<Duration> {
        Ok(Duration::ZERO)
    }

    /// Enqueues a copy of `bytes` from host to device.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done, and nothing that is not ordered against it writes them meanwhile.
    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, stream: &Self::Stream) -> Result<()>;

    /// Enqueues a copy of `bytes` from device to host.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`].
    unsafe fn copy_to_host(&self, to: *mut u8, from: DevicePtr, bytes: usize, stream: &Self::Stream) -> Result<()>;

    /// Enqueues a copy of `bytes` within the device. The ranges do not overlap.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`], with both ranges on the device.
    unsafe fn copy_on_device(&self, to: DevicePtr, from: DevicePtr, bytes: usize, stream: &Self::Stream) -> Result<()>;

    /// Enqueues the conversion of `elements` elements, whole blocks of them (see [`DType::converts_to`]). The ranges do not overlap; one
    /// of blocks may begin anywhere.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`], with both ranges on the device.
    unsafe fn cast_raw(
        &self,
        to: (DevicePtr, DType),
        from: (DevicePtr, DType),
        elements: usize,
        stream: &Self::Stream,
    ) -> Result<()>;

    /// Whether it makes matrices of this type of several tensors: as a rule any that they can become.
    fn dequantises_to(&self, _dtype: DType) -> bool {
        true
    }

    /// Enqueues the making of a matrix, `to` that type, of the tensors of its recipe; those that there are not are not looked at. Each
    /// lies on a boundary of 16 bytes, unless the device's memory is RAM: then anywhere. The ranges do not overlap.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`], with all ranges on the device.
    unsafe fn dequantise_raw(
        &self,
        to: (DevicePtr, DType),
        from: [DevicePtr; INPUTS],
        recipe: &Recipe,
        stream: &Self::Stream,
    ) -> Result<()>;

    /// Enqueues the decoding of packed `parts`, which lie at `from` on a boundary of 16 bytes, to weights of BF16 at `to`. Where a
    /// block is [corrupt](crate::packed::Corrupt) its weights are any, and a 1 is written to `report`.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`], with both ranges on the device; `report` is memory of the host's that the device
    /// [knows](Device::register), and only read meanwhile.
    unsafe fn unpack_raw(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        parts: Parts<'_>,
        report: *mut u32,
        stream: &Self::Stream,
    ) -> Result<()>;

    /// Marks the present end of `stream`'s work.
    fn record(&self, event: &Self::Event, stream: &Self::Stream) -> Result<()>;

    /// Makes later work of `stream` wait for the newest record of `event`.
    fn wait(&self, stream: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Whether the newest record of `event` has been reached.
    fn query(&self, event: &Self::Event) -> Result<bool>;

    /// Blocks until the newest record of `event` has been reached.
    fn synchronize(&self, event: &Self::Event) -> Result<()>;

    /// Blocks until all work enqueued on `stream` so far is done.
    fn drain(&self, stream: &Self::Stream) -> Result<()> {
        let event = self.event()?;
        self.record(&event, stream)?;
        self.synchronize(&event)
    }
}
