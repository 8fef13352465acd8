//! A disk of even pace, and what placing residents evenly and not stopping between passes win on it. By a simulated clock, so
//! that what a busy machine adds does not count.

use std::time::Duration;

use super::*;
use crate::device::Cpu;

/// How long the disk takes for a unit, and the layer function.
const READ: Duration = Duration::from_millis(60);
const COMPUTE: Duration = Duration::from_millis(14);

/// Units of a pass, and how many of them stay on disk.
const UNITS: usize = 32;
const ON_DISK: usize = 8;

/// Median seconds of a pass with rings of one over units that stay on disk where `reads` says so, else on the device;
/// `between` runs between two passes.
fn pass(reads: fn(usize) -> bool, between: impl Fn(&mut LayerStreamer<Cpu>)) -> f64 {
    let fixture = fixtures::fixture(UNITS, &[4_000], 5);
    assert_eq!((0..UNITS).filter(|&unit| reads(unit)).count(), ON_DISK);
    pace_reads(READ);
    let mut units = fixture.units.clone();
    units.iter_mut().enumerate().filter(|(unit, _)| !reads(*unit)).for_each(|(_, unit)| _ = unit.set_tier(Tier::Gpu));
    // With threads each answer comes when it is given, not with the next ones.
    let cache = CachePolicy::Direct;
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 1, reader: Reader::Pread, cache, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &units, &settings).unwrap();
    let (stream, mut times) = (Cpu.stream().unwrap(), Vec::new());
    for number in 0..5 {
        let start = simulated::now();
        let compute = |(), layer: &Layer<'_, Cpu>| {
            fixtures::check(&fixture, &Cpu, layer);
            simulated::sleep(COMPUTE);
            Ok::<_, Error>(())
        };
        streamer.run_pass(&stream, (), compute).unwrap();
        between(&mut streamer);
        // The first fills the tiers, and the next starts with full slots or empty ones.
        if number > 1 {
            times.push((simulated::now() - start).as_secs_f64());
        }
    }
    Faults::plan(|attempt: Attempt<'_>| attempt.result);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn at_even_distances(unit: usize) -> bool {
    unit.is_multiple_of(UNITS / ON_DISK)
}

fn in_a_row(unit: usize) -> bool {
    unit < ON_DISK
}

/// `better` takes less than `share` of `worse`'s time.
fn assert_wins(share: f64, better: impl Fn() -> f64, worse: impl Fn() -> f64) {
    let (better, worse, limit) = (better(), worse(), ON_DISK as f64 * READ.as_secs_f64());
    let said = format!("{better:.4} s a pass, {worse:.4} s the other way, {limit:.4} s by the disk");
    assert!(better < share * worse, "{said}");
    println!("{said}");
}

#[test]
fn residents_at_even_distances_are_faster_than_in_a_row() {
    if !in_child("pipeline::tests::pace::residents_at_even_distances_are_faster_than_in_a_row") {
        return;
    }
    simulated::begin();
    assert_wins(0.9, || pass(at_even_distances, |_| {}), || pass(in_a_row, |_| {}));
}

#[test]
fn a_pipeline_that_goes_on_between_passes_is_faster_than_one_that_is_drained() {
    if !in_child("pipeline::tests::pace::a_pipeline_that_goes_on_between_passes_is_faster_than_one_that_is_drained") {
        return;
    }
    simulated::begin();
    // A host chooses the next token meanwhile.
    let pause = || simulated::sleep(8 * COMPUTE);
    let goes_on = || pass(at_even_distances, |_| pause());
    let drained = || {
        pass(at_even_distances, |streamer| {
            pause();
            // Hands back what was read ahead.
            streamer.rewind().unwrap();
        })
    };
    assert_wins(0.95, goes_on, drained);
}
