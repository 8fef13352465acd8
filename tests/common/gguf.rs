//! Writes a Hugging Face folder as the GGUF file that a converter makes of it: names, order of rows, norms, keys.

use std::{fs, os::unix::fs::FileExt, path::Path};

use layer_streamer::{Checkpoint, DType, model::ModelConfig};
use serde_json::Value;
use support::gguf::{GgufFile, Meta};

/// Families whose queries and keys are stored with the elements that rotate together side by side.
fn is_interleaved(model_type: &str) -> bool {
    ["llama", "mistral", "smollm3", "granite"].contains(&model_type)
}

/// The file of a folder whose configuration spells everything out.
pub fn converted(folder: &Path) -> GgufFile {
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let read = ModelConfig::read(folder).unwrap();
    let model_type = config["model_type"].as_str().unwrap();
    let mut file = GgufFile::default();
    keys(&mut file, &config, &read);
    let checkpoint = Checkpoint::open(folder).unwrap();
    for name in checkpoint.names() {
        let (dtype, shape) = checkpoint.describe(name).unwrap();
        let (path, offset) = checkpoint.location(name).unwrap();
        let mut bytes = vec![0; dtype.bytes_of(shape).unwrap()];
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        let heads = if name.contains(".q_proj.") { read.heads } else { read.kv_heads };
        if is_interleaved(model_type) && (name.contains(".q_proj.") || name.contains(".k_proj.")) {
            bytes = interleaved(&bytes, heads, read.head_dim);
        }
        let (code, bytes) = stored(dtype, shape, bytes, model_type.starts_with("gemma") && name.contains("norm"));
        file.tensor(&theirs(name, model_type), shape, code, bytes);
    }
    file
}

/// Rows of heads, of which the halves rotate together, in pairs.
fn interleaved(bytes: &[u8], heads: usize, head_dim: usize) -> Vec<u8> {
    let row = bytes.len() / (heads * head_dim);
    let at = |head: usize, element: usize| &bytes[(head * head_dim + element) * row..][..row];
    let pair = |head: usize, i: usize| [at(head, i), at(head, head_dim / 2 + i)].concat();
    (0..heads).flat_map(|head| (0..head_dim / 2).flat_map(move |i| pair(head, i))).collect()
}

/// Type and bytes as converters have them: vectors in F32, and the norms of Gemma with the one that is added to them.
fn stored(dtype: DType, shape: &[usize], bytes: Vec<u8>, adds_one: bool) -> (u32, Vec<u8>) {
    let code = match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 30,
        other => panic!("{other}"),
    };
    if shape.len() > 1 {
        return (code, bytes);
    }
    let wide: Vec<f32> = match dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect(),
    };
    let one = if adds_one { 1.0 } else { 0.0 };
    (0, wide.iter().flat_map(|value| (value + one).to_le_bytes()).collect())
}

/// What GGUF calls a tensor.
fn theirs(name: &str, model_type: &str) -> String {
    let outside = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    if let Some((_, theirs)) = outside.iter().find(|(ours, _)| *ours == name) {
        return (*theirs).into();
    }
    let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let (module, parameter) = rest.rsplit_once('.').unwrap();
    let norms_after = model_type.starts_with("gemma") || model_type == "olmo2";
    let theirs = match module {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if norms_after => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{theirs}.{parameter}")
}

/// The keys of its architecture.
fn keys(file: &mut GgufFile, config: &Value, read: &ModelConfig) {
    let architecture = match config["model_type"].as_str().unwrap() {
        "mistral" => "llama",
        "gemma3_text" => "gemma3",
        other => other,
    };
    file.set("general.architecture", Meta::text(architecture));
    let mut set = |name: &str, value: Meta| file.set(&format!("{architecture}.{name}"), value);
    let count = |number: usize| Meta::U32(number as u32);
    set("block_count", count(read.layers));
    set("context_length", count(config["max_position_embeddings"].as_u64().unwrap() as usize));
    set("embedding_length", count(read.hidden));
    set("feed_forward_length", count(read.ffn));
    set("attention.head_count", count(read.heads));
    set("attention.head_count_kv", count(read.kv_heads));
    set("attention.key_length", count(read.head_dim));
    set("attention.value_length", count(read.head_dim));
    set("attention.layer_norm_rms_epsilon", Meta::F32(read.rms_eps));
    set("rope.dimension_count", count(2 * read.ropes[0].pairs()));
    set("vocab_size", count(read.vocab));
    for (ours, theirs) in [
        ("rope_theta", "rope.freq_base"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(number) = config[ours].as_f64() {
            set(theirs, Meta::F32(number as f32));
        }
    }
    for (ours, theirs) in
        [("sliding_window", "attention.sliding_window"), ("sliding_window_pattern", "attention.sliding_window_pattern")]
    {
        if let Some(number) = config[ours].as_u64() {
            set(theirs, count(number as usize));
        }
    }
    let scaling = &config["rope_scaling"];
    if let kind @ ("linear" | "yarn") = scaling["rope_type"].as_str().unwrap_or_default() {
        set("rope.scaling.type", Meta::text(kind));
        set("rope.scaling.factor", Meta::F32(scaling["factor"].as_f64().unwrap() as f32));
    }
    if let Some(original) =
        scaling["original_max_position_embeddings"].as_u64().or(config["original_max_position_embeddings"].as_u64())
    {
        set("rope.scaling.original_context_length", count(original as usize));
    }
    if let Some(factor) = scaling["attention_factor"].as_f64() {
        set("rope.scaling.attn_factor", Meta::F32(factor as f32));
    }
    rope_tensors(file, scaling, read);
}

/// Factors of frequencies, where a rope has them pair by pair.
fn rope_tensors(file: &mut GgufFile, scaling: &Value, read: &ModelConfig) {
    let mut vector = |name: &str, numbers: Vec<f32>| {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        file.tensor(name, &[numbers.len()], 0, bytes);
    };
    let numbers = |key: &str| -> Vec<f32> {
        scaling[key].as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    };
    match scaling["rope_type"].as_str() {
        Some("longrope") => {
            vector("rope_factors_long.weight", numbers("long_factor"));
            vector("rope_factors_short.weight", numbers("short_factor"));
        }
        // By how much each frequency is less than without scaling.
        Some("llama3") => {
            let (pairs, theta) = (read.ropes[0].pairs(), scaling["plain_theta"].as_f64().unwrap());
            let plain = |i: usize| theta.powf(-(i as f64) / pairs as f64);
            let found = read.ropes[0].frequencies(1);
            vector("rope_freqs.weight", (0..pairs).map(|i| (plain(i) / f64::from(found[i])) as f32).collect());
        }
        _ => {}
    }
}
