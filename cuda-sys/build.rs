//! Finds the CUDA toolkit, makes bindings of its runtime's header, and links its static runtime.
//!
//! The toolkit is the one of `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `nvcc` on the PATH, or `/usr/local/cuda`, in this order. A build
//! script of a crate that depends on this one need not search again; it finds these variables:
//!
//! - `DEP_CUDART_INCLUDE`: the folder of `cuda_runtime_api.h`.
//! - `DEP_CUDART_NVCC`: the compiler, which may be missing where the runtime is emulated.
//! - `DEP_CUDART_HOME`: the toolkit's folder.
//! - `DEP_CUDART_EMULATED`: `true` or `false`.
//!
//! `LAYER_STREAMER_CUDA=emulated` is for layer-streamer's own tests, which bring a runtime that runs on the CPU: bindings are
//! made as ever, but nothing is linked, so of the toolkit the headers alone must be there.

use std::{
    env,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

/// The functions that are bound: every one that layer-streamer calls.
const FUNCTIONS: &str = "cuda(GetErrorName|GetErrorString|DriverGetVersion|RuntimeGetVersion|\
    GetDeviceCount|SetDevice|DeviceGetAttribute|MemGetInfo|Malloc|Free|\
    HostRegister|HostUnregister|MemcpyAsync|StreamCreateWithFlags|StreamDestroy|\
    StreamIsCapturing|StreamWaitEvent|EventCreateWithFlags|EventDestroy|EventRecord|EventQuery|\
    EventSynchronize|EventElapsedTime)";

/// The flags, and the version of the headers.
const CONSTANTS: &str =
    "CUDART_VERSION|cuda(EventDisableTiming|EventBlockingSync|HostRegisterPortable|StreamNonBlocking)";

/// The types that no function's arguments bring along.
const TYPES: &str = "cudaDeviceAttr|cudaError|cudaStreamCaptureStatus";

/// The header that all of these are in.
const HEADER: &str = "cuda_runtime_api.h";

struct Toolkit {
    nvcc: PathBuf,
    home: PathBuf,
    include: PathBuf,
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(problem) = build() {
        // Cargo fails then, and prints no more than this.
        println!("cargo::error={problem}");
    }
}

fn build() -> Result<(), String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "LIBCLANG_PATH", "LAYER_STREAMER_CUDA"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rustc-check-cfg=cfg(cuda_emulated)");
    let emulated = match env::var_os("LAYER_STREAMER_CUDA") {
        None => false,
        Some(value) if value == "emulated" => true,
        Some(value) => return Err(format!("LAYER_STREAMER_CUDA={}: unset it", value.display())),
    };
    let toolkit = find_toolkit(emulated)?;
    if emulated {
        println!("cargo::rustc-cfg=cuda_emulated");
    } else {
        link(&toolkit)?;
    }
    make_bindings(&toolkit, emulated)?;
    for (name, path) in [("include", &toolkit.include), ("nvcc", &toolkit.nvcc), ("home", &toolkit.home)] {
        println!("cargo::metadata={name}={}", path.display());
    }
    println!("cargo::metadata=emulated={emulated}");
    Ok(())
}

fn find_toolkit(headers_alone: bool) -> Result<Toolkit, String> {
    let nvcc = if let Some(nvcc) = env::var_os("NVCC") {
        PathBuf::from(nvcc)
    } else if let Some(home) = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH")) {
        PathBuf::from(home).join("bin/nvcc")
    } else {
        let path = env::var_os("PATH").unwrap_or_default();
        let mut places = env::split_paths(&path).map(|folder| folder.join("nvcc"));
        places.find(|nvcc| nvcc.is_file()).unwrap_or_else(|| "/usr/local/cuda/bin/nvcc".into())
    };
    let nvcc = match nvcc.canonicalize() {
        Ok(nvcc) => nvcc,
        Err(_) if headers_alone => nvcc,
        Err(_) => {
            return Err(format!(
                "feature cuda needs the CUDA toolkit, but there is no {}: install it (without root: ci/cuda-toolkit DIR), \
                 then set CUDA_HOME to its folder",
                nvcc.display()
            ));
        }
    };
    let home = nvcc.parent().and_then(Path::parent).ok_or("NVCC is not inside a toolkit: set CUDA_HOME instead")?;
    let include = toolkit_folder(home, &[&format!("{}/include", target()), "include"], HEADER)?;
    Ok(Toolkit { home: home.to_owned(), include, nvcc })
}

/// Where the toolkit keeps what is for the machine that the crate is compiled for.
fn target() -> &'static str {
    match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => "targets/sbsa-linux",
        _ => "targets/x86_64-linux",
    }
}

/// Which of a toolkit's folders has `file`: they are the toolkit's own layout, that of the wheels, a distribution's.
fn toolkit_folder(home: &Path, folders: &[&str], file: &str) -> Result<PathBuf, String> {
    let mut folders = folders.iter().map(|folder| home.join(folder));
    folders.find(|folder| folder.join(file).exists()).ok_or_else(|| {
        format!(
            "the CUDA toolkit at {} lacks {file}: install its package cuda-cudart-dev (wheel: nvidia-cuda-runtime), or set \
             CUDA_HOME to another toolkit",
            home.display()
        )
    })
}

/// Links the static runtime, so that a program starts on machines without a driver too, and what the runtime itself needs.
fn link(toolkit: &Toolkit) -> Result<(), String> {
    let debian = format!("lib/{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default());
    let folders = [&format!("{}/lib", target()), "lib64", "lib", &debian];
    let lib = toolkit_folder(&toolkit.home, &folders, "libcudart_static.a")?;
    println!("cargo::rustc-link-search=native={}", lib.display());
    println!("cargo::rustc-link-lib=static=cudart_static");
    for name in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={name}");
    }
    Ok(())
}

fn make_bindings(toolkit: &Toolkit, emulated: bool) -> Result<(), String> {
    let header = toolkit.include.join(HEADER);
    let mut builder = bindgen::Builder::default()
        .header(header.display().to_string())
        .clang_arg(format!("-I{}", toolkit.include.display()))
        .allowlist_function(FUNCTIONS)
        .allowlist_var(CONSTANTS)
        .allowlist_type(TYPES)
        // A closed enum would make a newer driver's error code undefined behaviour.
        .default_enum_style(bindgen::EnumVariation::NewType { is_bitfield: false, is_global: false })
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .prepend_enum_name(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .use_core()
        .generate_comments(false)
        .layout_tests(false);
    if emulated {
        // What the emulation fills in, to say what it is.
        builder = builder.allowlist_type("cudaDeviceProp");
    }
    // It panics where it finds no libclang.
    panic::set_hook(Box::new(|_| {}));
    let bindings = panic::catch_unwind(AssertUnwindSafe(|| builder.generate()));
    let _ = panic::take_hook();
    let bindings = match bindings {
        Ok(Ok(bindings)) => bindings,
        Ok(Err(error)) => {
            return Err(format!(
                "no bindings of {}: {}; clang's own headers come with libclang-dev",
                header.display(),
                error.to_string().replace('\n', " ")
            ));
        }
        Err(_) => return Err("feature cuda needs libclang: install libclang-dev, or set LIBCLANG_PATH".into()),
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("cudart.rs");
    bindings.write_to_file(&out).map_err(|error| format!("cannot write {}: {error}", out.display()))
}
