//! The files as they are, and the checks that all families share.

use std::{io, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    files,
};

/// Far more than any configuration has.
const MOST_BYTES: u64 = 4 << 20;

/// Why a configuration is refused.
pub(super) enum ConfigFault {
    /// It says what cannot be.
    Wrong(String),
    /// It says what is not computed here.
    Unsupported(String),
}

impl ConfigFault {
    /// As an error of this file.
    pub(super) fn at(self, path: &Path) -> Error {
        match self {
            Self::Wrong(cause) => Error::checkpoint(path, cause),
            Self::Unsupported(what) => Error::Unsupported {
                what: format!("{}: {what}", path.display()),
                remedy: "take a model without it".into(),
            },
        }
    }
}

/// [`ConfigFault::Wrong`] unless `holds`, or where the number is too large for F32.
pub(super) fn within(key: &str, value: f64, holds: bool) -> Result<(), ConfigFault> {
    if holds && (value as f32).is_finite() { Ok(()) } else { Err(ConfigFault::Wrong(format!("{key} is {value}"))) }
}

#[derive(Deserialize)]
pub(super) struct Raw {
    pub(super) hidden_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) intermediate_size: usize,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) hidden_act: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    pub(super) rope_parameters: Option<RawRope>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) sliding_window: Option<usize>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) max_window_layers: Option<usize>,
    pub(super) layer_types: Option<Vec<String>>,
    pub(super) eos_token_id: Option<OneOrMany>,
}

#[derive(Default, Deserialize)]
pub(super) struct RawRope {
    pub(super) rope_type: Option<String>,
    /// The older spelling; some files have both.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) factor: Option<f64>,
    pub(super) low_freq_factor: Option<f64>,
    pub(super) high_freq_factor: Option<f64>,
    pub(super) original_max_position_embeddings: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "eos_token_id must be a token id or a list of them")]
pub(super) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
pub(super) struct RawGeneration {
    pub(super) eos_token_id: Option<OneOrMany>,
}

impl Raw {
    /// Query heads, key heads and their width.
    pub(super) fn heads(&self) -> Result<[usize; 3], ConfigFault> {
        let (heads, kv_heads) =
            (self.num_attention_heads, self.num_key_value_heads.unwrap_or(self.num_attention_heads));
        for (key, value) in [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if value == 0 || value > u32::MAX as usize {
                return Err(ConfigFault::Wrong(format!("{key} is {value}")));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(ConfigFault::Wrong(format!("{heads} query heads cannot share {kv_heads} key heads evenly")));
        }
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 4096 {
            return Err(ConfigFault::Wrong(format!("head_dim is {head_dim}, expected an even number up to 4096")));
        }
        Ok([heads, kv_heads, head_dim])
    }

    /// Whether norms, activation and rotation are those that are computed here.
    pub(super) fn check_features(&self) -> Result<(), ConfigFault> {
        within("rms_norm_eps", self.rms_norm_eps, self.rms_norm_eps >= 0.0)?;
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(ConfigFault::Unsupported(format!("hidden_act {act:?}")));
        }
        if self.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            return Err(ConfigFault::Unsupported("partial_rotary_factor".into()));
        }
        Ok(())
    }
}

/// What `config.json` says.
pub(super) fn read(path: &Path) -> Result<Value> {
    let text = files::read_small(path, MOST_BYTES)?;
    let text = text.ok_or_else(|| Error::io("read", path)(io::Error::from_raw_os_error(libc::ENOENT)))?;
    serde_json::from_slice(&text).map_err(|e| Error::checkpoint(path, format!("is no valid JSON: {e}")))
}

impl OneOrMany {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// `eos_token_id` of `generation_config.json`, else of `config.json`.
pub(super) fn stop_tokens(folder: &Path, of_config: Vec<u32>) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let of_generation = match files::read_small(&path, MOST_BYTES)? {
        Some(text) => {
            let raw: RawGeneration = serde_json::from_slice(&text)
                .map_err(|e| Error::checkpoint(&path, format!("is no valid generation configuration: {e}")))?;
            raw.eos_token_id
        }
        None => None,
    };
    Ok(of_generation.map_or(of_config, OneOrMany::into_vec))
}
