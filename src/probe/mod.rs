//! A probe: what disk and link carry, measured in well under a second, and kept for the next start.
//!
//! A probe reads and copies in short windows. Where the windows differ, or the kernel tells that others have the processors or the
//! disk, it was disturbed: it goes on for about a second in search of a calm stretch, and what it finds otherwise is kept for ten
//! minutes in place of thirty days. Later passes are compared with the probe ([`Probe::observe`]): a short
//! probe cannot see a disk that slows down after a second, or a machine that was slow all the while.

mod judge;
mod kept;
mod load;
mod measure;

use std::{fmt, path::PathBuf, time::SystemTime};

use judge::Judgement;

use crate::{
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, Result},
    plan::{Bandwidths, BindingLink},
};

/// What the disk of a checkpoint's largest file and the way to a device carry, when that was measured, and how far to trust it.
///
/// ```no_run
/// use layer_streamer::{Checkpoint, device::Cpu, probe::{Probe, Seen}};
///
/// let checkpoint = Checkpoint::open("examples/speller")?;
/// if let Some(probe) = Probe::recent(&Cpu, &checkpoint)? {
///     println!("{:.2} GB/s from disk, measured {}", probe.bandwidths().disk / 1e9, probe.age());
///     // … plan by it and run; then, with what steady passes moved:
///     let disk = Seen { bytes: 30_000_000_000, seconds: 11.0, bound: true };
///     if let Some(disagreement) = probe.observe(Some(disk), None) {
///         eprintln!("{disagreement}");
///     }
/// }
/// # Ok::<_, layer_streamer::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    verdict: Judgement,
    taken: SystemTime,
    /// The file that it is kept in.
    kept: Option<PathBuf>,
}

impl Probe {
    /// The probe that is kept for this machine, the checkpoint's file system and this device in the user's cache folder
    /// (`$XDG_CACHE_HOME` or `~/.cache`), if it is at most thirty days old (ten minutes, if it was disturbed).
    pub fn kept<D: Device>(device: &D, checkpoint: &Checkpoint) -> Option<Self> {
        let (_, kept) = subject(device, checkpoint);
        kept.as_deref().and_then(kept::recall)
    }

    /// The probe that is [kept](Self::kept), or else a [new one](Self::measure).
    ///
    /// # Errors
    /// As [`Probe::measure`].
    pub fn recent<D: Device>(device: &D, checkpoint: &Checkpoint) -> Result<Option<Self>> {
        match Self::kept(device, checkpoint) {
            Some(probe) => Ok(Some(probe)),
            None => Self::measure(device, checkpoint),
        }
    }

    /// Measures anew, and keeps the result in the user's cache folder where that can be written. Takes about half a second, and
    /// somewhat more than one where others disturb it. `None` where there is no memory to try it with.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Read`] where the file cannot be read, or the device's own.
    pub fn measure<D: Device>(device: &D, checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let (file, kept) = subject(device, checkpoint);
        let verdict = match measure::measure(device, checkpoint, file) {
            Err(Error::Memory { .. }) => return Ok(None),
            found => found?,
        };
        let probe = Self { verdict, taken: SystemTime::now(), kept };
        // What cannot be kept is measured again.
        let _ = kept::keep(&probe);
        Ok(Some(probe))
    }

    /// The rates, in bytes per second: those of the fastest windows that agree, since contention only ever lowers a rate.
    pub fn bandwidths(&self) -> Bandwidths {
        self.verdict.bandwidths
    }

    /// How far the windows differ: their median distance from each rate, relative to it. 0.02 is calm, 0.15 is not.
    pub fn spread(&self) -> Bandwidths {
        self.verdict.spread
    }

    /// What disturbed it, in words, if anything did. The rates may then be too low.
    pub fn disturbed(&self) -> Option<&str> {
        self.verdict.disturbed.as_deref()
    }

    /// When it was measured.
    pub fn taken(&self) -> SystemTime {
        self.taken
    }

    /// How long ago it was measured, in words such as "just now" or "3 days ago".
    pub fn age(&self) -> String {
        let minutes = self.taken.elapsed().map_or(0, |age| age.as_secs() / 60);
        let (count, unit) = match minutes {
            0 => return "just now".into(),
            1..60 => (minutes, "minute"),
            60..1440 => (minutes / 60, "hour"),
            _ => (minutes / 1440, "day"),
        };
        format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
    }

    /// Whether passes show that a rate is wrong by a quarter or more, either way. A link that moved more than the probe says
    /// always counts; one that moved less only where it was [bound](Seen::bound), since else it may have had nothing to do. Less
    /// than a gigabyte or a second tells nothing.
    pub fn disagreement(&self, disk: Option<Seen>, copy: Option<Seen>) -> Option<Disagreement> {
        let Bandwidths { disk: reads, copy: copies } = self.bandwidths();
        [(BindingLink::Disk, disk, reads), (BindingLink::Copy, copy, copies)].into_iter().find_map(
            |(link, seen, probed)| {
                let Seen { bytes, seconds, bound } = seen?;
                let rate = bytes as f64 / seconds;
                let wrong = rate >= probed * WRONG || (bound && rate <= probed / WRONG);
                (bytes >= ENOUGH_BYTES && seconds >= ENOUGH_SECONDS && wrong).then(|| Disagreement {
                    link,
                    probed,
                    seen: rate,
                    age: self.age(),
                })
            },
        )
    }

    /// As [`disagreement`](Self::disagreement). Where there is one, the probe is no longer kept, and the next start measures anew.
    pub fn observe(&self, disk: Option<Seen>, copy: Option<Seen>) -> Option<Disagreement> {
        let found = self.disagreement(disk, copy);
        if found.is_some() {
            kept::forget(self);
        }
        found
    }
}

/// By what factor a rate is wrong, and how much passes must have moved, and in how long, to tell.
const WRONG: f64 = 1.25;
const ENOUGH_BYTES: u64 = 1_000_000_000;
const ENOUGH_SECONDS: f64 = 1.0;

/// What steady passes moved over a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Bytes that went over it; for the disk only those read past the page cache.
    pub bytes: u64,
    /// How long it was at work for them, or all the passes' time. Too long a time only hides that the link is faster than the
    /// probe says, unless `bound` is set.
    pub seconds: f64,
    /// The passes waited for this link, and `seconds` is what that took: the link was busy all the time.
    pub bound: bool,
}

/// A probe that passes have shown to be wrong. Prints as a sentence.
#[derive(Clone, Debug, PartialEq)]
pub struct Disagreement {
    /// The link.
    pub link: BindingLink,
    /// What the probe says, in bytes per second.
    pub probed: f64,
    /// What passes moved.
    pub seen: f64,
    /// How old the probe is, in words.
    pub age: String,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { link, probed, seen, age } = self;
        let did = match link {
            BindingLink::Disk => "read from disk",
            BindingLink::Copy => "copied to the device",
        };
        let [probed, seen] = [probed, seen].map(|rate| rate / 1e9);
        write!(f, "passes {did} at {seen:.2} GB/s, not at {probed:.2} as measured {age}: the next start measures anew")
    }
}

/// What is probed, the largest file, and where the result is kept.
fn subject<D: Device>(device: &D, checkpoint: &Checkpoint) -> (usize, Option<PathBuf>) {
    let file = (0..checkpoint.files().len()).max_by_key(|&file| checkpoint.length(file)).unwrap_or(0);
    (file, kept::path(&checkpoint.files()[file], &device.describe()))
}

#[cfg(test)]
mod tests;
