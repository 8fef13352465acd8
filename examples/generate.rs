//! Generates text with a model that is streamed layer by layer.
//!
//! Only the generated text goes to stdout; the memory table, the progress bar and the closing line go to stderr.

#[path = "budget/mod.rs"]
mod budget;
#[path = "device/mod.rs"]
mod device;
#[path = "generate/dump.rs"]
mod dump;
#[path = "interrupt/mod.rs"]
mod interrupt;
#[path = "generate/report.rs"]
mod report;
#[path = "bench/report/units.rs"]
#[allow(dead_code, reason = "benchmarks use the rest")]
mod units;
#[path = "generate/waiting.rs"]
mod waiting;

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use budget::{Amount, Measure};
use clap::Parser;
use device::{Chosen, Wanted};
use dump::Dump;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use interrupt::Interrupts;
use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence, Tables},
    plan::{Part, Placement},
    probe::Probe,
    trace::{
        Observer,
        timeline::{Timeline, TraceFile},
    },
    tuner::{self, Record},
};
use report::{Report, Run};
use tokenizers::Tokenizer;
use waiting::{Silence, Waiting};

/// Says something on stderr, which may be closed or full: that is no reason to stop.
macro_rules! say {
    // In one piece, since stderr passes on each part of a table as it comes.
    ($($text:tt)*) => { let _ = io::stderr().write_all((format!($($text)*) + "\n").as_bytes()); };
}

// After the macro, which it uses.
#[path = "generate/prompt.rs"]
mod prompt;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Generate text with a model whose layers are streamed from disk while they compute.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  generate '4096='                                     the speller that comes with the project
  generate --model ~/models/Qwen2.5-7B 'Once upon a'   any Llama, Mistral, Qwen2 or Qwen3 folder from the hub
  generate --model DIR --prompt-ids 1,2,3 --print-ids  a checkpoint without a tokenizer
  generate --model DIR --prompt-file story.txt         a long prompt; - is standard input
  generate --model DIR --trace run.html 'Once upon a'  a picture of what every stage did and waited for
  generate --model DIR --json 'Once upon a' | jq .verdict
  generate --vram 8GB --ram 32GB --model DIR …         the best plan for so much memory [default: for what is free]
  generate --ram 4GB --model DIR --plan                what that plan is, and no more
  generate --n-gpu 1 --n-cpu-pinned 1 --model DIR …    a plan of your own
  generate --config tuned.json --model DIR …           the fastest that `tune --json tuned.json` found")]
struct Options {
    /// Folder with config.json, safetensors shards and tokenizer.json
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/speller"), hide_default_value = true)]
    model: PathBuf,

    /// Where to compute: cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,

    /// Tokens that the KV cache holds [default: prompt + new tokens]
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_new_tokens: usize,

    /// The prompt as token ids, comma separated, in place of PROMPT
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Option<Vec<u32>>,

    /// Read the prompt from a file (UTF-8, up to 64 MB); - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_ids"])]
    prompt_file: Option<PathBuf>,

    /// Print token ids, comma separated, in place of text
    #[arg(long)]
    print_ids: bool,

    /// Write the prompt's logits to a safetensors file: `logits`, F32 [tokens, vocabulary]
    #[arg(long, value_name = "FILE")]
    dump_logits: Option<PathBuf>,

    /// Write what every stage did and waited for: FILE.html opens in any browser, FILE.json in Perfetto
    #[arg(long, value_name = "FILE", help_heading = "Figures")]
    trace: Option<PathBuf>,

    /// Print one JSON object in place of the text: tokens, times, bytes by link, placement, verdict
    #[arg(long, help_heading = "Figures")]
    json: bool,

    /// GPU memory to use, such as 8GB or 7.5GiB; auto: what is free, less a sixteenth and at least 256 MiB [default: auto]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    vram: Option<Amount>,

    /// RAM to use, likewise
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    ram: Option<Amount>,

    /// Print what would be reserved and where the layers would live, and stop
    #[arg(long, help_heading = "Memory")]
    plan: bool,

    /// Measure disk and link anew (about half a second), even if what was measured in the last 30 days is kept
    #[arg(long, help_heading = "Memory", conflicts_with = "no_probe")]
    probe: bool,

    /// Do not measure disk and link: assume 2 and 10 GB/s
    #[arg(long, help_heading = "Memory")]
    no_probe: bool,

    /// Layers buffered ahead on the device, at least 1 [default: 2 if any of these is given, else by the memory]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_gpu: Option<usize>,

    /// Layers buffered in pinned RAM; 0 skips the stage [default: 4 likewise]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_cpu_pinned: Option<usize>,

    /// Layers buffered in pageable RAM; 0 skips the stage [default: 0]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_cpu: Option<usize>,

    /// Layers handed to compute at once, at most n-gpu; 0 means one by one
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_gpu: Option<usize>,

    /// Layers handed from pinned RAM to the transfer at once, at most n-cpu-pinned
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_cpu_pinned: Option<usize>,

    /// Layers handed from pageable RAM at once, at most n-cpu
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_cpu: Option<usize>,

    /// Where layers live between passes: disk, ram, pinned or gpu, such as 0-7=pinned,8-11=gpu [default: all on disk]. The parts
    /// of a streamed output head are numbered after the layers
    #[arg(long, value_name = "LIST", help_heading = "Pipeline, in place of a budget")]
    tier: Option<String>,

    /// Where embedding table and output head live: on-device, embedding-in-file, or head-streamed, which streams the head after
    /// the layers [default: on-device]
    #[arg(long, value_name = "WAY", help_heading = "Pipeline, in place of a budget")]
    tables: Option<Tables>,

    /// All of these as `tune --json FILE` found them: the answer of that search
    #[arg(long, value_name = "FILE", help_heading = "Pipeline, in place of a budget",
          conflicts_with_all = ["n_gpu", "n_cpu_pinned", "n_cpu", "batch_gpu", "batch_cpu_pinned", "batch_cpu", "tier", "tables"])]
    config: Option<PathBuf>,

    /// Print nothing but the text (and errors)
    #[arg(long)]
    quiet: bool,

    /// The text to continue (after --, if it begins with a dash)
    #[arg(required_unless_present_any = ["prompt_ids", "prompt_file", "plan"])]
    prompt: Option<String>,
}

impl Options {
    /// How the model is to run on this device, where any part of that, or a file with it, is given.
    fn placement<D: Kernels>(&self, device: &D, model: &Model) -> Result<Option<Placement>, Failure> {
        if let Some(path) = &self.config {
            let record = Record::read(path)?;
            let answer = record.answer_for(&budget::id(&self.model, model), path)?;
            if !self.quiet {
                let within = record.budget.map(|budget| format!(", within {}", budget::describe(budget)));
                let (on, from) = (&record.device, &record.machine);
                say!("settings: found for {}, on {on} of {from}{}", record.checkpoint, within.unwrap_or_default());
                let present = [("machine", from, tuner::machine()), ("device", on, device.describe())];
                for (what, then, now) in present.iter().filter(|(_, then, now)| *then != now) {
                    say!("warning: this {what} is another, {now}, not {then}: search again to find its own");
                }
            }
            return Ok(Some(answer.placement.clone()));
        }
        let given = [self.n_gpu, self.n_cpu_pinned, self.n_cpu, self.batch_gpu, self.batch_cpu_pinned, self.batch_cpu];
        if !given.iter().any(Option::is_some) && self.tier.is_none() && self.tables.is_none() {
            return Ok(None);
        }
        let usual = Settings::default();
        let settings = Settings {
            n_gpu: self.n_gpu.unwrap_or(usual.n_gpu),
            n_cpu_pinned: self.n_cpu_pinned.unwrap_or(usual.n_cpu_pinned),
            n_cpu: self.n_cpu.unwrap_or(usual.n_cpu),
            batch_gpu: self.batch_gpu.unwrap_or(usual.batch_gpu),
            batch_cpu_pinned: self.batch_cpu_pinned.unwrap_or(usual.batch_cpu_pinned),
            batch_cpu: self.batch_cpu.unwrap_or(usual.batch_cpu),
            ..usual
        };
        let mut model = model.clone();
        model.tables = self.tables.unwrap_or_default();
        let Placement { tiers, statics, .. } = model.placement(&settings);
        Ok(Some(Placement { statics, ..Placement::new(settings, tiers.len(), self.tier.as_deref().unwrap_or(""))? }))
    }
}

fn main() -> ExitCode {
    // Not the process's start as the kernel notes it, which under `cargo run` is that of a compilation.
    let begun = Instant::now();
    let options = Options::parse();
    let waiting = Waiting::on("looking for a device", options.quiet);
    let chosen = device::choose(options.device);
    drop(waiting);
    let outcome = chosen.map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, &options, begun, &|| None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &options, begun, &|| device.memory().ok()),
    });
    match outcome {
        Ok(()) if interrupt::is_noted() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `begun`: when the program did. `memory`: of a device that has its own, bytes free and in all.
fn run<D: Kernels>(
    device: &D,
    options: &Options,
    begun: Instant,
    memory: &dyn Fn() -> Option<(usize, usize)>,
) -> Result<(), Failure> {
    let before = memory();
    // Opened before the long work, so that paths that cannot be written are known at once.
    let trace = options.trace.as_deref().filter(|_| !options.plan).map(TraceFile::create).transpose()?;
    let dump = options.dump_logits.as_deref().filter(|_| !options.plan).map(Dump::create).transpose()?;
    let waiting = Waiting::on("reading the checkpoint's headers and the prompt", options.quiet);
    let mut model = Model::open(&options.model)?;
    let (tokenizer, prompt) = prompt::prompt(options)?;
    let wanted = prompt.len().saturating_add(options.max_new_tokens);
    let context = options.context.unwrap_or_else(|| wanted.clamp(1, model.config.max_positions).max(prompt.len()));
    if prompt.len() > context {
        return Err(
            format!("the prompt is {} tokens long, the context {context}; raise --context", prompt.len()).into()
        );
    }
    drop(waiting);
    let (settings, probe) = plan(device, &mut model, options, context)?;
    let mut parts = Decoder::memory(device, &model, &settings, 1, context)?;
    if options.plan {
        let plan = Decoder::plan(device, &model, &settings)?;
        // Whoever reads it may have gone away.
        let table = budget::table(&device.describe(), !device.memory_is_ram(), &model, &parts, &plan, probe.as_ref());
        let _ = io::stdout().write_all(table.as_bytes());
        return Ok(());
    }
    let timeline = trace.as_ref().map(|_| Timeline::new());
    parts.extend(timeline.as_ref().map(|of| Part { what: "the trace".into(), bytes: of.bytes(), on_device: false }));
    if !options.quiet {
        print_memory(&device.describe(), &parts, settings.n_cpu == 0 && settings.n_cpu_pinned == 0);
    }
    let waiting = Waiting::on("reserving memory and loading what stays", options.quiet);
    let mut observers: Vec<_> = timeline.iter().map(|timeline| timeline.clone() as Arc<dyn Observer>).collect();
    if !options.quiet {
        observers.push(Arc::new(Silence));
    }
    let mut decoder = Decoder::with_observers(device, &model, &settings, 1, context, &observers)?;
    drop(waiting);
    let ran = generate(&mut decoder, options, &prompt, tokenizer.as_ref(), begun, dump).map(|mut run| {
        run.done.device_memory = before.zip(memory()).map(|((before, _), (free, all))| [before, free, all]);
        let report = Report::new(&mut decoder, &settings, &parts, probe.clone(), run.done);
        if options.json {
            // Whoever reads it may have gone away.
            let _ = io::stdout().write_all(format!("{}\n", report.json(run.text.as_deref())).as_bytes());
        }
        if !options.quiet {
            say!("{}", report.text());
        }
    });
    let findings = decoder.streamer().findings();
    drop(decoder);
    // After the figures, so that a disk that is full costs the trace alone; also of a run that failed, which is the error then.
    let written = trace.zip(timeline).map_or(Ok(()), |(file, timeline)| {
        let mut recording = timeline.recording(probe.map(|probe| probe.bandwidths()));
        recording.facts.insert(0, ("model".into(), options.model.display().to_string()));
        recording.verdict = findings;
        file.write(&recording)
    });
    ran.and(written.map_err(Failure::from))
}

/// A run, and the text it gave, where text is kept.
struct Generated {
    done: Run,
    text: Option<String>,
}

/// Reads the prompt and continues it, token by token, to stdout; with `--json` the text is kept.
fn generate<D: Kernels>(
    decoder: &mut Decoder<D>,
    options: &Options,
    prompt: &[u32],
    tokenizer: Option<&Tokenizer>,
    begun: Instant,
    dump: Option<Dump>,
) -> Result<Generated, Failure> {
    let bar = progress_bar(options.quiet, decoder.streamer().plan().units());
    let hook = bar.clone();
    decoder.streamer().track_progress(move |progress| {
        if progress.done == 1 {
            hook.set_message(format!("pass {}", progress.passes + 1));
        }
        hook.set_position(progress.done as u64);
    });
    let interrupts = Interrupts::cancel(decoder.streamer().canceller());
    let start = Instant::now();
    // On a terminal the bar shows it.
    let waiting = Waiting::on("reading the prompt", options.quiet || io::stderr().is_terminal());
    let forward = decoder.forward(&[Sequence { row: 0, tokens: prompt }]);
    drop(waiting);
    let prompt_time = start.elapsed();
    let mut done = Run {
        prompt_tokens: prompt.len(),
        prompt_time,
        tokens: Vec::new(),
        decode_time: Duration::ZERO,
        first_token: None,
        interrupted: false,
        device_memory: None,
    };
    let mut forward = forward.map_err(Failure::from);
    if let Some(dump) = dump.filter(|_| forward.is_ok()) {
        forward = dump.write(decoder, prompt.len());
    }
    let decoding = Instant::now();
    let mut text = tokenizer.filter(|_| !options.print_ids).map(|tokenizer| tokenizer.decode_stream(true));
    let mut kept = (options.json && text.is_some()).then(String::new);
    let mut out = io::stdout().lock();
    let shared_line = out.is_terminal();
    let (stop, tokenizer_file) = (decoder.model().config.stop.clone(), options.model.join("tokenizer.json"));
    let decoded = forward.and_then(|()| {
        decoder.decode(&[0], options.max_new_tokens, &stop, |_, token| {
            done.first_token.get_or_insert_with(|| begun.elapsed());
            done.tokens.push(token);
            let piece = match &mut text {
                Some(text) => prompt::guarded(&tokenizer_file, || text.step(token))?.unwrap_or_default(),
                None => format!("{}{token}", if done.tokens.len() > 1 { "," } else { "" }),
            };
            done.interrupted = interrupt::is_noted();
            let next = if done.interrupted { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            if let Some(kept) = &mut kept {
                kept.push_str(&piece);
            }
            if options.json {
                return Ok(next);
            }
            if shared_line {
                // The bar would be drawn over the text.
                bar.finish_and_clear();
            }
            // A reader that went away (`| head`) wants no more text: that is no error.
            match write!(out, "{piece}").and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
                Err(error) => Err(format!("cannot write to stdout: {error}").into()),
                Ok(()) => Ok::<_, Failure>(next),
            }
        })
    });
    done.decode_time = decoding.elapsed();
    bar.finish_and_clear();
    match decoded {
        // By Ctrl-C: what came is the answer.
        Err(error) if interrupt::is_noted() && matches!(error.downcast_ref(), Some(Error::Cancelled)) => {
            done.interrupted = true;
        }
        other => other?,
    }
    drop(interrupts);
    if !options.json {
        match writeln!(out) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(format!("cannot write to stdout: {error}").into());
            }
            _ => {}
        }
    }
    Ok(Generated { done, text: kept })
}

/// The settings that were given, else the fastest for the memory there is, for which layers get tiers; and what the links
/// carry, where that was measured.
fn plan<D: Kernels>(
    device: &D,
    model: &mut Model,
    options: &Options,
    context: usize,
) -> Result<(Settings, Option<Probe>), Failure> {
    let placement = options.placement(device, model)?;
    if placement.is_some() && (options.vram.is_some() || options.ram.is_some()) {
        return Err("--vram and --ram choose the pipeline and the tiers; leave out either them or your own".into());
    }
    let _waiting = Waiting::on("measuring disk and link", options.quiet);
    let measure = match (options.probe, options.no_probe) {
        (true, _) => Measure::Anew,
        (_, true) => Measure::Never,
        // Beside the forecast, or in the picture.
        _ if options.plan || options.trace.is_some() => Measure::Always,
        _ => Measure::IfItCounts,
    };
    let (settings, probe) = match placement {
        None => {
            let budget = budget::budget(device, options.vram, options.ram)?;
            budget::fit(device, model, budget, context, measure)?
        }
        Some(placement) => {
            model.place(&placement)?;
            // What the links carry decides nothing here: it is for the table, or was asked for.
            let measure = if measure == Measure::IfItCounts { Measure::Before } else { measure };
            (placement.settings, budget::probe(device, model, measure)?)
        }
    };
    // A plan's table says what was measured and when, but not what disturbed it.
    if let Some(probe) = probe.as_ref().filter(|probe| probe.disturbed().is_some() || (options.probe && !options.plan))
        && !options.quiet
    {
        say!("{}", budget::measured(probe));
    }
    Ok((settings, probe))
}

fn print_memory(device: &str, rows: &[Part], hidden_slot: bool) {
    say!("device: {device}");
    if hidden_slot {
        say!("no stage ahead of the transfer: each layer is read when the one before has been copied");
    }
    let total = rows.iter().map(|part| part.bytes).sum::<usize>();
    let width = rows.iter().map(|part| part.what.chars().count()).max().unwrap_or(0);
    for (what, bytes) in rows.iter().map(|part| (part.what.as_str(), part.bytes)).chain([("total", total)]) {
        say!("  {what:width$}  {:>10}", units::bytes(bytes as u64));
    }
}

fn progress_bar(quiet: bool, layers: usize) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} layers").expect("a valid template");
    ProgressBar::with_draw_target(Some(layers as u64), target).with_style(style.progress_chars("=> "))
}
