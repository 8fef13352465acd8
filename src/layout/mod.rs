//! The only arithmetic of bytes: extents of files, offsets in slots, and what slots, tiers and staging blocks take.
//!
//! What is planned, what is printed and what is reserved are the same sums because all three ask this module.

mod arriving;
mod repack;
mod stream;
mod unit;

pub(crate) use arriving::{Cast, CopyRange, Dequantise, Unpack};
pub(crate) use repack::{REPACK_ALIGN, Repacked};
pub use stream::Sharing;
pub(crate) use stream::{Rings, Space, StageLayout, Staging, StreamLayout, Tallies, Tally};
#[cfg(test)]
pub(crate) use unit::MAX_GAP;
pub(crate) use unit::{Extent, Placed, UnitLayout};

/// What O_DIRECT asks of memory addresses, file offsets and lengths (bytes); also the page size.
pub(crate) const PAGE: usize = 4096;

/// Every tensor starts on such a boundary in device memory (bytes), as kernels with 16-byte accesses and cuBLAS like it.
pub const DEVICE_ALIGN: usize = 256;

/// The most bytes that a unit, or what is kept in one place, may be: as far as a pointer reaches, whole pages.
pub(crate) const MOST: usize = isize::MAX as usize / PAGE * PAGE;

/// So many bytes, rounded up to whole pages; more than [`MOST`] stays more than can be reserved.
pub(crate) fn pages(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(PAGE).unwrap_or(usize::MAX / PAGE * PAGE)
}

/// What a slot for up to so many bytes takes: at least a page, so that each has an address of its own.
pub(crate) fn slot_bytes(largest: usize) -> usize {
    pages(largest).max(PAGE)
}

/// Things that lie one behind the other, each on a multiple of `align` bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offsets {
    align: usize,
    bytes: usize,
}

impl Offsets {
    /// An empty one.
    pub(crate) fn aligned_to(align: usize) -> Self {
        Self { align, bytes: 0 }
    }

    /// Where the next thing, of so many bytes, lies; `None` if it would end beyond [`MOST`], and then it is not added.
    pub(crate) fn push(&mut self, bytes: usize) -> Option<usize> {
        let at = self.bytes;
        let end = at.checked_add(bytes)?.checked_next_multiple_of(self.align)?;
        self.bytes = Some(end).filter(|end| *end <= MOST)?;
        Some(at)
    }

    /// What all of them take.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What a unit moves in a pass (bytes read, bytes that arrive, of these what is used in place, and what is unpacked and to how much) and
/// takes where it is kept or in a slot (in RAM, on the device; there also with packed tensors as they are stored).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) read: usize,
    pub(crate) arriving: usize,
    pub(crate) in_place: usize,
    pub(crate) unpacked: [usize; 2],
    /// Whole pages.
    pub(crate) host: usize,
    /// In a slot in RAM on its way to where it is kept on the device: nothing where it is used in place.
    pub(crate) through: usize,
    /// In a slot of the device as it is stored, which is nothing where it is used in place; and where it comes packed out of RAM.
    pub(crate) passing: [usize; 2],
    /// A multiple of [`DEVICE_ALIGN`].
    pub(crate) device: usize,
    /// Likewise.
    pub(crate) packed: usize,
    /// Where it is kept packed in RAM: what it is expected to take, in whole pages, and the bytes of weights that come of that.
    pub(crate) repacked: [usize; 2],
}

impl Sizes {
    /// Whether the two take the same memory but for what rounding to pages makes of it, and move alike.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let near = |a: usize, b: usize| a.abs_diff(b) <= a.min(b) / 64;
        (self.in_place > 0) == (other.in_place > 0)
            && near(self.host, other.host)
            && near(self.device, other.device)
            && near(self.packed, other.packed)
    }

    /// Sums; one that no number holds is the largest there is.
    pub(crate) fn plus(self, other: Self) -> Self {
        self.with(other, usize::saturating_add)
    }

    /// What is left of sums when those of a part of the same units are taken away.
    pub(crate) fn minus(self, other: Self) -> Self {
        self.with(other, usize::saturating_sub)
    }

    pub(crate) fn max(self, other: Self) -> Self {
        self.with(other, usize::max)
    }

    fn with(self, other: Self, f: fn(usize, usize) -> usize) -> Self {
        let both = |a: [usize; 2], b: [usize; 2]| [f(a[0], b[0]), f(a[1], b[1])];
        Self {
            read: f(self.read, other.read),
            arriving: f(self.arriving, other.arriving),
            in_place: f(self.in_place, other.in_place),
            unpacked: both(self.unpacked, other.unpacked),
            repacked: both(self.repacked, other.repacked),
            host: f(self.host, other.host),
            through: f(self.through, other.through),
            passing: both(self.passing, other.passing),
            device: f(self.device, other.device),
            packed: f(self.packed, other.packed),
        }
    }
}
