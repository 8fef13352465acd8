//! Memory for slots and kept units: one anonymous mapping cut into equal, page-aligned slots, faulted in before the first read.
//! Memory of kept units is filled once, from its start on. Threads prefault it ahead of the reader, so that nobody waits for all
//! of it; whoever would overtake them can tell.

use std::{
    io, mem,
    ptr::NonNull,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::{
    error::{Error, Result},
    layout::{PAGE, slot_bytes},
    memory::{self, PROMISED},
    sync,
};

/// `slots` buffers of `slot_bytes` each, one after the other.
///
/// **Invariant** for everyone who writes through [`slot`](Arena::slot): a slot belongs to one stage at a time, and the
/// rings hand it on. The arena itself never reads or writes it after start.
pub(crate) struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    /// Unmapped on drop; absent if the memory is the caller's.
    map: Option<Arc<MmapRaw>>,
    slot_bytes: usize,
    slots: usize,
    prefault: Option<Prefault>,
}

// SAFETY: a range of memory; whoever follows an address into it answers for the access.
unsafe impl Send for Arena {}
// SAFETY: a shared reference hands out addresses and no access to what lies there.
unsafe impl Sync for Arena {}

/// What is prefaulted at once (bytes): a huge page. In tests less, so that the [`Prefault`] threads are often overtaken.
const STEP: usize = if cfg!(test) { PAGE } else { 2 << 20 };

/// What is prefaulted before anything is read (bytes): units that all fit in so little are read once.
const FIRST: usize = 8 * STEP;

const UNPOISONED: &str = "nothing panics under this lock";

/// Threads that make an arena present, piece after piece.
struct Prefault {
    /// Where the next piece begins: before it memory is present, or is about to be, or is not wanted.
    next: Arc<AtomicUsize>,
    promised: Arc<Promised>,
    /// Until the memory is asked for they let others start.
    begun: Arc<AtomicBool>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Prefault {
    fn begin(&self) {
        if !self.begun.load(Relaxed) {
            self.begun.store(true, Relaxed);
            self.threads.lock().expect(UNPOISONED).iter().for_each(|thread| thread.thread().unpark());
        }
    }

    /// Leaves them nothing to do of `bytes`, and waits for their end.
    fn stop(&self, bytes: usize) {
        self.next.fetch_max(bytes, Relaxed);
        self.begin();
        let threads = mem::take(&mut *self.threads.lock().expect(UNPOISONED));
        // They cannot panic, and what they did is undone with the mapping.
        threads.into_iter().for_each(|thread| _ = thread.join());
        self.promised.take(self.promised.0.load(Relaxed));
    }
}

/// Bytes of an arena that are yet to become present: its part of [`PROMISED`].
struct Promised(AtomicUsize);

impl Promised {
    fn new(bytes: usize) -> Arc<Self> {
        PROMISED.fetch_add(bytes, Relaxed);
        Arc::new(Self(bytes.into()))
    }

    /// Of these the system knows, or is about to.
    fn take(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Relaxed);
        PROMISED.fetch_sub(bytes, Relaxed);
    }
}

/// Has `fault_in` make pieces of `bytes` present, where they begin and how long they are, of those that no other thread has taken
/// from `next`, until none is left or it fails.
fn share(bytes: usize, next: &AtomicUsize, fault_in: impl Fn(usize, usize) -> io::Result<()>) -> io::Result<()> {
    loop {
        let at = next.fetch_add(STEP, Relaxed);
        if at >= bytes {
            return Ok(());
        }
        fault_in(at, STEP.min(bytes - at))?;
    }
}

/// Makes the page of the byte at `at` present and leaves the byte as it is, whoever else writes to it meanwhile: to the hardware
/// it is one access, which no sanitizer needs to see.
///
/// # Safety
/// The byte may be written.
unsafe fn fault_in_page(at: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller promised that the byte may be written; adding nothing to it changes nothing.
    unsafe {
        std::arch::asm!("lock or byte ptr [{}], 0", in(reg) at, options(nostack));
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller promised that the byte may be written. Where it is not zero the page is present.
    let _ = unsafe { std::sync::atomic::AtomicU8::from_ptr(at) }.compare_exchange(0, 0, Relaxed, Relaxed);
}

impl Arena {
    /// Reserves the arena, in huge pages where the system grants them, and makes it present: first touch is slower than a
    /// disk and must not happen while streaming. A child process does not inherit it, a core dump leaves it out.
    pub(crate) fn new(what: &'static str, slots: usize, largest: usize) -> Result<Self> {
        let arena = Self::reserve(what, slots, largest)?;
        match arena.populate() {
            // Linux before 5.14 does not know the advice.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for at in (0..arena.bytes).step_by(PAGE) {
                    // SAFETY: inside the mapping, which nobody else knows yet.
                    unsafe { arena.start.add(at).write(0) };
                }
            }
            other => other.map_err(|error| arena.failed(what, error))?,
        }
        Ok(arena)
    }

    /// Reserves one slot that is filled once, from its start on. It becomes present from there on, its first pieces now and
    /// the rest, once somebody [asks for it](Self::is_prefaulted), in threads of its own; whoever overtakes them waits for the
    /// pages that it writes, and no more. A page that is not `wanted`, by where it begins, becomes present where it is written,
    /// or with a neighbour in a huge page.
    pub(crate) fn prefaulting(
        what: &'static str,
        bytes: usize,
        wanted: impl Fn(usize) -> bool + Clone + Send + 'static,
    ) -> Result<Self> {
        let mut arena = Self::reserve(what, 1, bytes)?;
        let map = arena.map.clone().expect("it was reserved");
        let first = FIRST.min(map.len());
        let promised = Promised::new(map.len() - first);
        (0..first).step_by(PAGE).filter(|page| wanted(*page)).for_each(|page| {
            // SAFETY: inside the mapping, which may be written, and which nobody else knows yet.
            unsafe { fault_in_page(map.as_mut_ptr().add(page)) };
        });
        let (next, begun) = (Arc::new(AtomicUsize::new(first)), Arc::new(AtomicBool::new(false)));
        // Half of the processors are left to those who read, copy and compute.
        let most = (thread::available_parallelism().map_or(1, usize::from) / 2).max(1);
        let count = most.min((map.len() - first).div_ceil(STEP));
        let mut threads = Vec::with_capacity(count);
        for _ in 0..count {
            let (map, next, begun) = (map.clone(), next.clone(), begun.clone());
            let (promised, wanted) = (promised.clone(), wanted.clone());
            let work = move |()| {
                while !begun.load(Relaxed) {
                    thread::park();
                }
                // By faults, not by advice, which would hold a lock that others need to map memory, as drivers do when a
                // kernel is first launched, and threads when they start.
                let _ = share(map.len(), &next, |at, len| {
                    let pages = || (at..at + len).step_by(PAGE).filter(|page| wanted(*page));
                    // Before the system sees it: counted twice, it would be missing elsewhere.
                    promised.take(pages().count() * PAGE);
                    // SAFETY: inside the mapping, which may be written, and which this thread holds.
                    pages().for_each(|page| unsafe { fault_in_page(map.as_mut_ptr().add(page)) });
                    Ok(())
                });
            };
            let Ok(thread) = sync::spawn("ls-fault", || (), work) else { break };
            threads.push(thread);
        }
        if threads.is_empty() {
            // The memory becomes present where it is used.
            promised.take(map.len() - first);
        } else {
            arena.prefault = Some(Prefault { next, promised, begun, threads: Mutex::new(threads) });
        }
        Ok(arena)
    }

    fn reserve(what: &'static str, slots: usize, largest: usize) -> Result<Self> {
        let slot_bytes = slot_bytes(largest);
        let bytes = slots.max(1).saturating_mul(slot_bytes);
        let failed = |source: io::Error| Error::Memory { what, bytes, free: None, source: Arc::new(source) };
        // The system may promise more than it has, and then kill whoever uses it.
        if let Some(free) = memory::free().filter(|free| *free < bytes) {
            let source = io::Error::new(io::ErrorKind::OutOfMemory, format!("only {free} bytes are available"));
            return Err(Error::Memory { what, bytes, free: Some(free), source: Arc::new(source) });
        }
        let map: MmapRaw = MmapOptions::new().len(bytes).map_anon().map_err(failed)?.into();
        // Older kernels lack some of these; the memory works without them.
        for advice in [Advice::HugePage, Advice::DontFork, Advice::DontDump] {
            let _ = map.advise(advice);
        }
        // A mapping is never at address zero.
        let start = NonNull::new(map.as_mut_ptr()).expect("a mapping");
        Ok(Self { start, bytes, map: Some(Arc::new(map)), slot_bytes, slots, prefault: None })
    }

    /// The same in memory of the caller's, which is `slots` times `slot_bytes` long. Both it and `slot_bytes` are on page
    /// boundaries.
    ///
    /// # Safety
    /// The memory outlives the arena, and is used by nothing else meanwhile.
    pub(crate) unsafe fn lent(start: NonNull<u8>, slots: usize, slot_bytes: usize) -> Self {
        Self { start, bytes: slots * slot_bytes, map: None, slot_bytes, slots, prefault: None }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> Error {
        Error::Memory { what, bytes: self.bytes, free: None, source: Arc::new(source) }
    }

    /// Makes every page present, on several threads: the kernel zeroes pages, and in a virtual machine fetches them from
    /// the host, no faster than one thread can ask.
    fn populate(&self) -> io::Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let (next, threads) = (AtomicUsize::new(0), thread::available_parallelism().map_or(1, usize::from));
        let work = || share(map.len(), &next, |at, len| map.advise_range(Advice::PopulateWrite, at, len));
        thread::scope(|scope| {
            // For little memory they would cost more than they save. Without them it is this one's.
            let helpers = (1..threads.min(map.len().div_ceil(8 * STEP)))
                .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok());
            let helpers: Vec<_> = helpers.collect();
            let first = work();
            helpers.into_iter().fold(first, |so_far, helper| so_far.and(helper.join().expect("advice does not panic")))
        })
    }

    /// The first byte of slot `index`, on a page boundary.
    pub(crate) fn slot(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.slots.max(1), "slot {index} of {}", self.slots);
        // SAFETY: the offset is inside the arena by the assertion.
        unsafe { self.start.add(index * self.slot_bytes) }
    }

    /// Ends the threads that prefault the memory: it is dropped, or will never be.
    pub(crate) fn abandon(&self) {
        if let Some(prefault) = &self.prefault {
            prefault.stop(self.bytes);
        }
    }

    /// Has the threads begin that prefault the memory, if there are any.
    pub(crate) fn prefault(&self) {
        if let Some(prefault) = &self.prefault {
            prefault.begin();
        }
    }

    /// Whether all bytes before `end` that are wanted are present, or are about to be. Where they are not, whoever fills them may overtake the
    /// threads that prefault it; they begin once this was first asked. True where none do.
    pub(crate) fn is_prefaulted(&self, end: usize) -> bool {
        self.prefault.as_ref().is_none_or(|prefault| {
            let there = end <= prefault.next.load(Relaxed);
            prefault.begin();
            there
        })
    }

    /// All of it: where it starts and how long it is.
    pub(crate) fn whole(&self) -> (NonNull<u8>, usize) {
        (self.start, self.bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// By page: whether it is present.
    fn present(arena: &Arena) -> Vec<bool> {
        let (start, bytes) = arena.whole();
        let mut pages = vec![0; bytes / PAGE];
        // SAFETY: the mapping is that long and the vector has a byte for each page.
        assert_eq!(unsafe { libc::mincore(start.as_ptr().cast(), bytes, pages.as_mut_ptr()) }, 0);
        pages.iter().map(|page| page & 1 == 1).collect()
    }

    fn within_ten_seconds(is_so: impl Fn() -> bool) {
        let mut waits = 0..1000;
        while !is_so() {
            assert!(waits.next().is_some(), "not within ten seconds");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn slots_are_page_aligned_disjoint_and_present() {
        let arena = Arena::new("a test", 3, 5000).unwrap();
        let starts: Vec<_> = (0..3).map(|i| arena.slot(i).as_ptr() as usize).collect();
        assert_eq!(starts[0] % PAGE, 0);
        assert_eq!((starts[1] - starts[0], starts[2] - starts[0], arena.whole().1), (8192, 16384, 24576));
        assert_eq!(present(&arena), [true; 6]);
    }

    #[test]
    fn memory_that_is_prefaulted_becomes_present_by_itself_and_may_be_dropped_before() {
        let arena = Arena::prefaulting("a test", (40 << 20) + 5, |_| true).unwrap();
        let bytes = arena.whole().1;
        assert!(!arena.is_prefaulted(bytes), "nobody asked for the rest yet");
        assert!(arena.is_prefaulted(FIRST), "the first pieces are there at once");
        within_ten_seconds(|| !present(&arena).contains(&false));
        drop(arena);
        for _ in 0..20 {
            drop(Arena::prefaulting("a test", 256 << 20, |_| true).unwrap());
        }
        // What was promised and not taken is not held against others; other tests may run.
        assert!(PROMISED.load(Relaxed) < 4 << 30, "{PROMISED:?}");
    }

    #[test]
    fn what_is_not_wanted_does_not_become_present() {
        let bytes = 4 * FIRST;
        let wanted = |page: usize| page / PAGE % 3 == 1;
        let arena = Arena::prefaulting("a test", bytes, wanted).unwrap();
        // SAFETY: the advice is for this mapping: its pages come one by one.
        assert_eq!(unsafe { libc::madvise(arena.slot(0).as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) }, 0);
        let present =
            || present(&arena).into_iter().enumerate().map(|(page, there)| (page * PAGE, there)).collect::<Vec<_>>();
        arena.prefault();
        within_ten_seconds(|| present().iter().all(|(at, there)| *there || !wanted(*at)));
        assert!(arena.is_prefaulted(bytes));
        // What was there before the advice may have been a huge page.
        assert!(present().iter().all(|(at, there)| *at < FIRST || *there == wanted(*at)));
    }

    #[test]
    fn more_memory_than_there_is_is_an_error_that_says_how_much() {
        let message = Arena::new("pinned slots", 1 << 20, 1 << 40).err().expect("an exbibyte").to_string();
        assert!(message.contains("pinned slots") && message.contains("1152921504606846976 bytes"), "{message}");
    }
}
