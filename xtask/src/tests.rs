//! The everyday tests, and how many there are.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use serde_json::Value;

use crate::{
    readme,
    run::{self, Failure, Run},
};

/// Run README's own test command, and refuse a package that has no tests.
///
/// `cargo test` is content with a package without tests, so that a mistake in a Cargo.toml would pass unseen. Every package that a
/// plain `cargo test` takes must have some.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask test --locked --features capi")]
pub struct Options {
    /// Further options of `cargo test`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    more: Vec<String>,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    readme::command("cargo test")?.args(&options.more).run()?;

    let mut build = readme::command("cargo test")?;
    build.args(["--no-run", "--message-format=json-render-diagnostics"]).args(&options.more);
    let mut counts = default_members()?.into_iter().map(|package| (package, 0)).collect::<BTreeMap<_, _>>();
    for test in executables(&build.read()?)? {
        *counts.entry(test.package).or_default() += list(&test.path)?.len();
    }
    println!("\ntests by package:");
    for (package, count) in &counts {
        println!("{count:6} {package}");
    }
    match counts.iter().find(|(_, count)| **count == 0) {
        Some((package, _)) => Err(format!("{package} has no tests").into()),
        None => Ok(()),
    }
}

/// An executable with tests that cargo has built.
pub struct Executable {
    /// The path of its package's Cargo.toml.
    pub package: String,
    pub name: String,
    pub path: PathBuf,
}

/// Those of cargo's messages, in the form that `--message-format=json` prints.
pub fn executables(messages: &str) -> Result<Vec<Executable>, Failure> {
    let mut found = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line)?;
        if let (Some(path), true) = (message["executable"].as_str(), message["profile"]["test"] == true) {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (package, name) = (text(&message["manifest_path"]), text(&message["target"]["name"]));
            found.push(Executable { package, name, path: path.into() });
        }
    }
    Ok(found)
}

/// The names of its tests.
pub fn list(executable: &PathBuf) -> Result<Vec<String>, Failure> {
    let said = run::command(executable, &["--list"]).read()?;
    Ok(said.lines().filter_map(|line| Some(line.strip_suffix(": test")?.to_owned())).collect())
}

/// Cargo.toml of each package that a plain `cargo test` takes.
fn default_members() -> Result<Vec<String>, Failure> {
    let said: Value = serde_json::from_str(&run::cargo("metadata --locked --no-deps --format-version 1").read()?)?;
    let members = said["workspace_default_members"].as_array().ok_or("cargo metadata names no default members")?;
    let packages = said["packages"].as_array().ok_or("cargo metadata names no packages")?;
    let path_of = |member: &Value| {
        let package = packages.iter().find(|package| package["id"] == *member)?;
        Some(package["manifest_path"].as_str()?.to_owned())
    };
    members
        .iter()
        .map(|member| path_of(member).ok_or_else(|| format!("cargo metadata leaves out {member}").into()))
        .collect()
}
