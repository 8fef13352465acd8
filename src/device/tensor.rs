//! Tensors in device memory, and which device and stream may use them.

use std::{fmt, marker::PhantomData, slice};

use crate::{
    device::{Cpu, Device},
    dtype::{DType, Element},
    error::{Error, Result},
    shape::Shape,
};

/// An address in a device's memory. Only the device may follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePtr(*mut u8);

// SAFETY: an address is plain data; whoever follows it answers for the access.
unsafe impl Send for DevicePtr {}
// SAFETY: an address is plain data; whoever follows it answers for the access.
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

/// A stream of a device, for comparing: [`Device::stream_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamId(usize);

impl StreamId {
    /// The only one of a device whose work is done when a call returns: there is nothing to be ordered.
    pub const CALLER: Self = Self(0);

    /// A stream by its handle, which no other open stream of the device has.
    pub fn of_handle(handle: usize) -> Self {
        Self(handle)
    }
}

/// A tensor in the memory of a device of type `D`, row-major and without gaps, borrowed for `'a` from what keeps the memory alive.
///
/// Tensors of a streamed layer may be used on one stream alone, the one that is ordered after their arrival and before the
/// release of the layer: kernels and [`download`] refuse them on any other.
pub struct TensorRef<'a, D> {
    ptr: DevicePtr,
    dtype: DType,
    shape: Shape,
    /// Where work on it is ordered; `None`: whoever made it answers for that.
    stream: Option<StreamId>,
    lives: PhantomData<&'a [u8]>,
    of: PhantomData<fn() -> D>,
}

/// The same, to be written to.
pub struct TensorMut<'a, D> {
    ptr: DevicePtr,
    dtype: DType,
    shape: Shape,
    lives: PhantomData<&'a mut [u8]>,
    of: PhantomData<fn() -> D>,
}

// Not derived, which would demand it of the device.
impl<D> Clone for TensorRef<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for TensorRef<'_, D> {}

macro_rules! tensor_methods {
    ($name:ident) => {
        impl<D> $name<'_, D> {
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
                self.dtype.bytes(self.elements())
            }
        }

        impl<D> fmt::Debug for $name<'_, D> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} {:?} at {:p}", self.dtype, self.shape(), self.ptr.as_ptr())
            }
        }
    };
}
tensor_methods!(TensorRef);
tensor_methods!(TensorMut);

impl<'a, D: Device> TensorRef<'a, D> {
    /// # Safety
    /// `ptr` is an address of a device of type `D`, aligned for `dtype`; rows are whole blocks of it; the tensor's bytes from there on are allocated for `'a`
    /// and until work that uses them is done; and nothing that is not ordered against that work writes them meanwhile. On
    /// [`Cpu`], whose elements safe code may look at, nothing at all writes them during `'a`.
    pub unsafe fn from_raw(ptr: DevicePtr, dtype: DType, shape: Shape) -> Self {
        Self { ptr, dtype, shape, stream: None, lives: PhantomData, of: PhantomData }
    }

    /// The same tensor, by the name of another type of device.
    ///
    /// # Safety
    /// It is in that device's memory.
    #[cfg(feature = "capi")]
    pub(crate) unsafe fn of_device<E: Device>(self) -> TensorRef<'a, E> {
        TensorRef {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: self.shape,
            stream: self.stream,
            lives: PhantomData,
            of: PhantomData,
        }
    }

    /// The same tensor, for work on `stream` alone.
    pub(crate) fn only_on(self, stream: StreamId) -> Self {
        Self { stream: Some(stream), ..self }
    }

    /// Some rows of the first dimension, as a tensor of their own.
    ///
    /// # Panics
    /// If there are no such rows.
    #[cfg(feature = "model")]
    pub(crate) fn rows(self, rows: std::ops::Range<usize>) -> Self {
        let (height, shape) = (self.shape()[0], self.shape.with_rows(rows.len()));
        assert!(rows.start <= rows.end && rows.end <= height, "rows {rows:?} of {height}");
        let row_bytes = self.bytes() / height.max(1);
        // Inside the tensor, as the assertion found, and on a boundary of its elements.
        Self { ptr: self.ptr.offset(rows.start * row_bytes), shape, ..self }
    }

    /// [`Error::Kernel`] where work on `stream` could come before the tensor is there, or after it is gone.
    pub(crate) fn check_stream(&self, kernel: &'static str, stream: StreamId) -> Result<()> {
        if self.stream.is_none_or(|only| only == stream) {
            return Ok(());
        }
        let cause = format!(
            "{self:?} is a layer's, taken with another stream; on this one it may not have arrived yet, or be gone already"
        );
        Err(Error::Kernel { kernel, cause })
    }
}

impl<'a> TensorRef<'a, Cpu> {
    /// The elements where they lie, without a copy: the CPU device's work is done when its call returns.
    ///
    /// ```
    /// use layer_streamer::{Checkpoint, Error, LayerStreamer, Settings, device::{Cpu, Device}};
    /// use half::bf16;
    ///
    /// let checkpoint = Checkpoint::open("examples/speller")?;
    /// let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &checkpoint.layers()?, &Settings::default())?;
    /// let largest = streamer.run_pass(&Cpu.stream()?, 0.0, |largest, layer| {
    ///     let norm: &[bf16] = layer.tensor("input_layernorm.weight")?.as_slice()?;
    ///     Ok::<_, Error>(norm.iter().map(|weight| weight.to_f32()).fold(largest, f32::max))
    /// })?;
    /// assert!(largest > 0.0);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Kernel`] if they are of another type than `T`.
    pub fn as_slice<T: Element>(self) -> Result<&'a [T]> {
        fits::<T>("as_slice", self.elements(), self.dtype, self.elements())?;
        // SAFETY: `from_raw` was promised that so many elements lie there, aligned, for `'a`, and that on this device nothing
        // writes them meanwhile; any bits are a `T`.
        Ok(unsafe { slice::from_raw_parts(self.ptr.as_ptr().cast(), self.elements()) })
    }
}

impl<'a, D: Device> TensorMut<'a, D> {
    /// # Safety
    /// As [`TensorRef::from_raw`], and nothing that is not ordered against that work reads them meanwhile.
    pub unsafe fn from_raw(ptr: DevicePtr, dtype: DType, shape: Shape) -> Self {
        Self { ptr, dtype, shape, lives: PhantomData, of: PhantomData }
    }

    /// The same tensor, by the name of another type of device.
    ///
    /// # Safety
    /// It is in that device's memory.
    #[cfg(feature = "capi")]
    pub(crate) unsafe fn of_device<E: Device>(self) -> TensorMut<'a, E> {
        TensorMut { ptr: self.ptr, dtype: self.dtype, shape: self.shape, lives: PhantomData, of: PhantomData }
    }

    /// A shorter borrow of the same tensor.
    pub fn borrow(&mut self) -> TensorMut<'_, D> {
        TensorMut { ptr: self.ptr, dtype: self.dtype, shape: self.shape, lives: PhantomData, of: PhantomData }
    }

    /// The tensor for reading, while nothing writes it.
    pub fn as_ref(&self) -> TensorRef<'_, D> {
        TensorRef {
            ptr: self.ptr,
            dtype: self.dtype,
            shape: self.shape,
            stream: None,
            lives: PhantomData,
            of: PhantomData,
        }
    }
}

/// Copies `data` into `to` and waits until it is there.
///
/// # Errors
/// [`Error::Kernel`] if type or length differ, or the device's own.
pub fn upload<D: Device, T: Element>(
    device: &D,
    stream: &D::Stream,
    data: &[T],
    to: &mut TensorMut<'_, D>,
) -> Result<()> {
    fits::<T>("upload", data.len(), to.dtype(), to.elements())?;
    // SAFETY: the lengths agree, both borrows last to the end of this function, and when `drain` returns, also with an error,
    // the copy touches host memory no more: the trait's promise.
    unsafe { device.copy_to_device(to.ptr(), data.as_ptr().cast(), size_of_val(data), stream)? };
    device.drain(stream)
}

/// Copies `from` into `data` and waits until it is there.
///
/// # Errors
/// As [`upload`], and [`Error::Kernel`] for a layer's tensor on another stream than the layer was taken with.
pub fn download<D: Device, T: Element>(
    device: &D,
    stream: &D::Stream,
    from: TensorRef<'_, D>,
    data: &mut [T],
) -> Result<()> {
    fits::<T>("download", data.len(), from.dtype(), from.elements())?;
    from.check_stream("download", device.stream_id(stream))?;
    // SAFETY: the lengths agree, and when `drain` returns, also with an error, the copy touches `data` no more: the trait's promise.
    unsafe { device.copy_to_host(data.as_mut_ptr().cast(), from.ptr(), size_of_val(data), stream)? };
    device.drain(stream)
}

fn fits<T: Element>(kernel: &'static str, len: usize, dtype: DType, elements: usize) -> Result<()> {
    if dtype == T::DTYPE && elements == len {
        return Ok(());
    }
    Err(Error::Kernel { kernel, cause: format!("{len} × {} do not fit a tensor of {elements} × {dtype}", T::DTYPE) })
}
