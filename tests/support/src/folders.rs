//! Folders of the repository and folders to write to, for the tests of the library and of the program.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A folder on a real file system where there is one, beside what cargo has built: a temporary folder may lie in memory.
pub fn folder() -> tempfile::TempDir {
    let program = env::current_exe().unwrap();
    // It is target/PROFILE/deps/PROGRAM.
    let beside = program.ancestors().nth(3).map(|target| target.join("tmp")).filter(|folder| folder.exists());
    tempfile::tempdir_in(beside.unwrap_or_else(env::temp_dir)).unwrap()
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

/// The whole file and when it was last changed, to be [`healed`] with.
pub fn whole(path: &Path) -> (Vec<u8>, SystemTime) {
    (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap())
}

/// A disk that had failed works again: the file is what it was, so that it is not taken for another one.
pub fn healed(path: &Path, (bytes, modified): &(Vec<u8>, SystemTime)) {
    fs::write(path, bytes).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(*modified).unwrap();
}
