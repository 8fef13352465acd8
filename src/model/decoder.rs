//! A decoder-only transformer computed layer by layer as the layers arrive.
//!
//! A pass takes any number of tokens of any number of sequences. Inside each layer they go through in blocks of a fixed
//! size, so that only the residual stream and the KV cache grow with the context, and the bytes streamed do not.

use std::sync::Arc;

use super::{
    EMBED, Model, NORM, Tables,
    exchange::Exchange,
    head::Head,
    tables::EmbeddingRows,
    workspace::{Layout, Region, Workspace},
};
use crate::{
    device::{self, TensorRef},
    dtype::DType,
    error::{Error, Result},
    kernels::{AttentionMask, Kernels, Precision, Ragged, RopeLayout},
    pipeline::{Layer, LayerStreamer, StaticTensors},
    plan::{Part, Plan, Settings, UnitPlan},
    trace::Observer,
};

/// Tokens that go through a layer at once.
pub(super) const BLOCK: usize = 256;

/// Tokens that go through the output head at once.
pub(super) const HEAD_BLOCK: usize = 16;

/// New tokens of one sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The sequence's row in the KV cache.
    pub row: usize,
    /// The tokens that follow what the cache holds; at least one.
    pub tokens: &'a [u32],
}

/// Regions of device memory whose size depends on the context, on the block, or on neither.
pub(super) struct Regions {
    pub(super) residual: Region,
    pub(super) header: Region,
    inv_freq: Region,
    normed: Region,
    hidden: Region,
    unrotated: Region,
    query: Region,
    key: Region,
    value: Region,
    mixed: Region,
    gate: Region,
    up: Region,
    pub(super) head_in: Region,
    pub(super) head_normed: Region,
    pub(super) logits: Region,
    /// What comes of a part of the head, for several tokens.
    pub(super) part: Region,
    pub(super) best: Region,
}

/// Where the words lie that say what is in a batch: each token's id, each token's position, for each block what [`Ragged`]
/// tells the kernels, and the number of each sequence's last token.
#[derive(Clone, Copy)]
pub(super) struct BatchHeader {
    pub(super) tokens: usize,
    pub(super) sequences: usize,
}

impl BatchHeader {
    fn positions(self) -> usize {
        self.tokens
    }

    /// The offsets of block `number`; after them the lengths, then the rows.
    fn block(self, number: usize) -> usize {
        2 * self.tokens + number * (3 * self.sequences + 1)
    }

    pub(super) fn last(self) -> usize {
        self.block(self.tokens.div_ceil(BLOCK))
    }

    fn words(self) -> usize {
        self.last() + self.sequences
    }
}

/// A model with its memory on a device. The KV cache holds `batch` sequences of up to `context` tokens.
pub struct Decoder<D: Kernels> {
    pub(super) model: Model,
    pub(super) device: D,
    pub(super) streamer: LayerStreamer<D>,
    pub(super) statics: StaticTensors<D>,
    pub(super) stream: D::Stream,
    cache: Workspace<D>,
    cache_regions: [Vec<Region>; 2],
    pub(super) work: Workspace<D>,
    pub(super) regions: Regions,
    pub(super) batch: usize,
    context: usize,
    lengths: Vec<usize>,
    /// Of the pass before; no tokens if there was none, or it failed.
    pub(super) header: BatchHeader,
    pub(super) exchange: Exchange<D>,
    /// Where the embedding table stays in its file.
    rows: Option<EmbeddingRows<D>>,
}

fn cache_layout(model: &Model, precision: Precision, batch: usize, context: usize) -> (Layout, [Vec<Region>; 2]) {
    let (layout, config) = (Layout::default(), &model.config);
    let shape = [batch, config.kv_heads, context, config.head_dim];
    let regions = [(), ()].map(|()| (0..config.layers).map(|_| layout.region(precision.cache, &shape)).collect());
    (layout, regions)
}

/// The largest header, that of one token in every place of the cache.
fn most(batch: usize, context: usize) -> BatchHeader {
    BatchHeader { tokens: batch * context, sequences: batch }
}

fn work_layout(model: &Model, precision: Precision, batch: usize, context: usize) -> (Layout, Regions) {
    let (layout, config) = (Layout::default(), &model.config);
    let tokens = batch * context;
    let block = tokens.min(BLOCK);
    let head_block = tokens.min(HEAD_BLOCK);
    // Of a head that comes in parts the logits of all sequences are made at once.
    let (head_rows, part) = match model.tables {
        Tables::HeadStreamed => (head_block.max(batch), model.part_rows()),
        Tables::OnDevice | Tables::EmbeddingInFile => (head_block, 0),
    };
    let f32s = |shape: &[usize]| layout.region(DType::F32, shape);
    let u32s = |shape: &[usize]| layout.region(DType::U32, shape);
    let activations = |shape: &[usize]| layout.region(precision.activation, shape);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let regions = Regions {
        residual: f32s(&[tokens, config.hidden]),
        header: u32s(&[most(batch, context).words()]),
        inv_freq: f32s(&[config.head_dim / 2]),
        normed: activations(&[block, config.hidden]),
        hidden: activations(&[block, config.hidden]),
        unrotated: f32s(&[block, q]),
        query: activations(&[block, q]),
        key: activations(&[block, kv]),
        value: activations(&[block, kv]),
        mixed: activations(&[block, q]),
        gate: activations(&[block, config.ffn]),
        up: activations(&[block, config.ffn]),
        head_in: f32s(&[head_block, config.hidden]),
        head_normed: activations(&[head_rows, config.hidden]),
        logits: f32s(&[head_rows, config.vocab]),
        part: f32s(&[head_block, part]),
        best: u32s(&[batch]),
    };
    (layout, regions)
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
        check_size(model, batch, context)?;
        device.check_head_size(model.config.head_dim)?;
        device.bind_thread()?;
        let precision = device.precision();
        let (cache_layout, cache_regions) = cache_layout(model, precision, batch, context);
        let (work_layout, regions) = work_layout(model, precision, batch, context);
        let stream = device.stream()?;
        device.prepare(&stream)?;
        let cache = Workspace::new(device, "the KV cache", &cache_layout)?;
        let work = Workspace::new(device, "activations", &work_layout)?;
        let exchange = Exchange::new(device, "tokens on their way", most(batch, context).words())?;
        let rows = match model.tables.reads_rows() {
            true => Some(EmbeddingRows::new(device, &model.checkpoint, EMBED, precision.weight, batch * context)?),
            false => None,
        };
        // First, while nothing else reads.
        let statics = StaticTensors::new(device, &model.checkpoint, &model.statics_for(precision), settings)?;
        let streamer =
            LayerStreamer::with_observers(device, model.source(), &model.units_for(precision), settings, observers)?;
        let mut inv_freq = work.write(regions.inv_freq, 0, &[model.config.head_dim / 2])?;
        device::upload(device, &stream, &model.config.inv_freq, &mut inv_freq)?;
        Ok(Self {
            device: device.clone(),
            streamer,
            statics,
            stream,
            cache,
            cache_regions,
            work,
            regions,
            batch,
            context,
            lengths: vec![0; batch],
            header: BatchHeader { tokens: 0, sequences: 0 },
            exchange,
            rows,
            model: model.clone(),
        })
    }

    /// What [`Decoder::new`] will reserve with the same arguments.
    ///
    /// # Errors
    /// As there, as far as can be known beforehand.
    pub fn memory(device: &D, model: &Model, settings: &Settings, batch: usize, context: usize) -> Result<Vec<Part>> {
        let mut parts = Self::plan(device, model, settings)?.memory();
        parts.extend(Self::fixed_overhead(device, model, batch, context)?);
        Ok(parts)
    }

    /// What the streamer of [`Decoder::new`] will do with the same arguments.
    ///
    /// # Errors
    /// As [`Plan::on`].
    pub fn plan(device: &D, model: &Model, settings: &Settings) -> Result<Plan> {
        Plan::on(device, model.source(), &model.units_for(device.precision()), settings)
    }

    /// What is reserved besides the streamer's part.
    pub(super) fn fixed_overhead(device: &D, model: &Model, batch: usize, context: usize) -> Result<Vec<Part>> {
        check_size(model, batch, context)?;
        let precision = device.precision();
        let statics = UnitPlan::new(&model.checkpoint, &model.statics_for(precision))?.device_bytes;
        let sequences = if batch == 1 { String::new() } else { format!("{batch} × ") };
        let (cache, work) =
            (cache_layout(model, precision, batch, context), work_layout(model, precision, batch, context));
        let rows = model.tables.reads_rows().then(|| EmbeddingRows::<D>::bytes(batch * context, model.config.hidden));
        let rows = rows.map(|bytes| Part::new("embedding rows on their way", bytes, false));
        Ok([
            Part::new("static tensors", statics, true),
            Part::new(format!("KV cache of {sequences}{context} tokens"), cache.0.bytes()?, true),
            Part::new("activations", work.0.bytes()?, true),
            Part::new("tokens on their way", Exchange::<D>::bytes(most(batch, context).words()), false),
            Part::new("kernels' scratch", device.scratch_bytes(), true),
        ]
        .into_iter()
        .chain(rows)
        .collect())
    }

    /// Runs all tokens of `batch` through the model, in one pass over the layers, and keeps their keys and values.
    ///
    /// # Errors
    /// [`Error::Setting`] if a row is out of range or named twice, a sequence has no token or would outgrow the context, or
    /// a token is not in the vocabulary; else the streamer's. After an error the cache is as it was before.
    pub fn forward(&mut self, batch: &[Sequence<'_>]) -> Result<()> {
        self.forward_observed(batch, |_, _, _| Ok(()))
    }

    /// As [`forward`](Self::forward); after each layer `observe` is given its number, the residual stream `[T, H]`, and the
    /// device's stream on which that is computed.
    ///
    /// # Errors
    /// As there, or what `observe` returns.
    pub fn forward_observed(
        &mut self,
        batch: &[Sequence<'_>],
        mut observe: impl FnMut(usize, TensorRef<'_, D>, &D::Stream) -> Result<()>,
    ) -> Result<()> {
        self.check_batch(batch)?;
        self.device.bind_thread()?;
        self.header.tokens = 0;
        let header = self.send_batch(batch)?;
        let Self { streamer, stream, device, statics, work, regions, model, rows, .. } = self;
        let (hidden, tokens) = (model.config.hidden, header.tokens);
        match rows {
            Some(rows) => {
                let ids = batch.iter().flat_map(|sequence| sequence.tokens.iter().copied());
                rows.send(ids, work, regions.residual, stream)?;
            }
            None => {
                let ids = work.read(regions.header, 0, &[tokens])?;
                let residual = work.write(regions.residual, 0, &[tokens, hidden])?;
                device.embed(stream, statics.tensor(EMBED)?, ids, residual)?;
            }
        }
        let math = LayerMath {
            device,
            stream,
            model,
            work,
            regions,
            header,
            cache: &self.cache,
            cache_regions: &self.cache_regions,
        };
        let shape = [self.batch, model.config.kv_heads, self.context, model.config.head_dim];
        let head = Head { device, stream, model, work, regions, norm: statics.tensor(NORM)? };
        streamer.run_pass(stream, 0, |column, layer| {
            if layer.index() >= model.config.layers {
                if column == 0 {
                    head.norm_last(header)?;
                }
                let column = head.part(layer, header.sequences, column)?;
                if column == model.config.vocab {
                    head.choose(header.sequences)?;
                }
                return Ok(column);
            }
            for (number, start) in (0..tokens).step_by(BLOCK).enumerate() {
                math.block(layer, number, start, BLOCK.min(tokens - start), shape)?;
            }
            observe(layer.index(), work.read(regions.residual, 0, &[tokens, hidden])?, stream)?;
            Ok::<_, Error>(column)
        })?;
        for sequence in batch {
            self.lengths[sequence.row] += sequence.tokens.len();
        }
        self.header = header;
        Ok(())
    }

    fn check_batch(&self, batch: &[Sequence<'_>]) -> Result<()> {
        if batch.is_empty() {
            return Err(Error::setting("batch", "has no sequence"));
        }
        for (number, sequence) in batch.iter().enumerate() {
            let Some(&length) = self.lengths.get(sequence.row) else {
                return Err(Error::setting(
                    "row",
                    format!("is {}, the KV cache has {} rows", sequence.row, self.batch),
                ));
            };
            if batch[..number].iter().any(|other| other.row == sequence.row) {
                return Err(Error::setting("row", format!("{} is in the batch twice", sequence.row)));
            }
            if sequence.tokens.is_empty() {
                return Err(Error::setting("prompt", "is empty; give at least one token"));
            }
            if length + sequence.tokens.len() > self.context {
                let cause =
                    format!("{} tokens after {length} exceed the context of {}", sequence.tokens.len(), self.context);
                return Err(Error::setting("prompt", cause));
            }
            if let Some(id) = sequence.tokens.iter().find(|&&id| id as usize >= self.model.config.vocab) {
                let cause = format!("token {id} is not in the vocabulary of {}", self.model.config.vocab);
                return Err(Error::setting("prompt", cause));
            }
        }
        Ok(())
    }

    /// Sends what the kernels need to know of the batch.
    fn send_batch(&mut self, batch: &[Sequence<'_>]) -> Result<BatchHeader> {
        let tokens = batch.iter().map(|sequence| sequence.tokens.len()).sum();
        let header = BatchHeader { tokens, sequences: batch.len() };
        let words = self.exchange.words()?;
        let mut first = 0;
        for (i, sequence) in batch.iter().enumerate() {
            let (count, held) = (sequence.tokens.len(), self.lengths[sequence.row]);
            words[first..][..count].copy_from_slice(sequence.tokens);
            let positions = &mut words[header.positions() + first..][..count];
            positions.iter_mut().zip(held..).for_each(|(word, position)| *word = position as u32);
            let after = first + count;
            for (number, start) in (0..tokens).step_by(BLOCK).enumerate() {
                // Where its tokens begin and end in the block, how long its cache is by then, and its row.
                let (offsets, end) = (header.block(number), tokens.min(start + BLOCK));
                let (lengths, in_block) = (offsets + header.sequences + 1, |at: usize| at.clamp(start, end) - start);
                words[offsets + i] = in_block(first) as u32;
                words[offsets + i + 1] = in_block(after) as u32;
                words[lengths + i] = (held + end.clamp(first, after) - first) as u32;
                words[lengths + header.sequences + i] = sequence.row as u32;
            }
            words[header.last() + i] = (after - 1) as u32;
            first = after;
        }
        self.exchange.send(self.work.write(self.regions.header, 0, &[header.words()])?, &self.stream)?;
        Ok(header)
    }

    /// How many tokens of sequence `row` the KV cache holds.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn length(&self, row: usize) -> usize {
        self.lengths[row]
    }

    /// How many sequences the pass before had.
    pub(super) fn sequences(&self) -> usize {
        self.header.sequences
    }

    /// How many tokens a sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Forgets all tokens of sequence `row` from number `length` on.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such row, or it is shorter.
    pub fn truncate(&mut self, row: usize, length: usize) -> Result<()> {
        match self.lengths.get_mut(row) {
            Some(held) if length <= *held => *held = length,
            Some(held) => {
                return Err(Error::setting("truncate", format!("to {length}, but row {row} holds {held} tokens")));
            }
            None => return Err(Error::setting("row", format!("is {row}, the KV cache has {} rows", self.batch))),
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

fn check_size(model: &Model, batch: usize, context: usize) -> Result<()> {
    if batch == 0 || batch > u16::MAX.into() {
        return Err(Error::setting("batch", format!("is {batch}, expected 1 to {}", u16::MAX)));
    }
    if context == 0 || context > model.config.max_positions {
        let most = model.config.max_positions;
        return Err(Error::setting("context", format!("is {context} tokens, this model takes 1 to {most}")));
    }
    Ok(())
}

/// What a layer computes with, apart from its weights.
struct LayerMath<'a, D: Kernels> {
    device: &'a D,
    stream: &'a D::Stream,
    model: &'a Model,
    work: &'a Workspace<D>,
    regions: &'a Regions,
    header: BatchHeader,
    cache: &'a Workspace<D>,
    cache_regions: &'a [Vec<Region>; 2],
}

impl<D: Kernels> LayerMath<'_, D> {
    /// Sends tokens `start..start + tokens`, the block called `number`, through a layer.
    fn block(
        &self,
        layer: &Layer<'_, D>,
        number: usize,
        start: usize,
        tokens: usize,
        cache_shape: [usize; 4],
    ) -> Result<()> {
        let Self { device, stream, work, regions: at, header, cache, .. } = *self;
        let config = &self.model.config;
        let (hidden, heads, groups, size, ffn) =
            (config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn);
        let (q, kv) = (heads * size, groups * size);
        let linear = |x: TensorRef<'_, D>, name: &str, bias: &str, out| {
            device.linear(stream, x, layer.tensor(name)?, layer.get(bias), out)
        };
        let residual = || work.write(at.residual, start * hidden, &[tokens, hidden]);
        let (offsets, sequences) = (header.block(number), header.sequences);
        let lengths = offsets + sequences + 1;
        let batch = Ragged {
            q_offsets: work.read(at.header, offsets, &[sequences + 1])?,
            kv_lens: work.read(at.header, lengths, &[sequences])?,
            rows: work.read(at.header, lengths + sequences, &[sequences])?,
        };
        let positions = work.read(at.header, header.positions() + start, &[tokens])?;
        let inv_freq = work.read(at.inv_freq, 0, &[size / 2])?;

        let normed = || work.write(at.normed, 0, &[tokens, hidden]);
        let weight = layer.tensor("input_layernorm.weight")?;
        device.rms_norm(stream, residual()?.as_ref(), weight, config.rms_eps, normed()?)?;
        let x = work.read(at.normed, 0, &[tokens, hidden])?;
        linear(x, "self_attn.v_proj.weight", "self_attn.v_proj.bias", work.write(at.value, 0, &[tokens, kv])?)?;
        for (region, heads, [name, bias, norm]) in [
            (at.query, heads, ["self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.q_norm.weight"]),
            (at.key, groups, ["self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.k_norm.weight"]),
        ] {
            let shape = [tokens, heads, size];
            linear(x, name, bias, work.write(at.unrotated, 0, &[tokens, heads * size])?)?;
            if config.family.qk_norm {
                let x = work.write(at.unrotated, 0, &shape)?;
                device.rms_norm_in_place(stream, x, layer.tensor(norm)?, config.rms_eps)?;
            }
            let (x, out) = (work.read(at.unrotated, 0, &shape)?, work.write(region, 0, &shape)?);
            device.rope(stream, x, positions, inv_freq, RopeLayout::Halves, out)?;
        }
        let [keys, values] = [0, 1].map(|kind| self.cache_regions[kind][layer.index()]);
        for (region, to) in [(at.key, keys), (at.value, values)] {
            let block = work.read(region, 0, &[tokens, groups, size])?;
            device.append_kv(stream, block, batch, cache.write(to, 0, &cache_shape)?)?;
        }
        let mask = AttentionMask { scale: (size as f32).powf(-0.5), window: config.window(layer.index()) };
        device.attention(
            stream,
            work.read(at.query, 0, &[tokens, heads, size])?,
            cache.read(keys, 0, &cache_shape)?,
            cache.read(values, 0, &cache_shape)?,
            batch,
            mask,
            work.write(at.mixed, 0, &[tokens, heads, size])?,
        )?;
        let mixed = work.read(at.mixed, 0, &[tokens, q])?;
        linear(
            mixed,
            "self_attn.o_proj.weight",
            "self_attn.o_proj.bias",
            work.write(at.hidden, 0, &[tokens, hidden])?,
        )?;
        let (mixed, weight) =
            (work.read(at.hidden, 0, &[tokens, hidden])?, layer.tensor("post_attention_layernorm.weight")?);
        device.add_rms_norm(stream, residual()?, mixed, weight, config.rms_eps, normed()?)?;
        linear(x, "mlp.gate_proj.weight", "mlp.gate_proj.bias", work.write(at.gate, 0, &[tokens, ffn])?)?;
        linear(x, "mlp.up_proj.weight", "mlp.up_proj.bias", work.write(at.up, 0, &[tokens, ffn])?)?;
        device.swiglu(stream, work.write(at.gate, 0, &[tokens, ffn])?, work.read(at.up, 0, &[tokens, ffn])?)?;
        let gated = work.read(at.gate, 0, &[tokens, ffn])?;
        linear(gated, "mlp.down_proj.weight", "mlp.down_proj.bias", work.write(at.hidden, 0, &[tokens, hidden])?)?;
        device.add(stream, residual()?, work.read(at.hidden, 0, &[tokens, hidden])?)
    }
}
