//! What the caller chooses: how deep the pipeline is, how files are read.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    layout::Rings,
};

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
    /// What the page cache holds is taken from there, everything else is read past it (needs cachestat(2), Linux 6.5; without it as
    /// [`CachePolicy::Direct`]). A whole unit that it holds, and that is kept and used in RAM as it is stored, is not even copied but
    /// used there, by a mapping, in memory that must not be written: whoever cuts such a file short meanwhile, or a disk that fails,
    /// ends the process (SIGBUS).
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
    /// `n_gpu`, `n_cpu_pinned` and `n_cpu`.
    pub(crate) fn rings(&self) -> Rings {
        [self.n_gpu, self.n_cpu_pinned, self.n_cpu]
    }

    /// The batches of the same.
    pub(crate) fn batches(&self) -> Rings {
        [self.batch_gpu, self.batch_cpu_pinned, self.batch_cpu]
    }

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
