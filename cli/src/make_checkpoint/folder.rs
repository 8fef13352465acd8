//! A Hugging Face folder: shards of safetensors, index and configuration. The configuration comes last: a folder that has it is
//! complete.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use layer_streamer::DType;
use serde_json::json;

use super::{
    cannot,
    quantised::{Format, Quantised},
    shapes::{CONTEXT, EOS, RMS_EPS, ROPE_BASE, Shape, Tensor, tensors},
    weights::{DEVIATION, Weights},
    writing::{Contents, Writer},
};

/// One file of weights.
struct Shard {
    name: String,
    contents: Contents,
}

impl Shard {
    fn new(name: String, mut tensors: Vec<Tensor>) -> Self {
        // As the library safetensors sorts them, whose types are in the same order. It keeps each on a multiple of its elements' size.
        tensors.sort_by(|a, b| (b.dtype as usize).cmp(&(a.dtype as usize)).then_with(|| a.name.cmp(&b.name)));
        let mut json = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
        let mut end = 0;
        let place = |tensor: Tensor| {
            let (Tensor { name, dtype, .. }, shape, start) = (&tensor, json!(tensor.shape), end);
            end += tensor.bytes();
            // Writing to a string cannot fail.
            let _ = write!(json, r#","{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#);
            (tensor, start)
        };
        let tensors = tensors.into_iter().map(place).collect();
        json.push('}');
        json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(8) - json.len()));
        let header = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        Self { name, contents: Contents { header, tensors } }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.contents.tensors.iter().map(|(tensor, _)| tensor)
    }
}

/// Deals tensors to shards of at most `shard_size` tensor bytes, as the hub's checkpoints are dealt.
fn deal(tensors: Vec<Tensor>, shard_size: u64) -> Vec<Shard> {
    let (mut dealt, mut filled) = (Vec::<Vec<Tensor>>::new(), 0);
    for tensor in tensors {
        filled += tensor.bytes();
        match dealt.last_mut() {
            Some(shard) if filled <= shard_size => shard.push(tensor),
            _ => {
                filled = tensor.bytes();
                dealt.push(vec![tensor]);
            }
        }
    }
    let count = dealt.len();
    let name = |index| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    dealt.into_iter().enumerate().map(|(index, tensors)| Shard::new(name(index), tensors)).collect()
}

/// A file beside the shards: its name and what it holds.
type SideFile = (&'static str, serde_json::Value);

/// The configuration, the generation defaults and, for several shards, the index.
fn side_files(shape: &Shape, layers: u64, quantised: Option<Quantised>, shards: &[Shard]) -> Vec<SideFile> {
    let mut files = Vec::new();
    if shards.len() > 1 {
        let total_size: u64 = shards.iter().flat_map(Shard::tensors).map(Tensor::bytes).sum();
        let places = |shard| Shard::tensors(shard).map(|tensor| (&tensor.name, &shard.name));
        let weight_map: BTreeMap<_, _> = shards.iter().flat_map(places).collect();
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
        files.push(("model.safetensors.index.json", index));
    }
    let generation = json!({ "bos_token_id": 151643, "do_sample": false, "eos_token_id": [EOS, 151643] });
    files.push(("generation_config.json", generation));
    let mut config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "vocab_size": shape.vocab,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv,
        "hidden_act": "silu", "rms_norm_eps": RMS_EPS, "rope_theta": ROPE_BASE, "initializer_range": DEVIATION,
        "attention_dropout": 0.0, "tie_word_embeddings": shape.tied, "use_cache": true,
        "max_position_embeddings": CONTEXT, "use_sliding_window": false, "sliding_window": 131072,
        "max_window_layers": layers, "bos_token_id": 151643, "eos_token_id": EOS,
    });
    if let Some(quantised) = quantised {
        config["quantization_config"] = quantised.config();
    }
    files.push(("config.json", config));
    files
}

/// Refuses a folder that holds any part of a checkpoint: nothing is overwritten, and clean-up may remove what it names.
fn refuse_checkpoint(dir: &Path) -> Result<(), String> {
    for entry in fs::read_dir(dir).map_err(cannot("list", dir))? {
        let name = entry.map_err(cannot("list", dir))?.file_name();
        let name = name.to_string_lossy();
        if name.contains(".safetensors") || name == "config.json" || name == "generation_config.json" {
            let dir = dir.display();
            return Err(format!("{dir} already holds a checkpoint ({name}); name another folder or remove it"));
        }
    }
    Ok(())
}

fn write_all(dir: &Path, shards: &[Shard], side_files: &[SideFile], seed: u64, bytes: u64) -> Result<(), String> {
    let mut writer = Writer::new(dir, bytes, Weights::new(seed, None))?;
    for Shard { name, contents } in shards {
        let path = dir.join(name);
        writer.write(&path, contents).map_err(cannot("write", &path))?;
    }
    for (name, json) in side_files {
        let path = dir.join(name);
        fs::write(&path, format!("{json:#}\n")).map_err(cannot("write", &path))?;
    }
    Ok(())
}

/// Makes the folder, whose layers' matrices are of this format, or else plain. Returns how many bytes its shards have.
pub fn make(
    dir: &Path,
    shape: &Shape,
    layers: u64,
    seed: u64,
    shard_size: u64,
    format: Option<Format>,
) -> Result<u64, String> {
    let quantised = format.map(|format| Quantised::new(format, shape));
    let mut tensors = tensors(shape, layers, [DType::BF16; 2]);
    if let Some(quantised) = quantised {
        tensors = tensors.into_iter().flat_map(|tensor| quantised.stored(tensor)).collect();
    }
    let shards = deal(tensors, shard_size);
    let side_files = side_files(shape, layers, quantised, &shards);
    let bytes = shards.iter().map(|shard| shard.contents.bytes()).sum();

    let dir_is_new = !dir.exists();
    fs::create_dir_all(dir).map_err(cannot("create", dir))?;
    refuse_checkpoint(dir)?;
    write_all(dir, &shards, &side_files, seed, bytes).inspect_err(|_| {
        // The first error is the one to report; what cannot be removed stays.
        for name in shards.iter().map(|shard| shard.name.as_str()).chain(side_files.iter().map(|&(name, _)| name)) {
            let _ = fs::remove_file(dir.join(name));
        }
        if dir_is_new {
            let _ = fs::remove_dir(dir);
        }
    })?;
    Ok(bytes)
}
