//! Sums of spans: since the start, of the first pass, and of steady passes.

use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_utils::CachePadded;
use serde::Serialize;

use super::{Activity, Stage, clock};
use crate::plan::Reader;

/// Where one stage's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageStats {
    /// Units that were moved to the end; for compute, units given back. One that is kept further on passes uncounted.
    pub units: u64,
    /// Bytes of these units: read (rounded to pages), copied, or for compute as stored.
    pub bytes: u64,
    /// Time at work.
    #[serde(rename = "busy_seconds", serialize_with = "seconds")]
    pub busy: Duration,
    /// Time waiting for the stage before.
    #[serde(rename = "starved_seconds", serialize_with = "seconds")]
    pub starved: Duration,
    /// Time waiting for a slot from the stage after.
    #[serde(rename = "blocked_seconds", serialize_with = "seconds")]
    pub blocked: Duration,
}

fn seconds<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

/// The mean of some passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PassStats {
    /// How many passes these are.
    pub passes: u64,
    /// From the caller's first wish to the last unit given back, or from one such end to the next.
    pub seconds: f64,
    /// Bytes read past the page cache.
    pub direct_bytes: f64,
    /// Bytes read through the page cache.
    pub buffered_bytes: f64,
    /// Bytes of tensors used where the page cache has them.
    pub mapped_bytes: f64,
    /// Bytes copied from pageable to pinned RAM.
    pub pinned_bytes: f64,
    /// Bytes copied to the device.
    pub transferred_bytes: f64,
    /// By [`Stage`]: seconds at work, waiting for the stage before, and waiting for the stage after.
    pub stage_seconds: [[f64; 3]; 4],
}

/// How far the units are that are packed in RAM: all that are not packed are read from disk in every pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedInRam {
    /// How many are to be packed.
    pub units: usize,
    /// How many are.
    pub packed: usize,
    /// How many will not be: packed, they are larger than was planned, or they could not be read.
    pub given_up: usize,
}

impl PackedInRam {
    /// How many are yet to be packed.
    pub fn to_pack(self) -> usize {
        self.units - self.packed - self.given_up
    }
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
    /// Bytes of tensors used where the page cache has them, pass after pass.
    pub mapped_bytes: u64,
    /// Passes completed.
    pub passes: u64,
    /// The first pass, once it is complete.
    pub first: Option<PassStats>,
    /// The passes after those that fill what is kept, once there are any. Two passes fill, or one where nothing is kept; where
    /// units are packed in RAM, all passes up to the one in which the last of them was.
    pub steady: Option<PassStats>,
    /// How far the units are that are packed in RAM.
    pub packed: PackedInRam,
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

    /// What each stage did with its time in steady passes, or before there are any in the first one.
    pub fn waits(&self) -> Vec<String> {
        self.steady.or(self.first).map_or_else(Vec::new, |passes| passes.waits())
    }

    /// What happened since `before`, `seconds` ago, as if it was one pass.
    pub fn since(&self, before: &Self, seconds: f64) -> PassStats {
        let bytes = |stage: Stage| (self.stage(stage).bytes - before.stage(stage).bytes) as f64;
        PassStats {
            passes: 1,
            seconds,
            direct_bytes: (self.direct_bytes - before.direct_bytes) as f64,
            buffered_bytes: (self.buffered_bytes - before.buffered_bytes) as f64,
            mapped_bytes: (self.mapped_bytes - before.mapped_bytes) as f64,
            pinned_bytes: bytes(Stage::Pin),
            transferred_bytes: bytes(Stage::Transfer),
            stage_seconds: Stage::ALL.map(|stage| {
                let [now, then] = [self, before].map(|stats| *stats.stage(stage));
                let times = [(now.busy, then.busy), (now.starved, then.starved), (now.blocked, then.blocked)];
                times.map(|(now, then)| now.saturating_sub(then).as_secs_f64())
            }),
        }
    }
}

impl PassStats {
    /// What each stage did with its time: a line for each that did anything.
    pub fn waits(&self) -> Vec<String> {
        let share = |seconds: f64| 100.0 * seconds / self.seconds.max(1e-9);
        let skipped = |stage: Stage| stage == Stage::Pin && self.pinned_bytes == 0.0;
        let stages = Stage::ALL.into_iter().filter(|stage| !skipped(*stage));
        let line = |stage: Stage| {
            let [busy, starved, blocked] = self.stage_seconds[stage as usize].map(share);
            let mut line = format!("{stage}: busy {busy:.0} %");
            if stage > Stage::Read {
                line += &format!(", waits for the stage before {starved:.0} %");
            }
            if stage < Stage::Compute {
                line += &format!(", for a slot {blocked:.0} %");
            }
            line
        };
        stages.map(line).collect()
    }
}

/// What a stage moved with one unit, or with several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Carried {
    pub(crate) bytes: u64,
    /// Of a read: past the page cache, and through it.
    pub(crate) direct: u64,
    pub(crate) buffered: u64,
    /// Used from the page cache instead.
    pub(crate) mapped: u64,
}

impl Carried {
    pub(crate) fn count_read(&mut self, bytes: usize, direct: bool) {
        let bytes = bytes as u64;
        self.bytes += bytes;
        *(if direct { &mut self.direct } else { &mut self.buffered }) += bytes;
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.direct += other.direct;
        self.buffered += other.buffered;
        self.mapped += other.mapped;
    }
}

/// Passes that are told apart: the first, and steady ones. Those between are in neither.
const PHASES: usize = 2;
const FIRST: usize = 0;
const STEADY: usize = 1;

/// One stage's sums. Its own thread writes the atomic ones, any may read.
#[derive(Default)]
struct StageCounters {
    units: AtomicU64,
    bytes: AtomicU64,
    /// Nanoseconds at work, starved, blocked.
    nanos: [AtomicU64; 3],
    /// Which of these the present time is, and up to when it is counted: nanoseconds since the start, 0 before it has begun.
    kind: AtomicUsize,
    settled: AtomicU64,
    /// What was moved on the trip under way. Bytes belong to the trip of their unit, however far ahead the stage is.
    trip: [AtomicU64; 4],
    trips: Mutex<Trips>,
}

/// What a stage moved on the trips that are complete: how many these are, and all of it.
#[derive(Default)]
struct Trips {
    complete: [(u64, Carried); PHASES],
    count: usize,
    /// Of the reader: those for all of whose units it has looked whether they are there.
    looked: usize,
}

/// A look at the clocks.
#[derive(Clone, Copy)]
struct Look {
    at: Instant,
    nanos: [[u64; 3]; 4],
}

/// The time of passes.
#[derive(Default)]
struct Passes {
    /// The end of the pass before, or where there is none the beginning of this one.
    from: Option<Look>,
    phases: [PassTimes; PHASES],
    count: usize,
}

#[derive(Clone, Copy, Default)]
struct PassTimes {
    passes: u64,
    time: Duration,
    nanos: [[u64; 3]; 4],
}

pub(super) struct Counters {
    start: Instant,
    direct_bytes: AtomicU64,
    buffered_bytes: AtomicU64,
    mapped_bytes: AtomicU64,
    stages: [CachePadded<StageCounters>; 4],
    passes: Mutex<Passes>,
    /// How many passes fill what is kept; [`usize::MAX`] as long as nobody knows.
    filling: AtomicUsize,
}

impl Default for Counters {
    fn default() -> Self {
        let (direct_bytes, buffered_bytes, mapped_bytes) = Default::default();
        let (stages, passes, filling) = Default::default();
        Self { start: clock::now(), direct_bytes, buffered_bytes, mapped_bytes, stages, passes, filling }
    }
}

const UNPOISONED: &str = "nothing panics under this lock";

impl Counters {
    /// Where the first `filling` passes fill what is kept, or as many as it takes until [`Counters::filled`].
    pub(super) fn new(filling: Option<usize>) -> Self {
        Self { filling: AtomicUsize::new(filling.unwrap_or(usize::MAX)), ..Self::default() }
    }

    /// All is kept that will be. In the trips for which it has looked already, and the one for which it is looking, the reader may have
    /// found units that were not. Never fewer than two: units that are late in the first pass are read once more in the second.
    pub(super) fn filled(&self) {
        let trips = self.stages[Stage::Read as usize].trips.lock().expect(UNPOISONED);
        self.filling.store(trips.looked.max(1) + 1, Relaxed);
    }

    /// Which mean the pass counts for before which so many were complete, if any.
    fn phase(&self, count: usize) -> Option<usize> {
        match count {
            0 => Some(FIRST),
            _ => (count >= self.filling.load(Relaxed)).then_some(STEADY),
        }
    }

    /// The stage does something else from `now` on, or goes on with what it does.
    pub(super) fn settle(&self, stage: Stage, next: Activity, now: Instant) {
        let counters = &self.stages[stage as usize];
        // One more, since 0 says that the stage has not begun.
        let now = now.saturating_duration_since(self.start).as_nanos() as u64 + 1;
        let since = counters.settled.load(Relaxed);
        if since > 0 {
            counters.nanos[counters.kind.load(Relaxed)].fetch_add(now.saturating_sub(since), Relaxed);
        }
        counters.settled.store(now.max(since), Relaxed);
        self.relabel(stage, next);
    }

    /// The stage has been doing this since it last did something else.
    pub(super) fn relabel(&self, stage: Stage, activity: Activity) {
        let kind = match activity {
            Activity::Unit { .. } => 0,
            Activity::Starved => 1,
            Activity::Blocked => 2,
        };
        self.stages[stage as usize].kind.store(kind, Relaxed);
    }

    /// Counts a unit that was moved to the end. A stage does so in the order in which it hands units on.
    pub(super) fn count(&self, stage: Stage, carried: Carried) {
        let counters = &self.stages[stage as usize];
        // What is used from the page cache is not moved.
        counters.units.fetch_add(u64::from(carried.mapped == 0), Relaxed);
        counters.bytes.fetch_add(carried.bytes, Relaxed);
        self.mapped_bytes.fetch_add(carried.mapped, Relaxed);
        let Carried { bytes, direct, buffered, mapped } = carried;
        let sums = counters.trip.iter().zip([bytes, direct, buffered, mapped]);
        sums.for_each(|(sum, more)| _ = sum.fetch_add(more, Relaxed));
    }

    pub(super) fn count_read(&self, bytes: usize, direct: bool) {
        let counter = if direct { &self.direct_bytes } else { &self.buffered_bytes };
        counter.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn trip_looked(&self) {
        self.stages[Stage::Read as usize].trips.lock().expect(UNPOISONED).looked += 1;
    }

    pub(super) fn trip_ended(&self, stage: Stage) {
        let counters = &self.stages[stage as usize];
        let [bytes, direct, buffered, mapped] = counters.trip.each_ref().map(|sum| sum.swap(0, Relaxed));
        let mut trips = counters.trips.lock().expect(UNPOISONED);
        if let Some(phase) = self.phase(trips.count) {
            trips.complete[phase].0 += 1;
            trips.complete[phase].1.add(Carried { bytes, direct, buffered, mapped });
        }
        trips.count += 1;
    }

    pub(super) fn trip_left(&self, stage: Stage) {
        let counters = &self.stages[stage as usize];
        counters.trip.iter().for_each(|sum| sum.store(0, Relaxed));
        let mut trips = counters.trips.lock().expect(UNPOISONED);
        trips.looked = trips.count;
    }

    pub(super) fn pass_begun(&self) {
        let mut passes = self.passes.lock().expect(UNPOISONED);
        passes.from.get_or_insert_with(|| self.look());
    }

    pub(super) fn pass_ended(&self) {
        let mut passes = self.passes.lock().expect(UNPOISONED);
        let (look, phase) = (self.look(), self.phase(passes.count));
        if let (Some(from), Some(phase)) = (passes.from.replace(look), phase) {
            let sums = &mut passes.phases[phase];
            sums.passes += 1;
            sums.time += look.at - from.at;
            let pairs =
                sums.nanos.iter_mut().flatten().zip(look.nanos.iter().flatten().zip(from.nanos.iter().flatten()));
            pairs.for_each(|(sum, (now, then))| *sum += now.saturating_sub(*then));
        }
        passes.count += 1;
    }

    /// The pass was left: what follows is not measured from the end of the one before.
    pub(super) fn pass_left(&self) {
        self.passes.lock().expect(UNPOISONED).from = None;
    }

    /// All stages' time up to now, that of waits under way included.
    fn look(&self) -> Look {
        let at = clock::now();
        let now = at.saturating_duration_since(self.start).as_nanos() as u64 + 1;
        let nanos = std::array::from_fn(|stage| {
            let counters = &self.stages[stage];
            let mut nanos: [u64; 3] = std::array::from_fn(|kind| counters.nanos[kind].load(Relaxed));
            let since = counters.settled.load(Relaxed);
            if since > 0 {
                nanos[counters.kind.load(Relaxed)] += now.saturating_sub(since);
            }
            nanos
        });
        Look { at, nanos }
    }

    /// The mean of the passes of this phase.
    fn mean(&self, phase: usize) -> Option<PassStats> {
        let times = self.passes.lock().expect(UNPOISONED).phases[phase];
        let count = times.passes as f64;
        let moved = |stage: Stage, of: fn(&Carried) -> u64| {
            let (count, carried) = self.stages[stage as usize].trips.lock().expect(UNPOISONED).complete[phase];
            if count > 0 { of(&carried) as f64 / count as f64 } else { 0.0 }
        };
        (times.passes > 0).then(|| PassStats {
            passes: times.passes,
            seconds: times.time.as_secs_f64() / count,
            direct_bytes: moved(Stage::Read, |carried| carried.direct),
            buffered_bytes: moved(Stage::Read, |carried| carried.buffered),
            mapped_bytes: moved(Stage::Read, |carried| carried.mapped),
            pinned_bytes: moved(Stage::Pin, |carried| carried.bytes),
            transferred_bytes: moved(Stage::Transfer, |carried| carried.bytes),
            stage_seconds: times.nanos.map(|nanos| nanos.map(|nanos| nanos as f64 / 1e9 / count)),
        })
    }

    /// The sums so far.
    pub(super) fn stats(&self) -> Stats {
        let look = self.look();
        let passes = self.passes.lock().expect(UNPOISONED).count as u64;
        Stats {
            stages: std::array::from_fn(|stage| {
                let counters = &self.stages[stage];
                let [busy, starved, blocked] = look.nanos[stage].map(Duration::from_nanos);
                let (units, bytes) = (counters.units.load(Relaxed), counters.bytes.load(Relaxed));
                StageStats { units, bytes, busy, starved, blocked }
            }),
            direct_bytes: self.direct_bytes.load(Relaxed),
            buffered_bytes: self.buffered_bytes.load(Relaxed),
            mapped_bytes: self.mapped_bytes.load(Relaxed),
            passes,
            first: self.mean(FIRST),
            steady: self.mean(STEADY),
            ..Stats::default()
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn passes_are_steady_if_the_reader_looked_for_their_units_after_all_were_packed() {
        let counters = Counters::new(None);
        let end_pass = |direct| {
            counters.count(Stage::Read, Carried { bytes: direct, direct, ..Carried::default() });
            counters.trip_ended(Stage::Read);
            counters.pass_begun();
            counters.pass_ended();
        };
        for _ in 0..3 {
            counters.trip_looked();
            end_pass(10);
        }
        assert_eq!(counters.stats().steady, None, "units are still being packed");
        // When the last is packed, the reader has looked for all units of the fourth pass, and may have for some of the fifth.
        counters.trip_looked();
        counters.filled();
        for direct in [10, 7, 3] {
            end_pass(direct);
            counters.trip_looked();
        }
        let stats = counters.stats();
        let [first, steady] = [stats.first, stats.steady].map(Option::unwrap);
        assert_eq!([(first.passes, first.direct_bytes), (steady.passes, steady.direct_bytes)], [(1, 10.0), (1, 3.0)]);
    }
}
