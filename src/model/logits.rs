//! What a decoder tells of a pass: next tokens and logits.

use std::mem;

use super::{
    buffers::HEAD_BLOCK,
    decoder::Decoder,
    head::{Head, blocks},
    sampling::{Sampler, check_logits},
};
use crate::{
    device,
    error::{Error, Result},
    kernels::Kernels,
    pipeline::LayerStreamer,
};

/// Where [`argmax`](Kernels::argmax) found a NaN among the logits. No vocabulary is so large.
const NO_TOKEN: u32 = u32::MAX;

impl<D: Kernels> Decoder<D> {
    /// The most likely next token of each sequence of the batch before, in its order, appended to `out`.
    ///
    /// # Errors
    /// [`Error::Setting`] if no pass went before, or, as [`Sampler::choose`] has it, for a logit that is NaN; or the device's own.
    pub fn greedy(&mut self, out: &mut Vec<u32>) -> Result<()> {
        let before = out.len();
        if self.most_likely(out)? {
            return Ok(());
        }
        out.truncate(before);
        self.last_logits(check_logits)?;
        Err(Error::setting("logits", "are NaN: the model computed no probabilities"))
    }

    /// The same; `false` if a sequence has none, since a logit is NaN: which, and where, its logits say.
    pub(crate) fn most_likely(&mut self, out: &mut Vec<u32>) -> Result<bool> {
        self.check_passed()?;
        self.device.bind_thread()?;
        let Self { streamer, stream, device, statics, buffers, model, exchange, pass, pages, .. } = self;
        if !model.tables.streams_head() {
            let head =
                Head { device, stream, config: &model.config, buffers, norm: statics.tensor(&model.names.norm)? };
            head.choose_by(statics.tensor(&model.names.head)?, pass.sequences)?;
        }
        let best = buffers.work.read(buffers.at.best, 0, &[pass.sequences])?;
        let best = exchange.receive(best, stream)?;
        streamer.check_arrivals().inspect_err(|_| pages.distrust())?;
        out.extend_from_slice(best);
        Ok(!best.contains(&NO_TOKEN))
    }

    /// The next token of each sequence of the batch before, whose `rows` these are in its order, drawn by `sampler` and appended
    /// to `out`. The sampler knows a sequence by its row, for which [`Sampler::begin`] has been called.
    ///
    /// # Errors
    /// [`Error::Setting`] for another number of rows, or as [`Sampler::choose`] and [`last_logits`](Self::last_logits).
    pub fn sample(&mut self, rows: &[usize], sampler: &mut Sampler, out: &mut Vec<u32>) -> Result<()> {
        self.check_rows(rows)?;
        let (mut logits, mut rows) = (mem::take(&mut sampler.logits), rows.iter());
        let sampled = self.last_logits_by(&mut logits, |logits| {
            let row = rows.next().expect("a row for each sequence");
            out.push(sampler.choose(*row, logits)?);
            Ok(())
        });
        sampler.logits = logits;
        sampled
    }

    /// The logits of the last token of each sequence of the batch before, in its order: `sink` is given a row of the
    /// vocabulary's length for each.
    ///
    /// # Errors
    /// As [`greedy`](Self::greedy), or what `sink` returns.
    pub fn last_logits<E: From<Error>>(&mut self, sink: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        self.last_logits_by(&mut Vec::new(), sink)
    }

    /// The same, by way of memory that can be used again.
    fn last_logits_by<E: From<Error>>(
        &mut self,
        rows: &mut Vec<f32>,
        mut sink: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check_passed()?;
        self.device.bind_thread()?;
        let Self { streamer, stream, device, statics, buffers, model, pass, pages, last_logits_there, .. } = self;
        let head = Head { device, stream, config: &model.config, buffers, norm: statics.tensor(&model.names.norm)? };
        rows.resize(HEAD_BLOCK.min(pass.sequences) * model.config.vocab, 0.0);
        let mut tell = |streamer: &LayerStreamer<D>, first, count| {
            let rows = &mut rows[..count * model.config.vocab];
            device::download(device, stream, head.logits(first, count)?, rows)?;
            streamer.check_arrivals().inspect_err(|_| pages.distrust())?;
            rows.chunks_exact(model.config.vocab).try_for_each(&mut sink)
        };
        if !model.tables.streams_head() {
            let weight = statics.tensor(&model.names.head)?;
            return blocks(pass.sequences).try_for_each(|(start, count)| {
                head.project_last(weight, start, count)?;
                tell(streamer, 0, count)
            });
        }
        if !mem::replace(last_logits_there, true) {
            streamer.run_pass(stream, 0, |column, layer| match layer.index() < model.config.layers {
                true => Ok::<_, Error>(column),
                false => head.choose_by_part(layer, pass.sequences, column),
            })?;
        }
        blocks(pass.sequences).try_for_each(|(start, count)| tell(streamer, start, count))
    }

    /// The logits of every token of the batch before, in order, as rows of the vocabulary's length, a few rows at a time. Where
    /// the head is [streamed](super::Tables::HeadStreamed) it comes anew for these few, in a pass of all units.
    ///
    /// # Errors
    /// [`Error::Setting`] if that batch took [several passes](Self::pass_tokens); else as [`greedy`](Self::greedy) and
    /// [`LayerStreamer::run_pass`](crate::LayerStreamer::run_pass), or what `sink` returns.
    pub fn all_logits<E: From<Error>>(&mut self, mut sink: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        self.check_passed()?;
        if !self.pass.is_whole() {
            let cause =
                format!("of all tokens are there after one pass, of at most {} tokens: give fewer", self.pass_tokens());
            return Err(Error::setting("logits", cause).into());
        }
        self.device.bind_thread()?;
        self.last_logits_there = false;
        let Self { streamer, stream, device, statics, buffers, model, pass, pages, .. } = self;
        let (config, streams_head) = (&model.config, model.tables.streams_head());
        let (hidden, vocab, tokens) = (config.hidden, config.vocab, pass.tokens);
        let head = Head { device, stream, config, buffers, norm: statics.tensor(&model.names.norm)? };
        let most = if streams_head { buffers.capacity.batch.max(HEAD_BLOCK.min(tokens)) } else { HEAD_BLOCK };
        let mut rows_out = Vec::new();
        for start in (0..tokens).step_by(most) {
            let rows = most.min(tokens - start);
            head.norm(buffers.work.read(buffers.at.residual, start * hidden, &[rows, hidden])?, 0)?;
            if streams_head {
                streamer.run_pass(stream, 0, |column, layer| match layer.index() < config.layers {
                    true => Ok::<_, Error>(column),
                    false => head.part(layer, rows, column),
                })?;
            } else {
                head.project(statics.tensor(&model.names.head)?, rows)?;
            }
            rows_out.resize(rows * vocab, 0.0);
            device::download(device, stream, head.logits(0, rows)?, &mut rows_out)?;
            streamer.check_arrivals().inspect_err(|_| pages.distrust())?;
            sink(&rows_out)?;
        }
        Ok(())
    }

    /// Whether these can be the rows of the batch before.
    pub(super) fn check_rows(&self, rows: &[usize]) -> Result<()> {
        if rows.len() != self.sequences() {
            let cause = format!("are {}, but the pass before had {} sequences", rows.len(), self.sequences());
            return Err(Error::setting("rows", cause));
        }
        match rows.iter().find(|&&row| row >= self.held.len()) {
            Some(row) => Err(Error::setting("rows", format!("have {row}, the KV cache has {} rows", self.held.len()))),
            None => Ok(()),
        }
    }

    fn check_passed(&self) -> Result<()> {
        if self.pass.tokens > 0 { Ok(()) } else { Err(Error::setting("logits", "need a forward pass that succeeded")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Cpu,
        model::{Model, Sequence, Tables},
        plan::Settings,
    };

    #[test]
    fn the_last_logits_are_those_of_each_sequence_s_last_token_whenever_they_are_asked_for() {
        let ids: Vec<u32> = (0..3 * 20).map(|i| 3 + i * 7919 % 300).collect();
        let batch: Vec<_> = (0..20).map(|row| Sequence { row, tokens: &ids[row * 3..row * 3 + 1 + row % 3] }).collect();
        for tables in [Tables::OnDevice, Tables::EmbeddingInFile, Tables::HeadStreamed] {
            let model = Model::open("tests/data/qwen2-tied").unwrap().with_tables(tables);
            let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 20, 8).unwrap();
            assert!(decoder.last_logits(|_| Ok::<_, Error>(())).is_err(), "before any pass");
            decoder.forward(&batch).unwrap();
            let last = |decoder: &mut Decoder<Cpu>| {
                let mut rows = Vec::<Vec<f32>>::new();
                let kept = decoder.last_logits(|row| {
                    rows.push(row.to_vec());
                    Ok::<_, Error>(())
                });
                kept.unwrap();
                rows
            };
            let (first, again) = (last(&mut decoder), last(&mut decoder));
            let mut all = Vec::new();
            let vocab = model.config.vocab;
            let kept = decoder.all_logits(|rows| {
                all.extend(rows.chunks(vocab).map(<[_]>::to_vec));
                Ok::<_, Error>(())
            });
            kept.unwrap();
            let mut end = 0;
            let expected = batch.iter().map(|sequence| {
                end += sequence.tokens.len();
                all[end - 1].clone()
            });
            let expected: Vec<_> = expected.collect();
            for found in [&first, &again, &last(&mut decoder)] {
                assert!(*found == expected, "{tables:?}");
            }
            let mut best = Vec::new();
            decoder.greedy(&mut best).unwrap();
            for (row, best) in expected.iter().zip(best) {
                assert!(row.iter().all(|logit| *logit <= row[best as usize]), "{tables:?}");
            }
        }
    }
}
