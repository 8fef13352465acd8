//! Where the bytes of one unit lie: in files, in a host slot, in a device slot.

use std::{iter, ops::Range};

use super::{DEVICE_ALIGN, MOST, Offsets, PAGE, Sizes};
use crate::{
    checkpoint::{Checkpoint, PackedRange, TensorEntry},
    dtype::DType,
    error::{Error, Result},
    packed::Parts,
    shape::Shape,
    unit::{Arrival, ArrivalOp, Tier, Unit},
};

/// Tensors closer together than this (bytes) share one read: a second request costs the disk about as much.
pub(crate) const MAX_GAP: u64 = 64 << 10;

/// One contiguous read: `len` bytes at `offset` of file `file`, both multiples of the page size, into the host slot at `at`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// Where the last tensor ends in the file: a read must get this far; the rest is rounding.
    pub(crate) end: u64,
    pub(crate) at: usize,
}

impl Extent {
    /// The pages of these bytes of a file.
    pub(crate) fn covering(file: usize, bytes: Range<u64>, at: usize) -> Self {
        let offset = bytes.start / PAGE as u64 * PAGE as u64;
        let mut extent = Self { file, offset, len: 0, end: offset, at };
        extent.grow_to(bytes.end);
        extent
    }

    fn grow_to(&mut self, end: u64) {
        self.end = self.end.max(end);
        self.len = (self.end.next_multiple_of(PAGE as u64) - self.offset) as usize;
    }

    /// Its part from `position` on, a whole number of pages before its end, of up to `most` bytes.
    pub(crate) fn part(&self, position: usize, most: usize) -> Self {
        let (offset, len) = (self.offset + position as u64, most.min(self.len - position));
        Self { offset, len, end: self.end.min(offset + len as u64), at: self.at + position, ..*self }
    }

    /// How many of its bytes must come.
    pub(crate) fn needed(&self) -> usize {
        (self.end - self.offset) as usize
    }

    /// What a read of it brings from a file of this length.
    fn brings(&self, length: u64) -> usize {
        self.len.min((length - self.offset) as usize)
    }
}

/// Bytes that go to the device unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Where it goes among what is kept [packed](Tier::GpuPacked).
    pub(crate) kept_at: usize,
    pub(crate) bytes: usize,
}

impl CopyRange {
    /// What of it lies in `window`, a range of the host slot.
    pub(crate) fn within(&self, window: &Range<usize>) -> Option<Self> {
        let (start, end) = (self.from.max(window.start), (self.from + self.bytes).min(window.end));
        let skipped = start.saturating_sub(self.from);
        (start < end).then(|| Self {
            from: start,
            to: self.to + skipped,
            kept_at: self.kept_at + skipped,
            bytes: end - start,
        })
    }
}

/// A tensor that is converted on the device: `elements` of `from_type` at `from` in the host slot become `to_type` at `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cast {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// As for copies.
    pub(crate) kept_at: usize,
    pub(crate) elements: usize,
    pub(crate) from_type: DType,
    pub(crate) to_type: DType,
}

impl Cast {
    /// Bytes before the cast.
    pub(crate) fn bytes(&self) -> usize {
        self.from_type.bytes(self.elements)
    }

    /// Bytes after it.
    pub(crate) fn bytes_after(&self) -> usize {
        self.to_type.bytes(self.elements)
    }

    /// Whether it is kept as it is stored where packed tensors are, and cast from there: if that is less.
    pub(crate) fn is_kept_stored(&self) -> bool {
        self.bytes() < self.bytes_after()
    }

    /// The elements that begin in `window`, a range of the host slot, whole blocks of them, in pieces of up to `block_bytes` before the
    /// cast.
    pub(crate) fn pieces(&self, window: &Range<usize>, block_bytes: usize) -> impl Iterator<Item = Self> {
        let (cast, size, elements) = (*self, self.from_type.size(), self.from_type.block_elements());
        let to_size = self.to_type.bytes(elements);
        let begin_before = |end: usize| end.saturating_sub(cast.from).div_ceil(size).min(cast.elements / elements);
        let (first, end, most) = (begin_before(window.start), begin_before(window.end), block_bytes / size);
        (first..end).step_by(most).map(move |start| Self {
            from: cast.from + start * size,
            to: cast.to + start * to_size,
            kept_at: cast.kept_at + start * to_size,
            elements: most.min(end - start) * elements,
            ..cast
        })
    }
}

/// A tensor that is unpacked on the device: its parts, at `from` in the host slot, become weights of BF16 at `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unpack {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Where its parts go as they are.
    pub(crate) kept_at: usize,
    pub(crate) packed: PackedRange,
    /// The number of its report of corrupt weights among those of the unit.
    pub(crate) report: usize,
    /// For messages.
    pub(crate) file: usize,
    pub(crate) tensor: String,
}

/// Some of its parts, likewise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnpackPiece<'a> {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) parts: Parts<'a>,
}

impl Unpack {
    /// Bytes before it is unpacked.
    pub(crate) fn bytes(&self) -> usize {
        self.packed.parts().bytes()
    }

    /// Each part by itself.
    fn parts(&self) -> impl Iterator<Item = UnpackPiece<'_>> {
        let all = self.packed.parts();
        let (mut from, mut to, mut left) = (self.from, self.to, all.weights);
        all.lengths.chunks(1).map(move |lengths| {
            let parts = Parts { weights: all.part.min(left), lengths, ..all };
            let piece = UnpackPiece { from, to, parts };
            (from, to, left) = (from + parts.bytes(), to + WEIGHT * parts.weights, left - parts.weights);
            piece
        })
    }

    /// The parts that begin in `window`, a range of the host slot, as many at a time as lie in `block_bytes`: one at least.
    pub(crate) fn pieces(&self, window: &Range<usize>, block_bytes: usize) -> impl Iterator<Item = UnpackPiece<'_>> {
        let lengths = self.packed.parts().lengths;
        let (mut first, window) = (0, window.clone());
        let mut parts = self.parts().peekable();
        iter::from_fn(move || {
            while parts.next_if(|part| part.from < window.start).is_some() {
                first += 1;
            }
            let mut piece = parts.next_if(|part| part.from < window.end)?;
            let (begin, end) = (first, piece.from.saturating_add(block_bytes));
            first += 1;
            while let Some(next) = parts.next_if(|next| next.from < window.end && next.from + next.parts.bytes() <= end)
            {
                piece.parts.weights += next.parts.weights;
                first += 1;
            }
            piece.parts.lengths = &lengths[begin..first];
            Some(piece)
        })
    }
}

/// Bytes of a weight that was unpacked.
const WEIGHT: usize = DType::BF16.size();

/// A tensor in a device slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) name: String,
    pub(crate) at: usize,
    pub(crate) dtype: DType,
    /// What it is made of.
    pub(crate) stored: TensorEntry,
}

/// Everything about one unit that the stages need.
#[derive(Clone, Debug)]
pub(crate) struct UnitLayout {
    pub(crate) name: String,
    pub(crate) extents: Vec<Extent>,
    pub(crate) copies: Vec<CopyRange>,
    pub(crate) casts: Vec<Cast>,
    pub(crate) unpacks: Vec<Unpack>,
    /// Where its [reports](Self::reports) of corrupt weights begin among those of all units.
    pub(crate) reports_at: usize,
    /// Sorted by name.
    pub(crate) tensors: Vec<Placed>,
    /// What the tensors take in their files, where each counts once.
    pub(crate) disk_bytes: usize,
    /// What reading it brings: the same rounded to pages, as far as the files go.
    pub(crate) read_bytes: usize,
    /// Whole pages.
    pub(crate) host_bytes: usize,
    /// A multiple of [`DEVICE_ALIGN`].
    pub(crate) device_bytes: usize,
    /// The same where tensors that are packed, or smaller than what they become, are kept as they are.
    pub(crate) packed_bytes: usize,
    pub(crate) tier: Tier,
    /// The layer function uses it where it was read to: nothing is copied, and what is kept of it are the pages that were read.
    pub(crate) in_place: bool,
    /// Where it lies among the units that are kept in its tier.
    pub(crate) resident_at: usize,
    /// For messages: (file, end, name) of each stored tensor, sorted.
    pub(super) stored: Vec<(usize, u64, String)>,
}

impl UnitLayout {
    pub(crate) fn new(checkpoint: &Checkpoint, unit: &Unit) -> Result<Self> {
        let mut inputs =
            unit.arrivals().iter().map(|arrival| input(checkpoint, unit, arrival)).collect::<Result<Vec<_>>>()?;
        // In file order, so that what lies side by side on disk does so in every slot and moves in one piece.
        // By size and name too: no other tensor must come between two uses of the one that starts where it does.
        inputs.sort_by_key(|&(_, input, entry)| (entry.file, entry.offset, entry.bytes, input));
        let extents = lay_out_extents(inputs.iter().map(|(_, _, entry)| *entry));
        let too_large = || Error::setting("unit", format!("{} is larger than can be addressed", unit.name()));
        let host_bytes = extents.last().map_or(0, |extent| extent.at.saturating_add(extent.len));
        if host_bytes > MOST {
            return Err(too_large());
        }
        let (mut copies, mut casts, mut unpacks, mut tensors) =
            (Vec::<CopyRange>::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut stored, mut disk_bytes) = (Vec::new(), 0usize);
        let [mut on_device, mut kept] = [Offsets::aligned_to(DEVICE_ALIGN); 2];
        for (arrival, input, entry) in inputs {
            let dtype = if let ArrivalOp::To(to) = arrival.op { to } else { entry.dtype };
            let elements = entry.elements();
            let bytes = dtype.bytes_of(&entry.shape).ok_or_else(too_large)?;
            let kept_bytes = if entry.packed.is_some() { entry.bytes } else { entry.bytes.min(bytes) };
            let (at, kept_at) = on_device.push(bytes).zip(kept.push(kept_bytes)).ok_or_else(too_large)?;
            if elements > 0 {
                let from = host_position(&extents, entry);
                if let Some(packed) = &entry.packed {
                    let (packed, tensor) = (packed.clone(), input.to_owned());
                    let (report, file) = (unpacks.len(), entry.file);
                    unpacks.push(Unpack { from, to: at, kept_at, packed, report, file, tensor });
                } else if dtype == entry.dtype {
                    match copies.last_mut() {
                        // Side by side on the device, they are so where they are kept.
                        Some(last) if last.from + last.bytes == from && last.to + last.bytes == at => {
                            last.bytes += entry.bytes
                        }
                        _ => copies.push(CopyRange { from, to: at, kept_at, bytes: entry.bytes }),
                    }
                } else {
                    casts.push(Cast { from, to: at, kept_at, elements, from_type: entry.dtype, to_type: dtype });
                }
            }
            let record = (entry.file, entry.end(), input.to_owned());
            if entry.bytes > 0 && stored.last() != Some(&record) {
                disk_bytes += entry.bytes;
                stored.push(record);
            }
            tensors.push(Placed { name: arrival.output.clone(), at, dtype, stored: entry.clone() });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::setting("unit", format!("{} has two tensors named {}", unit.name(), pair[0].name)));
        }
        Ok(Self {
            name: unit.name().to_owned(),
            read_bytes: extents.iter().map(|extent| extent.brings(checkpoint.length(extent.file))).sum(),
            extents,
            copies,
            casts,
            unpacks,
            reports_at: 0,
            tensors,
            disk_bytes,
            host_bytes,
            device_bytes: on_device.bytes(),
            packed_bytes: kept.bytes(),
            tier: unit.tier(),
            in_place: false,
            resident_at: 0,
            stored,
        })
    }

    /// Plans it for a device that computes in RAM. There the tiers are one, and a unit is used in place if all of its tensors arrive as
    /// they are stored, on boundaries of their elements.
    pub(crate) fn share_memory(&mut self) {
        let lies_well = |tensor: &Placed| tensor.stored.offset.is_multiple_of(tensor.dtype.align() as u64);
        self.in_place = self.disk_bytes > 0
            && self.casts.is_empty()
            && self.unpacks.is_empty()
            && self.tier != Tier::PinnedPacked
            && self.tensors.iter().all(lies_well);
        if self.in_place {
            self.copies.clear();
            for tensor in self.tensors.iter_mut().filter(|tensor| tensor.stored.bytes > 0) {
                tensor.at = host_position(&self.extents, &tensor.stored);
            }
        }
        self.tier = match self.tier {
            Tier::Ram | Tier::Pinned | Tier::GpuPacked if self.in_place => Tier::Gpu,
            Tier::Ram => Tier::Pinned,
            tier => tier,
        };
    }

    /// What it moves and takes.
    pub(crate) fn sizes(&self) -> Sizes {
        let unpacked = self.unpacks.iter().map(|unpack| [unpack.bytes(), WEIGHT * unpack.packed.parts().weights]);
        Sizes {
            read: self.read_bytes,
            arriving: self.disk_bytes,
            in_place: if self.in_place { self.disk_bytes } else { 0 },
            unpacked: unpacked.fold([0; 2], |[from, to], [more, weights]| [from + more, to + weights]),
            host: self.host_bytes,
            through: if self.in_place { 0 } else { self.host_bytes },
            passing: [if self.in_place { 0 } else { self.device_bytes }, self.device_bytes],
            device: if self.in_place { self.host_bytes } else { self.device_bytes },
            packed: self.packed_bytes,
            repacked: self.expected_packed(),
        }
    }

    /// The packed tensors of which the device may report that they are corrupt: file and name. Those that are stored so come first,
    /// then all that may be [packed where they are kept](Self::repacked).
    pub(crate) fn reports(&self) -> impl Iterator<Item = (usize, &str)> {
        let stored = self.unpacks.iter().map(|unpack| (unpack.file, unpack.tensor.as_str()));
        let kept = self.tensors.iter().filter(|_| self.tier == Tier::PinnedPacked);
        stored.chain(kept.map(|placed| (placed.stored.file, placed.name.as_str())))
    }

    /// What it takes where it is kept.
    pub(crate) fn kept_bytes(&self) -> usize {
        match self.tier {
            Tier::Disk => 0,
            Tier::Ram | Tier::Pinned => self.host_bytes,
            Tier::Gpu if self.in_place => self.host_bytes,
            Tier::Gpu => self.device_bytes,
            Tier::GpuPacked => self.packed_bytes,
            Tier::PinnedPacked => self.expected_packed()[0],
        }
    }

    /// What there is to read, in parts of up to `most` bytes, each with the range of the host slot for which it comes: elements and
    /// parts of packed tensors that begin there lie whole in it. None of these may be longer than `most` less a page.
    pub(crate) fn reads(&self, most: usize) -> impl Iterator<Item = (Extent, Range<usize>)> {
        self.extents.iter().flat_map(move |extent| {
            let (mut start, end) = (extent.at, extent.at + extent.len);
            iter::from_fn(move || {
                let position = (start - extent.at) / PAGE * PAGE;
                let limit = extent.at + position + most;
                let cut = if limit < end { self.whole_up_to(limit) } else { end };
                let window = start..cut;
                start = cut;
                let bytes = (cut - extent.at).next_multiple_of(PAGE) - position;
                (!window.is_empty()).then(|| (extent.part(position, bytes), window))
            })
        })
    }

    /// The last place of the host slot up to `limit` that is not within an element that is cast, or a packed part.
    fn whole_up_to(&self, limit: usize) -> usize {
        let across = |from: usize, bytes: usize| from < limit && limit < from + bytes;
        let casts = self.casts.iter().filter(|cast| across(cast.from, cast.bytes()));
        let elements = casts.map(|cast| limit - (limit - cast.from) % cast.from_type.size());
        let unpacks = self.unpacks.iter().filter(|unpack| across(unpack.from, unpack.bytes()));
        let parts = unpacks.flat_map(Unpack::parts).filter(|part| across(part.from, part.parts.bytes()));
        elements.chain(parts.map(|part| part.from)).min().unwrap_or(limit)
    }

    /// Index of the tensor called `name`.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Index of the tensor called `name`, or an error that lists what there is.
    pub(crate) fn find(&self, name: &str) -> Result<usize> {
        self.position(name).ok_or_else(|| Error::NoTensor {
            unit: self.name.clone(),
            tensor: name.to_owned(),
            known: self.tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The stored tensor that byte `offset` of file `file` belongs to, or the next: reads begin on page boundaries, before
    /// the tensors that they are for.
    pub(crate) fn tensor_at(&self, file: usize, offset: u64) -> &str {
        let at = self.stored.partition_point(|(f, end, _)| (*f, *end) <= (file, offset));
        self.stored.get(at).map_or("", |(_, _, name)| name)
    }
}

/// The stored tensor that something is made of, if it can be.
fn input<'a>(
    checkpoint: &'a Checkpoint,
    unit: &Unit,
    arrival: &'a Arrival,
) -> Result<(&'a Arrival, &'a str, &'a TensorEntry)> {
    let [input] = arrival.inputs.as_slice() else {
        let (output, op, given) = (&arrival.output, arrival.op, arrival.inputs.len());
        let cause = format!("{}: {output} is made by {op:?}, which takes one stored tensor, not {given}", unit.name());
        return Err(Error::setting("unit", cause));
    };
    let entry = checkpoint.entry(input)?;
    if let Err(error) = Shape::new(&entry.shape) {
        return Err(Error::tensor(&checkpoint.files()[entry.file], input, error.to_string()));
    }
    if let ArrivalOp::To(to) = arrival.op
        && to != entry.dtype
        && (entry.packed.is_some() || !entry.dtype.converts_to(to))
    {
        let (file, packed) = (&checkpoint.files()[entry.file], if entry.packed.is_some() { "packed " } else { "" });
        return Err(Error::tensor(file, input, format!("cannot be converted from {packed}{} to {to}", entry.dtype)));
    }
    Ok((arrival, input, entry))
}

/// Cuts tensors (sorted by place) into extents: page-aligned outward, merged where they touch or nearly do.
fn lay_out_extents<'a>(entries: impl Iterator<Item = &'a TensorEntry>) -> Vec<Extent> {
    let mut extents = Vec::<Extent>::new();
    for entry in entries.filter(|entry| entry.bytes > 0) {
        let at = extents.last().map_or(0, |last| last.at.saturating_add(last.len));
        let extent = Extent::covering(entry.file, entry.offset..entry.end(), at);
        match extents.last_mut() {
            Some(last) if last.file == extent.file && extent.offset <= last.offset + last.len as u64 + MAX_GAP => {
                last.grow_to(extent.end);
            }
            _ => extents.push(extent),
        }
    }
    extents
}

fn host_position(extents: &[Extent], entry: &TensorEntry) -> usize {
    let after = extents.partition_point(|extent| (extent.file, extent.offset) <= (entry.file, entry.offset));
    let extent = &extents[after - 1];
    extent.at + (entry.offset - extent.offset) as usize
}
