//! `tune`: stopped, killed and started again, its answer taken by `generate` and pasted into a shell.

mod common;

use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::program;
use layer_streamer::{
    Settings,
    model::Model,
    plan::Placement,
    tuner::{Record, Trial},
};
use support::marked::{marked, nothing_is_left};

/// Enough for the tokenizer, the kernels' scratch, and about half of the speller's layers with the longest rings of the grid.
const RAM: &str = "5.32MB";

/// The command on the CPU.
fn tune_alone() -> Command {
    let mut command = program("tune");
    command.args(["--device", "cpu"]);
    command
}

/// The command on the speller, with a small grid whose workers bear the record's path. Pauses make it last.
fn tune(record: &Path, sleep: &str) -> Child {
    let mut command = tune_alone();
    command.args(["--n-gpu", "1,2", "--n-cpu-pinned", "0,1,2", "--n-cpu", "0", "--runs", "3"]);
    // Less than all, so that what is read in every pass differs.
    command
        .args(["--no-probe", "--ram", RAM, "--sleep", sleep, "--json"])
        .arg(record)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command.process_group(0).spawn().unwrap()
}

/// Waits until the record holds so many trials, the worker of the next being on its way.
fn recorded(record: &Path, count: usize) -> Vec<Trial> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(found) = Record::read(record)
            && found.trials.len() >= count
            && !marked(record).is_empty()
        {
            return found.trials;
        }
        assert!(Instant::now() < deadline, "no {count} trials");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_search_stopped_by_ctrl_c_or_killed_leaves_no_process_and_goes_on_without_repeating_anything() {
    let folder = support::folder();
    let record = folder.path().join("record.json");
    let mut before = Vec::new();
    for (signal, count) in [(libc::SIGINT, 1), (libc::SIGKILL, 3)] {
        let mut child = tune(&record, "0.3");
        let trials = recorded(&record, count);
        assert_eq!(trials[..before.len()], before, "what was on record is done again");
        // SAFETY: no memory is involved; the child has not been waited for.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        let status = child.wait().unwrap();
        assert_eq!(status.code(), if signal == libc::SIGINT { Some(130) } else { None }, "{status}");
        nothing_is_left(&record);
        before = Record::read(&record).unwrap().trials;
        assert!(before.len() < 6, "the search was over before it was ended");
    }
    let done = tune(&record, "0.3").wait_with_output().unwrap();
    assert!(done.status.success());
    let found = Record::read(&record).unwrap();
    assert_eq!(found.trials[..before.len()], before, "what was on record is done again");
    let distinct = |trial: &Trial| found.trials.iter().filter(|other| other.placement == trial.placement).count() == 1;
    assert!(found.trials.len() == 6 && found.trials.iter().all(distinct), "{found:?}");
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains("best: ") && said.contains("--config"), "{said}");
    nothing_is_left(&record);
    // Candidates with shorter rings keep more.
    let kept: Vec<_> = found.trials.iter().map(|trial| trial.placement.kept()).collect();
    assert!(kept.iter().min() < kept.iter().max(), "{kept:?}");
}

/// The record that `tune` left at `path`, with another answer.
fn with_answer(path: &Path, placement: &Placement) {
    let mut record = Record::read(path).unwrap();
    record.answer.as_mut().unwrap().placement = placement.clone();
    fs::write(path, serde_json::to_string(&record).unwrap()).unwrap();
}

#[test]
fn the_whole_answer_is_what_generate_uses_and_only_for_its_checkpoint() {
    let folder = support::folder();
    let path = folder.path().join("record.json");
    assert!(tune(&path, "0").wait_with_output().unwrap().status.success());
    let generate = |arguments: &[&str]| {
        let mut command = program("generate");
        let done = command.args(["--device", "cpu", "--config"]).arg(&path).args(arguments).output().unwrap();
        (done.status.success(), String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let record = Record::read(&path).unwrap();
    let answer = record.answer.as_ref().unwrap();
    assert_eq!(record.budget.unwrap().host_bytes, 5_320_000);
    assert!(answer.device_bytes > 0 && answer.device_bytes + answer.host_bytes <= 5_320_000, "{answer:?}");
    let (_, text, said) = generate(&["4096="]);
    assert_eq!(text, " four thousand ninety-six\n", "{said}");
    let Settings { n_gpu, n_cpu_pinned, .. } = answer.placement.settings;
    let slots = format!("{} pinned slots", n_gpu + n_cpu_pinned + 1);
    assert!(said.contains(&slots) && said.contains("settings: found for ") && !said.contains("warning"), "{said}");

    // Rings, tiers and tables, whichever they are.
    let mut model = Model::open(support::speller()).unwrap();
    for (words, tiers, lines) in [
        ("head-streamed", "1-2=gpu,5=pinned", &["3 units kept on the device"][..]),
        ("embedding-in-file", "0=ram,7=gpu", &["2 units kept on the device", "embedding rows on their way"]),
        ("on-device", "", &["6 pinned slots"]),
    ] {
        model.tables = words.parse().unwrap();
        let settings = Settings { n_gpu: 3, n_cpu_pinned: 2, ..Settings::default() };
        let units = model.placement(&settings).tiers.len();
        let placement = Placement { statics: words.into(), ..Placement::new(settings, units, tiers).unwrap() };
        with_answer(&path, &placement);
        let (_, text, said) = generate(&["4096="]);
        assert_eq!(text, " four thousand ninety-six\n", "{said}");
        lines.iter().for_each(|line| assert!(said.contains(line), "{words}: {line} in {said}"));
        let flags = ["--tables", words, "--tier", tiers, "--n-gpu", "3", "--n-cpu-pinned", "2", "4096="];
        let by_flags = program("generate").args(["--device", "cpu"]).args(flags).output().unwrap();
        assert_eq!(text, String::from_utf8_lossy(&by_flags.stdout), "{by_flags:?}");
    }

    // What was found elsewhere is used, with a warning.
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"machine\":\"", "\"machine\":\"far from ")).unwrap();
    let (done, _, said) = generate(&["4096="]);
    assert!(done && said.contains("warning: this machine is another"), "{said}");
    // What cannot be used is refused by name.
    let tiny = support::data("qwen3");
    for (text, model, cause) in [
        (text.as_str(), Some(&tiny), "record.json: was found for "),
        (r#"{"machine":"m","trials":[],"best":{"n_gpu":1}}"#, None, "another version"),
        ("{}", None, "is no record of a search"),
        ("", None, "is no record of a search"),
        (&text.replace("\"head-streamed\"", "").replace("\"on-device\"", "\"in-the-attic\""), None, "in-the-attic"),
        (&text.replace("\"units\":8", "\"units\":9"), None, "is for 9 units, there are 8"),
    ] {
        fs::write(&path, text).unwrap();
        let model: Vec<_> = model.iter().flat_map(|model| ["--model", model.to_str().unwrap()]).collect();
        let (done, _, said) = generate(&[&model[..], &["--prompt-ids", "1", "--print-ids"]].concat());
        assert!(!done && said.contains("error: ") && said.contains(cause), "{cause:?} in {said}");
    }
}

#[test]
fn the_answer_is_run_once_more_for_a_trace() {
    let folder = support::folder();
    let path = folder.path().join("answer.json");
    let mut command = tune_alone();
    command.args(["--no-probe", "--n-gpu", "1", "--n-cpu-pinned", "2", "--n-cpu", "0", "--runs", "2", "--trace"]);
    let done = command.arg(&path).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success() && said.contains("running the answer for the trace"), "{said}");
    let trace: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 20 && trace.to_string().contains("bound by"));
    let refused = tune_alone().args(["--model", "/nowhere", "--trace", "/nowhere/trace.json"]).output().unwrap();
    assert!(!refused.status.success());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn the_last_line_can_be_pasted_into_a_shell() {
    let folder = support::folder();
    // Names that a shell would take apart; one model has no tokenizer.
    let odd = folder.path().join("it's an odd $name");
    fs::create_dir(&odd).unwrap();
    for entry in fs::read_dir(support::speller()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "tokenizer.json" {
            fs::copy(entry.path(), odd.join(entry.file_name())).unwrap();
        }
    }
    let (odd, record) = (odd.to_str().unwrap(), folder.path().join("a record"));
    for arguments in [&[][..], &["--model", odd, "--context", "64"], &["--json", record.to_str().unwrap()]] {
        let mut command = tune_alone();
        command.args(["--no-probe", "--ram", RAM, "--n-gpu", "1", "--n-cpu-pinned", "1"]);
        let tuned = command.args(["--n-cpu", "0", "--runs", "2"]).args(arguments).output().unwrap();
        let said = String::from_utf8(tuned.stdout).unwrap();
        let line = said.lines().last().unwrap();
        let ran = Command::new("sh").args(["-c", line]).output().unwrap();
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        assert!(ran.status.success() && !line.contains('…'), "{line}: {ran:?}");
        match line.contains("--prompt-ids") {
            true => assert!(text.trim().split(',').all(|id| id.parse::<u32>().is_ok()), "{line}: {text}"),
            false => assert_eq!(text, " four thousand ninety-six\n", "{line}"),
        }
        assert_eq!(line.contains("--config"), arguments.contains(&"--json"), "{line}");
        assert_eq!(line.contains("--tier"), !line.contains("--config"), "{line}");
    }
}

#[test]
fn what_the_command_line_cannot_mean_is_refused_at_once_and_a_search_that_finds_nothing_fails() {
    let folder = support::folder();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let record = path("record.json");
    let mut first = tune(Path::new(&record), "0.3");
    recorded(Path::new(&record), 1);
    for (arguments, code, cause) in [
        (&["--json", &record, "--ram", RAM, "--sleep", "0.3", "--runs", "3"][..], 1, "another search is writing to it"),
        (&["--plot", &path("picture.png")], 2, "ends in .svg"),
        (&["--plot", &path("no/picture.svg")], 1, "cannot write "),
        (&["--minutes", "0"], 1, "no configuration could be measured"),
        (&["--n-gpu", "0"], 1, "error: n_gpu: must be at least 1"),
        (&["--n-cpu", "0,70000"], 1, "error: n_cpu: is 70000"),
        (&["--ram", "1MB"], 1, "less than the least that will do"),
        (&["--vram", "1MB"], 1, "--vram: "),
    ] {
        let ended = program("tune").args(["--device", "cpu"]).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.code() == Some(code) && said.contains(cause), "{arguments:?}: {said}");
        // One error, and no table of what could not be tried.
        assert!(ended.stdout.is_empty() || arguments[0] == "--minutes", "{arguments:?}: {ended:?}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    nothing_is_left(Path::new(&record));
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["record.json"]);
}
