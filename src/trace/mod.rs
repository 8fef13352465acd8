//! What the pipeline does with its time. Stages say when something begins and when it has ended; these spans feed the sums of
//! [`Stats`], every [`Observer`], and the ranges of NVTX (feature `nvtx`). Without an observer a span costs two looks at the
//! clock and a few atomic additions.
//!
//! A stage is *starved* while it waits for the stage before it, *blocked* while it waits for a slot from the stage after it,
//! and *busy* the rest of the time. A unit's way through a stage is a span of its own: reads of neighbouring units overlap,
//! and layers that are held end in any order.

pub(crate) mod clock;
#[cfg(feature = "nvtx")]
mod nvtx;
mod stats;
#[cfg(not(loom))]
pub mod timeline;
mod verdict;

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::error::Error;
pub(crate) use stats::Carried;
use stats::Counters;
pub use stats::{PackedInRam, PassStats, StageStats, Stats};
pub use verdict::{Bound, Verdict};

/// A stage of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Disk to the first host slot.
    Read,
    /// Pageable RAM to pinned RAM.
    Pin,
    /// Host to device.
    Transfer,
    /// The caller's layer function, and whatever else it does between two layers.
    Compute,
}

impl Stage {
    /// All stages, in the order of the data.
    pub const ALL: [Stage; 4] = [Stage::Read, Stage::Pin, Stage::Transfer, Stage::Compute];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        ["read", "pin", "transfer", "compute"][self as usize]
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a stage does during a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// A unit goes through the stage: it is read, copied, or computed with. A unit that is kept further on passes without one.
    Unit {
        /// Its number in the pass, from 0.
        unit: usize,
        /// The trip on which it was read or handed on, from 0. A rewind begins another.
        pass: u64,
    },
    /// The stage waits for the stage before it.
    Starved,
    /// The stage waits for a slot from the stage after it.
    Blocked,
}

/// A span that has begun.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    /// Whose time.
    pub stage: Stage,
    /// Spent how.
    pub activity: Activity,
    /// Bytes that the unit moves (compute: that it has in its files); 0 for waits.
    pub bytes: usize,
    /// When it began.
    pub start: Instant,
}

/// A span that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Whose time.
    pub stage: Stage,
    /// Spent how.
    pub activity: Activity,
    /// Bytes that the unit moved; 0 for waits, and where the unit was given up: a read that failed, or a pass that was left.
    pub bytes: usize,
    /// When it began.
    pub start: Instant,
    /// When it ended.
    pub end: Instant,
}

/// A moment worth knowing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Mark {
    /// The caller asks for the first unit of a pass.
    PassBegun {
        /// Passes completed before.
        passes: u64,
    },
    /// The caller has given the last unit of a pass back.
    PassEnded {
        /// Passes completed, this one included.
        passes: u64,
    },
    /// The pipeline was sent back to the first unit.
    Rewind,
    /// The pass was cancelled, and the caller learns of it.
    Cancelled,
    /// The memory that keeps this unit is not present yet: the unit passes through slots, and is read once more.
    Late {
        /// Its number in the pass.
        unit: usize,
    },
    /// Reads are under way, and for ten seconds none has ended. The pass, or what loads static tensors, waits on; a cancel ends the
    /// wait.
    Silent {
        /// One of the files that are being read.
        file: PathBuf,
        /// How long none has.
        since: Duration,
    },
    /// A pass, or the streamer for good, has failed: the first error of either, in the thread where it happened. The caller
    /// gets it in the place of the unit at fault.
    Failed(Error),
    /// Device or disk did not answer at teardown: this many bytes are left reserved, since it might still touch them.
    Leaked {
        /// Host and device bytes together.
        bytes: usize,
    },
}

/// What a streamer is made of, told before anything streams.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The device, in its own words.
    pub device: String,
    /// By unit: its name, its bytes as stored, and where it is kept.
    pub units: Vec<(String, usize, crate::plan::Tier)>,
    /// Slots of the rings in pageable RAM, in pinned RAM and on the device; 0 where there is no such ring.
    pub slots: [usize; 3],
}

/// Sees spans and marks as they happen, in the thread where they happen: it must be quick, must not call the streamer, and
/// where nothing may be allocated must not allocate.
pub trait Observer: Send + Sync {
    /// The streamer has reserved its memory and is about to start its threads.
    fn started(&self, _about: &About) {}
    /// A span begins. A panic ends the streamer.
    fn begin(&self, _span: &Begun) {}
    /// A span has ended. A panic ends the streamer.
    fn end(&self, _span: &Span) {}
    /// A copy ([`Stage::Transfer`]) or a layer ([`Stage::Compute`]) has ended on the device, which timed it by events of its
    /// own. Told some time after; only where [`times_device`](Observer::times_device) asks for it and the device works by itself.
    fn on_device(&self, _span: &Span) {}
    /// A copy or layer was not timed by the device, since too many were under way.
    fn untimed(&self, _stage: Stage) {}
    /// Something happened. A panic is ignored.
    fn mark(&self, _mark: &Mark) {}
    /// Whether copies and layers shall be timed on the device, which takes events that are timed. Asked once, before the start.
    fn times_device(&self) -> bool {
        false
    }
}

/// A span that its stage will end, by [`Trace::end`].
#[derive(Debug)]
#[must_use = "a span that has begun must end"]
pub(crate) struct Open {
    begun: Begun,
    /// NVTX's number of the range, where a tool is attached.
    #[cfg(feature = "nvtx")]
    range: u64,
}

/// A stage that does not wait is at work, on whichever unit.
const WORK: Activity = Activity::Unit { unit: 0, pass: 0 };

/// Who observes, and whether they may still be called.
#[derive(Default)]
struct Observers {
    all: Vec<Arc<dyn Observer>>,
    /// Calls under way.
    inside: AtomicUsize,
    closed: AtomicBool,
}

impl Observers {
    fn tell(&self, what: impl FnMut(&Arc<dyn Observer>)) {
        struct Inside<'a>(&'a AtomicUsize);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        if self.all.is_empty() {
            return;
        }
        // Either this sees that it is closed, or who closes it sees this call.
        self.inside.fetch_add(1, Ordering::SeqCst);
        let _inside = Inside(&self.inside);
        if !self.closed.load(Ordering::SeqCst) {
            self.all.iter().for_each(what);
        }
    }

    /// Returns once nobody is being told anything.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while self.inside.load(Ordering::SeqCst) > 0 {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

/// The sums, and whoever observes.
#[derive(Default)]
pub(crate) struct Trace {
    counters: Counters,
    observers: Observers,
    /// Once started, where a tool is attached.
    #[cfg(feature = "nvtx")]
    nvtx: Option<nvtx::Nvtx>,
}

impl Trace {
    /// Where the first `filling` passes fill what is kept, or as many as it takes until [`Trace::filled`].
    pub(crate) fn new(observers: &[Arc<dyn Observer>], filling: Option<usize>) -> Self {
        Self {
            counters: Counters::new(filling),
            observers: Observers { all: observers.to_vec(), ..Observers::default() },
            #[cfg(feature = "nvtx")]
            nvtx: None,
        }
    }

    pub(crate) fn started(&mut self, about: &About) {
        #[cfg(feature = "nvtx")]
        {
            self.nvtx = nvtx::Nvtx::new(about);
        }
        self.observers.tell(|observer| observer.started(about));
    }

    pub(crate) fn times_device(&self) -> bool {
        self.observers.all.iter().any(|observer| observer.times_device())
    }

    /// The stage's thread begins its work.
    pub(crate) fn enter(&self, stage: Stage) {
        self.counters.settle(stage, WORK, clock::now());
    }

    pub(crate) fn begin(&self, stage: Stage, activity: Activity, bytes: usize) -> Open {
        self.begin_at(stage, activity, bytes, clock::now())
    }

    /// The same from `start` on, when the caller looked at the clock.
    pub(crate) fn begin_at(&self, stage: Stage, activity: Activity, bytes: usize, start: Instant) -> Open {
        let begun = Begun { stage, activity, bytes, start };
        if !matches!(activity, Activity::Unit { .. }) {
            self.counters.settle(stage, activity, start);
        }
        self.observers.tell(|observer| observer.begin(&begun));
        Open {
            // After the observers, who may panic: a range that has begun is ended.
            #[cfg(feature = "nvtx")]
            range: self.nvtx.as_ref().map_or(0, |nvtx| nvtx.begin(&begun)),
            begun,
        }
    }

    /// Ends a span; returns when.
    pub(crate) fn end(&self, open: Open) -> Instant {
        self.ended(open, true)
    }

    /// Ends the span of a unit that was not moved to the end.
    pub(crate) fn give_up(&self, open: Open) {
        self.ended(open, false);
    }

    fn ended(&self, open: Open, moved: bool) -> Instant {
        let Begun { stage, activity, bytes, start } = open.begun;
        let (bytes, end) = (if moved { bytes } else { 0 }, clock::now());
        #[cfg(feature = "nvtx")]
        if let Some(nvtx) = &self.nvtx {
            nvtx.end(&open.begun, open.range);
        }
        if !matches!(activity, Activity::Unit { .. }) {
            self.counters.settle(stage, WORK, end);
        }
        let span = Span { stage, activity, bytes, start, end };
        self.observers.tell(|observer| observer.end(&span));
        end
    }

    /// The device's own time of a copy or layer.
    pub(crate) fn on_device(&self, span: &Span) {
        self.observers.tell(|observer| observer.on_device(span));
    }

    pub(crate) fn untimed(&self, stage: Stage) {
        self.observers.tell(|observer| observer.untimed(stage));
    }

    pub(crate) fn mark(&self, mark: &Mark) {
        #[cfg(feature = "nvtx")]
        if let Some(nvtx) = &self.nvtx {
            nvtx.mark(mark);
        }
        self.observers.tell(|observer| {
            // Marks come where an error is kept and where things end: both must go on.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| observer.mark(mark)));
        });
    }

    /// From its return on nobody is told anything, whatever a thread that was left to itself may still do.
    pub(crate) fn close(&self) {
        self.observers.close();
    }

    /// What the stage waited for is its own work after all, which went on elsewhere: its wait under way counts as such in the sums.
    pub(crate) fn waited_for_work(&self, stage: Stage) {
        self.counters.relabel(stage, WORK);
    }

    /// Bytes that a read brought.
    pub(crate) fn count_read(&self, bytes: usize, direct: bool) {
        self.counters.count_read(bytes, direct);
    }

    /// Counts a unit that a stage has moved to the end, in the order in which it hands units on.
    pub(crate) fn count(&self, stage: Stage, carried: Carried) {
        self.counters.count(stage, carried);
    }

    /// All is kept that will be.
    pub(crate) fn filled(&self) {
        self.counters.filled();
    }

    /// The reader has looked for all units of a pass whether they are there.
    pub(crate) fn trip_looked(&self) {
        self.counters.trip_looked();
    }

    /// A stage has handed on the last unit of a pass.
    pub(crate) fn trip_ended(&self, stage: Stage) {
        self.counters.trip_ended(stage);
    }

    /// A stage goes back to the first unit: what the present trip moved is no pass's.
    pub(crate) fn trip_left(&self, stage: Stage) {
        self.counters.trip_left(stage);
    }

    /// The caller asks for the first unit of a pass.
    pub(crate) fn pass_begun(&self, passes: u64) {
        self.counters.pass_begun();
        self.mark(&Mark::PassBegun { passes });
    }

    /// The caller has given the last unit of a pass back.
    pub(crate) fn pass_ended(&self, passes: u64) {
        self.counters.pass_ended();
        self.mark(&Mark::PassEnded { passes });
    }

    /// The caller leaves the pass.
    pub(crate) fn pass_left(&self) {
        self.counters.pass_left();
        self.mark(&Mark::Rewind);
    }

    /// The sums so far; what else [`Stats`] has is for the caller to add.
    pub(crate) fn stats(&self) -> Stats {
        self.counters.stats()
    }
}
