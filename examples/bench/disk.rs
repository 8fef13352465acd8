//! The raw reader: nothing but reads of the same files, in each way that a program may try.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, squeue, types};
use memmap2::MmapRaw;

use super::{Failure, Moved, clock, memory, units};

/// The most reads at once, and the most bytes of each.
const MAX_DEPTH: usize = 32;
const MAX_CHUNK: usize = 4 << 20;

/// What reads go round in, chunk after chunk. Slots do not fit into a cache, and whoever brings the bytes there (in a virtual
/// machine the host copies them) is faster if its target does: such a limit would be one for data that nobody keeps.
const MEMORY: usize = 512 << 20;

const PAGE: u64 = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// A way of reading.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// One thread with an io_uring, or as many threads in `pread` as there are reads at once.
    pub uring: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// Reads at once.
    pub depth: usize,
    /// Bytes of a read.
    pub chunk: usize,
}

impl Way {
    pub fn engine(self) -> &'static str {
        if self.uring { "io_uring" } else { "pread" }
    }

    pub fn cache(self) -> &'static str {
        if self.direct { "O_DIRECT" } else { "buffered" }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { depth, chunk, .. } = self;
        write!(f, "raw {} reads, {}, {depth} × {}", self.cache(), self.engine(), units::bytes(*chunk as u64))
    }
}

struct Source {
    path: PathBuf,
    length: u64,
    buffered: File,
    direct: io::Result<File>,
}

impl Source {
    fn descriptor(&self, direct: bool) -> RawFd {
        self.direct.as_ref().ok().filter(|_| direct).unwrap_or(&self.buffered).as_raw_fd()
    }
}

/// Files, and memory to read them into.
pub struct Disk {
    files: Vec<Source>,
    /// The same kind as the pipeline's: huge pages make a read's list of segments short.
    memory: MmapRaw,
    /// Where the next window goes on, in bytes from the start of the first file.
    at: AtomicU64,
    /// Why there is no io_uring, if there is none.
    pub without_uring: Option<String>,
}

/// What the readers of one window share.
struct Shared {
    way: Way,
    /// Of the chunk that is read next.
    next: AtomicU64,
    read: AtomicU64,
    /// Reads that have ended.
    ended: AtomicUsize,
    cached: AtomicU64,
    over: AtomicBool,
    failed: Mutex<Option<Failure>>,
}

/// A read of one chunk, and how many of its bytes the page cache held when it was asked for.
#[derive(Clone, Copy)]
struct Read<'d> {
    file: &'d Source,
    offset: u64,
    cached: u64,
    /// The buffer to read into.
    to: usize,
}

impl Read<'_> {
    /// Counts what came, or says why nothing did.
    fn done(self, result: io::Result<u64>, shared: &Shared) -> Result<(), Failure> {
        let count = result.map_err(|error| unreadable(self.file, self.offset, error))?;
        shared.read.fetch_add(count, Relaxed);
        shared.cached.fetch_add(self.cached, Relaxed);
        shared.ended.fetch_add(1, Relaxed);
        Ok(())
    }
}

impl Disk {
    /// Opens regular files that hold at least a byte.
    pub fn open(paths: &[PathBuf]) -> Result<Self, Failure> {
        let files = paths.iter().map(|path| {
            let named = |what: &str, error: &dyn fmt::Display| format!("cannot {what} {}: {error}", path.display());
            let about = fs::metadata(path).map_err(|e| named("open", &e))?;
            if !about.is_file() {
                return Err(format!("{}: is no regular file; name files on the disk to measure", path.display()));
            }
            if about.len() == 0 {
                return Err(format!("{}: is empty; name files with bytes to read", path.display()));
            }
            let buffered = File::open(path).map_err(|e| named("open", &e))?;
            // SAFETY: the descriptor is open. Each read then fetches what it asks for and no more, so that rows of a
            // table differ by depth and chunk alone; a kernel that takes no advice reads ahead.
            unsafe { libc::posix_fadvise(buffered.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
            let direct = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
            Ok(Source { path: path.clone(), length: about.len(), buffered, direct })
        });
        let files = files.collect::<Result<_, _>>()?;
        let memory = memory(MEMORY + HUGE_PAGE)?;
        let without_uring = IoUring::new(1).err().map(|error| format!("io_uring refused: {error}"));
        Ok(Self { files, memory, at: AtomicU64::new(0), without_uring })
    }

    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.length).sum()
    }

    /// Why there are no reads past the page cache, if there are none.
    pub fn without_direct(&self) -> Option<String> {
        let refused =
            |file: &Source| Some(format!("{}: O_DIRECT refused: {}", file.path.display(), file.direct.as_ref().err()?));
        self.files.iter().find_map(refused)
    }

    /// The ways that this machine allows, with these depths and chunks.
    pub fn ways(&self, direct: bool, depths: &[usize], chunks: &[usize]) -> Vec<Way> {
        let engines = [false, true].into_iter().filter(|uring| !uring || self.without_uring.is_none());
        let way = |uring, depth, chunk| Way { uring, direct, depth, chunk };
        engines
            .flat_map(|uring| {
                chunks.iter().flat_map(move |&chunk| depths.iter().map(move |&depth| way(uring, depth, chunk)))
            })
            .collect()
    }

    /// The fastest way, past the page cache or through it. The first third of the time uses up what the disk had saved
    /// up while idle, and counts for nothing; the second goes to all ways, and the last to the four best again, since the pick of
    /// many short windows is often a lucky one. An error of `go_on`, which is asked before each window, ends it.
    pub fn fastest(
        &self,
        direct: bool,
        time: Duration,
        go_on: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<Way, Failure> {
        let ways = self.ways(direct, &[4, 8, 16, MAX_DEPTH], &[1 << 20, MAX_CHUNK]);
        for _ in 0..10 {
            go_on()?;
            self.window(ways[2], time / 30)?;
        }
        let best_first = |ways: &[Way]| -> Result<Vec<Way>, Failure> {
            let rate = |way: &Way| {
                go_on()?;
                Ok((self.window(*way, time / 3 / ways.len() as u32)?.0.rate(), *way))
            };
            let mut rated = ways.iter().map(rate).collect::<Result<Vec<_>, Failure>>()?;
            rated.sort_by(|a, b| b.0.total_cmp(&a.0));
            Ok(rated.into_iter().map(|(_, way)| way).collect())
        };
        let ways = best_first(&ways)?;
        Ok(best_first(&ways[..4])?[0])
    }

    /// Reads for this long, from when it is at full depth, and until a read has ended. Returns with what it moved how much of it the page cache held when
    /// it was asked for.
    pub fn window(&self, way: Way, window: Duration) -> Result<(Moved, u64), Failure> {
        self.window_between(way, window, || Ok(()), || Ok(()))
    }

    /// As [`window`](Self::window); it is reading already while `before` runs, and still while `after` does, and
    /// neither counts: so the disk is not idle while the pipeline comes to rest before, or sets off again after.
    pub fn window_between(
        &self,
        way: Way,
        window: Duration,
        before: impl FnOnce() -> Result<(), Failure>,
        after: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(Moved, u64), Failure> {
        let shared = Shared {
            way,
            next: AtomicU64::new(self.at.load(Relaxed) / way.chunk as u64),
            read: AtomicU64::new(0),
            ended: AtomicUsize::new(0),
            cached: AtomicU64::new(0),
            over: AtomicBool::new(false),
            failed: Mutex::new(None),
        };
        let moved = thread::scope(|scope| {
            for _ in 0..if way.uring { 1 } else { way.depth } {
                let shared = &shared;
                scope.spawn(move || {
                    let outcome = if way.uring { self.read_uring(shared) } else { self.read_pread(shared) };
                    if let Err(error) = outcome {
                        *shared.failed.lock().expect("no thread panics") = Some(error);
                    }
                });
            }
            // Until as many reads have ended as there are at once: setting up a ring takes longer than many a read, and what
            // is under way when the window ends counts as little as what was still to be asked for when it began.
            let failed = || shared.failed.lock().expect("no thread panics").is_some();
            while shared.ended.load(Relaxed) < way.depth && !failed() {
                thread::sleep(Duration::from_millis(1));
            }
            let measured = before().and_then(|()| {
                let totals = || (shared.read.load(Relaxed), shared.cached.load(Relaxed));
                let ((bytes, cached), start, cpu) = (totals(), Instant::now(), clock::process());
                thread::sleep(window);
                // On a machine that is busy otherwise a short window may see no read end.
                while shared.read.load(Relaxed) == bytes && !failed() {
                    thread::sleep(Duration::from_millis(1));
                }
                let (now, seconds, cpu_seconds) = (totals(), start.elapsed().as_secs_f64(), clock::process() - cpu);
                after()?;
                Ok((Moved { bytes: now.0 - bytes, seconds, cpu_seconds }, now.1 - cached))
            });
            shared.over.store(true, Relaxed);
            measured
        });
        self.at.store(shared.next.load(Relaxed) * way.chunk as u64, Relaxed);
        match shared.failed.into_inner().expect("no thread panics") {
            Some(error) => Err(error),
            None => moved,
        }
    }

    /// The next chunk, round and round.
    fn next(&self, shared: &Shared) -> Read<'_> {
        let chunk = shared.way.chunk as u64;
        let total: u64 = self.files.iter().map(|file| file.length.div_ceil(chunk)).sum();
        let number = shared.next.fetch_add(1, Relaxed);
        let mut index = number % total;
        let file = self.files.iter().find(|file| {
            let chunks = file.length.div_ceil(chunk);
            let found = index < chunks;
            index -= if found { 0 } else { chunks };
            found
        });
        let (file, offset) = (file.expect("the index is below the total"), index * chunk);
        let len = chunk.min(file.length - offset);
        let cached = if shared.way.direct { None } else { cached(&file.buffered, offset, len) };
        // So many chunks later nobody reads into this buffer any more.
        let to = number as usize % (MEMORY / shared.way.chunk);
        Read { file, offset, cached: cached.unwrap_or(0), to }
    }

    /// The first byte of buffer `number`, on a huge page's boundary if chunks are that large.
    fn buffer(&self, way: Way, number: usize) -> *mut u8 {
        let start = self.memory.as_mut_ptr();
        start.wrapping_add(start.align_offset(HUGE_PAGE) + number * way.chunk)
    }

    fn read_pread(&self, shared: &Shared) -> Result<(), Failure> {
        let Shared { way, .. } = *shared;
        while !shared.over.load(Relaxed) {
            let read = self.next(shared);
            let (descriptor, to) = (read.file.descriptor(way.direct), self.buffer(way, read.to));
            // SAFETY: the buffer is a chunk long, and its bytes mean nothing to anyone.
            let count = unsafe { libc::pread(descriptor, to.cast(), way.chunk, read.offset as libc::off_t) };
            read.done(u64::try_from(count).map_err(|_| io::Error::last_os_error()), shared)?;
        }
        Ok(())
    }

    fn read_uring(&self, shared: &Shared) -> Result<(), Failure> {
        let Shared { way, .. } = *shared;
        let mut ring = IoUring::new(way.depth as u32)?;
        let whole = libc::iovec { iov_base: self.buffer(way, 0).cast(), iov_len: MEMORY };
        // SAFETY: the memory outlives the ring. Where the limit on locked memory forbids it, reads go without.
        let fixed = unsafe { ring.submitter().register_buffers(&[whole]) }.is_ok();
        let mut under_way = vec![None; way.depth];
        let mut failed = None;
        loop {
            let over = shared.over.load(Relaxed) || failed.is_some();
            for number in (0..way.depth).filter(|_| !over) {
                if under_way[number].is_some() {
                    continue;
                }
                let read = self.next(shared);
                let (to, len) = (self.buffer(way, read.to), way.chunk as u32);
                let descriptor = types::Fd(read.file.descriptor(way.direct));
                let entry = if fixed {
                    opcode::ReadFixed::new(descriptor, to, len, 0).offset(read.offset).build()
                } else {
                    opcode::Read::new(descriptor, to, len).offset(read.offset).build()
                };
                // A read from the page cache copies while it is submitted: the kernel's own threads do that side by
                // side.
                let flags = if way.direct { squeue::Flags::empty() } else { squeue::Flags::ASYNC };
                // SAFETY: the buffer is a chunk long, and stays until it comes back: the loop ends with none under way.
                unsafe { ring.submission().push(&entry.user_data(number as u64).flags(flags)) }
                    .expect("the queue has a place for every buffer");
                under_way[number] = Some(read);
            }
            if under_way.iter().all(Option::is_none) {
                return failed.map_or(Ok(()), Err);
            }
            match ring.submit_and_wait(1).map_err(|error| error.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                // The kernel may still write into memory that would be someone else's soon.
                Err(_) => std::process::abort(),
            }
            for done in ring.completion() {
                let read: Option<Read> = under_way[done.user_data() as usize].take();
                let count = u64::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
                failed = read.and_then(|read| read.done(count, shared).err()).or(failed);
            }
        }
    }

    /// Compares samples of every file, read past the page cache, with plain reads.
    pub fn check(&self) -> Result<(), Failure> {
        let chunk = 1 << 20;
        let mut plain = vec![0; chunk];
        for file in self.files.iter().filter(|file| file.direct.is_ok()) {
            let chunks = file.length.div_ceil(chunk as u64);
            for sample in 0..chunks.min(8) {
                // The first and the last chunk are among them.
                let offset = sample * (chunks - 1) / (chunks.min(8) - 1).max(1) * chunk as u64;
                let to = self.buffer(Way { uring: false, direct: true, depth: 1, chunk }, 0);
                // SAFETY: the buffer is a chunk long, and nobody else's outside a window.
                let count = unsafe { libc::pread(file.descriptor(true), to.cast(), chunk, offset as libc::off_t) };
                let len = (chunk as u64).min(file.length - offset) as usize;
                if usize::try_from(count) != Ok(len) {
                    return Err(unreadable(file, offset, io::Error::last_os_error()));
                }
                file.buffered.read_exact_at(&mut plain[..len], offset).map_err(|e| unreadable(file, offset, e))?;
                // SAFETY: this many bytes were read into it.
                if plain[..len] != *unsafe { std::slice::from_raw_parts(to, len) } {
                    let path = file.path.display();
                    return Err(format!("{path}: O_DIRECT and the page cache differ from byte {offset} on").into());
                }
            }
        }
        Ok(())
    }
}

fn unreadable(file: &Source, offset: u64, error: io::Error) -> Failure {
    format!("cannot read {} at byte {offset}: {error}", file.path.display()).into()
}

/// How many of these bytes the page cache holds, if cachestat(2) (Linux 6.5) tells.
fn cached(file: &File, offset: u64, len: u64) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let (range, mut counts) = ([offset, len], [0u64; 5]);
    // SAFETY: the structures of the call's manual page are two and five numbers of 64 bits, and the descriptor is open.
    let rc = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    (rc == 0).then(|| (counts[0] * PAGE).min(len))
}

/// Files, and how much of each the page cache held at first.
pub struct CachedFiles(Vec<(File, u64, u64)>);

impl CachedFiles {
    /// `None` where the system cannot tell.
    pub fn note(paths: &[PathBuf]) -> Result<Option<Self>, Failure> {
        let mut noted = Vec::new();
        for path in paths {
            let file = File::open(path).map_err(|error| format!("cannot open {}: {error}", path.display()))?;
            let length = file.metadata()?.len();
            let Some(cached) = cached(&file, 0, length) else { return Ok(None) };
            noted.push((file, length, cached));
        }
        Ok(Some(Self(noted)))
    }

    /// Bytes that the page cache held.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(_, _, cached)| cached).sum()
    }

    /// Takes files out of the page cache again that were mostly not in it: a check has read them, which must not make
    /// what is measured next faster.
    pub fn restore(&self) {
        for (file, _, _) in self.0.iter().filter(|(_, length, cached)| 2 * cached < *length) {
            // SAFETY: the descriptor is open. Without effect on other programs' data: these pages are clean.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
    }
}
