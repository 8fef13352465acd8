//! The CUDA toolkit, and what is checked of CUDA code without a GPU.

use std::{env, ffi::OsString, fs, path::PathBuf, process::Command};

use crate::run::{self, Failure, Run};

/// A toolkit for its headers: that of CUDA_HOME, or one from wheels.
pub fn headers() -> Result<PathBuf, Failure> {
    if let Some(home) = env::var_os("CUDA_HOME").map(PathBuf::from)
        && home.join("include/cuda_runtime_api.h").exists()
    {
        return Ok(home);
    }
    let said = run::command("ci/cuda-toolkit", &[]).arg(run::target().join("cuda-toolkit")).read()?;
    Ok(said.into())
}

/// The compiler that cuda-sys/build.rs takes.
pub fn nvcc() -> PathBuf {
    let home = || env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH")).map(PathBuf::from);
    match env::var_os("NVCC") {
        Some(compiler) => compiler.into(),
        None => match home() {
            Some(home) => home.join("bin/nvcc"),
            None if run::is_there("nvcc") => "nvcc".into(),
            None => "/usr/local/cuda/bin/nvcc".into(),
        },
    }
}

/// Kernels bound by memory keep everything in registers.
pub fn check_spills() -> Result<(), Failure> {
    let work = run::scratch("spills")?;
    let mut compiled = 0;
    for path in sources("cuda")? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Attention holds whole tiles in registers; with heads of 256 a few do not fit.
        if !name.ends_with(".cu") || name.starts_with("attention_") {
            continue;
        }
        let mut command = run::command(nvcc(), &["-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o"]);
        let output = command.arg(work.path().join("cubin")).arg(&path).quiet()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        if let Some(line) = said.lines().find(|line| spills(line)) {
            return Err(format!("{name} spills registers: {}", line.trim()).into());
        }
        compiled += 1;
    }
    println!("{compiled} files, no register spilled");
    if compiled > 0 { Ok(()) } else { Err("no kernel in cuda/".into()) }
}

/// Whether a line of ptxas counts spilled bytes, as in "0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads".
fn spills(line: &str) -> bool {
    line.split(", ").any(|part| part.contains(" bytes spill ") && !part.trim().starts_with("0 "))
}

/// The files of a folder of the repository, in order.
pub fn sources(folder: &str) -> Result<Vec<PathBuf>, Failure> {
    let entries = fs::read_dir(run::root().join(folder))?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<Result<Vec<_>, Failure>>()?;
    paths.sort();
    Ok(paths)
}

/// A machine without a driver is told so. The example is built, with feature `cuda`, in the everyday profile.
pub fn check_without_driver() -> Result<(), Failure> {
    let program = run::target().join("debug/examples/bench_transfer");
    let mut command = run::command(program, &["--device", "cuda", "--size", "1MiB", "--window", "0.001"]);
    let output = command.output().map_err(|error| format!("bench_transfer is not built: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        println!("there is a GPU");
        return Ok(());
    }
    print!("{said}");
    match said
        .lines()
        .any(|line| line.starts_with("error: cannot use cuda:0: cudaError") && line.contains("; no usable GPU"))
    {
        true => Ok(()),
        false => Err("the message does not say that there is no usable GPU".into()),
    }
}

/// `nvcc` for these GPUs, and `-L` for the runtime beside it.
pub fn compiler(archs: &str) -> Command {
    let mut command = run::command(nvcc(), &["-O3"]);
    command.args(archs.split(',').map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")));
    if let Some(home) = nvcc().parent().and_then(|bin| bin.parent()) {
        let mut folder = OsString::from("-L");
        folder.push(home.join("lib"));
        command.arg(folder);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_spilled_byte_counts() {
        assert!(!spills("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"));
        assert!(spills("    8 bytes stack frame, 0 bytes spill stores, 16 bytes spill loads"));
        assert!(spills("    8 bytes stack frame, 10 bytes spill stores, 0 bytes spill loads"));
        assert!(!spills("ptxas info    : Used 30 registers, 400 bytes cmem[0]"));
    }
}
