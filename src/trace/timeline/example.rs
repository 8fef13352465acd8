//! A recording as a run would leave it, for tests and for looking at the page: a model whose layers are read from a disk that is
//! slower than the link to the GPU, three passes, one that is cancelled, one read that fails.

use std::{collections::VecDeque, env, path::PathBuf};

use super::{Lane, Link, Moment, RecordedSpan, RecordedUnit, Recording, Ring, TraceFile};
use crate::trace::{Activity, Stage};

pub(super) const MODEL: &str = "Qwen2.5-7B, 12 of its layers";
/// What no file may stumble over.
pub(super) const HOSTILE: &str = "\"</script><script>throw 1</script><!--<script>\u{2028}\0\\é";
const LAYER: u64 = 466_000_000;
const PINNED_SLOTS: usize = 5;
const GPU_SLOTS: usize = 3;
/// Bytes a nanosecond.
const DISK: f64 = 2.48;
const LINK: f64 = 52.6;
const PASSES: u64 = 3;

/// Lanes as they fill.
#[derive(Default)]
struct Run {
    read: Vec<RecordedSpan>,
    transfer: Vec<RecordedSpan>,
    copies: Vec<RecordedSpan>,
    compute: Vec<RecordedSpan>,
    kernels: Vec<RecordedSpan>,
    moments: Vec<Moment>,
    /// When each of the last units was done with its slot.
    pinned: VecDeque<u64>,
    on_gpu: VecDeque<u64>,
}

impl Run {
    fn push(lane: &mut Vec<RecordedSpan>, activity: Activity, start: u64, end: u64, bytes: u64) {
        if end > start {
            lane.push(RecordedSpan { start, end, activity, bytes });
        }
    }

    fn last(lane: &[RecordedSpan]) -> u64 {
        lane.last().map_or(0, |event| event.end)
    }

    /// One unit from the disk to the end of its computation.
    fn unit(&mut self, unit: usize, pass: u64, rng: &mut fastrand::Rng, from_disk: bool) {
        let activity = Activity::Unit { unit, pass };
        let mut there = 0;
        if from_disk {
            // Two at a time share the disk.
            let before = self.read.iter().rev().filter(|event| matches!(event.activity, Activity::Unit { .. }));
            let two: Vec<RecordedSpan> = before.take(2).copied().collect();
            let free = if self.pinned.len() >= PINNED_SLOTS { self.pinned.pop_front().unwrap_or(0) } else { 0 };
            let [last, idle] = [0, 1].map(|before| two.get(before).map_or(0, |event| event.end));
            let start = free.max(idle);
            Self::push(&mut self.read, Activity::Blocked, last, free, 0);
            there = start.max(last) + (LAYER as f64 / DISK * (0.94 + 0.12 * rng.f64())) as u64;
            Self::push(&mut self.read, activity, start, there, LAYER);
        }
        let free = if self.on_gpu.len() >= GPU_SLOTS { self.on_gpu.pop_front().unwrap_or(0) } else { 0 };
        let idle = Self::last(&self.transfer);
        Self::push(&mut self.transfer, Activity::Starved, idle, there, 0);
        Self::push(&mut self.transfer, Activity::Blocked, idle.max(there), free, 0);
        let start = idle.max(there).max(free);
        Self::push(&mut self.transfer, activity, start, start + 180_000, LAYER);
        let start = (start + 60_000).max(Self::last(&self.copies));
        let copied = start + (LAYER as f64 / LINK * (0.97 + 0.06 * rng.f64())) as u64;
        Self::push(&mut self.copies, activity, start, copied, LAYER);
        if from_disk {
            self.pinned.push_back(copied);
        }
        let idle = Self::last(&self.compute);
        Self::push(&mut self.compute, Activity::Starved, idle, copied, 0);
        let begun = idle.max(copied);
        Self::push(&mut self.compute, activity, begun, begun + 400_000, LAYER);
        let start = (begun + 100_000).max(Self::last(&self.kernels));
        // The first pass has a prompt.
        let work = if pass == 0 { 250e6 } else { 19e6 } * (0.95 + 0.1 * rng.f64());
        Self::push(&mut self.kernels, activity, start, start + work as u64, LAYER);
        self.on_gpu.push_back(start + work as u64);
        if unit == 0 {
            self.mark(begun, "pass begun", format!("pass {pass}"));
        }
    }

    fn mark(&mut self, at: u64, kind: &'static str, text: impl Into<String>) {
        self.moments.push(Moment { at, kind, text: text.into() });
    }
}

/// Three passes of twelve units.
pub(super) fn example() -> Recording {
    let mut rng = fastrand::Rng::with_seed(11);
    let mut run = Run::default();
    let kept = |unit: usize| unit % 4 == 3;
    for pass in 0..PASSES {
        for unit in 0..12 {
            run.unit(unit, pass, &mut rng, pass == 0 || !kept(unit));
        }
        let ended = Run::last(&run.kernels);
        run.mark(ended, "pass ended", "");
    }
    // The next pass has begun to be read; one of its reads fails, and the caller is told.
    let at = Run::last(&run.read);
    Run::push(&mut run.read, Activity::Unit { unit: 0, pass: PASSES }, at, at + 210_000_000, LAYER);
    Run::push(&mut run.read, Activity::Unit { unit: 1, pass: PASSES }, at + 40_000_000, at + 120_000_000, 0);
    let error = "unit model.layers.1: cannot read tensor mlp.up_proj.weight from model-00001.safetensors at byte 733184: \
                 Input/output error (os error 5); the disk or its file system failed, see the kernel log";
    run.mark(at + 120_000_000, "failed", error);
    run.mark(at + 215_000_000, "rewind", "");
    run.moments.sort_by_key(|moment| moment.at);
    let lane = |stage, on_device, mut events: Vec<RecordedSpan>| {
        events.sort_by_key(|event| event.end);
        Lane { stage, on_device, events }
    };
    Recording {
        facts: facts(),
        units: (0..12)
            .map(|unit| RecordedUnit {
                name: format!("model.layers.{unit}"),
                bytes: LAYER as usize,
                tier: if kept(unit) { "in pinned RAM" } else { "on disk" }.into(),
            })
            .collect(),
        lanes: vec![
            lane(Stage::Read, false, run.read),
            lane(Stage::Transfer, false, run.transfer),
            lane(Stage::Transfer, true, run.copies),
            lane(Stage::Compute, false, run.compute),
            lane(Stage::Compute, true, run.kernels),
        ],
        moments: run.moments,
        rings: vec![
            ring("pinned slots", PINNED_SLOTS, Stage::Read, Stage::Transfer),
            ring("device slots", GPU_SLOTS, Stage::Transfer, Stage::Compute),
        ],
        links: vec![
            Link { name: "disk".into(), stage: Stage::Read, limit: Some(2.52e9) },
            Link { name: "PCIe".into(), stage: Stage::Transfer, limit: Some(54.4e9) },
        ],
        verdict: vec![
            "The disk binds: it was read all the time at 2.47 GB/s, 0.98 of what it was measured to give.".into(),
            "transfer waited for read 75 % of the time and for a GPU slot 21 %; compute waited for transfer 96 %."
                .into(),
            "Each layer more that is kept in pinned RAM saves 0.19 s a pass.".into(),
        ],
        dropped: 0,
        untimed: 0,
    }
}

fn facts() -> Vec<(String, String)> {
    [
        ("model", MODEL),
        ("device", "NVIDIA H100 80GB HBM3"),
        ("settings", "n_gpu 2, n_cpu_pinned 4, n_cpu 0"),
        ("reader", "io_uring with registered buffers"),
        ("units", "9 on disk, 3 in pinned RAM"),
        ("tokens", "3 out at 0.91 tokens/s"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

fn ring(name: &str, slots: usize, filled_by: Stage, emptied_by: Stage) -> Ring {
    Ring { name: name.into(), slots, filled_by, emptied_by }
}

/// The example with names that end scripts, strings and comments.
pub(super) fn hostile() -> Recording {
    let mut recording = example();
    let names = recording.units.iter_mut().map(|unit| &mut unit.name);
    let names = names.chain(recording.facts.iter_mut().flat_map(|(name, value)| [name, value]));
    let names = names.chain(&mut recording.verdict).chain(recording.moments.iter_mut().map(|moment| &mut moment.text));
    let names = names.chain(recording.rings.iter_mut().map(|ring| &mut ring.name));
    names.chain(recording.links.iter_mut().map(|link| &mut link.name)).for_each(|name| *name = HOSTILE.into());
    recording
}

/// The example again and again, until it has so many spans.
pub(super) fn large(spans: usize) -> Recording {
    let mut recording = example();
    let once = recording.lanes.clone();
    let length = super::series::end(&recording);
    let each = once.iter().map(|lane| lane.events.len()).sum::<usize>();
    for turn in 1..spans.div_ceil(each) as u64 {
        for (lane, again) in recording.lanes.iter_mut().zip(&once) {
            lane.events.extend(again.events.iter().map(|event| {
                let activity = match event.activity {
                    Activity::Unit { unit, pass } => Activity::Unit { unit, pass: pass + turn * PASSES },
                    wait => wait,
                };
                RecordedSpan { start: event.start + turn * length, end: event.end + turn * length, activity, ..*event }
            }));
        }
    }
    recording.dropped = 1234;
    recording.untimed = 56;
    recording
}

/// For `cargo xtask trace-page`, and for whoever works on the page: `TRACE_EXAMPLES=folder cargo test --lib timeline -- --ignored`.
#[test]
#[ignore = "writes files for people and for cargo xtask trace-page"]
fn write_the_examples() {
    let folder = PathBuf::from(env::var_os("TRACE_EXAMPLES").expect("TRACE_EXAMPLES names a folder"));
    for (name, recording) in
        [("example", example()), ("hostile", hostile()), ("large", large(300_000)), ("empty", Recording::default())]
    {
        for extension in ["html", "json"] {
            TraceFile::create(folder.join(name).with_extension(extension)).unwrap().write(&recording).unwrap();
        }
    }
}
