//! What `config.json` and `generation_config.json` of a Hugging Face folder say about a decoder-only model, read as transformers 5
//! reads them: what is absent has the default of the model's class, null has not, and of two blocks that say the same the one
//! counts that counts there. The metadata of a GGUF file become such a configuration.

mod families;
mod generation;
mod gguf;
mod keys;
mod layers;
mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use families::{Biases, Caps, FAMILIES, MINISTRAL, RopeRule};
pub(crate) use families::{Family, HeadNorm, Norms};
pub use generation::SuggestedSampling;
use keys::{ConfigFault, Keys, within};
use layers::LayerSet;
pub use rope::Rope;
use serde_json::{Map, Value};

use crate::{
    checkpoint::gguf::Gguf,
    error::{Error, Result},
    kernels::RopeLayout,
};

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
    /// Rotary position embeddings, one or two: [`rope_of`](Self::rope_of) tells which a layer has.
    pub ropes: Vec<Rope>,
    /// Which elements of a head rotate together.
    pub(crate) rope_layout: RopeLayout,
    /// The output head is the embedding table.
    pub tied: bool,
    /// The longest context the model was made for, in tokens: 2^32 - 1 where its rotary frequencies follow the length.
    pub max_positions: usize,
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    /// What the embedding, the scores before the softmax, what a layer's halves add to the residual stream, and the logits are
    /// multiplied by.
    pub multipliers: Multipliers,
    /// The soft caps of scores and of logits: `cap · tanh(x / cap)`.
    pub soft_caps: SoftCaps,
    pub(crate) activation: Activation,
    windows: (LayerSet, Option<usize>),
    second_rope: LayerSet,
    /// How its makers would have tokens chosen.
    pub suggested: SuggestedSampling,
    pub(crate) qkv_bias: bool,
    pub(crate) o_bias: bool,
    pub(crate) mlp_bias: bool,
}

/// What parts of the computation are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// The embedding; 1 for most.
    pub embedding: f32,
    /// The scores before the softmax; `1 / sqrt(head_dim)` for most.
    pub scores: f32,
    /// What attention and MLP add to the residual stream; 1 for most.
    pub branch: f32,
    /// The logits; 1 for most.
    pub logits: f32,
}

/// Soft caps (Gemma 2's report, arXiv:2408.00118): `None` where there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftCaps {
    /// Of the scores before the softmax.
    pub scores: Option<f32>,
    /// Of the logits.
    pub logits: Option<f32>,
}

/// The activation of the MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Silu,
    /// The form with a hyperbolic tangent.
    Gelu,
}

/// The configuration of the language model, where it is a part of another, and its family.
fn language_model(config: &Map<String, Value>) -> Option<(Family, Map<String, Value>)> {
    let of = |config: &Map<String, Value>| {
        let model_type = config.get("model_type").and_then(Value::as_str)?;
        // As transformers takes it.
        if model_type == "mistral" && config.contains_key("layer_types") {
            return Some(MINISTRAL);
        }
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    };
    if let Some(family) = of(config) {
        return Some((family, config.clone()));
    }
    let Some(Value::Object(text)) = config.get("text_config") else { return None };
    let mut text = text.clone();
    if let (Some(whole), false) = (config.get("model_type").and_then(Value::as_str), text.contains_key("model_type")) {
        text.insert("model_type".into(), format!("{whole}_text").into());
    }
    // What the whole says counts for the text, unless that has its own.
    if let (Some(stop), false) = (config.get("eos_token_id"), text.contains_key("eos_token_id")) {
        text.insert("eos_token_id".into(), stop.clone());
    }
    // Of the heads the whole decides.
    match config.get("tie_word_embeddings") {
        Some(tied) => _ = text.insert("tie_word_embeddings".into(), tied.clone()),
        None if text.get("model_type").is_some_and(|of| of == "gemma3_text") => _ = text.remove("tie_word_embeddings"),
        None => {}
    }
    // transformers caps logits in Gemma 3's language model by itself, and not where it is a part.
    text.insert("final_logit_softcapping".into(), Value::Null);
    of(&text).map(|family| (family, text))
}

impl ModelConfig {
    /// Reads the configuration of a folder, or of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Checkpoint`] that names the file and what is wrong in it; [`Error::Unsupported`] for a model
    /// of another family, or one with features that are not computed here.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let folder = path.as_ref();
        if let Some(file) = Gguf::if_file(folder)? {
            return Self::of_gguf(&file);
        }
        let path = folder.join("config.json");
        let config = keys::read(&path)?;
        let Some((family, config)) = language_model(&config) else {
            let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
            let known = FAMILIES.map(|family| family.model_type).join(", ");
            return Err(Error::Unsupported {
                what: format!("{}: model_type {model_type:?}", path.display()),
                remedy: format!("the model types known are {known}"),
            });
        };
        let config = Self::of(family, &config).map_err(|fault| fault.at(&path))?;
        let (stop, suggested) = generation::read(folder)?;
        Ok(Self { stop: stop.unwrap_or(config.stop), suggested, ..config })
    }

    /// What a GGUF file says of its model.
    pub(crate) fn of_gguf(file: &Gguf) -> Result<Self> {
        let gguf::Described { family, config, layout, factors } = gguf::read(file)?;
        let mut config = Self::of(family, &config).map_err(|fault| fault.at(file.path()))?;
        config.rope_layout = layout;
        if let Some(factors) = factors {
            config.ropes[0].slow_by(&factors).map_err(|fault| fault.at(file.path()))?;
        }
        if layout == RopeLayout::ToHalves {
            // Elements have to change places in those layers too in which nothing rotates.
            config.ropes.iter_mut().for_each(|rope| rope.pair_all(config.head_dim));
        }
        Ok(config)
    }

    /// What the file says of a model of this family; its own stop tokens.
    fn of(family: Family, config: &Map<String, Value>) -> Result<Self, ConfigFault> {
        let keys = Keys::new(config, family.fallbacks);
        let [heads, kv_heads, head_dim] = heads(&keys)?;
        let rms_eps = keys.number("rms_norm_eps")?.ok_or_else(|| ConfigFault::Wrong("rms_norm_eps is null".into()))?;
        within("rms_norm_eps", rms_eps, rms_eps >= 0.0)?;
        refuse_later_tokens(&family, &keys)?;
        let ropes = rope::ropes(family.rope, &keys, head_dim)?;
        let unrotated = match family.rope {
            RopeRule::SomeLayers => layers::unrotated(&keys)?,
            _ => LayerSet::None,
        };
        let windows = layers::windows(&family, &keys, &unrotated)?;
        let attention_bias = keys.flag("attention_bias")?;
        let hidden = keys.size("hidden_size")?;
        Ok(Self {
            hidden,
            layers: keys.size("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            ffn: keys.size("intermediate_size")?,
            vocab: keys.size("vocab_size")?,
            rms_eps: rms_eps as f32,
            rope_layout: RopeLayout::Halves,
            max_positions: rope::max_positions(&ropes, keys.size("max_position_embeddings")?),
            tied: keys.flag("tie_word_embeddings")?,
            stop: keys.stop()?.unwrap_or_default(),
            multipliers: multipliers(&family, &keys, hidden, head_dim)?,
            soft_caps: soft_caps(&family, &keys)?,
            activation: activation(&family, &keys)?,
            second_rope: if family.rope == RopeRule::ByType { windows.0.clone() } else { unrotated },
            windows,
            suggested: SuggestedSampling::default(),
            ropes,
            qkv_bias: match family.biases {
                Biases::None => false,
                Biases::Qkv => true,
                Biases::Attention | Biases::AttentionAndMlp => attention_bias,
            },
            o_bias: attention_bias && matches!(family.biases, Biases::Attention | Biases::AttentionAndMlp),
            mlp_bias: family.biases == Biases::AttentionAndMlp && keys.flag("mlp_bias")?,
            family,
        })
    }

    /// How many tokens a layer sees, itself included; `None`: all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.1.filter(|_| self.windows.0.has(layer))
    }

    /// Which of [`ropes`](Self::ropes) a layer has.
    pub fn rope_of(&self, layer: usize) -> usize {
        usize::from(self.ropes.len() > 1 && self.second_rope.has(layer))
    }

    /// Two lengths of a sequence with the same have the same frequencies.
    pub(crate) fn regime(&self, length: usize) -> [usize; 2] {
        let mut regimes = self.ropes.iter().map(|rope| rope.regime(length));
        [(); 2].map(|()| regimes.next().unwrap_or(0))
    }

    /// A layer's tensors with their shapes, named by what follows the layer's number.
    pub(crate) fn layer_tensors(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (h, q, kv, f) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn);
        let family = &self.family;
        let [of_query, of_key] = match family.head_norm {
            HeadNorm::Together => [q, kv],
            HeadNorm::Each | HeadNorm::None => [self.head_dim; 2],
        };
        let (before, after) = (family.norms != Norms::After, family.norms != Norms::Before);
        let matrices = [
            (!family.is_fused, "self_attn.q_proj.weight", [q, h]),
            (!family.is_fused, "self_attn.k_proj.weight", [kv, h]),
            (!family.is_fused, "self_attn.v_proj.weight", [kv, h]),
            (family.is_fused, "self_attn.qkv_proj.weight", [q + 2 * kv, h]),
            (true, "self_attn.o_proj.weight", [h, q]),
            (!family.is_fused, "mlp.gate_proj.weight", [f, h]),
            (!family.is_fused, "mlp.up_proj.weight", [f, h]),
            (family.is_fused, "mlp.gate_up_proj.weight", [2 * f, h]),
            (true, "mlp.down_proj.weight", [h, f]),
        ];
        let vectors = [
            (before, "input_layernorm.weight", h),
            // After attention in families that norm there, else before the MLP.
            (true, "post_attention_layernorm.weight", h),
            (before && after, "pre_feedforward_layernorm.weight", h),
            (after, "post_feedforward_layernorm.weight", h),
            (self.qkv_bias, "self_attn.q_proj.bias", q),
            (self.qkv_bias, "self_attn.k_proj.bias", kv),
            (self.qkv_bias, "self_attn.v_proj.bias", kv),
            (self.o_bias, "self_attn.o_proj.bias", h),
            (self.mlp_bias, "mlp.gate_proj.bias", f),
            (self.mlp_bias, "mlp.up_proj.bias", f),
            (self.mlp_bias, "mlp.down_proj.bias", h),
            (family.head_norm != HeadNorm::None, "self_attn.q_norm.weight", of_query),
            (family.head_norm != HeadNorm::None, "self_attn.k_norm.weight", of_key),
        ];
        let matrices = matrices.into_iter().map(|(there, name, shape)| (there, name, shape.to_vec()));
        let all = matrices.chain(vectors.into_iter().map(|(there, name, len)| (there, name, vec![len])));
        all.filter_map(|(there, name, shape)| there.then_some((name, shape))).collect()
    }
}

/// Refuses a model whose tokens see those after them too: it makes embeddings, and continues no text.
fn refuse_later_tokens(family: &Family, keys: &Keys<'_>) -> Result<(), ConfigFault> {
    let refusal = |key| Err(ConfigFault::Unsupported(format!("attention to later tokens ({key})")));
    // Null is not true either.
    if keys.has("is_causal") && !keys.flag("is_causal")? {
        return refusal("is_causal");
    }
    // Gemma alone has this key.
    if family.caps != Caps::None && keys.flag("use_bidirectional_attention")? {
        return refusal("use_bidirectional_attention");
    }
    Ok(())
}

/// Query heads, key heads and their width.
fn heads(keys: &Keys<'_>) -> Result<[usize; 3], ConfigFault> {
    let heads = keys.size("num_attention_heads")?;
    let kv_heads = match keys.count("num_key_value_heads")? {
        Some(_) => keys.size("num_key_value_heads")?,
        None => heads,
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigFault::Wrong(format!("{heads} query heads cannot share {kv_heads} key heads evenly")));
    }
    let head_dim = match keys.count("head_dim")? {
        Some(size) => size,
        None => keys.size("hidden_size")? / heads,
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 4096 {
        return Err(ConfigFault::Wrong(format!("head_dim is {head_dim}, expected an even number up to 4096")));
    }
    Ok([heads, kv_heads, head_dim])
}

fn multipliers(family: &Family, keys: &Keys<'_>, hidden: usize, head_dim: usize) -> Result<Multipliers, ConfigFault> {
    let or_one = |key| Ok(if family.has_multipliers { keys.number(key)?.unwrap_or(1.0) } else { 1.0 });
    let divided_by = match family.query_scalar {
        true => keys.positive("query_pre_attn_scalar")?.unwrap_or(head_dim as f64),
        false => head_dim as f64,
    };
    let scores = match family.has_multipliers {
        true => or_one("attention_multiplier")?,
        false => divided_by.powf(-0.5),
    };
    within("attention_multiplier", scores, scores > 0.0)?;
    let embedding = if family.scales_embedding { (hidden as f64).sqrt() } else { or_one("embedding_multiplier")? };
    let logits = or_one("logits_scaling")?;
    within("logits_scaling", logits, logits != 0.0)?;
    Ok(Multipliers {
        embedding: embedding as f32,
        scores: scores as f32,
        branch: or_one("residual_multiplier")? as f32,
        logits: (1.0 / logits) as f32,
    })
}

fn soft_caps(family: &Family, keys: &Keys<'_>) -> Result<SoftCaps, ConfigFault> {
    let cap = |counts, key| Ok(if counts { keys.positive(key)?.map(|cap| cap as f32) } else { None });
    Ok(SoftCaps {
        scores: cap(family.caps == Caps::ScoresAndLogits, "attn_logit_softcapping")?,
        logits: cap(family.caps != Caps::None, "final_logit_softcapping")?,
    })
}

fn activation(family: &Family, keys: &Keys<'_>) -> Result<Activation, ConfigFault> {
    match keys.word(family.activation)? {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::Gelu),
        other => Err(ConfigFault::Unsupported(format!("{} {:?}", family.activation, other.unwrap_or("null")))),
    }
}
