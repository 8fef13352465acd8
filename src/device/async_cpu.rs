//! The CPU device made asynchronous, for tests: every stream is a thread with a queue, work is delayed at random from a seed,
//! and a copy poisons its target before it writes it. What CUDA's rules leave open goes wrong here, and soon: a forgotten
//! wait shows up as poison, or as the bytes of another lap.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use crate::{
    device::{Cpu, CpuMemory, CpuStream, Device, DevicePtr},
    dtype::DType,
    error::{Error, Result},
};

/// What a byte of device memory is before its copy, and while it is under way.
pub(crate) const POISON: u8 = 0xa5;

/// The device. Clones share the seed's sequence and the fault.
#[derive(Clone)]
pub(crate) struct AsyncCpu(Arc<Shared>);

struct Shared {
    random: Mutex<fastrand::Rng>,
    /// Counts copies down; the one that reaches zero fails, as do all after it.
    copies_left: AtomicU64,
}

/// Work in a stream's queue. Events are captured with the record that counts.
enum Work {
    Call(Box<dyn FnOnce() + Send>),
    Record(Arc<EventState>, u64),
    Wait(Arc<EventState>, u64),
    End,
}

#[derive(Default)]
struct Queue {
    work: Mutex<VecDeque<Work>>,
    filled: Condvar,
}

impl Queue {
    fn push(&self, work: Work) {
        self.work.lock().unwrap().push_back(work);
        self.filled.notify_one();
    }
}

/// A stream: dropping it lets queued work finish in the background, as CUDA does.
pub(crate) struct AsyncStream(Arc<Queue>);

impl Drop for AsyncStream {
    fn drop(&mut self) {
        self.0.push(Work::End);
    }
}

#[derive(Default)]
struct EventState {
    recorded: AtomicU64,
    reached: Mutex<u64>,
    changed: Condvar,
}

impl EventState {
    fn reach(&self, record: u64) {
        let mut reached = self.reached.lock().unwrap();
        *reached = reached.max(record);
        self.changed.notify_all();
    }

    fn await_record(&self, record: u64) {
        drop(self.changed.wait_while(self.reached.lock().unwrap(), |reached| *reached < record).unwrap());
    }
}

/// An event.
#[derive(Clone, Default)]
pub(crate) struct AsyncEvent(Arc<EventState>);

impl AsyncCpu {
    pub(crate) fn new(seed: u64) -> Self {
        let random = Mutex::new(fastrand::Rng::with_seed(seed));
        Self(Arc::new(Shared { random, copies_left: AtomicU64::new(u64::MAX) }))
    }

    /// Makes the copy after `copies` more of them fail, and every later one.
    pub(crate) fn fail_after(&self, copies: u64) {
        self.0.copies_left.store(copies, SeqCst);
    }

    /// Enqueues the caller's own work.
    pub(crate) fn enqueue(&self, stream: &AsyncStream, work: impl FnOnce() + Send + 'static) {
        let delay = self.delay();
        stream.0.push(Work::Call(Box::new(move || {
            thread::sleep(delay);
            work();
        })));
    }

    /// Mostly none, sometimes enough for other threads to overtake.
    fn delay(&self) -> Duration {
        let mut random = self.0.random.lock().unwrap();
        Duration::from_micros(if random.u8(..3) == 0 { random.u64(..400) } else { 0 })
    }
}

/// Addresses that a closure takes along.
struct Along<T>(T);
// SAFETY: plain addresses; the enqueuing call's contract keeps the memory valid until the work is done.
unsafe impl<T> Send for Along<T> {}

impl Device for AsyncCpu {
    type Stream = AsyncStream;
    type Event = AsyncEvent;
    type Memory = CpuMemory;
    type Registration = ();

    fn describe(&self) -> String {
        "asynchronous cpu".into()
    }

    fn bind_thread(&self) -> Result<()> {
        Ok(())
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
        let queue = Arc::new(Queue::default());
        let inside = queue.clone();
        thread::spawn(move || {
            loop {
                let mut queued = inside.filled.wait_while(inside.work.lock().unwrap(), |work| work.is_empty()).unwrap();
                let work = queued.pop_front().unwrap();
                drop(queued);
                match work {
                    Work::Call(call) => call(),
                    Work::Record(event, record) => event.reach(record),
                    Work::Wait(event, record) => event.await_record(record),
                    Work::End => return,
                }
            }
        });
        Ok(AsyncStream(queue))
    }

    fn event(&self) -> Result<AsyncEvent> {
        Ok(AsyncEvent::default())
    }

    unsafe fn copy_to_device(&self, to: DevicePtr, from: *const u8, bytes: usize, stream: &AsyncStream) -> Result<()> {
        let left = self.0.copies_left.load(SeqCst);
        if left == 0 {
            return Err(Error::Unsupported { what: "this copy".into(), remedy: "it fails on purpose".into() });
        }
        self.0.copies_left.store(left.saturating_sub(u64::from(left != u64::MAX)), SeqCst);
        let (range, delay) = (Along((to, from)), self.delay());
        self.enqueue(stream, move || {
            let Along((to, from)) = { range };
            // SAFETY: the contract of this call.
            unsafe {
                std::ptr::write_bytes(to.as_ptr(), POISON, bytes);
                thread::sleep(delay);
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

    unsafe fn zero(&self, to: DevicePtr, bytes: usize, stream: &AsyncStream) -> Result<()> {
        self.enqueue(stream, move || {
            let to = { to };
            // SAFETY: the contract of this call.
            unsafe { std::ptr::write_bytes(to.as_ptr(), 0, bytes) };
        });
        Ok(())
    }

    unsafe fn transform(
        &self,
        to: (DevicePtr, DType),
        from: (DevicePtr, DType),
        elements: usize,
        stream: &AsyncStream,
    ) -> Result<()> {
        self.enqueue(stream, move || {
            let synchronous: CpuStream = Cpu.stream().unwrap();
            // SAFETY: the contract of this call, passed on.
            unsafe { Cpu.transform(to, from, elements, &synchronous).unwrap() };
        });
        Ok(())
    }

    fn record(&self, event: &AsyncEvent, stream: &AsyncStream) -> Result<()> {
        let record = event.0.recorded.fetch_add(1, SeqCst) + 1;
        stream.0.push(Work::Record(event.0.clone(), record));
        Ok(())
    }

    fn wait(&self, stream: &AsyncStream, event: &AsyncEvent) -> Result<()> {
        stream.0.push(Work::Wait(event.0.clone(), event.0.recorded.load(SeqCst)));
        Ok(())
    }

    fn query(&self, event: &AsyncEvent) -> Result<bool> {
        Ok(*event.0.reached.lock().unwrap() >= event.0.recorded.load(SeqCst))
    }

    fn synchronize(&self, event: &AsyncEvent) -> Result<()> {
        event.0.await_record(event.0.recorded.load(SeqCst));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

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
}
