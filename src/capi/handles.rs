//! Handles: what C holds in place of pointers. A handle is an index into a table and the generation of what lies there, so
//! that one that was closed is known as such, whatever lies there now.
//!
//! **Invariant**: whoever moved a slot's state to `BUSY` has its value, and nobody else follows it, until the state is moved
//! on. `LENT` means that its owner waits for a callback and does not touch the value meanwhile.

use std::{
    cell::UnsafeCell,
    ops::Deref,
    sync::{
        Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crossbeam_utils::{Backoff, CachePadded};

use super::ffi::{Failure, Result, ls_status};
use crate::{
    pipeline::{Canceller, Meter},
    trace::Stats,
};

/// From the low end: index, kind, and in the rest the generation (of a layer: its number).
const INDEX_BITS: u32 = 16;
const KIND_BITS: u32 = 4;
const LOW: u32 = INDEX_BITS + KIND_BITS;
const CHUNK: usize = 128;
const CHUNKS: usize = (1 << INDEX_BITS) / CHUNK;

/// What a handle stands for. Zero is no kind, so that a zeroed handle is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Checkpoint = 1,
    Device,
    Stream,
    Streamer,
    Layer,
    Statics,
    Model,
    Engine,
}

impl Kind {
    fn name(self) -> &'static str {
        ["", "checkpoint", "device", "stream", "streamer", "layer", "static tensors", "model", "engine"][self as usize]
    }

    /// The handle of something of this kind.
    pub(super) fn id(self, index: usize, generation: u64) -> u64 {
        generation << LOW | (self as u64) << INDEX_BITS | index as u64
    }

    /// Index and generation.
    ///
    /// # Errors
    /// `LS_CLOSED` for a handle of another kind.
    #[inline]
    pub(super) fn parts(self, id: u64) -> Result<(usize, u64)> {
        if (id >> INDEX_BITS) & ((1 << KIND_BITS) - 1) != self as u64 {
            return Err(self.closed());
        }
        Ok(((id & ((1 << INDEX_BITS) - 1)) as usize, id >> LOW))
    }

    #[cold]
    pub(super) fn closed(self) -> Failure {
        let how = if self == Self::Layer { "was released, or never taken" } else { "was closed, or never opened" };
        Failure::new(ls_status::LS_CLOSED, format!("the {} {how}", self.name()))
    }

    #[cold]
    fn busy(self) -> Failure {
        let cause = "is in use by another thread, or by the call that this callback was called from";
        Failure::new(ls_status::LS_BUSY, format!("the {} {cause}", self.name()))
    }

    #[cold]
    fn poisoned(self) -> Failure {
        let cause = "panicked before and can only be closed";
        Failure::new(ls_status::LS_PANICKED, format!("the {} {cause}", self.name()))
    }
}

const PHASE_BITS: u32 = 2;
const FREE: u64 = 0;
const IDLE: u64 = 1;
const BUSY: u64 = 2;
const LENT: u64 = 3;

struct HandleSlot<T> {
    /// Generation and phase.
    state: AtomicU64,
    /// A panic came out of it.
    poisoned: AtomicBool,
    value: UnsafeCell<Option<T>>,
    /// Apart from the value: used while that is busy.
    remote: Mutex<Option<Remote>>,
}

/// What any thread may do at any time with what streams.
pub(super) struct Remote {
    pub(super) canceller: Canceller,
    pub(super) meter: Meter,
}

type HandleChunk<T> = OnceLock<Box<[CachePadded<HandleSlot<T>>]>>;

/// Which slots are free: those that were, and all from `unused` on.
struct Free {
    returned: Vec<usize>,
    unused: usize,
}

/// All that is open of one kind.
pub(super) struct HandleTable<T: 'static> {
    kind: Kind,
    chunks: [HandleChunk<T>; CHUNKS],
    free: Mutex<Free>,
}

// SAFETY: values are reached by one thread at a time, by the module's invariant, and handed from thread to thread by the
// acquire and release of the state.
unsafe impl<T: Send> Sync for HandleTable<T> {}

/// A value that is this thread's until this is dropped.
pub(super) struct Entered<'t, T> {
    slot: &'t HandleSlot<T>,
    index: usize,
    /// The state to go back to.
    before: u64,
    /// Whether the thread was panicking before: then that is not this value's doing.
    panicking: bool,
}

impl<T: Send> HandleTable<T> {
    pub(super) const fn new(kind: Kind) -> Self {
        Self {
            kind,
            chunks: [const { OnceLock::new() }; CHUNKS],
            free: Mutex::new(Free { returned: Vec::new(), unused: 0 }),
        }
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().expect("nothing panics under this lock")
    }

    #[inline]
    fn slot(&self, index: usize) -> Result<&HandleSlot<T>> {
        let chunk = self.chunks[index / CHUNK].get().ok_or_else(|| self.kind.closed())?;
        Ok(&chunk[index % CHUNK])
    }

    /// Puts `value` into the table and returns its handle.
    ///
    /// # Errors
    /// `LS_MEMORY` if 65536 are open.
    pub(super) fn open(&self, value: T, remote: Option<Remote>) -> Result<u64> {
        let index = {
            let mut free = self.free();
            match free.returned.pop() {
                Some(index) => index,
                None if free.unused < CHUNK * CHUNKS => {
                    free.unused += 1;
                    free.unused - 1
                }
                None => {
                    let message = format!("{} of kind {} are open: close some", CHUNK * CHUNKS, self.kind.name());
                    return Err(Failure::new(ls_status::LS_MEMORY, message));
                }
            }
        };
        self.chunks[index / CHUNK].get_or_init(|| {
            let slot = || HandleSlot {
                state: AtomicU64::new(1 << PHASE_BITS | FREE),
                poisoned: AtomicBool::new(false),
                value: UnsafeCell::new(None),
                remote: Mutex::new(None),
            };
            (0..CHUNK).map(|_| CachePadded::new(slot())).collect()
        });
        let slot = self.slot(index)?;
        let generation = slot.state.load(Ordering::Relaxed) >> PHASE_BITS;
        // SAFETY: a free slot taken off the list is this call's, and nobody enters it before it is idle.
        unsafe { *slot.value.get() = Some(value) };
        slot.poisoned.store(false, Ordering::Relaxed);
        *slot.remote.lock().expect("nothing panics under this lock") = remote;
        slot.state.store(generation << PHASE_BITS | IDLE, Ordering::Release);
        Ok(self.kind.id(index, generation))
    }

    /// Takes the value for this thread, unless a call has it.
    ///
    /// # Errors
    /// `LS_CLOSED`, `LS_BUSY`, or `LS_PANICKED` once a panic came out of it.
    #[inline]
    pub(super) fn enter(&self, id: u64) -> Result<Entered<'_, T>> {
        let (index, generation) = self.kind.parts(id)?;
        self.acquire(index, Some(generation), false)
    }

    /// The same, also from inside a callback of the call that has it.
    #[inline]
    pub(super) fn enter_lent(&self, id: u64) -> Result<Entered<'_, T>> {
        let (index, generation) = self.kind.parts(id)?;
        self.acquire(index, Some(generation), true)
    }

    /// The same for whatever lies at `index`: the caller checks what that is.
    #[inline]
    pub(super) fn enter_at(&self, index: usize, lent: bool) -> Result<Entered<'_, T>> {
        self.acquire(index, None, lent)
    }

    #[inline]
    fn acquire(&self, index: usize, generation: Option<u64>, lent: bool) -> Result<Entered<'_, T>> {
        let slot = self.slot(index)?;
        let before = slot.state.load(Ordering::Relaxed);
        let (present, phase) = (before >> PHASE_BITS, before & ((1 << PHASE_BITS) - 1));
        if phase == FREE || generation.is_some_and(|generation| generation != present) {
            return Err(self.kind.closed());
        }
        if phase == BUSY || (phase == LENT && !lent) {
            return Err(self.kind.busy());
        }
        let busy = present << PHASE_BITS | BUSY;
        if slot.state.compare_exchange(before, busy, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return Err(self.kind.busy());
        }
        let entered = Entered { slot, index, before, panicking: thread::panicking() };
        if slot.poisoned.load(Ordering::Relaxed) { Err(self.kind.poisoned()) } else { Ok(entered) }
    }

    /// Takes the value out of the table, if `may_close` agrees; the handle is then closed. A poisoned one always is.
    pub(super) fn close(&self, id: u64, may_close: impl FnOnce(&T) -> Result<()>) -> Result<T> {
        let (index, generation) = self.kind.parts(id)?;
        let entered = match self.acquire(index, Some(generation), false) {
            Ok(entered) => {
                may_close(&entered)?;
                entered
            }
            Err(failure) if failure.status == ls_status::LS_PANICKED => {
                let slot = self.slot(index)?;
                let [idle, busy] = [IDLE, BUSY].map(|phase| generation << PHASE_BITS | phase);
                let taken = slot.state.compare_exchange(idle, busy, Ordering::Acquire, Ordering::Relaxed);
                let before = taken.map_err(|_| self.kind.busy())?;
                Entered { slot, index, before, panicking: thread::panicking() }
            }
            Err(failure) => return Err(failure),
        };
        let slot = entered.slot;
        // From here on the slot is left free, not as it was.
        std::mem::forget(entered);
        *slot.remote.lock().expect("nothing panics under this lock") = None;
        // SAFETY: the state is busy, and this call made it so.
        let value = unsafe { (*slot.value.get()).take() };
        slot.state.store((generation + 1) << PHASE_BITS | FREE, Ordering::Release);
        self.free().returned.push(index);
        value.ok_or_else(|| self.kind.closed())
    }

    /// Cancels what the handle's value does, from any thread.
    ///
    /// # Errors
    /// `LS_CLOSED`.
    pub(super) fn cancel(&self, id: u64) -> Result<()> {
        self.with_remote(id, |remote| remote.canceller.cancel())
    }

    /// What the handle's value has moved, from any thread.
    ///
    /// # Errors
    /// `LS_CLOSED`.
    pub(super) fn stats(&self, id: u64) -> Result<Stats> {
        self.with_remote(id, |remote| remote.meter.stats())
    }

    fn with_remote<R>(&self, id: u64, call: impl FnOnce(&Remote) -> R) -> Result<R> {
        let (index, generation) = self.kind.parts(id)?;
        let slot = self.slot(index)?;
        // It is closed under this lock.
        let remote = slot.remote.lock().expect("nothing panics under this lock");
        match &*remote {
            Some(remote) if slot.state.load(Ordering::Acquire) >> PHASE_BITS == generation => Ok(call(remote)),
            _ => Err(self.kind.closed()),
        }
    }
}

impl<T> Entered<'_, T> {
    /// Where in the table it lies.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Runs a callback, in which [`HandleTable::enter_lent`] may have the value.
    pub(super) fn lend<R>(&self, callback: impl FnOnce() -> R) -> R {
        let [busy, lent] = [BUSY, LENT].map(|phase| self.before & !((1 << PHASE_BITS) - 1) | phase);
        self.slot.state.store(lent, Ordering::Release);
        let returned = callback();
        // Another thread may be in the middle of a call that is allowed meanwhile; most are short.
        let backoff = Backoff::new();
        while self.slot.state.compare_exchange(lent, busy, Ordering::Acquire, Ordering::Relaxed).is_err() {
            match backoff.is_completed() {
                true => thread::sleep(Duration::from_micros(100)),
                false => backoff.snooze(),
            }
        }
        returned
    }
}

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the state is busy, and this thread made it so; the value is there while the slot is not free.
        unsafe { (*self.slot.value.get()).as_ref().unwrap_unchecked() }
    }
}

impl<T> Drop for Entered<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if !self.panicking && thread::panicking() {
            self.slot.poisoned.store(true, Ordering::Relaxed);
        }
        self.slot.state.store(self.before, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::{super::ffi::ffi, ls_status::*, *};

    fn status<T>(result: Result<T>) -> ls_status {
        result.map_or_else(|failure| failure.status, |_| LS_OK)
    }

    #[test]
    fn a_closed_handle_stays_closed_whatever_takes_its_place() {
        static TABLE: HandleTable<u32> = HandleTable::new(Kind::Device);
        let first = TABLE.open(1, None).unwrap();
        assert_eq!(*TABLE.enter(first).unwrap(), 1);
        assert_eq!(TABLE.close(first, |_| Ok(())).unwrap(), 1);
        let second = TABLE.open(2, None).unwrap();
        assert_eq!(status(TABLE.enter(first)), LS_CLOSED);
        assert_eq!(status(TABLE.close(first, |_| Ok(()))), LS_CLOSED);
        assert_eq!(*TABLE.enter(second).unwrap(), 2);
        for id in [0, u64::MAX, second + 1, second ^ 1 << INDEX_BITS, second + (1 << LOW), 7] {
            assert_eq!(status(TABLE.enter(id)), LS_CLOSED, "{id:#x}");
        }
        let refused = TABLE.close(second, |_| Err(Failure::new(LS_LAYERS_HELD, "")));
        assert_eq!(status(refused), LS_LAYERS_HELD);
        assert_eq!(*TABLE.enter(second).unwrap(), 2, "and is open still");
    }

    #[test]
    fn what_is_entered_is_busy_and_what_is_lent_is_so_for_most() {
        static TABLE: HandleTable<u32> = HandleTable::new(Kind::Stream);
        let id = TABLE.open(1, None).unwrap();
        let entered = TABLE.enter(id).unwrap();
        assert_eq!((status(TABLE.enter(id)), status(TABLE.enter_lent(id))), (LS_BUSY, LS_BUSY));
        assert_eq!(status(TABLE.close(id, |_| Ok(()))), LS_BUSY);
        entered.lend(|| {
            assert_eq!(status(TABLE.enter(id)), LS_BUSY);
            assert_eq!(status(TABLE.close(id, |_| Ok(()))), LS_BUSY);
            assert_eq!(*TABLE.enter_lent(id).unwrap(), 1);
            assert_eq!(*TABLE.enter_lent(id).unwrap(), 1);
        });
        assert_eq!(status(TABLE.enter_lent(id)), LS_BUSY);
        drop(entered);
        assert_eq!(status(TABLE.enter(id)), LS_OK);
    }

    #[test]
    fn a_panic_is_a_status_and_poisons_its_handle_alone() {
        static TABLE: HandleTable<u32> = HandleTable::new(Kind::Model);
        let [bad, good] = [1, 2].map(|value| TABLE.open(value, None).unwrap());
        let panicked = ffi(|| {
            let _entered = TABLE.enter(bad)?;
            panic!("on purpose");
        });
        assert_eq!(panicked, LS_PANICKED);
        // SAFETY: it is never NULL.
        let message = unsafe { std::ffi::CStr::from_ptr(super::super::ffi::ls_last_error()) };
        assert!(message.to_str().unwrap().contains("on purpose"), "{message:?}");
        assert_eq!((status(TABLE.enter(bad)), status(TABLE.enter_lent(bad))), (LS_PANICKED, LS_PANICKED));
        assert_eq!(status(TABLE.enter(good)), LS_OK);
        assert_eq!(TABLE.close(bad, |_| unreachable!("not asked")).unwrap(), 1);
        assert_eq!(status(TABLE.enter(bad)), LS_CLOSED);
    }

    #[test]
    fn threads_that_enter_and_lend_at_once_never_meet_inside() {
        static TABLE: HandleTable<UnsafeCell<u64>> = HandleTable::new(Kind::Streamer);
        let id = TABLE.open(UnsafeCell::new(0), None).unwrap();
        let entered = AtomicUsize::new(0);
        let work = |lends: bool| {
            let mut times = 0;
            while times < 20_000 {
                let Ok(value) = (if lends { TABLE.enter(id) } else { TABLE.enter_lent(id) }) else { continue };
                // SAFETY: what is tested is that this is the only one.
                unsafe { *value.get() += 1 };
                if lends {
                    value.lend(|| std::hint::black_box(()));
                    // SAFETY: the state is busy, and this thread made it so: nobody else follows the value.
                    unsafe { *value.get() += 1 };
                }
                times += 1;
                entered.fetch_add(1 + usize::from(lends), Ordering::Relaxed);
            }
        };
        thread::scope(|scope| [true, false, false].map(|lends| scope.spawn(move || work(lends)).thread().id()));
        let value = TABLE.close(id, |_| Ok(())).unwrap().into_inner();
        assert_eq!(value as usize, entered.into_inner());
    }
}
