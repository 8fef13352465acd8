//! `batch` as its users meet it: every prompt of a file is answered once, as it is alone, whatever ends the runs in between.

mod common;
#[path = "batch/resuming.rs"]
mod resuming;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::program;
use serde_json::{Value, json};
use support::{copy_of, speller};

/// A folder with a file of prompts, and the runs over it.
struct Batch {
    folder: tempfile::TempDir,
}

impl Batch {
    fn of(lines: &[Value]) -> Self {
        let batch = Self { folder: support::folder() };
        batch.rewrite(&lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n"));
        batch
    }

    fn rewrite(&self, text: &str) {
        fs::write(self.input(), text).unwrap();
    }

    fn input(&self) -> PathBuf {
        self.folder.path().join("prompts.jsonl")
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("prompts.answers.jsonl")
    }

    fn journal(&self) -> PathBuf {
        self.folder.path().join("prompts.answers.jsonl.journal")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program("batch");
        command.args(["--device", "cpu", "--no-probe"]).args(arguments).arg(self.input());
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs to the end; the answers, in the order of the file.
    fn answers(&self, arguments: &[&str]) -> Vec<Value> {
        let done = self.run(arguments);
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert!(!self.journal().exists(), "it is of runs that go on");
        self.written()
    }

    fn written(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.output()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What a run says that is refused; the output is as it was.
    fn refused(&self, arguments: &[&str]) -> String {
        let before = fs::read(self.output()).ok();
        let done = self.run(arguments);
        let said = text(&done.stderr);
        assert!(done.status.code() == Some(1) && !said.contains("panicked"), "{said}");
        assert!(
            fs::read(self.output()).unwrap_or_default() == before.unwrap_or_default(),
            "the output is another: {said}"
        );
        said
    }

    fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Waits until the output has so many bytes more, or the run has ended.
    fn wait_for(&self, run: &mut Child, more: u64) {
        let length = || fs::metadata(self.output()).map_or(0, |file| file.len());
        let (begun, deadline) = (length(), Instant::now() + Duration::from_secs(60));
        while length() < begun + more && run.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "nothing is written");
            thread::sleep(Duration::from_micros(200));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `generate` answers, and its seed.
fn alone(prompt: &str, arguments: &[&str]) -> Value {
    let mut command = program("generate");
    command.args(["--device", "cpu", "--no-probe", "--quiet", "--json"]).args(arguments);
    if !arguments.contains(&"--max-new-tokens") {
        command.args(["--max-new-tokens", "256"]);
    }
    let done = command.arg("--").arg(prompt).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// So many prompts of numbers, long and short ones.
fn numbers(count: u64) -> Vec<Value> {
    let number = |at: u64| at * 7919 % 10_u64.pow(1 + (at % 6) as u32);
    (0..count).map(|at| json!({ "id": format!("n{at}"), "prompt": format!("{}=", number(at)) })).collect()
}

/// That each line has its answer, and that one to a prompt of `numbers` is what another run gave.
fn complete(answers: &[Value], lines: usize) -> BTreeMap<u64, Value> {
    let by_line: BTreeMap<u64, Value> =
        answers.iter().map(|answer| (answer["line"].as_u64().unwrap(), answer.clone())).collect();
    assert_eq!((answers.len(), by_line.len()), (lines, lines));
    assert_eq!(by_line.keys().copied().collect::<Vec<_>>(), (1..=lines as u64).collect::<Vec<_>>());
    by_line
}

/// The journal that a run over these prompts begins with.
fn journal_of(lines: &[Value]) -> Vec<u8> {
    let batch = Batch::of(lines);
    let mut run = batch.start(&["--sequences", "1"]);
    batch.wait_for(&mut run, 1);
    run.kill().unwrap();
    run.wait().unwrap();
    fs::read(batch.journal()).expect("it was killed before its end")
}

#[test]
fn every_answer_is_what_generate_gives_however_many_run_at_once() {
    let lines = [
        json!({ "id": "greedy", "prompt": "4096=" }),
        json!({ "id": 2, "prompt": "77=", "max_new_tokens": 1 }),
        json!({ "prompt": "900001=", "temperature": 4, "seed": 5, "max_new_tokens": 30 }),
        json!({ "prompt": "900001=", "temperature": 4, "max_new_tokens": 30 }),
        json!({ "prompt": "900001=", "temperature": 4, "top_k": 300, "max_new_tokens": 30 }),
        json!({ "prompt": "4096=", "stop": ["sand nine", "never"] }),
        json!({ "prompt": "4096=", "repetition_penalty": 0.9, "max_new_tokens": 12 }),
        json!({ "prompt_ids": [23, 29] }),
    ];
    let batch = Batch::of(&lines);
    let answers = batch.answers(&["--sequences", "3"]);
    complete(&answers, lines.len());
    assert_eq!(answers[0]["text"], " four thousand ninety-six");
    assert_eq!((&answers[0]["id"], &answers[1]["id"], &answers[2]["id"]), (&json!("greedy"), &json!(2), &Value::Null));
    assert_eq!((&answers[0]["end"], &answers[1]["end"]), (&json!("stop token"), &json!("max new tokens")));
    assert_eq!((&answers[0]["prompt_tokens"], &answers[0]["new_tokens"]), (&json!(5), &json!(5)));
    assert_eq!((&answers[5]["text"], &answers[5]["end"]), (&json!(" four thou"), &json!("stop text")));
    assert_eq!(answers[7]["text"], " seven");
    // A line without a seed draws by its number.
    let seeds: Vec<_> = answers.iter().map(|answer| answer["seed"].as_u64()).collect();
    assert_eq!(seeds, [None, None, Some(5), Some(4), Some(5), None, Some(7), None]);
    let wild = ["--temperature", "4", "--max-new-tokens", "30", "--seed"];
    for (line, prompt, arguments) in [
        (0, "4096=", vec![]),
        (1, "77=", vec!["--max-new-tokens", "1"]),
        (2, "900001=", [&wild[..], &["5"]].concat()),
        (3, "900001=", [&wild[..], &["4"]].concat()),
        (4, "900001=", [&wild[..], &["5", "--top-k", "300"]].concat()),
        (5, "4096=", vec!["--stop", "sand nine"]),
        (6, "4096=", vec!["--repetition-penalty", "0.9", "--max-new-tokens", "12", "--seed", "7"]),
    ] {
        assert_eq!(answers[line]["text"], alone(prompt, &arguments)["text"], "{}", lines[line]);
    }
    assert_ne!(answers[2]["text"], answers[3]["text"]);
    for sequences in ["1", "64"] {
        fs::remove_file(batch.output()).unwrap();
        assert_eq!(batch.answers(&["--sequences", sequences]), answers);
    }
}

#[test]
fn options_are_for_lines_that_say_nothing() {
    let batch =
        Batch::of(&[json!({ "prompt": "123456=" }), json!({ "prompt": "123456=", "temperature": 0, "stop": "q" })]);
    let given = ["--temperature", "4", "--seed", "9", "--max-new-tokens", "20", "--stop", "hundred"];
    let answers = batch.answers(&given);
    let expected =
        alone("123456=", &["--temperature", "4", "--seed", "10", "--max-new-tokens", "20", "--stop", "hundred"]);
    assert_eq!((&answers[0]["text"], &answers[0]["seed"]), (&expected["text"], &json!(10)));
    assert_eq!(answers[1]["text"], alone("123456=", &[])["text"]);
    let ids = Batch::of(&[json!({ "prompt": "7=" })]);
    assert_eq!(ids.answers(&["--print-ids"])[0]["ids"], json!([284]));
}

#[test]
fn a_line_that_is_not_understood_has_an_answer_that_says_why_or_ends_the_run() {
    let good = json!({ "id": "good", "prompt": "7=" }).to_string();
    let bad = [
        r#"{"id": "a", "prompt": "7=", "max_tokens": 3}"#,
        "{\"id\": \"b\", ",
        r#"{"id": "c", "prompt": ""}"#,
        r#"{"id": "d", "messages": [{"role": "user", "content": "7="}]}"#,
        r#"{"id": "e", "prompt_ids": [70000]}"#,
        r#"{"id": "f", "prompt": "7=", "temperature": -1}"#,
        &json!({ "id": "g", "prompt": "7=", "stop": "x".repeat(1025) }).to_string(),
    ];
    let batch = Batch::of(&[]);
    batch.rewrite(&format!("{good}\n{}\n\n{good}\n", bad.join("\n")));
    let done = batch.run(&[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let said = text(&done.stderr);
    assert!(said.contains("9 of 9 prompts answered, 7 of them errors"), "{said}");
    let answers = batch.written();
    let numbers: Vec<_> = answers.iter().map(|answer| answer["line"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 10]);
    for (answer, part) in answers[1..8].iter().zip([
        "max_tokens: is not known",
        "line: is no JSON: ",
        "prompt: is empty",
        "messages: the model has no chat template",
        "prompt: token 70000 is not in the vocabulary of 343",
        "temperature: is -1, must be a number, 0 or more",
        "stop: has a text of 1025 bytes",
    ]) {
        assert!(answer["error"].as_str().unwrap().starts_with(part) && answer.get("text").is_none(), "{answer}");
    }
    assert_eq!((&answers[1]["id"], &answers[2]["id"], &answers[3]["id"]), (&json!("a"), &Value::Null, &json!("c")));
    assert_eq!((&answers[0]["text"], &answers[8]["text"]), (&json!(" seven"), &json!(" seven")));
    for bad in bad {
        fs::write(batch.output(), "").unwrap();
        batch.rewrite(&format!("{good}\n{bad}\n{good}"));
        let said = batch.refused(&["--strict"]);
        assert!(said.contains("prompts.jsonl: line 2: "), "{said}");
    }
}

#[test]
fn openais_form_is_answered_in_openais_form() {
    let line =
        |id: &str, body: Value| json!({ "custom_id": id, "method": "POST", "url": "/v1/completions", "body": body });
    let lines = [
        line("x", json!({ "model": "gpt", "prompt": "4096=", "temperature": 0 })),
        line("y", json!({ "prompt": ["77="], "temperature": 0, "max_tokens": 1 })),
        line("z", json!({ "prompt": "7=", "n": 2 })),
        line("w", json!({ "prompt": "900001=", "temperature": 2, "max_tokens": 20 })),
        json!({ "custom_id": "v", "method": "POST", "url": "/v1/embeddings", "body": {} }),
        json!({ "id": "plain", "prompt": "7=" }),
    ];
    let batch = Batch::of(&lines);
    let answers = batch.answers(&[]);
    let ids: Vec<_> = answers.iter().map(|answer| answer["custom_id"].as_str().unwrap_or("-")).collect();
    assert_eq!(ids, ["x", "y", "z", "w", "v", "-"]);
    let body = &answers[0]["response"]["body"];
    assert_eq!(answers[0]["response"]["status_code"], 200);
    assert_eq!(body["choices"][0]["text"], " four thousand ninety-six");
    assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!("gpt")));
    assert_eq!(body["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10 }));
    let body = &answers[1]["response"]["body"];
    assert_eq!((&body["choices"][0]["finish_reason"], &body["model"]), (&json!("length"), &json!("speller")));
    for (answer, param) in [(2, "n"), (4, "url")] {
        let response = &answers[answer]["response"];
        assert_eq!((&response["status_code"], &response["body"]["error"]["param"]), (&json!(400), &json!(param)));
        assert_eq!(answers[answer]["error"], Value::Null);
    }
    let drawn = alone("900001=", &["--temperature", "2", "--seed", "4", "--max-new-tokens", "20"]);
    assert_eq!(answers[3]["response"]["body"]["choices"][0]["text"], drawn["text"], "line 4 draws by seed 4");
    assert_eq!(answers[5]["text"], " seven");
    // It goes on where it was, like any other.
    let whole = fs::read_to_string(batch.output()).unwrap();
    let kept: Vec<_> = whole.lines().take(3).collect();
    fs::write(batch.journal(), journal_of(&numbers(400))).unwrap();
    fs::write(batch.output(), kept.join("\n") + "\n{\"id\": \"batch_").unwrap();
    let again = batch.answers(&[]);
    let without_time = |answers: &[Value]| {
        let mut answers = answers.to_vec();
        answers.iter_mut().for_each(|answer| answer["response"]["body"]["created"] = json!(0));
        answers
    };
    assert_eq!(without_time(&again), without_time(&answers));
}

#[test]
fn a_text_that_cannot_fit_is_refused_by_its_bytes_before_it_is_cut_into_tokens() {
    let long = "7=".repeat(1 << 20);
    let body = json!({ "prompt": long, "temperature": 0 });
    let batch = Batch::of(&[
        json!({ "prompt": long }),
        json!({ "prompt": "7=" }),
        json!({ "custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body }),
    ]);
    let answers = batch.answers(&[]);
    let openai = &answers[2]["response"]["body"]["error"]["message"];
    for said in [&answers[0]["error"], openai] {
        let said = said.as_str().unwrap();
        assert!(said.contains("has 2097152 bytes, more than ") && said.contains(" tokens can be"), "{said}");
    }
    assert_eq!(answers[1]["text"], " seven");
}

#[test]
fn conversations_go_through_the_chat_template() {
    let model = copy_of(&speller());
    let template = "{% for turn in messages %}{% if turn.role == 'user' %}{{ turn.content }}={% endif %}{% endfor %}";
    fs::write(model.path().join("chat_template.jinja"), template).unwrap();
    let turns = json!([{ "role": "system", "content": "spell" }, { "role": "user", "content": "4096" }]);
    let url = "/v1/chat/completions";
    let body = json!({ "messages": turns, "temperature": 0 });
    let batch = Batch::of(&[
        json!({ "messages": turns }),
        json!({ "prompt": "4096" }),
        json!({ "custom_id": "x", "method": "POST", "url": url, "body": body }),
    ]);
    let model = model.path().to_str().unwrap();
    let answers = batch.answers(&["--model", model]);
    let expected = " four thousand ninety-six";
    assert_eq!((&answers[0]["text"], &answers[1]["text"]), (&json!(expected), &json!(expected)));
    let message = &answers[2]["response"]["body"]["choices"][0]["message"];
    assert_eq!(*message, json!({ "role": "assistant", "content": expected, "refusal": null }));
    fs::remove_file(batch.output()).unwrap();
    batch.rewrite(&json!({ "prompt": "4096=" }).to_string());
    assert_eq!(batch.answers(&["--model", model, "--raw"])[0]["text"], expected);
}

#[test]
fn a_short_answer_is_written_before_a_long_one_where_no_order_is_asked_for() {
    let mut lines = vec![json!({ "prompt": "777777=" })];
    lines.extend([(); 30].map(|()| json!({ "prompt": "7=" })));
    let batch = Batch::of(&lines);
    let ordered = complete(&batch.answers(&["--sequences", "4"]), 31);
    assert!(ordered[&1]["new_tokens"].as_u64() > ordered[&2]["new_tokens"].as_u64(), "{}", ordered[&1]);
    fs::remove_file(batch.output()).unwrap();
    let answers = batch.answers(&["--sequences", "4", "--as-they-end"]);
    assert_eq!(complete(&answers, 31), ordered);
    assert_ne!(answers[0]["line"], 1);
}

#[test]
fn standard_input_is_answered_on_standard_output_and_goes_on_with_an_output() {
    let lines = numbers(20);
    let input = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let folder = support::folder();
    let output = folder.path().join("out.jsonl");
    let run = |more: &[&str]| {
        let mut command = program("batch");
        command.args(["--device", "cpu", "--no-probe", "-"]).args(more);
        let mut run = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        run.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let done = run.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        done
    };
    let done = run(&[]);
    assert!(text(&done.stderr).contains("a run that is ended cannot go on; --output"), "{}", text(&done.stderr));
    let answers: Vec<Value> = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    complete(&answers, 20);
    let file = output.to_str().unwrap();
    let done = run(&["--output", file]);
    assert!(done.stdout.is_empty() && text(&done.stderr).contains("the same input"), "{}", text(&done.stderr));
    assert_eq!(fs::read_to_string(&output).unwrap(), text(&run(&[]).stdout));
}

#[test]
fn passes_are_full_and_every_token_is_counted() {
    let lines = numbers(300);
    let batch = Batch::of(&lines);
    let done = batch.run(&["--json"]);
    let summary: Value = serde_json::from_slice(&done.stdout).unwrap();
    let sum = |name: &str| batch.written().iter().map(|answer| answer[name].as_u64().unwrap()).sum::<u64>();
    let [new, prompts, passes] = ["new_tokens", "prompt_tokens", "passes"].map(|name| summary[name].as_u64().unwrap());
    assert_eq!((new, prompts), (sum("new_tokens"), sum("prompt_tokens")), "{summary}");
    assert_eq!(summary["sequences"], 64);
    // The last answers are alone with each other.
    let least = new / 64;
    assert!(passes <= 3 * least, "{passes} passes where {least} are the fewest: {summary}");
}

#[test]
fn fewer_run_at_once_where_memory_is_short() {
    let lines = numbers(80);
    let batch = Batch::of(&lines);
    let whole = batch.answers(&[]);
    fs::remove_file(batch.output()).unwrap();
    let said = batch.refused(&["--ram", "20MB", "--sequences", "64"]);
    assert!(said.contains("or fewer --sequences"), "{said}");
    let done = batch.run(&["--ram", "20MB"]);
    let said = text(&done.stderr);
    assert!(done.status.success() && said.contains("the memory is too little for 64"), "{said}");
    assert_eq!(batch.written(), whole);
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let batch = Batch::of(&numbers(2));
    let input = batch.input();
    let missing = batch.folder.path().join("nowhere/out");
    for (arguments, part) in [
        (&["--output", input.to_str().unwrap()][..], "is the input too"),
        (&["--output", missing.to_str().unwrap()], "cannot write"),
        (&["--output", "-", "--json"], "--json: the answers go to standard output"),
        (&["--sequences", "0"], "must be 1 or more"),
        (&["--top-p", "2"], "top_p: is 2"),
        (&["--system", "Be brief"], "has no chat template"),
    ] {
        let said = batch.refused(arguments);
        assert!(said.contains(part), "{arguments:?}: {said}");
        assert!(!batch.journal().exists());
    }
    let other = program("batch").arg(batch.folder.path()).output().unwrap();
    assert!(text(&other.stderr).contains("is a folder"), "{}", text(&other.stderr));
}
