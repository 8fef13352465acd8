//! `generate`: with rings alone, within budgets, and in a control group.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{MIB, judge, least_ram, peak_of, said};
use crate::run::{self, Failure};

pub fn check(program: &Path, model: &Path) -> Result<(), Failure> {
    let check = Check { program, model };
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
        let (answer, peak) =
            peak_of(self.command(before).args(options)).map_err(|failure| format!("{what}: {failure}"))?;
        let answer: Value = serde_json::from_str(&answer)?;
        judge(what, &said(&answer["placement"]["memory"])?, &["kv_cache"], peak, budget)?;
        Ok(answer["tokens"].clone())
    }
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
    fn more_than_was_said_is_a_failure() {
        let check = Check { program: Path::new("program"), model: Path::new("model") };
        let run = |fill: &str, budget| {
            let script = format!(
                "{fill} echo '{{\"placement\": {{\"memory\": [{{\"purpose\": \"kv_cache\", \"bytes\": 1000}}]}}, \"tokens\": [7]}}'"
            );
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
}
