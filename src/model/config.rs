//! What `config.json` and `generation_config.json` of a Hugging Face folder say about a decoder-only model.
//!
//! A model family is a row of [`FAMILIES`]: it states where the family differs, and the decoder does the rest. Both spellings
//! of the rope and type keys are read: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5).

mod raw;
mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use raw::{ConfigFault, OneOrMany, Raw, RawRope, stop_tokens};
use serde_json::Value;

use crate::error::{Error, Result};

/// Where a model family differs from the common decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    pub(super) model_type: &'static str,
    /// Query, key and value projections have biases whatever the configuration says.
    qkv_bias: bool,
    /// Each head's query and key are normed before they are rotated.
    pub(crate) qk_norm: bool,
    window: WindowRule,
}

/// When a configuration's `sliding_window` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WindowRule {
    Never,
    Always,
    /// If `use_sliding_window` is set; and then, where `layer_types` does not say, from layer `max_window_layers` on.
    IfEnabled,
}

const FAMILIES: [Family; 4] = [
    Family { model_type: "llama", qkv_bias: false, qk_norm: false, window: WindowRule::Never },
    Family { model_type: "mistral", qkv_bias: false, qk_norm: false, window: WindowRule::Always },
    Family { model_type: "qwen2", qkv_bias: true, qk_norm: false, window: WindowRule::IfEnabled },
    Family { model_type: "qwen3", qkv_bias: false, qk_norm: true, window: WindowRule::IfEnabled },
];

/// What transformers assumes where `max_window_layers` is left out.
const MAX_WINDOW_LAYERS: usize = 28;

/// A decoder-only model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub(crate) family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of the feed-forward part.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// What the norms add under the root.
    pub rms_eps: f32,
    /// Rotation per position of each pair of a head's elements, in radians: `head_dim / 2` of them.
    pub inv_freq: Vec<f32>,
    /// The output head is the embedding table.
    pub tied: bool,
    windows: Windows,
    /// The longest context the model was made for.
    pub max_positions: usize,
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
}

/// How many tokens each layer sees. No longer than what says so, however many layers there are said to be.
#[derive(Clone, Debug, PartialEq)]
enum Windows {
    /// Layers from this one on see so many, those before it all.
    From(usize, Option<usize>),
    /// By layer.
    Each(Vec<Option<usize>>),
}

impl Family {
    fn windows(self, raw: &Raw) -> Result<Windows, ConfigFault> {
        let enabled = match self.window {
            WindowRule::Never => false,
            WindowRule::Always => true,
            WindowRule::IfEnabled => raw.use_sliding_window.unwrap_or(false),
        };
        let window = raw.sliding_window.filter(|&window| enabled && window > 0);
        let layers = raw.num_hidden_layers;
        Ok(match (&raw.layer_types, self.window) {
            (Some(types), WindowRule::IfEnabled) if types.len() != layers => {
                return Err(ConfigFault::Wrong(format!("layer_types names {} layers of {layers}", types.len())));
            }
            (Some(types), WindowRule::IfEnabled) => {
                let of_type = |kind: &String| match kind.as_str() {
                    "full_attention" => Ok(None),
                    "sliding_attention" => Ok(window),
                    other => Err(ConfigFault::Unsupported(format!("layer type {other:?}"))),
                };
                Windows::Each(types.iter().map(of_type).collect::<Result<_, _>>()?)
            }
            (_, WindowRule::IfEnabled) => Windows::From(raw.max_window_layers.unwrap_or(MAX_WINDOW_LAYERS), window),
            _ => Windows::From(0, window),
        })
    }
}

impl ModelConfig {
    /// Reads a folder's configuration.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Checkpoint`] that names the file and what is wrong in it; [`Error::Unsupported`] for a model
    /// of another family, or one with features that are not computed here.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let value = raw::read(&path)?;
        let model_type = value.get("model_type").and_then(Value::as_str).unwrap_or("(none)").to_owned();
        let Some(family) = FAMILIES.into_iter().find(|family| family.model_type == model_type) else {
            let known = FAMILIES.map(|family| family.model_type).join(", ");
            return Err(Error::Unsupported {
                what: format!("{}: model_type {model_type:?}", path.display()),
                remedy: format!("the model types known are {known}"),
            });
        };
        let raw: Raw = serde_json::from_value(value)
            .map_err(|e| Error::checkpoint(&path, format!("is no {model_type} configuration: {e}")))?;
        let config = Self::of(family, raw).map_err(|refusal| refusal.at(&path))?;
        Ok(Self { stop: stop_tokens(folder, config.stop)?, ..config })
    }

    /// What the file says of a model of this family; its own stop tokens.
    fn of(family: Family, raw: Raw) -> Result<Self, ConfigFault> {
        let [heads, kv_heads, head_dim] = raw.heads()?;
        raw.check_features()?;
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let inv_freq = rope::frequencies(rope.unwrap_or(&RawRope::default()), raw.rope_theta, head_dim)?;
        let windows = family.windows(&raw)?;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(Self {
            hidden: raw.hidden_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            ffn: raw.intermediate_size,
            vocab: raw.vocab_size,
            rms_eps: raw.rms_norm_eps as f32,
            inv_freq,
            tied: raw.tie_word_embeddings.unwrap_or(false),
            windows,
            max_positions: raw.max_position_embeddings,
            stop: raw.eos_token_id.map_or_else(Vec::new, OneOrMany::into_vec),
            qkv_bias: family.qkv_bias || attention_bias,
            o_bias: !family.qkv_bias && attention_bias,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            family,
        })
    }

    /// How many tokens a layer sees, itself included; `None`: all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match &self.windows {
            Windows::From(first, window) => window.filter(|_| layer >= *first),
            Windows::Each(windows) => windows.get(layer).copied().flatten(),
        }
    }

    /// A layer's tensors with their shapes, named by what follows `model.layers.N.`.
    pub(crate) fn layer_tensors(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (h, q, kv, f) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn);
        let mut tensors = vec![
            ("input_layernorm.weight", vec![h]),
            ("self_attn.q_proj.weight", vec![q, h]),
            ("self_attn.k_proj.weight", vec![kv, h]),
            ("self_attn.v_proj.weight", vec![kv, h]),
            ("self_attn.o_proj.weight", vec![h, q]),
            ("post_attention_layernorm.weight", vec![h]),
            ("mlp.gate_proj.weight", vec![f, h]),
            ("mlp.up_proj.weight", vec![f, h]),
            ("mlp.down_proj.weight", vec![h, f]),
        ];
        for (present, more) in [
            (
                self.qkv_bias,
                vec![("self_attn.q_proj.bias", q), ("self_attn.k_proj.bias", kv), ("self_attn.v_proj.bias", kv)],
            ),
            (self.o_bias, vec![("self_attn.o_proj.bias", h)]),
            (self.mlp_bias, vec![("mlp.gate_proj.bias", f), ("mlp.up_proj.bias", f), ("mlp.down_proj.bias", h)]),
            (
                self.family.qk_norm,
                vec![("self_attn.q_norm.weight", self.head_dim), ("self_attn.k_norm.weight", self.head_dim)],
            ),
        ] {
            tensors.extend(more.into_iter().filter(|_| present).map(|(name, len)| (name, vec![len])));
        }
        tensors
    }
}
