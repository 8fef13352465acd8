//! What `generate` says that it takes bounds what it takes.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    mem::MaybeUninit,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{self, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::Value;

use crate::run::{self, Failure, Run};

/// Check that the memory which `generate` says it takes, and 64 MiB, bounds what it takes.
///
/// Makes a checkpoint of the shape below the folder, or takes the model that is there, and generates four tokens from it: with
/// settings of its own, within two budgets, and within what a control group leaves, where one can be set.
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
    let check = Check { program: &program, model: &model };
    let tokens = check.run("rings 2 and 4", &["--n-gpu", "2", "--n-cpu-pinned", "4"], &[], None)?;
    let least = least_ram(run::command(check.program, &["plan"]).args(check.options()))?;
    for budget in [least, least * 13 / 10] {
        let found =
            check.run(&format!("a budget of {budget} bytes"), &["--ram", &budget.to_string()], &[], Some(budget))?;
        same(&found, &tokens)?;
    }
    let limit = least * 13 / 10 + 512 * MIB;
    match Group::with_limit(limit)? {
        // More than the group leaves would be the end of it.
        Some(group) => same(
            &check.run(&format!("a group with a limit of {limit} bytes"), &[], &group.enter, Some(limit))?,
            &tokens,
        ),
        None => {
            println!("left out: no control group can be set here");
            Ok(())
        }
    }
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

fn same(found: &Value, expected: &Value) -> Result<(), Failure> {
    if found == expected { Ok(()) } else { Err(format!("tokens {found}, where other settings gave {expected}").into()) }
}

struct Check<'a> {
    program: &'a Path,
    model: &'a Path,
}

impl Check<'_> {
    /// Four tokens, run by the command in front, if there is one.
    fn command(&self, before: &[String]) -> Command {
        let mut command = match before {
            [first, rest @ ..] => {
                let mut command = run::command(first, &[]);
                command.args(rest).arg(self.program);
                command
            }
            [] => run::command(self.program, &[]),
        };
        command.arg("generate").args(self.options()).arg("--json");
        command
    }

    /// Which model runs on what, and how many tokens there are; in words, where it has a tokenizer.
    fn options(&self) -> Vec<OsString> {
        let prompt: &[&str] = match self.model.join("tokenizer.json").exists() {
            true => &["What is the capital of France?"],
            false => &["--prompt-ids", "1,2,3"],
        };
        let options = ["--device", "cpu", "--max-new-tokens", "4"].iter().chain(prompt).map(OsString::from);
        options.chain(["--model".into(), self.model.into()]).collect()
    }

    /// Holds the peak of a run against what it says, or both against the budget; returns its tokens.
    fn run(&self, what: &str, options: &[&str], before: &[String], budget: Option<u64>) -> Result<Value, Failure> {
        let (said, peak) =
            peak_of(self.command(before).args(options)).map_err(|failure| format!("{what}: {failure}"))?;
        let said: Value = serde_json::from_str(&said)?;
        let parts = said["placement"]["memory"].as_array().ok_or("no placement.memory in what generate says")?;
        let total: u64 = parts.iter().filter_map(|part| part["bytes"].as_u64()).sum();
        let bound = budget.unwrap_or(total);
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let over = mib(peak) - mib(bound);
        let (total_mib, bound_mib, peak_mib) = (mib(total), mib(bound), mib(peak));
        println!("{what}: said {total_mib:.0} MiB, bound {bound_mib:.0} MiB, peak {peak_mib:.0} MiB: {over:+.0} MiB");
        if total == 0 || total > bound || peak > bound + SLACK {
            return Err(format!("{what}: more than was said").into());
        }
        Ok(said["tokens"].clone())
    }
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

/// A control group with a limit of memory.
struct Group {
    /// A command that runs another one in the group.
    enter: Vec<String>,
    /// Groups of our own, which are removed at the end.
    folders: Vec<PathBuf>,
}

impl Group {
    fn with_limit(limit: u64) -> Result<Option<Self>, Failure> {
        let scope = |more: &[&str]| -> Vec<String> {
            let limit = format!("MemoryMax={limit}");
            let options = ["-p", &limit, "-p", "MemorySwapMax=0"];
            ["systemd-run", "--quiet", "--scope"]
                .iter()
                .chain(more)
                .chain(&options)
                .map(|word| (*word).to_owned())
                .collect()
        };
        let mut group = Self { enter: Vec::new(), folders: Vec::new() };
        let mut candidates = vec![scope(&[]), scope(&["--user"])];
        // Without systemd a group of one's own, of either version.
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let folder = Path::new(root).join(format!("layer-streamer-{}", process::id()));
            if Path::new(root).join("cgroup.procs").exists() && fs::create_dir(&folder).is_ok() {
                let shell = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", folder.display());
                if fs::write(folder.join(file), limit.to_string()).is_ok() {
                    candidates.push(["sh", "-c", &shell, "sh"].map(str::to_owned).to_vec());
                }
                group.folders.push(folder);
            }
        }
        for enter in candidates {
            let mut command = run::command(&enter[0], &[]);
            if ends_well(command.args(&enter[1..]).arg("true"), Duration::from_secs(20))? {
                group.enter = enter;
                return Ok(Some(group));
            }
        }
        Ok(None)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for folder in &self.folders {
            if let Err(error) = fs::remove_dir(folder) {
                eprintln!("cannot remove {}: {error}", folder.display());
            }
        }
    }
}

/// Whether a command can be run, and ends with 0 in that time.
fn ends_well(command: &mut Command, limit: Duration) -> Result<bool, Failure> {
    let begun = Instant::now();
    let Ok(mut child) = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() else {
        return Ok(false);
    };
    while begun.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        thread::sleep(Duration::from_millis(10));
    }
    child.kill()?;
    child.wait()?;
    Ok(false)
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
    fn more_than_was_said_is_a_failure() {
        let check = Check { program: Path::new("program"), model: Path::new("model") };
        let run = |fill: &str, budget| {
            let script =
                format!("{fill} echo '{{\"placement\": {{\"memory\": [{{\"bytes\": 1000}}]}}, \"tokens\": [7]}}'");
            let before = ["sh", "-c", &script].map(str::to_owned);
            check.run("fake", &[], &before, budget).map_err(|failure| failure.to_string())
        };
        assert_eq!(run("", None).unwrap(), serde_json::json!([7]));
        assert!(run("", Some(999)).unwrap_err().contains("more than was said"), "it says more than the budget");
        let fill = "x=$(head -c 100000000 /dev/zero | tr '\\0' x);";
        assert!(run(fill, None).unwrap_err().contains("more than was said"), "it takes more than it says");
        assert!(run("exit 1;", None).unwrap_err().contains("exit status: 1"));
        assert!(same(&serde_json::json!([7]), &serde_json::json!([8])).is_err());
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
