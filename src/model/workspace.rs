//! The decoder's own device memory: one allocation, cut into regions that never overlap.

use std::cell::Cell;

use crate::{
    device::{Device, Shape, TensorMut, TensorRef},
    dtype::DType,
    error::{Error, Result},
    layout::{DEVICE_ALIGN, Offsets},
};

/// A part of a [`Workspace`], of one type, used with any shape that fits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    at: usize,
    elements: usize,
    dtype: DType,
}

/// Adds up regions before anything is reserved.
pub(super) struct Layout {
    regions: Cell<Offsets>,
    overflow: Cell<bool>,
}

impl Default for Layout {
    fn default() -> Self {
        Self { regions: Cell::new(Offsets::aligned_to(DEVICE_ALIGN)), overflow: Cell::default() }
    }
}

impl Layout {
    /// A region for a tensor of at most these dimensions.
    pub(super) fn region(&self, dtype: DType, shape: &[usize]) -> Region {
        let mut regions = self.regions.get();
        let at = dtype.bytes_of(shape).and_then(|bytes| regions.push(bytes));
        self.regions.set(regions);
        self.overflow.set(self.overflow.get() || at.is_none());
        Region { at: at.unwrap_or(0), elements: shape.iter().fold(1, |n, &dim| n.saturating_mul(dim)), dtype }
    }

    /// Bytes of all regions.
    pub(super) fn bytes(&self) -> Result<usize> {
        if self.overflow.get() {
            return Err(Error::setting("context", "needs more memory than can be addressed"));
        }
        Ok(self.regions.get().bytes())
    }
}

/// **Invariant**: regions of one layout are disjoint, and the decoder makes one view of any part of a region at a time, or several
/// for reading.
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
        let ptr = self.device.address(&self.memory).offset(region.at + region.dtype.bytes(skip));
        // SAFETY: the assertion keeps the view inside the region, which is aligned and lies in this memory. Work on the memory is all on
        // the decoder's stream, in order, and the memory stays until that is done, as every device promises.
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
