//! What tries to bring the crate down.

use std::{
    env, fs,
    fs::File,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command},
};

use clap::Args;

use crate::run::{self, Failure, Run, Steps};

/// Run what tries to bring it down, and print what each attempt counted.
///
/// A long life goes on beside all of the others: a file system that fails on demand (which takes root), calls of the kernel that
/// fail one after the other, limits and refusals, ten thousand lives, and random files, tables, traces and options. Ends with a
/// table, or with the first failure. LAYER_STREAMER_LIVES says how many lives.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask attack                          # an hour, before a release
  cargo xtask attack 120 --only limits,fuzz   # two kinds, beside a life of two minutes")]
pub struct Options {
    /// How long the long life is, and all of the random cases together
    #[arg(default_value_t = 3600)]
    seconds: u64,
    /// Some kinds: fuse, faults, limits, lives, fuzz
    #[arg(long, value_delimiter = ',', value_parser = kind)]
    only: Vec<String>,
}

/// One kind of attack: its name, its title, and what `cargo test` takes, run by run.
struct Kind {
    name: &'static str,
    title: &'static str,
    runs: &'static [&'static str],
    /// Multiplies the number of random cases.
    effort: Option<&'static str>,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "fuse",
        title: "a file system that fails on demand",
        runs: &["--test fuse -- --include-ignored --test-threads=1"],
        effort: None,
    },
    Kind {
        name: "faults",
        title: "every call of every kind failing once",
        runs: &["--test faults --"],
        effort: Some("2"),
    },
    Kind {
        name: "limits",
        title: "limits, refusals, file systems, forks",
        runs: &["--test refusals --test filesystems --test fork --"],
        effort: None,
    },
    Kind { name: "lives", title: "many lives", runs: &["--test lives -- whatever_is_done"], effort: None },
    Kind {
        name: "fuzz",
        title: "random files, tables, traces and options",
        runs: &["--test fuzz -- --test-threads=2", "--lib -- --test-threads=2 plan::fuzz", "--test capi_fuzz --"],
        effort: None,
    },
];

/// Fuzz targets, which share the seconds: two run at a time.
const TARGETS: u64 = 9;

fn kind(name: &str) -> Result<String, String> {
    let known = KINDS.map(|kind| kind.name);
    if known.contains(&name) { Ok(name.to_owned()) } else { Err(format!("kinds are {}", known.join(", "))) }
}

fn tests(arguments: &str) -> Command {
    run::cargo(&format!("test --locked --features capi {arguments} --nocapture"))
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let steps = Steps::of("attack");
    let work = run::scratch("attack")?;
    steps.begin("building");
    run::cargo("test -q --locked --features capi --no-run").run()?;
    let mut soak = Soak::start(options.seconds, work.path().join("soak"))?;
    let mut said = String::new();
    for kind in KINDS.iter().filter(|kind| options.only.is_empty() || options.only.iter().any(|name| name == kind.name))
    {
        steps.begin(kind.title);
        for arguments in kind.runs {
            let mut command = tests(arguments);
            command.env("LAYER_STREAMER_FUZZ_SECONDS", (options.seconds / TARGETS + 1).to_string());
            command.env("LAYER_STREAMER_LIVES", env::var_os("LAYER_STREAMER_LIVES").unwrap_or_else(|| "10000".into()));
            command.envs(kind.effort.map(|effort| ("LAYER_STREAMER_EFFORT", effort)));
            said += &command.tee()?;
        }
    }
    steps.begin("the long life, to its end");
    said += &soak.end()?;
    steps.begin("counted");
    if let Ok(commit) = run::command("git", &["log", "-1", "--format=commit %h, %ad"]).read() {
        println!("{commit}");
    }
    let table = table(&said);
    table.iter().for_each(|line| println!("{line}"));
    if table.is_empty() { Err("no attempt counted anything".into()) } else { Ok(()) }
}

/// What tests say that they counted, which may stand behind the test's name.
fn table(said: &str) -> Vec<&str> {
    let counted = |line| match str::find(line, "counted: ") {
        Some(at) => Some(&line[at..]),
        None => line.contains(" tried, ").then_some(line),
    };
    said.lines().filter_map(counted).collect()
}

/// A long life in a process group of its own, so that all of it ends with us.
struct Soak {
    child: Child,
    log: PathBuf,
}

impl Soak {
    fn start(seconds: u64, log: PathBuf) -> Result<Self, Failure> {
        let file = File::create(&log)?;
        let mut command = run::cargo("test --locked --features capi --test lives -- --nocapture in_a_long_life");
        command.env("LAYER_STREAMER_SOAK_SECONDS", seconds.to_string()).process_group(0);
        let child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Self { child, log })
    }

    /// Waits for it; returns what it said.
    fn end(&mut self) -> Result<String, Failure> {
        let status = self.child.wait()?;
        let said = fs::read_to_string(&self.log)?;
        if status.success() { Ok(said) } else { Err(format!("the long life ended with {status}:\n{said}").into()) }
    }
}

impl Drop for Soak {
    fn drop(&mut self) {
        if let (Ok(None), Ok(group)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            // SAFETY: the call takes no pointer. The group's first process is our child and not yet waited for, so that the
            // number is not another group's.
            unsafe { libc::kill(-group, libc::SIGTERM) };
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_of_what_was_counted() {
        let said = "test a ... counted no\ntest b ... counted: 3 lives\nheader: 12 tried, 3 taken, 9 refused\nok\n";
        assert_eq!(table(said), ["counted: 3 lives", "header: 12 tried, 3 taken, 9 refused"]);
    }

    #[test]
    fn kinds_are_known_by_name() {
        assert!(kind("fuse").is_ok());
        assert!(kind("fuzzy").unwrap_err().contains("fuse, faults"));
    }
}
