//! Threads that copy one block of memory together. One core copies some 10 GB/s, which a fast link to a device outruns.

use std::{io, ptr, sync::Arc, thread};

use crate::{
    error::{Error, Result},
    ring::{Consumer, Producer, ring},
    sync::{self, AtomicBool, AtomicUsize, Ordering, Signal},
};

/// What a thread takes at a time: long enough for `memcpy` to bypass the cache, short enough to even out.
const PIECE: usize = 4 << 20;

/// More threads than this win nothing on the machines known.
const MOST: usize = 8;

/// A block to copy.
#[derive(Clone, Copy)]
struct CopyBlock {
    from: *const u8,
    to: *mut u8,
    len: usize,
}

// SAFETY: addresses are plain data; `Copiers::copy` answers for the accesses.
unsafe impl Send for CopyBlock {}

/// What the threads share.
struct CopierState {
    /// Where the next piece of the block begins.
    next: AtomicUsize,
    /// Helpers that have not said yet that they are done with the block.
    working: AtomicUsize,
    finished: Arc<Signal>,
    stop: AtomicBool,
}

impl CopierState {
    /// Copies pieces until there are none left.
    ///
    /// # Safety
    /// As [`Copiers::copy`]; `next` was set to 0 for this block.
    unsafe fn take_part(&self, block: CopyBlock) {
        loop {
            let at = self.next.fetch_add(PIECE, Ordering::Relaxed);
            if at >= block.len {
                return;
            }
            // SAFETY: inside the block, and every piece is taken by one thread.
            unsafe { ptr::copy_nonoverlapping(block.from.add(at), block.to.add(at), PIECE.min(block.len - at)) };
        }
    }
}

struct Helper {
    blocks: Producer<CopyBlock>,
    wake: Arc<Signal>,
    thread: Option<thread::JoinHandle<()>>,
}

/// The calling thread and its helpers, asleep until they are needed.
pub(crate) struct Copiers {
    shared: Arc<CopierState>,
    helpers: Vec<Helper>,
    /// How many of the helpers take part.
    active: usize,
}

impl Copiers {
    /// As many threads as there are cores, up to a limit; at first the calling one copies alone.
    pub(crate) fn new() -> Result<Self> {
        Self::with(thread::available_parallelism().map_or(1, usize::from).min(MOST))
    }

    /// So many threads, the calling one included.
    fn with(threads: usize) -> Result<Self> {
        let mut copiers = Self {
            shared: Arc::new(CopierState {
                next: AtomicUsize::new(0),
                working: AtomicUsize::new(0),
                finished: Signal::new(),
                stop: AtomicBool::new(false),
            }),
            helpers: Vec::with_capacity(threads - 1),
            active: 0,
        };
        for _ in 1..threads {
            let (blocks, inbox) = ring(1);
            let wake = Signal::new();
            let (shared, wake_in) = (copiers.shared.clone(), wake.clone());
            let failed = |source: io::Error| Error::Thread { stage: "pin", source: source.into() };
            let work = move |()| help(&shared, inbox, &wake_in);
            let thread = sync::spawn("ls-pin-copy", || (), work).map_err(failed)?;
            copiers.helpers.push(Helper { blocks, wake, thread: Some(thread) });
        }
        Ok(copiers)
    }

    /// Takes one thread more from now on, if there is one.
    pub(crate) fn grow(&mut self) {
        self.active = (self.active + 1).min(self.helpers.len());
    }

    /// Copies `len` bytes; returns when they are there.
    ///
    /// # Safety
    /// Both ranges are valid, do not overlap, and nobody else touches them meanwhile.
    pub(crate) unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) {
        #[cfg(test)]
        pace::keep();
        let block = CopyBlock { from, to, len };
        // One piece is the calling thread's own.
        let helpers = &mut self.helpers[..self.active.min(len.saturating_sub(1) / PIECE)];
        if helpers.is_empty() {
            // SAFETY: the caller promised that both ranges are valid and do not overlap.
            return unsafe { ptr::copy_nonoverlapping(from, to, len) };
        }
        self.shared.next.store(0, Ordering::Relaxed);
        self.shared.working.store(helpers.len(), Ordering::Relaxed);
        for helper in helpers {
            // The ring orders the two stores above before whatever the helper does with the block.
            let pushed = helper.blocks.push(block);
            debug_assert!(pushed, "a helper is idle when the copy before has returned");
            helper.wake.notify();
        }
        // SAFETY: both ranges are valid to the end of this function, as the caller promised, and it waits for every helper.
        unsafe { self.shared.take_part(block) };
        loop {
            let ticket = self.shared.finished.ticket();
            if self.shared.working.load(Ordering::Acquire) == 0 {
                return;
            }
            self.shared.finished.wait(ticket);
        }
    }
}

fn help(shared: &CopierState, mut inbox: Consumer<CopyBlock>, wake: &Signal) {
    loop {
        let ticket = wake.ticket();
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let Some(block) = inbox.pop() else {
            wake.wait(ticket);
            continue;
        };
        // SAFETY: `copy` waits for this thread before its caller may use the memory otherwise.
        unsafe { shared.take_part(block) };
        shared.working.fetch_sub(1, Ordering::Release);
        shared.finished.notify();
    }
}

impl Drop for Copiers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.helpers.iter().for_each(|helper| helper.wake.notify());
        for helper in &mut self.helpers {
            let _ = helper.thread.take().map(thread::JoinHandle::join);
        }
    }
}

/// How long copies take besides, for tests on the simulated clock.
#[cfg(test)]
pub(super) mod pace {
    use std::{
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        time::Duration,
    };

    use crate::trace::clock::simulated;

    static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

    /// From now on each copy of this process takes so much longer.
    pub(crate) fn set(time: Duration) {
        NANOSECONDS.store(time.as_nanos() as u64, Relaxed);
    }

    pub(super) fn keep() {
        match NANOSECONDS.load(Relaxed) {
            0 => {}
            time => simulated::sleep(Duration::from_nanos(time)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_threads_copies_every_byte_and_no_more() {
        for threads in [1, 2, 5] {
            let mut copiers = Copiers::with(threads).unwrap();
            (1..threads).for_each(|_| copiers.grow());
            let source: Vec<u8> = (0..6 * PIECE + 7).map(|i| ((i * 31) >> 7) as u8).collect();
            // Again at once, so that helpers which are slow to sleep, or to wake, meet the block after.
            for len in [0, 1, PIECE - 1, PIECE, 2 * PIECE, 2 * PIECE + 1, source.len() - 1].repeat(3) {
                let mut target = vec![0xaa; source.len()];
                // SAFETY: two vectors, both longer than `len`.
                unsafe { copiers.copy(source.as_ptr(), target.as_mut_ptr(), len) };
                assert_eq!(copiers.shared.working.load(Ordering::Relaxed), 0, "it returned with helpers at work");
                assert!(target[..len] == source[..len], "{len} bytes by {threads} threads");
                assert!(target[len..].iter().all(|&byte| byte == 0xaa), "{len} bytes by {threads} threads");
            }
        }
    }
}
