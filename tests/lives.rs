//! Lives of a streamer as nobody plans them: passes, parts of passes, layers held and given back in any order, cancels from
//! another thread, rewinds, tables, layers that are forgotten, and an end at any point, while signals interrupt every thread, the
//! process is stopped and goes on, and children are forked. Every byte is right or the error is the one that belongs there, nothing
//! hangs, and after each life the process holds what it held before. And a long life, in which memory does not grow.
//!
//! LAYER_STREAMER_LIVES says how many lives, LAYER_STREAMER_SOAK_SECONDS how long the long one is, LAYER_STREAMER_LIVES_SEED
//! repeats a life.

mod common;

use std::{
    env, fs, mem,
    process::{Child, Command},
    ptr,
    sync::atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use common::{Fixture, SIZES, bytes_of, check, checked_pass, fixture, random_fixture, settings};
use fastrand::Rng;
use layer_streamer::{
    Error, LayerStreamer, Settings,
    device::{Cpu, CpuStream, Device},
    plan::{CachePolicy, Reader, Tier},
};
use support::limits::{Holdings, in_child};

/// What happened in all lives.
#[derive(Debug, Default)]
struct Counts {
    lives: usize,
    right: usize,
    refused: usize,
    cancelled: usize,
    held: usize,
    forgotten: usize,
    forks: usize,
}

static OVER: AtomicBool = AtomicBool::new(false);
static SIGNALS: AtomicUsize = AtomicUsize::new(0);
/// The life that is lived; whoever waits for it to change gives up after a minute.
static LIFE: AtomicU64 = AtomicU64::new(0);

extern "C" fn ignored(_: libc::c_int) {}

/// Interrupts threads at random, stops the process now and then, and ends it if it hangs.
struct Weather {
    flag: tempfile::NamedTempFile,
    stopper: Child,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Weather {
    fn begin() -> Self {
        // SAFETY: a handler that does nothing, without SA_RESTART, so that calls are interrupted; the alarm is the watchdog's now.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = ignored as *const () as usize;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()), 0);
            libc::alarm(0);
        }
        let process = std::process::id();
        let interrupt = move || {
            let mut rng = Rng::new();
            while !OVER.load(SeqCst) {
                let tasks = fs::read_dir("/proc/self/task").unwrap();
                let tasks = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse::<i32>().ok());
                for task in tasks.collect::<Vec<_>>() {
                    if rng.bool() {
                        // SAFETY: no memory is involved; a thread that has gone is an error.
                        unsafe { libc::syscall(libc::SYS_tgkill, process, task, libc::SIGUSR1) };
                        SIGNALS.fetch_add(1, Relaxed);
                    }
                }
                thread::sleep(Duration::from_micros(rng.u64(..1500)));
            }
        };
        let watch = || {
            let (mut seen, mut since) = (LIFE.load(SeqCst), Instant::now());
            while !OVER.load(SeqCst) {
                thread::sleep(Duration::from_millis(20));
                let now = LIFE.load(SeqCst);
                if now != seen {
                    (seen, since) = (now, Instant::now());
                } else if since.elapsed() > Duration::from_secs(60) {
                    eprintln!("the life of seed {seen} hangs");
                    std::process::abort();
                }
            }
        };
        let threads = vec![thread::spawn(interrupt), thread::spawn(watch)];
        // It ends by itself, since whoever killed it between the two could stay stopped.
        let flag = tempfile::NamedTempFile::new().unwrap();
        let stops = "while [ -e \"$0\" ] && kill -STOP $1; do sleep 0.01; kill -CONT $1; sleep 0.2; done";
        let arguments = ["-c", stops, flag.path().to_str().unwrap(), &process.to_string()];
        let stopper = Command::new("sh").args(arguments).spawn().unwrap();
        Self { flag, stopper, threads }
    }

    fn end(mut self) {
        OVER.store(true, SeqCst);
        drop(self.flag);
        self.stopper.wait().unwrap();
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// A child that ends at once.
fn fork() {
    // SAFETY: the child makes one system call, which does not return.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    let mut status = -1;
    // SAFETY: the status goes to a local.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {}
    assert_eq!(status, 0);
}

struct Life<'a> {
    fixture: &'a Fixture,
    rng: Rng,
    counts: &'a mut Counts,
}

impl Life<'_> {
    fn settings(&mut self) -> Settings {
        let rng = &mut self.rng;
        let readers = [Reader::Auto, Reader::Pread, Reader::Uring, Reader::UringFixed];
        let caches = [CachePolicy::Auto, CachePolicy::Buffered, CachePolicy::Direct];
        Settings {
            reader: readers[rng.usize(..readers.len())],
            cache: caches[rng.usize(..caches.len())],
            ..settings(1 + rng.usize(..3), rng.usize(..3), rng.usize(..3))
        }
    }

    /// Whether it is the error of a cancel, where one may come.
    fn cancelled(&mut self, error: &Error, may: bool) -> bool {
        let cancelled = matches!(error, Error::Cancelled);
        assert!(cancelled && may, "{error}");
        self.counts.cancelled += 1;
        true
    }

    /// Takes some layers, holds a few, gives them back in any order. Whether the pass can go on; a layer may be forgotten.
    fn part(&mut self, streamer: &LayerStreamer<Cpu>, stream: &CpuStream, may_be_cancelled: bool, forgets: bool) {
        let mut held = Vec::new();
        for _ in 0..self.rng.usize(..3 * self.fixture.units.len()) {
            while !held.is_empty() && self.rng.u8(..3) == 0 {
                let layer: layer_streamer::Layer<'_, Cpu> = held.swap_remove(self.rng.usize(..held.len()));
                check(self.fixture, &Cpu, &layer);
                match self.rng.bool() {
                    true => drop(layer),
                    false => layer.release().unwrap(),
                }
            }
            match streamer.next(stream) {
                Ok(layer) => {
                    check(self.fixture, &Cpu, &layer);
                    self.counts.right += 1;
                    held.push(layer);
                }
                Err(Error::LayersHeld { held: count, .. }) => {
                    assert_eq!(count, held.len());
                    self.counts.held += 1;
                    held.pop();
                }
                Err(error) => {
                    self.cancelled(&error, may_be_cancelled);
                    break;
                }
            }
        }
        if forgets {
            held.into_iter().for_each(mem::forget);
        }
    }

    /// From the open to the end. Whether memory was left behind on purpose.
    fn live(mut self) -> bool {
        self.counts.lives += 1;
        let settings = self.settings();
        let tiers = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];
        let mut units = self.fixture.units.clone();
        units.iter_mut().for_each(|unit| _ = unit.set_tier(tiers[self.rng.usize(..4)]));
        let mut streamer = match LayerStreamer::new(&Cpu, &self.fixture.checkpoint, &units, &settings) {
            Ok(streamer) => streamer,
            Err(error) => {
                assert!(matches!(error, Error::Setting { .. } | Error::Unsupported { .. }), "{settings:?}: {error}");
                self.counts.refused += 1;
                return false;
            }
        };
        let stream = Cpu.stream().unwrap();
        for _ in 0..self.rng.usize(..8) {
            let canceller = streamer.canceller();
            let (cancels, after) = (self.rng.u8(..3) == 0, Duration::from_micros(self.rng.u64(..400)));
            let cancel = move || {
                thread::sleep(after);
                canceller.cancel();
            };
            let cancel = cancels.then(|| thread::spawn(cancel));
            match self.rng.u8(..12) {
                0..4 => {
                    let fixture = self.fixture;
                    let passed = streamer.run_pass(&stream, (), |(), layer| {
                        check(fixture, &Cpu, layer);
                        Ok::<_, Error>(())
                    });
                    match passed {
                        Ok(()) => self.counts.right += 1,
                        Err(error) => _ = self.cancelled(&error, cancels),
                    }
                }
                4..8 => self.part(&streamer, &stream, cancels, false),
                8 => {
                    let name = &self.fixture.units[0].arrivals()[0].inputs[0];
                    match streamer.load_static(&[name]) {
                        Ok(statics) => {
                            assert!(bytes_of(&Cpu, statics.tensor(name).unwrap()) == self.fixture.stored(name));
                        }
                        Err(error) => _ = self.cancelled(&error, cancels),
                    }
                }
                9 => {
                    fork();
                    self.counts.forks += 1;
                }
                10 if self.rng.u8(..4) == 0 => {
                    self.part(&streamer, &stream, cancels, true);
                    cancel.into_iter().for_each(|cancel| cancel.join().unwrap());
                    let leaked = matches!(streamer.rewind(), Err(Error::LayerLeaked { .. }));
                    let closed = streamer.close();
                    assert_eq!(leaked, matches!(closed, Err(Error::Leaked { .. })), "{closed:?}");
                    self.counts.forgotten += usize::from(leaked);
                    return leaked;
                }
                _ => {}
            }
            // Then the next pass is not the one that was cancelled.
            cancel.into_iter().for_each(|cancel| cancel.join().unwrap());
            streamer.rewind().unwrap();
        }
        if self.rng.bool() {
            self.part(&streamer, &stream, false, false);
        }
        match self.rng.bool() {
            true => streamer.close().unwrap(),
            false => drop(streamer),
        }
        false
    }
}

fn number(name: &str, usual: u64) -> u64 {
    env::var(name).map_or(usual, |text| text.parse().expect("a whole number"))
}

#[test]
fn whatever_is_done_with_a_streamer_its_bytes_are_right_and_nothing_is_left() {
    if !in_child("whatever_is_done_with_a_streamer_its_bytes_are_right_and_nothing_is_left") {
        return;
    }
    let repeated = env::var_os("LAYER_STREAMER_LIVES_SEED").is_some();
    let lives = if repeated { 1 } else { number("LAYER_STREAMER_LIVES", 150) };
    let first = number("LAYER_STREAMER_LIVES_SEED", Rng::new().u64(1 << 20..1 << 60));
    eprintln!("the first seed is {first}");
    let weather = Weather::begin();
    let (mut counts, mut before) = (Counts::default(), Holdings::at_rest());
    let mut stored: Option<Fixture> = None;
    for seed in first..first + lives {
        LIFE.store(seed, SeqCst);
        let rng = Rng::with_seed(seed);
        // Each fixture is that of a seed, for a few lives.
        let fixture = match &mut stored {
            Some(fixture) if seed % 8 != 0 && !repeated => fixture,
            none => none.insert(random_fixture(60_000, &mut Rng::with_seed(seed / 8))),
        };
        let leaked = Life { fixture, rng, counts: &mut counts }.live();
        if leaked {
            let now = Holdings::at_rest();
            assert_eq!(Holdings { arenas: before.arenas, ..now }, before, "seed {seed}");
            before = now;
        } else {
            before.assert_back(&format!("seed {seed}"));
        }
    }
    weather.end();
    eprintln!("counted: {counts:?}, {} signals, 0 wrong, 0 hung", SIGNALS.load(Relaxed));
}

/// What of the process's memory is in RAM, in bytes.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn in_a_long_life_nothing_grows() {
    if !in_child("in_a_long_life_nothing_grows") {
        return;
    }
    let time = Duration::from_secs(number("LAYER_STREAMER_SOAK_SECONDS", 3));
    let weather = Weather::begin();
    let mut fixture = fixture(6, &SIZES, 31);
    let tiers = [Tier::Disk, Tier::Ram, Tier::Disk, Tier::Pinned, Tier::Disk, Tier::Gpu];
    fixture.units.iter_mut().zip(tiers).for_each(|(unit, tier)| _ = unit.set_tier(tier));
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 2, 1)).unwrap();
    let (mut passes, start) = (0u64, Instant::now());
    let mut pass = |streamer: &mut LayerStreamer<Cpu>| {
        checked_pass(&fixture, streamer);
        passes += 1;
        LIFE.store(passes, SeqCst);
    };
    (0..20).for_each(|_| pass(&mut streamer));
    // The least of some looks: the folder that says which threads there are is open now and then.
    let look = |_| {
        thread::sleep(Duration::from_millis(2));
        Holdings::now()
    };
    let held = || (0..50).map(look).min_by_key(|holdings| holdings.descriptors).expect("there are fifty");
    let before = (resident(), held());
    while start.elapsed() < time {
        pass(&mut streamer);
    }
    let grown = resident().saturating_sub(before.0);
    assert_eq!(held(), before.1, "after {passes} passes");
    assert!(grown < 8 << 20, "{grown} bytes more in RAM after {passes} passes");
    streamer.close().unwrap();
    weather.end();
    eprintln!("counted: {passes} passes in {:?}, {grown} bytes more, 0 wrong", start.elapsed());
}
