//! The transfer stage: enqueues each unit's copies and casts on the device, and hands the unit on before they
//! are done; events keep the order.
//!
//! For a unit that goes from source slot `s` to device slot `d`, it enqueues
//!
//! ```text
//! copy stream       wait(compute_done[d], arrived[d]) → record(begun) → arrival: copies and casts → record(done)
//! the last stream   record(arrived[d])
//! ```
//!
//! and for a unit that is kept packed on the device, in every pass
//!
//! ```text
//! convert stream    wait(its arrival, compute_done[d], arrived[d]) → unpack → record(arrived[d])
//! ```
//!
//! For a unit that is used in place it enqueues nothing: slot `d` stands for slot `s`. One in the page cache needs neither.
//!
//! **Invariant**: a source slot is released upstream only after `done` was seen complete, or where it is used in place `compute_done[d]`; a
//! device slot comes back from the compute side only after its `compute_done` was recorded.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    device::Device,
    error::{Error, Result},
    pipeline::{
        arrival::{ArrivalStream, Form},
        device_time::DeviceTimer,
        host::HostMemory,
        link::{Entry, Inlet, Message, Outlet, Place, Slot},
        on_device::DeviceMemory,
        packer::PackedUnits,
        reports::Reports,
        residency::{Residencies, Residency},
        stage::{Advance, Advanced, Control},
    },
    plan::{Plan, Tier},
    sync::Signal,
    trace::{Activity, Carried, Stage},
};

/// A unit's copies that may still be running.
struct CopyInFlight<D: Device> {
    /// Where they come from, unless that is where the unit is kept.
    source: Option<Slot>,
    /// Reached when they begin, after whatever the device made them wait for.
    begun: D::Event,
    done: D::Event,
}

pub(crate) struct TransferStage<D: Device> {
    device: D,
    plan: Arc<Plan>,
    control: Arc<Control>,
    /// Of residents in pinned RAM, by unit, from their first copy on; dropped before the memory that they are about. One at a time
    /// between copies they cost little; all of them before the first read, seconds.
    residents: Vec<Option<D::Registration>>,
    from: Arc<HostMemory>,
    to: Arc<DeviceMemory<D>>,
    states: Arc<Residencies>,
    packed: Arc<PackedUnits>,
    inlet: Inlet,
    outlet: Outlet,
    arrival: ArrivalStream<D>,
    /// Slots on the device that are free, or come back and stand for a source slot that work which is enqueued may still use.
    back: Vec<Slot>,
    /// By slot on the device: the source slot that it stands for.
    stands_for: Vec<Option<Slot>>,
    /// Oldest first: all that come from source slots, and of those from residents a pass.
    in_flight: VecDeque<CopyInFlight<D>>,
    /// Events for more of these; at least so many stay for source slots.
    idle: Vec<[D::Event; 2]>,
    sources: usize,
    /// Where observers want the device's own time.
    timer: Option<DeviceTimer<D>>,
}

impl<D: Device> TransferStage<D> {
    #[allow(clippy::too_many_arguments, reason = "a stage is put together once")]
    pub(crate) fn new(
        device: &D,
        plan: &Arc<Plan>,
        control: &Arc<Control>,
        from: &Arc<HostMemory>,
        to: &Arc<DeviceMemory<D>>,
        states: &Arc<Residencies>,
        packed: &Arc<PackedUnits>,
        reports: Option<Arc<Reports<D>>>,
        inlet: Inlet,
        outlet: Outlet,
    ) -> Result<Self> {
        let sources = from.last().1.slots;
        // As many as may be enqueued before the first of them has to be done: slots, and a pass of units that have none.
        let most = sources + plan.layout.gpu.slots + plan.tallies.kept();
        let timed = control.trace.times_device();
        let slots = plan.layout.gpu.slots;
        Ok(Self {
            back: Vec::with_capacity(slots),
            stands_for: vec![None; slots],
            plan: plan.clone(),
            control: control.clone(),
            residents: plan.units.iter().map(|_| None).collect(),
            from: from.clone(),
            to: to.clone(),
            states: states.clone(),
            packed: packed.clone(),
            inlet,
            outlet,
            arrival: ArrivalStream::new(device, plan.layout.staging, reports, c"layer-streamer transfer")?,
            in_flight: VecDeque::with_capacity(most),
            idle: (0..most).map(|_| Ok([device.event()?, device.event()?])).collect::<Result<_>>()?,
            sources,
            timer: if timed { DeviceTimer::new(device, Stage::Transfer, most)? } else { None },
            device: device.clone(),
        })
    }

    /// Takes note of copies that are done, whose source slots are released; with `block` waits for the oldest. Returns whether there
    /// were any.
    fn retire(&mut self, mut block: bool) -> Result<bool> {
        let mut retired = false;
        while let Some(CopyInFlight { done, .. }) = self.in_flight.front() {
            if !self.device.query(done)? {
                if !block {
                    break;
                }
                self.device.synchronize(done)?;
            }
            let CopyInFlight { source, begun, done } = self.in_flight.pop_front().expect("it is there");
            self.idle.push([begun, done]);
            if let Some(slot) = source {
                self.inlet.release(slot);
            }
            (block, retired) = (false, true);
        }
        Ok(retired)
    }

    /// Enqueues all of a unit's work: from a slot or resident in host memory to one on the device.
    fn enqueue(&mut self, index: usize, pass: u64, from: Place, to: Place) -> Result<()> {
        let (plan, packed) = (self.plan.clone(), self.packed.clone());
        let packed = packed.get(index).filter(|_| from == Place::Resident);
        let unit = packed.map_or(&plan.units[index], |packed| &packed.layout);
        let source = match (from, packed) {
            (Place::Slot(slot), _) => self.from.last().0.slot(slot.0).as_ptr(),
            (Place::Resident, Some(packed)) => packed.start.as_ptr(),
            (Place::Resident, None) => self.from.resident(unit).as_ptr(),
            (Place::Mapped, _) => unreachable!("it is used where it is"),
        };
        let pinned = matches!(unit.tier, Tier::Pinned | Tier::PinnedPacked);
        if from == Place::Resident && pinned && self.residents[index].is_none() {
            // SAFETY: the stage drops it before its handle of the memory.
            self.residents[index] = unsafe { self.from.register_resident(&self.device, source, unit.host_bytes)? };
        }
        let target = self.to.address(&plan, index, to);
        let [arrived, compute_done] = self.to.events(index, to);
        self.device.wait(self.arrival.stream(), compute_done)?;
        // A unit that was handed back unused never saw compute: its casts may still be writing this slot.
        self.device.wait(self.arrival.stream(), arrived)?;
        let source_slot = if let Place::Slot(slot) = from { Some(slot) } else { None };
        let is_followed = source_slot.is_some() || self.idle.len() > self.sources;
        let flight = if is_followed { self.idle.pop() } else { None };
        let flight = flight.map(|[begun, done]| CopyInFlight { source: source_slot, begun, done });
        if let Some(CopyInFlight { begun, .. }) = &flight {
            self.device.record(begun, self.arrival.stream())?;
        }
        let timing =
            self.timer.as_mut().map(|timer| timer.begin(self.arrival.stream(), &self.control.trace)).transpose()?;
        let stays_packed = to == Place::Resident && unit.tier == Tier::GpuPacked;
        let form = if stays_packed { Form::Packed } else { Form::Plain };
        // SAFETY: slots and residents were sized for the unit by the plan. The source slot stays this stage's until `done`; the
        // device's was handed back, and the waits above order the copies after its last use.
        unsafe { self.arrival.enqueue(unit, 0..unit.host_bytes, source, target, form)? };
        self.arrival.record(unit, form, arrived)?;
        // Some devices are done already.
        self.arrival.check()?;
        if let Some((timer, timing)) = self.timer.as_mut().zip(timing.flatten()) {
            timer.end(timing, self.arrival.stream(), Activity::Unit { unit: index, pass }, unit.disk_bytes)?;
        }
        if let Some(flight) = flight {
            self.device.record(&flight.done, self.arrival.stream())?;
            self.in_flight.push_back(flight);
        }
        Ok(())
    }

    /// Enqueues the unpacking of a unit that is kept packed on the device, into a slot there.
    fn unpack(&mut self, index: usize, slot: Slot) -> Result<()> {
        let [kept_arrived, _] = self.to.events(index, Place::Resident);
        let [arrived, compute_done] = self.to.events(index, Place::Slot(slot));
        let stream = self.arrival.converting();
        for event in [kept_arrived, compute_done, arrived] {
            self.device.wait(stream, event)?;
        }
        let [kept, target] =
            [Place::Resident, Place::Slot(slot)].map(|place| self.to.address(&self.plan, index, place));
        // SAFETY: both were sized for the unit by the plan; the waits above order the work after the arrival of the one, and after the
        // last use of the other, which was handed back.
        unsafe { self.arrival.unpack(&self.plan.units[index], kept, target)? };
        self.device.record(arrived, stream)?;
        self.arrival.check()
    }

    /// Takes slots on the device that came back, and releases the source slots that they stood for, as far as these are not used any
    /// more. Returns whether any was released.
    fn take_back(&mut self) -> Result<bool> {
        while let Some(slot) = self.outlet.slot() {
            self.back.push(slot);
        }
        let mut released = false;
        for &slot in &self.back {
            let [_, compute_done] = self.to.events(0, Place::Slot(slot));
            let stands_for = &mut self.stands_for[slot.0];
            if stands_for.is_some() && self.device.query(compute_done)? {
                stands_for.take().into_iter().for_each(|source| self.inlet.release(source));
                released = true;
            }
        }
        Ok(released)
    }

    /// Waits until the source slot that one of the slots stands for which came back is not used any more, if there is one.
    fn wait_for_use(&self) -> Result<bool> {
        let Some(&slot) = self.back.iter().find(|slot| self.stands_for[slot.0].is_some()) else { return Ok(false) };
        let [_, compute_done] = self.to.events(0, Place::Slot(slot));
        self.device.synchronize(compute_done)?;
        Ok(true)
    }

    /// Where a unit goes on the device: where it is kept there, or a free slot.
    fn target(&mut self, Entry { unit, place, .. }: Entry) -> Option<Place> {
        let (tier, state) = (self.plan.units[unit].tier, self.states.of(unit));
        if place == Place::Mapped {
            return Some(place);
        }
        let stays = match self.plan.units[unit].in_place {
            // It may be on its way to where it is kept by another read.
            true => place == Place::Resident || state == Residency::There,
            false => tier == Tier::Gpu && state != Residency::Absent,
        };
        if stays {
            return Some(Place::Resident);
        }
        let free = self.back.iter().position(|slot| self.stands_for[slot.0].is_none())?;
        Some(Place::Slot(self.back.swap_remove(free)))
    }

    fn hand_on(&mut self, entry: Entry, place: Place) -> Result<Advanced> {
        let unit = entry.unit;
        let mut moved = None;
        let unpacks = self.plan.units[unit].tier == Tier::GpuPacked && self.states.of(unit) != Residency::Absent;
        let to = if unpacks { Place::Resident } else { place };
        if to == Place::Mapped {
            // Nothing is to be done.
        } else if to == Place::Resident && self.states.of(unit) == Residency::There {
            if let Place::Slot(source) = entry.place {
                // Read once more, before it was known that it had arrived: after a rewind, or since the one before it was to pass.
                self.inlet.release(source);
            }
        } else if let (true, Place::Slot(source), Place::Slot(slot)) =
            (self.plan.units[unit].in_place, entry.place, place)
        {
            self.to.put_in_place(slot, self.from.last().0.slot(source.0).as_ptr());
            self.stands_for[slot.0] = Some(source);
        } else {
            let packed = self.packed.get(unit).filter(|_| entry.place == Place::Resident);
            let bytes = packed.map_or(self.plan.units[unit].disk_bytes, |packed| packed.layout.disk_bytes);
            let span = self.control.trace.begin(Stage::Transfer, Activity::Unit { unit, pass: entry.pass }, bytes);
            let enqueued = self.enqueue(unit, entry.pass, entry.place, to);
            match enqueued {
                Ok(()) => _ = self.control.trace.end(span),
                Err(_) => self.control.trace.give_up(span),
            }
            enqueued?;
            moved = Some(Carried { bytes: bytes as u64, ..Carried::default() });
            if to == Place::Resident {
                self.states.fill(unit);
            }
        }
        if let (true, Place::Slot(slot)) = (unpacks, place) {
            self.unpack(unit, slot)?;
        }
        Ok(Advanced::Ready { entry: Entry { place, ..entry }, ends_pass: unit + 1 == self.plan.units(), moved })
    }

    fn try_advance(&mut self, epoch: u64) -> Result<Advanced> {
        if let Some(timer) = &mut self.timer {
            timer.tell(&self.control.trace)?;
        }
        let retired = self.retire(false)? | self.take_back()?;
        self.arrival.check()?;
        let waiting = match self.inlet.peek(epoch) {
            Some(Message::Failed { unit, .. }) => {
                self.inlet.take();
                return Ok(Advanced::Failed { unit });
            }
            Some(Message::Unit(entry)) if self.outlet.room() > 0 => {
                if let Some(place) = self.target(entry) {
                    self.inlet.take();
                    return self.hand_on(entry, place);
                }
                Activity::Blocked
            }
            Some(_) => Activity::Blocked,
            None => Activity::Starved,
        };
        if !retired {
            match waiting {
                Activity::Blocked => self.outlet.flush_if_starving(),
                _ => self.inlet.nudge(),
            }
        }
        // Nothing to enqueue: only now may the thread block on a copy, whose source slot the stage before may need. From a resident it
        // is followed to know what the device does, and not where none is enqueued behind it: what comes next would be late.
        let is_blocking = |oldest: &&CopyInFlight<D>| !retired && (oldest.source.is_some() || self.in_flight.len() > 1);
        let Some(CopyInFlight { begun, .. }) = self.in_flight.front().filter(is_blocking) else {
            let moved = retired || self.wait_for_use()?;
            return Ok(if moved { Advanced::Moved } else { Advanced::Waiting(waiting) });
        };
        // Until the copy has begun it is compute that keeps it waiting.
        if !self.device.query(begun)? {
            let wait = self.control.trace.begin(Stage::Transfer, Activity::Blocked, 0);
            let begun = self.device.synchronize(begun);
            self.control.trace.end(wait);
            begun?;
            return Ok(Advanced::Moved);
        }
        self.retire(true)?;
        Ok(Advanced::Moved)
    }
}

impl<D: Device> Advance for TransferStage<D> {
    const STAGE: Stage = Stage::Transfer;

    fn begin(&mut self) -> Result<()> {
        self.device.bind_thread()
    }

    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)> {
        self.try_advance(epoch).map_err(|error| {
            // What the device holds is unknown now: slots that were under way are never handed on again.
            self.control.fail_for_good(error.clone());
            (0, error)
        })
    }

    fn wait(&mut self, signal: &Signal, ticket: u32) -> Result<(), (usize, Error)> {
        signal.wait(ticket);
        // It is the link that kept the stage waiting if that copies now.
        let copies = |flight: &CopyInFlight<D>| -> Result<bool> {
            Ok(self.device.query(&flight.begun)? && !self.device.query(&flight.done)?)
        };
        // An error is met by the next attempt too.
        if self.in_flight.front().is_some_and(|flight| copies(flight).unwrap_or(false)) {
            self.control.trace.waited_for_work(Stage::Transfer);
        }
        Ok(())
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }

    fn end(&mut self) -> Result<()> {
        // The streams, not the events: after an error there may be copies that no event marks.
        self.arrival.drain()?;
        self.timer.as_mut().map_or(Ok(()), |timer| timer.tell(&self.control.trace))
    }
}
