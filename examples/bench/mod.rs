//! What the benchmarks share: windows and what moved in them, clocks, the raw reader, the plain copy, the pipeline
//! under measurement, and how figures are printed.
#![allow(dead_code, unused_imports, reason = "each benchmark uses a part")]

mod clock;
mod copy;
mod disk;
mod link;
mod stream;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use memmap2::{Advice, MmapRaw};

pub use clock::Clocks;
pub use copy::{Piece, PlainCopy};
pub use disk::{CachedFiles, Disk, Way};
pub use link::Link;
pub use stream::{Pipeline, Used};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Bytes moved, and what that took.
#[derive(Clone, Copy, Default)]
pub struct Moved {
    pub bytes: u64,
    pub seconds: f64,
    pub cpu_seconds: f64,
}

impl Moved {
    pub fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.seconds += other.seconds;
        self.cpu_seconds += other.cpu_seconds;
    }

    pub fn gb(self) -> f64 {
        self.bytes as f64 / 1e9
    }

    /// GB/s.
    pub fn rate(self) -> f64 {
        self.gb() / self.seconds
    }

    pub fn cpu_per_gb(self) -> f64 {
        self.cpu_seconds / self.gb()
    }
}

/// Prints what a benchmark returned, or its error in one line.
pub fn finish(outcome: Result<String, Failure>) -> ExitCode {
    match outcome {
        // Whoever reads it may have gone away.
        Ok(text) => match io::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => finish(Err(error.into())),
            _ => ExitCode::SUCCESS,
        },
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Parses an option in seconds.
pub fn seconds(text: &str) -> Result<Duration, &'static str> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.filter(|time| (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(time))
        .ok_or("give seconds from 0.001 to 3600, such as 0.5")
}

/// A bar on stderr for a number of windows; none where the output is for a program.
pub fn progress(windows: u64, json: bool) -> Result<ProgressBar, Failure> {
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(windows) };
    bar.set_style(ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} windows, {eta} left")?);
    Ok(bar)
}

/// The value below which this share of the samples lies; sorts them. 0 without samples.
pub fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples.get((samples.len().saturating_sub(1) as f64 * share).round() as usize).copied().unwrap_or(0.0)
}

/// Memory like the pipeline's: present, and in huge pages where the system grants them.
fn memory(bytes: usize) -> io::Result<MmapRaw> {
    let map: MmapRaw = memmap2::MmapOptions::new().len(bytes.max(1)).map_anon()?.into();
    let _ = map.advise(Advice::HugePage);
    if map.advise(Advice::PopulateWrite).is_err() {
        // Linux before 5.14 does not know the advice.
        // SAFETY: the whole of a mapping that nobody else knows yet.
        unsafe { map.as_mut_ptr().write_bytes(1, map.len()) };
    }
    Ok(map)
}
