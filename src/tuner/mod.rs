//! Finds the fastest settings by measuring them, each configuration in a process of its own, so that running out of memory, a
//! crash or a hang costs that configuration alone.
//!
//! The program starts itself again for that. The call of [`worker()`] at the top of its `main` takes over in those processes:
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use layer_streamer::{
//!     Checkpoint, Error, LayerStreamer,
//!     device::{Cpu, Device},
//!     tuner::{self, Event, Tuner, Values},
//! };
//!
//! fn main() -> Result<(), Error> {
//!     tuner::worker(|settings| {
//!         let checkpoint = Checkpoint::open("model")?;
//!         let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &checkpoint.layers()?, &settings)?;
//!         let stream = Cpu.stream()?;
//!         // One pass. On a GPU it ends with `device.drain(&stream)`.
//!         Ok::<_, Error>(move || streamer.run_pass(&stream, (), |(), _layer| Ok::<_, Error>(/* compute here */ ())))
//!     });
//!     let values = Values { n_gpu: vec![1, 2, 4], n_cpu_pinned: vec![0, 1, 2, 4, 8], ..Values::default() };
//!     let tuner = Tuner { values, record: Some("tuned.json".into()), ..Tuner::default() };
//!     let ranking = tuner.run(|event| {
//!         if let Event::Ended { trial, best: true } = event {
//!             println!("best so far: {:?}", trial.settings);
//!         }
//!         ControlFlow::Continue(())
//!     })?;
//!     if let Some(best) = ranking.best() {
//!         println!("{:?} at {:.3} s a pass", best.settings, best.seconds().unwrap_or_default());
//!     }
//!     Ok(())
//! }
//! ```

mod grid;
mod process;
mod record;
mod search;
mod simulation;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    env,
    ffi::OsString,
    ops::ControlFlow,
    path::PathBuf,
    time::{Duration, Instant},
};

pub use grid::Values;
pub use record::{Outcome, Record, Trial};
pub use worker::worker;

use self::{
    process::{End, Limits},
    record::Place,
    search::Order,
    worker::Task,
};
use crate::{
    error::{Error, Result},
    plan::{Bandwidths, Plan, Settings},
};

/// How to go through the configurations.
#[derive(Clone, Debug, Default)]
pub enum Search {
    /// All of them.
    #[default]
    Grid,
    /// Those that may be the fastest by a forecast, which learns from each that is measured: at most a third of them, but at
    /// least three. The first two, which tell most, have the shortest and the longest rings: a search that ends with these has
    /// found little.
    Plan {
        /// Of the same units with any settings: what a pass moves.
        plan: Box<Plan>,
        /// What the links carry. A factor of two off is no harm.
        bandwidths: Bandwidths,
    },
}

/// A search for the fastest settings.
#[derive(Clone, Debug)]
pub struct Tuner {
    /// What to try.
    pub values: Values,
    /// The settings that have no values: how files are read.
    pub common: Settings,
    /// In which order, and how many.
    pub search: Search,
    /// Runs of each configuration, at least 2. The first is not measured.
    pub runs: usize,
    /// Pause between runs. Buffers fill up meanwhile, which makes the next run faster than it would be without.
    pub sleep: Duration,
    /// A configuration's worker is ended when a measured run takes more than the best mean so far and of it 10 %, or thrice the
    /// relative spread seen if that is more. `strict`: whenever it takes more than the best mean, which may well discard
    /// the true best, as no two runs take the same time.
    pub strict: bool,
    /// When to stop searching.
    pub time_limit: Option<Duration>,
    /// How long the set-up and each run may take before the worker counts as hung.
    pub patience: Duration,
    /// Private memory that a worker may have, in bytes (RLIMIT_DATA). Drivers of GPUs may reserve more than they use.
    pub memory_limit: Option<u64>,
    /// A file to keep what was measured in, written after each configuration. If it is there already, the search goes on from
    /// it and repeats none: a [`Record`].
    pub record: Option<PathBuf>,
    /// For the record: what computes.
    pub device: String,
    /// For the record: what is streamed.
    pub checkpoint: String,
    /// The arguments that workers are started with; those of this process if `None`.
    pub arguments: Option<Vec<OsString>>,
}

impl Default for Tuner {
    /// The default settings alone, one run to warm up and three that count.
    fn default() -> Self {
        Self {
            values: Values::default(),
            common: Settings::default(),
            search: Search::Grid,
            runs: 4,
            sleep: Duration::ZERO,
            strict: false,
            time_limit: None,
            patience: Duration::from_secs(600),
            memory_limit: None,
            record: None,
            device: String::new(),
            checkpoint: String::new(),
            arguments: None,
        }
    }
}

/// What happens during a search.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A configuration is being tried.
    Begun {
        /// Its settings.
        settings: &'a Settings,
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
    /// A configuration has been tried.
    Ended {
        /// What came of it.
        trial: &'a Trial,
        /// Whether it is the fastest so far.
        best: bool,
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
    /// How many configurations there are that can differ, those on record included.
    pub configurations: usize,
    /// Why it ended.
    pub ended: Ended,
}

impl Ranking {
    /// The fastest.
    pub fn best(&self) -> Option<&Trial> {
        self.trials.first().filter(|trial| trial.seconds().is_some())
    }
}

impl Tuner {
    /// Searches. `hook` is told what happens, and asked a few times a second, whether to go on.
    ///
    /// A configuration that cannot be measured is no error: the ranking has the reason.
    ///
    /// # Errors
    /// [`Error::Setting`] for options that make no sense, for a record of another search or one that is under way, and in a
    /// process that is a worker itself; [`Error::Io`] if the record cannot be read or written, or a worker not be started.
    pub fn run(&self, mut hook: impl FnMut(Event<'_>) -> ControlFlow<()>) -> Result<Ranking> {
        let (configurations, mut record, mut place) = self.prepare()?;
        let sleep = record.sleep;
        let mut order = match &self.search {
            Search::Grid => Order::Grid,
            Search::Plan { plan, bandwidths } => Order::planned(plan, *bandwidths, &configurations, self.runs, sleep),
        };
        let arguments = self.arguments.clone().unwrap_or_else(|| env::args_os().skip(1).collect());
        let until = self.time_limit.and_then(|limit| Instant::now().checked_add(limit));
        let in_time = || until.is_none_or(|until| Instant::now() < until);
        let others = record.trials.iter().filter(|trial| !configurations.contains(&trial.settings)).count();
        let most = order.most(configurations.len()) + others;
        let ended = loop {
            let mut cancelled = false;
            let mut goes_on = || {
                cancelled |= hook(Event::Waiting).is_break();
                !cancelled && in_time()
            };
            let next = order.next(&configurations, &record, &mut goes_on);
            if cancelled {
                break Ended::Cancelled;
            }
            let Some(next) = next else { break Ended::Complete };
            if !in_time() {
                break Ended::TimeUp;
            }
            let settings = &configurations[next];
            let number = record.trials.len() + 1;
            if hook(Event::Begun { settings, number, most: most.max(number) }).is_break() {
                break Ended::Cancelled;
            }
            let limits = Limits {
                arguments: &arguments,
                patience: self.patience,
                memory: self.memory_limit,
                measured: record.limit(self.strict),
            };
            let task = Task { settings: settings.clone(), runs: self.runs, sleep };
            let measured = process::measure(&task, &limits, |ran| {
                let event = ran.map_or(Event::Waiting, |(run, seconds)| Event::Ran { run, seconds });
                cancelled |= hook(event).is_break();
                !cancelled && in_time()
            });
            let (runs, end) = measured.map_err(Error::io("start a worker of", "/proc/self/exe"))?;
            let outcome = match end {
                End::Done => Outcome::Done,
                End::Stopped(limit) => Outcome::Stopped { limit },
                End::Refused(reason) => Outcome::Refused { reason },
                End::Interrupted => break if cancelled { Ended::Cancelled } else { Ended::TimeUp },
            };
            let before = record.best.take();
            record.trials.push(Trial { settings: settings.clone(), runs, outcome });
            record.best = record.best_trial().map(|trial| trial.settings.clone());
            if let Some(place) = &mut place {
                place.write(&record)?;
            }
            let trial = record.trials.last().expect("it was pushed");
            let best = record.best != before && record.best.as_ref() == Some(settings);
            if hook(Event::Ended { trial, best }).is_break() {
                break Ended::Cancelled;
            }
        };
        let mut trials = record.trials;
        trials.sort_by(|a, b| a.rank().partial_cmp(&b.rank()).expect("seconds are numbers"));
        Ok(Ranking { trials, configurations: configurations.len() + others, ended })
    }

    /// Checks the options; the configurations that can be tried, what is on record, and where that is kept.
    fn prepare(&self) -> Result<(Vec<Settings>, Record, Option<Place>)> {
        if worker::is_worker() {
            let cause = "this process is a worker of another one; call tuner::worker first of all in main";
            return Err(Error::setting("tuner", cause));
        }
        if self.runs < 2 {
            return Err(Error::setting("runs", format!("is {}, but the first is not measured; at least 2", self.runs)));
        }
        if let Search::Plan { bandwidths: Bandwidths { disk, copy }, .. } = self.search
            && ![disk, copy].iter().all(|bandwidth| bandwidth.is_finite() && *bandwidth > 0.0)
        {
            let cause = format!("are {disk} and {copy} bytes a second; each must be more than nothing, and finite");
            return Err(Error::setting("bandwidths", cause));
        }
        let mut configurations = self.values.configurations(&self.common);
        if configurations.is_empty() {
            return Err(Error::setting("values", "each setting must have at least one"));
        }
        let mut record = Record {
            machine: record::machine(),
            device: self.device.clone(),
            checkpoint: self.checkpoint.clone(),
            runs: self.runs,
            sleep: self.sleep.as_secs_f64(),
            strict: self.strict,
            ..Record::default()
        };
        let mut place = self.record.as_deref().map(Place::take).transpose()?;
        if let Some(path) = &self.record {
            record.trials = record.resume(path)?;
            record.best = record.best_trial().map(|trial| trial.settings.clone());
        }
        // What cannot work needs no process to tell, and no plan.
        configurations.retain(|settings| {
            let Err(error) = settings.validate() else { return true };
            if !record.trials.iter().any(|trial| trial.settings == *settings) {
                let outcome = Outcome::Refused { reason: error.to_string() };
                record.trials.push(Trial { settings: settings.clone(), runs: Vec::new(), outcome });
            }
            false
        });
        // A place that cannot be written to is known before the long work.
        place.iter_mut().try_for_each(|place| place.write(&record))?;
        Ok((configurations, record, place))
    }
}
