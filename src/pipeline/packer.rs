//! Packs units that are stored plain and kept packed in pinned RAM: once, in threads of their own that take what processor time the
//! others leave, while the first passes go by. Until a unit is packed it passes through slots, as one on disk does.

use std::{
    ops::Range,
    ptr::{self, NonNull},
    slice,
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Relaxed},
        },
        mpsc,
    },
    thread,
    time::Duration,
};

use crate::{
    arena::Arena,
    checkpoint::TensorEntry,
    error::{Error, Result},
    io::{BlockReader, CHUNK, ReadBlock, Source},
    layout::{Extent, Placed, REPACK_ALIGN, Repacked, UnitLayout, pages},
    packed::{self, Description, Encoder, PART, Table},
    pipeline::{host::HostMemory, residency::Residencies, stage::Control},
    plan::{Plan, Reader, Tier},
    sync,
    trace::PackedInRam,
};

/// A unit that was packed: where it lies, and what becomes of its bytes on their way to the device.
pub(super) struct PackedUnit {
    pub(super) start: NonNull<u8>,
    pub(super) layout: UnitLayout,
}

// SAFETY: an address in memory that the streamer keeps, and that nobody writes any more.
unsafe impl Send for PackedUnit {}
// SAFETY: a shared reference only hands the address out.
unsafe impl Sync for PackedUnit {}

/// The units of a stream, as far as they are packed. **Invariant**: one whose residency is `There` is.
pub(super) struct PackedUnits {
    units: Vec<OnceLock<PackedUnit>>,
    planned: usize,
    to_pack: AtomicUsize,
    given_up: AtomicUsize,
    control: Arc<Control>,
}

/// How many passes fill what is kept; `None` where the last unit that is packed says so.
pub(super) fn passes_that_fill(plan: &Plan) -> Option<usize> {
    // Units that are late in the first pass are read once more in the second.
    let passes = if plan.tallies.kept() > 0 { 2 } else { 1 };
    (plan.count(Tier::PinnedPacked) == 0).then_some(passes)
}

impl PackedUnits {
    pub(super) fn new(plan: &Plan, control: &Arc<Control>) -> Self {
        let units = plan.units.iter().map(|_| OnceLock::new()).collect();
        let planned = plan.count(Tier::PinnedPacked);
        Self { units, planned, to_pack: planned.into(), given_up: 0.into(), control: control.clone() }
    }

    /// So many more are packed, or given up. The last ones end what fills the tiers.
    fn settle(&self, units: usize) {
        if units > 0 && self.to_pack.fetch_sub(units, AcqRel) == units {
            self.control.trace.filled();
        }
    }

    fn give_up(&self, units: usize) {
        self.given_up.fetch_add(units, Relaxed);
        self.settle(units);
    }

    /// How far they are.
    pub(super) fn progress(&self) -> PackedInRam {
        let given_up = self.given_up.load(Relaxed);
        let packed = self.units.iter().filter(|unit| unit.get().is_some()).count();
        PackedInRam { units: self.planned, packed, given_up }
    }

    /// A unit, once it is packed.
    pub(super) fn get(&self, unit: usize) -> Option<&PackedUnit> {
        self.units[unit].get()
    }
}

/// The threads.
pub(super) struct Packer {
    stop: Arc<AtomicBool>,
    threads: Vec<PackerThread>,
}

struct PackerThread {
    /// What it says last: whether its reads have ended.
    ended: mpsc::Receiver<bool>,
    thread: thread::JoinHandle<()>,
}

/// A quarter of the processors, and no more than a disk needs to be outrun.
fn thread_count() -> usize {
    (thread::available_parallelism().map_or(1, usize::from) / 4).clamp(1, 4)
}

/// A thread that is to end ends within this, unless its file does not answer: it gets little time from the processor.
const END: Duration = Duration::from_secs(10);

impl Packer {
    /// Starts them, if there is anything to pack: each has its share of the units, and room for as much as these are expected to take.
    pub(super) fn start(
        plan: &Arc<Plan>,
        sources: &Arc<[Source]>,
        host: &Arc<HostMemory>,
        states: &Arc<Residencies>,
        units: &Arc<PackedUnits>,
        reader: Reader,
    ) -> Result<Option<Self>> {
        let packing = plan.units.iter().enumerate().filter(|(_, unit)| unit.tier == Tier::PinnedPacked);
        let packing: Vec<_> = packing.map(|(number, _)| number).collect();
        if packing.is_empty() {
            return Ok(None);
        }
        let mut packer = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        let (count, mut room) = (thread_count().min(packing.len()), host.packing_room(plan));
        for first in 0..count {
            let numbers: Vec<_> = packing[first..].iter().copied().step_by(count).collect();
            let bytes = numbers.iter().map(|&number| plan.units[number].kept_bytes()).sum();
            let own = room.start..room.start.wrapping_add(bytes);
            room.start = own.end;
            let started = Packing::new(sources, host, own, packer.stop.clone(), reader).and_then(|work| {
                let (plan, states, units, (ends, ended)) =
                    (plan.clone(), states.clone(), units.clone(), mpsc::sync_channel(1));
                let run = move |()| _ = ends.send(work.run(&numbers, &plan, &states, &units));
                let failed = |source: std::io::Error| Error::Thread { stage: "pack", source: source.into() };
                Ok(PackerThread { ended, thread: sync::spawn("ls-pack", || (), run).map_err(failed)? })
            });
            match started {
                Ok(thread) => packer.threads.push(thread),
                Err(error) => {
                    packer.end();
                    return Err(error);
                }
            }
        }
        Ok(Some(packer))
    }

    /// Ends them; what they were at is lost. False if one does not end, since its file does not answer: then it is left to itself, as
    /// [a thread that reads](super::stage::Running::join), with the memory that it uses.
    pub(super) fn end(self) -> bool {
        self.stop.store(true, Relaxed);
        let ends = |PackerThread { ended, thread }| ended.recv_timeout(END).unwrap_or(false) && thread.join().is_ok();
        self.threads.into_iter().map(ends).fold(true, |all, one| all & one)
    }
}

/// What a thread works with.
struct Packing {
    /// First, so that it is dropped before the block that it reads into.
    reader: BlockReader<()>,
    blocks: Arc<Arena>,
    sources: Arc<[Source]>,
    /// Memory that is left for packed units: addresses of the arena.
    room: Range<*mut u8>,
    /// Bytes of weights on their way to a part.
    part: Vec<u8>,
    stop: Arc<AtomicBool>,
    /// Keeps the memory.
    _host: Arc<HostMemory>,
}

// SAFETY: the room is this thread's alone.
unsafe impl Send for Packing {}

/// Memory that a unit is put into, from its start on. No slice of it is made: other threads may touch its pages, to prefault them.
struct Target {
    start: NonNull<u8>,
    room: usize,
    end: usize,
}

impl Target {
    fn push(&mut self, bytes: &[u8]) -> Result<(), No> {
        if bytes.len() > self.room.saturating_sub(self.end) {
            return Err(No::Room);
        }
        // SAFETY: as much of the room is left, nobody else reads it or changes a byte of it before its unit is handed over, and `bytes`
        // lie elsewhere.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(self.end), bytes.len()) };
        self.end += bytes.len();
        Ok(())
    }
}

/// Why a tensor is not put into memory in this form.
enum No {
    /// It does not fit.
    Room,
    /// Packing makes it no smaller.
    Gain,
    /// It cannot be read, or the threads are to end.
    Unread,
}

impl From<Error> for No {
    fn from(_: Error) -> Self {
        Self::Unread
    }
}

impl Packing {
    fn new(
        sources: &Arc<[Source]>,
        host: &Arc<HostMemory>,
        room: Range<*mut u8>,
        stop: Arc<AtomicBool>,
        reader: Reader,
    ) -> Result<Self> {
        let blocks = Arc::new(Arena::new("weights to be packed", 1, CHUNK)?);
        Ok(Self {
            reader: BlockReader::new(reader, sources, &blocks, 1)?,
            blocks,
            sources: sources.clone(),
            room,
            part: Vec::with_capacity(2 * PART),
            stop,
            _host: host.clone(),
        })
    }

    /// Packs these units, one after the other. Whether all of its reads have ended at its end.
    fn run(mut self, numbers: &[usize], plan: &Plan, states: &Residencies, units: &PackedUnits) -> bool {
        // SAFETY: the call takes numbers. Where it fails, the thread takes its share as any other.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid().cast_unsigned(), 19) };
        for (done, &number) in numbers.iter().enumerate() {
            match self.pack(&plan.units[number]) {
                Ok(packed) => {
                    let first = units.units[number].set(packed).is_ok();
                    assert!(first, "a unit is packed once");
                    states.fill(number);
                    units.settle(1);
                }
                // What cannot be read the reader finds too, and tells.
                Err(No::Unread) => {
                    let left = if self.stop.load(Relaxed) { 0 } else { numbers.len() - done };
                    units.give_up(left);
                    break;
                }
                // A smaller one may fit.
                Err(No::Room | No::Gain) => units.give_up(1),
            }
        }
        self.reader.quiesce()
    }

    /// Packs a unit into the room that is left.
    fn pack(&mut self, unit: &UnitLayout) -> Result<PackedUnit, No> {
        let (start, room) =
            (NonNull::new(self.room.start).ok_or(No::Room)?, self.room.end.addr() - self.room.start.addr());
        let (mut target, mut tensors) = (Target { start, room, end: 0 }, Vec::with_capacity(unit.tensors.len()));
        for tensor in &unit.tensors {
            target.end = target.end.next_multiple_of(REPACK_ALIGN);
            let from = target.end;
            let packed = if tensor.can_pack() { self.pack_tensor(tensor, &mut target) } else { Err(No::Gain) };
            let how = match packed {
                Err(No::Gain) => {
                    target.end = from;
                    for stored in &tensor.stored {
                        target.end = target.end.next_multiple_of(REPACK_ALIGN);
                        self.read(&tensor.name, stored, |_, bytes| target.push(bytes))?;
                    }
                    Repacked::Stored
                }
                packed => Repacked::Packed(packed?),
            };
            tensors.push((from, how));
        }
        // Of files that have changed nothing is kept.
        for stored in unit.tensors.iter().flat_map(|tensor| &tensor.stored) {
            self.sources[stored.file].check_unchanged()?;
        }
        let bytes = pages(target.end);
        if bytes > room {
            return Err(No::Room);
        }
        self.room.start = start.as_ptr().wrapping_add(bytes);
        Ok(PackedUnit { start, layout: unit.repacked(tensors, bytes) })
    }

    /// Packs a tensor by the table of its first part.
    fn pack_tensor(&mut self, tensor: &Placed, target: &mut Target) -> Result<Description, No> {
        let shape = vec![tensor.elements()];
        let mut description =
            Description { shape, table: Table([0; 13]), checksum: 0, part: PART, lengths: Vec::new() };
        let (mut encoder, from) = (None, target.end);
        let mut put = |part: &mut Vec<u8>| {
            let weights: Vec<_> = part.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
            part.clear();
            let encoder = encoder.get_or_insert_with(|| {
                let mut counts = [0; 256];
                packed::count(&weights, &mut counts);
                description.table = Table::new(&counts);
                Encoder::new(description.table)
            });
            let bytes = encoder.part(&weights);
            description.lengths.push(bytes.len() as u32);
            target.push(&bytes)?;
            let plain = 2 * PART * (description.lengths.len() - 1) + 2 * weights.len();
            if target.end - from >= plain { Err(No::Gain) } else { Ok(()) }
        };
        self.part.clear();
        self.read(&tensor.name, &tensor.stored[0], |part, mut bytes| {
            while !bytes.is_empty() {
                let (more, rest) = bytes.split_at(bytes.len().min(2 * PART - part.len()));
                part.extend_from_slice(more);
                bytes = rest;
                if part.len() == 2 * PART {
                    put(part)?;
                }
            }
            Ok(())
        })?;
        if !self.part.is_empty() {
            put(&mut self.part)?;
        }
        Ok(description)
    }

    /// Hands `take` the stored bytes of a tensor in their order, some at a time.
    fn read(
        &mut self,
        name: &str,
        stored: &TensorEntry,
        mut take: impl FnMut(&mut Vec<u8>, &[u8]) -> Result<(), No>,
    ) -> Result<(), No> {
        let whole = Extent::covering(stored.file, stored.offset..stored.end(), 0);
        for position in (0..whole.len).step_by(CHUNK) {
            let part = whole.part(position, CHUNK);
            self.reader.submit(&Extent { at: 0, ..part }, ());
            let stop = || if self.stop.load(Relaxed) { Err(Error::Cancelled) } else { Ok(()) };
            let read = self.reader.next(|(), _| stop())?;
            let ReadBlock { block, result, .. } = read.expect("one was submitted");
            stop()?;
            result.map_err(|failure| failure.of("a unit to pack", name, &self.sources[stored.file]))?;
            let [from, to] = [stored.offset, stored.end()].map(|end| end.clamp(part.offset, part.end) - part.offset);
            // SAFETY: the read brought as many bytes as the part needs, and the block is this thread's until it is given back.
            let bytes = unsafe {
                let start = self.blocks.slot(block).as_ptr();
                slice::from_raw_parts(start.add(from as usize), (to - from) as usize)
            };
            let taken = take(&mut self.part, bytes);
            self.reader.free(block);
            taken?;
        }
        Ok(())
    }
}
