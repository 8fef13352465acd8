//! The tokens that may be chosen: they become fewer by top-k, top-p and min-p, and one of them is drawn.
//!
//! They stay in the order of the vocabulary, also for the draw: where two tokens are nearly as likely as each other, a logit's
//! last bit, which differs between ways to compute it, then moves a border a little and does not exchange them.

use std::cmp::Ordering;

use super::Sampling;

/// How many of the likeliest tokens are sorted first; where they do not reach `top_p`, [`GROWTH`] times as many are.
const SORTED: usize = 64;
const GROWTH: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Its logit; then how far that is below the largest, by the temperature.
    score: f64,
    /// `exp(score)`: its probability, where the likeliest token's is 1.
    weight: f64,
    token: u32,
}

impl Candidate {
    /// The more likely one is less; of equally likely ones the one that comes first.
    fn rank(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(self.token.cmp(&other.token))
    }
}

/// Memory that is used again for each draw.
#[derive(Default)]
pub(super) struct Candidates {
    kept: Vec<Candidate>,
    /// The same, partly sorted.
    order: Vec<Candidate>,
}

impl Candidates {
    /// What it takes for each token of the vocabulary.
    pub(super) const BYTES: usize = 2 * size_of::<Candidate>();

    /// Begins with all tokens, by their logits, none NaN or +∞, but those with -∞.
    pub(super) fn fill(&mut self, logits: impl ExactSizeIterator<Item = f64>) {
        self.kept.clear();
        self.kept.reserve_exact(logits.len());
        let candidates = logits.zip(0..).map(|(score, token)| Candidate { score, weight: 1.0, token });
        self.kept.extend(candidates.filter(|candidate| candidate.score > f64::NEG_INFINITY));
    }

    /// The token that `uniform`, from 0 to below 1, stands for; none if there are no candidates.
    pub(super) fn choose(&mut self, sampling: &Sampling, uniform: f64) -> Option<u32> {
        self.filter(sampling);
        self.draw(uniform)
    }

    /// Leaves those that may be drawn.
    fn filter(&mut self, sampling: &Sampling) {
        let largest = self.kept.iter().map(|candidate| candidate.score).fold(f64::NEG_INFINITY, f64::max);
        if sampling.temperature == 0.0 {
            self.kept.retain(|candidate| candidate.score == largest);
            self.kept.truncate(1);
            return;
        }
        for candidate in &mut self.kept {
            candidate.score = (candidate.score - largest) / sampling.temperature;
        }
        self.keep_top_k(sampling.top_k);
        for candidate in &mut self.kept {
            candidate.weight = candidate.score.exp();
        }
        self.keep_top_p(sampling.top_p);
        // The likeliest token, whose weight is 1, is never filtered out.
        self.kept.retain(|candidate| candidate.weight >= sampling.min_p);
    }

    fn keep_top_k(&mut self, count: usize) {
        if count == 0 || count >= self.kept.len() {
            return;
        }
        self.begin_order();
        let (_, last, _) = self.order.select_nth_unstable_by(count - 1, Candidate::rank);
        let least = last.score;
        self.kept.retain(|candidate| candidate.score >= least);
    }

    fn keep_top_p(&mut self, share: f64) {
        if share >= 1.0 {
            return;
        }
        let enough = share * self.total();
        self.begin_order();
        let (all, mut sorted) = (self.order.len(), SORTED);
        // The whole order is rarely needed, and sorting it would take longer than all else.
        while sorted < all {
            self.order.select_nth_unstable_by(sorted - 1, Candidate::rank);
            if self.cut(sorted, enough) {
                return;
            }
            sorted *= GROWTH;
        }
        self.cut(all, enough);
    }

    /// Sorts so many likeliest candidates, which come first, and keeps those before which there is less than `enough`. Returns
    /// false, and keeps all, where it takes more of them than these to know.
    fn cut(&mut self, sorted: usize, enough: f64) -> bool {
        let sorted = &mut self.order[..sorted];
        sorted.sort_unstable_by(Candidate::rank);
        let mut before = 0.0;
        let end = sorted.iter().position(|candidate| {
            let is_enough = before >= enough;
            before += candidate.weight;
            is_enough
        });
        let Some(end) = end else { return false };
        // The likeliest stays, even if nothing is enough.
        let Some(last) = sorted.get(end.max(1) - 1) else { return false };
        self.kept.retain(|candidate| candidate.rank(last).is_le());
        true
    }

    fn begin_order(&mut self) {
        self.order.clear();
        self.order.reserve_exact(self.kept.capacity());
        self.order.extend_from_slice(&self.kept);
    }

    fn total(&self) -> f64 {
        self.kept.iter().map(|candidate| candidate.weight).sum()
    }

    fn draw(&self, uniform: f64) -> Option<u32> {
        let (target, mut sum, mut found) = (uniform * self.total(), 0.0, None);
        // Where rounding leaves the sum short of the target it is the last that can be drawn.
        for candidate in self.kept.iter().filter(|candidate| candidate.weight > 0.0) {
            found = Some(candidate.token);
            sum += candidate.weight;
            if sum > target {
                break;
            }
        }
        found
    }

    /// Each token's probability.
    #[cfg(test)]
    pub(super) fn probabilities(&mut self, sampling: &Sampling, vocab: usize) -> Vec<f64> {
        self.filter(sampling);
        let (total, mut all) = (self.total(), vec![0.0; vocab]);
        for candidate in &self.kept {
            all[candidate.token as usize] = candidate.weight / total;
        }
        all
    }

    /// Where its memory lies, and how many bytes that are.
    #[cfg(test)]
    pub(super) fn memory(&self) -> [(usize, usize); 2] {
        [&self.kept, &self.order].map(|of| (of.as_ptr().addr(), of.capacity() * size_of::<Candidate>()))
    }
}
