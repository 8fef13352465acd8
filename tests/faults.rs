//! Every system call that a run makes, failing once: files that cannot be opened, examined or read, memory that is not there, rings
//! that the kernel does not give, folders that cannot be written. For each kind and each k the k-th such call of a whole life (open,
//! two passes, a rewind, tables, close) fails, and then: the bytes are right, or one error says what went wrong, at
//! once; nothing is left behind; and the next life is right.
#![cfg(target_arch = "x86_64")]

mod common;

use std::{
    fs,
    ops::ControlFlow,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use common::{Fixture, bytes_of, fixture, settings};
use layer_streamer::{
    Checkpoint, Error, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device},
    model::{Choice, Decoder, Model},
    plan::{CachePolicy, Reader, Tier},
    trace::{
        Observer,
        timeline::{Timeline, TraceFile},
    },
};
use support::limits::{Holdings, in_child};
use support::speller;
use support::trap::{Call, Kind};

/// Memory of arenas, rings and threads; the small change of the allocator, which nobody can do without, is left alone.
fn is_large(arguments: &[usize; 6]) -> bool {
    arguments[1] >= 64 << 10
}

fn any(_: &[usize; 6]) -> bool {
    true
}

const OPEN: &[Call] = &[(libc::SYS_openat, None), (libc::SYS_open, None)];
const EXAMINE: &[Call] =
    &[(libc::SYS_statx, None), (libc::SYS_fstat, None), (libc::SYS_newfstatat, None), (libc::SYS_stat, None)];
const READ: &[Call] = &[(libc::SYS_read, None), (libc::SYS_pread64, None)];
const WRITE: &[Call] =
    &[(libc::SYS_write, None), (libc::SYS_fsync, None), (libc::SYS_linkat, None), (libc::SYS_rename, None)];
const PRESENT: &[Call] = &[(libc::SYS_madvise, Some((2, libc::MADV_POPULATE_WRITE as u32)))];
/// Those by which Rust's threads wait.
const WAIT: &[Call] = &[(libc::SYS_futex, Some((1, (libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG) as u32)))];

static KINDS: &[Kind] = &[
    Kind { name: "open: no descriptor", calls: OPEN, applies: any, errno: libc::EMFILE },
    Kind { name: "open: not allowed", calls: OPEN, applies: any, errno: libc::EACCES },
    Kind { name: "open: interrupted", calls: OPEN, applies: any, errno: libc::EINTR },
    Kind { name: "examine", calls: EXAMINE, applies: any, errno: libc::EIO },
    Kind { name: "read: I/O error", calls: READ, applies: any, errno: libc::EIO },
    Kind { name: "read: interrupted", calls: READ, applies: any, errno: libc::EINTR },
    Kind { name: "memory", calls: &[(libc::SYS_mmap, None)], applies: is_large, errno: libc::ENOMEM },
    Kind { name: "making memory present: there is none", calls: PRESENT, applies: any, errno: libc::ENOMEM },
    Kind { name: "making memory present: unknown", calls: PRESENT, applies: any, errno: libc::EINVAL },
    Kind { name: "a ring", calls: &[(libc::SYS_io_uring_setup, None)], applies: any, errno: libc::ENOMEM },
    Kind { name: "its buffers", calls: &[(libc::SYS_io_uring_register, None)], applies: any, errno: libc::ENOMEM },
    Kind { name: "entering it", calls: &[(libc::SYS_io_uring_enter, None)], applies: any, errno: libc::EIO },
    Kind {
        name: "entering it: interrupted",
        calls: &[(libc::SYS_io_uring_enter, None)],
        applies: any,
        errno: libc::EINTR,
    },
    Kind { name: "waiting: interrupted", calls: WAIT, applies: any, errno: libc::EINTR },
    Kind { name: "write: the disk is full", calls: WRITE, applies: any, errno: libc::ENOSPC },
    Kind { name: "write: interrupted", calls: &[(libc::SYS_write, None)], applies: any, errno: libc::EINTR },
];

/// What a life may take on a machine that is busy with other things; alone it takes a small part of it. A call that is made again
/// and again gives up after five seconds, which is no way to end.
const SOON: Duration = Duration::from_secs(4);

/// What is done, again and again; what is checked after it was done or refused, with no call failing.
struct Life<'a> {
    name: &'a str,
    live: &'a dyn Fn() -> Result<(), Error>,
    check: &'a dyn Fn(bool),
}

#[derive(Default)]
struct Counts {
    tried: usize,
    right: usize,
    refused: usize,
}

impl Life<'_> {
    /// Lives with the k-th call of each kind failing, for every k there is.
    fn all(&self, kinds: impl Fn(&Kind) -> bool) {
        (self.check)((self.live)().is_ok());
        let before = Holdings::at_rest();
        for (number, kind) in KINDS.iter().enumerate().filter(|(_, kind)| kinds(kind)) {
            // A kind that hangs is one that fails.
            // SAFETY: no memory is involved.
            unsafe { libc::alarm(120) };
            let (mut counts, mut k) = (Counts::default(), 0);
            while self.one(number, k, before, &mut counts) {
                // Every one in the long runs; of many a part in everyday ones.
                k += if support::cases(1) > 1 { 1 } else { 1 + k / 6 };
            }
            let Counts { tried, right, refused } = counts;
            eprintln!("counted: {}, {}: {tried} tried, {right} right, {refused} errors, 0 wrong", self.name, kind.name);
        }
    }

    /// Whether there was a k-th call.
    fn one(&self, number: usize, k: usize, before: Holdings, counts: &mut Counts) -> bool {
        let kind = &KINDS[number];
        let what = format!("{}, {}, call {k}", self.name, kind.name);
        let start = Instant::now();
        support::trap::arm(number, k, 1);
        let outcome = panic::catch_unwind(AssertUnwindSafe(self.live));
        let fired = support::trap::disarm();
        assert!(start.elapsed() < SOON, "{what}: {:?}", start.elapsed());
        let outcome = outcome.unwrap_or_else(|_| panic!("{what}: a panic"));
        (self.check)(outcome.is_ok());
        match outcome {
            Ok(()) => counts.right += 1,
            Err(error) => {
                let text = error.to_string();
                // Of a thread for whose stack there is no memory the system says EAGAIN.
                let says = |errno: i32| text.contains(&format!("(os error {errno})"));
                let said = says(kind.errno) || (kind.name == "memory" && says(libc::EAGAIN));
                assert!(fired && said, "{what}: {text}, without the cause");
                assert!(kind.errno != libc::EINTR, "{what}: {text}: an interruption is no error");
                counts.refused += 1;
                (self.live)().unwrap_or_else(|error| panic!("{what}: the next life: {error}"));
                (self.check)(true);
            }
        }
        before.assert_back(&what);
        counts.tried += usize::from(fired);
        fired
    }
}

/// Compares a pass with what was stored.
fn pass(streamer: &mut LayerStreamer<Cpu>, stored: &[Vec<(String, Vec<u8>)>]) -> Result<(), Error> {
    let stream = Cpu.stream()?;
    streamer.run_pass(&stream, (), |(), layer| {
        for (name, bytes) in &stored[layer.index()] {
            assert!(bytes_of(&Cpu, layer.tensor(name)?) == *bytes, "wrong bytes: {name} of {}", layer.name());
        }
        Ok(())
    })
}

/// A streamer's life over units in every tier.
fn streamed(
    table: &[StoredTensor],
    units: &[Unit],
    stored: &[Vec<(String, Vec<u8>)>],
    reader: Reader,
) -> Result<(), Error> {
    let checkpoint = Checkpoint::from_table(table.to_vec())?;
    let settings = Settings { reader, cache: CachePolicy::Direct, ..settings(2, 2, 1) };
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, units, &settings)?;
    pass(&mut streamer, stored)?;
    drop(streamer.next(&Cpu.stream()?)?);
    streamer.rewind()?;
    let statics = streamer.load_static(&["0.1"])?;
    assert!(bytes_of(&Cpu, statics.tensor("0.1")?) == stored[0][1].1, "wrong bytes: static");
    pass(&mut streamer, stored)?;
    streamer.close()
}

/// What is stored, unit by unit.
fn stored(fixture: &Fixture) -> Vec<Vec<(String, Vec<u8>)>> {
    let unit = |unit: &Unit| {
        let of = |arrival: &layer_streamer::plan::Arrival| (arrival.output.clone(), fixture.stored(&arrival.inputs[0]));
        unit.arrivals().iter().map(of).collect()
    };
    fixture.units.iter().map(unit).collect()
}

/// Runs `work` in a thread whose calls may fail. The allocator takes what it needs from the heap that there is.
fn trapped(work: impl FnOnce() + Send) {
    // SAFETY: settings of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    thread::scope(|scope| {
        let body = || {
            support::trap::install(&KINDS);
            work();
        };
        scope.spawn(body).join().unwrap_or_else(|panic| panic::resume_unwind(panic));
    });
}

fn every_call_of_a_streamer(reader: Reader) {
    let mut fixture = fixture(4, &[300, 30_000, 7], 5);
    let tiers = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];
    fixture.units.iter_mut().zip(tiers).for_each(|(unit, tier)| _ = unit.set_tier(tier));
    let (stored, table) = (stored(&fixture), fixture.table.values().cloned().collect::<Vec<_>>());
    trapped(|| {
        let live = || streamed(&table, &fixture.units, &stored, reader);
        Life { name: &format!("a streamer with {reader}"), live: &live, check: &|_| () }
            .all(|kind| !kind.name.starts_with("write"));
    });
}

#[test]
fn every_call_of_a_streamer_that_reads_with_threads_may_fail() {
    if in_child("every_call_of_a_streamer_that_reads_with_threads_may_fail") {
        every_call_of_a_streamer(Reader::Pread);
    }
}

#[test]
fn every_call_of_a_streamer_that_reads_with_a_ring_may_fail() {
    if in_child("every_call_of_a_streamer_that_reads_with_a_ring_may_fail") {
        every_call_of_a_streamer(Reader::Auto);
    }
}

/// A model's life: opened, and asked for a few tokens.
fn spelled(folder: &Path) -> Result<Vec<u32>, Error> {
    let model = Model::open(folder)?;
    let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 1, 16)?;
    let mut tokens = Vec::new();
    decoder.generate(&[&[22, 10, 19, 16, 26]], 3, &[], Choice::Greedy, |_, token| {
        tokens.push(token);
        Ok::<_, Error>(ControlFlow::Continue(()))
    })?;
    Ok(tokens)
}

#[test]
fn every_call_of_a_model_may_fail() {
    if in_child("every_call_of_a_model_may_fail") {
        let folder = speller();
        let expected = spelled(&folder).unwrap();
        let live = || spelled(&folder).map(|tokens| assert_eq!(tokens, expected, "wrong tokens"));
        trapped(|| Life { name: "a model", live: &live, check: &|_| () }.all(|kind| !kind.name.starts_with("write")));
    }
}

#[test]
fn every_call_that_writes_a_trace_may_fail_and_what_was_there_stays() {
    if !in_child("every_call_that_writes_a_trace_may_fail_and_what_was_there_stays") {
        return;
    }
    let fixture = fixture(3, &[300], 5);
    for name in ["trace.json", "trace.html"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let timeline = Timeline::with_events(1000);
        let observers = [timeline.clone() as Arc<dyn Observer>];
        let mut streamer =
            LayerStreamer::with_observers(&Cpu, &fixture.checkpoint, &fixture.units, &Settings::default(), &observers)
                .unwrap();
        common::checked_pass(&fixture, &mut streamer);
        streamer.close().unwrap();
        let recording = timeline.recording(None);
        trapped(|| {
            let live = || TraceFile::create(&path).and_then(|file| file.write(&recording));
            // Whole or not at all, with nothing beside it.
            let check = |written: bool| {
                let (now, files) = (fs::read(&path).unwrap(), fs::read_dir(folder.path()).unwrap().count());
                assert_eq!((now != b"what was there", files), (written, 1), "{name}");
                fs::write(&path, "what was there").unwrap();
            };
            Life { name, live: &live, check: &check }
                .all(|kind| ["open", "write"].iter().any(|name| kind.name.starts_with(name)));
        });
    }
}
