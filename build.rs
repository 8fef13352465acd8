//! With feature `cuda`: compiles `cuda/*.cu`, makes the bindings of the toolkit's own headers, links the static runtime.
//! Without it: nothing.
//!
//! The toolkit is the one of `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `nvcc` on the PATH, or `/usr/local/cuda`, in this order.
//! `LAYER_STREAMER_CUDA_ARCHS=80,90` compiles for these architectures only, and for later ones through the newest's PTX.
//!
//! `LAYER_STREAMER_CUDA=emulated` is for this project's own tests: the host's C++ compiler compiles the kernels, and they run
//! on the CPU, on the runtime in `tests/cuda_emulation`. Of the toolkit it takes the headers alone.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(problem) = cuda::build() {
        // Cargo fails then, and prints no more than this.
        println!("cargo::error={problem}");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::{
        env, fs,
        panic::{self, AssertUnwindSafe},
        path::{Path, PathBuf},
        process::Command,
        sync::Mutex,
        thread,
    };

    /// Compiled for unless told otherwise, as far as the toolkit knows them: Ampere to Blackwell.
    const ARCHS: [u32; 6] = [80, 86, 89, 90, 100, 120];

    /// Every function of the runtime that the crate calls.
    const RUNTIME: &str = "cuda(GetErrorName|GetErrorString|DriverGetVersion|RuntimeGetVersion|\
        GetDeviceCount|SetDevice|DeviceGetAttribute|MemGetInfo|Malloc|Free|\
        HostRegister|HostUnregister|MemcpyAsync|MemsetAsync|StreamCreateWithFlags|StreamDestroy|\
        StreamIsCapturing|StreamWaitEvent|EventCreateWithFlags|EventDestroy|EventRecord|EventQuery|\
        EventSynchronize|EventElapsedTime)";

    /// The kernels' side of the emulation.
    const EMULATION: &str = "tests/cuda_emulation/kernels";

    struct Toolkit {
        nvcc: PathBuf,
        home: PathBuf,
        include: PathBuf,
    }

    pub(super) fn build() -> Result<(), String> {
        println!("cargo::rerun-if-changed=cuda");
        for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "LIBCLANG_PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        for name in ["LAYER_STREAMER_CUDA", "LAYER_STREAMER_CUDA_ARCHS"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let emulated = match env::var_os("LAYER_STREAMER_CUDA") {
            None => false,
            Some(value) if value == "emulated" => true,
            Some(value) => return Err(format!("LAYER_STREAMER_CUDA={}: unset it", value.display())),
        };
        let toolkit = find_toolkit(emulated)?;
        make_bindings(&toolkit, emulated)?;
        if emulated { compile_for_host(&toolkit) } else { compile_for_gpu(&toolkit) }
    }

    /// All kernels for GPUs, and the runtime that launches them.
    fn compile_for_gpu(toolkit: &Toolkit) -> Result<(), String> {
        let archs = architectures(toolkit)?;
        let debian = format!("lib/{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default());
        let folders = [&format!("{}/lib", target()), "lib64", "lib", &debian];
        let lib = toolkit_folder(&toolkit.home, &folders, "libcudart_static.a")?;
        compile(toolkit, &archs)?;
        println!("cargo::rustc-link-search=native={}", lib.display());
        println!("cargo::rustc-link-lib=static=cudart_static");
        for name in ["dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib={name}");
        }
        Ok(())
    }

    /// All kernels, and what stands in for the GPU's threads, for the CPU. The crate itself holds the runtime then.
    fn compile_for_host(toolkit: &Toolkit) -> Result<(), String> {
        println!("cargo::rerun-if-changed={EMULATION}");
        println!("cargo::rustc-cfg=cuda_emulated");
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(true).pic(true).include("cuda").include(EMULATION);
        build.flag("-isystem").flag(&toolkit.include).flag("-fno-exceptions").flag("-x").flag("c++");
        // Kernels read several elements at once, which nvcc allows.
        build.flag("-fno-strict-aliasing");
        build.warnings(true).flag("-Wno-unknown-pragmas");
        let mut files = files("cuda", "cu")?;
        files.extend(self::files(EMULATION, "cpp")?);
        archive(objects(&build, files)?)
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
                    "feature cuda needs the CUDA toolkit, but there is no {}: install it (without root: \
                     ci/cuda-toolkit DIR), then set CUDA_HOME to its folder",
                    nvcc.display()
                ));
            }
        };
        let home = nvcc.parent().and_then(Path::parent).ok_or("NVCC is not inside a toolkit: set CUDA_HOME instead")?;
        let folders = [&format!("{}/include", target()), "include"];
        let include = toolkit_folder(home, &folders, "cuda_runtime_api.h")?;
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
                "the CUDA toolkit at {} lacks {file}: install its package cuda-cudart-dev (wheel: nvidia-cuda-runtime), or \
                 set CUDA_HOME to another toolkit",
                home.display()
            )
        })
    }

    /// What to compile for: those named, or those of [`ARCHS`] that this compiler knows.
    fn architectures(toolkit: &Toolkit) -> Result<Vec<u32>, String> {
        let listed = Command::new(&toolkit.nvcc).arg("--list-gpu-arch").output();
        let listed = listed.map_err(|error| format!("cannot run {}: {error}", toolkit.nvcc.display()))?;
        let listed = String::from_utf8_lossy(&listed.stdout);
        let known = listed.split_whitespace().filter_map(|a| a.strip_prefix("compute_")?.parse().ok());
        let known: Vec<u32> = known.filter(|arch| *arch >= ARCHS[0]).collect();
        if known.is_empty() {
            return Err(format!(
                "{} names no architectures: CUDA 12.0 is the oldest that works",
                toolkit.nvcc.display()
            ));
        }
        let Ok(named) = env::var("LAYER_STREAMER_CUDA_ARCHS") else {
            return Ok(ARCHS.into_iter().filter(|arch| known.contains(arch)).collect());
        };
        let archs = named.split([',', ';', ' ']).filter(|arch| !arch.is_empty()).map(|arch| {
            arch.parse().ok().filter(|arch| known.contains(arch)).ok_or_else(|| {
                format!("LAYER_STREAMER_CUDA_ARCHS={named}: {arch} is none of {known:?}, which this toolkit can build")
            })
        });
        let mut archs = archs.collect::<Result<Vec<u32>, _>>()?;
        archs.sort_unstable();
        archs.dedup();
        if archs.is_empty() {
            return Err("LAYER_STREAMER_CUDA_ARCHS is empty: unset it, or name architectures, as in 80,90".into());
        }
        Ok(archs)
    }

    /// The files of a folder that end so, in the order of their names.
    fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
        let entries = fs::read_dir(folder).map_err(|error| format!("cannot list {folder}: {error}"))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|path| path.extension().is_some_and(|of| of == extension));
        files.sort();
        Ok(files)
    }

    fn jobs() -> usize {
        env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1)
    }

    fn compile(toolkit: &Toolkit, archs: &[u32]) -> Result<(), String> {
        let files = files("cuda", "cu")?;
        // SAFETY: this program has one thread yet. `cc` takes the compiler from there only.
        unsafe { env::set_var("NVCC", &toolkit.nvcc) };
        let mut build = cc::Build::new();
        build.cuda(true).cudart("none").debug(false).opt_level(3).pic(true);
        build.flag("-std=c++17").flag("-lineinfo").flag("-Xfatbin=-compress-all");
        build.flag("-Xcompiler=-fvisibility=hidden,-fno-exceptions");
        for arch in archs {
            build.flag("-gencode").flag(format!("arch=compute_{arch},code=sm_{arch}"));
        }
        let newest = archs.last().expect("at least one is left");
        build.flag("-gencode").flag(format!("arch=compute_{newest},code=compute_{newest}"));
        // A file per job; jobs beyond that go to the architectures of each.
        build.flag(format!("--threads={}", (jobs() / files.len().max(1)).max(1)));
        archive(objects(&build, files)?)
    }

    /// Compiles each file by itself: several together `cc` would compile for the device linker, which here only makes
    /// everything larger.
    fn objects(build: &cc::Build, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, String> {
        let count = files.len();
        let (queue, objects) = (Mutex::new(files.into_iter()), Mutex::new(Vec::new()));
        let work = || {
            let next = || queue.lock().expect("nothing panics under this lock").next();
            while let Some(file) = next() {
                let object = build.clone().file(&file).try_compile_intermediates();
                objects.lock().expect("nothing panics under this lock").push((file, object));
            }
        };
        thread::scope(|scope| (0..jobs().min(count)).for_each(|_| _ = scope.spawn(work)));
        let mut objects = objects.into_inner().expect("nothing panics under this lock");
        objects.sort_by(|a, b| a.0.cmp(&b.0));
        let mut compiled = Vec::with_capacity(count);
        for (file, object) in objects {
            compiled.extend(object.map_err(|error| {
                let error = error.to_string().replace('\n', " ");
                format!("{} does not compile, see the compiler's messages above: {error}", file.display())
            })?);
        }
        Ok(compiled)
    }

    fn archive(objects: Vec<PathBuf>) -> Result<(), String> {
        let archived = cc::Build::new().cpp(true).objects(objects).try_compile("layer_streamer_kernels");
        archived.map_err(|error| format!("cannot archive the kernels: {}", error.to_string().replace('\n', " ")))
    }

    fn make_bindings(toolkit: &Toolkit, emulated: bool) -> Result<(), String> {
        let mut builder = bindgen::Builder::default()
            .header("cuda/kernels.h")
            .clang_arg(format!("-I{}", toolkit.include.display()))
            .allowlist_function(RUNTIME)
            .allowlist_function("lsk_.*")
            .allowlist_var("LSK_.*|cuda(EventDisableTiming|EventBlockingSync|HostRegisterPortable|StreamNonBlocking)")
            .allowlist_type("cudaDeviceAttr|cudaError|cudaStreamCaptureStatus")
            // A closed enum would make a newer driver's error code undefined behaviour.
            .default_enum_style(bindgen::EnumVariation::NewType { is_bitfield: false, is_global: false })
            .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
            .prepend_enum_name(false)
            .rust_edition(bindgen::RustEdition::Edition2024)
            .generate_comments(false)
            .layout_tests(false);
        if emulated {
            // What the emulation says about itself.
            builder = builder.allowlist_var("CUDART_VERSION").allowlist_type("cudaDeviceProp");
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
                    toolkit.include.join("cuda_runtime_api.h").display(),
                    error.to_string().replace('\n', " ")
                ));
            }
            Err(_) => return Err("feature cuda needs libclang: install libclang-dev, or set LIBCLANG_PATH".into()),
        };
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("cuda.rs");
        bindings.write_to_file(&out).map_err(|error| format!("cannot write {}: {error}", out.display()))
    }
}
