//! Packs units that are stored plain and kept packed in pinned RAM: once, in threads of their own that take what processor time the
//! others leave, while the first passes go by. Until a unit is packed it passes through slots, as one on disk does.

use std::{
    ops::Range,
    ptr::NonNull,
    slice,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use crate::{
    arena::Arena,
    error::{Error, Result},
    io::{BlockReader, CHUNK, ReadBlock, Source},
    layout::{Extent, Placed, REPACK_ALIGN, Repacked, UnitLayout, pages},
    packed::{self, Description, Encoder, PART, Table},
    pipeline::{host::HostMemory, residency::Residencies},
    plan::{Plan, Reader, Tier},
    sync,
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
pub(super) struct PackedUnits(Vec<OnceLock<PackedUnit>>);

impl PackedUnits {
    pub(super) fn new(units: usize) -> Self {
        Self((0..units).map(|_| OnceLock::new()).collect())
    }

    /// A unit, once it is packed.
    pub(super) fn get(&self, unit: usize) -> Option<&PackedUnit> {
        self.0[unit].get()
    }
}

/// The threads. Dropping it ends them, at the latest when the reads that are under way have ended, or are given up.
pub(super) struct Packer {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// A quarter of the processors, and no more than a disk needs to be outrun.
fn thread_count() -> usize {
    (thread::available_parallelism().map_or(1, usize::from) / 4).clamp(1, 4)
}

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
            let end = room.start.wrapping_add(bytes);
            let blocks = Arc::new(Arena::new("weights to be packed", 1, CHUNK)?);
            let work = Packing {
                reader: BlockReader::new(reader, sources, &blocks, 1)?,
                blocks,
                sources: sources.clone(),
                room: room.start..end,
                part: Vec::with_capacity(2 * PART),
                stop: packer.stop.clone(),
                _host: host.clone(),
            };
            room.start = end;
            let (plan, states, units) = (plan.clone(), states.clone(), units.clone());
            let run = move |()| work.run(&numbers, &plan, &states, &units);
            let failed = |source: std::io::Error| Error::Thread { stage: "pack", source: source.into() };
            packer.threads.push(sync::spawn("ls-pack", || (), run).map_err(failed)?);
        }
        Ok(Some(packer))
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // What they were at is lost either way.
        self.threads.drain(..).for_each(|thread| _ = thread.join());
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

/// Memory that a unit is put into, from its start on.
struct Target<'a> {
    bytes: &'a mut [u8],
    end: usize,
}

impl Target<'_> {
    fn push(&mut self, bytes: &[u8]) -> Result<(), No> {
        let end = self.end.checked_add(bytes.len()).ok_or(No::Room)?;
        self.bytes.get_mut(self.end..end).ok_or(No::Room)?.copy_from_slice(bytes);
        self.end = end;
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
    /// Packs these units, one after the other.
    fn run(mut self, numbers: &[usize], plan: &Plan, states: &Residencies, units: &PackedUnits) {
        // SAFETY: the call takes numbers. Where it fails, the thread takes its share as any other.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid().cast_unsigned(), 19) };
        for &number in numbers {
            match self.pack(&plan.units[number]) {
                Ok(packed) => {
                    let first = units.0[number].set(packed).is_ok();
                    assert!(first, "a unit is packed once");
                    states.fill(number);
                }
                // What cannot be read the reader finds too, and tells.
                Err(No::Unread) => return,
                // A smaller one may fit.
                Err(No::Room | No::Gain) => {}
            }
        }
    }

    /// Packs a unit into the room that is left.
    fn pack(&mut self, unit: &UnitLayout) -> Result<PackedUnit, No> {
        let Range { start, end } = self.room;
        // SAFETY: the room is memory of the host's, which nobody else uses before a unit in it is handed over.
        let bytes = unsafe { slice::from_raw_parts_mut(start, end.offset_from_unsigned(start)) };
        let (mut target, mut tensors) = (Target { bytes, end: 0 }, Vec::with_capacity(unit.tensors.len()));
        for tensor in &unit.tensors {
            target.end = target.end.next_multiple_of(REPACK_ALIGN);
            let from = target.end;
            let packed = if tensor.can_pack() { self.pack_tensor(tensor, &mut target) } else { Err(No::Gain) };
            let how = match packed {
                Err(No::Gain) => {
                    target.end = from;
                    self.read(tensor, |_, bytes| target.push(bytes))?;
                    Repacked::Stored
                }
                packed => Repacked::Packed(packed?),
            };
            tensors.push((from, how));
        }
        // Of files that have changed nothing is kept.
        for tensor in &unit.tensors {
            self.sources[tensor.stored.file].check_unchanged()?;
        }
        let (start, bytes) = (NonNull::new(start).ok_or(No::Room)?, pages(target.end));
        if bytes > target.bytes.len() {
            return Err(No::Room);
        }
        self.room.start = start.as_ptr().wrapping_add(bytes);
        Ok(PackedUnit { start, layout: unit.repacked(tensors, bytes) })
    }

    /// Packs a tensor by the table of its first part.
    fn pack_tensor(&mut self, tensor: &Placed, target: &mut Target<'_>) -> Result<Description, No> {
        let shape = vec![tensor.stored.elements()];
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
        self.read(tensor, |part, mut bytes| {
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
    fn read(&mut self, tensor: &Placed, mut take: impl FnMut(&mut Vec<u8>, &[u8]) -> Result<(), No>) -> Result<(), No> {
        let stored = &tensor.stored;
        let whole = Extent::covering(stored.file, stored.offset..stored.end(), 0);
        for position in (0..whole.len).step_by(CHUNK) {
            let part = whole.part(position, CHUNK);
            self.reader.submit(&Extent { at: 0, ..part }, ());
            let stop = || if self.stop.load(Relaxed) { Err(Error::Cancelled) } else { Ok(()) };
            let read = self.reader.next(|(), _| stop())?;
            let ReadBlock { block, result, .. } = read.expect("one was submitted");
            stop()?;
            result.map_err(|failure| failure.of("a unit to pack", &tensor.name, &self.sources[stored.file]))?;
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
