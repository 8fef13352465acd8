//! `generate`, `chat` and `plan` with a model in one GGUF file.

mod common;
#[path = "../../tests/common/gguf.rs"]
mod gguf;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::program;
use gguf::converted;
use layer_streamer::gguf::Gguf;
use serde_json::Value;
use support::{copy_of, data, gguf::Meta};

/// What a run of the program printed. A failure is one of the test.
fn run(command: &str, model: &Path, arguments: &[&str]) -> (String, String) {
    let done = asked(command, model, arguments);
    let [out, said] = [done.stdout, done.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(done.status.success(), "{said}");
    (out, said)
}

fn asked(command: &str, model: &Path, arguments: &[&str]) -> Output {
    let mut program: Command = program(command);
    // What a probe finds is kept with the tests' files, not the user's.
    program.args(["--device", "cpu", "--model"]).env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    program.arg(model).args(arguments).output().unwrap()
}

/// The letters in which GPT-2 writes bytes.
fn letters() -> impl Iterator<Item = String> {
    let mut more = 256..;
    (0..=255u8).map(move |byte| {
        let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..);
        char::from_u32(if own { byte.into() } else { more.next().unwrap() }).unwrap().to_string()
    })
}

/// A small model as a folder without a tokenizer, and as a file with one whose tokens are bytes.
fn small() -> (tempfile::TempDir, PathBuf) {
    let folder = copy_of(&data("qwen3"));
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["eos_token_id"] = Value::Null;
    fs::write(&path, config.to_string()).unwrap();
    let mut file = converted(folder.path());
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let (mut tokens, mut kinds): (Vec<String>, Vec<i32>) = letters().map(|letter| (letter, 1)).unzip();
    tokens.extend((256..vocab).map(|id| format!("[{id}]")));
    tokens.truncate(vocab);
    kinds.resize(vocab, 3);
    file.set("tokenizer.ggml.model", Meta::text("gpt2"));
    file.set("tokenizer.ggml.pre", Meta::text("qwen2"));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::Ints(kinds));
    file.set("tokenizer.ggml.merges", Meta::Texts(Vec::new()));
    file.set("tokenizer.chat_template", Meta::text("{% for m in messages %}{{ m.content }}?{% endfor %}"));
    let path = folder.path().join("small.gguf");
    fs::write(&path, file.bytes()).unwrap();
    (folder, path)
}

#[test]
fn a_prompt_in_words_gives_what_its_ids_give_from_the_folder() {
    let (folder, file) = small();
    let ids = |text: &str| text.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(",");
    let new = ["--max-new-tokens", "9", "--print-ids"];
    let by_ids = |text: &str| run("generate", folder.path(), &[&new[..], &["--prompt-ids", &ids(text)]].concat()).0;
    let (raw, _) = run("generate", &file, &[&new[..], &["--raw", "Hi, it's me"]].concat());
    assert_eq!(raw, by_ids("Hi, it's me"));
    let (turn, said) = run("generate", &file, &[&new[..], &["Hi"]].concat());
    assert_eq!(turn, by_ids("Hi?"));
    assert!(said.contains("small.gguf") && said.contains("chat template"), "{said}");
    assert!(run("plan", &file, &["Hi"]).0.contains("tokenizer"));
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let (folder, file) = small();
    for (model, parts) in [
        (folder.path().join("none.gguf"), ["none.gguf", "No such file"]),
        (folder.path().join("config.json"), ["config.json", "is no folder; name the folder"]),
    ] {
        let done = asked("generate", &model, &["Hi"]);
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && parts.iter().all(|part| said.contains(part)), "{said}");
    }
    let mut untold = converted(folder.path());
    untold.remove("tokenizer.ggml.model");
    fs::write(&file, untold.bytes()).unwrap();
    for (command, part) in
        [("generate", "small.gguf: it has no tokenizer; give --prompt-ids"), ("chat", "there is no tokenizer")]
    {
        let arguments: &[&str] = if command == "chat" { &[] } else { &["Hi"] };
        let said = String::from_utf8(asked(command, &file, arguments).stderr).unwrap();
        assert!(said.contains(part), "{said}");
    }
    let packed = program("pack").arg(&file).arg(folder.path().join("packed")).output().unwrap();
    let said = String::from_utf8(packed.stderr).unwrap();
    assert!(!packed.status.success() && said.contains("small.gguf") && said.contains("folder"), "{said}");
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; .ci/run runs it"]
fn smollm2_says_the_same_from_a_file_as_from_its_folder() {
    let model = PathBuf::from(env::var_os("LAYER_STREAMER_SMOLLM2").expect("it names SmolLM2's folder"));
    // Weights as in the folder, all else as the package's own file has it.
    let (mut file, source) = (converted(&model), Gguf::open(model.join("q4.gguf")).unwrap());
    for key in ["tokens", "merges"].map(|key| format!("tokenizer.ggml.{key}")) {
        file.set(&key, Meta::Texts(source.texts(&key).unwrap().unwrap()));
    }
    let kinds = source.numbers("tokenizer.ggml.token_type").unwrap().unwrap();
    file.set("tokenizer.ggml.token_type", Meta::Ints(kinds.into_iter().map(|kind| kind as i32).collect()));
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"] {
        file.set(key, Meta::text(source.text(key).unwrap().unwrap()));
    }
    for key in ["bos", "eos"].map(|name| format!("tokenizer.ggml.{name}_token_id")) {
        file.set(&key, Meta::U32(source.count(&key).unwrap().unwrap() as u32));
    }
    let folder = support::folder();
    let path = folder.path().join("smollm2-bf16.gguf");
    fs::write(&path, file.bytes()).unwrap();
    for arguments in [&["--raw", "The capital of France is"][..], &["What is the capital of France?"]] {
        let arguments = [&["--max-new-tokens", "24"], arguments].concat();
        let [from_folder, from_file] = [&model, &path].map(|model| run("generate", model, &arguments).0);
        assert_eq!(from_file, from_folder);
        println!("{from_file}");
    }
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; .ci/run runs it"]
fn smollm2_in_blocks_says_what_its_weights_in_f32_say() {
    let model = PathBuf::from(env::var_os("LAYER_STREAMER_SMOLLM2").expect("it names SmolLM2's folder"));
    let prompts = [
        "What is the capital of France?",
        "Name three colours.",
        "Write a short poem about the sea.",
        "Why is the sky blue?",
        "Count from one to ten.",
        "What does a compiler do?",
        "Translate to French: good morning.",
        "Who wrote Hamlet?",
        "How do I boil an egg?",
        "Tell me a joke about cats.",
    ];
    for prompt in prompts {
        let arguments = ["--max-new-tokens", "32", prompt];
        let [blocks, plain] = ["q4.gguf", "f32"].map(|name| run("generate", &model.join(name), &arguments).0);
        assert_eq!(blocks, plain, "{prompt}");
        println!("{blocks}");
    }
}

#[test]
#[ignore = "takes Gemma 3 270M, which ci/gemma fetches: LAYER_STREAMER_GEMMA names the file; .ci/run runs it"]
fn gemma_in_five_types_says_what_transformers_says_of_the_same_file() {
    let model = PathBuf::from(env::var_os("LAYER_STREAMER_GEMMA").expect("it names Gemma's file"));
    let answers: Value = serde_json::from_slice(&fs::read(data("gemma/answers.json")).unwrap()).unwrap();
    for answer in answers.as_array().unwrap() {
        // A pass takes long where the program is hardly optimised.
        let arguments = ["--max-new-tokens", "8", answer["prompt"].as_str().unwrap()];
        let ids = run("generate", &model, &[&["--print-ids"], &arguments[..]].concat()).0;
        let expected: Vec<_> = answer["tokens"].as_array().unwrap()[..8].iter().map(Value::to_string).collect();
        assert_eq!(ids.trim_end(), expected.join(","), "{}", answer["prompt"]);
    }
    let answer = &answers[0];
    let text = run("generate", &model, &["--max-new-tokens", "24", answer["prompt"].as_str().unwrap()]).0;
    assert_eq!(text.trim_end_matches('\n'), answer["text"].as_str().unwrap());
}
