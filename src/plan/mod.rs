//! The plan: what every stage does, worked out once, before anything is reserved.
//!
//! A stage never computes where bytes go. It walks the units round and round and looks up each one's `UnitPlan`: where it
//! lives between passes, which extents to read into a host slot, which ranges to copy to the device, which tensors arrive
//! changed.

mod budget;
mod forecast;
#[cfg(test)]
mod fuzz;
mod placement;
mod settings;

pub use budget::{Budget, FixedOverhead};
pub use forecast::{Bandwidths, Forecast, Part};
pub use placement::Placement;
pub use settings::{CachePolicy, Reader, Settings, Tier};

use crate::{
    arena::PAGE,
    checkpoint::{Checkpoint, TensorEntry},
    device::{Device, Shape},
    dtype::DType,
    error::{Error, Result},
};

/// Every tensor starts on such a boundary in device memory (bytes), as kernels with 16-byte accesses and cuBLAS like it.
pub const DEVICE_ALIGN: usize = 256;

/// The most bytes that a unit, or what lives in one place, may be: as far as a pointer reaches, whole pages.
const MOST: usize = isize::MAX as usize / PAGE * PAGE;

/// Tensors closer together than this (bytes) share one read: a second request costs the disk about as much.
const MAX_GAP: u64 = 64 << 10;

/// What becomes of a tensor on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArrivalOp {
    /// It arrives as it is stored.
    Keep,
    /// It is converted to this type on the device (see [`DType::converts_to`]).
    To(DType),
}

/// One tensor as a layer function sees it, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The name under which the layer function finds it, unique within the unit.
    pub output: String,
    /// The stored tensors it is made of. Both present operations take one.
    pub inputs: Vec<String>,
    /// How it is made.
    pub op: ArrivalOp,
}

/// Tensors that travel together and are handed over as one "layer". Units need not be alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    name: String,
    arrivals: Vec<Arrival>,
    pub(crate) tier: Tier,
}

impl Unit {
    /// A unit without tensors yet. The name appears in messages.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds the stored tensor `input`, to be found as `output`, unchanged.
    pub fn keep(&mut self, output: impl Into<String>, input: impl Into<String>) -> &mut Self {
        self.add(Arrival { output: output.into(), inputs: vec![input.into()], op: ArrivalOp::Keep })
    }

    /// Adds a tensor however it is made.
    pub fn add(&mut self, arrival: Arrival) -> &mut Self {
        self.arrivals.push(arrival);
        self
    }

    /// Has every tensor added so far that arrives as it is stored converted to `dtype`, where that is another type.
    pub fn convert(&mut self, dtype: DType) -> &mut Self {
        for arrival in self.arrivals.iter_mut().filter(|arrival| arrival.op == ArrivalOp::Keep) {
            arrival.op = ArrivalOp::To(dtype);
        }
        self
    }

    /// Says where the unit is kept between passes.
    pub fn set_tier(&mut self, tier: Tier) -> &mut Self {
        self.tier = tier;
        self
    }

    /// Where the unit is kept between passes.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unit's tensors in the order they were added.
    pub fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }
}

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

/// Bytes that go to the device unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) bytes: usize,
}

/// A tensor that is converted on the device: `elements` of `from_type` at `from` in the host slot become `to_type` at `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cast {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) elements: usize,
    pub(crate) from_type: DType,
    pub(crate) to_type: DType,
}

/// A tensor in a device slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) name: String,
    pub(crate) at: usize,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

/// Everything about one unit that the stages need.
#[derive(Clone, Debug)]
pub(crate) struct UnitPlan {
    pub(crate) name: String,
    pub(crate) extents: Vec<Extent>,
    pub(crate) copies: Vec<CopyRange>,
    pub(crate) casts: Vec<Cast>,
    /// Sorted by name.
    pub(crate) tensors: Vec<Placed>,
    /// What the tensors take in their files, where each counts once.
    pub(crate) disk_bytes: usize,
    /// What reading it brings: the same rounded to pages, as far as the files go.
    pub(crate) read_bytes: usize,
    pub(crate) host_bytes: usize,
    pub(crate) device_bytes: usize,
    pub(crate) tier: Tier,
    /// Where it lies among the residents of its tier.
    pub(crate) resident_at: usize,
    /// For messages: (file, end, name) of each stored tensor, sorted.
    stored: Vec<(usize, u64, String)>,
}

impl UnitPlan {
    pub(crate) fn new(checkpoint: &Checkpoint, unit: &Unit) -> Result<Self> {
        let mut inputs = Vec::<(&Arrival, &str, &TensorEntry)>::with_capacity(unit.arrivals.len());
        for arrival in &unit.arrivals {
            let [input] = arrival.inputs.as_slice() else {
                let (output, op, given) = (&arrival.output, arrival.op, arrival.inputs.len());
                let cause =
                    format!("{}: {output} is made by {op:?}, which takes one stored tensor, not {given}", unit.name);
                return Err(Error::setting("unit", cause));
            };
            let entry = checkpoint.entry(input)?;
            if let Err(error) = Shape::new(&entry.shape) {
                return Err(Error::tensor(&checkpoint.files()[entry.file], input, error.to_string()));
            }
            if let ArrivalOp::To(to) = arrival.op
                && to != entry.dtype
                && !entry.dtype.converts_to(to)
            {
                let file = &checkpoint.files()[entry.file];
                return Err(Error::tensor(file, input, format!("cannot be converted from {} to {to}", entry.dtype)));
            }
            inputs.push((arrival, input, entry));
        }
        // In file order, so that what lies side by side on disk does so in every slot and moves in one piece.
        // By size and name too: no other tensor must come between two uses of the one that starts where it does.
        inputs.sort_by_key(|&(_, input, entry)| (entry.file, entry.offset, entry.bytes, input));
        let extents = lay_out_extents(inputs.iter().map(|(_, _, entry)| *entry));
        let too_large = || Error::setting("unit", format!("{} is larger than can be addressed", unit.name));
        let host_bytes = extents.last().map_or(0, |extent| extent.at.saturating_add(extent.len));
        if host_bytes > MOST {
            return Err(too_large());
        }
        let (mut copies, mut casts, mut tensors) = (Vec::<CopyRange>::new(), Vec::new(), Vec::new());
        let (mut stored, mut device_bytes, mut disk_bytes) = (Vec::new(), 0usize, 0usize);
        for (arrival, input, entry) in inputs {
            let dtype = if let ArrivalOp::To(to) = arrival.op { to } else { entry.dtype };
            let at = device_bytes;
            let elements = entry.bytes / entry.dtype.size();
            device_bytes = (elements.checked_mul(dtype.size()))
                .and_then(|bytes| at.checked_add(bytes)?.checked_next_multiple_of(DEVICE_ALIGN))
                .filter(|&bytes| bytes <= MOST)
                .ok_or_else(too_large)?;
            if elements > 0 {
                let from = host_position(&extents, entry);
                if dtype == entry.dtype {
                    match copies.last_mut() {
                        Some(last) if last.from + last.bytes == from && last.to + last.bytes == at => {
                            last.bytes += entry.bytes
                        }
                        _ => copies.push(CopyRange { from, to: at, bytes: entry.bytes }),
                    }
                } else {
                    casts.push(Cast { from, to: at, elements, from_type: entry.dtype, to_type: dtype });
                }
            }
            let record = (entry.file, entry.end(), input.to_owned());
            if entry.bytes > 0 && stored.last() != Some(&record) {
                disk_bytes += entry.bytes;
                stored.push(record);
            }
            tensors.push(Placed { name: arrival.output.clone(), at, dtype, shape: entry.shape.clone() });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::setting("unit", format!("{} has two tensors named {}", unit.name, pair[0].name)));
        }
        let read = |extent: &Extent| extent.len.min((checkpoint.length(extent.file) - extent.offset) as usize);
        let read_bytes = extents.iter().map(read).sum();
        let name = unit.name.clone();
        Ok(Self {
            name,
            extents,
            copies,
            casts,
            tensors,
            disk_bytes,
            read_bytes,
            host_bytes,
            device_bytes,
            tier: unit.tier,
            resident_at: 0,
            stored,
        })
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

/// Cuts tensors (sorted by place) into extents: page-aligned outward, merged where they touch or nearly do.
fn lay_out_extents<'a>(entries: impl Iterator<Item = &'a TensorEntry>) -> Vec<Extent> {
    let page = PAGE as u64;
    let mut extents = Vec::<Extent>::new();
    for entry in entries.filter(|entry| entry.bytes > 0) {
        let start = entry.offset / page * page;
        match extents.last_mut() {
            Some(last) if last.file == entry.file && start <= last.offset + last.len as u64 + MAX_GAP => {
                last.end = last.end.max(entry.end());
                last.len = (last.end.next_multiple_of(page) - last.offset) as usize;
            }
            last => {
                let at = last.map_or(0, |last| last.at.saturating_add(last.len));
                let len = (entry.end().next_multiple_of(page) - start) as usize;
                extents.push(Extent { file: entry.file, offset: start, len, end: entry.end(), at });
            }
        }
    }
    extents
}

fn host_position(extents: &[Extent], entry: &TensorEntry) -> usize {
    let after = extents.partition_point(|extent| (extent.file, extent.offset) <= (entry.file, entry.offset));
    let extent = &extents[after - 1];
    extent.at + (entry.offset - extent.offset) as usize
}

/// What a stage needs to know: its slots, how many units it hands over at once.
#[derive(Clone, Debug)]
pub(crate) struct StagePlan {
    pub(crate) slots: usize,
    pub(crate) slot_bytes: usize,
    pub(crate) batch: usize,
}

impl StagePlan {
    pub(crate) fn bytes(&self) -> usize {
        self.slots.saturating_mul(self.slot_bytes)
    }
}

/// The whole plan: units, and the stages that are not skipped.
///
/// With both host stages skipped the reader fills one hidden pinned slot, from which the transfer copies.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) units: Vec<UnitPlan>,
    pub(crate) ram: Option<StagePlan>,
    pub(crate) pinned: Option<StagePlan>,
    pub(crate) gpu: StagePlan,
    pub(crate) residents: Residents,
    /// Bytes of one staging block for casts; 0 if no unit has any.
    pub(crate) staging_bytes: usize,
}

/// Bytes of the units that live in each of these tiers, and how many units these are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Residents {
    pub(crate) ram: usize,
    pub(crate) pinned: usize,
    pub(crate) gpu: usize,
    pub(crate) count: usize,
}

/// Largest piece of a tensor that is converted at once (bytes, before conversion).
const STAGING: usize = 8 << 20;

/// Which of the two host stages there are, the RAM slots and the pinned slots, with rings of `n_gpu`, `n_cpu_pinned` and `n_cpu`.
/// Units that live in RAM need the pin stage, and that a RAM slot for the others. Where both stages are skipped a hidden pinned
/// slot remains.
fn host_stages([_, n_cpu_pinned, n_cpu]: [usize; 3], some_live_in_ram: bool) -> [bool; 2] {
    [n_cpu > 0 || (some_live_in_ram && n_cpu_pinned > 0), n_cpu_pinned > 0 || n_cpu == 0]
}

/// Bytes of one of the two staging blocks that these units need.
pub(crate) fn staging_bytes(units: &[UnitPlan]) -> usize {
    let pieces = units.iter().flat_map(|unit| &unit.casts).map(|t| t.elements * t.from_type.size());
    pieces.max().unwrap_or(0).min(STAGING).next_multiple_of(DEVICE_ALIGN)
}

impl Plan {
    /// Plans a stream of `units` of `checkpoint` to `device`. Nothing is reserved or read.
    ///
    /// # Errors
    /// As [`Plan::new`], and the device's own.
    pub fn on<D: Device>(device: &D, checkpoint: &Checkpoint, units: &[Unit], settings: &Settings) -> Result<Self> {
        Self::make(checkpoint, units, settings, device.memory_is_ram())
    }

    /// The same for any device whose memory is there as soon as it is reserved, as a GPU's is, or lent memory.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings or units that cannot work, [`Error::Checkpoint`] for a tensor that is not there.
    pub fn new(checkpoint: &Checkpoint, units: &[Unit], settings: &Settings) -> Result<Self> {
        Self::make(checkpoint, units, settings, false)
    }

    fn make(checkpoint: &Checkpoint, units: &[Unit], settings: &Settings, in_ram: bool) -> Result<Self> {
        settings.validate()?;
        if units.is_empty() {
            return Err(Error::setting("units", "there must be at least one"));
        }
        let mut units = units.iter().map(|unit| UnitPlan::new(checkpoint, unit)).collect::<Result<Vec<_>>>()?;
        let mut residents = Residents::default();
        for unit in &mut units {
            let (place, bytes, align) = match unit.tier {
                Tier::Disk => continue,
                Tier::Ram => (&mut residents.ram, unit.host_bytes, PAGE),
                Tier::Pinned => (&mut residents.pinned, unit.host_bytes, PAGE),
                Tier::Gpu => (&mut residents.gpu, unit.device_bytes, DEVICE_ALIGN),
            };
            unit.resident_at = *place;
            let end = place.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(align));
            *place = end
                .filter(|&end| end <= MOST)
                .ok_or_else(|| Error::setting("tier", "more lives there than can be addressed"))?;
            residents.count += 1;
        }
        let staging_bytes = staging_bytes(&units);
        Ok(Self::staged(units, residents, staging_bytes, in_ram, settings))
    }

    /// Adds the stages.
    fn staged(
        units: Vec<UnitPlan>,
        residents: Residents,
        staging_bytes: usize,
        in_ram: bool,
        settings: &Settings,
    ) -> Self {
        let stage = |n: usize, batch: usize, slot_bytes: usize| StagePlan {
            slots: n + 1,
            slot_bytes: slot_bytes.next_multiple_of(PAGE).max(PAGE),
            batch: batch.max(1),
        };
        // Slots are for the units that pass through them.
        let most = |bytes: fn(&UnitPlan) -> usize, tiers: &[Tier]| {
            units.iter().filter(|unit| tiers.contains(&unit.tier)).map(bytes).max().unwrap_or(0)
        };
        let host_bytes = most(|unit| unit.host_bytes, &[Tier::Disk, Tier::Gpu]);
        let pinned_bytes = most(|unit| unit.host_bytes, &[Tier::Disk, Tier::Gpu, Tier::Ram]);
        let passing = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu];
        let device_bytes = most(|unit| unit.device_bytes, if in_ram { &passing } else { &passing[..3] });
        let [ram, pinned] = host_stages([settings.n_gpu, settings.n_cpu_pinned, settings.n_cpu], residents.ram > 0);
        Self {
            ram: ram.then(|| stage(settings.n_cpu, settings.batch_cpu, host_bytes)),
            pinned: pinned.then(|| stage(settings.n_cpu_pinned, settings.batch_cpu_pinned, pinned_bytes)),
            gpu: stage(settings.n_gpu, settings.batch_gpu, device_bytes),
            residents,
            staging_bytes,
            units,
        }
    }

    /// How many units a pass has.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Bytes of tensors that one pass brings to the device, as stored.
    pub fn bytes_per_pass(&self) -> usize {
        self.units.iter().map(|unit| unit.disk_bytes).fold(0, usize::saturating_add)
    }

    /// Bytes of slots and kept units in RAM, in pinned RAM and on the device.
    pub fn slot_memory(&self) -> [usize; 3] {
        let slots = |stage: &Option<StagePlan>| stage.as_ref().map_or(0, StagePlan::bytes);
        let Residents { ram, pinned, gpu, .. } = self.residents;
        [
            slots(&self.ram).saturating_add(ram),
            slots(&self.pinned).saturating_add(pinned),
            self.gpu.bytes().saturating_add(gpu),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{AsRawFd, FromRawFd},
        path::PathBuf,
    };

    use super::*;
    use crate::checkpoint::StoredTensor;

    /// A file in memory that takes no room whatever its length, and its path.
    pub(in crate::plan) fn hole() -> (File, PathBuf) {
        // SAFETY: a name that ends with its zero; the descriptor is nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"hole".as_ptr(), libc::MFD_CLOEXEC)) };
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (file, path)
    }

    #[test]
    fn sums_that_no_number_holds_are_the_largest_there_is() {
        let (hole, file) = hole();
        hole.set_len(1 << 62).unwrap();
        let tensor = StoredTensor { name: "t".into(), file, offset: 0, dtype: DType::U8, shape: vec![1 << 62] };
        let checkpoint = Checkpoint::from_table([tensor]).unwrap();
        let mut unit = Unit::new("unit");
        unit.keep("t", "t");
        let units = vec![unit; 5];
        let plan = Plan::new(&checkpoint, &units, &Settings::default()).unwrap();
        let forecast = plan.forecast(Bandwidths::default());
        assert_eq!([plan.bytes_per_pass(), forecast.disk_bytes, forecast.copy_bytes], [usize::MAX; 3]);
        let budget = Budget { device_bytes: None, host_bytes: usize::MAX };
        let refused = budget.plan(&checkpoint, &units, FixedOverhead::default(), Bandwidths::default()).unwrap_err();
        assert!(refused.to_string().contains("larger together than can be addressed"), "{refused}");
    }

    #[test]
    fn a_tensor_counts_once_also_where_another_has_its_bytes() {
        let (hole, file) = hole();
        hole.set_len(4000).unwrap();
        let tensor = StoredTensor { name: "w".into(), file, offset: 0, dtype: DType::U8, shape: vec![4, 1000] };
        let (checkpoint, rows) = Checkpoint::from_table([tensor]).unwrap().with_rows("w", 4).unwrap();
        let mut unit = Unit::new("unit");
        unit.keep("a", "w").keep("b", &rows[0]).keep("c", "w");
        let plan = UnitPlan::new(&checkpoint, &unit).unwrap();
        assert_eq!((plan.disk_bytes, plan.read_bytes), (8000, 4000));
    }

    #[test]
    fn a_read_that_begins_before_its_tensor_is_still_called_by_it() {
        let folder = tempfile::tempdir().unwrap();
        let stored = |name: &str, file: &str, offset: u64, count: usize| {
            let file = folder.path().join(file);
            std::fs::write(&file, vec![0; 500_000]).unwrap();
            StoredTensor { name: name.into(), file, offset, dtype: DType::U8, shape: vec![count] }
        };
        let table = [stored("first", "a", 10, 100), stored("empty", "b", 5, 0), stored("second", "b", 200_100, 9_000)];
        let checkpoint = Checkpoint::from_table(table).unwrap();
        let mut unit = Unit::new("unit");
        ["first", "empty", "second"].iter().for_each(|name| _ = unit.keep(*name, *name));
        let plan = UnitPlan::new(&checkpoint, &unit).unwrap();
        let extent = plan.extents.last().unwrap();
        assert!(extent.offset < 200_100);
        assert_eq!(plan.tensor_at(extent.file, extent.offset), "second");
        assert_eq!(plan.tensor_at(plan.extents[0].file, 0), "first");
    }
}
