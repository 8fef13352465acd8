//! What a decoder reserves on its device besides the weights: how large, and where each part lies.

use super::{
    batch::Pass,
    config::{ModelConfig, Norms},
    embedding::EmbeddingRows,
    exchange::Exchange,
    pages::pages_for,
    weights::Model,
    workspace::{Layout, Region, Workspace},
};
use crate::{
    device::{self, Device},
    dtype::DType,
    error::{Error, Result},
    kernels::{Kernels, PAGE, Precision},
    layout::UnitLayout,
    plan::{Part, Purpose},
};

/// Tokens that go through the output head at once.
pub(super) const HEAD_BLOCK: usize = 16;

/// Tokens that a pass of several sequences may always have, if the cache holds that many: where weights come over a link, their
/// computing takes about as long as a layer takes to come, so that more at once would win little.
const PASS_TOKENS: usize = 8192;

/// How much a decoder's KV cache holds. It lies in pages of [`PAGE`] tokens, of which each sequence takes as many as its tokens need.
///
/// ```
/// use layer_streamer::{
///     Settings,
///     device::Cpu,
///     model::{Cache, Decoder, Model},
/// };
///
/// // Up to eight sequences, any of which may have 128 tokens, but all of them together no more than 256.
/// let cache = Cache { sequences: 8, context: 128, tokens: 256 };
/// let model = Model::open("examples/speller")?;
/// let decoder = Decoder::with_cache(&Cpu, &model, &Settings::default(), cache)?;
/// assert_eq!(decoder.free_pages(), 4);
/// # Ok::<(), layer_streamer::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Rows: how many sequences there may be at once.
    pub sequences: usize,
    /// How many tokens a sequence may have.
    pub context: usize,
    /// How many tokens there is room for in all; at least a context. Rounded up to whole pages.
    pub tokens: usize,
}

impl Cache {
    /// Room for so many sequences that all have their whole context.
    pub fn full(sequences: usize, context: usize) -> Self {
        let tokens = sequences.saturating_mul(pages_for(context).saturating_mul(PAGE));
        Self { sequences, context, tokens }
    }
}

/// How much a decoder has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    /// Rows of the KV cache.
    pub(super) batch: usize,
    /// Tokens that a row may hold.
    pub(super) context: usize,
    /// Pages of all rows together.
    pub(super) pages: usize,
    /// The most tokens in a pass: all that the cache holds, or else whole blocks of them. The residual stream and the words
    /// that describe a pass are sized by it; a batch with more tokens takes several passes.
    pub(super) pass_tokens: usize,
    /// The most tokens that go through a layer at once.
    pub(super) block: usize,
}

impl Capacity {
    /// Room for any prompt in one pass; several sequences' prompts may take more than one.
    ///
    /// # Errors
    /// [`Error::Setting`] for a batch or context of 0, a context longer than the model's, or room for less than a context.
    pub(super) fn new<D: Kernels>(device: &D, config: &ModelConfig, cache: Cache) -> Result<Self> {
        let Cache { sequences: batch, context, tokens } = cache;
        if batch == 0 || batch > u16::MAX.into() {
            return Err(Error::setting("batch", format!("is {batch}, expected 1 to {}", u16::MAX)));
        }
        if context == 0 || context > config.max_positions {
            let most = config.max_positions;
            return Err(Error::setting("context", format!("is {context} tokens, this model takes 1 to {most}")));
        }
        if tokens < context {
            let cause = format!("of the KV cache are {tokens}, expected at least a context of {context}");
            return Err(Error::setting("tokens", cause));
        }
        let block = device.block_tokens(token_bytes(config, device.precision()));
        let capacity = Self { batch, context, pages: pages_for(tokens), pass_tokens: usize::MAX, block };
        Ok(capacity.in_passes_of(context.max(PASS_TOKENS)))
    }

    /// The same with passes of so many tokens, rounded up to whole blocks, where that is less than the cache holds.
    pub(super) fn in_passes_of(self, tokens: usize) -> Self {
        let all = self.batch.saturating_mul(self.context);
        Self { pass_tokens: tokens.max(1).next_multiple_of(self.block).min(all), ..self }
    }

    /// What memory for the cache is said to be for.
    fn purpose(self) -> Purpose {
        let Self { batch, context, pages, .. } = self;
        match batch.saturating_mul(pages_for(context)) == pages {
            true => Purpose::KvCache { sequences: batch, tokens: context },
            false => Purpose::KvCache { sequences: 1, tokens: pages.saturating_mul(PAGE) },
        }
    }

    /// The most tokens of a pass, and of its blocks.
    pub(super) fn passes(self) -> [usize; 2] {
        [self.pass_tokens, self.block]
    }

    /// The most words that describe a pass.
    pub(super) fn words(self) -> usize {
        Pass::most_words(self.passes(), self.batch, pages_for(self.context))
    }
}

/// Regions of the workspace. Those of `block` hold the tokens of one block.
pub(super) struct Regions {
    /// `[pass, hidden]`, F32.
    pub(super) residual: Region,
    /// The words of a [`Pass`].
    pub(super) words: Region,
    /// Of each rope its frequencies: `[pairs]`, or `[batch, pairs]` where they depend on the sequence's length.
    pub(super) ropes: Vec<Region>,
    /// `[block, hidden]`: what attention, and then the MLP, start from.
    pub(super) normed: Region,
    /// `[block, hidden]`: what they add to the residual stream.
    pub(super) branch: Region,
    /// The same in F32, in families that norm it before it is added.
    pub(super) wide_branch: Region,
    /// `[block, heads, head_dim]`, F32, for queries, then for keys.
    pub(super) unrotated: Region,
    pub(super) query: Region,
    pub(super) key: Region,
    pub(super) value: Region,
    pub(super) attn_out: Region,
    pub(super) gate: Region,
    pub(super) up: Region,
    /// `[batch, hidden]`, F32: the residual stream of each sequence's last token.
    pub(super) last: Region,
    pub(super) head_normed: Region,
    pub(super) logits: Region,
    /// What comes of a part of the head, for several tokens.
    pub(super) part: Region,
    /// `[batch]`: each sequence's next token.
    pub(super) best: Region,
}

/// A decoder's device memory.
pub(super) struct Buffers<D: Device> {
    pub(super) capacity: Capacity,
    pub(super) cache: Workspace<D>,
    /// By layer, each `[pages, kv_heads, PAGE, head_dim]`.
    pub(super) keys: Vec<Region>,
    pub(super) values: Vec<Region>,
    pub(super) work: Workspace<D>,
    pub(super) at: Regions,
}

impl<D: Kernels> Buffers<D> {
    /// Reserves them.
    pub(super) fn new(device: &D, model: &Model, capacity: Capacity) -> Result<Self> {
        let precision = device.precision();
        let (cache_layout, [keys, values]) = cache_layout(&model.config, precision, capacity);
        let (work_layout, at) = work_layout(device, model, capacity);
        let cache = Workspace::new(device, "the KV cache", &cache_layout)?;
        let work = Workspace::new(device, "activations", &work_layout)?;
        Ok(Self { capacity, cache, keys, values, work, at })
    }

    /// Fills what never changes, and waits until it is there.
    pub(super) fn send_constants(&self, device: &D, stream: &D::Stream, config: &ModelConfig) -> Result<()> {
        for (rope, at) in config.ropes.iter().zip(&self.at.ropes).filter(|(rope, _)| !rope.grows()) {
            let mut table = self.work.write(*at, 0, &[rope.pairs()])?;
            device::upload(device, stream, &rope.frequencies(0), &mut table)?;
        }
        Ok(())
    }

    /// Copies a page of the cache to another, in all layers.
    pub(super) fn copy_page(
        &self,
        device: &D,
        stream: &D::Stream,
        config: &ModelConfig,
        [from, to]: [u32; 2],
    ) -> Result<()> {
        let page = [config.kv_heads, PAGE, config.head_dim];
        let at = |number: u32| number as usize * page.iter().product::<usize>();
        self.keys.iter().chain(&self.values).try_for_each(|&layer| {
            device.cast(stream, self.cache.read(layer, at(from), &page)?, self.cache.write(layer, at(to), &page)?)
        })
    }

    /// Sends the frequencies of a sequence that will have so many tokens, where they depend on that.
    pub(super) fn send_frequencies(
        &self,
        device: &D,
        stream: &D::Stream,
        config: &ModelConfig,
        (row, length): (usize, usize),
    ) -> Result<()> {
        for (rope, at) in config.ropes.iter().zip(&self.at.ropes).filter(|(rope, _)| rope.grows()) {
            let mut table = self.work.write(*at, row * rope.pairs(), &[rope.pairs()])?;
            device::upload(device, stream, &rope.frequencies(length), &mut table)?;
        }
        Ok(())
    }
}

fn cache_layout(config: &ModelConfig, precision: Precision, capacity: Capacity) -> (Layout, [Vec<Region>; 2]) {
    let layout = Layout::default();
    let shape = [capacity.pages, config.kv_heads, PAGE, config.head_dim];
    let regions = [(), ()].map(|()| (0..config.layers).map(|_| layout.region(precision.cache, &shape)).collect());
    (layout, regions)
}

/// What activations take for each token that goes through a layer with others.
fn token_bytes(config: &ModelConfig, precision: Precision) -> usize {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let wide = if config.family.norms == Norms::Before { 0 } else { config.hidden };
    2 * (config.hidden + q + kv + config.ffn) * precision.activation.size() + (q + wide) * DType::F32.size()
}

fn work_layout<D: Kernels>(device: &D, model: &Model, capacity: Capacity) -> (Layout, Regions) {
    let (layout, config, precision) = (Layout::default(), &model.config, device.precision());
    let Capacity { batch, pass_tokens, .. } = capacity;
    let block = device.product_rows(pass_tokens.min(capacity.block));
    let head_block = pass_tokens.max(batch).min(HEAD_BLOCK);
    // Of a head that comes in parts the logits of all sequences are made at once.
    let streamed = model.tables.streams_head();
    let head_rows = if streamed { head_block.max(batch) } else { head_block };
    let part = if streamed { model.part_rows() } else { 0 };
    let f32s = |shape: &[usize]| layout.region(DType::F32, shape);
    let u32s = |shape: &[usize]| layout.region(DType::U32, shape);
    let activations = |shape: &[usize]| layout.region(precision.activation, shape);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let regions = Regions {
        residual: f32s(&[pass_tokens, config.hidden]),
        words: u32s(&[capacity.words()]),
        ropes: config.ropes.iter().map(|rope| f32s(&[if rope.grows() { batch } else { 1 }, rope.pairs()])).collect(),
        normed: activations(&[block, config.hidden]),
        branch: activations(&[block, config.hidden]),
        wide_branch: f32s(&[if config.family.norms == Norms::Before { 0 } else { block }, config.hidden]),
        unrotated: f32s(&[block, q]),
        query: activations(&[block, q]),
        key: activations(&[block, kv]),
        value: activations(&[block, kv]),
        attn_out: activations(&[block, q]),
        gate: activations(&[block, config.ffn]),
        up: activations(&[block, config.ffn]),
        last: f32s(&[batch, config.hidden]),
        head_normed: activations(&[head_rows, config.hidden]),
        logits: f32s(&[head_rows, config.vocab]),
        part: f32s(&[head_block, part]),
        best: u32s(&[batch]),
    };
    (layout, regions)
}

/// What a decoder reserves besides its streamer's part.
pub(super) fn parts<D: Kernels>(device: &D, model: &Model, capacity: Capacity) -> Result<Vec<Part>> {
    let precision = device.precision();
    let statics = UnitLayout::new(&model.checkpoint, &model.statics_for(precision))?.device_bytes;
    let Capacity { pass_tokens, .. } = capacity;
    let (cache, _) = cache_layout(&model.config, precision, capacity);
    let (work, _) = work_layout(device, model, capacity);
    let part = |purpose: Purpose, bytes: usize| Part { purpose, bytes };
    let mut parts = vec![
        part(Purpose::Statics, statics),
        part(capacity.purpose(), cache.bytes()?),
        part(Purpose::Activations, work.bytes()?),
        part(Purpose::Tokens, Exchange::<D>::bytes(capacity.words())),
    ];
    let scratch = device.scratch_bytes();
    parts.extend((scratch > 0).then(|| part(Purpose::Scratch, scratch)));
    if model.tables.reads_rows() {
        let rows = EmbeddingRows::<D>::bytes(&model.checkpoint, &model.names.embed, pass_tokens)?;
        parts.push(part(Purpose::EmbeddingRows, rows));
    }
    Ok(parts)
}
