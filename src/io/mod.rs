//! The reader: files opened the fastest way they allow, and chunks read by an engine that keeps many in flight.
//!
//! How a file is read and who reads it are two questions. **How**: with O_DIRECT, past the page cache and straight into the
//! slot, if a trial read shows that the file can be read so; else buffered, and the reason is kept. Links may put every shard
//! on another file system, so each file is asked on its own. With [`CachePolicy::Auto`] a chunk that is wholly in the page
//! cache is taken from there, many times faster than the disk; a whole unit that is, and is kept and used in RAM as it is stored,
//! is not read at all but [mapped](MappedUnit). **Who**: the first backend that the system allows of io_uring with
//! registered buffers, io_uring, and threads in `pread`. An I/O error is an error, never a reason to step down.

mod blocks;
mod engine;
#[cfg(test)]
pub(crate) mod faults;
mod mapped;
mod pread;
mod uring;

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

pub(crate) use blocks::{BlockReader, ReadBlock};
pub(crate) use engine::Engine;
#[cfg(test)]
pub(crate) use mapped::HUGE;
pub(crate) use mapped::MappedUnit;

use crate::{
    arena::Arena,
    checkpoint::{Checkpoint, FileState},
    error::{Error, Result},
    layout::{Extent, PAGE},
    plan::CachePolicy,
    sync::STILL,
};

/// Bytes of one read request. Large enough that its fixed cost vanishes, small enough that many fill a queue.
pub(crate) const CHUNK: usize = 4 << 20;

/// A file of a checkpoint, opened for reading.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    /// What the file was when the checkpoint was opened.
    state: FileState,
    /// For reads past the page cache, or why there can be none.
    direct: Result<File, String>,
    buffered: File,
    policy: CachePolicy,
    /// A ring that is told of a read may make it at once, in the thread that tells it.
    blocks: bool,
    #[cfg(test)]
    faults: faults::Faults,
}

impl Source {
    fn open(path: &Path, state: FileState, policy: CachePolicy, trial: &Arena) -> Result<Self> {
        let buffered = File::open(path).map_err(Error::io("open", path))?;
        let direct = match policy {
            CachePolicy::Buffered => Err("asked for".into()),
            CachePolicy::Auto | CachePolicy::Direct => match try_direct(path, trial) {
                Ok(file) => Ok(file),
                // What file systems without O_DIRECT answer; anything else is an error.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    Err(format!("O_DIRECT refused: {error}"))
                }
                Err(error) => return Err(Error::io("read", path)(error)),
            },
        };
        // Another file by that name has its tensors elsewhere.
        std::iter::once(&buffered).chain(&direct).try_for_each(|file| state.check(file, path))?;
        Ok(Self {
            path: path.to_owned(),
            state,
            direct,
            blocks: is_fuse(&buffered),
            buffered,
            policy,
            #[cfg(test)]
            faults: faults::Faults::of_this_thread(),
        })
    }

    /// Whether the file is still the one that the checkpoint was opened with: see [`FileState::check`].
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.state.check(&self.buffered, &self.path)
    }

    /// Why every read goes through the page cache, if it does.
    pub(crate) fn why_buffered(&self) -> Option<&str> {
        self.direct.as_ref().err().map(String::as_str)
    }

    /// Whether to read these bytes past the page cache.
    fn prefers_direct(&self, offset: u64, len: usize) -> bool {
        self.direct.is_ok() && !(self.policy == CachePolicy::Auto && is_cached(&self.buffered, offset, len))
    }

    fn descriptor(&self, direct: bool) -> RawFd {
        self.direct.as_ref().ok().filter(|_| direct).unwrap_or(&self.buffered).as_raw_fd()
    }
}

/// Whether a program answers for the file system: then a read past the page cache, too, waits where it is asked for.
fn is_fuse(file: &File) -> bool {
    const FUSE_SUPER_MAGIC: u64 = 0x6573_5546;
    // SAFETY: a plain structure, which the call fills in.
    unsafe {
        let mut about: libc::statfs = std::mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &raw mut about) == 0 && about.f_type as u64 == FUSE_SUPER_MAGIC
    }
}

fn try_direct(path: &Path, trial: &Arena) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let start = Instant::now();
    loop {
        let to = trial.slot(0).as_ptr();
        // SAFETY: the slot is a page long and nobody else's.
        let result = unsafe { pread(file.as_raw_fd(), to, PAGE, 0) };
        #[cfg(test)]
        // SAFETY: the slot is a page long and nobody else's.
        let result = unsafe {
            let attempt = faults::Attempt { path, offset: 0, len: PAGE, trial: true, result };
            faults::Faults::of_this_thread().apply(attempt, to)
        };
        match result {
            Err(error) if is_passing(&error) && start.elapsed() < PATIENCE => thread::yield_now(),
            other => return other.map(|_| file),
        }
    }
}

/// Whether the same read may well succeed if it is made again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Whether the page cache holds all of these bytes of the file, as far as cachestat(2) (Linux 6.5) tells.
pub(crate) fn is_cached(file: &File, offset: u64, len: usize) -> bool {
    // Linux 6.18 was seen to leave out pages while others use them, a few times in a hundred; never all of three times.
    (0..3).any(|_| cached_pages(file, offset, len).is_some_and(|pages| pages >= len.div_ceil(PAGE) as u64))
}

/// How many pages of these bytes of the file the page cache holds; the last one of a file may be partial, and counts as one.
fn cached_pages(file: &File, offset: u64, len: usize) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let (range, mut counts) = (Range { offset, len: len as u64 }, Counts::default());
    // SAFETY: the structures are those of the call's manual page, and the descriptor is open.
    let rc = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut counts, 0) };
    (rc == 0).then_some(counts.cached)
}

/// # Safety
/// `to` points to `len` writable bytes.
unsafe fn pread(file: RawFd, to: *mut u8, len: usize, offset: u64) -> io::Result<usize> {
    // SAFETY: the caller promised that so many bytes may be written there.
    let count = unsafe { libc::pread(file, to.cast(), len, offset as libc::off_t) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Opens the files of a checkpoint, in its order.
pub(crate) fn open_all(checkpoint: &Checkpoint, policy: CachePolicy) -> Result<Arc<[Source]>> {
    let trial = Arena::new("a trial read", 1, PAGE)?;
    checkpoint.file_states().map(|(path, state)| Source::open(path, state, policy, &trial)).collect()
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
    /// Past the page cache.
    pub(crate) direct: bool,
    /// Given back with the result.
    pub(crate) tag: usize,
}

/// A chunk on its way, and how far it has come.
#[derive(Clone, Copy, Debug)]
struct Flight {
    chunk: Chunk,
    done: usize,
    /// As the chunk says, until that does not get on.
    direct: bool,
    /// Since when it is on its way.
    since: Instant,
    /// Since when the system has had no room for it.
    refused: Option<Instant>,
}

/// How long the system may have no room for a read, or for a call of io_uring, before that is an error.
const PATIENCE: Duration = Duration::from_secs(5);

impl Flight {
    fn new(chunk: Chunk) -> Self {
        Self { chunk, done: 0, direct: chunk.direct, since: Instant::now(), refused: None }
    }

    /// Where the next read starts, from the start of the chunk: at a page boundary, as O_DIRECT demands.
    fn start(&self) -> usize {
        if self.direct { self.done / PAGE * PAGE } else { self.done }
    }

    /// Reads the rest in this thread, as far as it comes.
    ///
    /// # Safety
    /// The chunk's memory is writable, and nobody else's until this returns.
    unsafe fn read(&self, source: &Source) -> io::Result<usize> {
        let (chunk, start, file) = (&self.chunk, self.start(), source.descriptor(self.direct));
        // SAFETY: start < len, so the rest of the range is the caller's to write.
        unsafe { pread(file, chunk.to.0.add(start), chunk.len - start, chunk.offset + start as u64) }
    }

    /// Takes the result of a read from [`start`](Self::start) on; `None` if there must be another. A count that covers `need`
    /// is success, short or not: extents are rounded past the end of the file.
    fn advance(&mut self, source: &Source, result: io::Result<usize>) -> Option<Result<usize, ReadFailure>> {
        let (start, chunk) = (self.start(), &self.chunk);
        #[cfg(test)]
        // SAFETY: the chunk is the engine's, and the read that brought the bytes has ended.
        let result = unsafe {
            let (offset, len) = (chunk.offset + start as u64, chunk.len - start);
            let attempt = faults::Attempt { path: &source.path, offset, len, trial: false, result };
            source.faults.apply(attempt, chunk.to.0.add(start))
        };
        #[cfg(not(test))]
        let _ = source;
        // Only what this read vouches for counts: it may have spoiled the bytes of the one before it that share its first page.
        let before = std::mem::replace(&mut self.done, start + *result.as_ref().unwrap_or(&0));
        match result {
            Ok(_) if self.done > before => self.refused = None,
            // The file ended inside a page, or the read was cut short there: a buffered read goes on from the very byte,
            // and tells.
            Ok(_) if self.direct => self.direct = false,
            Ok(_) => return Some(Err(ReadFailure { offset: chunk.offset + self.done as u64, errno: None })),
            // Whoever made the read looks up between two of them.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) if is_passing(&error) && self.refused.get_or_insert_with(Instant::now).elapsed() < PATIENCE => {
                thread::sleep(Duration::from_micros(200));
            }
            Err(error) => {
                return Some(Err(ReadFailure { offset: chunk.offset + start as u64, errno: error.raw_os_error() }));
            }
        }
        (self.done >= chunk.need).then_some(Ok(self.done))
    }
}

/// Why and where a read failed; no errno means that the file ended there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadFailure {
    pub(crate) offset: u64,
    pub(crate) errno: Option<i32>,
}

impl ReadFailure {
    /// The error of a unit, say, of which a read failed.
    pub(crate) fn of(self, unit: &str, tensor: &str, source: &Source) -> Error {
        Error::Read {
            unit: unit.to_owned(),
            tensor: tensor.to_owned(),
            path: source.path.clone(),
            offset: self.offset,
            source: self.source(),
        }
    }

    fn source(self) -> Arc<io::Error> {
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
    pub(crate) direct: bool,
    pub(crate) result: Result<usize, ReadFailure>,
    /// How long it took.
    took: Duration,
}

/// How long to wait for one of the reads under way to end, by the longest that any took: of many that a slow disk serves side by
/// side the first may come when all are nearly there.
fn patience(slowest: Duration) -> Duration {
    STILL.max(4 * slowest)
}

/// Cuts an extent whose slot starts at `slot` into chunks: the one at `position`.
///
/// # Safety
/// `slot` points to a slot that is large enough for the extent, and `position` is inside the extent.
pub(crate) unsafe fn chunk_at(source: &Source, extent: &Extent, position: usize, slot: *mut u8, tag: usize) -> Chunk {
    let part = extent.part(position, CHUNK);
    let Extent { file, offset, len, at, .. } = part;
    let need = part.needed();
    // SAFETY: the slot holds the extent from its `at` on, as the caller promised.
    let to = HostPtr(unsafe { slot.add(at) });
    Chunk { file, offset, len, need, to, direct: source.prefers_direct(offset, need), tag }
}
