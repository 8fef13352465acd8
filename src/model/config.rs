//! What `config.json` and `generation_config.json` of a Hugging Face folder say about a decoder-only model.
//!
//! A model family is a row of [`FAMILIES`]: it states where the family differs, and the decoder does the rest. Both spellings
//! of the rope and type keys are read: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5).

use std::{io, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    files,
};

/// Where a model family differs from the common decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    model_type: &'static str,
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

/// Far more than any configuration has.
const MOST_BYTES: u64 = 4 << 20;

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
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Default, Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    /// The older spelling; some files have both.
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "eos_token_id must be a token id or a list of them")]
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
        let wrong = |cause: String| Error::checkpoint(&path, cause);
        let text = files::read_small(&path, MOST_BYTES)?;
        let text = text.ok_or_else(|| Error::io("read", &path)(io::Error::from_raw_os_error(libc::ENOENT)))?;
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
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 4096 {
            return Err(wrong(format!("head_dim is {head_dim}, expected an even number up to 4096")));
        }
        let within = |key: &str, value: f64, holds: bool| {
            if holds && (value as f32).is_finite() { Ok(()) } else { Err(wrong(format!("{key} is {value}"))) }
        };
        within("rms_norm_eps", raw.rms_norm_eps, raw.rms_norm_eps >= 0.0)?;
        let unsupported = |what: String| Error::Unsupported {
            what: format!("{}: {what}", path.display()),
            remedy: "take a model without it".into(),
        };
        if raw.hidden_act.as_deref().is_some_and(|act| act != "silu") {
            return Err(unsupported(format!("hidden_act {:?}", raw.hidden_act.unwrap_or_default())));
        }
        if raw.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            return Err(unsupported("partial_rotary_factor".into()));
        }
        let rope = raw.rope_parameters.or(raw.rope_scaling).unwrap_or_default();
        let theta = rope.rope_theta.or(raw.rope_theta).unwrap_or(10_000.0);
        within("rope_theta", theta, theta > 0.0)?;
        let mut inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        match rope.rope_type.as_deref().or(rope.kind.as_deref()).unwrap_or("default") {
            "default" => {}
            "llama3" => llama3(&rope, &mut inv_freq).map_err(wrong)?,
            other => return Err(unsupported(format!("rope scaling {other:?}"))),
        }
        let enabled = match family.window {
            WindowRule::Never => false,
            WindowRule::Always => true,
            WindowRule::IfEnabled => raw.use_sliding_window.unwrap_or(false),
        };
        let window = raw.sliding_window.filter(|&window| enabled && window > 0);
        let layers = raw.num_hidden_layers;
        let windows = match (raw.layer_types, family.window) {
            (Some(types), WindowRule::IfEnabled) if types.len() != layers => {
                return Err(wrong(format!("layer_types names {} layers of {layers}", types.len())));
            }
            (Some(types), WindowRule::IfEnabled) => {
                let of_type = |kind: &String| match kind.as_str() {
                    "full_attention" => Ok(None),
                    "sliding_attention" => Ok(window),
                    other => Err(unsupported(format!("layer type {other:?}"))),
                };
                Windows::Each(types.iter().map(of_type).collect::<Result<_>>()?)
            }
            (_, WindowRule::IfEnabled) => Windows::From(raw.max_window_layers.unwrap_or(MAX_WINDOW_LAYERS), window),
            _ => Windows::From(0, window),
        };
        Ok(Self {
            hidden: raw.hidden_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: raw.intermediate_size,
            vocab: raw.vocab_size,
            rms_eps: raw.rms_norm_eps as f32,
            inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(),
            tied: raw.tie_word_embeddings.unwrap_or(false),
            windows,
            max_positions: raw.max_position_embeddings,
            stop: stop_tokens(folder.as_ref(), raw.eos_token_id)?,
            qkv_bias: family.qkv_bias || raw.attention_bias.unwrap_or(false),
            o_bias: !family.qkv_bias && raw.attention_bias.unwrap_or(false),
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

/// The scaling of Llama 3.1 (`_compute_llama3_parameters` in transformers): long wavelengths are stretched by `factor`, short
/// ones stay, those between are blended. The error says what is wrong with the numbers.
fn llama3(rope: &RawRope, inv_freq: &mut [f64]) -> Result<(), String> {
    let number = |key: &str, value: Option<f64>| match value {
        Some(value) if value > 0.0 && value.is_finite() => Ok(value),
        Some(value) => Err(format!("{key} of the llama3 rope scaling is {value}")),
        None => Err(format!("the llama3 rope scaling lacks {key}")),
    };
    let factor = number("factor", rope.factor)?;
    let (low, high) =
        (number("low_freq_factor", rope.low_freq_factor)?, number("high_freq_factor", rope.high_freq_factor)?);
    let original = number("original_max_position_embeddings", rope.original_max_position_embeddings)?;
    if low >= high {
        return Err(format!("low_freq_factor {low} of the llama3 rope scaling is not below high_freq_factor {high}"));
    }
    for frequency in inv_freq {
        let wavelengths = original * *frequency / std::f64::consts::TAU;
        let blend = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
        *frequency *= blend + (1.0 - blend) / factor;
    }
    Ok(())
}

/// `eos_token_id` of `generation_config.json`, else of `config.json`.
fn stop_tokens(folder: &Path, of_config: Option<OneOrMany>) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let of_generation = match files::read_small(&path, MOST_BYTES)? {
        Some(text) => {
            let raw: RawGeneration = serde_json::from_slice(&text)
                .map_err(|e| Error::checkpoint(&path, format!("is no valid generation configuration: {e}")))?;
            raw.eos_token_id
        }
        None => None,
    };
    Ok(match of_generation.or(of_config) {
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
        None => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Reads the speller's configuration with some keys changed; `null` removes one.
    fn read(changes: Value) -> Result<ModelConfig> {
        let speller = Path::new("examples/speller");
        let folder = tempfile::tempdir().unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(speller.join("config.json")).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        if let Some(generation) = config.get("generation") {
            fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        ModelConfig::read(folder.path())
    }

    #[test]
    fn a_window_counts_where_the_family_and_the_layer_types_say() {
        let some = |text: &str| text.chars().map(|c| (c == 'w').then_some(5)).collect::<Vec<_>>();
        let types = |text: &str| -> Value {
            text.chars().map(|c| if c == 'w' { "sliding_attention" } else { "full_attention" }).collect()
        };
        for (changes, windows) in [
            (serde_json::json!({}), "........"),
            (serde_json::json!({ "use_sliding_window": true }), "........"),
            (serde_json::json!({ "use_sliding_window": true, "layer_types": types("..w.w..w") }), "..w.w..w"),
            (serde_json::json!({ "use_sliding_window": false, "layer_types": types("wwwwwwww") }), "........"),
            (
                serde_json::json!({ "use_sliding_window": true, "layer_types": null, "max_window_layers": 3 }),
                "...wwwww",
            ),
            (
                serde_json::json!({ "use_sliding_window": true, "layer_types": null, "max_window_layers": null }),
                "........",
            ),
            (serde_json::json!({ "model_type": "mistral" }), "wwwwwwww"),
            (serde_json::json!({ "model_type": "llama" }), "........"),
        ] {
            let mut changes = changes;
            changes["sliding_window"] = 5.into();
            let config = read(changes.clone()).unwrap();
            let found: Vec<_> = (0..config.layers).map(|layer| config.window(layer)).collect();
            assert_eq!(found, some(windows), "{changes}");
        }
    }

    #[test]
    fn what_a_file_says_of_its_layers_takes_no_memory() {
        for family in FAMILIES {
            let changes = serde_json::json!({ "model_type": family.model_type, "num_hidden_layers": u32::MAX,
                "layer_types": null, "sliding_window": 5, "use_sliding_window": true });
            let config = read(changes).unwrap();
            assert_eq!(config.layers, u32::MAX as usize);
            assert_eq!(config.window(u32::MAX as usize - 1).is_some(), family.window != WindowRule::Never);
            assert!(matches!(config.windows, Windows::From(..)));
        }
    }

    #[test]
    fn both_spellings_of_the_rope_keys_are_read() {
        let base = |changes: Value| read(changes).unwrap().inv_freq[1];
        let (old, new) = (
            serde_json::json!({ "rope_parameters": null, "rope_theta": 9.0 }),
            serde_json::json!({
            "rope_parameters": { "rope_theta": 9.0, "rope_type": "default", "type": "default" }, "rope_theta": 4.0 }),
        );
        let expected = 9f64.powf(-2.0 / 64.0) as f32;
        assert_eq!((base(old), base(new)), (expected, expected));
        let llama3 = |key: &str| {
            serde_json::json!({ key: "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64 })
        };
        let scaled =
            |key| read(serde_json::json!({ "rope_parameters": null, "rope_scaling": llama3(key) })).unwrap().inv_freq;
        assert_eq!(scaled("type"), scaled("rope_type"));
        let plain = read(serde_json::json!({})).unwrap().inv_freq;
        assert_eq!((scaled("type")[0], scaled("type")[31]), (plain[0], plain[31] / 8.0));
    }

    #[test]
    fn stop_tokens_are_those_of_the_generation_configuration_first() {
        let stop = |changes: Value| read(changes).unwrap().stop;
        assert_eq!(stop(serde_json::json!({ "eos_token_id": 7 })), [7]);
        assert_eq!(stop(serde_json::json!({ "eos_token_id": 7, "generation": { "eos_token_id": [8, 9] } })), [8, 9]);
        assert_eq!(stop(serde_json::json!({ "eos_token_id": 7, "generation": {} })), [7]);
        assert!(stop(serde_json::json!({ "eos_token_id": null })).is_empty());
    }

    #[test]
    fn biases_follow_family_and_flags() {
        let names = |changes: Value| {
            let tensors = read(changes).unwrap().layer_tensors();
            let biases = tensors.into_iter().filter_map(|(name, _)| name.strip_suffix(".bias"));
            biases.map(|name| name.split('.').next_back().unwrap()[..1].to_owned()).collect::<String>()
        };
        assert_eq!(names(serde_json::json!({})), "qkv");
        assert_eq!(names(serde_json::json!({ "model_type": "llama", "attention_bias": true })), "qkvo");
        assert_eq!(
            names(serde_json::json!({ "model_type": "llama", "mlp_bias": true, "tie_word_embeddings": null })),
            "gud"
        );
    }

    #[test]
    fn numbers_that_cannot_be_computed_with_are_refused_by_key() {
        let rope = |key: &str, value: f64| {
            let mut rope = serde_json::json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64.0 });
            rope[key] = value.into();
            serde_json::json!({ "rope_parameters": rope })
        };
        for (changes, part) in [
            (serde_json::json!({ "rms_norm_eps": -1.0 }), "rms_norm_eps is -1"),
            (serde_json::json!({ "rms_norm_eps": 1e300 }), "rms_norm_eps"),
            (serde_json::json!({ "rope_parameters": { "rope_theta": 0.0 } }), "rope_theta is 0"),
            (rope("factor", 0.0), "factor of the llama3 rope scaling is 0"),
            (rope("low_freq_factor", 4.0), "not below"),
            (serde_json::json!({ "head_dim": 63 }), "head_dim is 63"),
            (serde_json::json!({ "num_attention_heads": 3, "num_key_value_heads": 2 }), "cannot share"),
            (serde_json::json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
            (serde_json::json!({ "eos_token_id": -1 }), "eos_token_id"),
            (serde_json::json!({ "layer_types": ["full_attention"] }), "layer_types names 1 layers of 8"),
            (serde_json::json!({ "layer_types": vec!["linear_attention"; 8] }), "linear_attention"),
        ] {
            let message = read(changes.clone()).unwrap_err().to_string();
            assert!(message.contains("config.json") && message.contains(part), "{changes}: {message}");
        }
    }
}
