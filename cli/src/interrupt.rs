//! Ctrl-C in programs that have something to keep: the first is noted, the next ends the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use layer_streamer::Canceller;

/// How many there were.
static NOTED: AtomicU32 = AtomicU32::new(0);

/// How many are only noted. The next one ends the process, and what it has started with it.
static MOST: AtomicU32 = AtomicU32::new(1);

extern "C" fn note(_: libc::c_int) {
    if NOTED.fetch_add(1, Relaxed) + 1 >= MOST.load(Relaxed) {
        leave();
    }
}

/// From now on the first Ctrl-C is only noted.
pub fn listen() {
    // SAFETY: the handler does nothing that a handler may not.
    unsafe { libc::signal(libc::SIGINT, note as *const () as libc::sighandler_t) };
}

/// From now on any Ctrl-C ends the process, until someone listens again.
pub fn leave() {
    // SAFETY: no memory is involved, and a handler may call this.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
}

/// Forgets what was noted. From now on so many are only noted, where someone listens.
pub fn forget(most: u32) {
    MOST.store(most, Relaxed);
    NOTED.store(0, Relaxed);
}

/// Whether there was one.
pub fn is_noted() -> bool {
    NOTED.load(Relaxed) > 0
}

/// From now on Ctrl-C ends the pass under way, until this is dropped: what was generated, the figures and the trace remain.
pub struct Interrupts(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Interrupts {
    pub fn cancel(canceller: Canceller) -> Self {
        listen();
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let watch = move || {
            while !ended.load(Relaxed) {
                if is_noted() {
                    return canceller.cancel();
                }
                thread::park_timeout(Duration::from_millis(50));
            }
        };
        // Without the thread, Ctrl-C ends the run with the token under way.
        Self(over, thread::Builder::new().spawn(watch).ok())
    }
}

impl Drop for Interrupts {
    /// Nothing is cancelled after this.
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        if let Some(watch) = self.1.take() {
            watch.thread().unpark();
            let _ = watch.join();
        }
    }
}
