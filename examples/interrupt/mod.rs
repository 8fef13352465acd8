//! Ctrl-C in programs that have something to keep: the first is noted, the next ends the process.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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
