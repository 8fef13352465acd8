//! Whether what was measured as the fastest is clearly faster than the default.
//!
//! The fastest of many is often the luckiest, so the two are measured again in turn: in rounds, each of which starts both anew,
//! one after the other. It is clearly faster if it is so by 3 % in four of up to five rounds: then its gain is beyond what rounds
//! differ by.

use serde::{Deserialize, Serialize};

use crate::plan::Placement;

/// What is gained by less than this share is not searched for.
pub(super) const WORTH: f64 = 0.03;

/// How many rounds must be won, and with how many lost it is over.
const WINS: usize = 4;
pub(super) const LOSSES: usize = 2;

/// How many are compared with the default at most, the fastest first. The first that is clearly faster is the answer.
pub(super) const CHALLENGERS: usize = 3;

/// One round of a comparison with the default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// Which candidate was compared.
    pub challenger: Placement,
    /// Median seconds of a pass of the default and of the challenger; `None` if one of them could not be measured this time.
    pub seconds: Option<[f64; 2]>,
}

/// Why the answer is what it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Comparison {
    /// It is the default: nothing that was tried was clearly faster.
    Kept,
    /// It was clearly faster than the default.
    Faster {
        /// Its time as a share of the default's, in the median of the rounds.
        ratio: f64,
        /// How many rounds it won, by 3 % or more.
        won: usize,
        /// Of how many.
        rounds: usize,
    },
    /// The default could not be measured; this is the fastest of the others.
    NoDefault,
    /// It is the default, as the search ended before anything was found to be clearly faster.
    Unfinished,
}

/// What the rounds with one challenger say.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    Open,
    Lost,
    Won(Comparison),
}

/// By the seconds of the rounds so far, the default's and the challenger's.
pub(super) fn state(rounds: &[Option<[f64; 2]>]) -> State {
    let Some(mut ratios) =
        rounds.iter().map(|round| round.map(|[default, challenger]| challenger / default)).collect::<Option<Vec<_>>>()
    else {
        return State::Lost;
    };
    let won = ratios.iter().filter(|ratio| **ratio <= 1.0 - WORTH).count();
    if ratios.len() - won >= LOSSES {
        return State::Lost;
    }
    if won < WINS {
        return State::Open;
    }
    State::Won(Comparison::Faster { ratio: median(&mut ratios), won, rounds: rounds.len() })
}

/// Of at least one.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_faster_by_3_percent_nearly_always_is_clearly_faster() {
        let state = |ratios: &[f64]| state(&ratios.iter().map(|ratio| Some([2.0, 2.0 * ratio])).collect::<Vec<_>>());
        assert_eq!(state(&[]), State::Open);
        assert_eq!(state(&[0.5, 0.5, 0.5]), State::Open);
        assert_eq!(state(&[0.5, 0.7, 0.6, 0.6]), State::Won(Comparison::Faster { ratio: 0.6, won: 4, rounds: 4 }));
        assert_eq!(state(&[0.5, 1.7, 0.6, 0.7]), State::Open);
        assert_eq!(state(&[0.5, 1.7, 0.6, 0.7, 0.7]), State::Won(Comparison::Faster { ratio: 0.7, won: 4, rounds: 5 }));
        for lost in [&[1.1, 1.0][..], &[0.5, 1.1, 0.6, 1.1], &[0.98, 0.98], &[0.98, 0.8, 0.5, 0.98]] {
            assert_eq!(state(lost), State::Lost, "{lost:?}");
        }
        assert_eq!(super::state(&[Some([1.0, 0.1]), None]), State::Lost);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!((median(&mut [3.0, 1.0, 9.0]), median(&mut [4.0, 1.0, 2.0, 9.0])), (2.0 + 1.0, 3.0));
    }
}
