//! The final norm and the output head: whole, as a tensor on the device, or in parts, as units that come after the layers.

use super::{
    batch::Pass,
    buffers::{Buffers, HEAD_BLOCK},
    config::ModelConfig,
    weights::PART,
};
use crate::{
    device::{TensorMut, TensorRef},
    error::Result,
    kernels::Kernels,
    pipeline::Layer,
};

/// What the head computes with, apart from its weights.
pub(super) struct Head<'a, D: Kernels> {
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) config: &'a ModelConfig,
    pub(super) buffers: &'a Buffers<D>,
    /// The final norm's weights.
    pub(super) norm: TensorRef<'a, D>,
}

impl<D: Kernels> Head<'_, D> {
    /// Keeps the residual stream of the last tokens of the sequences that end in this pass: the next one overwrites it.
    pub(super) fn keep_last(&self, pass: Pass) -> Result<()> {
        let (work, at, hidden, ending) = (&self.buffers.work, &self.buffers.at, self.config.hidden, pass.ending());
        if ending.is_empty() {
            return Ok(());
        }
        let indices = work.read(at.words, pass.last() + ending.start, &[ending.len()])?;
        let residual = work.read(at.residual, 0, &[pass.tokens, hidden])?;
        let last = work.write(at.last, ending.start * hidden, &[ending.len(), hidden])?;
        self.device.gather(self.stream, residual, indices, last)
    }

    /// Norms rows of the residual stream; they become the head's rows from `first` on.
    pub(super) fn norm(&self, residual: TensorRef<'_, D>, first: usize) -> Result<()> {
        let out = self.buffers.work.write(self.buffers.at.head_normed, first * self.config.hidden, residual.shape())?;
        let offset = self.config.family.norm_offset;
        self.device.rms_norm(self.stream, residual, self.norm, offset, self.config.rms_eps, out)
    }

    /// Norms the last tokens of sequences `start..start + rows`; they become the head's rows from `first` on.
    fn norm_last(&self, start: usize, rows: usize, first: usize) -> Result<()> {
        let (work, at, hidden) = (&self.buffers.work, &self.buffers.at, self.config.hidden);
        self.norm(work.read(at.last, start * hidden, &[rows, hidden])?, first)
    }

    /// The next token of each of so many sequences, by the whole head.
    pub(super) fn choose_by(&self, weight: TensorRef<'_, D>, sequences: usize) -> Result<()> {
        for (start, rows) in blocks(sequences) {
            self.project_last(weight, start, rows)?;
            self.choose(rows, start)?;
        }
        Ok(())
    }

    /// The logits of the last tokens of sequences `start..start + rows`, by the whole head; they become the first rows.
    pub(super) fn project_last(&self, weight: TensorRef<'_, D>, start: usize, rows: usize) -> Result<()> {
        self.norm_last(start, rows, 0)?;
        self.project(weight, rows)
    }

    /// The next token of each of so many sequences by a head that comes in parts: this one's first row is `column`. Returns the next one's.
    pub(super) fn choose_by_part(&self, layer: &Layer<'_, D>, sequences: usize, column: usize) -> Result<usize> {
        if column == 0 {
            blocks(sequences).try_for_each(|(start, rows)| self.norm_last(start, rows, start))?;
        }
        let column = self.part(layer, sequences, column)?;
        if column == self.config.vocab {
            self.choose(sequences, 0)?;
        }
        Ok(column)
    }

    /// The logits of so many of the head's rows by a part of the head whose first row is `column`; returns the next part's.
    pub(super) fn part(&self, layer: &Layer<'_, D>, rows: usize, column: usize) -> Result<usize> {
        let weight = layer.tensor(PART)?;
        self.project_part(weight, rows, column)?;
        Ok(column + weight.shape()[0])
    }

    /// The logits of so many of the head's rows by the whole head.
    pub(super) fn project(&self, weight: TensorRef<'_, D>, rows: usize) -> Result<()> {
        self.project_part(weight, rows, 0)
    }

    /// The same by some of its rows, from `column` on.
    fn project_part(&self, weight: TensorRef<'_, D>, rows: usize, column: usize) -> Result<()> {
        let (device, stream, work, at) = (self.device, self.stream, &self.buffers.work, &self.buffers.at);
        let (width, hidden, vocab) = (weight.shape()[0], self.config.hidden, self.config.vocab);
        for (start, rows) in blocks(rows) {
            let x = work.read(at.head_normed, start * hidden, &[rows, hidden])?;
            if rows == 1 || width == vocab {
                let out = || work.write(at.logits, start * vocab + column, &[rows, width]);
                device.linear(stream, x, weight, None, out()?)?;
                self.finish(out()?)?;
                continue;
            }
            device.linear(stream, x, weight, None, work.write(at.part, 0, &[rows, width])?)?;
            self.finish(work.write(at.part, 0, &[rows, width])?)?;
            for row in 0..rows {
                let to = work.write(at.logits, (start + row) * vocab + column, &[width])?;
                device.cast(stream, work.read(at.part, row * width, &[width])?, to)?;
            }
        }
        Ok(())
    }

    /// What the model does to its logits.
    fn finish(&self, mut logits: TensorMut<'_, D>) -> Result<()> {
        let (factor, cap) = (self.config.multipliers.logits, self.config.soft_caps.logits);
        if factor != 1.0 {
            self.device.scale(self.stream, logits.borrow(), factor)?;
        }
        cap.map_or(Ok(()), |cap| self.device.soft_cap(self.stream, logits, cap))
    }

    /// The most likely token by each of the first `rows` rows of logits, for the sequences from `first` on.
    fn choose(&self, rows: usize, first: usize) -> Result<()> {
        let best = self.buffers.work.write(self.buffers.at.best, first, &[rows])?;
        self.device.argmax(self.stream, self.logits(0, rows)?, best)
    }

    /// So many rows of logits, from row `first` on.
    pub(super) fn logits(&self, first: usize, rows: usize) -> Result<TensorRef<'_, D>> {
        let vocab = self.config.vocab;
        self.buffers.work.read(self.buffers.at.logits, first * vocab, &[rows, vocab])
    }
}

/// So many rows in blocks: where each starts, and how many it has.
pub(super) fn blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(HEAD_BLOCK).map(move |start| (start, HEAD_BLOCK.min(rows - start)))
}
