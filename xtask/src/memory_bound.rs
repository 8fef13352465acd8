//! What `generate`, `serve` and `batch` say that they take bounds what they take.

mod batch;
mod generate;
mod serve;

use std::{
    fs::{self, File},
    io::{self, Read},
    mem::MaybeUninit,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use clap::Args;
use serde_json::Value;

use crate::run::{self, Failure, Run};

/// Check that the memory which `generate`, `serve` and `batch` say they take, and 64 MiB, bounds what they take.
///
/// Makes a checkpoint of the shape below the folder, or takes the model that is there, and generates four tokens from it: with
/// settings of its own, within two budgets, and within what a control group leaves, where one can be set. If the model has a
/// tokenizer, a batch of prompts is answered too, and a server within a budget gets all that it takes: sequences that fill the
/// cache and are not read, a full queue, long requests, and those that take much to read.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask memory-bound ~/checkpoints qwen2.5-0.5b
  cargo xtask memory-bound ~/checkpoints qwen2.5-7b -- --layers 4")]
pub struct Options {
    /// Where the checkpoint lies or is made, as FOLDER/SHAPE
    #[arg(value_parser = run::absolute)]
    folder: PathBuf,
    /// A shape that `layer-streamer make-checkpoint` knows, or the name of a model's folder that is there
    shape: String,
    /// Further options of `make-checkpoint`
    #[arg(last = true)]
    more: Vec<String>,
}

const MIB: u64 = 1 << 20;
/// What a process takes besides what it says.
const SLACK: u64 = 64 * MIB;

pub fn run(options: &Options) -> Result<(), Failure> {
    let program = run::program()?;
    let model = checkpoint(&program, &options.folder, &options.shape, &options.more)?;
    generate::check(&program, &model)?;
    if !model.join("tokenizer.json").exists() {
        println!("left out: serve and batch, since the model has no tokenizer");
        return Ok(());
    }
    batch::check(&program, &model)?;
    serve::check(&program, &model)
}

/// FOLDER/SHAPE, which is made if it is not there.
pub fn checkpoint(program: &Path, folder: &Path, shape: &str, more: &[String]) -> Result<PathBuf, Failure> {
    let model = folder.join(shape);
    if !model.join("config.json").exists() {
        run::command(program, &["make-checkpoint"]).arg(&model).args(["--shape", shape]).args(more).run()?;
    }
    Ok(model)
}

/// The least RAM that will do, as `plan --ram 1 --json` says when it refuses that.
pub fn least_ram(plan: &mut Command) -> Result<u64, Failure> {
    let refused = plan.args(["--ram", "1", "--json"]).output()?;
    let said = String::from_utf8_lossy(&refused.stdout);
    let least = serde_json::from_str(&said).ok().and_then(|said: Value| said["refused"]["least"].as_u64());
    least
        .filter(|_| !refused.status.success())
        .ok_or_else(|| format!("no refusal that has the least RAM: {said}").into())
}

/// What a program says that it takes, by purpose, in bytes.
type Said = Vec<(String, u64)>;

/// The same from the JSON of a program.
fn said(memory: &Value) -> Result<Said, Failure> {
    let part = |part: &Value| Some((part["purpose"].as_str()?.to_owned(), part["bytes"].as_u64()?));
    let parts = memory.as_array().and_then(|parts| parts.iter().map(part).collect());
    parts.ok_or_else(|| format!("no list of what takes memory: {memory}").into())
}

fn total(said: &Said) -> u64 {
    said.iter().map(|(_, bytes)| bytes).sum()
}

/// Holds a peak against what was said, or both against the budget. `purposes` have to be among what was said.
fn judge(what: &str, said: &Said, purposes: &[&str], peak: u64, budget: Option<u64>) -> Result<(), Failure> {
    let total = total(said);
    let bound = budget.unwrap_or(total);
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let over = mib(peak) - mib(bound);
    let (total_mib, bound_mib, peak_mib) = (mib(total), mib(bound), mib(peak));
    println!("{what}: said {total_mib:.0} MiB, bound {bound_mib:.0} MiB, peak {peak_mib:.0} MiB: {over:+.0} MiB");
    if let Some(missing) =
        purposes.iter().find(|name| !said.iter().any(|(purpose, bytes)| purpose == *name && *bytes > 0))
    {
        return Err(format!("{what}: nothing is said of {missing}").into());
    }
    if total == 0 || total > bound || peak > bound + SLACK {
        return Err(format!("{what}: more than was said").into());
    }
    Ok(())
}

/// What a command writes to stdout, and the most bytes of RAM that it had.
fn peak_of(command: &mut Command) -> Result<(String, u64), Failure> {
    let errors = tempfile::NamedTempFile::new()?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(errors.path())?).spawn()?;
    let mut said = String::new();
    child.stdout.take().expect("stdout is a pipe").read_to_string(&mut said)?;
    let (mut status, mut usage) = (0, MaybeUninit::<libc::rusage>::uninit());
    let id = i32::try_from(child.id())?;
    // SAFETY: both pointers are to live variables of the types that wait4 fills. The child is not waited for elsewhere: `child`
    // is dropped unused.
    let waited = unsafe { libc::wait4(id, &raw mut status, 0, usage.as_mut_ptr()) };
    if waited != id {
        return Err(io::Error::last_os_error().into());
    }
    let status = ExitStatus::from_raw(status);
    if !status.success() {
        return Err(format!("ended with {status}: {}", fs::read_to_string(errors.path())?).into());
    }
    // SAFETY: wait4 has returned the child's id, so it has filled `usage`.
    let usage = unsafe { usage.assume_init() };
    Ok((said, u64::try_from(usage.ru_maxrss)? * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_childs_own() {
        let fill = "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo ${#x}";
        let (said, peak) = peak_of(&mut run::command("sh", &["-c", fill])).unwrap();
        assert_eq!(said, "50000000\n");
        assert!((40 * MIB..400 * MIB).contains(&peak), "{peak}");
        assert!(
            peak_of(&mut run::command("sh", &["-c", "echo why >&2; exit 1"])).unwrap_err().to_string().contains("why")
        );
    }

    #[test]
    fn what_is_said_has_every_purpose_and_bounds_the_peak_within_the_budget() {
        let said = said(&serde_json::json!([
            { "purpose": "kv_cache", "tokens": 64, "bytes": 1000 },
            { "purpose": "requests", "bytes": 0 },
        ]));
        let said = said.unwrap();
        let failure = |purposes: &[&str], peak, budget| {
            judge("fake", &said, purposes, peak, budget).err().map(|failure| failure.to_string())
        };
        assert_eq!(failure(&["kv_cache"], 1000 + SLACK, None), None);
        assert!(failure(&["kv_cache"], 1001 + SLACK, None).unwrap().contains("more than was said"));
        assert_eq!(failure(&["kv_cache"], 1001 + SLACK, Some(1001)), None);
        assert!(failure(&[], 0, Some(999)).unwrap().contains("more than was said"), "it says more than the budget");
        assert!(failure(&["kv_cache", "requests"], 0, None).unwrap().contains("nothing is said of requests"));
        assert!(super::said(&serde_json::json!([{ "bytes": 1 }])).is_err());
    }

    #[test]
    fn the_least_ram_is_what_the_refusal_says() {
        let refusal = r#"echo '{"refused":{"least":1234567}}'"#;
        let failing = format!("{refusal}; exit 1");
        assert_eq!(least_ram(&mut run::command("sh", &["-c", &failing])).unwrap(), 1_234_567);
        assert!(least_ram(&mut run::command("sh", &["-c", refusal])).is_err(), "not refused");
        assert!(least_ram(&mut run::command("false", &[])).is_err());
    }
}
