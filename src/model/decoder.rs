//! A decoder-only transformer whose layers are computed as they arrive: its memory, and how it is made.
//!
//! A pass takes many tokens of any number of sequences. Inside each layer they go through in blocks of a fixed size, so that of
//! all buffers only the residual stream grows with the tokens of a pass, and the KV cache with the context.

use std::{fmt, sync::Arc};

use super::{
    batch::Pass,
    buffers::{self, Buffers, Capacity},
    embedding::EmbeddingRows,
    exchange::Exchange,
    renewal::Renewal,
    weights::Model,
};
use crate::{
    error::{Error, Result},
    kernels::Kernels,
    pipeline::{LayerStreamer, StaticTensors},
    plan::{Part, Placement, Plan, Settings, Sharing},
    trace::Observer,
};

/// A model with its memory on a device. The KV cache holds `batch` sequences of up to `context` tokens.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use layer_streamer::{
///     Error, Settings,
///     device::Cpu,
///     model::{Choice, Decoder, Model},
/// };
///
/// // Spells numbers; these are its tokens for `7=`.
/// let model = Model::open("examples/speller")?;
/// let prompt = [23, 29];
/// let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 1, 16)?;
///
/// let mut tokens = Vec::new();
/// decoder.generate(&[&prompt], 8, &model.config.stop, Choice::Greedy, |_row, token| {
///     tokens.push(token);
///     Ok::<_, Error>(ControlFlow::Continue(()))
/// })?;
/// assert_eq!(tokens, [284], "` seven`, and the end");
/// # Ok::<(), Error>(())
/// ```
pub struct Decoder<D: Kernels> {
    pub(super) model: Model,
    /// Where the model's parts are kept, for people.
    placement: Placement,
    pub(super) device: D,
    pub(super) streamer: LayerStreamer<D>,
    pub(super) statics: StaticTensors<D>,
    pub(super) stream: D::Stream,
    pub(super) buffers: Buffers<D>,
    /// The tokens that each row of the cache holds.
    pub(super) held: Vec<Vec<u32>>,
    /// Of a model whose rotary frequencies depend on how long a sequence is.
    pub(super) renewal: Option<Renewal>,
    /// The last pass of the batch before; without tokens if there was none, or it failed.
    pub(super) pass: Pass,
    /// Whether the logits of that batch's last tokens are where the parts of a streamed head left them.
    pub(super) last_logits_there: bool,
    pub(super) exchange: Exchange<D>,
    /// Where the embedding table stays in its file.
    pub(super) rows: Option<EmbeddingRows<D>>,
}

impl<D: Kernels> fmt::Debug for Decoder<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Capacity { batch, context, pass_tokens }, config) = (self.buffers.capacity, &self.model.config);
        let model = format_args!("{}, {} layers of width {}", config.family.model_type, config.layers, config.hidden);
        f.debug_struct("Decoder")
            .field("model", &model)
            .field("batch", &batch)
            .field("context", &context)
            .field("pass_tokens", &pass_tokens)
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}

impl<D: Kernels> Decoder<D> {
    /// Reserves everything, loads what stays on the device, and starts streaming.
    ///
    /// # Errors
    /// [`Error::Setting`] for a batch or context of 0, or a context longer than the model's;
    /// [`Error::Kernel`] for heads that the device cannot compute; else as [`LayerStreamer::new`].
    pub fn new(device: &D, model: &Model, settings: &Settings, batch: usize, context: usize) -> Result<Self> {
        Self::with_observers(device, model, settings, batch, context, &[])
    }

    /// As [`Decoder::new`], with those who see what the streamer does.
    ///
    /// # Errors
    /// As there.
    pub fn with_observers(
        device: &D,
        model: &Model,
        settings: &Settings,
        batch: usize,
        context: usize,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self> {
        let capacity = Capacity::new(&model.config, batch, context)?;
        Self::with_capacity(device, model, settings, capacity, observers)
    }

    pub(super) fn with_capacity(
        device: &D,
        model: &Model,
        settings: &Settings,
        capacity: Capacity,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self> {
        device.check_head_size(model.config.head_dim)?;
        device.bind_thread()?;
        let (precision, tokens) = (device.precision(), capacity.pass_tokens);
        let stream = device.stream()?;
        device.prepare(&stream)?;
        let buffers = Buffers::new(device, model, capacity)?;
        let exchange = Exchange::new(device, "tokens on their way", capacity.words())?;
        let rows = match model.tables.reads_rows() {
            true => Some(EmbeddingRows::new(device, &model.checkpoint, &model.names.embed, precision.weight, tokens)?),
            false => None,
        };
        // First, while nothing else reads.
        let statics = StaticTensors::new(device, &model.checkpoint, &model.statics_for(precision), settings)?;
        let streamer =
            LayerStreamer::with_observers(device, model.source(), &model.units_for(precision), settings, observers)?;
        buffers.send_constants(device, &stream, &model.config)?;
        Ok(Self {
            device: device.clone(),
            streamer,
            statics,
            stream,
            buffers,
            held: vec![Vec::new(); capacity.batch],
            renewal: Renewal::of(&model.config, capacity.batch),
            pass: Pass::default(),
            last_logits_there: false,
            exchange,
            rows,
            placement: model.placement(settings),
            model: model.clone(),
        })
    }

    /// What [`Decoder::new`] will reserve with the same arguments.
    ///
    /// # Errors
    /// As there, as far as can be known beforehand.
    pub fn memory(device: &D, model: &Model, settings: &Settings, batch: usize, context: usize) -> Result<Vec<Part>> {
        let mut parts = Self::plan(device, model, settings)?.memory();
        parts.extend(buffers::parts(device, model, Capacity::new(&model.config, batch, context)?)?);
        Ok(parts)
    }

    /// What the streamer of [`Decoder::new`] will do with the same arguments.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn plan(device: &D, model: &Model, settings: &Settings) -> Result<Plan> {
        Plan::new(model.source(), &model.units_for(device.precision()), settings, Sharing::of(device))
    }

    /// How many tokens of sequence `row` the KV cache holds.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn length(&self, row: usize) -> usize {
        self.held[row].len()
    }

    /// The tokens of sequence `row` that the KV cache holds.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn tokens(&self, row: usize) -> &[u32] {
        &self.held[row]
    }

    /// How many sequences the batch before had.
    pub fn sequences(&self) -> usize {
        self.pass.sequences
    }

    /// How many sequences the KV cache has rows for.
    pub fn rows(&self) -> usize {
        self.buffers.capacity.batch
    }

    /// How many tokens a sequence may have.
    pub fn context(&self) -> usize {
        self.buffers.capacity.context
    }

    /// The most tokens that a pass takes, of all sequences together: any sequence's context, or all that the KV cache holds
    /// where that is not much. [`forward`](Self::forward) runs more tokens in several passes, and then
    /// [`all_logits`](Self::all_logits) has none to give.
    pub fn pass_tokens(&self) -> usize {
        self.buffers.capacity.pass_tokens
    }

    /// Forgets all tokens of sequence `row` from number `length` on.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such row, or it is shorter.
    pub fn truncate(&mut self, row: usize, length: usize) -> Result<()> {
        match self.held.get_mut(row) {
            Some(held) if length <= held.len() => held.truncate(length),
            Some(held) => {
                let held = held.len();
                return Err(Error::setting("truncate", format!("to {length}, but row {row} holds {held} tokens")));
            }
            None => {
                return Err(Error::setting(
                    "row",
                    format!("is {row}, the KV cache has {} rows", self.buffers.capacity.batch),
                ));
            }
        }
        Ok(())
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The streamer underneath, for its counts and hooks.
    pub fn streamer(&mut self) -> &mut LayerStreamer<D> {
        &mut self.streamer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Cpu;

    #[test]
    fn a_decoder_says_what_it_is_and_where_its_parts_live_in_a_few_lines() {
        let model = Model::open("examples/speller").unwrap();
        let decoder = Decoder::new(&Cpu, &model, &Settings::default(), 2, 16).unwrap();
        let said = format!("{decoder:?}");
        for part in
            ["qwen2, 8 layers of width 128", "batch: 2", "context: 16", "pass_tokens: 32", "n_gpu: 2", "on-device"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(said.len() < 1000, "{said}");
    }
}
