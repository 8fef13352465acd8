//! Faults that tests put between the system's answer to a read and the engine that asked for it.

use std::{
    cell::RefCell,
    io,
    path::Path,
    sync::{Arc, Mutex},
};

/// What bytes are that the system brought and a fault took away again.
const POISON: u8 = 0x5a;

/// A read that has ended.
pub(crate) struct Attempt<'a> {
    pub(crate) path: &'a Path,
    /// Where it started in the file, and how much it asked for.
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// Whether it is the one that finds out whether a file allows O_DIRECT.
    pub(crate) trial: bool,
    /// The system's answer.
    pub(crate) result: io::Result<usize>,
}

/// Turns answers into others: an error, or a count that is no larger.
type FaultPlan = Box<dyn FnMut(Attempt<'_>) -> io::Result<usize> + Send>;

/// Turns calls of io_uring_enter into errors.
type Enters = Box<dyn FnMut() -> Option<i32> + Send>;

/// Tells whether the page cache has given up what it had.
type GivenUp = Box<dyn FnMut() -> bool + Send>;

/// Tells which reads never end: the engine does not learn of their end.
type Never = Box<dyn FnMut(&Path, u64) -> bool + Send>;

/// The plan that all files of one streamer share.
#[derive(Clone, Default)]
pub(crate) struct Faults {
    answers: Arc<Mutex<Option<FaultPlan>>>,
    enters: Arc<Mutex<Option<Enters>>>,
    never: Arc<Mutex<Option<Never>>>,
    given_up: Arc<Mutex<Option<GivenUp>>>,
}

/// Whether this system has no ring to fail, which is said.
pub(crate) fn no_rings() -> bool {
    let refused = io_uring::IoUring::new(1).and_then(|ring| ring.submit()).err();
    if let Some(error) = &refused {
        eprintln!("skipped: there is no io_uring to fail: {error}");
    }
    refused.is_some()
}

thread_local! {
    static NEXT: RefCell<Faults> = RefCell::default();
}

impl Faults {
    /// For the files that this thread opens from now on.
    pub(crate) fn plan(plan: impl FnMut(Attempt<'_>) -> io::Result<usize> + Send + 'static) -> Self {
        let faults = Self { answers: Arc::new(Mutex::new(Some(Box::new(plan)))), ..Self::default() };
        NEXT.set(faults.clone());
        faults
    }

    /// Also for rings over these files: an error in place of a call, where `plan` has one.
    pub(crate) fn plan_enters(&self, plan: impl FnMut() -> Option<i32> + Send + 'static) {
        *self.enters.lock().unwrap() = Some(Box::new(plan));
    }

    /// A ring that takes reads once and then fails, while none of them ends.
    pub(crate) fn of_a_ring_that_fails_with_reads_that_never_end() -> Self {
        let (faults, mut calls) = (Self::plan(|attempt| attempt.result), 0);
        faults.plan_never(|_, _| true);
        faults.plan_enters(move || {
            calls += 1;
            (calls > 1).then_some(libc::EIO)
        });
        faults
    }

    /// Also for reads of these files: those of which `plan` says so never end.
    pub(crate) fn plan_never(&self, plan: impl FnMut(&Path, u64) -> bool + Send + 'static) {
        *self.never.lock().unwrap() = Some(Box::new(plan));
    }

    /// Also for what the page cache has of these files: it is not there whenever `plan` says so.
    pub(crate) fn plan_given_up(&self, plan: impl FnMut() -> bool + Send + 'static) {
        *self.given_up.lock().unwrap() = Some(Box::new(plan));
    }

    pub(crate) fn has_given_up(&self) -> bool {
        self.given_up.lock().unwrap().as_mut().is_some_and(|plan| plan())
    }

    pub(crate) fn enter(&self) -> Option<i32> {
        self.enters.lock().unwrap().as_mut().and_then(|plan| plan())
    }

    pub(crate) fn never_ends(&self, path: &Path, offset: u64) -> bool {
        self.never.lock().unwrap().as_mut().is_some_and(|plan| plan(path, offset))
    }

    /// Those planned for the files that this thread opens.
    pub(crate) fn of_this_thread() -> Self {
        NEXT.with_borrow(Self::clone)
    }

    /// Heals the disk.
    pub(crate) fn end(&self) {
        *self.answers.lock().unwrap() = None;
        *self.enters.lock().unwrap() = None;
        *self.never.lock().unwrap() = None;
        *self.given_up.lock().unwrap() = None;
    }

    /// The answer to use; what it takes away of what was read to `to` is gone.
    ///
    /// # Safety
    /// `to` points to as many writable bytes as the system's answer counts.
    pub(crate) unsafe fn apply(&self, attempt: Attempt<'_>, to: *mut u8) -> io::Result<usize> {
        let read = *attempt.result.as_ref().unwrap_or(&0);
        let result = match &mut *self.answers.lock().unwrap() {
            Some(plan) => plan(attempt),
            None => return attempt.result,
        };
        let kept = *result.as_ref().unwrap_or(&0);
        assert!(kept <= read, "a fault brings no bytes");
        // SAFETY: the caller promised that as many bytes as were read may be written there.
        unsafe { to.add(kept).write_bytes(POISON, read - kept) };
        result
    }
}
