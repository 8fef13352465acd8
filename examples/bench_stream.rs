//! How close the pipeline comes to the limit of its slowest link, measured in the same run.
//!
//! Disks are uneven from minute to minute, so the pipeline and a raw reader of the same files take turns in short windows.
//! In a window only bytes that were read in it count. Between two windows the pipeline fills its slots, so that the disk is
//! neither idle nor shared: whatever it reads then counts for nobody. Where no layer lives on disk the limit is a plain copy.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use layer_streamer::{
    Checkpoint, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device},
    plan::{CachePolicy, Home, Plan, Reader},
    trace::Stage,
};
use memmap2::MmapMut;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measure how close streaming comes to the disk's own speed, or to a plain copy where nothing is read.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  bench_stream --model /tmp/7b                        disk → RAM → device, beside the disk's own speed
  bench_stream --model /tmp/7b --reader pread         the rung for systems without io_uring
  bench_stream --model /tmp/7b --home 0-7=pinned      nothing from disk: beside a plain copy
  bench_stream --model /tmp/7b --cache buffered       through the page cache

Make a checkpoint with: make_checkpoint /tmp/7b --shape qwen2.5-7b --layers 8")]
struct Options {
    /// Folder with a checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Pairs of windows, one of each kind
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Length of a window in seconds
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// Seconds of reading before the first window, which use up what the disk had saved up
    #[arg(long, default_value_t = 10.0)]
    warm_up: f64,
    /// Who reads
    #[arg(long, default_value = "auto")]
    reader: ReaderName,
    /// Whether reads go past the page cache
    #[arg(long, default_value = "direct")]
    cache: CacheName,
    /// Where layers live between passes, such as 0-7=pinned,8-11=gpu
    #[arg(long, value_name = "LIST", default_value = "")]
    home: String,
    /// Layers buffered ahead on the device
    #[arg(long, default_value_t = 2)]
    n_gpu: usize,
    /// Layers buffered in pinned RAM
    #[arg(long, default_value_t = 2)]
    n_cpu_pinned: usize,
    /// Layers buffered in pageable RAM
    #[arg(long, default_value_t = 0)]
    n_cpu: usize,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReaderName {
    Auto,
    UringFixed,
    Uring,
    Pread,
}

#[derive(Clone, Copy, ValueEnum)]
enum CacheName {
    Auto,
    Direct,
    Buffered,
}

/// Counts what is allocated on the Rust heap.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    if let Err(error) = run(&Options::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

/// Bytes moved, and the time it took.
#[derive(Clone, Copy, Default)]
struct Moved {
    bytes: u64,
    seconds: f64,
}

impl Moved {
    fn rate(self) -> f64 {
        self.bytes as f64 / 1e9 / self.seconds
    }

    fn add(&mut self, other: Moved) {
        self.bytes += other.bytes;
        self.seconds += other.seconds;
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let mut units = checkpoint.layers()?;
    Home::parse(&options.home, &mut units)?;
    let settings = Settings {
        n_gpu: options.n_gpu,
        n_cpu_pinned: options.n_cpu_pinned,
        n_cpu: options.n_cpu,
        reader: match options.reader {
            ReaderName::Auto => Reader::Auto,
            ReaderName::UringFixed => Reader::UringFixed,
            ReaderName::Uring => Reader::Uring,
            ReaderName::Pread => Reader::Pread,
        },
        cache: match options.cache {
            CacheName::Auto => CachePolicy::Auto,
            CacheName::Direct => CachePolicy::Direct,
            CacheName::Buffered => CachePolicy::Buffered,
        },
        ..Settings::default()
    };
    let plan = Plan::new(&checkpoint, &units, &settings)?;
    let slots: usize = plan.memory().iter().map(|(_, bytes)| bytes).sum();
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &settings)?;
    let stream = Cpu.stream()?;

    // Check first: one pass, every tensor compared with a plain read.
    check(&mut streamer, &stream, &units, &checkpoint)?;
    let reads = {
        let before = read_bytes(&streamer);
        (0..3).try_for_each(|_| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())))?;
        settle(&streamer);
        read_bytes(&streamer) > before
    };
    let mut limit = if reads { Limit::disk(&options.model)? } else { Limit::copy(&plan)? };

    let steps = u64::from(options.pairs) * 2;
    let bar = if options.json { ProgressBar::hidden() } else { ProgressBar::new(steps) };
    bar.set_style(ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} windows, {eta} left")?);
    bar.set_message("warming up");
    let window = Duration::from_secs_f64(options.window);
    limit.warm_up(Duration::from_secs_f64(options.warm_up))?;
    let (mut raw, mut ours, mut cpu, mut allocations) = (Moved::default(), Moved::default(), 0.0, 0);
    let mut busy = [Duration::ZERO; 4];
    for pair in 0..options.pairs {
        bar.set_message("measuring");
        // In turn first and second, so that a drift of the disk favours neither.
        for ours_now in if pair % 2 == 0 { [false, true] } else { [true, false] } {
            if ours_now {
                let before = streamer.stats();
                let (moved, used, allocated) = pipeline_window(&mut streamer, &stream, window, reads)?;
                ours.add(moved);
                cpu += used;
                allocations += allocated;
                let after = streamer.stats();
                for stage in Stage::ALL {
                    busy[stage as usize] += after.stage(stage).busy - before.stage(stage).busy;
                }
                settle(&streamer);
            } else {
                raw.add(limit.window(window)?);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let stats = streamer.stats();
    // Taking layers and nothing else, the compute side has no work of its own to be bound by.
    let bottleneck =
        Stage::ALL.into_iter().filter(|&stage| stage != Stage::Compute).max_by_key(|&stage| busy[stage as usize]);
    let bottleneck = bottleneck.map_or("", Stage::name);
    let (ratio, per_gb) = (ours.rate() / raw.rate(), cpu / (ours.bytes as f64 / 1e9));
    if options.json {
        let object = serde_json::json!({
            "bytes": ours.bytes, "seconds": ours.seconds, "gb_s": ours.rate(), "limit_gb_s": raw.rate(), "ratio": ratio,
            "limit": limit.name(), "allocations": allocations, "reader": stats.reader.to_string(), "cpu_seconds_per_gb": per_gb,
            "bottleneck": bottleneck, "unit_bytes": plan.bytes_per_pass(), "slot_bytes": slots,
        });
        println!("{object}");
        return Ok(());
    }
    println!(
        "pipeline  {:.2} GB/s  ({:.1} GB in {:.1} s, read by {})",
        ours.rate(),
        ours.bytes as f64 / 1e9,
        ours.seconds,
        stats.reader
    );
    println!("limit     {:.2} GB/s  ({})", raw.rate(), limit.name());
    println!("ratio     {ratio:.3}");
    println!(
        "CPU       {per_gb:.3} s/GB, {allocations} allocations in the pipeline's windows, {bottleneck} was busiest"
    );
    if reads && 4 * slots > plan.bytes_per_pass() {
        println!("note: slots take {slots} bytes, a pass {}: a larger model measures better", plan.bytes_per_pass());
    }
    Ok(())
}

fn read_bytes(streamer: &LayerStreamer<Cpu>) -> u64 {
    let stats = streamer.stats();
    stats.direct_bytes + stats.buffered_bytes
}

/// Waits until the pipeline has filled all its slots and reads no more.
fn settle(streamer: &LayerStreamer<Cpu>) {
    let mut last = None;
    while last != Some(read_bytes(streamer)) {
        last = Some(read_bytes(streamer));
        thread::sleep(Duration::from_millis(30));
    }
}

fn check(
    streamer: &mut LayerStreamer<Cpu>,
    stream: &<Cpu as Device>::Stream,
    units: &[Unit],
    checkpoint: &Checkpoint,
) -> Result<(), Failure> {
    let mut expected = Vec::new();
    streamer.run_pass(stream, (), |(), layer| {
        for arrival in units[layer.index()].arrivals() {
            let tensor = layer.tensor(&arrival.output)?;
            let (path, offset) = checkpoint.location(&arrival.inputs[0]).ok_or("a tensor without a place")?;
            expected.resize(tensor.bytes(), 0);
            File::open(path)?.read_exact_at(&mut expected, offset)?;
            // SAFETY: the CPU device's memory is memory, and the layer is held.
            let arrived = unsafe { std::slice::from_raw_parts(tensor.ptr().as_ptr(), tensor.bytes()) };
            if arrived != expected {
                return Err(Failure::from(format!("{} of {} arrived wrong", arrival.output, layer.name())));
            }
        }
        Ok(())
    })
}

/// Takes layers as fast as they come until the window is over; with what it moved come CPU seconds and allocations.
fn pipeline_window(
    streamer: &mut LayerStreamer<Cpu>,
    stream: &<Cpu as Device>::Stream,
    window: Duration,
    reads: bool,
) -> Result<(Moved, f64, u64), Failure> {
    // The pipeline emptied first: the window begins when the reader is at work again.
    let full = read_bytes(streamer);
    while reads && read_bytes(streamer) == full {
        streamer.next(stream)?.release()?;
    }
    let before = read_bytes(streamer);
    let (start, cpu, allocations) = (Instant::now(), cpu_seconds(), ALLOCATIONS.load(Relaxed));
    let mut handed = 0;
    while start.elapsed() < window {
        let layer = streamer.next(stream)?;
        handed += layer.tensors().map(|(_, tensor)| tensor.bytes() as u64).sum::<u64>();
        layer.release()?;
    }
    let (seconds, allocations) = (start.elapsed().as_secs_f64(), ALLOCATIONS.load(Relaxed) - allocations);
    let (bytes, cpu) = (if reads { read_bytes(streamer) - before } else { handed }, cpu_seconds() - cpu);
    Ok((Moved { bytes, seconds }, cpu, allocations))
}

/// CPU time of the whole process.
fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is the call's, and zeroes are a value of it.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// The most that the raw reader tries: reads at once, and bytes of each.
const MAX_DEPTH: usize = 32;
const MAX_CHUNK: usize = 4 << 20;

const HUGE_PAGE: usize = 2 << 20;

/// The slowest link by itself.
enum Limit {
    /// Threads in `pread`, past the page cache, over the same files.
    Disk { files: Vec<(File, u64)>, memory: MmapMut, depth: usize, chunk: usize, at: AtomicU64 },
    /// One thread that copies memory of a layer's size.
    Copy { from: MmapMut, to: MmapMut },
}

impl Limit {
    fn disk(folder: &Path) -> Result<Self, Failure> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
                let length = file.metadata()?.len();
                files.push((file, length));
            }
        }
        // The same kind of memory as the pipeline's: huge pages make a read's list of segments short.
        let mut memory = MmapMut::map_anon(MAX_DEPTH * MAX_CHUNK + HUGE_PAGE)?;
        let _ = memory.advise(memmap2::Advice::HugePage);
        memory.fill(1);
        Ok(Self::Disk { files, memory, depth: 4, chunk: 1 << 20, at: AtomicU64::new(0) })
    }

    fn copy(plan: &Plan) -> Result<Self, Failure> {
        let bytes = plan.bytes_per_pass() / plan.units();
        let filled = || -> Result<MmapMut, Failure> {
            let mut map = MmapMut::map_anon(bytes.max(1))?;
            let _ = map.advise(memmap2::Advice::HugePage);
            map.fill(1);
            Ok(map)
        };
        Ok(Self::Copy { from: filled()?, to: filled()? })
    }

    fn name(&self) -> String {
        match self {
            Self::Disk { depth, chunk, .. } => format!("raw O_DIRECT reads, {depth} × {} KiB", chunk >> 10),
            Self::Copy { .. } => "plain copy by one thread".into(),
        }
    }

    /// Reads for this long; for a disk that is a sweep, after which the best depth and chunk are kept.
    fn warm_up(&mut self, time: Duration) -> Result<(), Failure> {
        let settings = [2, 4, 8, 16, MAX_DEPTH].map(|depth| [(depth, 1 << 20), (depth, MAX_CHUNK)]).concat();
        let mut best = (0.0, settings[0]);
        // Twice, and the second time counts: the first uses up what the disk had saved up while idle.
        for round in 0..2 {
            for &setting in &settings {
                if let Self::Disk { depth, chunk, .. } = self {
                    (*depth, *chunk) = setting;
                }
                let rate = self.window(time / (2 * settings.len() as u32))?.rate();
                if round == 1 && rate > best.0 {
                    best = (rate, setting);
                }
            }
        }
        if let Self::Disk { depth, chunk, .. } = self {
            (*depth, *chunk) = best.1;
        }
        Ok(())
    }

    fn window(&mut self, window: Duration) -> Result<Moved, Failure> {
        let start = Instant::now();
        match self {
            Self::Copy { from, to } => {
                let mut bytes = 0;
                while start.elapsed() < window {
                    to.copy_from_slice(from);
                    bytes += std::hint::black_box(&to).len() as u64;
                }
                Ok(Moved { bytes, seconds: start.elapsed().as_secs_f64() })
            }
            Self::Disk { files, memory, depth, chunk, at } => {
                let (read, over) = (AtomicU64::new(0), AtomicBool::new(false));
                let total: u64 = files.iter().map(|(_, length)| length / *chunk as u64).sum();
                let (files, chunk, at, read, over) = (&*files, *chunk, &*at, &read, &over);
                let memory = &memory[memory.as_ptr().align_offset(HUGE_PAGE)..];
                let work = |thread: usize| -> std::io::Result<()> {
                    let buffer = &memory[thread * chunk..(thread + 1) * chunk];
                    while !over.load(Relaxed) {
                        let mut index = at.fetch_add(1, Relaxed) % total;
                        for (file, length) in files {
                            let chunks = length / chunk as u64;
                            if index < chunks {
                                let (to, offset) =
                                    (buffer.as_ptr().cast_mut().cast(), (index * chunk as u64) as libc::off_t);
                                // SAFETY: the buffer is a chunk long and this thread's.
                                let count = unsafe { libc::pread(file.as_raw_fd(), to, chunk, offset) };
                                if count < 0 {
                                    return Err(std::io::Error::last_os_error());
                                }
                                read.fetch_add(count as u64, Relaxed);
                                break;
                            }
                            index -= chunks;
                        }
                    }
                    Ok(())
                };
                let moved = thread::scope(|scope| {
                    let threads: Vec<_> = (0..*depth).map(|thread| scope.spawn(move || work(thread))).collect();
                    thread::sleep(window);
                    let moved = Moved { bytes: read.load(Relaxed), seconds: start.elapsed().as_secs_f64() };
                    over.store(true, Relaxed);
                    threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics")).map(|()| moved)
                })?;
                Ok(moved)
            }
        }
    }
}
