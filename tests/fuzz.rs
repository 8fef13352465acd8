//! Files that are nearly right: mutated headers, indexes, configurations and records. Each is read or refused with an error,
//! never with a panic, and never with more memory than the file has. A tensor that is accepted lies where the safetensors
//! crate finds it, and what that refuses is refused here.
//!
//! Each target runs for two seconds, from a seed that it prints; LAYER_STREAMER_FUZZ_SECONDS says how long, and
//! LAYER_STREAMER_FUZZ_SEED repeats a run.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    env, fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use common::{copy_of, speller};
use layer_streamer::{
    Checkpoint,
    model::{Model, ModelConfig},
    plan::Placement,
    tuner::Record,
};
use safetensors::SafeTensors;

/// Notes the largest block that was asked for.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
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

/// More than any of these files is worth.
const MOST: usize = 16 << 20;

/// What numbers and names are turned into.
const WORDS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "18446744073709551615",
    "18446744073709551616",
    "4294967295",
    "1e308",
    "-0.0",
    "0.1",
    "null",
    "[]",
    "{}",
    "\"\"",
    "true",
    "\"F32\"",
    "\"F8_E8M0\"",
    "[0,0]",
    "\"..\"",
];

/// Changes some of the bytes.
fn mutated(bytes: &[u8], rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.usize(1..4) {
        let at = rng.usize(..=bytes.len());
        let end = (at + rng.usize(..40)).min(bytes.len());
        match rng.u8(..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(..8),
            1 if at < bytes.len() => bytes[at] = rng.u8(..),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            4 => {
                // A number, or whatever stands there, becomes another word.
                let digit = |byte: &u8| byte.is_ascii_digit();
                let from = bytes[at..].iter().position(digit).map_or(at, |position| at + position);
                let to =
                    bytes[from..].iter().position(|byte| !digit(byte)).map_or(bytes.len(), |position| from + position);
                bytes.splice(from..to, rng.choice(WORDS).expect("there are words").bytes());
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Calls `target` with mutants of `seed`, which it accepts, until the time is up; none may make it panic.
fn fuzz(name: &str, seed: &[u8], mut target: impl FnMut(&[u8]) -> bool) {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    let time = Duration::from_secs_f64(number("LAYER_STREAMER_FUZZ_SECONDS").unwrap_or(2.0));
    let first = number("LAYER_STREAMER_FUZZ_SEED").map_or_else(|| fastrand::u64(..1 << 50), |seed| seed as u64);
    println!("{name}: from seed {first}");
    assert!(target(seed), "{name}: the seed itself is refused");
    let (start, mut tried, mut accepted) = (Instant::now(), 0, 0);
    while start.elapsed() < time {
        let number = first + tried;
        let mutant = mutated(seed, &mut fastrand::Rng::with_seed(number));
        LARGEST.store(0, Relaxed);
        match panic::catch_unwind(AssertUnwindSafe(|| target(&mutant))) {
            Ok(read) => accepted += u64::from(read),
            Err(_) => panic!("{name}, LAYER_STREAMER_FUZZ_SEED={number}: {}", String::from_utf8_lossy(&mutant)),
        }
        let largest = LARGEST.load(Relaxed);
        assert!(largest < MOST, "{name}, LAYER_STREAMER_FUZZ_SEED={number}: a block of {largest} bytes");
        tried += 1;
    }
    println!("{name}: {tried} tried, {accepted} accepted");
    assert!(tried > 0);
}

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
    let folder = common::folder();
    let path = folder.path().join("model.safetensors");
    fuzz("header", &weights(), |bytes| {
        fs::write(&path, bytes).unwrap();
        let theirs = SafeTensors::deserialize(bytes);
        let ours = match Checkpoint::open(folder.path()) {
            Ok(ours) => ours,
            Err(error) => {
                // What they read is read, but for types that are not known here and names that come twice.
                let said = error.to_string();
                let differs = ["unknown type", "twice"].iter().any(|word| said.contains(word));
                assert!(theirs.is_err() || differs, "only they read it: {said}");
                return false;
            }
        };
        let theirs = theirs.expect("what they refuse is refused");
        let names: Vec<_> = ours.names().collect();
        assert_eq!(names.len(), theirs.len());
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

/// Fuzzes one file of a copy of the speller.
fn speller_s(file: &str, read: impl Fn(&Path) -> bool) {
    let folder = copy_of(&speller());
    let path = folder.path().join(file);
    let seed = fs::read(&path).unwrap();
    fuzz(file, &seed, |bytes| {
        fs::write(&path, bytes).unwrap();
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
    let folder = common::folder();
    let path = folder.path().join("record.json");
    let placement =
        r#"{"settings":{"n_gpu":2,"n_cpu_pinned":4},"units":8,"homes":"0-3=gpu,5=ram","statics":"on-device"}"#;
    fuzz("placement", placement.as_bytes(), |bytes| serde_json::from_slice::<Placement>(bytes).is_ok());
    let record = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/record.json")).unwrap();
    fuzz("record", &record, |bytes| {
        fs::write(&path, bytes).unwrap();
        Record::read(&path).is_ok()
    });
}
