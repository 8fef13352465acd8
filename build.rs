//! With feature `cuda`: compiles `cuda/*.cu`, and makes the bindings of `cuda/kernels.h`. Without it: nothing.
//!
//! Which toolkit is used, and the bindings and the library of its runtime, are the business of `cuda-sys`: see the head of
//! `cuda-sys/build.rs`.
//! `LAYER_STREAMER_CUDA_ARCHS=80,90` compiles for these architectures only, and for later ones through the newest's PTX.
//!
//! `LAYER_STREAMER_CUDA=emulated` is for this project's own tests: the host's C++ compiler compiles the kernels, and they run
//! on the CPU, on the runtime in `src/device/cuda/emulation`. Of the toolkit it takes the headers alone.

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
        env,
        ffi::{OsStr, OsString},
        fs,
        path::{Path, PathBuf},
        process::Command,
        sync::Mutex,
        thread,
    };

    /// Compiled for unless told otherwise, as far as the toolkit knows them: Ampere to Blackwell.
    const ARCHS: [u32; 6] = [80, 86, 89, 90, 100, 120];

    /// The kernels' side of the emulation.
    const EMULATION: &str = "cuda/emulation";

    pub(super) fn build() -> Result<(), String> {
        println!("cargo::rerun-if-changed=cuda");
        println!("cargo::rerun-if-env-changed=LAYER_STREAMER_CUDA_ARCHS");
        let include = found("INCLUDE")?;
        make_bindings(Path::new(&include))?;
        if found("EMULATED")? == "true" { compile_for_host(&include) } else { compile_for_gpu(found("NVCC")?.as_ref()) }
    }

    /// What the build script of `cuda-sys` has found. It has run before, and Cargo runs this one again when that finds something
    /// else.
    fn found(what: &str) -> Result<OsString, String> {
        let name = format!("DEP_CUDART_{what}");
        env::var_os(&name)
            .ok_or_else(|| format!("there is no {name}: build with Cargo, without an override of links = cudart"))
    }

    /// All kernels, for GPUs. The runtime that launches them is linked by `cuda-sys`.
    fn compile_for_gpu(nvcc: &Path) -> Result<(), String> {
        compile(nvcc, &architectures(nvcc)?)
    }

    /// All kernels, and what stands in for the GPU's threads, for the CPU. The crate itself holds the runtime then.
    fn compile_for_host(include: &OsStr) -> Result<(), String> {
        println!("cargo::rerun-if-changed={EMULATION}");
        println!("cargo::rustc-cfg=cuda_emulated");
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(true).pic(true).include("cuda").include(EMULATION);
        build.flag("-isystem").flag(include).flag("-fno-exceptions").flag("-x").flag("c++");
        // Kernels read several elements at once, which nvcc allows.
        build.flag("-fno-strict-aliasing");
        build.warnings(true).flag("-Wno-unknown-pragmas");
        let mut files = files("cuda", "cu")?;
        files.extend(self::files(EMULATION, "cpp")?);
        archive(objects(&build, files)?)
    }

    /// What to compile for: those named, or those of [`ARCHS`] that this compiler knows.
    fn architectures(nvcc: &Path) -> Result<Vec<u32>, String> {
        let listed = Command::new(nvcc).arg("--list-gpu-arch").output();
        let listed = listed.map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
        let listed = String::from_utf8_lossy(&listed.stdout);
        let known = listed.split_whitespace().filter_map(|a| a.strip_prefix("compute_")?.parse().ok());
        let known: Vec<u32> = known.filter(|arch| *arch >= ARCHS[0]).collect();
        if known.is_empty() {
            return Err(format!("{} names no architectures: CUDA 12.0 is the oldest that works", nvcc.display()));
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

    fn compile(nvcc: &Path, archs: &[u32]) -> Result<(), String> {
        let files = files("cuda", "cu")?;
        // SAFETY: this program has one thread yet. `cc` takes the compiler from there only.
        unsafe { env::set_var("NVCC", nvcc) };
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

    /// Bindings of the kernels' launchers. The runtime's types in them are those of `cuda-sys`, which is why the file is
    /// included where those are known by their names.
    fn make_bindings(include: &Path) -> Result<(), String> {
        let bindings = bindgen::Builder::default()
            .header("cuda/kernels.h")
            .clang_arg(format!("-I{}", include.display()))
            .allowlist_function("lsk_.*")
            .allowlist_var("LSK_.*")
            .blocklist_type("cuda.*|CU.*")
            .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
            .rust_edition(bindgen::RustEdition::Edition2024)
            .generate_comments(false)
            .layout_tests(false)
            .generate()
            .map_err(|error| format!("no bindings of cuda/kernels.h: {}", error.to_string().replace('\n', " ")))?;
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("kernels.rs");
        bindings.write_to_file(&out).map_err(|error| format!("cannot write {}: {error}", out.display()))
    }
}
