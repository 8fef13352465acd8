//! What `generate` tells programs and people of a run: JSON, a trace, prompts from files, and what remains after Ctrl-C.

mod common;

use std::{
    fs,
    io::{Read, Write},
    process::{Command, Output, Stdio},
};

use common::program;
use serde_json::Value;
use support::{copy_of, data};

fn generate() -> Command {
    let mut command = program("generate");
    command.args(["--device", "cpu", "--no-probe"]).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    generate().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn json_has_the_tokens_what_moved_and_what_binds() {
    let done = run(&["--json", "--quiet", "--n-cpu-pinned", "2", "4096="]);
    assert!(done.status.success() && done.stderr.is_empty(), "{}", text(&done.stderr));
    let found: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(found["text"], " four thousand ninety-six");
    assert_eq!((found["passes"].as_u64(), found["tokens"].as_array().unwrap().len()), (Some(6), 5));
    // All on disk: a steady pass moves what the first one did.
    let moved =
        |pass: &str| found[pass]["direct_bytes"].as_f64().unwrap() + found[pass]["buffered_bytes"].as_f64().unwrap();
    assert!(moved("first_pass") > 1e6);
    assert_eq!(moved("first_pass"), moved("steady_pass"));
    assert_eq!(found["steady_pass"]["passes"], 5);
    assert!(found["verdict"]["text"].as_str().unwrap().starts_with("bound by "), "{found}");
    assert_eq!(found["placement"]["settings"]["n_cpu_pinned"], 2);
    assert_eq!(found["links"].as_array().unwrap().len(), 5);
}

#[test]
fn the_speed_of_new_tokens_is_that_of_the_passes_that_bring_them() {
    let of = |new: &str| -> (Value, String) {
        let json = run(&["--json", "--quiet", "--max-new-tokens", new, "4096="]);
        (serde_json::from_slice(&json.stdout).unwrap(), text(&run(&["--max-new-tokens", new, "4096="]).stderr))
    };
    let (found, said) = of("3");
    // The prompt's pass brings the first token.
    let (passes, rate) = (found["decode_passes"].as_u64(), found["tokens_per_second"].as_f64().unwrap());
    assert_eq!((found["tokens"].as_array().unwrap().len(), passes), (3, Some(2)));
    assert!((rate * found["decode_seconds"].as_f64().unwrap() - 2.0).abs() < 1e-9, "{found}");
    assert!(said.contains("3 out at ") && said.matches(" tokens/s").count() == 2, "{said}");
    let (found, said) = of("1");
    assert!(found["decode_passes"] == 0 && found["tokens_per_second"].is_null(), "{found}");
    assert!(said.contains("1 out; the first ") && said.matches(" tokens/s").count() == 1, "{said}");
}

#[test]
fn a_prompt_comes_from_a_file_or_from_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt");
    fs::write(&file, "4096=").unwrap();
    let path = file.to_str().unwrap();
    assert_eq!(text(&run(&["--quiet", "--prompt-file", path]).stdout), " four thousand ninety-six\n");
    let mut child = generate()
        .args(["--quiet", "--prompt-file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"4096=").unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), " four thousand ninety-six\n");
    fs::write(&file, b"40\xff").unwrap();
    let refused = run(&["--prompt-file", path]);
    assert!(text(&refused.stderr).contains("is not UTF-8 from byte 2 on") && !refused.status.success());
    let nowhere = run(&["--prompt-file", "/nowhere"]);
    assert!(text(&nowhere.stderr).contains("cannot read --prompt-file /nowhere"), "{}", text(&nowhere.stderr));
}

#[test]
fn a_trace_is_written_whole_or_refused_before_anything_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for (name, part) in [("run.html", "bound by "), ("run.json", "\"traceEvents\"")] {
        let path = folder.path().join(name);
        let done = run(&["--quiet", "--trace", path.to_str().unwrap(), "4096="]);
        assert_eq!(text(&done.stdout), " four thousand ninety-six\n", "{}", text(&done.stderr));
        let written = fs::read_to_string(&path).unwrap();
        assert!(written.contains(part) && written.contains("layer 7"), "{name}");
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "nothing else is left");
    // The model is not even looked for.
    let refused = run(&["--model", "/nowhere", "--trace", "/nowhere/run.html", "4096="]);
    assert!(text(&refused.stderr).starts_with("error: cannot create the trace /nowhere/run.html"));
    let refused = run(&["--model", "/nowhere", "--trace", "run.txt", "4096="]);
    assert!(text(&refused.stderr).contains(".html (a page) or .json"), "{}", text(&refused.stderr));
}

#[test]
fn after_ctrl_c_the_answer_so_far_the_figures_and_the_trace_are_there() {
    // A model that never stops by itself, with room for more tokens than there is time for.
    let (model, folder) = (copy_of(&data("qwen2-f32")), tempfile::tempdir().unwrap());
    let config = model.path().join("config.json");
    let mut edited: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    edited["max_position_embeddings"] = 100_000.into();
    edited["eos_token_id"] = Value::Null;
    fs::write(&config, edited.to_string()).unwrap();
    let trace = folder.path().join("run.json");
    let mut child = generate()
        .args(["--model", model.path().to_str().unwrap(), "--trace", trace.to_str().unwrap()])
        .args(["--prompt-ids", "1,2,3", "--print-ids", "--max-new-tokens", "90000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It has begun.
    let mut begun = [0; 20];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    // SAFETY: the process is this test's own child, and not waited for yet.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    let output = child.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("3 tokens in at") && said.contains("bound by"), "{said}");
    let written: Value = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
    assert!(written["traceEvents"].as_array().unwrap().len() > 10);
}
