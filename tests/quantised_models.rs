//! Models whose layers are quantised: what is understood of `quantization_config` and of the tensors, and what is refused by name.
//! What such models compute `cli/tests/make_quantised.rs` holds, and each format's arithmetic `tests/quantised.rs`.

#[path = "common/changed.rs"]
mod changed;
mod common;

use std::fs;

use changed::{Tensor, Tensors, assert_refused, assert_same, changed, config_of, logits_of, saved, tensors_of};
use layer_streamer::{
    Error, LayerStreamer, Settings,
    device::{Cpu, Device},
    model::Model,
};
use safetensors::Dtype;
use serde_json::{Value, json};
use support::fuzz::mutants;
use tempfile::TempDir;

/// A matrix [128, 160], of the first layer.
const MODULE: &str = "model.layers.0.mlp.down_proj";
const GROUP: usize = 32;

fn fp8() -> Value {
    json!({ "quant_method": "fp8", "weight_block_size": [128, 128] })
}

fn gptq() -> Value {
    json!({ "quant_method": "gptq", "bits": 4, "group_size": GROUP })
}

fn awq() -> Value {
    json!({ "quant_method": "awq", "bits": 4, "version": "gemm" })
}

fn nf4() -> Value {
    json!({ "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4" })
}

fn compressed(format: &str, bits: u64, kind: &str) -> Value {
    let weights = json!({ "num_bits": bits, "type": kind, "symmetric": true });
    json!({ "quant_method": "compressed-tensors", "format": format, "config_groups": { "group_0": { "weights": weights } } })
}

fn int4() -> Value {
    compressed("pack-quantized", 4, "int")
}

/// The same with another value at a path of keys.
fn with(mut said: Value, path: &str, value: Value) -> Value {
    let (parent, key) = path.rsplit_once('/').unwrap();
    said.pointer_mut(parent).unwrap()[key] = value;
    said
}

fn zeros(dtype: Dtype, shape: &[usize]) -> Tensor {
    (dtype, shape.to_vec(), vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8])
}

fn words(all: impl IntoIterator<Item = i32>) -> Tensor {
    let all: Vec<_> = all.into_iter().collect();
    (Dtype::I32, vec![all.len()], all.iter().flat_map(|word| word.to_le_bytes()).collect())
}

fn text(text: &str) -> Tensor {
    (Dtype::U8, vec![text.len()], text.into())
}

/// The tensors of a matrix of this shape, by what follows the module's name. Scales are 0, so all weights are.
fn parts(method: &Value, [rows, columns]: [usize; 2]) -> Vec<(&'static str, Tensor)> {
    let groups = columns / GROUP;
    match method["quant_method"].as_str().unwrap() {
        "fp8" => vec![
            ("weight", zeros(Dtype::F8_E4M3, &[rows, columns])),
            ("weight_scale_inv", zeros(Dtype::F32, &[rows.div_ceil(128), columns.div_ceil(128)])),
        ],
        "compressed-tensors" if method["format"] == "float-quantized" => {
            vec![("weight", zeros(Dtype::F8_E4M3, &[rows, columns])), ("weight_scale", zeros(Dtype::BF16, &[rows, 1]))]
        }
        "compressed-tensors" => vec![
            ("weight_packed", zeros(Dtype::I32, &[rows, columns / 8])),
            ("weight_scale", zeros(Dtype::BF16, &[rows, groups])),
            ("weight_shape", zeros(Dtype::I64, &[2])),
        ],
        "gptq" => vec![
            ("qweight", zeros(Dtype::I32, &[columns / 8, rows])),
            ("scales", zeros(Dtype::F16, &[groups, rows])),
            ("qzeros", zeros(Dtype::I32, &[groups, rows / 8])),
            ("g_idx", words((0..columns).map(|column| (column / GROUP) as i32))),
        ],
        "awq" => vec![
            ("qweight", zeros(Dtype::I32, &[columns, rows / 8])),
            ("scales", zeros(Dtype::F16, &[groups, rows])),
            ("qzeros", zeros(Dtype::I32, &[groups, rows / 8])),
        ],
        _ => vec![
            ("weight", zeros(Dtype::U8, &[rows * columns / 2, 1])),
            ("weight.absmax", zeros(Dtype::U8, &[rows * columns / 64])),
            ("weight.nested_absmax", zeros(Dtype::F32, &[(rows * columns / 64).div_ceil(256)])),
            ("weight.nested_quant_map", zeros(Dtype::F32, &[256])),
            (
                "weight.quant_state.bitsandbytes__nf4",
                text(r#"{"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0}"#),
            ),
        ],
    }
}

/// A small model, of which the first layer is quantised and the others are plain, with something changed.
fn quantised(method: &Value, change: impl FnOnce(&mut Tensors)) -> TempDir {
    changed("mistral", |config, tensors| {
        config["quantization_config"] = method.clone();
        let names: Vec<_> =
            tensors.keys().filter(|name| name.contains("layers.0.") && name.contains("_proj")).cloned().collect();
        for name in names {
            let (_, shape, _) = tensors.remove(&name).unwrap();
            let module = name.strip_suffix("weight").unwrap();
            let parts = parts(method, [shape[0], shape[1]]);
            tensors.extend(parts.into_iter().map(|(part, tensor)| (format!("{module}{part}"), tensor)));
        }
        change(tensors);
    })
}

/// The same with another tensor of the module, or without it.
fn with_part(method: &Value, part: &str, tensor: Option<Tensor>) -> TempDir {
    quantised(method, |tensors| {
        let name = format!("{MODULE}.{part}");
        match tensor {
            Some(tensor) => _ = tensors.insert(name, tensor),
            None => _ = tensors.remove(&name).unwrap(),
        }
    })
}

fn methods() -> [Value; 6] {
    [fp8(), compressed("float-quantized", 8, "float"), int4(), gptq(), awq(), nf4()]
}

/// The same with scales for groups of so many columns.
fn in_groups(method: &Value, group: usize) -> TempDir {
    quantised(method, |tensors| {
        // Of one group there is no order.
        tensors.retain(|name, _| !name.ends_with("g_idx"));
        for (name, tensor) in tensors {
            let along = if name.ends_with("weight_scale") { 1 } else { 0 };
            if [".scales", ".qzeros", ".weight_scale"].iter().any(|part| name.ends_with(part)) {
                let mut shape = tensor.1.clone();
                shape[along] = (shape[along] * GROUP).div_ceil(group);
                *tensor = zeros(tensor.0, &shape);
            }
        }
    })
}

#[test]
fn layers_that_are_quantised_stand_beside_layers_that_are_not() {
    // With weights of 0 the first layer changes nothing.
    let (config, mut tensors) = (config_of("mistral"), tensors_of("mistral"));
    let of_first = |name: &str| name.contains("layers.0.") && name.contains("_proj");
    tensors.iter_mut().filter(|(name, _)| of_first(name)).for_each(|(_, (_, _, bytes))| bytes.fill(0));
    let expected = logits_of(&Model::open(saved(&config, &tensors).path()).unwrap());
    for method in methods() {
        assert_eq!(logits_of(&Model::open(quantised(&method, |_| {}).path()).unwrap()), expected, "{method}");
        // What is plain throughout is a plain model.
        assert_same(changed("mistral", |config, _| config["quantization_config"] = method).path(), "mistral");
    }
}

#[test]
fn quantised_tensors_count_where_there_are_plain_ones_beside() {
    let plain = tensors_of("mistral").remove(&format!("{MODULE}.weight")).unwrap();
    for method in [int4(), gptq(), awq()] {
        let [alone, both] = [None, Some(plain.clone())].map(|plain| {
            let folder = quantised(&method, |tensors| {
                plain.map(|plain| tensors.insert(format!("{MODULE}.weight"), plain));
            });
            logits_of(&Model::open(folder.path()).unwrap())
        });
        assert_eq!(alone, both, "{method}");
    }
}

#[test]
fn what_is_not_read_of_a_quantization_config_is_refused_by_name() {
    let weights = "/config_groups/group_0/weights";
    let of = |key: &str| format!("{weights}/{key}");
    let two_groups = with(int4(), "/config_groups/group_1", json!({ "weights": { "num_bits": 8, "type": "int" } }));
    for (said, method) in [
        (with(gptq(), "/bits", 8.into()), "gptq of 8 bits"),
        (with(gptq(), "/bits", Value::Null), "gptq of unknown bits"),
        (with(gptq(), "/checkpoint_format", "marlin".into()), "gptq in the format marlin"),
        (with(awq(), "/version", "GEMV".into()), "awq of the version gemv"),
        (with(awq(), "/bits", 3.into()), "awq of 3 bits"),
        (with(nf4(), "/bnb_4bit_quant_type", "fp4".into()), "bitsandbytes in FP4"),
        (with(nf4(), "/bnb_4bit_quant_type", Value::Null), "bitsandbytes in FP4"),
        (json!({ "quant_method": "bitsandbytes", "load_in_8bit": true }), "bitsandbytes in 8 bits"),
        (with(fp8(), "/weight_block_size", json!([64, 64])), "fp8 with blocks of [64,64]"),
        (with(fp8(), "/fmt", "e5m2".into()), "fp8 of the form e5m2"),
        (json!({ "quant_method": "modelopt", "quant_algo": "NVFP4" }), "modelopt"),
        (json!({ "quant_method": "mxfp4" }), "mxfp4"),
        (compressed("nvfp4-pack-quantized", 4, "float"), "compressed-tensors in the format nvfp4-pack-quantized"),
        (compressed("int-quantized", 8, "int"), "compressed-tensors in the format int-quantized"),
        (compressed("pack-quantized", 8, "int"), "format pack-quantized, other than FP8 and int4"),
        (with(int4(), &of("type"), "float".into()), "format pack-quantized, other than FP8 and int4"),
        (two_groups, "format pack-quantized, other than FP8 and int4"),
        (with(int4(), "/config_groups", json!({})), "format pack-quantized, other than FP8 and int4"),
        (with(int4(), "/format", Value::Null), "compressed-tensors in no format"),
        (with(int4(), "/transform_config", json!({ "config_groups": {} })), "with a transform_config"),
        (with(int4(), "/sparsity_config", json!({ "format": "sparse-24-bitmask" })), "format sparse-24-bitmask"),
        (json!({}), "a method without a name"),
    ] {
        let folder = changed("mistral", |config, _| config["quantization_config"] = said);
        let place = "config.json: quantization_config: weights quantised by ";
        assert_refused(folder.path(), &[place, method, "take the unquantised model", "FP8, GPTQ or AWQ in 4 bits"]);
    }
    for (key, value) in [
        ("/transform_config", json!({})),
        ("/transform_config", Value::Null),
        ("/sparsity_config", json!({})),
        ("/sparsity_config", json!({ "format": "dense" })),
    ] {
        Model::open(quantised(&with(int4(), key, value), |_| {}).path()).unwrap();
    }
}

#[test]
fn a_missing_tensor_or_one_of_another_shape_or_type_is_named() {
    for method in methods() {
        let mut parts = parts(&method, [128, 160]).into_iter();
        // The codes, of which the scales are there.
        let (codes, _) = parts.next().unwrap();
        let said = format!("tensor {MODULE}.{codes}: is not in the checkpoint; {}", called_for(&method));
        assert_refused(with_part(&method, codes, None).path(), &[&said]);
        for (part, tensor) in parts {
            // These are not needed: groups one after the other are no order, and the configuration has the shape.
            if !["g_idx", "weight_shape"].contains(&part) {
                // Of scales of FP8 the usual name is asked for.
                let asked = part.trim_end_matches("_inv");
                let said = format!("tensor {MODULE}.{asked}: is not in the checkpoint; {}", called_for(&method));
                assert_refused(with_part(&method, part, None).path(), &[&said, "download the folder anew"]);
            }
            if part == "weight_shape" || part.contains("quant_state") {
                continue;
            }
            let name = format!("model.safetensors: tensor {MODULE}.{part}: ");
            let (dtype, mut shape, _) = tensor.clone();
            shape[0] += 1;
            let said = [&*name, &format!("{shape:?}"), "expected"];
            assert_refused(with_part(&method, part, Some(zeros(dtype, &shape))).path(), &said);
            let shape = &tensor.1;
            let other = if dtype == Dtype::I32 { Dtype::F32 } else { Dtype::I32 };
            assert_refused(
                with_part(&method, part, Some(zeros(other, shape))).path(),
                &[&name, &other.to_string(), "expected"],
            );
        }
    }
    // More groups than columns.
    let many = with_part(&gptq(), "scales", Some(zeros(Dtype::F16, &[161, 128])));
    assert_refused(many.path(), &["scales: is F16 [161, 128], expected groups of a multiple of 8 columns"]);
    let asymmetric = with(int4(), "/config_groups/group_0/weights/symmetric", false.into());
    let said = "self_attn.q_proj.weight_zero_point: is not in the checkpoint";
    assert_refused(quantised(&asymmetric, |_| {}).path(), &[said, &called_for(&int4())]);
}

/// Why a tensor was looked for.
fn called_for(method: &Value) -> String {
    let name = match method["quant_method"].as_str().unwrap() {
        "compressed-tensors" if method["format"] == "float-quantized" => "FP8",
        "fp8" => "FP8",
        "gptq" => "GPTQ",
        "awq" => "AWQ",
        other => other,
    };
    format!("quantization_config of config.json ({name}) calls for it")
}

#[test]
fn scales_for_other_groups_than_the_configuration_states_are_refused() {
    const WEIGHTS: &str = "/config_groups/group_0/weights";
    let of_weights = |key: &str, value: Value| with(int4(), &format!("{WEIGHTS}/{key}"), value);
    let channel = || of_weights("strategy", "channel".into());
    let mut two = of_weights("group_size", 64.into());
    two["config_groups"]["group_1"] = two["config_groups"]["group_0"].clone();
    let other = with(two.clone(), "/config_groups/group_1/weights/group_size", 32.into());
    let [absent, old] = [json!({ "quant_method": "awq", "w_bit": 4 }), with(awq(), "/q_group_size", 64.into())];
    let dynamic = |size: i64| json!({ "-:.*q_proj": {}, "+:.*down_proj": { "bits": 4, "group_size": size } });
    let of_parts = |size: i64| with(with(gptq(), "/group_size", 64.into()), "/dynamic", dynamic(size));
    // Stated in which way, and what the scales are refused for.
    for (method, scales, stated) in [
        (with(gptq(), "/group_size", 16.into()), "scales", "a group_size of 16"),
        (with(gptq(), "/group_size", 64.into()), "scales", "a group_size of 64"),
        // As many groups, of other columns.
        (with(gptq(), "/group_size", 33.into()), "scales", "a group_size of 33"),
        (of_weights("group_size", 33.into()), "weight_scale", "a group_size of 33"),
        (with(gptq(), "/group_size", (-1).into()), "scales", "a group_size of -1, a scale for each row"),
        (of_parts(64), "scales", "a group_size of 64"),
        (with(awq(), "/group_size", 128.into()), "scales", "a group_size of 128"),
        (old, "scales", "a group_size of 64"),
        (of_weights("group_size", 128.into()), "weight_scale", "a group_size of 128"),
        (of_weights("group_size", (-1).into()), "weight_scale", "a scale for each row"),
        (channel(), "weight_scale", "a scale for each row"),
        (two, "weight_scale", "a group_size of 64"),
    ] {
        let named = format!("model.safetensors: tensor model.layers.0.self_attn.q_proj.{scales}: has the scales [");
        let [name, found] = [called_for(&method), "one for each 32 columns of a row".into()];
        let name = name.replace("calls for it", &format!("states {stated}"));
        assert_refused(in_groups(&method, GROUP).path(), &[&named, &found, &name, "or correct config.json"]);
    }
    // What is not stated, or differs from part to part, or is more than a row has.
    let row = usize::MAX;
    for (method, group) in [
        (with(gptq(), "/group_size", Value::Null), GROUP),
        (with(gptq(), "/group_size", 0.into()), GROUP),
        (of_parts(32), GROUP),
        (absent.clone(), GROUP),
        (other, GROUP),
        (of_weights("group_size", Value::Null), GROUP),
        (of_weights("strategy", "group".into()), GROUP),
        (with(gptq(), "/group_size", (-1).into()), row),
        (with(gptq(), "/group_size", 1024.into()), row),
        (with(awq(), "/group_size", (-1).into()), row),
        (absent, row),
        (channel(), row),
        (of_weights("group_size", (-1).into()), row),
    ] {
        Model::open(in_groups(&method, group).path()).unwrap_or_else(|error| panic!("{method}: {error}"));
    }
}

#[test]
fn scales_of_other_blocks_than_stated_are_refused() {
    for (scales, found) in [(zeros(Dtype::F32, &[128, 1]), "one for each row"), (zeros(Dtype::F32, &[]), "one for all")]
    {
        let said = format!("tensor {MODULE}.weight_scale_inv: has the scales {:?} of a matrix [128, 160]", scales.1);
        let stated = "quantization_config of config.json (FP8) states blocks of 128 × 128";
        let folder = |method: &Value| with_part(method, "weight_scale_inv", Some(scales.clone()));
        assert_refused(folder(&fp8()).path(), &[&said, found, stated, "or correct config.json"]);
        Model::open(folder(&with(fp8(), "/weight_block_size", Value::Null)).path()).unwrap();
    }
    let rows = compressed("float-quantized", 8, "float");
    let blocks = with(rows, "/config_groups/group_0/weights/block_structure", json!([128, 128]));
    Model::open(quantised(&blocks, |_| {}).path()).unwrap();
    let blocks = with(blocks, "/config_groups/group_0/weights/strategy", "block".into());
    assert_refused(quantised(&blocks, |_| {}).path(), &["weight_scale: ", "one for each row", "blocks of 128 × 128"]);

    let state = r#"{"blocksize": 128, "nested_blocksize": 256, "nested_offset": 0.0}"#;
    let folder = with_part(&nf4(), "weight.quant_state.bitsandbytes__nf4", Some(text(state)));
    let found = format!("{MODULE}.weight.absmax: has 320 scales of a matrix [128, 160], one for each 64 weights");
    assert_refused(folder.path(), &[&found, "quant_state.bitsandbytes__nf4 states a blocksize of 128", "anew"]);
}

#[test]
fn orders_that_name_what_is_not_there_are_refused() {
    let groups = |change: fn(usize) -> i32| words((0..160).map(change));
    let refused = |method: &Value, part: &str, order, cause: &str| {
        let name = format!("model.safetensors: tensor {MODULE}.{part}: ");
        assert_refused(with_part(method, part, Some(order)).path(), &[&name, cause]);
    };
    for (method, part) in [(gptq(), "g_idx"), (int4(), "weight_g_idx")] {
        refused(
            &method,
            part,
            groups(|column| if column == 7 { 5 } else { 0 }),
            "names the group 5, but the scales are of 5",
        );
        refused(&method, part, groups(|_| i32::MIN), "names the group -2147483648");
        refused(&method, part, words((0..159).map(|column| column / GROUP as i32)), "is I32 [159], expected I32 [160]");
        refused(&method, part, zeros(Dtype::I64, &[160]), "is I64 [160], expected I32 [160]");
        let mixed = with_part(&method, part, Some(groups(|column| (column % 5) as i32)));
        Model::open(mixed.path()).unwrap();
    }
    let unset = groups(|column| column as i32 - 1);
    refused(&gptq(), "g_idx", groups(|column| if column == 159 { -1 } else { 0 }), "names the group -1");
    Model::open(with_part(&int4(), "weight_g_idx", Some(unset)).path()).unwrap();
}

#[test]
fn what_nf4_says_of_its_scales_must_be_understood() {
    const STATE: &str = "weight.quant_state.bitsandbytes__nf4";
    for (said, cause) in [
        ("no JSON", "is no valid JSON"),
        ("", "is no valid JSON"),
        ("{}", "says no blocksize"),
        (r#"{"blocksize": 0}"#, "says no blocksize"),
        (r#"{"blocksize": 64, "nested_offset": "0.5", "nested_blocksize": 256}"#, "nested_offset that is no number"),
        (
            r#"{"blocksize": 64, "nested_offset": 0.5, "nested_blocksize": 128}"#,
            "nested_blocksize of 128, expected 256",
        ),
        (r#"{"blocksize": 64, "nested_offset": 0.5}"#, "says no nested_blocksize"),
    ] {
        let name = format!("model.safetensors: tensor {MODULE}.{STATE}: ");
        assert_refused(with_part(&nf4(), STATE, Some(text(said))).path(), &[&name, cause]);
    }
    // Scales are then no codes.
    let plain = with_part(&nf4(), STATE, Some(text(r#"{"blocksize": 64}"#)));
    assert_refused(plain.path(), &[&format!("tensor {MODULE}.weight.absmax: is U8 [320], expected F32 [320]")]);
}

#[test]
fn embeddings_and_heads_are_not_quantised() {
    for name in ["model.embed_tokens", "lm_head"] {
        for (method, said) in
            [(gptq(), "GPTQ"), (fp8(), "FP8"), (nf4(), "bitsandbytes"), (int4(), "compressed-tensors")]
        {
            let folder = quantised(&method, |tensors| {
                let (_, shape, _) = tensors.remove(&format!("{name}.weight")).unwrap();
                let parts = parts(&method, [shape[0], shape[1]]);
                tensors.extend(parts.into_iter().map(|(part, tensor)| (format!("{name}.{part}"), tensor)));
            });
            assert_refused(folder.path(), &[&format!("tensor {name}.weight: weights quantised by {said}")]);
        }
    }
}

#[test]
fn what_bitsandbytes_says_of_a_matrix_must_be_so() {
    let state = r#"{"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0, "shape": [160, 128]}"#;
    let folder = with_part(&nf4(), "weight.quant_state.bitsandbytes__nf4", Some(text(state)));
    assert_refused(folder.path(), &[MODULE, "quant_state", "says the shape [160,128], but [128, 160]"]);
    let folder = with_part(&nf4(), "weight.quant_map", Some(zeros(Dtype::F32, &[16])));
    assert_refused(folder.path(), &[MODULE, "quant_map", "other numbers"]);
}

#[test]
fn gptq_is_of_the_version_and_has_the_order_that_its_configuration_says() {
    let said = |key: &str, value: Value| {
        let mut said = gptq();
        said[key] = value;
        said
    };
    let version_2 = said("format", json!("gptq_v2"));
    assert!(Model::open(quantised(&version_2, |_| ()).path()).is_ok());
    let other = said("format", json!("marlin"));
    assert_refused(quantised(&other, |_| ()).path(), &["quantization_config", "gptq in the format marlin"]);
    let ordered = said("desc_act", json!(true));
    assert_refused(with_part(&ordered, "g_idx", None).path(), &[MODULE, "g_idx", "not in the checkpoint"]);
}

/// Mutants of one file's beginning, up to where the weights begin; each is opened and computed with, or refused.
fn mutants_of(name: &str, method: &Value, file: &str, beginning: impl FnOnce(&[u8]) -> usize) {
    let folder = quantised(method, |_| ());
    let path = folder.path().join(file);
    let whole = fs::read(&path).unwrap();
    let (beginning, rest) = whole.split_at(beginning(&whole));
    mutants(name, beginning, |bytes| {
        fs::write(&path, [bytes, rest].concat()).unwrap();
        let Ok(model) = Model::open(folder.path()) else { return false };
        let settings = Settings::default();
        let mut streamer = LayerStreamer::new(&Cpu, &model.checkpoint, &model.units, &settings).unwrap();
        streamer.run_pass(&Cpu.stream().unwrap(), (), |(), _| Ok::<_, Error>(())).is_ok()
    });
}

#[test]
fn a_quantised_folder_that_is_nearly_right_is_read_or_refused() {
    let header = |whole: &[u8]| 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    for (name, method) in [("fp8", fp8()), ("int4", int4()), ("gptq", gptq()), ("nf4", nf4())] {
        mutants_of(&format!("header of {name}"), &method, "model.safetensors", header);
        mutants_of(&format!("configuration of {name}"), &method, "config.json", <[u8]>::len);
    }
}
