//! Prompts that go through a chat template, answers that end early, and answers of which there is nothing to see.

mod common;

use std::{fs, path::Path, process::Output};

use common::program;
use serde_json::Value;
use support::{copy_of, speller};

/// What a question becomes for a model that spells numbers: `4096` is asked as `4096=`.
const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}{% endfor %}=";

/// Runs `generate` on the CPU with a copy of the speller that has this template.
fn generate(template: &str, arguments: &[&str]) -> Output {
    let folder = copy_of(&speller());
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    run(folder.path(), arguments)
}

fn run(model: &Path, arguments: &[&str]) -> Output {
    let mut command = program("generate");
    command.args(["--device", "cpu", "--no-probe", "--model"]).arg(model).args(arguments).output().unwrap()
}

/// What went to stdout and to stderr.
fn told(done: &Output) -> [String; 2] {
    [&done.stdout, &done.stderr].map(|bytes| String::from_utf8(bytes.clone()).unwrap())
}

fn assert_refused(done: &Output, parts: &[&str]) {
    let [out, said] = told(done);
    assert!(!done.status.success() && out.is_empty() && !said.contains("panicked"), "{said}");
    parts.iter().for_each(|part| assert!(said.contains(part), "{said} lacks {part}"));
}

#[test]
fn a_prompt_is_a_user_s_turn_where_there_is_a_template_and_that_is_said_in_one_line() {
    let [out, said] = told(&generate(TEMPLATE, &["4096"]));
    assert_eq!(out, " four thousand ninety-six\n", "{said}");
    let lines: Vec<_> = said.lines().filter(|line| line.contains("chat_template.jinja")).collect();
    assert!(matches!(lines[..], [line] if line.contains("--raw")), "{said}");
    // No token is put around a turn: what the template made is all there is.
    let [out, _] = told(&generate(TEMPLATE, &["--json", "4096"]));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["prompt_tokens"], 5);
    let [out, said] = told(&generate(TEMPLATE, &["--max-new-tokens", "2", "4096"]));
    assert!(out == " four thousand\n" && said.contains("cut off after 2 tokens: --max-new-tokens"), "{said}");
    for (arguments, expected) in [
        (&["--quiet", "4096"][..], " four thousand ninety-six\n"),
        (&["--quiet", "--system", "40", "96"], " four thousand ninety-six\n"),
        (&["--quiet", "--raw", "77="], " seventy-seven\n"),
        (&["--quiet", "--prompt-ids", "23,29"], " seven\n"),
    ] {
        assert_eq!(told(&generate(TEMPLATE, arguments)), [expected, ""], "{arguments:?}");
    }
    let thinks = "{{ '7=' if enable_thinking else '8=' }}";
    assert_eq!(told(&generate(thinks, &["--quiet", "--thinking", "true", ""]))[0], " seven\n");
    assert_eq!(told(&generate(thinks, &["--quiet", "--thinking", "false", ""]))[0], " eight\n");
}

#[test]
fn templates_that_fail_and_options_that_need_one_are_refused_with_what_to_do() {
    assert_refused(&generate("a\n{% if %}", &["1"]), &["chat_template.jinja: line 2", "--raw"]);
    let refuses = "{{ raise_exception('no such role') }}";
    assert_refused(&generate(refuses, &["1"]), &["chat_template.jinja", "no such role", "--raw"]);
    assert_refused(&run(&speller(), &["--system", "x", "1="]), &["--system", "no chat template"]);
    assert_refused(&run(&speller(), &["--thinking", "true", "1="]), &["--thinking", "no chat template"]);
    for with in [["--raw", "--system=x"], ["--raw", "--thinking=true"], ["--prompt-ids=1", "--system=x"]] {
        assert_refused(&generate(TEMPLATE, &[&with[..], &["1"]].concat()), &["cannot be used with"]);
    }
    assert_refused(&run(&speller(), &["--stop", "x", "--print-ids", "1="]), &["--stop", "token ids"]);
    assert_refused(&run(&speller(), &["--stop", "", "1="]), &["--stop"]);
}

#[test]
fn an_answer_ends_before_a_stop_text_of_which_nothing_is_printed() {
    for (stops, expected) in [
        (&["--stop", "ninety-six"][..], " four thousand \n"),
        (&["--stop", "d ni"], " four thousan\n"),
        (&["--stop", "never", "--stop", "thousand"], " four \n"),
        // It might have become one until the end.
        (&["--stop", "six and more"], " four thousand ninety-six\n"),
    ] {
        let arguments = [stops, &["--quiet", "4096="]].concat();
        assert_eq!(told(&run(&speller(), &arguments)), [expected, ""], "{stops:?}");
    }
    let [out, _] = told(&run(&speller(), &["--stop", "thousand", "--json", "4096="]));
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!([&found["text"], &found["end"]], [" four ", "stop text"]);
}

#[test]
fn an_empty_answer_is_explained_even_where_all_else_is_quiet() {
    let ended = ["--quiet", "4096= four thousand ninety-six"];
    let [out, said] = told(&run(&speller(), &ended));
    assert_eq!((out.as_str(), said.lines().count()), ("\n", 1), "{said}");
    for part in ["ended at once", "stop token 0 (<|endoftext|>)", "longer prompt"] {
        assert!(said.contains(part), "{said}");
    }
    let [out, said] = told(&generate("{{ messages[0].content }}", &ended));
    assert!(out == "\n" && said.contains("stop token 0") && said.contains("--system"), "{said}");
    let [out, said] = told(&run(&speller(), &["--quiet", "--stop", " four", "4096="]));
    assert!(out == "\n" && said.contains("--stop names, \" four\""), "{said}");
    let [out, said] = told(&run(&speller(), &["--quiet", "--max-new-tokens", "0", "4096="]));
    assert!(out == "\n" && said.contains("--max-new-tokens is 0"), "{said}");
}
