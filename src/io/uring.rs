//! The upper rungs: one io_uring, from the reader's own thread, with many reads in flight and no thread but the kernel's.
//!
//! With registered ("fixed") buffers the kernel pins the slots once; without them it pins each read's pages anew. Registration
//! counts against RLIMIT_MEMLOCK, which an ordinary user's default exhausts: then the rung below does as well.

use std::{io, sync::Arc};

use io_uring::{IoUring, opcode, types};

use super::{CHUNK, Chunk, Done, Flight, Source};

/// Reads in flight: enough to keep a fast disk's queues full with chunks of [`CHUNK`].
const DEPTH: usize = 32;

/// The kernel registers at most 1 GiB at once.
const MAX_REGISTRATION: usize = 1 << 30;

/// The engine. Requests come back in any order.
///
/// **Invariant**: a chunk's memory is this engine's from [`submit`](Self::submit) until its `Done` comes back or the engine
/// is dropped, which waits for every read to end.
pub(crate) struct Uring {
    ring: IoUring,
    sources: Arc<[Source]>,
    /// Start and length of each registered buffer, by its index; empty without registration.
    registered: Vec<(usize, usize)>,
    /// By the number that the kernel hands back; `None` is free.
    flights: Vec<Option<Flight>>,
    in_flight: usize,
    /// Entries that the kernel has not been told of.
    unsubmitted: bool,
}

impl Uring {
    /// Sets up a ring, and registers `buffers` (start and length) if there are any.
    ///
    /// # Errors
    /// The operating system's: EPERM or ENOSYS where io_uring is forbidden or unknown, ENOMEM where registering is refused.
    ///
    /// # Safety
    /// The buffers outlive the engine.
    pub(crate) unsafe fn new(sources: &Arc<[Source]>, buffers: &[(*mut u8, usize)]) -> io::Result<Self> {
        let ring = IoUring::new(DEPTH as u32)?;
        // Where a ring can be had its use may be forbidden still.
        ring.submit()?;
        // Pieces overlap by a chunk, so that every chunk lies wholly in one of them.
        let mut registered = Vec::new();
        for &(start, bytes) in buffers {
            for at in (0..bytes).step_by(MAX_REGISTRATION - CHUNK) {
                registered.push((start as usize + at, MAX_REGISTRATION.min(bytes - at)));
            }
        }
        if !registered.is_empty() {
            let iovecs: Vec<_> = (registered.iter())
                .map(|&(start, len)| libc::iovec { iov_base: start as *mut libc::c_void, iov_len: len })
                .collect();
            // SAFETY: the caller's.
            unsafe { ring.submitter().register_buffers(&iovecs) }.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOMEM) => {
                    let cause = format!("{error}; raise the limit on locked memory (ulimit -l)");
                    io::Error::new(error.kind(), cause)
                }
                _ => error,
            })?;
        }
        let flights = (0..DEPTH).map(|_| None).collect();
        Ok(Self { ring, sources: sources.clone(), registered, flights, in_flight: 0, unsubmitted: false })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(crate) fn has_room(&self) -> bool {
        self.in_flight < DEPTH
    }

    /// Prepares a read, which starts with the next [`flush`](Self::flush). Call it only after [`has_room`](Self::has_room).
    ///
    /// # Safety
    /// The chunk's memory is writable, and nobody else's for as long as the engine's invariant says.
    pub(crate) unsafe fn submit(&mut self, chunk: Chunk) {
        let number = self.flights.iter().position(Option::is_none).expect("submit without room");
        self.flights[number] = Some(Flight::new(chunk));
        self.in_flight += 1;
        self.push(number);
    }

    fn push(&mut self, number: usize) {
        let flight = self.flights[number].expect("a flight has its number until it is done");
        let (chunk, start) = (flight.chunk, flight.start());
        let (address, len) = (chunk.to.0.wrapping_add(start), (chunk.len - start) as u32);
        let file = types::Fd(self.sources[chunk.file].descriptor(flight.direct));
        let offset = chunk.offset + start as u64;
        let inside = |&(start, bytes): &(usize, usize)| {
            (start..start + bytes).contains(&(address as usize)) && address as usize + len as usize <= start + bytes
        };
        let entry = match self.registered.iter().position(inside) {
            Some(index) => opcode::ReadFixed::new(file, address, len, index as u16).offset(offset).build(),
            None => opcode::Read::new(file, address, len).offset(offset).build(),
        };
        // A read from the page cache copies while it is submitted: the kernel's own threads do that side by side.
        let flags = if flight.direct { io_uring::squeue::Flags::empty() } else { io_uring::squeue::Flags::ASYNC };
        let entry = entry.user_data(number as u64).flags(flags);
        // SAFETY: the range is the chunk's, valid by the invariant; the descriptor is open for the life of `sources`.
        unsafe { self.ring.submission().push(&entry) }.expect("the queue has a place for every flight");
        self.unsubmitted = true;
    }

    /// Tells the kernel of the reads prepared.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.unsubmitted {
            retried(|| self.ring.submit())?;
            self.unsubmitted = false;
        }
        Ok(())
    }

    /// Blocks until a read has ended, if any is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if self.in_flight > 0 {
            retried(|| self.ring.submit_and_wait(1))?;
            self.unsubmitted = false;
        }
        Ok(())
    }

    /// A finished read, if there is one.
    pub(crate) fn completion(&mut self) -> Option<Done> {
        loop {
            let entry = self.ring.completion().next()?;
            let (number, result) = (entry.user_data() as usize, entry.result());
            let flight = self.flights[number].as_mut().expect("a flight has its number until it is done");
            let mut result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            if result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ECANCELED)) {
                // The kernel could not start a thread of its own for it (a limit on threads): this one reads.
                // SAFETY: the rest of the chunk's memory is the engine's, and no read into it is under way.
                result = unsafe { flight.read(&self.sources[flight.chunk.file]) };
            }
            match flight.advance(&self.sources[flight.chunk.file], result) {
                Some(result) => {
                    let Chunk { tag, file, direct, .. } = flight.chunk;
                    self.flights[number] = None;
                    self.in_flight -= 1;
                    return Some(Done { tag, file, direct, result });
                }
                None => self.push(number),
            }
        }
    }
}

/// Repeats a call that a signal interrupted, or that found the kernel out of memory for a moment.
fn retried(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => std::thread::yield_now(),
            other => return other,
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.wait().is_err() {
                // The kernel may still write: better to leave it the memory than to let it write into someone else's.
                std::process::abort();
            }
            while self.completion().is_some() {}
        }
    }
}
