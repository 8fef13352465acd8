//! The options that all benchmarks share: one name for one thing.

use std::{path::PathBuf, time::Duration};

use clap::{Arg, Args};

/// What every benchmark takes. Each gives its own defaults: `#[command(mut_arg("window", by_default("0.5")))]`.
#[derive(Clone, Args)]
pub struct Common {
    /// How long each single measurement goes on
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub window: Duration,
    /// How often each thing is measured; they take turns, so that a machine that drifts favours none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Print one JSON object in place of text
    #[arg(long)]
    pub json: bool,
}

/// A benchmark's own default for one of the options above.
pub fn by_default(value: &'static str) -> impl FnOnce(Arg) -> Arg {
    move |arg| arg.required(false).default_value(value)
}

/// For benchmarks of which a curve says more than a table.
#[derive(Clone, Args)]
pub struct PlotTo {
    /// Also draw the curves, as SVG
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// Parses an option in seconds.
pub fn seconds(text: &str) -> Result<Duration, &'static str> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.filter(|time| (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(time))
        .ok_or("give seconds from 0.001 to 3600, such as 0.5")
}
