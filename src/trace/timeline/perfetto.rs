//! A recording as JSON trace events, the format that Perfetto and chrome://tracing read ("Trace Event Format", Google, 2016).
//!
//! Each lane is a thread: those of this program in one process, the device's streams in another. Spans of a lane that overlap
//! are put on threads of their own beside it, since the format has them nested or apart. What is in use of a ring, and a
//! link's throughput, are counters; what happened is an instant that concerns everything.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use serde::{
    Serialize, Serializer,
    ser::{Error as _, SerializeMap, SerializeSeq},
};

use super::{Lane, RecordedSpan, Recording, series};
use crate::trace::Activity;

/// The processes, by number.
const THREADS: u32 = 1;
const DEVICE: u32 = 2;
/// Threads are numbered from here: one with its process's number would be taken for its main thread.
const FIRST_THREAD: u32 = 11;
/// Throughput is told as a mean over this share of the recording, or over a millisecond where that is longer.
const BINS: u64 = 2000;
const LEAST_BIN: u64 = 1_000_000;

/// Writes the recording as one JSON object.
pub(super) fn write(out: impl Write, recording: &Recording) -> io::Result<()> {
    let mut json = serde_json::Serializer::new(out);
    let mut file = json.serialize_map(Some(3))?;
    file.serialize_entry("displayTimeUnit", "ms")?;
    file.serialize_entry("otherData", &Other::of(recording))?;
    file.serialize_entry("traceEvents", &Events(recording))?;
    SerializeMap::end(file)?;
    Ok(())
}

/// What is no event.
#[derive(Serialize)]
struct Other<'a> {
    verdict: &'a [String],
    facts: BTreeMap<&'a str, &'a str>,
    /// In GB/s, by link.
    limits: BTreeMap<&'a str, f64>,
    slots: BTreeMap<&'a str, usize>,
    dropped_events: u64,
    untimed_events: u64,
}

impl<'a> Other<'a> {
    fn of(recording: &'a Recording) -> Self {
        let limit = |link: &'a super::Link| Some((link.name.as_str(), gb_per_s(link.limit?)?));
        Self {
            verdict: &recording.verdict,
            facts: recording.facts.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
            limits: recording.links.iter().filter_map(limit).collect(),
            slots: recording.rings.iter().map(|ring| (ring.name.as_str(), ring.slots)).collect(),
            dropped_events: recording.dropped,
            untimed_events: recording.untimed,
        }
    }
}

/// One event. Times are microseconds; what a phase does not have is left out.
#[derive(Serialize)]
struct TraceEvent<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'static str>,
    /// The phase: `M`etadata, complete (`X`), `i`nstant or `C`ounter.
    ph: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    /// An instant's scope: `g`lobal.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Args<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Args<'a> {
    Name {
        name: &'a str,
    },
    Order {
        sort_index: u32,
    },
    Unit {
        unit: usize,
        pass: u64,
        bytes: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        gb_per_s: Option<f64>,
    },
    Text {
        text: &'a str,
    },
    InUse {
        #[serde(rename = "in use")]
        in_use: usize,
    },
    Throughput {
        #[serde(rename = "GB/s")]
        gb_per_s: f64,
    },
}

impl TraceEvent<'_> {
    /// Everything else is left out.
    const EMPTY: Self =
        TraceEvent { name: "", cat: None, ph: "M", ts: None, dur: None, pid: THREADS, tid: 0, s: None, args: None };
}

/// All events of a recording, made as they are written.
struct Events<'a>(&'a Recording);

impl Serialize for Events<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut events = serializer.serialize_seq(None)?;
        process(&mut events, THREADS, "threads")?;
        if self.0.lanes.iter().any(|lane| lane.on_device) {
            process(&mut events, DEVICE, "device streams")?;
        }
        let mut tid = FIRST_THREAD;
        for lane in &self.0.lanes {
            // A lane that has recorded nothing is there all the same.
            let mut rows = series::rows(&lane.events);
            rows.resize(rows.len().max(1), Vec::new());
            for (number, row) in rows.iter().enumerate() {
                self.row(&mut events, lane, number, row, tid)?;
                tid = tid.checked_add(1).ok_or_else(|| S::Error::custom("too many spans overlap"))?;
            }
        }
        self.instants(&mut events)?;
        self.counters(&mut events)?;
        events.end()
    }
}

impl Events<'_> {
    fn row<S: SerializeSeq>(
        &self,
        events: &mut S,
        lane: &Lane,
        number: usize,
        row: &[RecordedSpan],
        tid: u32,
    ) -> Result<(), S::Error> {
        let pid = if lane.on_device { DEVICE } else { THREADS };
        let stage = lane.stage.name();
        let name = match number {
            0 => stage.to_owned(),
            _ => format!("{stage}, at the same time {}", number + 1),
        };
        let of_thread = TraceEvent { pid, tid, ..TraceEvent::EMPTY };
        events.serialize_element(&TraceEvent {
            name: "thread_name",
            args: Some(Args::Name { name: &name }),
            ..of_thread
        })?;
        events.serialize_element(&TraceEvent {
            name: "thread_sort_index",
            args: Some(Args::Order { sort_index: tid }),
            ..of_thread
        })?;
        let starved = match series::stage_before(self.0, lane.stage) {
            Some(before) => format!("starved: waits for {before}"),
            None => "starved: waits for work".to_owned(),
        };
        for event in row {
            let (name, args) = match event.activity {
                Activity::Starved => (starved.as_str(), None),
                Activity::Blocked => ("blocked: waits for a slot", None),
                Activity::Unit { unit, pass } => {
                    let name = self.0.units.get(unit).map_or("unit", |unit| unit.name.as_str());
                    let rate = event.bytes as f64 / (event.end - event.start) as f64;
                    let gb_per_s = Some(rate).filter(|rate| event.bytes > 0 && rate.is_finite()).map(thousandths);
                    (name, Some(Args::Unit { unit, pass, bytes: event.bytes, gb_per_s }))
                }
            };
            events.serialize_element(&TraceEvent {
                name,
                cat: Some(stage),
                ph: "X",
                ts: Some(micros(event.start)),
                dur: Some(micros(event.end - event.start)),
                args,
                ..of_thread
            })?;
        }
        Ok(())
    }

    fn instants<S: SerializeSeq>(&self, events: &mut S) -> Result<(), S::Error> {
        for moment in &self.0.moments {
            events.serialize_element(&TraceEvent {
                name: moment.kind,
                cat: Some("mark"),
                ph: "i",
                ts: Some(micros(moment.at)),
                tid: FIRST_THREAD,
                s: Some("g"),
                args: Some(Args::Text { text: &moment.text }).filter(|_| !moment.text.is_empty()),
                ..TraceEvent::EMPTY
            })?;
        }
        Ok(())
    }

    fn counters<S: SerializeSeq>(&self, events: &mut S) -> Result<(), S::Error> {
        let mut counter = |name: &str, at: u64, args: Args<'_>| {
            let ts = Some(micros(at));
            events.serialize_element(&TraceEvent { name, ph: "C", ts, args: Some(args), ..TraceEvent::EMPTY })
        };
        for ring in &self.0.rings {
            for (at, in_use) in series::slots_in_use(self.0, ring) {
                counter(&ring.name, at, Args::InUse { in_use })?;
            }
        }
        let end = series::end(self.0);
        let width = (end / BINS).max(LEAST_BIN);
        for link in &self.0.links {
            let Some(lane) = series::measured_lane(self.0, link.stage) else { continue };
            let bins = end.div_ceil(width) as usize;
            let mut last = None;
            for (bin, rate) in series::throughput(&self.0.lanes[lane], width, bins).into_iter().chain([0.0]).enumerate()
            {
                let gb_per_s = thousandths(rate);
                if last.replace(gb_per_s) != Some(gb_per_s) {
                    counter(&link.name, (bin as u64).saturating_mul(width), Args::Throughput { gb_per_s })?;
                }
            }
        }
        Ok(())
    }
}

fn process<S: SerializeSeq>(events: &mut S, pid: u32, name: &str) -> Result<(), S::Error> {
    let of_process = TraceEvent { pid, ..TraceEvent::EMPTY };
    events.serialize_element(&TraceEvent { name: "process_name", args: Some(Args::Name { name }), ..of_process })?;
    events.serialize_element(&TraceEvent {
        name: "process_sort_index",
        args: Some(Args::Order { sort_index: pid }),
        ..of_process
    })
}

/// Nanoseconds as microseconds, never a hair too few: readers that multiply by a thousand and cut off the rest must come to
/// the same nanosecond, or spans that touch would overlap.
fn micros(nanos: u64) -> f64 {
    let micros = nanos as f64 / 1000.0;
    if micros * 1000.0 < nanos as f64 { micros.next_up() } else { micros }
}

fn gb_per_s(bytes_per_s: f64) -> Option<f64> {
    Some(thousandths(bytes_per_s / 1e9)).filter(|rate| rate.is_finite())
}

fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use serde_json::Value;

    use super::*;
    use crate::trace::{
        Stage,
        timeline::{RecordedUnit, example},
    };

    /// What a stage is called in a name that people read.
    fn stage_of(name: &str) -> Option<Stage> {
        Stage::ALL.into_iter().find(|stage| name.split(',').next() == Some(stage.name()))
    }

    fn events(recording: &Recording) -> Vec<Value> {
        let mut text = Vec::new();
        write(&mut text, recording).unwrap();
        let file: Value = serde_json::from_slice(&text).unwrap();
        file["traceEvents"].as_array().unwrap().clone()
    }

    fn of_phase<'a>(events: &'a [Value], phase: &str) -> Vec<&'a Value> {
        events.iter().filter(|event| event["ph"] == phase).collect()
    }

    fn nanos(value: &Value) -> u64 {
        (value.as_f64().unwrap() * 1000.0).round() as u64
    }

    #[test]
    fn readers_that_cut_off_and_readers_that_round_come_to_the_same_nanosecond() {
        let mut rng = fastrand::Rng::with_seed(5);
        for digits in 1..16 {
            for nanos in (0..1000).map(|_| rng.u64(..10u64.pow(digits))) {
                let read: f64 = serde_json::to_string(&micros(nanos)).unwrap().parse().unwrap();
                assert_eq!([(read * 1000.0) as u64, (read * 1000.0).round() as u64], [nanos; 2]);
            }
        }
    }

    /// The reader that stands in for Perfetto's: what the format asks of each phase, and that a thread's spans nest.
    #[test]
    fn every_event_has_what_the_format_asks_of_its_phase() {
        let events = events(&example::example());
        let mut ends: HashMap<u64, u64> = HashMap::new();
        let mut named = HashSet::new();
        for event in &events {
            let fields: Vec<&str> = event.as_object().unwrap().keys().map(String::as_str).collect();
            let has = |wanted: &[&str]| {
                for field in wanted {
                    assert!(fields.contains(field), "{event} lacks {field}");
                }
                let others = fields.iter().filter(|field| !wanted.contains(field) && **field != "args").count();
                assert_eq!(others, 0, "{event}");
            };
            let tid = event["tid"].as_u64().unwrap();
            assert!([1, 2].contains(&event["pid"].as_u64().unwrap()), "{event}");
            match event["ph"].as_str().unwrap() {
                "M" => {
                    has(&["name", "ph", "pid", "tid", "args"]);
                    match event["name"].as_str().unwrap() {
                        "process_name" => assert!(event["args"]["name"].is_string()),
                        "thread_name" => {
                            assert!(event["args"]["name"].is_string());
                            assert!(named.insert(tid), "{event}: named twice");
                        }
                        "process_sort_index" | "thread_sort_index" => assert!(event["args"]["sort_index"].is_u64()),
                        other => panic!("{other}"),
                    }
                }
                "X" => {
                    has(&["name", "cat", "ph", "pid", "tid", "ts", "dur"]);
                    assert!(named.contains(&tid), "{event}: a thread without a name");
                    let (start, end) = (nanos(&event["ts"]), nanos(&event["ts"]) + nanos(&event["dur"]));
                    let last = ends.entry(tid).or_default();
                    assert!(*last <= start, "{event}: begins before the one before has ended");
                    *last = end;
                }
                "i" => {
                    has(&["name", "cat", "ph", "pid", "tid", "ts", "s"]);
                    assert_eq!(event["s"], "g");
                }
                "C" => {
                    has(&["name", "ph", "pid", "tid", "ts", "args"]);
                    let values = event["args"].as_object().unwrap();
                    assert!(values.len() == 1 && values.values().all(Value::is_number), "{event}");
                }
                other => panic!("{event}: phase {other}"),
            }
        }
        assert!(of_phase(&events, "X").len() > 100);
    }

    #[test]
    fn the_spans_are_those_of_the_recording_to_the_nanosecond() {
        let recording = example::example();
        let events = events(&recording);
        let stages: HashMap<u64, (Stage, bool)> = of_phase(&events, "M")
            .into_iter()
            .filter(|event| event["name"] == "thread_name")
            .map(|event| {
                let stage = stage_of(event["args"]["name"].as_str().unwrap()).unwrap();
                (event["tid"].as_u64().unwrap(), (stage, event["pid"] == DEVICE))
            })
            .collect();
        for lane in &recording.lanes {
            let mut wanted: Vec<_> = lane
                .events
                .iter()
                .map(|event| {
                    let (name, unit, pass) = match event.activity {
                        Activity::Unit { unit, pass } => (recording.units[unit].name.as_str(), Some(unit), Some(pass)),
                        Activity::Starved if lane.stage == Stage::Transfer => ("starved: waits for read", None, None),
                        Activity::Starved => ("starved: waits for transfer", None, None),
                        Activity::Blocked => ("blocked: waits for a slot", None, None),
                    };
                    (event.start, event.end - event.start, name, unit.map(|unit| unit as u64), pass)
                })
                .collect();
            let mut found: Vec<_> = of_phase(&events, "X")
                .into_iter()
                .filter(|event| stages[&event["tid"].as_u64().unwrap()] == (lane.stage, lane.on_device))
                .map(|event| {
                    let args = &event["args"];
                    let name = event["name"].as_str().unwrap();
                    (nanos(&event["ts"]), nanos(&event["dur"]), name, args["unit"].as_u64(), args["pass"].as_u64())
                })
                .collect();
            wanted.sort();
            found.sort();
            assert_eq!(found, wanted, "{}", lane.stage);
        }
    }

    #[test]
    fn a_unit_tells_its_bytes_and_pace() {
        let unit = Activity::Unit { unit: 0, pass: 7 };
        let event = RecordedSpan { start: 1000, end: 3000, activity: unit, bytes: 5000 };
        let lanes = vec![Lane { stage: Stage::Read, on_device: false, events: vec![event] }];
        let units = vec![RecordedUnit { name: example::HOSTILE.into(), ..RecordedUnit::default() }];
        let events = events(&Recording { lanes, units, ..Recording::default() });
        let span = of_phase(&events, "X")[0];
        assert_eq!(span["name"], example::HOSTILE);
        assert_eq!(span["args"], serde_json::json!({ "unit": 0, "pass": 7, "bytes": 5000, "gb_per_s": 2.5 }));
    }

    #[test]
    fn facts_verdict_limits_and_what_was_lost_are_told() {
        let recording = Recording { dropped: 5, untimed: 6, ..example::example() };
        let mut text = Vec::new();
        write(&mut text, &recording).unwrap();
        let other = &serde_json::from_slice::<Value>(&text).unwrap()["otherData"];
        assert_eq!(other["verdict"][0], recording.verdict[0].as_str());
        assert_eq!(other["facts"]["model"], example::MODEL);
        assert_eq!(other["limits"]["disk"], 2.52);
        assert_eq!([&other["dropped_events"], &other["untimed_events"]], [5, 6]);
    }

    #[test]
    fn counters_follow_slots_and_throughput() {
        let recording = example::example();
        let events = events(&recording);
        let of = |name: &str, value: &str| -> Vec<f64> {
            let events = of_phase(&events, "C").into_iter().filter(|event| event["name"] == name);
            events.map(|event| event["args"][value].as_f64().unwrap()).collect()
        };
        let slots = of("pinned slots", "in use");
        assert!(slots.len() > 20 && slots.iter().all(|&in_use| in_use <= 5.0) && slots.contains(&5.0), "{slots:?}");
        let disk = of("disk", "GB/s");
        assert!(disk.iter().all(|&rate| rate < 4.0) && disk.iter().any(|&rate| rate > 2.0), "{disk:?}");
        assert_eq!(disk.last(), Some(&0.0));
    }

    #[test]
    fn an_empty_recording_is_valid_too() {
        assert_eq!(of_phase(&events(&Recording::default()), "X").len(), 0);
    }

    #[test]
    fn a_large_recording_is_written_in_seconds() {
        let recording = example::large(300_000);
        let began = support::processor_time();
        let mut count = Count(0);
        write(&mut count, &recording).unwrap();
        assert!(count.0 > 300_000 * 50);
        let took = support::processor_time() - began;
        assert!(took.as_secs() < 30, "{took:?}");
    }

    struct Count(usize);

    impl Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
