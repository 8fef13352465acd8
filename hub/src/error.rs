use std::{
    io,
    path::{Path, PathBuf},
};

use indicatif::DecimalBytes;

use crate::Name;

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be fetched. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `HF_HUB_OFFLINE` is set, and the cache does not have all of the model.
    #[error(
        "{name} is not in the cache, or not all of it ({}), and HF_HUB_OFFLINE is set; download it with: HF_HUB_OFFLINE=0",
        folder.display()
    )]
    Offline {
        /// The model.
        name: Name,
        /// Its place in the cache.
        folder: PathBuf,
    },
    /// A variable of the environment has a value that cannot be used, or one is missing.
    #[error("{0}")]
    Variable(String),
    /// The hub does not answer at all.
    #[error("cannot reach {0}; check the network (HTTPS_PROXY, HF_ENDPOINT), or give a model's folder that is there")]
    Unreachable(String),
    /// A server is not who it says, as far as certificates tell.
    #[error("{0}")]
    Certificate(String),
    /// The hub gives no such model: it has none, or not to everyone.
    #[error("{0}")]
    Refused(String),
    /// What came makes no sense, is not what was announced, or did not come in any of the tries.
    #[error("{0}")]
    Answer(String),
    /// The repository has no model in a form that can be run.
    #[error("{0}")]
    NoModel(String),
    /// The disk has less room than the model takes.
    #[error(
        "{}: {} are missing: the model takes {} more, and {} are free; {ROOM}", folder.display(),
        DecimalBytes(needed.saturating_sub(*free)), DecimalBytes(*needed), DecimalBytes(*free)
    )]
    NoRoom {
        /// The model's place in the cache.
        folder: PathBuf,
        /// Bytes that are not there yet.
        needed: u64,
        /// Bytes that the file system has.
        free: u64,
    },
    /// The cache cannot be used, or not be written to.
    #[error("cannot {operation} {}: {source}{remedy}", path.display())]
    Cache {
        /// What was tried, as a verb: `lock`, `write`, …
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
        /// Begins with a semicolon or a colon; empty where the error says enough.
        remedy: String,
    },
    /// A small file cannot be read.
    #[error(transparent)]
    File(#[from] layer_streamer::Error),
}

pub(crate) const ROOM: &str = "free some, or set HF_HUB_CACHE to a folder with more room";

/// What failed in the cache, on what and why.
pub(crate) fn cannot(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        let remedy = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => format!("; {ROOM}"),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                "; set HF_HUB_CACHE to a folder that you may write to".into()
            }
            _ => String::new(),
        };
        Error::Cache { operation, path: path.to_owned(), source, remedy }
    }
}
