//! The pin stage: copies a unit from pageable RAM into a pinned slot, which leaves the RAM slot free for the disk again.

use std::{ptr, sync::Arc};

use crate::{
    arena::Arena,
    error::Error,
    pipeline::{
        link::{Entry, Inlet, Outlet},
        stage::{Advance, Progress},
    },
    plan::{Plan, Step},
    trace::{Activity, Stage},
};

pub(crate) struct PinStage {
    plan: Arc<Plan>,
    program: Vec<Step>,
    from: Arc<Arena>,
    to: Arc<Arena>,
    inlet: Inlet,
    outlet: Outlet,
    cursor: usize,
}

impl PinStage {
    pub(crate) fn new(plan: &Arc<Plan>, from: &Arc<Arena>, to: &Arc<Arena>, inlet: Inlet, outlet: Outlet) -> Self {
        let program = plan.pinned.as_ref().expect("the stage is planned").program.clone();
        Self { plan: plan.clone(), program, from: from.clone(), to: to.clone(), inlet, outlet, cursor: 0 }
    }
}

impl Advance for PinStage {
    const STAGE: Stage = Stage::Pin;

    fn advance(&mut self, epoch: u64) -> Result<Progress, (usize, Error)> {
        let Some(entry) = self.inlet.peek(epoch) else {
            self.inlet.nudge();
            return Ok(Progress::Waiting(Activity::Starved));
        };
        let Some(source) = entry.slot else {
            self.inlet.take();
            return Ok(Progress::Failed { unit: entry.unit });
        };
        let Some(slot) = self.outlet.slot() else {
            self.outlet.flush_if_starving();
            return Ok(Progress::Waiting(Activity::Blocked));
        };
        let step = self.program[self.cursor];
        debug_assert_eq!(step.unit, entry.unit, "stages walk the same program");
        self.cursor = (self.cursor + 1) % self.program.len();
        self.inlet.take();
        let bytes = self.plan.units[step.unit].host_bytes;
        // SAFETY: both slots are this stage's by the link's invariant, and sized for the unit by the plan.
        unsafe { ptr::copy_nonoverlapping(self.from.slot(source.0).as_ptr(), self.to.slot(slot.0).as_ptr(), bytes) };
        self.inlet.release(source);
        self.outlet.publish(Entry { slot: Some(slot), ..entry }, step.ends_pass);
        Ok(Progress::Handed { unit: step.unit, bytes })
    }

    fn rewind(&mut self) {
        self.cursor = 0;
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }
}
