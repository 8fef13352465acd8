//! Prompts that go through a chat template, answers that end early, and answers of which there is nothing to see.

mod common;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use common::program;
use serde_json::Value;
use support::{copy_of, data, speller};

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

/// What `chat` answers to these lines, sent through a pipe.
fn chat(model: &Path, lines: &str) -> String {
    let mut command = program("chat");
    command.args(["--device", "cpu", "--no-probe", "--quiet", "--max-new-tokens", "200", "--model"]).arg(model);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

/// What `generate` answers to a turn of a conversation: to the first by the model's template, to a later one by the whole text.
fn answer(model: &Path, system: Option<&str>, turn: usize, expected: &Value) -> Value {
    let mut arguments = vec!["--quiet", "--json", "--max-new-tokens", "200"];
    match system {
        _ if turn > 0 => arguments.push("--raw"),
        Some(system) => arguments.extend(["--system", system]),
        None => {}
    }
    arguments.extend(["--", expected[if turn == 0 { "asked" } else { "prompt" }].as_str().unwrap()]);
    let [out, said] = told(&run(model, &arguments));
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{said}"))
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; .ci/run runs it"]
fn a_real_chat_model_answers_as_transformers_does() {
    let model = env::var_os("LAYER_STREAMER_SMOLLM2").expect("LAYER_STREAMER_SMOLLM2 names SmolLM2's folder");
    let model = PathBuf::from(model);
    // tests/data/make_answers.py made it, and explains the fields.
    let stored = fs::read(data("smollm2/answers.json")).unwrap();
    for conversation in serde_json::from_slice::<Vec<Value>>(&stored).unwrap() {
        let turns = conversation["turns"].as_array().unwrap();
        for (turn, expected) in turns.iter().enumerate() {
            let found = answer(&model, conversation["system"].as_str(), turn, expected);
            let [tokens, known] = [&found, expected].map(|of| of["tokens"].as_array().unwrap());
            let same = tokens.iter().zip(known).take_while(|(a, b)| a == b).count();
            println!("{same} of {} tokens are the same: {}", known.len(), expected["asked"]);
            assert_eq!(found["prompt_tokens"], expected["ids"], "{expected}");
            match expected["certain"].as_u64() {
                Some(certain) => assert!(same as u64 >= certain, "{found} in place of {expected}"),
                None => {
                    for key in ["tokens", "end", "text"] {
                        assert_eq!(found[key], expected[key], "{expected}");
                    }
                }
            }
        }
        if turns.len() > 1 {
            let of_all =
                |key| turns.iter().map(|turn| turn[key].as_str().unwrap().to_owned() + "\n").collect::<String>();
            assert_eq!(chat(&model, &of_all("asked")), of_all("text"));
        }
    }
}
