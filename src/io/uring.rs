//! The io_uring backends: one ring, from the reader's own thread, with many reads in flight and no thread but the kernel's.
//!
//! With registered ("fixed") buffers the kernel pins the slots once; without them it pins each read's pages anew. Registration
//! counts against RLIMIT_MEMLOCK, which an ordinary user's default exhausts: then a ring without them does as well.

use std::{
    io,
    mem::ManuallyDrop,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, types};

use super::{CHUNK, Chunk, Done, Flight, PATIENCE, Source, patience};
use crate::sync::until_none;

/// Reads in flight: enough to keep a fast disk's queues full with chunks of [`CHUNK`].
const DEPTH: usize = 32;

/// The kernel registers at most 1 GiB at once.
const MAX_REGISTRATION: usize = 1 << 30;

/// The engine. Requests come back in any order.
///
/// **Invariant**: a chunk's memory is this engine's from [`submit`](Self::submit) until its `Done` comes back, or
/// [`started`](Self::started) is 0 and the kernel is told of no more.
pub(crate) struct Uring {
    /// Left to the kernel if that still reads.
    ring: ManuallyDrop<IoUring>,
    sources: Arc<[Source]>,
    /// Start and length of each registered buffer, by its index; empty without registration.
    registered: Vec<(usize, usize)>,
    /// By the number that the kernel hands back; `None` is free.
    flights: Vec<Option<Flight>>,
    in_flight: usize,
    /// The longest that a read took.
    slowest: Duration,
    /// No more reads are started.
    ends: bool,
    /// Since when the kernel has had no room, and how long to leave it alone.
    refused: Option<(Instant, Duration)>,
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
            // SAFETY: the caller promised that the buffers outlive the ring.
            unsafe { ring.submitter().register_buffers(&iovecs) }.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOMEM) => {
                    let cause = format!("{error}; raise the limit on locked memory (ulimit -l)");
                    io::Error::new(error.kind(), cause)
                }
                _ => error,
            })?;
        }
        let flights = (0..DEPTH).map(|_| None).collect();
        let ring = ManuallyDrop::new(ring);
        Ok(Self {
            ring,
            sources: sources.clone(),
            registered,
            flights,
            in_flight: 0,
            slowest: Duration::ZERO,
            ends: false,
            refused: None,
        })
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
        let flags = if flight.direct && !self.sources[chunk.file].blocks {
            io_uring::squeue::Flags::empty()
        } else {
            io_uring::squeue::Flags::ASYNC
        };
        let entry = entry.user_data(number as u64).flags(flags);
        // SAFETY: the range is the chunk's, valid by the invariant; the descriptor is open for the life of `sources`.
        unsafe { self.ring.submission().push(&entry) }.expect("the queue has a place for every flight");
    }

    /// Reads that the kernel was told of and that have not ended.
    fn started(&mut self) -> usize {
        self.in_flight - self.ring.submission().len()
    }

    /// See [`Engine::quiesce`](super::Engine::quiesce). The kernel is not called for it: that may be what failed.
    pub(super) fn quiesce(&mut self) -> bool {
        self.ends = true;
        until_none(patience(self.slowest), || {
            while self.completion().is_some() {}
            self.started()
        })
    }

    /// Tells the kernel of the reads prepared; of those that it has no room for, the next time.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        let entered = self.enter(|ring| ring.submit());
        self.entered(entered)
    }

    /// Blocks until a read has ended, if any is in flight, or something else happened, but not for longer than `time`.
    pub(crate) fn wait(&mut self, time: Duration) -> io::Result<()> {
        if self.in_flight == 0 {
            return Ok(());
        }
        let entered = self.enter(|ring| {
            // Linux before 5.11 waits without a limit.
            if !ring.params().is_feature_ext_arg() {
                return ring.submit_and_wait(1);
            }
            let time = types::Timespec::from(time);
            ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
        });
        self.entered(entered)
    }

    fn enter(&self, call: impl FnOnce(&IoUring) -> io::Result<usize>) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(errno) = self.sources[0].faults.enter() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        call(&self.ring)
    }

    /// What a call of the kernel means. A signal or the end of the time is a chance to look at other things.
    fn entered(&mut self, result: io::Result<usize>) -> io::Result<()> {
        match result {
            Ok(_) => {
                self.refused = None;
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME) => Ok(()),
                Some(libc::EAGAIN | libc::EBUSY) => {
                    let (since, pause) = self.refused.unwrap_or((Instant::now(), Duration::from_micros(50)));
                    if since.elapsed() > PATIENCE {
                        return Err(error);
                    }
                    thread::sleep(pause);
                    self.refused = Some((since, (2 * pause).min(Duration::from_millis(50))));
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    /// A finished read, if there is one.
    pub(crate) fn completion(&mut self) -> Option<Done> {
        loop {
            let entry = self.ring.completion().next()?;
            self.refused = None;
            let (number, result) = (entry.user_data() as usize, entry.result());
            let flight = self.flights[number].as_mut().expect("a flight has its number until it is done");
            #[cfg(test)]
            {
                let source = &self.sources[flight.chunk.file];
                if source.faults.never_ends(&source.path, flight.chunk.offset) {
                    continue;
                }
            }
            let mut result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            if !self.ends && result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ECANCELED)) {
                // The kernel could not start a thread of its own for it (a limit on threads): this one reads.
                // SAFETY: the rest of the chunk's memory is the engine's, and no read into it is under way.
                result = unsafe { flight.read(&self.sources[flight.chunk.file]) };
            }
            match flight.advance(&self.sources[flight.chunk.file], result) {
                Some(result) => {
                    let Chunk { tag, file, direct, .. } = flight.chunk;
                    let took = flight.since.elapsed();
                    self.flights[number] = None;
                    self.in_flight -= 1;
                    self.slowest = self.slowest.max(took);
                    return Some(Done { tag, file, direct, result, took });
                }
                None => self.push(number),
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.quiesce() {
            // SAFETY: this is done once, and nothing uses the ring after it.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
        }
    }
}
