//! Bytes of files that are used where the page cache has them: nothing is read, and nothing is copied.

use std::{
    io,
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

use super::{Source, is_cached};
use crate::{
    layout::{Extent, UnitLayout},
    plan::{CachePolicy, Tier},
};

/// What a huge page has on most machines, in bytes.
pub(crate) const HUGE: usize = 2 << 20;

/// The files of one unit, mapped as a slot in RAM would hold its bytes.
///
/// The page cache may hold a file in huge pages. A processor sees them as such only where an address lies in its huge page as the
/// byte does in the file's: so the longest extent is placed. Sums of such a mapping take half of the time.
///
/// What is used so counts as memory of the process, so it is for units that are kept, in place of the memory that is planned for
/// them: of a unit one of the two is present, but for huge pages at its ends. A page that the page cache gives up is read anew
/// where it is touched, which is right but slow: whoever uses the mapping asks [before](Self::is_present). Where that cannot be,
/// since the file was cut short or the disk failed, the process ends (SIGBUS), as with any mapping.
pub(crate) struct MappedUnit {
    map: MmapRaw,
    /// Where the unit begins in it, and its length.
    at: usize,
    bytes: usize,
    /// Its pages are known to the processor, unless the page cache gave some up since.
    populated: AtomicBool,
    choice: AtomicU8,
}

/// Nobody has asked yet.
const OPEN: u8 = 0;
/// The unit is used from the page cache.
const MAPPED: u8 = 1;
/// It is read to the memory that is planned for it, for good.
const READ: u8 = 2;

impl MappedUnit {
    /// `None` where the unit is not to be used so, or cannot be.
    pub(crate) fn new(sources: &[Source], unit: &UnitLayout) -> Option<Self> {
        // A program that answers for a file system may not answer.
        let allows = |extent: &Extent| {
            let source = &sources[extent.file];
            source.policy == CachePolicy::Auto && !source.blocks
        };
        if !unit.in_place || unit.tier != Tier::Gpu || !unit.extents.iter().all(allows) {
            return None;
        }
        Self::map(sources, unit).ok()
    }

    fn map(sources: &[Source], unit: &UnitLayout) -> io::Result<Self> {
        let map: MmapRaw = MmapOptions::new().len(unit.host_bytes + HUGE).no_reserve_swap().map_anon()?.into();
        let longest = unit.extents.iter().max_by_key(|extent| extent.len);
        let wanted = longest.map_or(0, |extent| (extent.offset as usize).wrapping_sub(extent.at));
        let at = wanted.wrapping_sub(map.as_ptr().addr()) % HUGE;
        for extent in &unit.extents {
            let (file, offset) = (sources[extent.file].buffered.as_raw_fd(), extent.offset as libc::off_t);
            // SAFETY: extents lie in a slot's bytes, for which room was reserved above that nobody else knows, and `HUGE` bytes more
            // than that: `at` is less.
            let mapped = unsafe {
                let to = map.as_mut_ptr().add(at + extent.at).cast();
                libc::mmap(to, extent.len, libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED, file, offset)
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { map, at, bytes: unit.host_bytes, populated: AtomicBool::new(false), choice: AtomicU8::new(OPEN) })
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.at)
    }

    /// Whether the unit is used so: by what the page cache has when this is first asked, until it is not [present](Self::is_present).
    pub(crate) fn is_chosen(&self, sources: &[Source], unit: &UnitLayout) -> bool {
        if self.choice.load(Relaxed) == OPEN {
            let choice = if Self::is_cached(sources, unit) { MAPPED } else { READ };
            // Of two who ask at once, the first has said it.
            let _ = self.choice.compare_exchange(OPEN, choice, Relaxed, Relaxed);
        }
        self.choice.load(Relaxed) == MAPPED
    }

    /// Whether the unit is used so and the page cache has all of it, so that it can be used now. If not, it is to be read.
    pub(crate) fn is_present(&self, sources: &[Source], unit: &UnitLayout) -> bool {
        if !self.is_chosen(sources, unit) {
            return false;
        }
        let present = Self::is_cached(sources, unit) && (self.populated.load(Relaxed) || self.populate());
        self.populated.store(present, Relaxed);
        if !present {
            self.choice.store(READ, Relaxed);
            self.forget();
        }
        present
    }

    fn is_cached(sources: &[Source], unit: &UnitLayout) -> bool {
        #[cfg(test)]
        if unit.extents.iter().any(|extent| sources[extent.file].faults.has_given_up()) {
            return false;
        }
        let is_cached = |extent: &Extent| is_cached(&sources[extent.file].buffered, extent.offset, extent.needed());
        unit.extents.iter().all(is_cached)
    }

    /// Makes the pages known to the processor at once, which costs less than a fault for each, and tells of any that cannot be had.
    fn populate(&self) -> bool {
        self.map.advise_range(Advice::PopulateRead, self.at, self.bytes).is_ok()
    }

    /// To be called after each use: one may come after it was found that the page cache has not all of the unit.
    pub(crate) fn end_use(&self) {
        if self.choice.load(Relaxed) == READ {
            self.forget();
        }
    }

    /// What the page cache has of it counts as this process's no more. Whoever still uses it finds the same bytes.
    fn forget(&self) {
        // SAFETY: a mapping of files has their bytes, whether its pages are known to the processor or not.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.at, self.bytes) };
    }
}
