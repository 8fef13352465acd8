//! The backend that works everywhere: a few threads, each in `pread`, each fed by a ring of its own.

use std::{io, sync::Arc, thread, time::Duration};

use super::{Chunk, Done, Flight, ReadFailure, Source, patience};
use crate::{
    error::{Error, Result},
    ring::{Consumer, Producer, ring},
    sync::{self, AtomicBool, Ordering, Signal},
};

/// Threads in `pread` at once. With four the pipeline fell an eighth behind a raw reader of the same disk, with eight it kept up.
const THREADS: usize = 8;

/// Requests per thread: the one being read and the next.
const QUEUED: usize = 2;

/// The engine. Requests come back in any order.
///
/// **Invariant**: a chunk's memory is this engine's from [`submit`](Self::submit) until its `Done` comes back, or every thread
/// has ended.
pub(crate) struct PreadThreads {
    workers: Vec<PreadThread>,
    stop: Arc<AtomicBool>,
    in_flight: usize,
    /// The longest that a read took.
    slowest: Duration,
}

struct PreadThread {
    requests: Producer<Chunk>,
    results: Consumer<Done>,
    wake: Arc<Signal>,
    pending: usize,
    thread: Option<thread::JoinHandle<()>>,
}

impl PreadThread {
    /// Whether it may be in a read: it has something to read, and has not ended.
    fn may_read(&self) -> bool {
        self.pending > 0 && self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl PreadThreads {
    /// Starts the threads. They notify `finished` after each read.
    pub(crate) fn new(sources: &Arc<[Source]>, finished: &Arc<Signal>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut engine =
            Self { workers: Vec::with_capacity(THREADS), stop: stop.clone(), in_flight: 0, slowest: Duration::ZERO };
        for _ in 0..THREADS {
            let (requests, mut inbox) = ring::<Chunk>(QUEUED);
            let (mut outbox, results) = ring::<Done>(QUEUED);
            let wake = Signal::new();
            let (sources, stop, wake_in, finished) = (sources.clone(), stop.clone(), wake.clone(), finished.clone());
            let work = move |()| {
                loop {
                    let ticket = wake_in.ticket();
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let Some(chunk) = inbox.pop() else {
                        wake_in.wait(ticket);
                        continue;
                    };
                    // SAFETY: the chunk's memory is this engine's until the result is pushed.
                    let Some((result, took)) = (unsafe { read(&sources[chunk.file], chunk, &stop) }) else { return };
                    outbox.push(Done { tag: chunk.tag, file: chunk.file, direct: chunk.direct, result, took });
                    finished.notify();
                }
            };
            let failed = |source: io::Error| Error::Thread { stage: "read", source: source.into() };
            let thread = sync::spawn("ls-pread", || (), work).map_err(failed)?;
            engine.workers.push(PreadThread { requests, results, wake, pending: 0, thread: Some(thread) });
        }
        Ok(engine)
    }

    /// How many requests are under way.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether another request finds room.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight < self.workers.len() * QUEUED
    }

    /// Starts a read. Call it only after [`has_room`](Self::has_room).
    ///
    /// # Safety
    /// The chunk's memory is writable, and nobody else's for as long as the engine's invariant says.
    pub(crate) unsafe fn submit(&mut self, chunk: Chunk) {
        let worker = self.workers.iter_mut().min_by_key(|worker| worker.pending).expect("there are workers");
        assert!(worker.requests.push(chunk), "submit without room");
        worker.pending += 1;
        worker.wake.notify();
        self.in_flight += 1;
    }

    /// See [`Engine::quiesce`](super::Engine::quiesce): each thread ends after the read that it is in.
    pub(super) fn quiesce(&mut self) -> bool {
        self.stop.store(true, Ordering::SeqCst);
        self.workers.iter().for_each(|worker| worker.wake.notify());
        sync::until_none(patience(self.slowest), || {
            while self.completion().is_some() {}
            self.workers.iter().filter(|worker| worker.may_read()).count()
        })
    }

    /// A finished read, if there is one.
    pub(crate) fn completion(&mut self) -> Option<Done> {
        let (worker, done) =
            self.workers.iter_mut().find_map(|worker| worker.results.pop().map(|done| (worker, done)))?;
        worker.pending -= 1;
        self.in_flight -= 1;
        self.slowest = self.slowest.max(done.took);
        Some(done)
    }
}

/// Reads until the chunk is there, or has failed, and says how long that took; `None` if the thread is to stop before.
///
/// # Safety
/// The chunk's memory is writable, and nobody else's until this returns.
unsafe fn read(source: &Source, chunk: Chunk, stop: &AtomicBool) -> Option<(Result<usize, ReadFailure>, Duration)> {
    let mut flight = Flight::new(chunk);
    loop {
        // SAFETY: the chunk's memory is writable and nobody else's, as who submitted it promised.
        let result = unsafe { flight.read(source) };
        #[cfg(test)]
        while source.faults.never_ends(&source.path, chunk.offset) {
            thread::sleep(std::time::Duration::from_millis(1));
        }
        if let Some(result) = flight.advance(source, result) {
            return Some((result, flight.since.elapsed()));
        }
        if stop.load(Ordering::SeqCst) {
            return None;
        }
    }
}

impl Drop for PreadThreads {
    fn drop(&mut self) {
        self.quiesce();
        // One that is still in its read is left there; the others have nothing to do but to end.
        for worker in self.workers.iter_mut().filter(|worker| !worker.may_read()) {
            let _ = worker.thread.take().map(thread::JoinHandle::join);
        }
    }
}
