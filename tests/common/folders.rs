//! Folders of the repository and folders to write to, for the tests of the library and of the program.
#![allow(dead_code, reason = "each test uses a part")]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// A folder on a real file system where there is one: a temporary folder may lie in memory.
pub fn folder() -> tempfile::TempDir {
    let built = option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from).filter(|folder| folder.exists());
    let parent = built.unwrap_or_else(env::temp_dir);
    tempfile::tempdir_in(parent).unwrap()
}

/// The repository, or what was carried of it to a machine that only runs the tests.
pub fn root() -> PathBuf {
    let built = || {
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        package.ancestors().find(|folder| folder.join("tests/data").exists()).unwrap_or(package).to_owned()
    };
    env::var_os("LAYER_STREAMER_ROOT").map_or_else(built, PathBuf::from)
}

/// The repository's folder of reference checkpoints.
pub fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

/// The model that comes with the project.
pub fn speller() -> PathBuf {
    root().join("examples/speller")
}

/// A copy of a checkpoint folder that a test may spoil.
pub fn copy_of(original: &Path) -> tempfile::TempDir {
    let copy = folder();
    for entry in fs::read_dir(original).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}
