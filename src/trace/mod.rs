//! What the pipeline does with its time. Every stage reports spans and marks; [`Stats`] are sums of the same spans, and an
//! [`Observer`] sees each one. Without an observer a span costs a few atomic additions.

pub mod timeline;

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_utils::CachePadded;

use crate::{error::Error, plan::Reader};

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

/// What a stage was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Moving bytes or computing.
    Busy,
    /// Waiting for the stage before it.
    Starved,
    /// Waiting for a slot from the stage after it.
    Blocked,
}

/// A stretch of a stage's time.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Whose time.
    pub stage: Stage,
    /// Spent how.
    pub activity: Activity,
    /// The unit that was moved or computed, where it was one.
    pub unit: Option<usize>,
    /// Bytes moved.
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
    /// The pipeline was sent back to the first unit.
    Rewind,
    /// The pass was cancelled, and the caller learns of it.
    Cancelled,
    /// A pass, or the streamer for good, has failed: the first error of either, in the thread where it happened. The caller
    /// gets it in the place of the unit at fault.
    Failed(Error),
    /// The device did not answer at teardown: this many bytes are left reserved, since it might still touch them.
    Leaked {
        /// Host and device bytes together.
        bytes: usize,
    },
}

/// Sees every span and mark as it happens, in the thread where it happens: it must be quick, and must not call the streamer.
pub trait Observer: Send + Sync {
    /// A stage's stretch of time has ended. A panic ends the streamer.
    fn span(&self, _span: &Span) {}
    /// Something happened. A panic is ignored.
    fn mark(&self, _mark: &Mark) {}
}

/// Where one stage's time went since the streamer started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageStats {
    /// Whole units handed on.
    pub units: u64,
    /// Bytes moved; for compute, the bytes of the units it was given.
    pub bytes: u64,
    /// Time at work.
    pub busy: Duration,
    /// Time waiting for the stage before.
    pub starved: Duration,
    /// Time waiting for the stage after.
    pub blocked: Duration,
}

/// Counts since the streamer started.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// By [`Stage`]; a skipped stage stays at zero.
    pub stages: [StageStats; 4],
    /// Bytes read past the page cache.
    pub direct_bytes: u64,
    /// Bytes read through the page cache.
    pub buffered_bytes: u64,
    /// Files that are only read through the page cache, each with the reason.
    pub buffered_files: Vec<(PathBuf, String)>,
    /// Who reads.
    pub reader: Reader,
    /// Why it is not a faster reader; empty if it is the fastest, or was asked for.
    pub reader_reason: String,
}

impl Stats {
    /// One stage's counts.
    pub fn stage(&self, stage: Stage) -> &StageStats {
        &self.stages[stage as usize]
    }

    /// The stage that was at work most: the one to make faster.
    pub fn bottleneck(&self) -> Stage {
        Stage::ALL.into_iter().max_by_key(|&stage| self.stage(stage).busy).expect("there are four")
    }
}

#[derive(Default)]
struct Counters {
    units: AtomicU64,
    bytes: AtomicU64,
    nanos: [AtomicU64; 3],
}

/// The sums, and the observer if there is one.
#[derive(Default)]
pub(crate) struct Trace {
    stages: [CachePadded<Counters>; 4],
    direct_bytes: AtomicU64,
    buffered_bytes: AtomicU64,
    observer: Option<Arc<dyn Observer>>,
}

impl Trace {
    pub(crate) fn new(observer: Option<Arc<dyn Observer>>) -> Self {
        Self { observer, ..Self::default() }
    }

    pub(crate) fn span(&self, span: &Span) {
        let counters = &self.stages[span.stage as usize];
        let nanos = (span.end - span.start).as_nanos() as u64;
        counters.nanos[span.activity as usize].fetch_add(nanos, Relaxed);
        counters.bytes.fetch_add(span.bytes as u64, Relaxed);
        counters.units.fetch_add(u64::from(span.unit.is_some()), Relaxed);
        if let Some(observer) = &self.observer {
            observer.span(span);
        }
    }

    pub(crate) fn mark(&self, mark: &Mark) {
        if let Some(observer) = &self.observer {
            // Marks come where an error is kept and where things end: both must go on.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| observer.mark(mark)));
        }
    }

    pub(crate) fn count_read(&self, bytes: usize, direct: bool) {
        let counter = if direct { &self.direct_bytes } else { &self.buffered_bytes };
        counter.fetch_add(bytes as u64, Relaxed);
    }

    /// The sums so far; which files are read buffered is for the caller to add.
    pub(crate) fn stats(&self) -> Stats {
        let duration = |counters: &Counters, activity: Activity| {
            Duration::from_nanos(counters.nanos[activity as usize].load(Relaxed))
        };
        Stats {
            stages: std::array::from_fn(|stage| {
                let counters = &self.stages[stage];
                StageStats {
                    units: counters.units.load(Relaxed),
                    bytes: counters.bytes.load(Relaxed),
                    busy: duration(counters, Activity::Busy),
                    starved: duration(counters, Activity::Starved),
                    blocked: duration(counters, Activity::Blocked),
                }
            }),
            direct_bytes: self.direct_bytes.load(Relaxed),
            buffered_bytes: self.buffered_bytes.load(Relaxed),
            ..Stats::default()
        }
    }
}
