//! What the program takes itself, besides the model: it is in the table, and a budget has it.

mod common;

use std::{fs, path::Path};

use common::program;
use serde_json::Value;
use support::{copy_of, speller};

fn run(command: &str, model: &Path, options: &[&str]) -> (bool, Value) {
    let mut command = program(command);
    command.args(["--device", "cpu", "--no-probe", "--json", "--model"]).arg(model).args(options);
    let done = command.output().unwrap();
    (done.status.success(), serde_json::from_slice(&done.stdout).unwrap_or_default())
}

/// The least RAM that `plan` names.
fn least(model: &Path) -> u64 {
    let (_, said) = run("plan", model, &["--context", "64", "--ram", "1"]);
    said["refused"]["least"].as_u64().unwrap()
}

/// Bytes of a row of what `generate` says it took.
fn taken(said: &Value, purpose: &str) -> Option<u64> {
    let rows = said["placement"]["memory"].as_array().unwrap();
    rows.iter().find(|row| row["purpose"] == purpose)?["bytes"].as_u64()
}

#[test]
fn tokenizer_and_sampler_are_rows_of_the_table_and_count_against_the_budget() {
    let model = copy_of(&speller());
    let with_tokenizer = least(model.path());
    let options = |ram: u64, more: &[&str]| {
        let ram = ram.to_string();
        let options = ["--context", "64", "--ram", &ram, "--prompt-ids", "1,2"];
        run("generate", model.path(), &[&options, more].concat())
    };
    let (done, said) = options(with_tokenizer, &[]);
    assert!(done, "{said}");
    let tokenizer = taken(&said, "tokenizer").unwrap();
    assert_eq!(taken(&said, "sampler"), None);
    // What draws is on top of that.
    assert!(!options(with_tokenizer, &["--seed", "1"]).0);
    let (done, said) = options(with_tokenizer + 1_000_000, &["--seed", "1"]);
    assert!(done && taken(&said, "sampler").is_some_and(|bytes| bytes > 0), "{said}");
    let rows = said["placement"]["memory"].as_array().unwrap();
    let total: u64 = rows.iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    assert!(total <= with_tokenizer + 1_000_000, "{said}");

    // Without words there is no tokenizer.
    fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    assert_eq!(least(model.path()) + tokenizer, with_tokenizer);
    let (done, said) = options(with_tokenizer - tokenizer, &[]);
    assert!(done && taken(&said, "tokenizer").is_none(), "{said}");
}
