//! A batch of tokens through the model.

use super::{
    batch::{Pass, Sequence, passes},
    decoder::Decoder,
    head::Head,
    layer::LayerMath,
};
use crate::{
    device::TensorRef,
    error::{Error, Result},
    kernels::Kernels,
    pipeline::Layer,
};

impl<D: Kernels> Decoder<D> {
    /// Runs all tokens of `batch` through the model, in one pass over the layers, and keeps their keys and values. More tokens
    /// than [`pass_tokens`](Self::pass_tokens) take more passes, and give the same. The pages that they need in the KV cache are
    /// taken first.
    ///
    /// What a token comes to depends on the tokens before it in its sequence and on nothing else, to the last bit: neither on the
    /// rest of the batch, nor on the passes its sequence took, nor on where anything is kept.
    ///
    /// Where a model's rotary frequencies depend on how long a sequence is ([`Rope::grows`](super::Rope::grows)), and these tokens
    /// change them, the sequence is computed anew from its first token on: what comes of it is always what one pass over the
    /// whole sequence gives. Its tokens so far are then among those that are observed, and among
    /// [`all_logits`](Self::all_logits).
    ///
    /// # Errors
    /// [`Error::Setting`] if a row is out of range or named twice, a sequence has no token or would outgrow the context, or
    /// a token is not in the vocabulary; [`Error::Pages`] if the KV cache has too few free pages; else the streamer's. After an
    /// error the cache is as it was before.
    pub fn forward(&mut self, batch: &[Sequence<'_>]) -> Result<()> {
        self.forward_observed(batch, |_, _, _| Ok(()))
    }

    /// As [`forward`](Self::forward); after each layer of each pass `observe` is given its number, the residual stream `[T, H]`
    /// of the pass's tokens, and the device's stream on which that is computed.
    ///
    /// # Errors
    /// As there, or what `observe` returns.
    pub fn forward_observed(
        &mut self,
        batch: &[Sequence<'_>],
        observe: impl FnMut(usize, TensorRef<'_, D>, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        self.check_batch(batch)?;
        self.device.bind_thread()?;
        let passed = self.take_pages(batch).and_then(|()| match self.renewal {
            Some(_) => self.forward_renewing(batch, observe),
            None => self.forward_passes(batch, observe),
        });
        if passed.is_err() {
            batch.iter().for_each(|sequence| self.pages.cut(sequence.row, self.held[sequence.row].len()));
        }
        passed
    }

    /// Takes the pages that a batch needs, all or none.
    fn take_pages(&mut self, batch: &[Sequence<'_>]) -> Result<()> {
        let Self { pages, held, buffers, device, stream, model, .. } = self;
        let sizes = batch.iter().map(|sequence| (sequence.row, held[sequence.row].len(), sequence.tokens.len()));
        pages.grow(sizes, |from, to| buffers.copy_page(device, stream, &model.config, [from, to]))
    }

    /// Runs a batch that was checked and has its pages.
    pub(super) fn forward_passes(
        &mut self,
        batch: &[Sequence<'_>],
        mut observe: impl FnMut(usize, TensorRef<'_, D>, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        (self.pass.tokens, self.last_logits_there) = (0, false);
        let longest = batch.iter().map(|sequence| self.pages.of(sequence.row).len()).max().unwrap_or(0);
        let mut last = Pass::default();
        for pass in passes(batch, self.buffers.capacity.passes(), longest) {
            self.run(batch, pass, &mut observe)?;
            last = pass;
        }
        // At the end, so that the tokens of passes before one that failed are forgotten.
        for sequence in batch {
            let held = &mut self.held[sequence.row];
            let before = held.len();
            held.extend_from_slice(sequence.tokens);
            if self.renewal.is_none() {
                self.pages.fill(sequence.row, before, held);
            }
        }
        (self.pass, self.last_logits_there) = (last, self.model.tables.streams_head());
        Ok(())
    }

    /// One pass: sends the words, embeds, and computes each layer as it arrives, then the parts of a streamed head.
    fn run(
        &mut self,
        batch: &[Sequence<'_>],
        pass: Pass,
        observe: &mut impl FnMut(usize, TensorRef<'_, D>, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        let Self { streamer, stream, device, statics, buffers, model, exchange, rows, held, pages, .. } = self;
        let (work, at, config) = (&buffers.work, &buffers.at, &model.config);
        let words = pass.fill(exchange.words()?, batch, |row| held[row].len(), |row| pages.of(row));
        exchange.send(work.write(at.words, 0, &[words])?, stream)?;
        let shape = [pass.tokens, config.hidden];
        match rows {
            Some(rows) => rows.send(pass.ids(batch), work, at.residual, stream)?,
            None => {
                let (ids, residual) = (work.read(at.words, 0, &[pass.tokens])?, work.write(at.residual, 0, &shape)?);
                device.embed(stream, statics.tensor(&model.names.embed)?, ids, residual)?;
            }
        }
        if config.multipliers.embedding != 1.0 {
            device.scale(stream, work.write(at.residual, 0, &shape)?, config.multipliers.embedding)?;
        }
        let math = LayerMath { device, stream, config, buffers, pass, batch };
        let head = Head { device, stream, config, buffers, norm: statics.tensor(&model.names.norm)? };
        let compute = |column, layer: &Layer<'_, D>| {
            let number = layer.index();
            if number < config.layers {
                math.layer(layer)?;
                observe(number, work.read(at.residual, 0, &shape)?, stream)?;
                if number + 1 == config.layers {
                    head.keep_last(pass)?;
                }
            } else if pass.is_last() {
                return head.choose_by_part(layer, pass.sequences, column);
            }
            Ok::<_, Error>(column)
        };
        streamer.run_pass(stream, 0, compute)?;
        Ok(())
    }

    fn check_batch(&self, batch: &[Sequence<'_>]) -> Result<()> {
        if batch.is_empty() {
            return Err(Error::setting("batch", "has no sequence"));
        }
        let context = self.context();
        for (number, sequence) in batch.iter().enumerate() {
            let length = self.row(sequence.row)?.len();
            if batch[..number].iter().any(|other| other.row == sequence.row) {
                return Err(Error::setting("row", format!("{} is in the batch twice", sequence.row)));
            }
            if sequence.tokens.is_empty() {
                return Err(Error::setting("prompt", "is empty; give at least one token"));
            }
            if length + sequence.tokens.len() > context {
                let cause =
                    format!("{} tokens after {length} exceed the context of {}", sequence.tokens.len(), context);
                return Err(Error::setting("prompt", cause));
            }
            if let Some(id) = sequence.tokens.iter().find(|&&id| id as usize >= self.model.config.vocab) {
                let cause = format!("token {id} is not in the vocabulary of {}", self.model.config.vocab);
                return Err(Error::setting("prompt", cause));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, ops::ControlFlow};

    use super::*;
    use crate::{
        device::{self, Cpu},
        model::{Cache, Choice, Model, Tables, buffers::Capacity},
        plan::Settings,
        trace::Stage,
    };

    /// Next tokens, residual streams layer by layer, and bytes computed with, of a batch whose passes have so many tokens.
    fn run(model: &Model, most: usize, batch: &[Sequence<'_>]) -> (Vec<u32>, Vec<Vec<u32>>, u64) {
        let capacity = Capacity::new(&Cpu, &model.config, Cache::full(4, 500)).unwrap().in_passes_of(most);
        let mut decoder = Decoder::with_capacity(&Cpu, model, &Settings::default(), capacity, &[]).unwrap();
        let residuals = RefCell::new(vec![Vec::new(); model.config.layers]);
        let pass = decoder.forward_observed(batch, |layer, residual, stream| {
            let mut hidden = vec![0f32; residual.elements()];
            device::download(&Cpu, stream, residual, &mut hidden)?;
            residuals.borrow_mut()[layer].extend(hidden.into_iter().map(f32::to_bits));
            Ok(())
        });
        pass.unwrap();
        let (bytes, mut tokens) = (decoder.streamer().stats().stage(Stage::Compute).bytes, Vec::new());
        let sees_all = decoder.all_logits(|_| Ok::<_, Error>(())).map_err(|error| error.to_string());
        assert_eq!(sees_all.is_ok(), most >= 808, "{sees_all:?}");
        assert!(sees_all.err().is_none_or(|said| said.contains(&format!("at most {} tokens", decoder.pass_tokens()))));
        let rows: Vec<_> = batch.iter().map(|sequence| sequence.row).collect();
        let mut decoded = vec![Vec::new(); 4];
        decoder
            .decode(&rows, 4, &[], Choice::Greedy, |row, token| {
                decoded[row].push(token);
                Ok::<_, Error>(ControlFlow::Continue(()))
            })
            .unwrap();
        tokens.extend(decoded.into_iter().flatten());
        (tokens, residuals.into_inner(), bytes)
    }

    #[test]
    fn a_batch_in_several_passes_gives_to_the_bit_what_one_pass_gives() {
        let ids: Vec<u32> = (0..490u32).map(|i| 3 + i * 7919 % 300).collect();
        let batch: Vec<_> =
            [(2, 300), (0, 1), (3, 490), (1, 17)].map(|(row, count)| Sequence { row, tokens: &ids[..count] }).to_vec();
        for tables in [Tables::OnDevice, Tables::EmbeddingInFile, Tables::HeadStreamed] {
            let model = Model::open("tests/data/qwen2-tied").unwrap().with_tables(tables);
            let (tokens, residuals, bytes) = run(&model, 808, &batch);
            for (most, passes) in [(1, 4), (512, 2), (700, 2)] {
                let found = run(&model, most, &batch);
                assert_eq!(found.0, tokens, "{tables:?}, {most}");
                assert!(found.1 == residuals, "{tables:?}, {most}: residual streams");
                assert_eq!(found.2, passes * bytes, "{tables:?}, {most}");
            }
        }
    }

    #[test]
    fn a_pass_that_fails_takes_back_the_tokens_of_the_passes_before_it() {
        let model = Model::open("tests/data/qwen2-tied").unwrap();
        let capacity = Capacity::new(&Cpu, &model.config, Cache::full(2, 500)).unwrap().in_passes_of(256);
        let mut decoder = Decoder::with_capacity(&Cpu, &model, &Settings::default(), capacity, &[]).unwrap();
        let (tokens, mut layers) = ([5; 400], 0);
        let failed = decoder.forward_observed(&[Sequence { row: 0, tokens: &tokens }], |_, _, _| {
            layers += 1;
            let fails = layers > model.config.layers;
            if fails { Err(Error::Kernel { kernel: "test", cause: "on purpose".into() }) } else { Ok(()) }
        });
        assert!(failed.is_err() && decoder.length(0) == 0 && decoder.greedy(&mut Vec::new()).is_err());
        decoder.forward(&[Sequence { row: 0, tokens: &tokens }]).unwrap();
        assert_eq!(decoder.length(0), 400);
    }

    #[test]
    fn room_for_passes_grows_with_what_one_sequence_may_have_and_not_with_how_many_there_are() {
        let mut config = Model::open("tests/data/qwen2-tied").unwrap().config;
        config.max_positions = 1 << 20;
        let most = |batch, context| Capacity::new(&Cpu, &config, Cache::full(batch, context)).unwrap().pass_tokens;
        assert_eq!((most(1, 3), most(100, 48), most(1, 100_000)), (3, 4800, 100_000));
        assert_eq!((most(64, 8192), most(1000, 512), most(2, 10_000)), (8192, 8192, 10_240));
    }
}
