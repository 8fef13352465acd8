//! Functions of the caller's that are told how a pass goes and what happens.

use std::ffi::{CStr, c_char, c_void};

use super::ffi::c_line;
use crate::{
    error::Error,
    pipeline::Progress,
    plan::Part,
    trace::{Mark, Observer, Stats},
};

/// How much a line of the log matters.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_log_level {
    /// For whoever wonders what it does.
    LS_LOG_INFO = 0,
    /// Something is slower, or costs more, than it need be.
    LS_LOG_WARNING = 1,
    /// Something failed. Some call returns the same as its status, now or when it is the unit's turn.
    LS_LOG_ERROR = 2,
}

use ls_log_level::*;

/// How far a pass has come.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_progress {
    /// Passes completed before this one.
    pub passes: u64,
    /// Units of this pass handed over so far.
    pub done: usize,
    /// Units of a pass.
    pub units: usize,
    /// Bytes of this unit, as stored.
    pub bytes: usize,
}

/// Called for every unit handed over, in the thread that takes it. It must not call the streamer (LS_BUSY), and must return:
/// neither longjmp nor an exception may leave it.
pub type ls_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, progress: *const ls_progress)>;

/// Told what happens, as one line without a newline; `level` is an ls_log_level, `message` is the library's and lasts for the
/// call. Once opened: what memory is taken, who reads and why no faster reader does, files that are read through the page
/// cache alone and why. Later: rewinds, passes that were cancelled, errors where they happen, memory that cannot be given
/// back. Nothing in a pass that goes well, and no line about a rewind or a cancel allocates.
///
/// Called from any thread, also from several at once, until the close returns (or the open, if that fails). It must not call
/// the streamer or model that tells it, but for ls_cancel and ls_model_cancel. The rest is as for ls_progress_fn.
pub type ls_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: i32, message: *const c_char)>;

/// A function of the caller's with what it is given.
#[derive(Clone, Copy)]
pub(super) struct Callback<F> {
    function: F,
    user: *mut c_void,
}

// SAFETY: the header says from which threads it is called; what it is given is the caller's.
unsafe impl<F: Send> Send for Callback<F> {}
// SAFETY: the header says that it may be called from several threads at once.
unsafe impl<F: Sync> Sync for Callback<F> {}

impl<F> Callback<F> {
    pub(super) fn new(function: Option<F>, user: *mut c_void) -> Option<Self> {
        function.map(|function| Self { function, user })
    }
}

impl Callback<unsafe extern "C" fn(*mut c_void, *const ls_progress)> {
    pub(super) fn report(&self, Progress { passes, done, units, bytes }: Progress) {
        // SAFETY: the caller's own function, with what it asked for.
        unsafe { (self.function)(self.user, &ls_progress { passes, done, units, bytes }) };
    }
}

pub(super) type Reporter = Callback<unsafe extern "C" fn(*mut c_void, *const ls_progress)>;

/// The caller's log.
pub(super) struct Log(pub(super) Callback<unsafe extern "C" fn(*mut c_void, i32, *const c_char)>);

impl Log {
    fn say(&self, level: ls_log_level, message: &CStr) {
        // SAFETY: the caller's own function, with what it asked for.
        unsafe { (self.0.function)(self.0.user, level as i32, message.as_ptr()) };
    }

    /// What was just opened takes, and how it reads.
    pub(super) fn opened(&self, memory: &[Part], stats: &Stats) {
        for part in memory {
            let place = if part.is_on_device() { "on the device" } else { "in RAM" };
            self.say(LS_LOG_INFO, &c_line(format!("{}: {} bytes {place}", part.purpose, part.bytes)));
        }
        let Stats { reader, reader_reason: reason, .. } = stats;
        match reason.as_str() {
            "" => self.say(LS_LOG_INFO, &c_line(format!("reads by {reader}"))),
            why => self.say(LS_LOG_WARNING, &c_line(format!("reads by {reader}: {why}"))),
        }
        for (path, why) in &stats.buffered_files {
            let message = format!("{} is read through the page cache alone: {why}", path.display());
            self.say(LS_LOG_WARNING, &c_line(message));
        }
    }
}

impl Observer for Log {
    fn mark(&self, mark: &Mark) {
        match mark {
            Mark::PassBegun { .. } | Mark::PassEnded { .. } | Mark::Late { .. } => {}
            // Everyday matters, asked for by callers who may not want memory allocated for them.
            Mark::Rewind => self.say(LS_LOG_INFO, c"rewound: the next unit is the first"),
            Mark::Cancelled => self.say(LS_LOG_INFO, c"the pass was cancelled"),
            Mark::Silent { file, since } => {
                let message =
                    format!("{}: no read has ended for {} s; the pass waits", file.display(), since.as_secs());
                self.say(LS_LOG_WARNING, &c_line(message));
            }
            Mark::Failed(error) => self.say(LS_LOG_ERROR, &c_line(error.to_string())),
            Mark::Leaked { bytes } => {
                self.say(LS_LOG_ERROR, &c_line(Error::Leaked { bytes: *bytes }.to_string()));
            }
        }
    }
}
