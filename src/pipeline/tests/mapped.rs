//! Units that the page cache has, used where they lie there.

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::FileExt},
    thread,
    time::Duration,
};

use super::*;
use crate::{
    device::Cpu,
    io::{HUGE, is_cached},
    layout::PAGE,
};

/// Units that are used in place, each in pages of its own.
fn aligned() -> Fixture {
    let fixture = fixtures::fixture(4, &[40_000], 3);
    let plan = Plan::new(&fixture.checkpoint, &fixture.units, &Settings::default(), Sharing::Ram).unwrap();
    assert!(plan.units.iter().all(|unit| unit.in_place));
    fixture
}

/// Reads all of the files; returns whether the page cache has them then, as far as the system tells. If it does not, that is said.
fn warm(fixture: &Fixture) -> bool {
    let has = |path: &PathBuf| is_cached(&File::open(path).unwrap(), 0, fs::read(path).unwrap().len());
    let warm = fixture.checkpoint.files().iter().all(has);
    if !warm {
        eprintln!("skipped: the system does not tell what the page cache has");
    }
    warm
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
        if !warm(&fixture) {
            return;
        }
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
        assert!(warm(&fixture));
        (0..3).for_each(|_| fixtures::checked_pass(&fixture, &mut streamer));
        let mapped = streamer.stats().mapped_bytes;
        assert!(!direct || mapped == 0, "{tier}: {mapped}");
    }
}

#[test]
fn mapped_files_lie_in_huge_pages_as_the_page_cache_has_them() {
    let mut fixture = aligned();
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Gpu));
    if !warm(&fixture) {
        return;
    }
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
    if !warm(&fixture) {
        return;
    }
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
        if !warm(&case.fixture) {
            return;
        }
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
