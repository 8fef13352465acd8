//! Units that the page cache has, used where they lie there.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use memmap2::Mmap;

use super::*;
use crate::{
    device::Cpu,
    io::{HUGE, is_cached},
    layout::{PAGE, UnitLayout},
    pipeline::link::Place,
};

/// Units that are used in place, each in pages of its own.
fn aligned() -> Fixture {
    let fixture = fixtures::fixture(4, &[40_000], 3);
    let plan = Plan::new(&fixture.checkpoint, &fixture.units, &Settings::default(), Sharing::Ram).unwrap();
    assert!(plan.units.iter().all(|unit| unit.in_place));
    fixture
}

/// Has the page cache hold all of the files as long as what is returned lives, since it may give them up at any time. `None`, which is
/// said, where the system does not tell what it has, or lets nobody hold it.
fn warm(fixture: &Fixture) -> Option<Vec<Mmap>> {
    let files = fixture.checkpoint.files().iter().map(|path| File::open(path).unwrap());
    let held = files.map(|file| {
        // SAFETY: nobody cuts these files short.
        let map = unsafe { Mmap::map(&file).unwrap() };
        (map.lock().is_ok() && is_cached(&file, 0, map.len())).then_some(map)
    });
    let held: Option<Vec<_>> = held.collect();
    if held.is_none() {
        eprintln!("skipped: the system does not tell what the page cache has, or lets nobody hold it there");
    }
    held
}

/// Has the page cache give up all of the files; returns whether it did, as none in memory does.
fn cool(fixture: &Fixture) -> bool {
    let is_cold = |path: &PathBuf| {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: the descriptor is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        (0..file.metadata().unwrap().len()).step_by(PAGE).all(|at| !is_cached(&file, at, 1))
    };
    // Pages that a processor has just put there cannot be given up at once.
    (0..100).any(|_| {
        thread::sleep(Duration::from_millis(5));
        fixture.checkpoint.files().iter().filter(|path| !is_cold(path)).count() == 0
    })
}

fn streamer(fixture: &Fixture, cache: CachePolicy) -> LayerStreamer<Cpu> {
    let settings = Settings { n_cpu_pinned: 1, n_gpu: 1, cache, ..Settings::default() };
    LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings).unwrap()
}

#[test]
fn what_the_page_cache_has_is_used_there_and_what_it_has_not_is_read() {
    for tier in [Tier::Disk, Tier::Gpu] {
        let mut fixture = aligned();
        fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let Some(held) = warm(&fixture) else { return };
        let mut mapping = streamer(&fixture, CachePolicy::Auto);
        (0..3).for_each(|_| fixtures::checked_pass(&fixture, &mut mapping));
        let (stats, bytes) = (mapping.stats(), mapping.plan().bytes_per_pass() as f64);
        for passes in [stats.first.unwrap(), stats.steady.unwrap()] {
            let read = passes.direct_bytes + passes.buffered_bytes;
            let is_mapped = passes.mapped_bytes == bytes && read == 0.0;
            // What is not kept is in no plan of memory, and is read.
            assert!(
                if tier == Tier::Gpu { is_mapped } else { passes.mapped_bytes == 0.0 && read >= bytes },
                "{passes:?}"
            );
        }
        assert_eq!(mapping.verdict().unwrap().moves, tier != Tier::Gpu);
        mapping.close().unwrap();

        let mut reading = streamer(&fixture, CachePolicy::Buffered);
        fixtures::checked_pass(&fixture, &mut reading);
        assert_eq!(reading.stats().first.unwrap().mapped_bytes, 0.0);
        reading.close().unwrap();

        drop(held);
        if !cool(&fixture) {
            continue;
        }
        let mut streamer = streamer(&fixture, CachePolicy::Auto);
        // Not compared with the files, since that would bring them into the page cache.
        streamer.run_pass(&Cpu.stream().unwrap(), (), |(), _| Ok::<_, Error>(())).unwrap();
        let (stats, direct) = (streamer.stats(), streamer.stats().buffered_files.is_empty());
        let first = stats.first.unwrap();
        assert!(!direct || first.direct_bytes >= bytes && first.mapped_bytes == 0.0, "{tier}: {first:?}");
        // It was read to where it is kept.
        let _held = warm(&fixture).unwrap();
        (0..3).for_each(|_| fixtures::checked_pass(&fixture, &mut streamer));
        let mapped = streamer.stats().mapped_bytes;
        assert!(!direct || mapped == 0, "{tier}: {mapped}");
    }
}

/// How many of these pages are present as this process knows them, which a page of a file is not by being in the page cache.
fn known(start: *mut u8, bytes: usize) -> usize {
    let mut entries = vec![0; bytes.div_ceil(PAGE) * 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, (start.addr() / PAGE * 8) as u64).unwrap();
    // The highest bit says so: Documentation/admin-guide/mm/pagemap.rst of Linux.
    entries.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count()
}

#[test]
fn a_unit_takes_memory_once_whether_it_is_used_in_the_page_cache_or_read() {
    if let Err(error) = File::open("/proc/self/pagemap") {
        eprintln!("skipped: the system does not tell which pages are present: {error}");
        return;
    }
    // Without a rewind the page cache is used some times more after it was found that it has not all of the unit.
    [false, true].into_iter().for_each(a_unit_takes_memory_once);
}

fn a_unit_takes_memory_once(rewinds: bool) {
    let mut fixture = aligned();
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Gpu));
    let Some(_held) = warm(&fixture) else { return };
    // Whoever asks first is told that the page cache has not all of it.
    let missing = Arc::new(AtomicUsize::new(1));
    let of_plan = missing.clone();
    let plan = move || of_plan.fetch_update(Relaxed, Relaxed, |missing| missing.checked_sub(1)).is_ok();
    Faults::plan(|attempt| attempt.result).plan_given_up(plan);
    let mut streamer = streamer(&fixture, CachePolicy::Auto);
    let plan = streamer.plan().clone();
    let passes = |streamer: &mut LayerStreamer<Cpu>| {
        // Units are handed on some passes ahead.
        (0..20).for_each(|_| fixtures::checked_pass(&fixture, streamer));
        // Those threads have ended that fault memory in.
        let is_late = |unit: &UnitLayout| streamer.memory.is_late(unit, usize::MAX);
        while plan.units.iter().any(is_late) {
            thread::sleep(Duration::from_millis(5));
        }
    };
    // By unit: its pages, those of its memory that are present, and those of the page cache that this process has.
    let pages = |streamer: &LayerStreamer<Cpu>| -> Vec<[usize; 3]> {
        let of_unit = |(index, unit): (usize, &UnitLayout)| {
            let memory = streamer.memory.address(&plan, index, Place::Resident).as_ptr();
            let mapping = streamer.memory.mapped(index).unwrap().start();
            let bytes = unit.kept_bytes();
            [bytes.div_ceil(PAGE), known(memory, bytes), known(mapping, bytes)]
        };
        plan.units.iter().enumerate().map(of_unit).collect()
    };

    passes(&mut streamer);
    for (index, [all, memory, mapping]) in pages(&streamer).into_iter().enumerate() {
        assert_eq!([memory, mapping], if index == 0 { [all, 0] } else { [0, all] }, "unit {index}");
    }
    missing.store(usize::MAX, Relaxed);
    if rewinds {
        streamer.rewind().unwrap();
    }
    passes(&mut streamer);
    for (index, [all, memory, mapping]) in pages(&streamer).into_iter().enumerate() {
        assert_eq!([memory, mapping], [all, 0], "unit {index}");
    }
}

#[test]
fn mapped_files_lie_in_huge_pages_as_the_page_cache_has_them() {
    let mut fixture = aligned();
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Gpu));
    let Some(_held) = warm(&fixture) else { return };
    let (mut streamer, mut number) = (streamer(&fixture, CachePolicy::Auto), 0);
    let extents: Vec<_> = streamer.plan().units.iter().map(|unit| unit.extents.len()).collect();
    let pass = streamer.run_pass(&Cpu.stream().unwrap(), 0, |checked, layer| {
        let (arrivals, mut checked) = (fixture.units[number].arrivals(), checked);
        for arrival in arrivals.iter().filter(|_| extents[number] == 1) {
            let (_, at) = fixture.checkpoint.location(&arrival.inputs[0]).unwrap();
            let address = layer.tensor(&arrival.output)?.ptr().as_ptr().addr();
            assert_eq!(address % HUGE, at as usize % HUGE, "{}", arrival.output);
            checked += 1;
        }
        number += 1;
        Ok::<_, Error>(checked)
    });
    assert!(pass.unwrap() > 0 && streamer.stats().mapped_bytes > 0);
}

#[test]
fn a_file_that_changes_while_it_is_used_in_the_page_cache_ends_the_pass() {
    let mut fixture = aligned();
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Gpu));
    let Some(_held) = warm(&fixture) else { return };
    let mut streamer = streamer(&fixture, CachePolicy::Auto);
    fixtures::checked_pass(&fixture, &mut streamer);
    assert!(streamer.stats().mapped_bytes > 0);
    // Some file systems count in ticks of the clock.
    thread::sleep(Duration::from_millis(50));
    let path = fixture.checkpoint.files().last().unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0x55], file.metadata().unwrap().len() - 1).unwrap();
    let stream = Cpu.stream().unwrap();
    let error = streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap_err();
    assert!(matches!(&error, Error::Checkpoint { path: at, .. } if at == path), "{error}");
}

#[test]
fn units_that_the_page_cache_gives_up_at_any_time_are_read_and_every_layer_is_exact() {
    let (mut mapped, mut read) = (0, 0);
    for seed in 0..cases(40).into() {
        let mut case = Case::new(seed);
        case.settings.cache = CachePolicy::Auto;
        let mut rng = fastrand::Rng::with_seed(seed);
        Faults::plan(|attempt| attempt.result).plan_given_up(move || rng.bool());
        let Some(_held) = warm(&case.fixture) else { return };
        let (mut streamer, units) = (case.streamer(), case.units.len());
        let streams = [(); 2].map(|()| case.device.stream().unwrap());
        for _ in 0..3 {
            let some = case.rng.usize(..2 * units);
            case.take(&streamer, &streams, some);
            streamer.rewind().unwrap();
        }
        case.take(&streamer, &streams, 3 * units);
        streams.iter().for_each(|stream| case.device.drain(stream).unwrap());
        assert_eq!(case.wrong.load(SeqCst), 0, "seed {seed}");
        let stats = streamer.stats();
        (mapped, read) = (mapped + stats.mapped_bytes, read + stats.direct_bytes + stats.buffered_bytes);
    }
    assert!(mapped > 0 && read > 0, "{mapped} bytes used where they were, {read} read");
}
