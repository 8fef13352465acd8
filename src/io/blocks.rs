//! Reading outside the pipeline, through a few blocks of memory: what loads static tensors and probes the disk have in common.

use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Done, Engine, ReadFailure, Source, chunk_at};
use crate::{
    arena::Arena,
    error::{Error, Result},
    layout::Extent,
    plan::Reader,
    sync::Signal,
};

/// Reads into blocks of one chunk each, as many at a time as there are blocks. Each read carries a note of the caller's.
///
/// **Invariant**: a block is free, or the kernel's until its read ends, or the caller's until [`free`](Self::free).
pub(crate) struct BlockReader<T> {
    engine: Engine,
    signal: Arc<Signal>,
    sources: Arc<[Source]>,
    blocks: Arc<Arena>,
    free: Vec<usize>,
    /// By block, while its read is under way: the number of the read, and the note.
    notes: Vec<Option<(u64, T)>>,
    reads: u64,
    /// When a read last ended, or the first was taken.
    last: Instant,
}

/// A read that ended, with its block.
pub(crate) struct ReadBlock<T> {
    pub(crate) block: usize,
    pub(crate) note: T,
    pub(crate) result: Result<usize, ReadFailure>,
}

impl<T> BlockReader<T> {
    /// Registering a few blocks for one use would cost more than it saves, and what went when a streamer started may not go now,
    /// for want of a descriptor: any backend will do, unless `pread` is asked for.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub(crate) fn new(reader: Reader, sources: &Arc<[Source]>, blocks: &Arc<Arena>, count: usize) -> Result<Self> {
        let signal = Signal::new();
        let reader = if reader == Reader::Pread { reader } else { Reader::Auto };
        // SAFETY: there are no registered buffers.
        let (engine, ..) = unsafe { Engine::new(reader, sources, &[], &signal) }?;
        Ok(Self {
            engine,
            signal,
            sources: sources.clone(),
            blocks: blocks.clone(),
            free: (0..count).collect(),
            notes: (0..count).map(|_| None).collect(),
            reads: 0,
            last: Instant::now(),
        })
    }

    /// Whether another read finds room and a free block.
    pub(crate) fn has_room(&self) -> bool {
        self.engine.has_room() && !self.free.is_empty()
    }

    /// Whether no read is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.engine.in_flight() == 0
    }

    /// Takes a read of at most one chunk to the beginning of a block, for which there [is room](Self::has_room).
    pub(crate) fn submit(&mut self, part: &Extent, note: T) {
        let block = self.free.pop().expect("the caller looked whether there is a free block");
        if self.is_idle() {
            self.last = Instant::now();
        }
        // SAFETY: the block holds one chunk, and is the kernel's until its read ends.
        unsafe {
            let to = self.blocks.slot(block).as_ptr();
            self.engine.submit(chunk_at(&self.sources[part.file], part, 0, to, block));
        }
        self.notes[block] = Some((self.reads, note));
        self.reads += 1;
    }

    /// Starts the reads taken, and waits for one to end; `None` if none is under way. `idle` is called again and again while it
    /// waits, with the note of the oldest read and how long none has ended.
    ///
    /// # Errors
    /// The ring's own, or what `idle` returns: then reads are still under way.
    pub(crate) fn next(&mut self, mut idle: impl FnMut(&T, Duration) -> Result<()>) -> Result<Option<ReadBlock<T>>> {
        loop {
            let ticket = self.signal.ticket();
            self.engine.flush().map_err(Error::io("read with io_uring from", &self.sources[0].path))?;
            if let Some(ended) = self.ended() {
                return Ok(Some(ended));
            }
            let Some((_, oldest)) = self.notes.iter().flatten().min_by_key(|(number, _)| *number) else {
                return Ok(None);
            };
            let waited = self.engine.wait(&self.signal, ticket);
            waited.map_err(Error::io("read with io_uring from", &self.sources[0].path))?;
            idle(oldest, self.last.elapsed())?;
        }
    }

    /// A read that has ended, if there is one.
    pub(crate) fn ended(&mut self) -> Option<ReadBlock<T>> {
        let Done { tag: block, result, .. } = self.engine.completion()?;
        self.last = Instant::now();
        let (_, note) = self.notes[block].take().expect("a read ends once");
        Some(ReadBlock { block, note, result })
    }

    /// Gives a block back, of which nothing uses the memory any more.
    pub(crate) fn free(&mut self, block: usize) {
        self.free.push(block);
    }

    /// Starts no more reads, and waits for those under way. False if some do not end.
    pub(crate) fn quiesce(&mut self) -> bool {
        self.engine.quiesce()
    }
}

/// If reads do not end, the blocks are left to them for good.
impl<T> Drop for BlockReader<T> {
    fn drop(&mut self) {
        if !self.quiesce() {
            mem::forget(self.blocks.clone());
        }
    }
}
