//! The read stage: keeps the engine full of chunks, across slots, and hands slots on in order.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    arena::Arena,
    error::Error,
    io::{self, Engine, Failure, Source},
    pipeline::{
        link::{Entry, Outlet, Slot},
        stage::{Advance, Control, Progress},
    },
    plan::{Plan, Step},
    sync::Signal,
    trace::{Activity, Stage},
};

/// A slot being filled.
struct Load {
    step: Step,
    slot: Slot,
    /// The extent and the position in it from which the next chunk is cut.
    next: (usize, usize),
    outstanding: usize,
    failure: Option<(usize, Failure)>,
}

pub(crate) struct ReadStage {
    /// First, so that it is dropped before the arena that it reads into.
    engine: Engine,
    plan: Arc<Plan>,
    program: Vec<Step>,
    sources: Arc<[Source]>,
    arena: Arc<Arena>,
    outlet: Outlet,
    control: Arc<Control>,
    signal: Arc<Signal>,
    cursor: usize,
    /// In program order; a chunk's tag is the number of its load, counted from the start.
    loads: VecDeque<Load>,
    first: usize,
}

impl ReadStage {
    pub(crate) fn new(
        plan: &Arc<Plan>,
        sources: &Arc<[Source]>,
        arena: &Arc<Arena>,
        outlet: Outlet,
        control: &Arc<Control>,
        signal: &Arc<Signal>,
        engine: Engine,
    ) -> Self {
        let stage = plan.ram.as_ref().or(plan.pinned.as_ref()).expect("a plan has a host stage");
        Self {
            program: stage.program.clone(),
            loads: VecDeque::with_capacity(stage.slots),
            engine,
            plan: plan.clone(),
            sources: sources.clone(),
            arena: arena.clone(),
            outlet,
            control: control.clone(),
            signal: signal.clone(),
            cursor: 0,
            first: 0,
        }
    }

    /// Takes finished reads off the engine; returns how many bytes they brought.
    fn reap(&mut self) -> usize {
        let mut bytes = 0;
        while let Some(done) = self.engine.completion() {
            let load = &mut self.loads[done.tag - self.first];
            load.outstanding -= 1;
            match done.result {
                Ok(count) => {
                    bytes += count;
                    self.control.trace.count_read(count, done.direct);
                }
                // The first in file order is the one to report.
                Err(failure)
                    if load.failure.is_none_or(|(file, kept)| (done.file, failure.offset) < (file, kept.offset)) =>
                {
                    load.failure = Some((done.file, failure));
                }
                Err(_) => {}
            }
        }
        bytes
    }

    /// Starts as many reads as the engine and the free slots allow; returns whether it started any.
    fn submit(&mut self) -> Result<bool, (usize, Error)> {
        let mut started = false;
        while self.engine.has_room() {
            let unfinished =
                self.loads.back().filter(|load| load.next.0 < self.plan.units[load.step.unit].extents.len());
            if unfinished.is_none() {
                let Some(slot) = self.outlet.slot() else { break };
                let step = self.program[self.cursor];
                self.cursor = (self.cursor + 1) % self.program.len();
                self.loads.push_back(Load { step, slot, next: (0, 0), outstanding: 0, failure: None });
            }
            let tag = self.first + self.loads.len() - 1;
            let load = self.loads.back_mut().expect("pushed above");
            let (extent, position) = load.next;
            let Some(extent) = self.plan.units[load.step.unit].extents.get(extent) else { continue };
            let slot = self.arena.slot(load.slot.0).as_ptr();
            // SAFETY: the slot was sized for the unit's extents by the plan, and `next` is kept inside its extent.
            let chunk = unsafe { io::chunk_at(&self.sources[extent.file], extent, position, slot, tag) };
            load.next = if position + chunk.len < extent.len {
                (load.next.0, position + chunk.len)
            } else {
                (load.next.0 + 1, 0)
            };
            load.outstanding += 1;
            // SAFETY: the slot is this stage's until it is published, which waits for `outstanding`.
            unsafe { self.engine.submit(chunk) };
            started = true;
        }
        self.engine.flush().map_err(|error| self.engine_failed(error))?;
        Ok(started)
    }

    /// The engine itself failed, not a read: nothing can be read any more.
    fn engine_failed(&self, error: std::io::Error) -> (usize, Error) {
        (self.program[self.cursor].unit, Error::io("read with io_uring from", &self.sources[0].path)(error))
    }
}

impl Advance for ReadStage {
    const STAGE: Stage = Stage::Read;

    fn advance(&mut self, epoch: u64) -> Result<Progress, (usize, Error)> {
        let bytes = self.reap();
        let started = self.submit()?;
        if let Some(load) = self.loads.front()
            && load.outstanding == 0
            && load.next.0 >= self.plan.units[load.step.unit].extents.len()
        {
            let (step, unit) = (load.step, &self.plan.units[load.step.unit]);
            if let Some((file, failure)) = load.failure {
                let error = Error::Read {
                    unit: unit.name.clone(),
                    tensor: unit.tensor_at(file, failure.offset).to_owned(),
                    path: self.sources[file].path.clone(),
                    offset: failure.offset,
                    source: failure.source(),
                };
                return Err((step.unit, error));
            }
            self.outlet.publish(Entry { epoch, unit: step.unit, slot: Some(load.slot) }, step.ends_pass);
            self.loads.pop_front();
            self.first += 1;
            return Ok(Progress::Handed { unit: step.unit, bytes });
        }
        Ok(if bytes > 0 || started {
            Progress::Moved { bytes }
        } else if self.engine.in_flight() > 0 {
            Progress::Waiting(Activity::Busy)
        } else {
            self.outlet.flush_if_starving();
            Progress::Waiting(Activity::Blocked)
        })
    }

    fn wait(&mut self, signal: &Signal, ticket: u32) -> Result<(), (usize, Error)> {
        self.engine.wait(signal, ticket).map_err(|error| self.engine_failed(error))
    }

    fn rewind(&mut self) {
        while self.engine.in_flight() > 0 {
            let ticket = self.signal.ticket();
            self.reap();
            if self.engine.in_flight() > 0 && self.engine.wait(&self.signal, ticket).is_err() {
                // Said again, and kept as the epoch's error, by the next read.
                break;
            }
        }
        self.first += self.loads.len();
        for load in self.loads.drain(..) {
            self.outlet.put_back(load.slot);
        }
        self.cursor = 0;
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }
}
