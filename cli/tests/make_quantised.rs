//! `make-checkpoint --type` makes folders in each quantised format. They compute what a folder of their weights in F32 computes,
//! where the weights are what the formats' formulas say, told here anew. They take as much memory as their few bits call for.

mod common;
#[path = "common/making.rs"]
mod making;

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use common::program;
use half::{bf16, f16};
use making::{make, refused};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

const TYPES: [&str; 7] = ["fp8", "fp8-row", "fp8-tensor", "int4", "gptq", "awq", "nf4"];

/// Type, shape and bytes of each stored tensor.
type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a folder. Each lies on a multiple of its elements' size, sorted as the format's own library sorts them.
fn stored(folder: &Path) -> Stored {
    let mut all = Stored::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let file = fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let order = metadata.offset_keys();
        let places = metadata.tensors();
        let place = |name: &String| (std::cmp::Reverse(places[name].dtype), name.clone());
        assert!(order.is_sorted_by_key(place), "{order:?}");
        for (name, view) in SafeTensors::deserialize(&file).unwrap().tensors() {
            let start = places[&name].data_offsets.0;
            assert!(start.is_multiple_of(view.dtype().bitsize() / 8), "{name} begins at byte {start}");
            let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            assert!(all.insert(name, tensor).is_none());
        }
    }
    all
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// The tensors of one module.
struct Module<'a> {
    stored: &'a Stored,
    name: &'a str,
}

impl Module<'_> {
    fn get(&self, tensor: &str) -> &(Dtype, Vec<usize>, Vec<u8>) {
        let name = format!("{}.{tensor}", self.name);
        self.stored.get(&name).unwrap_or_else(|| panic!("{name} is not stored"))
    }

    fn shape(&self, tensor: &str) -> [usize; 2] {
        self.get(tensor).1.as_slice().try_into().unwrap()
    }

    fn bytes(&self, tensor: &str) -> &[u8] {
        &self.get(tensor).2
    }

    fn words(&self, tensor: &str) -> Vec<u32> {
        assert_eq!(self.get(tensor).0, Dtype::I32, "{} {tensor}", self.name);
        self.bytes(tensor).as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    fn floats(&self, tensor: &str) -> Vec<f32> {
        let (dtype, _, bytes) = self.get(tensor);
        match dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
            other => panic!("{} {tensor} is {other:?}", self.name),
        }
    }
}

/// What a code of E4M3 stands for: a sign, four bits of an exponent and three of a fraction.
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    assert_ne!(code & 127, 127, "NaN");
    let size =
        if exponent == 0 { fraction / 8.0 * 2f32.powi(-6) } else { (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7) };
    if code > 127 { -size } else { size }
}

fn fp8(module: &Module, config: &Value) -> (Vec<usize>, Vec<f32>) {
    let [rows, columns] = module.shape("weight");
    let by_blocks = !config["weight_block_size"].is_null();
    let scale = if by_blocks { "weight_scale_inv" } else { "weight_scale" };
    let (shape, scales) = (module.get(scale).1.clone(), module.floats(scale));
    let codes = module.bytes("weight");
    let mut weights = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let at = match &*shape {
                [] => 0,
                [_, 1] if !by_blocks => row,
                [_, across] => row / 128 * across + column / 128,
                other => panic!("scales {other:?}"),
            };
            weights.push(e4m3(codes[row * columns + column]) * scales[at]);
        }
    }
    (vec![rows, columns], weights)
}

/// Eight numbers of four bits to a word, the first in the lowest bits.
fn nibble(word: u32, at: usize) -> f32 {
    (word >> (4 * at) & 15) as f32
}

fn int4(module: &Module, config: &Value) -> (Vec<usize>, Vec<f32>) {
    let group = config["config_groups"]["group_0"]["weights"]["group_size"].as_u64().unwrap() as usize;
    let [rows, words] = module.shape("weight_packed");
    let columns = 8 * words;
    let said = module.bytes("weight_shape").as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    assert!(said.eq([rows as u64, columns as u64]));
    let (codes, scales) = (module.words("weight_packed"), module.floats("weight_scale"));
    assert_eq!(module.shape("weight_scale"), [rows, columns / group]);
    let mut weights = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let code = nibble(codes[row * words + column / 8], column % 8);
            weights.push((code - 8.0) * scales[row * (columns / group) + column / group]);
        }
    }
    (vec![rows, columns], weights)
}

fn gptq(module: &Module, config: &Value) -> (Vec<usize>, Vec<f32>) {
    let group = config["group_size"].as_u64().unwrap() as usize;
    let [words, rows] = module.shape("qweight");
    let columns = 8 * words;
    let (codes, zeros, of) = (module.words("qweight"), module.words("qzeros"), module.words("g_idx"));
    assert!(zeros.iter().all(|zeros| *zeros == 0x7777_7777));
    assert!(of.iter().enumerate().all(|(column, of)| *of as usize == column / group) && of.len() == columns);
    let scales = module.floats("scales");
    assert_eq!(module.shape("qzeros"), [columns / group, rows / 8]);
    let mut weights = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let group = of[column] as usize;
            let code = nibble(codes[column / 8 * rows + row], column % 8);
            let zero = nibble(zeros[group * (rows / 8) + row / 8], row % 8) + 1.0;
            weights.push((code - zero) * scales[group * rows + row]);
        }
    }
    (vec![rows, columns], weights)
}

fn awq(module: &Module, config: &Value) -> (Vec<usize>, Vec<f32>) {
    // From the lowest bits.
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let group = config["group_size"].as_u64().unwrap() as usize;
    let [columns, words] = module.shape("qweight");
    let rows = 8 * words;
    let (codes, zeros, scales) = (module.words("qweight"), module.words("qzeros"), module.floats("scales"));
    assert_eq!(module.shape("scales"), [columns / group, rows]);
    let mut weights = Vec::new();
    for row in 0..rows {
        let place = ORDER.iter().position(|at| *at == row % 8).unwrap();
        for column in 0..columns {
            let group = column / group;
            let code = nibble(codes[column * words + row / 8], place);
            let zero = nibble(zeros[group * words + row / 8], place);
            weights.push((code - zero) * scales[group * rows + row]);
        }
    }
    (vec![rows, columns], weights)
}

fn nf4(module: &Module, _: &Value) -> (Vec<usize>, Vec<f32>) {
    let state: Value = serde_json::from_slice(module.bytes("weight.quant_state.bitsandbytes__nf4")).unwrap();
    assert_eq!((&state["blocksize"], &state["nested_blocksize"]), (&64.into(), &256.into()));
    let shape: Vec<_> = state["shape"].as_array().unwrap().iter().map(|side| side.as_u64().unwrap() as usize).collect();
    let offset = state["nested_offset"].as_f64().unwrap() as f32;
    let [map, nested_map, nested] =
        ["weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax"].map(|tensor| module.floats(tensor));
    let (codes, scales) = (module.bytes("weight"), module.bytes("weight.absmax"));
    assert_eq!(module.shape("weight"), [codes.len(), 1]);
    let mut weights = Vec::new();
    for at in 0..2 * codes.len() {
        let code = if at % 2 == 0 { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
        let scale = nested_map[usize::from(scales[at / 64])] * nested[at / 64 / 256] + offset;
        assert!(scale > 0.0);
        weights.push(map[usize::from(code)] * scale);
    }
    (shape, weights)
}

/// How a matrix of a module is made, as `quantization_config` says it.
type Formula = fn(&Module, &Value) -> (Vec<usize>, Vec<f32>);

fn formula(name: &str) -> (Formula, &'static str) {
    match name {
        "int4" => (int4, "weight_packed"),
        "gptq" => (gptq, "qweight"),
        "awq" => (awq, "qweight"),
        "nf4" => (nf4, "weight"),
        _ => (fp8, "weight"),
    }
}

/// Shape and values of each matrix of the layers of a folder in this format.
fn matrices(name: &str, folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let (formula, codes) = formula(name);
    let (stored, said) = (stored(folder), config(folder)["quantization_config"].take());
    let modules = stored.keys().filter_map(|name| name.strip_suffix(codes)?.strip_suffix('.'));
    let quantised = modules.filter(|module| module.ends_with("_proj"));
    quantised.map(|name| (format!("{name}.weight"), formula(&Module { stored: &stored, name }, &said))).collect()
}

/// A folder of the same model with all weights in F32, or as they are if they are in BF16.
fn plain(name: &str, quantised: &Path, folder: &Path) {
    let matrices = matrices(name, quantised);
    let is_part = |tensor: &str| tensor.contains("_proj.") && !tensor.ends_with(".bias");
    let mut tensors: Stored = stored(quantised).into_iter().filter(|(tensor, _)| !is_part(tensor)).collect();
    for (tensor, (shape, weights)) in matrices {
        let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        assert!(tensors.insert(tensor, (Dtype::F32, shape, bytes)).is_none());
    }
    fs::create_dir(folder).unwrap();
    let mut config = config(quantised);
    config.as_object_mut().unwrap().remove("quantization_config").unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(quantised.join("generation_config.json"), folder.join("generation_config.json")).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Tokens and logits of a model.
fn generated(model: &Path, prompt: &str) -> (String, Vec<u8>) {
    let logits = model.with_extension("logits");
    let arguments =
        ["--device", "cpu", "--print-ids", "--max-new-tokens", "8", "--prompt-ids", prompt, "--dump-logits"];
    let done = program("generate").arg("--model").arg(model).args(arguments).arg(&logits).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    (String::from_utf8(done.stdout).unwrap(), fs::read(logits).unwrap())
}

#[test]
fn every_format_computes_what_its_weights_in_f32_compute() {
    let parent = tempfile::tempdir().unwrap();
    // The rows of 96 weights of the tiny shape are no whole blocks of FP8 and NF4, and its groups are of 32.
    for shape in ["small", "tiny"] {
        for name in TYPES {
            let [quantised, folder] = ["", "-f32"].map(|more| parent.path().join(format!("{shape}-{name}{more}")));
            let line = make(&quantised, &format!("--shape {shape} --type {name}"));
            assert!(line.ends_with(&format!("--model {} --prompt-ids 1,2,3\n", quantised.display())), "{line}");
            plain(name, &quantised, &folder);
            for prompt in ["3,4,5,6,7", "200", "9,8,7,6,5,4,3,2,1,0,9,8,7,6,5,4,3,2,1,0"] {
                let (found, expected) = (generated(&quantised, prompt), generated(&folder, prompt));
                assert_eq!(found.0, expected.0, "{shape} {name}");
                assert!(found.1 == expected.1, "{shape} {name}: other logits");
                assert!(found.1.as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite()), "{name}");
            }
        }
    }
}

#[test]
fn weights_have_the_folder_s_deviation_and_everything_else_is_the_folder_s() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("plain");
    make(&folder, "--shape small --seed 3");
    let expected = stored(&folder);
    for name in TYPES {
        let folder = parent.path().join(name);
        make(&folder, &format!("--shape small --seed 3 --type {name}"));
        let (found, matrices) = (stored(&folder), matrices(name, &folder));
        for (tensor, expected) in &expected {
            match matrices.get(tensor) {
                Some((shape, _)) => assert_eq!(shape, &expected.1, "{name}: {tensor}"),
                None => assert!(&found[tensor] == expected, "{name}: {tensor}"),
            }
        }
        assert_eq!(matrices.len(), 2 * 7);
        let all: Vec<_> = matrices.values().flat_map(|(_, all)| all.iter().map(|weight| f64::from(*weight))).collect();
        let mean_of = |power: i32| all.iter().map(|weight| (weight / 0.02).powi(power)).sum::<f64>() / all.len() as f64;
        let (mean, deviation) = (mean_of(1), mean_of(2).sqrt());
        // What NF4's codes stand for has a mean of 0.04 of its deviation. One scale for a matrix is far from the usual at times.
        let mean_is = if name == "nf4" { 0.04 } else { 0.0 };
        let tolerance = if ["fp8", "fp8-tensor"].contains(&name) { 0.3 } else { 0.02 };
        assert!((mean - mean_is).abs() < 0.01, "{name}: mean {mean}");
        assert!((deviation - 1.0).abs() < tolerance, "{name}: deviation {deviation}");
        let neighbours = all.windows(257).map(|w| w[0] * w[256]).sum::<f64>() / all.len() as f64 / 0.02f64.powi(2);
        assert!(neighbours.abs() < 0.02, "{name}: weights correlate: {neighbours}");
        let distinct: std::collections::BTreeSet<_> = matrices
            .values()
            .map(|(_, all)| all[..64].iter().map(|weight| weight.to_bits()).collect::<Vec<_>>())
            .collect();
        assert_eq!(distinct.len(), matrices.len(), "{name}");
    }
}

#[test]
fn configurations_are_those_of_published_models_and_tables_those_of_the_library() {
    let parent = tempfile::tempdir().unwrap();
    let said = |name: &str, shape: &str| {
        let folder = parent.path().join(format!("{shape}-{name}"));
        if !folder.exists() {
            make(&folder, &format!("--shape {shape} --type {name}"));
        }
        config(&folder)["quantization_config"].take()
    };
    let small = |name| said(name, "small");
    let blocks = json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128] });
    assert_eq!(small("fp8"), blocks);
    assert_eq!((small("fp8-tensor")["quant_method"].take(), small("gptq")["bits"].take()), ("fp8".into(), 4.into()));
    for (name, format, bits, kind, group) in
        [("fp8-row", "float-quantized", 8, "float", Value::Null), ("int4", "pack-quantized", 4, "int", 128.into())]
    {
        let (said, weights) = (small(name), small(name)["config_groups"]["group_0"]["weights"].take());
        assert_eq!((&said["quant_method"], &said["format"]), (&"compressed-tensors".into(), &format.into()));
        assert_eq!((&weights["num_bits"], &weights["type"]), (&bits.into(), &kind.into()));
        assert_eq!((&weights["group_size"], &weights["symmetric"]), (&group, &true.into()));
    }
    for name in ["gptq", "awq"] {
        assert_eq!([small(name), said(name, "tiny")].map(|said| said["group_size"].as_u64().unwrap()), [128, 32]);
    }
    assert_eq!(
        (small("awq")["version"].take(), small("nf4")["bnb_4bit_quant_type"].take()),
        ("gemm".into(), "nf4".into())
    );

    let made = stored(&parent.path().join("small-nf4"));
    let library = stored(&support::data("quantised"));
    for table in ["quant_map", "nested_quant_map"] {
        let made = &made[&format!("model.layers.0.mlp.up_proj.weight.{table}")].2;
        let of_library = &library[&format!("nf4_double.weight.{table}")].2;
        let number = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        for (made, expected) in made.as_chunks().0.iter().zip(of_library.as_chunks().0) {
            let (made, expected) = (number(made), number(expected));
            assert!((made - expected).abs() <= 2e-7 * expected.abs(), "{table}: {made}, not {expected}");
        }
        assert_eq!(made.len(), of_library.len());
    }
}

#[test]
fn weights_depend_on_the_seed_and_on_nothing_else() {
    let parent = tempfile::tempdir().unwrap();
    // Long enough for several writes, so that all kinds of tensors cross from one to the next.
    for (name, layers) in [("fp8", 30), ("gptq", 40), ("nf4", 40), ("int4", 40)] {
        let made = |folder: &str, args: &str| {
            let folder = parent.path().join(folder);
            make(&folder, &format!("--shape small --type {name} {args}"));
            let (tensors, files) = (stored(&folder), fs::read_dir(&folder).unwrap().count());
            fs::remove_dir_all(&folder).unwrap();
            (tensors, files)
        };
        let (reference, _) = made("reference", &format!("--seed 7 --layers {layers}"));
        let (sharded, files) = made("sharded", &format!("--seed 7 --layers {layers} --shard-size 5000001"));
        assert!(files > 4 && sharded == reference, "{name}");
        let (longer, _) = made("longer", &format!("--seed 7 --layers {}", layers + 20));
        assert!(reference.iter().all(|(tensor, bytes)| &longer[tensor] == bytes), "{name}");
        let (other, _) = made("other", &format!("--seed 8 --layers {layers}"));
        let same = reference.iter().filter(|(tensor, bytes)| &&other[*tensor] == bytes);
        let constant = ["norm.weight", "qzeros", "g_idx", "_map", "__nf4", "weight_shape"];
        let is_constant = |tensor: &str| constant.iter().any(|end| tensor.ends_with(end));
        assert!(same.map(|(tensor, _)| tensor).eq(reference.keys().filter(|tensor| is_constant(tensor))), "{name}");
    }
}

#[test]
fn kept_layers_take_the_memory_of_their_few_bits() {
    let parent = tempfile::tempdir().unwrap();
    let kept = |command: &str, name: &str, args: &str| {
        let folder = parent.path().join(format!("{command}-{name}"));
        make(&folder, &format!("--shape small {args}"));
        let mut said = program(command);
        said.args(["--device", "cpu", "--no-probe", "--json", "--context", "64", "--model"]).arg(folder);
        if command == "generate" {
            said.args(["--prompt-ids", "1,2"]);
        }
        let done = said.output().unwrap();
        let said: Value = serde_json::from_slice(&done.stdout).unwrap();
        let memory = if command == "plan" { &said["memory"] } else { &said["placement"]["memory"] };
        let rows = memory.as_array().unwrap().iter().filter(|row| row["purpose"] == "kept");
        let (mut bytes, mut units) = (0, 0);
        rows.for_each(|row| {
            bytes += row["bytes"].as_u64().unwrap();
            units += row["units"].as_u64().unwrap();
        });
        assert_eq!(units, 2, "{name}: {said}");
        bytes as f64
    };
    for command in ["plan", "generate"] {
        let plain = kept(command, "plain", "");
        for (name, most) in [("int4", 0.3), ("gptq", 0.3), ("awq", 0.3), ("nf4", 0.3), ("fp8", 0.54), ("fp8-row", 0.54)]
        {
            let share = kept(command, name, &format!("--type {name}")) / plain;
            assert!(share < most, "{command}: {name} takes {share} of BF16");
        }
    }
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let [file, folder] = ["model.gguf", "model"].map(|name| parent.path().join(name));
    for (path, args, parts) in [
        (&file, "--shape small --type fp8", &["model.gguf: this --type makes a folder", "/model, or", "q4_k"][..]),
        (&file, "--shape small --type nf4 --shard-size 1GB", &["makes a folder"]),
        (&folder, "--shape small --type Q8_0", &["--type Q8_0 makes a GGUF file", "model.gguf", "fp8, fp8-row", "nf4"]),
        (&folder, "--shape small --type fp4", &["--type", "fp8-tensor", "gptq", "Q4_K"]),
        (&folder, "--shape qwen2.5-72b --layers 100000 --type int4", &["free", "make room"]),
    ] {
        let message = refused(path, args);
        assert!(parts.iter().all(|part| message.contains(part)), "{args}: {message} lacks {parts:?}");
    }
    assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
    // The name of a type may be written in any way.
    make(&folder, "--shape tiny --type FP8-Row");
    let twice = refused(&folder, "--shape tiny --type awq");
    assert!(twice.contains("already holds a checkpoint"), "{twice}");
}

#[test]
fn a_failed_write_names_the_file_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("model");
    let script = r#"trap '' XFSZ; ulimit -f 72; exec "$0" make-checkpoint "$1" --shape small --type awq"#;
    let program = program("make-checkpoint");
    let output = Command::new("sh").args(["-c", script]).arg(program.get_program()).arg(&folder).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot write") && message.contains("model.safetensors: File too large"), "{message}");
    assert!(!folder.exists());
}
