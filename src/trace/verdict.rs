//! Which stage a pass waits for, and the one thing that would change it.

use std::fmt;

use serde::Serialize;

use super::{PassStats, Stage};

/// What a pass waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Bound {
    /// Reads past the page cache.
    Disk,
    /// Reads through the page cache, most of all that was read.
    PageCache,
    /// Copies from pageable to pinned RAM.
    Pin,
    /// Copies to the device.
    Transfer,
    /// The caller's work, or the device's.
    Compute,
}

/// What bounds passes, and what would help.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What was at work for the largest part of a pass.
    pub bound: Bound,
    /// That part: 1 is all of it.
    pub busy: f64,
    /// Whether anything moved: nothing does where all units are on the device, or are used where the page cache has them.
    pub moves: bool,
    /// Whether the device has memory of its own, behind a link.
    pub linked: bool,
    /// Whether anything was read.
    pub reads: bool,
    /// Whether these passes fill what is kept: those after them move less.
    pub fills: bool,
}

/// From this share of a pass on.
const FULL: f64 = 0.85;

/// Copies that wait for computation for this share of a pass are held up by it. Where they are not, it hides behind them.
const HELD_UP: f64 = 0.1;

impl Verdict {
    /// Judges passes by what their stages did. `linked`: the device has memory of its own.
    ///
    /// The caller's stage counts as at work also while the transfer waits for a slot on the device. Behind a link the caller only
    /// enqueues, and waits for all of it in the end: what tells there is whether copies wait for the computation. Where they do,
    /// it is at work all the time that there are layers.
    pub fn of(passes: &PassStats, linked: bool) -> Self {
        let share = |stage: Stage, kind: usize| passes.stage_seconds[stage as usize][kind] / passes.seconds.max(1e-9);
        let reads = if passes.buffered_bytes > passes.direct_bytes { Bound::PageCache } else { Bound::Disk };
        let (called, blocked) = (share(Stage::Compute, BUSY), share(Stage::Transfer, BLOCKED));
        let compute = match linked && passes.transferred_bytes > 0.0 {
            true if blocked >= HELD_UP => share(Stage::Transfer, BUSY) + blocked,
            true => blocked,
            false => called.max(blocked),
        };
        let read_bytes = passes.direct_bytes + passes.buffered_bytes;
        let stages = [
            (reads, Stage::Read, read_bytes),
            (Bound::Pin, Stage::Pin, passes.pinned_bytes),
            (Bound::Transfer, Stage::Transfer, passes.transferred_bytes),
        ];
        // A stage that moves nothing still hands units on, for which a busy machine may take long; nobody waits for its bytes.
        let moving = stages.into_iter().filter(|(_, _, bytes)| *bytes > 0.0);
        let shares = moving.map(|(bound, stage, _)| (bound, share(stage, BUSY)));
        let most = |most: (Bound, f64), other: (Bound, f64)| if other.1 > most.1 { other } else { most };
        let (bound, busy) = shares.fold((Bound::Compute, compute), most);
        let (moves, reads) = (read_bytes + passes.pinned_bytes + passes.transferred_bytes > 0.0, read_bytes > 0.0);
        Self { bound, busy: busy.clamp(0.0, 1.0), moves, linked, reads, fills: false }
    }

    /// Whether it was at work all the time, but for what timing and hand-overs take. Else the stages wait for one another in turn.
    pub fn is_full(&self) -> bool {
        self.busy >= FULL
    }

    /// What would help, and what would not.
    pub fn advice(&self) -> &'static str {
        match (self.bound, self.linked) {
            _ if !self.moves => "nothing moves, so neither more memory nor deeper rings would help",
            (Bound::Compute, _) if self.is_full() => "neither more memory nor deeper rings would help",
            _ if !self.is_full() && self.reads => {
                "in the rest of it the stages wait for one another, and deeper rings (n_cpu_pinned) would help"
            }
            _ if !self.is_full() => {
                "in the rest of it the stages wait for one another, and a deeper ring (n_gpu) would help"
            }
            (Bound::Disk | Bound::PageCache, true) => {
                "more RAM or GPU memory for layers would help, deeper rings would not"
            }
            (Bound::Disk | Bound::PageCache, false) => "more RAM for layers would help, deeper rings would not",
            (Bound::Pin, _) => {
                "skipping this stage (n_cpu 0, layers kept in pinned RAM) would help, deeper rings would not"
            }
            (_, true) => "more GPU memory for layers would help, more RAM or deeper rings would not",
            (_, false) => "keeping layers on the device (tier gpu, here RAM too) would help, deeper rings would not",
        }
    }
}

impl fmt::Display for Verdict {
    /// In one line: `bound by the disk, busy 97 % of a pass: more RAM for layers would help, deeper rings would not`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.bound, self.linked) {
            (Bound::Disk, _) => "the disk",
            (Bound::PageCache, _) => "copies from the page cache",
            (Bound::Pin, _) => "copies to pinned RAM",
            (Bound::Transfer, true) => "the link to the device",
            (Bound::Transfer, false) => "copies within RAM",
            (Bound::Compute, _) => "the computation",
        };
        let busy = 100.0 * self.busy;
        if self.fills {
            return write!(f, "the first pass, which fills what is kept, was bound by {what}, busy {busy:.0} % of it");
        }
        write!(f, "bound by {what}, busy {busy:.0} % of a pass: {}", self.advice())
    }
}

/// Places in [`PassStats::stage_seconds`].
const BUSY: usize = 0;
const BLOCKED: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_that_moves_nothing_bounds_nothing() {
        let mut passes = PassStats { passes: 1, seconds: 1.0, transferred_bytes: 1e6, ..PassStats::default() };
        passes.stage_seconds[Stage::Read as usize][BUSY] = 0.9;
        passes.stage_seconds[Stage::Pin as usize][BUSY] = 0.8;
        passes.stage_seconds[Stage::Transfer as usize][BUSY] = 0.3;
        assert_eq!(Verdict::of(&passes, false).bound, Bound::Transfer);
        passes.pinned_bytes = 1e6;
        assert_eq!(Verdict::of(&passes, false).bound, Bound::Pin);
        passes.direct_bytes = 1e6;
        assert_eq!(Verdict::of(&passes, false).bound, Bound::Disk);
    }
}
