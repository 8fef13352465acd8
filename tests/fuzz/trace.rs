//! Traces of anything: names that end strings, scripts and comments, times at the end of all time, spans in any order. Both files
//! are written, without a panic and without memory for more than the recording; the JSON keeps the rules of its format, and no
//! text gets out of its place in the page.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use layer_streamer::{
    Error,
    plan::{Bandwidths, Tier},
    trace::{
        About, Activity, Mark, Observer, Span, Stage,
        timeline::{Lane, Link, Moment, RecordedSpan, RecordedUnit, Recording, Ring, Timeline, TraceFile},
    },
};
use serde_json::Value;

use support::fuzz::{number, rounds};

const PARTS: [&str; 26] = [
    "\"",
    "\\",
    "'",
    "`${x}`",
    "</script>",
    "</SCRIPT ",
    "<script",
    "<!--",
    "-->",
    "]]>",
    "&lt;/script&gt;",
    "\\u003c",
    "\0",
    "\u{1b}[2J",
    "\r\n",
    "\u{7f}",
    "\u{85}",
    "\u{2028}\u{2029}",
    "\u{202e}",
    "\u{feff}",
    "\u{fffd}",
    "é",
    "𝄞",
    "{recording}\n{scripts}\n",
    "model.layers.0",
    "%s%n",
];

/// Any bytes.
fn bytes(rng: &mut fastrand::Rng) -> Vec<u8> {
    let length = rng.usize(..20);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

/// A text for people, or against them; now and then a very long one.
fn text(rng: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for _ in 0..rng.usize(..5) {
        match rng.u8(..4) {
            0 => text.push_str(&String::from_utf8_lossy(&bytes(rng))),
            1 => text.push(rng.char(..)),
            _ => text.push_str(rng.choice(PARTS).expect("there are parts")),
        }
    }
    if rng.u16(..2000) == 0 { text.repeat(400) } else { text }
}

fn stage(rng: &mut fastrand::Rng) -> Stage {
    Stage::ALL[rng.usize(..4)]
}

fn activity(rng: &mut fastrand::Rng) -> Activity {
    match rng.u8(..5) {
        0 => Activity::Starved,
        1 => Activity::Blocked,
        // The page writes waits as numbers below zero.
        2 => Activity::Unit { unit: number(rng) >> 1, pass: number(rng) as u64 },
        _ => Activity::Unit { unit: rng.usize(..6), pass: rng.u64(..4) },
    }
}

/// Nanoseconds; `late`: up to the end of time.
fn time(rng: &mut fastrand::Rng, late: bool) -> u64 {
    match rng.u8(..4) {
        0 if late => u64::MAX - rng.u64(..2000),
        1 if late => rng.u64(..) >> rng.u32(..64),
        2 => rng.u64(..1 << 50) >> rng.u32(..50),
        _ => rng.u64(..10_000_000),
    }
}

/// A recording that somebody filled in.
fn made(rng: &mut fastrand::Rng, late: bool) -> Recording {
    let some = |rng: &mut fastrand::Rng, most: usize| 0..rng.usize(..most);
    let events = |rng: &mut fastrand::Rng| -> Vec<RecordedSpan> {
        let event = |rng: &mut fastrand::Rng| {
            let (start, activity, bytes) = (time(rng, late), activity(rng), number(rng) as u64);
            let end = if rng.u8(..4) == 0 { time(rng, late) } else { start.saturating_add(rng.u64(..10_000_000)) };
            RecordedSpan { start, end, activity, bytes }
        };
        some(rng, 60).map(|_| event(rng)).collect()
    };
    let kinds = ["pass begun", "pass ended", "rewind", "cancelled", "late", "silent", "failed", "leaked"];
    let limits = [None, Some(2.5e9), Some(0.0), Some(-1.0), Some(f64::NAN), Some(f64::INFINITY), Some(f64::MAX)];
    Recording {
        facts: some(rng, 5).map(|_| (text(rng), text(rng))).collect(),
        units: some(rng, 7).map(|_| RecordedUnit { name: text(rng), bytes: number(rng), tier: text(rng) }).collect(),
        lanes: some(rng, 8).map(|_| Lane { stage: stage(rng), on_device: rng.bool(), events: events(rng) }).collect(),
        moments: some(rng, 8)
            .map(|_| Moment { at: time(rng, late), kind: kinds[rng.usize(..kinds.len())], text: text(rng) })
            .collect(),
        rings: some(rng, 4)
            .map(|_| Ring { name: text(rng), slots: number(rng), filled_by: stage(rng), emptied_by: stage(rng) })
            .collect(),
        links: some(rng, 4)
            .map(|_| Link { name: text(rng), stage: stage(rng), limit: limits[rng.usize(..limits.len())] })
            .collect(),
        verdict: some(rng, 3).map(|_| text(rng)).collect(),
        dropped: number(rng) as u64,
        untimed: number(rng) as u64,
    }
}

fn error(rng: &mut fastrand::Rng) -> Error {
    let path = PathBuf::from(OsString::from_vec(bytes(rng)));
    let source = Arc::new(std::io::Error::from_raw_os_error(rng.i32(..200)));
    match rng.u8(..4) {
        0 => Error::Io { operation: "read", path, source },
        1 => Error::Checkpoint { path, tensor: rng.bool().then(|| text(rng)), cause: text(rng) },
        2 => Error::Read { unit: text(rng), tensor: text(rng), path, offset: rng.u64(..), source },
        _ => Error::NoTensor { unit: text(rng), tensor: text(rng), known: text(rng) },
    }
}

/// A recording that a timeline made of what it was told.
fn observed(rng: &mut fastrand::Rng) -> Recording {
    let timeline = Timeline::with_events(rng.usize(..40));
    let (reserved, start) = (timeline.bytes(), Instant::now());
    let tiers = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];
    let units = (0..rng.usize(..7)).map(|_| (text(rng), number(rng), tiers[rng.usize(..4)])).collect();
    timeline.started(&About { device: text(rng), units, slots: [number(rng), number(rng), number(rng)] });
    for _ in 0..rng.usize(..200) {
        let at = |rng: &mut fastrand::Rng| start + Duration::from_nanos(time(rng, false));
        let (begun, bytes) = (at(rng), number(rng));
        let end = if rng.u8(..9) == 0 { at(rng) } else { begun + Duration::from_nanos(rng.u64(..1 << 24)) };
        let span = Span { stage: stage(rng), activity: activity(rng), bytes, start: begun, end };
        let mark = match rng.u8(..16) {
            0..8 => {
                timeline.end(&span);
                continue;
            }
            8..10 => {
                timeline.on_device(&span);
                continue;
            }
            10 => {
                timeline.untimed(span.stage);
                continue;
            }
            11 => Mark::PassBegun { passes: rng.u64(..9) },
            12 => [Mark::Rewind, Mark::Cancelled][rng.usize(..2)].clone(),
            13 => Mark::Late { unit: number(rng) },
            14 => Mark::Silent { file: OsString::from_vec(bytes_of_a_name(rng)).into(), since: Duration::from_secs(9) },
            _ => Mark::Failed(error(rng)),
        };
        timeline.mark(&mark);
    }
    assert_eq!(timeline.bytes(), reserved, "it grows");
    timeline.recording(rng.bool().then_some(Bandwidths { disk: 2e9, copy: f64::NAN }))
}

fn bytes_of_a_name(rng: &mut fastrand::Rng) -> Vec<u8> {
    [text(rng).into_bytes(), bytes(rng)].concat()
}

/// Of an event of the JSON, in whole nanoseconds.
fn nanos(value: &Value) -> u64 {
    (value.as_f64().unwrap() * 1000.0).round() as u64
}

fn spans(recording: &Recording) -> usize {
    recording.lanes.iter().map(|lane| lane.events.len()).sum()
}

/// The rules of the format: what each phase has, threads with names, and spans of a thread side by side.
fn check_json(recording: &Recording, file: &Value, late: bool) {
    let (mut named, mut ends, mut found) = (HashSet::new(), HashMap::<_, u64>::new(), 0);
    for event in file["traceEvents"].as_array().unwrap() {
        assert!(event["name"].is_string() && event["pid"].is_u64() && event["tid"].is_u64(), "{event}");
        let thread = (event["pid"].as_u64(), event["tid"].as_u64());
        let phase = event["ph"].as_str().unwrap();
        assert!(phase == "M" || event["ts"].as_f64().is_some_and(|at| at >= 0.0), "{event}");
        match phase {
            "M" => {
                let thread_name = event["name"] == "thread_name";
                assert!(!thread_name || named.insert(thread), "{event}: named twice");
            }
            "X" => {
                found += 1;
                assert!(named.contains(&thread) && event["dur"].as_f64().is_some_and(|time| time >= 0.0), "{event}");
                let (start, last) = (nanos(&event["ts"]), ends.entry(thread).or_default());
                assert!(late || *last <= start, "{event}: begins before {last}");
                *last = start.saturating_add(nanos(&event["dur"]));
            }
            "i" => assert_eq!(event["s"], "g"),
            "C" => assert!(event["args"].as_object().unwrap().values().all(Value::is_number), "{event}"),
            other => panic!("{event}: phase {other}"),
        }
    }
    assert_eq!(found, spans(recording));
    let moments = file["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "i");
    let texts = moments.map(|event| event["args"]["text"].as_str().unwrap_or(""));
    assert!(texts.eq(recording.moments.iter().map(|moment| moment.text.as_str())));
    assert_eq!(file["otherData"]["verdict"], Value::from(recording.verdict.clone()));
}

/// The page but for the recording is always the same, and the recording is all there.
fn check_page(recording: &Recording, page: &str, plain: &str) {
    let begin = "<script type=\"application/json\" id=\"recording\">\n";
    let around = |page: &str| {
        let (before, rest) = page.split_once(begin).unwrap();
        let (data, after) = rest.split_once("\n</script>").unwrap();
        (before.to_owned(), data.to_owned(), after.to_owned())
    };
    let ((before, data, after), (plain_before, _, plain_after)) = (around(page), around(plain));
    assert!(before == plain_before && after == plain_after, "{data}");
    assert!(!data.contains(['<', '\n', '\r', '\0']), "{data}");
    let data: Value = serde_json::from_str(&data).unwrap();
    let names = |list: &str| data[list].as_array().unwrap().iter().map(|one| one["name"].clone()).collect::<Vec<_>>();
    assert_eq!(names("units"), recording.units.iter().map(|unit| Value::from(&*unit.name)).collect::<Vec<_>>());
    assert_eq!(names("rings"), recording.rings.iter().map(|ring| Value::from(&*ring.name)).collect::<Vec<_>>());
    assert_eq!(names("links"), recording.links.iter().map(|link| Value::from(&*link.name)).collect::<Vec<_>>());
    let rows = data["lanes"].as_array().unwrap().iter().flat_map(|lane| lane["rows"].as_array().unwrap());
    let found: usize = rows.map(|row| row["length"].as_array().unwrap().len()).sum();
    assert_eq!(found, spans(recording));
}

#[test]
fn a_trace_of_anything_is_written_by_the_rules() {
    let folder = support::folder();
    let written = |name: &str, recording: &Recording| {
        let path = folder.path().join(name);
        TraceFile::create(&path).unwrap().write(recording).unwrap();
        fs::read_to_string(&path).unwrap()
    };
    let plain = written("plain.html", &Recording::default());
    rounds("trace", |rng| {
        let late = rng.u8(..4) == 0;
        let recording = if rng.bool() { observed(rng) } else { made(rng, late) };
        check_json(&recording, &serde_json::from_str(&written("trace.json", &recording)).unwrap(), late);
        check_page(&recording, &written("trace.html", &recording), &plain);
        true
    });
}
