//! The cache on the disk, in the layout of Python's huggingface_hub, which reads and writes it too:
//!
//! ```text
//! models--ORG--NAME/refs/REVISION              the commit that a branch or tag stood for
//! models--ORG--NAME/blobs/ETAG                 what a file holds
//! models--ORG--NAME/blobs/ETAG.incomplete      the beginning of it
//! models--ORG--NAME/snapshots/COMMIT/FILE      a link to the blob
//! models--ORG--NAME/.no_exist/COMMIT/FILE      an empty file: the commit has no such file
//! .locks/models--ORG--NAME/ETAG.lock           locked by whoever writes the blob
//! ```
//!
//! A blob gets its name, and a snapshot its link, only when the blob is whole. So whatever has a name can be used.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use layer_streamer::files::{self, NewFile};

use crate::{
    error::{Error, Result, cannot},
    fetch::Meta,
};

/// One model's part of the cache.
pub struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// The place of `ORG/NAME`. Nothing is made there yet.
    pub fn of(repository: &str) -> Result<Self> {
        let hub = hub_folder()?;
        let name = format!("models--{}", repository.replace('/', "--"));
        Ok(Self { folder: hub.join(&name), locks: hub.join(".locks").join(name) })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit that a revision stood for when it was last downloaded.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = files::read_small(&self.folder.join("refs").join(revision), 1 << 10).ok()??;
        let commit = String::from_utf8(text).ok()?.trim().to_owned();
        is_plain(&commit).then_some(commit)
    }

    /// From now on a revision stands for this commit.
    pub fn note_commit(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.folder.join("refs").join(revision);
        let write = || {
            fs::create_dir_all(self.folder.join("refs"))?;
            let new = NewFile::create(&path)?;
            new.file().write_all(commit.as_bytes())?;
            new.keep()
        };
        write().map_err(cannot("write", &path))
    }

    /// Whether a commit's file is there, whole.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    /// Whether it is known that the commit has no such file.
    pub fn is_absent(&self, commit: &str, file: &str) -> bool {
        self.absent(commit).join(file).exists()
    }

    pub fn note_absent(&self, commit: &str, file: &str) -> Result<()> {
        let folder = self.absent(commit);
        let path = folder.join(file);
        let write = || fs::create_dir_all(&folder).and_then(|()| File::create(&path));
        write().map(drop).map_err(cannot("write", &path))
    }

    fn absent(&self, commit: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit)
    }

    pub fn blob(&self, meta: &Meta) -> PathBuf {
        self.folder.join("blobs").join(&meta.etag)
    }

    /// Where a blob lies until it is whole.
    pub fn partial(&self, meta: &Meta) -> PathBuf {
        self.folder.join("blobs").join(format!("{}.incomplete", meta.etag))
    }

    /// Whether the blob is there. One of another length was damaged since it was downloaded.
    pub fn has_blob(&self, meta: &Meta) -> bool {
        fs::metadata(self.blob(meta)).is_ok_and(|found| found.is_file() && found.len() == meta.length)
    }

    /// How many bytes of a blob are on the disk.
    pub fn there(&self, meta: &Meta) -> u64 {
        if self.has_blob(meta) {
            return meta.length;
        }
        fs::metadata(self.partial(meta)).map_or(0, |found| found.len().min(meta.length))
    }

    /// Gives a commit's file its blob, which is whole.
    pub fn link(&self, commit: &str, file: &str, meta: &Meta) -> Result<()> {
        let (folder, target) = (self.snapshot(commit), Path::new("../../blobs").join(&meta.etag));
        let path = folder.join(file);
        let link = || {
            fs::create_dir_all(&folder)?;
            match symlink(&target, &path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if fs::read_link(&path).is_ok_and(|found| found == target) {
                        return Ok(());
                    }
                    fs::remove_file(&path)?;
                    symlink(&target, &path)
                }
                linked => linked,
            }
        };
        link().map_err(cannot("link", &path))
    }

    /// Waits until nobody else writes this blob, and keeps others from it until the lock is dropped.
    pub fn lock(&self, meta: &Meta, tell: impl Fn()) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", meta.etag));
        let lock = || {
            for folder in [&self.locks, &self.folder.join("blobs")] {
                fs::create_dir_all(folder)?;
            }
            loop {
                let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
                match file.try_lock() {
                    Ok(()) => {}
                    Err(fs::TryLockError::WouldBlock) => {
                        tell();
                        file.lock()?;
                    }
                    Err(fs::TryLockError::Error(error)) => return Err(error),
                }
                // Whoever had it may have removed it: then the next one would lock another file of this name.
                if fs::metadata(&path).is_ok_and(|found| file.metadata().is_ok_and(|own| own.ino() == found.ino())) {
                    return Ok(file);
                }
            }
        };
        lock().map_err(cannot("lock", &path))
    }

    /// Refuses a download of so many bytes where there is no room for them.
    pub fn check_space(&self, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let free = fs::create_dir_all(&self.folder).and_then(|()| files::free_bytes(&self.folder));
        let free = free.map_err(cannot("use", &self.folder))?;
        if bytes <= free { Ok(()) } else { Err(Error::NoRoom { folder: self.folder.clone(), needed: bytes, free }) }
    }
}

/// Whether a word can be the name of a file, and of nothing else.
pub fn is_plain(word: &str) -> bool {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !word.is_empty()
        && word.len() <= 200
        && !word.starts_with('.')
        && !word.contains("..")
        && word.bytes().all(is_legal)
}

/// Whether a revision is a commit's own name.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The variable's value, if it has one, as a path. A `~` that no shell has replaced is the user's folder.
fn path_of(variable: &str) -> Option<PathBuf> {
    let value = PathBuf::from(env::var_os(variable).filter(|value| !value.is_empty())?);
    match value.strip_prefix("~") {
        Ok(rest) => env::var_os("HOME").map(|home| Path::new(&home).join(rest)),
        Err(_) => Some(value),
    }
}

/// What huggingface_hub calls its home.
fn home() -> Option<PathBuf> {
    let cache = || path_of("XDG_CACHE_HOME").or_else(|| path_of("HOME").map(|home| home.join(".cache")));
    path_of("HF_HOME").or_else(|| cache().map(|cache| cache.join("huggingface")))
}

/// Where models of the hub are kept.
fn hub_folder() -> Result<PathBuf> {
    let folder = path_of("HF_HUB_CACHE").or_else(|| home().map(|home| home.join("hub")));
    folder
        .ok_or_else(|| Error::Variable("there is no place for models of the hub: set HF_HUB_CACHE to a folder".into()))
}

/// The user's token, and where it was found.
///
/// # Errors
/// Where the file that should have it cannot be read.
pub fn token() -> Result<Option<(String, String)>> {
    let trimmed = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    if let Some(token) = env::var("HF_TOKEN").ok().as_deref().and_then(trimmed) {
        return Ok(Some((token, "HF_TOKEN".into())));
    }
    let Some(path) = path_of("HF_TOKEN_PATH").or_else(|| home().map(|home| home.join("token"))) else {
        return Ok(None);
    };
    // An empty one is none, as it is to huggingface_hub.
    if fs::metadata(&path).is_ok_and(|file| file.len() == 0) {
        return Ok(None);
    }
    let text = files::read_small(&path, 4 << 10)?.unwrap_or_default();
    Ok(trimmed(&String::from_utf8_lossy(&text)).map(|token| (token, path.display().to_string())))
}
