//! The words that go to the device before each pass (tokens, positions, where sequences begin, rows of an embedding table that
//! stays in its file) and those that come back (the tokens found), through memory that the device knows, so that sending
//! neither blocks nor allocates.

use std::{mem::ManuallyDrop, slice};

use crate::{
    arena::Arena,
    device::{Device, TensorMut, TensorRef},
    dtype::DType,
    error::Result,
    layout::slot_bytes,
};

/// **Invariant**: the device uses the memory only until `done`, for which every access by the host waits first.
pub(super) struct Exchange<D: Device> {
    device: D,
    done: D::Event,
    words: usize,
    /// Dropped in this order: the device forgets the memory before it is unmapped.
    registration: ManuallyDrop<D::Registration>,
    host: ManuallyDrop<Arena>,
}

impl<D: Device> Exchange<D> {
    /// What an exchange of up to so many words of 32 bits takes.
    pub(super) fn bytes(words: usize) -> usize {
        slot_bytes(words.saturating_mul(size_of::<u32>()))
    }

    pub(super) fn new(device: &D, what: &'static str, words: usize) -> Result<Self> {
        let host = Arena::new(what, 1, Self::bytes(words))?;
        let (start, bytes) = host.whole();
        // SAFETY: the arena that holds the bytes is dropped after the registration, or never: see `drop`.
        let registration = unsafe { device.register(start.as_ptr(), bytes)? };
        let (done, device) = (device.event()?, device.clone());
        Ok(Self { device, done, words, registration: ManuallyDrop::new(registration), host: ManuallyDrop::new(host) })
    }

    /// The words, for filling, once the device is done with what was there.
    pub(super) fn words(&mut self) -> Result<&mut [u32]> {
        self.device.synchronize(&self.done)?;
        // SAFETY: the slot is page-aligned, at least `words` words long and zeroed at first. The device is done with it after
        // the wait, and the mutable borrow of `self` keeps everyone else away from it.
        Ok(unsafe { slice::from_raw_parts_mut(self.host.slot(0).as_ptr().cast(), self.words) })
    }

    /// Enqueues the copy of as many words as `to` has, from the first on.
    pub(super) fn send(&mut self, to: TensorMut<'_, D>, stream: &D::Stream) -> Result<()> {
        assert!(
            matches!(to.dtype(), DType::F32 | DType::U32) && to.elements() <= self.words,
            "{to:?} for {} words",
            self.words
        );
        // SAFETY: both are `to.bytes()` long, by the assertion; the host touches and frees the slot only after it waited for `done`,
        // recorded behind the copy, and work on `to` is ordered by the stream.
        unsafe { self.device.copy_to_device(to.ptr(), self.host.slot(0).as_ptr(), to.bytes(), stream)? };
        self.device.record(&self.done, stream)
    }

    /// The words of `from`, once all work of `stream` before this is done.
    pub(super) fn receive(&mut self, from: TensorRef<'_, D>, stream: &D::Stream) -> Result<&[u32]> {
        assert!(from.dtype() == DType::U32 && from.elements() <= self.words, "{from:?} for {} words", self.words);
        self.device.synchronize(&self.done)?;
        // SAFETY: `from` is `from.bytes()` long, and so is the slot by the assertion. Nothing else uses the slot after the
        // wait, nor before the next one, for `done`, recorded behind the copy; work on `from` is ordered by the stream.
        unsafe { self.device.copy_to_host(self.host.slot(0).as_ptr(), from.ptr(), from.bytes(), stream)? };
        self.device.record(&self.done, stream)?;
        Ok(&self.words()?[..from.elements()])
    }
}

impl<D: Device> Drop for Exchange<D> {
    fn drop(&mut self) {
        // If the wait fails, the device may still use the memory, which then stays.
        if self.device.synchronize(&self.done).is_ok() {
            // SAFETY: each is dropped here and nowhere else, and never used after; the device is done with the memory.
            unsafe {
                ManuallyDrop::drop(&mut self.registration);
                ManuallyDrop::drop(&mut self.host);
            }
        }
    }
}
