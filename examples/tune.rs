//! Finds the fastest settings for a model by measuring them, each configuration in a process of its own.
//!
//! The table goes to stdout, the progress to stderr.

#[path = "budget/mod.rs"]
mod budget;
#[path = "device/mod.rs"]
mod device;
#[path = "tune/plot.rs"]
mod plot;

use std::{
    env,
    ffi::OsString,
    fs,
    io::{self, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use device::{Chosen, Wanted};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence},
    probe::Probe,
    tuner::{self, Ended, Event, Outcome, Ranking, Search, Trial, Tuner, Values},
};

/// Says something on stderr, which may be closed or full: that is no reason to stop.
macro_rules! say {
    // In one piece, since stderr passes on each part of a table as it comes.
    ($($text:tt)*) => {{ let _ = io::stderr().write_all((format!($($text)*) + "\n").as_bytes()); }};
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Find the fastest settings for decoding with a model, layer by layer from disk, by measuring them.
#[derive(Parser)]
#[command(after_help = "\
Every combination of the values is a configuration, and runs in a process of its own: it may run out of memory, crash or hang
without harm to the others. A run is one token, with nothing before it: a long context takes memory besides. The first is not
measured; one that is clearly slower than the best so far ends its configuration. Ctrl-C ends the search with what was found; with
--json it goes on from there next time.

Examples:
  tune                                                   the speller that comes with the project, under a minute
  tune --model DIR --search plan --minutes 10            measure the promising ones alone
  tune --model DIR --n-gpu 1,2 --n-cpu-pinned 2,4,8      values of your own
  tune --model DIR --json tuned.json --plot tuned.svg    keep all times, draw them
  generate --model DIR --config tuned.json …             and use the fastest")]
struct Options {
    /// Folder with config.json and safetensors shards
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/speller"), hide_default_value = true)]
    model: PathBuf,

    /// Where to compute: cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,

    /// Layers buffered ahead on the device, at least 1
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2,4", help_heading = "Values to try")]
    n_gpu: Vec<usize>,

    /// Layers buffered in pinned RAM; 0 skips the stage
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1,2,4", help_heading = "Values to try")]
    n_cpu_pinned: Vec<usize>,

    /// Layers buffered in pageable RAM; 0 skips the stage
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,2", help_heading = "Values to try")]
    n_cpu: Vec<usize>,

    /// Layers handed to compute at once; 0 means one by one
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0", help_heading = "Values to try")]
    batch_gpu: Vec<usize>,

    /// Layers handed from pinned RAM to the transfer at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0", help_heading = "Values to try")]
    batch_cpu_pinned: Vec<usize>,

    /// Layers handed from pageable RAM at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0", help_heading = "Values to try")]
    batch_cpu: Vec<usize>,

    /// Runs of each configuration; the first is not measured
    #[arg(long, value_name = "N", default_value_t = 4)]
    runs: usize,

    /// Seconds between runs
    #[arg(long, value_name = "S", default_value = "0", value_parser = duration)]
    sleep: Duration,

    /// All configurations, or those that a forecast says may be the fastest: a third of them at most (but at least three)
    #[arg(long, value_enum, default_value = "grid")]
    search: Way,

    /// End a configuration with its first measured run that is slower than the best, not only if it is so clearly
    #[arg(long)]
    strict: bool,

    /// Stop searching after so many minutes
    #[arg(long, value_name = "M", value_parser = |text: &str| duration(text).map(|minutes| 60 * minutes))]
    minutes: Option<Duration>,

    /// Keep every run in this file, and go on from what it holds; `generate --config` takes the fastest from it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the times: a picture, FILE.svg
    #[arg(long, value_name = "FILE", value_parser = picture)]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Way {
    Grid,
    Plan,
}

/// Parses a time without its unit.
fn duration(text: &str) -> Result<Duration, &'static str> {
    let time = text.parse().ok().filter(|time: &f64| *time <= 1e6);
    time.and_then(|time| Duration::try_from_secs_f64(time).ok()).ok_or("give a number from 0 to a million, such as 0.5")
}

/// Parses the name of a picture.
fn picture(text: &str) -> Result<PathBuf, &'static str> {
    let path = PathBuf::from(text);
    let is_svg = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    if is_svg { Ok(path) } else { Err("give a name that ends in .svg") }
}

/// Set by Ctrl-C.
static STOPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOPPED.store(true, Relaxed);
    // SAFETY: no memory is involved. The next one ends the process, and the worker with it.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, "cpu", &options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &format!("cuda:{}", device.ordinal()), &options),
    });
    match outcome {
        Ok(Ended::Cancelled) => ExitCode::from(130),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            say!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// In a worker: the decoder with these settings, and one token as a pass.
fn worker<D: Kernels>(
    device: &D,
    options: &Options,
    settings: &Settings,
) -> Result<impl FnMut() -> Result<(), Error> + use<D>, Error> {
    let model = Model::open(&options.model)?;
    let (mut decoder, mut token) = (Decoder::new(device, &model, settings, 1, 1)?, Vec::new());
    Ok(move || {
        decoder.truncate(0, 0)?;
        decoder.forward(&[Sequence { row: 0, tokens: &[0] }])?;
        // Which waits for the device.
        token.clear();
        decoder.greedy(&mut token)
    })
}

/// Searches on `device`, which the command line calls `name`.
fn run<D: Kernels>(device: &D, name: &str, options: &Options) -> Result<Ended, Failure> {
    tuner::worker(|settings| worker(device, options, &settings));
    // SAFETY: the handler does nothing that a handler may not.
    unsafe { libc::signal(libc::SIGINT, stop as *const () as libc::sighandler_t) };
    let model = Model::open(&options.model)?;
    let plan = Decoder::plan(device, &model, &Settings::default())?;
    let search = match options.search {
        Way::Grid => Search::Grid,
        Way::Plan => {
            let probe = Probe::recent(device, &model.checkpoint)?;
            let bandwidths = probe.map_or_else(Default::default, |probe| probe.bandwidths());
            Search::Plan { plan: Box::new(plan.clone()), bandwidths }
        }
    };
    let folder = fs::canonicalize(&options.model)?;
    let chosen = ["--device", name].into_iter().filter(|_| options.device.is_none());
    let tuner = Tuner {
        values: Values {
            n_gpu: options.n_gpu.clone(),
            n_cpu_pinned: options.n_cpu_pinned.clone(),
            n_cpu: options.n_cpu.clone(),
            batch_gpu: options.batch_gpu.clone(),
            batch_cpu_pinned: options.batch_cpu_pinned.clone(),
            batch_cpu: options.batch_cpu.clone(),
        },
        search,
        runs: options.runs,
        sleep: options.sleep,
        strict: options.strict,
        time_limit: options.minutes,
        // Where all memory is RAM, a configuration that wants more than there is shall not drive out everything else.
        memory_limit: match device.free_memory()? {
            None => Some(budget::budget(device, None, None)?.host_bytes as u64),
            Some(_) => None,
        },
        record: options.json.clone(),
        device: device.describe(),
        checkpoint: format!("{}: {} layers, {} bytes", folder.display(), plan.units(), plan.bytes_per_pass()),
        // A worker that finds no GPU shall say so, not measure the CPU.
        arguments: Some(env::args_os().skip(1).chain(chosen.map(OsString::from)).collect()),
        ..Tuner::default()
    };
    // Before the long work, so that a path that cannot be written is known at once.
    if let Some(path) = &options.plot {
        write(path, None)?;
    }
    let ranking = search_with_bar(&tuner)?;
    let mut out = io::stdout().lock();
    // Whoever reads it may have gone away.
    let _ = out.write_all(table(&ranking).as_bytes());
    if let Some(path) = &options.plot {
        let title = format!("{} on {}", folder.file_name().unwrap_or_default().display(), tuner.device);
        write(path, Some(&plot::draw(&title, &ranking)?))?;
    }
    if let Some(best) = ranking.best() {
        let config = match &options.json {
            Some(path) => format!("--config {}", path.display()),
            None => flags(&best.settings),
        };
        let _ = writeln!(
            out,
            "best: {} at {} a token\nuse it: generate --device {name} --model {} {config} …",
            short(&best.settings),
            time(best.seconds().unwrap_or(0.0)),
            options.model.display()
        );
    }
    match ranking.ended {
        Ended::Complete => {}
        Ended::TimeUp => {
            say!("the time was up")
        }
        Ended::Cancelled => {
            say!("stopped{}", if options.json.is_some() { "; the same command goes on from here" } else { "" })
        }
    }
    if ranking.best().is_none() && ranking.ended != Ended::Cancelled {
        return Err("no configuration could be measured".into());
    }
    Ok(ranking.ended)
}

/// Writes the file, whole or not at all; or only finds out whether that can be done.
fn write(path: &Path, text: Option<&str>) -> Result<(), Failure> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let written = fs::write(&partial, text.unwrap_or("")).and_then(|()| match text {
        Some(_) => fs::rename(&partial, path),
        None => fs::remove_file(&partial),
    });
    Ok(written.map_err(|error| format!("cannot write {}: {error}", path.display()))?)
}

/// Searches, and shows how far it is: by a bar on a terminal, else by a line for each configuration.
fn search_with_bar(tuner: &Tuner) -> Result<Ranking, Failure> {
    let (bar, start) = (ProgressBar::new(0).with_prefix("?"), Instant::now());
    let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} configurations, {prefix} left; {msg}")?;
    bar.set_style(style.progress_chars("=> "));
    // Those on record took no time now.
    let (mut on_record, mut end) = (None, tuner.time_limit);
    let ranking = tuner.run(|event| {
        match event {
            Event::Begun { settings, number, most } => {
                on_record.get_or_insert(number as u64 - 1);
                bar.set_length(most as u64);
                bar.set_position(number as u64 - 1);
                bar.set_message(short(settings));
            }
            Event::Ended { trial, best } => {
                bar.inc(1);
                let (done, all) = (bar.position(), bar.length().unwrap_or(0));
                let since = done.saturating_sub(on_record.unwrap_or(0)).max(1);
                let by_number = start.elapsed().mul_f64(1.0 + all.saturating_sub(done) as f64 / since as f64);
                end = Some(tuner.time_limit.map_or(by_number, |limit| limit.min(by_number)));
                let new_best = if best { "new best: " } else { "" };
                let line = format!("{new_best}{}  {}", short(&trial.settings), came_to(trial));
                if bar.is_hidden() {
                    say!("{done}/{all}  {line}");
                } else if best {
                    bar.suspend(|| say!("{line}"));
                }
            }
            _ => {}
        }
        if let Some(end) = end {
            bar.set_prefix(HumanDuration(end.saturating_sub(start.elapsed())).to_string());
        }
        bar.tick();
        if STOPPED.load(Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    Ok(ranking?)
}

/// `n_gpu` / `n_cpu_pinned` / `n_cpu`, each with its batch if it has one.
fn short(settings: &Settings) -> String {
    let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = *settings;
    let ring = |(n, batch): (usize, usize)| if batch > 0 { format!("{n} by {batch}") } else { n.to_string() };
    [(n_gpu, batch_gpu), (n_cpu_pinned, batch_cpu_pinned), (n_cpu, batch_cpu)].map(ring).join(" / ")
}

/// As `generate` takes them.
fn flags(settings: &Settings) -> String {
    let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = *settings;
    let batches = [("gpu", batch_gpu), ("cpu-pinned", batch_cpu_pinned), ("cpu", batch_cpu)];
    let batches =
        batches.map(|(name, batch)| if batch > 0 { format!(" --batch-{name} {batch}") } else { String::new() });
    format!("--n-gpu {n_gpu} --n-cpu-pinned {n_cpu_pinned} --n-cpu {n_cpu}{}", batches.concat())
}

/// With four digits or so.
fn time(seconds: f64) -> String {
    match seconds {
        0.0..0.01 => format!("{:.3} ms", 1e3 * seconds),
        0.01..1.0 => format!("{:.1} ms", 1e3 * seconds),
        _ => format!("{seconds:.2} s"),
    }
}

/// What came of a trial.
fn came_to(trial: &Trial) -> String {
    match &trial.outcome {
        Outcome::Done => format!("{} a token", time(trial.seconds().unwrap_or(0.0))),
        Outcome::Stopped { limit } => format!("more than {} a token", time(*limit)),
        // It may be anything that a worker wrote.
        Outcome::Refused { reason } => format!("refused: {}", reason.replace(char::is_control, " ")),
    }
}

/// All trials for people.
fn table(ranking: &Ranking) -> String {
    let fastest = ranking.best().and_then(Trial::seconds).unwrap_or(f64::INFINITY);
    let width = ranking.trials.iter().map(|trial| short(&trial.settings).len()).max().unwrap_or(0).max(8);
    let mut text = format!("{:width$}  {:>10}  {:>6}  {:>6}\n", "settings", "a token", "±", "slower");
    for trial in &ranking.trials {
        let row = match (&trial.outcome, trial.seconds()) {
            (Outcome::Refused { .. }, _) => came_to(trial),
            (Outcome::Stopped { limit }, _) => format!("{:>10}  stopped", format!("> {}", time(*limit))),
            (Outcome::Done, seconds) => {
                let seconds = seconds.unwrap_or(0.0);
                let [least, most] = trial.extremes().unwrap_or_default();
                let [around, slower] = [(most - least) / 2.0 / seconds, seconds / fastest - 1.0]
                    .map(|share| format!("{:.0} %", 100.0 * share));
                format!("{:>10}  {around:>6}  {slower:>6}", time(seconds))
            }
        };
        text += &format!("{:width$}  {row}\n", short(&trial.settings));
    }
    let untried = ranking.configurations.saturating_sub(ranking.trials.len());
    text +=
        "settings: n_gpu / n_cpu_pinned / n_cpu, and how many layers are handed over at once where that is not one\n";
    if untried > 0 {
        text += &format!("{} of {} configurations were tried\n", ranking.trials.len(), ranking.configurations);
    }
    text
}
