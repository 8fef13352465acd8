//! What a disk gives to which way of reading, and what the crate's own reader makes of it.
//!
//! First a table of raw reads: past the page cache and through it, `pread` threads and io_uring, by depth (reads at
//! once) and chunk (bytes of each). Then the best row and the crate's pipeline, which streams the same files as units
//! of bytes, in alternating windows. Nothing is evicted from the page cache: for buffered rows the table says how much
//! came from it.

mod bench;
#[path = "bench/report/mod.rs"]
mod report;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bench::{CachedFiles, Disk, Moved, Pipeline, Way};
use clap::Parser;
use layer_streamer::{
    Checkpoint, DType, Settings, StoredTensor, Unit,
    device::{Cpu, Device},
    plan::{CachePolicy, Plan, Sharing},
};
use report::{
    Column, Common, Failure, Figure, Line, Panel, Plot, PlotTo, Report, Show, Spread, by_default, column, seconds,
    units,
};
use serde_json::{Value, json};

/// Measure the disk that files lie on, and how close this crate's reader comes to it.
///
/// Checks samples first, reads for a while, tries every way of reading, then measures the best one and the crate's
/// reader in turn.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.5")), mut_arg("rounds", by_default("8")))]
#[command(after_help = "\
Examples:
  bench_read /mnt/nvme/7b/*.safetensors         the disk under a model; as large as you have, gigabytes at least
  bench_read --window 2 FILE                    a quieter table, in four times the time
  bench_read FILE --plot disk.svg               GB/s over depth, a line for each way and chunk size
  bench_read FILE --json | jq .best             the way of reading to use
  bench_read FILE --json | jq .ratio.median     the crate's reader beside it

A row is one short window: on a disk that several programs share, compare rows only roughly. The figures below the table
were measured in turn, and compare well.")]
struct Options {
    /// Files to read, all on the disk to measure; they are only read
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How long to read before the first window, which uses up what the disk had saved up
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    warm_up: Duration,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    plot: PlotTo,
}

const COLUMNS: [Column; 8] = [
    column("cache", "reads", Show::Text, "O_DIRECT: past the page cache; buffered: through it"),
    column("engine", "by", Show::Text, "io_uring: one thread; pread: as many threads as reads at once"),
    column("depth", "depth", Show::Count, "reads at once"),
    column("chunk_bytes", "chunk", Show::Bytes, "bytes of a read"),
    column("gb_s", "GB/s", Show::Fixed(2), ""),
    column("cpu_s_per_gb", "CPU s/GB", Show::Fixed(3), "of all threads, the kernel's work for them included"),
    column(
        "page_cache_share",
        "cached",
        Show::Percent,
        "share of the bytes that the page cache held when they were asked for",
    ),
    column("best", "", Show::Mark("best of the disk"), ""),
];

/// What the table tries.
const DEPTHS: [usize; 4] = [1, 4, 16, 32];
const CHUNKS: [usize; 3] = [256 << 10, 1 << 20, 4 << 20];

/// Bytes of a unit that the crate's reader is given.
const UNIT: u64 = 32 << 20;

struct Row {
    way: Way,
    moved: Moved,
    /// Bytes that the page cache held when they were asked for.
    cached: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, Some(&options.plot), || run(&options))
}

fn run(options: &Options) -> Result<Report, Failure> {
    let Common { window, rounds, .. } = options.common;
    // A file named twice is one file.
    let files: Vec<PathBuf> = options.files.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
    let disk = Disk::open(&files)?;
    let cached = CachedFiles::note(&files)?;
    let cached_bytes = cached.as_ref().map(CachedFiles::bytes);
    disk.check()?;

    let direct = disk.without_direct().is_none();
    let mut ways = if direct { disk.ways(true, &DEPTHS, &CHUNKS) } else { Vec::new() };
    ways.extend(disk.ways(false, &DEPTHS, &CHUNKS));
    let bar = report::progress(ways.len() as u64 + 2 * u64::from(rounds), &options.common)?;
    bar.set_message("warming up");
    disk.window(ways[ways.len() / 4], options.warm_up)?;
    bar.set_message("trying");
    let row = |way: Way| -> Result<Row, Failure> {
        let (moved, cached) = disk.window(way, window)?;
        bar.inc(1);
        Ok(Row { way, moved, cached })
    };
    let rows = ways.into_iter().map(row).collect::<Result<Vec<_>, _>>()?;
    // The disk's own: rows through the page cache may not have reached it.
    let own = rows.iter().filter(|row| row.way.direct == direct);
    let best = own.max_by(|a, b| a.moved.rate().total_cmp(&b.moved.rate())).expect("there are rows").way;

    bar.set_message("comparing");
    let (checkpoint, units) = as_units(&files)?;
    let cache = if direct { CachePolicy::Direct } else { CachePolicy::Buffered };
    let settings = Settings { cache, ..Settings::default() };
    let plan = Plan::new(&checkpoint, &units, &settings, Sharing::Own)?;
    let slots: usize = plan.memory().iter().map(|part| part.bytes).sum();
    let mut pipeline = Pipeline::new(&Cpu, &checkpoint, &units, &settings, &[])?;
    // A sample: about sixteen units.
    pipeline.check(&checkpoint, &units, units.len().div_ceil(16))?;
    let (mut raw, mut ours, mut allocations) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        let settle = || {
            pipeline.settle();
            Ok(())
        };
        raw.push(disk.window_between(best, window, settle, || pipeline.empty())?.0.rate());
        let used = pipeline.window(window)?;
        ours.push(used.moved.rate());
        allocations += used.allocations;
        bar.inc(2);
    }
    bar.finish_and_clear();
    if let Some(cached) = cached {
        cached.restore();
    }

    let mut report = Report::new("bench_read", Cpu.describe(), &COLUMNS);
    report.line("files", about(files.len(), disk.bytes(), cached_bytes));
    rows.iter().for_each(|row| report.row(row.cells(best, cached_bytes.is_some())));
    let reader = pipeline.stats().reader.to_string();
    let ratios: Vec<_> = ours.iter().zip(&raw).map(|(ours, raw)| ours / raw).collect();
    report.compare(
        Figure::new(format!("layer-streamer, which reads by {reader}, and copies once"), "GB/s", &ours),
        Figure::new(best.to_string(), "GB/s", &raw),
        "layer-streamer / the best raw reads",
        &ratios,
    );
    report.field("file_bytes", disk.bytes());
    report.field("page_cache_bytes", cached_bytes);
    let Way { uring: _, direct, depth, chunk } = best;
    report.field("best", json!({"engine": best.engine(), "direct": direct, "depth": depth, "chunk_bytes": chunk}));
    report.field("reader", reader);
    report.field("slot_bytes", slots);
    report.field("allocations", allocations);
    [disk.without_direct(), disk.without_uring.clone()].into_iter().flatten().for_each(|note| report.note(note));
    if 4 * slots as u64 > disk.bytes() {
        let [files, slots] = [disk.bytes(), slots as u64].map(units::bytes);
        report.note(format!("{files} of files are less than four times the {slots} of slots; use larger ones"));
    }
    report.plot = Some(plot(&rows, direct));
    Ok(report)
}

fn about(files: usize, bytes: u64, cached: Option<u64>) -> String {
    let cached = match cached {
        Some(cached) => format!("the page cache held {} of it at the start", units::bytes(cached)),
        None => "what the page cache holds cannot be told (Linux 6.5 can)".into(),
    };
    format!("{files} with {}; {cached}", units::bytes(bytes))
}

/// GB/s of the disk's own rows over depth.
fn plot(rows: &[Row], direct: bool) -> Plot {
    let line = |uring: bool, chunk: usize| {
        let of_line =
            rows.iter().filter(|Row { way, .. }| (way.uring, way.direct, way.chunk) == (uring, direct, chunk));
        let points: Vec<_> =
            of_line.clone().map(|row| (row.way.depth as f64, Spread::of(&[row.moved.rate()]))).collect();
        let way = of_line.map(|row| row.way).next()?;
        Some(Line { name: format!("{}, {}", way.engine(), units::bytes(chunk as u64)), points })
    };
    let lines =
        [true, false].into_iter().flat_map(|uring| CHUNKS.into_iter().filter_map(move |chunk| line(uring, chunk)));
    let panel =
        Panel { x: "reads at once", y: "GB/s", format: |x| format!("{x}"), lines: lines.collect(), limit: None };
    let cache = if direct { "past" } else { "through" };
    Plot { title: format!("Reads {cache} the page cache, by depth and chunk"), panels: vec![panel] }
}

impl Row {
    /// `known`: the system tells what the page cache holds.
    fn cells(&self, best: Way, known: bool) -> [Value; 8] {
        let Self { way, moved, cached } = self;
        let share = (known && !way.direct).then(|| *cached as f64 / moved.bytes.max(1) as f64);
        [
            json!(way.cache()),
            json!(way.engine()),
            json!(way.depth),
            json!(way.chunk),
            json!(moved.rate()),
            json!(moved.cpu_per_gb()),
            json!(share),
            json!(*way == best),
        ]
    }
}

/// The files as a checkpoint: tensors of bytes, each a unit.
fn as_units(files: &[PathBuf]) -> Result<(Checkpoint, Vec<Unit>), Failure> {
    let (mut tensors, mut units) = (Vec::new(), Vec::new());
    for file in files {
        for offset in (0..Path::new(file).metadata()?.len()).step_by(UNIT as usize) {
            let len = UNIT.min(file.metadata()?.len() - offset) as usize;
            let name = format!("{} from byte {offset}", file.display());
            units.push(Unit::new(&name));
            units.last_mut().expect("it was just pushed").keep("bytes", &name);
            tensors.push(StoredTensor { name, file: file.clone(), offset, dtype: DType::U8, shape: vec![len] });
        }
    }
    Ok((Checkpoint::from_table(tensors)?, units))
}
