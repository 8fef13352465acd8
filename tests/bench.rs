//! The benchmarks as their users meet them: that they measure something and say what, not how fast.

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use common::example;
use serde_json::Value;
use support::{copy_of, speller};

/// Every benchmark that is built without further features, with arguments that make it as short as it makes sense.
fn benches() -> Vec<(&'static str, Vec<String>)> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut read = words(SHORT);
    read.push(shard());
    let mut stream = words(&format!("{SHORT} --device cpu --n-cpu 1"));
    stream.extend(["--model".to_owned(), model()]);
    let benches = vec![
        ("bench_read", read),
        ("bench_stream", stream),
        ("bench_ring", words("--rounds 2 --window 0.01 --wake-ups 40")),
        ("bench_transfer", words("--device cpu --size 1MiB --rounds 2 --window 0.001")),
        // Of the same kernels, rows and curves as on large tensors, which take minutes in a build that is hardly optimised.
        ("bench_kernels", words("--device cpu --small --rounds 1 --window 0.001")),
        ("bench_trace", words("--rounds 2 --window 0.001")),
    ];
    #[cfg(feature = "capi")]
    let benches = benches.into_iter().chain([("bench_ffi", words("--rounds 1 --window 0.01 --most 1e9"))]).collect();
    benches
}

/// As short as it makes sense.
const SHORT: &str = "--rounds 1 --window 0.05 --warm-up 0.2";

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

fn median(object: &Value, field: &str) -> f64 {
    number(&object[field], "median")
}

fn assert_positive(object: &Value, fields: &[&str]) {
    for field in fields {
        assert!(number(object, field) > 0.0, "{field} in {object}");
    }
}

fn assert_near(a: f64, b: f64) {
    assert!((a / b - 1.0).abs() < 1e-6, "{a} and {b}");
}

fn rows(object: &Value) -> &[Value] {
    object["rows"].as_array().unwrap()
}

fn model() -> String {
    speller().to_str().unwrap().to_owned()
}

fn shard() -> String {
    speller().join("model-00001-of-00002.safetensors").to_str().unwrap().to_owned()
}

/// Least, median and most of a number of samples.
fn assert_spread(spread: &Value) {
    let [min, median, max] = ["min", "median", "max"].map(|which| number(spread, which));
    assert!(0.0 < min && min <= median && median <= max && number(spread, "samples") >= 1.0, "{spread}");
}

#[test]
fn every_benchmark_prints_an_object_of_one_shape() {
    for (name, arguments) in benches() {
        let done = example(name).args(&arguments).arg("--json").output().unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{name}: {}", text(&done.stderr));
        let found: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(found["bench"], name);
        assert!(!found["device"].as_str().unwrap().is_empty() && found["notes"].is_array(), "{found}");
        let keys = |row: &Value| row.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let rows = rows(&found);
        assert!(!rows.is_empty() && rows.iter().all(|row| keys(row) == keys(&rows[0])), "{found}");
        for field in ["measured", "limit", "ratio"] {
            // Copies to the device have nothing beside them: they are the limit.
            if name == "bench_transfer" && field != "limit" {
                assert_eq!(found.get(field), Some(&Value::Null), "{found}");
                continue;
            }
            assert_spread(&found[field]);
            let named = if field == "ratio" { "of" } else { "what" };
            assert!(!found[field][named].as_str().unwrap().is_empty(), "{found}");
        }
    }
}

#[test]
fn every_benchmark_prints_a_table_that_its_legend_explains() {
    for (name, arguments) in benches() {
        let done = example(name).args(&arguments).output().unwrap();
        let said = text(&done.stdout);
        assert!(done.status.success(), "{name}: {}", text(&done.stderr));
        let blocks: Vec<_> = said.split("\n\n").collect();
        let [_device, table, legend, figures] = blocks[..] else { panic!("{name}: {said}") };
        let heading = table.lines().next().unwrap();
        let explained: Vec<_> = legend.lines().map(|line| line.trim().split("  ").next().unwrap()).collect();
        assert!(explained.iter().all(|column| heading.contains(column)), "{name}: {explained:?} of {heading}");
        assert!(figures.contains("limit "), "{name}: {figures}");
        assert!(!["KiB", "MiB", "GiB"].iter().any(|unit| said.contains(unit)), "{name} mixes units: {said}");
    }
}

#[test]
fn every_benchmark_has_examples_in_its_help_and_the_same_options() {
    for (name, _) in benches() {
        let help = text(&example(name).arg("--help").output().unwrap().stdout);
        for part in ["Examples:", "--window <SECONDS>", "--rounds <N>", "--json"] {
            assert!(help.contains(part), "{name} --help lacks {part}: {help}");
        }
    }
}

#[test]
fn curves_are_drawn_where_they_were_asked_for_and_a_file_that_cannot_be_written_is_refused_at_once() {
    let folder = support::folder();
    for (name, mut arguments) in benches() {
        if ["bench_ffi", "bench_trace"].contains(&name) {
            continue;
        }
        if name == "bench_stream" {
            arguments.extend(["--sweep", "n_gpu=1,2"].map(str::to_owned));
        }
        let svg = folder.path().join(format!("{name}.svg"));
        let done = example(name).args(&arguments).arg("--plot").arg(&svg).output().unwrap();
        assert!(done.status.success(), "{name}: {}", text(&done.stderr));
        let drawn = fs::read_to_string(&svg).unwrap();
        assert!(drawn.starts_with("<svg") && drawn.contains("</svg>") && drawn.contains("<circle"), "{name}: {drawn}");

        // As long as a test can wait for nothing: it ends before it measures.
        let unwritable = folder.path().join("nowhere/at.svg");
        let at = arguments.iter().position(|argument| argument == "--window").unwrap();
        let mut long = arguments.clone();
        long[at + 1] = "3600".to_owned();
        let mut command = example(name);
        let said = refusal(command.args(&long).arg("--plot").arg(&unwritable));
        assert!(said.contains("--plot") && said.contains("nowhere/at.svg"), "{name}: {said}");
    }
}

fn link<'a>(found: &'a Value, name: &str) -> Option<&'a Value> {
    rows(found).iter().find(|row| row["link"] == name)
}

#[test]
fn bench_stream_measures_reads_beside_raw_reads_and_copies_beside_plain_copies() {
    let stream =
        |options: &str| object("bench_stream", &["--model", &model()], &format!("{SHORT} --device cpu {options}"));
    let read = stream("--n-cpu 1");
    let disk = link(&read, "disk").or(link(&read, "page cache")).unwrap();
    // What is read is used in place; what comes packed out of RAM is copied.
    let packed = stream("--n-cpu 1 --tier 0-7=pinned-packed");
    let copies = link(&packed, "copy to the device").unwrap();
    assert_eq!([&read, &packed].map(|found| rows(found).len()), [1, 1], "{read} {packed}");
    for row in [disk, copies] {
        for field in ["gb_s", "limit_gb_s", "ratio"] {
            assert_spread(&row[field]);
        }
        assert_positive(row, &["pass_bytes", "cpu_s_per_gb"]);
    }
    // One window: what a link moves in a pass, the time of the pass and the link's rate are of one another.
    assert_near(median(disk, "gb_s"), number(disk, "pass_bytes") / 1e9 / median(&read, "pass_seconds"));
    assert_near(median(&read, "ratio"), median(&read, "measured") / median(&read, "limit"));
    assert_eq!(number(disk, "pass_bytes"), number(&read, "read_bytes_per_pass"));
    assert_positive(&read, &["read_cpu_seconds_per_gb", "compute_cpu_seconds_per_gb"]);
    assert_positive(&packed, &["transfer_cpu_seconds_per_gb"]);
    assert_positive(&read, &["cpu_seconds_per_gb", "memcpy_cpu_seconds_per_gb", "unit_bytes", "slot_bytes"]);
    assert_eq!(read["bottleneck"], "read", "{read}");
    assert!(read["limit"]["what"].as_str().unwrap().starts_with("raw "), "{read}");
    // A waiting thread that looked again and again would take a core.
    assert!(number(&read, "stalled_cpu_share") < 0.2 && number(&read, "allocations") == 0.0, "{read}");

    assert!(packed["limit"]["what"].as_str().unwrap().starts_with("plain copy"), "{packed}");
    assert_eq!(packed["bottleneck"], "transfer", "{packed}");
    assert_eq!(packed["read_cpu_seconds_per_gb"], Value::Null, "nothing is read: {packed}");
}

#[cfg(cuda_emulated)]
#[test]
fn bench_stream_has_a_row_for_each_link_on_the_way_to_a_gpu() {
    let found = object("bench_stream", &["--model", &model()], &format!("{SHORT} --device cuda --n-cpu 1"));
    assert_eq!(rows(&found).len(), 3, "{found}");
    let read = link(&found, "disk").or(link(&found, "page cache")).unwrap();
    for row in [read, link(&found, "copy to pinned RAM").unwrap(), link(&found, "copy to the device").unwrap()] {
        for field in ["gb_s", "limit_gb_s", "ratio"] {
            assert_spread(&row[field]);
        }
        assert_positive(row, &["pass_bytes", "cpu_s_per_gb"]);
    }
}

#[test]
fn bench_stream_counts_layers_on_the_device_in_the_weights_used_and_in_no_link() {
    let options = format!("{SHORT} --device cpu --tier 0-3=gpu");
    let found = object("bench_stream", &["--model", &model()], &options);
    let (whole, seconds) = (number(&found, "unit_bytes"), median(&found, "pass_seconds"));
    assert_near(number(&found, "weights_used_gb_s"), whole / 1e9 / seconds);
    for row in rows(&found) {
        assert!(number(row, "pass_bytes") <= 0.6 * whole, "half of the layers move: {found}");
    }
    let done = run("bench_stream", &["--model", &model()], &format!("{SHORT} --device cpu --tier 0-7=gpu"));
    let said = text(&done.stdout);
    assert!(done.status.success() && said.contains("nothing: all layers stay on the device"), "{said}");
    assert!(said.contains("a pass in which nothing moves") && !said.contains("GB/s"), "{said}");
}

#[test]
fn bench_stream_times_each_of_the_passes_asked_for() {
    let options = "--device cpu --passes 5 --window 0.05 --warm-up 0.2 --reader pread";
    let passes = object("bench_stream", &["--model", &model()], options);
    assert_eq!((&passes["pass_seconds"]["samples"], &passes["reader"]), (&5.into(), &"pread threads".into()));
    assert_spread(&passes["pass_seconds"]);
    let read = number(&passes, "read_bytes_per_pass");
    assert_near(median(&passes, "measured"), read / 1e9 / median(&passes, "pass_seconds"));
}

#[test]
fn bench_stream_traces_what_it_measures_also_where_it_is_interrupted() {
    let (folder, model) = (tempfile::tempdir().unwrap(), model());
    let path = folder.path().join("stream.json");
    let trace = || -> Value { serde_json::from_slice(&fs::read(&path).unwrap()).unwrap() };
    // Longer than a machine with other work stands still: that is what either of two verdicts could be about.
    let options = format!("--rounds 1 --window 0.5 --warm-up 0.2 --device cpu --trace {}", path.display());
    let found = object("bench_stream", &["--model", &model], &options);
    assert_eq!(number(&found, "allocations"), 0.0, "recording takes no memory");
    let whole = trace()["traceEvents"].as_array().unwrap().len();
    assert!(whole > 100, "{whole} events");
    // Of what was measured, not of the time in which the pipeline waits for the limit, nor of a stall.
    let verdict = trace().to_string();
    let words = match found["bottleneck"].as_str().unwrap() {
        "read" => ["bound by the disk", "bound by copies from the page cache"],
        _ => ["bound by copies within RAM"; 2],
    };
    let said: Vec<_> = verdict.split('"').filter(|text| text.contains("bound by")).collect();
    assert!(words.iter().any(|words| verdict.contains(words)), "{said:?}: {found}");
    fs::remove_file(&path).unwrap();

    let mut stopped = example("bench_stream");
    stopped.args(["--model", &model, "--device", "cpu", "--warm-up", "30", "--trace"]).arg(&path);
    let child = stopped.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Once it listens for Ctrl-C, the trace has its place.
    let listens = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & 1 << (libc::SIGINT - 1) != 0
    };
    while !listens() {
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(300));
    // SAFETY: the process is this test's own child, and not waited for yet.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).trim()), (Some(130), "error: stopped by Ctrl-C"));
    assert!(!trace()["traceEvents"].as_array().unwrap().is_empty());
}

#[test]
fn bench_stream_has_a_row_for_each_value_of_a_sweep() {
    let sweep = |values: &str| {
        let mut command = example("bench_stream");
        command.args(["--model", &model(), "--device", "cpu", "--json", "--sweep", values]).args(SHORT.split(' '));
        let done = command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).output().unwrap();
        assert!(done.status.success(), "{values}: {}", text(&done.stderr));
        serde_json::from_slice::<Value>(&done.stdout).unwrap()
    };
    for (text, values) in [("n_cpu_pinned=4,1,2", [1, 2, 4]), ("keep=0,120,30", [0, 30, 120])] {
        let found = sweep(text);
        let tried: Vec<_> = rows(&found).iter().map(|row| row["value"].as_u64().unwrap()).collect();
        assert_eq!(tried, values, "{found}");
        rows(&found).iter().for_each(|row| assert_spread(&row["pass_seconds"]));
        let memory: Vec<_> = rows(&found).iter().map(|row| number(row, "memory_bytes")).collect();
        assert!(memory.is_sorted() && memory[0] < memory[2], "more of either takes more memory: {found}");
        let still = rows(&found)[2]["link"].is_null();
        assert_eq!(still, text.starts_with("keep"), "with 120 % nothing moves: {found}");
    }
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
        assert!(read <= before && median(&found, "pass_seconds") > 0.0, "{before} bytes before, {found}");
        before = read;
    }
    assert_eq!(before, 0.0, "the least and 120 % keep all layers");
}

#[test]
fn bench_read_has_a_row_for_each_way_of_reading_and_marks_the_fastest_of_the_disk() {
    let read = object("bench_read", &[&shard()], SHORT);
    assert_eq!(number(&read, "file_bytes"), fs::metadata(shard()).unwrap().len() as f64);
    let direct = read["best"]["direct"] == true;
    let cache = if direct { "O_DIRECT" } else { "buffered" };
    assert!(rows(&read).len() >= 12 && rows(&read).iter().any(|row| row["cache"] == "O_DIRECT") == direct, "{read}");
    let disk = rows(&read).iter().filter(|row| row["cache"] == cache);
    let fastest = disk.max_by(|a, b| number(a, "gb_s").total_cmp(&number(b, "gb_s"))).unwrap();
    for field in ["engine", "depth", "chunk_bytes"] {
        assert_eq!(read["best"][field], fastest[field], "{read}");
    }
    assert_eq!(rows(&read).iter().filter(|row| row["best"] == true).collect::<Vec<_>>(), [fastest]);
    for row in rows(&read).iter().filter(|row| row["cache"] == "O_DIRECT") {
        assert_eq!(row["page_cache_share"], Value::Null, "{row}");
    }
}

#[test]
fn bench_ring_measures_hand_overs_and_wake_ups_of_a_thread_that_was_asleep() {
    let ring = object("bench_ring", &[], "--rounds 1 --window 0.02 --wake-ups 40");
    let hand_overs = || rows(&ring).iter().filter(|row| row["what"] == "hand-over");
    assert_eq!(hand_overs().count(), 15, "{ring}");
    for row in hand_overs() {
        assert_near(median(row, "seconds"), 1e-6 / median(row, "m_entries_s"));
    }
    for wake_up in [&ring["wake_up"], &ring["limit_wake_up"]] {
        assert!(number(wake_up, "median_seconds") <= number(wake_up, "p99_seconds"), "{ring}");
        assert!(number(wake_up, "median_seconds") > 0.0, "{ring}");
    }
    assert!(number(&ring["wake_up"], "asleep") > 20.0, "{ring}");
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
    let folder = support::folder();
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
        ("bench_stream", &["--model", &model, "--sweep", "tiers=1,2"], &["--sweep", "n_cpu_pinned", "keep"]),
        ("bench_stream", &["--model", &model, "--sweep", "n_gpu=0,1"], &["n_gpu", "at least 1"]),
        ("bench_stream", &["--model", &model, "--sweep", "n_gpu=1,2", "--ram", "1GB"], &["--sweep n_gpu", "--ram"]),
        ("bench_stream", &["--model", &model, "--sweep", "trace=0,2"], &["--sweep", "trace is 0, without, or 1"]),
        ("bench_stream", &["--model", &model, "--trace", "/nowhere/t.json"], &["/nowhere/t.json", "No such file"]),
        ("bench_stream", &["--model", &model, "--plot", "/tmp/x.svg"], &["--sweep"]),
        ("bench_stream", &["--model", &model, "--rounds", "0"], &["--rounds"]),
        ("bench_transfer", &["--size", "1kB"], &["--size", "64KiB"]),
        ("bench_ring", &["--wake-ups", "0"], &["--wake-ups"]),
    ] {
        let said = refusal(example(name).args(arguments));
        for part in parts {
            assert!(said.contains(part), "{name} {arguments:?}: {said} lacks {part}");
        }
    }
    for (spoil, part) in
        [("/dev/zero", "no regular file"), (nothing.as_str(), "out of the folder"), ("/nowhere", "No such file")]
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
    let measured = object("bench_kernels", &[], "--device cpu --small --rounds 2 --window 0.001");
    for row in rows(&measured) {
        assert_positive(row, &["bytes", "gb_s"]);
        assert_spread(&row["of_copy"]);
        assert_near(number(row, "gb_s"), number(row, "bytes") / median(row, "seconds") / 1e9);
        assert!(row["off"].is_null() || row["off"] == 0.0, "the CPU is its own twin: {row}");
        let multiplies = ["linear", "attention"].contains(&row["kernel"].as_str().unwrap());
        assert_eq!(row["tflop_s"].is_number(), multiplies, "{row}");
        let decodes = ["expand", "dequantise", "unpack"].contains(&row["kernel"].as_str().unwrap());
        assert_eq!(row["weights_gb_s"].is_number(), decodes, "{row}");
    }
    for kernel in [
        "cast",
        "expand",
        "dequantise",
        "rms_norm",
        "add_rms_norm",
        "rms_norm_in_place",
        "add",
        "rope",
        "swiglu",
        "geglu",
        "scale",
        "soft_cap",
        "argmax",
        "linear",
        "attention",
        "unpack",
    ] {
        assert!(rows(&measured).iter().any(|row| row["kernel"] == kernel), "{kernel} is missing");
    }
    for (kernel, weights) in
        [("expand", &["q4_k", "q8_0", "mxfp4"][..]), ("dequantise", &["fp8", "int4", "gptq", "awq", "nf4"])]
    {
        for of in weights {
            let named = |row: &&Value| row["shape"].as_str().unwrap().to_lowercase().starts_with(of);
            let found: Vec<_> = rows(&measured).iter().filter(|row| row["kernel"] == kernel).filter(named).collect();
            assert!(found.iter().any(|row| row["off"] == 0.0), "{kernel} of {of}: {found:?}");
            // What is read is shorter than what is made, or hardly longer.
            for row in found {
                let (moved, seconds) = (number(row, "bytes"), median(row, "seconds"));
                let made = number(row, "weights_gb_s") * seconds * 1e9;
                assert!(made < moved && moved < 2.2 * made, "{row}");
            }
        }
    }
}

#[test]
fn bench_trace_times_spans_beside_the_clock_that_they_look_at() {
    let trace = object("bench_trace", &[], "--rounds 7");
    let rows = trace["rows"].as_array().unwrap();
    // Of a machine that is busy with other things the least tells.
    let row = |what: &str| rows.iter().find(|row| row["what"] == what).unwrap_or_else(|| panic!("{what}"));
    let ns = |what: &str| number(&row(what)["ns"], "min");
    let clock = ns("two looks at the clock");
    for what in ["a unit read", "a unit copied"] {
        assert!(ns(what) > 0.0 && ns(what) < 3.0 * clock, "{what}: {trace}");
    }
    assert!(ns("a wait") > 0.0 && ns("a unit read, with an observer") > 0.0 && trace["nvtx"] == cfg!(feature = "nvtx"));
}
