//! The seam between the pipeline and whatever computes: memory, streams, events, copies, and the arrival transform.
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
#[cfg(any(test, cuda_emulated))]
#[path = "../../tests/cuda_emulation/streams.rs"]
pub(crate) mod streams;

use std::{ffi::CStr, marker::PhantomData, time::Duration};

pub use cpu::{Cpu, CpuEvent, CpuMemory, CpuStream};
pub use cuda::Cuda;
#[cfg(feature = "cuda")]
pub use cuda::{CudaEvent, CudaMemory, CudaRegistration, CudaStream};

use crate::{
    dtype::{DType, Element},
    error::{Error, Result},
};

/// An address in a device's memory. Only the device may follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePtr(*mut u8);

// SAFETY: an address is plain data; whoever follows it answers for the access.
unsafe impl Send for DevicePtr {}
// SAFETY: as above.
unsafe impl Sync for DevicePtr {}

impl DevicePtr {
    /// Wraps an address of the device's.
    pub fn new(address: *mut u8) -> Self {
        Self(address)
    }

    /// The address, for the device's own calls.
    pub fn as_ptr(self) -> *mut u8 {
        self.0
    }

    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// Dimensions of a tensor in device memory: up to eight, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 8],
    rank: usize,
}

impl Shape {
    /// At most eight dimensions.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more.
    pub fn new(shape: &[usize]) -> Result<Self> {
        let mut dims = [1; 8];
        let Some(used) = dims.get_mut(..shape.len()) else {
            let what = format!("a tensor of {} dimensions", shape.len());
            return Err(Error::Unsupported { what, remedy: "eight is the most".into() });
        };
        used.copy_from_slice(shape);
        Ok(Self { dims, rank: shape.len() })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// The product of the dimensions.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

/// A tensor in device memory, row-major and without gaps, borrowed for `'a` from what keeps the memory alive.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    ptr: DevicePtr,
    dtype: DType,
    shape: Shape,
    lives: PhantomData<&'a [u8]>,
}

/// The same, to be written to.
#[derive(Debug)]
pub struct TensorMut<'a> {
    ptr: DevicePtr,
    dtype: DType,
    shape: Shape,
    lives: PhantomData<&'a mut [u8]>,
}

macro_rules! tensor_methods {
    ($name:ident) => {
        impl $name<'_> {
            /// # Safety
            /// `ptr` is aligned for `dtype`, the tensor's bytes from there on are allocated for `'a`, and no other view of
            /// them is written meanwhile by work that is not ordered against the work that uses this one.
            pub unsafe fn from_raw(ptr: DevicePtr, dtype: DType, shape: Shape) -> Self {
                Self { ptr, dtype, shape, lives: PhantomData }
            }

            /// Where it starts.
            pub fn ptr(&self) -> DevicePtr {
                self.ptr
            }

            /// Element type.
            pub fn dtype(&self) -> DType {
                self.dtype
            }

            /// Dimensions, slowest first.
            pub fn shape(&self) -> &[usize] {
                self.shape.dims()
            }

            /// Number of elements.
            pub fn elements(&self) -> usize {
                self.shape.elements()
            }

            /// Length in bytes.
            pub fn bytes(&self) -> usize {
                self.elements() * self.dtype.size()
            }
        }
    };
}
tensor_methods!(TensorRef);
tensor_methods!(TensorMut);

impl TensorMut<'_> {
    /// A shorter borrow of the same tensor.
    pub fn borrow(&mut self) -> TensorMut<'_> {
        TensorMut { ptr: self.ptr, dtype: self.dtype, shape: self.shape, lives: PhantomData }
    }

    /// The tensor for reading, while nothing writes it.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { ptr: self.ptr, dtype: self.dtype, shape: self.shape, lives: PhantomData }
    }
}

/// What the pipeline needs of a device, and no more. Cloning gives another handle of the same device.
///
/// Errors are the device's own: an operation that fails has not happened, and the caller does not count on what follows it.
pub trait Device: Clone + Send + Sync + 'static {
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

    /// Bytes free in the device's own memory; `None` for a device that computes in the host's.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Reserves `bytes` of device memory, aligned to [`crate::plan::DEVICE_ALIGN`] and present; `what` is for messages.
    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Self::Memory>;

    /// As [`allocate`](Device::allocate), for memory that is filled once, from its start on: it may become present while that
    /// goes on.
    fn allocate_filled_once(&self, what: &'static str, bytes: usize) -> Result<Self::Memory> {
        self.allocate(what, bytes)
    }

    /// Whether memory of [`allocate_filled_once`](Device::allocate_filled_once) is present up to `end` (bytes from its start), or
    /// is about to be. Where it is not, whoever fills it may have to wait for that.
    fn is_touched(&self, _memory: &Self::Memory, _end: usize) -> bool {
        true
    }

    /// The memory will never be dropped, since something may still use it: whatever makes it present ends.
    fn abandon(&self, _memory: &Self::Memory) {}

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

    /// Enqueues setting `bytes` to zero.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`].
    unsafe fn zero(&self, to: DevicePtr, bytes: usize, stream: &Self::Stream) -> Result<()>;

    /// Enqueues the conversion of `elements` elements (see [`DType::converts_to`]). The ranges do not overlap.
    ///
    /// # Safety
    /// As [`Device::copy_to_device`], with both ranges on the device.
    unsafe fn transform(
        &self,
        to: (DevicePtr, DType),
        from: (DevicePtr, DType),
        elements: usize,
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

/// Copies `data` into `to` and waits until it is there.
///
/// # Errors
/// [`Error::Kernel`] if type or length differ, or the device's own.
pub fn upload<D: Device, T: Element>(device: &D, stream: &D::Stream, data: &[T], to: &mut TensorMut<'_>) -> Result<()> {
    fits::<T>("upload", data.len(), to.dtype(), to.elements())?;
    // SAFETY: the lengths agree, both borrows last to the end of this function, and it waits for the copy.
    unsafe { device.copy_to_device(to.ptr(), data.as_ptr().cast(), size_of_val(data), stream)? };
    device.drain(stream)
}

/// Copies `from` into `data` and waits until it is there.
///
/// # Errors
/// As [`upload`].
pub fn download<D: Device, T: Element>(
    device: &D,
    stream: &D::Stream,
    from: TensorRef<'_>,
    data: &mut [T],
) -> Result<()> {
    fits::<T>("download", data.len(), from.dtype(), from.elements())?;
    // SAFETY: the lengths agree, both borrows last to the end of this function, and it waits for the copy.
    unsafe { device.copy_to_host(data.as_mut_ptr().cast(), from.ptr(), size_of_val(data), stream)? };
    device.drain(stream)
}

fn fits<T: Element>(kernel: &'static str, len: usize, dtype: DType, elements: usize) -> Result<()> {
    if dtype == T::DTYPE && elements == len {
        return Ok(());
    }
    Err(Error::Kernel { kernel, cause: format!("{len} × {} do not fit a tensor of {elements} × {dtype}", T::DTYPE) })
}
