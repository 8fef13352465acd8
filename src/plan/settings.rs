//! What the caller chooses: how deep the pipeline is, where units live, how files are read.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Unit;
use crate::error::{Error, Result};

/// Where a unit is kept between passes. A unit may be read twice if its memory is not yet faulted in when the first pass reaches
/// it: that pass does not wait where a slot can take the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// On disk: read in every pass.
    #[default]
    Disk,
    /// In pageable RAM: read once, pinned and transferred in every pass.
    Ram,
    /// In pinned RAM: read once, transferred in every pass.
    Pinned,
    /// On the device: read and transferred once.
    Gpu,
}

impl fmt::Display for Tier {
    /// Where: `on disk`, `in RAM`, `in pinned RAM` or `on the device`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "on disk",
            Self::Ram => "in RAM",
            Self::Pinned => "in pinned RAM",
            Self::Gpu => "on the device",
        })
    }
}

impl Tier {
    /// Gives units their tiers from a text such as `0-7=pinned,8-11=gpu,12=ram`; units not named keep theirs.
    ///
    /// # Errors
    /// [`Error::Setting`] for a text of another form, or a unit that there is not.
    pub fn parse(text: &str, units: &mut [Unit]) -> Result<()> {
        Self::assign(text, units, |unit, tier| _ = unit.set_tier(tier))
    }

    /// The same for whatever stands for the units: `give` gives one its tier.
    pub(super) fn assign<U>(text: &str, units: &mut [U], give: impl Fn(&mut U, Self)) -> Result<()> {
        let wrong = |part: &str, cause: String| Error::setting("tier", format!("{part:?}: {cause}"));
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let parsed = part.split_once('=').and_then(|(range, tier)| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let tier = Self::ALL.into_iter().find(|known| known.word() == tier)?;
                Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?, tier))
            });
            let Some((first, last, tier)) = parsed else {
                return Err(wrong(
                    part,
                    "expected UNIT=TIER or FIRST-LAST=TIER, TIER being disk, ram, pinned or gpu".into(),
                ));
            };
            let count = units.len();
            let Some(named) = units.get_mut(first..last.saturating_add(1)).filter(|named| !named.is_empty()) else {
                return Err(wrong(part, format!("there are {count} units, 0 to {}", count.saturating_sub(1))));
            };
            named.iter_mut().for_each(|unit| give(unit, tier));
        }
        Ok(())
    }

    pub(super) const ALL: [Self; 4] = [Self::Disk, Self::Ram, Self::Pinned, Self::Gpu];

    /// As [`parse`](Self::parse) takes it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Ram => "ram",
            Self::Pinned => "pinned",
            Self::Gpu => "gpu",
        }
    }
}

/// Who reads from disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reader {
    /// The first of the others that the system allows.
    #[default]
    Auto,
    /// io_uring with registered buffers, which must fit in RLIMIT_MEMLOCK.
    UringFixed,
    /// io_uring without them.
    Uring,
    /// A few threads in `pread`.
    Pread,
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::UringFixed => "io_uring with registered buffers",
            Self::Uring => "io_uring",
            Self::Pread => "pread threads",
        })
    }
}

/// Whether reads go past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// What the page cache holds is taken from there, everything else is read past it (needs cachestat(2), Linux 6.5; without
    /// it as [`CachePolicy::Direct`]).
    #[default]
    Auto,
    /// Past the page cache where the file system allows it.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// How deep the pipeline is. The names are those of `llm-layer-prefetch`.
///
/// A stage that buffers `n` units owns `n + 1` slots, the extra one being what its consumer holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Units buffered ahead on the device, at least 1; also how many layers a host may hold at once.
    pub n_gpu: usize,
    /// Units buffered in pinned (registered) RAM; 0 skips the stage.
    pub n_cpu_pinned: usize,
    /// Units buffered in pageable RAM; 0 skips the stage.
    pub n_cpu: usize,
    /// Units handed over at once from the device's buffer to the layer function; 0 means one by one; at most `n_gpu`.
    pub batch_gpu: usize,
    /// The same from pinned RAM to the transfer; at most `n_cpu_pinned`.
    pub batch_cpu_pinned: usize,
    /// The same from pageable RAM to its consumer; at most `n_cpu`.
    pub batch_cpu: usize,
    /// Who reads.
    pub reader: Reader,
    /// How the page cache is used.
    pub cache: CachePolicy,
}

impl Default for Settings {
    /// Two units ahead on the device and four in pinned RAM, which the disk fills directly.
    fn default() -> Self {
        Self {
            n_gpu: 2,
            n_cpu_pinned: 4,
            n_cpu: 0,
            batch_gpu: 0,
            batch_cpu_pinned: 0,
            batch_cpu: 0,
            reader: Reader::Auto,
            cache: CachePolicy::Auto,
        }
    }
}

impl Settings {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first one out of range.
    pub fn validate(&self) -> Result<()> {
        if self.n_gpu == 0 {
            return Err(Error::setting("n_gpu", "must be at least 1: the layer function needs a unit on the device"));
        }
        for (name, n_name, batch, n) in [
            ("batch_gpu", "n_gpu", self.batch_gpu, self.n_gpu),
            ("batch_cpu_pinned", "n_cpu_pinned", self.batch_cpu_pinned, self.n_cpu_pinned),
            ("batch_cpu", "n_cpu", self.batch_cpu, self.n_cpu),
        ] {
            if batch > n {
                let cause = format!("a batch of {batch} never fills a buffer of {n_name} = {n}; use at most {n}");
                return Err(Error::setting(name, cause));
            }
        }
        for (name, n) in [("n_gpu", self.n_gpu), ("n_cpu_pinned", self.n_cpu_pinned), ("n_cpu", self.n_cpu)] {
            if n > MAX_SLOTS {
                return Err(Error::setting(name, format!("is {n}, more than the {MAX_SLOTS} that a stage can hold")));
            }
        }
        Ok(())
    }
}

/// Far above any use; keeps arithmetic on slots small.
const MAX_SLOTS: usize = 1 << 16;
