//! The Python package that this crate succeeds.

use std::path::PathBuf;

use clap::Args;

use crate::run::{self, Failure, Run};

/// Compare warm passes with those of the Python package that this crate succeeds, on the CPU, turn by turn.
///
/// A virtual environment with PyTorch (3 GB) is made beside the checkpoint's folder and kept. `ci/compare-llm-layer-prefetch.py` says what
/// is compared.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask compare-llm-layer-prefetch ~/models/Qwen2.5-3B --rounds 5")]
pub struct Options {
    /// The checkpoint's folder
    #[arg(value_parser = run::absolute)]
    folder: PathBuf,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let name = options.folder.file_name().ok_or("the checkpoint's folder has no name")?;
    let environment = options.folder.with_file_name(format!("{}-llm-layer-prefetch", name.to_string_lossy()));
    let ready = environment.join("ready");
    if !ready.exists() {
        run::command("python3", &["-m", "venv"]).arg(&environment).run()?;
        let pip = environment.join("bin/pip");
        run::command(&pip, &["install", "-q", "torch", "numpy", "tqdm"]).run()?;
        run::command(&pip, &["install", "-q", "--no-deps", "llm-layer-prefetch==1.0.0"]).run()?;
        std::fs::write(ready, "")?;
    }
    run::cargo("build -q --release --locked --example bench_stream").run()?;
    let mut compare = run::command(environment.join("bin/python"), &["ci/compare-llm-layer-prefetch.py"]);
    compare.arg(run::target().join("release/examples/bench_stream")).arg(&options.folder);
    compare.arg(options.rounds.to_string()).run()
}
