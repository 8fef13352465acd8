//! The tool of `injection.c`, compiled, and a process that it is attached to.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// NVTX loads the tool of this path.
pub const ATTACH: &str = "NVTX_INJECTION64_PATH";
/// Where the tool writes what it saw.
pub const OUT: &str = "LAYER_STREAMER_NVTX_OUT";

/// NVIDIA's headers, which come with `nvtx-sys`.
fn headers() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["metadata", "--format-version=1", "--locked", "--offline", "--features=nvtx", "--filter-platform"]);
    // What other platforms need is not there.
    cargo.arg(format!("{}-unknown-linux-gnu", env::consts::ARCH));
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut packages = metadata["packages"].as_array().unwrap().iter();
    let package = packages.find(|package| package["name"] == "nvtx-sys").expect("a dependency");
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("c/include")
}

/// Compiles the tool into `folder`.
pub fn compile(folder: &Path, flags: &[&str]) -> PathBuf {
    let tool = folder.join("tool.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvtx/injection.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]).args(flags);
    compiler.arg("-isystem").arg(headers()).arg("-o").arg(&tool).arg(source);
    assert!(compiler.status().expect("a C compiler").success());
    tool
}
