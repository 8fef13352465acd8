//! The comparison of the fastest candidates with the default.

use std::ops::ControlFlow;

use super::{
    SearchEvent, Searching, Trial,
    verdict::{CHALLENGERS, Comparison, Round, State, state},
};
use crate::{error::Result, plan::Placement};

impl Searching<'_> {
    /// Finds the answer. Whether that came to its end, or was cancelled.
    pub(super) fn compare(&mut self, hook: &mut impl FnMut(SearchEvent<'_>) -> ControlFlow<()>) -> Result<bool> {
        let default = &self.tuner.candidates[0];
        let (answer, verdict) = match self.record.default_seconds() {
            None => (self.record.best_trial().map(|trial| trial.placement.clone()), Comparison::NoDefault),
            Some(_) => {
                let faster = self.record.faster().into_iter().map(|trial| trial.placement.clone());
                // A record may have others.
                let faster: Vec<_> = faster.filter(|placement| self.find(placement).is_some()).collect();
                let mut verdict = Comparison::Kept;
                let mut answer = default.placement.clone();
                for challenger in faster.into_iter().take(CHALLENGERS) {
                    match self.challenge(&challenger, hook)? {
                        None => return Ok(false),
                        Some(State::Won(won)) => {
                            (answer, verdict) = (challenger, won);
                            break;
                        }
                        Some(_) => {}
                    }
                }
                (Some(answer), verdict)
            }
        };
        let candidate = answer.and_then(|placement| self.find(&placement));
        if let Some(candidate) = candidate {
            self.record.set_answer(&self.tuner.candidates[candidate], verdict);
            self.write()?;
        }
        Ok(true)
    }

    /// The number of the candidate with this placement.
    fn find(&self, placement: &Placement) -> Option<usize> {
        self.tuner.candidates.iter().position(|candidate| candidate.placement == *placement)
    }

    /// Measures the default and one that was faster in turn, until it is clear whether that always is; `None` if cancelled.
    fn challenge(
        &mut self,
        challenger: &Placement,
        hook: &mut impl FnMut(SearchEvent<'_>) -> ControlFlow<()>,
    ) -> Result<Option<State>> {
        let default = &self.tuner.candidates[0].placement;
        loop {
            let rounds = self.record.rounds_of(challenger);
            let state = state(&rounds);
            if state != State::Open {
                return Ok(Some(state));
            }
            let number = rounds.len();
            if hook(SearchEvent::Comparing { challenger, round: number + 1 }).is_break() {
                return Ok(None);
            }
            // Each goes first in every other round: what comes first may find the machine in another state.
            let mut seconds = [None; 2];
            for turn in [number % 2, 1 - number % 2] {
                let measured = self.measure([default, challenger][turn], None, |event| hook(event).is_continue())?;
                let Some(trial) = measured else { return Ok(None) };
                seconds[turn] = Trial::typical(&trial);
            }
            let seconds = seconds[0].zip(seconds[1]).map(|(default, challenger)| [default, challenger]);
            self.record.rounds.push(Round { challenger: challenger.clone(), seconds });
            self.write()?;
            let round = self.record.rounds.last().expect("it was pushed");
            if hook(SearchEvent::Compared { round }).is_break() {
                return Ok(None);
            }
        }
    }
}
