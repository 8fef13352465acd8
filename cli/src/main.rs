//! The program `layer-streamer`: runs models whose layers are streamed from disk, plans and tunes such runs, packs
//! models, and makes checkpoints to try them with.
//!
//! Each subcommand is a module with `Options`, which clap parses, and `run`. Answers go to stdout, all else to stderr.

/// Says something on stderr, which may be closed or full: that is no reason to stop.
macro_rules! say {
    // In one piece, since stderr passes on each part of a table as it comes.
    ($($text:tt)*) => {{ let _ = std::io::Write::write_all(&mut std::io::stderr(), (format!($($text)*) + "\n").as_bytes()); }};
}

mod batch;
mod budget;
mod chat;
mod device;
mod generate;
mod hub;
mod interrupt;
mod make_checkpoint;
mod pack;
mod placing;
mod plan;
mod prompt;
mod run;
mod sampling;
mod serve;
mod text;
mod tune;
#[allow(dead_code, reason = "benchmarks use the rest")]
mod units;
mod unpack;
mod waiting;

use std::{env, ffi::OsString, path::PathBuf, process::ExitCode, sync::LazyLock, time::Instant};

use clap::{Parser, Subcommand};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Run large language models that do not fit on the GPU, or in a set amount of RAM: the weights stay on disk and are streamed
/// through memory layer by layer.
#[derive(Parser)]
#[command(
    name = "layer-streamer",
    version,
    after_help = "`layer-streamer COMMAND --help` explains a command's options, with examples."
)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

macro_rules! subcommands {
    ($($name:ident in $module:ident,)*) => {
        #[derive(Subcommand)]
        enum Command {
            $($name($module::Options),)*
        }

        impl Command {
            fn run(&self) -> Result<(), Failure> {
                match self {
                    $(Self::$name(options) => $module::run(options),)*
                }
            }
        }
    };
}

// In the order of the help.
subcommands! {
    Generate in generate,
    Chat in chat,
    Batch in batch,
    Serve in serve,
    Plan in plan,
    Tune in tune,
    Pack in pack,
    Unpack in unpack,
    MakeCheckpoint in make_checkpoint,
}

/// When the program began: not the process's start as the kernel notes it, which under `cargo run` is that of a compilation.
static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn main() -> ExitCode {
    LazyLock::force(&BEGUN);
    match Program::parse().command.run() {
        Ok(()) if interrupt::is_noted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What this program was called by, for commands that are to be pasted into the same shell.
fn called() -> OsString {
    env::args_os().next().unwrap_or_else(|| "layer-streamer".into())
}

/// The model that comes with the project.
fn speller() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("examples").join("speller")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn options_contradict_each_other_nowhere_and_every_command_has_examples() {
        let program = Program::command();
        program.clone().debug_assert();
        for command in program.get_subcommands() {
            let (name, about) = (command.get_name(), command.get_about().map(ToString::to_string).unwrap_or_default());
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                !about.is_empty() && after.contains(&format!("layer-streamer {name} ")),
                "{name}: {about}\n{after}"
            );
        }
    }
}
