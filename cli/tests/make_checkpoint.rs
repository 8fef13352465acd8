//! `make-checkpoint` makes what a reader of Hugging Face checkpoints expects, the same each time, and leaves
//! nothing behind where it fails.

mod common;
#[path = "common/making.rs"]
mod making;

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use half::bf16;
use making::{make, refused};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// All tensors of a folder, after a check of each shard's own form.
fn tensors(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    for name in names(dir).iter().filter(|name| name.ends_with(".safetensors")) {
        let file = fs::read(dir.join(name)).unwrap();
        let (length, metadata) = SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(length % 8, 0);
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert!(metadata.offset_keys().is_sorted(), "{name}");
        for (tensor, view) in SafeTensors::deserialize(&file).unwrap().tensors() {
            assert_eq!(view.dtype(), Dtype::BF16);
            assert!(all.insert(tensor, (view.shape().to_vec(), view.data().to_vec())).is_none());
        }
    }
    all
}

fn values(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect()
}

#[test]
fn names_shapes_and_index_are_those_of_qwen2() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("several shards");
    let line = make(&dir, "--shape tiny --shard-size 40KB");
    assert!(line.ends_with(&format!("--model {} --prompt-ids 1,2,3\n", dir.display())), "{line}");

    let mut expected = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![256, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
    ]);
    for layer in ["model.layers.0", "model.layers.1"] {
        let mut expect = |name: &str, shape: &[usize]| expected.insert(format!("{layer}.{name}"), shape.to_vec());
        for (projection, rows) in [("q", 64), ("k", 32), ("v", 32)] {
            expect(&format!("self_attn.{projection}_proj.weight"), &[rows, 64]);
            expect(&format!("self_attn.{projection}_proj.bias"), &[rows]);
        }
        expect("self_attn.o_proj.weight", &[64, 64]);
        expect("mlp.gate_proj.weight", &[96, 64]);
        expect("mlp.up_proj.weight", &[96, 64]);
        expect("mlp.down_proj.weight", &[64, 96]);
        expect("input_layernorm.weight", &[64]);
        expect("post_attention_layernorm.weight", &[64]);
    }
    let tensors = tensors(&dir);
    let shapes: BTreeMap<_, _> = tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
    assert_eq!(shapes, expected);

    let index = json(&dir.join("model.safetensors.index.json"));
    let total: usize = tensors.values().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let mut shards = BTreeMap::<&str, usize>::new();
    for (name, shard) in index["weight_map"].as_object().unwrap() {
        *shards.entry(shard.as_str().unwrap()).or_default() += tensors[name].1.len();
    }
    assert!(shards.len() > 2 && shards.values().all(|&bytes| bytes <= 40_000), "{shards:?}");
    for (number, shard) in (1..).zip(shards.keys()) {
        assert_eq!(*shard, format!("model-{number:05}-of-{:05}.safetensors", shards.len()));
    }
    assert_eq!(names(&dir).len(), shards.len() + 3);

    let config = json(&dir.join("config.json"));
    assert_eq!((&config["num_hidden_layers"], &config["hidden_size"]), (&2.into(), &64.into()));
    assert_eq!((&config["tie_word_embeddings"], &config["eos_token_id"]), (&true.into(), &151645.into()));
    assert_eq!(json(&dir.join("generation_config.json"))["eos_token_id"], serde_json::json!([151645, 151643]));
    layer_streamer::Checkpoint::open(&dir).unwrap();
}

#[test]
fn norms_are_one_and_everything_else_is_normal() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "--shape tiny --layers 20");
    assert_eq!(names(dir.path()), ["config.json", "generation_config.json", "model.safetensors"]);
    let (norms, weights): (Tensors, Tensors) =
        tensors(dir.path()).into_iter().partition(|(name, _)| name.ends_with("norm.weight"));
    assert!(norms.values().all(|(_, bytes)| values(bytes).iter().all(|&value| value == 1.0)));

    let all: Vec<f64> = weights.values().flat_map(|(_, bytes)| values(bytes)).collect();
    let mean_of = |power: i32| all.iter().map(|value| (value / 0.02).powi(power)).sum::<f64>() / all.len() as f64;
    // Moments of the standard normal distribution: 0, 1, 0, 3.
    for (power, moment, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.01), (3, 0.0, 0.03), (4, 3.0, 0.1)] {
        assert!((mean_of(power) - moment).abs() < tolerance, "moment {power} is {}", mean_of(power));
    }
    let neighbours = all.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / all.len() as f64 / 0.02f64.powi(2);
    assert!(neighbours.abs() < 0.01, "neighbours correlate: {neighbours}");
    let distinct: std::collections::BTreeSet<_> = weights.values().map(|(_, bytes)| bytes).collect();
    assert_eq!(distinct.len(), weights.len());
}

#[test]
fn weights_depend_on_the_seed_and_on_nothing_else() {
    let parent = tempfile::tempdir().unwrap();
    // Long enough for several writes a file, so that tensors cross from one to the next.
    let made = |name: &str, args: &str| {
        let dir = parent.path().join(name);
        make(&dir, &format!("--shape tiny --layers 600 {args}"));
        let tensors = tensors(&dir);
        fs::remove_dir_all(&dir).unwrap();
        tensors
    };
    let reference = made("reference", "--seed 7");
    assert!(reference.values().map(|(_, bytes)| bytes.len()).sum::<usize>() > 33 << 20);
    assert!(made("again", "--seed 7") == reference);
    assert!(made("sharded", "--seed 7 --shard-size 20MB") == reference);
    let other = made("other", "--seed 8");
    assert!(reference.iter().all(|(name, tensor)| name.ends_with("norm.weight") == (&other[name] == tensor)));
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    let unknown = refused(&dir, "--shape qwen2.5-8b");
    assert!(unknown.contains("qwen2.5-7b") && unknown.contains("qwen2.5-72b"), "{unknown}");
    assert!(refused(&dir, "--shape tiny --layers 0").contains("--layers"));
    for size in ["0", "4XB", "GB", "-1", "99999999999GB"] {
        let message = refused(&dir, &format!("--shape tiny --shard-size={size}"));
        assert!(message.contains("--shard-size"), "{message}");
    }
    let space = refused(&dir, "--shape qwen2.5-72b --layers 100000");
    assert!(["free", "175.54 TB", "make room"].iter().all(|part| space.contains(part)), "{space}");
    assert!(!dir.exists());

    make(&dir, "--shape tiny");
    let before = fs::read(dir.join("model.safetensors")).unwrap();
    let twice = refused(&dir, "--shape tiny --seed 1");
    assert!(twice.contains("already holds a checkpoint"), "{twice}");
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), before);

    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(refused(&file, "--shape tiny").contains(&format!("cannot create {}", file.display())));
}

#[test]
fn a_failed_write_names_the_file_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("model");
    // Blocks are of 512 bytes: the first shard fits into 72 of them, the second does not.
    let script = r#"trap '' XFSZ; ulimit -f 72; exec "$0" make-checkpoint "$1" --shape tiny --shard-size 41000"#;
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(common::program("make-checkpoint").get_program())
        .arg(&dir)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("model-00002-of-00005.safetensors: File too large"), "{message}");
    assert!(!dir.exists());
}
