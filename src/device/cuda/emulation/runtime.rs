//! Streams, events, copies and launches.
//!
//! **Invariant**: a handle is an address of a structure that is never freed, so that one which was destroyed is known by it.

use std::{
    ffi::{c_uint, c_void},
    ptr,
    sync::atomic::{
        AtomicBool, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
    thread,
    time::Duration,
};

use super::{
    CURRENT, Code, DEVICE, DEVICES, DICE, EmulatedDevice, Lock, Operation, RARITY, UNREGISTERED_COPIES, code, fails,
    memory::{self, POISON},
    ranges::MemoryRange,
    sys::{cudaEvent_t, cudaEventDisableTiming, cudaMemcpyKind as Kind, cudaStream_t, cudaStreamCaptureStatus},
};
use crate::device::streams::{self, Along, pause};

/// A stream or an event, of one device.
#[repr(align(64))]
pub(crate) struct Handle<T> {
    magic: usize,
    device: usize,
    alive: AtomicBool,
    what: T,
}

pub(crate) type StreamHandle = Handle<streams::Stream>;
type EventHandle = Handle<streams::Event>;

/// What handles are made for.
pub(crate) trait Handled: Sized + 'static {
    const MAGIC: usize;
    /// Every handle there ever was.
    fn all() -> &'static Lock<Vec<&'static Handle<Self>>>;
}

impl Handled for streams::Stream {
    const MAGIC: usize = 0x5374_7265_616d;

    fn all() -> &'static Lock<Vec<&'static StreamHandle>> {
        static ALL: Lock<Vec<&StreamHandle>> = Lock::new(Vec::new());
        &ALL
    }
}

impl Handled for streams::Event {
    const MAGIC: usize = 0x4576_656e_7400;

    fn all() -> &'static Lock<Vec<&'static EventHandle>> {
        static ALL: Lock<Vec<&EventHandle>> = Lock::new(Vec::new());
        &ALL
    }
}

/// How many were made and not destroyed.
pub(super) static STREAMS: AtomicUsize = AtomicUsize::new(0);
pub(super) static EVENTS: AtomicUsize = AtomicUsize::new(0);
/// How many were made to tell when they are reached, ever.
pub(super) static TIMED_EVENTS: AtomicUsize = AtomicUsize::new(0);

/// The devices' own streams, made when they are first used.
static DEFAULT: [Lock<Option<&StreamHandle>>; DEVICES] = [const { Lock::new(None) }; DEVICES];

impl<T: Handled> Handle<T> {
    fn new(device: usize, what: T) -> &'static Self {
        let handle: &Self = Box::leak(Box::new(Self { magic: T::MAGIC, device, alive: AtomicBool::new(true), what }));
        T::all().lock().push(handle);
        handle
    }

    /// # Safety
    /// It is a handle of some kind, null, or not an address at all.
    unsafe fn find(raw: *mut c_void) -> Result<&'static Self, Code> {
        let refused = Err(Code::cudaErrorInvalidResourceHandle);
        if raw.addr() < 4096 || !raw.cast::<Self>().is_aligned() {
            return refused;
        }
        // SAFETY: the address of one that was created, which is never given back.
        let handle = unsafe { &*raw.cast::<Self>() };
        if handle.magic == T::MAGIC && handle.alive.load(Acquire) { Ok(handle) } else { refused }
    }

    fn raw(&'static self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

fn failed_to_start(error: std::io::Error) -> Code {
    eprintln!("emulated CUDA: no thread for a stream: {error}");
    Code::cudaErrorOperatingSystem
}

impl StreamHandle {
    fn start(device: usize) -> Result<&'static Self, Code> {
        let stream = Handle::new(device, streams::Stream::new().map_err(failed_to_start)?);
        DEVICE[device].streams.lock().push(stream);
        Ok(stream)
    }

    /// The stream of a handle; the device's own for a null pointer.
    ///
    /// # Safety
    /// As [`Handle::find`].
    pub(crate) unsafe fn of(raw: *mut c_void) -> Result<&'static Self, Code> {
        let device = CURRENT.get();
        let stream = if raw.is_null() {
            let mut default = DEFAULT[device].lock();
            match *default {
                Some(stream) => stream,
                None => default.insert(Self::start(device)?),
            }
        } else {
            // SAFETY: a stream that was created, by what this function asks of its caller.
            unsafe { Self::find(raw)? }
        };
        stream.device().alive()?;
        Ok(stream)
    }

    fn is_default(&self) -> bool {
        DEFAULT[self.device].lock().is_some_and(|stream| ptr::eq(stream, self))
    }

    pub(crate) fn device(&self) -> &'static EmulatedDevice {
        &DEVICE[self.device]
    }

    /// Whether all of these bytes are memory of the stream's device.
    pub(crate) fn reaches(&self, start: usize, bytes: usize) -> bool {
        memory::DEVICE.around(start, bytes).is_some_and(|range| range.device() == self.device)
    }

    /// Enqueues work that may fault.
    pub(crate) fn run(&self, work: impl FnOnce() -> Result<(), Code> + Send + 'static) {
        let (device, delay) = (self.device(), DICE.delay(RARITY));
        self.what.push(move || {
            pause(delay);
            if device.alive().is_err() {
                return;
            }
            let done = if fails(Operation::Fault) { Err(Code::cudaErrorIllegalAddress) } else { work() };
            let _ = done.map_err(|code| device.lose(code));
        });
    }

    fn destroy(&'static self) {
        // Under the lock: whoever drains the device sees it alive, or knows that it ends.
        let _streams = self.device().streams.lock();
        if self.alive.swap(false, AcqRel) {
            STREAMS.fetch_sub(1, AcqRel);
            let gone = move || self.device().streams.lock().retain(|stream| !ptr::eq(*stream, self));
            self.what.push(gone);
            self.what.end();
        }
    }
}

impl EventHandle {
    fn destroy(&self) {
        if self.alive.swap(false, AcqRel) {
            EVENTS.fetch_sub(1, AcqRel);
            // SAFETY: the caller must not use it any more.
            unsafe { self.what.forget() };
        }
    }
}

impl EmulatedDevice {
    /// Waits for all work of the device, and for streams that were destroyed to end.
    pub(super) fn drain(&self) {
        loop {
            let (marks, ending) = {
                let streams = self.streams.lock();
                let alive = streams.iter().filter(|stream| stream.alive.load(Relaxed));
                let marks: Vec<_> = alive.map(|stream| stream.what.mark()).collect();
                let ending = marks.len() < streams.len();
                (marks, ending)
            };
            marks.into_iter().for_each(|mark| mark.wait());
            if !ending {
                return;
            }
            thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Destroys every handle but the default streams.
pub(super) fn end_all() {
    let streams: Vec<_> = streams::Stream::all().lock().clone();
    streams.into_iter().filter(|stream| !stream.is_default()).for_each(StreamHandle::destroy);
    let events: Vec<_> = streams::Event::all().lock().clone();
    events.into_iter().for_each(EventHandle::destroy);
}

/// A use of registered memory by work that is not done.
struct Use(&'static MemoryRange);

impl Use {
    fn of(range: &'static MemoryRange) -> Self {
        range.in_use.fetch_add(1, Relaxed);
        Self(range)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Relaxed);
    }
}

/// # Safety
/// As `cudaMemcpyAsync`.
unsafe fn copy(to: *mut c_void, from: *const c_void, bytes: usize, kind: Kind, raw: cudaStream_t) -> Result<(), Code> {
    // SAFETY: null, or a stream that was created: its memory is never given back.
    let stream = unsafe { StreamHandle::of(raw.cast())? };
    let reaches = |at: usize| stream.reaches(at, bytes);
    let is_host = |at: usize| at != 0 && !memory::DEVICE.touches(at, bytes);
    let (target, source) = (to.addr(), from.addr());
    let (valid, host) = match kind {
        Kind::cudaMemcpyHostToDevice => (reaches(target) && is_host(source), Some(source)),
        Kind::cudaMemcpyDeviceToHost => (is_host(target) && reaches(source), Some(target)),
        Kind::cudaMemcpyDeviceToDevice => {
            let apart = target + bytes <= source || source + bytes <= target;
            (reaches(target) && reaches(source) && apart, None)
        }
        _ => (false, None),
    };
    if bytes == 0 {
        return Ok(());
    }
    if !valid {
        return Err(Code::cudaErrorInvalidValue);
    }
    if fails(Operation::Copy) {
        return Err(Code::cudaErrorUnknown);
    }
    let registered = host.map(|host| memory::HOST.around(host, bytes).map(Use::of));
    let blocks = matches!(registered, Some(None));
    let (range, between) = (Along((to.cast::<u8>(), from.cast::<u8>())), DICE.delay(RARITY));
    stream.run(move || {
        let (Along((to, from)), _registered) = ({ range }, registered);
        // SAFETY: the caller keeps both until the copy is done; the ranges are what was checked above.
        unsafe {
            ptr::write_bytes(to, POISON, bytes);
            pause(between);
            ptr::copy_nonoverlapping(from, to, bytes);
        }
        Ok(())
    });
    if blocks {
        UNREGISTERED_COPIES.fetch_add(1, Relaxed);
        stream.what.mark().wait();
    }
    Ok(())
}

unsafe extern "C" {
    fn emulation_run(grid: *mut c_void, seed: u64) -> Code;
    fn emulation_discard(grid: *mut c_void);
}

/// A launch that has not run.
struct Grid(*mut c_void);

// SAFETY: any thread may run it.
unsafe impl Send for Grid {}

impl Grid {
    fn run(self) -> Result<(), Code> {
        let grid = std::mem::ManuallyDrop::new(self).0;
        // SAFETY: it is owned, and given away.
        match unsafe { emulation_run(grid, DICE.next()) } {
            Code::cudaSuccess => Ok(()),
            code => Err(code),
        }
    }
}

impl Drop for Grid {
    fn drop(&mut self) {
        // SAFETY: it is owned, and did not run.
        unsafe { emulation_discard(self.0) };
    }
}

/// # Safety
/// As [`Handle::find`].
unsafe fn launch(raw: cudaStream_t, grid: Grid) -> Result<(), Code> {
    // SAFETY: null, or a stream that was created: its memory is never given back.
    let stream = unsafe { StreamHandle::of(raw.cast())? };
    if stream.device != CURRENT.get() {
        return Err(Code::cudaErrorInvalidResourceHandle);
    }
    if fails(Operation::Launch) {
        return Err(Code::cudaErrorLaunchOutOfResources);
    }
    stream.run(move || grid.run());
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn emulation_enqueue(stream: cudaStream_t, grid: *mut c_void) -> Code {
    // SAFETY: the kernels give a grid that is theirs no more, and the stream that they were given.
    code(unsafe { launch(stream, Grid(grid)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaMemcpyAsync(
    to: *mut c_void,
    from: *const c_void,
    bytes: usize,
    kind: Kind,
    stream: cudaStream_t,
) -> Code {
    // SAFETY: the program gives ranges that stay until the copy is done, and a stream that was created.
    code(unsafe { copy(to, from, bytes, kind, stream) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaStreamCreateWithFlags(to: *mut cudaStream_t, flags: c_uint) -> Code {
    // One that waits for the default stream is not emulated.
    if flags != super::sys::cudaStreamNonBlocking as c_uint {
        return Code::cudaErrorInvalidValue;
    }
    let device = CURRENT.get();
    code(DEVICE[device].alive().and_then(|()| StreamHandle::start(device)).map(|stream| {
        STREAMS.fetch_add(1, AcqRel);
        // SAFETY: a program gives the place for its stream.
        unsafe { to.write(stream.raw().cast()) };
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaStreamDestroy(stream: cudaStream_t) -> Code {
    if stream.is_null() {
        return Code::cudaErrorInvalidResourceHandle;
    }
    // SAFETY: null, or a stream that was created: its memory is never given back.
    code(unsafe { StreamHandle::of(stream.cast()) }.map(StreamHandle::destroy))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaStreamIsCapturing(stream: cudaStream_t, to: *mut cudaStreamCaptureStatus) -> Code {
    // SAFETY: null or a stream that was created, and the place for the answer.
    unsafe {
        let none = cudaStreamCaptureStatus::cudaStreamCaptureStatusNone;
        code(StreamHandle::of(stream.cast()).map(|_| to.write(none)))
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaStreamWaitEvent(stream: cudaStream_t, event: cudaEvent_t, _flags: c_uint) -> Code {
    // SAFETY: a stream and an event that were created: their memory is never given back.
    let found =
        unsafe { StreamHandle::of(stream.cast()).and_then(|stream| Ok((stream, EventHandle::find(event.cast())?))) };
    code(found.map(|(stream, event)| stream.what.wait(&event.what)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventCreateWithFlags(to: *mut cudaEvent_t, flags: c_uint) -> Code {
    let device = CURRENT.get();
    code(DEVICE[device].alive().map(|()| {
        EVENTS.fetch_add(1, AcqRel);
        let timed = flags & cudaEventDisableTiming as c_uint == 0;
        TIMED_EVENTS.fetch_add(usize::from(timed), AcqRel);
        // SAFETY: a program gives the place for its event.
        unsafe { to.write(Handle::new(device, streams::Event::new(timed)).raw().cast()) };
    }))
}

/// The event of a handle, whose device is alive.
///
/// # Safety
/// As [`Handle::find`].
unsafe fn event(raw: cudaEvent_t) -> Result<&'static EventHandle, Code> {
    // SAFETY: an event that was created, by what this function asks of its caller.
    let event = unsafe { EventHandle::find(raw.cast())? };
    DEVICE[event.device].alive().map(|()| event)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventDestroy(raw: cudaEvent_t) -> Code {
    // SAFETY: an event that was created: its memory is never given back.
    code(unsafe { event(raw) }.map(EventHandle::destroy))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventRecord(raw: cudaEvent_t, stream: cudaStream_t) -> Code {
    // SAFETY: a stream and an event that were created: their memory is never given back.
    let found = unsafe { event(raw).and_then(|event| Ok((event, StreamHandle::of(stream.cast())?))) };
    code(found.and_then(|(event, stream)| {
        if event.device != stream.device {
            return Err(Code::cudaErrorInvalidResourceHandle);
        }
        stream.what.record(&event.what);
        Ok(())
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventQuery(raw: cudaEvent_t) -> Code {
    // SAFETY: an event that was created: its memory is never given back.
    match unsafe { event(raw) } {
        Ok(event) if event.what.is_reached() => code(DEVICE[event.device].alive()),
        Ok(_) => Code::cudaErrorNotReady,
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventElapsedTime(to: *mut f32, from: cudaEvent_t, until: cudaEvent_t) -> Code {
    // SAFETY: two events that were created: their memory is never given back.
    let found = unsafe { event(from).and_then(|from| Ok((from, event(until)?))) };
    code(found.and_then(|(from, until)| {
        if !(from.what.timed && until.what.timed) || from.device != until.device {
            return Err(Code::cudaErrorInvalidResourceHandle);
        }
        let (from, until) = from.what.reached_at().zip(until.what.reached_at()).ok_or(Code::cudaErrorNotReady)?;
        // SAFETY: a program gives the place for the time.
        unsafe { to.write((until as f64 - from as f64) as f32 / 1e6) };
        Ok(())
    }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cudaEventSynchronize(raw: cudaEvent_t) -> Code {
    // SAFETY: an event that was created: its memory is never given back.
    code(unsafe { event(raw) }.and_then(|event| {
        event.what.synchronize();
        let device = &DEVICE[event.device];
        device.check_memory();
        device.alive()
    }))
}
