//! What it costs to tell of a span: the pipeline's own trace, begun and ended in one thread, beside the two looks at the clock
//! that it takes anyhow. What counts is the thread's own processor time, to which nothing adds that runs in between. Kinds take
//! turns, so that the state of the machine meets all of them.

#[path = "bench/clock.rs"]
#[allow(dead_code, reason = "other benchmarks use more of it")]
mod clock;
// The crate keeps its trace to itself; these are the crate's own files.
#[path = "../src/error.rs"]
#[allow(dead_code, reason = "the pipeline uses more of it")]
mod error;
#[path = "bench/report/mod.rs"]
mod report;
#[path = "../src/trace/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the pipeline uses more of it")]
mod trace;

/// What the files above take of the rest.
mod files {
    pub use layer_streamer::files::NewFile;
}
mod plan {
    pub use layer_streamer::plan::{Bandwidths, Reader, Tier};
}

use std::{
    hint::black_box,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use clap::Parser;
use layer_streamer::device::{Cpu, Device};
use plan::Tier;
use report::{Column, Common, Failure, Figure, Report, Show, Spread, by_default, column};
use serde_json::json;
use trace::{About, Activity, Begun, Observer, Span, Stage, Trace, timeline::Timeline};

/// Measure what it costs to tell of a span: begin it, end it.
///
/// Checks first that every span reaches an observer whole and in order.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.002")), mut_arg("rounds", by_default("101")))]
#[command(after_help = "\
Examples:
  bench_trace                                           without NVTX
  cargo run --release --features nvtx --example bench_trace     with NVTX, and no tool attached
  NVTX_INJECTION64_PATH=tool.so bench_trace             with a tool, if built with feature nvtx
  bench_trace --json | jq '.rows[] | {what, ns: .ns.median}'

A pass has a few spans for each layer and stage. With NVTX and no tool, a range must cost 20 ns at most.")]
struct Options {
    #[command(flatten)]
    common: Common,
}

const COLUMNS: [Column; 3] = [
    column("what", "what", Show::Text, ""),
    column("ns", "ns", Show::Spread(1), "a span begun and ended, ± half of the range over the rounds"),
    column("ns_beyond_clock", "beyond the clock", Show::Spread(1), "less the first row of the same round"),
];

const CLOCK: &str = "two looks at the clock";
const READ: &str = "a unit read";

/// Spans between two looks at the window's end.
const SPANS: u32 = 1000;

/// An observer that does as little as one can.
#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    ended: AtomicU64,
    wrong: AtomicU64,
}

impl Observer for Counts {
    fn begin(&self, span: &Begun) {
        let begun = self.begun.fetch_add(1, Relaxed);
        if begun != self.ended.load(Relaxed) || (span.bytes != 0) != matches!(span.activity, Activity::Unit { .. }) {
            self.wrong.fetch_add(1, Relaxed);
        }
    }

    fn end(&self, span: &Span) {
        let ended = self.ended.fetch_add(1, Relaxed) + 1;
        if ended != self.begun.load(Relaxed) || span.end < span.start {
            self.wrong.fetch_add(1, Relaxed);
        }
    }
}

/// The streamer that is told of: one unit.
fn started(observers: &[Arc<dyn Observer>]) -> Trace {
    let mut trace = Trace::new(observers, Some(1));
    trace.started(&About { units: vec![("layer".into(), BYTES, Tier::Disk)], ..About::default() });
    trace
}

const BYTES: usize = 1 << 20;
const UNIT: Activity = Activity::Unit { unit: 0, pass: 0 };

fn span(trace: &Trace, stage: Stage, activity: Activity) {
    let bytes = if activity == UNIT { BYTES } else { 0 };
    let open = black_box(trace).begin(stage, black_box(activity), bytes);
    black_box(trace.end(open));
}

/// A start/end range as plain calls of NVTX, made whether or not there is a tool.
#[cfg(feature = "nvtx")]
fn bare_range(domain: nvtx_sys::DomainHandle) {
    use nvtx_sys::{ColorType, EventAttributes, MessageType, MessageValue, PayloadType, PayloadValue};
    let range = EventAttributes {
        version: nvtx_sys::NVTX_VERSION as u16,
        size: nvtx_sys::NVTX_EVENT_ATTRIBUTES_SIZE as u16,
        category: 1,
        colorType: ColorType::NVTX_COLOR_ARGB.into(),
        color: !0,
        payloadType: PayloadType::NVTX_PAYLOAD_TYPE_UNSIGNED_INT64.into(),
        reserved0: 0,
        payload: PayloadValue { ullValue: BYTES as u64 },
        messageType: MessageType::NVTX_MESSAGE_TYPE_ASCII.into(),
        message: MessageValue { ascii: c"layer".as_ptr() },
    };
    nvtx_sys::domain_range_end(domain, nvtx_sys::domain_range_start_ex(domain, black_box(&range)));
}

/// One kind: what it is, and what is timed.
type Kind = (&'static str, Box<dyn Fn()>);

fn kinds(spans: u32) -> Vec<Kind> {
    let repeat = move |work: Box<dyn Fn()>| -> Box<dyn Fn()> { Box::new(move || (0..spans).for_each(|_| work())) };
    let of = |trace: Trace, stage, activity| repeat(Box::new(move || span(&trace, stage, activity)));
    let counted = || started(&[Arc::new(Counts::default())]);
    let looks = || {
        black_box(Instant::now());
        black_box(Instant::now());
    };
    #[allow(unused_mut, reason = "one more with NVTX")]
    let mut kinds: Vec<Kind> = vec![
        (CLOCK, repeat(Box::new(looks))),
        (READ, of(started(&[]), Stage::Read, UNIT)),
        ("a unit copied", of(started(&[]), Stage::Transfer, UNIT)),
        ("a wait", of(started(&[]), Stage::Read, Activity::Blocked)),
        ("a unit read, with an observer", of(counted(), Stage::Read, UNIT)),
        ("a unit read, with a timeline", of(started(&[Timeline::new()]), Stage::Read, UNIT)),
    ];
    #[cfg(feature = "nvtx")]
    {
        let domain = nvtx_sys::domain_create_ascii(c"bench_trace");
        kinds.push(("a bare NVTX range", repeat(Box::new(move || bare_range(domain)))));
    }
    kinds
}

/// Every span must reach the observer, begun and then ended.
fn check() -> Result<(), Failure> {
    let counts = Arc::new(Counts::default());
    let trace = started(&[counts.clone() as Arc<dyn Observer>]);
    for activity in [UNIT, Activity::Starved, Activity::Blocked] {
        Stage::ALL.into_iter().for_each(|stage| span(&trace, stage, activity));
    }
    let told = [&counts.begun, &counts.ended, &counts.wrong].map(|count| count.load(Relaxed));
    if told == [12, 12, 0] { Ok(()) } else { Err(format!("12 spans became {told:?} (begun, ended, wrong)").into()) }
}

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, None, || run(&options))
}

fn run(options: &Options) -> Result<Report, Failure> {
    check()?;
    let kinds = kinds(SPANS);
    let mut samples = vec![Vec::new(); kinds.len()];
    let bar = report::progress(options.common.rounds.into(), &options.common)?;
    // The first round warms up.
    for round in 0..=options.common.rounds {
        for ((_, work), samples) in kinds.iter().zip(&mut samples) {
            let (start, mut spans, mut took) = (clock::own_thread(), 0, 0.0);
            while spans == 0 || took < options.common.window.as_secs_f64() {
                work();
                spans += SPANS;
                took = clock::own_thread() - start;
            }
            if round > 0 {
                samples.push(took * 1e9 / f64::from(spans));
            }
        }
        bar.inc(u64::from(round > 0));
    }
    bar.finish_and_clear();
    let mut report = Report::new("bench_trace", Cpu.describe(), &COLUMNS);
    let clock = &samples[0];
    for ((what, _), samples) in kinds.iter().zip(&samples) {
        let beyond: Vec<_> = samples.iter().zip(clock).map(|(sample, clock)| sample - clock).collect();
        // A bare range does not look at it.
        let looks = *what != CLOCK && !what.contains("bare");
        report.row([json!(what), json!(Spread::of(samples)), json!(looks.then(|| Spread::of(&beyond)))]);
    }
    let tool = std::env::var("NVTX_INJECTION64_PATH").ok();
    report.line(
        "NVTX",
        match (cfg!(feature = "nvtx"), &tool) {
            (false, _) => "not built in (feature nvtx)".into(),
            (true, None) => "built in, no tool attached".into(),
            (true, Some(path)) => format!("built in, NVTX_INJECTION64_PATH={path}"),
        },
    );
    report.field("nvtx", cfg!(feature = "nvtx"));
    report.field("tool", json!(tool));
    let read = &samples[1];
    let ratios: Vec<_> = read.iter().zip(clock).map(|(read, clock)| read / clock).collect();
    report.compare(
        Figure::new(READ, "ns", read),
        Figure::new(CLOCK, "ns", clock),
        "a span / the clock alone, in turn",
        &ratios,
    );
    Ok(report)
}
