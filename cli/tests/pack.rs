//! `pack` and `unpack`: what was packed comes back bit for bit, whatever ends them on the way, and what is damaged is told.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use common::program;
use layer_streamer::packed::{Description, KEY};
use serde_json::{Map, Value, json};
use support::{folder, speller};

const FIRST: &str = "shards/one.safetensors";
const SECOND: &str = "shards/two.safetensors";

/// Name, type, shape and bytes.
type Tensor = (String, String, Vec<usize>, Vec<u8>);

fn tensor(name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    (name.into(), dtype.into(), shape.to_vec(), bytes)
}

/// Normally distributed BF16 weights.
fn weights(name: &str, shape: &[usize], seed: u64) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut normal = || (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
    let some: Vec<_> = (0..4096).map(|_| half::bf16::from_f32(0.02 * normal()).to_le_bytes()).collect();
    let bytes = (0..shape.iter().product()).flat_map(|_| some[rng.usize(..some.len())]);
    tensor(name, "BF16", shape, bytes.collect())
}

fn random(name: &str, dtype: &str, shape: &[usize], bytes: usize) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(bytes as u64);
    tensor(name, dtype, shape, (0..bytes).map(|_| rng.u8(..)).collect())
}

fn write(path: &Path, metadata: Value, tensors: &[Tensor]) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
        data.extend_from_slice(bytes);
    }
    if !metadata.is_null() {
        header.insert("__metadata__".into(), metadata);
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_raw(path, &Value::from(header).to_string(), &data);
}

fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length, header.as_bytes(), data].concat()).unwrap();
}

/// The metadata of a file and its tensors as they lie in it, in the order of their bytes.
fn read(path: &Path) -> (Map<String, Value>, Vec<Tensor>) {
    let file = fs::read(path).unwrap();
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Map<String, Value> = serde_json::from_slice(header).unwrap();
    let metadata = header.remove("__metadata__").map_or_else(Map::new, |all| all.as_object().unwrap().clone());
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let mut tensors: Vec<_> = header
        .into_iter()
        .map(|(name, record)| {
            let offsets = [0, 1].map(|end| number(&record["data_offsets"][end]));
            let shape = record["shape"].as_array().unwrap().iter().map(number).collect();
            let dtype = record["dtype"].as_str().unwrap().to_owned();
            (offsets, (name, dtype, shape, data[offsets[0]..offsets[1]].to_vec()))
        })
        .collect();
    tensors.sort_by_key(|(offsets, _)| *offsets);
    assert_eq!(tensors.last().map_or(0, |(offsets, _)| offsets[1]), data.len());
    (metadata, tensors.into_iter().map(|(_, tensor)| tensor).collect())
}

fn index(folder: &Path, shards: &[(&str, &[Tensor])]) {
    let entries = shards.iter().flat_map(|(shard, tensors)| tensors.iter().map(|tensor| (tensor.0.clone(), *shard)));
    let index = json!({ "metadata": { "total_size": 1, "note": "kept" }, "weight_map": Map::from_iter(entries.map(|(name, shard)| (name, shard.into()))) });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Tensors that are written in several steps: when the third is begun, the journal has the first.
fn large() -> Vec<Tensor> {
    let shapes = [("a", 1400), ("b", 7700), ("c", 3200)].into_iter().enumerate();
    let mut large: Vec<_> = shapes.map(|(seed, (name, rows))| weights(name, &[rows, 1024], seed as u64)).collect();
    large.push(random("d", "F32", &[9], 36));
    large
}

/// Blocks of 512 bytes after which the third of them is under way.
const IN_THE_THIRD: u64 = 25_600;

fn small() -> Vec<Tensor> {
    vec![weights("e", &[600, 1000], 3), random("f", "F32", &[9], 36)]
}

/// A model of two shards.
fn model_of(first: &[Tensor], second: &[Tensor]) -> tempfile::TempDir {
    let model = folder();
    write(&model.path().join(FIRST), json!({ "format": "pt" }), first);
    write(&model.path().join(SECOND), json!({ "format": "pt" }), second);
    index(model.path(), &[(FIRST, first), (SECOND, second)]);
    fs::write(model.path().join("config.json"), "{}").unwrap();
    model
}

/// One that is packed in no time.
fn model() -> tempfile::TempDir {
    model_of(&[weights("a", &[700, 1024], 1), weights("b", &[700, 1024], 2), random("c", "F32", &[9], 36)], &small())
}

fn run(command: &str, arguments: &[&Path]) -> Output {
    program(command).arg("--quiet").args(arguments).output().unwrap()
}

fn does(command: &str, arguments: &[&Path]) -> String {
    let output = run(command, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command} {arguments:?}: {said}");
    said
}

fn refused(command: &str, arguments: &[&Path]) -> String {
    let output = run(command, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{command} {arguments:?}: {said}");
    assert!(said.starts_with("error: ") && !said.contains("panicked") && output.stdout.is_empty(), "{said}");
    said
}

/// Ends it in a file's place where it would be longer than so many blocks of 512 bytes, as a signal does that nobody handles.
fn ended_after(blocks: u64, command: &str, arguments: &[&Path]) {
    let script = format!(r#"ulimit -c 0; ulimit -f {blocks}; exec "$0" {command} --quiet "$@""#);
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).arg(program(command).get_program()).args(arguments);
    assert_eq!(shell.output().unwrap().status.code(), None);
}

/// All files below a folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

fn assert_same(one: &Path, other: &Path) {
    let relative = |folder: &Path| {
        let files = files(folder).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(folder).unwrap().to_owned(), bytes)).collect::<BTreeMap<_, _>>()
    };
    let (one, other) = (relative(one), relative(other));
    assert!(one.keys().eq(other.keys()), "{:?} and {:?}", one.keys(), other.keys());
    one.iter().for_each(|(name, bytes)| assert!(other[name] == *bytes, "{} differs", name.display()));
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// The first byte of a tensor.
fn start_of(path: &Path, name: &str) -> usize {
    let bytes = fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    data + header[name]["data_offsets"][0].as_u64().unwrap() as usize
}

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
        weights("just_over_a_block", &[4097], 9),
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
    assert_eq!(of_first[KEY], "1");
    let total: usize =
        [FIRST, SECOND].iter().flat_map(|name| read(&packed.join(name)).1).map(|tensor| tensor.3.len()).sum();
    let index = |folder: &Path| -> Value {
        serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).unwrap()).unwrap()
    };
    let written = index(&packed);
    assert_eq!(written["metadata"], json!({ "total_size": total, "note": "kept" }));
    assert_eq!(written["weight_map"], index(from)["weight_map"]);

    does("unpack", &[&packed, &unpacked]);
    let said = run("unpack", &[Path::new("--check"), &packed]);
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("all 27 tensors are as they were packed"), "{said:?}");
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
    write(&model.path().join("model.safetensors"), Value::Null, &[weights("old", &[9000], 1)]);
    write(&model.path().join("best.safetensors"), Value::Null, &[weights("new", &[9000], 2)]);
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
            thread::sleep(Duration::from_millis(rng.u64(0..40 + 10 * attempt)));
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
    let (model, to) = (model_of(&small(), &large()), folder());
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
fn ctrl_c_ends_it_cleanly_and_says_how_to_go_on() {
    let (model, to) = (folder(), folder());
    let (whole, packed) = (to.path().join("whole"), to.path().join("packed"));
    let tensors: Vec<_> = (0..12).map(|number| weights(&format!("w{number}"), &[1000, 1024], number)).collect();
    write(&model.path().join("model.safetensors"), Value::Null, &tensors);
    does("pack", &[model.path(), &whole]);
    let mut command = program("pack");
    let child = command.arg("--quiet").arg(model.path()).arg(&packed).stderr(Stdio::piped()).spawn().unwrap();
    while !packed.join("model.safetensors.partial").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: the process is this test's own child, and not waited for yet.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.starts_with("interrupted; the same command goes on") && said.lines().count() == 1, "{said}");
    assert!(!packed.join("model.safetensors").exists());
    does("pack", &[model.path(), &packed]);
    assert_same(&packed, &whole);
}

#[test]
fn a_damaged_file_is_told_with_its_tensor_and_nothing_is_made_of_it() {
    let (model, to) = (model(), folder());
    let (from, packed) = (model.path(), to.path().join("packed"));
    does("pack", &[from, &packed]);
    let original = fs::read(packed.join(FIRST)).unwrap();
    // In the signs and mantissas, in the second part's index, and in a tensor that is not packed.
    let description = read(&packed.join(FIRST)).0[&format!("{KEY}:b")].as_str().unwrap().to_owned();
    let second = Description::from_json(&description).unwrap().lengths[0] as usize;
    for (number, (name, at, how)) in
        [("a", 5000, "its checksum is"), ("b", second + 4, "part 1, block 0"), ("c", 3, "its checksum is")]
            .iter()
            .enumerate()
    {
        let unpacked = to.path().join(format!("unpacked {number}"));
        flip(&packed.join(FIRST), start_of(&packed.join(FIRST), name) + at);
        for said in [refused("unpack", &[&packed, &unpacked]), refused("unpack", &[Path::new("--check"), &packed])] {
            let expected = format!("{FIRST}: tensor {name} is damaged: {how}");
            assert!(said.contains(&expected) && said.contains("take the file anew"), "{said}");
        }
        assert!(!unpacked.join(FIRST).exists() && !unpacked.join("config.json").exists());
        fs::write(packed.join(FIRST), &original).unwrap();
        does("unpack", &[&packed, &unpacked]);
    }
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    let (model, to) = (model(), folder());
    // The other shard is as it should be.
    let (path, packed) = (model.path().join(SECOND), to.path().join("packed"));
    let record = |weights: u64, start: u64, end: u64| {
        format!(r#"{{"dtype":"BF16","shape":[{weights}],"data_offsets":[{start},{end}]}}"#)
    };
    let described = |key: &str, value: &str| {
        let metadata = json!({ KEY: "1", key: value });
        format!(r#"{{"__metadata__":{metadata},"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#)
    };
    let description = json!({ "dtype": "BF16", "shape": [2], "table": [0,1,2,3,4,5,6,7,8,9,10,11,12], "xxh3": "0123456789abcdef", "part": 4096, "lengths": [5136] });
    for (header, cause) in [
        (r#"{"a":"#.to_owned(), "header is malformed"),
        (format!(r#"{{"a":{}}}"#, record(2, 0, 6)), "does not fit BF16 [2]"),
        (format!(r#"{{"a":{}}}"#, record(2, 4, 0)), "range 4..0"),
        (format!(r#"{{"a":{}}}"#, record(2, 1 << 60, (1 << 60) + 4)), "does not fit BF16 [2]"),
        (format!(r#"{{"a":{},"b":{}}}"#, record(2, 0, 4), record(1, 2, 4)), "tensor b begins at byte"),
        (format!(r#"{{"a":{}}}"#, record(1, 2, 4)), "tensor a begins at byte"),
        (format!(r#"{{"a":{}}}"#, record(1, 0, 2)), "2 bytes after its last tensor"),
        (format!(r#"{{"a":{},"a":{}}}"#, record(2, 0, 4), record(0, 4, 4)), "twice"),
        (r#"{"a":{"dtype":"BF16","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#.into(), "tensor a"),
        (described(&format!("{KEY}:a"), "{}"), "missing field"),
        (described(&format!("{KEY}:a"), &description.to_string()), "packed tensor a"),
        (described(&format!("{KEY}:b"), &description.to_string()), "no such tensor"),
        (described("layer_streamer.xxh3:a", "what"), "no checksum"),
        (described(KEY, "2"), "version 2"),
        (described("", "").replacen(&format!("{KEY}\""), &format!("{KEY}:a\""), 1), "no version"),
    ] {
        write_raw(&path, &header, &[0; 4]);
        for command in ["pack", "unpack"] {
            let said = refused(command, &[model.path(), &packed]);
            assert!(said.contains(cause) && said.contains(SECOND), "{command} {header}: {said}");
        }
        assert!(!packed.exists());
    }
    write(&path, Value::Null, &[weights("a", &[5000], 1)]);
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 20, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(refused("pack", &[model.path(), &packed]).contains(SECOND), "{length}");
    }
    fs::write(&path, [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat()).unwrap();
    assert!(refused("pack", &[model.path(), &packed]).contains("1099511627776"));
}

#[test]
fn what_should_not_be_converted_or_overwritten_is_refused_with_what_to_do() {
    let (model, to) = (model(), folder());
    let (from, packed, other) = (model.path(), to.path().join("packed"), to.path().join("other"));
    symlink(from, to.path().join("link")).unwrap();
    for (command, arguments, cause) in [
        ("pack", [from, from], "lies in the model's own folder"),
        ("pack", [from, &from.join("shards/../new/packed")], "lies in the model's own folder"),
        ("pack", [from, &to.path().join("link/new")], "lies in the model's own folder"),
        ("pack", [to.path(), &packed], "holds neither"),
        ("pack", [Path::new("/nowhere/at/all"), &packed], "/nowhere/at/all"),
        ("pack", [from, &from.join("config.json")], "lies in the model's own folder"),
        ("unpack", [from, &packed], "is not packed"),
        ("unpack", [Path::new("--check"), from], "is not packed"),
    ] {
        let said = refused(command, &arguments);
        assert!(said.contains(cause), "{said}");
        assert!(!packed.exists());
    }
    does("pack", &[from, &packed]);
    let said = refused("pack", &[&packed, &other]);
    assert!(said.contains("is packed already (shards/one.safetensors)"), "{said}");
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("already holds ") && said.contains("name another folder"), "{said}");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes"), "").unwrap();
    assert!(refused("pack", &[from, &other]).contains("already holds notes"));
    fs::write(to.path().join("file"), "").unwrap();
    assert!(refused("pack", &[from, &to.path().join("file")]).contains("is no folder"));

    let f32 = folder();
    write(&f32.path().join("model.safetensors"), Value::Null, &[random("a", "F32", &[9], 36)]);
    assert!(refused("pack", &[f32.path(), &to.path().join("f32")]).contains("has no BF16 weights"));
    assert!(!to.path().join("f32").exists());
}

#[test]
fn a_folder_that_is_not_finished_takes_its_own_command_alone() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let (from, packed) = (model.path(), to.path().join("packed"));
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    let another = speller();
    let said = refused("pack", &[&another, &packed]);
    assert!(said.contains("a part of other work") && said.contains(&from.display().to_string()), "{said}");
    let journal = packed.join("layer-streamer.journal");
    let lock = fs::File::open(&journal).unwrap();
    lock.lock().unwrap();
    assert!(refused("pack", &[from, &packed]).contains("another process"));
    lock.unlock().unwrap();
    fs::write(packed.join("notes"), "").unwrap();
    assert!(refused("pack", &[from, &packed]).contains("holds notes, which is no part of this work"));
    fs::remove_file(packed.join("notes")).unwrap();
    // It cannot be used either.
    fs::write(packed.join("config.json"), "{}").unwrap();
    fs::copy(from.join("model.safetensors.index.json"), packed.join("model.safetensors.index.json")).unwrap();
    fs::copy(from.join(FIRST), packed.join(FIRST)).unwrap();
    assert!(refused("unpack", &[&packed, &to.path().join("unpacked")]).contains("is not complete"));
    fs::write(&journal, "nonsense\n").unwrap();
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("is damaged; remove the folder"), "{said}");
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
    assert_eq!((json["tensors"].as_u64(), json["packed"].as_u64()), (Some(98), Some(57)));
    assert_eq!(json["kinds"].as_array().unwrap().len(), 14);
    let sum =
        |what: &str| json["kinds"].as_array().unwrap().iter().map(|kind| kind[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!(
        [sum("bytes_before"), sum("bytes_after")].map(Some),
        ["bytes_before", "bytes_after"].map(|what| json[what].as_u64())
    );
    assert!(json["ratio"].as_f64().unwrap() > 1.48, "{json}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("packed 3.24 MB in ") && said.contains("and read back"), "{said}");
}
