//! What a checkpoint and a plan accept and describe, and what they say about everything else. The `safetensors` crate is
//! the reference for the format.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use layer_streamer::{
    Checkpoint, DType, Error, Plan, Result, Settings, StoredTensor, Unit, device,
    pipeline::StaticTensors,
    plan::{Arrival, ArrivalOp, Sharing, Tier},
};
use proptest::{collection, prelude::*, sample};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// What a file says about its tensors, by name.
type Described = BTreeMap<String, (String, Vec<usize>)>;

fn describe(checkpoint: &Checkpoint) -> Described {
    let describe = |name: &str| checkpoint.describe(name).map(|(dtype, shape)| (dtype.to_string(), shape.to_vec()));
    checkpoint.names().map(|name| (name.to_owned(), describe(name).unwrap())).collect()
}

fn folder<N: AsRef<Path>>(files: impl IntoIterator<Item = (N, Vec<u8>)>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.into_iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

fn open_single(bytes: Vec<u8>) -> Result<Checkpoint> {
    Checkpoint::open(folder([(SINGLE, bytes)]))
}

/// A safetensors file with this header, whatever it says, and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), &vec![0; data]].concat()
}

fn file_of(records: &[String], data: usize) -> Vec<u8> {
    file(&format!("{{{}}}", records.join(",")), data)
}

fn record(name: &str, dtype: impl std::fmt::Display, shape: &[usize], start: usize, end: usize) -> String {
    format!(r#"{name:?}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
}

/// A file of one-byte tensors with these names.
fn bytes_named(names: &[&str]) -> Vec<u8> {
    let records: Vec<_> = names.iter().enumerate().map(|(at, name)| record(name, "U8", &[1], at, at + 1)).collect();
    file_of(&records, names.len())
}

/// Fails unless `result` is an error of one line that contains all of `parts`.
#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted, but should be refused with {parts:?}") };
    let message = error.to_string();
    assert!(!message.contains('\n') && parts.iter().all(|part| message.contains(part)), "{message:?} lacks {parts:?}");
}

/// One unit of all tensors: what is planned is what the table says can be read.
fn plan_of_all(checkpoint: &Checkpoint) -> Plan {
    let mut unit = Unit::new("all");
    checkpoint.names().for_each(|name| _ = unit.keep(name, name));
    Plan::new(checkpoint, &[unit], &Settings::default(), Sharing::Own).unwrap()
}

fn dtype() -> impl Strategy<Value = Dtype> {
    use Dtype::*;
    sample::select(&[BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64][..])
}

/// Tensors of any names, with type, shape, and two numbers for the test's use.
fn tensors() -> impl Strategy<Value = BTreeMap<String, (Dtype, Vec<usize>, u8, usize)>> {
    let tensor = (dtype(), collection::vec(0..5usize, 0..4), any::<u8>(), 0..3usize);
    collection::btree_map("[a-z.é\"\\\\]{0,6}", tensor, 1..9)
}

fn bytes_of(dtype: Dtype, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * dtype.bitsize() / 8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(support::cases(256)))]

    #[test]
    fn what_safetensors_writes_opens_as_written(tensors in tensors(), metadata: bool) {
        let zeros = [0; 4 * 4 * 4 * 8];
        let views: Vec<_> = (tensors.iter())
            .map(|(name, (dtype, shape, ..))| {
                (name, TensorView::new(*dtype, shape.clone(), &zeros[..bytes_of(*dtype, shape)]).unwrap())
            })
            .collect();
        let metadata = metadata.then(|| [("format".to_owned(), "pt".to_owned())].into());
        let checkpoint = open_single(safetensors::serialize(views, metadata).unwrap()).unwrap();
        let expected: Described =
            tensors.into_iter().map(|(name, (dtype, shape, ..))| (name, (dtype.to_string(), shape))).collect();
        prop_assert_eq!(describe(&checkpoint), expected);
    }

    #[test]
    fn shards_of_any_tensor_order_and_header_length_open_as_written(tensors in tensors(), pad in 0..9usize) {
        let mut shards = BTreeMap::<String, Vec<_>>::new();
        let (mut expected, mut weight_map, mut total) = (Described::new(), BTreeMap::new(), 0);
        for (name, (dtype, shape, rank, shard)) in tensors {
            let shard = format!("shard {shard}.safetensors");
            shards.entry(shard.clone()).or_default().push((rank, name.clone(), dtype, shape.clone()));
            weight_map.insert(name.clone(), shard);
            total += bytes_of(dtype, &shape);
            expected.insert(name, (dtype.to_string(), shape));
        }
        let mut files = vec![(INDEX.to_owned(), serde_json::json!({ "weight_map": weight_map }).to_string().into())];
        for (shard, mut tensors) in shards {
            // The data in order of rank, the header in order of name.
            tensors.sort();
            let (mut data, mut records) = (0, BTreeMap::new());
            for (_, name, dtype, shape) in tensors {
                let start = data;
                data += bytes_of(dtype, &shape);
                records.insert(name.clone(), record(&name, dtype, &shape, start, data));
            }
            let records: Vec<_> = records.into_values().collect();
            files.push((shard, file(&format!("{{{}}}{}", records.join(","), " ".repeat(pad)), data)));
        }
        let checkpoint = Checkpoint::open(folder(files)).unwrap();
        prop_assert_eq!(describe(&checkpoint), expected);
        prop_assert_eq!(plan_of_all(&checkpoint).bytes_per_pass(), total);
    }
}

/// Opens these bytes as a folder's only file, next to the reference. Ours may refuse more, for two documented reasons, and does
/// not mind types that are not known, as long as nobody reads such a tensor.
fn assert_agrees_with_safetensors(bytes: &[u8]) {
    let shown = String::from_utf8_lossy(bytes);
    match (open_single(bytes.to_vec()), SafeTensors::deserialize(bytes)) {
        (Ok(ours), Ok(reference)) => {
            let tensor =
                |(name, view): (&str, TensorView)| (name.into(), (view.dtype().to_string(), view.shape().into()));
            let readable = |(name, _): &(&str, TensorView)| !ours.unreadable().any(|(unknown, _)| unknown == *name);
            assert_eq!(describe(&ours), reference.iter().filter(readable).map(tensor).collect(), "{shown}");
            let data: usize = reference.iter().filter(readable).map(|(_, view)| view.data().len()).sum();
            assert_eq!(plan_of_all(&ours).bytes_per_pass(), data, "{shown}");
        }
        (Ok(ours), Err(_)) if ours.unreadable().next().is_some() => {}
        (Ok(_), Err(reference)) => panic!("accepted what safetensors refuses ({reference}): {shown}"),
        (Err(ours), Ok(_)) => {
            let (ours, documented) = (ours.to_string(), ["holds no tensor", "has the unknown type", "is listed twice"]);
            assert!(documented.iter().any(|cause| ours.contains(cause)), "refused as {ours:?}: {shown}");
        }
        (Err(ours), Err(_)) => assert!(matches!(ours, Error::Checkpoint { .. }), "{ours} is no refusal: {shown}"),
    }
}

#[test]
fn every_single_damage_to_a_file_is_judged_as_safetensors_judges_it() {
    let records = [
        record("b", "F32", &[1, 2], 1, 9),
        r#""__metadata__":{"k":"v"}"#.into(),
        record("a", "I8", &[], 0, 1),
        record("é", "BF16", &[usize::MAX, 0], 9, 9),
    ];
    let valid = file_of(&records, 9);
    assert_eq!(open_single(valid.clone()).unwrap().names().collect::<Vec<_>>(), ["a", "b", "é"]);
    for at in 0..valid.len() {
        assert_agrees_with_safetensors(&valid[..at]);
        assert_agrees_with_safetensors(&[&valid[..at], &valid[at + 1..]].concat());
        for &byte in b"\0\x01 19-+.eE\"\\,:[]{}abU\x80\xff" {
            assert_agrees_with_safetensors(&[&valid[..at], &[byte], &valid[at + 1..]].concat());
            assert_agrees_with_safetensors(&[&valid[..at], &[byte], &valid[at..]].concat());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(support::cases(256)))]

    #[test]
    fn garbage_is_judged_as_safetensors_judges_it(garbage: Vec<u8>, json in r#"[\[\]{}":,a0-9 _.\\-]{0,40}"#) {
        assert_agrees_with_safetensors(&garbage);
        assert_agrees_with_safetensors(&file(&json, 9));
        assert_agrees_with_safetensors(&file(&format!("{{{json}}}"), 0));
    }

    #[test]
    fn ranges_that_slip_are_judged_as_safetensors_judges_them(
        records in collection::vec((dtype(), collection::vec(extent(), 0..3), slip(), slip()), 1..4),
        data_slip in -1..2isize,
    ) {
        let mut end = 0usize;
        let records: Vec<_> = (records.into_iter().zip(["a", "b", "c"]))
            .map(|((dtype, shape, gap, excess), name)| {
                let elements = shape.iter().fold(1usize, |elements, dim| elements.wrapping_mul(*dim));
                let start = end.wrapping_add_signed(gap);
                end = start.wrapping_add(elements.wrapping_mul(dtype.bitsize() / 8)).wrapping_add_signed(excess);
                record(name, dtype, &shape, start, end)
            })
            .collect();
        let data = end.saturating_add_signed(data_slip).min(1000);
        assert_agrees_with_safetensors(&file_of(&records, data));
    }
}

/// A size, mostly small, sometimes near the end of arithmetic.
#[test]
fn rows_of_a_matrix_are_tensors_of_their_own_where_that_is_asked_for() {
    let file = file_of(&[record("m", "U8", &[7, 3], 0, 21), record("v", "U8", &[4], 21, 25)], 25);
    let checkpoint = open_single(file).unwrap();
    let start = checkpoint.location("m").unwrap().1;
    let (cut, parts) = checkpoint.with_rows("m", 3).unwrap();
    let found =
        parts.iter().map(|name| (cut.describe(name).unwrap().1.to_vec(), cut.location(name).unwrap().1 - start));
    assert_eq!(found.collect::<Vec<_>>(), [(vec![3, 3], 0), (vec![3, 3], 9), (vec![1, 3], 18)]);
    assert!(cut.describe("m").is_some() && checkpoint.describe(&parts[0]).is_none());
    assert_eq!(checkpoint.with_rows("m", 100).unwrap().1.len(), 1);
    let none = open_single(file_of(&[record("m", "F32", &[0, 1 << 62], 0, 0)], 0)).unwrap();
    assert_eq!(none.with_rows("m", 1).unwrap().1.len(), 0, "of rows that could not be addressed");
    assert_refused(checkpoint.with_rows("v", 1), &["v", "no rows"]);
    assert_refused(checkpoint.with_rows("w", 1), &["w", "is not in the checkpoint"]);
}

fn extent() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..4usize, 1 => sample::select(&[1 << 61, 1 << 62, 1 << 63, !1, !0][..])]
}

/// How far a range is off, mostly not at all.
fn slip() -> impl Strategy<Value = isize> {
    prop_oneof![12 => Just(0), 1 => -2..3isize, 1 => Just(isize::MIN)]
}

#[test]
fn a_malformed_file_is_refused_with_tensor_and_cause() {
    let one = |dtype, shape: &[usize], start, end| file_of(&[record("w", dtype, shape, start, end)], 8);
    let two = |[a, b]: [usize; 2], [c, d]: [usize; 2]| {
        file_of(&[record("v", "U8", &[b - a], a, b), record("w", "U8", &[d - c], c, d)], 8)
    };
    let (half, max) = (1 << 63, usize::MAX);
    let truncated = bytes_named(&["v", "w"]);
    for (bytes, parts) in [
        (vec![], &["is 0 bytes long, too short", "truncated?"][..]),
        (100u64.to_le_bytes().to_vec(), &["header ends at byte 108, the file at byte 8", "truncated?"]),
        (vec![0xff; 99], &["a header of 18446744073709551615 bytes, more than safetensors allows"]),
        (file("", 0), &["header is malformed: EOF"]),
        (file("{]", 0), &["header is malformed: key must be a string"]),
        (file("[]", 0), &["header is malformed", "expected an object of tensors"]),
        (file(r#"{"__metadata__":{"a":1}}"#, 0), &["header is malformed", "integer `1`, expected a string"]),
        (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), &["duplicate field `__metadata__`"]),
        (file(r#"{"w":{"dtype":"U8","shape":[1]}}"#, 1), &["tensor w: missing field `data_offsets`"]),
        (file(r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1), &["tensor w: invalid value"]),
        (one("F4", &[16], 0, 8), &["tensor w: has the unknown type F4"]),
        (one("F32", &[3], 0, 8), &["tensor w: its range 0..8 does not fit F32 [3]"]),
        (one("F32", &[1], 0, 8), &["tensor w: its range 0..8 does not fit F32 [1]"]),
        (one("F32", &[2], 8, 0), &["tensor w: its range 8..0 does not fit F32 [2]"]),
        (one("U8", &[half, 2], 0, 0), &["tensor w: its range 0..0 does not fit"]),
        (one("F32", &[1 << 62], 0, 0), &["tensor w: its range 0..0 does not fit"]),
        (one("U8", &[max], 0, max), &["tensor w: U8 [18446744073709551615] is more than can be addressed"]),
        (two([0, half], [half, max]), &["tensor v: U8 [9223372036854775808] is more than can be addressed"]),
        (one("U8", &[9], 0, 9), &["tensor w: its 9 bytes from byte", "do not fit in the file of", "truncated?"]),
        (truncated[..truncated.len() - 1].to_vec(), &["tensor w: its 1 bytes from byte", "truncated?"]),
        (one("U8", &[7], 0, 7), &["has 1 bytes after its last tensor"]),
        (two([0, 6], [5, 8]), &["tensor w: overlaps tensor v"]),
        (two([0, 8], [4, 4]), &["tensor w: overlaps tensor v"]),
        (two([0, 4], [5, 8]), &["tensor w: a hole of 1 bytes lies before it"]),
        (two([1, 4], [4, 8]), &["tensor v: a hole of 1 bytes lies before it"]),
        (bytes_named(&["v", "w", "v"]), &["tensor v: is listed twice"]),
    ] {
        assert_refused(open_single(bytes), &[&["/model.safetensors: "], parts].concat());
    }
}

#[test]
fn where_index_and_shards_disagree_those_are_refused_who_ask_for_the_tensor() {
    let index = |places: &[(&str, &str)]| {
        let places: Vec<_> = places.iter().map(|(name, shard)| format!("{name:?}:{shard:?}")).collect();
        format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, places.join(","))
    };
    let agreed = index(&[("v", "1.st"), ("w", "2.st")]);
    let open = |index: &str, first: Option<&[&str]>, second: &[&str]| {
        let first = first.map(|names| ("1.st", bytes_named(names)));
        let files = [(INDEX, index.as_bytes().to_vec()), ("2.st", bytes_named(second))];
        Checkpoint::open(folder(files.into_iter().chain(first)))
    };
    assert_eq!(open(&agreed, Some(&["v"]), &["w"]).unwrap().names().collect::<Vec<_>>(), ["v", "w"]);
    for (first, second, tensor, parts) in [
        (None, &["w"][..], "v", &["cannot open", "/1.st: No such file"][..]),
        (
            Some(&["v"][..]),
            &["x"],
            "w",
            &["/2.st: tensor w: is not in this file, where the index places it", "download"],
        ),
    ] {
        let checkpoint = open(&agreed, first, second).unwrap();
        let mut unit = Unit::new("layer");
        unit.keep("out", tensor);
        assert_refused(Plan::new(&checkpoint, &[unit], &Settings::default(), Sharing::Own), parts);
        let said: Vec<_> = checkpoint.unreadable().map(|(name, error)| (name, error.to_string())).collect();
        assert!(matches!(&said[..], [(name, why)] if *name == tensor && parts.iter().all(|part| why.contains(part))));
        assert!(checkpoint.describe(tensor).is_none() && checkpoint.names().all(|name| name != tensor));
    }
    assert_refused(open(&agreed, None, &[]), &["cannot open", "/1.st: No such file"]);
    for shard in ["../2.st", "/2.st", "a/../../2.st", "a//2.st", "./2.st", "2.st/", "", ".", ".."] {
        let cause = format!("tensor w: its shard {shard:?} is no plain path inside the folder");
        assert_refused(open(&index(&[("w", shard)]), None, &["w"]), &["/model.safetensors.index.json: ", &cause]);
    }
    assert_refused(open("", None, &["w"]), &["/model.safetensors.index.json: is empty"]);
    for (json, cause) in [(" ", "EOF"), ("{}", "missing field"), (r#"{"weight_map":{"w":2}}"#, "a string")] {
        assert_refused(open(json, None, &["w"]), &["/model.safetensors.index.json: is no valid index: ", cause]);
    }
    assert_refused(open(&index(&[]), None, &["w"]), &[": holds no tensor"]);
}

#[test]
fn a_path_that_is_no_model_folder_is_refused_with_what_to_name_instead() {
    let folder = folder([("file", file("{}", 0))]);
    let path = folder.path();
    assert_refused(Checkpoint::open(path), &["holds neither", INDEX, SINGLE, "name the folder"]);
    assert_refused(Checkpoint::open(path.join("none")), &["cannot open", "/none: No such file"]);
    assert_refused(Checkpoint::open(path.join("file")), &["/file: is no folder; name the folder"]);
    fs::create_dir(path.join(SINGLE)).unwrap();
    assert_refused(Checkpoint::open(path), &["/model.safetensors: is no regular file"]);
}

#[test]
fn layers_come_in_order_of_number_and_are_complete_or_refused() {
    let open = |names: &[&str]| open_single(bytes_named(names)).unwrap();
    let others = ["lm_head", "model.layers.norm.w", "model.layers.3", "x.model.layers.0.b"];
    let (mut names, mut expected) = (others.map(String::from).to_vec(), Vec::new());
    for n in 0..11 {
        let mut unit = Unit::new(format!("model.layers.{n}"));
        for output in ["a.w", "b"] {
            names.push(format!("model.layers.{n}.{output}"));
            unit.keep(output, &names[names.len() - 1]);
        }
        expected.push(unit);
    }
    let names: Vec<_> = names.iter().rev().map(String::as_str).collect();
    assert_eq!(open(&names).layers().unwrap(), expected);

    for (names, cause) in [
        (&["model.layers.0.w", "model.layers.2.w"][..], "has tensors of layer 2 but none of layer 1"),
        (&["model.layers.1.w"], "has tensors of layer 1 but none of layer 0"),
        (&others, "has no tensor under model.layers.N."),
        (&["model.layers.0.w", "model.layers.00.w"], "tensor model.layers.00.w: \"00\" is no layer number"),
        (&["model.layers.0.w", "model.layers.01.w"], "tensor model.layers.01.w: \"01\" is no layer number"),
        (&["model.layers.18446744073709551616.w"], "\"18446744073709551616\" is no layer number"),
    ] {
        let checkpoint = open(names);
        assert_refused(checkpoint.layers(), &[checkpoint.source().to_str().unwrap(), cause]);
    }
}

#[test]
fn a_table_is_taken_if_its_tensors_lie_apart_in_their_files() {
    let folder = folder([("file", vec![0; 20])]);
    let at = |name: &str, file: &str, offset, shape: &[usize]| {
        let (name, file, shape) = (name.to_owned(), folder.path().join(file), shape.to_vec());
        StoredTensor { name, file, offset, dtype: DType::F32, shape }
    };
    // Out of order, with a hole, off any alignment, up to the last byte; without elements anywhere, even at the end.
    let table = [("c", 12, &[2][..]), ("a", 1, &[]), ("b", 3, &[0]), ("d", 20, &[0])];
    let checkpoint =
        Checkpoint::from_table(table.map(|(name, offset, shape)| at(name, "file", offset, shape))).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
    assert_eq!(checkpoint.describe("c"), Some((DType::F32, &[2][..])));
    assert_eq!(checkpoint.describe("e"), None);

    let a = || at("a", "file", 4, &[2]);
    for (table, parts) in [
        (vec![], &["tensor table: holds no tensor"][..]),
        (vec![a(), at("b", "file", 11, &[1])], &["/file: tensor b: overlaps tensor a"]),
        (vec![at("b", "file", 8, &[1]), a()], &["/file: tensor b: overlaps tensor a"]),
        (vec![a(), at("b", "file", 17, &[1])], &["/file: tensor b: its 4 bytes from byte 17 on do not fit"]),
        (vec![at("b", "file", 21, &[0])], &["/file: tensor b: its 0 bytes from byte 21 on do not fit"]),
        (vec![at("b", "file", u64::MAX, &[1])], &["/file: tensor b: its 4 bytes from byte 18446744073709551615 on"]),
        (vec![at("b", "file", 0, &[1 << 62])], &["/file: tensor b: F32 [4611686018427387904] is more than can be"]),
        (vec![at("b", "file", 0, &[1 << 61])], &["/file: tensor b: F32 [2305843009213693952] is more than can be"]),
        (vec![a(), at("a", "file", 16, &[1])], &["/file: tensor a: is listed twice"]),
        (vec![a(), at("b", "none", 0, &[0])], &["cannot open", "/none: No such file"]),
        (vec![a(), at("b", "", 0, &[0])], &["tensor b: its file is no regular file"]),
    ] {
        assert_refused(Checkpoint::from_table(table), parts);
    }
}

#[test]
fn settings_out_of_range_are_refused_by_name_and_limit() {
    let checkpoint = open_single(bytes_named(&["model.layers.0.w"])).unwrap();
    let plan = |[n_gpu, n_cpu_pinned, n_cpu]: [usize; 3], [batch_gpu, batch_cpu_pinned, batch_cpu]: [usize; 3]| {
        let settings =
            Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, ..Settings::default() };
        Plan::new(&checkpoint, &checkpoint.layers().unwrap(), &settings, Sharing::Own)
    };
    for (n, batch) in [([1, 0, 0], [0; 3]), ([2, 3, 4], [2, 3, 4]), ([1 << 16; 3], [1 << 16; 3])] {
        assert_eq!(plan(n, batch).unwrap().units(), 1);
    }
    for (n, batch, parts) in [
        ([0, 4, 4], [0; 3], ["n_gpu: ", "at least 1"]),
        ([2, 3, 4], [3, 0, 0], ["batch_gpu: a batch of 3 ", "n_gpu = 2; use at most 2"]),
        ([2, 3, 4], [0, 4, 0], ["batch_cpu_pinned: a batch of 4 ", "n_cpu_pinned = 3; use at most 3"]),
        ([2, 3, 4], [0, 0, 5], ["batch_cpu: a batch of 5 ", "n_cpu = 4; use at most 4"]),
        ([2, 3, 0], [0, 0, 1], ["batch_cpu: a batch of 1 ", "n_cpu = 0; use at most 0"]),
        ([usize::MAX, 3, 4], [0; 3], ["n_gpu: is 18446744073709551615", "65536"]),
        ([2, 65537, 4], [0; 3], ["n_cpu_pinned: is 65537", "65536"]),
    ] {
        assert_refused(plan(n, batch), &parts);
    }
}

#[test]
fn units_that_cannot_be_made_are_refused_with_unit_or_tensor_and_cause() {
    let records = [record("i", "I64", &[1], 0, 8), record("z", "F32", &[0], 8, 8), record("f", "F32", &[2], 8, 16)];
    let checkpoint = open_single(file_of(&records, 16)).unwrap();
    let plan = |arrivals: &[(&str, &[&str], ArrivalOp)]| {
        let mut unit = Unit::new("layer");
        for &(output, inputs, op) in arrivals {
            let inputs = inputs.iter().map(|&input| input.to_owned()).collect();
            unit.add(Arrival { output: output.into(), inputs, op });
        }
        Plan::new(&checkpoint, &[unit], &Settings::default(), Sharing::Own)
    };
    use ArrivalOp::{Keep, To};
    let good = [("a", &["f"][..], Keep), ("z", &["z"], To(DType::BF16)), ("b", &["f"], To(DType::BF16))];
    assert_eq!(plan(&good).unwrap().bytes_per_pass(), 8, "what two outputs share is read once");
    assert_eq!(plan(&[("i", &["i"], To(DType::I64))]).unwrap().bytes_per_pass(), 8, "to its own type, anything goes");

    for (arrivals, parts) in [
        (&[("w", &["none"][..], Keep)][..], &["tensor none: is not in the checkpoint"][..]),
        (&[("w", &["f"], Keep), ("w", &["i"], Keep)], &["layer has two tensors named w"]),
        (&[("w", &["i"], To(DType::F32))], &["/model.safetensors: tensor i: cannot be converted from I64 to F32"]),
        (&[("w", &["f"], To(DType::F16))], &["/model.safetensors: tensor f: cannot be converted from F32 to F16"]),
        (&[("w", &[], Keep)], &["layer: w is made by Keep, which takes one stored tensor, not 0"]),
        (&[("w", &["f", "i"], To(DType::F32))], &["layer: w is made by To(F32), which takes one stored tensor, not 2"]),
    ] {
        assert_refused(plan(arrivals), parts);
    }
    assert_refused(
        Plan::new(&checkpoint, &[], &Settings::default(), Sharing::Own),
        &["units: there must be at least one"],
    );
}

#[test]
fn units_larger_than_can_be_addressed_are_refused() {
    // All hole, in memory, whose file system takes files of such lengths. The first two, rounded to pages, are nothing together.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let lengths = [("a", 256), ("b", 256), ("c", 8192), ("d", 8192)].map(|(name, less)| (name, (1_u64 << 63) - less));
    let stored = lengths.map(|(name, bytes)| {
        let file = folder.path().join(name);
        fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        StoredTensor { name: name.into(), file, offset: 0, dtype: DType::U8, shape: vec![bytes as usize] }
    });
    let checkpoint = Checkpoint::from_table(stored).unwrap();
    let unit = |names: &[&str]| {
        let mut unit = Unit::new("layer");
        names.iter().for_each(|name| _ = unit.keep(*name, *name));
        unit
    };
    let plan = |units: &[Unit]| Plan::new(&checkpoint, units, &Settings::default(), Sharing::Own);
    assert!(plan(&[unit(&["c"])]).is_ok());
    for names in [&["a", "b"][..], &["c", "d"], &["a"], &["a", "b", "c", "d"]] {
        let too_large = "unit: layer is larger than can be addressed";
        assert_refused(plan(&[unit(names)]), &[too_large]);
        assert_refused(StaticTensors::new(&device::Cpu, &checkpoint, &unit(names), &Settings::default()), &[too_large]);
    }
    for tier in [Tier::Ram, Tier::Pinned, Tier::Gpu] {
        let mut units = [unit(&["c"]), unit(&["d"])];
        units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        assert_refused(plan(&units), &["tier: more is kept there than can be addressed"]);
    }
}
