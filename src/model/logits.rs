//! What a decoder tells of a pass: next tokens and logits.

use super::{buffers::HEAD_BLOCK, decoder::Decoder, head::Head, weights::NORM};
use crate::{
    device,
    error::{Error, Result},
    kernels::Kernels,
};

impl<D: Kernels> Decoder<D> {
    /// The most likely next token of each sequence of the batch before, in its order, appended to `out`.
    ///
    /// # Errors
    /// [`Error::Setting`] if no pass went before, or the device's own.
    pub fn greedy(&mut self, out: &mut Vec<u32>) -> Result<()> {
        self.check_passed()?;
        self.device.bind_thread()?;
        let Self { stream, device, statics, buffers, model, exchange, pass, .. } = self;
        if !model.tables.streams_head() {
            let head = Head { device, stream, config: &model.config, buffers, norm: statics.tensor(NORM)? };
            head.choose_by(statics.tensor(model.head_name())?, pass.sequences)?;
        }
        let best = buffers.work.read(buffers.at.best, 0, &[pass.sequences])?;
        out.extend_from_slice(exchange.receive(best, stream)?);
        Ok(())
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
        let Self { streamer, stream, device, statics, buffers, model, pass, .. } = self;
        let (config, streams_head) = (&model.config, model.tables.streams_head());
        let (hidden, vocab, tokens) = (config.hidden, config.vocab, pass.tokens);
        let head = Head { device, stream, config, buffers, norm: statics.tensor(NORM)? };
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
                head.project(statics.tensor(model.head_name())?, rows, 0)?;
            }
            rows_out.resize(rows * vocab, 0.0);
            let logits = buffers.work.read(buffers.at.logits, 0, &[rows, vocab])?;
            device::download(device, stream, logits, &mut rows_out)?;
            sink(&rows_out)?;
        }
        Ok(())
    }

    fn check_passed(&self) -> Result<()> {
        if self.pass.tokens > 0 { Ok(()) } else { Err(Error::setting("logits", "need a forward pass that succeeded")) }
    }
}
