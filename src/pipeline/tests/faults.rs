//! Reads that fail, come short or stand still, and passes that are cancelled: on every backend, on the asynchronous device, over
//! random units, tiers and settings. What came before the fault is exact, the error says where, and the next pass is exact.

use std::{
    io,
    sync::{Condvar, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    io::faults::Attempt,
    trace::{Begun, Mark, Observer},
};

const BACKENDS: [Reader; 3] = [Reader::UringFixed, Reader::Uring, Reader::Pread];

/// A drawn case, read by `backend` where the system has it.
pub(super) fn case(seed: u64, backend: Reader) -> Case {
    let mut case = Case::new(seed);
    case.settings.reader = backend;
    if case.settings.cache == CachePolicy::Auto && case.device.memory_is_ram() {
        // What the page cache has would not be read.
        case.settings.cache = CachePolicy::Direct;
    }
    case
}

impl Case {
    /// Takes units up to the end of the pass or the first error; returns how many came.
    fn take_until_error(
        &self,
        streamer: &LayerStreamer<AsyncCpu>,
        stream: &<AsyncCpu as Device>::Stream,
    ) -> (usize, Option<Error>) {
        for count in 0..self.units.len() {
            match streamer.next(stream) {
                Ok(layer) => {
                    assert_eq!(layer.index(), count);
                    self.verify(&layer, stream);
                }
                Err(error) => return (count, Some(error)),
            }
        }
        (self.units.len(), None)
    }

    /// Whether every byte that was compared so far was right.
    fn assert_exact(&self, streams: &[<AsyncCpu as Device>::Stream], what: &str) {
        streams.iter().for_each(|stream| self.device.drain(stream).unwrap());
        assert_eq!(self.wrong.load(SeqCst), 0, "{what}: {:?}", self.settings);
    }

    /// The tensor of `unit` in file `file` that a read from `offset` on touches first, found without the plan.
    fn tensor_from(&self, unit: usize, file: usize, offset: u64) -> &str {
        let path = &self.fixture.checkpoint.files()[file];
        let names = self.units[unit].arrivals().iter().flat_map(|arrival| &arrival.inputs).map(String::as_str);
        let end = |name: &&str| {
            let tensor = &self.fixture.table[*name];
            tensor.offset + tensor.dtype.bytes_of(&tensor.shape).unwrap() as u64
        };
        let there = names.filter(|name| &self.fixture.table[*name].file == path && end(name) > offset);
        there.filter(|name| self.fixture.table[*name].shape != [0]).min_by_key(end).expect("a read is for a tensor")
    }
}

#[test]
fn reads_cut_short_anywhere_and_interrupted_bring_every_byte() {
    for seed in 0..12 {
        for backend in BACKENDS {
            let mut case = case(seed, backend);
            let mut rng = fastrand::Rng::with_seed(seed);
            Faults::plan(move |attempt| {
                let count = attempt.result?;
                match rng.u8(..6) {
                    0 => Err(io::Error::from_raw_os_error([libc::EINTR, libc::EAGAIN][rng.usize(..2)])),
                    1 => Ok(count),
                    // Less than a page too, again and again.
                    2 | 3 => Ok(rng.usize(count.min(1)..=count.min(6000))),
                    _ => Ok(rng.usize(count.min(1)..=count)),
                }
            });
            let mut streamer = case.streamer();
            let streams = [case.device.stream().unwrap()];
            let units = case.units.len();
            for _ in 0..2 {
                case.take(&streamer, &streams, units);
                let part = case.rng.usize(..=units);
                case.take(&streamer, &streams, part);
                streamer.rewind().unwrap();
            }
            let name = case.units[0].arrivals()[0].inputs[0].clone();
            let statics = streamer.load_static(&[&name]).unwrap();
            let tensor = statics.tensor(&name).unwrap();
            let mut loaded = vec![0; tensor.bytes()];
            // SAFETY: the vector has the tensor's length and outlives the copy.
            unsafe { case.device.copy_to_host(loaded.as_mut_ptr(), tensor.ptr(), loaded.len(), &streams[0]).unwrap() };
            case.assert_exact(&streams, &format!("seed {seed}"));
            assert!(loaded == case.fixture.stored(&name), "seed {seed}: {:?}", case.settings);
        }
    }
}

/// A place on disk that is broken: reads that touch it get this answer.
fn broken_at(file: std::path::PathBuf, place: u64, answer: fn() -> io::Result<usize>) -> Faults {
    Faults::plan(move |attempt: Attempt<'_>| {
        let touched = (attempt.offset..attempt.offset + attempt.len as u64).contains(&place);
        if touched && attempt.path == file && !attempt.trial { answer() } else { attempt.result }
    })
}

#[test]
fn a_disk_error_at_any_unit_names_it_and_the_next_pass_after_it_is_exact() {
    type Answer = (fn() -> io::Result<usize>, Option<i32>);
    const ANSWERS: [Answer; 2] = [(|| Err(io::Error::from_raw_os_error(libc::EIO)), Some(libc::EIO)), (|| Ok(0), None)];
    let mut hit = [[false; 8]; 3];
    for seed in 0..24 {
        for (backend_index, backend) in BACKENDS.into_iter().enumerate() {
            for aim in 0..8 {
                let mut case = case(seed, backend);
                let plan = Plan::new(&case.fixture.checkpoint, &case.units, &case.settings, Sharing::Own).unwrap();
                let Some(extents) = plan.units.get(aim).map(|unit| &unit.extents).filter(|all| !all.is_empty()) else {
                    continue;
                };
                let aimed = extents[case.rng.usize(..extents.len())];
                let place = aimed.offset + case.rng.u64(..aimed.end - aimed.offset);
                let covers = |extent: &&crate::layout::Extent| {
                    extent.file == aimed.file && (extent.offset..extent.offset + extent.len as u64).contains(&place)
                };
                // Units share pages: the first that reads this one fails.
                let find = |unit: &crate::layout::UnitLayout| unit.extents.iter().find(covers).copied();
                let (unit, extent) =
                    plan.units.iter().enumerate().find_map(|(unit, plan)| Some((unit, find(plan)?))).unwrap();
                hit[backend_index][unit] = true;

                let file = case.fixture.checkpoint.files()[aimed.file].clone();
                let (answer, wanted_errno) = ANSWERS[case.rng.usize(..2)];
                let faults = broken_at(file.clone(), place, answer);
                let mut streamer = case.streamer();
                let (before, streams) = (streamer.stats(), [case.device.stream().unwrap()]);
                let tensor = case.tensor_from(unit, extent.file, extent.offset).to_owned();
                for _ in 0..2 {
                    let (came, error) = case.take_until_error(&streamer, &streams[0]);
                    let error = error.expect("the disk is broken");
                    let shown = format!("seed {seed}, place {place} of {}: {error}", file.display());
                    assert_eq!(came, unit, "{shown}");
                    let Error::Read { unit: name, tensor: at, path, offset, source } = &error else {
                        panic!("{shown}")
                    };
                    assert_eq!((name.as_str(), at, path), (case.units[unit].name(), &tensor, &file), "{shown}");
                    assert_eq!((*offset, source.raw_os_error()), (extent.offset, wanted_errno), "{shown}");
                    assert_eq!(streamer.next(&streams[0]).err().unwrap().to_string(), error.to_string());
                    streamer.rewind().unwrap();
                }
                faults.end();
                streamer.rewind().unwrap();
                let units = case.units.len();
                case.take(&streamer, &streams, 2 * units);
                case.assert_exact(&streams, &format!("seed {seed}, unit {unit}"));
                let after = streamer.stats();
                assert_eq!((after.reader, after.reader_reason), (before.reader, before.reader_reason));
                assert_eq!(after.buffered_files, before.buffered_files);
            }
        }
    }
    assert_eq!(hit, [[true; 8]; 3], "every unit failed once on every backend");
}

#[test]
fn a_disk_error_at_any_read_fails_that_pass_alone() {
    for seed in 0..10 {
        for backend in BACKENDS {
            for nth in 0..6 {
                let mut case = case(seed, backend);
                let mut left = nth * case.rng.usize(1..4);
                Faults::plan(move |attempt| {
                    let fails = !attempt.trial && left == 0;
                    left = left.wrapping_sub(usize::from(!attempt.trial));
                    if fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { attempt.result }
                });
                let (mut streamer, streams) = (case.streamer(), [case.device.stream().unwrap()]);
                // Units that are kept further on are not read often enough.
                for _ in 0..20 {
                    let (came, error) = case.take_until_error(&streamer, &streams[0]);
                    let Some(error) = error else { continue };
                    assert!(matches!(&error, Error::Read { unit, .. } if unit == case.units[came].name()), "{error}");
                    streamer.rewind().unwrap();
                    break;
                }
                let units = case.units.len();
                case.take(&streamer, &streams, 2 * units);
                case.assert_exact(&streams, &format!("seed {seed}, read {nth}"));
            }
        }
    }
}

#[test]
fn a_disk_error_in_the_trial_read_is_an_error_and_no_reason_to_read_through_the_page_cache() {
    let mut case = Case::new(1);
    case.settings.cache = CachePolicy::Direct;
    Faults::plan(|attempt| if attempt.trial { Err(io::Error::from_raw_os_error(libc::EIO)) } else { attempt.result });
    let error = LayerStreamer::new(&case.device, &case.fixture.checkpoint, &case.units, &case.settings).err().unwrap();
    assert!(matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(libc::EIO)), "{error}");
    assert!(error.to_string().contains("kernel log"), "{error}");
    // What a file system without O_DIRECT answers.
    Faults::plan(
        |attempt| if attempt.trial { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { attempt.result },
    );
    let (streamer, streams) = (case.streamer(), [case.device.stream().unwrap()]);
    let units = case.units.len();
    case.take(&streamer, &streams, units);
    case.assert_exact(&streams, "buffered");
    let stats = streamer.stats();
    assert_eq!((stats.direct_bytes, stats.buffered_files.len()), (0, case.fixture.checkpoint.files().len()));
}

#[test]
fn a_pass_cancelled_at_any_unit_ends_there_and_the_next_is_exact() {
    for seed in 0..3 {
        for backend in BACKENDS {
            for (n_cpu_pinned, n_cpu) in [(0, 0), (2, 0), (0, 2), (2, 2)] {
                let mut case = case(seed, backend);
                case.settings = Settings { n_gpu: 2, n_cpu_pinned, n_cpu, reader: backend, ..Settings::default() };
                let (mut streamer, streams) = (case.streamer(), [case.device.stream().unwrap()]);
                let (units, canceller) = (case.units.len(), streamer.canceller());
                for at in 0..units {
                    for elsewhere in [false, true] {
                        let pass = streamer.run_pass(&streams[0], 0, |count, layer| {
                            case.verify(layer, &streams[0]);
                            layer.check_cancelled()?;
                            if layer.index() == at && elsewhere {
                                thread::scope(|scope| _ = scope.spawn(|| canceller.cancel()));
                            } else if layer.index() == at {
                                canceller.cancel();
                            }
                            assert_eq!(layer.check_cancelled().is_err(), layer.index() == at);
                            assert!(layer.index() <= at, "it went on");
                            Ok(count + 1)
                        });
                        // After the last unit there is nothing to ask for, and the next pass is the one that is cancelled.
                        match pass {
                            Ok(count) => {
                                assert_eq!((count, at), (units, units - 1));
                                let next = streamer.run_pass(&streams[0], (), |(), _| Ok(()));
                                assert!(matches!(next, Err(Error::Cancelled)), "{next:?}");
                            }
                            Err(error) => assert!(at + 1 < units && matches!(error, Error::Cancelled), "{error}"),
                        }
                        streamer.rewind().unwrap();
                        case.take(&streamer, &streams, units);
                    }
                }
                // At a moment that nobody chose.
                for pause in 0..10 {
                    let canceller = canceller.clone();
                    let canceller = thread::spawn(move || {
                        thread::sleep(Duration::from_micros(150 * pause));
                        canceller.cancel();
                    });
                    let (came, error) = case.take_until_error(&streamer, &streams[0]);
                    assert!(error.is_none() || matches!(error, Some(Error::Cancelled)), "after {came}: {error:?}");
                    canceller.join().unwrap();
                    streamer.rewind().unwrap();
                    case.take(&streamer, &streams, units);
                }
                case.assert_exact(&streams, &format!("seed {seed}"));
            }
        }
    }
}

/// A disk that stands still until it is opened, or for three seconds, so that a test fails and does not hang; and what tells
/// that a read waits for it.
fn still_disk() -> (Arc<(Mutex<bool>, Condvar)>, mpsc::Receiver<()>) {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let (inside, (stuck, waits)) = (gate.clone(), mpsc::channel());
    let give_up = Instant::now() + Duration::from_secs(3);
    Faults::plan(move |attempt| {
        if !attempt.trial {
            _ = stuck.send(());
            let left = give_up.saturating_duration_since(Instant::now());
            drop(inside.1.wait_timeout_while(inside.0.lock().unwrap(), left, |open| !*open).unwrap());
        }
        attempt.result
    });
    (gate, waits)
}

fn open((open, changed): &(Mutex<bool>, Condvar)) {
    *open.lock().unwrap() = true;
    changed.notify_all();
}

#[test]
fn a_pass_that_waits_for_a_disk_that_stands_still_is_cancelled_at_once() {
    for backend in BACKENDS {
        let mut case = case(4, backend);
        let (gate, waits) = still_disk();
        let (mut streamer, streams) = (case.streamer(), [case.device.stream().unwrap()]);
        waits.recv().unwrap();
        let (canceller, start) = (streamer.canceller(), Instant::now());
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            canceller.cancel();
        });
        let error = streamer.next(&streams[0]).err();
        assert!(matches!(error, Some(Error::Cancelled)), "{error:?}");
        streamer.rewind().unwrap();
        assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
        open(&gate);
        let units = case.units.len();
        case.take(&streamer, &streams, 2 * units);
        case.assert_exact(&streams, "after the disk went on");
    }
}

#[test]
fn dropping_waits_for_reads_that_still_write_to_its_memory() {
    for backend in BACKENDS {
        let case = case(4, backend);
        let (gate, waits) = still_disk();
        let streamer = case.streamer();
        waits.recv().unwrap();
        let start = Instant::now();
        let opener = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            open(&gate);
        });
        drop(streamer);
        assert!(start.elapsed() >= Duration::from_millis(100), "{backend}: it was dropped with reads under way");
        opener.join().unwrap();
    }
}

#[test]
fn an_observer_that_panics_keeps_nobody_from_the_error() {
    struct Panics {
        in_spans: bool,
    }
    impl Observer for Panics {
        fn begin(&self, _: &Begun) {
            let is_a_stage_s = thread::current().name().is_some_and(|name| name.starts_with("ls-"));
            assert!(!(self.in_spans && is_a_stage_s), "on purpose");
        }
        fn mark(&self, _: &Mark) {
            panic!("on purpose");
        }
    }
    for backend in BACKENDS {
        for in_spans in [false, true] {
            let (told, error) = mpsc::channel();
            thread::spawn(move || {
                let mut case = case(4, backend);
                // Any other reader will do where the system lacks this one.
                case.settings.reader = case.streamer().stats().reader;
                Faults::plan(|attempt| {
                    if attempt.trial {
                        return attempt.result;
                    }
                    // The caller waits by then.
                    thread::sleep(Duration::from_millis(20));
                    Err(io::Error::from_raw_os_error(libc::EIO))
                });
                let observer = Arc::new(Panics { in_spans });
                let Case { fixture: Fixture { checkpoint, .. }, units, settings, device, .. } = &case;
                let streamer = LayerStreamer::with_observers(device, checkpoint, units, settings, &[observer]);
                let (streamer, stream) = (streamer.unwrap(), device.stream().unwrap());
                _ = told.send(streamer.next(&stream).err());
            });
            let error = error.recv_timeout(Duration::from_secs(10)).expect("an error, not a hang or a panic");
            match error.expect("the disk is broken") {
                Error::Panicked { message, .. } if in_spans => assert!(message.contains("on purpose"), "{message}"),
                Error::Read { .. } if !in_spans => {}
                other => panic!("{other}"),
            }
        }
    }
}
