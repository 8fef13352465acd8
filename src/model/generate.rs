//! Decoding: token after token, greedily or drawn at random.

use std::ops::ControlFlow;

use super::{batch::Sequence, decoder::Decoder, sampling::Sampler};
use crate::{
    error::{Error, Result},
    kernels::Kernels,
};

/// How the next token is chosen. A host that chooses in another way has [`Decoder::last_logits`].
#[derive(Debug)]
pub enum Choice<'a> {
    /// The most likely one, which the device finds.
    Greedy,
    /// One that is drawn.
    Sample(&'a mut Sampler),
}

impl<D: Kernels> Decoder<D> {
    /// Runs `prompts` through the model, the prompt `i` in row `i` of the KV cache, and continues each as
    /// [`decode`](Self::decode) does.
    ///
    /// # Errors
    /// As [`Decoder::forward`], or what `on_token` returns.
    pub fn generate<E: From<Error>>(
        &mut self,
        prompts: &[&[u32]],
        most: usize,
        stop: &[u32],
        choice: Choice<'_>,
        on_token: impl FnMut(usize, u32) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        let batch: Vec<_> = prompts.iter().enumerate().map(|(row, &tokens)| Sequence { row, tokens }).collect();
        self.forward(&batch)?;
        self.decode(&(0..prompts.len()).collect::<Vec<_>>(), most, stop, choice, on_token)
    }

    /// Continues the sequences of the batch before, whose `rows` these are in its order, each by the token that is chosen, again
    /// and again, until it ends with one of `stop`, or has `most` new tokens, or fills the context. `on_token` is given the
    /// row and each new token but the one that stops; [`ControlFlow::Break`] ends that sequence.
    ///
    /// A sampler's repetition penalty counts all tokens that the KV cache holds of a sequence, and the new ones; its presence
    /// penalty counts the new ones of this call.
    ///
    /// Every pass brings one token to each sequence that has not ended, so a batch costs as many passes as its longest.
    ///
    /// # Errors
    /// As [`Decoder::forward`], or what `on_token` returns.
    pub fn decode<E: From<Error>>(
        &mut self,
        rows: &[usize],
        most: usize,
        stop: &[u32],
        choice: Choice<'_>,
        mut on_token: impl FnMut(usize, u32) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        self.check_rows(rows)?;
        let mut sampler = match choice {
            Choice::Sample(sampler) if !sampler.sampling().is_greedy() => Some(sampler),
            _ => None,
        };
        if let Some(sampler) = &mut sampler {
            rows.iter().try_for_each(|row| sampler.begin(*row, self.tokens(*row)))?;
        }
        let mut live = rows.to_vec();
        let mut found = Vec::with_capacity(rows.len());
        for left in (0..most).rev() {
            found.clear();
            match &mut sampler {
                Some(sampler) => self.sample(&live, sampler, &mut found)?,
                None => self.greedy(&mut found)?,
            }
            let mut going = Vec::with_capacity(live.len());
            for (&row, token) in live.iter().zip(&found) {
                if !stop.contains(token) && on_token(row, *token)?.is_continue() && self.length(row) < self.context() {
                    going.push((row, *token));
                }
            }
            if left == 0 || going.is_empty() {
                break;
            }
            let batch: Vec<_> = (going.iter())
                .map(|(row, token)| Sequence { row: *row, tokens: std::slice::from_ref(token) })
                .collect();
            self.forward(&batch)?;
            live = going.iter().map(|(row, _)| *row).collect();
        }
        Ok(())
    }
}
