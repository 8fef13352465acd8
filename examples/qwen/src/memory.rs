//! A tensor that owns its memory. An engine for speed would reserve its buffers once; this one takes them as it goes.

use layer_streamer::{
    DType, Element, Error,
    device::{self, Device, Shape, TensorMut, TensorRef},
};

/// A tensor on a device. All work on it goes to one stream, in order; its memory stays until that work is done, as
/// [`Device::allocate`] promises.
pub struct Buffer<D: Device> {
    device: D,
    memory: D::Memory,
    dtype: DType,
    shape: Shape,
}

impl<D: Device> Buffer<D> {
    pub fn new(device: &D, dtype: DType, shape: &[usize]) -> Result<Self, Error> {
        let bytes = dtype.bytes_of(shape).ok_or_else(|| Error::Unsupported {
            what: format!("a tensor of shape {shape:?}"),
            remedy: "give fewer tokens".into(),
        })?;
        let memory = device.allocate("a tensor", bytes)?;
        Ok(Self { device: device.clone(), memory, dtype, shape: Shape::new(shape)? })
    }

    pub fn filled<T: Element>(device: &D, stream: &D::Stream, values: &[T]) -> Result<Self, Error> {
        let mut buffer = Self::new(device, T::DTYPE, &[values.len()])?;
        device::upload(device, stream, values, &mut buffer.write())?;
        Ok(buffer)
    }

    pub fn read(&self) -> TensorRef<'_, D> {
        // SAFETY: the memory was reserved for a tensor of this type and shape, and is aligned for any type. All work on it goes to
        // one stream, in order.
        unsafe { TensorRef::from_raw(self.device.address(&self.memory), self.dtype, self.shape) }
    }

    pub fn write(&mut self) -> TensorMut<'_, D> {
        self.write_shared()
    }

    /// For a cache, which kernels of one stream fill and read in turn.
    pub fn write_shared(&self) -> TensorMut<'_, D> {
        // SAFETY: the memory was reserved for a tensor of this type and shape, and is aligned for any type. All work on it goes to
        // one stream, in order, and safe code here never looks at it but by `to_host`, which waits.
        unsafe { TensorMut::from_raw(self.device.address(&self.memory), self.dtype, self.shape) }
    }

    /// The same elements in another shape.
    pub fn shaped(&self, shape: &[usize]) -> Result<TensorRef<'_, D>, Error> {
        let shape = Shape::new(shape)?;
        assert_eq!(shape.elements(), self.shape.elements());
        // SAFETY: as in `read`; the shape has as many elements.
        Ok(unsafe { TensorRef::from_raw(self.device.address(&self.memory), self.dtype, shape) })
    }

    pub fn reshape(&mut self, shape: &[usize]) -> Result<(), Error> {
        let shape = Shape::new(shape)?;
        assert_eq!(shape.elements(), self.shape.elements());
        self.shape = shape;
        Ok(())
    }

    /// Waits for the stream, and copies.
    pub fn to_host<T: Element + Default>(&self, stream: &D::Stream) -> Result<Vec<T>, Error> {
        let mut values = vec![T::default(); self.shape.elements()];
        device::download(&self.device, stream, self.read(), &mut values)?;
        Ok(values)
    }
}
