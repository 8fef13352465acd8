//! What was measured, as JSON: a search can be resumed from it, and its result used.

use std::{
    fmt,
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{
    Candidate,
    verdict::{Comparison, Round, WORTH, median},
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    files,
    plan::{Bandwidths, Budget, Cost, Part, Placement, fastest},
};

/// The number of the format that records have now.
const FORMAT: u32 = 3;

/// Bytes of a record, at most: every run of thousands of candidates.
const LONGEST: u64 = 64 << 20;

/// What a search has found out so far, and on what.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The number of the file's format.
    pub(super) format: u32,
    /// The machine: its name, processor and kernel.
    pub machine: String,
    /// The device, as the host describes it.
    pub device: String,
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// The memory that the candidates were planned for.
    pub budget: Option<Budget>,
    /// What the planner took the links to carry.
    pub bandwidths: Option<Bandwidths>,
    /// Runs of each candidate, the first of which is not measured.
    pub runs: usize,
    /// Seconds between runs.
    pub sleep: f64,
    /// Whether candidates were stopped strictly.
    pub strict: bool,
    /// What the planner chooses by itself.
    pub default: Placement,
    /// What to use, as far as is known; `None` until something was measured.
    pub answer: Option<Answer>,
    /// The candidates in the order in which they were tried.
    pub trials: Vec<Trial>,
    /// How the fastest of them did against the default.
    pub rounds: Vec<Round>,
}

/// What a checkpoint is told from others by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointId {
    /// For people, such as its folder.
    pub name: String,
    /// How many layers it has.
    pub layers: usize,
    /// Bytes of all its tensors.
    pub bytes: u64,
}

impl CheckpointId {
    /// Of a checkpoint with so many layers.
    pub fn new(name: impl Into<String>, checkpoint: &Checkpoint, layers: usize) -> Self {
        let tensors = checkpoint.names().filter_map(|name| checkpoint.describe(name));
        let bytes = tensors.filter_map(|(dtype, shape)| dtype.bytes_of(shape)).map(|bytes| bytes as u64).sum();
        Self { name: name.into(), layers, bytes }
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} layers, {} bytes)", self.name, self.layers, self.bytes)
    }
}

/// What to use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// The rings, and where units are kept.
    pub placement: Placement,
    /// Why this and no other.
    pub verdict: Comparison,
    /// Mean seconds of a pass, as the search measured it.
    pub seconds: f64,
    /// What it takes of the device's memory, in bytes; of a device that computes in RAM, of that.
    pub device_bytes: usize,
    /// What it takes of RAM besides.
    pub host_bytes: usize,
}

/// A candidate that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The rings, and where units are kept.
    pub placement: Placement,
    /// Seconds of every run that ended, the first of which does not count.
    pub runs: Vec<f64>,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a trial ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All runs were measured.
    Done,
    /// A measured run took more than so many seconds, clearly more than the best so far.
    Stopped {
        /// The limit.
        limit: f64,
    },
    /// There is no time for this placement.
    Refused {
        /// Why: the host's error, or how the process ended.
        reason: String,
    },
}

impl Trial {
    /// Seconds of the measured runs.
    pub fn measured(&self) -> &[f64] {
        self.runs.get(1..).unwrap_or(&[])
    }

    /// Mean seconds of a run, if all were measured.
    pub fn seconds(&self) -> Option<f64> {
        let measured = self.measured();
        (self.outcome == Outcome::Done && !measured.is_empty())
            .then(|| measured.iter().sum::<f64>() / measured.len() as f64)
    }

    /// The fastest and the slowest measured run, if all were measured.
    pub fn extremes(&self) -> Option<[f64; 2]> {
        self.seconds()?;
        Some([f64::min, f64::max].map(|of| self.measured().iter().copied().reduce(of).expect("there is one")))
    }

    /// Median seconds of the measured runs, if all were.
    pub(super) fn typical(&self) -> Option<f64> {
        self.seconds()?;
        Some(median(&mut self.measured().to_vec()))
    }

    /// How far its runs differ: their standard deviation, relative to their mean. 0 for fewer than two.
    fn spread(&self) -> f64 {
        let (measured, mean) = (self.measured(), self.seconds().unwrap_or(f64::INFINITY));
        let squares: f64 = measured.iter().map(|seconds| (seconds / mean - 1.0).powi(2)).sum();
        if measured.len() < 2 { 0.0 } else { (squares / (measured.len() - 1) as f64).sqrt() }
    }

    /// Fastest first, then those that were stopped, then those refused.
    pub(super) fn rank(&self) -> (u8, Cost) {
        let (class, seconds) = match (&self.outcome, self.seconds()) {
            (_, Some(seconds)) => (0, seconds),
            (Outcome::Stopped { limit }, _) => (1, self.measured().iter().copied().fold(*limit, f64::max)),
            _ => (2, 0.0),
        };
        (class, Cost::of_seconds(seconds))
    }
}

impl Record {
    /// An empty one.
    pub(super) fn new(machine: String) -> Self {
        Self { format: FORMAT, machine, ..Self::default() }
    }

    /// Reads a record that a search left.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Setting`] for a file that is no record, or one of another version of this crate.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        /// What records of all versions have.
        #[derive(Deserialize)]
        struct AnyVersion {
            /// The first had none.
            #[serde(default = "first")]
            format: u32,
            #[serde(rename = "machine")]
            _machine: String,
            #[serde(rename = "trials")]
            _trials: Vec<IgnoredAny>,
        }
        fn first() -> u32 {
            1
        }
        let path = path.as_ref();
        let text = files::read_up_to(path, LONGEST)?
            .ok_or_else(|| Error::io("read", path)(io::Error::from_raw_os_error(libc::ENOENT)))?;
        let wrong = |cause: String| Error::setting("record", format!("{}: {cause}", path.display()));
        let none = |error: serde_json::Error| wrong(format!("is no record of a search: {error}"));
        let format = serde_json::from_slice::<AnyVersion>(&text).map_err(none)?.format;
        if format != FORMAT {
            let cause = format!("was written by another version (format {format}, not {FORMAT})");
            return Err(wrong(format!("{cause}; remove it and search again")));
        }
        let record: Self = serde_json::from_slice(&text).map_err(none)?;
        let runs = record.trials.iter().flat_map(|trial| &trial.runs);
        if !runs.chain(record.rounds.iter().flat_map(|round| round.seconds.iter().flatten())).all(|run| *run >= 0.0) {
            return Err(wrong("has a run of less than no time".into()));
        }
        Ok(record)
    }

    /// The answer, if it is for this checkpoint; `path` is where the record was read from, for messages.
    ///
    /// # Errors
    /// [`Error::Setting`] for another checkpoint, or where the search has found nothing that works.
    pub fn answer_for(&self, checkpoint: &CheckpointId, path: &Path) -> Result<&Answer> {
        let wrong = |cause: String| Error::setting("record", format!("{}: {cause}", path.display()));
        let Self { checkpoint: known, .. } = self;
        if (known.layers, known.bytes) != (checkpoint.layers, checkpoint.bytes) {
            let cause = format!("was found for {known}, and this is {checkpoint}");
            return Err(wrong(format!("{cause}; name the record of this checkpoint, or search with it")));
        }
        self.answer.as_ref().ok_or_else(|| wrong("the search has found no settings that work; go on with it".into()))
    }

    /// What was found, if it was the same that is wanted now; nothing if there is no such file yet.
    pub(super) fn resume(&self, path: &Path) -> Result<(Vec<Trial>, Vec<Round>)> {
        if !path.try_exists().map_err(Error::io("look for", path))? {
            return Ok(Default::default());
        }
        let found = Self::read(path)?;
        let same = |what: &str, then: &dyn fmt::Debug, now: &dyn fmt::Debug| {
            let (then, now) = (format!("{then:?}"), format!("{now:?}"));
            (then == now).then_some(()).ok_or_else(|| {
                let cause = format!("holds another search, whose {what} was {then}, not {now}");
                Error::setting("record", format!("{}: {cause}; remove it, or name another file", path.display()))
            })
        };
        same("machine", &found.machine, &self.machine)?;
        same("device", &found.device, &self.device)?;
        same("checkpoint", &found.checkpoint.to_string(), &self.checkpoint.to_string())?;
        same("budget", &found.budget, &self.budget)?;
        same("number of runs", &found.runs, &self.runs)?;
        same("pause between runs", &found.sleep, &self.sleep)?;
        same("strictness", &found.strict, &self.strict)?;
        same("default", &found.default, &self.default)?;
        Ok((found.trials, found.rounds))
    }

    /// The trial of this placement.
    pub(super) fn trial_of(&self, placement: &Placement) -> Option<&Trial> {
        self.trials.iter().find(|trial| trial.placement == *placement)
    }

    /// The rounds in which this one was compared with the default, by their seconds.
    pub(super) fn rounds_of(&self, challenger: &Placement) -> Vec<Option<[f64; 2]>> {
        self.rounds.iter().filter(|round| round.challenger == *challenger).map(|round| round.seconds).collect()
    }

    /// Mean seconds of the default, if it was measured.
    pub(super) fn default_seconds(&self) -> Option<f64> {
        self.trial_of(&self.default)?.seconds()
    }

    /// The trials that were so much faster than the default that it is worth finding out whether they are always, the fastest
    /// first.
    pub(super) fn faster(&self) -> Vec<&Trial> {
        let Some(limit) = self.default_seconds() else { return Vec::new() };
        let seconds = |trial: &Trial| trial.seconds().unwrap_or(f64::INFINITY);
        let mut faster: Vec<_> = self.trials.iter().filter(|trial| seconds(trial) < limit * (1.0 - WORTH)).collect();
        faster.sort_by_key(|trial| Cost::of_seconds(seconds(trial)));
        faster
    }

    /// Sets the answer to this candidate's placement, which was measured.
    pub(super) fn set_answer(&mut self, candidate: &Candidate, verdict: Comparison) {
        let Some(seconds) = self.trial_of(&candidate.placement).and_then(Trial::seconds) else { return };
        let [device_bytes, host_bytes] = Part::totals(&candidate.memory);
        let placement = candidate.placement.clone();
        self.answer = Some(Answer { placement, verdict, seconds, device_bytes, host_bytes });
    }

    /// The fastest trial.
    pub(super) fn best_trial(&self) -> Option<&Trial> {
        fastest(self.trials.iter().filter_map(|trial| Some((Cost::of_seconds(trial.seconds()?), trial))), 0.0)
    }

    /// How long a measured run may take: the best so far, and of it 10 %, or thrice the spread seen if that is more; with
    /// `strict` not more than the best.
    pub(super) fn limit(&self, strict: bool) -> Option<f64> {
        let best = self.best_trial()?;
        let seconds = best.seconds()?;
        let mut spreads: Vec<_> =
            self.trials.iter().filter(|trial| trial.seconds().is_some()).map(Trial::spread).collect();
        spreads.sort_unstable_by(f64::total_cmp);
        // The median, as one disturbed trial must not open the door to all others; and the best one's own: it may be the best
        // by luck, such as buffers that filled up while the run before was disturbed, and must not close it to them.
        let spread = spreads[spreads.len() / 2].max(best.spread());
        Some(if strict { seconds } else { seconds * (1.0 + (3.0 * spread).max(0.1)) })
    }
}

/// A record's file, of one search at a time: whichever file is at the path is locked by it, before it is there.
pub(super) struct RecordFile {
    path: PathBuf,
    locked: Option<Locked>,
}

impl RecordFile {
    /// Takes the place for a search.
    pub(super) fn take(path: &Path) -> Result<Self> {
        let file = match File::open(path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let locked = file.map(|file| Locked::new(file, path)).transpose()?;
        Ok(Self { path: path.to_owned(), locked })
    }

    /// Writes the record, whole or not at all.
    pub(super) fn write(&mut self, record: &Record) -> Result<()> {
        let text = serde_json::to_string_pretty(record)
            .map_err(|error| Error::setting("record", format!("cannot be written: {error}")))?;
        let mut partial = self.path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let failed = |error| Error::io("write", &self.path)(error);
        let file = File::options().create(true).truncate(false).write(true).open(&partial).map_err(failed)?;
        let locked = Locked::new(file, &self.path)?;
        let replace = || {
            locked.0.set_len(0)?;
            (&locked.0).write_all((text + "\n").as_bytes())?;
            fs::rename(&partial, &self.path)
        };
        if let Err(error) = replace() {
            // There may be nothing to remove.
            let _ = fs::remove_file(&partial);
            return Err(failed(error));
        }
        self.locked = Some(locked);
        Ok(())
    }
}

/// A file that is locked until this is dropped. Closing it is not enough: a child that is being started has it open too for a moment.
struct Locked(File);

impl Locked {
    /// Locks the file of the record at `path`.
    fn new(file: File, path: &Path) -> Result<Self> {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let cause = "another search is writing to it; wait for its end, or name another file";
                Err(Error::setting("record", format!("{}: {cause}", path.display())))
            }
            // Not every file system has locks.
            _ => Ok(Self(file)),
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// This machine, for people and to tell it from others: its name, processor and kernel.
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!(
        "{}, {} ({threads} threads), Linux {}",
        read("/proc/sys/kernel/hostname").trim(),
        model.map_or(std::env::consts::ARCH, |(_, model)| model.trim()),
        read("/proc/sys/kernel/osrelease").trim(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(n_gpu: usize, runs: &[f64], outcome: Outcome) -> Trial {
        let settings = crate::plan::Settings { n_gpu, ..Default::default() };
        Trial { placement: Placement { settings, ..Placement::default() }, runs: runs.to_vec(), outcome }
    }

    fn record(trials: &[Trial]) -> Record {
        Record { runs: 3, trials: trials.to_vec(), ..Record::new(machine()) }
    }

    #[test]
    fn the_limit_is_a_tenth_or_thrice_the_spread_over_the_best() {
        assert_eq!(record(&[]).limit(false), None);
        let stopped = trial(9, &[1.0, 0.1], Outcome::Stopped { limit: 0.05 });
        let calm = trial(1, &[9.0, 2.0, 2.0], Outcome::Done);
        assert_eq!(record(std::slice::from_ref(&stopped)).limit(false), None);
        let found = record(&[stopped.clone(), calm.clone()]);
        assert!((found.limit(false).unwrap() - 2.2).abs() < 1e-9 && found.limit(true) == Some(2.0));
        // A standard deviation of a tenth of the mean.
        let uneven = trial(2, &[0.1, 3.0 - 0.3 / 2f64.sqrt(), 3.0 + 0.3 / 2f64.sqrt()], Outcome::Done);
        let found = record(&[uneven.clone(), calm.clone(), uneven.clone()]);
        assert!((found.limit(false).unwrap() - 2.0 * 1.3).abs() < 1e-9, "{:?}", found.limit(false));
        let disturbed = record(&[calm.clone(), uneven, calm.clone()]);
        assert!((disturbed.limit(false).unwrap() - 2.2).abs() < 1e-9, "one is an accident");
        let lucky = trial(3, &[4.0, 1.7, 1.9], Outcome::Done);
        let limit = record(&[calm.clone(), calm, lucky]).limit(false).unwrap();
        assert!(limit > 2.2 && limit < 2.3, "{limit} s end what is as fast without luck");
    }

    #[test]
    fn an_answer_is_for_its_checkpoint_wherever_that_lies() {
        let id = CheckpointId { name: "/a/model".into(), layers: 8, bytes: 1000 };
        let mut found = Record { checkpoint: id.clone(), ..record(&[trial(1, &[1.0, 2.0], Outcome::Done)]) };
        let said = found.answer_for(&id, Path::new("r")).unwrap_err().to_string();
        assert!(said.contains("r: the search has found no settings"), "{said}");
        let candidate = Candidate::from(found.trials[0].placement.clone());
        found.set_answer(&candidate, Comparison::Kept);
        let moved = CheckpointId { name: "/b".into(), ..id.clone() };
        assert_eq!(found.answer_for(&moved, Path::new("r")).unwrap().placement, candidate.placement);
        for other in [CheckpointId { layers: 9, ..id.clone() }, CheckpointId { bytes: 1001, ..id }] {
            let said = found.answer_for(&other, Path::new("r")).unwrap_err().to_string();
            assert!(said.contains("r: was found for /a/model (8 layers, 1000 bytes)"), "{said}");
            assert!(said.contains(&other.to_string()) && said.contains("search with it"), "{said}");
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written_and_only_for_the_same_search() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        let refused = trial(7, &[], Outcome::Refused { reason: "\"too\nmuch\"".into() });
        let rounds = vec![
            Round { challenger: Placement::default(), seconds: Some([0.5, 0.25]) },
            Round { challenger: Placement::default(), seconds: None },
        ];
        let mut found = Record {
            budget: Some(Budget { device_bytes: None, host_bytes: 7 }),
            bandwidths: Some(Bandwidths::default()),
            rounds,
            ..record(&[
                trial(1, &[0.1, 0.2, 0.3], Outcome::Done),
                refused,
                trial(3, &[1.0], Outcome::Stopped { limit: 0.3 }),
            ])
        };
        let candidate = Candidate::from(found.trials[0].placement.clone());
        found.set_answer(&candidate, Comparison::Faster { ratio: 0.5, won: 4, rounds: 5 });
        assert!(found.answer.is_some());
        assert_eq!(found.resume(&path).unwrap(), Default::default());
        let mut place = RecordFile::take(&path).unwrap();
        for _ in 0..2 {
            place.write(&found).unwrap();
            assert_eq!(Record::read(&path).unwrap(), found);
            let said = RecordFile::take(&path).err().expect("it is taken").to_string();
            assert!(said.contains("record: /") && said.contains("another search is writing to it"), "{said}");
        }
        // A child that is being started has it open too.
        let inherited = place.locked.as_ref().unwrap().0.try_clone().unwrap();
        drop(place);
        drop(RecordFile::take(&path).unwrap());
        drop(inherited);
        assert_eq!(found.resume(&path).unwrap(), (found.trials.clone(), found.rounds.clone()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let other = Record { device: "another".into(), ..found.clone() };
        let said = other.resume(&path).unwrap_err().to_string();
        assert!(said.contains("device was \"\", not \"another\"") && said.contains("remove it"), "{said}");
        let text = serde_json::to_string(&found).unwrap();
        for text in ["", "{}", "[1]", &text.replace("0.2", "-0.2"), &text.replace("\"units\"", "\"unit\"")] {
            fs::write(&path, text).unwrap();
            let said = Record::read(&path).unwrap_err().to_string();
            assert!(said.starts_with("record: /"), "{said}");
        }
        // As the first version wrote it, and as a later one may.
        let first =
            r#"{"machine":"m","device":"d","checkpoint":"c","runs":3,"sleep":0.0,"best":{"n_gpu":1},"trials":[]}"#;
        for text in [first, &text.replace("\"format\":3", "\"format\":4,\"more\":4")] {
            fs::write(&path, text).unwrap();
            let said = Record::read(&path).unwrap_err().to_string();
            assert!(said.contains("another version") && said.contains("remove it and search again"), "{said}");
        }
        assert!(Record::read(folder.path().join("none")).unwrap_err().to_string().contains("cannot read"));
        let nowhere = RecordFile::take(&folder.path().join("no/where")).unwrap().write(&found);
        assert!(nowhere.unwrap_err().to_string().contains("cannot write"));
    }
}
