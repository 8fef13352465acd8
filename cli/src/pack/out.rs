//! The file that is written. A thread writes it past the page cache, so that whoever fills the next chunk need not wait.

use std::{
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use memmap2::MmapMut;

/// What O_DIRECT asks of memory addresses, file offsets and lengths.
const PAGE: usize = 4096;
/// Bytes of one write: large enough that the disk, not the system call, sets the pace.
const CHUNK: usize = 4 << 20;
/// One is being filled, one written, one on its way.
const BUFFERS: usize = 3;

/// Bytes, how many they are, and where they belong.
type Chunk = (MmapMut, usize, u64);

pub struct Out {
    file: File,
    full: Sender<Chunk>,
    /// Buffers that were written, or why one was not.
    free: Receiver<io::Result<MmapMut>>,
    writer: JoinHandle<()>,
    written: Arc<AtomicU64>,
    buffer: MmapMut,
    /// Where the buffer begins in the file, and how much of it is filled.
    start: u64,
    filled: usize,
}

impl Out {
    /// Writes from `at` on. What the file has before that stays.
    pub fn open(path: &Path, at: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let direct = File::options().write(true).custom_flags(libc::O_DIRECT).open(path);
        let direct = direct.or_else(|_| file.try_clone())?;
        let (full, chunks) = mpsc::channel::<Chunk>();
        let (give_back, free) = mpsc::channel();
        for _ in 1..BUFFERS {
            // The receiver is there.
            let _ = give_back.send(MmapMut::map_anon(CHUNK));
        }
        let written = Arc::new(AtomicU64::new(at));
        let (progress, cached) = (written.clone(), file.try_clone()?);
        let write = move || {
            for (buffer, length, at) in chunks {
                let bytes = &buffer[..length];
                let done = match direct.write_all_at(bytes, at) {
                    // The file system has no such writes.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => cached.write_all_at(bytes, at),
                    done => done,
                };
                let is_last = done.is_err();
                if !is_last {
                    progress.store(at + length as u64, Relaxed);
                }
                // Nobody waits for it in the end.
                let _ = give_back.send(done.map(|()| buffer));
                if is_last {
                    break;
                }
            }
        };
        let writer = thread::Builder::new().name("write".into()).spawn(write)?;
        let start = at - at % PAGE as u64;
        let mut buffer = MmapMut::map_anon(CHUNK)?;
        let filled = (at - start) as usize;
        match file.read_exact_at(&mut buffer[..filled], start) {
            // A new file: the header comes last.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => buffer[..filled].fill(0),
            done => done?,
        }
        Ok(Self { file, full, free, writer, written, buffer, start, filled })
    }

    /// Where the next bytes go.
    pub fn at(&self) -> u64 {
        self.start + self.filled as u64
    }

    /// Up to there the file has what was written, whatever ends the process.
    pub fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.filled));
            self.buffer[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == CHUNK {
                self.pass_on()?;
            }
        }
        Ok(())
    }

    /// Gives the buffer to the thread, and takes another.
    fn pass_on(&mut self) -> io::Result<()> {
        let next = self.free.recv().map_err(|_| io::Error::other("the thread that writes is gone"))??;
        let buffer = std::mem::replace(&mut self.buffer, next);
        let length = self.filled.next_multiple_of(PAGE);
        let _ = self.full.send((buffer, length, self.start));
        (self.start, self.filled) = (self.start + self.filled as u64, 0);
        Ok(())
    }

    /// Waits for what is on its way.
    pub fn wait(mut self) -> io::Result<File> {
        if self.filled > 0 {
            let filled = self.filled;
            self.buffer[filled..].fill(0);
            self.pass_on()?;
        }
        let Self { file, full, free, writer, .. } = self;
        drop(full);
        writer.join().map_err(|_| io::Error::other("the thread that writes panicked"))?;
        free.into_iter().try_for_each(|written| written.map(drop))?;
        Ok(file)
    }
}

/// Puts a header before what was written. From then on the disk has the whole file, of `end` bytes, and only the disk.
pub fn finish(file: &File, header: &[u8], end: u64) -> io::Result<()> {
    file.write_all_at(header, 0)?;
    file.set_len(end)?;
    file.sync_all()?;
    // What is read back comes from the disk, not from the page cache.
    // SAFETY: the descriptor is open; the call takes no pointers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}
