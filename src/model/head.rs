//! The final norm and the output head: whole, as a tensor on the device, or in parts, as units that come after the layers.

use super::{
    Decoder, Model, NORM,
    decoder::{BatchHeader, HEAD_BLOCK, Regions},
    tables::PART,
    workspace::Workspace,
};
use crate::{
    device::{self, TensorRef},
    error::{Error, Result},
    kernels::Kernels,
    pipeline::Layer,
};

/// What the head computes with, apart from its weights.
pub(super) struct Head<'a, D: Kernels> {
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) model: &'a Model,
    pub(super) work: &'a Workspace<D>,
    pub(super) regions: &'a Regions,
    pub(super) norm: TensorRef<'a, D>,
}

impl<D: Kernels> Head<'_, D> {
    /// Norms rows of the residual stream; they become the head's rows from `first` on.
    fn norm(&self, residual: TensorRef<'_, D>, first: usize) -> Result<()> {
        let config = &self.model.config;
        let out = self.work.write(self.regions.head_normed, first * config.hidden, residual.shape())?;
        self.device.rms_norm(self.stream, residual, self.norm, config.rms_eps, out)
    }

    /// Norms the last tokens of sequences `start..start + rows`; they become the head's rows from `first` on.
    fn norm_some(&self, header: BatchHeader, start: usize, rows: usize, first: usize) -> Result<()> {
        let hidden = self.model.config.hidden;
        let indices = self.work.read(self.regions.header, header.last() + start, &[rows])?;
        let residual = self.work.read(self.regions.residual, 0, &[header.tokens, hidden])?;
        self.device.gather(
            self.stream,
            residual,
            indices,
            self.work.write(self.regions.head_in, 0, &[rows, hidden])?,
        )?;
        self.norm(self.work.read(self.regions.head_in, 0, &[rows, hidden])?, first)
    }

    /// Norms the last token of every sequence.
    pub(super) fn norm_last(&self, header: BatchHeader) -> Result<()> {
        blocks(header.sequences).try_for_each(|(start, rows)| self.norm_some(header, start, rows, start))
    }

    /// The logits of so many of the head's rows by a part of the head whose first row is `column`; returns the next part's.
    pub(super) fn part(&self, layer: &Layer<'_, D>, rows: usize, column: usize) -> Result<usize> {
        let weight = layer.tensor(PART)?;
        self.project(weight, rows, column)?;
        Ok(column + weight.shape()[0])
    }

    fn project(&self, weight: TensorRef<'_, D>, rows: usize, column: usize) -> Result<()> {
        let (device, stream, work, at, config) =
            (self.device, self.stream, self.work, self.regions, &self.model.config);
        let (width, hidden, vocab) = (weight.shape()[0], config.hidden, config.vocab);
        for (start, rows) in blocks(rows) {
            let x = work.read(at.head_normed, start * hidden, &[rows, hidden])?;
            if rows == 1 || width == vocab {
                let out = work.write(at.logits, start * vocab + column, &[rows, width])?;
                device.linear(stream, x, weight, None, out)?;
                continue;
            }
            device.linear(stream, x, weight, None, work.write(at.part, 0, &[rows, width])?)?;
            for row in 0..rows {
                let to = work.write(at.logits, (start + row) * vocab + column, &[width])?;
                device.cast(stream, work.read(at.part, row * width, &[width])?, to)?;
            }
        }
        Ok(())
    }

    /// The most likely token by each of the first `rows` rows of logits.
    pub(super) fn choose(&self, rows: usize) -> Result<()> {
        self.choose_some(rows, 0)
    }

    /// The same, for the sequences from `first` on.
    fn choose_some(&self, rows: usize, first: usize) -> Result<()> {
        let logits = self.work.read(self.regions.logits, 0, &[rows, self.model.config.vocab])?;
        self.device.argmax(self.stream, logits, self.work.write(self.regions.best, first, &[rows])?)
    }
}

/// So many rows in blocks: where each starts, and how many it has.
fn blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(HEAD_BLOCK).map(move |start| (start, HEAD_BLOCK.min(rows - start)))
}

impl<D: Kernels> Decoder<D> {
    /// The most likely next token of each sequence of the pass before, in its order, appended to `out`.
    ///
    /// # Errors
    /// [`Error::Setting`] if no pass went before, or the device's own.
    pub fn greedy(&mut self, out: &mut Vec<u32>) -> Result<()> {
        self.check_passed()?;
        self.device.bind_thread()?;
        let header = self.header;
        if !self.model.tables.streams_head() {
            let (head, weight) = (self.head()?, self.statics.tensor(self.model.head_name())?);
            for (start, rows) in blocks(header.sequences) {
                head.norm_some(header, start, rows, 0)?;
                head.project(weight, rows, 0)?;
                head.choose_some(rows, start)?;
            }
        }
        let best = self.work.read(self.regions.best, 0, &[header.sequences])?;
        out.extend_from_slice(self.exchange.receive(best, &self.stream)?);
        Ok(())
    }

    /// The logits of every token of the pass before, in order, as rows of the vocabulary's length, a few rows at a time. Where the
    /// head is [streamed](super::Tables::HeadStreamed) it comes anew for these few, in a pass of all units.
    ///
    /// # Errors
    /// As [`greedy`](Self::greedy) and [`LayerStreamer::run_pass`](crate::LayerStreamer::run_pass), or what `sink` returns.
    pub fn all_logits<E: From<Error>>(&mut self, mut sink: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        self.check_passed()?;
        self.device.bind_thread()?;
        let (tokens, config) = (self.header.tokens, self.model.config.clone());
        let most = if self.model.tables.streams_head() { self.batch.max(HEAD_BLOCK.min(tokens)) } else { HEAD_BLOCK };
        let mut rows_out = Vec::new();
        for start in (0..tokens).step_by(most) {
            let rows = most.min(tokens - start);
            let Self { streamer, stream, device, statics, work, regions, model, .. } = self;
            let head = Head { device, stream, model, work, regions, norm: statics.tensor(NORM)? };
            head.norm(work.read(regions.residual, start * config.hidden, &[rows, config.hidden])?, 0)?;
            if model.tables.streams_head() {
                streamer.run_pass(stream, 0, |column, layer| match layer.index() < config.layers {
                    true => Ok::<_, Error>(column),
                    false => head.part(layer, rows, column),
                })?;
            } else {
                head.project(statics.tensor(model.head_name())?, rows, 0)?;
            }
            rows_out.resize(rows * config.vocab, 0.0);
            let logits = work.read(regions.logits, 0, &[rows, config.vocab])?;
            device::download(device, stream, logits, &mut rows_out)?;
            sink(&rows_out)?;
        }
        Ok(())
    }

    fn head(&self) -> Result<Head<'_, D>> {
        let Self { stream, device, statics, work, regions, model, .. } = self;
        Ok(Head { device, stream, model, work, regions, norm: statics.tensor(NORM)? })
    }

    fn check_passed(&self) -> Result<()> {
        if self.header.tokens > 0 {
            Ok(())
        } else {
            Err(Error::setting("logits", "need a forward pass that succeeded"))
        }
    }
}
