//! How close the pipeline comes to the limit of its slowest link, measured in the same run.
//!
//! Disks are uneven from minute to minute, so the pipeline and a raw reader of the same files take turns in short
//! windows. In a window only bytes that were read in it count, and what the pipeline had read before is taken out of it
//! first. The raw reader reads on while the pipeline comes to rest and while it sets off, so the disk is never idle;
//! whatever is read then counts for nobody. Where no layer lives on disk the limit is a plain copy.

mod bench;
#[path = "budget/mod.rs"]
mod budget;
#[path = "device/mod.rs"]
mod device;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use bench::{
    CachedFiles, Disk, Failure, Link, Moved, Piece, Pipeline, PlainCopy, Used, Way, finish, progress, quantile, seconds,
};
use budget::Amount;
use clap::{Parser, ValueEnum};
use device::{Chosen, Wanted};
use layer_streamer::{
    Checkpoint, Settings, Unit,
    device::Device,
    plan::{Bandwidths, Besides, CachePolicy, Forecast, Home, Part, Plan, Reader},
    probe::Probe,
    trace::Stage,
};

/// Measure how close streaming comes to the disk's own speed, or to a plain copy where nothing is read.
///
/// Checks every byte first, reads for a while, then measures the pipeline and the limit in turn. Prints GB/s (10⁹
/// bytes), CPU seconds per GB of each stage beside those of a plain memcpy, and what the pipeline's threads use while
/// it is stalled.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  bench_stream --model /tmp/3b                        disk → RAM → device, beside the disk's own speed
  bench_stream --model /tmp/3b --passes 5             how long a pass takes
  bench_stream --model /tmp/3b --n-cpu 2              one more stage: pageable RAM in front of pinned RAM
  bench_stream --model /tmp/3b --reader pread         the rung for systems without io_uring
  bench_stream --model /tmp/3b --home 0-35=pinned     nothing from disk: beside a plain copy
  bench_stream --model /tmp/3b --ram 4GiB             the plan for so much memory, and whether it takes as long as foretold
  bench_stream --model /tmp/3b --keep 50              the same for the least that will do and half of the layers' bytes
  bench_stream --model /tmp/3b --cache buffered       through the page cache
  bench_stream --model /tmp/3b --json | jq .ratio     one figure, for a script

Make a checkpoint with: make_checkpoint /tmp/3b --shape qwen2.5-3b
(layers large enough to be typical, and enough of them: a pass should be at least four times what the slots hold)")]
struct Options {
    /// Folder with a checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Pairs of windows, one of each kind
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Time whole passes in place of windows, back to back, with a window of the limit before and after
    #[arg(long, value_name = "N", conflicts_with = "pairs", value_parser = clap::value_parser!(u32).range(1..))]
    passes: Option<u32>,
    /// Length of a window
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    window: Duration,
    /// How long to read before the first window, which uses up what the disk had saved up and finds the best raw reader
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    warm_up: Duration,
    /// Who reads
    #[arg(long, default_value = "auto")]
    reader: ReaderName,
    /// Whether reads go past the page cache
    #[arg(long, default_value = "direct")]
    cache: CacheName,
    /// Where layers live between passes, such as 0-7=pinned,8-11=gpu
    #[arg(long, value_name = "LIST", default_value = "")]
    home: String,
    /// Choose homes and rings for so much GPU memory, such as 8GB, 7.5GiB or auto
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["home", "n_gpu", "n_cpu_pinned", "n_cpu"])]
    vram: Option<Amount>,
    /// The same for RAM
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["home", "n_gpu", "n_cpu_pinned", "n_cpu"])]
    ram: Option<Amount>,
    /// The same for the least RAM that will do, and this share of the layers' bytes
    #[arg(long, value_name = "PERCENT", conflicts_with_all = ["ram", "home", "n_gpu", "n_cpu_pinned", "n_cpu"], value_parser = share)]
    keep: Option<f64>,
    /// Layers buffered ahead on the device
    #[arg(long, value_name = "N", default_value_t = 2)]
    n_gpu: usize,
    /// Layers buffered in pinned RAM
    #[arg(long, value_name = "N", default_value_t = 2)]
    n_cpu_pinned: usize,
    /// Layers buffered in pageable RAM
    #[arg(long, value_name = "N", default_value_t = 0)]
    n_cpu: usize,
    /// Layers handed over at once from the device's buffer; 0 means one by one
    #[arg(long, value_name = "N", default_value_t = 0)]
    batch_gpu: usize,
    /// The same from pinned RAM
    #[arg(long, value_name = "N", default_value_t = 0)]
    batch_cpu_pinned: usize,
    /// The same from pageable RAM
    #[arg(long, value_name = "N", default_value_t = 0)]
    batch_cpu: usize,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|share| (0.0..=1e6).contains(share)).ok_or("give percent from 0 up")
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

impl Options {
    fn settings(&self) -> Settings {
        Settings {
            n_gpu: self.n_gpu,
            n_cpu_pinned: self.n_cpu_pinned,
            n_cpu: self.n_cpu,
            batch_gpu: self.batch_gpu,
            batch_cpu_pinned: self.batch_cpu_pinned,
            batch_cpu: self.batch_cpu,
            reader: match self.reader {
                ReaderName::Auto => Reader::Auto,
                ReaderName::UringFixed => Reader::UringFixed,
                ReaderName::Uring => Reader::Uring,
                ReaderName::Pread => Reader::Pread,
            },
            cache: match self.cache {
                CacheName::Auto => CachePolicy::Auto,
                CacheName::Direct => CachePolicy::Direct,
                CacheName::Buffered => CachePolicy::Buffered,
            },
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    finish(device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, false, &options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, true, &options),
    }))
}

/// `linked`: whether the device has memory of its own, behind a link.
fn run<D: Device>(device: &D, linked: bool, options: &Options) -> Result<String, Failure> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let mut units = checkpoint.layers()?;
    Home::parse(&options.home, &mut units)?;
    let mut settings = options.settings();
    if options.vram.is_some() || options.ram.is_some() || options.keep.is_some() {
        let mut budget = budget::budget(device, options.vram, options.ram)?;
        if let Some(percent) = options.keep {
            // As they lie in memory, rounded to pages.
            let slots = Plan::on(device, &checkpoint, &units, &settings)?.memory();
            let slots = slots.iter().find(|part| part.what.ends_with("pinned slots")).map_or(0, |part| part.bytes);
            let share = percent / 100.0 * units.len() as f64 / (settings.n_cpu_pinned + 1) as f64;
            let least = budget.least(&checkpoint, &units, Besides::default())?;
            budget.host_bytes = least.host_bytes + (slots as f64 * share).ceil() as usize;
        }
        let probe = Probe::recent(device, &checkpoint)?;
        let bandwidths = probe.map_or_else(Bandwidths::default, |probe| probe.bandwidths());
        let (homes, Settings { n_gpu, n_cpu_pinned, .. }) =
            budget.plan(&checkpoint, &units, Besides::default(), bandwidths)?;
        units.iter_mut().zip(homes).for_each(|(unit, home)| _ = unit.home(home));
        settings = Settings { n_gpu, n_cpu_pinned, ..settings };
    }
    let plan = Plan::on(device, &checkpoint, &units, &settings)?;
    let files = files(&checkpoint, &units);
    let disk = Disk::open(&files)?;
    let mut pipeline = Pipeline::new(device, &checkpoint, &units, &settings)?;

    // Check first: one pass, every tensor compared with a plain read.
    let cached = CachedFiles::note(&files)?;
    disk.check()?;
    pipeline.check(&checkpoint, &units, 1)?;
    if let Some(cached) = cached {
        cached.restore();
    }
    let before = pipeline.stats();
    if !pipeline.find_out()? {
        return still(&mut pipeline, &plan, options);
    }
    let after = pipeline.stats();
    // The raw reader reads as the pipeline does: past the page cache or through it.
    let direct = after.direct_bytes - before.direct_bytes >= after.buffered_bytes - before.buffered_bytes;

    let mut copy = plain_copy(&plan, &checkpoint, &units)?;
    let mut copied = copy.window(options.window / 4);
    let window = options.window;
    let bar = progress(u64::from(options.passes.map_or(2 * options.pairs, |_| 3)), options.json)?;
    bar.set_message("warming up");
    let mut limit = match pipeline.reads {
        true => Limit::Disk(disk.fastest(direct, options.warm_up)?),
        false if linked => Limit::Link(Link::new(device, plan.bytes_per_pass() / plan.units())?),
        false => Limit::Memory,
    };
    bar.set_message("measuring");
    let (mut raw, mut ours, mut passes) = (Moved::default(), Used::default(), Vec::new());
    let mut raw_window = |pipeline: &Pipeline<D>| -> Result<(), Failure> {
        let settle = || {
            pipeline.settle();
            Ok(())
        };
        raw.add(match &mut limit {
            Limit::Disk(way) => disk.window_between(*way, window, settle, || pipeline.empty())?.0,
            other => {
                settle()?;
                let moved = if let Limit::Link(link) = other { link.window(window)? } else { copy.window(window) };
                pipeline.empty()?;
                moved
            }
        });
        bar.inc(1);
        Ok(())
    };
    if let Some(count) = options.passes {
        raw_window(&pipeline)?;
        // From here on pass follows pass, and each begins and ends with as much in the slots as the one before.
        pipeline.finish_pass()?;
        passes.reserve(count as usize);
        let used = pipeline.measure(|pipeline| {
            (0..count).try_for_each(|_| {
                let start = Instant::now();
                pipeline.pass()?;
                passes.push(start.elapsed().as_secs_f64());
                Ok(())
            })
        })?;
        ours.add(used);
        bar.inc(1);
        raw_window(&pipeline)?;
    } else {
        for pair in 0..options.pairs {
            // In turn first and second, so that a drift of the disk favours neither.
            for ours_now in if pair % 2 == 0 { [false, true] } else { [true, false] } {
                if ours_now {
                    ours.add(pipeline.window(window)?);
                    bar.inc(1);
                } else {
                    raw_window(&pipeline)?;
                }
            }
        }
    }
    bar.finish_and_clear();
    let stalled = pipeline.stalled_share(STALL)?;
    copied.add(copy.window(window / 4));
    // What the way to the device carries.
    let carried = match linked {
        true => Link::new(device, plan.bytes_per_pass() / plan.units())?.window(window / 4)?,
        false => copied,
    };
    let slots = plan.memory().iter().filter(|part| part.what.ends_with("slots")).map(|part| part.bytes).sum();
    let figures = Figures {
        ours,
        raw,
        limit: match limit {
            Limit::Disk(way) => way.to_string(),
            Limit::Link(link) => link.name(),
            Limit::Memory => copy.name(),
        },
        reader: pipeline.stats().reader.to_string(),
        passes,
        copied,
        stalled,
        unit_bytes: plan.bytes_per_pass(),
        slot_bytes: slots,
        reads: pipeline.reads,
        read_per_pass: pipeline.read_per_pass,
        kept: plan.units() - plan.count(Home::Disk),
        forecast: plan.forecast(Bandwidths { disk: raw.rate() * 1e9, copy: carried.rate() * 1e9 }),
    };
    Ok(if options.json { figures.json() } else { figures.text() })
}

/// Where every layer lives on the device: how long a pass takes in which nothing moves.
fn still<D: Device>(pipeline: &mut Pipeline<D>, plan: &Plan, options: &Options) -> Result<String, Failure> {
    if !options.home.is_empty() {
        let cause = "every layer lives on the device, so nothing moves from pass to pass; leave some elsewhere";
        return Err(format!("--home: {cause}").into());
    }
    let start = Instant::now();
    (0..100).try_for_each(|_| pipeline.pass())?;
    let seconds = start.elapsed().as_secs_f64() / 100.0;
    let planned = plan.forecast(Bandwidths::default()).disk_bytes;
    Ok(match options.json {
        true => {
            let object = serde_json::json!({
                "kept": plan.units(), "units": plan.units(), "read_bytes_per_pass": pipeline.read_per_pass,
                "planned_bytes_per_pass": planned, "pass_seconds": seconds,
            });
            format!("{object}\n")
        }
        false => format!("all layers live on the device: nothing moves, {:.1} µs a pass\n", seconds * 1e6),
    })
}

/// The slowest link by itself.
enum Limit<D: Device> {
    Disk(Way),
    Link(Link<D>),
    Memory,
}

/// How long the caller holds a layer, to see what waiting costs.
const STALL: Duration = Duration::from_secs(1);

/// The files that the units lie in.
fn files(checkpoint: &Checkpoint, units: &[Unit]) -> Vec<PathBuf> {
    let tensors = units.iter().flat_map(Unit::arrivals).flat_map(|arrival| &arrival.inputs);
    let files = tensors.filter_map(|name| Some(checkpoint.location(name)?.0.to_owned()));
    files.collect::<BTreeSet<_>>().into_iter().collect()
}

/// A copy between memory as large as that which the pipeline's transfer copies between, in pieces of a layer's tensors.
fn plain_copy(plan: &Plan, checkpoint: &Checkpoint, units: &[Unit]) -> Result<PlainCopy, Failure> {
    let (mut from, mut to) = (0, 0);
    for Part { what, bytes, .. } in plan.memory() {
        if what.ends_with("GPU slots") {
            to += bytes;
        } else if what.ends_with("pinned slots") || what.ends_with("RAM") || what.ends_with("RAM slots") {
            from += bytes;
        }
    }
    let piece = |name: &String| {
        let (dtype, shape) = checkpoint.describe(name)?;
        Some(Piece { bytes: dtype.bytes_of(shape)?, offset: checkpoint.location(name)?.1 })
    };
    let pieces = |unit: &Unit| -> Vec<Piece> {
        unit.arrivals().iter().flat_map(|arrival| &arrival.inputs).filter_map(piece).collect()
    };
    let largest = units.iter().map(pieces).max_by_key(|pieces| pieces.iter().map(|piece| piece.bytes).sum::<usize>());
    PlainCopy::new(from, to, largest.unwrap_or_default())
}

/// What was measured.
struct Figures {
    ours: Used,
    raw: Moved,
    limit: String,
    reader: String,
    /// Seconds of each.
    passes: Vec<f64>,
    copied: Moved,
    stalled: f64,
    unit_bytes: usize,
    slot_bytes: usize,
    reads: bool,
    read_per_pass: u64,
    /// Units that are not read again.
    kept: usize,
    /// By what the links gave in this run.
    forecast: Forecast,
}

impl Figures {
    fn ratio(&self) -> f64 {
        self.ours.moved.rate() / self.raw.rate()
    }

    /// Least, median and most seconds of a pass.
    fn spread(&self) -> Option<[f64; 3]> {
        let mut passes = self.passes.clone();
        (!passes.is_empty()).then(|| [0.0, 0.5, 1.0].map(|share| quantile(&mut passes, share)))
    }

    /// Seconds of a pass: of those that were timed, else by the bytes that came in the windows.
    fn pass_seconds(&self) -> f64 {
        let moved = if self.reads { self.forecast.disk_bytes } else { self.forecast.copy_bytes };
        self.spread().map_or(moved as f64 / 1e9 / self.ours.moved.rate(), |[_, median, _]| median)
    }

    fn pass_rate(&self, seconds: f64) -> f64 {
        self.unit_bytes as f64 / 1e9 / seconds
    }

    fn json(&self) -> String {
        let moved = self.ours.moved;
        let stages: serde_json::Map<_, _> = Stage::ALL
            .into_iter()
            .filter_map(|stage| Some((format!("{stage}_cpu_seconds_per_gb"), self.ours.cpu_per_gb(stage)?.into())))
            .collect();
        let mut object = serde_json::json!({
            "bytes": moved.bytes, "seconds": moved.seconds, "gb_s": moved.rate(), "limit_gb_s": self.raw.rate(),
            "ratio": self.ratio(), "limit": self.limit, "allocations": self.ours.allocations, "reader": self.reader,
            "bottleneck": self.ours.bottleneck().name(), "cpu_seconds_per_gb": moved.cpu_per_gb(),
            "limit_cpu_seconds_per_gb": self.raw.cpu_per_gb(), "memcpy_cpu_seconds_per_gb": self.copied.cpu_per_gb(),
            "memcpy_gb_s": self.copied.rate(), "stalled_cpu_share": self.stalled,
            "unit_bytes": self.unit_bytes, "slot_bytes": self.slot_bytes, "kept": self.kept,
            "read_bytes_per_pass": self.read_per_pass, "planned_bytes_per_pass": self.forecast.disk_bytes,
            "pass_seconds": self.pass_seconds(), "planned_pass_seconds": self.forecast.pass_seconds,
        });
        let fields = object.as_object_mut().expect("it was made as one");
        fields.extend(stages);
        if let Some([min, median, max]) = self.spread() {
            fields.extend([
                ("passes".to_owned(), self.passes.len().into()),
                ("pass_seconds_min".to_owned(), min.into()),
                ("pass_seconds_median".to_owned(), median.into()),
                ("pass_seconds_max".to_owned(), max.into()),
                ("pass_gb_s_median".to_owned(), self.pass_rate(median).into()),
            ]);
        }
        format!("{object}\n")
    }

    fn text(&self) -> String {
        let moved = self.ours.moved;
        let mut text = String::new();
        let mut line = |line: String| text += &(line + "\n");
        let reader = if self.reads { format!(", read by {}", self.reader) } else { String::new() };
        line(format!("pipeline  {:.2} GB/s  ({:.1} GB in {:.1} s{reader})", moved.rate(), moved.gb(), moved.seconds));
        line(format!("limit     {:.2} GB/s  ({})", self.raw.rate(), self.limit));
        line(format!("ratio     {:.3}", self.ratio()));
        if let Some(spread) = self.spread() {
            let [min, median, max] =
                spread.map(|seconds| format!("{seconds:.3} s = {:.2} GB/s", self.pass_rate(seconds)));
            line(format!("pass      {median} in the median, {min} at best, {max} at worst of {}", self.passes.len()));
        }
        if self.kept > 0 {
            let gb = |bytes: f64| bytes / 1e9;
            line(format!(
                "pass      {:.3} s, {:.3} by the plan at the limits of this run; {:.3} GB read, {:.3} by the plan; {} units kept",
                self.pass_seconds(),
                self.forecast.pass_seconds,
                gb(self.read_per_pass as f64),
                gb(self.forecast.disk_bytes as f64),
                self.kept,
            ));
        }
        let stages = Stage::ALL.into_iter().filter_map(|stage| Some((stage, self.ours.cpu_per_gb(stage)?)));
        let stages: Vec<_> = stages.map(|(stage, cpu)| format!("{stage} {cpu:.3}")).collect();
        line(format!(
            "CPU       {:.3} s/GB: {}; beside it the limit {:.3}, a plain memcpy {:.3}",
            moved.cpu_per_gb(),
            stages.join(", "),
            self.raw.cpu_per_gb(),
            self.copied.cpu_per_gb()
        ));
        line(format!("stalled   {:.2} % of a core, all the pipeline's threads together", self.stalled * 100.0));
        line(format!(
            "{} allocations while the pipeline was measured; {} was busiest",
            self.ours.allocations,
            self.ours.bottleneck()
        ));
        if self.reads && 4 * self.slot_bytes > self.unit_bytes {
            let (slots, pass) = (self.slot_bytes as f64 / 1e9, self.unit_bytes as f64 / 1e9);
            line(format!(
                "note: a pass of {pass:.3} GB is less than four times the {slots:.3} GB of slots; use a larger model"
            ));
        }
        text
    }
}
