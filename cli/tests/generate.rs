//! `generate` and `plan` as their users meet them: what goes where, and one clear error for every bad input.

mod common;

use std::{
    ffi::CString,
    fs,
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::program;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{copy_of, data, speller};

/// A command on the CPU, whatever there is besides.
fn on_cpu(command: &str) -> Command {
    let mut command = program(command);
    // What a probe finds is kept with the tests' files, not the user's.
    command.args(["--device", "cpu"]).env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

fn generate(arguments: &[&str]) -> Output {
    on_cpu("generate").args(arguments).output().unwrap()
}

fn plan(arguments: &[&str]) -> Output {
    on_cpu("plan").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn text_alone_goes_to_stdout_and_everything_else_to_stderr() {
    let done = generate(&["4096="]);
    assert!(done.status.success());
    assert_eq!(text(&done.stdout), " four thousand ninety-six\n");
    let said = text(&done.stderr);
    for part in [
        "pinned slots",
        "8 units kept on the device",
        "static tensors",
        "KV cache of 37 tokens",
        "tokenizer",
        "total",
        "tokens/s",
        "GB/s",
        "bound by",
        " s after the start",
    ] {
        assert!(said.contains(part), "{said} lacks {part}");
    }
    let quiet =
        generate(&["--quiet", "--n-gpu", "7", "--n-cpu-pinned", "0", "--n-cpu", "3", "--batch-cpu", "2", "4096="]);
    assert_eq!((text(&quiet.stdout), text(&quiet.stderr)), (" four thousand ninety-six\n".into(), String::new()));
}

#[test]
fn layers_that_are_kept_are_listed() {
    for tiers in ["0-7=gpu", "0-7=pinned", "0-7=ram", "0=gpu,2-3=pinned,5-7=ram"] {
        let done = generate(&["--tier", tiers, "4096="]);
        assert_eq!(text(&done.stdout), " four thousand ninety-six\n", "{tiers}: {}", text(&done.stderr));
        assert!(text(&done.stderr).contains("units kept"), "{}", text(&done.stderr));
    }
}

#[test]
fn that_nothing_is_read_ahead_is_said_where_it_is_so() {
    let alone = ["--n-gpu", "1", "--n-cpu-pinned", "0", "--n-cpu", "0"];
    // A layer that is used in place stays in its slot, and there is one more for the next.
    assert!(!text(&generate(&[&alone[..], &["4096="]].concat()).stderr).contains("no stage ahead"));
    let folder = support::folder();
    let model = folder.path().join("packed");
    assert!(program("pack").arg(speller()).arg(&model).output().unwrap().status.success());
    let done = on_cpu("generate").args(alone).arg("--model").arg(model).arg("4096=").output().unwrap();
    assert_says(&text(&done.stderr), &["no stage ahead of the transfer"]);
}

#[test]
fn any_budget_from_the_minimum_on_gives_the_same_text_and_is_kept_to() {
    assert_says(&refusal(&["--ram", "1MB", "4096="]), &["ram: 1000000 bytes", "least that will do"]);
    let refused = |ram: &str| {
        let done = plan(&["--ram", ram, "--json", "4096="]);
        assert!(!done.status.success() && text(&done.stderr).contains("ram: "), "{}", text(&done.stderr));
        serde_json::from_slice::<Value>(&done.stdout).unwrap()["refused"].clone()
    };
    let least = refused("1MB")["least"].as_u64().unwrap();
    let short = refused(&(least - 1).to_string());
    assert_eq!(short, json!({ "memory": "shared", "given": least - 1, "least": least }));
    // Which of them are packed in RAM depends on the rates that the machine is measured at.
    for (pack, in_ram) in [("never", None), ("auto", Some("pinned_packed"))] {
        let mut kept = Vec::new();
        for more in [0, 500_000, 1_500_000, 6_000_000] {
            let ram = (least + more).to_string();
            let given = ["--ram", &ram, "--pack", pack];
            let done = generate(&[&given[..], &["4096="]].concat());
            assert_eq!(text(&done.stdout), " four thousand ninety-six\n", "{}", text(&done.stderr));
            let done = plan(&[&given[..], &["--json", "4096="]].concat());
            let plan: Value = serde_json::from_slice(&done.stdout).unwrap();
            let tiers = plan["tiers"].as_array().unwrap();
            let layers = |tier: &str| tiers[..8].iter().filter(|found| *found == tier).count();
            kept.push(layers("gpu") + in_ram.map_or(0, layers));
            assert_eq!(kept[kept.len() - 1] + layers("disk"), 8, "{plan}");
            let taken = plan["device_bytes"].as_u64().unwrap() + plan["host_bytes"].as_u64().unwrap();
            assert!(taken <= least + more, "{plan}");
        }
        assert!(kept[0] == 0 && kept.is_sorted() && kept[3] == 8 && (1..8).contains(&kept[2]), "{pack}: {kept:?}");
    }
}

#[test]
fn the_plan_is_printed_alone_and_names_tiers_and_the_link_that_binds() {
    let done = plan(&["--no-probe", "--n-cpu-pinned", "1", "--tier", "0-2=gpu,5=pinned"]);
    assert!(done.status.success() && done.stderr.is_empty(), "{}", text(&done.stderr));
    assert_says(
        &text(&done.stdout),
        &["4 on the device: 0-2,5", "4 on disk: 3-4,6-7", "bound by disk", "(2.00 GB/s, assumed)"],
    );
    let packed = plan(&["--no-probe", "--tier", "0-2=gpu,3-5=pinned-packed"]);
    assert_says(&text(&packed.stdout), &["and copies and unpacks", "(2.00 and 10.00 GB/s, assumed)"]);
    let all = plan(&["4096="]);
    assert_says(&text(&all.stdout), &["8 on the device: 0-7", "measured", "nothing moves", "KV cache of 37 tokens"]);
}

#[test]
fn links_are_measured_only_where_layers_are_read_again_and_within_what_a_process_may_take_besides() {
    let cache = tempfile::tempdir().unwrap();
    let run = |command: &str, arguments: &[&str]| {
        let mut command = on_cpu(command);
        command.args(arguments).env("XDG_CACHE_HOME", cache.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        // What wait4(2) would tell counts the test's own process too, as it was before it became the other program.
        let peak_now = || -> Option<usize> {
            let text = fs::read_to_string(&status).ok()?;
            let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            Some(peak.trim().strip_suffix(" kB")?.parse::<usize>().ok()? * 1024)
        };
        let mut peak = 0;
        let ended = loop {
            // Whatever it has grown to once, it shows until it ends.
            peak = peak.max(peak_now().unwrap_or(0));
            match child.try_wait().unwrap() {
                Some(ended) => break ended,
                None => std::thread::sleep(Duration::from_micros(500)),
            }
        };
        assert!(ended.success(), "{arguments:?}");
        (peak, fs::read_dir(cache.path().join("layer-streamer")).map_or(0, Iterator::count))
    };
    assert_eq!(run("generate", &["4096="]).1, 0, "all layers are kept");
    let ram = 3_200_000;
    let (peak, measured) = run("generate", &["--ram", &ram.to_string(), "4096="]);
    assert_eq!(measured, 1);
    assert!(peak <= ram + (64 << 20), "{peak} bytes of {ram}");
    // Now they are known.
    assert_eq!(run("plan", &[]).1, 1);
}

/// A cache folder with what a first probe kept, and that file.
fn probed() -> (tempfile::TempDir, PathBuf) {
    let cache = tempfile::tempdir().unwrap();
    let done = plan_with(&cache, &[]);
    assert_says(&text(&done.stdout), &["measured just now"]);
    let mut files = fs::read_dir(cache.path().join("layer-streamer")).unwrap();
    let file = files.next().unwrap().unwrap().path();
    assert!(files.next().is_none());
    (cache, file)
}

fn plan_with(cache: &tempfile::TempDir, arguments: &[&str]) -> Output {
    let done = on_cpu("plan").args(arguments).env("XDG_CACHE_HOME", cache.path()).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    done
}

/// Gives a kept probe a figure that no disk has, an age, and a disturbance.
fn falsify(file: &Path, age: Duration, disturbed: Option<&str>) {
    edit_json(file.to_owned(), |kept| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        kept["taken"] = (now - age).as_secs().into();
        kept["disk"] = 123e9.into();
        kept["disturbed"] = disturbed.into();
    });
}

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn a_kept_probe_says_how_old_it_is_and_is_taken_anew_if_too_old_or_damaged_or_asked_for() {
    let (cache, file) = probed();
    let plan = |arguments: &[&str]| text(&plan_with(&cache, arguments).stdout);
    falsify(&file, 3 * DAY + MINUTE, None);
    assert_says(&plan(&[]), &["(123.00 and ", " GB/s, measured 3 days ago)"]);
    let anew = |told: &str| {
        assert!(told.contains("measured just now") && !told.contains("123.00"), "{told}");
        let kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert!(kept["disk"].as_f64().unwrap() < 100e9, "{kept}");
    };
    anew(&plan(&["--probe"]));
    falsify(&file, 31 * DAY, None);
    anew(&plan(&[]));
    fs::write(&file, "disk 123000000000\ncopy 10000000000\n").unwrap();
    anew(&plan(&[]));
    assert_says(&refusal(&["--probe", "--no-probe", "1="]), &["--probe", "--no-probe"]);
}

#[test]
fn a_disturbed_probe_is_told_of_in_one_line_and_kept_for_minutes() {
    let (cache, file) = probed();
    falsify(&file, 5 * MINUTE + MINUTE / 2, Some("other processes kept 2.0 of 2 processors busy"));
    let done = plan_with(&cache, &[]);
    assert_says(&text(&done.stdout), &["(123.00 and ", " GB/s, measured 5 minutes ago while disturbed)"]);
    let said = text(&done.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_says(&said, &["123.00", "disturbed", "2.0 of 2 processors", "--probe measures anew"]);
    assert_eq!(text(&plan_with(&cache, &["--quiet"]).stderr), "");
    falsify(&file, 11 * MINUTE, Some("other processes kept 2.0 of 2 processors busy"));
    assert_says(&text(&plan_with(&cache, &[]).stdout), &["measured just now"]);
    // What is forced is also told without a plan, and though all layers are kept.
    let done = on_cpu("generate").args(["--probe", "4096="]).env("XDG_CACHE_HOME", cache.path()).output().unwrap();
    assert_says(&text(&done.stderr), &["disk and link: ", " GB/s, measured just now"]);
}

#[test]
fn ids_go_in_and_out_without_a_tokenizer() {
    let folder = copy_of(&speller());
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let model = folder.path().to_str().unwrap();
    let with = generate(&["--quiet", "--print-ids", "4096="]);
    let tokenizer = tokenizers::Tokenizer::from_file(speller().join("tokenizer.json")).unwrap();
    let encoded = tokenizer.encode("4096=", false).unwrap();
    let prompt = encoded.get_ids().iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let without = generate(&["--model", model, "--quiet", "--print-ids", "--prompt-ids", &prompt]);
    assert_eq!(text(&without.stdout), text(&with.stdout));
    assert!(text(&with.stdout).split(',').count() > 2, "{}", text(&with.stdout));
    let refused = generate(&["--model", model, "4096="]);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("tokenizer.json") && text(&refused.stderr).contains("--prompt-ids"));
}

#[test]
fn dumped_logits_are_a_safetensors_file_of_the_prompt_s_logits() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, reference) = (folder.path().join("logits.safetensors"), data("qwen2-tied"));
    let bytes = fs::read(reference.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let ids: Vec<String> = expected
        .tensor("prompt")
        .unwrap()
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b).to_string())
        .collect();
    let (model, path_text) = (reference.to_str().unwrap(), path.to_str().unwrap());
    let done = generate(&[
        "--model",
        model,
        "--quiet",
        "--print-ids",
        "--prompt-ids",
        &ids.join(","),
        "--dump-logits",
        path_text,
    ]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let bytes = fs::read(&path).unwrap();
    let dumped = SafeTensors::deserialize(&bytes).unwrap();
    let (got, wanted) = (dumped.tensor("logits").unwrap(), expected.tensor("logits").unwrap());
    assert_eq!((got.dtype(), got.shape()), (wanted.dtype(), wanted.shape()));
    let floats = |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
    for (a, b) in floats(got.data()).iter().zip(floats(wanted.data())) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let mut child =
        on_cpu("generate").args(["--quiet", "777777="]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success() && said.is_empty(), "{said}");
}

#[test]
fn a_closed_stderr_is_no_reason_to_stop() {
    let mut child = on_cpu("generate").arg("77=").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success());
    assert_eq!(text(&done.stdout), " seventy-seven\n");
}

/// Edits a copy of the speller, and generates with it: what is said to `98765=`, and how many tokens that was.
fn said_by(edit: impl FnOnce(&Path)) -> (String, u64) {
    let folder = copy_of(&speller());
    edit(folder.path());
    let done = generate(&["--model", folder.path().to_str().unwrap(), "--json", "98765="]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    (said["text"].as_str().unwrap().to_owned(), said["prompt_tokens"].as_u64().unwrap())
}

#[test]
fn padding_and_truncation_that_a_tokenizer_was_saved_with_are_not_for_prompts() {
    let plain = said_by(|_| ());
    assert_eq!(plain.1, 6);
    for direction in ["Left", "Right"] {
        let padding = json!({
            "strategy": { "Fixed": 16 }, "direction": direction, "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        });
        assert_eq!(said_by(|folder| edit_json(folder.join("tokenizer.json"), |t| t["padding"] = padding)), plain);
    }
    let cut = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
    assert_eq!(said_by(|folder| edit_json(folder.join("tokenizer.json"), |t| t["truncation"] = cut)), plain);
}

#[test]
fn a_bos_token_that_tokenizer_config_json_alone_asks_for_is_put_first_once() {
    let count = |config: Value, edit: fn(&mut Value)| {
        let with = |folder: &Path| {
            fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
            edit_json(folder.join("tokenizer.json"), edit);
        };
        said_by(with).1
    };
    let bos = json!("<|endoftext|>");
    assert_eq!(count(json!({ "add_bos_token": true, "bos_token": bos }), |_| ()), 7);
    assert_eq!(count(json!({ "add_bos_token": true, "bos_token": { "content": bos } }), |_| ()), 7);
    assert_eq!(count(json!({ "add_bos_token": false, "bos_token": bos }), |_| ()), 6);
    assert_eq!(count(json!({ "add_bos_token": true, "bos_token": null }), |_| ()), 6);
    let itself = |tokenizer: &mut Value| {
        let special = json!({ "SpecialToken": { "id": "<|endoftext|>", "type_id": 0 } });
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [special, { "Sequence": { "id": "A", "type_id": 0 } }], "pair": [],
            "special_tokens": { "<|endoftext|>": { "id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"] } },
        });
    };
    assert_eq!(count(json!({ "add_bos_token": true, "bos_token": bos }), itself), 7);
    let unknown = json!({ "add_bos_token": true, "bos_token": "<none>" });
    let said = spoiled(|folder| fs::write(folder.join("tokenizer_config.json"), unknown.to_string()).unwrap());
    assert_says(&said, &["tokenizer_config.json", "add_bos_token", "<none>"]);
}

/// Runs with a limit on time: a bad input must not hang.
fn refusal(arguments: &[&str]) -> String {
    let mut child = on_cpu("generate").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{arguments:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let done = child.wait_with_output().unwrap();
    let said = text(&done.stderr);
    assert!(!done.status.success() && done.stdout.is_empty(), "{arguments:?} was not refused: {said}");
    assert!(!said.contains("panicked"), "{said}");
    let errors = said.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "one clear error, not: {said}");
    said
}

fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{said} lacks {part}");
    }
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let long = "1234567890=".repeat(20);
    for (arguments, parts) in [
        (&["--n-gpu", "0", "1="][..], &["n_gpu", "at least 1"][..]),
        (&["--batch-gpu", "3", "1="], &["batch_gpu", "n_gpu = 2"]),
        (&["--batch-cpu-pinned", "5", "1="], &["batch_cpu_pinned", "n_cpu_pinned = 4"]),
        (&["--batch-cpu", "1", "1="], &["batch_cpu", "n_cpu = 0"]),
        (&["--n-gpu", "99999999", "1="], &["n_gpu", "99999999"]),
        (&[""], &["prompt is empty"]),
        (&["--prompt-ids", "1,x"], &["--prompt-ids", "x"]),
        (&["--prompt-ids", "5000"], &["token 5000", "vocabulary of 343"]),
        (&["--context", "3", "4096="], &["5 tokens", "context 3", "--context"]),
        (&["--context", "0", "4096="], &["context 0"]),
        (&["--context", "1000", "4096="], &["context", "1 to 128"]),
        (&[&long], &["the prompt is 220 tokens long", "this model takes 128", "shorter"]),
        (&["--model", "/nowhere/at/all", "1="], &["/nowhere/at/all/config.json", "No such file"]),
        (&["--vram", "1GB", "1="], &["--vram", "cpu", "--ram alone"]),
        (&["--ram", "1GB", "--n-gpu", "1", "1="], &["--vram, --ram and --pack", "your own"]),
        (&["--ram", "much", "1="], &["--ram", "such as 4GiB"]),
        (&["--ram=-1GB", "1="], &["--ram", "such as 4GiB"]),
        (&["--tier", "0-8=gpu", "1="], &["tier", "0-8=gpu", "8 units, 0 to 7"]),
        (&["--tier", "3-2=gpu", "1="], &["tier", "3-2=gpu"]),
        (&["--tier", "1=attic", "1="], &["tier", "attic", "disk, ram, pinned, gpu, gpu-packed or pinned-packed"]),
        (&["--dump-logits", "/", "1="], &["--dump-logits /", "it is a folder; name a file"]),
        (&["--dump-logits", "/dev/null", "1="], &["--dump-logits /dev/null", "no regular file"]),
        (&["--dump-logits", "/nowhere/at/all", "1="], &["--dump-logits /nowhere/at/all", "No such file"]),
    ] {
        assert_says(&refusal(arguments), parts);
    }
}

#[test]
fn settings_of_the_environment_are_refused_by_name() {
    let has_amx = fs::read_to_string("/proc/cpuinfo").is_ok_and(|said| said.contains("amx_bf16"));
    let mut cases = vec![("LAYER_STREAMER_THREADS", "0"), ("LAYER_STREAMER_THREADS", "many")];
    if cfg!(target_arch = "x86_64") {
        cases.push(("LAYER_STREAMER_AMX", "2"));
        cases.extend((!has_amx).then_some(("LAYER_STREAMER_AMX", "1")));
    }
    for (name, value) in cases {
        let done = on_cpu("generate").env(name, value).arg("4096=").output().unwrap();
        assert!(!done.status.success() && done.stdout.is_empty(), "{name}={value} was not refused");
        assert_says(&text(&done.stderr), &[name, &format!("is {value}")]);
    }
}

/// Spoils a copy of the speller and returns what is said of it.
fn spoiled(spoil: impl FnOnce(&Path)) -> String {
    let folder = copy_of(&speller());
    spoil(folder.path());
    refusal(&["--model", folder.path().to_str().unwrap(), "1="])
}

fn edit_json(path: PathBuf, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

#[test]
fn bad_checkpoints_are_refused_with_file_tensor_and_cause() {
    let config =
        |key: &'static str, value: Value| spoiled(|folder| edit_json(folder.join("config.json"), |c| c[key] = value));
    assert_says(
        &config("model_type", "gpt_neox".into()),
        &["config.json", "gpt_neox", "llama, mistral, ministral, qwen2, qwen3"],
    );
    assert_says(&config("rms_norm_eps", (-1.0).into()), &["config.json", "rms_norm_eps is -1"]);
    assert_says(&config("num_attention_heads", 0.into()), &["config.json", "num_attention_heads is 0"]);
    assert_says(&config("num_key_value_heads", 0.into()), &["config.json", "num_key_value_heads is 0"]);
    let layers = |count: usize| {
        spoiled(|folder| {
            edit_json(folder.join("config.json"), |c| {
                c["num_hidden_layers"] = count.into();
                c["layer_types"] = Value::Null;
            })
        })
    };
    assert_says(&layers(9), &["model.layers.8.", "config.json calls for it"]);
    assert_says(&config("hidden_size", 256.into()), &["model.embed_tokens.weight", "[343, 128]", "[343, 256]"]);
    assert_says(&config("hidden_act", "gelu".into()), &["hidden_act", "gelu"]);
    assert_says(&config("vocab_size", "many".into()), &["config.json", "many"]);
    let rope = serde_json::json!({ "rope_type": "xpos", "factor": 4.0 });
    assert_says(&config("rope_parameters", rope), &["config.json", "rope scaling", "xpos"]);
    assert_says(&spoiled(|f| fs::write(f.join("config.json"), "{").unwrap()), &["config.json", "JSON"]);
    assert_says(&spoiled(|f| fs::write(f.join("tokenizer.json"), "{").unwrap()), &["tokenizer.json"]);
    // Of these the tokenizers crate panics.
    for charsmap in ["AA==", "/////w==", "AQAAAA=="] {
        let normalizer = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": charsmap });
        let said = spoiled(|folder| edit_json(folder.join("tokenizer.json"), |t| t["normalizer"] = normalizer));
        assert!(said.contains("tokenizer.json") && !said.contains("panicked"), "{said}");
    }
    // What would be waited for, or fill the memory.
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ] {
        let pipe = spoiled(|folder| {
            let path = CString::new(folder.join(file).as_os_str().as_bytes()).unwrap();
            let _ = fs::remove_file(folder.join(file));
            // SAFETY: the name ends with its zero.
            assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        });
        assert_says(&pipe, &[file, "no regular file"]);
        let hole = spoiled(|folder| fs::File::create(folder.join(file)).unwrap().set_len(1 << 38).unwrap());
        assert_says(&hole, &[file, "274877906944 bytes"]);
    }
    // More layers than there are tensors, of which none is asked for room.
    let many = spoiled(|folder| {
        edit_json(folder.join("config.json"), |c| {
            c["num_hidden_layers"] = u32::MAX.into();
            c["layer_types"] = Value::Null;
        })
    });
    assert_says(&many, &["model.layers.8.", "config.json calls for it"]);

    assert_says(&spoiled(|f| fs::remove_file(f.join(SHARDS[1])).unwrap()), &[SHARDS[1], "No such file"]);
    assert_says(&spoiled(|f| fs::write(f.join(SHARDS[1]), "").unwrap()), &[SHARDS[1], "0 bytes"]);
    let cut =
        spoiled(|f| fs::OpenOptions::new().write(true).open(f.join(SHARDS[1])).unwrap().set_len(900_000).unwrap());
    assert_says(&cut, &[SHARDS[1], "tensor model.", "truncated"]);
    let index = |edit: fn(&mut Value)| {
        spoiled(|f| edit_json(f.join("model.safetensors.index.json"), |i| edit(&mut i["weight_map"])))
    };
    let moved = index(|map| map["model.norm.weight"] = "none.safetensors".into());
    assert_says(&moved, &["none.safetensors", "No such file"]);
    assert_says(
        &index(|map| map["model.norm.weight"] = "../elsewhere.safetensors".into()),
        &["model.norm.weight", "../elsewhere"],
    );
}
