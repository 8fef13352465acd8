//! `make-checkpoint --type` makes GGUF files in each type, which compute what a folder of their weights in F32 computes.

mod common;
#[path = "common/making.rs"]
mod making;

use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::Path, process::Command};

use common::program;
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device},
    gguf::Gguf,
    plan::{Arrival, ArrivalOp},
};
use making::{make, refused};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

/// Types, and their codes in GGUF files.
const TYPES: [(&str, u32); 16] = [
    ("F32", 0),
    ("F16", 1),
    ("BF16", 30),
    ("Q4_0", 2),
    ("Q4_1", 3),
    ("Q5_0", 6),
    ("Q5_1", 7),
    ("Q8_0", 8),
    ("Q2_K", 10),
    ("Q3_K", 11),
    ("Q4_K", 12),
    ("Q5_K", 13),
    ("Q6_K", 14),
    ("IQ4_NL", 20),
    ("IQ4_XS", 23),
    ("MXFP4", 39),
];

/// Shape and weights of each tensor.
type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// All tensors as the library expands them.
fn weights(model: &Path) -> Weights {
    let checkpoint = Checkpoint::open(model).unwrap();
    let mut unit = Unit::new("all");
    let mut names: Vec<_> = checkpoint.names().map(str::to_owned).collect();
    names.sort();
    for name in &names {
        let op = if checkpoint.describe(name).unwrap().0 == DType::F32 {
            ArrivalOp::Keep
        } else {
            ArrivalOp::To(DType::F32)
        };
        unit.add(Arrival { output: name.clone(), inputs: vec![name.clone()], op });
    }
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &[unit], &Settings::default()).unwrap();
    let pass = streamer.run_pass(&Cpu.stream().unwrap(), Weights::new(), |mut all, layer| {
        for name in &names {
            let tensor = layer.tensor(name)?;
            all.insert(name.clone(), (tensor.shape().to_vec(), tensor.as_slice()?.to_vec()));
        }
        Ok::<_, Error>(all)
    });
    pass.unwrap()
}

/// Of each tensor the bytes that are stored.
fn stored(file: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = Checkpoint::open(file).unwrap();
    let bytes = |name: &str| {
        let (dtype, shape) = checkpoint.describe(name).unwrap();
        let mut bytes = vec![0; dtype.bytes_of(shape).unwrap()];
        let (path, offset) = checkpoint.location(name).unwrap();
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    checkpoint.names().map(|name| (name.to_owned(), bytes(name))).collect()
}

/// A Hugging Face folder of these weights in F32, with the configuration that is made for the shape and the file's end of texts.
fn folder_of(weights: &Weights, file: &Path, folder: &Path) {
    make(folder, "--shape small");
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["eos_token_id"] = Gguf::open(file).unwrap().count("tokenizer.ggml.eos_token_id").unwrap().into();
    fs::write(path, config.to_string()).unwrap();
    fs::remove_file(folder.join("generation_config.json")).unwrap();
    let bytes = |all: &[f32]| all.iter().flat_map(|weight| weight.to_le_bytes()).collect::<Vec<_>>();
    let bytes: Vec<_> = weights.iter().map(|(name, (shape, all))| (name, shape.clone(), bytes(all))).collect();
    let views =
        bytes.iter().map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Tokens and logits of a model.
fn generated(model: &Path) -> (String, Vec<u8>) {
    let logits = model.with_extension("logits");
    let arguments = "--device cpu --prompt-ids 3,4,5,6,7 --print-ids --max-new-tokens 8 --dump-logits";
    let done = program("generate").arg("--model").arg(model).args(arguments.split(' ')).arg(&logits).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    (String::from_utf8(done.stdout).unwrap(), fs::read(logits).unwrap())
}

#[test]
fn every_type_computes_what_its_weights_in_f32_compute() {
    let parent = tempfile::tempdir().unwrap();
    for (name, code) in TYPES {
        let (file, folder) = (parent.path().join(format!("{name}.gguf")), parent.path().join(name));
        let line = make(&file, &format!("--shape small --type {name}"));
        assert!(line.ends_with(&format!("--model {} --prompt-ids 1,2,3\n", file.display())), "{line}");
        let checkpoint = Checkpoint::open(&file).unwrap();
        for tensor in checkpoint.names() {
            let (dtype, shape) = checkpoint.describe(tensor).unwrap();
            assert_eq!(dtype.name(), if shape.len() > 1 { name } else { "F32" }, "{tensor}");
        }
        assert_eq!(layer_streamer::gguf::type_code(checkpoint.describe("lm_head.weight").unwrap().0), Some(code));
        let weights = weights(&file);
        folder_of(&weights, &file, &folder);
        let (found, expected) = (generated(&file), generated(&folder));
        assert_eq!(found.0, expected.0, "{name}");
        // These are multiplied in whole numbers, where the machine has the instructions.
        let in_whole_numbers = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"].contains(&name);
        assert!(found.1 == expected.1 || in_whole_numbers, "{name}: other logits");
        let [found, expected] = [found.1, expected.1].map(|bytes| {
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let logits = file.tensor("logits").unwrap();
            assert_eq!(logits.shape(), [5, 512]);
            logits.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect::<Vec<_>>()
        });
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-5, "{name}: {found}, and in F32 {expected}");
        }
    }
}

#[test]
fn weights_of_every_type_have_no_mean_and_the_folder_s_deviation() {
    let parent = tempfile::tempdir().unwrap();
    for (name, _) in TYPES {
        let file = parent.path().join(format!("{name}.gguf"));
        make(&file, &format!("--shape small --type {name}"));
        let weights = weights(&file);
        let is_norm = |name: &str| name.ends_with("norm.weight");
        let norms = weights.iter().filter(|(name, _)| is_norm(name));
        assert!(norms.flat_map(|(_, (_, all))| all).all(|&weight| weight == 1.0), "{name}");
        let all: Vec<_> = weights.iter().filter(|(name, (shape, _))| !is_norm(name) && shape.len() > 1).collect();
        let all: Vec<_> = all.iter().flat_map(|(_, (_, all))| all.iter().map(|&weight| f64::from(weight))).collect();
        let mean_of = |power: i32| all.iter().map(|weight| (weight / 0.02).powi(power)).sum::<f64>() / all.len() as f64;
        let (mean, deviation) = (mean_of(1), mean_of(2).sqrt());
        assert!(mean.abs() < 0.005 && (deviation - 1.0).abs() < 0.01, "{name}: mean {mean}, deviation {deviation}");
        // Blocks repeat nothing of those before them.
        let neighbours = all.windows(257).map(|w| w[0] * w[256]).sum::<f64>() / all.len() as f64 / 0.02f64.powi(2);
        assert!(neighbours.abs() < 0.01, "{name}: blocks correlate: {neighbours}");
    }
}

#[test]
fn types_without_blocks_have_the_folder_s_weights() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("folder");
    make(&folder, "--shape tiny --seed 5");
    let expected = weights(&folder);
    for (name, tolerance) in [("f32", 0.0), ("bf16", 0.0), ("f16", 3e-8)] {
        let file = parent.path().join(format!("{name}.gguf"));
        make(&file, &format!("--shape tiny --seed 5 --type {name}"));
        let found = weights(&file);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (tensor, (shape, all)) in &found {
            assert_eq!(shape, &expected[tensor].0, "{name}: {tensor}");
            let off = all.iter().zip(&expected[tensor].1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= tolerance, "{name}: {tensor} is {off} off");
        }
    }
}

#[test]
fn weights_depend_on_the_seed_and_on_nothing_else() {
    let parent = tempfile::tempdir().unwrap();
    // Blocks that do not divide what is written at once, in files that take more than one write.
    for (dtype, layers) in [("mxfp4", 60), ("q6_k", 38), ("q4_k", 55)] {
        let made = |name: &str, args: &str| {
            let file = parent.path().join(format!("{name}.gguf"));
            make(&file, &format!("--shape small --type {dtype} {args}"));
            assert!(fs::metadata(&file).unwrap().len() > 16 << 20);
            let tensors = stored(&file);
            fs::remove_file(&file).unwrap();
            tensors
        };
        let reference = made("reference", &format!("--seed 7 --layers {layers}"));
        assert!(made("again", &format!("--seed 7 --layers {layers}")) == reference);
        // With more layers all tensors lie elsewhere, and other blocks are cut.
        let longer = made("longer", &format!("--seed 7 --layers {}", layers + 1));
        assert_eq!(longer.len(), reference.len() + 12);
        assert!(reference.iter().all(|(name, bytes)| &longer[name] == bytes), "{dtype}");
        let other = made("other", &format!("--seed 8 --layers {layers}"));
        assert!(reference.iter().all(|(name, bytes)| name.ends_with("norm.weight") == (&other[name] == bytes)));
    }
}

#[test]
fn the_tokenizer_of_a_file_has_a_token_for_each_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("small.gguf");
    make(&file, "--shape small --type q8_0");
    let said = |arguments: &[&str]| {
        let mut generate = program("generate");
        generate
            .args(["--device", "cpu", "--print-ids", "--max-new-tokens", "4", "--model"])
            .arg(&file)
            .args(arguments);
        let done = generate.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    assert_eq!(said(&["--raw", "Hi, é"]), said(&["--prompt-ids", "72,105,44,32,195,169"]));
    let metadata = Gguf::open(&file).unwrap();
    let tokens = metadata.texts("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(
        (tokens.len(), &*tokens[b'a' as usize], &*tokens[b' ' as usize], &*tokens[300]),
        (512, "a", "Ġ", "[300]")
    );
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let [file, folder] = ["model.gguf", "model"].map(|name| parent.path().join(name));
    let none = parent.path().join("none/model.gguf");
    for (path, args, parts) in [
        (&file, "--shape small --type q4_7", &["--type", "q4_7", "Q4_K", "MXFP4"][..]),
        (
            &file,
            "--shape tiny --type q4_k",
            &["tiny has rows of 64 and 96", "Q4_K has blocks of 256", "Q8_0, IQ4_NL, MXFP4 would do"],
        ),
        (&file, "--shape qwen2.5-0.5b --type IQ4_XS", &["rows of 896 and 4864", "F32, F16, BF16, Q4_0"]),
        (&file, "--shape qwen2.5-72b --type q2_k", &["rows of 8192 and 29568"]),
        (&folder, "--shape small --type q4_k", &["--type Q4_K makes a GGUF file", "model.gguf"]),
        (&file, "--shape small", &["model.gguf: ", "--type q4_k", "name a folder"]),
        (&file, "--shape small --type q4_k --shard-size 1GB", &["--type", "--shard-size"]),
        (&file, "--shape qwen2.5-72b --layers 100000 --type q8_0", &["free", "93.26 TB", "make room"]),
        (&none, "--shape small --type q4_k", &["cannot create", "none/model.gguf: No such file"]),
    ] {
        let message = refused(path, args);
        assert!(parts.iter().all(|part| message.contains(part)), "{args}: {message} lacks {parts:?}");
    }
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);

    fs::write(&file, "older").unwrap();
    let twice = refused(&file, "--shape small --type q4_k");
    assert!(twice.contains("model.gguf already exists"), "{twice}");
    assert_eq!(fs::read(&file).unwrap(), b"older");
}

#[test]
fn a_failed_write_names_the_file_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("model.gguf");
    let script = r#"trap '' XFSZ; ulimit -f 72; exec "$0" make-checkpoint "$1" --shape small --type q8_0"#;
    let program = common::program("make-checkpoint");
    let output = Command::new("sh").args(["-c", script]).arg(program.get_program()).arg(&file).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot write") && message.contains("model.gguf: File too large"), "{message}");
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
}
