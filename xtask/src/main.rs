//! The repository's checks and measurements: `cargo xtask --help`. `.ci/run` and `ci/full` are lists of them.

mod attack;
mod attack_server;
mod browser;
mod budget;
mod capi;
mod chat_page;
mod compare_llm_layer_prefetch;
mod cuda;
mod first_token;
mod gpu_bundle;

mod memory_bound;
mod mutants;
mod readme;
mod run;
mod sanitize;
mod server;
mod speller;
mod statistics;
mod tests;
mod trace_page;
mod tune_pairs;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::run::Failure;

/// Checks and measurements of layer-streamer, beside `cargo test`.
///
/// `.ci/run` has all that a change must pass, `ci/full` what a release must; CONTRIBUTING.md says which covers what.
#[derive(Parser)]
#[command(
    name = "xtask",
    bin_name = "cargo xtask",
    after_help = "`cargo xtask COMMAND --help` explains a command, with examples."
)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Test(tests::Options),
    /// Check one thing that `.ci/run` demands
    Check {
        #[arg(value_enum)]
        what: Check,
    },
    Attack(attack::Options),
    AttackServer(attack_server::Options),
    Mutants(mutants::Options),
    Sanitize(sanitize::Options),
    Capi(capi::Options),
    CapiInstall(capi::install::Options),
    TracePage(trace_page::Options),
    MemoryBound(memory_bound::Options),
    Budget(budget::Options),
    FirstToken(first_token::Options),
    TunePairs(tune_pairs::Options),
    CompareLlmLayerPrefetch(compare_llm_layer_prefetch::Options),
    GpuBundle(gpu_bundle::Options),
}

#[derive(Clone, Copy, ValueEnum)]
enum Check {
    /// README's first `cargo run` gives the answer that README shows
    Readme,
    /// The program, installed, runs outside the repository
    Installed,
    /// The tuner searches, draws, and leaves a record that `generate` takes
    Tuned,
    /// The page at which people talk to the model, in a browser
    ChatPage,
    /// The program on the emulated GPU
    Emulated,
    /// Kernels bound by memory keep everything in registers
    Spills,
    /// A machine without a driver is told so; takes bench_transfer, built with feature cuda
    WithoutDriver,
}

impl Check {
    fn run(self) -> Result<(), Failure> {
        match self {
            Self::Readme => readme::check_first_run(),
            Self::Installed => speller::installed(),
            Self::Tuned => speller::tuned(),
            Self::ChatPage => chat_page::check(),
            Self::Emulated => speller::emulated(),
            Self::Spills => cuda::check_spills(),
            Self::WithoutDriver => cuda::check_without_driver(),
        }
    }
}

fn main() -> ExitCode {
    let done = match Program::parse().command {
        Command::Test(options) => tests::run(&options),
        Command::Check { what } => what.run(),
        Command::Attack(options) => attack::run(&options),
        Command::AttackServer(options) => attack_server::run(&options),
        Command::Mutants(options) => mutants::run(&options),
        Command::Sanitize(options) => sanitize::run(&options),
        Command::Capi(options) => capi::run(&options),
        Command::CapiInstall(options) => capi::install::run(&options),
        Command::TracePage(options) => trace_page::run(&options),
        Command::MemoryBound(options) => memory_bound::run(&options),
        Command::Budget(options) => budget::run(&options),
        Command::FirstToken(options) => first_token::run(&options),
        Command::TunePairs(options) => tune_pairs::run(&options),
        Command::CompareLlmLayerPrefetch(options) => compare_llm_layer_prefetch::run(&options),
        Command::GpuBundle(options) => gpu_bundle::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
