//! Runs that end before all is answered, and those that go on after them.

use std::{fs, process::Stdio, thread, time::Duration};

use serde_json::{Value, json};
use support::{copy_of, speller};

use crate::{Batch, complete, journal_of, numbers, text};

/// The promise: SIGKILL at any moment, again and again, and every prompt has one answer, the one it has anyway.
#[test]
fn runs_that_are_killed_and_resumed_answer_every_prompt_once() {
    let lines = numbers(300);
    let whole = Batch::of(&lines).answers(&[]);
    let expected = complete(&whole, 300);
    assert!(whole.iter().all(|answer| answer["end"] == "stop token"), "the speller spells");
    let mut rng = fastrand::Rng::new();
    for more in [&[][..], &["--as-they-end"]] {
        let batch = Batch::of(&lines);
        let (mut kills, mut resumed) = (0, 0);
        let sequences = ["--sequences", "6"];
        let arguments = [more, &sequences].concat();
        while kills < 5 {
            let mut run = batch.start(&arguments);
            // What is written before it is killed differs, as does when.
            batch.wait_for(&mut run, rng.u64(..5000));
            thread::sleep(Duration::from_micros(rng.u64(..3000)));
            run.kill().unwrap();
            let is_complete = run.wait().unwrap().success();
            let written = fs::read(batch.output()).unwrap_or_default();
            let answers = written.iter().filter(|byte| **byte == b'\n').count();
            assert!(answers >= resumed, "answers are never lost");
            resumed = answers;
            kills += 1;
            if is_complete {
                break;
            }
            assert!(batch.journal().exists() || written.is_empty());
        }
        assert!(resumed > 0 && kills > 1, "{kills} kills, {resumed} answers");
        let said = batch.run(&[&arguments[..], &["--json"]].concat());
        assert!(said.status.success(), "{}", text(&said.stderr));
        let summary: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(
            (&summary["prompts"], &summary["answered"], &summary["errors"]),
            (&json!(300), &json!(300), &json!(0))
        );
        assert_eq!(summary["before"], resumed, "what is there is not computed again");
        let answers = batch.written();
        assert_eq!(complete(&answers, 300), expected);
        assert!(!more.is_empty() || answers.is_sorted_by_key(|answer| answer["line"].as_u64()), "in order");
    }
}

#[test]
fn a_last_line_that_is_cut_off_anywhere_is_written_anew() {
    let lines = numbers(12);
    let batch = Batch::of(&lines);
    let whole = complete(&batch.answers(&[]), 12);
    let bytes = fs::read(batch.output()).unwrap();
    // The journal of a run that was ended.
    let journal = journal_of(&numbers(400));
    let mut rng = fastrand::Rng::new();
    for cut in [0, 1, bytes.len() - 1, bytes.len()].into_iter().chain((0..4).map(|_| rng.usize(..bytes.len()))) {
        fs::write(batch.output(), &bytes[..cut]).unwrap();
        fs::write(batch.journal(), &journal).unwrap();
        assert_eq!(complete(&batch.answers(&[]), 12), whole, "cut at {cut}");
        assert_eq!(fs::read(batch.output()).unwrap(), bytes);
    }
}

#[test]
fn another_input_model_or_option_is_refused_by_name() {
    let lines = numbers(400);
    let batch = Batch::of(&lines);
    let mut run = batch.start(&["--sequences", "2"]);
    batch.wait_for(&mut run, 500);
    let other = batch.run(&["--sequences", "2"]);
    assert!(text(&other.stderr).contains("another process writes it"), "{}", text(&other.stderr));
    run.kill().unwrap();
    run.wait().unwrap();
    assert!(batch.journal().exists(), "it was killed before its end");
    let said = batch.refused(&["--max-new-tokens", "9"]);
    assert!(said.contains("was begun with --max-new-tokens 256, which is 9 now"), "{said}");
    let said = batch.refused(&["--temperature", "0.5"]);
    assert!(said.contains("was begun with --temperature not given, which is 0.5 now"), "{said}");
    let other = copy_of(&speller());
    let shard = other.path().join("model-00002-of-00002.safetensors");
    let mut weights = fs::read(&shard).unwrap();
    let last = weights.len() - 1;
    weights[last] ^= 1;
    fs::write(&shard, weights).unwrap();
    let said = batch.refused(&["--model", other.path().to_str().unwrap()]);
    assert!(said.contains("was begun with the model") && said.contains("other weights"), "{said}");
    let journal = fs::read_to_string(batch.journal()).unwrap();
    let device = serde_json::from_str::<Value>(&journal).unwrap()["device"].as_str().unwrap().to_owned();
    assert!(device.starts_with("cpu ("), "{device}");
    fs::write(batch.journal(), journal.replace(&device, "H200")).unwrap();
    let said = batch.refused(&[]);
    assert!(
        said.contains(&format!("was begun on the device H200, and {device} may")) && said.contains("--device"),
        "{said}"
    );
    fs::write(batch.journal(), journal).unwrap();
    let original = fs::read_to_string(batch.input()).unwrap();
    for (changed, part) in [
        (original.replacen("n0", "m0", 1), "line 1 is not the one that was answered"),
        (format!("\n{original}"), "line 1 is not the one that was answered"),
        (String::new(), "line 1 was answered, but there is no such line now"),
    ] {
        batch.rewrite(&changed);
        let said = batch.refused(&[]);
        assert!(said.contains(part) && said.contains("prompts.jsonl: "), "{said}");
    }
    batch.rewrite(&original);
    let journal = fs::read(batch.journal()).unwrap();
    fs::remove_file(batch.journal()).unwrap();
    assert!(batch.refused(&[]).contains(".journal is missing"));
    fs::write(batch.journal(), journal).unwrap();
    // The model may lie elsewhere, and more may run at once.
    let copy = copy_of(&speller());
    complete(&batch.answers(&["--sequences", "20", "--model", copy.path().to_str().unwrap()]), 400);
    assert!(batch.refused(&[]).contains("remove it, or give another --output"), "a complete output stays as it is");
}

#[test]
fn ctrl_c_keeps_what_is_answered_and_says_how_to_go_on() {
    let lines = numbers(400);
    let batch = Batch::of(&lines);
    let run = batch.command(&["--sequences", "2"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut run = run.unwrap();
    batch.wait_for(&mut run, 500);
    // SAFETY: it is a process of this test.
    unsafe { libc::kill(run.id() as libc::pid_t, libc::SIGINT) };
    let done = run.wait_with_output().unwrap();
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(130), "{said}");
    assert!(said.contains("interrupted: the same command goes on"), "{said}");
    let written = batch.written().len();
    assert!((1..400).contains(&written) && said.contains(&format!("{written} of 400 prompts answered")), "{said}");
    let whole = batch.run(&[]);
    let said = text(&whole.stderr);
    assert!(said.contains(&format!("has {written} answers; going on after them")), "{said}");
    complete(&batch.written(), 400);
}
