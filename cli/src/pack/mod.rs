//! Writes a model whose BF16 weights are packed, and the inverse (`unpack`).
//!
//! Files are converted one by one, and within them tensor by tensor. All processors read and convert pieces of a tensor; one
//! thread takes them in order and writes. A file gets its name when it was read back and has what the source has.
//!
//! | file | what |
//! | --- | --- |
//! | `folder.rs` | which files are taken, and what may lie where they are written |
//! | `header.rs` | headers of safetensors files, with what they say of packed tensors |
//! | `convert.rs` | one file |
//! | `out.rs` | the file that is written, past the page cache |
//! | `team.rs` | pieces in order, by all processors |
//! | `journal.rs` | what was done, so that the same command goes on from there |
//! | `report.rs` | the table at the end |

mod convert;
mod folder;
mod header;
mod journal;
mod out;
mod report;
mod team;

use std::{
    fmt,
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use indicatif::ProgressBar;
use layer_streamer::files;
use serde_json::json;

pub use self::folder::check_complete;
use self::{
    convert::{Converter, partial_of},
    folder::Source,
    header::{Header, Tensor},
    journal::{Journal, Work},
    report::Report,
    team::Team,
};
use crate::{
    Failure,
    hub::{self, ModelFolder},
    interrupt, units,
    waiting::progress,
};

const EXAMPLES: &str = "\
Any BF16 weights come out of `layer-streamer unpack` bit for bit; what is not BF16, or would not get smaller, is stored as it is.
Each file is read back from the disk and compared before it gets its name. Ctrl-C, or whatever else ends it, loses little more
than the tensor under way: the same command goes on from there.

Examples:
  A model of the hub, downloaded if it is not there:
    layer-streamer pack Qwen/Qwen2.5-7B-Instruct /mnt/nvme/7b-packed
  A folder, and what it was made of again:
    layer-streamer pack ~/models/7b /mnt/nvme/7b-packed
    layer-streamer unpack /mnt/nvme/7b-packed /mnt/nvme/7b
  Whether a packed folder is whole:
    layer-streamer unpack --check /mnt/nvme/7b-packed";

/// Pack a model: its BF16 weights take a third less on the disk, without loss
///
/// Configuration, tokenizer and whatever else belongs to the model are copied, other weights (PyTorch's, GGUF) are not.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Folder of a model, or its name on the hub
    #[arg(value_name = "MODEL", value_parser = hub::parser())]
    model: ModelFolder,
    /// Folder to write to; made if missing, refused if it holds anything but what this command began
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    shown: Shown,
}

/// What people and programs see.
#[derive(Args)]
pub struct Shown {
    /// Print JSON in place of the table
    #[arg(long)]
    json: bool,
    /// Show no progress, and not how long it took
    #[arg(long)]
    quiet: bool,
}

pub fn run(Options { model, folder, shown }: &Options) -> Result<(), Failure> {
    convert(model, folder, shown, true)
}

/// An error as a sentence with the file in it, and with what to do where the error itself does not say that.
fn cannot(verb: &str, path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| {
        let remedy = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "; make room, then the same command goes on from there"
            }
            ErrorKind::ReadOnlyFilesystem => "; name a folder on another disk",
            _ => "",
        };
        format!("cannot {verb} {}: {error}{remedy}", path.display()).into()
    }
}

/// Ctrl-C.
#[derive(Debug)]
struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// The headers of all files whose tensors count.
fn headers(source: &Source) -> Result<Vec<(PathBuf, Header)>, Failure> {
    let read = |name: &PathBuf| {
        let path = source.folder.join(name);
        let file = File::open(&path).map_err(cannot("open", &path))?;
        Ok((name.clone(), Header::read(&file, &path)?))
    };
    source.weights.iter().map(read).collect()
}

/// Refuses what is converted already.
fn check_source(headers: &[(PathBuf, Header)], folder: &Path, packing: bool) -> Result<(), Failure> {
    let packed = headers.iter().find(|(_, header)| header.is_packed());
    let folder = folder.display();
    match packed {
        Some((name, _)) if packing => Err(format!("{folder} is packed already ({})", name.display()).into()),
        None if !packing => Err(format!("{folder} is not packed: no file of it has a packed tensor").into()),
        None if !headers.iter().any(|(_, header)| header.tensors.iter().any(Tensor::can_be_packed)) => {
            Err(format!("{folder} has no BF16 weights, and no others are packed: leave it as it is").into())
        }
        _ => Ok(()),
    }
}

/// Names tensors in packed files of which nobody can tell whether they are as they were: `pack` gives each a checksum.
fn tell_unchecked(headers: &[(PathBuf, Header)]) {
    for (file, header) in headers.iter().filter(|(_, header)| header.is_packed()) {
        for Tensor { name, .. } in header.tensors.iter().filter(|tensor| tensor.checksum.is_none()) {
            say!("warning: {}: tensor {name} has no checksum: damage to it would not be noticed", file.display());
        }
    }
}

/// Refuses to begin what may not fit on the disk.
fn check_space(source: &Source, headers: &[(PathBuf, Header)], to: &Path, packing: bool) -> Result<(), Failure> {
    let mut needed = source.bytes_beside()?;
    for (name, header) in headers {
        let path = to.join(name);
        let there = fs::metadata(partial_of(&path)).map_or(0, |metadata| metadata.len());
        if !path.exists() {
            let most = header.most_bytes(packing)? + header.tensors.iter().map(Tensor::bytes).sum::<u64>();
            needed += most.saturating_sub(there);
        }
    }
    let at = folder::existing(to)?;
    let free = files::free_bytes(&at).map_err(cannot("examine", &at))?;
    if needed > free {
        let (free, needed) = (units::bytes(free), units::bytes(needed));
        let cause = format!("{} has {free} free, this may take {needed}", at.display());
        return Err(format!("{cause}; name a folder on another disk, or make room").into());
    }
    Ok(())
}

/// Packs or unpacks a model into a folder.
pub fn convert(model: &ModelFolder, to: &Path, shown: &Shown, packing: bool) -> Result<(), Failure> {
    model.fetch(shown.quiet)?;
    let source = Source::read(model)?;
    let headers = headers(&source)?;
    check_source(&headers, &source.folder, packing)?;
    let real = fs::canonicalize(&source.folder).map_err(cannot("find", &source.folder))?;
    let command = if packing { "pack" } else { "unpack" };
    let work = Work { command: command.into(), source: real.display().to_string() };
    source.check_destination(to, &work)?;
    check_space(&source, &headers, to, packing)?;
    fs::create_dir_all(to).map_err(cannot("create", to))?;
    let journal = Journal::open(to, &work)?;
    if !packing {
        tell_unchecked(&headers);
    }
    interrupt::listen();
    let bytes: u64 = headers.iter().flat_map(|(_, header)| &header.tensors).map(Tensor::bytes).sum();
    let begun = Instant::now();
    // Each byte is written and read back.
    let bar = progress(2 * bytes, shown.quiet);
    let report = convert_files(&source, to, packing, journal, &bar);
    bar.finish_and_clear();
    let report = match report {
        Err(error) if error.is::<Interrupted>() => {
            say!("interrupted; the same command goes on from there, or remove {}", to.display());
            return Ok(());
        }
        report => report?,
    };
    let (seconds, rate) = rate(bytes, begun);
    if !shown.quiet {
        let bytes = units::bytes(bytes);
        say!(
            "{command}ed {bytes} in {seconds:.1} s, {}, and read back; the folder is {}",
            units::rate(rate),
            to.display()
        );
    }
    let text = if shown.json {
        let mut json = report.json();
        json["folder"] = to.display().to_string().into();
        (json["seconds"], json["bytes_per_second"]) = (seconds.into(), rate.into());
        format!("{json:#}\n")
    } else {
        report.table()
    };
    print(&text)
}

fn convert_files(
    source: &Source,
    to: &Path,
    packing: bool,
    mut journal: Journal,
    bar: &ProgressBar,
) -> Result<Report, Failure> {
    let converter = Converter { from: &source.folder, to, packing, team: &Team::new(), bar };
    let mut report = Report::new(packing);
    for name in &source.weights {
        let (before, after) = converter.file(name, &mut journal)?;
        before.iter().zip(&after).for_each(|(before, after)| report.add(before, after));
    }
    source.write_beside(to, report.bytes_after())?;
    // The names are on the disk before the folder counts as complete.
    File::open(to).and_then(|folder| folder.sync_all()).map_err(cannot("write", to))?;
    journal.remove()?;
    Ok(report)
}

/// Reads a packed model, and compares what it holds with what was packed.
pub fn check(model: &ModelFolder, shown: &Shown) -> Result<(), Failure> {
    model.fetch(shown.quiet)?;
    let source = Source::read(model)?;
    let headers = headers(&source)?;
    check_source(&headers, &source.folder, false)?;
    let tensors = || headers.iter().flat_map(|(_, header)| &header.tensors);
    let bytes: u64 = tensors().map(Tensor::bytes).sum();
    let bar = progress(bytes, shown.quiet).with_message("verifying");
    let (begun, team) = (Instant::now(), Team::new());
    for (name, _) in &headers {
        convert::verify(&source.folder.join(name), None, &team, &bar)?;
    }
    bar.finish_and_clear();
    let (seconds, rate) = rate(bytes, begun);
    let (all, packed) = (tensors().count(), tensors().filter(|tensor| tensor.packed.is_some()).count());
    let unknown = tensors().filter(|tensor| tensor.checksum.is_none()).count();
    print(&match shown.json {
        true => format!(
            "{:#}\n",
            json!({
                "tensors": all, "packed": packed, "without_checksum": unknown, "bytes": bytes, "seconds": seconds,
                "bytes_per_second": rate,
            })
        ),
        false => {
            let unknown =
                if unknown == 0 { String::new() } else { format!(", {unknown} without a checksum to compare") };
            let (bytes, rate) = (units::bytes(bytes), units::rate(rate));
            format!(
                "all {all} tensors are as they were packed ({packed} packed{unknown}): {bytes} in {seconds:.1} s, {rate}\n"
            )
        }
    })
}

fn rate(bytes: u64, begun: Instant) -> (f64, f64) {
    let seconds = begun.elapsed().as_secs_f64();
    (seconds, bytes as f64 / seconds)
}

fn print(text: &str) -> Result<(), Failure> {
    io::stdout().write_all(text.as_bytes()).map_err(|error| format!("cannot print: {error}").into())
}
