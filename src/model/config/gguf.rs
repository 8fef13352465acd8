//! What a GGUF file's metadata say of a model, in the words of `config.json`. Everything that its family has a default for is said,
//! since defaults of transformers are not GGUF's. A key of the architecture that is not understood is refused by name.

use std::cell::RefCell;

use serde_json::{Map, Value, json};

use super::{
    families::{FAMILIES, Family},
    keys::ConfigFault,
};
use crate::{
    checkpoint::gguf::Gguf,
    error::{Error, Result},
    kernels::RopeLayout,
};

/// An architecture of GGUF.
struct Architecture {
    /// As `general.architecture` and the beginnings of keys spell it.
    name: &'static str,
    /// The family's name in `config.json`.
    model_type: &'static str,
    /// Where converters leave the elements of a head that rotate together.
    layout: RopeLayout,
    /// Its keys beside those that all have, and what `config.json` calls them.
    keys: &'static [(&'static str, &'static str)],
}

const WINDOW: (&str, &str) = ("attention.sliding_window", "sliding_window");

const ARCHITECTURES: [Architecture; 9] = [
    Architecture { name: "llama", model_type: "llama", layout: RopeLayout::ToHalves, keys: &[WINDOW] },
    Architecture { name: "qwen2", model_type: "qwen2", layout: RopeLayout::Halves, keys: &[] },
    Architecture { name: "qwen3", model_type: "qwen3", layout: RopeLayout::Halves, keys: &[] },
    Architecture { name: "phi3", model_type: "phi3", layout: RopeLayout::Halves, keys: &[WINDOW] },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        layout: RopeLayout::Halves,
        keys: &[
            WINDOW,
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        layout: RopeLayout::Halves,
        keys: &[
            WINDOW,
            ("attention.sliding_window_pattern", "sliding_window_pattern"),
            ("rope.freq_base_swa", "rope_local_base_freq"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
    },
    Architecture { name: "smollm3", model_type: "smollm3", layout: RopeLayout::ToHalves, keys: &[] },
    Architecture {
        name: "granite",
        model_type: "granite",
        layout: RopeLayout::ToHalves,
        keys: &[
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ],
    },
    Architecture { name: "olmo2", model_type: "olmo2", layout: RopeLayout::Halves, keys: &[] },
];

/// Counts that every architecture has, and what `config.json` calls them.
const COUNTS: [(&str, &str); 5] = [
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
];

/// Keys that say nothing of the computation.
const IDLE: [&str; 2] = ["tensor_data_layout", "rope.scaling.finetuned"];

/// The rotary base where none is said.
const ROPE_BASE: f64 = 1e4;

/// What the frequencies of rotation are divided by, pair by pair.
const FACTORS: &str = "rope_freqs.weight";

/// What a file says.
pub(super) struct Described {
    pub(super) family: Family,
    pub(super) config: Map<String, Value>,
    pub(super) layout: RopeLayout,
    /// What the frequencies are divided by, where that is said by a tensor.
    pub(super) factors: Option<Vec<f32>>,
}

/// The keys of an architecture, which notes those that were asked for.
struct Said<'a> {
    file: &'a Gguf,
    architecture: &'static Architecture,
    asked: RefCell<Vec<String>>,
}

impl<'a> Said<'a> {
    fn key(&self, name: &str) -> String {
        let key = format!("{}.{name}", self.architecture.name);
        self.asked.borrow_mut().push(key.clone());
        key
    }

    fn count(&self, name: &str) -> Result<Option<u64>> {
        self.file.count(&self.key(name))
    }

    /// A number, which is finite: JSON has no other.
    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.file.number(&self.key(name))? {
            Some(number) if !number.is_finite() => Err(self.refused(name, &number.to_string())),
            number => Ok(number),
        }
    }

    /// The same as JSON: a whole number, where that is what is stored.
    fn value(&self, name: &str) -> Result<Option<Value>> {
        let number = self.number(name)?;
        let count = self.file.value(&self.key(name)).and_then(|value| value.as_count());
        Ok(count.map(Value::from).or(number.map(Value::from)))
    }

    fn lacks(&self, name: &str) -> Error {
        Error::checkpoint(self.file.path(), format!("lacks the key {}.{name}", self.architecture.name))
    }

    /// A count above 0 that must be there.
    fn size(&self, name: &str) -> Result<u64> {
        match self.count(name)?.ok_or_else(|| self.lacks(name))? {
            0 => Err(self.refused(name, "0, expected at least 1")),
            size => Ok(size),
        }
    }

    fn refused(&self, name: &str, said: &str) -> Error {
        Error::checkpoint(self.file.path(), format!("{}.{name} is {said}", self.architecture.name))
    }

    /// Refuses a feature that is not computed.
    fn unsupported(&self, name: &str, said: impl std::fmt::Display) -> Error {
        ConfigFault::Unsupported(format!("{}.{name} {said}", self.architecture.name)).at(self.file.path())
    }

    /// Refuses keys that nobody asked for.
    fn refuse_others(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let prefix = format!("{}.", self.architecture.name);
        let mut others =
            self.file.keys().filter(|key| key.starts_with(&prefix) && !asked.iter().any(|other| other == key));
        match others.next() {
            Some(key) => Err(ConfigFault::Unsupported(format!("the key {key}")).at(self.file.path())),
            None => Ok(()),
        }
    }
}

/// What the file says of its model.
///
/// # Errors
/// [`Error::Checkpoint`] that names file and key; [`Error::Unsupported`] for an architecture, or a key of it, that is not known.
pub(super) fn read(file: &Gguf) -> Result<Described> {
    let name = file.text("general.architecture")?;
    let found = ARCHITECTURES.iter().find(|architecture| name == Some(architecture.name));
    let architecture = found.ok_or_else(|| Error::Unsupported {
        what: format!("{}: general.architecture {:?}", file.path().display(), name.unwrap_or("(none)")),
        remedy: format!(
            "the architectures known are {}",
            ARCHITECTURES.each_ref().map(|architecture| architecture.name).join(", ")
        ),
    })?;
    let said = Said { file, architecture, asked: RefCell::new(Vec::new()) };
    let mut config = Map::new();
    dimensions(&said, &mut config)?;
    for (name, known_as) in architecture.keys {
        config.insert((*known_as).into(), said.value(name)?.unwrap_or(Value::Null));
    }
    let model_type = of_family(&said, &mut config)?;
    config.insert("model_type".into(), model_type.into());
    let factors = rope(&said, &mut config)?;
    IDLE.iter().for_each(|name| _ = said.key(name));
    said.refuse_others()?;
    let mut family = FAMILIES.into_iter().find(|family| family.model_type == model_type).expect("a family's name");
    // Converters have added it to the stored weights.
    family.norm_offset = 0.0;
    Ok(Described { family, config, layout: architecture.layout, factors })
}

/// What all architectures have.
fn dimensions(said: &Said<'_>, config: &mut Map<String, Value>) -> Result<()> {
    for (name, known_as) in COUNTS {
        config.insert(known_as.into(), said.size(name)?.into());
    }
    let heads = said.size("attention.head_count")?;
    let kv_heads = said.count("attention.head_count_kv")?.unwrap_or(heads);
    let width = said.count("attention.key_length")?.unwrap_or(said.size("embedding_length")? / heads);
    if let Some(other) = said.count("attention.value_length")?.filter(|&other| other != width) {
        return Err(said.unsupported("attention.value_length", format_args!("{other}, where keys have {width}")));
    }
    let eps = "attention.layer_norm_rms_epsilon";
    let eps = said.number(eps)?.ok_or_else(|| said.lacks(eps))?;
    // Tokens count for more than the key, which is left out by some converters and wrong by others.
    let (tokens, vocab) = (said.file.length("tokenizer.ggml.tokens")?, said.count("vocab_size")?);
    let vocab = tokens.or(vocab).ok_or_else(|| said.lacks("vocab_size"))?;
    let stops = ["eos", "eot", "eom"].map(|name| said.file.count(&format!("tokenizer.ggml.{name}_token_id")));
    let mut stop = Vec::new();
    for id in stops {
        stop.extend(id?.filter(|id| !stop.contains(id)));
    }
    let stored = |name: &str| Value::from(said.file.stores(name));
    for (key, value) in [
        ("num_key_value_heads", kv_heads.into()),
        ("head_dim", width.into()),
        ("rms_norm_eps", eps.into()),
        ("vocab_size", vocab.into()),
        ("eos_token_id", if stop.is_empty() { Value::Null } else { json!(stop) }),
        ("tie_word_embeddings", (!said.file.stores("output.weight")).into()),
        ("attention_bias", stored("blk.0.attn_q.bias")),
        ("mlp_bias", stored("blk.0.ffn_gate.bias")),
    ] {
        config.insert(key.into(), value);
    }
    if said.file.flag(&said.key("attention.causal"))? == Some(false) {
        return Err(said.unsupported("attention.causal", "false"));
    }
    for name in ["expert_count", "expert_used_count"] {
        if let Some(experts @ 1..) = said.count(name)? {
            return Err(said.unsupported(name, experts));
        }
    }
    Ok(())
}

/// What a family's own keys mean where they are absent, and the family's name in `config.json`.
fn of_family(said: &Said<'_>, config: &mut Map<String, Value>) -> Result<&'static str> {
    let is_absent = |config: &Map<String, Value>, known_as: &str| config.get(known_as).is_none_or(Value::is_null);
    let (hidden, heads) = (said.size("embedding_length")? as f64, said.size("attention.head_count")? as f64);
    let head_dim = config["head_dim"].as_f64().unwrap_or(hidden / heads);
    let required: &[&str] = match said.architecture.name {
        "gemma2" => &["attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"],
        "gemma3" => &["attention.sliding_window", "rope.freq_base"],
        _ => &[],
    };
    for name in required {
        said.number(name)?.ok_or_else(|| said.lacks(name))?;
    }
    let mut or = |known_as: &str, value: f64| {
        if is_absent(config, known_as) {
            config.insert(known_as.into(), value.into());
        }
    };
    match said.architecture.name {
        // Of the scores' scale files say nothing: the largest Gemmas divide by another width than that of their heads.
        "gemma2" => {
            or("query_pre_attn_scalar", if said.size("block_count")? == 46 { hidden / heads } else { head_dim })
        }
        "gemma3" => {
            or("query_pre_attn_scalar", if said.size("block_count")? == 62 { hidden / heads } else { head_dim });
            or("rope_local_base_freq", ROPE_BASE);
            if is_absent(config, "sliding_window_pattern") {
                config.insert("sliding_window_pattern".into(), 6.into());
            }
        }
        "smollm3" => _ = config.insert("no_rope_layer_interval".into(), 4.into()),
        "granite" => {
            or("attention_multiplier", head_dim.powf(-0.5));
            ["embedding_multiplier", "residual_multiplier", "logits_scaling"].into_iter().for_each(|key| or(key, 1.0));
        }
        _ => {}
    }
    let window = said.count(WINDOW.0)?.filter(|&window| window > 0);
    if let Some(window) = window.filter(|_| !said.architecture.keys.contains(&WINDOW))
        && window < said.size("context_length")?
    {
        return Err(said.unsupported(WINDOW.0, window));
    }
    // Mistral has Llama's architecture, and a window.
    let is_mistral = said.architecture.name == "llama" && window.is_some();
    Ok(if is_mistral { "mistral" } else { said.architecture.model_type })
}

/// How heads are rotated; and what the frequencies are divided by, where a tensor says that.
fn rope(said: &Said<'_>, config: &mut Map<String, Value>) -> Result<Option<Vec<f32>>> {
    config.insert("rope_theta".into(), said.number("rope.freq_base")?.unwrap_or(ROPE_BASE).into());
    let is_phi = said.architecture.name == "phi3";
    let width = config["head_dim"].as_u64().unwrap_or(0);
    match said.count("rope.dimension_count")? {
        Some(turned) if turned != width && !is_phi => {
            return Err(said.unsupported("rope.dimension_count", format_args!("{turned}, where heads have {width}")));
        }
        // The half is for the product of part and width, which is rounded down.
        Some(turned) if turned != width => {
            let part = (turned as f64 + 0.5) / width as f64;
            config.insert("partial_rotary_factor".into(), part.into());
        }
        _ => {}
    }
    let (factor, original) = (said.number("rope.scaling.factor")?, said.count("rope.scaling.original_context_length")?);
    let attention = said.number("rope.scaling.attn_factor")?;
    let usual = if factor.is_some() { "linear" } else { "none" };
    let kind = said.file.text(&said.key("rope.scaling.type"))?.unwrap_or(usual);
    let [long, short] = ["long", "short"].map(|name| said.file.vector(&format!("rope_factors_{name}.weight")));
    let (long, short, factors) = (long?, short?, said.file.vector(FACTORS)?);
    if factors.is_some() && (said.architecture.name != "llama" || kind != "none") {
        return Err(Error::tensor(said.file.path(), FACTORS, "is not understood beside what its keys say"));
    }
    let needed = |value: Option<f64>, name: &str| value.ok_or_else(|| said.lacks(name));
    let scaling = match (kind, long, short) {
        ("none" | "longrope", Some(long), Some(short)) if is_phi => {
            let original = needed(original.map(|length| length as f64), "rope.scaling.original_context_length")?;
            config.insert("original_max_position_embeddings".into(), original.into());
            json!({ "rope_type": "longrope", "long_factor": long, "short_factor": short,
                "attention_factor": attention.unwrap_or(1.0) })
        }
        (_, Some(_), _) | (_, _, Some(_)) => {
            let cause = "is not understood beside what its keys say";
            return Err(Error::tensor(said.file.path(), "rope_factors_long.weight", cause));
        }
        (_, None, None) if attention.is_some_and(|factor| factor != 1.0) => {
            return Err(said.unsupported("rope.scaling.attn_factor", attention.unwrap_or_default()));
        }
        ("none", ..) => Value::Null,
        ("linear", ..) => json!({ "rope_type": "linear", "factor": needed(factor, "rope.scaling.factor")? }),
        ("yarn", ..) => {
            let original = needed(original.map(|length| length as f64), "rope.scaling.original_context_length")?;
            json!({ "rope_type": "yarn", "factor": needed(factor, "rope.scaling.factor")?,
                "original_max_position_embeddings": original,
                "beta_fast": said.number("rope.scaling.yarn_beta_fast")?, "beta_slow": said.number("rope.scaling.yarn_beta_slow")? })
        }
        (other, ..) => return Err(said.unsupported("rope.scaling.type", format_args!("{other:?}"))),
    };
    config.insert("rope_scaling".into(), scaling);
    Ok(factors)
}
