//! What a search by plan finds and what it takes for that: on machines that are simulated, and on a disk of even pace before
//! units that differ.

use std::{
    env, fs,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

mod by_clock;
mod machines;

use super::{
    simulation::{Costs, Forecaster, Line},
    *,
};
use crate::{
    checkpoint::{Checkpoint, StoredTensor},
    device::{Cpu, Device},
    dtype::DType,
    io::faults::{Attempt, Faults},
    pipeline::LayerStreamer,
    plan::{CachePolicy, Plan, Reader, Settings, Sharing, Tier, Unit},
};

/// Held by tests that measure time or take all processors for long.
static PROCESSORS: Mutex<()> = Mutex::new(());

/// Units' sizes, in parts of a pass, and how long disk and layer function take for a part.
const SIZES: [usize; 12] = [6, 1, 1, 1, 6, 1, 1, 1, 6, 1, 1, 1];
const PART: usize = 128 << 10;
const READ: Duration = Duration::from_micros(2200);
const COMPUTE: Duration = Duration::from_micros(1800);

/// Units of so many parts of a file of zeros.
fn units(file: &Path, sizes: &[usize]) -> (Checkpoint, Vec<Unit>) {
    let (mut table, mut units, mut offset) = (Vec::new(), Vec::new(), 0);
    for (number, size) in sizes.iter().enumerate() {
        let name = format!("unit {number}");
        let shape = vec![size * PART];
        table.push(StoredTensor { name: name.clone(), file: file.into(), offset, dtype: DType::U8, shape });
        // So far apart that each is read alone.
        offset += (size * PART + (128 << 10)) as u64;
        let mut unit = Unit::new(name.clone());
        unit.keep("weights", name);
        units.push(unit);
    }
    fs::File::options().append(true).open(file).unwrap().set_len(offset).unwrap();
    (Checkpoint::from_table(table).unwrap(), units)
}

/// What a pass takes on a disk and with a layer function of that pace, by the machine's own clock.
fn paced() -> Costs {
    let (part, parts) = (PART as f64, SIZES.iter().sum::<usize>() as f64);
    Costs([READ.as_secs_f64() / part, 1e-10, 1e-10, parts * COMPUTE.as_secs_f64(), 0.02, 0.05, 1e-4])
}

/// No test, but what the tests start again: a worker on that machine, whose last argument is the file to read. The machine
/// behaves as the simulation says: whether pipelines do is for the test with a clock that is real.
#[test]
fn worker_on_a_paced_machine() {
    let setup = |Placement { settings, .. }| {
        let (checkpoint, units) = units(Path::new(&env::args().next_back().unwrap()), &SIZES);
        let line = Line::new(&Plan::new(&checkpoint, &units, &settings, Sharing::Own)?, 4, 0.0);
        let mut rng = fastrand::Rng::with_seed(7);
        Ok::<_, Error>(move || line.pass(paced()) * (0.99 + 0.02 * rng.f64()))
    };
    super::worker::worker_by(setup, |pass| Ok(pass()));
}

/// The same with a pipeline and a clock that are real.
#[test]
fn worker_on_a_slow_disk() {
    worker(|Placement { settings, .. }| {
        let (checkpoint, units) = units(Path::new(&env::args().next_back().unwrap()), &SIZES);
        // Answers are given one at a time, each as late as its size demands.
        let mut due = Instant::now();
        Faults::plan(move |attempt: Attempt<'_>| {
            if !attempt.trial {
                due = due.max(Instant::now()) + READ.mul_f64(attempt.len as f64 / PART as f64);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            attempt.result
        });
        let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &settings)?;
        let stream = Cpu.stream()?;
        Ok::<_, Error>(move || {
            streamer.run_pass(&stream, (), |(), layer| {
                thread::sleep(COMPUTE.mul_f64(SIZES[layer.index()] as f64));
                Ok::<_, Error>(())
            })
        })
    });
}

/// Each combination of the values with all units on disk.
fn on_disk(checkpoint: &Checkpoint, units: &[Unit], values: &Values, common: &Settings) -> Vec<Candidate> {
    let candidate = |settings: &Settings| Candidate {
        plan: Some(Plan::new(checkpoint, units, settings, Sharing::Own).unwrap()),
        ..Placement { settings: settings.clone(), tiers: vec![Tier::Disk; units.len()], ..Placement::default() }.into()
    };
    values.configurations(common).iter().map(candidate).collect()
}

fn tuner(file: &Path, worker: &str, values: &Values) -> Tuner {
    let arguments = ["--exact".into(), OsString::from(format!("tuner::tests::{worker}"))];
    let common = Settings { reader: Reader::Pread, cache: CachePolicy::Direct, ..Settings::default() };
    let (checkpoint, units) = units(file, &SIZES);
    Tuner {
        candidates: on_disk(&checkpoint, &units, values, &common),
        arguments: Some(arguments.into_iter().chain([file.into()]).collect()),
        patience: Duration::from_secs(60),
        ..Tuner::default()
    }
}

fn ranking(tuner: &Tuner) -> Ranking {
    let ranking = tuner.run(|_| ControlFlow::Continue(())).unwrap();
    assert_eq!(ranking.ended, Ended::Complete);
    let refused = ranking.trials.iter().find(|trial| matches!(trial.outcome, Outcome::Refused { .. }));
    assert_eq!(refused, None);
    ranking
}

/// The runs of two configurations in turn, by their medians: the second's, relative to the first's.
fn compared(file: &Path, worker: &str, pair: [&Settings; 2]) -> f64 {
    let mut runs = [vec![], vec![]];
    for turn in 0..6 {
        let settings = pair[turn % 2];
        let values = Values {
            n_gpu: vec![settings.n_gpu],
            n_cpu_pinned: vec![settings.n_cpu_pinned],
            n_cpu: vec![settings.n_cpu],
            batch_gpu: vec![settings.batch_gpu],
            batch_cpu_pinned: vec![settings.batch_cpu_pinned],
            batch_cpu: vec![settings.batch_cpu],
        };
        runs[turn % 2].extend_from_slice(ranking(&tuner(file, worker, &values)).trials[0].measured());
    }
    let [a, b] = runs.map(|mut runs| {
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    });
    b / a
}

/// Compares both searches, with workers of one kind.
fn search_and_compare(worker: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let values = Values {
        n_gpu: vec![1, 2, 4],
        n_cpu_pinned: vec![0, 1, 2, 4],
        n_cpu: vec![0, 1, 3],
        batch_cpu_pinned: vec![0, 2],
        ..Values::default()
    };
    let grid = tuner(file.path(), worker, &values);
    let all = ranking(&grid);
    // The disk is known to be faster than it is, and what is computed is not known at all.
    let bandwidths = Bandwidths { disk: 1.5 * PART as f64 / READ.as_secs_f64(), copy: 5e9 };
    let planned = ranking(&Tuner { search: Search::Plan { bandwidths }, ..grid.clone() });
    let runs = |ranking: &Ranking| ranking.trials.iter().map(|trial| trial.runs.len()).sum::<usize>();
    let (best, slowest) = (all.fastest().unwrap(), all.trials.iter().filter_map(Trial::seconds).fold(0.0, f64::max));
    let pick = planned.fastest().unwrap();
    assert!(slowest > 1.2 * best.seconds().unwrap(), "the settings do not matter: {all:?}");
    let ratio = compared(file.path(), worker, [&best.placement.settings, &pick.placement.settings]);
    println!(
        "grid: {} configurations, {} runs, {:?} at {:.4} s, the slowest that was not stopped {slowest:.4} s\n\
         plan: {} configurations, {} runs, {:?} at {:.4} s; {:.3} of the grid's when run in turn",
        all.trials.len(),
        runs(&all),
        best.placement.settings,
        best.seconds().unwrap(),
        planned.trials.len(),
        runs(&planned),
        pick.placement.settings,
        pick.seconds().unwrap(),
        ratio,
    );
    // What it has learned holds for all the others too.
    let line = |trial: &Trial| {
        let of = |candidate: &&Candidate| candidate.placement == trial.placement;
        Line::new(grid.candidates.iter().find(of).unwrap().plan.as_ref().unwrap(), grid.runs, 0.0)
    };
    let known: Vec<_> = planned.trials.iter().map(|trial| (line(trial), trial)).collect();
    let mut forecaster = Forecaster::new(bandwidths);
    forecaster.learn(&known.iter().map(|(line, trial)| (line, *trial)).collect::<Vec<_>>(), || true);
    let off = |trial: &Trial| Some((forecaster.forecast(&line(trial)) / trial.seconds()? - 1.0).abs());
    let mut off: Vec<_> = all.trials.iter().filter_map(off).collect();
    off.sort_by(f64::total_cmp);
    let median = off[off.len() / 2];
    println!("forecasts of {}: {median:.3} off in the median, {:.3} at most", off.len(), off.last().unwrap());
    assert_eq!(all.trials.len(), all.candidates);
    assert!(3 * runs(&planned) <= runs(&all) && ratio < 1.03 && median < 0.03);
}

#[test]
fn a_search_by_plan_finds_what_the_grid_finds_in_a_third_of_its_runs() {
    search_and_compare("worker_on_a_paced_machine");
}

#[test]
#[ignore = "measures time, and wants a machine to itself: ci/full runs it"]
fn a_search_by_plan_finds_what_the_grid_finds_with_a_real_pipeline_and_clock() {
    let _alone = PROCESSORS.lock().unwrap_or_else(PoisonError::into_inner);
    search_and_compare("worker_on_a_slow_disk");
}

#[test]
fn what_cannot_work_is_one_error_before_anything_starts_and_what_is_on_record_counts() {
    let (file, folder) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempdir().unwrap());
    for (wrong, cause) in [
        (Values { n_gpu: vec![1, 0], ..Values::default() }, "n_gpu: must be at least 1"),
        (Values { n_cpu: vec![70_000], ..Values::default() }, "n_cpu: is 70000, more than the 65536"),
        (Values { batch_cpu: vec![], ..Values::default() }, "batch_cpu: has no value to try"),
    ] {
        let never = |_: &Settings| panic!("it was tried");
        let said = Candidates::new(Candidate::default(), &wrong, never).unwrap_err().to_string();
        assert!(said.starts_with(cause), "{said}");
    }
    let by_plan = |disk: f64, copy: f64| Search::Plan { bandwidths: Bandwidths { disk, copy } };
    let of = |n_gpu: &[usize]| {
        tuner(file.path(), "worker_on_a_slow_disk", &Values { n_gpu: n_gpu.to_vec(), ..Values::default() })
    };
    let mut twice = of(&[1]);
    twice.candidates.push(twice.candidates[0].clone());
    let mut without_plan = Tuner { search: by_plan(1e9, 1e9), ..of(&[1, 2]) };
    without_plan.candidates[1].plan = None;
    let mut wrong = vec![
        (Tuner { candidates: vec![], ..of(&[1]) }, "candidates: there must be at least one"),
        (twice, "candidates: number 1 is there twice"),
        (without_plan, "candidates: a search by plan needs the plan of each"),
    ];
    for (disk, copy) in [(0.0, 1e9), (1e9, f64::INFINITY), (f64::NAN, 1e9), (1e9, -1.0)] {
        wrong.push((Tuner { search: by_plan(disk, copy), ..of(&[1, 2]) }, "bandwidths: "));
    }
    for (tuner, cause) in wrong {
        let said = tuner.run(|_| panic!("something happened")).unwrap_err().to_string();
        assert!(said.starts_with(cause), "{said}");
    }
    let record = folder.path().join("record");
    let mut counts = Vec::new();
    // The default is the same in both.
    for n_gpu in [&[1][..], &[1, 2]] {
        let tuner = Tuner { search: by_plan(1e9, 1e9), record: Some(record.clone()), ..of(n_gpu) };
        let ranking = tuner.run(|event| {
            if let SearchEvent::Begun { number, most, .. } = event {
                counts.push((number, most));
            }
            ControlFlow::Continue(())
        });
        let ranking = ranking.unwrap();
        assert_eq!((ranking.ended, ranking.candidates), (Ended::Complete, ranking.trials.len()), "{ranking:?}");
    }
    assert_eq!(counts, [(1, 1), (2, 2)]);
    for (other, cause) in [
        (Tuner { strict: true, ..of(&[1]) }, "strictness was false"),
        (of(&[2]), "default was Placement"),
        (Tuner { budget: Some(Budget { device_bytes: None, host_bytes: 1 }), ..of(&[1]) }, "budget was None"),
    ] {
        let said = Tuner { record: Some(record.clone()), ..other }.run(|_| panic!("something happened"));
        let said = said.unwrap_err().to_string();
        assert!(said.contains(cause) && said.contains("remove it, or name another file"), "{said}");
    }
}

#[test]
fn a_search_by_plan_is_within_3_percent_of_the_grid_on_all_kinds_of_machines() {
    let _alone = PROCESSORS.lock().unwrap_or_else(PoisonError::into_inner);
    let (file, mut rng) = (tempfile::NamedTempFile::new().unwrap(), fastrand::Rng::with_seed(8));
    let (mut tried, mut of, mut matters) = (0, 0, 0);
    for case in 0..support::cases(12) {
        // Units of 64 MiB and up, of which none is read.
        let size = |_| 512 * if rng.u8(..3) == 0 { rng.usize(2..9) } else { 1 };
        let sizes: Vec<_> = (0..12).map(size).collect();
        let (checkpoint, units) = units(file.path(), &sizes);
        let plan = Plan::new(&checkpoint, &units, &Settings::default(), Sharing::Own).unwrap();
        // Any of the stages may be the one that all wait for; the search is told by how fast disk and link are, not quite right.
        let mut from = |low: f64, high: f64| low * (high / low).powf(rng.f64());
        let [disk, pin, copy] = [from(0.5e9, 8e9), from(5e9, 15e9), from(1e9, 20e9)];
        let compute = plan.bytes_per_pass() as f64 / from(0.5e9, 20e9);
        let costs =
            Costs([1.0 / disk, 1.0 / pin, 1.0 / copy, compute, from(0.05, 0.3), from(0.05, 1.0), from(1e-4, 2e-2)]);
        let bandwidths = Bandwidths { disk: disk * from(0.6, 1.7), copy: copy * from(0.6, 1.7) };
        let values = Values {
            n_gpu: vec![1, 2, 3],
            n_cpu_pinned: vec![0, 1, 2, 4],
            n_cpu: vec![0, 2],
            batch_gpu: vec![0, 2],
            batch_cpu_pinned: vec![0, 4],
            ..Values::default()
        };
        let candidates = on_disk(&checkpoint, &units, &values, &Settings::default());
        let seconds = |candidate: &Candidate| Line::new(candidate.plan.as_ref().unwrap(), 4, 0.0).pass(costs);
        let all: Vec<_> = candidates.iter().map(seconds).collect();
        let mut order = Order::planned(&candidates, bandwidths, 4, 0.0).unwrap();
        let mut record = Record { runs: 4, ..Record::default() };
        while let Some(next) = order.next(&candidates, &record, || true) {
            // Runs differ by a hundredth or two, and slow ones are stopped.
            let mut runs: Vec<_> = (0..4).map(|_| all[next] * (0.99 + 0.02 * rng.f64())).collect();
            let limit = record.limit(false).filter(|limit| runs[1] > *limit);
            runs.truncate(if limit.is_some() { 1 } else { 4 });
            let outcome = limit.map_or(Outcome::Done, |limit| Outcome::Stopped { limit });
            record.trials.push(Trial { placement: candidates[next].placement.clone(), runs, outcome });
        }
        let best = &record.best_trial().unwrap().placement;
        let pick = seconds(candidates.iter().find(|candidate| candidate.placement == *best).unwrap());
        let [least, most] = [f64::min, f64::max].map(|of| all.iter().copied().reduce(of).unwrap());
        println!(
            "{case}: {} of {}, {:.3} of the best, the worst {:.3}",
            record.trials.len(),
            all.len(),
            pick / least,
            most / least
        );
        assert!(pick <= 1.03 * least && 3 * record.trials.len() <= all.len(), "{costs:?} {bandwidths:?} {sizes:?}");
        (tried, of, matters) = (tried + record.trials.len(), of + all.len(), matters + u32::from(most > 1.2 * least));
    }
    assert!(matters * 2 > support::cases(12), "the settings mattered in {matters}");
    println!("{tried} of {of} configurations were tried");
}

#[test]
fn learning_from_many_trials_of_many_units_can_be_interrupted() {
    let _alone = PROCESSORS.lock().unwrap_or_else(PoisonError::into_inner);
    let file = tempfile::NamedTempFile::new().unwrap();
    let (checkpoint, units) = units(file.path(), &[8; 2000]);
    let trials: Vec<_> = (1..40)
        .map(|n_gpu| {
            let settings = Settings { n_gpu, ..Settings::default() };
            let line = Line::new(&Plan::new(&checkpoint, &units, &settings, Sharing::Own).unwrap(), 4, 0.0);
            // Times that nothing explains.
            let placement = Placement { settings, ..Placement::default() };
            (line, Trial { placement, runs: vec![1.0 + n_gpu as f64; 4], outcome: Outcome::Done })
        })
        .collect();
    let mut forecaster = Forecaster::new(Bandwidths::default());
    let (start, mut asked) = (support::processor_time(), 0);
    forecaster.learn(&trials.iter().map(|(line, trial)| (line, trial)).collect::<Vec<_>>(), || {
        asked += 1;
        asked < 3
    });
    let took = support::processor_time() - start;
    assert!(asked >= 3 && took < Duration::from_secs(10), "{asked} times in {took:?}");
}
