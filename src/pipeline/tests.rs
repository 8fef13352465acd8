//! The pipeline on the asynchronous device: random units, settings, streams and interruptions, every byte compared by work
//! that runs on a stream like a layer function's. `cargo xtask mutants pipeline` checks that these tests notice where any one wait
//! is missing.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use support::{cases, limits::in_child};

use super::{Layer, LayerStreamer};
use crate::{
    device::{Cpu, Device, async_cpu::AsyncCpu},
    dtype::{self, DType},
    error::Error,
    fixtures::{self, Fixture, random_fixture},
    io::faults::{Attempt, Faults},
    plan::{
        Arrival, ArrivalOp, Bandwidths, Budget, CachePolicy, FixedOverhead, Plan, Reader, Settings, Sharing, Tier, Unit,
    },
    quantised::{Recipe, Scheme},
    trace::clock::simulated,
};

mod faults;
mod mapped;
mod order;
mod pace;
mod silence;
mod spans;

/// What each tensor of each unit must be on the device.
type Expected = Vec<Vec<(String, Arc<Vec<u8>>)>>;

const TIERS: [Tier; 4] = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];

/// The disk answers this thread's streamers one read at a time, each so long after the one before or after it was asked.
fn pace_reads(read: Duration) {
    let mut due = simulated::now();
    Faults::plan(move |attempt: Attempt<'_>| {
        if !attempt.trial {
            due = due.max(simulated::now()) + read;
            simulated::sleep_until(due);
        }
        attempt.result
    });
}

struct Case {
    fixture: Fixture,
    units: Vec<Unit>,
    expected: Expected,
    settings: Settings,
    device: AsyncCpu,
    rng: fastrand::Rng,
    wrong: Arc<AtomicUsize>,
}

/// The file and offset of every read from now on.
fn reads_seen() -> Arc<Mutex<Vec<(PathBuf, u64)>>> {
    let seen = Arc::<Mutex<Vec<_>>>::default();
    let reads = seen.clone();
    Faults::plan(move |attempt| {
        if !attempt.trial {
            reads.lock().unwrap().push((attempt.path.to_owned(), attempt.offset));
        }
        attempt.result
    });
    seen
}

/// Gives the units tiers for a random budget, and returns its settings, read in the way that was drawn.
fn planned(fixture: &Fixture, units: &mut [Unit], drawn: Settings, rng: &mut fastrand::Rng) -> Settings {
    let none = Budget { device_bytes: rng.bool().then_some(0), host_bytes: 0 };
    let least = none.least(&fixture.checkpoint, units, FixedOverhead::default()).unwrap();
    let budget = Budget {
        device_bytes: least.device_bytes.map(|bytes| bytes + rng.usize(..1_000_000)),
        host_bytes: least.host_bytes + rng.usize(..1_000_000),
    };
    let placement = budget.plan(&fixture.checkpoint, units, FixedOverhead::default(), Bandwidths::default()).unwrap();
    placement.apply_to(units).unwrap();
    let Settings { n_gpu, n_cpu_pinned, .. } = placement.settings;
    Settings { n_gpu, n_cpu_pinned, reader: drawn.reader, cache: drawn.cache, ..Settings::default() }
}

/// A matrix of several tensors, and what it must be on the device.
fn matrix(
    fixture: &Fixture,
    (inputs, shape): &([String; 3], [usize; 2]),
    rng: &mut fastrand::Rng,
) -> (Arrival, Vec<u8>) {
    let (scheme, to) =
        (Scheme::Gptq { zero: 1, order: false }, [None, Some(DType::F32), Some(DType::BF16)][rng.usize(..3)]);
    let entries = inputs.each_ref().map(|name| fixture.checkpoint.describe(name).unwrap());
    let recipe = Recipe::new(scheme, *shape, &entries).unwrap();
    let (stored, dtype) = (inputs.each_ref().map(|name| fixture.stored(name)), to.unwrap_or(recipe.as_blocks()));
    let mut made = vec![0; dtype.bytes_of(shape).unwrap()];
    recipe.make([&stored[0], &stored[1], &stored[2], &[]], dtype, &mut made);
    let op = ArrivalOp::Dequantise { scheme, shape: *shape, to };
    (Arrival { output: "a matrix".into(), inputs: inputs.to_vec(), op }, made)
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut fixture = random_fixture(60_000, &mut rng);
        // With a generator of their own, so that a seed draws the rest as it ever did.
        let mut of_matrices = fastrand::Rng::with_seed(!seed);
        let matrices = [(); 2].map(|()| fixture.add_gptq(&mut of_matrices));
        let (mut units, mut expected) = (Vec::new(), Vec::new());
        // Sometimes all on disk, sometimes all in one tier, mostly mixed.
        let tiers = match rng.u8(..6) {
            0 => vec![Tier::Disk],
            1 => vec![TIERS[rng.usize(..4)]],
            _ => TIERS.to_vec(),
        };
        for unit in &fixture.units {
            let (mut changed, mut tensors) = (Unit::new(unit.name()), Vec::new());
            for arrival in unit.arrivals() {
                let (stored, _, bytes) = fixture.tensor(&arrival.inputs[0]);
                let converts = stored.converts_to(DType::F32) && !fixture.packed.contains_key(&arrival.inputs[0]);
                let narrow = if (units.len() + tensors.len()) % 2 == 0 { DType::BF16 } else { DType::F32 };
                let to = if rng.u8(..3) == 0 && converts { narrow } else { stored };
                let mut arrived = vec![0; to.bytes(stored.elements(bytes.len()))];
                dtype::convert(stored, &bytes, to, &mut arrived);
                tensors.push((arrival.output.clone(), Arc::new(arrived)));
                changed.add(Arrival { op: ArrivalOp::To(to), ..arrival.clone() });
            }
            if of_matrices.bool() {
                let (arrival, made) = matrix(&fixture, &matrices[of_matrices.usize(..2)], &mut of_matrices);
                tensors.push((arrival.output.clone(), Arc::new(made)));
                changed.add(arrival);
            }
            changed.set_tier(match tiers[rng.usize(..tiers.len())] {
                Tier::Gpu if units.len() % 2 == 1 => Tier::GpuPacked,
                Tier::Pinned if units.len() % 3 == 2 => Tier::PinnedPacked,
                tier => tier,
            });
            units.push(changed);
            expected.push(tensors);
        }
        let rings = fixtures::random_rings(&mut rng);
        let settings = Settings {
            reader: [Reader::Auto, Reader::UringFixed, Reader::Uring, Reader::Pread][rng.usize(..4)],
            cache: [CachePolicy::Auto, CachePolicy::Direct, CachePolicy::Buffered][rng.usize(..3)],
            ..rings
        };
        // Or what a budget makes of it: any mix that the planner may choose.
        let settings = if rng.u8(..4) > 0 { settings } else { planned(&fixture, &mut units, settings, &mut rng) };
        let device = AsyncCpu::new(seed);
        if seed % 2 == 1 {
            device.link();
        }
        Self { fixture, units, expected, settings, device, rng, wrong: Arc::default() }
    }

    /// With the reader that was drawn, or whichever this system allows.
    fn streamer(&self) -> LayerStreamer<AsyncCpu> {
        let start = |settings| LayerStreamer::new(&self.device, &self.fixture.checkpoint, &self.units, settings);
        let any = Settings { reader: Reader::Auto, ..self.settings.clone() };
        match start(&self.settings) {
            Err(Error::Unsupported { .. }) => start(&any).unwrap(),
            other => other.unwrap(),
        }
    }

    /// Enqueues a comparison of everything in the layer with what it must be.
    fn verify(&self, layer: &Layer<'_, AsyncCpu>, stream: &<AsyncCpu as Device>::Stream) {
        for (name, expected) in &self.expected[layer.index()] {
            let tensor = layer.tensor(name).unwrap();
            assert_eq!(tensor.bytes(), expected.len());
            let (address, expected, wrong) = (tensor.ptr(), expected.clone(), self.wrong.clone());
            self.device.enqueue(stream, move || {
                // SAFETY: the layer is released on this stream after this, so its slot is not refilled before this is done.
                let bytes = unsafe { std::slice::from_raw_parts(address.as_ptr(), expected.len()) };
                // This test is about races, which the compiler must not reason away.
                let differs = std::hint::black_box(bytes) != expected.as_slice();
                wrong.fetch_add(usize::from(differs), SeqCst);
            });
        }
    }

    /// Takes and releases `count` layers, holding a few at a time, on several streams.
    fn take(&mut self, streamer: &LayerStreamer<AsyncCpu>, streams: &[<AsyncCpu as Device>::Stream], count: usize) {
        let mut held = Vec::new();
        for _ in 0..count {
            if held.len() == self.settings.n_gpu || (!held.is_empty() && self.rng.bool()) {
                let layer: Layer<'_, AsyncCpu> = held.swap_remove(self.rng.usize(..held.len()));
                match self.rng.bool() {
                    true => drop(layer),
                    // Its work is on the stream that it was taken with, which this one then follows.
                    false => layer.release_on(&streams[self.rng.usize(..streams.len())]).unwrap(),
                }
            }
            let stream = &streams[self.rng.usize(..streams.len())];
            let layer = streamer.next(stream).unwrap();
            self.verify(&layer, stream);
            held.push(layer);
        }
    }

    /// Some passes with interruptions; returns how many tensors were found wrong.
    fn run(mut self) -> usize {
        let mut streamer = self.streamer();
        let streams = [self.device.stream().unwrap(), self.device.stream().unwrap()];
        let units = self.units.len();
        for _ in 0..4 {
            if self.rng.u8(..3) == 0 {
                let part = self.rng.usize(..=units);
                self.take(&streamer, &streams, part);
                streamer.rewind().unwrap();
            }
            self.take(&streamer, &streams, units);
        }
        if self.rng.bool() {
            drop(streamer);
        }
        streams.iter().for_each(|stream| self.device.drain(stream).unwrap());
        self.wrong.load(SeqCst)
    }
}

#[test]
fn every_unit_arrives_byte_for_byte_on_an_asynchronous_device() {
    let start = fastrand::u64(..);
    for seed in (0..cases(150)).map(|i| start.wrapping_add(i.into())) {
        let case = Case::new(seed);
        let settings = case.settings.clone();
        assert_eq!(case.run(), 0, "seed {seed}: {settings:?}");
    }
}

#[test]
fn a_slot_is_filled_after_all_its_uses_though_the_last_was_of_a_unit_used_in_place() {
    // All units of it pass through two slots; uses on two streams end in any order.
    const SEED: u64 = 16_955_117_086_878_815_004;
    let case = Case::new(SEED);
    let plan = Plan::new(&case.fixture.checkpoint, &case.units, &case.settings, Sharing::Ram).unwrap();
    assert!(plan.layout.gpu.slots == 2 && plan.tiers().all(|tier| tier == Tier::Disk));
    assert!(plan.units.iter().any(|unit| unit.in_place) && plan.units.iter().any(|unit| !unit.in_place));
    (0..cases(30)).for_each(|_| assert_eq!(Case::new(SEED).run(), 0));
}

#[test]
fn after_a_failure_at_any_unit_the_next_pass_is_exact() {
    for seed in 0..cases(20).into() {
        let mut case = Case::new(seed);
        let (units, streams) = (case.units.len(), [case.device.stream().unwrap()]);
        let mut streamer = case.streamer();
        for at in 0..units {
            let failed = streamer.run_pass(&streams[0], (), |(), layer| {
                if layer.index() == at { Err(Error::setting("test", "fails on purpose")) } else { Ok(()) }
            });
            assert!(matches!(failed, Err(Error::Setting { name: "test", .. })));
            case.take(&streamer, &streams, units);
        }
        case.device.drain(&streams[0]).unwrap();
        assert_eq!(case.wrong.load(SeqCst), 0, "seed {seed}");
    }
}

#[test]
fn what_does_not_live_on_disk_is_read_once_or_once_more_where_its_memory_was_late() {
    let mut again = 0;
    for tier in [Tier::Ram, Tier::Pinned, Tier::Gpu] {
        for (n_cpu_pinned, n_cpu) in [(0, 0), (2, 0), (0, 2), (2, 2)] {
            let mut case = Case::new(11);
            case.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
            case.settings = Settings { n_cpu_pinned, n_cpu, ..Settings::default() };
            let streams = [case.device.stream().unwrap()];
            let streamer = case.streamer();
            case.take(&streamer, &streams, case.units.len());
            let read = |streamer: &LayerStreamer<AsyncCpu>| {
                let stats = streamer.stats();
                stats.direct_bytes + stats.buffered_bytes
            };
            let once = streamer.plan().units.iter().map(|unit| unit.read_bytes as u64).sum::<u64>();
            case.take(&streamer, &streams, case.units.len());
            let all = read(&streamer);
            assert!((once..=2 * once).contains(&all), "{all} bytes of {once}");
            again += all - once;
            case.take(&streamer, &streams, 4 * case.units.len());
            assert_eq!(read(&streamer), all, "{tier:?} with {:?}", case.settings);
            case.device.drain(&streams[0]).unwrap();
            assert_eq!(case.wrong.load(SeqCst), 0);
        }
    }
    assert!(again > 0, "no memory was late");
}

#[test]
fn tiers_of_every_kind_are_late_in_these_tests_and_no_unit_is_read_a_third_time() {
    for tier in [Tier::Ram, Tier::Pinned, Tier::Gpu] {
        let late = (0..200).any(|seed| {
            let mut case = Case::new(seed);
            // One stays on disk, so that there are slots that the others fit in.
            let plan = Plan::new(&case.fixture.checkpoint, &case.units, &case.settings, Sharing::Own).unwrap();
            let on_disk = (0..case.units.len()).max_by_key(|unit| plan.units[*unit].host_bytes).unwrap();
            for (number, unit) in case.units.iter_mut().enumerate() {
                unit.set_tier(if number == on_disk { Tier::Disk } else { tier });
            }
            case.settings = Settings { n_cpu_pinned: 2, n_cpu: 2, cache: CachePolicy::Direct, ..Settings::default() };
            let seen = reads_seen();
            let (streamer, streams) = (case.streamer(), [case.device.stream().unwrap()]);
            let units = case.units.len();
            case.take(&streamer, &streams, 5 * units);
            drop(streamer);
            case.device.drain(&streams[0]).unwrap();
            assert_eq!(case.wrong.load(SeqCst), 0, "seed {seed}");
            // Units share pages: those that begin where no other does tell.
            let begins: Vec<_> =
                plan.units.iter().map(|unit| unit.extents.first().map(|e| (e.file, e.offset))).collect();
            let seen = seen.lock().unwrap();
            let times = (0..units).filter(|unit| *unit != on_disk).filter_map(|unit| {
                let begin =
                    begins[unit].filter(|begin| begins.iter().flatten().filter(|other| *other == begin).count() == 1);
                let (file, offset) = begin?;
                let file = &case.fixture.checkpoint.files()[file];
                Some(seen.iter().filter(|(path, at)| path == file && *at == offset).count())
            });
            let most = times.max().unwrap_or(0);
            assert!(most <= 2, "seed {seed}: a unit kept {tier} was read {most} times");
            most > 1
        });
        assert!(late, "no unit kept {tier} was late");
    }
}

#[test]
fn a_unit_of_whose_memory_only_the_beginning_is_there_is_late() {
    for tier in [Tier::Ram, Tier::Pinned, Tier::Gpu] {
        // A megabyte each, of which much less is there at first.
        let mut fixture = fixtures::fixture(3, &[1 << 19], 7);
        fixture.units[..2].iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let settings = Settings { n_cpu_pinned: 2, cache: CachePolicy::Direct, ..Settings::default() };
        let seen = reads_seen();
        let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings).unwrap();
        let first = &streamer.plan().units[0].extents[0];
        let begin = (fixture.checkpoint.files()[first.file].clone(), first.offset);
        for _ in 0..3 {
            fixtures::checked_pass(&fixture, &mut streamer);
        }
        drop(streamer);
        let times = seen.lock().unwrap().iter().filter(|at| **at == begin).count();
        assert_eq!(times, 2, "a unit kept {tier}: once through slots, once to where it is kept");
    }
}

#[test]
fn a_run_that_waits_for_compute_is_not_called_bound_by_the_transfer() {
    let mut case = Case::new(3);
    case.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::Disk));
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 1, ..Settings::default() };
    let streamer = LayerStreamer::new(&case.device, &case.fixture.checkpoint, &case.units, &settings).unwrap();
    let stream = case.device.stream().unwrap();
    let transfer = || *streamer.stats().stage(crate::trace::Stage::Transfer);
    // A busy machine may take the processor away in the middle of a copy, for longer than a few layers take.
    let told = (0..400).any(|taken| {
        let layer = streamer.next(&stream).unwrap();
        case.device.enqueue(&stream, || std::thread::sleep(std::time::Duration::from_millis(40)));
        layer.release().unwrap();
        taken >= 20 && transfer().blocked > 2 * transfer().busy
    });
    assert!(told, "{:?}", transfer());
}

#[test]
fn when_the_device_fails_every_later_call_returns_that_error_and_drop_ends() {
    for copies in [0, 1, 7, 23] {
        let case = Case::new(6);
        let (mut streamer, stream) = (case.streamer(), case.device.stream().unwrap());
        case.device.fail_after(copies);
        let pass = |streamer: &mut LayerStreamer<AsyncCpu>| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(()));
        let first = (0..100).find_map(|_| pass(&mut streamer).err()).expect("copies fail").to_string();
        assert!(first.contains("on purpose"), "{first}");
        assert_eq!(pass(&mut streamer).unwrap_err().to_string(), first);
        assert_eq!(streamer.rewind().unwrap_err().to_string(), first);
    }
}
