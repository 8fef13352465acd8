//! Greedy decoding.

use std::ops::ControlFlow;

use super::{batch::Sequence, decoder::Decoder};
use crate::{
    error::{Error, Result},
    kernels::Kernels,
};

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
        on_token: impl FnMut(usize, u32) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        let batch: Vec<_> = prompts.iter().enumerate().map(|(row, &tokens)| Sequence { row, tokens }).collect();
        self.forward(&batch)?;
        self.decode(&(0..prompts.len()).collect::<Vec<_>>(), most, stop, on_token)
    }

    /// Continues the sequences of the batch before, whose `rows` these are in its order, each by the most likely token, again
    /// and again, until it ends with one of `stop`, or has `most` new tokens, or fills the context. `on_token` is given the
    /// row and each new token but the one that stops; [`ControlFlow::Break`] ends that sequence.
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
        mut on_token: impl FnMut(usize, u32) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        if rows.len() != self.sequences() {
            let cause = format!("are {}, but the pass before had {} sequences", rows.len(), self.sequences());
            return Err(Error::setting("rows", cause).into());
        }
        let mut live = rows.to_vec();
        let mut found = Vec::with_capacity(rows.len());
        for left in (0..most).rev() {
            found.clear();
            self.greedy(&mut found)?;
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
