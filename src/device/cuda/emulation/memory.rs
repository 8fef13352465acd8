//! Device memory, and host memory that is registered.
//!
//! An allocation is a mapping of its own: an inaccessible page, bytes that are checked, the memory, bytes that are checked up
//! to the next multiple of 256, an inaccessible page. Its addresses stay reserved for a while after it was freed.

use std::{
    collections::VecDeque,
    ffi::{c_uint, c_void},
    io, ptr, slice,
    sync::atomic::{
        AtomicBool,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
        fence,
    },
    thread,
};

use super::{
    CURRENT, Code, DEVICE as DEVICES, EmulatedDevice, Lock, MACHINE, Operation, code, current, fails, ranges::Ranges,
};

/// Ranges as they were asked for.
pub(super) static DEVICE: Ranges = Ranges::new();
pub(super) static HOST: Ranges = Ranges::new();

/// NaN in F32 and BF16, and no index of anything.
pub(super) const POISON: u8 = 0xff;
/// What is around an allocation.
const CANARY: u8 = 0xc5;
const PAGE: usize = 4096;
/// What `cudaMalloc` aligns to.
const ALIGN: usize = 256;
/// How many freed allocations stay inaccessible.
const KEPT: usize = 256;

/// Mappings of freed allocations, oldest first.
static FREED: Lock<VecDeque<(usize, usize)>> = Lock::new(VecDeque::new());

/// What of an allocation is where, as far as it follows from its size.
struct AllocationLayout {
    /// The mapping, guard pages included.
    mapping: usize,
    /// From the start of the mapping to the allocation.
    before: usize,
    /// Checked bytes after it.
    slack: usize,
}

impl AllocationLayout {
    fn of(bytes: usize) -> Self {
        let padded = bytes.next_multiple_of(ALIGN);
        let inner = (padded + ALIGN).next_multiple_of(PAGE);
        Self { mapping: inner + 2 * PAGE, before: PAGE + inner - padded, slack: padded - bytes }
    }
}

/// Maps memory for an allocation; its address.
fn map(bytes: usize) -> io::Result<usize> {
    let layout = AllocationLayout::of(bytes);
    let (none, private) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping, of which nobody knows; the ranges below lie in it.
    unsafe {
        let mapping = libc::mmap(ptr::null_mut(), layout.mapping, none, private, -1, 0);
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = mapping.byte_add(PAGE).cast::<u8>();
        if libc::mprotect(first.cast(), layout.mapping - 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE) != 0 {
            let error = io::Error::last_os_error();
            libc::munmap(mapping, layout.mapping);
            return Err(error);
        }
        let start = mapping.cast::<u8>().add(layout.before);
        ptr::write_bytes(first, CANARY, layout.before - PAGE);
        ptr::write_bytes(start, POISON, bytes);
        ptr::write_bytes(start.add(bytes), CANARY, layout.slack);
        Ok(start.expose_provenance())
    }
}

/// Makes an allocation inaccessible, and unmaps one that was freed long ago.
fn unmap(start: usize, bytes: usize) {
    let layout = AllocationLayout::of(bytes);
    let mapping = start - layout.before;
    let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let mut freed = FREED.lock();
    freed.push_back((mapping, layout.mapping));
    let oldest = if freed.len() > KEPT { freed.pop_front() } else { None };
    // SAFETY: both mappings were allocations, which nobody may use any more. Mapping anew gives the memory back.
    unsafe {
        libc::mmap(ptr::without_provenance_mut(mapping), layout.mapping, libc::PROT_NONE, fixed, -1, 0);
        if let Some((mapping, bytes)) = oldest {
            libc::munmap(ptr::without_provenance_mut(mapping), bytes);
        }
    }
}

/// Says where bytes around an allocation were overwritten, if any were; whether none were.
fn intact(start: usize, bytes: usize) -> bool {
    let layout = AllocationLayout::of(bytes);
    let head = layout.before - PAGE;
    // SAFETY: both ranges lie in the allocation's mapping, and no work that is right writes them.
    let around = unsafe {
        [
            (-(head as isize), slice::from_raw_parts::<u8>(ptr::with_exposed_provenance(start - head), head)),
            (bytes as isize, slice::from_raw_parts::<u8>(ptr::with_exposed_provenance(start + bytes), layout.slack)),
        ]
    };
    around.into_iter().all(|(first, bytes_there)| {
        let Some(at) = bytes_there.iter().position(|byte| *byte != CANARY) else { return true };
        eprintln!("emulated CUDA: byte {} of an allocation of {bytes} bytes was overwritten", first + at as isize);
        false
    })
}

/// Keeps allocations from being freed while they are checked. The order that takes is that of fences, which the thread
/// sanitizer does not know: threads that wait for events are not ordered by what they check.
fn exclusively<R>(work: impl FnOnce() -> R) -> R {
    static HELD: AtomicBool = AtomicBool::new(false);
    while HELD.swap(true, Relaxed) {
        thread::yield_now();
    }
    fence(Acquire);
    let result = work();
    fence(Release);
    HELD.store(false, Relaxed);
    result
}

impl EmulatedDevice {
    /// Loses the context if the bytes around any of its allocations were overwritten.
    pub(super) fn check_memory(&self) {
        exclusively(|| {
            for range in DEVICE.iter().filter(|range| ptr::eq(&DEVICES[range.device()], self)) {
                if !intact(range.start(), range.bytes()) {
                    self.lose(Code::cudaErrorIllegalAddress);
                }
            }
        });
    }
}

/// Frees all there is.
pub(super) fn free_all() {
    for range in DEVICE.iter() {
        let (start, bytes) = (range.start(), range.bytes());
        DEVICES[range.device()].used.fetch_sub(bytes, AcqRel);
        exclusively(|| range.remove());
        unmap(start, bytes);
    }
    HOST.iter().for_each(|range| range.remove());
}

fn allocate(bytes: usize) -> Result<usize, Code> {
    let (device, refused) = (current(), Err(Code::cudaErrorMemoryAllocation));
    device.alive()?;
    if bytes == 0 {
        return Ok(0);
    }
    let most = MACHINE.memory.load(Relaxed);
    let add = |used: usize| used.checked_add(bytes).filter(|used| *used <= most);
    if fails(Operation::Allocate) || device.used.fetch_update(AcqRel, Relaxed, add).is_err() {
        return refused;
    }
    match map(bytes) {
        Ok(start) if DEVICE.add(start, bytes, CURRENT.get()) => Ok(start),
        other => {
            let _ = other.map(|start| unmap(start, bytes));
            device.used.fetch_sub(bytes, AcqRel);
            refused
        }
    }
}

fn free(start: usize) -> Result<(), Code> {
    current().alive()?;
    if start == 0 {
        return Ok(());
    }
    let range = DEVICE.at(start).ok_or(Code::cudaErrorInvalidValue)?;
    let (device, bytes) = (&DEVICES[range.device()], range.bytes());
    device.alive()?;
    device.drain();
    exclusively(|| {
        if !intact(start, bytes) {
            device.lose(Code::cudaErrorIllegalAddress);
        }
        // What ran to its end meanwhile may have faulted.
        device.alive()?;
        range.remove();
        Ok(())
    })?;
    device.used.fetch_sub(bytes, AcqRel);
    unmap(start, bytes);
    Ok(())
}

fn register(start: usize, bytes: usize) -> Result<(), Code> {
    let device = current();
    device.alive()?;
    if start == 0 || bytes == 0 {
        return Err(Code::cudaErrorInvalidValue);
    }
    if HOST.touches(start, bytes) {
        return Err(Code::cudaErrorHostMemoryAlreadyRegistered);
    }
    let page = start / PAGE * PAGE;
    // SAFETY: it writes nothing, and fails where nothing is mapped.
    let mapped = unsafe { libc::msync(ptr::without_provenance_mut(page), start + bytes - page, libc::MS_ASYNC) == 0 };
    if !mapped {
        return Err(Code::cudaErrorInvalidValue);
    }
    if fails(Operation::Register) || !HOST.add(start, bytes, CURRENT.get()) {
        return Err(Code::cudaErrorMemoryAllocation);
    }
    Ok(())
}

fn unregister(start: usize) -> Result<(), Code> {
    let device = current();
    device.alive()?;
    let range = HOST.at(start).ok_or(Code::cudaErrorHostMemoryNotRegistered)?;
    let in_use = range.in_use.load(Relaxed);
    if in_use > 0 {
        eprintln!("emulated CUDA: {} bytes are unregistered while {in_use} copies use them", range.bytes());
        device.lose(Code::cudaErrorIllegalAddress);
        return device.alive();
    }
    range.remove();
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaMalloc(to: *mut *mut c_void, bytes: usize) -> Code {
    // SAFETY: a program gives the place for the address.
    code(allocate(bytes).map(|start| unsafe { to.write(ptr::with_exposed_provenance_mut(start)) }))
}

#[unsafe(no_mangle)]
extern "C" fn cudaFree(memory: *mut c_void) -> Code {
    code(free(memory.addr()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaMemGetInfo(free: *mut usize, total: *mut usize) -> Code {
    let (device, most) = (current(), MACHINE.memory.load(Relaxed));
    // SAFETY: a program gives the places for both sizes.
    code(device.alive().map(|()| unsafe {
        free.write(most.saturating_sub(device.used.load(Relaxed)));
        total.write(most);
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cudaHostRegister(start: *mut c_void, bytes: usize, _flags: c_uint) -> Code {
    code(register(start.addr(), bytes))
}

#[unsafe(no_mangle)]
extern "C" fn cudaHostUnregister(start: *mut c_void) -> Code {
    code(unregister(start.addr()))
}
