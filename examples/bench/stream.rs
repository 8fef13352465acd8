//! The pipeline under measurement.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use layer_streamer::{
    Checkpoint, Error, LayerStreamer, Settings, Unit,
    device::Device,
    packed::Description,
    plan::Tier,
    trace::{Observer, PassStats, Stage, Stats, Verdict},
};

use super::{Clocks, Failure, Moved, clock};

/// Counts what is allocated on the Rust heap.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the pipeline did while it was measured.
#[derive(Clone, Copy, Default)]
pub struct Used {
    /// Bytes read, or where nothing is read brought to the device, and the CPU time of the whole process.
    pub moved: Moved,
    /// Bytes of each link.
    pub links: PerPass,
    pub allocations: u64,
    pub clocks: Clocks,
    /// Bytes moved and time at work, by stage.
    pub stages: [(u64, Duration); 4],
    /// All of it, as if it was one pass.
    pub passes: PassStats,
}

impl Used {
    pub fn add(&mut self, other: Self) {
        self.moved.add(other.moved);
        self.allocations += other.allocations;
        self.clocks.add(other.clocks);
        for (sum, stage) in self.stages.iter_mut().zip(other.stages) {
            *sum = (sum.0 + stage.0, sum.1 + stage.1);
        }
        let (sum, more) = (&mut self.passes, other.passes);
        sum.passes = 1;
        for (sum, more) in [
            (&mut sum.seconds, more.seconds),
            (&mut sum.direct_bytes, more.direct_bytes),
            (&mut sum.buffered_bytes, more.buffered_bytes),
            (&mut sum.mapped_bytes, more.mapped_bytes),
            (&mut sum.pinned_bytes, more.pinned_bytes),
            (&mut sum.transferred_bytes, more.transferred_bytes),
        ] {
            *sum += more;
        }
        let times = sum.stage_seconds.iter_mut().flatten().zip(more.stage_seconds.into_iter().flatten());
        times.for_each(|(sum, more)| *sum += more);
    }

    /// The stage that was at work most, of those that moved anything. Taking layers and nothing else, the compute side has no work
    /// to be bound by.
    pub fn bottleneck(&self) -> Stage {
        let at_work = |stage: &Stage| {
            let (bytes, busy) = self.stages[*stage as usize];
            (bytes > 0, busy)
        };
        [Stage::Read, Stage::Pin, Stage::Transfer].into_iter().max_by_key(at_work).expect("there are three")
    }

    /// CPU seconds per GB that a stage moved, if it moved any. Where the reader's work is done by threads of the
    /// kernel's, theirs counts as its own.
    pub fn cpu_per_gb(&self, stage: Stage) -> Option<f64> {
        let bytes = if stage == Stage::Compute { self.moved.bytes } else { self.stages[stage as usize].0 };
        let cpu_seconds = match stage {
            Stage::Read => self.clocks.stages[0] + self.clocks.kernel_workers(),
            Stage::Pin => self.clocks.stages[1],
            Stage::Transfer => self.clocks.stages[2],
            Stage::Compute => self.clocks.own,
        };
        (bytes > 0).then(|| Moved { bytes, seconds: 0.0, cpu_seconds }.cpu_per_gb())
    }
}

/// Bytes that a pass moves, link by link.
#[derive(Clone, Copy, Default)]
pub struct PerPass {
    /// Read past the page cache, and through it.
    pub direct: u64,
    pub buffered: u64,
    /// Used where the page cache has it.
    pub mapped: u64,
    /// Copied to pinned RAM, and to the device.
    pub pin: u64,
    pub transfer: u64,
}

impl PerPass {
    pub fn read(&self) -> u64 {
        self.direct + self.buffered
    }

    fn between(before: &Stats, after: &Stats) -> Self {
        let stage = |stage| after.stage(stage).bytes - before.stage(stage).bytes;
        Self {
            direct: after.direct_bytes - before.direct_bytes,
            buffered: after.buffered_bytes - before.buffered_bytes,
            mapped: after.mapped_bytes - before.mapped_bytes,
            pin: stage(Stage::Pin),
            transfer: stage(Stage::Transfer),
        }
    }
}

/// A streamer, and someone who takes its layers.
pub struct Pipeline<D: Device> {
    streamer: LayerStreamer<D>,
    stream: D::Stream,
    /// Slots of all stages together, or a few more.
    slots: usize,
    /// By unit: it moves in every pass.
    moves: Vec<bool>,
    /// What a steady pass moves.
    pub per_pass: PerPass,
    /// Layers of a pass where some move and others do not, or not as far: windows are whole passes then.
    whole: Option<usize>,
    longest_copy: Duration,
    /// Whether it reads in every pass. If not, it copies.
    pub reads: bool,
}

impl<D: Device> Pipeline<D> {
    pub fn new(
        device: &D,
        checkpoint: &Checkpoint,
        units: &[Unit],
        settings: &Settings,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self, Failure> {
        let streamer = LayerStreamer::with_observers(device, checkpoint, units, settings, observers)?;
        let slots = settings.n_gpu + settings.n_cpu_pinned + settings.n_cpu + 3;
        let largest = units.iter().map(|unit| bytes(checkpoint, unit)).max().unwrap_or(0);
        let longest_copy = Duration::from_nanos(largest as u64);
        let (moves, stream) = (vec![true; units.len()], device.stream()?);
        Ok(Self {
            streamer,
            stream,
            slots,
            moves,
            per_pass: PerPass::default(),
            whole: None,
            longest_copy,
            reads: true,
        })
    }

    pub fn stats(&self) -> Stats {
        self.streamer.stats()
    }

    /// What a trace says in words, of what was measured: between the windows the pipeline waits for the limit.
    pub fn findings(&self, used: &Used) -> Vec<String> {
        if used.passes.seconds == 0.0 {
            return self.streamer.findings();
        }
        let linked = !self.streamer.device().memory_is_ram();
        let verdict = Verdict::of(&used.passes, linked).to_string();
        std::iter::once(verdict).chain(used.passes.waits()).collect()
    }

    /// Runs one pass and compares every tensor of one unit in `every` with a plain read.
    pub fn check(&mut self, checkpoint: &Checkpoint, units: &[Unit], every: usize) -> Result<(), Failure> {
        let (mut expected, mut arrived) = (Vec::new(), Vec::new());
        let device = self.streamer.device().clone();
        self.streamer.run_pass(&self.stream, (), |(), layer| {
            for arrival in units[layer.index()].arrivals().iter().filter(|_| layer.index().is_multiple_of(every)) {
                let tensor = layer.tensor(&arrival.output)?;
                let name = &arrival.inputs[0];
                let (path, offset) = checkpoint.location(name).ok_or("a tensor without a place")?;
                let packing = checkpoint.packing(name);
                expected.resize(packing.map_or(tensor.bytes(), Description::bytes), 0);
                File::open(path)?.read_exact_at(&mut expected, offset)?;
                if let Some(packing) = packing {
                    let mut weights = vec![0; packing.weights()];
                    packing.parts().decode(&expected, &mut weights)?;
                    expected = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
                }
                arrived.resize(tensor.bytes(), 0);
                // SAFETY: the vector is as long as the tensor, whose layer is held; the copy is waited for.
                unsafe { device.copy_to_host(arrived.as_mut_ptr(), tensor.ptr(), tensor.bytes(), &self.stream)? };
                device.drain(&self.stream)?;
                if arrived != expected {
                    return Err(Failure::from(format!("{} of {} arrived wrong", arrival.output, layer.name())));
                }
            }
            Ok(())
        })
    }

    /// Runs a pass to see what a steady one does; returns whether anything moves.
    pub fn find_out(&mut self) -> Result<bool, Failure> {
        let (mut before, mut after);
        // Units whose memory was not there in the first pass are read once more in the second.
        self.pass()?;
        // Between two moments at which all slots are full a pass is read, no more and no less. Where a busy disk made one
        // of them seem so, again.
        let mut tries = 0..200;
        let mut packs = self.streamer.plan().count(Tier::PinnedPacked) > 0;
        loop {
            self.settle_for_good();
            before = self.stats();
            self.pass()?;
            self.settle_for_good();
            after = self.stats();
            let plan = self.streamer.plan();
            let units = after.stage(Stage::Read).units - before.stage(Stage::Read).units;
            // What was packed meanwhile may still have passed as it was read.
            let settled = units as usize == plan.count(Tier::Disk) && before.packed == after.packed;
            if settled && !std::mem::replace(&mut packs, false) || tries.next().is_none() {
                break;
            }
        }
        self.per_pass = PerPass::between(&before, &after);
        self.reads = self.per_pass.read() > 0;
        let (reads, plan) = (self.reads, self.streamer.plan());
        self.moves = plan
            .tiers()
            .map(|tier| tier == Tier::Disk || (!reads && !matches!(tier, Tier::Gpu | Tier::GpuPacked)))
            .collect();
        let first = plan.tiers().next();
        self.whole = plan.tiers().any(|tier| Some(tier) != first).then_some(plan.units());
        Ok(self.reads || self.per_pass.transfer > 0)
    }

    /// Takes the layers of one pass, and waits until the last is on the device.
    pub fn pass(&mut self) -> Result<(), Failure> {
        self.streamer.run_pass(&self.stream, (), |(), _| Ok::<_, Error>(()))?;
        self.drain()
    }

    /// Runs a pass, and calls `use_tensor` with where each tensor begins and how long it is, while its layer is held.
    pub fn each_tensor(&mut self, mut use_tensor: impl FnMut(*const u8, usize)) -> Result<(), Failure> {
        self.streamer.run_pass(&self.stream, (), |(), layer| {
            layer.tensors().for_each(|(_, tensor)| use_tensor(tensor.ptr().as_ptr(), tensor.bytes()));
            Ok::<_, Error>(())
        })?;
        self.drain()
    }

    fn drain(&self) -> Result<(), Failure> {
        Ok(self.streamer.device().drain(&self.stream)?)
    }

    /// Takes the rest of the pass, or one more where none is begun.
    pub fn finish_pass(&self) -> Result<(), Failure> {
        loop {
            let layer = self.streamer.next(&self.stream)?;
            let last = layer.index() + 1 == self.streamer.plan().units();
            layer.release()?;
            if last {
                return Ok(());
            }
        }
    }

    fn take(&self) -> Result<(), Failure> {
        Ok(self.streamer.next(&self.stream)?.release()?)
    }

    /// Waits until all slots are full and nothing moves any more. A copy shows only when its layer is done, so that is
    /// how long nothing must have moved: at 1 GB/s, which the slowest memory beats.
    pub fn settle(&self) {
        let total = || {
            let stats = self.stats();
            (read_bytes(&stats), Stage::ALL.map(|stage| stats.stage(stage).bytes))
        };
        let mut last = None;
        while last != Some(total()) {
            last = Some(total());
            thread::sleep(Duration::from_millis(30) + self.longest_copy);
        }
    }

    /// The same several times, for where every byte counts.
    fn settle_for_good(&self) {
        (0..4).for_each(|_| self.settle());
    }

    /// Takes as many layers that move as all slots hold: what was read before is gone then.
    pub fn empty(&self) -> Result<(), Failure> {
        let mut left = self.slots;
        while left > 0 {
            let layer = self.streamer.next(&self.stream)?;
            left -= usize::from(self.moves[layer.index()]);
            layer.release()?;
        }
        Ok(())
    }

    /// Takes layers as fast as they come until the window is over, and the pass with it where layers differ; on a busy machine for
    /// another window if nothing was moved. Empty it first.
    pub fn window(&mut self, window: Duration) -> Result<Used, Failure> {
        let take = |pipeline: &mut Self| {
            let (start, mut taken) = (Instant::now(), 0);
            while start.elapsed() < window || pipeline.whole.is_some_and(|units| taken % units != 0) {
                pipeline.take()?;
                taken += 1;
            }
            Ok(())
        };
        let mut used = self.measure(take)?;
        while used.moved.bytes == 0 {
            let more = self.measure(take)?;
            used.add(more);
            used.links = more.links;
        }
        Ok(used)
    }

    /// Whatever `work` makes the pipeline do.
    pub fn measure(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Failure>) -> Result<Used, Failure> {
        // What a device was asked for counts when it is done, at both ends alike.
        self.drain()?;
        let clocks = Clocks::now()?;
        let (start, before, allocations) = (Instant::now(), self.stats(), ALLOCATIONS.load(Relaxed));
        work(self)?;
        self.drain()?;
        let (seconds, allocations) = (start.elapsed().as_secs_f64(), ALLOCATIONS.load(Relaxed) - allocations);
        let (after, clocks) = (self.stats(), Clocks::now()?.since(clocks));
        let links = PerPass::between(&before, &after);
        let bytes = if self.reads { links.read() } else { links.transfer };
        let stages = Stage::ALL.map(|stage| {
            let (before, after) = (before.stage(stage), after.stage(stage));
            (after.bytes - before.bytes, after.busy - before.busy)
        });
        let moved = Moved { bytes, seconds, cpu_seconds: clocks.process };
        let passes = after.since(&before, seconds);
        Ok(Used { moved, links, allocations, clocks, stages, passes })
    }

    /// The CPU time of all the pipeline's threads, as a share of one core, while the caller holds a layer and takes no
    /// other.
    pub fn stalled_share(&self, time: Duration) -> Result<f64, Failure> {
        let layer = self.streamer.next(&self.stream)?;
        self.settle();
        let (start, process, own) = (Instant::now(), clock::process(), clock::own_thread());
        thread::sleep(time);
        let cpu = (clock::process() - process) - (clock::own_thread() - own);
        // The two clocks are read one after the other, which shows when nothing runs.
        let share = (cpu / start.elapsed().as_secs_f64()).max(0.0);
        layer.release()?;
        Ok(share)
    }
}

/// Bytes of a unit's tensors.
fn bytes(checkpoint: &Checkpoint, unit: &Unit) -> usize {
    let inputs = unit.arrivals().iter().flat_map(|arrival| &arrival.inputs);
    inputs.filter_map(|name| checkpoint.describe(name).and_then(|(dtype, shape)| dtype.bytes_of(shape))).sum()
}

fn read_bytes(stats: &Stats) -> u64 {
    stats.direct_bytes + stats.buffered_bytes
}
