//! The read stage: keeps the engine full of chunks, across slots, and hands units on in order.
//!
//! A unit that is kept in RAM is read once, straight to where it is kept; one that is kept on the device is read once, through a slot.
//! From then on the stage hands on an entry that keeps its place in the order, and the disk is not touched. Where memory is
//! faulted in more slowly than the disk reads, the first pass need not wait for that: units whose memory is not there yet pass
//! through slots that can take them as if they stayed on disk, and are read once more in the second.
//!
//! A unit that is kept and used in place is not read as long as the page cache has all of it: it is used from there.

use std::{
    collections::VecDeque,
    io as std_io,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    device::Device,
    error::{Error, Result},
    io::{self, Engine, ReadFailure, Source},
    layout::UnitLayout,
    pipeline::{
        host::HostMemory,
        link::{Entry, Outlet, Place},
        on_device::DeviceMemory,
        residency::{Residencies, Residency},
        stage::{Advance, Advanced, Control},
    },
    plan::{Plan, Tier},
    sync::Signal,
    trace::{Activity, Carried, Mark, Open, Stage},
};

/// A unit on its way from disk.
struct Load {
    unit: usize,
    /// The slot it is read into, or where it lies without one.
    place: Place,
    to: *mut u8,
    /// The extent and the position in it from which the next chunk is cut.
    next: (usize, usize),
    outstanding: usize,
    failure: Option<(usize, ReadFailure)>,
    pass: u64,
    /// From the first read to the last; none where nothing is read.
    span: Option<Open>,
    moved: Carried,
}

// SAFETY: `to` points into memory that the stage keeps alive, and is its own while it reads.
unsafe impl Send for Load {}

pub(crate) struct ReadStage<D: Device> {
    /// First, so that it is dropped before the memory that it reads into.
    engine: Engine,
    plan: Arc<Plan>,
    sources: Arc<[Source]>,
    memory: Arc<HostMemory>,
    on_device: Arc<DeviceMemory<D>>,
    states: Arc<Residencies>,
    outlet: Outlet,
    control: Arc<Control>,
    signal: Arc<Signal>,
    cursor: usize,
    /// Trips through the units that were begun before, rewinds included.
    pass: u64,
    /// Not every unit's first read has begun yet.
    first_pass: bool,
    /// In order; a chunk's tag is the number of its load, counted from the start.
    loads: VecDeque<Load>,
    first: usize,
    /// By file: something was read from it in this pass.
    unchecked: Vec<bool>,
    /// By load, as many as there can be at once, and file: reads that are under way.
    under_way: Vec<usize>,
    /// Why nothing can be read any more, and what the loads have stays theirs.
    broken: Option<Error>,
    /// When a read last ended or the disk had nothing to do, and whether it was told that none has since.
    last: Instant,
    told: bool,
}

/// Reads of which none ends for so long are told of.
pub(super) const SLOW: Duration = Duration::from_secs(10);

impl<D: Device> ReadStage<D> {
    #[allow(clippy::too_many_arguments, reason = "a stage is put together once")]
    pub(crate) fn new(
        plan: &Arc<Plan>,
        sources: &Arc<[Source]>,
        memory: &Arc<HostMemory>,
        on_device: &Arc<DeviceMemory<D>>,
        states: &Arc<Residencies>,
        outlet: Outlet,
        control: &Arc<Control>,
        signal: &Arc<Signal>,
        engine: Engine,
    ) -> Self {
        let slots = memory.first().1.slots;
        Self {
            engine,
            loads: VecDeque::with_capacity(slots + plan.tallies.kept()),
            plan: plan.clone(),
            sources: sources.clone(),
            memory: memory.clone(),
            on_device: on_device.clone(),
            states: states.clone(),
            outlet,
            control: control.clone(),
            signal: signal.clone(),
            cursor: 0,
            pass: 0,
            first_pass: true,
            first: 0,
            unchecked: vec![false; sources.len()],
            under_way: vec![0; (slots + plan.tallies.kept()) * sources.len()],
            broken: None,
            last: Instant::now(),
            told: false,
        }
    }

    /// Takes finished reads off the engine; returns whether there were any.
    fn reap(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.engine.completion() {
            let place = self.place(done.tag, done.file);
            self.under_way[place] -= 1;
            let load = &mut self.loads[done.tag - self.first];
            load.outstanding -= 1;
            any = true;
            (self.last, self.told) = (Instant::now(), false);
            match done.result {
                Ok(count) => {
                    load.moved.count_read(count, done.direct);
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
            if load.outstanding == 0 && is_submitted(&self.plan, load) {
                close(&self.control, load);
            }
        }
        any
    }

    /// Before the last unit of a pass is handed on, none of the files that were read for it may have become another; nor one of
    /// those of a unit that is kept from now on.
    fn check_files(&mut self, index: usize, was_read: bool) -> Result<()> {
        let unit = &self.plan.units[index];
        if was_read {
            unit.extents.iter().for_each(|extent| self.unchecked[extent.file] = true);
        }
        let is_last = index + 1 == self.plan.units();
        let of_unit = |file: usize| unit.tier != Tier::Disk && unit.extents.iter().any(|extent| extent.file == file);
        for (file, source) in self.sources.iter().enumerate() {
            if self.unchecked[file] && (is_last || of_unit(file)) {
                source.check_unchanged()?;
                self.unchecked[file] &= !is_last;
            }
        }
        Ok(())
    }

    /// Whether the unit goes where it is kept and stays there.
    fn stays(&self, unit: &UnitLayout) -> bool {
        match unit.tier {
            // Packed ones are put there by another thread.
            Tier::Disk | Tier::PinnedPacked => false,
            // Asked in any case, since that is what has memory become present.
            Tier::Ram | Tier::Pinned => !(self.memory.is_late(unit) && self.first_pass),
            Tier::Gpu | Tier::GpuPacked => {
                !(self.on_device.is_late(unit, self.memory.first().1.slot_bytes) && self.first_pass)
            }
        }
    }

    /// Whether the unit can be used from the page cache now.
    fn is_in_page_cache(&self, index: usize) -> bool {
        let mapped = self.on_device.mapped(index);
        mapped.is_some_and(|mapped| mapped.is_present(&self.sources, &self.plan.units[index]))
    }

    /// Begins the unit's span, if anything of it is read.
    fn open(&self, unit: usize, from: usize) -> Option<Open> {
        let plan = &self.plan.units[unit];
        let reads = from < plan.extents.len();
        let activity = Activity::Unit { unit, pass: self.pass };
        reads.then(|| self.control.trace.begin(Stage::Read, activity, plan.read_bytes))
    }

    /// Begins with the next unit, if there is a slot for it and room to hand it on.
    fn begin_load(&mut self) -> bool {
        if self.loads.len() == self.loads.capacity() || self.outlet.room() <= self.loads.len() {
            return false;
        }
        let index = self.cursor;
        let unit = &self.plan.units[index];
        let is_read = self.states.of(index) != Residency::Absent;
        let is_mapped = !is_read && self.is_in_page_cache(index);
        let stays = is_read || !is_mapped && self.stays(unit);
        let (nothing, all) = (std::ptr::null_mut(), (unit.extents.len(), 0));
        let (place, to, next) = match unit.tier {
            _ if is_read => (Place::Resident, nothing, all),
            _ if is_mapped => (Place::Mapped, nothing, all),
            Tier::Ram | Tier::Pinned if stays => (Place::Resident, self.memory.resident(unit).as_ptr(), (0, 0)),
            _ if stays && unit.in_place => {
                let home = self.on_device.address(&self.plan, index, Place::Resident);
                (Place::Resident, home.as_ptr(), (0, 0))
            }
            _ => {
                let Some(slot) = self.outlet.slot() else { return false };
                (Place::Slot(slot), self.memory.first().0.slot(slot.0).as_ptr(), (0, 0))
            }
        };
        if stays {
            self.states.begin(index);
        }
        if !matches!(unit.tier, Tier::Disk | Tier::PinnedPacked) && !stays && !is_mapped {
            self.control.trace.mark(&Mark::Late { unit: index });
        }
        let mapped = if is_mapped { unit.disk_bytes as u64 } else { 0 };
        let (pass, span, moved) = (self.pass, self.open(index, next.0), Carried { mapped, ..Carried::default() });
        self.loads.push_back(Load { unit: index, place, to, next, outstanding: 0, failure: None, pass, span, moved });
        self.cursor = (index + 1) % self.plan.units();
        if self.cursor == 0 {
            self.pass += 1;
            self.control.trace.trip_looked();
        }
        self.first_pass &= self.cursor > 0;
        true
    }

    /// Starts as many reads as the engine and the free slots allow; returns whether it did anything.
    fn submit(&mut self) -> Result<bool, (usize, Error)> {
        let mut moved = false;
        while self.engine.has_room() {
            if self.loads.back().is_none_or(|load| is_submitted(&self.plan, load)) {
                if !self.begin_load() {
                    break;
                }
                moved = true;
            }
            let tag = self.first + self.loads.len() - 1;
            let load = self.loads.back_mut().expect("begun above");
            let (extent, position) = load.next;
            let Some(extent) = self.plan.units[load.unit].extents.get(extent) else { continue };
            // SAFETY: slot and resident were sized for the unit's extents by the plan, and `next` is kept inside its extent.
            let chunk = unsafe { io::chunk_at(&self.sources[extent.file], extent, position, load.to, tag) };
            let after = position + chunk.len;
            load.next = if after < extent.len { (load.next.0, after) } else { (load.next.0 + 1, 0) };
            load.outstanding += 1;
            let reads = self.place(tag, extent.file);
            self.under_way[reads] += 1;
            // SAFETY: the memory is this stage's until the unit is published, which waits for `outstanding`.
            unsafe { self.engine.submit(chunk) };
            moved = true;
        }
        self.engine.flush().map_err(|error| self.engine_failed(error))?;
        Ok(moved)
    }

    /// The engine itself failed, not a read: nothing can be read any more, and what is under way may end or not.
    fn engine_failed(&mut self, error: std_io::Error) -> (usize, Error) {
        let error = Error::io("read with io_uring from", &self.sources[0].path)(error);
        self.control.fail_for_good(error.clone());
        self.broken = Some(error.clone());
        (self.cursor, error)
    }

    /// Where reads of this file for the load of this number are counted.
    fn place(&self, load: usize, file: usize) -> usize {
        let files = self.sources.len();
        load % (self.under_way.len() / files) * files + file
    }

    /// Tells, once, of a disk that does not answer.
    fn tell_of_silence(&mut self) {
        if self.told || self.last.elapsed() < SLOW {
            return;
        }
        // The file of the oldest read: others may only wait for their turn behind that. Units are read in order, and their files.
        let loads = self.first..self.first + self.loads.len();
        let mut all = loads.flat_map(|load| (0..self.sources.len()).map(move |file| (load, file)));
        if let Some((_, file)) = all.find(|(load, file)| self.under_way[self.place(*load, *file)] > 0) {
            self.told = true;
            let (file, since) = (self.sources[file].path.clone(), self.last.elapsed());
            self.control.trace.mark(&Mark::Silent { file, since });
        }
    }
}

impl<D: Device> Advance for ReadStage<D> {
    const STAGE: Stage = Stage::Read;

    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)> {
        if let Some(error) = &self.broken {
            return Err((self.cursor, error.clone()));
        }
        if self.engine.in_flight() == 0 {
            (self.last, self.told) = (Instant::now(), false);
        }
        let reaped = self.reap();
        let moved = self.submit()?;
        if let Some(load) = self.loads.front()
            && load.outstanding == 0
            && is_submitted(&self.plan, load)
        {
            let (index, unit) = (load.unit, &self.plan.units[load.unit]);
            if let Some((file, failure)) = load.failure {
                let error = failure.of(&unit.name, unit.tensor_at(file, failure.offset), &self.sources[file]);
                return Err((index, error));
            }
            let (place, pass) = (load.place, load.pass);
            let in_ram = place == Place::Resident && (unit.in_place || !unit.tier.is_on_device());
            let moved = Some(load.moved).filter(|moved| moved.bytes > 0 || moved.mapped > 0);
            if let Err(error) = self.check_files(index, load.moved.bytes > 0) {
                self.states.give_up(index);
                return Err((index, error));
            }
            if in_ram {
                self.states.fill(index);
            }
            let entry = Entry { epoch, unit: index, pass, place };
            self.loads.pop_front();
            self.first += 1;
            return Ok(Advanced::Ready { entry, ends_pass: index + 1 == self.plan.units(), moved });
        }
        Ok(if reaped || moved {
            Advanced::Moved
        } else if self.engine.in_flight() > 0 {
            Advanced::Working
        } else {
            self.outlet.flush_if_starving();
            Advanced::Waiting(Activity::Blocked)
        })
    }

    fn wait(&mut self, signal: &Signal, ticket: u32) -> Result<(), (usize, Error)> {
        let waited = self.engine.wait(signal, ticket);
        self.tell_of_silence();
        waited.map_err(|error| self.engine_failed(error))
    }

    /// Where a read does not end, its slot is not put back: the streamer is at its end then, or beyond use.
    fn rewind(&mut self) {
        while self.engine.in_flight() > 0 {
            let ticket = self.signal.ticket();
            self.reap();
            if self.engine.in_flight() > 0 {
                let signal = self.signal.clone();
                if self.broken.is_some() || self.control.stopped() || self.wait(&signal, ticket).is_err() {
                    return;
                }
            }
        }
        self.first += self.loads.len();
        while let Some(mut load) = self.loads.pop_front() {
            if let Some(span) = load.span.take() {
                self.control.trace.give_up(span);
            }
            let is_complete = is_submitted(&self.plan, &load) && load.outstanding == 0 && load.failure.is_none();
            let slot = if let Place::Slot(slot) = load.place { Some(slot) } else { None };
            if slot.is_none() && is_complete {
                // It need not be read again, but its files are yet to be checked.
                let read = self.plan.units[load.unit].extents.iter().filter(|_| load.moved.bytes > 0);
                read.for_each(|extent| self.unchecked[extent.file] = true);
            } else {
                self.states.give_up(load.unit);
            }
            if let Some(slot) = slot {
                self.outlet.put_back(slot);
            }
        }
        for (unit, plan) in self.plan.units.iter().enumerate() {
            // What has not reached the device is read once more.
            if plan.tier.is_on_device() {
                self.states.give_up(unit);
            }
        }
        self.pass += u64::from(self.cursor > 0);
        self.cursor = 0;
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }

    fn end(&mut self) -> Result<()> {
        for span in self.loads.iter_mut().filter_map(|load| load.span.take()) {
            self.control.trace.give_up(span);
        }
        // Memory that a read may still write to is nobody else's, for good.
        if self.engine.quiesce() { Ok(()) } else { Err(Error::Leaked { bytes: self.memory.bytes() }) }
    }
}

fn is_submitted(plan: &Plan, load: &Load) -> bool {
    load.next.0 >= plan.units[load.unit].extents.len()
}

/// Ends the span of a load whose reads have all ended.
fn close(control: &Control, load: &mut Load) {
    if let Some(span) = load.span.take() {
        match load.failure {
            None => _ = control.trace.end(span),
            Some(_) => control.trace.give_up(span),
        }
    }
}
