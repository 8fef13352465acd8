//! Where the bytes of one unit lie: in files, in a host slot, in a device slot.

use std::{iter, ops::Range};

use super::{
    DEVICE_ALIGN, MOST, Offsets, PAGE, Sizes,
    arriving::{Cast, CopyRange, Dequantise, Unpack, WEIGHT},
};
use crate::{
    checkpoint::{Checkpoint, TensorEntry},
    dtype::DType,
    error::{Error, Result},
    quantised::Recipe,
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

/// A tensor in a device slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) name: String,
    pub(crate) at: usize,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// What it is made of.
    pub(crate) stored: Vec<TensorEntry>,
}

impl Placed {
    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Everything about one unit that the stages need.
#[derive(Clone, Debug)]
pub(crate) struct UnitLayout {
    pub(crate) name: String,
    pub(crate) extents: Vec<Extent>,
    pub(crate) copies: Vec<CopyRange>,
    pub(crate) casts: Vec<Cast>,
    pub(crate) unpacks: Vec<Unpack>,
    pub(crate) dequantises: Vec<Dequantise>,
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
        let made = unit.arrivals().iter().map(|arrival| Made::new(checkpoint, unit, arrival));
        let mut made = made.collect::<Result<Vec<_>>>()?;
        // In file order, so that what lies side by side on disk does so in every slot and moves in one piece.
        // By size and name too: no other tensor must come between two uses of the one that starts where it does.
        let place = |&(name, entry): &(&'_ str, &TensorEntry)| (entry.file, entry.offset, entry.bytes, name.to_owned());
        made.sort_by_cached_key(|made| place(&made.inputs[0]));
        let mut stored: Vec<_> = made.iter().flat_map(|made| &made.inputs).copied().collect();
        stored.sort_by_cached_key(place);
        let extents = lay_out_extents(stored.iter().map(|(_, entry)| *entry));
        let too_large = || Error::setting("unit", format!("{} is larger than can be addressed", unit.name()));
        let host_bytes = extents.last().map_or(0, |extent| extent.at.saturating_add(extent.len));
        if host_bytes > MOST {
            return Err(too_large());
        }
        stored.dedup_by_key(|(name, entry)| (entry.file, entry.end(), *name));
        stored.retain(|(_, entry)| entry.bytes > 0);
        let mut layout = Self {
            name: unit.name().to_owned(),
            read_bytes: extents.iter().map(|extent| extent.brings(checkpoint.length(extent.file))).sum(),
            extents,
            copies: Vec::new(),
            casts: Vec::new(),
            unpacks: Vec::new(),
            dequantises: Vec::new(),
            reports_at: 0,
            tensors: Vec::with_capacity(made.len()),
            disk_bytes: stored.iter().map(|(_, entry)| entry.bytes).sum(),
            host_bytes,
            device_bytes: 0,
            packed_bytes: 0,
            tier: unit.tier(),
            in_place: false,
            resident_at: 0,
            stored: stored.iter().map(|(name, entry)| (entry.file, entry.end(), (*name).to_owned())).collect(),
        };
        let [mut on_device, mut kept] = [Offsets::aligned_to(DEVICE_ALIGN); 2];
        for made in &made {
            layout.add(made, &mut on_device, &mut kept).ok_or_else(too_large)?;
        }
        (layout.device_bytes, layout.packed_bytes) = (on_device.bytes(), kept.bytes());
        layout.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = layout.tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::setting("unit", format!("{} has two tensors named {}", unit.name(), pair[0].name)));
        }
        Ok(layout)
    }

    /// Adds a tensor behind the others: on the device, and among those that are kept packed. `None` if it ends beyond [`MOST`].
    fn add(&mut self, made: &Made<'_>, on_device: &mut Offsets, kept: &mut Offsets) -> Option<()> {
        let Made { arrival, inputs, dtype, shape, recipe } = made;
        let ((input, entry), bytes) = (inputs[0], dtype.bytes_of(shape)?);
        let at = on_device.push(bytes)?;
        self.tensors.push(Placed {
            name: arrival.output.clone(),
            at,
            dtype: *dtype,
            shape: shape.clone(),
            stored: inputs.iter().map(|(_, entry)| (*entry).clone()).collect(),
        });
        if bytes == 0 {
            return Some(());
        }
        let from = |entry| host_position(&self.extents, entry);
        if let Some(recipe) = *recipe {
            let from: Vec<_> = inputs.iter().map(|(_, entry)| (from(entry), *entry)).collect();
            let mut dequantise = Dequantise { to: at, ..Dequantise::new(recipe, *dtype, &from) };
            if dequantise.is_kept_stored() {
                for input in &mut dequantise.inputs {
                    input.kept_at = kept.push(input.bytes)?;
                }
            } else {
                dequantise.kept_at = kept.push(bytes)?;
            }
            self.dequantises.push(dequantise);
            return Some(());
        }
        let from = from(entry);
        let kept_at = kept.push(if entry.packed.is_some() { entry.bytes } else { entry.bytes.min(bytes) })?;
        if let Some(packed) = &entry.packed {
            let (packed, tensor) = (packed.clone(), input.to_owned());
            let (report, file) = (self.unpacks.len(), entry.file);
            self.unpacks.push(Unpack { from, to: at, kept_at, packed, report, file, tensor });
        } else if *dtype == entry.dtype {
            match self.copies.last_mut() {
                // Side by side on the device, they are so where they are kept.
                Some(last) if last.from + last.bytes == from && last.to + last.bytes == at => last.bytes += entry.bytes,
                _ => self.copies.push(CopyRange { from, to: at, kept_at, bytes: entry.bytes }),
            }
        } else {
            let (elements, from_type) = (entry.elements(), entry.dtype);
            self.casts.push(Cast { from, to: at, kept_at, elements, from_type, to_type: *dtype });
        }
        Some(())
    }

    /// Plans it for a device that computes in RAM. There the tiers are one, and a unit is used in place if all of its tensors arrive as
    /// they are stored, on boundaries of their elements.
    pub(crate) fn share_memory(&mut self) {
        let lies_well = |tensor: &Placed| tensor.stored[0].offset.is_multiple_of(tensor.dtype.align() as u64);
        self.in_place = self.disk_bytes > 0
            && self.casts.is_empty()
            && self.unpacks.is_empty()
            && self.dequantises.is_empty()
            && self.tier != Tier::PinnedPacked
            && self.tensors.iter().all(lies_well);
        if self.in_place {
            self.copies.clear();
            for tensor in self.tensors.iter_mut().filter(|tensor| tensor.stored[0].bytes > 0) {
                tensor.at = host_position(&self.extents, &tensor.stored[0]);
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
        stored.chain(kept.map(|placed| (placed.stored[0].file, placed.name.as_str())))
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

/// A tensor, and the stored ones that it is made of.
struct Made<'a> {
    arrival: &'a Arrival,
    inputs: Vec<(&'a str, &'a TensorEntry)>,
    dtype: DType,
    shape: Vec<usize>,
    /// Of a matrix that is made of several.
    recipe: Option<Recipe>,
}

impl<'a> Made<'a> {
    /// Refuses what cannot be made.
    fn new(checkpoint: &'a Checkpoint, unit: &Unit, arrival: &'a Arrival) -> Result<Self> {
        let (output, op, given) = (&arrival.output, arrival.op, arrival.inputs.len());
        let wanted = if let ArrivalOp::Dequantise { scheme, .. } = op { scheme.inputs() } else { 1 };
        if given != wanted {
            let takes = if wanted == 1 { "one stored tensor".into() } else { format!("{wanted} stored tensors") };
            let cause = format!("{}: {output} is made by {op:?}, which takes {takes}, not {given}", unit.name());
            return Err(Error::setting("unit", cause));
        }
        let find = |name: &'a String| -> Result<_> {
            let entry = checkpoint.entry(name)?;
            match Shape::new(&entry.shape) {
                Ok(_) => Ok((name.as_str(), entry)),
                Err(error) => Err(Error::tensor(&checkpoint.files()[entry.file], name, error.to_string())),
            }
        };
        let inputs = arrival.inputs.iter().map(find).collect::<Result<Vec<_>>>()?;
        let refused = |at: usize, cause: String| {
            let (name, entry) = inputs[at];
            Error::tensor(&checkpoint.files()[entry.file], name, cause)
        };
        let entry = inputs[0].1;
        let (dtype, shape, recipe) = match op {
            ArrivalOp::Keep => (entry.dtype, entry.shape.clone(), None),
            ArrivalOp::To(to) => {
                if to != entry.dtype && (entry.packed.is_some() || !entry.dtype.converts_to(to)) {
                    let packed = if entry.packed.is_some() { "packed " } else { "" };
                    return Err(refused(0, format!("cannot be converted from {packed}{} to {to}", entry.dtype)));
                }
                (to, entry.shape.clone(), None)
            }
            ArrivalOp::Dequantise { scheme, shape, to } => {
                if let Some(packed) = inputs.iter().position(|(_, entry)| entry.packed.is_some()) {
                    return Err(refused(packed, "is packed, so no matrix can be made of it and others: unpack the folder (layer-streamer unpack)".into()));
                }
                let entries: Vec<_> = inputs.iter().map(|(_, entry)| (entry.dtype, entry.shape.as_slice())).collect();
                let recipe = Recipe::new(scheme, shape, &entries).map_err(|(at, cause)| refused(at, cause))?;
                let found = |at: usize| inputs.get(at).map_or(0, |(_, entry)| entry.bytes);
                debug_assert!(shape.contains(&0) || recipe.input_bytes() == std::array::from_fn(found), "{recipe:?}");
                let to = to.unwrap_or_else(|| recipe.as_blocks());
                if !matches!(to, DType::F32 | DType::BF16) && to != recipe.as_blocks() {
                    return Err(refused(0, format!("cannot become {to}, which is neither F32 nor BF16")));
                }
                (to, shape.to_vec(), Some(recipe))
            }
        };
        Ok(Self { arrival, inputs, dtype, shape, recipe })
    }
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
