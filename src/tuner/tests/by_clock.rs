//! The simulation beside another one: stages that look at a clock, as threads do, and know nothing of its recurrence.

use super::*;
use crate::{
    fixtures,
    layout::{StageLayout, UnitLayout},
};

/// A stage with the ring after it.
struct ClockedStage {
    /// Seconds by unit, and whether it takes a slot of the ring.
    units: Vec<(f64, bool)>,
    free: usize,
    batch: usize,
    /// Until when it works.
    until: Option<f64>,
    /// Units, counted over all passes: those it has begun, has done, and has handed on.
    begun: usize,
    done: usize,
    handed: usize,
}

fn workers(plan: &Plan, costs: [f64; 4]) -> Vec<ClockedStage> {
    let disk = [Tier::Disk].as_slice();
    let to_pin = [Tier::Disk, Tier::Ram].as_slice();
    let to_copy = [Tier::Disk, Tier::Ram, Tier::Pinned].as_slice();
    let rings: Vec<(&StageLayout, &[Tier], usize)> = match (&plan.layout.ram, &plan.layout.pinned) {
        (Some(ram), Some(pinned)) => vec![(ram, disk, 0), (pinned, to_pin, 1), (&plan.layout.gpu, to_copy, 2)],
        (Some(ring), None) | (None, Some(ring)) => vec![(ring, disk, 0), (&plan.layout.gpu, to_copy, 2)],
        (None, None) => vec![(&plan.layout.gpu, to_copy, 2)],
    };
    let worker = |units, free, batch| ClockedStage { units, free, batch, until: None, begun: 0, done: 0, handed: 0 };
    let mut workers: Vec<_> = (rings.iter())
        .map(|(ring, moves, kind)| {
            let seconds = |unit: &UnitLayout| {
                let bytes = if *kind == 0 { unit.read_bytes } else { unit.disk_bytes };
                let moved = moves.contains(&unit.tier);
                (if moved { bytes as f64 * costs[*kind] } else { 0.0 }, moved)
            };
            worker(plan.units.iter().map(seconds).collect(), ring.slots, ring.batch)
        })
        .collect();
    let total: usize = plan.units.iter().map(|unit| unit.disk_bytes).sum();
    let share = |unit: &UnitLayout| (unit.disk_bytes as f64 / total as f64 * costs[3], false);
    workers.push(worker(plan.units.iter().map(share).collect(), 0, 1));
    workers
}

/// Mean seconds of all passes but the first; `None` if they stand still.
fn by_clock(mut workers: Vec<ClockedStage>, passes: usize) -> Option<f64> {
    let (units, last) = (workers[0].units.len(), workers.len() - 1);
    let (mut now, mut ends) = (0.0f64, Vec::new());
    while ends.len() < passes {
        // Whoever is done hands on, and gives the slot back that the unit came in.
        let mut moved = true;
        while moved {
            moved = false;
            for at in 0..=last {
                if workers[at].until.is_some_and(|until| until <= now) {
                    let unit = workers[at].done % units;
                    if at > 0 && workers[at - 1].units[unit].1 {
                        workers[at - 1].free += 1;
                    }
                    let worker = &mut workers[at];
                    (worker.until, worker.done, moved) = (None, worker.done + 1, true);
                    // A batch ends with the pass, too.
                    if unit + 1 == units || (unit + 1).is_multiple_of(worker.batch) {
                        worker.handed = worker.done;
                    }
                    if at == last && unit + 1 == units {
                        ends.push(now);
                    }
                }
                let there = if at == 0 { passes * units } else { workers[at - 1].handed };
                let worker = &mut workers[at];
                let (seconds, takes) = worker.units[worker.begun % units];
                if worker.until.is_none() && worker.begun < there && (!takes || worker.free > 0) {
                    worker.free -= usize::from(takes);
                    (worker.until, worker.begun, moved) = (Some(now + seconds), worker.begun + 1, true);
                }
            }
        }
        // Nobody has anything to do where nobody works.
        let next = workers.iter().filter_map(|worker| worker.until).fold(f64::INFINITY, f64::min);
        if next.is_infinite() && ends.len() < passes {
            return None;
        }
        now = next;
    }
    Some((ends[passes - 1] - ends[0]) / (passes - 1) as f64)
}

#[test]
fn a_pass_takes_as_long_as_with_stages_that_look_at_a_clock() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (mut rng, mut moving) = (fastrand::Rng::with_seed(11), 0);
    for _ in 0..500 {
        let sizes: Vec<_> = (0..rng.usize(1..12)).map(|_| rng.usize(1..9)).collect();
        let (checkpoint, mut units) = units(file.path(), &sizes);
        let tiers = [Tier::Disk, Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];
        units.iter_mut().for_each(|unit| _ = unit.set_tier(tiers[rng.usize(..tiers.len())]));
        let settings = fixtures::random_rings(&mut rng);
        let plan = Plan::new(&checkpoint, &units, &settings, Sharing::Own).unwrap();
        let per_byte = |rng: &mut fastrand::Rng| 1e-9 * (1.0 + 9.0 * rng.f64());
        let parts = sizes.iter().sum::<usize>() as f64;
        let costs = [per_byte(&mut rng), per_byte(&mut rng), per_byte(&mut rng), parts * 2e-3 * rng.f64()];
        let [read, pin, copy, compute] = costs;
        let found = Line::new(&plan, 4, 0.0).pass(Costs([read, pin, copy, compute, 0.0, 0.0, 0.0]));
        match by_clock(workers(&plan, costs), 4) {
            Some(seconds) => {
                assert!((found / seconds - 1.0).abs() < 1e-9, "{found}, {seconds}: {settings:?}, {sizes:?}")
            }
            None => assert!(found.is_infinite(), "{found}, but it stands still: {settings:?}"),
        }
        moving += usize::from(found.is_finite());
    }
    assert!(moving > 300, "{moving} of 500");
}
