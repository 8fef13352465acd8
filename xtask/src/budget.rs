//! Memory turns into speed as forecast.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use crate::run::{self, Failure, Run};

/// Check that memory turns into speed as forecast.
///
/// Streams the checkpoint on the CPU device within the least RAM that will do and some percent of the layers' bytes. What a pass
/// reads must be what was planned, to the byte, and take at most a tenth longer than by the limits of the same run.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask budget ~/models/Qwen2.5-3B
  cargo xtask budget ~/models/Qwen2.5-3B 0 50 --rounds 3")]
pub struct Options {
    /// The checkpoint's folder
    #[arg(value_parser = run::absolute)]
    folder: PathBuf,
    /// How much of the layers is kept
    #[arg(default_values_t = [0, 25, 50, 75, 100])]
    percent: Vec<u32>,
    /// Measurements of each, in turn with the limits
    #[arg(long, default_value_t = 6)]
    rounds: u32,
    /// A `bench_stream` that is built already
    #[arg(long, value_parser = run::absolute)]
    bench: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let bench = match &options.bench {
        Some(bench) => bench.clone(),
        None => {
            run::cargo("build -q --release --locked --example bench_stream").run()?;
            run::target().join("release/examples/bench_stream")
        }
    };
    let mut failed = Vec::new();
    for percent in &options.percent {
        let mut command = run::command(&bench, &["--device", "cpu", "--json"]);
        command.arg("--model").arg(&options.folder);
        command.args(["--keep", &percent.to_string(), "--rounds", &options.rounds.to_string()]);
        let found = serde_json::from_str(&command.read()?)?;
        let (line, is_as_planned) = judge(&found)?;
        println!("{percent:5} %: {line}");
        if !is_as_planned {
            failed.push(format!("{percent} %"));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("not as planned: {}", failed.join(", ")).into()) }
}

/// A line for people, and whether what was planned came about.
fn judge(found: &Value) -> Result<(String, bool), Failure> {
    let number =
        |path: &str| found.pointer(path).and_then(Value::as_f64).ok_or(format!("bench_stream gives no {path}"));
    let (kept, seconds) = (number("/kept")?, number("/pass_seconds/median")?);
    let (read, planned_read) = (number("/read_bytes_per_pass")?, number("/planned_bytes_per_pass")?);
    // Where nothing is read nothing is forecast.
    let planned = number("/planned_pass_seconds").unwrap_or(0.0);
    let mut line = format!(
        "{kept:3} kept, {:8.3} GB a pass (planned {:8.3}), {seconds:7.3} s (planned {planned:7.3})",
        read / 1e9,
        planned_read / 1e9
    );
    if planned > 0.0 {
        let (limit, memcpy) = (number("/limit/median")?, number("/memcpy_gb_s")?);
        let ratio = planned / seconds;
        line += &format!("; planned / taken {ratio:.3}, limits {limit:.2} and {memcpy:.2} GB/s");
    }
    Ok((line, read == planned_read && (planned == 0.0 || seconds <= 1.1 * planned)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bytes_must_be_as_planned_and_seconds_nearly() {
        let found = |read: u64, seconds: f64| {
            json!({"kept": 2, "pass_seconds": {"median": seconds}, "read_bytes_per_pass": read, "planned_bytes_per_pass": 1000,
                   "planned_pass_seconds": 1.0, "limit": {"median": 2.0}, "memcpy_gb_s": 6.0})
        };
        assert!(judge(&found(1000, 1.1)).unwrap().1);
        assert!(!judge(&found(1001, 1.0)).unwrap().1);
        assert!(!judge(&found(1000, 1.11)).unwrap().1);
        assert!(judge(&json!({})).is_err());
    }
}
