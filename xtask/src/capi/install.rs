//! Installs the C API as `cargo cinstall` does.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::Value;

use crate::run::{self, Failure, Run};

/// Install the C API as `cargo cinstall --prefix PREFIX --libdir lib` does, for machines without cargo-c.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask capi-install ~/.local
  cargo xtask capi-install ~/.local cuda,nvtx")]
pub struct Options {
    /// Where `include/` and `lib/` are made
    #[arg(value_parser = run::absolute)]
    prefix: PathBuf,
    /// Features of the library besides `capi`, with commas between them
    #[arg(default_value = "")]
    features: String,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    install(&options.prefix, &options.features, &[])
}

/// Builds the library in this environment, and installs it with its header and its `.pc` file.
pub fn install(prefix: &Path, features: &str, environment: &[(&str, &str)]) -> Result<(), Failure> {
    let package = package()?;
    let text =
        |value: &Value| value.as_str().map(str::to_owned).ok_or("cargo metadata leaves out what the .pc file says");
    let (version, description) =
        (text(&package["version"])?, text(&package["metadata"]["capi"]["pkg_config"]["description"])?);
    // A library of the same minor number runs what was linked to it.
    let (minor, _) = version.rsplit_once('.').ok_or("the version has no patch number")?;
    let (so, file) = (format!("liblayer_streamer.so.{minor}"), format!("liblayer_streamer.so.{version}"));
    let private = build(&so, features, environment)?;

    let (include, lib) = (prefix.join("include"), prefix.join("lib"));
    fs::create_dir_all(&include)?;
    fs::create_dir_all(lib.join("pkgconfig"))?;
    let release = run::target().join("release");
    fs::copy(run::root().join("include/layer_streamer.h"), include.join("layer_streamer.h"))?;
    fs::copy(release.join("liblayer_streamer.a"), lib.join("liblayer_streamer.a"))?;
    fs::copy(release.join("liblayer_streamer.so"), lib.join(&file))?;
    for name in [so.as_str(), "liblayer_streamer.so"] {
        let link = lib.join(name);
        if link.is_symlink() {
            fs::remove_file(&link)?;
        }
        symlink(&file, link)?;
    }
    let prefix = prefix.display();
    let pc = format!(
        "prefix={prefix}\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\nName: layer_streamer\nDescription: \
         {description}\nVersion: {version}\nLibs: -L${{libdir}} -llayer_streamer\nLibs.private: {private}\nCflags: \
         -I${{includedir}}\n"
    );
    fs::write(lib.join("pkgconfig/layer_streamer.pc"), pc)?;
    Ok(())
}

/// What cargo knows of the library.
fn package() -> Result<Value, Failure> {
    let said: Value = serde_json::from_str(&run::cargo("metadata --locked --no-deps --format-version 1").read()?)?;
    let packages = said["packages"].as_array().ok_or("cargo metadata names no packages")?;
    let found = packages.iter().find(|package| package["name"] == "layer-streamer");
    Ok(found.ok_or("cargo metadata leaves out layer-streamer")?.clone())
}

/// Builds both libraries; returns what the static one must be linked with.
fn build(so: &str, features: &str, environment: &[(&str, &str)]) -> Result<String, Failure> {
    let features = ["capi", features].join(",");
    let mut rustc = run::cargo("rustc -q --release --locked -p layer-streamer --lib --crate-type staticlib,cdylib");
    rustc.args(["--features", features.trim_end_matches(',')]);
    rustc.args([
        "--",
        "-C",
        &format!("link-arg=-Wl,-soname,{so}"),
        "-C",
        "strip=debuginfo",
        "--print",
        "native-static-libs",
    ]);
    let output = rustc.envs(environment.iter().copied()).quiet()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let private = said.lines().find_map(|line| line.strip_prefix("note: native-static-libs: "));
    Ok(private.ok_or_else(|| format!("rustc names no libraries: {said}"))?.to_owned())
}
