//! What a GPU machine without Rust needs to test and measure the crate.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::Value;

use crate::{
    capi::install,
    cuda,
    run::{self, Failure, Run},
    tests,
};

/// Pack tests, benchmarks, the program and data for a GPU machine without Rust or a network.
///
/// They go into DIR, and all of it into DIR.tar.xz. On the GPU machine `DIR/gpu run` runs them.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask gpu-bundle /tmp/gpu
  LAYER_STREAMER_CUDA_ARCHS=90 cargo xtask gpu-bundle /tmp/gpu   # for one kind of GPU, and quicker")]
pub struct Options {
    #[arg(value_name = "DIR", value_parser = run::absolute)]
    folder: PathBuf,
}

/// The most bytes of the archive.
const MOST: u64 = 40 << 20;
const EXAMPLES: [&str; 3] = ["bench_transfer", "bench_kernels", "bench_stream"];
/// Scripts that are run there.
const SCRIPTS: [&str; 3] = ["torch-attention.py", "gpu-nvtx.py", "same-sums"];

pub fn run(options: &Options) -> Result<(), Failure> {
    let folder = &options.folder;
    let archs = env::var("LAYER_STREAMER_CUDA_ARCHS").unwrap_or_else(|_| "80,90".into());
    let bundle = Bundle { folder, archs: &archs };
    for part in ["bin", "deps", "examples", "tests", "ci"] {
        let part = folder.join(part);
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        fs::create_dir_all(part)?;
    }
    let count = bundle.tests()?;
    bundle.programs()?;
    bundle.checks(&bundle.kernels()?)?;
    bundle.hosts()?;
    bundle.data()?;
    let archive = bundle.pack()?;
    let bytes = fs::metadata(&archive)?.len();
    let mib = bytes as f64 / f64::from(1 << 20);
    println!("{}: {mib:.1} MiB, {count} test executables, {} examples", archive.display(), EXAMPLES.len());
    if bytes > MOST { Err(format!("{} may be {MOST} bytes", archive.display()).into()) } else { Ok(()) }
}

struct Bundle<'a> {
    folder: &'a Path,
    /// For which GPUs, as in "80,90".
    archs: &'a str,
}

impl Bundle<'_> {
    fn cargo(&self, words: &str) -> std::process::Command {
        let mut command = run::cargo(words);
        command.args(["--locked", "--release", "--features", "cuda,nvtx", "--message-format=json-render-diagnostics"]);
        command.env("LAYER_STREAMER_CUDA_ARCHS", self.archs);
        command
    }

    /// The library's own tests and those of `tests/cuda*.rs`, less files that hold tests for the emulated runtime alone.
    fn tests(&self) -> Result<usize, Failure> {
        let messages = self.cargo("test -p layer-streamer --no-run --lib --test cuda*").read()?;
        let mut count = 0;
        for test in tests::executables(&messages)? {
            if tests::list(&test.path)?.is_empty() {
                continue;
            }
            let name = if test.name == "layer_streamer" { "lib" } else { &test.name };
            self.take(&test.path, &self.folder.join("deps").join(name))?;
            count += 1;
        }
        Ok(count)
    }

    fn programs(&self) -> Result<(), Failure> {
        let examples = EXAMPLES.map(|name| format!("--example {name}")).join(" ");
        self.cargo(&format!("build --bin layer-streamer {examples}")).read()?;
        run::cargo("build -q --locked --release -p xtask").run()?;
        let release = run::target().join("release");
        for name in ["layer-streamer", "xtask"] {
            self.take(&release.join(name), &self.folder.join("bin").join(name))?;
        }
        for name in EXAMPLES {
            self.take(&release.join("examples").join(name), &self.folder.join("examples").join(name))?;
        }
        Ok(())
    }

    /// The library of kernels that the build script has made.
    fn kernels(&self) -> Result<PathBuf, Failure> {
        let messages = self.cargo("build -p layer-streamer --lib").read()?;
        for line in messages.lines().filter(|line| line.starts_with('{')) {
            let message: Value = serde_json::from_str(line)?;
            let library =
                message["out_dir"].as_str().map(|folder| Path::new(folder).join("liblayer_streamer_kernels.a"));
            if let Some(library) = library.filter(|library| library.exists()) {
                return Ok(library);
            }
        }
        Err("no build script has made liblayer_streamer_kernels.a".into())
    }

    /// Checks that are CUDA programs themselves.
    fn checks(&self, kernels: &Path) -> Result<(), Failure> {
        for source in cuda::sources("tests/cuda")? {
            let name = source.file_stem().unwrap_or_default().to_string_lossy();
            if name.ends_with("_check") && source.extension().is_some_and(|extension| extension == "cu") {
                let to = self.folder.join("deps").join(&*name);
                cuda::compiler(self.archs).arg("-std=c++17").arg(&source).arg(kernels).arg("-o").arg(&to).run()?;
                strip(&to)?;
            }
        }
        Ok(())
    }

    /// Hosts of the C API: the one with its own kernel and stream, and its twin on the CPU.
    fn hosts(&self) -> Result<(), Failure> {
        let prefix = run::scratch("gpu-bundle")?;
        // Its build script compiles the same kernels.
        install::install(prefix.path(), "cuda", &[("LAYER_STREAMER_CUDA_ARCHS", self.archs)])?;
        let pc = fs::read_to_string(prefix.path().join("lib/pkgconfig/layer_streamer.pc"))?;
        let libraries = pc
            .lines()
            .find_map(|line| line.strip_prefix("Libs.private: "))
            .ok_or("the .pc file has no Libs.private")?;
        for host in ["embed.c", "embed_cuda.cu"] {
            let to = self.folder.join("examples").join(Path::new(host).file_stem().unwrap_or_default());
            let mut nvcc = cuda::compiler(self.archs);
            nvcc.arg("-I").arg(prefix.path().join("include")).arg(Path::new("examples/c").join(host));
            nvcc.arg(prefix.path().join("lib/liblayer_streamer.a")).args(libraries.split_whitespace());
            nvcc.args(["-Xlinker", "--gc-sections", "-o"]).arg(&to).run()?;
            strip(&to)?;
        }
        Ok(())
    }

    /// Models, what tests read, and the scripts.
    fn data(&self) -> Result<(), Failure> {
        for (from, to) in [
            ("examples/speller", "examples"),
            ("tests/data", "tests"),
            ("tests/families", "tests"),
            ("tests/nvtx", "tests"),
        ] {
            run::command("cp", &["-r", from]).arg(self.folder.join(to)).run()?;
        }
        let ci = run::root().join("ci");
        for script in SCRIPTS {
            fs::copy(ci.join(script), self.folder.join("ci").join(script))?;
        }
        fs::copy(ci.join("gpu.py"), self.folder.join("gpu"))?;
        Ok(())
    }

    /// DIR.tar.xz of DIR, without what a run has left there.
    fn pack(&self) -> Result<PathBuf, Failure> {
        let name = self.folder.file_name().ok_or("DIR has no name")?;
        let mut archive = self.folder.as_os_str().to_owned();
        archive.push(".tar.xz");
        let mut tar = run::command("tar", &["-cJf"]);
        tar.arg(&archive).arg("-C").arg(self.folder.parent().ok_or("DIR has no parent")?);
        tar.arg(format!("--exclude={}/out", name.to_string_lossy())).arg(name).run()?;
        Ok(archive.into())
    }

    fn take(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        fs::copy(from, to).map_err(|error| format!("cannot copy {}: {error}", from.display()))?;
        strip(to)
    }
}

fn strip(path: &Path) -> Result<(), Failure> {
    run::command("strip", &["--strip-all"]).arg(path).run()
}
