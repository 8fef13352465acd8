//! GGUF files as checkpoints: what is read of a file, and what is said of everything else.

use std::{fs, path::PathBuf};

use layer_streamer::{
    Checkpoint, DType, Error, Result,
    gguf::{Gguf, Value},
};
use support::{
    folder,
    gguf::{GgufFile, Meta},
};

/// The types that are read, by their codes.
const CODES: [(u32, DType); 16] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (20, DType::IQ4_NL),
    (23, DType::IQ4_XS),
    (30, DType::BF16),
    (39, DType::MXFP4),
];

/// A file with some keys and tensors.
fn small() -> GgufFile {
    let mut file = GgufFile::default();
    file.set("general.architecture", Meta::text("llama"));
    file.set("llama.block_count", Meta::U32(1));
    file.set("a.list", Meta::Texts(vec!["x".into(), String::new(), "é€".into()]));
    file.set("a.float", Meta::F32(0.5));
    file.set("scores", Meta::Floats(vec![1.5, -2.0]));
    file.set("types", Meta::Ints(vec![3, -1]));
    file.tensor("token_embd.weight", &[5, 3], 0, (0..60).collect());
    file.tensor("blk.0.attn_q.weight", &[2, 3], 30, (60..72).collect());
    file.tensor("odd", &[7], 1, (80..94).collect());
    file
}

fn written(files: &[(&str, &GgufFile)]) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    files.iter().for_each(|(name, file)| fs::write(folder.path().join(name), file.bytes()).unwrap());
    let first = folder.path().join(files[0].0);
    (folder, first)
}

fn open(file: &GgufFile) -> Result<Checkpoint> {
    let (_folder, path) = written(&[("m.gguf", file)]);
    Checkpoint::open(path)
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint> {
    let folder = folder();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(path)
}

/// Fails unless `result` is an error of one line that contains all of `parts`.
#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted, but should be refused with {parts:?}") };
    let message = error.to_string();
    assert!(!message.contains('\n') && parts.iter().all(|part| message.contains(part)), "{message:?} lacks {parts:?}");
}

#[test]
fn tensors_lie_where_the_file_says_with_the_decoder_s_names_and_rows_first() {
    for (version, alignment) in [(3, 32), (2, 32), (3, 8), (3, 1), (3, 4096)] {
        let file = GgufFile { version, alignment, ..small() };
        let (_folder, path) = written(&[("any name", &file)]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let names: Vec<_> = checkpoint.names().collect();
        assert_eq!(names, ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "odd"]);
        assert_eq!(checkpoint.describe(names[0]), Some((DType::F32, [5, 3].as_slice())));
        assert_eq!(checkpoint.describe(names[1]), Some((DType::BF16, [2, 3].as_slice())));
        assert_eq!(checkpoint.describe(names[2]), Some((DType::F16, [7].as_slice())));
        let bytes = fs::read(&path).unwrap();
        for (name, expected) in [(names[0], 0..60u8), (names[1], 60..72), (names[2], 80..94)] {
            let (at, offset) = checkpoint.location(name).unwrap();
            let found = &bytes[offset as usize..][..expected.len()];
            assert!(
                at == path && found.iter().copied().eq(expected) && offset.is_multiple_of(alignment as u64),
                "{name}"
            );
        }
    }
}

#[test]
fn names_of_layers_become_the_decoder_s_by_what_the_layer_has() {
    let named = |stored: &[&str]| -> Vec<String> {
        let mut file = GgufFile::default();
        stored.iter().for_each(|name| file.tensor(name, &[1], 0, vec![0; 4]));
        open(&file).unwrap().names().map(str::to_owned).collect()
    };
    let of_layer = |names: &[&str]| names.iter().map(|name| format!("model.layers.7.{name}")).collect::<Vec<_>>();
    let llama = ["ffn_down", "ffn_gate", "ffn_up", "ffn_norm", "attn_norm", "attn_k", "attn_output"];
    let llama = llama.map(|name| format!("blk.7.{name}.weight"));
    let expected = [
        "input_layernorm.weight",
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "post_attention_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
    ];
    assert_eq!(named(&llama.each_ref().map(String::as_str)), of_layer(&expected));
    let gemma = ["blk.7.ffn_norm.weight", "blk.7.post_attention_norm.weight", "blk.7.post_ffw_norm.weight"];
    let expected =
        ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight", "pre_feedforward_layernorm.weight"];
    assert_eq!(named(&gemma), of_layer(&expected));
    let phi = ["blk.7.ffn_up.weight", "blk.7.attn_qkv.weight", "blk.7.attn_q.bias", "blk.7.attn_k_norm.weight"];
    let expected =
        ["mlp.gate_up_proj.weight", "self_attn.k_norm.weight", "self_attn.q_proj.bias", "self_attn.qkv_proj.weight"];
    assert_eq!(named(&phi), of_layer(&expected));
    let kept = ["blk.7.attn_rot_embd.weight", "blk.7.bias", "blk.x", "output.weight.x", "rope_freqs.weight"];
    assert_eq!(named(&kept), kept);
    assert_eq!(named(&["output.weight", "output_norm.weight"]), ["lm_head.weight", "model.norm.weight"]);
}

#[test]
fn metadata_are_what_was_written_and_lists_are_read_when_asked_for() {
    let (_folder, path) = written(&[("m.gguf", &small())]);
    let file = Gguf::open(&path).unwrap();
    assert_eq!(file.path(), path);
    let keys: Vec<_> = file.keys().collect();
    assert_eq!(keys, ["a.float", "a.list", "general.architecture", "llama.block_count", "scores", "types"]);
    assert_eq!(file.text("general.architecture").unwrap(), Some("llama"));
    assert_eq!(file.count("llama.block_count").unwrap(), Some(1));
    assert_eq!((file.value("a.float"), file.value("none")), (Some(&Value::Float(0.5)), None));
    assert_eq!(file.length("a.list").unwrap(), Some(3));
    assert_eq!(file.texts("a.list").unwrap().unwrap(), ["x", "", "é€"]);
    assert_eq!(file.numbers("scores").unwrap().unwrap(), [1.5, -2.0]);
    assert_eq!(file.numbers("types").unwrap().unwrap(), [3.0, -1.0]);
    assert_eq!((file.texts("none").unwrap(), file.flag("none").unwrap()), (None, None));
    for (result, parts) in [
        (file.text("a.float").map(|_| ()), ["a.float is 0.5", "a text"]),
        (file.count("a.float").map(|_| ()), ["a.float is 0.5", "a whole number"]),
        (file.flag("a.list").map(|_| ()), ["a.list is a list of 3", "true or false"]),
        (file.texts("scores").map(|_| ()), ["scores is a list of 2", "a list of texts"]),
        (file.numbers("a.list").map(|_| ()), ["a.list is a list of 3", "a list of numbers"]),
    ] {
        assert_refused(result, &[&["m.gguf"], parts.as_slice()].concat());
    }
    fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert_refused(file.texts("a.list"), &["m.gguf", "a.list", "truncated"]);
}

#[test]
fn a_file_that_ends_anywhere_is_refused_as_that() {
    let bytes = small().bytes();
    for end in 0..bytes.len() {
        assert_refused(open_bytes(&bytes[..end]), &["m.gguf", if end < 4 { "" } else { "truncated" }]);
    }
    assert!(open_bytes(&bytes).is_ok());
}

#[test]
fn what_no_file_can_be_is_refused_with_file_key_or_tensor_and_cause() {
    let with = |change: &dyn Fn(&mut GgufFile)| {
        let mut file = small();
        change(&mut file);
        file
    };
    let raw = |code, bytes: &[u8]| Meta::Raw(code, bytes.to_vec());
    let list = |code: u32, count: u64, rest: &[u8]| {
        raw(9, &[&code.to_le_bytes(), count.to_le_bytes().as_slice(), rest].concat())
    };
    let nested = (0..5).fold(Vec::new(), |inner: Vec<u8>, depth| {
        let code: u32 = if depth == 0 { 0 } else { 9 };
        [&code.to_le_bytes(), u64::from(depth > 0).to_le_bytes().as_slice(), &inner].concat()
    });
    let cases: Vec<(GgufFile, Vec<&str>)> = vec![
        (with(&|file| file.version = 1), vec!["version 1", "versions 2 and 3"]),
        (with(&|file| file.version = 4), vec!["version 4"]),
        (with(&|file| file.version = 3 << 24), vec!["big-endian"]),
        (with(&|file| file.magic = *b"FUGG"), vec!["big-endian"]),
        (with(&|file| file.magic = *b"GGML"), vec!["is no folder; name the folder", "GGUF file"]),
        (with(&|file| file.alignment = 24), vec!["general.alignment is 24", "power of two"]),
        (with(&|file| file.metadata.push(("a.float".into(), Meta::U32(1)))), vec!["a.float", "twice"]),
        (with(&|file| file.set("k", raw(13, &[0; 8]))), vec!["the value of \"k\"", "type 13"]),
        (with(&|file| file.set("k", raw(7, &[2]))), vec!["\"k\"", "neither true nor false"]),
        (with(&|file| file.set("k", raw(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xFF]))), vec!["\"k\"", "UTF-8"]),
        (with(&|file| file.set("k", list(0, u64::MAX, &[]))), vec!["\"k\"", "more than the file has room for"]),
        (with(&|file| file.set("k", list(10, 1 << 61, &[]))), vec!["\"k\"", "more than the file has room for"]),
        (with(&|file| file.set("k", list(8, 1, &[0xFF; 8]))), vec!["\"k\"", "truncated"]),
        (with(&|file| file.set("k", raw(9, &nested))), vec!["\"k\"", "lists within lists"]),
        (with(&|file| file.tensor("odd", &[1], 0, vec![0; 4])), vec!["tensor odd", "listed twice"]),
        (with(&|file| file.tensor("t", &[1; 5], 0, vec![0; 4])), vec!["\"t\"", "5 dimensions"]),
        (with(&|file| file.tensor("t", &[1 << 62, 8], 0, vec![0; 4])), vec!["tensor t", "more than can be addressed"]),
        (with(&|file| file.tensor("t", &[9], 0, vec![0; 32])), vec!["tensor t", "36 bytes", "truncated"]),
        (GgufFile::default(), vec!["holds no tensor"]),
    ];
    for (file, parts) in cases {
        assert_refused(open(&file), &[&["m.gguf"], parts.as_slice()].concat());
    }
    // The offset of the last tensor is what its record ends with.
    let bytes = small().bytes();
    let at = bytes.windows(3).position(|three| three == b"odd").unwrap() + 3 + 4 + 8 + 4;
    for (offset, part) in
        [(7u64, "no multiple of the alignment"), (32, "overlaps"), (u64::MAX - 31, "outside any file")]
    {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        assert_refused(open_bytes(&bytes), &["m.gguf", part]);
    }
    assert_refused(open_bytes(b"<!DOCTYPE html>and so on"), &["m.gguf", "web page"]);
    assert_refused(open_bytes(b"version https://git-lfs.github.com/spec/v1"), &["m.gguf", "git lfs pull"]);
}

#[test]
fn every_type_that_is_read_is_read_and_others_are_refused_by_name_for_those_who_ask() {
    for (code, dtype) in CODES {
        let mut file = GgufFile::default();
        let shape = [2, 3 * dtype.block_elements()];
        file.tensor("t", &shape, code, vec![0; 6 * dtype.size()]);
        assert_eq!(open(&file).unwrap().describe("t").unwrap(), (dtype, &shape[..]));
        // Rows of whole blocks.
        if dtype.is_blocks() {
            let mut file = GgufFile::default();
            file.tensor("t", &[6, dtype.block_elements() / 2], code, vec![0; 3 * dtype.size()]);
            assert_refused(open(&file), &["tensor t", dtype.name(), "rows that are no whole blocks", "m.gguf"]);
        }
    }
    for (code, name) in [(9, "Q8_1"), (16, "IQ2_XXS"), (28, "F64"), (34, "TQ1_0"), (4, "number 4")] {
        let mut file = small();
        file.tensor("blk.0.attn_k.weight", &[2, 32], code, vec![0; 256]);
        let checkpoint = open(&file).unwrap();
        assert_eq!(checkpoint.names().count(), 3);
        let (asked, error) = checkpoint.unreadable().next().unwrap();
        assert_eq!(asked, "model.layers.0.self_attn.k_proj.weight");
        let expected = [&format!("tensor blk.0.attn_k.weight: the type {name} "), "m.gguf", "such as Q4_K_M or Q8_0"];
        assert!(matches!(error, Error::Unsupported { .. }));
        assert_refused::<()>(Err(error), &expected);
        // Where there is nothing else, that is said at once.
        file.tensors.drain(..3);
        assert_refused(open(&file), &expected);
    }
}

/// A file in three parts: keys and a tensor, a tensor, two tensors.
fn parts() -> [GgufFile; 3] {
    let small = small();
    let part = |number: u16, metadata, tensors: &[usize]| {
        let tensors = tensors.iter().map(|&index| small.tensors[index].clone()).collect();
        let mut file = GgufFile { metadata, tensors, ..GgufFile::default() };
        file.set("split.no", Meta::U16(number));
        file.set("split.count", Meta::U16(3));
        file.set("split.tensors.count", Meta::I32(3));
        file
    };
    [part(0, small.metadata.clone(), &[]), part(1, Vec::new(), &[0]), part(2, Vec::new(), &[1, 2])]
}

const PARTS: [&str; 3] = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];

#[test]
fn a_split_file_is_one_checkpoint_by_its_first_part() {
    let parts = parts();
    let (folder, first) = written(&[(PARTS[0], &parts[0]), (PARTS[1], &parts[1]), (PARTS[2], &parts[2])]);
    let checkpoint = Checkpoint::open(&first).unwrap();
    for (name, part, expected) in [
        ("model.embed_tokens.weight", 1, 0..60u8),
        ("model.layers.0.self_attn.q_proj.weight", 2, 60..72),
        ("odd", 2, 80..94),
    ] {
        let (path, offset) = checkpoint.location(name).unwrap();
        assert_eq!(path, folder.path().join(PARTS[part]));
        assert!(fs::read(path).unwrap()[offset as usize..][..expected.len()].iter().copied().eq(expected), "{name}");
    }
    assert_refused(Checkpoint::open(folder.path().join(PARTS[1])), &[PARTS[1], "is part 2 of 3", "name the first"]);
    let renamed = folder.path().join("other.gguf");
    fs::rename(&first, &renamed).unwrap();
    assert_refused(Checkpoint::open(&renamed), &["other.gguf", "-00001-of-00003.gguf"]);
}

#[test]
fn parts_that_do_not_agree_are_refused() {
    let refused = |change: &dyn Fn(&mut [GgufFile; 3]), expected: &[&str]| {
        let mut files = parts();
        change(&mut files);
        let (_folder, first) = written(&[(PARTS[0], &files[0]), (PARTS[1], &files[1]), (PARTS[2], &files[2])]);
        assert_refused(Checkpoint::open(first), expected);
    };
    refused(&|files| files[1].set("split.no", Meta::U16(2)), &[PARTS[1], "split.no is 2, expected 1"]);
    refused(&|files| files[2].set("split.count", Meta::U16(4)), &[PARTS[2], "split.count is 4, expected 3"]);
    refused(&|files| files[2].remove("split.no"), &[PARTS[2], "split.no is absent"]);
    refused(&|files| files[0].set("split.tensors.count", Meta::I32(9)), &[PARTS[0], "is 9, but the parts have 3"]);
    refused(&|files| files[0].set("split.count", Meta::text("3")), &[PARTS[0], "split.count is \"3\""]);
    let twice = |files: &mut [GgufFile; 3]| {
        files[0].set("split.tensors.count", Meta::I32(4));
        files[1].tensor("odd", &[1], 0, vec![0; 4]);
    };
    refused(&twice, &["tensor odd", PARTS[1], PARTS[2]]);
    let files = parts();
    let (_folder, first) = written(&[(PARTS[0], &files[0]), (PARTS[1], &files[1])]);
    assert_refused(Checkpoint::open(first), &[PARTS[2], "No such file"]);
}
