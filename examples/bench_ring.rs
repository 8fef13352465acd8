//! How fast the rings between the stages hand entries over, and how soon a sleeping stage wakes.
//!
//! Hand-overs: two threads, one entry at a time, as two stages do it: put one in and notify; take one out, or sleep.
//! Beside it the same ring without sleeping, which is the limit, and the standard library's `sync_channel`. Wake-up: an
//! entry for a thread that has been asleep for a while, beside a bare `park` and `unpark`, which is as fast as the
//! system wakes a thread. All kinds take turns, so that whatever else the machine does meets all of them.

mod bench;
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

use bench::{Failure, finish, progress, quantile, seconds};
use clap::Parser;
use crossbeam_utils::Backoff;
use ring::{Consumer, Producer, ring};
use sync::Signal;

/// Measure how fast the rings between the pipeline's stages hand entries over, and how soon a sleeping stage wakes.
///
/// Checks first that every entry arrives once and in order. Prints millions of entries per second, and microseconds.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  bench_ring                              as the pipeline uses it: rings of 4 and of 64 entries
  bench_ring --rounds 20                  a quieter figure on a busy machine
  bench_ring --json | jq .wake_up_us_median

The pipeline hands over one entry per layer and stage, so thousands a second are plenty; what the wake-up takes is time
that a disk or a bus may stand still.")]
struct Options {
    /// Windows of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of a window
    #[arg(long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    window: Duration,
    /// Wake-ups of each kind
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    wake_ups: u32,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
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
            while !over.load(Ordering::Relaxed) {
                tx.send(Entry::new(number));
                number += 1;
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

/// Entries that the pipeline's rings hold: a few slots, and a model with many layers at home.
const CAPACITIES: [usize; 2] = [4, 64];

fn main() -> ExitCode {
    finish(run(&Options::parse()))
}

fn run(options: &Options) -> Result<String, Failure> {
    let windows = u64::from(options.rounds) * (CAPACITIES.len() * Kind::ALL.len()) as u64;
    let bar = progress(windows, options.json)?;
    bar.set_message("handing over");
    let mut totals = [[(0, 0.0); 3]; 2];
    for _ in 0..options.rounds {
        for (totals, capacity) in totals.iter_mut().zip(CAPACITIES) {
            for (total, kind) in totals.iter_mut().zip(Kind::ALL) {
                let (entries, seconds) = kind.window(capacity, options.window)?;
                *total = (total.0 + entries, total.1 + seconds);
                bar.inc(1);
            }
        }
    }
    bar.set_message("waking");
    let [mut ours, mut bare] = wake_ups(options.wake_ups, || bar.tick());
    bar.finish_and_clear();
    let rates = totals.map(|totals| totals.map(|(entries, seconds): (u64, f64)| entries as f64 / 1e6 / seconds));
    let [ours_at, bare_at] =
        [&mut ours, &mut bare].map(|samples| [0.5, 0.99].map(|share| quantile(&mut samples.micros, share)));

    if options.json {
        let hand_overs = CAPACITIES.iter().zip(rates).map(|(capacity, [sleeping, spinning, channel])| {
            serde_json::json!({
                "capacity": capacity, "m_entries_s": sleeping, "limit_m_entries_s": spinning,
                "ratio": sleeping / spinning, "sync_channel_m_entries_s": channel,
            })
        });
        let object = serde_json::json!({
            "hand_overs": hand_overs.collect::<Vec<_>>(), "wake_ups": options.wake_ups,
            "wake_ups_asleep": ours.parked, "wake_up_us_median": ours_at[0], "wake_up_us_p99": ours_at[1],
            "limit_wake_ups_asleep": bare.parked, "limit_wake_up_us_median": bare_at[0],
            "limit_wake_up_us_p99": bare_at[1],
        });
        return Ok(format!("{object}\n"));
    }
    let mut text = String::from("hand-overs, million entries/s     ring   limit: without sleep   sync_channel\n");
    for (capacity, [sleeping, spinning, channel]) in CAPACITIES.iter().zip(rates) {
        text += &format!("  a ring of {capacity:<4} {sleeping:>22.2} {spinning:>22.2} {channel:>14.2}\n");
    }
    text += "wake-up of a sleeping thread, µs  median      p99   asleep\n";
    for (name, [median, p99], samples) in [("ring and signal", ours_at, &ours), ("limit: park, unpark", bare_at, &bare)]
    {
        text += &format!("  {name:<30} {median:>7.1} {p99:>8.1}   {} of {}\n", samples.parked, options.wake_ups);
    }
    Ok(text)
}
