//! Whether the tuner's answer is ever slower than the default.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::Value;

use crate::{
    memory_bound::checkpoint,
    run::{self, Failure, Run},
    statistics::quartiles,
};

/// Check that what `tune` answers is never slower than the default.
///
/// Makes a checkpoint below the folder, or takes the one that is there. `tune` searches once where all of it fits in RAM and once
/// within 0.6 of its bytes; then `generate` takes turns with that answer and without. Prints the ratio of their seconds a token,
/// and how far the default is from itself. Fails if a median is more than 1.03.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask tune-pairs ~/checkpoints
  cargo xtask tune-pairs ~/checkpoints --pairs 5 --shape qwen2.5-7b -- --layers 4")]
pub struct Options {
    /// Where the checkpoint lies or is made, as FOLDER/SHAPE
    #[arg(value_parser = run::absolute)]
    folder: PathBuf,
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// A shape that `layer-streamer make-checkpoint` knows
    #[arg(long, default_value = "qwen2.5-0.5b")]
    shape: String,
    /// Further options of `make-checkpoint`
    #[arg(last = true)]
    more: Vec<String>,
}

/// The median may be so much more than 1.
const MOST: f64 = 1.03;

pub fn run(options: &Options) -> Result<(), Failure> {
    let program = run::program()?;
    let model = checkpoint(&program, &options.folder, &options.shape, &options.more)?;
    let bytes = shard_bytes(&model)?;
    let work = run::scratch("tune-pairs")?;
    let mut slower = Vec::new();
    for ram in ["auto".to_owned(), (bytes * 6 / 10).to_string()] {
        println!("== --ram {ram} of {bytes} bytes");
        let record = work.path().join(&ram);
        let mut tune = run::command(&program, &["tune", "--device", "cpu", "--ram", &ram, "--search", "plan"]);
        tune.arg("--model").arg(&model).arg("--json").arg(&record).quiet()?;
        let record = record.to_str().ok_or("the temporary folder's name is not UTF-8")?;
        let median = compare(&program, &model, &["--ram", &ram], &["--config", record], options.pairs)?;
        let found: Value = serde_json::from_str(&fs::read_to_string(record)?)?;
        if found["answer"]["placement"] == found["default"] {
            println!("the answer is the default: what differs is the machine");
        }
        if median > MOST {
            slower.push(format!("{median:.3} of the default's seconds a token with --ram {ram}"));
        }
    }
    if slower.is_empty() { Ok(()) } else { Err(format!("the answer is slower: {}", slower.join(", ")).into()) }
}

fn shard_bytes(model: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(model)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// The median of the answer's seconds a token over the default's.
fn compare(program: &Path, model: &Path, default: &[&str], tuned: &[&str], pairs: u32) -> Result<f64, Failure> {
    let seconds = |options: &[&str]| -> Result<f64, Failure> {
        let mut command = run::command(program, &["generate", "--device", "cpu", "--context", "256", "--model"]);
        command.arg(model).args(options);
        command.args("--prompt-ids 1,2,3 --print-ids --max-new-tokens 12 --json".split(' '));
        let said: Value = serde_json::from_slice(&command.quiet()?.stdout)?;
        Ok(1.0 / said["tokens_per_second"].as_f64().ok_or("generate gives no tokens_per_second")?)
    };
    let (mut ratios, mut noise) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        // Each runs twice, the other in between: a machine that becomes faster or slower meanwhile favours neither.
        let (outer, inner) = if pair % 2 == 1 { (default, tuned) } else { (tuned, default) };
        let outer_first = seconds(outer)?;
        let inner_both = [seconds(inner)?, seconds(inner)?];
        let outer_both = [outer_first, seconds(outer)?];
        let [default, tuned] = if pair % 2 == 1 { [outer_both, inner_both] } else { [inner_both, outer_both] };
        ratios.push((tuned[0] + tuned[1]) / (default[0] + default[1]));
        noise.push(default[1] / default[0]);
    }
    println!("{pairs} pairs: {}", spread(&ratios, "the default's seconds a token"));
    println!("the default beside itself: {}", spread(&noise, "its own"));
    Ok(quartiles(&ratios)[1])
}

fn spread(ratios: &[f64], of: &str) -> String {
    let [low, median, high] = quartiles(ratios);
    let (least, most) =
        ratios.iter().fold((f64::MAX, f64::MIN), |(least, most), ratio| (least.min(*ratio), most.max(*ratio)));
    format!("{median:.3} of {of} in the median, quartiles {low:.3} and {high:.3}, from {least:.3} to {most:.3}")
}
