//! The pipeline on the emulated runtime, from random seeds: units, tiers, settings, readers, conversions, streams, cancels,
//! rewinds, errors of the layer function, and a device that fails somewhere. Bytes are right or there is a clean error; nothing
//! hangs, nothing stays behind.
#![cfg(cuda_emulated)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use common::{Fixture, random_fixture};
use layer_streamer::{
    Canceller, DType, Error, Layer, LayerStreamer, Result, Settings, Unit,
    cuda_emulation::{self as emulation, Live, Operation},
    device::{Cpu, Cuda, CudaStream, Device, DevicePtr},
    plan::{Arrival, ArrivalOp, CachePolicy, Reader, Tier},
};
use support::{cases, nothing_left};

/// A tensor as it must be on the device.
struct Expected {
    name: String,
    dtype: DType,
    bytes: Vec<u8>,
}

/// What compute saw: the stream itself copies layers here, and they are compared at the end.
struct Log {
    memory: Vec<u8>,
    used: usize,
    /// Unit, tensor, where it was copied to.
    entries: Vec<(usize, usize, usize)>,
}

struct Case {
    fixture: Fixture,
    units: Vec<Unit>,
    expected: Vec<Vec<Expected>>,
    settings: Settings,
    device: Cuda,
    log: Log,
    rng: fastrand::Rng,
}

/// The first of these threads would be the last to know: an abort leaves the seed on stderr.
fn watch(seed: &Arc<AtomicU64>) {
    let seed = seed.clone();
    thread::spawn(move || {
        let mut last = (seed.load(Relaxed), 0);
        loop {
            thread::sleep(Duration::from_secs(1));
            let now = seed.load(Relaxed);
            last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
            if last.1 == 120 {
                eprintln!("seed {now} hangs");
                std::process::abort();
            }
        }
    });
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let fixture = random_fixture([2_000, 60_000, 300_000][rng.usize(..3)], &mut rng);
        let tiers = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked];
        let tiers = if rng.u8(..4) == 0 { vec![tiers[rng.usize(..6)]] } else { tiers.to_vec() };
        let (mut units, mut expected) = (Vec::new(), Vec::new());
        for unit in &fixture.units {
            let (mut changed, mut tensors) = (Unit::new(unit.name()), Vec::new());
            for arrival in unit.arrivals() {
                let (stored, _, bytes) = fixture.tensor(&arrival.inputs[0]);
                let to = [stored, DType::F32, DType::BF16][rng.usize(..3)];
                let converts = stored.converts_to(to) && !fixture.packed.contains_key(&arrival.inputs[0]);
                let to = if converts { to } else { stored };
                tensors.push(Expected { name: arrival.output.clone(), dtype: to, bytes: converted(stored, bytes, to) });
                changed.add(Arrival { op: ArrivalOp::To(to), ..arrival.clone() });
            }
            changed.set_tier(tiers[rng.usize(..tiers.len())]);
            units.push(changed);
            expected.push(tensors);
        }
        let rings = common::random_rings(&mut rng);
        let settings = Settings {
            reader: [Reader::Auto, Reader::UringFixed, Reader::Uring, Reader::Pread][rng.usize(..4)],
            cache: [CachePolicy::Auto, CachePolicy::Direct, CachePolicy::Buffered][rng.usize(..3)],
            ..rings
        };
        emulation::seed(seed);
        // Fresh memory that nobody touches costs nothing.
        let log = Log { memory: vec![0; 64 << 20], used: 0, entries: Vec::new() };
        let device = Cuda::new(rng.u32(..2)).unwrap();
        Self { fixture, units, expected, settings, device, log, rng }
    }

    /// Something of the device's fails from here on, most of the time; whether a fault loses its context.
    fn fail_somewhere(&mut self) -> Option<Operation> {
        let (operation, most) = [
            (Operation::Allocate, 4),
            (Operation::Register, 2),
            (Operation::Copy, 150),
            (Operation::Launch, 60),
            (Operation::Fault, 300),
        ][self.rng.usize(..5)];
        match self.rng.u8(..3) {
            0 => return None,
            1 if operation == Operation::Allocate => emulation::device_memory(self.rng.usize(..2 << 20)),
            _ => emulation::fail(operation, self.rng.u64(..most)),
        }
        Some(operation)
    }

    fn streamer(&self) -> Result<LayerStreamer<Cuda>> {
        let start = |settings| LayerStreamer::new(&self.device, &self.fixture.checkpoint, &self.units, settings);
        match start(&self.settings) {
            // This system may not have the reader.
            Err(Error::Unsupported { .. }) => start(&Settings { reader: Reader::Auto, ..self.settings.clone() }),
            other => other,
        }
    }

    /// Copies a layer to the log, in the stream's own time.
    fn see(&mut self, layer: &Layer<'_, Cuda>, stream: &CudaStream) -> Result<()> {
        for (index, expected) in self.expected[layer.index()].iter().enumerate() {
            let tensor = layer.tensor(&expected.name)?;
            assert_eq!((tensor.bytes(), tensor.dtype()), (expected.bytes.len(), expected.dtype));
            let log = &mut self.log;
            let at = log.used;
            if at + tensor.bytes() > log.memory.len() {
                return Ok(());
            }
            // SAFETY: the log has room, and lasts until the device is drained or reset.
            unsafe {
                let to = log.memory.as_mut_ptr().add(at);
                self.device.copy_to_host(to, tensor.ptr(), tensor.bytes(), stream)?;
            }
            log.used += tensor.bytes();
            log.entries.push((layer.index(), index, at));
        }
        Ok(())
    }

    /// Takes and releases `count` layers, holding some, on any of the streams.
    fn take(&mut self, streamer: &LayerStreamer<Cuda>, streams: &[CudaStream], count: usize) -> Result<()> {
        let mut held: Vec<Layer<'_, Cuda>> = Vec::new();
        for _ in 0..count {
            if held.len() == self.settings.n_gpu || (!held.is_empty() && self.rng.bool()) {
                held.swap_remove(self.rng.usize(..held.len())).release()?;
            }
            let stream = &streams[self.rng.usize(..streams.len())];
            let layer = streamer.next(stream)?;
            self.see(&layer, stream)?;
            held.push(layer);
        }
        held.into_iter().try_for_each(Layer::release)
    }

    /// One pass or a part of one, perhaps given up or cancelled.
    fn step(&mut self, streamer: &mut LayerStreamer<Cuda>, streams: &[CudaStream]) -> Result<()> {
        let units = self.units.len();
        let at = self.rng.usize(..=units);
        match self.rng.u8(..5) {
            0 => {
                self.take(streamer, streams, at)?;
                streamer.rewind()
            }
            1 => self.take(streamer, streams, units),
            2 => {
                let cancel = streamer.canceller();
                let later = Duration::from_micros(self.rng.u64(..3000));
                let cancelled = thread::spawn(move || {
                    thread::sleep(later);
                    Canceller::cancel(&cancel);
                });
                let passed = self.pass(streamer, &streams[0], units);
                cancelled.join().expect("it does not panic");
                passed
            }
            3 => self.pass(streamer, &streams[0], at),
            _ => self.pass(streamer, &streams[0], units),
        }
    }

    /// A pass whose layer function fails at a layer, if there is one of that number.
    fn pass(&mut self, streamer: &mut LayerStreamer<Cuda>, stream: &CudaStream, at: usize) -> Result<()> {
        streamer.run_pass(stream, (), |(), layer| {
            self.see(layer, stream)?;
            if layer.index() == at { Err(Error::Cancelled) } else { Ok(()) }
        })
    }

    fn run(mut self) {
        let device = self.device.clone();
        let memory = self.log.memory.as_mut_slice();
        // SAFETY: the log outlives it.
        let registration = unsafe { device.register(memory.as_mut_ptr(), memory.len()).unwrap() };
        let streams = [device.stream().unwrap(), device.stream().unwrap()];
        let failure = self.fail_somewhere();
        let mut streamer = match self.streamer() {
            Ok(streamer) => Some(streamer),
            Err(error) => {
                self.assert_clean(&error, failure);
                None
            }
        };
        for _ in 0..5 {
            let Some(streamer) = &mut streamer else { break };
            let Err(error) = self.step(streamer, &streams) else { continue };
            if matches!(error, Error::Cancelled) {
                let _ = streamer.rewind();
                continue;
            }
            self.assert_clean(&error, failure);
            // Where the streamer is beyond use it says so every time, in the same words.
            if let Err(again) = streamer.rewind() {
                let last = streamer.next(&streams[0]).err().map(|error| error.to_string());
                assert_eq!(last, Some(again.to_string()));
                break;
            }
        }
        if self.rng.bool() {
            let _ = streams.iter().try_for_each(|stream| device.drain(stream));
        }
        drop(streamer);
        let drained = streams.iter().try_for_each(|stream| device.drain(stream));
        drop((registration, streams));
        let alive = device.bind_thread().is_ok();
        if alive {
            drained.unwrap();
            self.compare();
            assert_eq!(emulation::live(), Live::default());
        } else {
            assert_eq!(failure, Some(Operation::Fault));
        }
        emulation::reset();
        let Self { fixture: Fixture { checkpoint, folder, .. }, .. } = self;
        drop(checkpoint);
        nothing_left(folder.path());
    }

    /// An error is that of the device which was made to fail, with what was tried and the code's name.
    fn assert_clean(&self, error: &Error, failure: Option<Operation>) {
        let name = match failure.unwrap_or_else(|| panic!("nothing was to fail: {error}")) {
            Operation::Allocate | Operation::Register => "cudaErrorMemoryAllocation",
            Operation::Copy => "cudaErrorUnknown",
            Operation::Launch => "cudaErrorLaunchOutOfResources",
            Operation::Fault => "cudaErrorIllegalAddress",
        };
        let Error::Cuda { name: found, operation, .. } = error else { panic!("{error}") };
        assert!(*found == name && !operation.is_empty(), "{error}");
    }

    fn compare(&self) {
        for &(unit, index, at) in &self.log.entries {
            let expected = &self.expected[unit][index];
            let found = &self.log.memory[at..][..expected.bytes.len()];
            assert!(
                same(expected.dtype, found, &expected.bytes),
                "{} of unit {unit}: {:?}",
                expected.name,
                self.settings
            );
        }
    }
}

/// What the CPU device makes of a tensor.
fn converted(from: DType, bytes: Vec<u8>, to: DType) -> Vec<u8> {
    if from == to {
        return bytes;
    }
    let elements = from.elements(bytes.len());
    let mut made = vec![0; to.bytes(elements)];
    let at = |bytes: *const u8| DevicePtr::new(bytes.cast_mut());
    // SAFETY: both vectors are that long, and the CPU's streams are done when a call returns.
    unsafe {
        let (to, from) = ((at(made.as_mut_ptr()), to), (at(bytes.as_ptr()), from));
        Cpu.cast_raw(to, from, elements, &Cpu.stream().unwrap()).unwrap();
    }
    made
}

/// Whether both hold the same values: bits, or NaN in both, whose payload is nobody's business.
fn same(dtype: DType, a: &[u8], b: &[u8]) -> bool {
    let nan = |bytes: &[u8]| match (dtype, bytes) {
        (DType::BF16, [low, high]) => half::bf16::from_le_bytes([*low, *high]).is_nan(),
        (DType::F32, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]).is_nan(),
        _ => false,
    };
    let size = dtype.size();
    a == b || a.chunks(size).zip(b.chunks(size)).all(|(a, b)| a == b || (nan(a) && nan(b)))
}

#[test]
fn whatever_happens_bytes_are_right_or_there_is_a_clean_error_and_nothing_stays() {
    let only = std::env::var("SEED").ok().map(|seed| seed.parse().expect("a whole number"));
    let start = only.unwrap_or_else(|| fastrand::u64(..));
    let current = Arc::new(AtomicU64::new(start));
    watch(&current);
    let count = if only.is_some() { 1 } else { cases(200) };
    for seed in (0..count).map(|i| start.wrapping_add(i.into())) {
        current.store(seed, Relaxed);
        println!("seed {seed}");
        Case::new(seed).run();
    }
}
