//! Finds the fastest way to run a model by measuring, each candidate in a process of its own.
//!
//! The table and the answer go to stdout, the progress to stderr.

mod plot;
mod show;

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    slice,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use layer_streamer::{
    Error, Settings,
    files::NewFile,
    kernels::Kernels,
    model::{Cache, Decoder, Fit, Model, Sequence},
    plan::{Bandwidths, FixedOverhead, Pack, Placement, Tier},
    trace::{
        Observer, Stage,
        timeline::{Timeline, TraceFile},
    },
    tuner::{self, Answer, Candidate, Candidates, Ended, Ranking, Record, Search, SearchEvent, Tuner, Values},
};
use show::{came_to, short};

use crate::{
    Failure,
    budget::{self, Amount, Measure},
    device::{self, Chosen, Wanted},
    hub::{self, ModelFolder},
    interrupt::{self, Interrupts},
    placing::checkpoint_id,
    text,
};

/// Find the fastest way to decode with a model within an amount of memory, by measuring
#[derive(Args)]
#[command(after_help = "\
What is tried: first the default, which is what `generate` does by itself with the same --vram and --ram, then every combination
of the values, each with the layers kept in memory that then fit. Each runs in a process of its own: it may run out of memory,
crash or hang without harm to the others. A run is one token, with nothing before it. The first is not measured; one that is
clearly slower than the best so far ends its candidate.

The answer: the fastest of many is often the luckiest. So what was faster than the default is measured again beside it, in turn,
and is the answer only if it is faster by 3 % in four of up to five rounds. Else the default is kept. Ctrl-C ends the
search, and the default is the answer; with --json the same command goes on from there.

Examples:
  layer-streamer tune                                                   the speller that comes with the project, under a minute
  layer-streamer tune --model Qwen/Qwen2.5-7B-Instruct                  a model of the hub, downloaded once
  layer-streamer tune --model DIR --ram 8GB                             the fastest within so much memory [default: within what is free]
  layer-streamer tune --model DIR --search plan --minutes 10            measure the promising ones alone
  layer-streamer tune --model DIR --n-gpu 1,2 --n-cpu-pinned 2,4,8      values of your own
  layer-streamer tune --model DIR --json tuned.json --plot tuned.svg    keep all times, draw them
  layer-streamer tune --model DIR --trace tuned.html                    see what the answer's passes wait for
  layer-streamer generate --model DIR --config tuned.json …             and use the answer")]
pub struct Options {
    /// Folder with config.json and safetensors shards; a GGUF file; or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, which is
    /// downloaded once
    #[arg(long, value_name = "MODEL", value_parser = hub::parser(), default_value_os_t = crate::speller().into(),
          hide_default_value = true)]
    model: ModelFolder,

    /// Where to compute: cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,

    /// GPU memory to use, such as 8GB or 7.5GiB; auto: what is free, less a sixteenth and at least 256 MiB [default: auto]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    vram: Option<Amount>,

    /// RAM to use, likewise
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    ram: Option<Amount>,

    /// Tokens that the KV cache holds [default: 256, or as many as the model takes]
    #[arg(long, value_name = "N", help_heading = "Memory")]
    context: Option<usize>,

    /// Do not measure disk and link (once per machine and file system, under a second): assume 2 and 10 GB/s
    #[arg(long, help_heading = "Memory")]
    no_probe: bool,

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

    /// Runs of each candidate; the first is not measured
    #[arg(long, value_name = "N", default_value_t = 4)]
    runs: usize,

    /// Seconds between runs
    #[arg(long, value_name = "S", default_value = "0", value_parser = duration)]
    sleep: Duration,

    /// All candidates, or those that a forecast says may be the fastest: a third of them at most (but at least four)
    #[arg(long, value_enum, default_value = "grid")]
    search: Way,

    /// End a candidate with its first measured run that is slower than the best, not only if it is so clearly
    #[arg(long)]
    strict: bool,

    /// Stop searching after so many minutes; the fastest found is then compared with the default
    #[arg(long, value_name = "M", value_parser = |text: &str| duration(text).map(|minutes| 60 * minutes))]
    minutes: Option<Duration>,

    /// Keep every run in this file, and go on from what it holds; `layer-streamer generate --config` takes the answer from it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the times: a picture, FILE.svg
    #[arg(long, value_name = "FILE", value_parser = picture)]
    plot: Option<PathBuf>,

    /// Run the answer once more when it is found, and write what every stage did and waited for: FILE.html opens in any browser,
    /// FILE.json in Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
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

pub fn run(options: &Options) -> Result<(), Failure> {
    match device::choose(options.device)? {
        Chosen::Cpu(device) => run_on(&device, "cpu", options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, &format!("cuda:{}", device.ordinal()), options),
    }
}

/// The most passes that a worker waits for until its layers are all where they are kept.
const FILLING: usize = 50;

/// A decoder with the placement that is tried, and a token that it computes again and again.
struct Trial<D: Kernels> {
    decoder: Decoder<D>,
    token: Vec<u32>,
}

impl<D: Kernels> Trial<D> {
    fn new(
        device: &D,
        options: &Options,
        placement: &Placement,
        observers: &[Arc<dyn Observer>],
    ) -> Result<Self, Error> {
        let mut model = Model::open(&options.model)?;
        model.place(placement)?;
        let context = context(options, &model);
        let decoder = Decoder::with_observers(device, &model, &placement.settings, Cache::full(1, context), observers)?;
        Ok(Self { decoder, token: Vec::new() })
    }

    /// One token with nothing before it, which is one pass.
    fn pass(&mut self) -> Result<(), Error> {
        self.decoder.truncate(0, 0)?;
        self.decoder.forward(&[Sequence { row: 0, tokens: &[0] }])?;
        // Which waits for the device.
        self.token.clear();
        self.decoder.greedy(&mut self.token)
    }

    /// Passes until the layers that are kept are all there: they are read in the first, and some once more where their memory was
    /// not there in time.
    fn fill(&mut self, placement: &Placement) -> Result<(), Error> {
        let read = placement.tiers.iter().filter(|tier| **tier == Tier::Disk).count() as u64;
        let mut before = 0;
        for _ in 0..if placement.kept() > 0 { FILLING } else { 0 } {
            self.pass()?;
            let now = self.decoder.streamer().stats().stage(Stage::Read).units;
            if now - before <= read {
                break;
            }
            before = now;
        }
        Ok(())
    }
}

/// In a worker: passes with this placement, once all is where it is kept.
fn worker<D: Kernels>(
    device: &D,
    options: &Options,
    placement: &Placement,
) -> Result<impl FnMut() -> Result<(), Error> + use<D>, Error> {
    let mut trial = Trial::new(device, options, placement, &[])?;
    trial.fill(placement)?;
    Ok(move || trial.pass())
}

/// Runs the answer as its worker did, while a timeline records, and writes the trace, also after Ctrl-C.
fn trace<D: Kernels>(device: &D, options: &Options, answer: &Answer, file: TraceFile) -> Result<(), Failure> {
    let measure = if options.no_probe { Measure::Never } else { Measure::Always };
    let probe = budget::probe(device, &Model::open(&options.model)?, measure)?;
    let timeline = Timeline::new();
    let observer: Arc<dyn Observer> = timeline.clone();
    let mut trial = Trial::new(device, options, &answer.placement, slice::from_ref(&observer))?;
    let interrupts = Interrupts::cancel(trial.decoder.streamer().canceller());
    let ran = trial.fill(&answer.placement).and_then(|()| (0..options.runs).try_for_each(|_| trial.pass()));
    drop(interrupts);
    let mut recording = timeline.recording(probe.map(|probe| probe.bandwidths()));
    recording.facts.push(("model".into(), options.model.display().to_string()));
    recording.facts.push(("settings".into(), short(&answer.placement)));
    recording.verdict = trial.decoder.streamer().findings();
    file.write(&recording)?;
    match ran {
        Err(Error::Cancelled) if interrupt::is_noted() => Ok(()),
        ran => Ok(ran?),
    }
}

/// How many tokens the KV cache holds: more than an answer of a usual length, and little beside the layers.
fn context(options: &Options, model: &Model) -> usize {
    options.context.unwrap_or_else(|| model.config.max_positions.min(256))
}

/// What a worker may take besides the budget, in bytes: its code's data, and the stacks of its threads, of which most is never
/// used.
fn slack() -> u64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    (256 << 20) + (4 << 20) * threads
}

/// The candidates, and all else that a search needs, on `device`, which the command line calls `name`.
fn prepare<D: Kernels>(device: &D, name: &str, options: &Options) -> Result<(Tuner, Candidates), Failure> {
    let values = Values {
        n_gpu: options.n_gpu.clone(),
        n_cpu_pinned: options.n_cpu_pinned.clone(),
        n_cpu: options.n_cpu.clone(),
        batch_gpu: options.batch_gpu.clone(),
        batch_cpu_pinned: options.batch_cpu_pinned.clone(),
        batch_cpu: options.batch_cpu.clone(),
    };
    values.validate()?;
    let mut model = Model::open(&options.model)?;
    let context = context(options, &model);
    // What is found is for runs with a tokenizer.
    let overhead = FixedOverhead::of(&text::memory(&options.model, &model));
    // What is packed while passes go by would be measured before it is.
    let fit = |budget| Fit { overhead, pack: Pack::Never, ..Fit::new(device, budget, Cache::full(1, context)) };
    // A search that goes on has the memory that it began with: what is free varies.
    let begun = options.json.as_deref().filter(|path| path.exists()).map(Record::read).transpose()?;
    let is_auto = |amount: Option<Amount>| amount.is_none_or(|amount| amount == Amount::Auto);
    let known = begun.and_then(|record| record.budget.zip(record.bandwidths));
    let known = known.filter(|_| is_auto(options.vram) && is_auto(options.ram));
    let (budget, (settings, bandwidths)) = match known {
        Some((budget, known)) => (budget, (Fit { bandwidths: known, ..fit(budget) }.fastest(&mut model)?, known)),
        None => {
            let budget = budget::budget(device, options.vram, options.ram)?;
            let measure = if options.no_probe { Measure::Never } else { Measure::IfItCounts };
            let (settings, probe) = budget::fastest(fit(budget), &mut model, measure)?;
            (budget, (settings, probe.map_or_else(Bandwidths::default, |probe| probe.bandwidths())))
        }
    };
    let candidate = |model: &Model, settings: &Settings| {
        Ok::<_, Error>(Candidate {
            placement: model.placement(settings),
            plan: Some(Decoder::plan(device, model, settings)?),
            memory: Decoder::memory(device, model, settings, Cache::full(1, context))?,
        })
    };
    let candidates = Candidates::new(candidate(&model, &settings)?, &values, |settings| {
        let mut model = model.clone();
        Fit { bandwidths, settings: Some(settings), ..fit(budget) }.fastest(&mut model)?;
        candidate(&model, settings)
    })?;
    let chosen = ["--device", name].into_iter().filter(|_| options.device.is_none());
    let tuner = Tuner {
        candidates: candidates.all.clone(),
        search: match options.search {
            Way::Grid => Search::Grid,
            Way::Plan => Search::Plan { bandwidths },
        },
        runs: options.runs,
        sleep: options.sleep,
        strict: options.strict,
        time_limit: options.minutes,
        // Where all memory is RAM, what wants more than was allowed shall not drive out everything else.
        memory_limit: budget.device_bytes.is_none().then(|| (budget.host_bytes as u64).saturating_add(slack())),
        record: options.json.clone(),
        device: device.describe(),
        checkpoint: checkpoint_id(&options.model, &model),
        budget: Some(budget),
        bandwidths: Some(bandwidths),
        // A worker that finds no GPU shall say so, not measure the CPU.
        arguments: Some(
            options.model.resolved(env::args_os().skip(1)).into_iter().chain(chosen.map(OsString::from)).collect(),
        ),
        ..Tuner::default()
    };
    Ok((tuner, candidates))
}

/// Searches on `device`, which the command line calls `name`.
fn run_on<D: Kernels>(device: &D, name: &str, options: &Options) -> Result<(), Failure> {
    // First of all: a worker is this program, started with the same words, and goes no further.
    tuner::worker(|placement| worker(device, options, &placement));
    // Before Ctrl-C is only noted: what has been downloaded is kept however it ends.
    options.model.fetch(false)?;
    interrupt::listen();
    let (tuner, candidates) = prepare(device, name, options)?;
    // Before the long work, so that a path that cannot be written is known at once.
    let place = |path: &Path| NewFile::create(path).map_err(|error| cannot_write(path, &error));
    let plot = options.plot.as_deref().map(place).transpose()?;
    let file = options.trace.as_deref().map(TraceFile::create).transpose()?;
    if let Some(budget) = tuner.budget {
        let within = budget::describe(budget);
        match candidates.all.len() {
            1 => say!("within {within} nothing can differ from the default, or nothing else fits"),
            count => say!("{count} candidates within {within}"),
        }
    }
    let ranking = search_with_bar(&tuner)?;
    // Before the answer is said, so that the last line is what can be pasted.
    let traced = match (file, &ranking.answer) {
        (Some(file), Some(answer)) if ranking.ended != Ended::Cancelled => {
            say!("running the answer for the trace");
            trace(device, options, answer, file)
        }
        (Some(file), _) => {
            say!("{} was not written: the search was stopped before its answer", file.path().display());
            Ok(())
        }
        _ => Ok(()),
    };
    let mut out = io::stdout().lock();
    let default = &candidates.all[0].placement;
    // Whoever reads it may have gone away.
    let _ = out.write_all(show::table(&ranking, default, &candidates.refused).as_bytes());
    match ranking.ended {
        Ended::Complete => {}
        Ended::TimeUp => {
            say!("the time was up")
        }
        Ended::Cancelled => {
            say!("stopped{}", if options.json.is_some() { "; the same command goes on from here" } else { "" })
        }
    }
    if let Some(answer) = &ranking.answer {
        let _ = writeln!(out, "{}\nuse it:", show::answer(answer));
        let _ = out.write_all(&show::command(options, name, answer));
    } else if ranking.ended != Ended::Cancelled {
        return Err("no configuration could be measured".into());
    }
    // After the answer, which a disk that is full does not cost.
    if let Some(file) = plot {
        let folder = options.model.hub_name().unwrap_or(Path::new(&tuner.checkpoint.name));
        let title = format!("{} on {}", folder.file_name().unwrap_or_default().display(), tuner.device);
        write(file, &plot::draw(&title, &ranking)?)?;
    }
    traced
}

/// Writes a picture.
fn write(file: NewFile, text: &str) -> Result<(), Failure> {
    let path = file.path().to_owned();
    let written = file.file().write_all(text.as_bytes()).and_then(|()| file.keep());
    Ok(written.map_err(|error| cannot_write(&path, &error))?)
}

fn cannot_write(path: &Path, error: &io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// Searches, and shows how far it is: by a bar on a terminal, else by a line for each configuration.
fn search_with_bar(tuner: &Tuner) -> Result<Ranking, Failure> {
    let (bar, start) = (ProgressBar::new(0).with_prefix("?"), Instant::now());
    let style = ProgressStyle::with_template("[{bar:30}] {pos}/{len} candidates, {prefix} left; {msg}")?;
    bar.set_style(style.progress_chars("=> "));
    // Those on record took no time now.
    let (mut on_record, mut end) = (None, tuner.time_limit);
    let ranking = tuner.run(|event| {
        match event {
            SearchEvent::Begun { placement, number, most } => {
                on_record.get_or_insert(number as u64 - 1);
                bar.set_length(most as u64);
                bar.set_position(number as u64 - 1);
                bar.set_message(short(placement));
            }
            SearchEvent::Ended { trial, best } => {
                bar.inc(1);
                let (done, all) = (bar.position(), bar.length().unwrap_or(0));
                let since = done.saturating_sub(on_record.unwrap_or(0)).max(1);
                let by_number = start.elapsed().mul_f64(1.0 + all.saturating_sub(done) as f64 / since as f64);
                end = Some(tuner.time_limit.map_or(by_number, |limit| limit.min(by_number)));
                let new_best = if best { "new best: " } else { "" };
                let line = format!("{new_best}{}  {}", short(&trial.placement), came_to(trial));
                if bar.is_hidden() {
                    say!("{done}/{all}  {line}");
                } else if best {
                    bar.suspend(|| say!("{line}"));
                }
            }
            SearchEvent::Comparing { challenger, round } => {
                end = None;
                bar.set_prefix("?");
                bar.set_message(format!("{} beside the default, round {round}", short(challenger)));
            }
            SearchEvent::Compared { round } => {
                let line = format!("beside the default: {}  {}", short(&round.challenger), show::round(round));
                bar.suspend(|| say!("{line}"));
            }
            _ => {}
        }
        if let Some(end) = end {
            bar.set_prefix(HumanDuration(end.saturating_sub(start.elapsed())).to_string());
        }
        bar.tick();
        if interrupt::is_noted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    Ok(ranking?)
}
