//! The pipeline in small: how long a pass takes with given settings, and what the links carry, by how long passes took.
//!
//! Stages in a row, each of which works on one unit at a time and needs the unit from the stage before (with the rest of its
//! batch) and a free slot of the ring after it, make a recurrence: a unit's work begins when the last of these is there.

use std::{
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use super::record::{Outcome, Trial};
use crate::{
    layout::StageLayout,
    plan::{Bandwidths, Plan, Tier},
};

/// Seconds a byte that is read, pinned and copied, and of a pass's computation; how unevenly all of these take their time: a
/// unit's up to that share longer or shorter, which deeper rings bridge; what part of the time of pinning, which takes
/// processor and memory, computation takes longer for it; and seconds until a read begins to bring bytes, which those under
/// way spend together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs(pub(super) [f64; COSTS]);

const COSTS: usize = 7;

/// How far off what is assumed may be, as factors; for computation nothing is. Those of the links are given.
const PRIOR: [f64; COSTS] = [2.0, 2.0, 2.0, f64::INFINITY, 2.0, 3.0, 4.0];

/// Of the last three, where nothing is known.
const UNEVEN: f64 = 0.1;
const IN_THE_WAY: f64 = 0.2;
const LATENCY: f64 = 2e-3;

/// How far off a pass's simulated time may be, relatively.
const NOISE: f64 = 0.02;

/// From how many places costs that explain the trials are looked for.
const STARTS: usize = 12;

/// One stage: what it moves, and the ring after it.
struct SimulatedStage {
    /// Bytes by unit, of which each costs one of [`Costs`]; for computation the unit's share of a pass.
    work: Vec<f64>,
    kind: usize,
    /// By unit: it takes a slot of the ring.
    takes: Vec<bool>,
    slots: usize,
    batch: usize,
}

/// A unit's work at a stage: what it waits for, as numbers of steps, 0 for nothing, and what it costs.
struct Step {
    /// The stage's own, before.
    before: u32,
    arrived: u32,
    /// After which a slot was free.
    free: u32,
    kind: u8,
    /// The caller sleeps before it.
    sleeps: bool,
    work: f64,
    /// What pinning carries of the unit, while it is computed.
    pinned: f64,
    /// How unevenly it takes its time.
    uneven: f64,
}

/// The pipeline with one configuration: the steps of all runs, each after those that it waits for.
pub(super) struct Line {
    steps: Vec<Step>,
    /// The last step of the first run, and of all; `None` if the pipeline stands still before.
    ends: Option<[usize; 2]>,
    runs: usize,
    sleep: f64,
    /// What its slots take, in bytes.
    pub(super) bytes: usize,
}

impl Line {
    pub(super) fn new(plan: &Plan, runs: usize, sleep: f64) -> Self {
        let (units, total) = (&plan.units, plan.bytes_per_pass().max(1) as f64);
        let stage = |kind: usize, ring: &StageLayout, moves: &[Tier]| SimulatedStage {
            work: (units.iter())
                .map(|unit| match kind {
                    _ if !moves.contains(&unit.tier) => 0.0,
                    // It takes a slot, and nothing of the link.
                    _ if unit.tier == Tier::GpuPacked => 0.0,
                    0 => unit.read_bytes as f64,
                    _ if unit.in_place => 0.0,
                    _ => unit.disk_bytes as f64,
                })
                .collect(),
            kind,
            takes: units.iter().map(|unit| moves.contains(&unit.tier)).collect(),
            slots: ring.slots,
            batch: ring.batch,
        };
        let mut stages = Vec::with_capacity(4);
        match (&plan.layout.ram, &plan.layout.pinned) {
            (Some(ram), Some(pinned)) => {
                stages.push(stage(0, ram, &[Tier::Disk]));
                stages.push(stage(1, pinned, &[Tier::Disk, Tier::Ram]));
            }
            (Some(ring), None) | (None, Some(ring)) => stages.push(stage(0, ring, &[Tier::Disk])),
            (None, None) => {}
        }
        let passing = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::PinnedPacked, Tier::GpuPacked];
        stages.push(stage(2, &plan.layout.gpu, &passing));
        stages.push(SimulatedStage {
            work: units.iter().map(|unit| unit.disk_bytes as f64 / total).collect(),
            kind: 3,
            takes: vec![false; units.len()],
            slots: 0,
            batch: 1,
        });
        let rings = [&plan.layout.ram, &plan.layout.pinned].into_iter().flatten().chain([&plan.layout.gpu]);
        let bytes = rings.map(StageLayout::bytes).fold(0, usize::saturating_add);
        let (steps, ends) = steps(&stages, units.len(), runs);
        Self { steps, ends, runs, sleep, bytes }
    }

    /// Mean seconds of the measured runs.
    pub(super) fn pass(&self, costs: Costs) -> f64 {
        let [.., uneven, in_the_way, latency] = costs.0;
        let uneven = uneven.min(1.0);
        let mut done = Vec::with_capacity(self.steps.len() + 1);
        done.push(0.0f64);
        for step in &self.steps {
            let of = |number: u32| done[number as usize];
            let mut start = of(step.before) + if step.sleeps { self.sleep } else { 0.0 };
            start = start.max(of(step.arrived));
            if step.free > 0 {
                start = start.max(of(step.free) + if step.kind == 0 { latency } else { 0.0 });
            }
            let seconds = step.work * costs.0[usize::from(step.kind)] + in_the_way * step.pinned * costs.0[1];
            done.push(start + seconds * (1.0 + uneven * step.uneven));
        }
        let Some([first, all]) = self.ends else { return f64::INFINITY };
        // Sleep is not measured, but the stages before go on meanwhile.
        (done[all] - done[first]) / (self.runs - 1) as f64 - self.sleep
    }
}

/// The steps of all stages in an order in which they can be gone through, and the last of the first run and of all.
fn steps(stages: &[SimulatedStage], units: usize, runs: usize) -> (Vec<Step>, Option<[usize; 2]>) {
    let (last, end) = (stages.len() - 1, runs * units);
    let pin = stages.iter().find(|stage| stage.kind == 1);
    let mut steps = Vec::with_capacity(stages.len() * end);
    // By stage: the steps of the units that it has had, and which units took slots.
    let mut had: Vec<Vec<u32>> = stages.iter().map(|_| Vec::with_capacity(end)).collect();
    let mut taken: Vec<Vec<usize>> = stages.iter().map(|_| Vec::with_capacity(end)).collect();
    let mut advanced = true;
    while advanced && had[last].len() < end {
        advanced = false;
        for (number, stage) in stages.iter().enumerate() {
            while had[number].len() < end {
                let at = had[number].len();
                let unit = at % units;
                let mut arrived = 0;
                if number > 0 {
                    let batch = stages[number - 1].batch;
                    let complete = at - unit + ((unit / batch + 1) * batch).min(units) - 1;
                    let Some(&step) = had[number - 1].get(complete) else { break };
                    arrived = step;
                }
                let mut free = 0;
                if stage.takes[unit] {
                    if let Some(before) = taken[number].len().checked_sub(stage.slots) {
                        let Some(&step) = had[number + 1].get(taken[number][before]) else { break };
                        free = step;
                    }
                    taken[number].push(at);
                }
                steps.push(Step {
                    before: had[number].last().copied().unwrap_or(0),
                    arrived,
                    free,
                    kind: stage.kind as u8,
                    sleeps: number == last && unit == 0 && at > 0,
                    work: stage.work[unit],
                    pinned: pin.filter(|_| number == last).map_or(0.0, |pin| pin.work[unit]),
                    uneven: pseudo_random(4 * at + stage.kind),
                });
                had[number].push(steps.len() as u32);
                advanced = true;
            }
        }
    }
    let ends = had[last].get(units - 1).zip(had[last].get(end - 1));
    (steps, ends.map(|(first, all)| [*first as usize, *all as usize]))
}

/// From −1 to 1, the same for the same `number`.
fn pseudo_random(number: usize) -> f64 {
    let mixed =
        (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// What is known of the links, and learned with every trial.
pub(super) struct Forecaster {
    given: Costs,
    /// Costs that explain what was seen, the most likely first.
    plausible: Vec<Costs>,
}

impl Forecaster {
    pub(super) fn new(bandwidths: Bandwidths) -> Self {
        let pin = Bandwidths::default().copy;
        let given = Costs([1.0 / bandwidths.disk, 1.0 / pin, 1.0 / bandwidths.copy, 0.0, UNEVEN, IN_THE_WAY, LATENCY]);
        Self { given, plausible: vec![given] }
    }

    /// Finds costs at which the trials would have taken the time they took, and which are not far from what was given. A few
    /// trials can be explained in several ways, so that many are tried, on all processors: nothing is measured meanwhile.
    /// `goes_on` is asked a few times a second; when it says no, nothing is learned.
    pub(super) fn learn(&mut self, trials: &[(&Line, &Trial)], mut goes_on: impl FnMut() -> bool) {
        let longest = trials.iter().filter_map(|(_, trial)| trial.seconds()).fold(0.0, f64::max);
        if longest == 0.0 {
            return;
        }
        let Costs(given) = self.given;
        let known = (0..COSTS).filter(|&cost| PRIOR[cost].is_finite());
        let off = |costs: Costs, most: f64| {
            let given = known.clone().map(|cost| ((costs.0[cost] / given[cost]).ln() / PRIOR[cost].ln()).powi(2)).sum();
            let mut off = Off { given, trials: 0.0 };
            for (line, trial) in trials {
                let ratio = match (trial.seconds(), &trial.outcome) {
                    (Some(seconds), _) => line.pass(costs) / seconds,
                    // It took longer, nobody knows how much.
                    (None, Outcome::Stopped { limit }) => (line.pass(costs) / limit).min(1.0),
                    _ => 1.0,
                };
                off.trials += (ratio.max(1e-9).ln() / NOISE).powi(2);
                // The rest would only add to it.
                if off.sum() >= most {
                    break;
                }
            }
            off
        };
        let start_from = |start: usize| {
            let around = |cost: usize, factor: f64| factor.powf(pseudo_random(COSTS * start + cost));
            // Computation may take any share of the time.
            Costs(std::array::from_fn(|cost| match PRIOR[cost] {
                f64::INFINITY => 0.15 * longest * around(cost, 7.0),
                factor => given[cost] * around(cost, factor),
            }))
        };
        let (next, given_up) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = |ends: &mpsc::Sender<(Costs, f64)>| {
            loop {
                let start = next.fetch_add(1, Relaxed);
                if start >= STARTS {
                    return;
                }
                let Some(end) = descend(start_from(start), trials.len() as f64, &off, &given_up) else { return };
                ends.send(end).expect("it is waited for");
            }
        };
        let mut ends = Vec::with_capacity(STARTS);
        thread::scope(|scope| {
            let (sender, found) = mpsc::channel();
            let count = thread::available_parallelism().map_or(1, usize::from).min(STARTS);
            let spawn = |_| {
                let (work, sender) = (&work, sender.clone());
                thread::Builder::new().spawn_scoped(scope, move || work(&sender)).ok()
            };
            if (0..count).map_while(spawn).count() == 0 {
                work(&sender);
            }
            drop(sender);
            loop {
                match found.recv_timeout(Duration::from_millis(100)) {
                    Ok(end) => ends.push(end),
                    Err(mpsc::RecvTimeoutError::Timeout) if goes_on() => {}
                    Err(mpsc::RecvTimeoutError::Timeout) => given_up.store(true, Relaxed),
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        if given_up.into_inner() {
            return;
        }
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        // Two standard deviations from the most likely; where that explains little, more is plausible.
        let most = 2.0 * ends[0].1 + 4.0;
        self.plausible = ends.into_iter().take_while(|(_, off)| *off <= most).map(|(costs, _)| costs).collect();
    }

    /// Seconds that a run will most likely take; before anything was learned, those of the links alone.
    pub(super) fn forecast(&self, line: &Line) -> f64 {
        line.pass(self.plausible[0])
    }

    /// Seconds that a run may take at the least.
    pub(super) fn hope(&self, line: &Line) -> f64 {
        self.plausible.iter().map(|costs| line.pass(*costs)).fold(f64::INFINITY, f64::min)
    }
}

/// How far costs are from what was given, and times from what was seen: sums of squared standard deviations.
struct Off {
    given: f64,
    trials: f64,
}

impl Off {
    fn sum(&self) -> f64 {
        self.given + self.trials
    }
}

/// Goes down from `start`, one cost at a time, in steps that become smaller, until the trials are `explained`: the costs, and
/// how far off they are. `None` if it was given up. `off` may stop counting at its second argument.
fn descend(
    start: Costs,
    explained: f64,
    off: &impl Fn(Costs, f64) -> Off,
    given_up: &AtomicBool,
) -> Option<(Costs, f64)> {
    let (mut here, mut step) = ((start, off(start, f64::INFINITY)), 1.5f64);
    while step > 1.01 && here.1.trials > explained {
        if given_up.load(Relaxed) {
            return None;
        }
        let before = here.1.sum();
        for cost in 0..COSTS {
            for factor in [step, 1.0 / step] {
                let Costs(mut costs) = here.0;
                costs[cost] *= factor;
                let found = off(Costs(costs), here.1.sum());
                if found.sum() < here.1.sum() {
                    here = (Costs(costs), found);
                }
            }
        }
        if here.1.sum() >= before {
            step = step.sqrt();
        }
    }
    Some((here.0, here.1.sum()))
}
