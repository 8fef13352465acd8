//! Which candidate comes next.

use super::{
    Candidate,
    record::{Outcome, Record, Trial},
    simulation::{Forecaster, Line},
    verdict::WORTH,
};
use crate::{
    error::{Error, Result},
    plan::{Bandwidths, Cost, Placement, fastest},
};

/// Of candidates forecast to be equally fast but for this share, that which takes the least memory is tried first.
const ALIKE: f64 = 0.01;

/// How far off forecasts are taken to be at first; half of that after one that was seen to be right, a third after two, …
const FIRST_ERROR: f64 = 0.1;

/// From how many trials costs are learned at most: what more would tell is little, and takes longer with each.
const LEARN: usize = 16;

/// The order of the search.
pub(super) enum Order {
    /// As they come.
    Grid,
    /// By forecast, as long as it may be worth it.
    Plan(Box<Planned>),
}

pub(super) struct Planned {
    lines: Vec<Line>,
    forecaster: Forecaster,
    /// The candidate that was forecast last, and its seconds.
    asked: Option<(usize, f64)>,
    /// How far off forecasts were, relatively.
    errors: Vec<f64>,
}

impl Order {
    pub(super) fn planned(candidates: &[Candidate], bandwidths: Bandwidths, runs: usize, sleep: f64) -> Result<Self> {
        let line = |candidate: &Candidate| Some(Line::new(candidate.plan.as_ref()?, runs, sleep));
        let lines = candidates.iter().map(line).collect::<Option<_>>();
        let cause = "a search by plan needs the plan of each";
        let lines = lines.ok_or_else(|| Error::setting("candidates", cause))?;
        let forecaster = Forecaster::new(bandwidths);
        Ok(Self::Plan(Box::new(Planned { lines, forecaster, asked: None, errors: Vec::new() })))
    }

    /// How many of so many candidates are tried at most: a third by plan, but at least four.
    pub(super) fn most(&self, candidates: usize) -> usize {
        match self {
            Self::Grid => candidates,
            Self::Plan(_) => (candidates / 3).max(4).min(candidates),
        }
    }

    /// The number of the next candidate, if there is one that is worth trying. `goes_on` is asked a few times a second
    /// where finding it takes long; after a no it may be any.
    pub(super) fn next(
        &mut self,
        candidates: &[Candidate],
        record: &Record,
        goes_on: impl FnMut() -> bool,
    ) -> Option<usize> {
        let tried = |number: &usize| record.trial_of(&candidates[*number].placement).is_some();
        let left: Vec<_> = (0..candidates.len()).filter(|number| !tried(number)).collect();
        let most = self.most(candidates.len());
        match self {
            Self::Grid => left.first().copied(),
            Self::Plan(planned) => {
                // What is refused does not count: most of it takes no time.
                let ran = |candidate: &&Candidate| {
                    record.trial_of(&candidate.placement).is_some_and(|trial| !trial.runs.is_empty())
                };
                if candidates.iter().filter(ran).count() >= most {
                    return None;
                }
                planned.next(candidates, &left, record, goes_on)
            }
        }
    }
}

impl Planned {
    fn next(
        &mut self,
        candidates: &[Candidate],
        left: &[usize],
        record: &Record,
        goes_on: impl FnMut() -> bool,
    ) -> Option<usize> {
        // In the order in which they were tried.
        let line_of = |trial: &Trial| candidates.iter().position(|candidate| trial.placement == candidate.placement);
        let mut trials: Vec<_> =
            record.trials.iter().filter_map(|trial| Some((&self.lines[line_of(trial)?], trial))).collect();
        let anchors = self.anchors();
        if let Some(anchor) = anchors.iter().find(|number| left.contains(number)) {
            return Some(*anchor);
        }
        if let Some((number, forecast)) = self.asked.take()
            && let Some(trial) = record.trial_of(&candidates[number].placement)
        {
            match (trial.seconds(), &trial.outcome) {
                (Some(seconds), _) => self.errors.push((forecast / seconds - 1.0).abs()),
                (None, Outcome::Stopped { limit }) => self.errors.push((1.0 - forecast / limit).max(0.0)),
                _ => {}
            }
        }
        let best = record.best_trial();
        if trials.len() > LEARN {
            // Those that come first, the best, and the newest.
            let rest = trials.split_off(anchors.len());
            let newest = rest.len() - (LEARN - anchors.len() - 1);
            let is_best = |trial: &Trial| best.is_some_and(|best| best.placement == trial.placement);
            let (old, new) = rest.split_at(newest);
            trials.extend(old.iter().filter(|(_, trial)| is_best(trial)).chain(new));
        }
        self.forecaster.learn(&trials, goes_on);
        // By the costs that suit each best, among those that explain what was seen: what may win by them is worth a trial.
        let hopes: Vec<_> = left.iter().map(|&number| (number, self.forecaster.hope(&self.lines[number]))).collect();
        let recent = &self.errors[self.errors.len().saturating_sub(2)..];
        let seen = recent.iter().copied().fold(0.0, f64::max);
        let error = seen.max(FIRST_ERROR / (1 + self.errors.len()) as f64);
        let worth = best.and_then(Trial::seconds).unwrap_or(f64::INFINITY) * (1.0 - WORTH);
        let number = self.most_hopeful(&hopes, |_, hope| hope * (1.0 - error) < worth).or_else(|| {
            // A machine is more than the forecast knows of it: what is next to the best may be better, until nothing is.
            let best = &best?.placement;
            self.most_hopeful(&hopes, |number, _| are_neighbours(&candidates[number].placement, best))
        })?;
        self.asked = Some((number, self.forecaster.forecast(&self.lines[number])));
        Some(number)
    }

    /// What is tried first, whatever may be forecast: the default, which the others are compared with; then the shortest rings,
    /// with which the stages wait for each other, and the longest, with which they wait for the slowest: the two tell most about
    /// each stage. The slow one before the fast one, so that it is less likely to be stopped. Each once.
    fn anchors(&self) -> Vec<usize> {
        let bytes = |number: &usize| self.lines[*number].bytes;
        let all = 0..self.lines.len();
        let mut anchors = vec![0];
        for extreme in [all.clone().min_by_key(bytes), all.max_by_key(bytes)].into_iter().flatten() {
            if !anchors.contains(&extreme) {
                anchors.push(extreme);
            }
        }
        anchors
    }

    /// Among those that may be tried that with the best hope; of several that are alike in that, that which takes least.
    fn most_hopeful(&self, hopes: &[(usize, f64)], may: impl Fn(usize, f64) -> bool) -> Option<usize> {
        let hopes = hopes.iter().filter(|(number, hope)| may(*number, *hope));
        let cost = |&(number, seconds): &(usize, f64)| Cost { seconds, burden: self.lines[number].bytes as f64 };
        fastest(hopes.map(|hope| (cost(hope), hope.0)), ALIKE)
    }
}

/// Whether they differ in one stage: its ring, its batch or both.
fn are_neighbours(a: &Placement, b: &Placement) -> bool {
    let stages = |Placement { settings: of, .. }: &Placement| {
        [(of.n_gpu, of.batch_gpu), (of.n_cpu_pinned, of.batch_cpu_pinned), (of.n_cpu, of.batch_cpu)]
    };
    stages(a).iter().zip(stages(b)).filter(|(a, b)| **a != *b).count() == 1
}
