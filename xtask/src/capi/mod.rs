//! The C API as those who embed the library have it.

#[cfg(test)]
mod header;
pub mod install;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use clap::Args;

use crate::run::{self, Failure, Run, Steps};

/// Check the C API as those who embed the library have it.
///
/// Hosts under valgrind and in Python, an installed package that compiles a host outside the repository, by pkg-config and by
/// CMake, and what the C edge costs. About four minutes on two cores.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask capi")]
pub struct Options {}

/// Token ids of the prompt "4096=".
const PROMPT: &str = "22,10,19,16,26";

pub fn run(_: &Options) -> Result<(), Failure> {
    let steps = Steps::of("C API");
    let work = run::scratch("capi")?;

    steps.begin("tools");
    run::command("ci/tools", &["capi"]).run()?;
    steps.begin("hosts under valgrind, a host in Python; cargo test --features capi runs all other tests");
    tests(work.path())?;

    steps.begin("install");
    let prefix = work.path().join("prefix");
    install_and_inspect(&prefix)?;

    let hosts = Hosts::new(work.path(), &prefix)?;
    steps.begin("a host outside the repository, with pkg-config alone");
    hosts.with_pkg_config()?;
    steps.begin("the same with CMake");
    hosts.with_cmake()?;

    steps.begin("what the C edge costs");
    // Another program's load can spoil a comparison of nanoseconds, but hardly three.
    let cost = || run::cargo("run -q --release --locked --features capi --example bench_ffi").run();
    cost().or_else(|_| cost()).or_else(|_| cost())
}

/// clippy, and the tests that take valgrind and NumPy.
fn tests(work: &Path) -> Result<(), Failure> {
    run::cargo(
        "clippy --locked --features capi --lib --example bench_ffi --test capi --test capi_fuzz --test \
         capi_kernels --test capi_misuse --test capi_plan --test capi_trace -- -D warnings",
    )
    .run()?;
    let mut tests = run::cargo("test -q --locked --features capi --test capi -- --ignored");
    if run::command("python3", &["-m", "pip", "show", "-q", "numpy"]).quiet().is_err() {
        let python = work.join("python");
        run::command("python3", &["-m", "pip", "install", "-q", "--target"]).arg(&python).arg("numpy").run()?;
        tests.env("PYTHONPATH", python);
    }
    tests.run()
}

/// By cargo-c where it is, else by our own installer. The shared library has its version's name, and exports the functions of the
/// header alone.
fn install_and_inspect(prefix: &Path) -> Result<(), Failure> {
    if run::is_there("cargo-cinstall") {
        run::cargo("cinstall -q --locked -p layer-streamer --libdir lib --prefix").arg(prefix).run()?;
    } else {
        install::install(prefix, "", &[])?;
    }
    let library = prefix.join("lib/liblayer_streamer.so");
    let dynamic = run::command("readelf", &["-d"]).arg(&library).read()?;
    if !dynamic.contains("soname: [liblayer_streamer.so.0.1]") {
        return Err(format!("the shared library is not liblayer_streamer.so.0.1:\n{dynamic}").into());
    }
    exports_only_ours(&run::command("nm", &["-D", "--defined-only"]).arg(&library).read()?)
}

/// What `nm` lists are functions `ls_…`, and more than fifty.
fn exports_only_ours(listed: &str) -> Result<(), Failure> {
    let names = listed.lines().filter_map(|line| line.split_whitespace().last()).collect::<Vec<_>>();
    if let Some(other) = names.iter().find(|name| !name.starts_with("ls_")) {
        return Err(format!("the shared library exports {other}, which no header declares").into());
    }
    if names.len() <= 50 { Err(format!("the shared library exports {} functions", names.len()).into()) } else { Ok(()) }
}

/// Hosts that are built in a folder outside the repository.
struct Hosts<'a> {
    work: &'a Path,
    prefix: &'a Path,
    /// The tokens that each must print.
    expected: String,
}

impl<'a> Hosts<'a> {
    fn new(work: &'a Path, prefix: &'a Path) -> Result<Self, Failure> {
        for source in ["generate.c", "embed.c", "CMakeLists.txt"] {
            fs::copy(run::root().join("examples/c").join(source), work.join(source))?;
        }
        let program = run::program()?;
        let options = ["generate", "--device", "cpu", "--quiet", "--print-ids", "--prompt-ids", PROMPT];
        Ok(Self { work, prefix, expected: run::command(program, &options).read()? })
    }

    fn with_pkg_config(&self) -> Result<(), Failure> {
        let shared = self.compile("shared", self.prefix, &[])?;
        self.check(&shared)?;
        // The loader's cache does not know the prefix, and -l takes a shared library where there is one.
        let prefix = self.work.join("static");
        let (lib, pc) = (prefix.join("lib"), prefix.join("lib/pkgconfig/layer_streamer.pc"));
        run::command("cp", &["-r"]).args([self.prefix, &prefix]).run()?;
        for entry in fs::read_dir(lib)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains(".so")) {
                fs::remove_file(path)?;
            }
        }
        let moved = |line: &str| match line.strip_prefix("prefix=") {
            Some(_) => format!("prefix={}\n", prefix.display()),
            None => format!("{line}\n"),
        };
        fs::write(&pc, fs::read_to_string(&pc)?.lines().map(moved).collect::<String>())?;
        let host = self.compile("static-host", &prefix, &["--static"])?;
        self.check(&host)?;
        has_no_shared_library(&host)
    }

    fn with_cmake(&self) -> Result<(), Failure> {
        for linked in ["OFF", "ON"] {
            let build = self.work.join(format!("cmake-{linked}"));
            let mut cmake = self.outside("cmake");
            cmake.env("PKG_CONFIG_PATH", self.prefix.join("lib/pkgconfig"));
            cmake.arg("-S").arg(self.work).arg("-B").arg(&build).arg(format!("-DSTATIC={linked}")).quiet()?;
            self.outside("cmake").arg("--build").arg(&build).quiet()?;
            let host = build.join("generate");
            self.check(&host)?;
            if linked == "ON" {
                has_no_shared_library(&host)?;
            }
        }
        Ok(())
    }

    /// Compiles `generate.c` as pkg-config says.
    fn compile(&self, name: &str, prefix: &Path, options: &[&str]) -> Result<PathBuf, Failure> {
        let mut pkg_config = self.outside("pkg-config");
        pkg_config.env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")).args(["--cflags", "--libs"]).args(options);
        let flags = pkg_config.arg("layer_streamer").read()?;
        let flags = shlex::split(&flags).ok_or_else(|| format!("pkg-config says {flags}"))?;
        let mut cc = self.outside("cc");
        cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o", name, "generate.c"])
            .args(flags)
            .run()?;
        Ok(self.work.join(name))
    }

    /// A host prints the tokens that the program prints.
    fn check(&self, host: &Path) -> Result<(), Failure> {
        let mut host = run::command(host, &[]);
        // It is found here, and nowhere that the search would find by itself.
        host.env("LD_LIBRARY_PATH", self.prefix.join("lib")).arg(run::root().join("examples/speller")).arg(PROMPT);
        let said = host.read()?;
        if said == self.expected { Ok(()) } else { Err(format!("a host prints {said}, not {}", self.expected).into()) }
    }

    fn outside(&self, program: &str) -> Command {
        let mut command = run::command(OsString::from(program), &[]);
        command.current_dir(self.work);
        command
    }
}

/// A host that was linked statically takes no library of ours at run time.
fn has_no_shared_library(host: &Path) -> Result<(), Failure> {
    let said = run::command("ldd", &[]).arg(host).read()?;
    match said.lines().find(|line| line.contains("layer_streamer")) {
        Some(line) => Err(format!("{} takes{line}", host.display()).into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_functions_of_the_header_may_be_exported() {
        let ours = (0..60).map(|i| format!("0000000000001000 T ls_{i}\n")).collect::<String>();
        assert!(exports_only_ours(&ours).is_ok());
        assert!(exports_only_ours(&(ours + "0000000000001000 T rust_eh_personality\n")).is_err());
        assert!(exports_only_ours("0000000000001000 T ls_one\n").is_err());
    }
}
