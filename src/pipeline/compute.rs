//! The compute side of the pipeline, in the caller's thread: takes units that have arrived, orders the caller's stream after
//! their arrival, and hands their slots back ordered after the caller's work.

use std::{
    fmt, mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    device::{Device, Shape, TensorRef},
    error::{Error, Result},
    io::Source,
    layout::Placed,
    pipeline::{
        LayerStreamer,
        device_time::{DeviceTimer, Timing},
        link::{Entry, Inlet, Place},
        on_device::DeviceMemory,
        stage::Control,
    },
    plan::Plan,
    sync::Signal,
    trace::{Activity, Carried, Mark, Open, Stage},
};

/// How far a pass has come, for progress bars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes completed before this one.
    pub passes: u64,
    /// Units of this pass handed to the caller so far.
    pub done: usize,
    /// Units of a pass.
    pub units: usize,
    /// Bytes of this unit, as stored.
    pub bytes: usize,
}

/// A hook that is called for every unit handed over.
pub(super) type ProgressHook = Box<dyn FnMut(Progress) + Send>;

/// A unit that the caller has, and where. One that stays on the device may be held twice, in two passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) unit: usize,
    pub(super) place: Place,
    /// No other of the process has it.
    number: u64,
}

/// Numbers from here on no streamer has given yet. A streamer takes them by the batch, so that no two threads meet here per layer.
static NUMBERS: AtomicU64 = AtomicU64::new(NUMBERS_AT_ONCE);
const NUMBERS_AT_ONCE: u64 = 4096;

/// A layer that is held, as a value that borrows nothing: for hosts that keep layers in tables of their own, such as bindings to
/// other languages. [`Layer::into_token`] makes one; [`LayerStreamer::release_token`] takes it back. Dropping it leaks the layer.
#[must_use = "the layer's slot is not filled again until the token is given back"]
#[derive(Debug, PartialEq, Eq)]
pub struct LayerToken(Taken);

impl LayerToken {
    /// The layer's number in the pass, from 0.
    pub fn index(&self) -> usize {
        self.0.unit
    }

    pub(super) fn taken(&self) -> Taken {
        self.0
    }

    /// A number below 2⁴⁴ that no other layer taken in this process has, whichever the streamer.
    pub fn number(&self) -> u64 {
        self.0.number
    }
}

/// A layer that the caller has.
struct Held<D: Device> {
    taken: Taken,
    /// The same unit was held beside it: the event that ends its use may end the other's.
    beside: bool,
    activity: Activity,
    span: Open,
    timing: Option<Timing<D>>,
}

/// What the caller's side of the streamer keeps between calls.
pub(super) struct ComputeSide<D: Device> {
    device: D,
    plan: Arc<Plan>,
    control: Arc<Control>,
    signal: Arc<Signal>,
    memory: Arc<DeviceMemory<D>>,
    sources: Arc<[Source]>,
    inlet: Inlet,
    epoch: u64,
    position: usize,
    passes: u64,
    /// Of the layer taken last; a multiple of [`NUMBERS_AT_ONCE`] less one if the next begins a new batch.
    number: u64,
    held: Vec<Held<D>>,
    failed: Option<Error>,
    /// Where observers want the device's own time.
    timer: Option<DeviceTimer<D>>,
}

impl<D: Device> ComputeSide<D> {
    pub(super) fn new(
        device: &D,
        plan: &Arc<Plan>,
        sources: &Arc<[Source]>,
        control: &Arc<Control>,
        signal: &Arc<Signal>,
        memory: &Arc<DeviceMemory<D>>,
        inlet: Inlet,
    ) -> Result<Self> {
        let most = plan.layout.gpu.slots + plan.units();
        let timed = control.trace.times_device();
        Ok(Self {
            device: device.clone(),
            plan: plan.clone(),
            control: control.clone(),
            signal: signal.clone(),
            memory: memory.clone(),
            sources: sources.clone(),
            inlet,
            epoch: control.epoch(),
            position: 0,
            passes: 0,
            number: NUMBERS_AT_ONCE - 1,
            held: Vec::with_capacity(plan.layout.gpu.slots),
            failed: None,
            timer: if timed { DeviceTimer::new(device, Stage::Compute, most)? } else { None },
        })
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.control.is_cancelled(self.epoch) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits for the next unit; `stream` will not run ahead of its arrival.
    pub(super) fn next(&mut self, stream: &D::Stream) -> Result<(Taken, Progress)> {
        if let Some(error) = &self.failed {
            // A pass that was cancelled, say, cannot be followed by another once the streamer is beyond use.
            return Err(self.control.fatal().unwrap_or_else(|| error.clone()));
        }
        let may_hold = self.plan.layout.gpu.slots - 1;
        if self.held.len() >= may_hold {
            let oldest = self.plan.units[self.held[0].taken.unit].name.clone();
            return Err(Error::LayersHeld { held: self.held.len(), oldest });
        }
        let trace = &self.control.trace;
        if self.position == 0 {
            trace.pass_begun(self.passes);
        }
        let wait = trace.begin(Stage::Compute, Activity::Starved, 0);
        let arrival = self.control.next_entry(self.epoch, &mut self.inlet, &self.signal);
        let arrived_at = trace.end(wait);
        let arrival = arrival.and_then(|entry| self.check_files(entry.unit, entry.place).map(|()| entry));
        let ordered = arrival.and_then(|Entry { unit, place, pass, .. }| {
            let [arrived, compute_done] = self.memory.events(unit, place);
            let mut waited = self.device.wait(stream, arrived);
            if place == Place::Resident || self.plan.units[unit].in_place {
                // So that the newest record of the end of its use stands for those before it, on whichever streams. Nothing that was
                // copied since waits for these.
                waited = waited.and_then(|()| self.device.wait(stream, compute_done));
            }
            let timing = waited.and_then(|()| match &mut self.timer {
                Some(timer) => {
                    timer.tell(trace)?;
                    timer.begin(stream, trace)
                }
                None => Ok(None),
            });
            Ok((unit, place, pass, timing.inspect_err(|e| self.control.fail_for_good(e.clone()))?))
        });
        let (unit, place, pass, timing) = ordered.inspect_err(|error| {
            if matches!(error, Error::Cancelled) {
                self.control.trace.mark(&Mark::Cancelled);
            }
            self.failed = Some(error.clone());
        })?;
        debug_assert_eq!(unit, self.position, "units arrive in order");
        let activity = Activity::Unit { unit, pass };
        let span = trace.begin_at(Stage::Compute, activity, self.plan.units[unit].disk_bytes, arrived_at);
        self.number += 1;
        if self.number.is_multiple_of(NUMBERS_AT_ONCE) {
            self.number = NUMBERS.fetch_add(NUMBERS_AT_ONCE, Ordering::Relaxed);
        }
        let taken = Taken { unit, place, number: self.number };
        let mut beside = false;
        for other in self.held.iter_mut().filter(|other| other.taken.unit == unit) {
            (other.beside, beside) = (true, true);
        }
        self.held.push(Held { taken, beside, activity, span, timing });
        self.position += 1;
        let progress = Progress {
            passes: self.passes,
            done: self.position,
            units: self.plan.units(),
            bytes: self.plan.units[unit].disk_bytes,
        };
        if self.position == self.plan.units() {
            self.position = 0;
            self.passes += 1;
        }
        Ok((taken, progress))
    }

    /// Makes the work of `stream` from now on follow what was enqueued on `with`, with which the layer was taken.
    pub(super) fn join(&mut self, taken: Taken, with: &D::Stream, stream: &D::Stream) -> Result<()> {
        // Recorded once more at the end of the use: only then may anyone else look at it.
        let [_, compute_done] = self.memory.events(taken.unit, taken.place);
        let beside = self.held.iter().any(|held| held.taken == taken && held.beside);
        let follows = if beside { self.device.wait(with, compute_done) } else { Ok(()) };
        let joined = (follows.and_then(|()| self.device.record(compute_done, with)))
            .and_then(|()| self.device.wait(stream, compute_done));
        joined.inspect_err(|error| {
            self.control.fail_for_good(error.clone());
            self.failed = Some(error.clone());
        })
    }

    /// Ends the use of a layer; its slot is handed back, to be filled once the work now on `stream` is done.
    pub(super) fn release(&mut self, taken: Taken, stream: &D::Stream) -> Result<()> {
        let Some(index) = self.held.iter().position(|held| held.taken == taken) else {
            return Ok(());
        };
        let Taken { unit, place, .. } = taken;
        let [_, compute_done] = self.memory.events(unit, place);
        let timed = match (&mut self.timer, self.held[index].timing.take()) {
            (Some(timer), Some(timing)) => {
                let Held { activity, .. } = self.held[index];
                timer.end(timing, stream, activity, self.plan.units[unit].disk_bytes)
            }
            _ => Ok(()),
        };
        // The record stands for the use of whoever held the unit beside it too, on whichever stream.
        let follows = if self.held[index].beside { self.device.wait(stream, compute_done) } else { Ok(()) };
        // Without the record the slot must never be filled again: its event still shows the lap before.
        timed.and(follows).and_then(|()| self.device.record(compute_done, stream)).inspect_err(|e| {
            self.control.fail_for_good(e.clone());
            self.failed = Some(e.clone());
        })?;
        match place {
            Place::Slot(slot) => self.inlet.release(slot),
            Place::Mapped => self.memory.mapped(unit).iter().for_each(|mapped| mapped.end_use()),
            Place::Resident => {}
        }
        // Held until here: what was not recorded must count as in use at the end.
        let checked = self.check_files(unit, place);
        match &checked {
            Ok(()) => self.give_back(index),
            Err(error) => {
                self.control.trace.give_up(self.held.remove(index).span);
                self.failed = Some(error.clone());
            }
        }
        checked
    }

    /// The files of a unit that is used where the page cache has it are still those that the checkpoint was opened with: asked before
    /// the layer function has it and after, since what they become meanwhile is what it sees.
    fn check_files(&self, unit: usize, place: Place) -> Result<()> {
        if place != Place::Mapped {
            return Ok(());
        }
        let extents = self.plan.units[unit].extents.iter();
        let checked = extents.map(|extent| self.sources[extent.file].check_unchanged()).find(Result::is_err);
        checked.unwrap_or(Ok(())).inspect_err(|error| self.control.fail(self.epoch, error.clone()))
    }

    /// Forgets a layer that is held, and counts it.
    fn give_back(&mut self, index: usize) {
        let Held { taken: Taken { unit, .. }, span, .. } = self.held.remove(index);
        let trace = &self.control.trace;
        trace.end(span);
        trace.count(Stage::Compute, Carried { bytes: self.plan.units[unit].disk_bytes as u64, ..Carried::default() });
        if unit + 1 == self.plan.units() {
            trace.trip_ended(Stage::Compute);
            trace.pass_ended(self.passes);
        }
    }

    /// Ends the spans of layers that were leaked, and tells of the last ones that the device has done.
    pub(super) fn end(&mut self) {
        for Held { span, .. } in mem::take(&mut self.held) {
            self.control.trace.give_up(span);
        }
        if let Some(timer) = &mut self.timer {
            // The device is idle, or beyond use.
            let _ = timer.tell(&self.control.trace);
        }
    }

    /// Whether the next unit is not the first, or cannot come.
    pub(super) fn is_mid_pass(&self) -> bool {
        self.position != 0 || self.failed.is_some()
    }

    pub(super) fn rewind(&mut self) -> Result<()> {
        self.check_no_leak()?;
        self.control.trace.pass_left();
        self.control.rewind();
        self.epoch = self.control.epoch();
        (self.position, self.failed) = (0, None);
        Ok(())
    }

    /// Whether a layer was never released.
    pub(super) fn holds_layers(&self) -> bool {
        !self.held.is_empty()
    }

    /// To be called where no [`Layer`] can exist.
    pub(super) fn check_no_leak(&self) -> Result<()> {
        if let Some(error) = self.control.fatal() {
            return Err(error);
        }
        let Some(held) = self.held.first() else { return Ok(()) };
        Err(Error::LayerLeaked { layer: self.plan.units[held.taken.unit].name.clone() })
    }
}

/// A unit on the device, ready for work on the stream it was taken with. Its slot goes back when it is released or dropped.
///
/// Its tensors may be used on that stream alone, where work comes after the arrival and before the release; on another they are
/// refused. Who orders streams by events of their own makes views with [`TensorRef::from_raw`], and answers for them.
///
/// ```
/// # use layer_streamer::{Checkpoint, Error, LayerStreamer, Settings, device::{Cpu, Device}};
/// # let checkpoint = Checkpoint::open("examples/speller")?;
/// # let streamer = LayerStreamer::new(&Cpu, &checkpoint, &checkpoint.layers()?, &Settings::default())?;
/// let stream = Cpu.stream()?;
/// // Two layers are held at once (`n_gpu` is 2), and given back in any order.
/// let (first, second) = (streamer.next(&stream)?, streamer.next(&stream)?);
/// assert_eq!((first.index(), second.name()), (0, "model.layers.1"));
/// assert_eq!(first.tensor("mlp.up_proj.weight")?.shape(), [384, 128]);
/// second.release()?;
/// drop(first);
/// # Ok::<(), Error>(())
/// ```
pub struct Layer<'s, D: Device> {
    streamer: &'s LayerStreamer<D>,
    stream: &'s D::Stream,
    taken: Taken,
    released: bool,
}

impl<'s, D: Device> Layer<'s, D> {
    pub(super) fn new(streamer: &'s LayerStreamer<D>, stream: &'s D::Stream, taken: Taken) -> Self {
        Self { streamer, stream, taken, released: false }
    }

    /// Its number in the pass, from 0.
    pub fn index(&self) -> usize {
        self.taken.unit
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.streamer.plan().units[self.taken.unit].name
    }

    /// The tensor that the unit calls `name`, in device memory; nothing is copied or allocated.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none, listing those there are.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_, D>> {
        let index = self.streamer.plan().units[self.taken.unit].find(name)?;
        self.tensor_at(index)
    }

    /// The tensor that the unit calls `name`, or `None`.
    pub fn get(&self, name: &str) -> Option<TensorRef<'_, D>> {
        let index = self.streamer.plan().units[self.taken.unit].position(name)?;
        self.tensor_at(index).ok()
    }

    /// The unit's tensors by name, in alphabetical order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, TensorRef<'_, D>)> {
        let tensors = &self.streamer.plan().units[self.taken.unit].tensors;
        tensors
            .iter()
            .enumerate()
            .filter_map(|(index, placed)| Some((placed.name.as_str(), self.tensor_at(index).ok()?)))
    }

    fn tensor_at(&self, index: usize) -> Result<TensorRef<'_, D>> {
        let tensor = self.streamer.tensor_at(self.taken, index)?;
        Ok(tensor.only_on(self.streamer.device.stream_id(self.stream)))
    }

    /// For a layer function that computes for long, which nothing else ends early: it asks now and then.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the pass was [cancelled](LayerStreamer::canceller).
    pub fn check_cancelled(&self) -> Result<()> {
        self.streamer.check_cancelled()
    }

    /// The layer as a value that borrows neither the streamer nor the stream.
    pub fn into_token(mut self) -> LayerToken {
        self.released = true;
        LayerToken(self.taken)
    }

    /// Gives the slot back, to be filled again once the work now on `stream`, and on the stream that the layer was taken with, is
    /// done. Use this in place of dropping where the layer's work ends on another stream, or to see an error of the device.
    ///
    /// # Errors
    /// The device's own, if it could not mark the end of the work; the streamer is then beyond use.
    pub fn release_on(mut self, stream: &D::Stream) -> Result<()> {
        let device = &self.streamer.device;
        self.released = true;
        if device.stream_id(stream) != device.stream_id(self.stream) {
            self.streamer.compute.borrow_mut().join(self.taken, self.stream, stream)?;
        }
        self.streamer.release(self.taken, stream)
    }

    /// As [`release_on`](Self::release_on), with the stream that the layer was taken with.
    ///
    /// # Errors
    /// As there.
    pub fn release(self) -> Result<()> {
        let stream = self.stream;
        self.release_on(stream)
    }
}

impl<D: Device> fmt::Debug for Layer<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = &self.streamer.plan().units[self.taken.unit].tensors;
        f.debug_struct("Layer")
            .field("index", &self.index())
            .field("name", &self.name())
            .field("tensors", &tensors.len())
            .finish_non_exhaustive()
    }
}

impl<D: Device> Drop for Layer<'_, D> {
    fn drop(&mut self) {
        if !self.released {
            // An error is kept by the streamer, and the next call returns it.
            let _ = self.streamer.release(self.taken, self.stream);
        }
    }
}

/// # Safety
/// `placed` lies, aligned, in memory that starts at `base` and lives for `'a`.
pub(super) unsafe fn view<'a, D: Device>(base: crate::device::DevicePtr, placed: &Placed) -> Result<TensorRef<'a, D>> {
    let shape = Shape::new(&placed.shape)?;
    // SAFETY: the caller promised that the tensor lies there, aligned, for as long as the view is used.
    Ok(unsafe { TensorRef::from_raw(base.offset(placed.at), placed.dtype, shape) })
}
