//! The reader: files opened the fastest way they allow, and chunks read by an engine that keeps several in flight.
//!
//! A file is opened with O_DIRECT, past the page cache and straight into the slot, and proves with a trial read that it can
//! be read so; where its file system refuses, it is read buffered and the reason is kept. Links may put every shard on
//! another file system, so each file is asked on its own. An I/O error is an error, never a reason to fall back.

mod pread;

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

pub(crate) use pread::PreadThreads;

use crate::{
    arena::{Arena, PAGE},
    error::{Error, Result},
};

/// Bytes of one read request. Large enough that its fixed cost vanishes, small enough that several fill a queue.
pub(crate) const CHUNK: usize = 1 << 20;

/// A file of a checkpoint, opened for reading.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    file: File,
    /// `None` if reads go past the page cache, else why they do not.
    pub(crate) buffered: Option<String>,
}

impl Source {
    fn open(path: &Path, trial: &Arena) -> Result<Self> {
        let buffered = |reason: io::Error| -> Result<Self> {
            let file = File::open(path).map_err(Error::io("open", path))?;
            Ok(Self { path: path.to_owned(), file, buffered: Some(format!("O_DIRECT refused: {reason}")) })
        };
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return buffered(error),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        // SAFETY: the slot is a page long and nobody else's.
        match unsafe { pread(&file, trial.slot(0).as_ptr(), PAGE, 0) } {
            Ok(_) => Ok(Self { path: path.to_owned(), file, buffered: None }),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => buffered(error),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Reads one chunk. A count that covers `need` is success, short or not: extents are rounded past the end of the file.
    /// After any other short count the read goes on from the last page boundary, as O_DIRECT demands.
    ///
    /// # Safety
    /// `chunk.to` points to `chunk.len` writable bytes that are nobody else's until this returns.
    unsafe fn read(&self, chunk: &Chunk) -> Result<usize, Failure> {
        let mut done = 0;
        while done < chunk.need {
            let start = done / PAGE * PAGE;
            let offset = chunk.offset + start as u64;
            // SAFETY: start < len, so the rest of the range is the caller's to write.
            match unsafe { pread(&self.file, chunk.to.0.add(start), chunk.len - start, offset) } {
                Ok(count) if start + count > done => done = start + count,
                Ok(_) => return Err(Failure { offset: chunk.offset + done as u64, errno: None }),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure { offset, errno: error.raw_os_error() }),
            }
        }
        Ok(done)
    }
}

/// # Safety
/// `to` points to `len` writable bytes.
unsafe fn pread(file: &File, to: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
    // SAFETY: the caller's; the descriptor is open for the life of `file`.
    let count = unsafe { libc::pread(file.as_raw_fd(), to.cast(), len, offset as libc::off_t) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Opens `paths`, in that order.
pub(crate) fn open_all(paths: &[PathBuf]) -> Result<Arc<[Source]>> {
    let trial = Arena::new("a trial read", 1, PAGE)?;
    paths.iter().map(|path| Source::open(path, &trial)).collect()
}

/// An address in a host slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostPtr(pub(crate) *mut u8);

// SAFETY: an address is plain data; whoever writes through it answers for the access.
unsafe impl Send for HostPtr {}

/// A read request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    pub(crate) file: usize,
    /// A multiple of the page size, as are `to` and `len`.
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// How many of the bytes must come; the rest is rounding.
    pub(crate) need: usize,
    pub(crate) to: HostPtr,
    /// Given back with the result.
    pub(crate) tag: usize,
}

/// Why and where a read failed; no errno means that the file ended there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) offset: u64,
    pub(crate) errno: Option<i32>,
}

impl Failure {
    pub(crate) fn source(self) -> Arc<io::Error> {
        Arc::new(match self.errno {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends here"),
        })
    }
}

/// The result of a read request: the bytes read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) tag: usize,
    pub(crate) file: usize,
    pub(crate) result: Result<usize, Failure>,
}

/// Cuts an extent whose slot starts at `slot` into chunks: the one at `position`, if the extent is that long.
///
/// # Safety
/// `slot` points to a slot that is large enough for the extent.
pub(crate) unsafe fn chunk_at(
    extent: &crate::plan::Extent,
    position: usize,
    slot: *mut u8,
    tag: usize,
) -> Option<Chunk> {
    if position >= extent.len {
        return None;
    }
    let offset = extent.offset + position as u64;
    let len = CHUNK.min(extent.len - position);
    let need = (extent.end - offset).min(len as u64) as usize;
    // SAFETY: position < len, and the slot holds the extent from `at` on.
    let to = HostPtr(unsafe { slot.add(extent.at + position) });
    Some(Chunk { file: extent.file, offset, len, need, to, tag })
}
