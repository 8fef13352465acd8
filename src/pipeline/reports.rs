//! What a device tells of packed weights that it found corrupt: a word for each packed tensor, in memory of the host's that the
//! device writes by itself. Nobody waits for that; whoever uses what was computed with the weights looks first.

use std::{
    mem::ManuallyDrop,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering::Acquire},
};

use crate::{
    arena::Arena,
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, Result},
    layout::UnitLayout,
    packed::CORRUPT,
};

/// The words. **Invariant**: whoever enqueues work that may write them keeps them until that is done.
pub(super) struct Reports<D: Device> {
    /// By word: the packed tensor that it is about, and its file.
    tensors: Vec<(PathBuf, String)>,
    /// Dropped in this order: the device forgets the memory before it is unmapped.
    registration: ManuallyDrop<D::Registration>,
    words: ManuallyDrop<Arena>,
}

// SAFETY: the registration is not touched before it is dropped, and the words are atomics.
unsafe impl<D: Device> Sync for Reports<D> {}

impl<D: Device> Reports<D> {
    /// For the packed tensors of these units; `None` if there are none.
    pub(super) fn new(device: &D, checkpoint: &Checkpoint, units: &[UnitLayout]) -> Result<Option<Self>> {
        let reports = units.iter().flat_map(UnitLayout::reports);
        let tensors: Vec<_> =
            reports.map(|(file, tensor)| (checkpoint.files()[file].clone(), tensor.to_owned())).collect();
        if tensors.is_empty() {
            return Ok(None);
        }
        let words = Arena::new("reports of corrupt weights", 1, size_of::<u32>() * tensors.len())?;
        let (start, bytes) = words.whole();
        // SAFETY: the words are dropped after the registration.
        let registration = unsafe { device.register(start.as_ptr(), bytes)? };
        Ok(Some(Self { tensors, registration: ManuallyDrop::new(registration), words: ManuallyDrop::new(words) }))
    }

    /// Where the device reports of the packed tensor of this number.
    pub(super) fn word(&self, number: usize) -> *mut u32 {
        assert!(number < self.tensors.len());
        // SAFETY: the arena has so many words.
        unsafe { self.words.slot(0).as_ptr().cast::<u32>().add(number) }
    }

    /// Whether nothing was reported so far.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the first tensor that is corrupt, and its file.
    pub(super) fn check(&self) -> Result<()> {
        let is_set = |number: usize| {
            // SAFETY: an aligned word that only atomics and the device touch.
            unsafe { AtomicU32::from_ptr(self.word(number)) }.load(Acquire) != 0
        };
        let mut tensors = self.tensors.iter().enumerate();
        tensors
            .find(|(number, _)| is_set(*number))
            .map_or(Ok(()), |(_, (path, tensor))| Err(Error::tensor(path, tensor, CORRUPT)))
    }
}

impl<D: Device> Drop for Reports<D> {
    fn drop(&mut self) {
        // SAFETY: each is dropped here and nowhere else, and never used after; nothing is enqueued any more that writes the words.
        unsafe {
            ManuallyDrop::drop(&mut self.registration);
            ManuallyDrop::drop(&mut self.words);
        }
    }
}
