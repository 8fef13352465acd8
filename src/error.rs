//! The one error type: what was tried, where, why it failed, and what to do about it.

use std::{fmt, io, path::PathBuf, sync::Arc};

use serde::Serialize;

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Cheap to clone, so that the first error of a pass can be kept and returned.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operating system call on a file failed.
    #[error("cannot {operation} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried, as a verb: `open`, `read`, …
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// A checkpoint, or a table standing for one, is malformed.
    #[error("{}: {}{cause}", path.display(), tensor_prefix(tensor))]
    Checkpoint {
        /// The shard, index or configuration at fault.
        path: PathBuf,
        /// The tensor at fault, where there is one.
        tensor: Option<String>,
        /// What is wrong with it.
        cause: String,
    },
    /// A read of a unit failed while it streamed.
    #[error(
        "unit {unit}: cannot read tensor {tensor} from {} at byte {offset}: {source}{}", path.display(), remedy(source)
    )]
    Read {
        /// The unit (layer) that was being read.
        unit: String,
        /// The first tensor that the failing read belongs to.
        tensor: String,
        /// The shard.
        path: PathBuf,
        /// Where the read failed, in bytes from the start of the file.
        offset: u64,
        /// The operating system's error; `UnexpectedEof` if the file became shorter than it was when opened.
        source: Arc<io::Error>,
    },
    /// A setting or argument is out of range.
    #[error("{name}: {cause}")]
    Setting {
        /// The setting or argument, as the caller spells it.
        name: &'static str,
        /// What it must be, and what it was.
        cause: String,
    },
    /// A budget of memory is less than the least that will do.
    #[error(
        "{}: {given} bytes of {memory} are less than the least that will do, {least}; allow that much, or {remedy}",
        memory.option()
    )]
    TooLittle {
        /// Which memory that is.
        memory: MemoryKind,
        /// What was allowed, in bytes.
        given: usize,
        /// What would do, in bytes: of the device's memory, or of RAM where as much of that is allowed as is now.
        least: usize,
        /// What makes the least smaller.
        remedy: &'static str,
    },
    /// Memory could not be had.
    #[error("cannot reserve {bytes} bytes for {what}: {source}; use smaller settings or free memory")]
    Memory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for, in bytes.
        bytes: usize,
        /// How much could be had, in bytes, where it is known that this is less.
        free: Option<usize>,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// The KV cache has too few free pages for a batch.
    #[error(
        "the batch takes {needed} more pages of the KV cache, {available} are free; give fewer tokens, truncate a sequence, or give \
         the cache more tokens"
    )]
    Pages {
        /// How many pages the batch takes besides those that its sequences have.
        needed: usize,
        /// How many no sequence has.
        available: usize,
    },
    /// A thread could not be started.
    #[error(
        "cannot start the {stage} thread: {source}; raise the limit on processes (ulimit -u) or memory (ulimit -v)"
    )]
    Thread {
        /// The pipeline stage that the thread was for.
        stage: &'static str,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// A name that the unit, or the set of static tensors, does not have.
    #[error("{unit} has no tensor named {tensor}; it has {known}")]
    NoTensor {
        /// The unit, or "the static tensors".
        unit: String,
        /// The name asked for.
        tensor: String,
        /// The names there are.
        known: String,
    },
    /// More layers are held than the settings allow.
    #[error(
        "cannot take another layer: {held} are held already, the oldest is {oldest}; release a layer or raise n_gpu"
    )]
    LayersHeld {
        /// How many are held: `n_gpu` of them.
        held: usize,
        /// The one taken first.
        oldest: String,
    },
    /// A layer was leaked (`mem::forget`) instead of released, so its slot can never be filled again.
    #[error("layer {layer} was taken and never released; drop or release each layer before the next pass")]
    LayerLeaked {
        /// The layer's name.
        layer: String,
    },
    /// Device or disk did not answer when a streamer was closed, and may use its memory still.
    #[error(
        "device or disk did not answer when the streamer was closed: {bytes} bytes stay reserved, and what was lent must stay as it is; \
         end the process to have them back"
    )]
    Leaked {
        /// Of RAM and of the device's memory.
        bytes: usize,
    },
    /// As many requests wait as may.
    #[error("{waiting} requests wait already: try again later, or allow more")]
    Busy {
        /// How many that are.
        waiting: usize,
    },
    /// The pass was cancelled from another thread.
    #[error("the pass was cancelled; the next one starts afresh")]
    Cancelled,
    /// A kernel was given tensors that do not fit together.
    #[error("{kernel}: {cause}")]
    Kernel {
        /// The kernel.
        kernel: &'static str,
        /// Which shapes or types disagree.
        cause: String,
    },
    /// The CUDA runtime, or a kernel, failed.
    #[error("cannot {operation}: {name} ({message}){}", after_semicolon(remedy))]
    Cuda {
        /// What was tried, as a verb with its object. Work fails after it was enqueued, so that an earlier kernel may be at fault.
        operation: String,
        /// The code's name, such as `cudaErrorMemoryAllocation`.
        name: &'static str,
        /// What the runtime says about it.
        message: &'static str,
        /// What to do about it; empty where that is not known.
        remedy: String,
    },
    /// Something this build or machine cannot do.
    #[error("{what} is not supported: {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        remedy: String,
    },
    /// A pipeline thread panicked: a bug in this crate. The streamer can only be dropped.
    #[error("the {stage} thread panicked: {message}; this is a bug, please report it")]
    Panicked {
        /// The stage whose thread it was.
        stage: &'static str,
        /// The panic's message.
        message: String,
    },
}

/// The memory that a budget is for. Prints in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// The device's own.
    Device,
    /// RAM, beside a device that has memory of its own.
    Ram,
    /// RAM, in which the device computes too.
    Shared,
}

impl MemoryKind {
    /// Its budget, as the program's options spell it.
    fn option(self) -> &'static str {
        match self {
            Self::Device => "vram",
            Self::Ram | Self::Shared => "ram",
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device memory",
            Self::Ram => "RAM",
            Self::Shared => "RAM, in which this device computes too,",
        })
    }
}

impl Error {
    /// An [`Error::Io`], for `map_err`.
    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { operation, path, source: Arc::new(source) }
    }

    /// An [`Error::Setting`].
    pub(crate) fn setting(name: &'static str, cause: impl Into<String>) -> Error {
        Error::Setting { name, cause: cause.into() }
    }

    /// An [`Error::Checkpoint`] about the file as a whole.
    pub(crate) fn checkpoint(path: impl Into<PathBuf>, cause: impl Into<String>) -> Error {
        Error::Checkpoint { path: path.into(), tensor: None, cause: cause.into() }
    }

    /// An [`Error::Checkpoint`] about one tensor.
    pub(crate) fn tensor(path: impl Into<PathBuf>, tensor: &str, cause: impl Into<String>) -> Error {
        Error::Checkpoint { path: path.into(), tensor: Some(tensor.to_owned()), cause: cause.into() }
    }
}

fn tensor_prefix(tensor: &Option<String>) -> String {
    tensor.as_ref().map(|name| format!("tensor {name}: ")).unwrap_or_default()
}

fn after_semicolon(remedy: &str) -> String {
    if remedy.is_empty() { String::new() } else { format!("; {remedy}") }
}

/// What a person can do about an operating system's error, where that is known.
fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE) => "; raise the limit on open files (ulimit -n)",
        Some(libc::EAGAIN) => "; raise the limit on processes (ulimit -u)",
        Some(libc::EIO) => "; the disk or its file system failed, see the kernel log",
        Some(libc::ENOSPC) => "; free some space",
        None if source.kind() == io::ErrorKind::UnexpectedEof => {
            "; the file became shorter while it was in use, restore it and open the checkpoint again"
        }
        _ => "",
    }
}
