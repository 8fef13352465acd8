//! How fast the rings between the stages hand entries over, and how soon a sleeping stage wakes.
//!
//! Hand-overs: two threads, one entry at a time, as two stages do it: put one in and notify; take one out, or sleep.
//! Beside it the same ring without sleeping, which is the limit, and the standard library's `sync_channel`. Wake-up: an
//! entry for a thread that has been asleep for a while, beside a bare `park` and `unpark`, which is as fast as the
//! system wakes a thread. All kinds take turns, so that whatever else the machine does meets all of them.

#[path = "bench/report/mod.rs"]
mod report;
// The crate keeps its ring to itself; these are the crate's own files.
#[path = "../src/ring.rs"]
#[allow(dead_code, reason = "stages use more of it")]
mod ring;
#[path = "../src/sync.rs"]
#[allow(dead_code, unused_imports, reason = "stages use more of it")]
mod sync;

use std::{
    fs, hint,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use crossbeam_utils::Backoff;
use report::{
    Column, Common, Failure, Figure, Line, Panel, Plot, PlotTo, Report, Show, Spread, by_default, column, quantile,
};
use ring::{Consumer, Producer, ring};
use serde_json::{Value, json};
use sync::Signal;

/// Measure how fast the rings between the pipeline's stages hand entries over, and how soon a sleeping stage wakes.
///
/// Checks that every entry arrives once and in order.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.1")), mut_arg("rounds", by_default("5")))]
#[command(after_help = "\
Examples:
  bench_ring                                        rings of 1 to 64 entries, and how long a wake-up takes
  bench_ring --rounds 20                            a quieter figure on a busy machine
  bench_ring --plot ring.svg                        entries a second over the size of the ring
  bench_ring --json | jq .wake_up.median_seconds    one figure, for a script

The pipeline hands over one entry per layer and stage, so thousands a second are plenty; what the wake-up takes is time
that a disk or a bus may stand still.")]
struct Options {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    plot: PlotTo,
    /// Wake-ups of each kind
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    wake_ups: u32,
}

/// As large as what the pipeline's rings carry.
#[derive(Clone, Copy)]
struct Entry {
    number: u64,
    /// Made of the number, so that a torn entry is noticed.
    mirror: [u64; 3],
}

impl Entry {
    /// Ends a window.
    const END: u64 = u64::MAX;

    fn new(number: u64) -> Self {
        Self { number, mirror: [!number; 3] }
    }

    fn is(&self, number: u64) -> bool {
        self.number == number && self.mirror == [!number; 3]
    }
}

/// Two ends that hand entries over, one by one.
trait Sender: Send {
    fn send(&mut self, entry: Entry);
}

trait Receiver {
    fn receive(&mut self) -> Entry;
}

/// The ring, its waiting side asleep: what the pipeline does.
struct Sleeping<End>(End, [Arc<Signal>; 2]);

impl Sender for Sleeping<Producer<Entry>> {
    fn send(&mut self, entry: Entry) {
        let Self(end, [filled, emptied]) = self;
        loop {
            let ticket = emptied.ticket();
            if end.push(entry) {
                return filled.notify();
            }
            emptied.wait(ticket);
        }
    }
}

impl Receiver for Sleeping<Consumer<Entry>> {
    fn receive(&mut self) -> Entry {
        let Self(end, [filled, emptied]) = self;
        loop {
            let ticket = filled.ticket();
            if let Some(entry) = end.pop() {
                emptied.notify();
                return entry;
            }
            filled.wait(ticket);
        }
    }
}

/// The ring alone, its waiting side looking again and again.
struct Spinning<End>(End);

impl Sender for Spinning<Producer<Entry>> {
    fn send(&mut self, entry: Entry) {
        let backoff = Backoff::new();
        while !self.0.push(entry) {
            backoff.snooze();
        }
    }
}

impl Receiver for Spinning<Consumer<Entry>> {
    fn receive(&mut self) -> Entry {
        let backoff = Backoff::new();
        loop {
            match self.0.pop() {
                Some(entry) => return entry,
                None => backoff.snooze(),
            }
        }
    }
}

impl Sender for std::sync::mpsc::SyncSender<Entry> {
    fn send(&mut self, entry: Entry) {
        std::sync::mpsc::SyncSender::send(self, entry).expect("the receiver takes entries up to the last");
    }
}

impl Receiver for std::sync::mpsc::Receiver<Entry> {
    fn receive(&mut self) -> Entry {
        self.recv().expect("the sender says when it ends")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Sleeping,
    Spinning,
    Channel,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Sleeping, Self::Spinning, Self::Channel];

    fn name(self) -> &'static str {
        ["ring and signal", "limit: ring without sleeping", "std::sync::mpsc::sync_channel"][self as usize]
    }

    /// Hands entries over until the window ends; returns how many, and the seconds it took.
    fn window(self, capacity: usize, window: Duration) -> Result<(u64, f64), Failure> {
        let (tx, rx) = ring(capacity);
        match self {
            Self::Sleeping => {
                let signals = [Signal::new(), Signal::new()];
                hand_over(Sleeping(tx, signals.clone()), Sleeping(rx, signals), window)
            }
            Self::Spinning => hand_over(Spinning(tx), Spinning(rx), window),
            Self::Channel => {
                let (tx, rx) = sync_channel(capacity);
                hand_over(tx, rx, window)
            }
        }
    }
}

/// Every entry is checked in every window: comparing costs less than handing over.
fn hand_over(mut tx: impl Sender, mut rx: impl Receiver, window: Duration) -> Result<(u64, f64), Failure> {
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let (sent, received) = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut number = 0;
            // One at least, however late this thread comes to run.
            loop {
                tx.send(Entry::new(number));
                number += 1;
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
            tx.send(Entry::new(Entry::END));
            number
        });
        scope.spawn(|| {
            thread::sleep(window);
            over.store(true, Ordering::Relaxed);
        });
        let (mut received, mut in_order) = (0, true);
        loop {
            let entry = rx.receive();
            if entry.is(Entry::END) {
                break;
            }
            in_order &= hint::black_box(entry.is(received));
            received += 1;
        }
        (sender.join().expect("no thread panics"), in_order.then_some(received))
    });
    if received != Some(sent) {
        return Err(format!("{sent} entries were sent, but not all arrived once and in order").into());
    }
    Ok((sent, start.elapsed().as_secs_f64()))
}

/// How long the receiver is left alone before an entry. By then it has stopped looking and sleeps, unless others want
/// the processor, when it is given this long again.
const QUIET: Duration = Duration::from_millis(1);

/// Whether a thread of this process is asleep.
fn is_asleep(thread: libc::pid_t) -> bool {
    let state = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    state.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
}

fn own_number() -> libc::pid_t {
    // SAFETY: without arguments, and it cannot fail.
    unsafe { libc::gettid() }
}

/// Microseconds from just before an entry is sent until the receiver has it, and how often it was asleep then.
#[derive(Default)]
struct WakeUps {
    micros: Vec<f64>,
    parked: usize,
}

impl WakeUps {
    /// A sample counts if the receiver's thread has given up the processor for it.
    fn record(&mut self, sent: Duration, now: Duration, switches: &mut libc::c_long) {
        let before = std::mem::replace(switches, voluntary_switches());
        if *switches > before {
            self.micros.push((now - sent).as_secs_f64() * 1e6);
            self.parked += 1;
        }
    }
}

/// How often the calling thread has gone to sleep.
fn voluntary_switches() -> libc::c_long {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is the call's, and zeroes are a value of it.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

/// Wakes a thread asleep on the pipeline's signal and one that is parked, in turn.
fn wake_ups(count: u32, mut woken: impl FnMut()) -> [WakeUps; 2] {
    let base = Instant::now();
    let (mut tx, mut rx) = ring::<Entry>(4);
    let signal = Signal::new();
    // For the parked thread: when it was woken, in nanoseconds, 0 for not yet.
    let (stamp, taken) = (AtomicU64::new(0), AtomicU64::new(0));
    let numbers = [AtomicI32::new(0), AtomicI32::new(0)];
    let (signal, stamp, taken, numbers) = (&*signal, &stamp, &taken, &numbers);
    let samples = || WakeUps { micros: Vec::with_capacity(count as usize), parked: 0 };
    thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            numbers[0].store(own_number(), Ordering::Relaxed);
            let (mut samples, mut switches) = (samples(), voluntary_switches());
            for _ in 0..count {
                let entry = loop {
                    let ticket = signal.ticket();
                    if let Some(entry) = rx.pop() {
                        break entry;
                    }
                    signal.wait(ticket);
                };
                samples.record(Duration::from_nanos(entry.number), base.elapsed(), &mut switches);
                taken.fetch_add(1, Ordering::Release);
            }
            samples
        });
        let parked = scope.spawn(move || {
            numbers[1].store(own_number(), Ordering::Relaxed);
            let (mut samples, mut switches) = (samples(), voluntary_switches());
            for _ in 0..count {
                let sent = loop {
                    match stamp.swap(0, Ordering::Acquire) {
                        0 => thread::park(),
                        sent => break sent,
                    }
                };
                samples.record(Duration::from_nanos(sent), base.elapsed(), &mut switches);
                taken.fetch_add(1, Ordering::Release);
            }
            samples
        });
        for number in 0..2 * u64::from(count) {
            let receiver = &numbers[number as usize % 2];
            for _ in 0..100 {
                thread::sleep(QUIET);
                if is_asleep(receiver.load(Ordering::Relaxed)) {
                    break;
                }
            }
            let now = base.elapsed().as_nanos() as u64;
            if number.is_multiple_of(2) {
                assert!(tx.push(Entry::new(now)), "the ring is empty");
                signal.notify();
            } else {
                stamp.store(now, Ordering::Release);
                parked.thread().unpark();
            }
            while taken.load(Ordering::Acquire) <= number {
                thread::sleep(QUIET / 10);
            }
            woken();
        }
        [sleeper, parked].map(|thread| thread.join().expect("no thread panics"))
    })
}

/// Entries that the rings hold: the pipeline's hold as many as it has slots (a few), or units that are kept (many).
const CAPACITIES: [usize; 5] = [1, 2, 4, 16, 64];

const COLUMNS: [Column; 8] = [
    column("what", "what", Show::Text, ""),
    column("way", "way", Show::Text, ""),
    column("capacity", "ring of", Show::Count, "how many entries the ring, or channel, holds"),
    column("seconds", "median", Show::SpreadOfSeconds, "time of one, ± half of the range over the rounds"),
    column("p99_seconds", "p99", Show::Seconds, "99 of 100 take less"),
    column("m_entries_s", "M/s", Show::Spread(2), "million entries a second"),
    column("ratio", "of limit", Show::Spread(2), "rate over that of the row marked as the limit, round by round"),
    column("asleep", "asleep", Show::Text, "how often the thread had really given up its core when its entry came"),
];

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, Some(&options.plot), || run(&options))
}

fn run(options: &Options) -> Result<Report, Failure> {
    let common = &options.common;
    let bar = report::progress(u64::from(common.rounds) * (CAPACITIES.len() * Kind::ALL.len()) as u64, common)?;
    bar.set_message("handing over");
    // Million entries a second, by capacity, kind and round.
    let mut rates = [[(); 3]; CAPACITIES.len()].map(|kinds| kinds.map(|()| Vec::new()));
    for _ in 0..common.rounds {
        for (rates, capacity) in rates.iter_mut().zip(CAPACITIES) {
            for (rates, kind) in rates.iter_mut().zip(Kind::ALL) {
                let (entries, seconds) = kind.window(capacity, common.window)?;
                rates.push(entries as f64 / 1e6 / seconds);
                bar.inc(1);
            }
        }
    }
    bar.set_message("waking");
    let woken = wake_ups(options.wake_ups, || bar.tick());
    bar.finish_and_clear();

    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut report = Report::new("bench_ring", format!("cpu ({threads} threads)"), &COLUMNS);
    for (capacity, rates) in CAPACITIES.iter().zip(&rates) {
        for (kind, of_kind) in Kind::ALL.into_iter().zip(rates) {
            let seconds: Vec<_> = of_kind.iter().map(|rate| 1e-6 / rate).collect();
            let ratio = (kind != Kind::Spinning).then(|| Spread::of(&ratios(of_kind, &rates[1])));
            let [seconds, rates] = [Spread::of(&seconds), Spread::of(of_kind)].map(|spread| json!(spread));
            report.row([
                json!("hand-over"),
                json!(kind.name()),
                json!(capacity),
                seconds,
                Value::Null,
                rates,
                json!(ratio),
                Value::Null,
            ]);
        }
    }
    wake_up_rows(&mut report, woken, options.wake_ups);
    let [sleeping, spinning, _] = &rates[CAPACITIES.iter().position(|capacity| *capacity == 4).expect("it is there")];
    report.compare(
        Figure::new("hand-overs through a ring of 4 whose ends sleep, as the pipeline's do", "M/s", sleeping),
        Figure::new("the same ring without sleeping", "M/s", spinning),
        "a ring of 4, sleeping / not sleeping",
        &ratios(sleeping, spinning),
    );
    report.plot = Some(plot(&rates));
    Ok(report)
}

fn wake_up_rows(report: &mut Report, woken: [WakeUps; 2], count: u32) {
    let [ours, bare] = woken.map(|mut samples| {
        let [median, p99] = [0.5, 0.99].map(|share| quantile(&mut samples.micros, share) / 1e6);
        (median, p99, samples.parked)
    });
    for (way, (median, p99, asleep), ratio) in
        [("ring and signal", ours, Some(bare.0 / ours.0)), ("limit: park and unpark", bare, None)]
    {
        report.row([
            json!("wake-up"),
            json!(way),
            Value::Null,
            json!(Spread::of(&[median])),
            json!(p99),
            Value::Null,
            json!(ratio.filter(|ratio| ratio.is_finite()).map(|ratio| Spread::of(&[ratio]))),
            json!(format!("{asleep} of {count}")),
        ]);
    }
    for (key, (median, p99, asleep)) in [("wake_up", ours), ("limit_wake_up", bare)] {
        let object = json!({"median_seconds": median, "p99_seconds": p99, "asleep": asleep, "of": count});
        report.field(key, object);
    }
}

fn ratios(ours: &[f64], limit: &[f64]) -> Vec<f64> {
    ours.iter().zip(limit).map(|(ours, limit)| ours / limit).collect()
}

fn plot(rates: &[[Vec<f64>; 3]]) -> Plot {
    let line = |kind: Kind| Line {
        name: kind.name().to_owned(),
        points: CAPACITIES.iter().zip(rates).map(|(&x, rates)| (x as f64, Spread::of(&rates[kind as usize]))).collect(),
    };
    let panel = Panel {
        x: "entries that the ring holds",
        y: "million entries a second",
        format: |x| format!("{x}"),
        lines: Kind::ALL.map(line).into(),
        limit: None,
    };
    Plot { title: "Hand-overs between two threads".to_owned(), panels: vec![panel] }
}
