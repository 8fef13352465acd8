//! When the first token comes.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    thread,
};

use clap::Args;
use memmap2::{Advice, MmapMut};
use serde_json::Value;

use crate::{
    run::{self, Failure, Run},
    statistics::median,
};

/// Compare when the first token comes with layers kept in RAM and without, from a disk of which nothing is cached.
///
/// The two take turns; the medians come at the end. Before each, as much memory as the model takes is filled and freed, so that
/// both find it in the same state: what a host has taken back costs many times more. Fails if the first token comes more than a
/// tenth later with layers kept; that much is noise.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask first-token ~/models/Qwen2.5-3B
  cargo xtask first-token ~/models/Qwen2.5-7B --rounds 3 --device cuda")]
pub struct Options {
    /// The checkpoint's folder
    #[arg(value_parser = run::absolute)]
    folder: PathBuf,
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[arg(long, default_value = "cpu")]
    device: String,
    /// A `layer-streamer` that is built already
    #[arg(long, value_parser = run::absolute)]
    program: Option<PathBuf>,
}

/// A way to run the model, and what came of it in each round.
struct Way {
    name: &'static str,
    options: &'static [&'static str],
    first: Vec<f64>,
    passes: Vec<f64>,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let program = match &options.program {
        Some(program) => program.clone(),
        None => run::program()?,
    };
    let way = |name, options| Way { name, options, first: Vec::new(), passes: Vec::new() };
    let mut ways = [way("rings alone", &["--n-gpu", "2", "--n-cpu-pinned", "2"]), way("auto", &[])];
    for round in 0..=options.rounds {
        // Neither has the better place.
        let order = if round % 2 == 1 { [0, 1] } else { [1, 0] };
        for way in order {
            let way = &mut ways[way];
            fill_memory((evict(&options.folder)? * 5 / 4).min(available()? * 3 / 4))?;
            let mut command = run::command(&program, &["generate", "--device", &options.device, "--model"]);
            // On a GPU machine there is no repository to run it in.
            command.arg(&options.folder).args(way.options).current_dir(&options.folder);
            command.args("--prompt-ids 1,2,3 --print-ids --max-new-tokens 3 --json".split(' '));
            let said: Value = serde_json::from_slice(&command.quiet()?.stdout)?;
            let number = |name: &str| said[name].as_f64().ok_or(format!("generate gives no {name}"));
            // The first round warms up.
            if round > 0 {
                way.first.push(number("first_token_seconds")?);
                way.passes.push((number("prompt_seconds")? + number("decode_seconds")?) / number("passes")?);
            }
        }
    }
    for Way { name, first, passes, .. } in &ways {
        let each = first.iter().map(|seconds| format!("{seconds:.2}")).collect::<Vec<_>>().join(" ");
        let (first, pass) = (median(first), median(passes));
        println!("{name}: first token after {first:.2} s in the median of {each}; a pass of three {pass:.2} s");
    }
    let [alone, auto] = [&ways[0], &ways[1]].map(|way| median(&way.first));
    if auto > 1.1 * alone {
        return Err(
            format!("with layers kept the first token comes after {auto:.2} s, without after {alone:.2} s").into()
        );
    }
    Ok(())
}

/// Drops the checkpoint's files from the page cache; returns their bytes.
fn evict(folder: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = File::open(path)?;
            // SAFETY: the call takes no pointer, and the file is open until the end of this block.
            let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error).into());
            }
            bytes += file.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Memory that can be taken without swapping, in bytes.
fn available() -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable in /proc/meminfo")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Writes to each page of so much memory, in all threads, and frees it.
fn fill_memory(bytes: u64) -> Result<(), Failure> {
    const PAGE: usize = 4096;
    // As arenas do.
    let mut memory = MmapMut::map_anon(usize::try_from(bytes)?.max(PAGE))?;
    memory.advise(Advice::HugePage)?;
    let part = memory.len().div_ceil(thread::available_parallelism()?.get()).next_multiple_of(PAGE);
    thread::scope(|scope| {
        for part in memory.chunks_mut(part) {
            scope.spawn(|| part.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_dropped_and_memory_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.safetensors"), [0; 5000]).unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(evict(folder.path()).unwrap(), 5000);
        assert!(evict(&folder.path().join("none")).is_err());
        assert!(available().unwrap() > 1 << 20);
        fill_memory(3 << 20).unwrap();
    }
}
