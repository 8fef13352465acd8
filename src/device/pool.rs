//! The threads that compute for the CPU device: the caller and one less than there are processors.
//!
//! A call's work is numbered pieces, which whoever is free takes by a counter. A call waits for the pieces, not for threads: one
//! that the operating system does not run in time joins nothing. Threads look for the next call for [`SPIN`], then sleep.
//! Calls of several threads take turns. A piece must not make a call of its own.
//!
//! **Invariant**: `job` is written only by the caller whose turn it is, while the gate is closed and nobody is inside; threads
//! read it only while they are inside.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    error::{Error, Result},
    sync::{self, AtomicBool, AtomicUsize, Condvar, JoinHandle, Mutex, Ordering::*, UnsafeCell, spin_loop, yield_now},
};

/// How long a thread without work looks for more before it sleeps: longer than the pause between two kernels of a layer.
const SPIN: Duration = Duration::from_micros(50);

/// How often it looks before it looks at the clock. A model has no clock, and each look makes it larger.
const LOOKS: usize = if cfg!(loom) { 1 } else { 64 };

/// Whether to stop spinning.
fn spun(since: Instant) -> bool {
    cfg!(loom) || since.elapsed() > SPIN
}

/// Bits of the gate: how many threads are inside, whether more may come in, and the job's number above them.
const INSIDE: usize = (1 << 16) - 1;
const OPEN: usize = 1 << 16;
const NUMBER: usize = 1 << 17;

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    pieces: usize,
}

struct Shared {
    gate: AtomicUsize,
    /// The next piece.
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
    /// What the first piece that panicked left.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is the only part that is not shared safely by itself; the module's invariant says who uses it when, and its
// closure may be called from any thread.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing belongs to the thread that made it.
unsafe impl Send for Shared {}

pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

/// How many threads compute, the caller's included: as LAYER_STREAMER_THREADS says, else as there are processors that this process
/// may use.
fn threads() -> Result<usize> {
    const NAME: &str = "LAYER_STREAMER_THREADS";
    let Some(set) = std::env::var_os(NAME) else { return Ok(thread::available_parallelism().map_or(1, usize::from)) };
    let threads = set.to_str().and_then(|set| set.parse().ok()).filter(|threads| (1..=INSIDE).contains(threads));
    threads.ok_or_else(|| Error::setting(NAME, format!("is {}, expected a number from 1 to {INSIDE}", set.display())))
}

/// The threads of all that the process computes on the CPU. The first to ask starts them.
///
/// # Errors
/// [`Error::Thread`] where they cannot be started, and [`Error::Setting`] where their number is none.
#[cfg(not(loom))]
pub(crate) fn pool() -> Result<&'static Pool> {
    static POOL: OnceLock<Pool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let started = Pool::start(threads()? - 1)?;
    // Of two that are made at once, one is kept.
    Ok(POOL.get_or_init(|| started))
}

impl Pool {
    pub(crate) fn start(threads: usize) -> Result<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { work: &|_| {}, pieces: 0 }),
            asleep: AtomicUsize::new(0),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, threads: Vec::new(), turn: Mutex::new(()) };
        for number in 0..threads {
            let shared = pool.shared.clone();
            let thread = sync::start(&format!("ls-kernels-{number}"), move || shared.help());
            // The threads so far end with the pool.
            pool.threads.push(thread.map_err(|source| Error::Thread { stage: "kernels", source: source.into() })?);
        }
        Ok(pool)
    }

    /// How many threads compute, the caller's included.
    #[cfg(any(loom, feature = "model"))]
    pub(crate) fn size(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work` with each number below `pieces`, in parallel.
    ///
    /// # Panics
    /// If a piece did, with what it panicked with, once no thread calls `work` any more.
    pub(crate) fn deal(&self, pieces: usize, work: impl Fn(usize) + Sync) {
        let work: &(dyn Fn(usize) + Sync) = &work;
        if pieces < 2 || self.threads.is_empty() {
            return (0..pieces).for_each(work);
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: the lifetime is all that changes, and nobody reads the job after this function, by `close`.
        let work = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(work) };
        // SAFETY: it is this caller's turn, and the one before left the gate closed and nobody inside.
        shared.job.with_mut(|job| unsafe { *job = Job { work, pieces } });
        shared.next.store(0, Relaxed);
        let number = shared.gate.load(Relaxed) / NUMBER;
        // In one order with `asleep`: a thread that goes to sleep sees the open gate, or is seen here.
        shared.gate.store(number.wrapping_add(1).wrapping_mul(NUMBER) | OPEN, SeqCst);
        if shared.asleep.load(SeqCst) > 0 {
            drop(shared.bed.lock());
            shared.alarm.notify_all();
        }
        shared.pieces();
        shared.close();
        let panicked = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }

    /// How many threads sleep.
    #[cfg(test)]
    pub(crate) fn asleep(&self) -> usize {
        self.shared.asleep.load(SeqCst)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.bed.lock());
        self.shared.alarm.notify_all();
        for thread in self.threads.drain(..) {
            // It catches what pieces panic with, and has no other cause to.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A thread's life.
    fn help(&self) {
        let mut last = 0;
        while let Some(number) = self.enter(last) {
            last = number;
            self.pieces();
            self.gate.fetch_sub(1, Release);
        }
    }

    /// Waits for a job other than the last one, and goes inside; `None`: the pool ends.
    fn enter(&self, last: usize) -> Option<usize> {
        let mut since = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let gate = self.gate.load(Relaxed);
                if opens(gate, last) && self.gate.compare_exchange(gate, gate + 1, Acquire, Relaxed).is_ok() {
                    return Some(gate / NUMBER);
                }
                spin_loop();
            }
            if self.stop.load(Relaxed) {
                return None;
            }
            if spun(since) {
                self.sleep(last);
                since = Instant::now();
            }
        }
    }

    fn sleep(&self, last: usize) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, SeqCst);
        while !opens(self.gate.load(SeqCst), last) && !self.stop.load(SeqCst) {
            bed = self.alarm.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, SeqCst);
    }

    /// Takes pieces until there are no more.
    fn pieces(&self) {
        // SAFETY: this is the caller whose turn it is, or a thread inside.
        let job = self.job.with(|job| unsafe { *job });
        // SAFETY: the caller has lent the closure until nobody is inside.
        let work = unsafe { &*job.work };
        let all = || {
            loop {
                let piece = self.next.fetch_add(1, Relaxed);
                if piece >= job.pieces {
                    return;
                }
                work(piece);
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(all)) {
            self.next.store(job.pieces, Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    /// Lets nobody in any more, and waits for those inside, who have at most the piece that they are at left.
    fn close(&self) {
        let mut gate = self.gate.fetch_and(!OPEN, Acquire);
        let since = Instant::now();
        while gate & INSIDE != 0 {
            // Where there are more threads than processors, the one that is waited for may need this one's.
            if spun(since) {
                yield_now()
            } else {
                spin_loop()
            }
            gate = self.gate.load(Acquire);
        }
    }
}

/// Whether a thread may go in that was at job `last`.
fn opens(gate: usize, last: usize) -> bool {
    gate & OPEN != 0 && gate / NUMBER != last
}
