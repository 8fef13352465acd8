//! How far a batch is: on a terminal a bar, elsewhere a line from time to time; and its closing lines.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use layer_streamer::{engine::EngineStats, plan::Part};
use serde_json::{Value, json};

use crate::units;

/// How often the bar changes, and how often a line is said where there is no terminal.
const BAR_EVERY: Duration = Duration::from_millis(200);
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Prompts of the input, if they were counted.
    pub all: Option<u64>,
    /// Those that were answered before this run.
    pub before: u64,
    /// Those that this run has answered, and whose answers are written.
    pub answered: u64,
    /// Of all answers, those that say why there is none.
    pub errors: u64,
}

impl Tally {
    pub fn done(&self) -> u64 {
        self.before + self.answered
    }

    /// How long the rest takes, at the pace of this run.
    fn left(&self, elapsed: Duration) -> Option<Duration> {
        let left = self.all?.saturating_sub(self.done());
        (self.answered > 0).then(|| elapsed.mul_f64(left as f64 / self.answered as f64))
    }
}

pub struct Progress {
    pub tally: Tally,
    bar: ProgressBar,
    is_bar: bool,
    quiet: bool,
    begun: Instant,
    told: Instant,
}

impl Progress {
    pub fn begin(tally: Tally, quiet: bool) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let template = if tally.all.is_some() { "[{bar:30}] {msg}" } else { "{msg}" };
        let style = ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(tally.all, target).with_style(style);
        let (is_bar, now) = (!bar.is_hidden(), Instant::now());
        Self { tally, bar, is_bar, quiet, begun: now, told: now }
    }

    /// Shows how far it is, if that was some time ago.
    pub fn tell(&mut self, stats: &EngineStats) {
        let every = if self.is_bar { BAR_EVERY } else { LINE_EVERY };
        if self.quiet || self.told.elapsed() < every {
            return;
        }
        self.told = Instant::now();
        let text = self.text(stats);
        if self.is_bar {
            self.bar.set_position(self.tally.done());
            self.bar.set_message(text);
        } else {
            say!("{text}");
        }
    }

    fn text(&self, stats: &EngineStats) -> String {
        let elapsed = self.begun.elapsed();
        let rate = |tokens: u64| units::count(tokens as f64 / elapsed.as_secs_f64().max(1e-9));
        let all = self.tally.all.map_or_else(String::new, |all| format!(" of {all}"));
        let left = self.tally.left(elapsed).map_or_else(String::new, |left| format!(", {} left", duration(left)));
        format!(
            "{}{all} prompts, {} new tokens/s, {} of prompts{left}",
            self.tally.done(),
            rate(stats.new_tokens),
            rate(stats.prompt_tokens)
        )
    }

    /// The closing line.
    pub fn end(&self, stats: &EngineStats) -> Summary {
        self.bar.finish_and_clear();
        Summary { tally: self.tally, elapsed: self.begun.elapsed(), stats: *stats }
    }
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    tally: Tally,
    elapsed: Duration,
    stats: EngineStats,
}

impl Summary {
    /// Of a run that had nothing to do.
    pub fn of(tally: Tally) -> Self {
        Self { tally, elapsed: Duration::ZERO, stats: EngineStats::default() }
    }

    pub fn text(&self) -> String {
        let Self { tally: Tally { all, before, answered, errors }, elapsed, stats } = self;
        let all = all.map_or_else(String::new, |all| format!(" of {all}"));
        let before = if *before > 0 { format!(", {before} of them before") } else { String::new() };
        let errors = if *errors > 0 { format!(", {errors} of them errors") } else { String::new() };
        let mut text = format!("{}{all} prompts answered{before}{errors}", self.tally.done());
        if *answered > 0 && stats.passes > 0 {
            let seconds = elapsed.as_secs_f64().max(1e-9);
            let rate = |tokens: u64| format!("{tokens} tokens ({:.2}/s)", tokens as f64 / seconds);
            text += &format!(
                "\n{} in and {} out in {:.2} s: {} passes of {:.1} new tokens each",
                rate(stats.prompt_tokens),
                rate(stats.new_tokens),
                seconds,
                stats.passes,
                stats.new_tokens as f64 / stats.passes.max(1) as f64
            );
        }
        text
    }

    /// The same for programs.
    pub fn json(&self, interrupted: bool, sequences: usize, memory: &[Part]) -> Value {
        let Self { tally: Tally { all, before, answered, errors }, elapsed, stats } = self;
        let seconds = elapsed.as_secs_f64();
        let rate = |tokens: u64| tokens as f64 / seconds.max(1e-9);
        json!({
            "prompts": all, "answered": self.tally.done(), "before": before, "now": answered, "errors": errors,
            "interrupted": interrupted, "sequences": sequences, "seconds": seconds, "passes": stats.passes,
            "prompt_tokens": stats.prompt_tokens, "reused_tokens": stats.reused_tokens, "new_tokens": stats.new_tokens,
            "prompt_tokens_per_second": rate(stats.prompt_tokens), "new_tokens_per_second": rate(stats.new_tokens),
            "memory": crate::plan::memory(memory),
        })
    }
}

/// For people: its two largest parts.
fn duration(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_goes_by_the_pace_of_this_run_alone() {
        let tally = Tally { all: Some(1000), before: 600, answered: 100, errors: 3 };
        assert_eq!(tally.left(Duration::from_secs(20)), Some(Duration::from_secs(60)));
        assert_eq!(Tally { answered: 0, ..tally }.left(Duration::from_secs(20)), None);
        assert_eq!(Tally { all: None, ..tally }.left(Duration::from_secs(20)), None);
        assert_eq!(
            Summary::of(tally).text().lines().next(),
            Some("700 of 1000 prompts answered, 600 of them before, 3 of them errors")
        );
        let shown = [59, 60, 3599, 3600, 90_000].map(|seconds| duration(Duration::from_secs(seconds)));
        assert_eq!(shown, ["59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 0 min"]);
    }
}
