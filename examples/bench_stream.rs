//! How close the pipeline comes to the limit of its slowest link, measured in the same run.
//!
//! Disks are uneven from minute to minute, so the pipeline and a raw reader of the same files take turns in short
//! windows. In a window only bytes that were read in it count, and what the pipeline had read before is taken out of it
//! first. The raw reader reads on while the pipeline comes to rest and while it sets off, so the disk is never idle;
//! whatever is read then counts for nobody. Where no layer stays on disk the limit is a plain copy.
//!
//! A link's rate is its bytes over the time of the whole window, waits included, so that the rates of all links belong to the
//! same passes: a layer that is read and copied counts in both, one that is kept in RAM in the copy alone.

mod bench;
#[path = "../cli/src/budget.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod budget;
#[path = "../cli/src/device.rs"]
mod device;
#[path = "../cli/src/interrupt.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod interrupt;
#[path = "bench/report/mod.rs"]
mod report;
#[path = "bench/stream_report.rs"]
mod stream_report;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use bench::{
    CachedFiles, Disk, Kind, Lane, Limits, Link, MappedTensors, Piece, Pipeline, PlainCopy, available, take_turns,
    time_passes,
};
use budget::Amount;
use clap::{Parser, ValueEnum};
use device::{Chosen, Wanted};
use layer_streamer::{
    Checkpoint, Settings, Unit,
    device::Device,
    plan::{Bandwidths, CachePolicy, FixedOverhead, Part, Plan, Purpose, Reader, Sharing, Tier},
    probe::Probe,
    trace::{
        Observer, Stage,
        timeline::{Timeline, TraceFile},
    },
};
use report::{Common, Failure, PlotTo, Report, Spread, by_default, seconds, units};
use stream_report::{one, swept};

/// Measure how close streaming comes to the disk's own speed, or to a plain copy where nothing is read.
///
/// Checks every byte first, reads for a while, then measures the pipeline and the limit in turn. Says link by link what a pass
/// moves, at what rate and beside which limit, what that costs in CPU time, and what the pipeline's threads use while it is
/// stalled.
#[derive(Clone, Parser)]
#[command(mut_arg("window", by_default("2")), mut_arg("rounds", by_default("8")))]
#[command(mut_arg("plot", |arg| arg.requires("sweep")))]
#[command(after_help = "\
Examples:
  bench_stream --model /tmp/3b                        disk → RAM → device, beside the disk's own speed
  bench_stream --model /tmp/3b --passes 5             how long a pass takes
  bench_stream --model /tmp/3b --n-cpu 2              one more stage: pageable RAM in front of pinned RAM
  bench_stream --model /tmp/3b --reader pread         as on systems without io_uring
  bench_stream --model /tmp/3b --tier 0-35=pinned     nothing from disk: beside a plain copy
  bench_stream --model /tmp/3b --ram 4GiB             the plan for so much memory, and whether it takes as long as foretold
  bench_stream --model /tmp/3b --keep 50              the same for the least that will do and half of the layers' bytes
  bench_stream --model /tmp/3b --cache buffered       through the page cache
  bench_stream --model /tmp/3b --cache auto --tier 0-35=gpu
                                                      on the CPU, of a model that the page cache has: summed where it lies there
  bench_stream --model /tmp/3b --sweep n_cpu_pinned=1,2,4 --plot rings.svg
                                                      how many layers to buffer, value beside value
  bench_stream --model /tmp/3b --sweep keep=0,25,50,75
                                                      what memory buys
  bench_stream --model /tmp/3b --tier 0-35=pinned --sweep trace=0,1
                                                      what a trace costs
  bench_stream --model /tmp/3b --trace stream.html    a picture of what every stage did and waited for
  bench_stream --model /tmp/3b --json | jq .ratio.median
                                                      one figure, for a script

Make a checkpoint with: layer-streamer make-checkpoint /tmp/3b --shape qwen2.5-3b
(layers large enough to be typical, and enough of them: a pass should be at least four times what the slots hold)")]
struct Options {
    /// Folder with a checkpoint
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Time whole passes in place of windows, back to back, with a window of the limit before and after
    #[arg(long, value_name = "N", conflicts_with_all = ["rounds", "sweep"], value_parser = clap::value_parser!(u32).range(1..))]
    passes: Option<u32>,
    /// Try each of these values of a setting, in turn: n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu,
    /// keep (percent), or trace (0 or 1: whether a trace is recorded, which is not written)
    #[arg(long, value_name = "SETTING=A,B,C")]
    sweep: Option<Sweep>,
    /// How long to read before the first window, which uses up what the disk had saved up and finds the best raw reader
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    warm_up: Duration,
    /// Who reads
    #[arg(long, default_value = "auto")]
    reader: ReaderName,
    /// Whether reads go past the page cache
    #[arg(long, default_value = "direct")]
    cache: CacheName,
    /// Where layers are kept between passes, such as 0-7=pinned,8-11=gpu
    #[arg(long, value_name = "LIST", default_value = "")]
    tier: String,
    /// Choose tiers and rings for so much GPU memory, such as 8GB, 7.5GiB or auto
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["tier", "n_gpu", "n_cpu_pinned", "n_cpu"])]
    vram: Option<Amount>,
    /// The same for RAM
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["tier", "n_gpu", "n_cpu_pinned", "n_cpu"])]
    ram: Option<Amount>,
    /// The same for the least RAM that will do, and this share of the layers' bytes
    #[arg(long, value_name = "PERCENT", conflicts_with_all = ["ram", "tier", "n_gpu", "n_cpu_pinned", "n_cpu"], value_parser = share)]
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
    #[command(flatten)]
    common: Common,
    /// Write what every stage did and waited for: FILE.html opens in any browser, FILE.json in Perfetto. Ctrl-C ends the run, and
    /// the trace is written
    #[arg(long, value_name = "FILE", conflicts_with = "sweep")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    plot: PlotTo,
}

/// The settings that a sweep can try.
const SWEPT: [&str; 8] =
    ["n_gpu", "n_cpu_pinned", "n_cpu", "batch_gpu", "batch_cpu_pinned", "batch_cpu", "keep", "trace"];

#[derive(Clone)]
struct Sweep {
    setting: &'static str,
    values: Vec<usize>,
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("give SETTING=A,B,C with whole numbers, SETTING being one of {}", SWEPT.join(", "));
        let (name, values) = text.split_once('=').ok_or_else(form)?;
        let setting = SWEPT.into_iter().find(|setting| *setting == name.replace('-', "_")).ok_or_else(form)?;
        let values: BTreeSet<usize> =
            values.split(',').map(|value| value.trim().parse().map_err(|_| form())).collect::<Result<_, _>>()?;
        if setting == "trace" && values.iter().any(|value| *value > 1) {
            return Err("trace is 0, without, or 1, with one".into());
        }
        Ok(Self { setting, values: values.into_iter().collect() })
    }
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
    /// The options with a value of the sweep.
    fn with(&self, setting: &str, value: usize) -> Self {
        let mut options = self.clone();
        match setting {
            "n_gpu" => options.n_gpu = value,
            "n_cpu_pinned" => options.n_cpu_pinned = value,
            "n_cpu" => options.n_cpu = value,
            "batch_gpu" => options.batch_gpu = value,
            "batch_cpu_pinned" => options.batch_cpu_pinned = value,
            "batch_cpu" => options.batch_cpu = value,
            "trace" => {}
            _ => options.keep = Some(value as f64),
        }
        options
    }

    /// What a sweep would silently overrule is refused.
    fn check_sweep(&self) -> Result<(), Failure> {
        let Some(Sweep { setting, .. }) = &self.sweep else { return Ok(()) };
        let budget = self.ram.is_some() || self.vram.is_some() || self.keep.is_some();
        if *setting == "keep" && (self.ram.is_some() || !self.tier.is_empty()) {
            return Err("--sweep keep: it chooses tiers and rings; leave out --ram and --tier".into());
        }
        if ["n_gpu", "n_cpu_pinned"].contains(setting) && budget {
            return Err(format!("--sweep {setting}: a budget chooses it; leave out --ram, --vram and --keep").into());
        }
        Ok(())
    }

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
    let code = report::run(&options.common, Some(&options.plot), || match device::choose(options.device)? {
        Chosen::Cpu(device) => run(&device, false, &options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, true, &options),
    });
    if interrupt::is_noted() { ExitCode::from(130) } else { code }
}

/// An error once Ctrl-C was pressed.
fn go_on() -> Result<(), Failure> {
    if interrupt::is_noted() { Err("stopped by Ctrl-C".into()) } else { Ok(()) }
}

/// `linked`: whether the device has memory of its own, behind a link.
fn run<D: Device>(device: &D, linked: bool, options: &Options) -> Result<Report, Failure> {
    options.check_sweep()?;
    // Opened before the long work, so that a path that cannot be written is known at once.
    let trace = options.trace.as_deref().map(TraceFile::create).transpose()?;
    let timeline = trace.as_ref().map(|_| Timeline::new());
    let observed = |timeline: &Arc<Timeline>| timeline.clone() as Arc<dyn Observer>;
    if trace.is_some() {
        interrupt::listen();
    }
    let checkpoint = Checkpoint::open(&options.model)?;
    let planned = match &options.sweep {
        None => vec![(0, planned(device, &checkpoint, options)?)],
        Some(Sweep { setting, values }) => (values.iter())
            .map(|&value| Ok((value, planned(device, &checkpoint, &options.with(setting, value))?)))
            .collect::<Result<_, Failure>>()?,
    };
    let host: usize = planned.iter().map(|(_, (.., plan))| host_bytes(plan, linked)).sum();
    let free = available();
    if planned.len() > 1 && host > free / 10 * 9 {
        let [host, free] = [host, free].map(|bytes| units::bytes(bytes as u64));
        return Err(format!("--sweep: all values together take {host} of RAM, {free} are free; try fewer").into());
    }
    let files = files(&checkpoint, &planned[0].1.0);
    let disk = Disk::open(&files)?;
    disk.check()?;
    let mut lanes = Vec::new();
    let (largest, copied_units) = (planned.iter().map(|(_, (units, _, plan))| (plan.clone(), units.clone())))
        .max_by_key(|(plan, _)| host_bytes(plan, linked))
        .ok_or("a sweep has values")?;
    for (value, (units, settings, plan)) in planned {
        let is_swept = options.sweep.as_ref().is_some_and(|sweep| sweep.setting == "trace" && value == 1);
        let observer = timeline.as_ref().map(observed).or_else(|| is_swept.then(|| observed(&Timeline::new())));
        let mut pipeline = Pipeline::new(device, &checkpoint, &units, &settings, observer.as_slice())?;
        // Check first: one pass, every tensor compared with a plain read.
        let cached = CachedFiles::note(&files)?;
        pipeline.check(&checkpoint, &units, 1)?;
        if let Some(cached) = cached {
            cached.restore();
        }
        let moves = pipeline.find_out()?;
        lanes.push(Lane::new(value, plan, pipeline, moves));
    }
    let link = linked.then(|| Link::new(device, largest.bytes_per_pass() / largest.units())).transpose()?;
    let copy = plain_copy(&largest, &checkpoint, &copied_units)?;
    let window = options.common.window;
    let mut limits =
        Limits { disk: &disk, ways: [None, None], link, copy, moved: Default::default(), window, go_on: &go_on };
    let mut found = Found::default();
    let mapped = lanes.iter().any(|lane| lane.kind == Some(Kind::Mapped));
    let tensors = mapped.then(|| MappedTensors::new(&checkpoint, &copied_units)).transpose()?;
    let measured = measure(&mut lanes, &mut limits, &mut found, tensors.as_ref(), options);
    let written = trace
        .zip(timeline)
        .map_or(Ok(()), |(file, timeline)| write_trace(file, &timeline, &lanes[0], &found, &options.model));
    measured?;
    let mut report = match &options.sweep {
        None => one(device.describe(), &lanes[0], &limits, &found),
        Some(sweep) => swept(device.describe(), sweep, &lanes, &limits),
    };
    let (slots, pass) = (slots(&largest), largest.bytes_per_pass());
    if lanes.iter().any(|lane| lane.pipeline.reads) && 4 * slots > pass {
        let [pass, slots] = [pass, slots].map(|bytes| units::bytes(bytes as u64));
        report.note(format!("a pass of {pass} is less than four times the {slots} of slots; use a larger model"));
    }
    // A disk that is full costs the trace alone.
    report.failed = written.err().map(|error| error.to_string());
    Ok(report)
}

/// Units with their tiers, settings, and the plan for them.
fn planned<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    options: &Options,
) -> Result<(Vec<Unit>, Settings, Plan), Failure> {
    let mut units = checkpoint.layers()?;
    Tier::parse(&options.tier, &mut units)?;
    let mut settings = options.settings();
    if options.vram.is_some() || options.ram.is_some() || options.keep.is_some() {
        let mut budget = budget::budget(device, options.vram, options.ram)?;
        if let Some(percent) = options.keep {
            // As they lie in memory, rounded to pages.
            let slots = Plan::new(checkpoint, &units, &settings, Sharing::of(device))?.memory();
            let slots = slots.iter().find(|part| matches!(part.purpose, Purpose::Slots { tier: Tier::Pinned, .. }));
            let slots = slots.map_or(0, |part| part.bytes);
            let share = percent / 100.0 * units.len() as f64 / (settings.n_cpu_pinned + 1) as f64;
            let least = budget.least(checkpoint, &units, FixedOverhead::default())?;
            budget.host_bytes = least.host_bytes + (slots as f64 * share).ceil() as usize;
        }
        let probe = Probe::recent(device, checkpoint)?;
        let bandwidths = probe.map_or_else(Bandwidths::default, |probe| probe.bandwidths());
        let placement = budget.plan(checkpoint, &units, FixedOverhead::default(), bandwidths)?;
        placement.apply_to(&mut units)?;
        let Settings { n_gpu, n_cpu_pinned, .. } = placement.settings;
        settings = Settings { n_gpu, n_cpu_pinned, ..settings };
    }
    let plan = Plan::new(checkpoint, &units, &settings, Sharing::of(device))?;
    Ok((units, settings, plan))
}

/// Bytes of slots on one side.
fn slot_bytes(plan: &Plan, on_device: bool) -> usize {
    let parts = plan.memory();
    let is_slots = |part: &&Part| matches!(part.purpose, Purpose::Slots { .. });
    parts.iter().filter(is_slots).filter(|part| part.is_on_device() == on_device).map(|part| part.bytes).sum()
}

fn slots(plan: &Plan) -> usize {
    slot_bytes(plan, false) + slot_bytes(plan, true)
}

/// Bytes of layers that are kept in RAM, pinned or not.
fn resident_bytes(plan: &Plan) -> usize {
    let parts = plan.memory();
    let is_kept = |part: &&Part| matches!(part.purpose, Purpose::Kept { .. }) && !part.is_on_device();
    parts.iter().filter(is_kept).map(|part| part.bytes).sum()
}

/// Bytes of RAM in all.
fn host_bytes(plan: &Plan, linked: bool) -> usize {
    plan.memory().iter().filter(|part| !(linked && part.is_on_device())).map(|part| part.bytes).sum()
}

/// What is measured beside the windows.
#[derive(Default)]
struct Found {
    /// GB/s of plain copies to the device, before and after.
    copies: Vec<f64>,
    /// One thread's memcpy.
    memcpy: bench::Moved,
    memcpy_rates: Vec<f64>,
    /// GB/s of the other way of reading, where the pipeline reads both past and through the page cache.
    other_reads: Option<(Kind, Vec<f64>)>,
    stalled: f64,
}

fn measure<D: Device>(
    lanes: &mut [Lane<D>],
    limits: &mut Limits<'_, D>,
    found: &mut Found,
    tensors: Option<&MappedTensors>,
    options: &Options,
) -> Result<(), Failure> {
    let rounds = options.common.rounds;
    let passes = options.passes.unwrap_or(rounds);
    for lane in lanes.iter_mut() {
        match (lane.kind, tensors) {
            (None, _) => lane.time_still_passes(passes)?,
            (Some(Kind::Mapped), Some(tensors)) => lane.sum_passes(tensors, passes)?,
            _ => {}
        }
    }
    let kinds: Vec<Kind> = lanes.iter().filter_map(|lane| lane.kind).filter(|kind| *kind != Kind::Mapped).collect();
    if kinds.is_empty() {
        return Ok(());
    }
    let windows = options.passes.map_or(u64::from(rounds) * kinds.len() as u64, |_| 1);
    let bar = report::progress(windows, &options.common)?;
    bar.set_message("warming up");
    found.copy_for_a_while(limits)?;
    kinds.iter().try_for_each(|kind| limits.warm_up(*kind, options.warm_up))?;
    bar.set_message("measuring");
    match options.passes {
        Some(count) => time_passes(&mut lanes[0], limits, count)?,
        None => take_turns(lanes, limits, rounds, &bar)?,
    }
    bar.finish_and_clear();
    if let [lane] = lanes {
        // A hundredth of the bytes is too little to say anything of.
        let read = lane.pipeline.per_pass;
        if 100 * read.direct.min(read.buffered) > read.read() {
            let other = if lane.kind == Some(Kind::Direct) { Kind::Buffered } else { Kind::Direct };
            limits.warm_up(other, options.warm_up / 2)?;
            let rates = (0..2).map(|_| limits.window(other, None, None)).collect::<Result<_, _>>()?;
            found.other_reads = Some((other, rates));
        }
        found.stalled = lane.pipeline.stalled_share(STALL)?;
    }
    found.copy_for_a_while(limits)
}

/// What was recorded, with the limits of this run.
fn write_trace<D: Device>(
    file: TraceFile,
    timeline: &Timeline,
    lane: &Lane<D>,
    found: &Found,
    model: &Path,
) -> Result<(), Failure> {
    let mut recording = timeline.recording(None);
    recording.facts.insert(0, ("model".into(), model.display().to_string()));
    recording.verdict = lane.pipeline.findings(&lane.used());
    let median = |rates: &[f64]| (!rates.is_empty()).then(|| Spread::of(rates).median * 1e9);
    for link in &mut recording.links {
        let is_read = link.stage == Stage::Read;
        link.limit = match lane.kind {
            Some(Kind::Mapped) => None,
            Some(Kind::Copy) if is_read => None,
            Some(Kind::Copy) => median(&lane.limits),
            _ if is_read => median(&lane.limits),
            _ => median(&found.copies),
        };
    }
    Ok(file.write(&recording)?)
}

impl Found {
    /// Half a window of copies, in four parts.
    fn copy_for_a_while<D: Device>(&mut self, limits: &mut Limits<'_, D>) -> Result<(), Failure> {
        for _ in 0..4 {
            let moved = limits.copy.window(limits.window / 8);
            self.memcpy.add(moved);
            self.memcpy_rates.push(moved.rate());
            if limits.link.is_some() {
                self.copies.push(limits.plain_window(limits.window / 8)?);
            } else {
                self.copies.push(moved.rate());
                limits.moved[Kind::Copy as usize].add(moved);
            }
        }
        Ok(())
    }
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
    let [from, to] = [false, true].map(|on_device| slot_bytes(plan, on_device));
    let from = from + resident_bytes(plan);
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
