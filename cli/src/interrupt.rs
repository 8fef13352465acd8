//! Ctrl-C in programs that have something to keep: the first is noted, the next ends the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use layer_streamer::Canceller;

static NOTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    NOTED.store(true, Relaxed);
    // SAFETY: no memory is involved. The next one ends the process, and what it has started with it.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
}

/// From now on the first Ctrl-C is only noted.
pub fn listen() {
    // SAFETY: the handler does nothing that a handler may not.
    unsafe { libc::signal(libc::SIGINT, note as *const () as libc::sighandler_t) };
}

/// Whether there was one.
pub fn is_noted() -> bool {
    NOTED.load(Relaxed)
}

/// From now on Ctrl-C ends the pass under way, until this is dropped: what was generated, the figures and the trace remain.
pub struct Interrupts(Arc<AtomicBool>);

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
                thread::sleep(Duration::from_millis(50));
            }
        };
        // Without the thread, Ctrl-C ends the run with the token under way.
        let _ = thread::Builder::new().spawn(watch);
        Self(over)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
