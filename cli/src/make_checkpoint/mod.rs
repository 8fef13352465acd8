//! Writes a checkpoint of random weights: the names, shapes and files of a real model without the download.

mod blocks;
mod folder;
mod gguf;
mod quantised;
mod shapes;
mod weights;
mod writing;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use layer_streamer::DType;
use quantised::{FORMATS, Format};
use shapes::{Shape, shape_parser};

use crate::{Failure, called};

const EXAMPLES: &str = "\
Examples:
  A 15 GB model in four shards, as Qwen2.5-7B-Instruct has them:
    layer-streamer make-checkpoint /mnt/nvme/7b --shape qwen2.5-7b
  Eight layers of the 72B model: real layer sizes without the real wait:
    layer-streamer make-checkpoint /mnt/nvme/72b-8 --shape qwen2.5-72b --layers 8
  Another set of weights, in shards of half a gigabyte:
    layer-streamer make-checkpoint /tmp/small --shape qwen2.5-0.5b --seed 7 --shard-size 500MB
  A GGUF file of 4.3 GB, whose matrices are of four and a half bits a weight:
    layer-streamer make-checkpoint /mnt/nvme/7b.gguf --shape qwen2.5-7b --type q4_k
  A folder of 8.7 GB, whose layers are in FP8, as DeepSeek's are:
    layer-streamer make-checkpoint /mnt/nvme/7b-fp8 --shape qwen2.5-7b --type fp8

A folder has no tokenizer, so give prompts as token ids:
    layer-streamer generate --model /mnt/nvme/7b --prompt-ids 1,2,3
A GGUF file has one, with a token for each byte of a text.";

/// Write a checkpoint of random weights, shaped like a real model: a Hugging Face folder, or a GGUF file
///
/// For measuring and testing where the real weights are not at hand: names, shapes, types and shards are the model's own,
/// so streaming costs the same. The text that such a model generates is noise.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Folder to write to; made if missing, refused if it holds a checkpoint. Or a new file, NAME.gguf
    path: PathBuf,
    /// Model to take names and shapes from
    #[arg(long, value_parser = shape_parser())]
    shape: &'static Shape,
    /// Number of layers, if not the model's own
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    layers: Option<u64>,
    /// Of a GGUF file the type of embedding, head and the layers' matrices; norms and biases are in F32. Of a folder how the
    /// layers' matrices are quantised (fp8 to nf4); all else is in BF16
    #[arg(long = "type", value_name = "TYPE", ignore_case = true, value_parser = type_parser())]
    kind: Option<Kind>,
    /// Same seed, same weights, whatever the number of layers and the shard size; a file in F32 or BF16 has those of the folder
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tensor bytes in one file of a folder: bytes, or with a decimal suffix KB, MB, GB (a larger tensor gets its own
    /// file) [default: 4GB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    shard_size: Option<u64>,
}

/// Tensor bytes of a shard, unless said otherwise.
const SHARD: u64 = 4_000_000_000;

/// What matrices are made of.
#[derive(Clone, Copy)]
enum Kind {
    InFile(DType),
    InFolder(Format),
}

/// All kinds, by their names.
fn kinds() -> impl Iterator<Item = (&'static str, Kind)> {
    let in_file = gguf::types().map(|dtype| (dtype.name(), Kind::InFile(dtype)));
    in_file.chain(FORMATS.map(|(name, format)| (name, Kind::InFolder(format))))
}

fn type_parser() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(kinds().map(|(name, _)| name)).try_map(|said| {
        let named = kinds().find(|(name, _)| name.eq_ignore_ascii_case(&said));
        named.map(|(_, kind)| kind).ok_or("is not a known type")
    })
}

fn parse_bytes(text: &str) -> Result<u64, &'static str> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit = match &text[digits..] {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("give whole bytes, KB, MB or GB, such as 4GB"),
    };
    let bytes = text[..digits].parse().ok().and_then(|number: u64| number.checked_mul(unit));
    bytes.filter(|&bytes| bytes > 0).ok_or("give at least one byte and less than 2^64")
}

/// An error as a sentence with the file in it.
fn cannot(verb: &str, path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("cannot {verb} {}: {error}", path.display())
}

/// Returns the line to print.
fn make(Options { path, shape, layers, kind, seed, shard_size }: &Options) -> Result<String, String> {
    let layers = layers.unwrap_or(shape.layers);
    let start = Instant::now();
    let names_file = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let said = path.display();
    let folder = |format| folder::make(path, shape, layers, *seed, shard_size.unwrap_or(SHARD), format);
    let bytes = match (kind, names_file) {
        (None, false) => folder(None)?,
        (Some(Kind::InFolder(format)), false) => folder(Some(*format))?,
        (Some(Kind::InFile(_)), true) if shard_size.is_some() => {
            return Err(format!(
                "{said}: --shard-size is for folders; a GGUF file, which this --type makes, is one file"
            ));
        }
        (Some(Kind::InFile(dtype)), true) => gguf::make(path, shape, layers, *seed, *dtype)?,
        (Some(Kind::InFile(dtype)), false) => {
            let formats = FORMATS.map(|(name, _)| name).join(", ");
            return Err(format!(
                "{said}: --type {dtype} makes a GGUF file; name one, such as {said}.gguf, or for a folder take one of \
                 {formats}"
            ));
        }
        (Some(Kind::InFolder(_)), true) => {
            let folder = path.with_extension("");
            return Err(format!(
                "{said}: this --type makes a folder; name one, such as {}, or for a GGUF file take a type such as q4_k",
                folder.display()
            ));
        }
        (None, true) => {
            let cause = "a GGUF file has weights of some type; say which, such as --type q4_k, or name a folder";
            return Err(format!("{said}: {cause}"));
        }
    };
    let (path, seconds) = (path.display(), start.elapsed().as_secs_f64());
    let rate = bytes as f64 / 1e9 / seconds;
    let run = format!("{} generate --model {path} --prompt-ids 1,2,3", called().display());
    Ok(format!("{path}: {bytes} bytes in {seconds:.1} s, {rate:.2} GB/s; run it: {run}"))
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let line = make(options)?;
    writeln!(io::stdout(), "{line}").map_err(|error| format!("cannot print: {error}").into())
}
