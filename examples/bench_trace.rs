//! What it costs to tell of a span: the pipeline's own trace, begun and ended in one thread, beside the two looks at the clock
//! that it takes anyhow. Kinds take turns, so that whatever else the machine does meets all of them.

// The crate keeps its trace to itself; these are the crate's own files.
#[path = "../src/error.rs"]
#[allow(dead_code, reason = "the pipeline uses more of it")]
mod error;
#[path = "../src/trace/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the pipeline uses more of it")]
mod trace;

/// What the files above take of the plan.
mod plan {
    pub use layer_streamer::plan::{Bandwidths, Home, Reader};
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
use plan::Home;
use serde_json::{Value, json};
use trace::{About, Activity, Begun, Observer, Span, Stage, Trace};

/// Measure what it costs to tell of a span: begin it, end it.
///
/// Checks first that every span reaches an observer whole and in order. Prints nanoseconds, beside two looks at the clock.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  bench_trace                                           without NVTX
  cargo run --release --features nvtx --example bench_trace     with NVTX, and no tool attached
  NVTX_INJECTION64_PATH=tool.so bench_trace             with a tool, if built with feature nvtx
  bench_trace --json | jq '.rows[] | {what, ns}'

A pass has a few spans for each layer and stage. With NVTX and no tool, a range must cost 20 ns at most.")]
struct Options {
    /// How often each kind is measured
    #[arg(long, value_name = "N", default_value_t = 101, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Spans each time
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    spans: u32,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

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
    let mut trace = Trace::new(observers);
    trace.started(&About { units: vec![("layer".into(), BYTES, Home::Disk)], ..About::default() });
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
        ("two looks at the clock", repeat(Box::new(looks))),
        ("a unit read", of(started(&[]), Stage::Read, UNIT)),
        ("a unit copied", of(started(&[]), Stage::Transfer, UNIT)),
        ("a wait", of(started(&[]), Stage::Read, Activity::Blocked)),
        ("a unit read, with an observer", of(counted(), Stage::Read, UNIT)),
    ];
    #[cfg(feature = "nvtx")]
    {
        let domain = nvtx_sys::domain_create_ascii(c"bench_trace");
        kinds.push(("a bare NVTX range", repeat(Box::new(move || bare_range(domain)))));
    }
    kinds
}

/// Every span must reach the observer, begun and then ended.
fn check() -> Result<(), String> {
    let counts = Arc::new(Counts::default());
    let trace = started(&[counts.clone() as Arc<dyn Observer>]);
    for activity in [UNIT, Activity::Starved, Activity::Blocked] {
        Stage::ALL.into_iter().for_each(|stage| span(&trace, stage, activity));
    }
    let told = [&counts.begun, &counts.ended, &counts.wrong].map(|count| count.load(Relaxed));
    if told == [12, 12, 0] { Ok(()) } else { Err(format!("12 spans became {told:?} (begun, ended, wrong)")) }
}

/// Median, least and most of the samples.
fn spread(samples: &mut [f64]) -> [f64; 3] {
    samples.sort_unstable_by(f64::total_cmp);
    [samples[samples.len() / 2], samples[0], samples[samples.len() - 1]]
}

fn row(what: &str, [ns, min, max]: [f64; 3], beyond: f64) -> Value {
    json!({ "what": what, "ns": ns, "ns_min": min, "ns_max": max, "ns_beyond_clock": beyond })
}

fn run(options: &Options) -> Result<String, String> {
    check()?;
    let kinds = kinds(options.spans);
    let mut samples = vec![Vec::new(); kinds.len()];
    // The first round warms up.
    for round in 0..=options.rounds {
        for ((_, work), samples) in kinds.iter().zip(&mut samples) {
            let start = Instant::now();
            work();
            if round > 0 {
                samples.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(options.spans));
            }
        }
    }
    let tool = std::env::var("NVTX_INJECTION64_PATH").ok();
    let built = cfg!(feature = "nvtx");
    let clock = samples[0].clone();
    let rows = kinds.iter().zip(&mut samples).map(|((what, _), samples)| {
        let mut beyond: Vec<_> = samples.iter().zip(&clock).map(|(sample, clock)| sample - clock).collect();
        (*what, spread(samples), spread(&mut beyond)[0])
    });
    if options.json {
        let rows: Vec<Value> = rows.map(|(what, ns, beyond)| row(what, ns, beyond)).collect();
        let object =
            json!({ "nvtx": built, "tool": tool, "rounds": options.rounds, "spans": options.spans, "rows": rows });
        return Ok(format!("{object}\n"));
    }
    let mut text = format!("{:<32}{:>8}{:>16}{:>18}\n", "what", "ns", "least to most", "beyond the clock");
    for (what, [median, min, max], beyond) in rows {
        // A bare range does not look at it.
        let looks = !what.contains("clock") && !what.contains("bare");
        let beyond = if looks { format!("{beyond:.1}") } else { "-".into() };
        text += &format!("{what:<32}{median:>8.1}{:>16}{beyond:>18}\n", format!("{min:.1} to {max:.1}"));
    }
    text +=
        "ns: a span begun and ended, median of the rounds; beyond the clock: less the first row of the same round\n";
    text += &match (built, tool) {
        (false, _) => "NVTX: not built in (feature nvtx)\n".into(),
        (true, None) => "NVTX: built in, no tool attached\n".into(),
        (true, Some(path)) => format!("NVTX: built in, NVTX_INJECTION64_PATH={path}\n"),
    };
    Ok(text)
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(text) => {
            use std::io::Write;
            // Whoever reads it may have gone away.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
