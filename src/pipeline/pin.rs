//! The pin stage: copies a unit from pageable RAM, slot or resident, into a pinned slot, which leaves a RAM slot free for the disk
//! again. Units that are kept in pinned RAM or on the device skip this stage.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    pipeline::{
        copiers::Copiers,
        host::HostMemory,
        link::{Entry, Inlet, Message, Outlet, Place},
        stage::{Advance, Advanced, Control},
    },
    plan::{Plan, Tier},
    trace::{Activity, Carried, Stage},
};

pub(crate) struct PinStage {
    plan: Arc<Plan>,
    control: Arc<Control>,
    memory: Arc<HostMemory>,
    inlet: Inlet,
    outlet: Outlet,
    copiers: Copiers,
    /// Copies since the stage last had to wait.
    streak: usize,
}

impl PinStage {
    pub(crate) fn new(
        plan: &Arc<Plan>,
        control: &Arc<Control>,
        memory: &Arc<HostMemory>,
        inlet: Inlet,
        outlet: Outlet,
    ) -> Result<Self> {
        let (plan, control, memory) = (plan.clone(), control.clone(), memory.clone());
        Ok(Self { plan, control, memory, inlet, outlet, copiers: Copiers::new()?, streak: 0 })
    }
}

impl Advance for PinStage {
    const STAGE: Stage = Stage::Pin;

    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)> {
        let streak = std::mem::take(&mut self.streak);
        let entry = match self.inlet.peek(epoch) {
            Some(Message::Unit(entry)) => entry,
            Some(Message::Failed { unit, .. }) => {
                self.inlet.take();
                return Ok(Advanced::Failed { unit });
            }
            None => {
                self.inlet.nudge();
                return Ok(Advanced::Waiting(Activity::Starved));
            }
        };
        let unit = &self.plan.units[entry.unit];
        let ends_pass = entry.unit + 1 == self.plan.units();
        let blocked = |outlet: &mut Outlet| {
            outlet.flush_if_starving();
            Ok(Advanced::Waiting(Activity::Blocked))
        };
        if self.outlet.room() == 0 {
            return blocked(&mut self.outlet);
        }
        let from = match entry.place {
            Place::Slot(slot) => self.memory.first().0.slot(slot.0),
            Place::Resident if unit.tier == Tier::Ram => self.memory.resident(unit),
            Place::Resident | Place::Mapped => {
                self.streak = streak;
                self.inlet.take();
                return Ok(Advanced::Ready { entry, ends_pass, moved: None });
            }
        };
        let Some(slot) = self.outlet.slot() else { return blocked(&mut self.outlet) };
        self.inlet.take();
        let to = self.memory.last().0.slot(slot.0);
        // Twice round the ring without a wait: were the next stage the slower one, its slots would have run out.
        let slower = streak >= 2 * self.memory.last().1.slots;
        if slower {
            self.copiers.grow();
        }
        let copy = Activity::Unit { unit: entry.unit, pass: entry.pass };
        let span = self.control.trace.begin(Stage::Pin, copy, unit.host_bytes);
        // SAFETY: both slots are this stage's by the link's invariant, a resident is not written any more, and all were sized for
        // the unit by the plan.
        unsafe { self.copiers.copy(from.as_ptr(), to.as_ptr(), unit.host_bytes) };
        self.control.trace.end(span);
        self.streak = if slower { 0 } else { streak + 1 };
        if let Place::Slot(source) = entry.place {
            self.inlet.release(source);
        }
        let entry = Entry { place: Place::Slot(slot), ..entry };
        let moved = Carried { bytes: unit.host_bytes as u64, ..Carried::default() };
        Ok(Advanced::Ready { entry, ends_pass, moved: Some(moved) })
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }
}
