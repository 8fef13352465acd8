//! Programs in C beside the crate: its libraries built as C links them, and a C compiler.
#![allow(dead_code, reason = "each test uses a part")]

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

/// The folder with both libraries, of the profile that the tests have; but the everyday ones are not optimised, since hosts hardly
/// compute, and a build with optimisations takes many times as long.
pub fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
        // A build for a named target, which that variable asks of both, lies one folder deeper.
        let deeper = usize::from(env::var_os("CARGO_BUILD_TARGET").is_some());
        let target = folder.ancestors().nth(1 + deeper).unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
            "rustc",
            "-q",
            "--locked",
            "-p",
            "layer-streamer",
            "--lib",
        ]);
        cargo.args(["--features", if cfg!(feature = "cuda") { "capi,cuda" } else { "capi" }]);
        cargo.args(["--crate-type", "staticlib,cdylib", "--target-dir"]).arg(target);
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0");
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success());
        folder
    })
}

/// How a host is compiled and linked.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub compiler: &'static [&'static str],
    pub linked_statically: bool,
}

pub const C11: Build = Build { compiler: &["cc", "-std=c11", "-x", "c"], linked_statically: true };
pub const CPP17: Build = Build { compiler: &["c++", "-std=c++17", "-x", "c++"], linked_statically: false };
/// Nothing of C11 is missing in it.
pub const SANITIZED: Build = Build {
    compiler: &["cc", "-std=c11", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-x", "c"],
    linked_statically: true,
};

impl Build {
    /// Compiles `source` to `program`. Every warning is an error.
    pub fn compile(&self, source: &Path, program: &Path) {
        let folder = libraries();
        let mut compiler = Command::new(self.compiler[0]);
        compiler.args(&self.compiler[1..]).args(["-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"]);
        compiler.arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include")).arg(source).args(["-x", "none"]);
        if self.linked_statically {
            compiler.arg(folder.join("liblayer_streamer.a")).args(["-lpthread", "-ldl", "-lrt", "-lm"]);
            if cfg!(feature = "cuda") {
                compiler.arg("-lstdc++");
            }
        } else {
            compiler.arg("-L").arg(folder).arg("-llayer_streamer").arg(format!("-Wl,-rpath,{}", folder.display()));
        }
        let done = compiler.arg("-o").arg(program).output().expect("a C compiler");
        assert!(done.status.success(), "{self:?} {}: {}", source.display(), String::from_utf8_lossy(&done.stderr));
    }
}

/// What a program that must succeed printed.
pub fn printed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}
