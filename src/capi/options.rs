//! What a streamer is opened with, and what it tells of itself.

use std::{
    ffi::{c_char, c_void},
    fmt, mem,
    path::{Path, PathBuf},
    ptr::{self, NonNull},
    sync::Arc,
};

use super::{
    callbacks::{Callback, Log, Reporter, ls_log_fn, ls_progress_fn},
    checkpoint::{CHECKPOINTS, ls_checkpoint},
    ffi::{Failure, Grows, Result, ffi, list, ls_status, path, place, read_options, text, write_options, write_sized},
    traced::Traced,
    units::{NamedUnit, ls_unit},
};
use crate::{
    checkpoint::Checkpoint,
    layout::Space,
    pipeline::LentMemory,
    plan::{CachePolicy, Pack, Plan, Reader, Settings, Sharing, Tier, Unit},
    trace::{Observer, Stats},
};

/// Where a unit is kept between passes.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_tier {
    /// On disk: read in every pass.
    LS_TIER_DISK = 0,
    /// In pageable RAM: read once.
    LS_TIER_RAM = 1,
    /// In pinned RAM: read once.
    LS_TIER_PINNED = 2,
    /// On the device: read and transferred once.
    LS_TIER_GPU = 3,
    /// On the device, with packed and quantised tensors as they are stored: read and transferred once, unpacked in every pass.
    LS_TIER_GPU_PACKED = 4,
    /// In pinned RAM, packed there while the first passes go by.
    LS_TIER_PINNED_PACKED = 5,
}

/// Who reads from disk.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_reader {
    /// The first of the others that the system allows.
    LS_READER_AUTO = 0,
    /// io_uring with registered buffers.
    LS_READER_URING_FIXED = 1,
    /// io_uring without them.
    LS_READER_URING = 2,
    /// A few threads in pread.
    LS_READER_PREAD = 3,
}

/// Whether reads go past the page cache.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_cache {
    /// What the page cache holds is taken from there, everything else is read past it. On the CPU a whole unit that it holds, and that
    /// is kept and used as it is stored, is used there, by a mapping, in memory that must not be written: whoever cuts such a file
    /// short meanwhile, or a disk that fails, ends the process (SIGBUS).
    LS_CACHE_AUTO = 0,
    /// Past the page cache where the file system allows it.
    LS_CACHE_DIRECT = 1,
    /// Through the page cache.
    LS_CACHE_BUFFERED = 2,
}

/// Whether a budget may have units that are stored plain packed where they are kept in pinned RAM.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_pack {
    /// A model's layers, where passes are expected to be faster for it. A streamer's units are not.
    LS_PACK_AUTO = 0,
    /// They are kept as they are stored.
    LS_PACK_NEVER = 1,
    /// All of them are packed.
    LS_PACK_ALWAYS = 2,
}

/// What a streamer is opened with. Fill it with ls_streamer_options_init, then change what should differ.
///
/// A stage that buffers n units owns n + 1 slots of the largest unit's size, the extra one being what its consumer holds.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_streamer_options {
    /// sizeof(ls_streamer_options), by which the library knows the caller's version of it.
    pub size: usize,
    /// Units buffered ahead on the device, at least 1; also how many layers may be held at once.
    pub n_gpu: usize,
    /// Units buffered in pinned RAM; 0 skips the stage.
    pub n_cpu_pinned: usize,
    /// Units buffered in pageable RAM; 0 skips the stage.
    pub n_cpu: usize,
    /// Units handed over at once from the device's buffer; 0 means one by one; at most n_gpu.
    pub batch_gpu: usize,
    /// The same from pinned RAM; at most n_cpu_pinned.
    pub batch_cpu_pinned: usize,
    /// The same from pageable RAM; at most n_cpu.
    pub batch_cpu: usize,
    /// An ls_reader.
    pub reader: i32,
    /// An ls_cache.
    pub cache: i32,
    /// The units. NULL: one per layer of the checkpoint, "model.layers.N" or whatever its
    /// decoder's layers are called, of all tensors under that, named by what follows it.
    pub units: *const ls_unit,
    /// How many units.
    pub unit_count: usize,
    /// Where units are kept between passes, as in "0-7=pinned,8-11=gpu,12=ram", by their numbers from 0; the others, and all if it
    /// is NULL, are kept where their `tier` says, or stay on disk.
    pub tiers: *const c_char,
    /// May be NULL.
    pub progress: ls_progress_fn,
    /// What `progress` is given.
    pub progress_user: *mut c_void,
    /// May be NULL.
    pub log: ls_log_fn,
    /// What `log` is given.
    pub log_user: *mut c_void,
    /// Memory of the caller's for slots and kept units in pageable RAM, as much as ls_streamer_memory says or more, on a boundary
    /// of 4096 bytes; NULL: the library's own. What is lent is the streamer's until that is closed (for good if
    /// the close says LS_LEAKED). It should be present: first touch is slower than a disk.
    pub ram_memory: *mut c_void,
    /// Its length in bytes.
    pub ram_bytes: usize,
    /// The same for pinned RAM. With CUDA the caller has pinned it (cudaHostAlloc, cudaHostRegister).
    pub pinned_memory: *mut c_void,
    /// Its length in bytes.
    pub pinned_bytes: usize,
    /// The same on the device, on a boundary of 256 bytes.
    pub gpu_memory: *mut c_void,
    /// Its length in bytes.
    pub gpu_bytes: usize,
    /// How much RAM may be used, in bytes: the library then chooses the numbers above and where units are kept, so that a pass
    /// takes the least time; `tiers` and the memory above are left NULL. SIZE_MAX: what is free, less a reserve; 0: no budget.
    /// LS_TOO_LITTLE if it is less than the least that will do. What comes of it is asked by ls_streamer_plan. To a streamer it is for its slots and
    /// units alone: leave out what you load or allocate besides, and expect to hold one layer at a time (n_gpu 1). To a model
    /// it is for everything.
    pub host_budget: usize,
    /// The same of a GPU's own memory; 0 or SIZE_MAX: what is free there, less a reserve. Of a device that computes in RAM: 0.
    pub device_budget: usize,
    /// A file for a picture of what every stage did and waited for: FILE.html opens in any browser, FILE.json in Perfetto. NULL:
    /// none. The open fails with LS_INVALID or LS_IO where the file cannot be written; the close writes it, in one piece, and
    /// returns LS_IO if that fails, with everything closed all the same. What is recorded takes some 9 MB of RAM, beside the
    /// budget; where a run is so long that this is full, the oldest events make way.
    pub trace: *const c_char,
    /// An ls_pack, in a whole word; other than LS_PACK_AUTO only with a budget.
    pub pack: u64,
}

// SAFETY: `repr(C)`, the size first, words and pointers that may be NULL; two i32 in a row are as long as a word.
unsafe impl Grows for ls_streamer_options {
    const FIRST: usize = mem::offset_of!(ls_streamer_options, device_budget) + size_of::<usize>();
}

/// What a streamer takes. Set `size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_memory {
    /// sizeof(ls_memory).
    pub size: usize,
    /// Bytes of slots and kept units in pageable RAM.
    pub ram: usize,
    /// The same in pinned RAM.
    pub pinned: usize,
    /// The same on the device.
    pub gpu: usize,
    /// Bytes on the device that cannot be lent: blocks for tensors that are converted on arrival.
    pub staging: usize,
}

// SAFETY: `repr(C)`, all fields words, the first of them the size.
unsafe impl Grows for ls_memory {
    const FIRST: usize = mem::offset_of!(ls_memory, staging) + size_of::<usize>();
}

/// What a streamer with these options needs of memory that is lent to it; nothing is reserved or read. `options` may be NULL:
/// the defaults. Set `memory->size` to sizeof(ls_memory) before. Device memory that a streamer reserves itself on the CPU may
/// have slots for layers that are kept there too, until the memory they are kept in is present: n_gpu + 1 of the largest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_memory(
    checkpoint: ls_checkpoint,
    options: *const ls_streamer_options,
    memory: *mut ls_memory,
) -> ls_status {
    ffi(|| {
        let to = place(memory, "memory")?;
        // SAFETY: the caller says that options lie there, if it is not NULL.
        let chosen = unsafe { StreamOptions::read(options)? };
        if chosen.budgets != [0; 2] {
            return Err(Failure::invalid("host_budget", "is for memory of the library's own: leave it 0"));
        }
        let checkpoint = CHECKPOINTS.enter(checkpoint.id)?.checkpoint.clone();
        let units = chosen.units(&checkpoint)?;
        let layout = Plan::new(&checkpoint, &units, &chosen.settings, Sharing::Own)?.layout;
        let [ram, pinned, gpu] = layout.spaces().map(Space::bytes);
        let staging = layout.staging.bytes();
        let memory = ls_memory { size: size_of::<ls_memory>(), ram, pinned, gpu, staging };
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { write_sized(to, "memory", memory) }
    })
}

/// Counts of one stage since the streamer was opened.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_stage_stats {
    /// Whole units handed on.
    pub units: u64,
    /// Bytes moved; for compute, the bytes of the units it was given.
    pub bytes: u64,
    /// Nanoseconds at work.
    pub busy_ns: u64,
    /// Nanoseconds waiting for the stage before.
    pub starved_ns: u64,
    /// Nanoseconds waiting for the stage after.
    pub blocked_ns: u64,
}

/// Counts since the streamer was opened. Set `size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_stats {
    /// sizeof(ls_stats).
    pub size: usize,
    /// Disk to the first host slot.
    pub read: ls_stage_stats,
    /// Pageable RAM to pinned RAM.
    pub pin: ls_stage_stats,
    /// Host to device.
    pub transfer: ls_stage_stats,
    /// Whatever the caller does from taking a layer to releasing it.
    pub compute: ls_stage_stats,
    /// Bytes read past the page cache.
    pub direct_bytes: u64,
    /// Bytes read through the page cache.
    pub buffered_bytes: u64,
    /// The ls_reader that reads.
    pub reader: u64,
    /// Bytes of tensors used where the page cache has them, pass after pass.
    pub mapped_bytes: u64,
}

// SAFETY: `repr(C)`, the size first, then counts that fill whole words.
unsafe impl Grows for ls_stats {
    const FIRST: usize = mem::offset_of!(ls_stats, reader) + size_of::<u64>();
}

/// Fills `options`, which is `size` bytes long (sizeof(ls_streamer_options)), with the defaults: two units ahead on the device
/// and four in pinned RAM, which the disk fills directly; one unit per layer, all on disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_options_init(options: *mut ls_streamer_options, size: usize) -> ls_status {
    // SAFETY: the caller says that so many bytes may be written.
    ffi(|| unsafe { write_options(options, size, "options", defaults()) })
}

fn defaults() -> ls_streamer_options {
    let settings = Settings::default();
    ls_streamer_options {
        size: size_of::<ls_streamer_options>(),
        n_gpu: settings.n_gpu,
        n_cpu_pinned: settings.n_cpu_pinned,
        n_cpu: settings.n_cpu,
        batch_gpu: settings.batch_gpu,
        batch_cpu_pinned: settings.batch_cpu_pinned,
        batch_cpu: settings.batch_cpu,
        reader: ls_reader::LS_READER_AUTO as i32,
        cache: ls_cache::LS_CACHE_AUTO as i32,
        units: ptr::null(),
        unit_count: 0,
        tiers: ptr::null(),
        progress: None,
        progress_user: ptr::null_mut(),
        log: None,
        log_user: ptr::null_mut(),
        ram_memory: ptr::null_mut(),
        ram_bytes: 0,
        pinned_memory: ptr::null_mut(),
        pinned_bytes: 0,
        gpu_memory: ptr::null_mut(),
        gpu_bytes: 0,
        host_budget: 0,
        device_budget: 0,
        trace: ptr::null(),
        pack: ls_pack::LS_PACK_AUTO as u64,
    }
}

type ObserverList = Vec<Arc<dyn Observer>>;

/// What the options say, in Rust's terms.
pub(super) struct StreamOptions {
    pub(super) settings: Settings,
    /// The caller's own units.
    units: Option<Vec<NamedUnit>>,
    pub(super) tiers: Option<String>,
    /// Of RAM and of the device's own memory; 0: none given.
    pub(super) budgets: [usize; 2],
    pub(super) pack: Pack,
    pub(super) progress: Option<Reporter>,
    pub(super) log: Option<Arc<Log>>,
    /// Where a trace is to be.
    trace: Option<PathBuf>,
    pub(super) lent: LentMemory,
}

impl StreamOptions {
    /// NULL stands for the defaults.
    ///
    /// # Safety
    /// `options` is NULL or points to what the header says.
    pub(super) unsafe fn read(options: *const ls_streamer_options) -> Result<Self> {
        if options.is_null() {
            return Ok(Self::default());
        }
        // SAFETY: the caller promised options of the size that they say.
        let options = unsafe { read_options(options, "options", defaults())? };
        // SAFETY: the caller promised that units and tiers are NULL or what the header says.
        let (units, tiers) = unsafe {
            let units = match NonNull::new(options.units.cast_mut()) {
                None if options.unit_count > 0 => return Err(Failure::new(ls_status::LS_NULL, "units is NULL")),
                None => None,
                Some(units) => Some(list(units.as_ptr(), options.unit_count, "units")?),
            };
            let units = units.map(|units| units.iter().map(|unit| unit.read()).collect::<Result<_>>()).transpose()?;
            let tiers = if options.tiers.is_null() { None } else { Some(text(options.tiers, "tiers")?.to_owned()) };
            (units, tiers)
        };
        let reader = [Reader::Auto, Reader::UringFixed, Reader::Uring, Reader::Pread];
        let cache = [CachePolicy::Auto, CachePolicy::Direct, CachePolicy::Buffered];
        let settings = Settings {
            n_gpu: options.n_gpu,
            n_cpu_pinned: options.n_cpu_pinned,
            n_cpu: options.n_cpu,
            batch_gpu: options.batch_gpu,
            batch_cpu_pinned: options.batch_cpu_pinned,
            batch_cpu: options.batch_cpu,
            reader: choose(options.reader, &reader, "reader")?,
            cache: choose(options.cache, &cache, "cache")?,
        };
        let log = Callback::new(options.log, options.log_user).map(|log| Arc::new(Log(log)));
        let progress = Callback::new(options.progress, options.progress_user);
        let range = |start: *mut c_void, bytes| NonNull::new(start.cast()).map(|start| (start, bytes));
        let lent = LentMemory {
            ram: range(options.ram_memory, options.ram_bytes),
            pinned: range(options.pinned_memory, options.pinned_bytes),
            gpu: range(options.gpu_memory, options.gpu_bytes),
        };
        let budgets = [options.host_budget, options.device_budget];
        let pack = choose(options.pack, &[Pack::Auto, Pack::Never, Pack::Always], "pack")?;
        // SAFETY: the caller says that a path ends there, if it is not NULL.
        let trace = if options.trace.is_null() { None } else { Some(unsafe { path(options.trace, "trace")? }) };
        let trace = trace.map(Path::to_owned);
        Ok(Self { settings, units, tiers, budgets, pack, progress, log, trace, lent })
    }

    /// The options of a call that was given none.
    pub(super) fn default() -> Self {
        Self {
            settings: Settings::default(),
            units: None,
            tiers: None,
            budgets: [0; 2],
            pack: Pack::Auto,
            progress: None,
            log: None,
            trace: None,
            lent: LentMemory::default(),
        }
    }

    /// The units to stream.
    pub(super) fn units(&self, checkpoint: &Checkpoint) -> Result<Vec<Unit>> {
        let mut units = match &self.units {
            Some(units) => NamedUnit::found_in(checkpoint, units)?,
            None => checkpoint.layers()?,
        };
        self.place(&mut units)?;
        Ok(units)
    }

    /// Gives a model's units their tiers.
    pub(super) fn place_model(&self, units: &mut [Unit]) -> Result<()> {
        if self.units.is_some() {
            return Err(Failure::invalid("units", "a model has its own: leave them NULL"));
        }
        if self.lends() {
            return Err(Failure::invalid("memory", "a model brings its own: leave it NULL"));
        }
        self.place(units)
    }

    /// Whether any memory is the caller's.
    pub(super) fn lends(&self) -> bool {
        [self.lent.ram, self.lent.pinned, self.lent.gpu].iter().any(Option::is_some)
    }

    fn place(&self, units: &mut [Unit]) -> Result<()> {
        Ok(Tier::parse(self.tiers.as_deref().unwrap_or(""), units)?)
    }

    /// Who is to see what the streamer does, and the trace among them: to be asked before the long work, since a trace that cannot
    /// be written is refused here.
    pub(super) fn observers(&self) -> Result<(ObserverList, Option<Traced>)> {
        let trace = self.trace.as_deref().map(Traced::create).transpose()?;
        let log = self.log.clone().map(|log| log as Arc<dyn Observer>);
        let timeline = trace.as_ref().map(|trace| trace.timeline.clone() as Arc<dyn Observer>);
        Ok((log.into_iter().chain(timeline).collect(), trace))
    }
}

/// One of the values of an enumeration, by its code.
pub(super) fn choose<T: Copy>(code: impl TryInto<usize> + Copy + fmt::Display, values: &[T], name: &str) -> Result<T> {
    let value = code.try_into().ok().and_then(|code| values.get(code).copied());
    value.ok_or_else(|| Failure::invalid(name, format!("is {code}, expected 0 to {}", values.len() - 1)))
}

/// Writes the counts where the caller wants them.
///
/// # Safety
/// `to` points to what the header says.
pub(super) unsafe fn write_stats(to: NonNull<ls_stats>, stats: &Stats) -> Result<()> {
    let [read, pin, transfer, compute] = stats.stages.map(|stage| ls_stage_stats {
        units: stage.units,
        bytes: stage.bytes,
        busy_ns: stage.busy.as_nanos() as u64,
        starved_ns: stage.starved.as_nanos() as u64,
        blocked_ns: stage.blocked.as_nanos() as u64,
    });
    let Stats { direct_bytes, buffered_bytes, mapped_bytes, .. } = *stats;
    let (size, reader) = (size_of::<ls_stats>(), stats.reader as u64);
    let stats = ls_stats { size, read, pin, transfer, compute, direct_bytes, buffered_bytes, reader, mapped_bytes };
    // SAFETY: the caller says that as many bytes may be written as its size says.
    unsafe { write_sized(to, "stats", stats) }
}
