//! The C API as its users meet it: what it exports, and the hosts in `examples/`, which must print what Rust prints.

#[path = "capi/abi.rs"]
mod abi;
mod common;
#[path = "common/host.rs"]
mod host;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{bytes_of, generate};
use host::{Build, C11, CPP17, SANITIZED, libraries, printed};
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device, TensorRef},
    model::{Decoder, Model},
    plan::{Arrival, ArrivalOp},
};
use support::speller;

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)
}

/// What `embed` prints in a pass, by the Rust API.
fn sums() -> String {
    let checkpoint = Checkpoint::open(speller()).unwrap();
    let units = checkpoint.layers().unwrap();
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &Settings::default()).unwrap();
    let stream = Cpu.stream().unwrap();
    let lines = streamer.run_pass(&stream, String::new(), |lines, layer| {
        let bytes: Vec<_> = layer.tensors().map(|(_, tensor)| bytes_of(&Cpu, tensor)).collect();
        let sum: u64 = bytes.iter().flatten().map(|byte| u64::from(*byte)).sum();
        let (count, all) = (bytes.len(), bytes.concat().len());
        Ok::<_, Error>(format!("{lines}{}: {count} tensors, {all} bytes, sum {sum}\n", layer.name()))
    });
    lines.unwrap()
}

/// What `generate` prints, by the Rust API.
fn tokens(prompt: &[u32]) -> String {
    let model = Model::open(speller()).unwrap();
    let mut decoder = Decoder::new(&Cpu, &model, &Settings::default(), 1, prompt.len() + 32).unwrap();
    let found = generate(&mut decoder, &[prompt], 32, &model.config.stop).remove(0);
    found.iter().map(u32::to_string).collect::<Vec<_>>().join(",") + "\n"
}

/// Compiles both hosts, and holds what they print, run by `runner`, against what Rust prints.
fn check_hosts(build: Build, runner: &[&str]) {
    let folder = support::folder();
    let run = |name: &str| {
        let program = folder.path().join(name);
        if !program.exists() {
            build.compile(&source(&format!("c/{name}.c")), &program);
        }
        let Some((first, rest)) = runner.split_first() else { return Command::new(program) };
        let mut command = Command::new(first);
        command.args(rest).arg(program);
        command
    };
    let model = speller();
    assert_eq!(printed(run("embed").arg(&model).arg("2")), sums().repeat(2), "{build:?}");
    assert_eq!(printed(run("generate").arg(&model).arg("22,10,19,16,26")), tokens(&[22, 10, 19, 16, 26]), "{build:?}");

    for name in ["embed", "generate"] {
        let failed = run(name).args(["/no/such/folder", "1"]).output().unwrap();
        let said = String::from_utf8(failed.stderr).unwrap();
        assert_eq!(failed.status.code(), Some(1), "{said}");
        assert!(said.contains("cannot") && said.contains("/no/such/folder"), "{said}");
    }
}

#[test]
fn hosts_in_c11_and_in_cpp17_print_what_rust_prints() {
    check_hosts(C11, &[]);
    check_hosts(CPP17, &[]);
}

#[test]
fn address_and_undefined_behaviour_sanitizers_find_nothing_in_the_hosts() {
    check_hosts(SANITIZED, &[]);
}

#[test]
#[ignore = "takes valgrind; cargo xtask capi runs it"]
fn valgrind_finds_nothing_in_the_hosts() {
    let suppressions = format!("--suppressions={}/ci/valgrind-suppressions", env!("CARGO_MANIFEST_DIR"));
    // What is left is reachable: tables of handles, as large as at the first open.
    let lost = "definite,indirect,possible";
    let (errors, shown) = (format!("--errors-for-leak-kinds={lost}"), format!("--show-leak-kinds={lost}"));
    let valgrind = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", &errors, &shown, &suppressions];
    check_hosts(C11, &valgrind);
}

/// What `mlp.py` computes, in F64.
fn mlp() -> Vec<f64> {
    const WEIGHTS: [&str; 4] =
        ["post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"];
    let checkpoint = Checkpoint::open(speller()).unwrap();
    let units: Vec<_> = (0..8)
        .map(|layer| {
            let mut unit = Unit::new("mlp");
            for name in WEIGHTS {
                let inputs = vec![format!("model.layers.{layer}.{name}")];
                unit.add(Arrival { output: name.into(), inputs, op: ArrivalOp::To(DType::F32) });
            }
            unit
        })
        .collect();
    let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &Settings::default()).unwrap();
    let floats = |tensor: TensorRef<'_, Cpu>| -> Vec<f64> {
        let bytes = bytes_of(&Cpu, tensor);
        bytes.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
    };
    let product = |matrix: &[f64], x: &[f64]| -> Vec<f64> {
        matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let x: Vec<f64> = (0..128).map(|i| -1.0 + 2.0 * f64::from(i) / 127.0).collect();
    let stream = Cpu.stream().unwrap();
    let done = streamer.run_pass(&stream, x, |x, layer| {
        let [norm, gate, up, down] = WEIGHTS.map(|name| floats(layer.tensor(name).unwrap()));
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / 128.0 + 1e-6).sqrt();
        let h: Vec<_> = x.iter().zip(&norm).map(|(x, norm)| x * scale * norm).collect();
        let gated: Vec<_> =
            product(&gate, &h).iter().zip(product(&up, &h)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        Ok::<_, Error>(x.iter().zip(product(&down, &gated)).map(|(x, y)| x + y).collect())
    });
    done.unwrap()
}

#[test]
#[ignore = "takes Python with NumPy; cargo xtask capi runs it"]
fn a_host_in_python_computes_layers_in_numpy() {
    let script = source("python/mlp.py");
    assert!(fs::read_to_string(&script).unwrap().lines().count() < 80);
    let library = libraries().join("liblayer_streamer.so");
    let said = printed(Command::new("python3").arg(script).arg(library).arg(speller()));
    let found: Vec<f64> = said.split_whitespace().map(|value| value.parse().unwrap()).collect();
    let expected = mlp();
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-3 * b.abs().max(1.0), "{a} and {b}");
    }
}
