//! Files that are nearly right: mutated headers, indexes, configurations and records. Each is read or refused with an error,
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
    fs,
    io::ErrorKind,
    path::Path,
};

use layer_streamer::{
    Checkpoint,
    model::{Model, ModelConfig},
    plan::Placement,
    tuner::Record,
};
use safetensors::SafeTensors;
use support::{
    copy_of,
    fuzz::{LARGEST, mutants},
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
