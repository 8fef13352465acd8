//! The choice of a backend: the best engine that the system allows, or the one that was asked for.

use std::{io, sync::Arc, time::Duration};

use super::{Chunk, Done, Source, pread::PreadThreads, uring::Uring};
use crate::{
    error::{Error, Result},
    plan::Reader,
    sync::Signal,
};

/// Something that reads chunks. See the engines for the invariant that both keep.
pub(crate) enum Engine {
    Uring(Box<Uring>),
    Pread(PreadThreads),
}

impl Engine {
    /// Takes the first backend from `wanted` down that can be had, or `wanted` alone if that is not [`Reader::Auto`]. Returns
    /// with the engine which backend it is, and why it is not a higher one.
    ///
    /// # Safety
    /// `buffers` (start and length) outlive the engine.
    pub(crate) unsafe fn new(
        wanted: Reader,
        sources: &Arc<[Source]>,
        buffers: &[(*mut u8, usize)],
        finished: &Arc<Signal>,
    ) -> Result<(Self, Reader, String)> {
        let mut reasons = Vec::new();
        for (backend, buffers) in [(Reader::UringFixed, buffers), (Reader::Uring, &[])] {
            if wanted != backend && wanted != Reader::Auto {
                continue;
            }
            // SAFETY: the caller promised that the buffers outlive the engine.
            match unsafe { Uring::new(sources, buffers) } {
                Ok(ring) => return Ok((Self::Uring(Box::new(ring)), backend, reasons.join("; "))),
                Err(error) => reasons.push(format!("{backend} refused: {error}")),
            }
        }
        if !matches!(wanted, Reader::Auto | Reader::Pread) {
            return Err(Error::Unsupported { what: reasons.join("; "), remedy: "use the reader \"auto\"".into() });
        }
        Ok((Self::Pread(PreadThreads::new(sources, finished)?), Reader::Pread, reasons.join("; ")))
    }

    /// How many reads are under way.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Self::Uring(engine) => engine.in_flight(),
            Self::Pread(engine) => engine.in_flight(),
        }
    }

    /// Whether another read finds room.
    pub(crate) fn has_room(&self) -> bool {
        match self {
            Self::Uring(engine) => engine.has_room(),
            Self::Pread(engine) => engine.has_room(),
        }
    }

    /// Takes a read; it starts by the next [`flush`](Self::flush) or [`wait`](Self::wait) at the latest.
    ///
    /// # Safety
    /// The chunk's memory is writable, and nobody else's until its `Done` comes back or [`quiesce`](Self::quiesce) returns true.
    pub(crate) unsafe fn submit(&mut self, chunk: Chunk) {
        // SAFETY: the caller promised that the chunk's memory is writable, and nobody else's until its read ends.
        unsafe {
            match self {
                Self::Uring(engine) => engine.submit(chunk),
                Self::Pread(engine) => engine.submit(chunk),
            }
        }
    }

    /// Starts the reads taken.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.flush(),
            Self::Pread(_) => Ok(()),
        }
    }

    /// A finished read, if there is one.
    pub(crate) fn completion(&mut self) -> Option<Done> {
        match self {
            Self::Uring(engine) => engine.completion(),
            Self::Pread(engine) => engine.completion(),
        }
    }

    /// Blocks until there may be a finished read, or `signal` was notified since `ticket`. While reads are in flight, a ring is
    /// woken by them alone, and nobody sleeps for longer than [`LOOK_UP`].
    pub(crate) fn wait(&mut self, signal: &Signal, ticket: u32) -> io::Result<()> {
        match self {
            Self::Uring(engine) if engine.in_flight() > 0 => return engine.wait(LOOK_UP),
            Self::Pread(engine) if engine.in_flight() > 0 => signal.wait_for(ticket, LOOK_UP),
            _ => signal.wait(ticket),
        }
        Ok(())
    }

    /// The last call: starts no more reads, and waits for those under way as long as they end one after the other. False if for
    /// [`STILL`](crate::sync::STILL), or four times as long as the slowest read took, none did: then the kernel may write to the
    /// memory of one whenever it likes, and it must stay as it is for good.
    pub(crate) fn quiesce(&mut self) -> bool {
        match self {
            Self::Uring(engine) => engine.quiesce(),
            Self::Pread(engine) => engine.quiesce(),
        }
    }
}

/// How often who waits for reads looks whether there is something else to do.
const LOOK_UP: Duration = Duration::from_millis(100);
