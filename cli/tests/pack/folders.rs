//! Models to pack, and what became of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Map, Value, json};
use support::folder;

use crate::common::program;

pub const FIRST: &str = "shards/one.safetensors";
pub const SECOND: &str = "shards/two.safetensors";

/// Name, type, shape and bytes.
pub type Tensor = (String, String, Vec<usize>, Vec<u8>);

pub fn tensor(name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    (name.into(), dtype.into(), shape.to_vec(), bytes)
}

/// Normally distributed BF16 weights: short runs out of some that were drawn, since drawing millions would take seconds.
pub fn weights(name: &str, shape: &[usize], seed: u64) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut normal = || (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
    let some: Vec<_> = (0..4096).flat_map(|_| half::bf16::from_f32(0.02 * normal()).to_le_bytes()).collect();
    let length = 2 * shape.iter().product::<usize>();
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let start = 2 * rng.usize(..some.len() / 2);
        let run = &some[start..some.len().min(start + 2 * rng.usize(1..100)).min(start + length - bytes.len())];
        bytes.extend_from_slice(run);
    }
    tensor(name, "BF16", shape, bytes)
}

pub fn random(name: &str, dtype: &str, shape: &[usize], bytes: usize) -> Tensor {
    let mut rng = fastrand::Rng::with_seed(bytes as u64);
    tensor(name, dtype, shape, (0..bytes).map(|_| rng.u8(..)).collect())
}

pub fn write(path: &Path, metadata: Value, tensors: &[Tensor]) {
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

pub fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length, header.as_bytes(), data].concat()).unwrap();
}

/// The metadata of a file and its tensors as they lie in it, in the order of their bytes.
pub fn read(path: &Path) -> (Map<String, Value>, Vec<Tensor>) {
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

pub fn index(folder: &Path, shards: &[(&str, &[Tensor])]) {
    let entries = shards.iter().flat_map(|(shard, tensors)| tensors.iter().map(|tensor| (tensor.0.clone(), *shard)));
    let index = json!({ "metadata": { "total_size": 1, "note": "kept" }, "weight_map": Map::from_iter(entries.map(|(name, shard)| (name, shard.into()))) });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Tensors that are written in several steps: when the third is begun, the journal has the first.
pub fn large() -> Vec<Tensor> {
    let shapes = [("a", 1400), ("b", 7700), ("c", 3200)].into_iter().enumerate();
    let mut large: Vec<_> = shapes.map(|(seed, (name, rows))| weights(name, &[rows, 1024], seed as u64)).collect();
    large.push(random("d", "F32", &[9], 36));
    large
}

/// Blocks of 512 bytes after which the third of them is under way.
pub const IN_THE_THIRD: u64 = 25_600;

pub fn small() -> Vec<Tensor> {
    vec![weights("e", &[600, 1000], 3), random("f", "F32", &[9], 36)]
}

/// A model of two shards.
pub fn model_of(first: &[Tensor], second: &[Tensor]) -> tempfile::TempDir {
    let model = folder();
    write(&model.path().join(FIRST), json!({ "format": "pt" }), first);
    write(&model.path().join(SECOND), json!({ "format": "pt" }), second);
    index(model.path(), &[(FIRST, first), (SECOND, second)]);
    fs::write(model.path().join("config.json"), "{}").unwrap();
    model
}

/// One that is packed in no time.
pub fn model() -> tempfile::TempDir {
    model_of(&[weights("a", &[700, 1024], 1), weights("b", &[700, 1024], 2), random("c", "F32", &[9], 36)], &small())
}

/// One that takes long enough to be disturbed.
pub fn long() -> tempfile::TempDir {
    let model = folder();
    let tensors: Vec<_> = (0..12).map(|number| weights(&format!("w{number}"), &[1000, 1024], number)).collect();
    write(&model.path().join("model.safetensors"), Value::Null, &tensors);
    model
}

/// A process that packs such a model, and has begun to write.
pub fn under_way(model: &Path, to: &Path) -> Child {
    let mut command = program("pack");
    let child = command.arg("--quiet").arg(model).arg(to).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while !to.join("model.safetensors.partial").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    child
}

pub fn signal(child: &Child, signal: libc::c_int) {
    // SAFETY: the process is this test's own child, and not waited for yet.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
}

pub fn run(command: &str, arguments: &[&Path]) -> Output {
    program(command).arg("--quiet").args(arguments).output().unwrap()
}

pub fn does(command: &str, arguments: &[&Path]) -> String {
    let output = run(command, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command} {arguments:?}: {said}");
    said
}

pub fn refused(command: &str, arguments: &[&Path]) -> String {
    let output = run(command, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{command} {arguments:?}: {said}");
    assert!(said.starts_with("error: ") && !said.contains("panicked") && output.stdout.is_empty(), "{said}");
    said
}

/// Ends it in a file's place where it would be longer than so many blocks of 512 bytes, as a signal does that nobody handles.
pub fn ended_after(blocks: u64, command: &str, arguments: &[&Path]) {
    let script = format!(r#"ulimit -c 0; ulimit -f {blocks}; exec "$0" {command} --quiet "$@""#);
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).arg(program(command).get_program()).args(arguments);
    assert_eq!(shell.output().unwrap().status.code(), None);
}

/// All files below a folder.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
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

pub fn assert_same(one: &Path, other: &Path) {
    let relative = |folder: &Path| {
        let files = files(folder).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(folder).unwrap().to_owned(), bytes)).collect::<BTreeMap<_, _>>()
    };
    let (one, other) = (relative(one), relative(other));
    assert!(one.keys().eq(other.keys()), "{:?} and {:?}", one.keys(), other.keys());
    one.iter().for_each(|(name, bytes)| assert!(other[name] == *bytes, "{} differs", name.display()));
}

pub fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// The first byte of a tensor.
pub fn start_of(path: &Path, name: &str) -> usize {
    let bytes = fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    data + header[name]["data_offsets"][0].as_u64().unwrap() as usize
}
