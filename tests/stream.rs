//! The pipeline from outside: every unit arrives byte for byte, in order, pass after pass, whatever the settings, and after
//! every kind of failure the next pass works.

mod common;

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::FileExt,
    panic::{self, AssertUnwindSafe},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::{LentSlots, SIZES, bytes_of, check, checked_pass, fixture, settings};
use layer_streamer::{
    DType, Error, LayerStreamer, LentMemory, Plan, Settings, Unit,
    device::{Cpu, Device},
    plan::{Arrival, ArrivalOp, CachePolicy, Sharing, Tier},
    trace::Stage,
};
use support::{healed, whole};

#[test]
fn every_unit_of_every_pass_arrives_byte_for_byte_whatever_the_settings() {
    let fixture = fixture(7, &SIZES, 1);
    for n_cpu in [0, 1, 5] {
        for n_cpu_pinned in [0, 1, 4] {
            for n_gpu in [1, 2, 7] {
                for whole in [false, true] {
                    let batch = |n: usize| if whole { n } else { 0 };
                    let settings = Settings {
                        batch_gpu: batch(n_gpu),
                        batch_cpu_pinned: batch(n_cpu_pinned),
                        batch_cpu: batch(n_cpu),
                        ..settings(n_gpu, n_cpu_pinned, n_cpu)
                    };
                    let mut streamer =
                        LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings).unwrap();
                    for _ in 0..3 {
                        checked_pass(&fixture, &mut streamer);
                    }
                }
            }
        }
    }
}

#[test]
fn layers_may_be_held_up_to_n_gpu_and_released_in_any_order() {
    let fixture = fixture(6, &SIZES, 2);
    let device = Cpu;
    let stream = device.stream().unwrap();
    let settings = Settings { batch_gpu: 3, ..settings(3, 2, 0) };
    let streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    for _ in 0..4 {
        let mut held: Vec<_> = (0..3).map(|_| streamer.next(&stream).unwrap()).collect();
        let refused = streamer.next(&stream).expect_err("three are held").to_string();
        assert!(refused.contains("3 are held") && refused.contains(held[0].name()), "{refused}");
        held.swap(0, 1);
        for layer in held.drain(..) {
            check(&fixture, &device, &layer);
            layer.release().unwrap();
        }
    }
}

#[test]
fn layers_are_kept_as_tokens_in_memory_that_is_lent() {
    let fixture = fixture(6, &SIZES, 13);
    let settings = settings(3, 2, 1);
    let plan = Plan::new(&fixture.checkpoint, &fixture.units, &settings, Sharing::Own).unwrap();
    let needed = plan.slot_memory();
    // Pages of its own for each; one more page, of which nothing may be written.
    let mut memory = needed.map(|bytes| vec![[0u8; 4096]; bytes.div_ceil(4096) + 2]);
    let [ram, pinned, gpu] = [0, 1, 2].map(|at| {
        let pages: &mut [[u8; 4096]] = &mut memory[at];
        let skip = pages.as_ptr().cast::<u8>().align_offset(4096);
        let start = NonNull::new(pages.as_mut_ptr().cast::<u8>().wrapping_add(skip)).unwrap();
        Some((start, needed[at]))
    });
    let open = |lent| {
        // SAFETY: the vectors outlive the streamer, and nothing else looks into them meanwhile.
        unsafe { LayerStreamer::with_lent_memory(&Cpu, &fixture.checkpoint, &fixture.units, &settings, &[], &lent) }
    };
    let short = LentMemory { ram: ram.map(|(start, bytes)| (start, bytes - 1)), pinned, gpu };
    let refused = open(short).expect_err("a byte is missing").to_string();
    assert!(refused.starts_with("ram_memory: is ") && refused.contains("these settings need"), "{refused}");
    let streamer = open(LentMemory { ram, pinned, gpu }).unwrap();
    let (stream, mut numbers) = (Cpu.stream().unwrap(), HashSet::new());
    let lent = gpu.unwrap().0.as_ptr().addr();
    for pass in 0..3 {
        for unit in (0..6).step_by(2) {
            // Held two at a time, the later one given back first.
            let tokens = [unit, unit + 1].map(|_| streamer.next(&stream).unwrap().into_token());
            for (token, unit) in tokens.into_iter().zip([unit, unit + 1]).rev() {
                assert!(token.index() == unit && numbers.insert(token.number()), "pass {pass}");
                for arrival in fixture.units[unit].arrivals() {
                    // SAFETY: the token is this streamer's; on the CPU device work is done when its call returns.
                    let tensor = unsafe { streamer.token_tensor(&token, &arrival.output).unwrap() };
                    assert!((lent..lent + needed[2]).contains(&tensor.ptr().as_ptr().addr()));
                    assert!(bytes_of(&Cpu, tensor) == fixture.stored(&arrival.inputs[0]), "{}", arrival.output);
                }
                // SAFETY: as above.
                unsafe { streamer.release_token(token, &stream).unwrap() };
            }
        }
    }
    streamer.close().unwrap();
}

#[test]
fn a_leaked_layer_is_an_error_that_names_it_and_drop_still_ends() {
    let fixture = fixture(4, &SIZES, 3);
    let device = Cpu;
    let stream = device.stream().unwrap();
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings(2, 1, 0)).unwrap();
    std::mem::forget(streamer.next(&stream).unwrap());
    let refused = streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap_err().to_string();
    assert!(refused.contains("unit 0"), "{refused}");
    assert!(matches!(streamer.rewind(), Err(Error::LayerLeaked { .. })));
    assert!(matches!(streamer.close(), Err(Error::Leaked { .. })));
}

#[test]
fn tensors_that_change_on_arrival_arrive_changed_piece_by_piece() {
    let fixture = fixture(3, &[9_000_000, 5, 70_000], 4);
    let mut units = Vec::new();
    for number in 0..3 {
        let mut unit = Unit::new(format!("unit {number}"));
        unit.keep("kept", format!("{number}.2"));
        for index in 0..2 {
            let inputs = vec![format!("{number}.{index}")];
            unit.add(Arrival { output: format!("f32 {index}"), inputs, op: ArrivalOp::To(DType::F32) });
        }
        units.push(unit);
    }
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &units, &settings(2, 2, 0)).unwrap();
    let stream = Cpu.stream().unwrap();
    for _ in 0..2 {
        let pass = streamer.run_pass(&stream, (), |(), layer| {
            assert!(bytes_of(&Cpu, layer.tensor("kept")?) == fixture.stored(&format!("{}.2", layer.index())));
            for index in 0..2 {
                let tensor = layer.tensor(&format!("f32 {index}"))?;
                let stored = fixture.stored(&format!("{}.{index}", layer.index()));
                let widened: Vec<u8> = stored.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
                assert_eq!(tensor.dtype(), DType::F32);
                assert!(bytes_of(&Cpu, tensor) == widened);
            }
            Ok::<_, Error>(())
        });
        pass.unwrap();
    }
}

#[derive(Debug)]
#[allow(dead_code, reason = "shown when a test fails")]
enum Trouble {
    Mine(usize),
    Streamer(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Streamer(error)
    }
}

#[test]
fn after_an_error_or_a_panic_of_the_layer_function_at_any_layer_the_next_pass_works() {
    let fixture = fixture(5, &SIZES, 5);
    let stream = Cpu.stream().unwrap();
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 1, 1)).unwrap();
    panic::set_hook(Box::new(|_| {}));
    for at in 0..5 {
        let failed =
            streamer.run_pass(
                &stream,
                0,
                |count, layer| {
                    if layer.index() == at { Err(Trouble::Mine(at)) } else { Ok(count + 1) }
                },
            );
        assert!(matches!(failed, Err(Trouble::Mine(index)) if index == at), "{failed:?}");
        checked_pass(&fixture, &mut streamer);

        let panicked = panic::catch_unwind(AssertUnwindSafe(|| {
            streamer.run_pass(&stream, (), |(), layer| {
                assert!(layer.index() != at, "on purpose");
                Ok::<_, Error>(())
            })
        }));
        assert!(panicked.is_err());
        checked_pass(&fixture, &mut streamer);
    }
    let _ = panic::take_hook();
}

#[test]
fn rewind_in_the_middle_of_a_pass_starts_over_with_the_first_unit() {
    let fixture = fixture(5, &SIZES, 6);
    let stream = Cpu.stream().unwrap();
    let settings = Settings { batch_gpu: 2, batch_cpu_pinned: 3, ..settings(2, 3, 2) };
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    for taken in [1, 4, 2, 0, 3] {
        for _ in 0..taken {
            check(&fixture, &Cpu, &streamer.next(&stream).unwrap());
        }
        streamer.rewind().unwrap();
        streamer.rewind().unwrap();
        checked_pass(&fixture, &mut streamer);
    }
}

#[test]
fn a_shard_that_shrinks_while_it_streams_is_one_clear_error_and_healing_it_heals_the_next_pass() {
    let fixture = fixture(6, &SIZES, 7);
    let stream = Cpu.stream().unwrap();
    for (n_cpu_pinned, n_cpu) in [(2, 0), (0, 2), (1, 1), (0, 0)] {
        let mut streamer =
            LayerStreamer::new(&Cpu, &fixture.opened_again(), &fixture.units, &settings(1, n_cpu_pinned, n_cpu))
                .unwrap();
        checked_pass(&fixture, &mut streamer);
        let path = fixture.file("a.bin");
        let before = whole(&path);
        let cut = fixture.table.values().filter(|t| t.file == path).map(|t| t.offset).max().unwrap();
        // In the middle of a pass. It may have been read before the cut; a later one was not.
        let _ = streamer.run_pass(&stream, (), |(), layer| {
            if layer.index() == 2 {
                fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            }
            Ok::<_, Error>(())
        });
        let failed = (0..5).find_map(|_| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).err());
        let message = failed.expect("the bytes are gone").to_string();
        let tensor = &fixture.table.values().find(|t| t.file == path && t.offset == cut).unwrap().name;
        for part in [path.to_str().unwrap(), tensor, "unit ", &format!("at byte {cut}:"), "became shorter"] {
            assert!(message.contains(part), "{message} lacks {part}");
        }
        let still = streamer.next(&stream).expect_err("the error stays until a rewind").to_string();
        assert_eq!(still, message);
        healed(&path, &before);
        checked_pass(&fixture, &mut streamer);
    }
}

#[test]
fn a_shard_that_is_rewritten_in_place_fails_the_pass_that_read_it_and_every_later_one() {
    for (tier, at) in
        [(Tier::Disk, 0), (Tier::Disk, 2), (Tier::Disk, 4), (Tier::Pinned, 0), (Tier::Ram, 1), (Tier::Gpu, 4)]
    {
        let mut fixture = fixture(5, &SIZES, 20);
        fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        // The clock of file systems is a coarse one.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let stream = Cpu.stream().unwrap();
        let mut streamer =
            LayerStreamer::new(&Cpu, &fixture.opened_again(), &fixture.units, &settings(2, 1, 1)).unwrap();
        let path = fixture.file("a.bin");
        let other: Vec<u8> = fs::read(&path).unwrap().iter().map(|byte| !byte).collect();
        let pass = |streamer: &mut LayerStreamer<Cpu>, rewrites: bool| {
            streamer.run_pass(&stream, (), |(), layer| {
                if rewrites && layer.index() == at {
                    // Never shorter.
                    fs::File::options().write(true).open(&path).unwrap().write_all_at(&other, 0).unwrap();
                }
                Ok::<_, Error>(())
            })
        };
        // What is kept is filled in the first passes, and read no more in the next.
        let first = pass(&mut streamer, true);
        let failed = first.err().or_else(|| (0..2).find_map(|_| pass(&mut streamer, false).err()));
        match (tier, failed) {
            (_, Some(Error::Checkpoint { path: named, .. })) => assert_eq!(named, path),
            // All of it was read, and looked at, before it was rewritten.
            (Tier::Pinned | Tier::Ram | Tier::Gpu, None) => continue,
            (_, other) => panic!("{tier} at {at}: {other:?}"),
        }
        let again = pass(&mut streamer, false).err();
        assert!(tier != Tier::Disk || matches!(again, Some(Error::Checkpoint { .. })), "{tier} at {at}: {again:?}");
    }
}

#[test]
fn a_shard_that_is_replaced_is_read_as_it_was_by_who_has_it_open_and_refused_to_who_opens_it() {
    let fixture = fixture(5, &SIZES, 20);
    let stream = Cpu.stream().unwrap();
    let start = |checkpoint: &_| LayerStreamer::new(&Cpu, checkpoint, &fixture.units, &settings(2, 1, 1));
    let path = fixture.file("a.bin");
    let replace = || {
        let other: Vec<u8> = fs::read(&path).unwrap().iter().map(|byte| !byte).collect();
        fs::write(fixture.file("new"), other).unwrap();
        fs::rename(fixture.file("new"), &path).unwrap();
    };
    let stored: HashMap<_, _> = fixture.table.keys().map(|name| (name, fixture.stored(name))).collect();
    // While it streams, and before the first pass.
    let mut streamer = start(&fixture.checkpoint).unwrap();
    for at in [2, 0, 4] {
        let pass = streamer.run_pass(&stream, (), |(), layer| {
            for arrival in fixture.units[layer.index()].arrivals() {
                assert!(bytes_of(&Cpu, layer.tensor(&arrival.output)?) == stored[&arrival.inputs[0]]);
            }
            if layer.index() == at {
                replace();
            }
            Ok::<_, Error>(())
        });
        pass.unwrap();
    }
    let refused = start(&fixture.checkpoint).expect_err("it is another file").to_string();
    assert!(refused.contains("a.bin") && refused.contains("open it again"), "{refused}");

    checked_pass(&fixture, &mut start(&fixture.opened_again()).unwrap());
    // The same file with other bytes, and the same bytes in a shorter file.
    let opened = fixture.opened_again();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(start(&opened).err(), Some(Error::Checkpoint { .. })));
    let opened = fixture.opened_again();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(start(&opened).err(), Some(Error::Checkpoint { .. })));
}

#[test]
fn rewinding_again_and_again_over_a_broken_file_loses_nothing() {
    let fixture = fixture(4, &SIZES, 17);
    let stream = Cpu.stream().unwrap();
    for n_gpu in [1, 3] {
        let settings = Settings { batch_gpu: n_gpu, ..settings(n_gpu, 1, 1) };
        let mut streamer = LayerStreamer::new(&Cpu, &fixture.opened_again(), &fixture.units, &settings).unwrap();
        checked_pass(&fixture, &mut streamer);
        let whole = ["a.bin", "b.bin"].map(|name| (fixture.file(name), whole(&fixture.file(name))));
        whole.iter().for_each(|(path, _)| fs::write(path, "gone").unwrap());
        for pause in 0..12 {
            streamer.rewind().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(pause));
        }
        assert!(matches!(streamer.next(&stream).err(), Some(Error::Read { .. })));
        whole.iter().for_each(|(path, whole)| healed(path, whole));
        checked_pass(&fixture, &mut streamer);
    }
}

#[test]
fn a_pass_cancelled_at_any_layer_ends_there_and_the_next_is_exact() {
    let fixture = fixture(5, &SIZES, 19);
    let stream = Cpu.stream().unwrap();
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 1, 1)).unwrap();
    for at in 0..4 {
        let canceller = streamer.canceller();
        let pass = streamer.run_pass(&stream, 0, |count, layer| {
            check(&fixture, &Cpu, layer);
            if layer.index() == at {
                let canceller = canceller.clone();
                std::thread::spawn(move || canceller.cancel()).join().unwrap();
            }
            assert!(layer.index() <= at);
            Ok::<_, Error>(count + 1)
        });
        assert!(matches!(pass, Err(Error::Cancelled)), "{pass:?}");
        checked_pass(&fixture, &mut streamer);
    }
    let canceller = streamer.canceller();
    drop(streamer);
    canceller.cancel();
}

#[test]
fn a_progress_hook_that_panics_leaves_a_streamer_that_works() {
    let fixture = fixture(4, &SIZES, 18);
    let stream = Cpu.stream().unwrap();
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 1, 0)).unwrap();
    streamer.track_progress(|progress| assert!(progress.done != 2, "on purpose"));
    let pass = AssertUnwindSafe(|| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())));
    assert!(panic::catch_unwind(pass).is_err());
    checked_pass(&fixture, &mut streamer);
}

#[test]
fn static_tensors_are_loaded_whole_however_large() {
    let fixture = fixture(3, &[9, 6_000_000, 70_000], 8);
    let streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(1, 1, 0)).unwrap();
    let statics = streamer.load_static(&["0.1", "2.0", "1.2"]).unwrap();
    for name in ["0.1", "2.0", "1.2"] {
        assert!(bytes_of(&Cpu, statics.tensor(name).unwrap()) == fixture.stored(name), "{name}");
    }
    assert!(statics.tensor("0.0").unwrap_err().to_string().contains("0.1"), "the error lists what there is");
    assert!(streamer.load_static(&["nothing"]).err().unwrap().to_string().contains("nothing"));
}

#[cfg(feature = "model")]
#[test]
fn static_tensors_may_change_on_arrival_wherever_they_start() {
    use layer_streamer::{
        device::{DevicePtr, Shape, TensorMut},
        kernels::Kernels,
    };
    // Elements of four bytes at any multiple of two: some lie across the pieces that are read.
    let mut rng = fastrand::Rng::with_seed(17);
    let fixture = common::random_fixture(9 << 20, &mut rng);
    let mut unit = Unit::new("converted");
    for name in fixture.table.keys() {
        unit.keep(name.clone(), name.clone());
    }
    let floats = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3);
    let mut narrow = Unit::new("narrow");
    for tensor in fixture.table.values().filter(|tensor| floats(tensor.dtype)) {
        narrow.keep(tensor.name.clone(), tensor.name.clone());
    }
    narrow.convert(DType::BF16);
    let streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(1, 1, 0)).unwrap();
    let (whole, narrowed) = (streamer.load_static_unit(&unit).unwrap(), streamer.load_static_unit(&narrow).unwrap());
    let (stream, mut straddling) = (Cpu.stream().unwrap(), 0);
    for (name, tensor) in &fixture.table {
        assert!(bytes_of(&Cpu, whole.tensor(name).unwrap()) == fixture.stored(name), "{name}");
        if !floats(tensor.dtype) {
            continue;
        }
        straddling += usize::from(tensor.dtype == DType::F32 && tensor.offset % 4 != 0 && tensor.shape[0] > 600_000);
        let got = narrowed.tensor(name).unwrap();
        assert_eq!((got.dtype(), got.shape()), (DType::BF16, tensor.shape.as_slice()));
        let mut expected = vec![half::bf16::ZERO; tensor.shape[0]];
        // SAFETY: the vector is as long as the tensor, and lives until the kernel, in this thread, is done.
        let out = unsafe {
            let shape = Shape::new(&tensor.shape).unwrap();
            TensorMut::from_raw(DevicePtr::new(expected.as_mut_ptr().cast()), DType::BF16, shape)
        };
        Cpu.cast(&stream, whole.tensor(name).unwrap(), out).unwrap();
        let expected: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(bytes_of(&Cpu, got) == expected, "{name}");
    }
    assert!(straddling > 0, "choose another seed");
}

#[test]
fn the_counts_are_those_of_the_work_done() {
    let fixture = fixture(4, &SIZES, 9);
    let lent = LentSlots::new(&fixture.checkpoint, &fixture.units, &settings(2, 2, 2), Tier::Gpu);
    let mut streamer = lent.streamer(&fixture.checkpoint, &fixture.units, &settings(2, 2, 2), &[]).unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = seen.clone();
    streamer.track_progress(move |progress| {
        assert_eq!((progress.units, progress.done), (4, counter.fetch_add(1, Ordering::Relaxed) % 4 + 1));
    });
    for _ in 0..3 {
        checked_pass(&fixture, &mut streamer);
    }
    assert_eq!(seen.load(Ordering::Relaxed), 12);
    let stats = streamer.stats();
    let pass = streamer.plan().bytes_per_pass() as u64;
    assert_eq!(pass, fixture.table.values().map(|t| 2 * t.shape[0] as u64).sum::<u64>());
    assert_eq!((stats.stage(Stage::Compute).units, stats.stage(Stage::Compute).bytes), (12, 3 * pass));
    for stage in [Stage::Read, Stage::Pin, Stage::Transfer] {
        assert!(stats.stage(stage).units >= 12 && stats.stage(stage).bytes >= 3 * pass, "{stage}: {stats:?}");
    }
    assert!(stats.direct_bytes + stats.buffered_bytes >= 3 * pass);

    // Where nothing is lent, what is read is used in place.
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 2, 2)).unwrap();
    (0..3).for_each(|_| checked_pass(&fixture, &mut streamer));
    let stats = streamer.stats();
    let bytes = Stage::ALL.map(|stage| stats.stage(stage).bytes);
    assert!(bytes[0] >= 3 * pass && bytes[1..] == [0, 0, 3 * pass], "{bytes:?}");
}

#[test]
fn what_is_kept_is_read_once_where_its_memory_is_there_in_time() {
    let mut fixture = fixture(4, &SIZES, 12);
    let reading = Settings { cache: CachePolicy::Direct, ..settings(2, 2, 2) };
    for tier in [Tier::Ram, Tier::Pinned, Tier::Gpu] {
        fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &reading).unwrap();
        let pass = streamer.plan().bytes_per_pass() as u64;
        let mut read = || {
            checked_pass(&fixture, &mut streamer);
            let stats = streamer.stats();
            stats.direct_bytes + stats.buffered_bytes
        };
        let once = read();
        assert!(once >= pass, "{tier}: {once}");
        (0..3).for_each(|_| assert_eq!(read(), once, "{tier}"));
    }
}

#[test]
fn dropping_at_any_moment_ends_every_thread() {
    let fixture = fixture(5, &SIZES, 10);
    let stream = Cpu.stream().unwrap();
    for taken in [0, 1, 5, 8] {
        let streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 1, 1)).unwrap();
        for _ in 0..taken {
            drop(streamer.next(&stream).unwrap());
        }
        drop(streamer);
    }
}
