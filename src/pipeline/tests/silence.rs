//! Rings that the kernel refuses to enter, reads that are put off again and again, and reads that never end: what is delivered
//! is exact, what cannot be is an error, and whatever a read may still write to is nobody else's.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use support::limits::{Holdings, in_child};

use super::{faults::case, *};
use crate::{
    StaticTensors,
    io::faults::no_rings,
    trace::{Begun, Mark, Observer, Span},
};

const RINGS: [Reader; 2] = [Reader::UringFixed, Reader::Uring];

/// What a cancel, a rewind or a close may take on a machine that is busy with other things; alone it is less than a second.
const SOON: Duration = Duration::from_secs(3);

/// Which calls of io_uring_enter fail: from which on, how many, and with what.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    from: usize,
    count: usize,
    errno: i32,
}

impl Case {
    /// Passes with rewinds between, over a ring that fails. Returns the error that the streamer came to, if it did.
    fn under(&mut self, refusals: Refusals) -> Option<String> {
        let calls = Arc::new(AtomicUsize::new(0));
        let Refusals { from, count, errno } = refusals;
        let faults = Faults::plan(|attempt| attempt.result);
        faults.plan_enters(move || {
            let call = calls.fetch_add(1, SeqCst);
            (from..from.saturating_add(count)).contains(&call).then_some(errno)
        });
        let (mut streamer, stream) = (self.streamer(), self.device.stream().unwrap());
        let mut error: Option<String> = None;
        for round in 0..6 {
            for _ in 0..self.rng.usize(..=self.units.len()) {
                match (streamer.next(&stream), &error) {
                    (Ok(layer), None) => self.verify(&layer, &stream),
                    (Ok(layer), Some(error)) => {
                        panic!("{refusals:?}, round {round}: layer {} after {error}", layer.index())
                    }
                    (Err(found), None) => error = Some(found.to_string()),
                    (Err(found), Some(first)) => assert_eq!(&found.to_string(), first, "{refusals:?}, round {round}"),
                }
            }
            if let Err(found) = streamer.rewind() {
                let first = error.get_or_insert_with(|| found.to_string());
                assert_eq!(&found.to_string(), first, "{refusals:?}, round {round}");
            }
        }
        self.device.drain(&stream).unwrap();
        assert_eq!(self.wrong.load(SeqCst), 0, "{refusals:?}: wrong bytes");
        let start = Instant::now();
        streamer.close().unwrap();
        assert!(start.elapsed() < SOON, "{refusals:?}: {:?} to close", start.elapsed());
        error
    }
}

#[test]
fn a_ring_that_fails_at_any_call_ends_the_streamer_with_an_error_and_no_byte_is_wrong() {
    if no_rings() {
        return;
    }
    let mut failed = 0;
    for backend in RINGS {
        for from in 0..30 {
            for (count, errno) in [(1, libc::EIO), (2, libc::ENOMEM), (usize::MAX, libc::EBADF)] {
                let error = case(4 + from as u64 % 5, backend).under(Refusals { from, count, errno });
                if let Some(error) = error {
                    assert!(error.contains("io_uring") && error.contains("os error"), "{error}");
                    failed += 1;
                }
            }
        }
    }
    assert!(failed > 20, "only {failed} of 180 rings failed");
}

#[test]
fn a_ring_that_a_signal_interrupts_or_that_has_no_room_for_a_moment_is_no_error() {
    if no_rings() {
        return;
    }
    for backend in RINGS {
        for (from, errno) in [(0, libc::EINTR), (1, libc::EAGAIN), (2, libc::EBUSY)] {
            assert_eq!(case(6, backend).under(Refusals { from, count: 12, errno }), None);
        }
    }
}

#[test]
fn a_ring_that_never_has_room_is_an_error_after_five_seconds_and_one_that_is_always_interrupted_can_be_closed() {
    if no_rings() {
        return;
    }
    let check = |errno: i32| {
        let case = case(4, Reader::Uring);
        let faults = Faults::plan(|attempt| attempt.result);
        faults.plan_enters(move || Some(errno));
        let (streamer, stream) = (case.streamer(), case.device.stream().unwrap());
        let start = Instant::now();
        if errno == libc::EINTR {
            thread::sleep(Duration::from_millis(300));
        } else {
            let error = streamer.next(&stream).err().map(|error| error.to_string()).unwrap_or_default();
            let took = start.elapsed();
            assert!(error.contains("os error 11") || error.contains("os error 16"), "{error}");
            assert!((4..20).contains(&took.as_secs()), "{took:?}");
        }
        let start = Instant::now();
        streamer.close().unwrap();
        assert!(start.elapsed() < SOON, "{:?} to close after {errno}", start.elapsed());
    };
    thread::scope(|scope| {
        [libc::EAGAIN, libc::EBUSY, libc::EINTR].into_iter().for_each(|errno| _ = scope.spawn(move || check(errno)));
    });
}

#[test]
fn a_read_that_is_put_off_without_end_fails_after_five_seconds_and_one_that_is_interrupted_can_be_closed() {
    let check = |backend: Reader, errno: i32| {
        let case = case(4, backend);
        Faults::plan(move |attempt| match attempt.trial {
            true => attempt.result,
            false => Err(io::Error::from_raw_os_error(errno)),
        });
        let (streamer, stream) = (case.streamer(), case.device.stream().unwrap());
        let start = Instant::now();
        if errno == libc::EINTR {
            thread::sleep(Duration::from_millis(300));
        } else {
            let error = streamer.next(&stream).err();
            assert!(matches!(&error, Some(Error::Read { .. })), "{error:?}");
            assert!((4..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        }
        let start = Instant::now();
        streamer.close().unwrap();
        assert!(start.elapsed() < SOON, "{backend}: {:?} to close after {errno}", start.elapsed());
    };
    thread::scope(|scope| {
        for backend in [Reader::Uring, Reader::Pread] {
            for errno in [libc::EAGAIN, libc::EINTR] {
                scope.spawn(move || check(backend, errno));
            }
        }
    });
}

/// Notes the files that are silent, and counts all that it is told.
#[derive(Default)]
struct Listener {
    silent: Mutex<Vec<PathBuf>>,
    told: AtomicUsize,
}

impl Observer for Listener {
    fn begin(&self, _: &Begun) {
        self.told.fetch_add(1, SeqCst);
    }

    fn end(&self, _: &Span) {
        self.told.fetch_add(1, SeqCst);
    }

    fn mark(&self, mark: &Mark) {
        self.told.fetch_add(1, SeqCst);
        if let Mark::Silent { file, .. } = mark {
            self.silent.lock().unwrap().push(file.clone());
        }
    }
}

#[test]
fn a_read_that_never_ends_is_told_of_once_and_cancel_rewind_and_close_do_not_wait_for_it() {
    let check = |backend: Reader, seed: u64| {
        let case = case(seed, backend);
        let stuck = Arc::new(AtomicBool::new(true));
        let faults = Faults::plan(|attempt| attempt.result);
        let holds = stuck.clone();
        // Of a unit in two files one is still read.
        faults.plan_never(move |path, _| holds.load(SeqCst) && path.ends_with("b.bin"));
        let listener = Arc::new(Listener::default());
        let Case { fixture, units, settings, device, .. } = &case;
        let observers = [listener.clone() as Arc<dyn Observer>];
        let streamer = LayerStreamer::with_observers(device, &fixture.checkpoint, units, settings, &observers);
        let (mut streamer, stream) = (streamer.unwrap(), device.stream().unwrap());
        let start = Instant::now();
        for wait in [Duration::from_secs(12), Duration::from_millis(50)] {
            let (canceller, cancelled) = (streamer.canceller(), Arc::new(Mutex::new(None)));
            let at = cancelled.clone();
            let cancel = thread::spawn(move || {
                thread::sleep(wait);
                *at.lock().unwrap() = Some(Instant::now());
                canceller.cancel();
            });
            let error = (0..).find_map(|_| streamer.next(&stream).err());
            assert!(matches!(error, Some(Error::Cancelled)), "{backend}: {error:?}");
            cancel.join().unwrap();
            streamer.rewind().unwrap();
            let took = cancelled.lock().unwrap().expect("it was cancelled").elapsed();
            assert!(took < SOON, "{backend}: {took:?} to cancel and rewind");
        }
        let told = listener.silent.lock().unwrap().clone();
        assert!(matches!(&told[..], [file] if file.ends_with("b.bin")), "{backend}: {told:?}");
        let closing = Instant::now();
        assert!(matches!(streamer.close(), Err(Error::Leaked { bytes }) if bytes > 0));
        assert!(closing.elapsed() < SOON, "{backend}: {:?} to close", closing.elapsed());
        assert!(start.elapsed() < Duration::from_secs(30));
        // Threads that were left in their reads may go.
        stuck.store(false, SeqCst);
    };
    thread::scope(|scope| {
        // In the last one reads of another file wait behind those that never end.
        for (backend, seed) in [(Reader::Uring, 4), (Reader::Pread, 4), (Reader::Pread, 12)] {
            scope.spawn(move || check(backend, seed));
        }
        scope.spawn(static_tensors_that_never_come);
    });
}

/// They are told of too, and a cancel ends the wait.
fn static_tensors_that_never_come() {
    let case = case(4, Reader::Uring);
    let Case { fixture, units, settings, device, .. } = &case;
    let faults = Faults::plan(|attempt| attempt.result);
    let listener = Arc::new(Listener::default());
    let observers = [listener.clone() as Arc<dyn Observer>];
    let streamer = LayerStreamer::with_observers(device, &fixture.checkpoint, units, settings, &observers).unwrap();
    let name = units[0].arrivals()[0].inputs[0].as_str();
    // What the pipeline has read ahead by now does not stand still with them.
    thread::sleep(Duration::from_millis(300));
    faults.plan_never(|_, _| true);
    let canceller = streamer.canceller();
    thread::scope(|scope| {
        let cancel = scope.spawn(move || {
            thread::sleep(Duration::from_millis(11_500));
            canceller.cancel();
            Instant::now()
        });
        let error = streamer.load_static(&[name]).err();
        assert!(matches!(error, Some(Error::Cancelled)), "{error:?}");
        assert!(cancel.join().unwrap().elapsed() < SOON);
    });
    let told = listener.silent.lock().unwrap().clone();
    assert!(matches!(&told[..], [file] if *file == fixture.table[name].file), "{told:?}");
    faults.end();
    drop(streamer);
}

#[test]
fn a_disk_whose_reads_are_slow_and_end_side_by_side_is_no_reason_to_leave_memory_to_it() {
    let mut case = case(6, Reader::Pread);
    case.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Disk));
    Faults::plan(|attempt| {
        if !attempt.trial {
            thread::sleep(Duration::from_millis(800));
        }
        attempt.result
    });
    let (streamer, stream) = (case.streamer(), case.device.stream().unwrap());
    drop(streamer.next(&stream).unwrap());
    // More are under way, and none ends for longer than a disk that is quick would be given.
    streamer.close().unwrap();
}

#[test]
fn a_thread_that_is_held_in_a_system_call_holds_nobody_up() {
    if no_rings() {
        return;
    }
    let case = case(4, Reader::Uring);
    let [held, reached, left] = [true, false, false].map(|is| Arc::new(AtomicBool::new(is)));
    let (holds, reaches, leaves) = (held.clone(), reached.clone(), left.clone());
    Faults::plan(|attempt| attempt.result).plan_enters(move || {
        reaches.store(true, SeqCst);
        while holds.load(SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        leaves.store(true, SeqCst);
        None
    });
    let Case { fixture, units, settings, device, .. } = &case;
    let listener = Arc::new(Listener::default());
    let observers = [listener.clone() as Arc<dyn Observer>];
    let streamer = LayerStreamer::with_observers(device, &fixture.checkpoint, units, settings, &observers);
    let (mut streamer, stream) = (streamer.unwrap(), device.stream().unwrap());
    // On a busy machine the reader's thread may come to its first call late.
    while !reached.load(SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    streamer.canceller().cancel();
    assert!(matches!(streamer.next(&stream).err(), Some(Error::Cancelled)));
    let start = Instant::now();
    streamer.rewind().unwrap();
    assert!(matches!(streamer.close(), Err(Error::Leaked { bytes }) if bytes > 0));
    assert!(start.elapsed() < SOON, "{:?} to close", start.elapsed());
    // The thread goes on, and tells nobody any more: who listened may be gone.
    let told = listener.told.load(SeqCst);
    held.store(false, SeqCst);
    while !left.load(SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(300));
    assert_eq!(listener.told.load(SeqCst), told, "told after the close");
}

#[test]
fn static_tensors_whose_reads_may_still_come_leave_them_the_memory_and_the_next_load_is_exact() {
    const THIS: &str = "pipeline::tests::silence::\
                        static_tensors_whose_reads_may_still_come_leave_them_the_memory_and_the_next_load_is_exact";
    if no_rings() || !in_child(THIS) {
        return;
    }
    let case = case(4, Reader::Auto);
    let Case { fixture, settings, units, .. } = &case;
    let before = Holdings::at_rest();
    let faults = Faults::of_a_ring_that_fails_with_reads_that_never_end();
    let mut unit = Unit::new("statics");
    let single = units[0].arrivals().iter().filter(|arrival| arrival.inputs.len() == 1);
    single.for_each(|arrival| _ = unit.add(arrival.clone()));
    let load = || StaticTensors::new(&Cpu, &fixture.checkpoint, &unit, settings);
    let error = load().err().expect("the ring fails").to_string();
    assert!(error.contains("io_uring") && error.contains("os error 5"), "{error}");
    let left = Holdings::at_rest().arenas - before.arenas;
    assert_eq!(left, crate::io::CHUNK, "what the one read goes to, and nothing else");
    faults.end();
    let (loaded, name) = (load().unwrap(), &unit.arrivals()[0].output);
    let expected = &case.expected[0].iter().find(|(of, _)| of == name).unwrap().1;
    assert!(fixtures::bytes_of(&Cpu, loaded.tensor(name).unwrap()) == **expected);
    drop(loaded);
    assert_eq!(Holdings::at_rest().arenas - before.arenas, left);
}
