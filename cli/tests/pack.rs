//! `pack` and `unpack`: what was packed comes back bit for bit, whatever ends them on the way, and what is damaged is told.

mod common;
#[path = "pack/folders.rs"]
mod folders;
#[path = "pack/refusals.rs"]
mod refusals;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use common::program;
use folders::*;
use layer_streamer::packed::{Description, KEY};
use serde_json::{Value, json};
use support::{folder, speller};

/// Tensors of every kind that a file may have.
fn all_kinds() -> (Vec<Tensor>, Vec<Tensor>) {
    let sizes = [("BOOL", 1), ("U8", 1), ("I8", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U16", 2), ("I16", 2), ("F16", 2)];
    let more = [("U32", 4), ("I32", 4), ("F32", 4), ("U64", 8), ("I64", 8), ("F64", 8), ("F4_UNHEARD_OF", 1)];
    let mut first: Vec<_> =
        sizes.iter().chain(&more).map(|(dtype, size)| random(dtype, dtype, &[11, 3], 33 * size)).collect();
    let all = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    // NaN with payloads, infinities, negative zeros among ordinary weights.
    let mut odd = weights("odd", &[100, 333], 4);
    for (at, bits) in [(7, 0x7fc1u16), (900, 0xff81), (4095, 0x7f80), (4096, 0xff80), (33_299, 0x8000)] {
        odd.3[2 * at..2 * at + 2].copy_from_slice(&bits.to_le_bytes());
    }
    first.extend([
        weights("normal", &[300, 1024], 5),
        tensor("every_number", "BF16", &[256, 256], all),
        odd,
        random("random", "BF16", &[50_001], 100_002),
    ]);
    let second = vec![
        tensor("empty", "BF16", &[0], Vec::new()),
        weights("z.0.last_first", &[5000, 63], 6),
        tensor("empty_rows", "F32", &[3, 0], Vec::new()),
        weights("scalar", &[], 7),
        weights("one", &[1], 8),
        weights("just_enough", &[4, 4096], 9),
        weights("too_few", &[16_383], 9),
        weights("just_over_a_block", &[20_481], 9),
        random("scalar_f32", "F32", &[], 4),
        tensor("ones", "BF16", &[64, 64], [0x80, 0x3f].repeat(4096)),
    ];
    (first, second)
}

#[test]
fn every_tensor_returns_bit_for_bit_with_its_type_its_shape_and_what_the_file_says_besides() {
    let (model, to) = (folder(), folder());
    let (from, packed, unpacked) = (model.path(), to.path().join("new/packed"), to.path().join("unpacked"));
    let (first, second) = all_kinds();
    let metadata = json!({ "format": "pt", "a \"quoted\" key": "ä\n" });
    write(&from.join(FIRST), metadata.clone(), &first);
    write(&from.join(SECOND), Value::Null, &second);
    index(from, &[(FIRST, &first), (SECOND, &second)]);
    does("pack", &[from, &packed]);

    let (of_first, stored) = read(&packed.join(FIRST));
    assert_eq!(
        (&of_first["format"], &of_first["a \"quoted\" key"]),
        (&metadata["format"], &metadata["a \"quoted\" key"])
    );
    for ((name, dtype, shape, bytes), original) in stored.iter().zip(&first) {
        assert_eq!(*name, original.0, "the order");
        let Some(description) = of_first.get(&format!("{KEY}:{name}")) else {
            assert_eq!((dtype, shape, bytes), (&original.1, &original.2, &original.3), "{name}");
            continue;
        };
        let description = Description::from_json(description.as_str().unwrap()).unwrap();
        assert_eq!((dtype.as_str(), shape.as_slice(), &description.shape), ("U8", &[bytes.len()][..], &original.2));
        let mut weights = vec![0; description.weights()];
        description.parts().decode(bytes, &mut weights).unwrap();
        assert!(weights.into_iter().flat_map(u16::to_le_bytes).eq(original.3.iter().copied()), "{name}");
    }
    let is_packed = |name: &str| of_first.contains_key(&format!("{KEY}:{name}"));
    assert_eq!(["normal", "odd", "random", "every_number", "U16"].map(is_packed), [true, true, false, false, false]);
    let (of_second, _) = read(&packed.join(SECOND));
    let is_packed = |name: &str| of_second.contains_key(&format!("{KEY}:{name}"));
    assert_eq!(["just_enough", "just_over_a_block", "too_few", "one"].map(is_packed), [true, true, false, false]);
    assert_eq!(of_first[KEY], "1");
    let total: usize =
        [FIRST, SECOND].iter().flat_map(|name| read(&packed.join(name)).1).map(|tensor| tensor.3.len()).sum();
    let index = |folder: &Path| -> Value {
        serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).unwrap()).unwrap()
    };
    let written = index(&packed);
    assert_eq!(written["metadata"], json!({ "total_size": total, "note": "kept" }));
    assert_eq!(written["weight_map"], index(from)["weight_map"]);

    let checkpoint = layer_streamer::Checkpoint::open(&packed).unwrap();
    assert_eq!(checkpoint.describe("normal"), Some((layer_streamer::DType::BF16, &[300, 1024][..])));
    does("unpack", &[&packed, &unpacked]);
    let said = run("unpack", &[Path::new("--check"), &packed]);
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("all 29 tensors are as they were packed"), "{said:?}");
    for (name, metadata, tensors) in [(FIRST, metadata, &first), (SECOND, json!({}), &second)] {
        let (said, returned) = read(&unpacked.join(name));
        assert_eq!(Value::from(said), metadata);
        assert!(returned == *tensors, "{name}");
    }
    let total: usize = first.iter().chain(&second).map(|tensor| tensor.3.len()).sum();
    assert_eq!(index(&unpacked)["metadata"]["total_size"], total);
}

#[test]
fn what_belongs_to_the_model_is_copied_and_nothing_else() {
    let (model, to) = (model(), folder());
    let (from, packed) = (model.path(), to.path().join("packed"));
    let put = |name: &str| {
        fs::create_dir_all(from.join(name).parent().unwrap()).unwrap();
        fs::write(from.join(name), name).unwrap();
    };
    let copied = ["LICENSE", "README.md", "chat_templates/tool.jinja", "merges.txt", "tokenizer.model"];
    let left = [
        ".git/config",
        ".hidden",
        "a.gguf",
        "adapter.safetensors",
        "model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "optimizer.pt",
    ];
    copied.iter().chain(&left).for_each(|name| put(name));
    symlink(from.join("merges.txt"), from.join("linked.txt")).unwrap();
    symlink("/nowhere", from.join("broken.txt")).unwrap();
    assert!(Command::new("mkfifo").arg(from.join("pipe.txt")).status().unwrap().success());
    does("pack", &[from, &packed]);
    let names: Vec<_> = files(&packed).into_keys().map(|path| path.strip_prefix(&packed).unwrap().to_owned()).collect();
    let mut expected: Vec<_> = copied.iter().map(PathBuf::from).collect();
    expected.extend(["config.json", "linked.txt", "model.safetensors.index.json", FIRST, SECOND].map(PathBuf::from));
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(fs::read(packed.join("linked.txt")).unwrap(), b"merges.txt");
    assert!(!packed.join("linked.txt").is_symlink());
}

#[test]
fn the_file_that_the_configuration_names_is_the_one_that_is_packed() {
    let (model, to) = (folder(), folder());
    let packed = to.path().join("packed");
    write(&model.path().join("model.safetensors"), Value::Null, &[weights("old", &[90, 1000], 1)]);
    write(&model.path().join("best.safetensors"), Value::Null, &[weights("new", &[90, 1000], 2)]);
    fs::write(model.path().join("config.json"), r#"{"transformers_weights": "best.safetensors"}"#).unwrap();
    does("pack", &[model.path(), &packed]);
    assert!(packed.join("best.safetensors").exists() && !packed.join("model.safetensors").exists());
}

#[test]
fn whatever_kills_it_the_same_command_goes_on_and_writes_the_same_bytes() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let from = model.path();
    let [whole, packed, unpacked, again] = ["whole", "packed", "unpacked", "again"].map(|name| to.path().join(name));
    does("pack", &[from, &whole]);
    does("unpack", &[&whole, &unpacked]);
    let mut rng = fastrand::Rng::with_seed(11);
    for (command, source, to, reference) in [("pack", from, &packed, &whole), ("unpack", &whole, &again, &unpacked)] {
        let mut kills = 0;
        for attempt in 0.. {
            let mut child = program(command).arg("--quiet").arg(source).arg(to).stdout(Stdio::null()).spawn().unwrap();
            thread::sleep(Duration::from_millis(rng.u64(0..40 + 25 * attempt)));
            // It may have ended by itself.
            let _ = child.kill();
            let succeeded = child.wait().unwrap().success();
            if succeeded || !to.join("layer-streamer.journal").exists() && to.join("config.json").exists() {
                break;
            }
            kills += 1;
            assert!(attempt < 100, "{command} gets nowhere");
        }
        assert!(kills > 0, "{command} was never killed");
        assert_same(to, reference);
    }
}

#[test]
fn what_was_written_before_it_was_killed_is_not_written_again_but_read_back() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let (from, whole, packed) = (model.path(), to.path().join("whole"), to.path().join("packed"));
    does("pack", &[from, &whole]);
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    let partial = packed.join(format!("{FIRST}.partial"));
    let tensor = start_of(&whole.join(FIRST), "a") + 300_000;
    assert_eq!(fs::read(&partial).unwrap()[tensor], fs::read(whole.join(FIRST)).unwrap()[tensor]);
    flip(&partial, tensor);
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("one.safetensors.partial: tensor a is damaged"), "{said}");
    assert!(!packed.join(FIRST).exists());
    // What was wrong is gone.
    does("pack", &[from, &packed]);
    assert_same(&packed, &whole);
}

#[test]
fn a_finished_file_stays_and_is_read_back_when_the_next_one_was_not() {
    // It has no packed tensor, so that the file itself does not say its checksums.
    let (model, to) = (model_of(&[random("f", "F32", &[9], 36)], &large()), folder());
    let (from, whole, packed) = (model.path(), to.path().join("whole"), to.path().join("packed"));
    does("pack", &[from, &whole]);
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    let modified = |name: &str| fs::metadata(packed.join(name)).unwrap().modified().unwrap();
    let before = modified(FIRST);
    assert!(!packed.join(SECOND).exists());
    does("pack", &[from, &packed]);
    assert_eq!(modified(FIRST), before);
    assert_same(&packed, &whole);

    fs::remove_dir_all(&packed).unwrap();
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    flip(&packed.join(FIRST), start_of(&packed.join(FIRST), "f"));
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("one.safetensors: tensor f is damaged"), "{said}");
    does("pack", &[from, &packed]);
    assert_same(&packed, &whole);
}

#[test]
fn a_source_that_changed_meanwhile_is_noticed_and_its_file_begun_anew() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let (from, whole, packed) = (model.path(), to.path().join("whole"), to.path().join("packed"));
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    // Nothing but the first tensor, which was written.
    let mut other = large();
    other[0] = weights("a", &[1400, 1024], 21);
    write(&from.join(FIRST), json!({ "format": "pt" }), &other);
    let said = does("pack", &[from, &packed]);
    assert!(said.contains("shards/one.safetensors has changed since") && said.contains("is written anew"), "{said}");
    does("pack", &[from, &whole]);
    assert_same(&packed, &whole);
}

#[test]
fn a_line_of_the_journal_that_was_cut_off_is_as_if_it_were_not_there() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let (from, whole, packed) = (model.path(), to.path().join("whole"), to.path().join("packed"));
    does("pack", &[from, &whole]);
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    let journal = packed.join("layer-streamer.journal");
    let lines = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, lines + r#"{"Tensor":["shards/o"#).unwrap();
    // It writes further lines: the file is begun anew.
    let source = fs::File::options().write(true).open(from.join(FIRST)).unwrap();
    source.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    does("pack", &[from, &packed]);
    assert_same(&packed, &whole);
}

#[test]
fn ctrl_c_ends_it_cleanly_and_says_how_to_go_on() {
    let (model, to) = (long(), folder());
    let (whole, packed) = (to.path().join("whole"), to.path().join("packed"));
    does("pack", &[model.path(), &whole]);
    let child = under_way(model.path(), &packed);
    signal(&child, libc::SIGINT);
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.starts_with("interrupted; the same command goes on") && said.lines().count() == 1, "{said}");
    assert!(!packed.join("model.safetensors").exists());
    does("pack", &[model.path(), &packed]);
    assert_same(&packed, &whole);
}

#[test]
fn a_source_that_changes_while_it_is_read_is_not_packed() {
    let (model, to) = (long(), folder());
    let packed = to.path().join("packed");
    let child = under_way(model.path(), &packed);
    signal(&child, libc::SIGSTOP);
    let source = fs::File::options().write(true).open(model.path().join("model.safetensors")).unwrap();
    source.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    signal(&child, libc::SIGCONT);
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains("model.safetensors changed while it was read"), "{said}");
    assert!(!packed.join("model.safetensors").exists() && !packed.join("config.json").exists());
    does("pack", &[model.path(), &packed]);
}

#[test]
fn a_packed_model_answers_as_before_wherever_its_layers_are_kept_and_its_plan_says_what_is_unpacked() {
    let to = folder();
    let packed = to.path().join("a packed spéller");
    does("pack", &[&speller(), &packed]);
    let answer = |more: &[&str]| {
        let generate = ["--device", "cpu", "--quiet", "--no-probe", "4096=", "--model"];
        let done = program("generate").args(generate).arg(&packed).args(more).output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap())
    };
    for more in ["0-7=gpu-packed", "0-3=pinned-packed,4-7=gpu", "0-3=pinned,4=ram"] {
        assert_eq!(answer(&["--tier", more]), (Some(0), " four thousand ninety-six\n".into()), "{more}");
    }
    let plan = program("plan").args(["--device", "cpu", "--no-probe", "--n-gpu", "1", "--model"]).arg(&packed).output();
    let table = String::from_utf8(plan.unwrap().stdout).unwrap();
    assert!(table.contains("  stored: 3.15 MB of weights in 2.20 MB, 1.43 times less\n"), "{table}");
    assert!(table.contains(" and copies and unpacks 2.20 MB in "), "{table}");
}

#[test]
fn the_table_has_a_line_for_each_kind_of_tensor_and_json_has_the_same() {
    let to = folder();
    let output = program("pack").arg("--quiet").arg(speller()).arg(to.path().join("text")).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.stderr.is_empty() && table.lines().count() == 15, "{table}");
    let line = table.lines().find(|line| line.starts_with("model.layers.*.mlp.up_proj.weight ")).unwrap();
    let words: Vec<_> = line.split_whitespace().skip(1).collect();
    assert_eq!(words, ["8", "tensors", "786", "kB", "→", "527", "kB", "1.492"]);
    assert!(table.lines().last().unwrap().starts_with("in all "), "{table}");
    let output = program("pack").arg("--json").arg(speller()).arg(to.path().join("json")).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["tensors"].as_u64(), json["packed"].as_u64()), (Some(98), Some(41)));
    assert_eq!(json["kinds"].as_array().unwrap().len(), 14);
    let sum =
        |what: &str| json["kinds"].as_array().unwrap().iter().map(|kind| kind[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!(
        [sum("bytes_before"), sum("bytes_after")].map(Some),
        ["bytes_before", "bytes_after"].map(|what| json[what].as_u64())
    );
    // All that is packed gets so much smaller; small tensors stay as they are.
    let packed = |what: &str| -> f64 {
        let kinds = json["kinds"].as_array().unwrap().iter();
        kinds.filter(|kind| kind["bytes_after"] != kind["bytes_before"]).map(|kind| kind[what].as_f64().unwrap()).sum()
    };
    assert!(packed("bytes_before") / packed("bytes_after") > 1.48, "{json}");
    assert!((1.43..1.44).contains(&json["ratio"].as_f64().unwrap()), "{json}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("packed 3.24 MB in ") && said.contains("and read back"), "{said}");
}
