//! The transfer stage: enqueues each unit's copies and arrival transforms on the device, and hands the unit on before they
//! are done; events keep the order.
//!
//! For a unit that goes from source slot `s` to device slot `d`, it enqueues
//!
//! ```text
//! copy stream       wait(compute_done[d], arrived[d]) → copies → record(transfer_done[s])
//! transform stream  for each piece: wait(staged) → transform → record(consumed)        only if tensors change on arrival
//! either            record(arrived[d])
//! ```
//!
//! **Invariant**: a source slot is released upstream only after its `transfer_done` was seen complete; a device slot comes
//! back from the compute side only after its `compute_done` was recorded.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    arena::Arena,
    device::{Device, DevicePtr, drain},
    error::{Error, Result},
    pipeline::{
        link::{Entry, Inlet, Outlet, Slot},
        stage::{Advance, Control, Progress, Safeguard},
    },
    plan::{Plan, Step, UnitPlan},
    trace::{Activity, Stage},
};

/// Device slots and the events that guard them; shared with the compute side.
pub(crate) struct DeviceSlots<D: Device> {
    pub(crate) memory: D::Memory,
    pub(crate) slot_bytes: usize,
    /// The unit in this slot is on the device and as the layer function expects it.
    pub(crate) arrived: Vec<D::Event>,
    /// The layer function is done with this slot.
    pub(crate) compute_done: Vec<D::Event>,
}

impl<D: Device> DeviceSlots<D> {
    pub(crate) fn new(device: &D, plan: &Plan) -> Result<Self> {
        let stage = &plan.gpu;
        let events = || (0..stage.slots).map(|_| device.event()).collect::<Result<Vec<_>>>();
        Ok(Self {
            memory: device.allocate("GPU slots", stage.bytes())?,
            slot_bytes: stage.slot_bytes,
            arrived: events()?,
            compute_done: events()?,
        })
    }

    pub(crate) fn address(&self, device: &D, slot: Slot) -> DevicePtr {
        device.address(&self.memory).offset(slot.0 * self.slot_bytes)
    }
}

/// Two blocks through which stored bytes pass on their way to a transform, on a stream of their own, so that the copies of
/// the next piece need not wait for it.
struct Staging<D: Device> {
    memory: D::Memory,
    block_bytes: usize,
    stream: D::Stream,
    staged: [D::Event; 2],
    consumed: [D::Event; 2],
    turn: usize,
}

pub(crate) struct TransferStage<D: Device> {
    device: D,
    plan: Arc<Plan>,
    program: Vec<Step>,
    control: Arc<Control>,
    from: Arc<Arena>,
    to: Arc<DeviceSlots<D>>,
    inlet: Inlet,
    outlet: Outlet,
    stream: D::Stream,
    staging: Option<Staging<D>>,
    transfer_done: Vec<D::Event>,
    /// Source slots whose copies may still be running, oldest first.
    in_flight: VecDeque<Slot>,
    cursor: usize,
}

impl<D: Device> TransferStage<D> {
    pub(crate) fn new(
        device: &D,
        plan: &Arc<Plan>,
        control: &Arc<Control>,
        from: &Arc<Arena>,
        to: &Arc<DeviceSlots<D>>,
        inlet: Inlet,
        outlet: Outlet,
    ) -> Result<Self> {
        let sources = plan.pinned.as_ref().or(plan.ram.as_ref()).expect("a plan has a host stage").slots;
        let staging = if plan.staging_bytes == 0 {
            None
        } else {
            Some(Staging {
                memory: device.allocate("staging blocks", 2 * plan.staging_bytes)?,
                block_bytes: plan.staging_bytes,
                stream: device.stream()?,
                staged: [device.event()?, device.event()?],
                consumed: [device.event()?, device.event()?],
                turn: 0,
            })
        };
        Ok(Self {
            program: plan.gpu.program.clone(),
            plan: plan.clone(),
            control: control.clone(),
            from: from.clone(),
            to: to.clone(),
            inlet,
            outlet,
            stream: device.stream()?,
            staging,
            transfer_done: (0..sources).map(|_| device.event()).collect::<Result<_>>()?,
            in_flight: VecDeque::with_capacity(sources),
            cursor: 0,
            device: device.clone(),
        })
    }

    /// Releases source slots whose copies are done; with `block` waits for the oldest. Returns whether it released any.
    fn retire(&mut self, mut block: bool) -> Result<bool> {
        let mut released = false;
        while let Some(&slot) = self.in_flight.front() {
            let done = &self.transfer_done[slot.0];
            if self.control.keeps(Safeguard::WaitTransferDone) && !self.device.query(done)? {
                if !block {
                    break;
                }
                self.device.synchronize(done)?;
            }
            self.in_flight.pop_front();
            self.inlet.release(slot);
            (block, released) = (false, true);
        }
        Ok(released)
    }

    fn enqueue(&mut self, unit: &UnitPlan, from: Slot, to: Slot) -> Result<()> {
        let (source, target) = (self.from.slot(from.0).as_ptr(), self.to.address(&self.device, to));
        if self.control.keeps(Safeguard::WaitComputeDone) {
            self.device.wait(&self.stream, &self.to.compute_done[to.0])?;
        }
        // A unit that was handed back unused never saw compute: its transforms may still be writing this slot.
        self.device.wait(&self.stream, &self.to.arrived[to.0])?;
        for copy in &unit.copies {
            // SAFETY: the ranges lie inside both slots by the plan. The source slot stays this stage's until transfer_done;
            // the device slot was handed back, and the wait above orders the copy after its last use.
            unsafe {
                let from = source.add(copy.from);
                self.device.copy_to_device(target.offset(copy.to), from, copy.bytes, &self.stream)?;
            }
        }
        let arrived = &self.to.arrived[to.0];
        match &mut self.staging {
            Some(staging) if !unit.transforms.is_empty() => {
                self.device.wait(&staging.stream, &self.to.compute_done[to.0])?;
                for transform in &unit.transforms {
                    let (from_size, to_size) = (transform.from_type.size(), transform.to_type.size());
                    let piece = staging.block_bytes / from_size;
                    for start in (0..transform.elements).step_by(piece) {
                        let elements = piece.min(transform.elements - start);
                        let turn = staging.turn;
                        staging.turn = 1 - turn;
                        let block = self.device.address(&staging.memory).offset(turn * staging.block_bytes);
                        let result = target.offset(transform.to + start * to_size);
                        self.device.wait(&self.stream, &staging.consumed[turn])?;
                        // SAFETY: as above; the waits on `consumed` and `staged` order the two uses of the block.
                        unsafe {
                            let from = source.add(transform.from + start * from_size);
                            self.device.copy_to_device(block, from, elements * from_size, &self.stream)?;
                            self.device.record(&staging.staged[turn], &self.stream)?;
                            self.device.wait(&staging.stream, &staging.staged[turn])?;
                            let (to, from) = ((result, transform.to_type), (block, transform.from_type));
                            self.device.transform(to, from, elements, &staging.stream)?;
                        }
                        self.device.record(&staging.consumed[turn], &staging.stream)?;
                    }
                }
                self.device.record(&self.transfer_done[from.0], &self.stream)?;
                self.device.wait(&staging.stream, &self.transfer_done[from.0])?;
                self.device.record(arrived, &staging.stream)
            }
            _ => {
                self.device.record(&self.transfer_done[from.0], &self.stream)?;
                self.device.record(arrived, &self.stream)
            }
        }
    }

    fn try_advance(&mut self, epoch: u64) -> Result<Progress> {
        let retired = self.retire(false)?;
        let waiting = match self.inlet.peek(epoch) {
            Some(Entry { slot: None, unit, .. }) => {
                self.inlet.take();
                return Ok(Progress::Failed { unit });
            }
            Some(entry @ Entry { slot: Some(source), .. }) => {
                if let Some(slot) = self.outlet.slot() {
                    let step = self.program[self.cursor];
                    debug_assert_eq!(step.unit, entry.unit, "stages walk the same program");
                    self.cursor = (self.cursor + 1) % self.program.len();
                    self.inlet.take();
                    let plan = self.plan.clone();
                    let unit = &plan.units[step.unit];
                    self.enqueue(unit, source, slot)?;
                    self.in_flight.push_back(source);
                    self.outlet.publish(Entry { slot: Some(slot), ..entry }, step.ends_pass);
                    return Ok(Progress::Handed { unit: step.unit, bytes: unit.disk_bytes });
                }
                Activity::Blocked
            }
            None => Activity::Starved,
        };
        // Nothing to enqueue: only now may the thread block on a copy, whose source slot the stage before may need.
        if retired || self.retire(true)? {
            return Ok(Progress::Moved { bytes: 0 });
        }
        match waiting {
            Activity::Blocked => self.outlet.flush_if_starving(),
            _ => self.inlet.nudge(),
        }
        Ok(Progress::Waiting(waiting))
    }
}

impl<D: Device> Advance for TransferStage<D> {
    const STAGE: Stage = Stage::Transfer;

    fn begin(&mut self) -> Result<()> {
        self.device.bind_thread()
    }

    fn advance(&mut self, epoch: u64) -> Result<Progress, (usize, Error)> {
        self.try_advance(epoch).map_err(|error| {
            // What the device holds is unknown now: slots that were under way are never handed on again.
            self.control.fail_for_good(error.clone());
            (self.program[self.cursor].unit, error)
        })
    }

    fn rewind(&mut self) {
        self.cursor = 0;
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }

    fn end(&mut self) -> Result<()> {
        // The streams, not the events: after an error there may be copies that no event marks.
        drain(&self.device, &self.stream)?;
        self.staging.as_ref().map_or(Ok(()), |staging| drain(&self.device, &staging.stream))
    }
}
