//! Ranges of memory that the runtime knows. Looking one up takes no lock and orders nothing: copies do it all the time.

use std::sync::atomic::{
    AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// More than any test has at a time.
const MOST: usize = 8192;

/// A range, if `start` is not 0. While it is [`CLAIMED`] the rest is being filled in.
pub(super) struct MemoryRange {
    start: AtomicUsize,
    end: AtomicUsize,
    /// The device whose memory it is.
    device: AtomicUsize,
    /// Copies that use it and are not done.
    pub(super) in_use: AtomicUsize,
}

const CLAIMED: usize = 1;

impl MemoryRange {
    const fn none() -> Self {
        let [start, end, device, in_use] = [const { AtomicUsize::new(0) }; 4];
        Self { start, end, device, in_use }
    }

    pub(super) fn start(&self) -> usize {
        self.start.load(Acquire)
    }

    pub(super) fn bytes(&self) -> usize {
        self.end.load(Relaxed) - self.start()
    }

    pub(super) fn device(&self) -> usize {
        self.device.load(Relaxed)
    }

    /// Takes it out. It must be there.
    pub(super) fn remove(&self) {
        self.start.store(0, Release);
    }
}

pub(super) struct Ranges {
    all: [MemoryRange; MOST],
    /// How many were ever used at a time.
    high: AtomicUsize,
}

impl Ranges {
    pub(super) const fn new() -> Self {
        Self { all: [const { MemoryRange::none() }; MOST], high: AtomicUsize::new(0) }
    }

    /// Adds a range; whether there was room.
    pub(super) fn add(&self, start: usize, bytes: usize, device: usize) -> bool {
        let claimed = self.all.iter().enumerate().find(|(_, range)| {
            range.start.load(Relaxed) == 0 && range.start.compare_exchange(0, CLAIMED, AcqRel, Relaxed).is_ok()
        });
        let Some((index, range)) = claimed else { return false };
        range.end.store(start + bytes, Relaxed);
        range.device.store(device, Relaxed);
        range.in_use.store(0, Relaxed);
        range.start.store(start, Release);
        self.high.fetch_max(index + 1, AcqRel);
        true
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &MemoryRange> {
        self.all[..self.high.load(Acquire)].iter().filter(|range| range.start() > CLAIMED)
    }

    pub(super) fn count(&self) -> usize {
        self.iter().count()
    }

    /// The range that starts there.
    pub(super) fn at(&self, start: usize) -> Option<&MemoryRange> {
        self.iter().find(|range| range.start() == start)
    }

    /// The range in which all of these bytes lie.
    pub(super) fn around(&self, start: usize, bytes: usize) -> Option<&MemoryRange> {
        self.iter().find(|range| {
            let begins = range.start();
            begins <= start && start.saturating_add(bytes) <= range.end.load(Relaxed) && range.start() == begins
        })
    }

    /// Whether any of these bytes is in a range.
    pub(super) fn touches(&self, start: usize, bytes: usize) -> bool {
        self.iter().any(|range| range.start() < start.saturating_add(bytes) && start < range.end.load(Relaxed))
    }
}
