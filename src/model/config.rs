//! What `config.json` and `generation_config.json` of a Hugging Face folder say about a decoder-only model.
//!
//! A model family is a row of [`FAMILIES`]: it states where the family differs, and the decoder does the rest. Both spellings
//! of the rope and type keys are read: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5).

use std::{fs, io, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// Where a model family differs from the common decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    model_type: &'static str,
    /// Query, key and value projections have biases whatever the configuration says.
    qkv_bias: bool,
    /// Each head's query and key are normed before they are rotated.
    pub(crate) qk_norm: bool,
    /// A sliding window counts only if `use_sliding_window` is set, and from layer `max_window_layers` on.
    optional_window: bool,
}

const FAMILIES: [Family; 4] = [
    Family { model_type: "llama", qkv_bias: false, qk_norm: false, optional_window: false },
    Family { model_type: "mistral", qkv_bias: false, qk_norm: false, optional_window: false },
    Family { model_type: "qwen2", qkv_bias: true, qk_norm: false, optional_window: true },
    Family { model_type: "qwen3", qkv_bias: false, qk_norm: true, optional_window: true },
];

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
    /// A sliding window of this many tokens, and the first layer that has it.
    pub window: Option<(usize, usize)>,
    /// The longest context the model was made for.
    pub max_positions: usize,
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
}

#[derive(Deserialize)]
struct Raw {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct RawGeneration {
    eos_token_id: Option<OneOrMany>,
}

impl ModelConfig {
    /// Reads a folder's configuration.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Checkpoint`] that names the file and what is wrong in it; [`Error::Unsupported`] for a model
    /// of another family, or one with features that are not computed here.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let path = folder.as_ref().join("config.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let wrong = |cause: String| Error::checkpoint(&path, cause);
        let value: Value = serde_json::from_slice(&text).map_err(|e| wrong(format!("is no valid JSON: {e}")))?;
        let model_type = value.get("model_type").and_then(Value::as_str).unwrap_or("(none)").to_owned();
        let Some(family) = FAMILIES.into_iter().find(|family| family.model_type == model_type) else {
            let known = FAMILIES.map(|family| family.model_type).join(", ");
            return Err(Error::Unsupported {
                what: format!("{}: model_type {model_type:?}", path.display()),
                remedy: format!("the model types known are {known}"),
            });
        };
        let raw: Raw =
            serde_json::from_value(value).map_err(|e| wrong(format!("is no {model_type} configuration: {e}")))?;

        let (heads, kv_heads) = (raw.num_attention_heads, raw.num_key_value_heads.unwrap_or(raw.num_attention_heads));
        for (key, value) in [
            ("hidden_size", raw.hidden_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("intermediate_size", raw.intermediate_size),
            ("vocab_size", raw.vocab_size),
            ("max_position_embeddings", raw.max_position_embeddings),
        ] {
            if value == 0 || value > u32::MAX as usize {
                return Err(wrong(format!("{key} is {value}")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(wrong(format!("{heads} query heads cannot share {kv_heads} key heads evenly")));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 16 || heads * head_dim > u32::MAX as usize {
            return Err(wrong(format!(
                "heads of {head_dim} elements cannot be rotated in pairs; head_dim must be even"
            )));
        }
        let unsupported = |what: String| Error::Unsupported {
            what: format!("{}: {what}", path.display()),
            remedy: "the model would compute something else without it".into(),
        };
        if raw.hidden_act.as_deref().is_some_and(|act| act != "silu") {
            return Err(unsupported(format!("hidden_act {:?}", raw.hidden_act.unwrap_or_default())));
        }
        let rope = raw.rope_parameters.or(raw.rope_scaling);
        let theta = rope.as_ref().and_then(|rope| rope.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0);
        let mut inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        match rope.as_ref().and_then(|rope| rope.rope_type.as_deref()).unwrap_or("default") {
            "default" => {}
            "llama3" => {
                let scaled = rope.as_ref().and_then(|rope| llama3(rope, &mut inv_freq));
                scaled.ok_or_else(|| wrong("the llama3 rope scaling lacks one of its four numbers".into()))?;
            }
            other => return Err(unsupported(format!("rope scaling {other:?}"))),
        }
        let windowed = !family.optional_window || raw.use_sliding_window;
        let first_windowed = if family.optional_window { raw.max_window_layers.unwrap_or(0) } else { 0 };
        Ok(Self {
            hidden: raw.hidden_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            ffn: raw.intermediate_size,
            vocab: raw.vocab_size,
            rms_eps: raw.rms_norm_eps as f32,
            inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(),
            tied: raw.tie_word_embeddings,
            window: raw.sliding_window.filter(|&window| windowed && window > 0).map(|window| (window, first_windowed)),
            max_positions: raw.max_position_embeddings,
            stop: stop_tokens(folder.as_ref(), raw.eos_token_id)?,
            qkv_bias: family.qkv_bias || raw.attention_bias,
            o_bias: !family.qkv_bias && raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            family,
        })
    }

    /// The window of layer `layer`, in tokens.
    pub(crate) fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|&(_, first)| layer >= first).map(|(window, _)| window)
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

/// The scaling of Llama 3.1 (`_compute_llama3_parameters` in transformers): long wavelengths are stretched by `factor`, short
/// ones stay, those between are blended. `None` if a number is missing.
fn llama3(rope: &RawRope, inv_freq: &mut [f64]) -> Option<()> {
    let (factor, low, high) = (rope.factor?, rope.low_freq_factor?, rope.high_freq_factor?);
    let original = rope.original_max_position_embeddings?;
    for frequency in inv_freq {
        let wavelengths = original * *frequency / std::f64::consts::TAU;
        let blend = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
        *frequency *= blend + (1.0 - blend) / factor;
    }
    Some(())
}

/// `eos_token_id` of `generation_config.json`, else of `config.json`.
fn stop_tokens(folder: &Path, of_config: Option<OneOrMany>) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let of_generation = match fs::read(&path) {
        Ok(text) => {
            let raw: RawGeneration = serde_json::from_slice(&text)
                .map_err(|e| Error::checkpoint(&path, format!("is no valid generation configuration: {e}")))?;
            raw.eos_token_id
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    Ok(match of_generation.or(of_config) {
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
        None => Vec::new(),
    })
}
