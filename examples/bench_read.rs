//! What a disk gives to which way of reading, and what the crate's own reader makes of it.
//!
//! First a table of raw reads: past the page cache and through it, `pread` threads and io_uring, by depth (reads at
//! once) and chunk (bytes of each). Then the best row and the crate's pipeline, which streams the same files as units
//! of bytes, in alternating windows. Nothing is evicted from the page cache: for buffered rows the table says how much
//! came from it.

mod bench;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bench::{CachedFiles, Disk, Failure, Moved, Pipeline, Used, Way, finish, progress, seconds};
use clap::Parser;
use layer_streamer::{
    Checkpoint, DType, Settings, StoredTensor, Unit,
    device::Cpu,
    plan::{CachePolicy, Plan},
};

/// Measure the disk that files lie on, and how close this crate's reader comes to it.
///
/// Checks samples first, reads for a while, tries every way of reading, then measures the best one and the crate's
/// reader in turn. Prints GB/s (10⁹ bytes) and CPU seconds per GB.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  bench_read /mnt/nvme/7b/*.safetensors         the disk under a model; as large as you have, gigabytes at least
  bench_read --window 2 FILE                    a quieter table, in four times the time
  bench_read FILE --json | jq .best             the way of reading to use

A row is one short window: on a disk that several programs share, compare rows only roughly. The two lines below
the table were measured in turn, and compare well.")]
struct Options {
    /// Files to read, all on the disk to measure; they are only read
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Length of a window: one for each row, and each of the pairs
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    window: Duration,
    /// How long to read before the first window, which uses up what the disk had saved up
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    warm_up: Duration,
    /// Pairs of windows: the best row, and the crate's reader
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

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
    finish(run(&Options::parse()))
}

fn run(options: &Options) -> Result<String, Failure> {
    // A file named twice is one file.
    let files: Vec<PathBuf> = options.files.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
    let disk = Disk::open(&files)?;
    let cached = CachedFiles::note(&files)?;
    let cached_bytes = cached.as_ref().map(CachedFiles::bytes);
    disk.check()?;

    let direct = disk.without_direct().is_none();
    let mut ways = if direct { disk.ways(true, &DEPTHS, &CHUNKS) } else { Vec::new() };
    ways.extend(disk.ways(false, &DEPTHS, &CHUNKS));
    let bar = progress(ways.len() as u64 + 2 * u64::from(options.pairs), options.json)?;
    bar.set_message("warming up");
    disk.window(ways[ways.len() / 4], options.warm_up)?;
    bar.set_message("trying");
    let row = |way: Way| -> Result<Row, Failure> {
        let (moved, cached) = disk.window(way, options.window)?;
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
    let plan = Plan::new(&checkpoint, &units, &settings)?;
    let slots: usize = plan.memory().iter().map(|part| part.bytes).sum();
    let mut pipeline = Pipeline::new(&Cpu, &checkpoint, &units, &settings)?;
    // A sample: about sixteen units.
    pipeline.check(&checkpoint, &units, units.len().div_ceil(16))?;
    let (mut raw, mut ours) = (Moved::default(), Used::default());
    for _ in 0..options.pairs {
        let settle = || {
            pipeline.settle();
            Ok(())
        };
        raw.add(disk.window_between(best, options.window, settle, || pipeline.empty())?.0);
        ours.add(pipeline.window(options.window)?);
        bar.inc(2);
    }
    bar.finish_and_clear();
    if let Some(cached) = cached {
        cached.restore();
    }
    let figures = Figures {
        rows,
        best,
        ours,
        raw,
        bytes: disk.bytes(),
        slots,
        cached: cached_bytes,
        reader: pipeline.stats().reader.to_string(),
        notes: [disk.without_direct(), disk.without_uring.clone()].into_iter().flatten().collect(),
    };
    Ok(if options.json { figures.json() } else { figures.text(files.len()) })
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

/// What was measured.
struct Figures {
    rows: Vec<Row>,
    best: Way,
    ours: Used,
    raw: Moved,
    /// Of the files.
    bytes: u64,
    slots: usize,
    /// Bytes of the files that the page cache held at the start, if the system tells.
    cached: Option<u64>,
    reader: String,
    notes: Vec<String>,
}

impl Figures {
    fn ratio(&self) -> f64 {
        self.ours.moved.rate() / self.raw.rate()
    }

    fn json(&self) -> String {
        let way = |way: Way| {
            serde_json::json!({
                "engine": way.engine(), "direct": way.direct, "depth": way.depth, "chunk_bytes": way.chunk,
            })
        };
        let rows = self.rows.iter().map(|row| {
            let mut object = way(row.way);
            object["gb_s"] = row.moved.rate().into();
            object["cpu_seconds_per_gb"] = row.moved.cpu_per_gb().into();
            object["bytes"] = row.moved.bytes.into();
            object["page_cache_bytes"] = self.cached.map(|_| row.cached).into();
            object
        });
        let object = serde_json::json!({
            "file_bytes": self.bytes, "page_cache_bytes": self.cached, "rows": rows.collect::<Vec<_>>(),
            "best": way(self.best),
            "bytes": self.ours.moved.bytes, "seconds": self.ours.moved.seconds, "gb_s": self.ours.moved.rate(),
            "limit_gb_s": self.raw.rate(), "ratio": self.ratio(), "reader": self.reader, "slot_bytes": self.slots,
            "allocations": self.ours.allocations, "notes": self.notes,
        });
        format!("{object}\n")
    }

    fn text(&self, files: usize) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let mut text = format!("{files} file{}, {:.3} GB", if files == 1 { "" } else { "s" }, gb(self.bytes));
        text += &match self.cached {
            Some(cached) => format!("; the page cache held {:.3} GB of it at the start\n", gb(cached)),
            None => "; what the page cache holds cannot be told (Linux 6.5 can)\n".into(),
        };
        text += "reads     by        depth  chunk, KiB   GB/s  CPU, s/GB  from the page cache\n";
        for row in &self.rows {
            let Way { depth, chunk, direct, .. } = row.way;
            let cached = match self.cached {
                _ if direct => "-".into(),
                Some(_) => format!("{:.0} %", row.cached as f64 / row.moved.bytes.max(1) as f64 * 100.0),
                None => "?".into(),
            };
            let line = format!(
                "{:9} {:9} {depth:5} {:11} {:6.2} {:10.3}  {cached:>19}{}",
                row.way.cache(),
                row.way.engine(),
                chunk >> 10,
                row.moved.rate(),
                row.moved.cpu_per_gb(),
                if row.way == self.best { "  ← best of the disk" } else { "" }
            );
            text += &(line + "\n");
        }
        text += &format!(
            "\nlayer-streamer  {:.2} GB/s  ({:.1} GB in {:.1} s, read by {}, and copied once)\n",
            self.ours.moved.rate(),
            self.ours.moved.gb(),
            self.ours.moved.seconds,
            self.reader
        );
        text += &format!("limit           {:.2} GB/s  ({}, in the same run)\n", self.raw.rate(), self.best);
        text += &format!("ratio           {:.3}\n", self.ratio());
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        if 4 * self.slots as u64 > self.bytes {
            let (files, slots) = (gb(self.bytes), gb(self.slots as u64));
            text += &format!(
                "note: {files:.3} GB of files are less than four times the {slots:.3} GB of slots; use larger ones\n"
            );
        }
        text
    }
}
