//! `chat` as its users meet it: through a pipe, and on a terminal.

mod common;
#[path = "common/models.rs"]
mod models;
#[path = "common/terminal.rs"]
mod terminal;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use common::program;
use models::{TEMPLATE, chat_model, endless};
use serde_json::Value;
use support::speller;
use terminal::Terminal;

const ANSWER: &str = " four thousand ninety-six\n";

fn on_cpu(command: &str, model: &Path, arguments: &[&str]) -> Command {
    let mut program = program(command);
    program.args(["--device", "cpu", "--no-probe", "--model"]).arg(model).args(arguments);
    program
}

/// Sends this to `chat` through a pipe.
fn piped(model: &Path, arguments: &[&str], input: &str) -> Output {
    let mut command = on_cpu("chat", model, arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // What is refused at once does not read it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn told(done: &Output) -> [String; 2] {
    [&done.stdout, &done.stderr].map(|bytes| String::from_utf8(bytes.clone()).unwrap())
}

fn assert_says(said: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(said.contains(part), "{said} lacks {part}"));
}

/// The answers to these messages, where nothing is refused.
fn answers(model: &Path, arguments: &[&str], input: &str) -> String {
    let done = piped(model, arguments, input);
    let [out, said] = told(&done);
    assert!(done.status.success(), "{said}");
    out
}

#[test]
fn answers_alone_go_to_stdout_and_follow_from_all_turns_before() {
    let model = chat_model(TEMPLATE);
    let done = piped(model.path(), &[], "4096\n\n7\n/stats\n/exit\nnever read\n");
    let [out, said] = told(&done);
    let whole = "4096= four thousand ninety-six<|endoftext|>7=";
    let second = on_cpu("generate", model.path(), &["--quiet", "--raw", whole]).output().unwrap();
    assert!(done.status.success());
    assert_eq!(out, format!("{ANSWER}{}", told(&second)[0]), "{said}");
    // Of the second turn the end of the first answer, the digit and the sign are new.
    assert_says(&said, &["KV cache of 128 tokens", "10 were there before the last answer", "\n3 tokens in at "]);
}

#[test]
fn turns_that_change_are_computed_anew_from_where_they_differ() {
    let model = chat_model(TEMPLATE);
    let quiet = ["--quiet"];
    assert_eq!(answers(model.path(), &quiet, "77\n/reset\n4096\n"), format!(" seventy-seven\n{ANSWER}"));
    assert_eq!(answers(model.path(), &quiet, "/system 40\n96\n"), ANSWER);
    assert_eq!(answers(model.path(), &["--quiet", "--system", "40"], "96\n/reset\n96\n"), ANSWER.repeat(2));
    assert_eq!(answers(model.path(), &["--quiet", "--system", "40"], "/system\n77\n"), " seventy-seven\n");
    let done = piped(model.path(), &["--quiet"], "4096\n/reset\n4097\n/stats\n");
    assert_says(&told(&done)[1], &["3 were there before the last answer", "\n2 tokens in at "]);
}

#[test]
fn a_message_may_have_several_lines() {
    let model = chat_model(TEMPLATE);
    let input = "40\\\n96\n/reset\n\"\"\"\n4\n09\n6\n\"\"\"\n";
    assert_eq!(answers(model.path(), &["--quiet"], input), ANSWER.repeat(2));
}

#[test]
fn what_begins_with_a_space_is_a_message_even_if_it_reads_like_a_command() {
    let model = chat_model("{{ messages[-1].content | replace(' /exit', '4096=') }}");
    assert_eq!(answers(model.path(), &["--quiet"], " /exit\n/exit \nnever read\n"), ANSWER);
}

#[test]
fn a_conversation_is_saved_and_goes_on_from_its_file() {
    let model = chat_model(TEMPLATE);
    let file = model.path().join("saved.json");
    let saving = format!("4096\n/save {}\n7\n", file.display());
    let both = answers(model.path(), &["--quiet", "--system", ""], &saving);
    let saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(saved["messages"][1]["content"], " four thousand ninety-six");
    let loading = format!("77\n/load {}\n7\n", file.display());
    let later = answers(model.path(), &["--quiet"], &loading);
    assert_eq!(later.strip_prefix(" seventy-seven\n"), both.strip_prefix(ANSWER), "{both}{later}");
    fs::write(&file, "{}").unwrap();
    for (input, parts) in [
        (format!("/load {}", file.display()), &["saved.json", "\"messages\""][..]),
        ("/load /nowhere/at/all\n".into(), &["/nowhere/at/all", "no such file"]),
        ("/save /nowhere/at/all\n".into(), &["/nowhere/at/all", "No such file"]),
        ("/save\n".into(), &["/save takes"]),
    ] {
        let done = piped(model.path(), &["--quiet"], &input);
        assert!(!done.status.success());
        assert_says(&told(&done)[1], parts);
    }
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let plain = piped(&speller(), &[], "4096\n");
    assert!(!plain.status.success() && plain.stdout.is_empty());
    assert_says(&told(&plain)[1], &["no chat template", "`generate`"]);
    let no_tokenizer = chat_model(TEMPLATE);
    fs::remove_file(no_tokenizer.path().join("tokenizer.json")).unwrap();
    assert_says(&told(&piped(no_tokenizer.path(), &[], ""))[1], &["no tokenizer.json"]);
    let model = chat_model(TEMPLATE);
    let unknown = piped(model.path(), &["--quiet"], "/what\n");
    assert!(!unknown.status.success());
    assert_says(&told(&unknown)[1], &["/what", "no such command", "/help"]);
    let refuses = chat_model("{{ raise_exception('no such role') }}");
    assert_says(&told(&piped(refuses.path(), &["--quiet"], "1\n"))[1], &["chat_template.jinja", "no such role"]);
}

#[test]
fn a_full_context_is_told_with_what_to_do() {
    let model = chat_model(TEMPLATE);
    let done = piped(model.path(), &["--quiet", "--context", "8"], "4096\n77\n");
    let [out, said] = told(&done);
    assert!(!done.status.success() && ANSWER.starts_with(out.trim_end()), "{out}{said}");
    assert_says(
        &said,
        &["cut off: the context of 8 tokens is full", "/reset", "--context", "(this model was made for 128)"],
    );
    assert_says(&said, &["the conversation is 13 tokens long, and the context has 8"]);
    // After a reset there is room again.
    let [out, _] = told(&piped(model.path(), &["--quiet", "--context", "8"], "4096\n/reset\n77\n"));
    assert!(out.ends_with(" seventy-seven\n"), "{out}");
}

#[test]
fn an_answer_ends_where_its_options_say_and_an_empty_one_is_taken_back() {
    let model = chat_model(TEMPLATE);
    assert_eq!(answers(model.path(), &["--quiet", "--stop", "ninety"], "4096\n"), " four thousand \n");
    let done = piped(model.path(), &["--quiet", "--max-new-tokens", "2"], "4096\n");
    assert_eq!(told(&done), [" four thousand\n", "cut off: --max-new-tokens 2\n"]);
    let at_once = chat_model("{{ messages[-1].content }}");
    let [out, said] = told(&piped(at_once.path(), &["--quiet"], "4096= four thousand ninety-six\n4096=\n"));
    assert_eq!(out, format!("\n{ANSWER}"));
    assert_says(&said, &["ended at once", "stop token 0", "taken back"]);
}

#[test]
fn on_a_terminal_ctrl_c_stops_an_answer_and_clears_a_line_and_ctrl_d_ends() {
    let model = endless();
    let mut terminal = Terminal::start(on_cpu("chat", model.path(), &["--context", "20000", "--ram", "1GB"]));
    terminal.expect("/help lists commands");
    terminal.expect("> ");
    terminal.send("4096\r");
    terminal.expect("four thousand ninety-six");
    terminal.send("\x03");
    terminal.expect("stopped");
    terminal.expect("> ");
    terminal.send("thrown away\x03");
    terminal.expect("> ");
    terminal.send("/stats\r");
    terminal.expect("the KV cache holds ");
    terminal.expect("> ");
    terminal.send("/reset\r");
    terminal.expect("a new conversation");
    terminal.expect("> ");
    // The line before the last one, from the history.
    terminal.send("\x1b[A\x1b[A\r");
    terminal.expect("the KV cache holds ");
    terminal.expect("> ");
    terminal.send("77\r");
    terminal.expect("seventy-seven");
    terminal.send("\x03");
    terminal.expect("stopped");
    terminal.expect("> ");
    terminal.send("\x04");
    assert_eq!(terminal.end().code(), Some(0));
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; .ci/run runs it"]
fn a_real_chat_model_answers_can_be_stopped_and_remembers_what_was_said() {
    let folder = std::env::var_os("LAYER_STREAMER_SMOLLM2").expect("LAYER_STREAMER_SMOLLM2 names SmolLM2's folder");
    let model = PathBuf::from(folder);
    let (first, second) = ("What is the capital of France?", "And of Italy?");
    let out =
        answers(&model, &["--quiet", "--max-new-tokens", "40"], &format!("{first}\n{second}\n/reset\n{second}\n"));
    let mut lines = out.lines();
    assert!(lines.next().unwrap().contains("Paris") && lines.next().unwrap().contains("Rome"), "{out}");
    assert!(!lines.any(|line| line.contains("The capital of Italy")), "what was forgotten: {out}");
    let mut terminal = Terminal::start(on_cpu("chat", &model, &["--context", "2048"]));
    terminal.expect("/help lists commands");
    terminal.expect("> ");
    terminal.send("Tell me a very long story.\r");
    terminal.expect(" the ");
    terminal.send("\x03");
    terminal.expect("stopped");
    terminal.expect("> ");
    terminal.send("/reset\r");
    terminal.expect("a new conversation");
    for (question, answer) in [(first, "Paris"), (second, "Rome")] {
        terminal.expect("> ");
        terminal.send(&format!("{question}\r"));
        terminal.expect(answer);
    }
    terminal.expect("> ");
    terminal.send("/exit\r");
    assert_eq!(terminal.end().code(), Some(0));
}
