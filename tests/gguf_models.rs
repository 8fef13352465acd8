//! Models as GGUF files: each computes what it computes as a Hugging Face folder.

mod common;
#[path = "common/families.rs"]
mod families;
#[path = "common/gguf.rs"]
mod gguf;

use std::{fs, path::Path};

use common::{distance, logits};
use families::{drawings, stored};
use gguf::converted;
use layer_streamer::{
    Error, Settings,
    device::Cpu,
    model::{Decoder, Model, ModelConfig, Sequence},
};
use serde_json::{Value, json};
use support::{
    copy_of, data,
    gguf::{GgufFile, Meta},
    speller,
};

/// How far apart logits may be where a file has factors of its rope's frequencies, each rounded to F32, instead of a rule.
fn tolerance(config: &Value) -> f64 {
    if config["rope_scaling"]["rope_type"] == "llama3" { 1e-5 } else { 0.0 }
}

fn run(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut decoder = Decoder::new(&Cpu, model, &Settings::default(), 1, ids.len()).unwrap();
    decoder.forward(&[Sequence { row: 0, tokens: ids }]).unwrap();
    logits(&mut decoder)
}

/// How far off the GGUF file of a folder is.
fn compared(folder: &Path, ids: &[u32], what: &str) -> f64 {
    let path = folder.join("model.gguf");
    fs::write(&path, converted(folder).bytes()).unwrap();
    let [from_folder, from_file] =
        [folder, &path].map(|path| Model::open(path).unwrap_or_else(|error| panic!("{what}: {error}")));
    assert_eq!(from_file.config.tied, from_folder.config.tied);
    let [expected, found] = [&from_folder, &from_file].map(|model| run(model, ids));
    let same = expected.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
    if same { 0.0 } else { distance(&found, &expected) }
}

/// A configuration of the same dimensions that GGUF can say, and that spells everything out.
fn spelled_out(config: &Value, read: &ModelConfig, has: impl Fn(&str) -> bool, number: usize) -> Value {
    let model_type = config["model_type"].as_str().unwrap();
    let (theta, pairs) = (5000.0, read.head_dim / 2);
    let mut spelled = json!({
        "model_type": model_type, "hidden_size": read.hidden, "num_hidden_layers": read.layers,
        "num_attention_heads": read.heads, "num_key_value_heads": read.kv_heads, "head_dim": read.head_dim,
        "intermediate_size": read.ffn, "vocab_size": read.vocab, "rms_norm_eps": read.rms_eps,
        "max_position_embeddings": 64, "rope_theta": theta, "tie_word_embeddings": !has("lm_head.weight"),
        "attention_bias": has("model.layers.0.self_attn.q_proj.bias"), "mlp_bias": has("model.layers.0.mlp.up_proj.bias"),
    });
    let more = match model_type {
        "mistral" => json!({ "sliding_window": 5 }),
        "phi3" => json!({ "sliding_window": 6, "original_max_position_embeddings": 64 }),
        "gemma2" => {
            json!({ "query_pre_attn_scalar": read.head_dim, "sliding_window": 4, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0 })
        }
        "gemma3_text" => {
            json!({ "query_pre_attn_scalar": read.head_dim, "sliding_window": 4, "sliding_window_pattern": 2,
            "rope_local_base_freq": 1000.0 })
        }
        "granite" => {
            json!({ "attention_multiplier": 0.25, "embedding_multiplier": 12.0, "residual_multiplier": 0.21875,
            "logits_scaling": 8.0 })
        }
        _ => json!({}),
    };
    let long = |i: usize| 1.0 + i as f64 / 4.0;
    let factors = |of: &dyn Fn(usize) -> f64, pairs: usize| (0..pairs).map(of).collect::<Vec<_>>();
    let scaling = match (model_type, number % 4) {
        ("phi3", 1) => json!({ "rope_type": "longrope", "long_factor": factors(&long, pairs),
            "short_factor": factors(&|i| 1.0 + i as f64 / 64.0, pairs), "attention_factor": 1.25 }),
        ("phi3", _) => Value::Null,
        (_, 1) => json!({ "rope_type": "linear", "factor": 4.0 }),
        ("gemma3_text", 2) => Value::Null,
        (_, 2) => json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 }),
        ("llama", 3) => json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "plain_theta": theta }),
        _ => Value::Null,
    };
    let spelled = spelled.as_object_mut().unwrap();
    spelled.extend(more.as_object().unwrap().clone());
    spelled.insert("rope_scaling".into(), scaling);
    if model_type == "phi3" && number % 4 == 2 && read.head_dim.is_multiple_of(4) {
        spelled.insert("partial_rotary_factor".into(), 0.5.into());
    }
    Value::Object(spelled.clone())
}

#[test]
fn every_family_computes_the_same_from_its_gguf_file() {
    let mut families = std::collections::BTreeMap::<String, (usize, f64)>::new();
    for (number, (place, drawing)) in drawings(&stored()).into_iter().enumerate() {
        if ["gemma3", "ministral"].contains(&drawing.family.as_str()) {
            continue;
        }
        let folder = support::folder();
        drawing.write(folder.path());
        let read = ModelConfig::read(folder.path()).unwrap();
        let has = |name: &str| drawing.tensors.iter().any(|(other, _)| other == name);
        let config = spelled_out(&drawing.config, &read, has, number);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let ids = &drawing.ids[..drawing.ids.len().min(64)];
        let off = compared(folder.path(), ids, &format!("{place}: {config}"));
        assert!(off <= tolerance(&config), "{place}: {off:.1e} off: {config}");
        let (count, most) = families.entry(drawing.family).or_default();
        (*count, *most) = (*count + 1, most.max(off));
    }
    assert_eq!(families.len(), 10);
    for (family, (count, most)) in families {
        println!("{family}: {count} drawings, logits off by {most:.1e} at most");
        assert!(count >= 7);
    }
}

#[test]
fn references_in_bf16_compute_the_same_from_their_gguf_files() {
    for name in ["llama3", "mistral", "qwen2-f32", "qwen2-sharded", "qwen2-tied", "qwen3", "speller"] {
        let original = if name == "speller" { speller() } else { data(name) };
        let folder = copy_of(&original);
        let text = fs::read_to_string(folder.path().join("config.json")).unwrap();
        let (config, read) = (serde_json::from_str(&text).unwrap(), ModelConfig::read(folder.path()).unwrap());
        let checkpoint = layer_streamer::Checkpoint::open(folder.path()).unwrap();
        let config = spelled_out(&config, &read, |name| checkpoint.describe(name).is_some(), 3);
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % read.vocab as u32).collect();
        let off = compared(folder.path(), &ids, name);
        println!("{name}: logits off by {off:.1e}");
        assert!(off <= tolerance(&config), "{name}: {off:.1e}");
    }
}

#[test]
fn a_model_in_parts_computes_what_it_computes_in_one() {
    let (file, folder) = (small("qwen3"), support::folder());
    let paths = ["m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"].map(|name| folder.path().join(name));
    let (mut first, mut second) = (file.clone(), GgufFile::default());
    second.tensors = first.tensors.split_off(file.tensors.len() / 2);
    for (part, number) in [(&mut first, 0), (&mut second, 1)] {
        part.set("split.no", Meta::U16(number));
        part.set("split.count", Meta::U16(2));
        part.set("split.tensors.count", Meta::I32(file.tensors.len() as i32));
    }
    [&file, &first, &second].into_iter().zip(&paths).for_each(|(part, path)| fs::write(path, part.bytes()).unwrap());
    let [whole, parts] = [&paths[0], &paths[1]].map(|path| run(&Model::open(path).unwrap(), &[1, 2, 3]));
    assert_eq!(parts, whole);
}

/// A small model's file.
fn small(name: &str) -> GgufFile {
    let folder = copy_of(&data(name));
    let (text, read) =
        (fs::read_to_string(folder.path().join("config.json")).unwrap(), ModelConfig::read(folder.path()).unwrap());
    let config = spelled_out(&serde_json::from_str(&text).unwrap(), &read, |_| false, 0);
    let mut config = config;
    config["tie_word_embeddings"] = false.into();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    converted(folder.path())
}

fn open(file: &GgufFile) -> Result<Model, Error> {
    let folder = support::folder();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file.bytes()).unwrap();
    Model::open(path)
}

#[test]
fn what_a_file_says_that_is_not_understood_is_refused_by_name() {
    let file = small("qwen3");
    open(&file).unwrap();
    for (key, value, parts) in [
        ("general.architecture", Meta::text("mamba"), &["\"mamba\"", "architectures known are llama, qwen2"][..]),
        ("qwen3.of_its_own", Meta::U32(1), &["the key qwen3.of_its_own"]),
        ("qwen3.block_count", Meta::U32(0), &["qwen3.block_count is 0"]),
        ("qwen3.block_count", Meta::text("two"), &["qwen3.block_count is \"two\"", "a whole number"]),
        ("qwen3.feed_forward_length", Meta::Ints(vec![1, 2]), &["qwen3.feed_forward_length is a list of 2"]),
        ("qwen3.attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN), &["rms_epsilon is NaN"]),
        ("qwen3.attention.value_length", Meta::U32(2), &["qwen3.attention.value_length 2"]),
        ("qwen3.attention.causal", Meta::Bool(false), &["qwen3.attention.causal false"]),
        ("qwen3.attention.sliding_window", Meta::U32(7), &["qwen3.attention.sliding_window 7"]),
        ("qwen3.expert_count", Meta::U32(8), &["qwen3.expert_count 8"]),
        ("qwen3.rope.dimension_count", Meta::U32(2), &["qwen3.rope.dimension_count 2"]),
        ("qwen3.rope.scaling.type", Meta::text("odd"), &["qwen3.rope.scaling.type \"odd\""]),
        ("qwen3.rope.scaling.type", Meta::text("linear"), &["lacks the key qwen3.rope.scaling.factor"]),
        ("qwen3.rope.scaling.attn_factor", Meta::F32(2.0), &["qwen3.rope.scaling.attn_factor 2"]),
        ("qwen3.vocab_size", Meta::U32(7), &["tensor model.embed_tokens.weight", "[7, ", "by the file's metadata"]),
    ] {
        let mut file = file.clone();
        file.set(key, value);
        let error = open(&file).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && error.contains("m.gguf"), "{error} lacks {parts:?}");
    }
    let mut lacking = file.clone();
    lacking.remove("qwen3.context_length");
    assert!(open(&lacking).unwrap_err().to_string().contains("m.gguf: lacks the key qwen3.context_length"));
    // Keys and values that say nothing new.
    for (key, value) in [
        ("qwen3.attention.sliding_window", Meta::U32(64)),
        ("qwen3.expert_count", Meta::U32(0)),
        ("qwen3.attention.causal", Meta::Bool(true)),
        ("qwen3.rope.scaling.type", Meta::text("none")),
        ("general.of_its_own", Meta::U32(1)),
    ] {
        let mut file = file.clone();
        file.set(key, value);
        open(&file).unwrap_or_else(|error| panic!("{key}: {error}"));
    }
}

#[test]
fn tensors_that_are_missing_superfluous_or_of_blocks_are_refused_by_name() {
    let file = small("qwen3");
    let refused = |change: &dyn Fn(&mut GgufFile), parts: &[&str]| {
        let mut file = file.clone();
        change(&mut file);
        let error = open(&file).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && error.contains("m.gguf"), "{error} lacks {parts:?}");
    };
    let without = |name: &'static str| move |file: &mut GgufFile| file.tensors.retain(|tensor| tensor.name != name);
    refused(
        &without("blk.1.ffn_down.weight"),
        &["model.layers.1.mlp.down_proj.weight", "the file's metadata calls for it"],
    );
    refused(
        &|file| file.tensor("blk.0.ffn_down.bias", &[1], 0, vec![0; 4]),
        &["mlp.down_proj.bias", "would compute without it"],
    );
    refused(
        &|file| file.tensor("rope_freqs.weight", &[1], 0, vec![0; 4]),
        &["tensor rope_freqs.weight", "not understood"],
    );
    let in_blocks = |file: &mut GgufFile| {
        let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.1.ffn_down.weight").unwrap();
        tensor.code = 16;
    };
    let norm_in_blocks = |file: &mut GgufFile| {
        let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == "blk.1.attn_norm.weight").unwrap();
        (tensor.code, tensor.bytes) = (8, vec![0; 34 * tensor.shape[0] / 32]);
    };
    refused(&norm_in_blocks, &["input_layernorm.weight", "is of type Q8_0, of which only matrices may be"]);
    refused(&in_blocks, &["tensor blk.1.ffn_down.weight: the type IQ2_XXS is not supported", "such as Q4_K_M or Q8_0"]);
}

#[test]
fn what_the_tokens_say_is_the_model_s() {
    let mut file = small("qwen3");
    let model = open(&file).unwrap();
    assert!(model.config.stop.is_empty());
    let tokens = (0..model.config.vocab).map(|id| format!("t{id}")).collect();
    file.remove("qwen3.vocab_size");
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    for (name, id) in [("eos", 5), ("eot", 7), ("eom", 5)] {
        file.set(&format!("tokenizer.ggml.{name}_token_id"), Meta::U32(id));
    }
    let said = open(&file).unwrap().config;
    assert_eq!((said.vocab, said.stop.as_slice()), (model.config.vocab, [5, 7].as_slice()));
}

/// What the keys of an architecture say, without any tensor.
fn configured(architecture: &str, keys: &[(&str, Meta)]) -> Result<ModelConfig, Error> {
    let mut file = GgufFile::default();
    file.set("general.architecture", Meta::text(architecture));
    let usual = [
        ("block_count", Meta::U32(8)),
        ("context_length", Meta::U32(64)),
        ("embedding_length", Meta::U32(96)),
        ("feed_forward_length", Meta::U32(16)),
        ("attention.head_count", Meta::U32(4)),
        ("attention.key_length", Meta::U32(16)),
        ("attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("vocab_size", Meta::U32(9)),
    ];
    for (name, value) in usual.iter().chain(keys) {
        file.set(&format!("{architecture}.{name}"), value.clone());
    }
    let folder = support::folder();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file.bytes()).unwrap();
    ModelConfig::read(path)
}

#[test]
fn what_is_absent_has_the_meaning_that_gguf_gives_it() {
    let llama = configured("llama", &[]).unwrap();
    assert_eq!((llama.kv_heads, llama.window(0), llama.tied), (4, None, true));
    assert_eq!(llama.ropes[0].frequencies(1)[1], 1e4f64.powf(-1.0 / 8.0) as f32);
    let window = ("attention.sliding_window", Meta::U32(5));
    assert_eq!(configured("llama", std::slice::from_ref(&window)).unwrap().window(0), Some(5));

    let granite = configured("granite", &[]).unwrap().multipliers;
    assert_eq!([granite.embedding, granite.scores, granite.branch, granite.logits], [1.0, 0.25, 1.0, 1.0]);
    let smollm3 = configured("smollm3", &[]).unwrap();
    assert_eq!([0, 2, 3, 7].map(|layer| smollm3.rope_of(layer)), [0, 0, 1, 1]);

    let caps =
        [("attn_logit_softcapping", Meta::F32(50.0)), ("final_logit_softcapping", Meta::F32(30.0)), window.clone()];
    let gemma2 = configured("gemma2", &caps).unwrap();
    assert_eq!((gemma2.soft_caps.scores, gemma2.soft_caps.logits), (Some(50.0), Some(30.0)));
    assert_eq!([0, 1, 2].map(|layer| gemma2.window(layer)), [Some(5), None, Some(5)]);
    let base = [window.clone(), ("rope.freq_base", Meta::F32(1e6))];
    let gemma3 = configured("gemma3", &base).unwrap();
    assert_eq!([0, 4, 5, 6].map(|layer| gemma3.window(layer)), [Some(5), Some(5), None, Some(5)]);
    let second = |rope: usize| gemma3.ropes[rope].frequencies(1)[1];
    assert_eq!([second(0), second(1)], [1e6, 1e4].map(|base: f64| base.powf(-1.0 / 8.0) as f32));
    assert_eq!(gemma3.soft_caps.logits, None);
    // The largest divide scores by another width.
    for (architecture, keys, layers) in [("gemma2", &caps[..], 46), ("gemma3", &base, 62)] {
        let scores = |layers| {
            let keys = [keys, &[("block_count", Meta::U32(layers))]].concat();
            configured(architecture, &keys).unwrap().multipliers.scores
        };
        assert_eq!([scores(8), scores(layers)], [16.0, 24.0].map(|width: f64| width.powf(-0.5) as f32));
    }
    for (architecture, keys, lacking) in [
        ("gemma2", &caps[1..], "gemma2.attn_logit_softcapping"),
        ("gemma2", &caps[..2], "gemma2.attention.sliding_window"),
        ("gemma3", &base[..1], "gemma3.rope.freq_base"),
    ] {
        let error = configured(architecture, keys).unwrap_err().to_string();
        assert!(error.contains(&format!("lacks the key {lacking}")), "{error}");
    }
}
