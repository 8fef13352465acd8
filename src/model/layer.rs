//! The mathematics of a layer, as calls of kernels: attention and MLP, each between a norm and the residual stream.

use super::{
    batch::{Block, Pass},
    buffers::Buffers,
    config::ModelConfig,
    workspace::Region,
};
use crate::{
    device::{TensorMut, TensorRef},
    error::Result,
    kernels::{AttentionMask, Kernels, Ragged, RopeLayout},
    pipeline::Layer,
};

/// The names of a projection's weight and bias.
type Projection = [&'static str; 2];

macro_rules! projections {
    ($($constant:ident: $name:literal;)*) => {
        $(const $constant: Projection = [concat!($name, ".weight"), concat!($name, ".bias")];)*
    };
}
projections! {
    Q: "self_attn.q_proj";
    K: "self_attn.k_proj";
    V: "self_attn.v_proj";
    O: "self_attn.o_proj";
    GATE: "mlp.gate_proj";
    UP: "mlp.up_proj";
    DOWN: "mlp.down_proj";
}

/// What a layer computes with, apart from its weights.
pub(super) struct LayerMath<'a, D: Kernels> {
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) config: &'a ModelConfig,
    pub(super) buffers: &'a Buffers<D>,
    pub(super) pass: Pass,
}

impl<D: Kernels> LayerMath<'_, D> {
    /// Sends the pass's tokens through a layer, block by block.
    pub(super) fn layer(&self, layer: &Layer<'_, D>) -> Result<()> {
        self.pass.blocks().try_for_each(|block| self.block(layer, block))
    }

    fn block(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let Self { device, stream, .. } = *self;
        let (at, hidden, eps) = (&self.buffers.at, self.config.hidden, self.config.rms_eps);
        let shape = [block.tokens, hidden];
        let residual = || self.buffers.work.write(at.residual, block.start * hidden, &shape);

        let weight = layer.tensor("input_layernorm.weight")?;
        device.rms_norm(stream, residual()?.as_ref(), weight, 0.0, eps, self.write(at.normed, &shape)?)?;
        self.attention(layer, block)?;
        let weight = layer.tensor("post_attention_layernorm.weight")?;
        let (attended, normed) = (self.read(at.branch, &shape)?, self.write(at.normed, &shape)?);
        device.add_rms_norm(stream, residual()?, attended, weight, 0.0, eps, normed)?;
        self.mlp(layer, block)?;
        device.add(stream, residual()?, self.read(at.branch, &shape)?)
    }

    /// What the block's normed tokens see in the cache, after their own keys and values went there: normed → branch.
    fn attention(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let Self { device, stream, config, buffers, pass, .. } = *self;
        let (at, cache, tokens) = (&buffers.at, &buffers.cache, block.tokens);
        let (hidden, heads, kv_heads, size) = (config.hidden, config.heads, config.kv_heads, config.head_dim);

        let [offsets, lengths, rows] = pass.ragged(block);
        let batch = Ragged {
            q_offsets: self.words(offsets, pass.sequences + 1)?,
            kv_lens: self.words(lengths, pass.sequences)?,
            rows: self.words(rows, pass.sequences)?,
        };
        let positions = self.words(pass.positions() + block.start, tokens)?;
        let inv_freq = self.read(at.inv_freq, &[size / 2])?;

        let x = self.read(at.normed, &[tokens, hidden])?;
        self.linear(layer, x, V, self.write(at.value, &[tokens, kv_heads * size])?)?;
        for (region, heads, name, norm) in
            [(at.query, heads, Q, "self_attn.q_norm.weight"), (at.key, kv_heads, K, "self_attn.k_norm.weight")]
        {
            let shape = [tokens, heads, size];
            self.linear(layer, x, name, self.write(at.unrotated, &[tokens, heads * size])?)?;
            if config.family.qk_norm {
                let x = self.write(at.unrotated, &shape)?;
                device.rms_norm_in_place(stream, x, layer.tensor(norm)?, 0.0, config.rms_eps)?;
            }
            let (x, out) = (self.read(at.unrotated, &shape)?, self.write(region, &shape)?);
            device.rope(stream, x, positions, inv_freq, 1.0, RopeLayout::Halves, out)?;
        }

        let (keys, values) = (buffers.keys[layer.index()], buffers.values[layer.index()]);
        let cached = [buffers.capacity.batch, kv_heads, buffers.capacity.context, size];
        for (new, to) in [(at.key, keys), (at.value, values)] {
            let new = self.read(new, &[tokens, kv_heads, size])?;
            device.append_kv(stream, new, batch, cache.write(to, 0, &cached)?)?;
        }
        let (q, out) = (self.read(at.query, &[tokens, heads, size])?, self.write(at.attn_out, &[tokens, heads, size])?);
        let mask =
            AttentionMask { scale: (size as f32).powf(-0.5), window: config.window(layer.index()), soft_cap: None };
        let (keys, values) = (cache.read(keys, 0, &cached)?, cache.read(values, 0, &cached)?);
        device.attention(stream, q, keys, values, batch, mask, out)?;
        let attn_out = self.read(at.attn_out, &[tokens, heads * size])?;
        self.linear(layer, attn_out, O, self.write(at.branch, &[tokens, hidden])?)
    }

    /// The gated feed-forward part: normed → branch.
    fn mlp(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let (at, shape, wide) = (&self.buffers.at, [block.tokens, self.config.hidden], [block.tokens, self.config.ffn]);
        let x = self.read(at.normed, &shape)?;
        self.linear(layer, x, GATE, self.write(at.gate, &wide)?)?;
        self.linear(layer, x, UP, self.write(at.up, &wide)?)?;
        self.device.swiglu(self.stream, self.write(at.gate, &wide)?, self.read(at.up, &wide)?)?;
        self.linear(layer, self.read(at.gate, &wide)?, DOWN, self.write(at.branch, &shape)?)
    }

    /// `x` by a projection of the layer, with its bias where there is one.
    fn linear(
        &self,
        layer: &Layer<'_, D>,
        x: TensorRef<'_, D>,
        [weight, bias]: Projection,
        out: TensorMut<'_, D>,
    ) -> Result<()> {
        self.device.linear(self.stream, x, layer.tensor(weight)?, layer.get(bias), out)
    }

    fn read(&self, region: Region, shape: &[usize]) -> Result<TensorRef<'_, D>> {
        self.buffers.work.read(region, 0, shape)
    }

    fn write(&self, region: Region, shape: &[usize]) -> Result<TensorMut<'_, D>> {
        self.buffers.work.write(region, 0, shape)
    }

    /// So many of the pass's words, from this one on.
    fn words(&self, first: usize, count: usize) -> Result<TensorRef<'_, D>> {
        self.buffers.work.read(self.buffers.at.words, first, &[count])
    }
}
