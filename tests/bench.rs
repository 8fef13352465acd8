//! The benchmarks as their users meet them: that they measure something and say what, not how fast.

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    process::{Command, Output},
};

use common::{copy_of, example, speller};
use serde_json::Value;

/// As short as it makes sense.
const SHORT: &str = "--pairs 1 --window 0.05 --warm-up 0.2";

fn run(name: &str, paths: &[&str], options: &str) -> Output {
    example(name).args(paths).args(options.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The one JSON object that it prints, and nothing else.
fn object(name: &str, paths: &[&str], options: &str) -> Value {
    let done = run(name, paths, &format!("{options} --json"));
    assert!(done.status.success() && done.stderr.is_empty(), "{name} {options}: {}", text(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

fn number(object: &Value, field: &str) -> f64 {
    object[field].as_f64().unwrap_or_else(|| panic!("{field} is no number in {object}"))
}

fn assert_positive(object: &Value, fields: &[&str]) {
    for field in fields {
        assert!(number(object, field) > 0.0, "{field} in {object}");
    }
}

fn assert_near(a: f64, b: f64) {
    assert!((a / b - 1.0).abs() < 1e-6, "{a} and {b}");
}

const RATES: &[&str] = &["bytes", "seconds", "gb_s", "limit_gb_s", "ratio"];

fn model() -> String {
    speller().to_str().unwrap().to_owned()
}

#[test]
fn bench_stream_measures_reads_beside_raw_reads_and_copies_beside_plain_copies() {
    let stream =
        |options: &str| object("bench_stream", &["--model", &model()], &format!("{SHORT} --device cpu {options}"));
    let read = stream("--n-cpu 1");
    assert_positive(&read, RATES);
    assert_near(number(&read, "gb_s"), number(&read, "bytes") / 1e9 / number(&read, "seconds"));
    assert_near(number(&read, "ratio"), number(&read, "gb_s") / number(&read, "limit_gb_s"));
    let stages = ["read", "pin", "transfer", "compute"].map(|stage| format!("{stage}_cpu_seconds_per_gb"));
    assert_positive(&read, &stages.each_ref().map(String::as_str));
    assert_positive(&read, &["cpu_seconds_per_gb", "memcpy_cpu_seconds_per_gb", "unit_bytes", "slot_bytes"]);
    assert!(["read", "pin", "transfer"].contains(&read["bottleneck"].as_str().unwrap()), "{read}");
    assert!(read["limit"].as_str().unwrap().starts_with("raw "), "{read}");
    // A waiting thread that looked again and again would take a core.
    assert!(number(&read, "stalled_cpu_share") < 0.2 && number(&read, "allocations") == 0.0, "{read}");

    let copied = stream("--home 0-7=pinned");
    assert_positive(&copied, RATES);
    assert!(
        copied["limit"].as_str().unwrap().starts_with("plain copy") && copied["bottleneck"] == "transfer",
        "{copied}"
    );
    assert_eq!(copied["read_cpu_seconds_per_gb"], Value::Null, "nothing was read: {copied}");
}

#[test]
fn bench_stream_times_each_of_the_passes_asked_for() {
    let options = "--device cpu --passes 5 --window 0.05 --warm-up 0.2 --reader pread";
    let passes = object("bench_stream", &["--model", &model()], options);
    assert_eq!((&passes["passes"], &passes["reader"]), (&5.into(), &"pread threads".into()));
    let [min, median, max] = ["min", "median", "max"].map(|which| number(&passes, &format!("pass_seconds_{which}")));
    let seconds = number(&passes, "seconds");
    assert!(0.0 < min && min <= median && median <= max && 5.0 * min <= seconds && max <= seconds, "{passes}");
    assert_near(number(&passes, "pass_gb_s_median"), number(&passes, "unit_bytes") / 1e9 / median);
}

#[test]
fn bench_stream_reads_as_many_bytes_a_pass_as_was_planned_for_the_memory() {
    let mut before = f64::INFINITY;
    for keep in [0, 30, 55, 120] {
        let options = format!("{SHORT} --device cpu --keep {keep}");
        let mut command = example("bench_stream");
        command.args(["--model", &model(), "--json"]).args(options.split_whitespace());
        let done = command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        let found: Value = serde_json::from_slice(&done.stdout).unwrap();
        let read = number(&found, "read_bytes_per_pass");
        assert_eq!(read, number(&found, "planned_bytes_per_pass"), "{found}");
        assert!(read <= before && number(&found, "pass_seconds") > 0.0, "{before} bytes before, {found}");
        before = read;
    }
    assert_eq!(before, 0.0, "the least and 120 % keep all layers");
}

#[test]
fn bench_read_has_a_row_for_each_way_of_reading_and_marks_the_fastest_of_the_disk() {
    let shard = speller().join("model-00001-of-00002.safetensors");
    let read = object("bench_read", &[shard.to_str().unwrap()], SHORT);
    assert_positive(&read, RATES);
    assert_eq!(number(&read, "file_bytes"), fs::metadata(&shard).unwrap().len() as f64);
    let rows = read["rows"].as_array().unwrap();
    assert!(rows.len() >= 12, "{read}");
    let direct = rows.iter().any(|row| row["direct"] == true);
    let disk = rows.iter().filter(|row| row["direct"] == direct);
    let fastest = disk.max_by(|a, b| number(a, "gb_s").total_cmp(&number(b, "gb_s"))).unwrap();
    for field in ["engine", "direct", "depth", "chunk_bytes"] {
        assert_eq!(read["best"][field], fastest[field], "{read}");
    }
    for row in rows.iter().filter(|row| row["direct"] == true) {
        assert!(row["page_cache_bytes"].as_f64().unwrap_or(0.0) == 0.0, "{row}");
    }
    let done = run("bench_read", &[shard.to_str().unwrap()], SHORT);
    assert!(done.status.success() && text(&done.stdout).contains("best of the disk"), "{}", text(&done.stdout));
}

#[test]
fn bench_ring_measures_hand_overs_and_wake_ups_of_a_thread_that_was_asleep() {
    let ring = object("bench_ring", &[], "--rounds 1 --window 0.02 --wake-ups 40");
    for hand_overs in ring["hand_overs"].as_array().unwrap() {
        assert_positive(hand_overs, &["capacity", "m_entries_s", "limit_m_entries_s", "sync_channel_m_entries_s"]);
    }
    assert_positive(&ring, &["wake_up_us_median", "limit_wake_up_us_median"]);
    assert!(number(&ring, "wake_up_us_median") <= number(&ring, "wake_up_us_p99"), "{ring}");
    assert!(number(&ring, "wake_ups_asleep") > 20.0, "{ring}");
    let done = run("bench_ring", &[], "--rounds 1 --window 0.02 --wake-ups 5");
    assert!(done.status.success() && text(&done.stdout).contains("million entries/s"), "{}", text(&done.stdout));
}

/// What it says of an input that it cannot measure: one error, at once.
fn refusal(command: &mut Command) -> String {
    let done = command.output().unwrap();
    let said = text(&done.stderr);
    assert!(!done.status.success() && done.stdout.is_empty() && !said.contains("panicked"), "{command:?}: {said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{command:?}: {said}");
    said
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let folder = common::folder();
    let [empty, nothing] = ["empty", "nothing"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    fs::create_dir(&empty).unwrap();
    fs::write(&nothing, "").unwrap();
    let model = model();
    for (name, arguments, parts) in [
        ("bench_read", &["/nowhere"][..], &["cannot open /nowhere", "No such file"][..]),
        ("bench_read", &[&empty], &[&empty, "no regular file"]),
        ("bench_read", &["/dev/null"], &["/dev/null", "no regular file"]),
        ("bench_read", &[&nothing], &[&nothing, "is empty"]),
        ("bench_read", &[], &["FILE"]),
        ("bench_stream", &["--model", "/nowhere"], &["/nowhere", "No such file"]),
        ("bench_stream", &["--model", &empty], &[&empty, "model.safetensors"]),
        ("bench_stream", &["--model", "/dev/null"], &["/dev/null", "no folder"]),
        ("bench_stream", &["--model", &model, "--window", "0"], &["--window", "seconds from 0.001"]),
        ("bench_stream", &["--model", &model, "--warm-up", "nan"], &["--warm-up", "seconds from 0.001"]),
        ("bench_stream", &["--model", &model, "--n-gpu", "0"], &["n_gpu", "at least 1"]),
        ("bench_stream", &["--model", &model, "--home", "0-7=gpu"], &["--home", "nothing moves"]),
        ("bench_ring", &["--wake-ups", "0"], &["--wake-ups"]),
    ] {
        let said = refusal(example(name).args(arguments));
        for part in parts {
            assert!(said.contains(part), "{name} {arguments:?}: {said} lacks {part}");
        }
    }
    for (spoil, part) in [("/dev/zero", "no regular file"), (nothing.as_str(), "0 bytes"), ("/nowhere", "No such file")]
    {
        let (copy, shard) = (copy_of(&speller()), "model-00002-of-00002.safetensors");
        fs::remove_file(copy.path().join(shard)).unwrap();
        symlink(spoil, copy.path().join(shard)).unwrap();
        let said = refusal(example("bench_stream").arg("--model").arg(copy.path()));
        assert!(said.contains(shard) && said.contains(part), "{said} lacks {part}");
    }
}

#[test]
fn bench_kernels_holds_every_kernel_against_its_twin_and_times_it() {
    let measured = object("bench_kernels", &[], "--device cpu --quick");
    assert_positive(&measured, &["copy_gb_s"]);
    let kernels = measured["kernels"].as_array().unwrap();
    for row in kernels {
        assert_positive(row, &["seconds", "bytes", "gb_s", "of_copy"]);
        assert_near(number(row, "gb_s"), number(row, "bytes") / number(row, "seconds") / 1e9);
        assert!(row["off"].is_null() || row["off"] == 0.0, "the CPU is its own twin: {row}");
    }
    for kernel in ["cast", "rms_norm", "add_rms_norm", "rope", "swiglu", "argmax", "linear", "attention"] {
        let checked = |row: &Value| row["kernel"].as_str().unwrap().starts_with(kernel);
        assert!(kernels.iter().any(checked), "{kernel} is missing");
    }
}

#[test]
fn bench_trace_times_spans_beside_the_clock_that_they_look_at() {
    let trace = object("bench_trace", &[], "--rounds 7 --spans 20000");
    let rows = trace["rows"].as_array().unwrap();
    let ns = |what: &str| number(rows.iter().find(|row| row["what"] == what).unwrap_or_else(|| panic!("{what}")), "ns");
    let clock = ns("two looks at the clock");
    for what in ["a unit read", "a unit copied"] {
        assert!(ns(what) > 0.0 && ns(what) < 3.0 * clock, "{what}: {trace}");
    }
    assert!(ns("a wait") > 0.0 && ns("a unit read, with an observer") > 0.0 && trace["nvtx"] == cfg!(feature = "nvtx"));
    let done = run("bench_trace", &[], "--rounds 1 --spans 100");
    assert!(done.status.success() && text(&done.stdout).contains("beyond the clock"), "{}", text(&done.stdout));
}
