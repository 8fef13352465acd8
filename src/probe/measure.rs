//! Measuring: windows of reads and of copies, in rounds.

use std::{
    mem,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    judge::{Judgement, ProbeRound, judge},
    load::{KernelCounts, OtherLoad},
};
use crate::{
    arena::Arena,
    checkpoint::Checkpoint,
    device::{Device, DevicePtr},
    error::Result,
    io::{self, BlockReader, CHUNK, ReadBlock, Source},
    layout::Extent,
    plan::{CachePolicy, Reader},
};

/// How long a round reads and how long it copies; reads and copies under way are waited for.
pub(super) const DISK_TIME: Duration = Duration::from_millis(300);
pub(super) const COPY_TIME: Duration = Duration::from_millis(100);

/// The least length of a window. A window of reads also holds as many reads as are in flight at once.
const DISK_WINDOW: Duration = Duration::from_millis(40);
const COPY_WINDOW: Duration = Duration::from_millis(15);

/// The windows of reads that a round tries to fill. For a slow disk it goes on for twice `DISK_TIME` to get them.
const DISK_WINDOWS: usize = 3;

/// A disturbed probe goes on: so many rounds at most, of which none starts later than this.
const ROUNDS: usize = 3;
const LAST_START: Duration = Duration::from_millis(850);

/// Chunks of memory to read to and copy from. They keep a disk busy, are prefaulted quickly, and take less than what a process is
/// allowed beside its budget.
pub(super) const BLOCKS: usize = 8;

/// Copies that are enqueued at once, so that one wait for them costs next to nothing.
const COPIES: usize = 8;

/// Reads from file number `file` and copies to the device until one round is calm, or time is up.
pub(super) fn measure<D: Device>(device: &D, checkpoint: &Checkpoint, file: usize) -> Result<Judgement> {
    device.bind_thread()?;
    let blocks = Arc::new(Arena::new("a probe of disk and link", BLOCKS, CHUNK)?);
    let sources = io::open_all(checkpoint, CachePolicy::Direct)?;
    let mut disk = Disk::new(&sources, file, checkpoint.length(file), &blocks)?;
    let link = CopyLink::new(device, &blocks)?;
    let judged = rounds(&sources[file].path, &mut disk, &link);
    // Reads and copies that are under way end here, or what they use is left to them.
    drop(disk);
    if judged.is_err() && device.drain(&link.stream).is_err() {
        mem::forget(link);
        mem::forget(blocks);
    }
    judged
}

fn rounds<D: Device>(path: &Path, disk: &mut Disk<'_>, link: &CopyLink<'_, D>) -> Result<Judgement> {
    let (start, mut rounds) = (Instant::now(), Vec::new());
    loop {
        let before = KernelCounts::now(path);
        let (reads, bytes) = disk.round()?;
        let copies = link.round()?;
        let load = OtherLoad::between(&before, &KernelCounts::now(path), bytes);
        rounds.push(ProbeRound { disk: reads, copy: copies, disturbed: load.disturbance() });
        let verdict = judge(&rounds);
        if verdict.disturbed.is_none() || rounds.len() == ROUNDS || start.elapsed() > LAST_START {
            return Ok(verdict);
        }
    }
}

/// Reads one file from the start on, and over again.
struct Disk<'a> {
    reader: BlockReader<()>,
    source: &'a Source,
    file: usize,
    length: u64,
    at: u64,
}

impl<'a> Disk<'a> {
    fn new(sources: &'a Arc<[Source]>, file: usize, length: u64, blocks: &Arc<Arena>) -> Result<Self> {
        let reader = BlockReader::new(Reader::Auto, sources, blocks, BLOCKS)?;
        Ok(Self { reader, source: &sources[file], file, length, at: 0 })
    }

    /// The rates of a round's windows (bytes per second), and all bytes that were read in it.
    fn round(&mut self) -> Result<(Vec<f64>, u64)> {
        let (start, mut bytes, mut rates) = (Instant::now(), 0, Vec::new());
        // Begins when the first reads have come: the queue is full from then on.
        let mut window: Option<Window> = None;
        loop {
            let time = if rates.len() < DISK_WINDOWS { 2 * DISK_TIME } else { DISK_TIME };
            while start.elapsed() < time && self.reader.has_room() {
                self.submit();
            }
            let mut came = self.reader.next(|_, _| Ok(()))?;
            if came.is_none() {
                if rates.is_empty() {
                    rates.push(bytes as f64 / start.elapsed().as_secs_f64());
                }
                return Ok((rates, bytes));
            }
            let mut reads = 0;
            while let Some(ReadBlock { block, result, .. }) = came {
                self.reader.free(block);
                reads += 1;
                bytes += result.map_err(|failure| failure.of("a probe", "", self.source))? as u64;
                came = self.reader.ended();
            }
            // Looked at only when all reads that have come are counted: they come in bursts.
            let now = Instant::now();
            let open = window.get_or_insert(Window { start: now, bytes, reads: 0 });
            open.reads += if open.start == now { 0 } else { reads };
            // While the queue runs empty at the end, the disk has less to do than it could.
            if start.elapsed() < time && open.reads >= BLOCKS && now - open.start >= DISK_WINDOW {
                rates.push((bytes - open.bytes) as f64 / (now - open.start).as_secs_f64());
                window = Some(Window { start: now, bytes, reads: 0 });
            }
        }
    }

    fn submit(&mut self) {
        let (file, offset) = (self.file, self.at);
        let end = self.length.min(offset + CHUNK as u64);
        self.reader.submit(&Extent::covering(file, offset..end, 0), ());
        self.at = if end < self.length { end } else { 0 };
    }
}

/// A window that is open: when it began, the bytes that had come by then, and the reads that have come since.
struct Window {
    start: Instant,
    bytes: u64,
    reads: usize,
}

/// Copies the blocks to the device in one piece; for one that computes in RAM, half of them to the other half.
struct CopyLink<'a, D: Device> {
    // First, so that it is dropped before the memory it is about.
    _registered: D::Registration,
    _own: Option<D::Memory>,
    stream: D::Stream,
    device: &'a D,
    blocks: &'a Arena,
    to: DevicePtr,
    bytes: usize,
}

impl<'a, D: Device> CopyLink<'a, D> {
    fn new(device: &'a D, blocks: &'a Arena) -> Result<Self> {
        let ((from, both), stream) = (blocks.whole(), device.named_stream(c"layer-streamer probe")?);
        let own = (!device.memory_is_ram()).then(|| device.allocate("a probe of the link", both)).transpose()?;
        let bytes = if own.is_some() { both } else { both / 2 };
        let to = own.as_ref().map_or(DevicePtr::new(blocks.slot(BLOCKS / 2).as_ptr()), |memory| device.address(memory));
        // SAFETY: the struct borrows the blocks, so they outlive the registration.
        let registered = unsafe { device.register(from.as_ptr(), bytes)? };
        Ok(Self { _registered: registered, _own: own, stream, device, blocks, to, bytes })
    }

    fn copy(&self) -> Result<()> {
        let from = self.blocks.whole().0.as_ptr();
        let enqueued = (0..COPIES).try_for_each(|_| {
            // SAFETY: both sides hold so many bytes and do not overlap. No read into the blocks is in flight, and the copies are
            // waited for below, also where one of them fails.
            unsafe { self.device.copy_to_device(self.to, from, self.bytes, &self.stream) }
        });
        let done = self.device.drain(&self.stream);
        enqueued.and(done)
    }

    /// The rates of a round's windows, in bytes per second.
    fn round(&self) -> Result<Vec<f64>> {
        self.copy()?;
        let (start, mut rates) = (Instant::now(), Vec::new());
        while start.elapsed() < COPY_TIME {
            let (window, mut copied) = (Instant::now(), 0);
            while window.elapsed() < COPY_WINDOW {
                self.copy()?;
                copied += COPIES * self.bytes;
            }
            rates.push(copied as f64 / window.elapsed().as_secs_f64());
        }
        Ok(rates)
    }
}
