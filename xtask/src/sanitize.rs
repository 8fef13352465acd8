//! Tests under a sanitizer.

use std::process::Command;

use clap::{Args, ValueEnum};

use crate::{
    cuda,
    run::{self, Failure, Run},
};

/// Run ring, pipeline, codec, `tests/stream.rs`, what runs on the emulated CUDA runtime, and the C API under a sanitizer.
///
/// `address` covers the kernels too, with undefined behaviour. `thread` builds the standard library as well, whose source is
/// `rustup component add rust-src`: one that comes compiled orders threads where the sanitizer does not see it. The sanitizers come with
/// every toolchain, but behind flags that RUSTC_BOOTSTRAP opens on a stable one.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask sanitize thread")]
pub struct Options {
    #[arg(value_enum)]
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Thread,
    Address,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Thread => "thread",
            Self::Address => "address",
        }
    }

    /// `cargo test` of the library with these features. It has a target folder of its own, which keeps the everyday build as it is.
    fn tests(self, host: &str, features: &str, arguments: &str) -> Command {
        let name = self.name();
        let std = if self == Self::Thread { "-Zbuild-std" } else { "" };
        // One test after the other: sanitizers multiply what each takes of memory and time.
        let mut command = run::cargo(&format!(
            "test --locked -p layer-streamer --no-default-features --features {features} --target-dir target/sanitize-{name} \
             {std} {arguments} --test-threads=1"
        ));
        // With a target named, build scripts go without.
        command.env("CARGO_BUILD_TARGET", host).env("RUSTC_BOOTSTRAP", "1");
        command.env("RUSTFLAGS", format!("-Zsanitizer={name} -Cunsafe-allow-abi-mismatch=sanitizer"));
        for (variable, file) in [("TSAN_OPTIONS", "tsan-suppressions"), ("LSAN_OPTIONS", "lsan-suppressions")] {
            command.env(variable, format!("suppressions={}/ci/{file}", run::root().display()));
        }
        command
    }
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let kind = options.kind;
    let said = run::command("rustc", &["-vV"]).read()?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: ")).ok_or("rustc -vV names no host")?;
    pipeline_and_cuda(kind, host)?;
    c_api(kind, host)
}

/// What runs on the CPU device and on the emulated GPU.
fn pipeline_and_cuda(kind: Kind, host: &str) -> Result<(), Failure> {
    let home = cuda::headers()?;
    // Models are left out, and kernels where threads are looked at: those of a block are no threads of the system's.
    let tests = |arguments: &str| {
        let mut command = kind.tests(host, if kind == Kind::Thread { "cuda" } else { "cuda,model" }, arguments);
        command
            .env("CUDA_HOME", &home)
            .env("LAYER_STREAMER_CUDA", "emulated")
            .env("LAYER_STREAMER_TEST_DEVICE", "cuda");
        if kind == Kind::Address {
            // Traps need no library beside the one that Rust brings.
            command.env("CXXFLAGS", "-fsanitize=address,undefined -fsanitize-undefined-trap-on-error");
        }
        command
    };
    if kind == Kind::Thread {
        // What keeps it from being built is told as it is.
        tests("--lib --no-run --").run()?;
        finds_a_race(&mut tests("--lib -- --ignored device::async_cpu::tests::copies"))?;
    }
    tests("--lib -- ring:: io:: device:: pipeline:: packed:: kernels::").run()?;
    tests("--test stream --").run()?;
    if kind == Kind::Address {
        tests("--test packed --").run()?;
        tests("--test cuda_kernels --").run()?;
    }
    // When a GPU's context is lost, what it may still use is never freed: that is no leak.
    let mut cuda = tests("--test cuda --test cuda_fault --test cuda_emulated --test cuda_chaos --");
    cuda.env("ASAN_OPTIONS", "detect_leaks=0").run()
}

/// A wait that is left out on purpose is a race, which must be found: or else the rest shows nothing.
fn finds_a_race(tests: &mut Command) -> Result<(), Failure> {
    let output = tests.output()?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    match said.lines().find(|line| line.contains("SUMMARY: ThreadSanitizer: data race")) {
        Some(line) => {
            println!("{line}");
            Ok(())
        }
        None => Err(format!("{said}\nthe sanitizer does not find the race of device::async_cpu::tests").into()),
    }
}

/// The C API on the CPU: called from Rust, then by hosts in C, linked to the library as it is built here.
fn c_api(kind: Kind, host: &str) -> Result<(), Failure> {
    let tests = |arguments: &str| kind.tests(host, "capi", arguments).run();
    tests("--lib -- capi::")?;
    if kind == Kind::Thread {
        return tests("--test capi_misuse -- a_second_thread a_callback a_stream");
    }
    // Left out is what builds hosts without the sanitizer, which cannot be linked to this.
    tests("--test capi_misuse -- --skip null_for_every_pointer")?;
    tests("--test capi_fuzz --test capi_kernels --test capi_plan --")?;
    tests("--test capi -- find_nothing")
}
