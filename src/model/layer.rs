//! The mathematics of a layer, as calls of kernels: attention and MLP, each between norms and the residual stream.

use super::{
    batch::{Block, Pass, Sequence},
    buffers::Buffers,
    config::{Activation, HeadNorm, ModelConfig, Norms},
    workspace::Region,
};
use crate::{
    device::{TensorMut, TensorRef},
    error::Result,
    kernels::{AttentionMask, Kernels, PAGE, Ragged},
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
    QKV: "self_attn.qkv_proj";
    O: "self_attn.o_proj";
    GATE: "mlp.gate_proj";
    UP: "mlp.up_proj";
    GATE_UP: "mlp.gate_up_proj";
    DOWN: "mlp.down_proj";
}

/// What a layer computes with, apart from its weights.
pub(super) struct LayerMath<'a, D: Kernels> {
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) config: &'a ModelConfig,
    pub(super) buffers: &'a Buffers<D>,
    pub(super) pass: Pass,
    pub(super) batch: &'a [Sequence<'a>],
}

impl<D: Kernels> LayerMath<'_, D> {
    /// Sends the pass's tokens through a layer, block by block.
    pub(super) fn layer(&self, layer: &Layer<'_, D>) -> Result<()> {
        self.pass.blocks(self.batch).try_for_each(|block| {
            layer.check_cancelled()?;
            self.block(layer, block)
        })
    }

    fn block(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let (device, stream, norms) = (self.device, self.stream, self.config.family.norms);
        let normed = self.write(self.buffers.at.normed, &self.shape(block))?;
        match norms {
            Norms::Before | Norms::Around => {
                self.norm(layer, "input_layernorm.weight", self.residual(block)?, normed)?
            }
            Norms::After => device.cast(stream, self.residual(block)?.as_ref(), normed)?,
        }
        self.attention(layer, block)?;
        self.end_branch(layer, block, "post_attention_layernorm.weight")?;

        let (branch, normed) = (self.branch(block)?, self.write(self.buffers.at.normed, &self.shape(block))?);
        let before_mlp = match norms {
            Norms::Before => "post_attention_layernorm.weight",
            Norms::Around => "pre_feedforward_layernorm.weight",
            Norms::After => {
                device.add(stream, self.residual(block)?, branch)?;
                device.cast(stream, self.residual(block)?.as_ref(), normed)?;
                return self.feed_forward(layer, block);
            }
        };
        let (weight, offset) = (layer.tensor(before_mlp)?, self.config.family.norm_offset);
        device.add_rms_norm(stream, self.residual(block)?, branch, weight, offset, self.config.rms_eps, normed)?;
        self.feed_forward(layer, block)
    }

    /// The second half: normed → the residual stream.
    fn feed_forward(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        self.mlp(layer, block)?;
        self.end_branch(layer, block, "post_feedforward_layernorm.weight")?;
        self.device.add(self.stream, self.residual(block)?, self.branch(block)?)
    }

    /// What is done to a branch before it is added: its norm, where the family has one there, and the multiplier.
    fn end_branch(&self, layer: &Layer<'_, D>, block: Block, norm: &str) -> Result<()> {
        let (at, shape, factor) = (&self.buffers.at, self.shape(block), self.config.multipliers.branch);
        if self.config.family.norms != Norms::Before {
            let wide = self.write(at.wide_branch, &shape)?;
            self.norm(layer, norm, wide, self.write(at.branch, &shape)?)?;
        }
        if factor == 1.0 { Ok(()) } else { self.device.scale(self.stream, self.write(at.branch, &shape)?, factor) }
    }

    fn norm(&self, layer: &Layer<'_, D>, name: &str, x: TensorMut<'_, D>, out: TensorMut<'_, D>) -> Result<()> {
        let (weight, offset, eps) = (layer.tensor(name)?, self.config.family.norm_offset, self.config.rms_eps);
        self.device.rms_norm(self.stream, x.as_ref(), weight, offset, eps, out)
    }

    /// What the block's normed tokens see in the cache, after their own keys and values went there: normed → branch.
    fn attention(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let Self { device, stream, config, buffers, pass, .. } = *self;
        let (at, cache, tokens) = (&buffers.at, &buffers.cache, block.tokens);
        let (hidden, heads, kv_heads, size) = (config.hidden, config.heads, config.kv_heads, config.head_dim);

        let [offsets, lengths, pages] = pass.ragged(block);
        let batch = Ragged {
            q_offsets: self.words(offsets, &[block.sequences + 1])?,
            kv_lens: self.words(lengths, &[block.sequences])?,
            pages: self.words(pages, &[block.sequences, pass.pages])?,
        };
        let (q_width, kv) = (heads * size, kv_heads * size);
        let x = (at.normed, hidden);
        self.linear(layer, block, x, V, (QKV, q_width + kv), (at.value, kv))?;
        for (region, heads, name, first, norm) in [
            (at.query, heads, Q, 0, "self_attn.q_norm.weight"),
            (at.key, kv_heads, K, q_width, "self_attn.k_norm.weight"),
        ] {
            self.linear(layer, block, x, name, (QKV, first), (at.unrotated, heads * size))?;
            let normed_together: &[usize] = match config.family.head_norm {
                HeadNorm::None => &[],
                HeadNorm::Each => &[tokens, heads, size],
                HeadNorm::Together => &[tokens, heads * size],
            };
            if !normed_together.is_empty() {
                let (x, weight) = (self.write(at.unrotated, normed_together)?, layer.tensor(norm)?);
                device.rms_norm_in_place(stream, x, weight, config.family.norm_offset, config.rms_eps)?;
            }
            self.rotate(layer.index(), block, heads, region)?;
        }

        let (keys, values) = (buffers.keys[layer.index()], buffers.values[layer.index()]);
        let cached = [buffers.capacity.pages, kv_heads, PAGE, size];
        for (new, to) in [(at.key, keys), (at.value, values)] {
            let new = self.read(new, &[tokens, kv_heads, size])?;
            device.append_kv(stream, new, batch, cache.write(to, 0, &cached)?)?;
        }
        let (q, out) = (self.read(at.query, &[tokens, heads, size])?, self.write(at.attn_out, &[tokens, heads, size])?);
        let (scale, window) = (config.multipliers.scores, config.window(layer.index()));
        let mask = AttentionMask { scale, window, soft_cap: config.soft_caps.scores };
        let (keys, values) = (cache.read(keys, 0, &cached)?, cache.read(values, 0, &cached)?);
        device.attention(stream, q, keys, values, batch, mask, out)?;
        self.linear(layer, block, (at.attn_out, q_width), O, (O, 0), self.branch_out())
    }

    /// Rotates the block's queries or keys: unrotated → `to`. Where frequencies depend on the length of a sequence, each sequence
    /// has its own.
    fn rotate(&self, layer: usize, block: Block, heads: usize, to: Region) -> Result<()> {
        let (number, size) = (self.config.rope_of(layer), self.config.head_dim);
        let (rope, table) = (&self.config.ropes[number], self.buffers.at.ropes[number]);
        let rotate = |start: usize, tokens: usize, row: usize| {
            let (skip, shape) = (start * heads * size, [tokens, heads, size]);
            let work = &self.buffers.work;
            let x = work.read(self.buffers.at.unrotated, skip, &shape)?;
            let positions = self.words(self.pass.positions() + block.start + start, &[tokens])?;
            let inv_freq = work.read(table, row * rope.pairs(), &[rope.pairs()])?;
            let out = work.write(to, skip, &shape)?;
            self.device.rope(self.stream, x, positions, inv_freq, rope.scale, self.config.rope_layout, out)
        };
        if !rope.grows() {
            return rotate(0, block.tokens, 0);
        }
        self.pass.spans(block, self.batch).try_for_each(|(row, tokens)| rotate(tokens.start, tokens.len(), row))
    }

    /// The gated feed-forward part: normed → branch.
    fn mlp(&self, layer: &Layer<'_, D>, block: Block) -> Result<()> {
        let Self { device, stream, config, .. } = *self;
        let (at, wide) = (&self.buffers.at, [block.tokens, config.ffn]);
        let x = (at.normed, config.hidden);
        self.linear(layer, block, x, GATE, (GATE_UP, 0), (at.gate, config.ffn))?;
        self.linear(layer, block, x, UP, (GATE_UP, config.ffn), (at.up, config.ffn))?;
        let (gate, up) = (self.write(at.gate, &wide)?, self.read(at.up, &wide)?);
        match config.activation {
            Activation::Silu => device.swiglu(stream, gate, up)?,
            Activation::Gelu => device.geglu(stream, gate, up)?,
        }
        self.linear(layer, block, (at.gate, config.ffn), DOWN, (DOWN, 0), self.branch_out())
    }

    /// The block's rows of `x` by a projection of the layer, with its bias where there is one; how wide both are is said beside them.
    /// In a family whose projections are fused it is the part of `fused` whose first row is given.
    fn linear(
        &self,
        layer: &Layer<'_, D>,
        block: Block,
        (x, depth): (Region, usize),
        [weight, bias]: Projection,
        ([fused, _], first): (Projection, usize),
        (out, width): (Region, usize),
    ) -> Result<()> {
        let weight = match self.config.family.is_fused {
            true => layer.tensor(fused)?.rows(first..first + width),
            false => layer.tensor(weight)?,
        };
        let rows = self.device.product_rows(block.tokens);
        let (x, out) = (self.read(x, &[rows, depth])?, self.write(out, &[rows, width])?);
        self.device.linear(self.stream, x, weight, layer.get(bias), out)
    }

    fn shape(&self, block: Block) -> [usize; 2] {
        [block.tokens, self.config.hidden]
    }

    fn residual(&self, block: Block) -> Result<TensorMut<'_, D>> {
        let (at, hidden) = (self.buffers.at.residual, self.config.hidden);
        self.buffers.work.write(at, block.start * hidden, &self.shape(block))
    }

    fn branch(&self, block: Block) -> Result<TensorRef<'_, D>> {
        self.read(self.buffers.at.branch, &self.shape(block))
    }

    /// Where attention and MLP leave what they made, and how wide it is: in F32 where it is normed before it is added.
    fn branch_out(&self) -> (Region, usize) {
        let (at, norms) = (&self.buffers.at, self.config.family.norms);
        (if norms == Norms::Before { at.branch } else { at.wide_branch }, self.config.hidden)
    }

    fn read(&self, region: Region, shape: &[usize]) -> Result<TensorRef<'_, D>> {
        self.buffers.work.read(region, 0, shape)
    }

    fn write(&self, region: Region, shape: &[usize]) -> Result<TensorMut<'_, D>> {
        self.buffers.work.write(region, 0, shape)
    }

    /// As many of the pass's words as the shape has, from this one on.
    fn words(&self, first: usize, shape: &[usize]) -> Result<TensorRef<'_, D>> {
        self.buffers.work.read(self.buffers.at.words, first, shape)
    }
}
