//! The buffer that a timeline is recorded in, reserved at the start.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::{Lane, Link, Moment, RecordedSpan, RecordedUnit, Recording, Ring};
use crate::{
    plan::Bandwidths,
    trace::{About, Activity, Begun, Mark, Observer, Span, Stage},
};

/// Lanes: a thread for each stage, and what the device did of copies and layers.
const LANES: [(Stage, bool); 6] = [
    (Stage::Read, false),
    (Stage::Pin, false),
    (Stage::Transfer, false),
    (Stage::Transfer, true),
    (Stage::Compute, false),
    (Stage::Compute, true),
];

/// Events of a lane that are kept unless told otherwise: an hour of a 70B model, a minute of a small one.
const EVENTS: usize = 1 << 15;

/// Marks that are kept.
const MARKS: usize = 1 << 12;

/// Waits of one kind closer together than this are one: the stage looked up, and found nothing to do (nanoseconds).
const SAME_WAIT: u64 = 20_000;

/// The newest events of a kind, and how many older ones they have overwritten.
struct Newest<T> {
    events: VecDeque<T>,
    most: usize,
    dropped: u64,
}

impl<T> Newest<T> {
    fn new(most: usize) -> Self {
        Self { events: VecDeque::with_capacity(most), most, dropped: 0 }
    }

    fn push(&mut self, event: T) {
        if self.events.len() == self.most {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(event);
    }
}

/// Records what a streamer does, in memory reserved when it is made; where that is full, the oldest events make way.
///
/// ```no_run
/// use layer_streamer::{
///     Checkpoint, Error, LayerStreamer, Settings,
///     device::{Cpu, Device},
///     trace::timeline::{Timeline, TraceFile},
/// };
///
/// fn main() -> Result<(), Error> {
///     let file = TraceFile::create("pass.html")?; // or .json, for Perfetto
///     let timeline = Timeline::new();
///     let checkpoint = Checkpoint::open("model")?;
///     let units = checkpoint.layers()?;
///     let mut streamer =
///         LayerStreamer::with_observers(&Cpu, &checkpoint, &units, &Settings::default(), &[timeline.clone()])?;
///     let stream = Cpu.stream()?;
///     streamer.run_pass(&stream, (), |(), _layer| Ok::<_, Error>(()))?;
///     let mut recording = timeline.recording(None);
///     recording.verdict = streamer.findings();
///     file.write(&recording)
/// }
/// ```
pub struct Timeline {
    start: Instant,
    about: Mutex<About>,
    lanes: [Mutex<Newest<RecordedSpan>>; LANES.len()],
    marks: Mutex<Newest<(u64, Mark)>>,
    untimed: AtomicU64,
}

const UNPOISONED: &str = "nothing panics under this lock";

impl Timeline {
    /// With room for 32,768 events of each lane.
    #[allow(clippy::new_ret_no_self, reason = "observers are shared")]
    pub fn new() -> Arc<Self> {
        Self::with_events(EVENTS)
    }

    /// With room for so many events of each lane, at least one.
    pub fn with_events(most: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            about: Mutex::default(),
            lanes: std::array::from_fn(|_| Mutex::new(Newest::new(most.max(1)))),
            marks: Mutex::new(Newest::new(MARKS)),
            untimed: AtomicU64::new(0),
        })
    }

    /// What it takes of RAM, in bytes.
    pub fn bytes(&self) -> usize {
        let lanes = self.lanes.iter().map(|lane| lane.lock().expect(UNPOISONED).events.capacity());
        lanes.sum::<usize>() * size_of::<RecordedSpan>() + MARKS * size_of::<(u64, Mark)>()
    }

    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_nanos() as u64
    }

    fn add(&self, on_device: bool, span: &Span) {
        let event = RecordedSpan {
            start: self.nanos(span.start),
            end: self.nanos(span.end),
            activity: span.activity,
            bytes: span.bytes as u64,
        };
        let lane = LANES.iter().position(|lane| *lane == (span.stage, on_device));
        let Some(lane) = lane else { return };
        let mut lane = self.lanes[lane].lock().expect(UNPOISONED);
        if let Some(last) = lane.events.back_mut()
            && last.activity == event.activity
            && !matches!(event.activity, Activity::Unit { .. })
            && event.start.saturating_sub(last.end) < SAME_WAIT
        {
            last.end = event.end;
            return;
        }
        lane.push(event);
    }

    /// What was recorded so far; the limits of links are those that `measured` has. The caller may add facts and a verdict.
    pub fn recording(&self, measured: Option<Bandwidths>) -> Recording {
        let about = self.about.lock().expect(UNPOISONED).clone();
        let (mut lanes, mut dropped) = (Vec::new(), 0);
        for (&(stage, on_device), lane) in LANES.iter().zip(&self.lanes) {
            let lane = lane.lock().expect(UNPOISONED);
            dropped += lane.dropped;
            if !lane.events.is_empty() {
                lanes.push(Lane { stage, on_device, events: lane.events.iter().copied().collect() });
            }
        }
        let marks = self.marks.lock().expect(UNPOISONED);
        dropped += marks.dropped;
        let moments = marks.events.iter().map(|(at, mark)| moment(*at, mark, &about)).collect();
        let [ram, pinned, gpu] = about.slots;
        let pins = ram > 0 && pinned > 0;
        let after_ram = if pins { Stage::Pin } else { Stage::Transfer };
        let rings = [
            ("RAM slots", ram, Stage::Read, after_ram),
            ("pinned slots", pinned, if pins { Stage::Pin } else { Stage::Read }, Stage::Transfer),
            ("device slots", gpu, Stage::Transfer, Stage::Compute),
        ];
        let rings = rings.into_iter().filter(|(_, slots, ..)| *slots > 0);
        Recording {
            facts: vec![("device".into(), about.device)],
            units: (about.units.into_iter())
                .map(|(name, bytes, tier)| RecordedUnit { name, bytes, tier: tier.to_string() })
                .collect(),
            lanes,
            moments,
            rings: rings
                .map(|(name, slots, filled_by, emptied_by)| Ring { name: name.into(), slots, filled_by, emptied_by })
                .collect(),
            links: vec![
                Link { name: "disk".into(), stage: Stage::Read, limit: measured.map(|of| of.disk) },
                Link { name: "to the device".into(), stage: Stage::Transfer, limit: measured.map(|of| of.copy) },
            ],
            verdict: Vec::new(),
            dropped,
            untimed: self.untimed.load(Relaxed),
        }
    }
}

/// A mark in words.
fn moment(at: u64, mark: &Mark, about: &About) -> Moment {
    let (kind, text) = match mark {
        Mark::PassBegun { passes } => ("pass begun", format!("pass {}", passes + 1)),
        Mark::PassEnded { passes } => ("pass ended", format!("pass {passes}")),
        Mark::Rewind => ("rewind", String::new()),
        Mark::Cancelled => ("cancelled", String::new()),
        Mark::Late { unit } => ("late", about.units.get(*unit).map(|unit| unit.0.clone()).unwrap_or_default()),
        Mark::Silent { file, .. } => ("silent", file.display().to_string()),
        Mark::Failed(error) => ("failed", error.to_string()),
        Mark::Leaked { bytes } => ("leaked", format!("{bytes} bytes")),
    };
    Moment { at, kind, text }
}

impl Observer for Timeline {
    fn started(&self, about: &About) {
        self.about.lock().expect(UNPOISONED).clone_from(about);
    }

    fn begin(&self, _: &Begun) {}

    fn end(&self, span: &Span) {
        self.add(false, span);
    }

    fn on_device(&self, span: &Span) {
        self.add(true, span);
    }

    fn untimed(&self, _: Stage) {
        self.untimed.fetch_add(1, Relaxed);
    }

    fn mark(&self, mark: &Mark) {
        let at = self.nanos(Instant::now());
        self.marks.lock().expect(UNPOISONED).push((at, mark.clone()));
    }

    fn times_device(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn span(timeline: &Timeline, activity: Activity, micros: [u64; 2]) -> Span {
        let [start, end] = micros.map(|micros| timeline.start + Duration::from_micros(micros));
        Span { stage: Stage::Read, activity, bytes: 7, start, end }
    }

    #[test]
    fn the_oldest_events_make_way_and_are_counted() {
        let timeline = Timeline::with_events(3);
        let bytes = timeline.bytes();
        for unit in 0..5 {
            timeline.end(&span(&timeline, Activity::Unit { unit, pass: 0 }, [10 * unit as u64, 10 * unit as u64 + 9]));
        }
        timeline.mark(&Mark::Rewind);
        let recording = timeline.recording(None);
        assert_eq!((recording.dropped, recording.lanes.len(), recording.moments.len()), (2, 1, 1));
        let kept: Vec<_> =
            recording.lanes[0].events.iter().map(|event| (event.start, event.end, event.bytes)).collect();
        assert_eq!(kept, [(20_000, 29_000, 7), (30_000, 39_000, 7), (40_000, 49_000, 7)]);
        assert_eq!(timeline.bytes(), bytes, "no more memory than was reserved");
    }

    #[test]
    fn waits_of_one_kind_that_follow_each_other_at_once_are_one() {
        let timeline = Timeline::with_events(9);
        for (activity, micros) in [
            (Activity::Starved, [0, 100]),
            (Activity::Starved, [110, 200]),
            // Of another kind, after a while, and behind a unit.
            (Activity::Blocked, [201, 300]),
            (Activity::Blocked, [400, 500]),
            (Activity::Unit { unit: 0, pass: 0 }, [500, 510]),
            (Activity::Blocked, [511, 600]),
        ] {
            timeline.end(&span(&timeline, activity, micros));
        }
        let found = timeline.recording(None).lanes.remove(0).events;
        let times: Vec<_> = found.iter().map(|event| [event.start / 1000, event.end / 1000]).collect();
        assert_eq!(times, [[0, 200], [201, 300], [400, 500], [500, 510], [511, 600]]);
    }

    #[test]
    fn what_the_device_timed_has_lanes_of_its_own_and_links_their_limits() {
        let timeline = Timeline::with_events(9);
        let about = About { device: "a device".into(), slots: [2, 3, 4], ..About::default() };
        timeline.started(&about);
        let unit = Activity::Unit { unit: 0, pass: 0 };
        for stage in [Stage::Compute, Stage::Transfer] {
            timeline.on_device(&Span { stage, ..span(&timeline, unit, [5, 6]) });
            timeline.end(&Span { stage, ..span(&timeline, unit, [1, 2]) });
        }
        timeline.untimed(Stage::Compute);
        let recording = timeline.recording(Some(Bandwidths { disk: 2e9, copy: 5e9 }));
        let lanes: Vec<_> = recording.lanes.iter().map(|lane| (lane.stage, lane.on_device)).collect();
        let expected =
            [(Stage::Transfer, false), (Stage::Transfer, true), (Stage::Compute, false), (Stage::Compute, true)];
        assert_eq!((lanes.as_slice(), recording.untimed), (&expected[..], 1));
        let rings: Vec<_> = recording.rings.iter().map(|ring| (ring.slots, ring.filled_by, ring.emptied_by)).collect();
        let [read, pin, transfer, compute] = Stage::ALL;
        assert_eq!(rings, [(2, read, pin), (3, pin, transfer), (4, transfer, compute)]);
        assert_eq!(recording.links.iter().map(|link| link.limit).collect::<Vec<_>>(), [Some(2e9), Some(5e9)]);
    }
}
