//! The shapes that are known, and the tensors of a model of such a shape.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use indicatif::DecimalBytes;
use layer_streamer::DType;

use super::weights::Values;

/// What all shapes have in common: the longest context, the epsilon of norms, the base of rotation, the token that ends a text.
pub const CONTEXT: u64 = 32768;
pub const RMS_EPS: f64 = 1e-6;
pub const ROPE_BASE: f64 = 1e6;
pub const EOS: u64 = 151645;

/// A model's dimensions.
pub struct Shape {
    pub name: &'static str,
    pub hidden: u64,
    pub layers: u64,
    pub heads: u64,
    pub kv: u64,
    pub ffn: u64,
    pub vocab: u64,
    pub tied: bool,
}

pub const SHAPES: [Shape; 9] = [
    Shape { name: "tiny", hidden: 64, layers: 2, heads: 2, kv: 1, ffn: 96, vocab: 256, tied: true },
    Shape { name: "small", hidden: 256, layers: 2, heads: 4, kv: 2, ffn: 512, vocab: 512, tied: false },
    Shape { name: "qwen2.5-0.5b", hidden: 896, layers: 24, heads: 14, kv: 2, ffn: 4864, vocab: 151936, tied: true },
    Shape { name: "qwen2.5-1.5b", hidden: 1536, layers: 28, heads: 12, kv: 2, ffn: 8960, vocab: 151936, tied: true },
    Shape { name: "qwen2.5-3b", hidden: 2048, layers: 36, heads: 16, kv: 2, ffn: 11008, vocab: 151936, tied: true },
    Shape { name: "qwen2.5-7b", hidden: 3584, layers: 28, heads: 28, kv: 4, ffn: 18944, vocab: 152064, tied: false },
    Shape { name: "qwen2.5-14b", hidden: 5120, layers: 48, heads: 40, kv: 8, ffn: 13824, vocab: 152064, tied: false },
    Shape { name: "qwen2.5-32b", hidden: 5120, layers: 64, heads: 40, kv: 8, ffn: 27648, vocab: 152064, tied: false },
    Shape { name: "qwen2.5-72b", hidden: 8192, layers: 80, heads: 64, kv: 8, ffn: 29568, vocab: 152064, tied: false },
];

pub fn shape_parser() -> impl TypedValueParser<Value = &'static Shape> {
    let known = SHAPES.iter().map(|shape| {
        let bytes: u64 = tensors(shape, shape.layers, [DType::BF16; 2]).iter().map(Tensor::bytes).sum();
        PossibleValue::new(shape.name).help(format!("{} layers, {}", shape.layers, DecimalBytes(bytes)))
    });
    PossibleValuesParser::new(known)
        .try_map(|name| SHAPES.iter().find(|shape| shape.name == name).ok_or("is not a known shape"))
}

/// A tensor to be made.
pub struct Tensor {
    /// As Hugging Face folders have it.
    pub name: String,
    /// Slowest first.
    pub shape: Vec<u64>,
    pub dtype: DType,
    pub values: Values,
}

impl Tensor {
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.iter().product::<u64>() as usize) as u64
    }
}

/// All tensors, in the order in which the hub's checkpoints were dealt to shards; norms and biases are of the type `vectors`.
pub fn tensors(shape: &Shape, layers: u64, [matrices, vectors]: [DType; 2]) -> Vec<Tensor> {
    let &Shape { hidden, ffn, vocab, .. } = shape;
    let kv = hidden / shape.heads * shape.kv;
    let tensor = |name: String, shape: &[u64]| Tensor {
        name,
        shape: shape.to_vec(),
        dtype: if shape.len() > 1 { matrices } else { vectors },
        values: Values::Weights,
    };
    let mut all = vec![tensor("model.embed_tokens.weight".into(), &[vocab, hidden])];
    for layer in 0..layers {
        let of_layer: [(&str, &[u64]); 12] = [
            ("input_layernorm.weight", &[hidden]),
            ("self_attn.q_proj.weight", &[hidden, hidden]),
            ("self_attn.q_proj.bias", &[hidden]),
            ("self_attn.k_proj.weight", &[kv, hidden]),
            ("self_attn.k_proj.bias", &[kv]),
            ("self_attn.v_proj.weight", &[kv, hidden]),
            ("self_attn.v_proj.bias", &[kv]),
            ("self_attn.o_proj.weight", &[hidden, hidden]),
            ("post_attention_layernorm.weight", &[hidden]),
            ("mlp.up_proj.weight", &[ffn, hidden]),
            ("mlp.gate_proj.weight", &[ffn, hidden]),
            ("mlp.down_proj.weight", &[hidden, ffn]),
        ];
        all.extend(of_layer.map(|(name, shape)| tensor(format!("model.layers.{layer}.{name}"), shape)));
    }
    all.push(tensor("model.norm.weight".into(), &[hidden]));
    if !shape.tied {
        all.push(tensor("lm_head.weight".into(), &[vocab, hidden]));
    }
    all
}
