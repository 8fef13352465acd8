//! The decoder's own device memory: one allocation, cut into regions that never overlap.

use std::cell::Cell;

use crate::{
    device::{Device, Shape, TensorMut, TensorRef},
    dtype::DType,
    error::{Error, Result},
    plan::DEVICE_ALIGN,
};

/// A part of a [`Workspace`], of one type, used with any shape that fits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    at: usize,
    elements: usize,
    dtype: DType,
}

/// Adds up regions before anything is reserved.
#[derive(Default)]
pub(super) struct Layout {
    bytes: Cell<usize>,
    overflow: Cell<bool>,
}

impl Layout {
    /// A region for a tensor of at most these dimensions.
    pub(super) fn region(&self, dtype: DType, shape: &[usize]) -> Region {
        let at = self.bytes.get();
        let end = dtype.bytes_of(shape).and_then(|bytes| at.checked_add(bytes)?.checked_next_multiple_of(DEVICE_ALIGN));
        self.overflow.set(self.overflow.get() || end.is_none());
        self.bytes.set(end.unwrap_or(at));
        Region { at, elements: shape.iter().fold(1, |n, &dim| n.saturating_mul(dim)), dtype }
    }

    /// Bytes of all regions.
    pub(super) fn bytes(&self) -> Result<usize> {
        if self.overflow.get() {
            return Err(Error::setting("context", "needs more memory than can be addressed"));
        }
        Ok(self.bytes.get())
    }
}

/// **Invariant**: regions of one layout are disjoint, and the decoder makes one view of a region at a time, or several for
/// reading.
pub(super) struct Workspace<D: Device> {
    device: D,
    memory: D::Memory,
}

impl<D: Device> Workspace<D> {
    pub(super) fn new(device: &D, what: &'static str, layout: &Layout) -> Result<Self> {
        Ok(Self { memory: device.allocate(what, layout.bytes()?)?, device: device.clone() })
    }

    /// The region for writing, from element `skip` on, with this shape.
    pub(super) fn write(&self, region: Region, skip: usize, shape: &[usize]) -> Result<TensorMut<'_, D>> {
        let shape = Shape::new(shape)?;
        assert!(skip + shape.elements() <= region.elements, "{shape:?} from {skip} on in {region:?}");
        let ptr = self.device.address(&self.memory).offset(region.at + skip * region.dtype.size());
        // SAFETY: the assertion keeps the view inside the region, which lies in this memory; the region starts at a multiple
        // of DEVICE_ALIGN and elements follow without gaps, so it is aligned. All work on the memory is enqueued on the
        // decoder's stream, in order, and the memory stays until what is enqueued is done, as every device promises.
        Ok(unsafe { TensorMut::from_raw(ptr, region.dtype, shape) })
    }

    /// The same for reading.
    pub(super) fn read(&self, region: Region, skip: usize, shape: &[usize]) -> Result<TensorRef<'_, D>> {
        let view = self.write(region, skip, shape)?;
        // SAFETY: `write` found the view to be inside its region and aligned, and is not used for writing; work that writes the
        // region is enqueued on the decoder's stream before or after what reads this view, never beside it.
        Ok(unsafe { TensorRef::from_raw(view.ptr(), view.dtype(), Shape::new(shape)?) })
    }
}
