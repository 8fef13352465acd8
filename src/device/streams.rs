//! Streams and events by CUDA's rules, on the CPU: a stream is a thread with a queue, an event a marker in it. The emulated
//! runtime is built on it, and the asynchronous device of unit tests.
//!
//! Everything is ordered by atomics in this file, with futexes to sleep on, because the thread sanitizer does not see inside
//! the standard library's locks. And nothing is ordered that CUDA leaves open: a thread that enqueues learns nothing of what
//! the stream has done, so that a wait forgotten elsewhere is a race in the sanitizer's eyes too.

use std::{
    cell::UnsafeCell,
    io, ptr,
    sync::{
        Arc,
        atomic::{
            AtomicPtr, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    thread,
    time::Duration,
};

/// Sleeps unless `word` is no longer `seen`. It may return early.
fn sleep_while(word: &AtomicU32, seen: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives throughout the call; without a timeout the rest is not read.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, seen, ptr::null::<libc::timespec>()) };
}

/// Wakes everyone who sleeps on the word.
fn wake(word: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: only the address counts.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}

/// A random sequence (splitmix64) that any thread may draw from.
pub(crate) struct Dice(AtomicU64);

impl Dice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    #[cfg(cuda_emulated)]
    pub(crate) fn seed(&self, seed: u64) {
        self.0.store(seed, Relaxed);
    }

    pub(crate) fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut x = self.0.fetch_add(STEP, Relaxed).wrapping_add(STEP);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Mostly none, one time in `rarity` enough for other threads to overtake.
    pub(crate) fn delay(&self, rarity: u64) -> Duration {
        let x = self.next();
        Duration::from_micros(if x.is_multiple_of(rarity) { (x >> 32) % 400 } else { 0 })
    }
}

/// Sleeps, or goes on at once.
pub(crate) fn pause(delay: Duration) {
    if !delay.is_zero() {
        thread::sleep(delay);
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A piece of work, or the end of the stream, and what was pushed after it.
struct Node {
    work: UnsafeCell<Option<Work>>,
    next: AtomicPtr<Node>,
}

impl Node {
    fn new(work: Option<Work>) -> *mut Self {
        Box::into_raw(Box::new(Self { work: UnsafeCell::new(work), next: AtomicPtr::default() }))
    }
}

struct WorkQueue {
    last: AtomicPtr<Node>,
    /// How many were pushed, to sleep on.
    pushed: AtomicU32,
}

/// A queue of work that a thread of its own runs in order.
pub(crate) struct Stream(Arc<WorkQueue>);

impl Stream {
    pub(crate) fn new() -> io::Result<Self> {
        let first = Along(Node::new(None));
        let queue = Arc::new(WorkQueue { last: AtomicPtr::new(first.0), pushed: AtomicU32::new(0) });
        let inside = queue.clone();
        let run = move || {
            let Along(first) = { first };
            // SAFETY: the queue was made with it.
            unsafe { run(&inside, first) };
        };
        match thread::Builder::new().name("cuda-stream".into()).spawn(run) {
            Ok(_) => Ok(Self(queue)),
            Err(error) => {
                // SAFETY: no thread was started, and nothing was pushed.
                drop(unsafe { Box::from_raw(queue.last.load(Relaxed)) });
                Err(error)
            }
        }
    }

    fn push_node(&self, work: Option<Work>) {
        let node = Node::new(work);
        let before = self.0.last.swap(node, AcqRel);
        // SAFETY: the thread frees a node once it has seen the one after it, which is this.
        unsafe { (*before).next.store(node, Release) };
        self.0.pushed.fetch_add(1, Release);
        wake(&self.0.pushed);
    }

    /// Enqueues work.
    pub(crate) fn push(&self, work: impl FnOnce() + Send + 'static) {
        self.push_node(Some(Box::new(work)));
    }

    /// Lets the thread end when it has done what is enqueued. Nothing may be pushed any more.
    pub(crate) fn end(&self) {
        self.push_node(None);
    }

    /// Enqueues a mark.
    pub(crate) fn mark(&self) -> Arc<Milestone> {
        let mark = Arc::new(Milestone::default());
        let reached = mark.clone();
        self.push(move || reached.reach());
        mark
    }

    /// Marks the present end of the stream's work.
    pub(crate) fn record(&self, event: &Event) {
        event.set(self.mark());
    }

    /// Makes later work wait for the newest record of `event`.
    pub(crate) fn wait(&self, event: &Event) {
        if let Some(mark) = event.newest() {
            self.push(move || mark.wait());
        }
    }
}

/// The stream's thread.
///
/// # Safety
/// `first` is the queue's first node, and nobody else's.
unsafe fn run(queue: &WorkQueue, mut first: *mut Node) {
    loop {
        let seen = queue.pushed.load(Acquire);
        // SAFETY: the node is this thread's until a later one is.
        let next = unsafe { (*first).next.load(Acquire) };
        if next.is_null() {
            sleep_while(&queue.pushed, seen);
            continue;
        }
        // SAFETY: whoever pushed `next` has stored it, and was the last to touch `first`.
        drop(unsafe { Box::from_raw(first) });
        first = next;
        // SAFETY: the node is this thread's, and was filled before it was pushed.
        match unsafe { (*first).work.get().as_mut() }.and_then(Option::take) {
            Some(work) => work(),
            None => break,
        }
    }
    // SAFETY: nothing is pushed after the end.
    drop(unsafe { Box::from_raw(first) });
}

/// A place in a stream's work.
#[derive(Default)]
pub(crate) struct Milestone {
    reached: AtomicU32,
    /// When it was, in nanoseconds of the monotonic clock.
    at: AtomicU64,
}

impl Milestone {
    fn reach(&self) {
        self.at.store(now(), Relaxed);
        self.reached.store(1, Release);
        wake(&self.reached);
    }

    pub(crate) fn is_reached(&self) -> bool {
        self.reached.load(Acquire) == 1
    }

    pub(crate) fn wait(&self) {
        while !self.is_reached() {
            sleep_while(&self.reached, 0);
        }
    }
}

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is the call's.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A record of an event, and those before it.
struct EventRecord {
    mark: Arc<Milestone>,
    before: *mut EventRecord,
}

/// A marker that streams and threads wait for: its newest record when they ask. Records are kept as long as the event is, so
/// that asking takes no lock.
#[derive(Default)]
pub(crate) struct Event {
    newest: AtomicPtr<EventRecord>,
    /// Whether it was made to tell when it is reached.
    #[cfg(cuda_emulated)]
    pub(crate) timed: bool,
}

impl Event {
    #[cfg(cuda_emulated)]
    pub(crate) fn new(timed: bool) -> Self {
        Self { timed, newest: AtomicPtr::default() }
    }

    fn set(&self, mark: Arc<Milestone>) {
        let record = Box::into_raw(Box::new(EventRecord { mark, before: ptr::null_mut() }));
        let before = self.newest.swap(record, AcqRel);
        // SAFETY: the field is read by `forget` alone.
        unsafe { (*record).before = before };
    }

    fn newest(&self) -> Option<Arc<Milestone>> {
        // SAFETY: records are freed by `forget` alone.
        unsafe { self.newest.load(Acquire).as_ref() }.map(|record| record.mark.clone())
    }

    /// Whether the newest record was reached; one that never was recorded counts as reached.
    pub(crate) fn is_reached(&self) -> bool {
        // SAFETY: records are freed by `forget` alone.
        unsafe { self.newest.load(Acquire).as_ref() }.is_none_or(|record| record.mark.is_reached())
    }

    /// When the newest record was reached, in nanoseconds of the monotonic clock; `None` if it was not, or there is none.
    pub(crate) fn reached_at(&self) -> Option<u64> {
        let mark = self.newest()?;
        mark.is_reached().then(|| mark.at.load(Relaxed))
    }

    /// Blocks until it was.
    pub(crate) fn synchronize(&self) {
        if let Some(mark) = self.newest() {
            mark.wait();
        }
    }

    /// Frees the records.
    ///
    /// # Safety
    /// Nobody else uses the event.
    pub(crate) unsafe fn forget(&self) {
        let mut record = self.newest.swap(ptr::null_mut(), AcqRel);
        while !record.is_null() {
            // SAFETY: it came from a box, and is reached from here only.
            record = unsafe { Box::from_raw(record) }.before;
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is borrowed mutably.
        unsafe { self.forget() };
    }
}

/// Addresses that a closure takes along.
#[derive(Clone, Copy)]
pub(crate) struct Along<T>(pub(crate) T);

// SAFETY: plain addresses; whoever enqueues the closure keeps what they point to valid until it has run.
unsafe impl<T> Send for Along<T> {}
