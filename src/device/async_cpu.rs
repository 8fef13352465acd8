//! The CPU device made asynchronous, for tests: every stream is a thread with a queue, work is delayed at random from a seed,
//! and a copy poisons its target before it writes it. What CUDA's rules leave open goes wrong here, and soon: a forgotten
//! wait shows up as poison, or as the bytes of another lap.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::{
    device::{
        Cpu, CpuMemory, CpuStream, Device, DevicePtr, StreamId,
        streams::{Along, Dice, Event, Stream, pause},
    },
    dtype::DType,
    error::{Error, Result},
    packed::Parts,
    quantised::{INPUTS, Recipe},
    trace::clock::simulated,
};

/// What a byte of device memory is before its copy, and while it is under way.
pub(crate) const POISON: u8 = 0xa5;

/// One piece of work in so many is delayed.
const RARITY: u64 = 3;

/// The device. Clones share the seed's sequence and the fault.
#[derive(Clone)]
pub(crate) struct AsyncCpu(Arc<AsyncState>);

struct AsyncState {
    dice: Dice,
    /// Counts copies down; the one that reaches zero fails, as do all after it.
    copies_left: AtomicU64,
    /// How many timed events were made.
    timed_events: AtomicU64,
    /// How long a copy to the device takes, in microseconds; or [`AS_IT_COMES`].
    copy_micros: AtomicU64,
    /// Whether it says that it has memory of its own.
    is_linked: AtomicBool,
}

/// Copies bring their bytes, and are delayed at random.
const AS_IT_COMES: u64 = u64::MAX;

/// A stream: dropping it lets queued work finish in the background, as CUDA does.
pub(crate) struct AsyncStream(Stream);

impl Drop for AsyncStream {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl AsyncCpu {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(AsyncState {
            dice: Dice::new(seed),
            copies_left: AtomicU64::new(u64::MAX),
            timed_events: AtomicU64::new(0),
            copy_micros: AtomicU64::new(AS_IT_COMES),
            is_linked: AtomicBool::new(false),
        }))
    }

    /// How many timed events were made.
    pub(crate) fn timed_events(&self) -> u64 {
        self.0.timed_events.load(SeqCst)
    }

    /// From now on copies to the device take this long each, and bring nothing; nothing is delayed at random.
    pub(crate) fn pace_copies(&self, time: Duration) {
        self.0.copy_micros.store(time.as_micros() as u64, SeqCst);
    }

    /// From now on says that its memory is its own, behind a link.
    pub(crate) fn link(&self) {
        self.0.is_linked.store(true, SeqCst);
    }

    fn is_paced(&self) -> bool {
        self.0.copy_micros.load(SeqCst) != AS_IT_COMES
    }

    /// Makes the copy after `copies` more of them fail, and every later one.
    pub(crate) fn fail_after(&self, copies: u64) {
        self.0.copies_left.store(copies, SeqCst);
    }

    /// Fails if it is a copy's turn to fail.
    fn count_down(&self) -> Result<()> {
        let left = self.0.copies_left.load(SeqCst);
        if left == 0 {
            return Err(Error::Unsupported { what: "this copy".into(), remedy: "it fails on purpose".into() });
        }
        self.0.copies_left.store(left.saturating_sub(u64::from(left != u64::MAX)), SeqCst);
        Ok(())
    }

    /// Enqueues the caller's own work.
    pub(crate) fn enqueue(&self, stream: &AsyncStream, work: impl FnOnce() + Send + 'static) {
        let delay = if self.is_paced() { Duration::ZERO } else { self.0.dice.delay(RARITY) };
        stream.0.push(move || {
            pause(delay);
            work();
        });
    }
}

// SAFETY: memory is the CPU's; streams are queues with a thread each, told apart by where they lie, and events order them.
// Tests drop memory once the work with it is done.
unsafe impl Device for AsyncCpu {
    type Stream = AsyncStream;
    type Event = Event;
    type Memory = CpuMemory;
    type Registration = ();

    fn describe(&self) -> String {
        "asynchronous cpu".into()
    }

    fn bind_thread(&self) -> Result<()> {
        Ok(())
    }

    fn memory_is_ram(&self) -> bool {
        !self.0.is_linked.load(SeqCst)
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(1 << 30)
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<CpuMemory> {
        let memory = Cpu.allocate(what, bytes)?;
        // SAFETY: the memory was just allocated with that many bytes.
        unsafe { std::ptr::write_bytes(Cpu.address(&memory).as_ptr(), POISON, bytes) };
        Ok(memory)
    }

    fn address(&self, memory: &CpuMemory) -> DevicePtr {
        Cpu.address(memory)
    }

    unsafe fn register(&self, _host: *mut u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn stream(&self) -> Result<AsyncStream> {
        let failed = |source: std::io::Error| Error::Thread { stage: "stream", source: source.into() };
        Stream::new().map(AsyncStream).map_err(failed)
    }

    fn stream_id(&self, stream: &AsyncStream) -> StreamId {
        StreamId::of_handle((&raw const *stream).addr())
    }

    fn event(&self) -> Result<Event> {
        Ok(Event::default())
    }

    fn timed_event(&self) -> Result<Option<Event>> {
        self.0.timed_events.fetch_add(1, SeqCst);
        self.event().map(Some)
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        let at = |event: &Event| event.reached_at().expect("only of events that were reached");
        Ok(Duration::from_nanos(at(to).saturating_sub(at(from))))
    }

    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, stream: &AsyncStream) -> Result<()> {
        self.count_down()?;
        if self.is_paced() {
            let time = Duration::from_micros(self.0.copy_micros.load(SeqCst));
            self.enqueue(stream, move || simulated::sleep(time));
            return Ok(());
        }
        let (range, delay) = (Along((to, from)), self.0.dice.delay(RARITY));
        self.enqueue(stream, move || {
            let Along((to, from)) = { range };
            // SAFETY: the contract of this call.
            unsafe {
                std::ptr::write_bytes(to.as_ptr(), POISON, bytes);
                pause(delay);
                std::ptr::copy_nonoverlapping(from, to.as_ptr(), bytes);
            }
        });
        Ok(())
    }

    unsafe fn copy_to_host(&self, to: *mut u8, from: DevicePtr, bytes: usize, stream: &AsyncStream) -> Result<()> {
        let range = Along((to, from));
        self.enqueue(stream, move || {
            let Along((to, from)) = { range };
            // SAFETY: the contract of this call.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, bytes) };
        });
        Ok(())
    }

    unsafe fn copy_on_device(&self, to: DevicePtr, from: DevicePtr, bytes: usize, stream: &AsyncStream) -> Result<()> {
        // SAFETY: the contract of this call, passed on.
        unsafe { self.copy_to_host(to.as_ptr(), from, bytes, stream) }
    }

    unsafe fn cast_raw(
        &self,
        to: (DevicePtr, DType),
        from: (DevicePtr, DType),
        elements: usize,
        stream: &AsyncStream,
    ) -> Result<()> {
        self.enqueue(stream, move || {
            let synchronous: CpuStream = Cpu.stream().unwrap();
            // SAFETY: the contract of this call, passed on.
            unsafe { Cpu.cast_raw(to, from, elements, &synchronous).unwrap() };
        });
        Ok(())
    }

    unsafe fn dequantise_raw(
        &self,
        to: (DevicePtr, DType),
        from: [DevicePtr; INPUTS],
        recipe: &Recipe,
        stream: &AsyncStream,
    ) -> Result<()> {
        let recipe = *recipe;
        self.enqueue(stream, move || {
            let synchronous: CpuStream = Cpu.stream().unwrap();
            // SAFETY: the contract of this call, passed on.
            unsafe { Cpu.dequantise_raw(to, from, &recipe, &synchronous).unwrap() };
        });
        Ok(())
    }

    unsafe fn unpack_raw(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        parts: Parts<'_>,
        report: *mut u32,
        stream: &AsyncStream,
    ) -> Result<()> {
        // Where they are not copied before.
        if self.memory_is_ram() {
            self.count_down()?;
        }
        if self.is_paced() {
            return Ok(());
        }
        let (ranges, lengths) = (Along((to, from, report)), parts.lengths.to_vec());
        let Parts { table, part, weights, .. } = parts;
        self.enqueue(stream, move || {
            let Along((to, from, report)) = { ranges };
            let (parts, synchronous) = (Parts { table, part, weights, lengths: &lengths }, Cpu.stream().unwrap());
            // SAFETY: the contract of this call, passed on.
            unsafe { Cpu.unpack_raw(to, from, parts, report, &synchronous).unwrap() };
        });
        Ok(())
    }

    fn record(&self, event: &Event, stream: &AsyncStream) -> Result<()> {
        stream.0.record(event);
        Ok(())
    }

    fn wait(&self, stream: &AsyncStream, event: &Event) -> Result<()> {
        stream.0.wait(event);
        Ok(())
    }

    fn query(&self, event: &Event) -> Result<bool> {
        Ok(event.is_reached())
    }

    fn synchronize(&self, event: &Event) -> Result<()> {
        event.synchronize();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicBool, thread, time::Duration};

    use super::*;

    #[test]
    fn a_wait_counts_the_record_that_is_newest_when_it_is_called() {
        let device = AsyncCpu::new(1);
        let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
        let (event, done, flag) = (device.event().unwrap(), device.event().unwrap(), Arc::new(AtomicBool::new(false)));
        assert!(device.query(&event).unwrap(), "never recorded counts as complete");
        device.wait(&b, &event).unwrap();
        device.record(&done, &b).unwrap();
        device.synchronize(&done).unwrap();
        let set = flag.clone();
        device.enqueue(&a, move || {
            thread::sleep(Duration::from_millis(20));
            set.store(true, SeqCst);
        });
        device.record(&event, &a).unwrap();
        assert!(!device.query(&event).unwrap());
        device.wait(&b, &event).unwrap();
        let seen = flag.clone();
        device.enqueue(&b, move || assert!(seen.load(SeqCst)));
        device.record(&done, &b).unwrap();
        device.synchronize(&done).unwrap();
        assert!(flag.load(SeqCst));
    }
    #[test]
    #[ignore = "a race on purpose, which cargo xtask sanitize demands to see"]
    fn copies_on_streams_of_which_none_waits_for_the_other_race() {
        let device = AsyncCpu::new(1);
        let (a, b) = (device.stream().unwrap(), device.stream().unwrap());
        let (memory, data) = (device.allocate("a test", 1 << 20).unwrap(), vec![1u8; 1 << 20]);
        for stream in [&a, &b] {
            // SAFETY: both ranges are that long and stay to the end. That nothing orders the two copies is what this is about.
            unsafe { device.copy_to_device(device.address(&memory), data.as_ptr(), data.len(), stream).unwrap() };
        }
        [a, b].iter().for_each(|stream| device.drain(stream).unwrap());
    }
}
