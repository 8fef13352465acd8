//! The plan: what every stage does, worked out once, before anything is reserved.
//!
//! A stage never computes where bytes go. It walks its program, a list of [`Step`]s, round and round, and looks up the unit's
//! [`UnitPlan`]: which extents to read into a host slot, which ranges to copy to the device, which tensors arrive changed.

use std::fmt;

use crate::{
    arena::PAGE,
    checkpoint::{Checkpoint, Entry},
    dtype::DType,
    error::{Error, Result},
};

/// Every tensor starts on such a boundary in device memory (bytes), as kernels with 16-byte accesses and cuBLAS like it.
pub const DEVICE_ALIGN: usize = 256;

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
    home: Home,
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

    /// Says where the unit lives between passes.
    pub fn home(&mut self, home: Home) -> &mut Self {
        self.home = home;
        self
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

/// Where a unit lives between passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Home {
    /// On disk: read in every pass.
    #[default]
    Disk,
}

/// Who reads from disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reader {
    /// The first of the others that the system allows.
    #[default]
    Auto,
    /// io_uring with registered buffers, which must fit in RLIMIT_MEMLOCK.
    UringFixed,
    /// io_uring without them.
    Uring,
    /// A few threads in `pread`.
    Pread,
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::UringFixed => "io_uring with registered buffers",
            Self::Uring => "io_uring",
            Self::Pread => "pread threads",
        })
    }
}

/// Whether reads go past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// What the page cache holds is taken from there, everything else is read past it (needs cachestat(2), Linux 6.5; without
    /// it as [`CachePolicy::Direct`]).
    #[default]
    Auto,
    /// Past the page cache where the file system allows it.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// How deep the pipeline is. The names are those of `llm-layer-prefetch`.
///
/// A stage that buffers `n` units owns `n + 1` slots, the extra one being what its consumer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Units buffered ahead on the device, at least 1; also how many layers a host may hold at once.
    pub n_gpu: usize,
    /// Units buffered in pinned (registered) RAM; 0 skips the stage.
    pub n_cpu_pinned: usize,
    /// Units buffered in pageable RAM; 0 skips the stage.
    pub n_cpu: usize,
    /// Units handed over at once from the device's buffer to the layer function; 0 means one by one; at most `n_gpu`.
    pub batch_gpu: usize,
    /// The same from pinned RAM to the transfer; at most `n_cpu_pinned`.
    pub batch_cpu_pinned: usize,
    /// The same from pageable RAM to its consumer; at most `n_cpu`.
    pub batch_cpu: usize,
    /// Who reads.
    pub reader: Reader,
    /// How the page cache is used.
    pub cache: CachePolicy,
}

impl Default for Settings {
    /// Two units ahead on the device and four in pinned RAM, which the disk fills directly.
    fn default() -> Self {
        Self {
            n_gpu: 2,
            n_cpu_pinned: 4,
            n_cpu: 0,
            batch_gpu: 0,
            batch_cpu_pinned: 0,
            batch_cpu: 0,
            reader: Reader::Auto,
            cache: CachePolicy::Auto,
        }
    }
}

impl Settings {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first one out of range.
    pub fn validate(&self) -> Result<()> {
        if self.n_gpu == 0 {
            return Err(Error::setting("n_gpu", "must be at least 1: the layer function needs a unit on the device"));
        }
        for (name, n_name, batch, n) in [
            ("batch_gpu", "n_gpu", self.batch_gpu, self.n_gpu),
            ("batch_cpu_pinned", "n_cpu_pinned", self.batch_cpu_pinned, self.n_cpu_pinned),
            ("batch_cpu", "n_cpu", self.batch_cpu, self.n_cpu),
        ] {
            if batch > n {
                let cause = format!("a batch of {batch} never fills a buffer of {n_name} = {n}; use at most {n}");
                return Err(Error::setting(name, cause));
            }
        }
        for (name, n) in [("n_gpu", self.n_gpu), ("n_cpu_pinned", self.n_cpu_pinned), ("n_cpu", self.n_cpu)] {
            if n > MAX_SLOTS {
                return Err(Error::setting(name, format!("is {n}, more than the {MAX_SLOTS} that a stage can hold")));
            }
        }
        Ok(())
    }
}

/// Far above any use; keeps arithmetic on slots small.
const MAX_SLOTS: usize = 1 << 16;

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
pub(crate) struct Transform {
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
    pub(crate) transforms: Vec<Transform>,
    /// Sorted by name.
    pub(crate) tensors: Vec<Placed>,
    /// What the tensors take in their files, where each counts once.
    pub(crate) disk_bytes: usize,
    pub(crate) host_bytes: usize,
    pub(crate) device_bytes: usize,
    /// For messages: (file, first byte, name) of each stored tensor, sorted.
    stored: Vec<(usize, u64, String)>,
}

impl UnitPlan {
    pub(crate) fn new(checkpoint: &Checkpoint, unit: &Unit) -> Result<Self> {
        let mut inputs = Vec::<(&Arrival, &str, &Entry)>::with_capacity(unit.arrivals.len());
        for arrival in &unit.arrivals {
            let [input] = arrival.inputs.as_slice() else {
                let (output, op, given) = (&arrival.output, arrival.op, arrival.inputs.len());
                let cause =
                    format!("{}: {output} is made by {op:?}, which takes one stored tensor, not {given}", unit.name);
                return Err(Error::setting("unit", cause));
            };
            let entry = checkpoint.entry(input)?;
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
        // By size too: a tensor without elements must not come between two uses of the one that starts where it does.
        inputs.sort_by_key(|(_, _, entry)| (entry.file, entry.offset, entry.bytes));
        let extents = lay_out_extents(inputs.iter().map(|(_, _, entry)| *entry));

        let (mut copies, mut transforms, mut tensors) = (Vec::<CopyRange>::new(), Vec::new(), Vec::new());
        let (mut stored, mut device_bytes, mut disk_bytes) = (Vec::new(), 0usize, 0usize);
        for (arrival, input, entry) in inputs {
            let dtype = if let ArrivalOp::To(to) = arrival.op { to } else { entry.dtype };
            let at = device_bytes;
            let elements = entry.bytes / entry.dtype.size();
            device_bytes = (elements.checked_mul(dtype.size()))
                .and_then(|bytes| at.checked_add(bytes)?.checked_next_multiple_of(DEVICE_ALIGN))
                .ok_or_else(|| Error::setting("unit", format!("{} is larger than can be addressed", unit.name)))?;
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
                    transforms.push(Transform { from, to: at, elements, from_type: entry.dtype, to_type: dtype });
                }
            }
            let record = (entry.file, entry.offset, input.to_owned());
            if stored.last() != Some(&record) {
                disk_bytes += entry.bytes;
                stored.push(record);
            }
            tensors.push(Placed { name: arrival.output.clone(), at, dtype, shape: entry.shape.clone() });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::setting("unit", format!("{} has two tensors named {}", unit.name, pair[0].name)));
        }
        let host_bytes = extents.last().map_or(0, |extent| extent.at + extent.len);
        let name = unit.name.clone();
        Ok(Self { name, extents, copies, transforms, tensors, disk_bytes, host_bytes, device_bytes, stored })
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

    /// The stored tensor that byte `offset` of file `file` belongs to, or the nearest before it.
    pub(crate) fn tensor_at(&self, file: usize, offset: u64) -> &str {
        let after = self.stored.partition_point(|(f, start, _)| (*f, *start) <= (file, offset));
        self.stored[after.saturating_sub(1)..].first().map_or("", |(_, _, name)| name)
    }
}

/// Cuts tensors (sorted by place) into extents: page-aligned outward, merged where they touch or nearly do.
fn lay_out_extents<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Extent> {
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
                let at = last.map_or(0, |last| last.at + last.len);
                let len = (entry.end().next_multiple_of(page) - start) as usize;
                extents.push(Extent { file: entry.file, offset: start, len, end: entry.end(), at });
            }
        }
    }
    extents
}

fn host_position(extents: &[Extent], entry: &Entry) -> usize {
    let after = extents.partition_point(|extent| (extent.file, extent.offset) <= (entry.file, entry.offset));
    let extent = &extents[after - 1];
    extent.at + (entry.offset - extent.offset) as usize
}

/// Where a stage finds a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The stage before hands it over (for the reader: the disk).
    Upstream,
}

/// One entry of a stage's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) unit: usize,
    pub(crate) source: Source,
    /// The last step of a pass: batches are cut short here.
    pub(crate) ends_pass: bool,
}

/// What a stage needs to know: its program, its slots, how many units it hands over at once.
#[derive(Clone, Debug)]
pub(crate) struct StagePlan {
    pub(crate) program: Vec<Step>,
    pub(crate) slots: usize,
    pub(crate) slot_bytes: usize,
    pub(crate) batch: usize,
}

impl StagePlan {
    pub(crate) fn bytes(&self) -> usize {
        self.slots * self.slot_bytes
    }
}

/// The whole plan: units, and one program for each stage that is not skipped.
///
/// With both host stages skipped the reader fills one hidden pinned slot, from which the transfer copies.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) units: Vec<UnitPlan>,
    pub(crate) ram: Option<StagePlan>,
    pub(crate) pinned: Option<StagePlan>,
    pub(crate) gpu: StagePlan,
    /// Bytes of one staging block for transforms; 0 if no unit has any.
    pub(crate) staging_bytes: usize,
}

/// Largest piece of a tensor that is converted at once (bytes, before conversion).
const STAGING: usize = 8 << 20;

impl Plan {
    /// Plans a stream of `units` of `checkpoint`. Nothing is reserved or read.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings or units that cannot work, [`Error::Checkpoint`] for a tensor that is not there.
    pub fn new(checkpoint: &Checkpoint, units: &[Unit], settings: &Settings) -> Result<Self> {
        settings.validate()?;
        if units.is_empty() {
            return Err(Error::setting("units", "there must be at least one"));
        }
        let program: Vec<_> = (units.iter().enumerate())
            .map(|(unit, given)| {
                let source = match given.home {
                    Home::Disk => Source::Upstream,
                };
                Step { unit, source, ends_pass: unit + 1 == units.len() }
            })
            .collect();
        let units = units.iter().map(|unit| UnitPlan::new(checkpoint, unit)).collect::<Result<Vec<_>>>()?;
        let stage = |n: usize, batch: usize, slot_bytes: usize, page: usize| StagePlan {
            program: program.clone(),
            slots: n + 1,
            slot_bytes: slot_bytes.next_multiple_of(page).max(page),
            batch: batch.max(1),
        };
        let host_bytes = units.iter().map(|unit| unit.host_bytes).max().unwrap_or(0);
        let device_bytes = units.iter().map(|unit| unit.device_bytes).max().unwrap_or(0);
        let staging = units.iter().flat_map(|unit| &unit.transforms).map(|t| t.elements * t.from_type.size()).max();
        let both_skipped = settings.n_cpu == 0 && settings.n_cpu_pinned == 0;
        Ok(Self {
            ram: (settings.n_cpu > 0).then(|| stage(settings.n_cpu, settings.batch_cpu, host_bytes, PAGE)),
            pinned: (settings.n_cpu_pinned > 0 || both_skipped)
                .then(|| stage(settings.n_cpu_pinned, settings.batch_cpu_pinned, host_bytes, PAGE)),
            gpu: stage(settings.n_gpu, settings.batch_gpu, device_bytes, PAGE),
            staging_bytes: staging.unwrap_or(0).min(STAGING).next_multiple_of(DEVICE_ALIGN),
            units,
        })
    }

    /// How many units a pass has.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Bytes of tensors that one pass brings to the device, as stored.
    pub fn bytes_per_pass(&self) -> usize {
        self.units.iter().map(|unit| unit.disk_bytes).sum()
    }

    /// What the streamer will reserve: a description and bytes of each part.
    pub fn memory(&self) -> Vec<(String, usize)> {
        let stages =
            [("RAM slots", self.ram.as_ref()), ("pinned slots", self.pinned.as_ref()), ("GPU slots", Some(&self.gpu))];
        let mut rows: Vec<_> = (stages.into_iter())
            .filter_map(|(what, stage)| stage.map(|stage| (format!("{} {what}", stage.slots), stage.bytes())))
            .collect();
        if self.staging_bytes > 0 {
            rows.push(("2 staging blocks".into(), 2 * self.staging_bytes));
        }
        rows
    }
}
