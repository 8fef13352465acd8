//! The CUDA runtime, emulated on the CPU, so that every line that calls CUDA runs where no GPU is: the crate built with
//! `LAYER_STREAMER_CUDA=emulated` finds these functions where it expects NVIDIA's. `cuda/emulation` runs the kernels themselves.
//!
//! The rules are CUDA's, and where those leave a choice the emulation takes the one that finds more mistakes:
//! - Two devices. Current is a thread's own choice. A stream or event of one does not work with the other's.
//! - Work runs later, in threads, delayed at random from a seed. Copies fill their target with junk first.
//! - A copy from or to host memory that was not registered keeps its caller until it is done, and is counted.
//! - Device memory ends at an inaccessible page, begins behind bytes that are checked, and is NaN before it is written; once
//!   freed it is inaccessible. A copy stays inside one allocation. Freeing waits for the device.
//! - Memory that a copy still uses must not be unregistered.
//! - A fault loses the device's context: later work is skipped, and every later call returns the error.
//!
//! Tests steer it by the functions below, which hold for the whole process.

mod memory;
mod queries;
mod ranges;
pub(crate) mod runtime;

use std::{
    cell::{Cell, UnsafeCell},
    ops::{Deref, DerefMut},
    sync::atomic::{
        AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
    thread,
};

use crate::device::{
    cuda::sys::{self, cudaError as Code},
    streams::Dice,
};

/// How many devices there are, unless [`machine`] says otherwise.
const DEVICES: usize = 2;

/// What a device has in bytes, unless [`device_memory`] says otherwise.
const MEMORY: usize = 16 << 30;

/// One piece of work in so many is delayed.
const RARITY: u64 = 8;

static DICE: Dice = Dice::new(1);

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `cudaMalloc`, for want of memory.
    Allocate,
    /// `cudaHostRegister`, as where no more memory can be locked.
    Register,
    /// `cudaMemcpyAsync`, when it is called.
    Copy,
    /// A launch, when it is made.
    Launch,
    /// Work on a stream, when it runs: the device's context is lost.
    Fault,
}

/// Counts each operation down; the one that reaches 0 fails.
static UNTIL_FAILURE: [AtomicU64; 5] = [const { AtomicU64::new(u64::MAX) }; 5];

/// Whether this operation is the one to fail.
fn fails(operation: Operation) -> bool {
    let until = &UNTIL_FAILURE[operation as usize];
    until.load(Relaxed) != u64::MAX && until.fetch_sub(1, Relaxed) == 0
}

/// Makes the operation after `others` more of its kind fail, once.
pub fn fail(operation: Operation, others: u64) {
    UNTIL_FAILURE[operation as usize].store(others, Relaxed);
}

/// The seed of delays, and of the order in which kernels' threads run.
pub fn seed(seed: u64) {
    DICE.seed(seed);
}

/// Gives each device so much memory.
pub fn device_memory(bytes: usize) {
    MACHINE.memory.store(bytes, Relaxed);
}

/// The machine that programs find.
struct EmulatedMachine {
    devices: AtomicI32,
    driver: AtomicI32,
    capability: AtomicI32,
    memory: AtomicUsize,
}

static MACHINE: EmulatedMachine = EmulatedMachine {
    devices: AtomicI32::new(DEVICES as i32),
    driver: AtomicI32::new(sys::CUDART_VERSION),
    capability: AtomicI32::new(90),
    memory: AtomicUsize::new(MEMORY),
};

/// A machine of another kind: how many devices, 2 at most; the CUDA version that its driver serves, as 13000, 0 without a
/// driver; the devices' compute capability, as 90.
pub fn machine(devices: i32, driver: i32, capability: i32) {
    MACHINE.devices.store(devices.min(DEVICES as i32), Relaxed);
    MACHINE.driver.store(driver, Relaxed);
    MACHINE.capability.store(capability, Relaxed);
}

/// cuBLAS handles, which `kernels/cublas/emulated.rs` makes.
pub(crate) static PRODUCTS: AtomicUsize = AtomicUsize::new(0);

static UNREGISTERED_COPIES: AtomicU64 = AtomicU64::new(0);

/// How many copies so far went from or to host memory that was not registered.
pub fn unregistered_copies() -> u64 {
    UNREGISTERED_COPIES.load(Relaxed)
}

/// How many events were made so far that tell when they are reached.
pub fn timed_events() -> usize {
    runtime::TIMED_EVENTS.load(Acquire)
}

/// What a process has of the runtime and must give back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Pieces of device memory.
    pub allocations: usize,
    /// Pieces of registered host memory.
    pub registrations: usize,
    /// Streams.
    pub streams: usize,
    /// Events.
    pub events: usize,
    /// cuBLAS handles.
    pub products: usize,
}

/// What is live now. Streams that were destroyed finish first.
pub fn live() -> Live {
    DEVICE.iter().for_each(EmulatedDevice::drain);
    Live {
        allocations: memory::DEVICE.count(),
        registrations: memory::HOST.count(),
        streams: runtime::STREAMS.load(Acquire),
        events: runtime::EVENTS.load(Acquire),
        products: PRODUCTS.load(Acquire),
    }
}

/// Ends everything there is, as `cudaDeviceReset` does, and forgets what the functions above have set. Handles and memory of
/// before must not be used any more.
pub fn reset() {
    DEVICE.iter().for_each(EmulatedDevice::drain);
    runtime::end_all();
    DEVICE.iter().for_each(EmulatedDevice::drain);
    memory::free_all();
    DEVICE.iter().for_each(|device| device.lost.store(0, Release));
    UNTIL_FAILURE.iter().for_each(|until| until.store(u64::MAX, Relaxed));
    machine(DEVICES as i32, sys::CUDART_VERSION, 90);
    device_memory(MEMORY);
    UNREGISTERED_COPIES.store(0, Relaxed);
    seed(1);
}

/// A device and its context.
pub(crate) struct EmulatedDevice {
    /// The error that lost the context; 0 if none did.
    lost: AtomicU32,
    /// Bytes allocated.
    used: AtomicUsize,
    /// Streams whose thread has not ended.
    streams: Lock<Vec<&'static runtime::StreamHandle>>,
}

pub(crate) static DEVICE: [EmulatedDevice; DEVICES] =
    [const { EmulatedDevice { lost: AtomicU32::new(0), used: AtomicUsize::new(0), streams: Lock::new(Vec::new()) } };
        DEVICES];

impl EmulatedDevice {
    /// The error that lost the context, if one did.
    pub(crate) fn alive(&self) -> Result<(), Code> {
        match self.lost.load(Acquire) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// Loses the context, unless it is lost already.
    fn lose(&self, code: Code) {
        let _ = self.lost.compare_exchange(0, code.0, Release, Relaxed);
    }
}

thread_local! {
    pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The thread's device.
pub(crate) fn current() -> &'static EmulatedDevice {
    &DEVICE[CURRENT.get()]
}

/// The code that a call returns.
fn code(result: Result<(), Code>) -> Code {
    result.err().unwrap_or(Code::cudaSuccess)
}

/// A lock that spins, for what is rare and short: the thread sanitizer does not see inside the standard library's.
pub(crate) struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: one thread at a time has access.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    fn lock(&self) -> Guard<'_, T> {
        while self.held.swap(true, Acquire) {
            thread::yield_now();
        }
        Guard(self)
    }
}

/// Access to what a [`Lock`] guards.
struct Guard<'a, T>(&'a Lock<T>);

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held, by this guard alone.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.0.held.store(false, Release);
    }
}
