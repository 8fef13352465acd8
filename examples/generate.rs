//! Generates text with a model that is streamed layer by layer.
//!
//! Only the generated text goes to stdout; the memory table, the progress bar and the closing line go to stderr.

#[path = "budget/mod.rs"]
mod budget;
#[path = "device/mod.rs"]
mod device;

use std::{
    fs,
    io::{self, BufWriter, IsTerminal, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use budget::Amount;
use clap::Parser;
use device::{Chosen, Wanted};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use layer_streamer::{
    Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence, Tables},
    plan::{Bandwidths, Part, Placement},
    trace::Stage,
    tuner::{self, Record},
};
use tokenizers::Tokenizer;

/// Says something on stderr, which may be closed or full: that is no reason to stop.
macro_rules! say {
    // In one piece, since stderr passes on each part of a table as it comes.
    ($($text:tt)*) => { let _ = io::stderr().write_all((format!($($text)*) + "\n").as_bytes()); };
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Generate text with a model whose layers are streamed from disk while they compute.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  generate '4096='                                     the speller that comes with the project
  generate --model ~/models/Qwen2.5-7B 'Once upon a'   any Llama, Mistral, Qwen2 or Qwen3 folder from the hub
  generate --model DIR --prompt-ids 1,2,3 --print-ids  a checkpoint without a tokenizer
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

    /// Print token ids, comma separated, in place of text
    #[arg(long)]
    print_ids: bool,

    /// Write the prompt's logits to a safetensors file: `logits`, F32 [tokens, vocabulary]
    #[arg(long, value_name = "FILE")]
    dump_logits: Option<PathBuf>,

    /// GPU memory to use, such as 8GB or 7.5GiB; auto: what is free, less a sixteenth and at least 256 MiB [default: auto]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    vram: Option<Amount>,

    /// RAM to use, likewise
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    ram: Option<Amount>,

    /// Print what would be reserved and where the layers would live, and stop
    #[arg(long, help_heading = "Memory")]
    plan: bool,

    /// Do not measure disk and link (once per machine and file system, under a second): assume 2 and 10 GB/s
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
    home: Option<String>,

    /// Where embedding table and output head live: on-device, embedding-in-file, or head-streamed, which streams the head after
    /// the layers [default: on-device]
    #[arg(long, value_name = "WAY", help_heading = "Pipeline, in place of a budget")]
    tables: Option<Tables>,

    /// All of these as `tune --json FILE` found them: the answer of that search
    #[arg(long, value_name = "FILE", help_heading = "Pipeline, in place of a budget",
          conflicts_with_all = ["n_gpu", "n_cpu_pinned", "n_cpu", "batch_gpu", "batch_cpu_pinned", "batch_cpu", "home", "tables"])]
    config: Option<PathBuf>,

    /// Print nothing but the text (and errors)
    #[arg(long)]
    quiet: bool,

    /// The text to continue (after --, if it begins with a dash)
    #[arg(required_unless_present_any = ["prompt_ids", "plan"])]
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
        if !given.iter().any(Option::is_some) && self.home.is_none() && self.tables.is_none() {
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
        let Placement { homes, statics, .. } = model.placement(&settings);
        Ok(Some(Placement { statics, ..Placement::new(settings, homes.len(), self.home.as_deref().unwrap_or(""))? }))
    }
}

fn main() {
    // Not the process's start as the kernel notes it, which under `cargo run` is that of a compilation.
    let begun = Instant::now();
    let options = Options::parse();
    let outcome = device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, &options, begun, &|| None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &options, begun, &|| device.memory().ok()),
    });
    if let Err(error) = outcome {
        say!("error: {error}");
        std::process::exit(1);
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
    let mut model = Model::open(&options.model)?;
    let needs_tokenizer = options.prompt.is_some() || !(options.plan || options.print_ids);
    let tokenizer = if needs_tokenizer { load_tokenizer(options)? } else { None };
    let prompt = match (&options.prompt_ids, &options.prompt, &tokenizer) {
        (Some(ids), _, _) => ids.clone(),
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text.as_str(), true)?.get_ids().to_vec(),
        _ => Vec::new(),
    };
    if prompt.is_empty() && !options.plan {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    let wanted = prompt.len().saturating_add(options.max_new_tokens);
    let context = options.context.unwrap_or_else(|| wanted.clamp(1, model.config.max_positions).max(prompt.len()));
    if prompt.len() > context {
        return Err(
            format!("the prompt is {} tokens long, the context {context}; raise --context", prompt.len()).into()
        );
    }
    // Opened before the long work, so that a path that cannot be written is known at once.
    let dump = options.dump_logits.as_deref().filter(|_| !options.plan).map(Dump::create).transpose()?;
    let (settings, bandwidths) = plan(device, &mut model, options, context)?;
    let parts = Decoder::memory(device, &model, &settings, 1, context)?;
    if options.plan {
        let plan = Decoder::plan(device, &model, &settings)?;
        // Whoever reads it may have gone away.
        let table = budget::table(
            &device.describe(),
            device.free_memory()?.is_some(),
            &model,
            &parts,
            &plan,
            bandwidths,
            options.no_probe,
        );
        let _ = io::stdout().write_all(table.as_bytes());
        return Ok(());
    }
    if !options.quiet {
        print_memory(&device.describe(), &parts, settings.n_cpu == 0 && settings.n_cpu_pinned == 0);
    }
    let mut decoder = Decoder::new(device, &model, &settings, 1, context)?;
    let bar = progress_bar(options.quiet, decoder.streamer().plan().units());
    let hook = bar.clone();
    decoder.streamer().track_progress(move |progress| {
        if progress.done == 1 {
            hook.set_message(format!("pass {}", progress.passes + 1));
        }
        hook.set_position(progress.done as u64);
    });
    let start = Instant::now();
    decoder.forward(&[Sequence { row: 0, tokens: &prompt }])?;
    let prompt_time = start.elapsed();
    if let Some(dump) = dump {
        dump.write(&mut decoder, prompt.len())?;
    }

    let decoding = Instant::now();
    let (mut count, mut first_token) = (0usize, None);
    let mut text = tokenizer.as_ref().filter(|_| !options.print_ids).map(|tokenizer| tokenizer.decode_stream(true));
    let mut out = io::stdout().lock();
    let shared_line = out.is_terminal();
    decoder.decode(&[0], options.max_new_tokens, &model.config.stop, |_, token| {
        count += 1;
        if count == 1 {
            first_token = Some(begun.elapsed().as_secs_f64());
        }
        let piece = match &mut text {
            Some(text) => text.step(token)?.unwrap_or_default(),
            None => format!("{}{token}", if count > 1 { "," } else { "" }),
        };
        if shared_line {
            // The bar would be drawn over the text.
            bar.finish_and_clear();
        }
        // A reader that went away (`| head`) wants no more text: that is no error.
        match write!(out, "{piece}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
            Err(error) => Err(format!("cannot write to stdout: {error}").into()),
            Ok(()) => Ok::<_, Failure>(ControlFlow::Continue(())),
        }
    })?;
    match writeln!(out) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(format!("cannot write to stdout: {error}").into());
        }
        _ => drop(out),
    }
    bar.finish_and_clear();
    if !options.quiet {
        report(&mut decoder, begun, (prompt.len(), prompt_time), (count, decoding.elapsed()));
        if let Some(seconds) = first_token {
            say!("first token {seconds:.2} s after the start");
        }
        if let Some((before, (free, total))) = before.zip(memory()) {
            let bytes = |bytes: usize| HumanBytes(bytes as u64);
            let (used, idle) = (bytes(total - free), bytes(total.saturating_sub(before.0)));
            say!("device memory in use: {used} of {}, {idle} of it before the model was loaded", bytes(total));
        }
    }
    Ok(())
}

/// The settings that were given, else the fastest for the memory there is, for which layers get homes; and what the links
/// carry, if that is of use.
fn plan<D: Kernels>(
    device: &D,
    model: &mut Model,
    options: &Options,
    context: usize,
) -> Result<(Settings, Bandwidths), Failure> {
    let placement = options.placement(device, model)?;
    if placement.is_some() && (options.vram.is_some() || options.ram.is_some()) {
        return Err("--vram and --ram choose the pipeline and the homes; leave out either them or your own".into());
    }
    let Some(placement) = placement else {
        let budget = budget::budget(device, options.vram, options.ram)?;
        let (settings, mut bandwidths) = budget::fit(device, model, budget, context, !options.no_probe)?;
        if options.plan && !options.no_probe {
            // The table says how long copies take also where nothing is read.
            bandwidths = Bandwidths::measured(device, &model.checkpoint)?;
        }
        return Ok((settings, bandwidths));
    };
    model.place(&placement)?;
    let bandwidths = match options.plan && !options.no_probe {
        true => Bandwidths::measured(device, &model.checkpoint)?,
        false => Bandwidths::default(),
    };
    Ok((placement.settings, bandwidths))
}

/// Reads `tokenizer.json`. Without one, ids can still go in and out.
fn load_tokenizer(options: &Options) -> Result<Option<Tokenizer>, Failure> {
    let path = options.model.join("tokenizer.json");
    if !path.exists() {
        if options.prompt_ids.is_none() {
            let message =
                format!("{}: there is no such file; give --prompt-ids 1,2,3 in place of text", path.display());
            return Err(message.into());
        }
        if !options.quiet {
            say!("no tokenizer.json in {}: printing token ids", options.model.display());
        }
        return Ok(None);
    }
    Tokenizer::from_file(&path).map(Some).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// The file for the logits, under another name until it is whole.
struct Dump<'a> {
    path: &'a Path,
    partial: PathBuf,
    file: fs::File,
}

impl<'a> Dump<'a> {
    /// Makes sure, before the long work, that the file can be written.
    fn create(path: &'a Path) -> Result<Self, Failure> {
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(path, &io::Error::other("there is something that is no regular file")));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = PathBuf::from(partial);
        let file =
            fs::File::options().write(true).create_new(true).open(&partial).map_err(|error| failed(path, &error))?;
        Ok(Self { path, partial, file })
    }

    /// Writes a safetensors file: the length of the header, the header, the rows.
    fn write<D: Kernels>(self, decoder: &mut Decoder<D>, tokens: usize) -> Result<(), Failure> {
        let vocab = decoder.model().config.vocab;
        let tensor =
            serde_json::json!({ "dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, 4 * tokens * vocab] });
        let mut header = serde_json::json!({ "logits": tensor }).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut out = BufWriter::new(&self.file);
        let failed = |error: io::Error| failed(self.path, &error);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        decoder
            .all_logits(|rows| rows.iter().try_for_each(|value| out.write_all(&value.to_le_bytes())).map_err(failed))?;
        out.flush().map_err(failed)?;
        drop(out);
        fs::rename(&self.partial, self.path).map_err(failed)
    }
}

impl Drop for Dump<'_> {
    fn drop(&mut self) {
        // Gone already if all went well.
        let _ = fs::remove_file(&self.partial);
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    format!("cannot write --dump-logits {}: {error}", path.display()).into()
}

fn print_memory(device: &str, rows: &[Part], hidden_slot: bool) {
    say!("device: {device}");
    if hidden_slot {
        say!("no stage ahead of the transfer: each layer is read when the one before has been copied");
    }
    let total = rows.iter().map(|part| part.bytes).sum::<usize>();
    let width = rows.iter().map(|part| part.what.chars().count()).max().unwrap_or(0);
    for (what, bytes) in rows.iter().map(|part| (part.what.as_str(), part.bytes)).chain([("total", total)]) {
        say!("  {what:width$}  {:>10}", HumanBytes(bytes as u64).to_string());
    }
}

fn progress_bar(quiet: bool, layers: usize) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} layers").expect("a valid template");
    ProgressBar::with_draw_target(Some(layers as u64), target).with_style(style.progress_chars("=> "))
}

fn report<D: Kernels>(decoder: &mut Decoder<D>, begun: Instant, prompt: (usize, Duration), new: (usize, Duration)) {
    let streamer = decoder.streamer();
    let (stats, units) = (streamer.stats(), streamer.plan().units() as u64);
    let compute = stats.stage(Stage::Compute);
    let (gigabytes, passes) = (compute.bytes as f64 / 1e9, compute.units / units);
    let per_second = |(tokens, time): (usize, Duration)| tokens as f64 / time.as_secs_f64().max(1e-9);
    let (seconds, running) = ((prompt.1 + new.1).as_secs_f64(), begun.elapsed().as_secs_f64());
    say!(
        "{} tokens in at {:.2} tokens/s, {} out at {:.2} tokens/s",
        prompt.0,
        per_second(prompt),
        new.0,
        per_second(new)
    );
    say!(
        "{passes} passes of {:.3} s streamed {gigabytes:.3} GB at {:.2} GB/s; {} was busiest",
        seconds / passes.max(1) as f64,
        gigabytes / seconds,
        stats.bottleneck(),
    );
    let share = |stage| format!("{stage} {:.0} %", 100.0 * stats.stage(stage).busy.as_secs_f64() / running);
    let first = (begun.elapsed() - new.1).as_secs_f64();
    say!("prompt read {first:.2} s after the start; at work: {}", Stage::ALL.map(share).join(", "));
    say!(
        "read by {}{}: {:.3} GB past the page cache, {:.3} GB from it",
        stats.reader,
        if stats.reader_reason.is_empty() { String::new() } else { format!(" ({})", stats.reader_reason) },
        stats.direct_bytes as f64 / 1e9,
        stats.buffered_bytes as f64 / 1e9,
    );
    for (path, reason) in &stats.buffered_files {
        say!("{} was read through the page cache: {reason}", path.display());
    }
}
