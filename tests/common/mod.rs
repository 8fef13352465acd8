//! What several integration tests share: a checkpoint of random bytes, and a plain reading of it to compare with.
#![allow(dead_code, reason = "each test uses a part")]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use layer_streamer::{Checkpoint, DType, StoredTensor, Unit};

/// Files of random bytes, the table of the tensors in them, and units over those.
pub struct Fixture {
    pub folder: tempfile::TempDir,
    pub checkpoint: Checkpoint,
    pub units: Vec<Unit>,
    pub table: HashMap<String, StoredTensor>,
}

/// Shapes `units` units of BF16 tensors of these element counts, at odd offsets, alternating between two files.
pub fn fixture(units: usize, elements: &[usize], seed: u64) -> Fixture {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let files = [folder.path().join("a.bin"), folder.path().join("b.bin")];
    let mut ends = [0u64; 2];
    let (mut table, mut made) = (HashMap::new(), Vec::new());
    for number in 0..units {
        let mut unit = Unit::new(format!("unit {number}"));
        for (index, &count) in elements.iter().enumerate() {
            let file = rng.usize(..2);
            let offset = ends[file] + 2 * rng.u64(..40);
            let name = format!("{number}.{index}");
            ends[file] = offset + 2 * count as u64;
            unit.keep(format!("t{index}"), &name);
            let stored = StoredTensor {
                name: name.clone(),
                file: files[file].clone(),
                offset,
                dtype: DType::BF16,
                shape: vec![count],
            };
            table.insert(name, stored);
        }
        made.push(unit);
    }
    for (file, end) in files.iter().zip(ends) {
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(end as usize).collect();
        fs::write(file, bytes).unwrap();
    }
    let used = table.values().cloned();
    Fixture { checkpoint: Checkpoint::from_table(used).unwrap(), folder, units: made, table }
}

impl Fixture {
    /// The bytes of a stored tensor, by the plainest read there is.
    pub fn stored(&self, name: &str) -> Vec<u8> {
        let tensor = &self.table[name];
        let bytes = tensor.dtype.bytes_of(&tensor.shape).unwrap();
        fs::read(&tensor.file).unwrap()[tensor.offset as usize..][..bytes].to_vec()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// The repository's folder of reference checkpoints.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A built example. `cargo test` builds them beside the test executables; `cargo test --test NAME` takes those built before.
pub fn example(name: &str) -> std::process::Command {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().unwrap().with_file_name("examples").join(name);
    assert!(path.exists(), "the example is not built: cargo build --example {name}");
    std::process::Command::new(path)
}

/// A copy of a checkpoint folder that a test may spoil.
pub fn copy_of(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// The model that comes with the project.
pub fn speller() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/speller")
}
