//! `generate` with the options that draw tokens at random.

mod common;

use std::{fs, path::Path, process::Output};

use common::program;
use serde_json::{Value, json};
use support::{copy_of, speller};

fn generate(model: &Path, arguments: &[&str]) -> Output {
    let mut command = program("generate");
    command.args(["--device", "cpu", "--no-probe", "--max-new-tokens", "24", "--model"]).arg(model);
    command.args(arguments).arg("4096=").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The answer, and what the run says for programs.
fn answer(model: &Path, arguments: &[&str]) -> (String, Value) {
    let done = generate(model, &[&["--json", "--quiet"], arguments].concat());
    assert!(done.status.success(), "{arguments:?}: {}", text(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    (json["text"].as_str().unwrap().to_owned(), json["sampling"].clone())
}

const GREEDY: &str = " four thousand ninety-six";

/// What none of the options would do, but for the temperature.
fn values(temperature: f64, seed: u64) -> Value {
    json!({ "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "seed": seed })
}

#[test]
fn a_seed_gives_the_same_text_in_any_memory_and_other_seeds_give_others() {
    let speller = speller();
    let wild = |seed: &str, more: &[&str]| {
        let (text, used) = answer(&speller, &[&["--temperature", "4", "--seed", seed], more].concat());
        assert_eq!(used, values(4.0, seed.parse().unwrap()));
        text
    };
    let first = wild("1", &[]);
    assert!(first != GREEDY && wild("2", &[]) != first);
    for more in [&["--ram", "40MB"][..], &["--n-gpu", "1", "--n-cpu-pinned", "0"], &["--tables", "head-streamed"]] {
        assert_eq!(wild("1", more), first, "{more:?}");
    }
}

#[test]
fn the_most_likely_token_is_the_default_and_any_option_turns_sampling_on() {
    let speller = speller();
    assert_eq!(answer(&speller, &[]), (GREEDY.into(), Value::Null));
    let said = text(&generate(&speller, &[]).stderr);
    assert!(!said.contains("sampled"), "{said}");
    for (option, value) in [
        ("top_k", "1"),
        ("top_p", "0.05"),
        ("min_p", "1"),
        ("temperature", "0"),
        ("seed", "18446744073709551615"),
        ("repetition_penalty", "0.9"),
        ("presence_penalty", "-0.5"),
    ] {
        let (text, used) = answer(&speller, &[&format!("--{}", option.replace('_', "-")), value]);
        assert_eq!(used[option].to_string().trim_end_matches(".0"), value);
        assert!(!["top_k", "top_p", "min_p", "temperature"].contains(&option) || text == GREEDY, "{option}: {text}");
    }
}

#[test]
fn a_drawn_seed_is_printed_and_gives_the_same_again() {
    let speller = speller();
    let done = generate(&speller, &["--temperature", "4", "--top-k", "300"]);
    let said = text(&done.stderr);
    let line = said.lines().find(|line| line.starts_with("sampled: ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.starts_with("sampled: temperature 4, top_k 300; --seed "), "{line}");
    let seed = line.split("--seed ").nth(1).unwrap().split(' ').next().unwrap();
    let again = generate(&speller, &["--temperature", "4", "--top-k", "300", "--seed", seed]);
    assert_eq!(text(&again.stdout), text(&done.stdout));
    let seeds = [(); 3].map(|()| answer(&speller, &["--sample"]).1["seed"].as_u64().unwrap());
    assert!(seeds[0] != seeds[1] || seeds[1] != seeds[2], "{seeds:?}");
}

#[test]
fn sample_takes_what_the_model_suggests_and_options_go_before_it() {
    let speller = speller();
    assert_eq!(answer(&speller, &["--sample", "--seed", "3"]).1, values(1.0, 3), "the speller suggests nothing");
    let copy = copy_of(&speller);
    let suggest = |values: Value| {
        fs::write(copy.path().join("generation_config.json"), values.to_string()).unwrap();
    };
    suggest(json!({ "eos_token_id": 0, "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1,
        "repetition_penalty": 1.05 }));
    let (_, used) = answer(copy.path(), &["--sample", "--top-p", "0.5", "--presence-penalty", "1", "--seed", "3"]);
    let expected = json!({ "temperature": 0.7, "top_k": 20, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.05,
        "presence_penalty": 1.0, "seed": 3 });
    assert_eq!(used, expected);
    assert_eq!(answer(copy.path(), &[]), (GREEDY.into(), Value::Null), "a suggestion is taken by those who ask for it");
    suggest(json!({ "eos_token_id": 0, "top_p": 7 }));
    let refused = generate(copy.path(), &[]);
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("generation_config.json: top_p: is 7, must be"), "{said}");
}

#[test]
fn values_out_of_range_are_refused_by_name_before_anything_is_loaded() {
    for (arguments, part) in [
        (["--temperature", "-1"], "temperature: is -1"),
        (["--temperature", "NaN"], "temperature: is NaN"),
        (["--top-p", "1.5"], "top_p: is 1.5"),
        (["--min-p", "-0.5"], "min_p: is -0.5"),
        (["--repetition-penalty", "0"], "repetition_penalty: is 0"),
        (["--presence-penalty", "-3"], "presence_penalty: is -3"),
        (["--top-k", "half"], "--top-k"),
        (["--top-k", "-1"], "'-1' for '--top-k"),
        (["--seed", "1.5"], "--seed"),
        (["--seed", "-1"], "'-1' for '--seed"),
    ] {
        let refused = generate(&speller(), &arguments);
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && refused.stdout.is_empty() && said.contains(part), "{arguments:?}: {said}");
        assert!(!said.contains("device:") && !said.contains("panicked"), "{said}");
    }
}
