//! Finds the fastest way to run by measuring, each candidate in a process of its own, so that running out of memory, a crash or
//! a hang costs that candidate alone.
//!
//! # What is tried, and what the answer is
//! The candidates are [`Placement`]s within one budget: first the default, which is what the planner chooses by itself, then the
//! best placement with each combination of the [`Values`]. So a candidate with shorter rings keeps more units, as it would in
//! use. The fastest of many is often the luckiest, so it is no answer yet: it is measured again beside the default, the two
//! started anew in turn. It becomes the answer if it is faster by 3 % in four of up to five rounds; else the next fastest has its
//! turn, up to three of them. If none is clearly faster, the answer is the default. The default is also the answer
//! if the search is stopped early.
//!
//! # Example
//! The program starts itself again to measure. The call of [`worker()`] at the top of its `main` takes over in those processes:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use layer_streamer::{
//!     Checkpoint, Error, LayerStreamer, Plan,
//!     device::{Cpu, Device},
//!     plan::{Bandwidths, Budget, FixedOverhead},
//!     tuner::{self, Candidates, SearchEvent, Tuner, Values},
//! };
//!
//! fn main() -> Result<(), Error> {
//!     tuner::worker(|placement| {
//!         let checkpoint = Checkpoint::open("model")?;
//!         let mut units = checkpoint.layers()?;
//!         placement.apply_to(&mut units)?;
//!         let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &placement.settings)?;
//!         let stream = Cpu.stream()?;
//!         // One pass. On a GPU it ends with `device.drain(&stream)`.
//!         Ok::<_, Error>(move || streamer.run_pass(&stream, (), |(), _layer| Ok::<_, Error>(/* compute here */ ())))
//!     });
//!     let (checkpoint, overhead, bandwidths) = (Checkpoint::open("model")?, FixedOverhead::default(), Bandwidths::default());
//!     let (mut units, budget) = (checkpoint.layers()?, Budget::free(&Cpu)?);
//!     let default = budget.plan(&checkpoint, &units, overhead, bandwidths)?;
//!     let values = Values { n_gpu: vec![1, 2, 4], n_cpu_pinned: vec![0, 1, 2, 4, 8], ..Values::default() };
//!     let candidates = Candidates::new(default.into(), &values, |settings| {
//!         Ok(budget.plan_with(&checkpoint, &units, overhead, bandwidths, settings)?.into())
//!     })?;
//!     let tuner = Tuner { candidates: candidates.all, record: Some("tuned.json".into()), ..Tuner::default() };
//!     let ranking = tuner.run(|event| {
//!         if let SearchEvent::Ended { trial, best: true } = event {
//!             println!("best so far: {:?}", trial.placement);
//!         }
//!         ControlFlow::Continue(())
//!     })?;
//!     if let Some(answer) = &ranking.answer {
//!         println!("{:?} at {:.3} s a pass: {:?}", answer.placement, answer.seconds, answer.verdict);
//!         answer.placement.apply_to(&mut units)?;
//!     }
//!     Ok(())
//! }
//! ```

mod candidates;
mod comparison;
mod grid;
mod process;
mod record;
mod search;
mod simulation;
#[cfg(test)]
mod tests;
mod verdict;
mod worker;

use std::{
    env,
    ffi::OsString,
    ops::ControlFlow,
    path::PathBuf,
    time::{Duration, Instant},
};

pub use candidates::{Candidate, Candidates, Refusal};
pub use grid::Values;
pub use record::{Answer, CheckpointId, Outcome, Record, Trial, machine};
pub use verdict::{Comparison, Round};
pub use worker::worker;

use self::{
    process::{End, Limits},
    record::RecordFile,
    search::Order,
    worker::Task,
};
use crate::{
    error::{Error, Result},
    plan::{Bandwidths, Budget, Placement},
};

/// How to go through the candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Search {
    /// All of them.
    #[default]
    Grid,
    /// Those that may be the fastest by a forecast, which learns from each that is measured: at most a third of them, but at
    /// least four. The first three, which tell most, are the default and those with the shortest and the longest rings: a search
    /// that ends with these has found little.
    Plan {
        /// What the links carry. A factor of two off is no harm.
        bandwidths: Bandwidths,
    },
}

/// A search for the fastest placement.
#[derive(Clone, Debug)]
pub struct Tuner {
    /// What to try, such as [`Candidates::all`]: the first is the default, and no two may be the same.
    pub candidates: Vec<Candidate>,
    /// In which order, and how many.
    pub search: Search,
    /// Runs of each candidate, at least 2. The first is not measured.
    pub runs: usize,
    /// Pause between runs. Buffers fill up meanwhile, which makes the next run faster than it would be without.
    pub sleep: Duration,
    /// A candidate's worker is ended when a measured run takes more than the best mean so far and of it 10 %, or thrice the
    /// relative spread seen if that is more. `strict`: whenever it takes more than the best mean, which may well discard
    /// the true best, as no two runs take the same time.
    pub strict: bool,
    /// When to stop searching. The fastest found is then still compared with the default.
    pub time_limit: Option<Duration>,
    /// How long the set-up and each run may take before the worker counts as hung.
    pub patience: Duration,
    /// Private memory that a worker may have, in bytes (RLIMIT_DATA). Drivers of GPUs may reserve more than they use.
    pub memory_limit: Option<u64>,
    /// A file to keep what was measured in, written after each candidate. If it is there already, the search goes on from
    /// it and repeats none: a [`Record`].
    pub record: Option<PathBuf>,
    /// For the record: what computes.
    pub device: String,
    /// For the record: what is streamed.
    pub checkpoint: CheckpointId,
    /// For the record: the memory that the candidates were planned for.
    pub budget: Option<Budget>,
    /// For the record: what the planner took the links to carry.
    pub bandwidths: Option<Bandwidths>,
    /// The arguments that workers are started with; those of this process if `None`.
    pub arguments: Option<Vec<OsString>>,
}

impl Default for Tuner {
    /// No candidates yet; one run to warm up and three that count.
    fn default() -> Self {
        Self {
            candidates: Vec::new(),
            search: Search::Grid,
            runs: 4,
            sleep: Duration::ZERO,
            strict: false,
            time_limit: None,
            patience: Duration::from_secs(600),
            memory_limit: None,
            record: None,
            device: String::new(),
            checkpoint: CheckpointId::default(),
            budget: None,
            bandwidths: None,
            arguments: None,
        }
    }
}

/// What happens during a search.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum SearchEvent<'a> {
    /// A candidate is being tried.
    Begun {
        /// Which.
        placement: &'a Placement,
        /// Its number, from 1, all that were on record included.
        number: usize,
        /// How many there will be at most.
        most: usize,
    },
    /// A run has ended.
    Ran {
        /// Its number, from 1.
        run: usize,
        /// Its time.
        seconds: f64,
    },
    /// A candidate has been tried.
    Ended {
        /// What came of it.
        trial: &'a Trial,
        /// Whether it is the fastest so far.
        best: bool,
    },
    /// A candidate was faster than the default, and the two are being measured again.
    Comparing {
        /// Which.
        challenger: &'a Placement,
        /// The round's number, from 1.
        round: usize,
    },
    /// Such a round has ended.
    Compared {
        /// What came of it.
        round: &'a Round,
    },
    /// Nothing new; at least every tenth of a second, so that the caller can say whether to go on.
    Waiting,
}

/// Why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All were tried, or as many as such a search may try, or there was nothing left that is worth it.
    Complete,
    /// The time was up.
    TimeUp,
    /// The caller did not want it to go on.
    Cancelled,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// The fastest first, then those that were stopped, then those that were refused; with those on record.
    pub trials: Vec<Trial>,
    /// How many candidates there are, those on record included.
    pub candidates: usize,
    /// What to use; `None` if nothing could be measured.
    pub answer: Option<Answer>,
    /// Why it ended.
    pub ended: Ended,
}

impl Ranking {
    /// The fastest by the search alone, which may be so by luck: [`answer`](Self::answer) says what to use.
    pub fn fastest(&self) -> Option<&Trial> {
        self.trials.first().filter(|trial| trial.seconds().is_some())
    }
}

/// A search under way.
struct Searching<'t> {
    tuner: &'t Tuner,
    arguments: Vec<OsString>,
    record: Record,
    place: Option<RecordFile>,
    until: Option<Instant>,
}

impl Tuner {
    /// Searches. `hook` is told what happens, and asked a few times a second, whether to go on.
    ///
    /// A candidate that cannot be measured is no error: the ranking has the reason.
    ///
    /// # Errors
    /// [`Error::Setting`] for options that make no sense, for a record of another search or one that is under way, and in a
    /// process that is a worker itself; [`Error::Io`] if the record cannot be read or written, or a worker not be started.
    pub fn run(&self, mut hook: impl FnMut(SearchEvent<'_>) -> ControlFlow<()>) -> Result<Ranking> {
        let mut order = self.check()?;
        let (record, place) = self.record()?;
        let mut searching = Searching {
            tuner: self,
            arguments: self.arguments.clone().unwrap_or_else(|| env::args_os().skip(1).collect()),
            record,
            place,
            until: self.time_limit.and_then(|limit| Instant::now().checked_add(limit)),
        };
        let known = |trial: &&Trial| self.candidates.iter().any(|candidate| candidate.placement == trial.placement);
        let others = searching.record.trials.len() - searching.record.trials.iter().filter(known).count();
        let mut ended = searching.search(&mut order, others, &mut hook)?;
        if ended != Ended::Cancelled && !searching.compare(&mut hook)? {
            ended = Ended::Cancelled;
        }
        let Record { mut trials, answer, .. } = searching.record;
        trials.sort_by_key(Trial::rank);
        Ok(Ranking { trials, candidates: self.candidates.len() + others, answer, ended })
    }

    /// Checks the options.
    fn check(&self) -> Result<Order> {
        if worker::is_worker() {
            let cause = "this process is a worker of another one; call tuner::worker first of all in main";
            return Err(Error::setting("tuner", cause));
        }
        if self.runs < 2 {
            return Err(Error::setting("runs", format!("is {}, but the first is not measured; at least 2", self.runs)));
        }
        if self.candidates.is_empty() {
            return Err(Error::setting("candidates", "there must be at least one, the default"));
        }
        for (number, candidate) in self.candidates.iter().enumerate() {
            candidate.placement.settings.validate()?;
            if self.candidates[..number].iter().any(|other| other.placement == candidate.placement) {
                return Err(Error::setting("candidates", format!("number {number} is there twice")));
            }
        }
        match self.search {
            Search::Grid => Ok(Order::Grid),
            Search::Plan { bandwidths: bandwidths @ Bandwidths { disk, copy } } => {
                if ![disk, copy].iter().all(|bandwidth| bandwidth.is_finite() && *bandwidth > 0.0) {
                    let cause =
                        format!("are {disk} and {copy} bytes a second; each must be more than nothing, and finite");
                    return Err(Error::setting("bandwidths", cause));
                }
                Order::planned(&self.candidates, bandwidths, self.runs, self.sleep.as_secs_f64())
            }
        }
    }

    /// What is on record, and where that is kept.
    fn record(&self) -> Result<(Record, Option<RecordFile>)> {
        let mut record = Record {
            device: self.device.clone(),
            checkpoint: self.checkpoint.clone(),
            budget: self.budget,
            bandwidths: self.bandwidths,
            runs: self.runs,
            sleep: self.sleep.as_secs_f64(),
            strict: self.strict,
            default: self.candidates[0].placement.clone(),
            ..Record::new(machine())
        };
        let mut place = self.record.as_deref().map(RecordFile::take).transpose()?;
        if let Some(path) = &self.record {
            (record.trials, record.rounds) = record.resume(path)?;
        }
        record.set_answer(&self.candidates[0], Comparison::Unfinished);
        // A place that cannot be written to is known before the long work.
        place.iter_mut().try_for_each(|place| place.write(&record))?;
        Ok((record, place))
    }
}

impl Searching<'_> {
    /// Tries candidates, until all that are worth it are tried. `others`: how many are on record besides.
    fn search(
        &mut self,
        order: &mut Order,
        others: usize,
        hook: &mut impl FnMut(SearchEvent<'_>) -> ControlFlow<()>,
    ) -> Result<Ended> {
        let candidates = &self.tuner.candidates;
        let (most, until) = (order.most(candidates.len()) + others, self.until);
        let in_time = || until.is_none_or(|until| Instant::now() < until);
        loop {
            let mut cancelled = false;
            let next = order.next(candidates, &self.record, || {
                cancelled |= hook(SearchEvent::Waiting).is_break();
                !cancelled && in_time()
            });
            if cancelled {
                return Ok(Ended::Cancelled);
            }
            let Some(next) = next else { return Ok(Ended::Complete) };
            if !in_time() {
                return Ok(Ended::TimeUp);
            }
            let placement = &candidates[next].placement;
            let number = self.record.trials.len() + 1;
            if hook(SearchEvent::Begun { placement, number, most: most.max(number) }).is_break() {
                return Ok(Ended::Cancelled);
            }
            let limit = self.record.limit(self.tuner.strict);
            let trial = self.measure(placement, limit, |event| {
                cancelled |= hook(event).is_break();
                !cancelled && in_time()
            })?;
            let Some(trial) = trial else { return Ok(if cancelled { Ended::Cancelled } else { Ended::TimeUp }) };
            self.record.trials.push(trial);
            self.record.set_answer(&candidates[0], Comparison::Unfinished);
            self.write()?;
            let trial = self.record.trials.last().expect("it was pushed");
            let best = self.record.best_trial().is_some_and(|best| best.placement == *placement);
            if hook(SearchEvent::Ended { trial, best }).is_break() {
                return Ok(Ended::Cancelled);
            }
        }
    }

    /// Measures a placement in a process of its own; `None` if `goes_on` wanted it no more. A measured run of more than
    /// `limit` seconds ends it.
    fn measure(
        &self,
        placement: &Placement,
        limit: Option<f64>,
        mut goes_on: impl FnMut(SearchEvent<'_>) -> bool,
    ) -> Result<Option<Trial>> {
        let limits = Limits {
            arguments: &self.arguments,
            patience: self.tuner.patience,
            memory: self.tuner.memory_limit,
            measured: limit,
        };
        let task = Task { placement: placement.clone(), runs: self.tuner.runs, sleep: self.record.sleep };
        let measured = process::measure(&task, &limits, |ran| {
            goes_on(ran.map_or(SearchEvent::Waiting, |(run, seconds)| SearchEvent::Ran { run, seconds }))
        });
        let (runs, end) = measured.map_err(Error::io("start a worker of", "/proc/self/exe"))?;
        let outcome = match end {
            End::Done => Outcome::Done,
            End::Stopped(limit) => Outcome::Stopped { limit },
            End::Refused(reason) => Outcome::Refused { reason },
            End::Interrupted => return Ok(None),
        };
        Ok(Some(Trial { placement: task.placement, runs, outcome }))
    }

    fn write(&mut self) -> Result<()> {
        self.place.iter_mut().try_for_each(|place| place.write(&self.record))
    }
}
