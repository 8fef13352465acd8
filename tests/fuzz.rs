//! Files that are nearly right: mutated headers, indexes, configurations, records and GGUF files. Each is read or refused with an error,
//! never with a panic, and never with more memory than the file has. A tensor that is accepted lies where the safetensors
//! crate finds it, and what that refuses is refused here.
//!
//! How long, and from which seed: see `common/fuzz.rs`. More targets: the planner's in `src/plan/fuzz.rs`, the options of the C
//! API in `capi_fuzz.rs`.

mod common;
#[path = "fuzz/trace.rs"]
mod trace;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::Path,
};

use layer_streamer::{
    Checkpoint, Settings, StaticTensors, Unit,
    device::Cpu,
    gguf::Gguf,
    model::{Model, ModelConfig},
    packed,
    plan::Placement,
    tuner::Record,
};
use safetensors::SafeTensors;
use support::{
    copy_of,
    fuzz::{LARGEST, mutants},
    gguf::{GgufFile, Meta},
    speller,
};

/// Notes the largest block that was asked for.
struct Watching;

// SAFETY: every call is passed on unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// A small file of each kind of tensor.
fn weights() -> Vec<u8> {
    use safetensors::{Dtype, tensor::TensorView};
    let data = vec![7u8; 4096];
    let tensor = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), &data[..bytes]).unwrap();
    let tensors = [
        ("model.layers.0.a", tensor(Dtype::F32, &[3, 5], 60)),
        ("model.layers.0.b", tensor(Dtype::BF16, &[2, 0, 7], 0)),
        ("model.layers.1.a", tensor(Dtype::U8, &[9], 9)),
        ("model.norm", tensor(Dtype::F16, &[], 2)),
    ];
    safetensors::serialize(tensors, None).unwrap()
}

#[test]
fn a_header_is_read_as_the_safetensors_crate_reads_it_or_refused() {
    let folder = support::folder();
    let path = folder.path().join("model.safetensors");
    mutants("header", &weights(), |bytes| {
        write_anew(&path, bytes);
        let theirs = SafeTensors::deserialize(bytes);
        let ours = match Checkpoint::open(folder.path()) {
            Ok(ours) => ours,
            Err(error) => {
                // What they read is read, but for names that come twice, and files of no type that is known here.
                let said = error.to_string();
                let differs = ["unknown type", "twice", "holds no tensor"].iter().any(|word| said.contains(word));
                assert!(theirs.is_err() || differs, "only they read it: {said}");
                return false;
            }
        };
        // A type that nobody knows is none of a tensor that is read.
        let (names, unknown): (Vec<_>, _) = (ours.names().collect(), ours.unreadable().count());
        let theirs = match theirs {
            Ok(theirs) => theirs,
            Err(error) => {
                assert!(unknown > 0, "what they refuse is refused: {error}");
                return true;
            }
        };
        assert_eq!(names.len() + unknown, theirs.len());
        for name in names {
            let (view, (dtype, shape)) = (theirs.tensor(name).unwrap(), ours.describe(name).unwrap());
            assert_eq!((view.shape(), view.data().len()), (shape, dtype.bytes_of(shape).unwrap()), "{name}");
            let (_, offset) = ours.location(name).unwrap();
            let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert!(view.data().is_empty() || at == offset as usize, "{name} is at {offset} or {at}");
        }
        true
    });
}

/// The smallest of models as a GGUF file, with a value of each kind, and a tensor of each type that is read, and one of another.
fn gguf() -> Vec<u8> {
    let mut file = GgufFile { alignment: 64, ..GgufFile::default() };
    for (key, value) in [
        ("general.architecture", Meta::text("llama")),
        ("llama.block_count", Meta::U32(1)),
        ("llama.context_length", Meta::U32(16)),
        ("llama.embedding_length", Meta::U32(4)),
        ("llama.feed_forward_length", Meta::U32(2)),
        ("llama.attention.head_count", Meta::U32(2)),
        ("llama.attention.head_count_kv", Meta::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(1e4)),
        ("llama.rope.dimension_count", Meta::U32(2)),
        ("llama.rope.scaling.type", Meta::text("yarn")),
        ("llama.rope.scaling.factor", Meta::F32(2.0)),
        ("llama.rope.scaling.original_context_length", Meta::U32(8)),
        ("llama.attention.sliding_window", Meta::U32(4)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
        ("small", Meta::U16(7)),
        ("signed", Meta::I32(-1)),
        ("real", Meta::F32(0.5)),
        ("flag", Meta::Bool(true)),
        ("tokenizer.ggml.tokens", Meta::Texts(["a", "", "é€"].map(str::to_owned).into())),
        ("tokenizer.ggml.scores", Meta::Floats(vec![0.0, -1.0, -2.0])),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![1, 2, 3])),
        ("lists", Meta::Raw(9, [[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].as_slice(), &[0; 12]].concat())),
    ] {
        file.set(key, value);
    }
    for (name, shape, code) in [
        ("token_embd.weight", &[3, 4][..], 0),
        ("output_norm.weight", &[4], 0),
        ("blk.0.attn_norm.weight", &[4], 0),
        ("blk.0.attn_q.weight", &[4, 4], 30),
        ("blk.0.attn_k.weight", &[2, 4], 30),
        ("blk.0.attn_v.weight", &[2, 4], 30),
        ("blk.0.attn_output.weight", &[4, 4], 30),
        ("blk.0.ffn_norm.weight", &[4], 1),
        ("blk.0.ffn_gate.weight", &[2, 4], 1),
        ("blk.0.ffn_up.weight", &[2, 4], 1),
        ("blk.0.ffn_down.weight", &[4, 2], 1),
    ] {
        let size = if code == 0 { 4 } else { 2 };
        file.tensor(name, shape, code, vec![7; size * shape.iter().product::<usize>()]);
    }
    file.tensor("of blocks", &[1, 32], 8, vec![7; 34]);
    file.tensor("not read", &[1, 256], 16, vec![7; 66]);
    file.bytes()
}

#[test]
fn a_gguf_file_is_read_or_refused_and_its_tensors_lie_in_it() {
    let folder = support::folder();
    let path = folder.path().join("m.gguf");
    mutants("gguf", &gguf(), |bytes| {
        write_anew(&path, bytes);
        if let Ok(file) = Gguf::open(&path) {
            for key in file.keys() {
                let _ = (file.texts(key), file.numbers(key), file.flag(key), file.count(key));
            }
        }
        let model = Model::open(&path);
        let Ok(checkpoint) = Checkpoint::open(&path) else { return false };
        let mut unit = Unit::new("all");
        checkpoint.names().for_each(|name| _ = unit.keep(name, name));
        StaticTensors::new(&Cpu, &checkpoint, &unit, &Settings::default()).unwrap();
        model.is_ok()
    });
}

/// A small file with packed tensors, of several parts and of one.
fn packed_weights() -> Vec<u8> {
    use safetensors::{Dtype, tensor::TensorView};
    let mut rng = fastrand::Rng::with_seed(1);
    let mut metadata = HashMap::from([(packed::KEY.to_owned(), packed::VERSION.to_owned())]);
    let tensors = [("a", 10_000, 4096), ("b", 5, 262_144)].map(|(name, count, part)| {
        let weights: Vec<u16> = (0..count).map(|_| rng.u16(..) >> 1 & 0xbfff).collect();
        let (description, bytes) = common::pack(&[count], part, &weights);
        metadata.insert(format!("{}:{name}", packed::KEY), description.to_json());
        (name, bytes)
    });
    let views =
        tensors.iter().map(|(name, bytes)| (*name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap()));
    safetensors::serialize(views, Some(metadata)).unwrap()
}

#[test]
fn a_packed_file_is_loaded_or_refused() {
    let folder = support::folder();
    let path = folder.path().join("model.safetensors");
    mutants("packed", &packed_weights(), |bytes| {
        write_anew(&path, bytes);
        let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return false };
        let mut unit = Unit::new("all");
        checkpoint.names().for_each(|name| _ = unit.keep(name, name));
        StaticTensors::new(&Cpu, &checkpoint, &unit, &Settings::default()).is_ok()
    });
}

#[test]
fn a_packed_part_is_decoded_alike_in_every_way_or_refused() {
    let mut rng = fastrand::Rng::with_seed(2);
    let weights: Vec<u16> = (0..3 * 4096 + 77).map(|_| 0x3d80 ^ (rng.u16(..) >> rng.u32(6..10))).collect();
    let mut counts = [0; 256];
    packed::count(&weights, &mut counts);
    let table = packed::Table::new(&counts);
    mutants("packed-part", &packed::Encoder::new(table).part(&weights), |bytes| {
        let decoded = packed::Decoding::ALL.into_iter().filter(|decoding| decoding.is_supported()).map(|decoding| {
            let mut out = vec![0; weights.len()];
            let part = packed::Packed::new(table, weights.len(), bytes)?.decoded_by(decoding);
            part.decode(&mut out).map(|()| out)
        });
        let decoded: Vec<_> = decoded.collect();
        assert!(decoded.windows(2).all(|pair| pair[0] == pair[1]), "ways of decoding disagree");
        decoded[0].is_ok()
    });
}

/// Some file systems write a file out at once when it was cut to nothing before, which takes a thousand times as long.
fn write_anew(path: &Path, bytes: &[u8]) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{}: {error}", path.display()),
        _ => fs::write(path, bytes).unwrap(),
    }
}

/// Fuzzes one file of a copy of the speller.
fn speller_s(file: &str, read: impl Fn(&Path) -> bool) {
    let folder = copy_of(&speller());
    let path = folder.path().join(file);
    let seed = fs::read(&path).unwrap();
    mutants(file, &seed, |bytes| {
        write_anew(&path, bytes);
        read(folder.path())
    });
}

#[test]
fn an_index_is_read_or_refused() {
    speller_s("model.safetensors.index.json", |folder| Checkpoint::open(folder).is_ok());
}

#[test]
fn a_configuration_is_read_or_refused() {
    speller_s("config.json", |folder| ModelConfig::read(folder).is_ok() & Model::open(folder).is_ok());
}

#[test]
fn a_generation_configuration_is_read_or_refused() {
    speller_s("generation_config.json", |folder| ModelConfig::read(folder).is_ok());
}

#[test]
fn a_record_of_a_search_is_read_or_refused() {
    let folder = support::folder();
    let path = folder.path().join("record.json");
    let placement =
        r#"{"settings":{"n_gpu":2,"n_cpu_pinned":4},"units":8,"tiers":"0-3=gpu,5=ram","statics":"on-device"}"#;
    mutants("placement", placement.as_bytes(), |bytes| serde_json::from_slice::<Placement>(bytes).is_ok());
    let record = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/record.json")).unwrap();
    mutants("record", &record, |bytes| {
        write_anew(&path, bytes);
        Record::read(&path).is_ok()
    });
}
