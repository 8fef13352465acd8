//! The compute side of the pipeline, in the caller's thread: takes units that have arrived, orders the caller's stream after
//! their arrival, and hands their slots back ordered after the caller's work.

use std::{sync::Arc, time::Instant};

use crate::{
    device::{Device, Shape, TensorRef},
    error::{Error, Result},
    pipeline::{
        LayerStreamer,
        link::{Entry, Inlet, Place},
        on_device::DeviceMemory,
        stage::{Control, Safeguard},
    },
    plan::{Placed, Plan},
    sync::Signal,
    trace::{Activity, Mark, Span, Stage},
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

struct Held {
    place: Place,
    unit: usize,
}

/// What the caller's side of the streamer keeps between calls.
pub(super) struct ComputeSide<D: Device> {
    device: D,
    plan: Arc<Plan>,
    control: Arc<Control>,
    signal: Arc<Signal>,
    memory: Arc<DeviceMemory<D>>,
    inlet: Inlet,
    epoch: u64,
    position: usize,
    passes: u64,
    held: Vec<Held>,
    failed: Option<Error>,
    /// Up to when the caller's time has been reported.
    clock: Option<Instant>,
}

impl<D: Device> ComputeSide<D> {
    pub(super) fn new(
        device: &D,
        plan: &Arc<Plan>,
        control: &Arc<Control>,
        signal: &Arc<Signal>,
        memory: &Arc<DeviceMemory<D>>,
        inlet: Inlet,
    ) -> Self {
        Self {
            device: device.clone(),
            plan: plan.clone(),
            control: control.clone(),
            signal: signal.clone(),
            memory: memory.clone(),
            inlet,
            epoch: control.epoch(),
            position: 0,
            passes: 0,
            held: Vec::with_capacity(plan.gpu.slots),
            failed: None,
            clock: None,
        }
    }

    /// Waits for the next unit; `stream` will not run ahead of its arrival.
    pub(super) fn next(&mut self, stream: &D::Stream) -> Result<(usize, Place, Progress)> {
        if let Some(error) = &self.failed {
            // A pass that was cancelled, say, cannot be followed by another once the streamer is beyond use.
            return Err(self.control.fatal().unwrap_or_else(|| error.clone()));
        }
        let may_hold = self.plan.gpu.slots - 1;
        if self.held.len() >= may_hold {
            let oldest = self.plan.units[self.held[0].unit].name.clone();
            return Err(Error::LayersHeld { held: self.held.len(), oldest });
        }
        self.report(Activity::Busy, None);
        let arrival = self.control.next_entry(self.epoch, &mut self.inlet, &self.signal);
        self.report(Activity::Starved, None);
        let ordered = arrival.and_then(|Entry { unit, place, .. }| {
            let [arrived, compute_done] = self.memory.events(unit, place);
            let mut waited = Ok(());
            if self.control.keeps(Safeguard::Arrival) {
                waited = self.device.wait(stream, arrived);
            }
            if place == Place::Home {
                // So that the newest record of the end of its use stands for all before it, on whichever streams.
                waited = waited.and_then(|()| self.device.wait(stream, compute_done));
            }
            waited.inspect_err(|e| self.control.fail_for_good(e.clone()))?;
            Ok((unit, place))
        });
        let (unit, place) = ordered.inspect_err(|error| {
            if matches!(error, Error::Cancelled) {
                self.control.trace.mark(&Mark::Cancelled);
            }
            self.failed = Some(error.clone());
        })?;
        debug_assert_eq!(unit, self.position, "units arrive in order");
        self.held.push(Held { place, unit });
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
        Ok((unit, place, progress))
    }

    /// Accounts for the time since the last report, and for `unit` if it was spent on one to the end.
    fn report(&mut self, activity: Activity, unit: Option<usize>) {
        let end = Instant::now();
        let start = self.clock.replace(end).unwrap_or(end);
        let bytes = unit.map_or(0, |unit| self.plan.units[unit].disk_bytes);
        self.control.trace.span(&Span { stage: Stage::Compute, activity, unit, bytes, start, end });
    }

    /// Ends the use of a layer; its slot is handed back, to be filled once the work now on `stream` is done.
    pub(super) fn release(&mut self, unit: usize, place: Place, stream: &D::Stream) -> Result<()> {
        let [_, compute_done] = self.memory.events(unit, place);
        // The mistake that tests make on purpose: handed back first, and refilled before the record.
        #[cfg(test)]
        if let Place::Slot(slot) = place
            && !self.control.keeps(Safeguard::RecordBeforeRelease)
        {
            self.inlet.release(slot);
            std::thread::sleep(std::time::Duration::from_micros(300));
            self.held.retain(|held| held.place != place);
            return self.device.record(compute_done, stream);
        }
        // Without the record the slot must never be filled again: its event still shows the lap before.
        self.device.record(compute_done, stream).inspect_err(|e| {
            self.control.fail_for_good(e.clone());
            self.failed = Some(e.clone());
        })?;
        if let Place::Slot(slot) = place {
            self.inlet.release(slot);
        }
        // Held until here: what was not recorded must count as in use at the end.
        if let Some(index) = self.held.iter().position(|held| held.unit == unit && held.place == place) {
            self.held.remove(index);
        }
        self.report(Activity::Busy, Some(unit));
        Ok(())
    }

    /// Whether the next unit is not the first, or cannot come.
    pub(super) fn is_mid_pass(&self) -> bool {
        self.position != 0 || self.failed.is_some()
    }

    pub(super) fn rewind(&mut self) -> Result<()> {
        self.check_no_leak()?;
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
        Err(Error::LayerLeaked { layer: self.plan.units[held.unit].name.clone() })
    }
}

/// A unit on the device, ready for work on the stream it was taken with. Its slot goes back when it is released or dropped.
pub struct Layer<'s, D: Device> {
    streamer: &'s LayerStreamer<D>,
    stream: &'s D::Stream,
    unit: usize,
    place: Place,
    released: bool,
}

impl<'s, D: Device> Layer<'s, D> {
    pub(super) fn new(streamer: &'s LayerStreamer<D>, stream: &'s D::Stream, unit: usize, place: Place) -> Self {
        Self { streamer, stream, unit, place, released: false }
    }

    /// Its number in the pass, from 0.
    pub fn index(&self) -> usize {
        self.unit
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.streamer.plan().units[self.unit].name
    }

    /// The tensor that the unit calls `name`, in device memory; nothing is copied or allocated.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none, listing those there are.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let index = self.streamer.plan().units[self.unit].find(name)?;
        self.tensor_at(index)
    }

    /// The tensor that the unit calls `name`, or `None`.
    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        let index = self.streamer.plan().units[self.unit].position(name)?;
        self.tensor_at(index).ok()
    }

    /// The unit's tensors by name, in alphabetical order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, TensorRef<'_>)> {
        let tensors = &self.streamer.plan().units[self.unit].tensors;
        tensors
            .iter()
            .enumerate()
            .filter_map(|(index, placed)| Some((placed.name.as_str(), self.tensor_at(index).ok()?)))
    }

    fn tensor_at(&self, index: usize) -> Result<TensorRef<'_>> {
        self.streamer.tensor_at(self.unit, self.place, index)
    }

    /// Gives the slot back, to be filled again once the work now on `stream` is done. Use this in place of dropping where
    /// the layer's work ends on another stream than it was taken with, or to see an error of the device.
    ///
    /// # Errors
    /// The device's own, if it could not mark the end of the work; the streamer is then beyond use.
    pub fn release_on(mut self, stream: &D::Stream) -> Result<()> {
        self.released = true;
        self.streamer.release(self.unit, self.place, stream)
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

impl<D: Device> Drop for Layer<'_, D> {
    fn drop(&mut self) {
        if !self.released {
            // An error is kept by the streamer, and the next call returns it.
            let _ = self.streamer.release(self.unit, self.place, self.stream);
        }
    }
}

/// # Safety
/// `placed` lies, aligned, in memory that starts at `base` and lives for `'a`.
pub(super) unsafe fn view<'a>(base: crate::device::DevicePtr, placed: &Placed) -> Result<TensorRef<'a>> {
    let shape = Shape::new(&placed.shape)?;
    // SAFETY: the caller's.
    Ok(unsafe { TensorRef::from_raw(base.offset(placed.at), placed.dtype, shape) })
}
