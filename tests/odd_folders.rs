//! Folders as they lie about: names with other beginnings, tensors that nobody needs, indexes that are not quite right, files
//! that are something else, links. What is needed is found, or there is one error that says what is wrong and what to do.

#[path = "common/changed.rs"]
mod changed;
mod common;

use std::{collections::BTreeMap, fs, os::unix::fs::symlink};

use changed::{
    Tensor, Tensors, assert_refused, assert_same, assert_says, byte, changed, config_of, logits_of, tensors_of, write,
};
use common::{distance, everywhere};
use layer_streamer::{Checkpoint, model::Model};
use safetensors::Dtype;
use serde_json::{Value, json};
use support::{data, folder};
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
fn renamed(tensors: &mut Tensors, rename: impl Fn(&str) -> String) {
    *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
}

#[test]
fn the_decoder_s_names_may_begin_with_anything_and_the_rest_of_the_checkpoint_is_left_alone() {
    for (prefix, head, others) in [
        ("", "", &["vision_tower.layers.0.norm.weight", "vision_tower.embed_tokens.weight"][..]),
        ("language_model.model.", "language_model.", &["vision_tower.encoder.layers.0.mlp.fc1.bias", "norm.weight"]),
        ("model.language_model.", "", &["model.visual.layers.0.x", "model.visual.embed_tokens.weight"]),
        ("transformer.", "", &["audio_tower.layers.0.x", "audio_tower.embed_tokens.weight"]),
        ("model.text_model.", "model.", &["model.vision_model.layers.0.x", "model.vision_model.embed_tokens.weight"]),
        // The usual names are meant where there are others besides.
        ("model.", "", &["draft.layers.0.x", "draft.embed_tokens.weight"]),
    ] {
        let folder = changed("mistral", |_, tensors| {
            renamed(tensors, |name| match name.strip_prefix("model.") {
                Some(rest) => format!("{prefix}{rest}"),
                None => format!("{head}{name}"),
            });
            others.iter().for_each(|name| _ = tensors.insert((*name).into(), byte(Dtype::U8)));
        });
        let expected = logits_of(&Model::open(data("mistral")).unwrap());
        for model in everywhere(folder.path()) {
            assert!(distance(&logits_of(&model), &expected) < 1e-6, "{prefix:?}, {:?}", model.tables);
        }
        let units = Checkpoint::open(folder.path()).unwrap().layers().unwrap();
        let names: Vec<_> = units.iter().map(|unit| unit.name().to_owned()).collect();
        assert_eq!(names, [0, 1, 2].map(|layer| format!("{prefix}layers.{layer}")));
    }
    let two = changed("mistral", |_, tensors| {
        let both: Vec<_> = tensors.iter().map(|(name, tensor)| (format!("draft.{name}"), tensor.clone())).collect();
        renamed(tensors, |name| format!("main.{name}"));
        tensors.extend(both);
    });
    assert_refused(two.path(), &["several decoders", "draft.model.layers.0", "main.model.layers.0"]);
    assert_says(Checkpoint::open(two.path()).unwrap().layers().err(), &["several decoders"]);
    let none = changed("mistral", |_, tensors| renamed(tensors, |name| name.replace("embed_tokens", "wte")));
    assert_refused(none.path(), &["tensor model.embed_tokens.weight: config.json calls for it"]);
}

#[test]
fn the_output_head_is_what_is_stored_whatever_the_configuration_says() {
    let head = tensors_of("mistral").remove("lm_head.weight").unwrap();
    let of_its_own = |tied: bool| {
        changed("qwen2-tied", |config, tensors| {
            config["tie_word_embeddings"] = tied.into();
            tensors.insert("lm_head.weight".into(), head.clone());
        })
    };
    let [said_tied, said_untied] = [of_its_own(true), of_its_own(false)].map(|folder| {
        let model = Model::open(folder.path()).unwrap();
        assert!(!model.config.tied);
        let all: Vec<_> = everywhere(folder.path()).iter().map(logits_of).collect();
        assert!(all.iter().all(|logits| distance(logits, &all[0]) < 1e-6));
        all.into_iter().next().unwrap()
    });
    assert_eq!(said_tied, said_untied);
    assert!(distance(&said_tied, &logits_of(&Model::open(data("qwen2-tied")).unwrap())) > 0.1);
    // The one that there is is both, by whichever of the names.
    let head_alone = changed("qwen2-tied", |_, tensors| {
        renamed(tensors, |name| name.replace("model.embed_tokens", "lm_head"));
    });
    assert_same(head_alone.path(), "qwen2-tied");
    // That of another part of the model is none.
    let stray = changed("qwen2-tied", |_, tensors| {
        tensors.insert("model.lm_head.weight".into(), head.clone());
    });
    assert_same(stray.path(), "qwen2-tied");
    let neither = changed("qwen2-tied", |config, _| config["tie_word_embeddings"] = false.into());
    assert_refused(neither.path(), &["tensor lm_head.weight", "config.json calls for it", "tie_word_embeddings"]);
    let unreadable = changed("qwen2-tied", |_, tensors| {
        tensors.insert("lm_head.weight".into(), (Dtype::F8_E8M0, vec![1], vec![0]));
    });
    assert_refused(unreadable.path(), &["tensor lm_head.weight: has the unknown type F8_E8M0"]);
}

#[test]
fn tensors_that_nothing_is_computed_with_are_left_alone_but_for_biases_and_norms_of_the_layers() {
    let with = |names: &[&str], dtype: Dtype| {
        changed("mistral", |_, tensors| {
            names.iter().for_each(|name| _ = tensors.insert((*name).into(), byte(dtype)));
        })
    };
    for dtype in [Dtype::U8, Dtype::F8_E8M0] {
        let harmless = [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.self_attn.masked_bias",
            "model.layers.1.self_attn.bias",
            "model.layers.2.self_attn.k_proj.k_scale",
            "model.layers.2.self_attn.k_proj.input_scale",
            "model.layers.2.self_attn.other_proj.weight",
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers.3.input_layernorm.weight",
            "model.layers.00.input_layernorm.bias2",
            "mtp.fc.weight",
            "score.weight",
        ];
        assert_same(with(&harmless, dtype).path(), "mistral");
        for name in [
            "model.layers.1.self_attn.q_proj.bias",
            "model.layers.2.mlp.down_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.post_feedforward_layernorm.weight",
            "model.layers.0.input_layernorm.bias",
        ] {
            assert_refused(with(&[name], dtype).path(), &[name, "config.json knows no such tensor", "take the config"]);
        }
    }
}

#[test]
fn quantised_weights_are_refused_by_their_method_with_what_to_take_instead() {
    let said = |quantisation: Value| changed("mistral", |config, _| config["quantization_config"] = quantisation);
    let remedy = "take the unquantised model";
    for (quantisation, method) in [
        (json!({ "quant_method": "gptq", "bits": 3 }), "quantised by gptq of 3 bits"),
        (json!({ "load_in_4bit": true }), "quantised by bitsandbytes"),
        (json!({ "bits": 4 }), "quantised by a method without a name"),
    ] {
        assert_refused(said(quantisation).path(), &["config.json: quantization_config", method, remedy]);
    }
    assert_same(said(Value::Null).path(), "mistral");
    let off = json!({ "quant_method": "bitsandbytes", "load_in_4bit": false, "load_in_8bit": false });
    assert_same(said(off).path(), "mistral");
    // Weights that are plain are what they are, whatever could have been done to them.
    assert_same(said(json!({ "quant_method": "gptq", "bits": 4 })).path(), "mistral");

    const NAME: &str = "model.layers.0.self_attn.q_proj.";
    for (gone, dtype, beside, method) in [
        (true, Dtype::I32, "qweight", "GPTQ or AWQ"),
        (false, Dtype::U8, "weight.absmax", "bitsandbytes"),
        (false, Dtype::F8_E4M3, "weight_scale_inv", "FP8"),
        (false, Dtype::F8_E4M3, "weight_scale", "FP8"),
        (false, Dtype::I8, "SCB", "bitsandbytes"),
        (false, Dtype::U32, "scales", "MLX"),
        (true, Dtype::I32, "weight_packed", "compressed-tensors"),
        (false, Dtype::I8, "weight_scales", "INT8 with scales"),
        (true, Dtype::I8, "weight._data", "quanto"),
        (true, Dtype::U8, "W_q", "HQQ"),
        (true, Dtype::I16, "codebooks", "AQLM"),
    ] {
        let packed = changed("mistral", |_, tensors| {
            let weight = tensors.remove(&format!("{NAME}weight")).unwrap();
            if !gone {
                let bytes = 4 * weight.2.len();
                tensors.insert(format!("{NAME}weight"), (dtype, vec![bytes * 8 / dtype.bitsize()], vec![0; bytes]));
            }
            tensors.insert(format!("{NAME}{beside}"), byte(Dtype::U8));
            if method == "AQLM" {
                tensors.insert(format!("{NAME}scales"), byte(Dtype::U8));
            }
        });
        assert_refused(packed.path(), &[&format!("{NAME}weight"), "weights quantised by", method, remedy]);
    }
    let bare = changed("mistral", |_, tensors| {
        let (dtype, ..) = tensors.get_mut(&format!("{NAME}weight")).unwrap();
        *dtype = Dtype::I16;
    });
    assert_refused(bare.path(), &[NAME, "is of type I16; take a model in F32, F16 or BF16"]);
}

/// A reference in two shards of these names, and its index. `change` is given the place of each tensor by name, and what each
/// shard has.
fn sharded(shards: [&str; 2], change: impl FnOnce(&mut BTreeMap<String, String>, &mut [Tensors; 2])) -> TempDir {
    let (folder, all) = (folder(), tensors_of("mistral"));
    let mut parts = [Tensors::new(), Tensors::new()];
    let mut places = BTreeMap::new();
    for (number, (name, tensor)) in all.into_iter().enumerate() {
        places.insert(name.clone(), shards[number % 2].to_owned());
        parts[number % 2].insert(name, tensor);
    }
    change(&mut places, &mut parts);
    for (shard, part) in shards.into_iter().zip(&parts) {
        let path = folder.path().join(shard);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write(&path, part);
    }
    fs::write(folder.path().join("config.json"), config_of("mistral").to_string()).unwrap();
    fs::write(folder.path().join(INDEX), json!({ "weight_map": places }).to_string()).unwrap();
    folder
}

const SHARDS: [&str; 2] = ["1.safetensors", "2.safetensors"];
const NORM: &str = "model.norm.weight";

/// Which of two shards has a tensor.
fn holder(parts: &[Tensors; 2], name: &str) -> usize {
    usize::from(parts[1].contains_key(name))
}

/// The same tensor with other values.
fn older((dtype, shape, bytes): &Tensor) -> Tensor {
    (*dtype, shape.clone(), vec![0; bytes.len()])
}

#[test]
fn index_and_shards_may_differ_in_what_is_not_needed() {
    assert_same(sharded(["weights/1.safetensors", "weights/more/2.safetensors"], |_, _| {}).path(), "mistral");
    // An old copy in the other shard, before or after the one that counts.
    for name in [NORM, "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"] {
        let doubled = sharded(SHARDS, |_, parts| {
            let at = holder(parts, name);
            let copy = older(&parts[at][name]);
            parts[1 - at].insert(name.into(), copy);
        });
        assert_same(doubled.path(), "mistral");
    }
    let unlisted = sharded(SHARDS, |places, parts| {
        parts[0].insert("extra.weight".into(), byte(Dtype::U8));
        parts[1].insert("model.extra.scale".into(), byte(Dtype::F8_E8M0));
        // Even one that is needed, as long as there is one alone.
        places.remove(NORM);
    });
    assert_same(unlisted.path(), "mistral");
    let absent = sharded(SHARDS, |places, _| {
        for (name, shard) in
            [("a", SHARDS[0]), ("model.layers.0.self_attn.q_proj.bias", SHARDS[1]), ("b", "no.safetensors")]
        {
            places.insert(name.into(), shard.into());
        }
    });
    assert_same(absent.path(), "mistral");
    let moved = sharded(SHARDS, |places, parts| {
        places.insert(NORM.into(), SHARDS[1 - holder(parts, NORM)].into());
    });
    assert_same(moved.path(), "mistral");
    let spoiled = sharded(SHARDS, |places, _| _ = places.insert("vision.weight".into(), "3.safetensors".into()));
    fs::write(spoiled.path().join("3.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_same(spoiled.path(), "mistral");
}

#[test]
fn an_old_copy_never_stands_in_for_a_tensor_that_cannot_be_read() {
    let broken = sharded(SHARDS, |places, parts| {
        let at = holder(parts, NORM);
        let copy = older(&parts[at][NORM]);
        parts[1 - at].insert(NORM.into(), copy);
        let kept: Vec<_> = parts[at].keys().filter(|name| *name != NORM).cloned().collect();
        kept.iter().for_each(|name| {
            let tensor = parts[at].remove(name).unwrap();
            parts[1 - at].insert(name.clone(), tensor);
            places.insert(name.clone(), SHARDS[1 - at].into());
        });
        places.insert(NORM.into(), "3.safetensors".into());
    });
    assert_refused(broken.path(), &["3.safetensors", "No such file"]);
    fs::write(broken.path().join("3.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_refused(broken.path(), &["3.safetensors: is a git-lfs pointer", "git lfs pull"]);
    let twice = sharded(SHARDS, |places, parts| {
        let at = holder(parts, NORM);
        let copy = older(&parts[at][NORM]);
        parts[1 - at].insert(NORM.into(), copy);
        places.remove(NORM);
    });
    assert_refused(
        twice.path(),
        &[SHARDS[0], "tensor model.norm.weight: is in", SHARDS[1], "does not say which counts"],
    );
    let bias = sharded(SHARDS, |places, _| {
        places.insert("model.layers.0.self_attn.q_proj.bias".into(), "no.safetensors".into());
    });
    assert_refused(bias.path(), &["self_attn.q_proj.bias", "config.json knows no such tensor"]);
    let missing = sharded(SHARDS, |_, parts| parts.iter_mut().for_each(|part| _ = part.remove(NORM)));
    assert_refused(missing.path(), &["tensor model.norm.weight: is not in this file, where the index places it"]);
    assert_says(Checkpoint::open(bias.path()).unwrap().layers().err(), &["no.safetensors", "No such file"]);
}

#[test]
fn the_files_that_count_are_those_that_transformers_takes() {
    let both = sharded(SHARDS, |_, parts| {
        parts.iter_mut().flat_map(Tensors::values_mut).for_each(|tensor| *tensor = older(tensor));
    });
    write(&both.path().join(SINGLE), &tensors_of("mistral"));
    assert_same(both.path(), "mistral");
    // One that cannot be read is no reason to take the others.
    fs::write(both.path().join(SINGLE), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_refused(both.path(), &["model.safetensors: is a git-lfs pointer"]);

    let named = changed("mistral", |config, tensors| {
        config["transformers_weights"] = "new.safetensors".into();
        tensors.values_mut().for_each(|tensor| *tensor = older(tensor));
    });
    write(&named.path().join("new.safetensors"), &tensors_of("mistral"));
    assert_same(named.path(), "mistral");
    for name in ["../new.safetensors", "new.bin", "/new.safetensors"] {
        let outside = changed("mistral", |config, _| config["transformers_weights"] = name.into());
        assert_refused(
            outside.path(),
            &["config.json: its transformers_weights", name, "no safetensors file in the folder"],
        );
    }
}

#[test]
fn links_lead_inside_the_folder_or_to_the_hub_s_cache_and_nowhere_else() {
    // The hub's cache: snapshots/COMMIT/FILE leads to ../../blobs/HASH.
    let cache = folder();
    let (snapshot, blobs) = (cache.path().join("snapshots/c0ffee"), cache.path().join("blobs"));
    fs::create_dir_all(snapshot.join("sub")).unwrap();
    fs::create_dir(&blobs).unwrap();
    let plain = sharded(["sub/1.safetensors", "2.safetensors"], |_, _| {});
    for (number, (file, up)) in
        [("config.json", "../.."), (INDEX, "../.."), ("sub/1.safetensors", "../../.."), ("2.safetensors", "../..")]
            .into_iter()
            .enumerate()
    {
        fs::copy(plain.path().join(file), blobs.join(number.to_string())).unwrap();
        symlink(format!("{up}/blobs/{number}"), snapshot.join(file)).unwrap();
    }
    assert_same(&snapshot, "mistral");
    let link = cache.path().join("link to the folder");
    symlink(&snapshot, &link).unwrap();
    assert_same(&link, "mistral");
    fs::remove_file(blobs.join("2")).unwrap();
    assert_refused(&snapshot, &["1.safetensors: is a link to ../../../blobs/2", "No such file", "download"]);

    let inside = sharded(SHARDS, |_, _| {});
    fs::rename(inside.path().join(SHARDS[1]), inside.path().join("data")).unwrap();
    symlink("data", inside.path().join(SHARDS[1])).unwrap();
    assert_same(inside.path(), "mistral");

    let elsewhere = folder();
    fs::rename(inside.path().join("data"), elsewhere.path().join("data")).unwrap();
    fs::remove_file(inside.path().join(SHARDS[1])).unwrap();
    symlink(elsewhere.path().join("data"), inside.path().join(SHARDS[1])).unwrap();
    assert_refused(inside.path(), &["2.safetensors: leads out of the folder, to", "/data", "put the file"]);
    // A folder on the way is a link too.
    let through = sharded(["sub/1.safetensors", "2.safetensors"], |_, _| {});
    fs::rename(through.path().join("sub"), elsewhere.path().join("sub")).unwrap();
    symlink(elsewhere.path().join("sub"), through.path().join("sub")).unwrap();
    assert_refused(through.path(), &["sub/1.safetensors: leads out of the folder"]);
    let index = sharded(SHARDS, |_, _| {});
    fs::rename(index.path().join(INDEX), elsewhere.path().join(INDEX)).unwrap();
    symlink(elsewhere.path().join(INDEX), index.path().join(INDEX)).unwrap();
    assert_refused(index.path(), &[INDEX, "leads out of the folder"]);
}

#[test]
fn a_file_that_is_something_else_is_refused_by_what_it_is_with_what_to_do() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n";
    let page = "\u{feff}\n<!DOCTYPE html><html><body>Access to this model is restricted.</body></html>";
    let answer = r#"{"error":"Repository not found"}"#;
    for (contents, weights_alone, parts) in [
        (pointer, false, &["is a git-lfs pointer", "git lfs pull"][..]),
        (page, false, &["is a web page", "download the file again"]),
        ("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", false, &["is a web page", "download"]),
        (answer, false, &["is a server's error message", "Repository not found", "download"]),
        ("Entry not found", false, &["is a server's error message", "Entry not found", "download"]),
        ("GGUF\u{3}\0\0\0 and so on", false, &["is a GGUF file", "safetensors version"]),
        ("PK\u{3}\u{4}\0\0\u{8}\u{8} and so on", false, &["is a zip archive", "safetensors version"]),
        ("Too many requests, come back later", true, &["is text in place of weights", "Too many requests", "download"]),
        ("{\"weight_map\": {}}", true, &["is text in place of weights", "download"]),
    ] {
        let files: &[&str] = if weights_alone { &SHARDS } else { &["config.json", INDEX, SHARDS[0], SHARDS[1]] };
        for file in files {
            let folder = sharded(SHARDS, |_, _| {});
            fs::write(folder.path().join(file), contents).unwrap();
            let said: Vec<_> = [&[*file], parts].concat();
            assert_refused(folder.path(), &said);
        }
    }
    for (file, said) in [("config.json", "is empty"), (INDEX, "is empty"), (SHARDS[0], "is 0 bytes long, too short")] {
        let folder = sharded(SHARDS, |_, _| {});
        fs::write(folder.path().join(file), "").unwrap();
        assert_refused(folder.path(), &[file, said]);
    }
}

#[test]
fn a_folder_without_safetensors_says_what_it_has_instead_and_what_to_do() {
    for (files, parts) in [
        (&["pytorch_model.bin"][..], &["pytorch_model.bin", "PyTorch's", "take the safetensors version"][..]),
        (&["consolidated.00.pth", "params.json"], &["consolidated.00.pth", "take the safetensors version"]),
        (&["m.Q4_K_M.gguf"], &["m.Q4_K_M.gguf", "a GGUF file", "take the model's safetensors version"]),
        (&["consolidated.safetensors"], &["consolidated.safetensors", "download the model's other safetensors"]),
        (&["model-00001-of-00002.safetensors"], &["-of-00002", "download model.safetensors.index.json too"]),
        (&["adapter_model.safetensors"], &["adapter_model", "merge it into the model"]),
        (&["model.fp16.safetensors"], &["model.fp16.safetensors", "give it the name model.safetensors"]),
        (&["model.safetensors.incomplete"], &["the download was not finished"]),
        (&["tokenizer.json"], &["name the folder that a model was saved to"]),
    ] {
        for config in [true, false] {
            let folder = folder();
            files.iter().for_each(|name| fs::write(folder.path().join(name), "").unwrap());
            if config {
                fs::write(folder.path().join("config.json"), config_of("mistral").to_string()).unwrap();
            }
            assert_refused(folder.path(), &[&["holds neither", INDEX, SINGLE], parts].concat());
        }
    }
    let nothing = folder();
    write(&nothing.path().join(SINGLE), &tensors_of("mistral"));
    assert_refused(nothing.path(), &["config.json", "No such file"]);
}
