//! The pipeline: stages joined by rings, and [`LayerStreamer`], which owns them.

mod arrival;
mod compute;
mod copiers;
mod device_time;
mod host;
mod link;
mod meter;
mod on_device;
mod packer;
mod pin;
mod read;
mod reports;
mod residency;
mod stage;
mod statics;
#[cfg(test)]
mod tests;
mod transfer;

use std::{
    cell::{Cell, RefCell},
    fmt,
    mem::ManuallyDrop,
    sync::Arc,
};

pub use compute::{Layer, LayerToken, Progress};
pub use host::LentMemory;
pub use meter::Meter;
pub use statics::StaticTensors;

use crate::{
    checkpoint::Checkpoint,
    device::{Device, DevicePtr, TensorRef},
    error::{Error, Result},
    io::{self, Engine, Source},
    layout::StageLayout,
    pipeline::{
        compute::{ComputeSide, ProgressHook, Taken},
        host::HostMemory,
        link::link,
        on_device::DeviceMemory,
        packer::{PackedUnits, Packer},
        pin::PinStage,
        read::ReadStage,
        reports::Reports,
        residency::Residencies,
        stage::{Control, Running},
        transfer::TransferStage,
    },
    plan::{Plan, Reader, Settings, Sharing, Unit},
    sync::Signal,
    trace::{About, Mark, Observer, Stats, Trace, Verdict},
};

/// Streams the units of a checkpoint to a device, pass after pass, ahead of the caller's work.
///
/// Its threads start at once and keep every buffer full: when a pass ends, the first units of the next are already there.
/// Dropping it stops the threads and waits for the device to be done with its memory.
///
/// ```
/// use layer_streamer::{
///     Checkpoint, Error, LayerStreamer, Settings,
///     device::{Cpu, Device},
/// };
///
/// let checkpoint = Checkpoint::open("examples/speller")?;
/// // One unit per layer, two units ahead on the device and four in pinned RAM.
/// let units = checkpoint.layers()?;
/// let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &Settings::default())?;
/// let stream = Cpu.stream()?;
/// for _pass in 0..2 {
///     let bytes = streamer.run_pass(&stream, 0, |bytes, layer| {
///         // Work that is enqueued on `stream` here runs when the layer has arrived.
///         Ok::<_, Error>(bytes + layer.tensors().map(|(_name, tensor)| tensor.bytes()).sum::<usize>())
///     })?;
///     assert_eq!(bytes, 3_153_920);
/// }
/// # Ok::<(), Error>(())
/// ```
pub struct LayerStreamer<D: Device> {
    device: D,
    checkpoint: Checkpoint,
    plan: Arc<Plan>,
    sources: Arc<[Source]>,
    /// Where packed tensors arrive.
    reports: Option<Arc<Reports<D>>>,
    packed: Arc<PackedUnits>,
    /// Which backend reads, and why not a higher one.
    reader: (Reader, String),
    control: Arc<Control>,
    compute: RefCell<ComputeSide<D>>,
    progress: Cell<Option<ProgressHook>>,
    /// Dropped in this order: the device forgets host memory before it is unmapped.
    registration: ManuallyDrop<Option<D::Registration>>,
    host: ManuallyDrop<Arc<HostMemory>>,
    memory: ManuallyDrop<Arc<DeviceMemory<D>>>,
    threads: Vec<Running>,
    /// Where units are packed while it runs.
    packer: Option<Packer>,
    /// Whether all that was given back already.
    ended: bool,
}

impl<D: Device> fmt::Debug for LayerStreamer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = |stage: &Option<StageLayout>| stage.as_ref().map_or(0, |stage| stage.slots);
        f.debug_struct("LayerStreamer")
            .field("device", &self.device.describe())
            .field("units", &self.plan.units())
            .field("residents", &self.plan.tallies.kept())
            .field("ram_slots", &slots(&self.plan.layout.ram))
            .field("pinned_slots", &slots(&self.plan.layout.pinned))
            .field("gpu_slots", &self.plan.layout.gpu.slots)
            .field("reader", &self.reader.0)
            .finish_non_exhaustive()
    }
}

/// Cancels passes from any thread. It may outlive the streamer, and does nothing then.
#[derive(Clone)]
pub struct Canceller(Arc<Control>);

impl Canceller {
    /// Makes the pass under way (or, between passes, the next one) fail with [`Error::Cancelled`] when it next asks for a layer,
    /// or at once if it waits for one; so also [`load_static`](LayerStreamer::load_static) while it waits for the disk. Layers that
    /// are held stay usable, and the pass after starts afresh. A layer function that computes for long asks by
    /// [`Layer::check_cancelled`], as the decoder does before each block of tokens.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

impl<D: Device> LayerStreamer<D> {
    /// Plans, reserves, registers, opens files, starts the threads; the first units are being read when this returns.
    ///
    /// # Errors
    /// Whatever [`Plan::new`] refuses; [`Error::Memory`], [`Error::Io`], [`Error::Thread`] or the device's own;
    /// [`Error::Checkpoint`] if a file is not the one that the checkpoint was opened with. Nothing is left behind after an error.
    pub fn new(device: &D, checkpoint: &Checkpoint, units: &[Unit], settings: &Settings) -> Result<Self> {
        Self::with_observers(device, checkpoint, units, settings, &[])
    }

    /// As [`LayerStreamer::new`], with those who see every span and mark.
    ///
    /// # Errors
    /// As there.
    pub fn with_observers(
        device: &D,
        checkpoint: &Checkpoint,
        units: &[Unit],
        settings: &Settings,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self> {
        // SAFETY: nothing is lent.
        unsafe { Self::with_lent_memory(device, checkpoint, units, settings, observers, &LentMemory::default()) }
    }

    /// The same, in memory of the caller's where some is lent.
    ///
    /// # Errors
    /// As there, and [`Error::Setting`] for memory that is shorter than [`Plan::slot_memory`] says, or begins in the wrong place.
    ///
    /// # Safety
    /// What is lent is the streamer's alone until that has been [closed](Self::close); for good if that returns
    /// [`Error::Leaked`]. Memory lent as pinned is known to the device, memory lent as the device's is `D`'s.
    pub unsafe fn with_lent_memory(
        device: &D,
        checkpoint: &Checkpoint,
        units: &[Unit],
        settings: &Settings,
        observers: &[Arc<dyn Observer>],
        lent: &LentMemory,
    ) -> Result<Self> {
        let sharing = if lent.is_some() { Sharing::Own } else { Sharing::of(device) };
        let plan = Arc::new(Plan::new(checkpoint, units, settings, sharing)?);
        lent.check(&plan)?;
        arrival::check(device, &plan.units)?;
        device.bind_thread()?;
        let sources = io::open_all(checkpoint, settings.cache)?;
        let gpu = lent.gpu.map(|(start, _)| DevicePtr::new(start.as_ptr()));
        // SAFETY: what is lent was checked, and outlives the streamer, as the caller promised.
        let host = unsafe { HostMemory::new(&plan, lent)? };
        let memory = Arc::new(DeviceMemory::new(device, &plan, &sources, gpu)?);
        let states = Arc::new(Residencies::new(plan.units()));
        let reports = Reports::new(device, checkpoint, &plan.units)?.map(Arc::new);
        // SAFETY: a local declared after `host`, then a field that Drop treats before it.
        let registration = unsafe { host.register_slots(device)? };

        let [read, pin, transfer, compute] = std::array::from_fn(|_| Signal::new());
        let signals = [&read, &pin, &transfer, &compute].map(Arc::clone).to_vec();
        let mut trace = Trace::new(observers, packer::passes_that_fill(&plan));
        trace.started(&about(device, &plan));
        let control = Control::new(signals, trace);
        let packed = Arc::new(PackedUnits::new(&plan, &control));
        let between = |stage: &StageLayout, producer: &Arc<Signal>, consumer: &Arc<Signal>| {
            link(stage.slots, plan.tallies.kept(), stage.batch, producer, consumer)
        };
        let layout = &plan.layout;
        let (gpu_out, gpu_in) = between(&layout.gpu, &transfer, &compute);
        let mut streamer = Self {
            compute: RefCell::new(ComputeSide::new(device, &plan, &sources, &control, &compute, &memory, gpu_in)?),
            progress: Cell::new(None),
            device: device.clone(),
            checkpoint: checkpoint.clone(),
            plan: plan.clone(),
            sources: sources.clone(),
            reports: reports.clone(),
            packed: packed.clone(),
            reader: (settings.reader, String::new()),
            control: control.clone(),
            registration: ManuallyDrop::new(registration),
            host: ManuallyDrop::new(host.clone()),
            memory: ManuallyDrop::new(memory.clone()),
            threads: Vec::with_capacity(3),
            packer: None,
            ended: false,
        };
        // From here on an error drops the streamer, which stops whatever has started.
        // SAFETY: the read stage owns the engine, and after it its own handle of the memory.
        let engine = unsafe { Engine::new(settings.reader, &sources, &host.read_targets(), &read) };
        let (engine, backend, why) = engine?;
        streamer.reader = (backend, why);
        let pins = layout.ram.is_some() && layout.pinned.is_some();
        let (read_out, read_in) = between(&host.first().1, &read, if pins { &pin } else { &transfer });
        let read_stage = ReadStage::new(&plan, &sources, &host, &memory, &states, read_out, &control, &read, engine);
        let (pin_stage, transfer_in) = if pins {
            let (pin_out, pin_in) = between(&host.last().1, &pin, &transfer);
            (Some(PinStage::new(&plan, &control, &host, read_in, pin_out)?), pin_in)
        } else {
            (None, read_in)
        };
        let transfer_stage = TransferStage::new(
            device,
            &plan,
            &control,
            &host,
            &memory,
            &states,
            &packed,
            reports,
            transfer_in,
            gpu_out,
        )?;
        streamer.threads.push(stage::spawn(transfer_stage, control.clone(), transfer)?);
        if let Some(stage) = pin_stage {
            streamer.threads.push(stage::spawn(stage, control.clone(), pin)?);
        }
        streamer.threads.push(stage::spawn(read_stage, control, read)?);
        streamer.packer = Packer::start(&plan, &sources, &host, &states, &packed, backend)?;
        Ok(streamer)
    }

    /// Waits until the next unit is on its way to the device and orders `stream` after its arrival; the caller's thread
    /// does not wait for the device. Up to `n_gpu` layers may be held at once and released in any order.
    ///
    /// # Errors
    /// [`Error::Read`] if the unit could not be read: every unit before it was handed over, and the error stays until
    /// [`rewind`](Self::rewind). [`Error::LayersHeld`] if `n_gpu` layers are held already.
    pub fn next<'s>(&'s self, stream: &'s D::Stream) -> Result<Layer<'s, D>> {
        let (taken, progress) = self.compute.borrow_mut().next(stream)?;
        let layer = Layer::new(self, stream, taken);
        // With the layer made and nothing borrowed: a hook that panics leaves a layer that is released.
        let hook = self.progress.take();
        if let Some(mut hook) = hook {
            hook(progress);
            self.progress.set(Some(hook));
        }
        Ok(layer)
    }

    /// Runs one pass: `layer_fn` is called for each unit in order with what it returned for the one before, `x` at first.
    /// After an error or a panic of `layer_fn`, or an error of the pipeline, the next pass starts afresh at the first unit.
    ///
    /// # Errors
    /// The first error of `layer_fn` or of the pipeline.
    pub fn run_pass<X, E: From<Error>>(
        &mut self,
        stream: &D::Stream,
        x: X,
        mut layer_fn: impl FnMut(X, &Layer<'_, D>) -> Result<X, E>,
    ) -> Result<X, E> {
        self.pass(stream, x, |x, layer| {
            let x = layer_fn(x, &layer)?;
            layer.release()?;
            Ok(x)
        })
    }

    /// The same for whoever has no `&mut`, and gives each layer back by itself.
    pub(crate) fn pass<'s, X, E: From<Error>>(
        &'s self,
        stream: &'s D::Stream,
        x: X,
        mut layer_fn: impl FnMut(X, Layer<'s, D>) -> Result<X, E>,
    ) -> Result<X, E> {
        /// Sends the pipeline back at once when `layer_fn` fails or panics, so that it is ready again early.
        struct Abandoned<'s, D: Device>(&'s LayerStreamer<D>);
        impl<D: Device> Drop for Abandoned<'_, D> {
            fn drop(&mut self) {
                // What stands in the way of it is found again, and reported, when the next pass starts.
                let _ = self.0.restart();
            }
        }
        {
            let mut compute = self.compute.borrow_mut();
            compute.check_no_leak()?;
            if compute.is_mid_pass() {
                compute.rewind()?;
            }
        }
        (0..self.plan.units()).try_fold(x, |x, _| {
            let layer = self.next(stream)?;
            // Dropped after the layer, which `layer_fn` owns: the slot is back by then.
            let abandoned = Abandoned(self);
            let x = layer_fn(x, layer)?;
            std::mem::forget(abandoned);
            Ok(x)
        })
    }

    /// Goes back to the first unit, after an error or in the middle of a pass. No thread or memory is made anew.
    ///
    /// # Errors
    /// [`Error::LayerLeaked`] if a layer was leaked; the first error of the device if it is beyond use.
    pub fn rewind(&mut self) -> Result<()> {
        self.restart()
    }

    /// [`rewind`](Self::rewind), for whoever holds no layer.
    pub(crate) fn restart(&self) -> Result<()> {
        self.compute.borrow_mut().rewind()
    }

    fn tensor_at(&self, Taken { unit, place, .. }: Taken, index: usize) -> Result<TensorRef<'_, D>> {
        let base = self.memory.address(&self.plan, unit, place);
        // SAFETY: the plan placed the tensor, aligned, inside slot or resident, which is the caller's until it gives it back.
        unsafe { compute::view(base, &self.plan.units[unit].tensors[index]) }
    }

    /// The tensor called `name` of a layer that is held as a token.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none, listing those there are.
    ///
    /// # Safety
    /// The token is this streamer's. Work on the tensor is on the stream that the layer was taken with, or on one that was made to
    /// wait for it since, and comes before the token is given back.
    pub unsafe fn token_tensor(&self, token: &LayerToken, name: &str) -> Result<TensorRef<'_, D>> {
        self.tensor_at(token.taken(), self.plan.units[token.index()].find(name)?)
    }

    /// The same by its number in the order of their names, in which [`Layer::tensors`] lists them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more than eight dimensions.
    ///
    /// # Panics
    /// If the layer has no such tensor.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn token_tensor_at(&self, token: &LayerToken, index: usize) -> Result<TensorRef<'_, D>> {
        self.tensor_at(token.taken(), index)
    }

    /// Gives back a layer that is held as a token: its slot is filled again once the work now on `stream` is done.
    ///
    /// # Errors
    /// As [`Layer::release_on`].
    ///
    /// # Safety
    /// The token is this streamer's. All work on the layer's tensors is on `stream`, or that follows it.
    pub unsafe fn release_token(&self, token: LayerToken, stream: &D::Stream) -> Result<()> {
        self.release(token.taken(), stream)
    }

    fn release(&self, taken: Taken, stream: &D::Stream) -> Result<()> {
        self.compute.borrow_mut().release(taken, stream)
    }

    /// As [`Layer::check_cancelled`].
    pub(crate) fn check_cancelled(&self) -> Result<()> {
        self.compute.borrow().check_cancelled()
    }

    /// Something with which another thread can cancel the pass under way.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.control.clone())
    }

    /// Loads tensors that stay on the device. Call it before the first pass: it reads beside the pipeline.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a name that the checkpoint lacks, [`Error::Read`], [`Error::Memory`] or the device's own;
    /// [`Error::Cancelled`] if it is cancelled while it waits for the disk.
    pub fn load_static(&self, names: &[&str]) -> Result<StaticTensors<D>> {
        let mut unit = Unit::new("the static tensors");
        for &name in names {
            unit.keep(name, name);
        }
        self.load_static_unit(&unit)
    }

    /// The same for the tensors of a unit, which may change on arrival.
    ///
    /// # Errors
    /// As there, and [`Error::Setting`] for a unit that cannot be made.
    pub fn load_static_unit(&self, unit: &Unit) -> Result<StaticTensors<D>> {
        self.device.bind_thread()?;
        let (epoch, mut told) = (self.control.epoch(), false);
        let was_cancelled = self.control.is_cancelled(epoch);
        let mut idle = |file: usize, since| {
            if since >= read::SLOW && !std::mem::replace(&mut told, true) {
                self.control.trace.mark(&Mark::Silent { file: self.sources[file].path.clone(), since });
            }
            if self.control.is_cancelled(epoch) && !was_cancelled { Err(Error::Cancelled) } else { Ok(()) }
        };
        StaticTensors::load(&self.device, &self.checkpoint, &self.sources, self.reader.0, unit, &mut idle)
    }

    /// Whether no packed weights were found corrupt so far. A device finds out when it unpacks them, and nobody waits for that: ask when
    /// the work of a pass is done, before its results are used. The pass after would begin with this error too.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the tensor that is corrupt, and its file.
    pub fn check_arrivals(&self) -> Result<()> {
        self.reports.as_ref().map_or(Ok(()), |reports| reports.check())
    }

    /// Calls `hook` for every unit handed over, in the thread that takes it.
    pub fn track_progress(&mut self, hook: impl FnMut(Progress) + Send + 'static) {
        self.progress.set(Some(Box::new(hook)));
    }

    /// Where the time and the bytes went since the start.
    pub fn stats(&self) -> Stats {
        self.meter().stats()
    }

    /// The same for another thread to ask, while passes run.
    pub fn meter(&self) -> Meter {
        Meter {
            control: self.control.clone(),
            sources: self.sources.clone(),
            reader: self.reader.clone(),
            packed: self.packed.clone(),
        }
    }

    /// What steady passes wait for, or before there are any what the first one waited for; `None` before that is complete.
    pub fn verdict(&self) -> Option<Verdict> {
        let stats = self.stats();
        let linked = !self.device.memory_is_ram();
        let fills = stats.steady.is_none() && self.plan.tallies.kept() > 0;
        stats.steady.or(stats.first).map(|passes| Verdict { fills, ..Verdict::of(&passes, linked) })
    }

    /// The verdict and what each stage waited for, in words, as a [`Recording`](crate::trace::timeline::Recording) takes them;
    /// nothing before a pass is complete.
    pub fn findings(&self) -> Vec<String> {
        self.verdict().map(|verdict| verdict.to_string()).into_iter().chain(self.stats().waits()).collect()
    }

    /// The plan that is being followed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<D: Device> LayerStreamer<D> {
    /// Drops it, and says how that went.
    ///
    /// # Errors
    /// [`Error::Leaked`] if the device did not answer, or a layer was leaked: memory that something may still use is not freed.
    pub fn close(mut self) -> Result<()> {
        self.end()
    }

    /// Stops the threads and gives everything back; once.
    pub(crate) fn end(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        self.control.stop();
        let mut idle = self.packer.take().is_none_or(Packer::end);
        idle &= self.device.bind_thread().is_ok();
        for thread in self.threads.drain(..) {
            idle &= thread.join();
        }
        // The device may still compute on slots that were released: wait for our own events, never for the caller's stream.
        idle &= self.memory.all_events().all(|event| self.device.synchronize(event).is_ok());
        // A leaked layer's work has no event to wait for.
        idle &= !self.compute.get_mut().holds_layers();
        self.compute.get_mut().end();
        if !idle {
            self.host.abandon();
            self.memory.abandon();
            let bytes = self.host.bytes() + self.memory.bytes;
            self.control.trace.mark(&Mark::Leaked { bytes });
            // A thread may have been left to itself.
            self.control.trace.close();
            return Err(Error::Leaked { bytes });
        }
        // SAFETY: this is done once, nothing uses the fields after it, and the threads and the device are done with the memory.
        unsafe {
            ManuallyDrop::drop(&mut self.registration);
            ManuallyDrop::drop(&mut self.host);
            ManuallyDrop::drop(&mut self.memory);
        }
        Ok(())
    }
}

/// What observers are told at the start.
fn about<D: Device>(device: &D, plan: &Plan) -> About {
    let slots = |stage: Option<&StageLayout>| stage.map_or(0, |stage| stage.slots);
    About {
        device: device.describe(),
        units: plan.units.iter().map(|unit| (unit.name.clone(), unit.disk_bytes, unit.tier)).collect(),
        slots: [slots(plan.layout.ram.as_ref()), slots(plan.layout.pinned.as_ref()), plan.layout.gpu.slots],
    }
}

impl<D: Device> Drop for LayerStreamer<D> {
    fn drop(&mut self) {
        // Observers are told.
        let _ = self.end();
    }
}
