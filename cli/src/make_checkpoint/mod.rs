//! Writes a checkpoint of random weights: the names, shapes and files of a real model without the download.

mod blocks;
mod folder;
mod gguf;
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
    /// Folder to write to; made if missing, refused if it holds a checkpoint. With --type a new file, NAME.gguf
    path: PathBuf,
    /// Model to take names and shapes from
    #[arg(long, value_parser = shape_parser())]
    shape: &'static Shape,
    /// Number of layers, if not the model's own
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    layers: Option<u64>,
    /// Make a GGUF file with embedding, head and the layers' matrices of this type; norms and biases are in F32
    #[arg(long = "type", value_name = "TYPE", ignore_case = true, value_parser = type_parser(), conflicts_with = "shard_size")]
    dtype: Option<DType>,
    /// Same seed, same weights, whatever the number of layers and the shard size; a file in F32 or BF16 has those of the folder
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tensor bytes in one file of a folder: bytes, or with a decimal suffix KB, MB, GB (a larger tensor gets its own file)
    #[arg(long, value_name = "BYTES", default_value = "4GB", value_parser = parse_bytes)]
    shard_size: u64,
}

fn type_parser() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(gguf::types().map(DType::name)).try_map(|name| {
        let named = |dtype: &DType| dtype.name().eq_ignore_ascii_case(&name);
        gguf::types().find(named).ok_or("is not a known type")
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
fn make(Options { path, shape, layers, dtype, seed, shard_size }: &Options) -> Result<String, String> {
    let layers = layers.unwrap_or(shape.layers);
    let start = Instant::now();
    let names_file = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let bytes = match (dtype, names_file) {
        (Some(dtype), true) => gguf::make(path, shape, layers, *seed, *dtype)?,
        (None, false) => folder::make(path, shape, layers, *seed, *shard_size)?,
        (Some(_), false) => {
            return Err(format!("{}: --type makes a GGUF file; name one, such as {0}.gguf", path.display()));
        }
        (None, true) => {
            let cause = "a GGUF file has weights of some type; say which, such as --type q4_k, or name a folder";
            return Err(format!("{}: {cause}", path.display()));
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
