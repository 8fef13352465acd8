//! Memory for slots: one anonymous mapping cut into equal, page-aligned slots, touched before the first read.

use std::{io, ptr::NonNull, sync::Arc, thread};

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::{
    error::{Error, Result},
    memory,
};

/// What O_DIRECT asks of memory addresses, file offsets and lengths; also the page size.
pub(crate) const PAGE: usize = 4096;

/// `slots` buffers of `slot_bytes` each, one after the other.
///
/// **Invariant** for everyone who writes through [`slot`](Arena::slot): a slot belongs to one stage at a time, and the
/// rings hand it on. The arena itself never reads or writes it after start.
pub(crate) struct Arena {
    map: MmapRaw,
    slot_bytes: usize,
    slots: usize,
}

impl Arena {
    /// Reserves the arena, in huge pages where the system grants them, and makes it present: first touch is slower than a
    /// disk and must not happen while streaming. A child process does not inherit it, a core dump leaves it out.
    pub(crate) fn new(what: &'static str, slots: usize, slot_bytes: usize) -> Result<Self> {
        let slot_bytes = slot_bytes.next_multiple_of(PAGE).max(PAGE);
        let bytes = slots.max(1).saturating_mul(slot_bytes);
        let failed = |source: io::Error| Error::Memory { what, bytes, source: Arc::new(source) };
        // The system may promise more than it has, and then kill whoever touches it.
        if let Some(available) = memory::free().filter(|&available| available < bytes) {
            let cause = format!("only {available} bytes are available");
            return Err(failed(io::Error::new(io::ErrorKind::OutOfMemory, cause)));
        }
        let map: MmapRaw = MmapOptions::new().len(bytes).map_anon().map_err(failed)?.into();
        // Older kernels lack some of these; the memory works without them.
        for advice in [Advice::HugePage, Advice::DontFork, Advice::DontDump] {
            let _ = map.advise(advice);
        }
        let arena = Self { map, slot_bytes, slots };
        match arena.populate() {
            // Linux before 5.14 does not know the advice.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for at in (0..bytes).step_by(PAGE) {
                    // SAFETY: inside the mapping, which nobody else knows yet.
                    unsafe { arena.map.as_mut_ptr().add(at).write(0) };
                }
            }
            other => other.map_err(failed)?,
        }
        Ok(arena)
    }

    /// Makes every page present, on several threads: the kernel zeroes pages, and in a virtual machine fetches them from
    /// the host, no faster than one thread can ask.
    fn populate(&self) -> io::Result<()> {
        const SHARE: usize = 64 << 20;
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = self.map.len().div_ceil(threads).next_multiple_of(PAGE).max(SHARE);
        let populate = |at: usize| self.map.advise_range(Advice::PopulateWrite, at, share.min(self.map.len() - at));
        thread::scope(|scope| {
            let spawn = |at| (at, thread::Builder::new().spawn_scoped(scope, move || populate(at)));
            let helpers: Vec<_> = (share..self.map.len()).step_by(share).map(spawn).collect();
            let first = populate(0);
            helpers.into_iter().fold(first, |so_far, (at, helper)| {
                // Without a thread the share is this one's.
                let own = |_| populate(at);
                so_far.and(helper.map_or_else(own, |helper| helper.join().expect("advice does not panic")))
            })
        })
    }

    /// The first byte of slot `index`, on a page boundary.
    pub(crate) fn slot(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.slots.max(1), "slot {index} of {}", self.slots);
        // SAFETY: the offset is inside the mapping by the assertion, and a mapping is never at address zero.
        unsafe { NonNull::new_unchecked(self.map.as_mut_ptr().add(index * self.slot_bytes)) }
    }

    /// The whole mapping: where it starts and how long it is.
    pub(crate) fn whole(&self) -> (NonNull<u8>, usize) {
        (self.slot(0), self.map.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_page_aligned_disjoint_and_present() {
        let arena = Arena::new("a test", 3, 5000).unwrap();
        let starts: Vec<_> = (0..3).map(|i| arena.slot(i).as_ptr() as usize).collect();
        assert_eq!(starts[0] % PAGE, 0);
        assert_eq!((starts[1] - starts[0], starts[2] - starts[0], arena.whole().1), (8192, 16384, 24576));
        let mut present = [0u8; 6];
        // SAFETY: the mapping is six pages long and the vector has a byte for each.
        let rc = unsafe { libc::mincore(arena.slot(0).as_ptr().cast(), 24576, present.as_mut_ptr()) };
        assert_eq!((rc, present), (0, [1; 6]));
    }

    #[test]
    fn more_memory_than_there_is_is_an_error_that_says_how_much() {
        let message = Arena::new("pinned slots", 1 << 20, 1 << 40).err().expect("an exbibyte").to_string();
        assert!(message.contains("pinned slots") && message.contains("1152921504606846976 bytes"), "{message}");
    }
}
