//! A decoder-only transformer whose layers are computed as they arrive: its memory, and how it is made.
//!
//! A pass takes many tokens of any number of sequences. Inside each layer they go through in blocks of a fixed size, so that of
//! all buffers only the residual stream grows with the tokens of a pass, and the KV cache with the context.

use std::{fmt, sync::Arc};

use super::{
    batch::Pass,
    buffers::{self, Buffers, Cache, Capacity},
    embedding::EmbeddingRows,
    exchange::Exchange,
    pages::Pages,
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

/// A model with its memory on a device. Its KV cache lies in pages, which sequences take as they grow; those that begin alike
/// share what they have in common.
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
    /// Where in the cache they lie.
    pub(super) pages: Pages,
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
        let (Capacity { batch, context, pages, pass_tokens, .. }, config) = (self.buffers.capacity, &self.model.config);
        let model = format_args!("{}, {} layers of width {}", config.family.model_type, config.layers, config.hidden);
        f.debug_struct("Decoder")
            .field("model", &model)
            .field("batch", &batch)
            .field("context", &context)
            .field("pages", &pages)
            .field("pass_tokens", &pass_tokens)
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}

impl<D: Kernels> Decoder<D> {
    /// Reserves everything, loads what stays on the device, and starts streaming. The KV cache has room for `batch` sequences of
    /// `context` tokens, all at once.
    ///
    /// # Errors
    /// [`Error::Setting`] for a batch or context of 0, or a context longer than the model's;
    /// [`Error::Kernel`] for heads that the device cannot compute; else as [`LayerStreamer::new`].
    pub fn new(device: &D, model: &Model, settings: &Settings, batch: usize, context: usize) -> Result<Self> {
        Self::with_cache(device, model, settings, Cache::full(batch, context))
    }

    /// As [`Decoder::new`], with a KV cache that may have room for fewer tokens than all sequences with their whole context.
    ///
    /// # Errors
    /// As there, and [`Error::Setting`] for a cache with less room than one context.
    pub fn with_cache(device: &D, model: &Model, settings: &Settings, cache: Cache) -> Result<Self> {
        Self::with_observers(device, model, settings, cache, &[])
    }

    /// As [`Decoder::with_cache`], with those who see what the streamer does.
    ///
    /// # Errors
    /// As there.
    pub fn with_observers(
        device: &D,
        model: &Model,
        settings: &Settings,
        cache: Cache,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self> {
        let capacity = Capacity::new(device, &model.config, cache)?;
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
            pages: Pages::new(capacity.pages, capacity.batch),
            renewal: Renewal::of(&model.config, capacity.batch),
            pass: Pass::default(),
            last_logits_there: false,
            exchange,
            rows,
            placement: model.placement(settings),
            model: model.clone(),
        })
    }

    /// What [`Decoder::with_cache`] will reserve with the same arguments.
    ///
    /// # Errors
    /// As there, as far as can be known beforehand.
    pub fn memory(device: &D, model: &Model, settings: &Settings, cache: Cache) -> Result<Vec<Part>> {
        let mut parts = Self::plan(device, model, settings)?.memory();
        parts.extend(buffers::parts(device, model, Capacity::new(device, &model.config, cache)?)?);
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

    /// Pages of the KV cache, of [`PAGE`](crate::kernels::PAGE) tokens, that no sequence has. Those that are kept of sequences that
    /// ended, for others that begin alike, are among them.
    pub fn free_pages(&self) -> usize {
        self.pages.available()
    }

    /// Free pages that [`forward`](Self::forward) takes for `tokens` more tokens of sequence `row`. A batch has its pages if those of
    /// its sequences are no more than are [free](Self::free_pages).
    ///
    /// # Panics
    /// If there is no such row.
    pub fn pages_for(&self, row: usize, tokens: usize) -> usize {
        self.pages.needed(row, self.length(row), tokens)
    }

    /// The most tokens that a pass takes, of all sequences together: any sequence's context, or all that the KV cache holds
    /// where that is not much. [`forward`](Self::forward) runs more tokens in several passes, and then
    /// [`all_logits`](Self::all_logits) has none to give.
    pub fn pass_tokens(&self) -> usize {
        self.buffers.capacity.pass_tokens
    }

    /// Begins sequence `row`, which must hold no tokens: takes over the pages that the KV cache has of the beginning of `tokens`,
    /// of sequences that are there and of such that ended. Returns how many tokens the sequence then holds: whole pages, and
    /// less than all of `tokens`. The others are for [`forward`](Self::forward), and give what they would without this, to the
    /// last bit.
    ///
    /// Of a model whose rotary frequencies depend on how long a sequence is ([`Rope::grows`](super::Rope::grows)) nothing is taken
    /// over.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such row, or it holds tokens.
    pub fn begin(&mut self, row: usize, tokens: &[u32]) -> Result<usize> {
        let held = self.row(row)?.len();
        if held > 0 {
            return Err(Error::setting("begin", format!("needs an empty row, but row {row} holds {held} tokens")));
        }
        Ok(self.take_over(row, tokens))
    }

    /// Takes over pages that are known by now for a row that holds whole pages of `tokens`. Returns how many tokens it then holds.
    pub(crate) fn take_over(&mut self, row: usize, tokens: &[u32]) -> usize {
        let taken = self.pages.begin(row, tokens);
        let held = &mut self.held[row];
        held.extend_from_slice(&tokens[held.len()..taken]);
        taken
    }

    /// What the page will be known by that a row computes next, once it holds so many more of `tokens`, all that it is to hold: rows of
    /// which this is the same compute the same page. `None` if the page will not be known.
    pub(crate) fn next_page<'a>(&self, row: usize, tokens: &'a [u32]) -> Option<(u64, &'a [u32])> {
        let is_known = self.renewal.is_none();
        is_known.then(|| self.pages.next(row, self.length(row), tokens)).flatten()
    }

    /// What happens to the pages where weights are found to be corrupt.
    #[cfg(test)]
    pub(crate) fn forget_pages(&mut self) {
        self.pages.distrust();
    }

    /// Forgets all tokens of sequence `row` from number `length` on, and gives back the pages behind them. A sequence that then
    /// goes on within a page that others have too does so in a copy.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such row, or it is shorter.
    pub fn truncate(&mut self, row: usize, length: usize) -> Result<()> {
        let held = self.row(row)?.len();
        if length > held {
            return Err(Error::setting("truncate", format!("to {length}, but row {row} holds {held} tokens")));
        }
        self.held[row].truncate(length);
        self.pages.cut(row, length);
        Ok(())
    }

    /// The tokens of a row, if there is one.
    pub(super) fn row(&self, row: usize) -> Result<&[u32]> {
        let held = self.held.get(row).map(Vec::as_slice);
        held.ok_or_else(|| Error::setting("row", format!("is {row}, the KV cache has {} rows", self.held.len())))
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
    use crate::{device::Cpu, kernels::PAGE, model::Sequence};

    /// A decoder with so many pages for rows of up to 256 tokens.
    fn decoder(pages: usize) -> Decoder<Cpu> {
        let mut model = Model::open("tests/data/qwen2-tied").unwrap();
        model.config.max_positions = 256;
        let cache = Cache { sequences: 3, context: 256, tokens: pages * PAGE };
        Decoder::with_cache(&Cpu, &model, &Settings::default(), cache).unwrap()
    }

    fn ids(count: usize) -> Vec<u32> {
        (0..count as u32).map(|i| 3 + i * 7919 % 300).collect()
    }

    /// The bits of the logits of a row's last token, after these tokens.
    fn forward(decoder: &mut Decoder<Cpu>, row: usize, tokens: &[u32]) -> Vec<u32> {
        decoder.forward(&[Sequence { row, tokens }]).unwrap();
        let mut bits = Vec::new();
        let told = decoder.last_logits(|logits| {
            bits.extend(logits.iter().map(|logit| logit.to_bits()));
            Ok::<_, Error>(())
        });
        told.unwrap();
        bits
    }

    fn alone(tokens: &[u32]) -> Vec<u32> {
        forward(&mut decoder(4), 0, tokens)
    }

    #[test]
    fn a_batch_without_pages_is_refused_and_changes_nothing() {
        let (mut decoder, ids) = (decoder(5), ids(256));
        assert_eq!((decoder.free_pages(), decoder.pages_for(0, 129)), (5, 3));
        forward(&mut decoder, 0, &ids[..129]);
        forward(&mut decoder, 1, &ids[100..228]);
        // The first of these has its page, the second has not.
        let both = [(0, 63), (2, 1)].map(|(row, count)| Sequence { row, tokens: &ids[..count] });
        let cut = (decoder.truncate(1, 70), decoder.free_pages(), decoder.pages_for(2, 65));
        assert!(matches!(cut, (Ok(()), 0, 2)), "{cut:?}");
        let refused = decoder.forward(&both).unwrap_err();
        assert!(matches!(refused, Error::Pages { needed: 1, available: 0 }));
        let said = refused.to_string();
        assert!(
            ["1 more pages of the KV cache", "0 are free", "truncate"].iter().all(|part| said.contains(part)),
            "{said}"
        );
        assert_eq!([0, 1, 2].map(|row| decoder.length(row)), [129, 70, 0]);
        assert_eq!(decoder.sequences(), 1, "of the batch before");
        decoder.truncate(1, 0).unwrap();
        decoder.forward(&both).unwrap();
        assert_eq!(forward(&mut decoder, 1, &ids[100..128]), alone(&ids[100..128]));
    }

    #[test]
    fn a_pass_that_fails_gives_back_the_pages_that_it_took() {
        let (mut decoder, ids) = (decoder(4), ids(256));
        forward(&mut decoder, 0, &ids[..70]);
        let batch = [(0, 100), (1, 60)].map(|(row, count)| Sequence { row, tokens: &ids[..count] });
        let failed = decoder
            .forward_observed(&batch, |_, _, _| Err(Error::Kernel { kernel: "test", cause: "on purpose".into() }));
        assert!(failed.is_err() && decoder.free_pages() == 2 && decoder.length(0) == 70);
        assert_eq!(forward(&mut decoder, 0, &ids[70..200]), alone(&ids[..200]));
    }

    #[test]
    fn a_row_that_takes_over_pages_gives_the_bits_that_it_gives_alone() {
        let (mut decoder, ids) = (decoder(6), ids(256));
        let other = [&ids[..100], &[5, 6, 7]].concat();
        forward(&mut decoder, 0, &ids[..200]);
        assert!(decoder.begin(0, &ids).is_err() && decoder.begin(3, &ids).is_err());
        decoder.truncate(0, 0).unwrap();
        assert_eq!((decoder.begin(1, &ids[..192]).unwrap(), decoder.tokens(1)), (128, &ids[..128]));
        assert_eq!((decoder.begin(2, &ids[..200]).unwrap(), decoder.free_pages()), (192, 3));
        assert_eq!(forward(&mut decoder, 2, &ids[192..200]), alone(&ids[..200]));
        // Cut within a page that both have: each goes on for itself.
        decoder.truncate(1, 100).unwrap();
        assert_eq!(decoder.pages_for(1, 3), 1);
        assert_eq!(forward(&mut decoder, 1, &other[100..]), alone(&other));
        assert_eq!(forward(&mut decoder, 2, &ids[200..203]), alone(&ids[..203]));
        // Within a page that is kept by nobody else: it is known for what it held no longer.
        decoder.truncate(1, 0).unwrap();
        decoder.truncate(2, 100).unwrap();
        assert_eq!(forward(&mut decoder, 2, &other[100..]), alone(&other));
        assert_eq!((decoder.begin(0, &ids[..200]).unwrap(), decoder.pages_for(0, 136)), (64, 3));
        assert_eq!(forward(&mut decoder, 0, &ids[64..200]), alone(&ids[..200]));
    }

    #[test]
    fn a_cache_with_less_room_than_a_context_is_refused() {
        let model = Model::open("examples/speller").unwrap();
        let cache = Cache { sequences: 2, context: 40, tokens: 39 };
        let refused = Decoder::with_cache(&Cpu, &model, &Settings::default(), cache).unwrap_err().to_string();
        assert!(refused.contains("39, expected at least a context of 40"), "{refused}");
    }

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
