//! How many tokens of prompts a pass may have beside sequences that are being continued.

use std::time::Duration;

/// The fewest: prompts always go on.
const LEAST: usize = 16;
/// What is allowed before anything was measured.
const FIRST: usize = 256;
/// After so many passes with prompts one goes without, so that what passes take alone is known.
const MEASURED: usize = 64;

/// Finds by doubling and halving how many tokens of prompts make a pass longer by no more than the allowed share.
#[derive(Debug)]
pub(super) struct Pace {
    delay: f64,
    most: usize,
    allowed: usize,
    /// What the last pass without prompts took, in seconds.
    alone: Option<f64>,
    /// Passes since then.
    since: usize,
}

impl Pace {
    /// `delay` as in [`Limits`](super::Limits); `most`: tokens that a pass can have.
    pub(super) fn new(delay: f64, most: usize) -> Self {
        Self { delay, most, allowed: FIRST.min(most), alone: None, since: 0 }
    }

    /// How many tokens of prompts the next pass may have, in which so many sequences are continued.
    pub(super) fn allowed(&self, continued: usize) -> usize {
        let left = self.most.saturating_sub(continued);
        match self.alone {
            _ if continued == 0 => left,
            Some(_) if self.since < MEASURED => self.allowed.min(left),
            _ => 0,
        }
    }

    /// A pass in which so many sequences were continued, with so many tokens of prompts, took so long.
    pub(super) fn note(&mut self, continued: usize, prompts: usize, took: Duration) {
        let took = took.as_secs_f64();
        self.since += usize::from(continued > 0);
        match (continued, prompts, self.alone) {
            (0, ..) => {}
            (_, 0, _) => (self.alone, self.since) = (Some(took), 0),
            (.., Some(alone)) if took > alone * (1.0 + self.delay) => self.allowed = (prompts / 2).max(LEAST),
            (_, _, Some(_)) if prompts >= self.allowed => self.allowed = (2 * self.allowed).min(self.most.max(LEAST)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass over a link: computing hides behind it, up to 300 tokens of prompts.
    fn takes(prompts: usize) -> Duration {
        Duration::from_micros(1000.max(200 + 4 * prompts as u64 * 2 / 3))
    }

    #[test]
    fn as_many_tokens_as_delay_a_pass_by_the_allowed_share() {
        for (delay, range) in [(0.0, 150..=600), (0.5, 240..=980)] {
            let mut pace = Pace::new(delay, 8192);
            pace.note(3, 0, takes(0));
            let mut tried = Vec::new();
            for _ in 0..40 {
                let prompts = pace.allowed(3);
                pace.note(3, prompts, takes(prompts));
                tried.push(prompts);
            }
            let settled = &tried[20..];
            assert!(settled.iter().all(|prompts| range.contains(prompts)), "{delay}: {settled:?}");
            let slow = settled.iter().filter(|prompts| takes(**prompts).as_secs_f64() > 1e-3 * (1.0 + delay)).count();
            assert!(slow <= settled.len() / 2, "{delay}: {settled:?}");
        }
    }

    #[test]
    fn prompts_go_on_however_slow_they_are_and_take_the_whole_pass_where_nothing_else_runs() {
        let mut pace = Pace::new(0.0, 1000);
        assert_eq!((pace.allowed(0), pace.allowed(1)), (1000, 0), "what a pass takes alone is not known yet");
        pace.note(1, 0, Duration::from_millis(1));
        assert_eq!((pace.allowed(1), pace.allowed(900), pace.allowed(1000)), (256, 100, 0));
        for _ in 0..20 {
            let prompts = pace.allowed(1);
            pace.note(1, prompts, Duration::from_secs(1));
        }
        assert_eq!((pace.allowed(1), pace.allowed(0)), (LEAST, 1000));
    }

    #[test]
    fn what_passes_take_alone_is_measured_again_while_prompts_keep_coming() {
        let mut pace = Pace::new(0.5, 1000);
        pace.note(1, 0, Duration::from_millis(1));
        let mut alone = 0;
        for _ in 0..1000 {
            // Sixty are continued now, which takes ten times as long.
            let prompts = pace.allowed(60);
            alone += usize::from(prompts == 0);
            pace.note(60, prompts, Duration::from_micros(10_000 + prompts as u64));
        }
        assert!((10..20).contains(&alone), "{alone} of 1000 passes without prompts");
        assert!(pace.allowed(60) > 500);
    }
}
