//! Generates text with a model that is streamed layer by layer.
//!
//! Only the generated text goes to stdout; the memory table, the progress bar and the closing line go to stderr.

#[path = "device/mod.rs"]
mod device;

use std::{
    fs,
    io::{self, BufWriter, IsTerminal, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Parser;
use device::{Chosen, Wanted};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use layer_streamer::{
    Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence},
    plan::{Home, Part},
    trace::Stage,
};
use tokenizers::Tokenizer;

/// Says something on stderr, which may be closed or full: that is no reason to stop.
macro_rules! say {
    ($($text:tt)*) => { let _ = writeln!(io::stderr(), $($text)*); };
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Generate text with a model whose layers are streamed from disk while they compute.
#[derive(Parser)]
#[command(after_help = "\
Examples:
  generate '4096='                                     the speller that comes with the project
  generate --model ~/models/Qwen2.5-7B 'Once upon a'   any Llama, Mistral, Qwen2 or Qwen3 folder from the hub
  generate --model DIR --prompt-ids 1,2,3 --print-ids  a checkpoint without a tokenizer
  generate --n-gpu 1 --n-cpu-pinned 1 --model DIR …    as little memory as it takes")]
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

    /// Layers buffered ahead on the device, at least 1
    #[arg(long, value_name = "N", default_value_t = Settings::default().n_gpu, help_heading = "Pipeline")]
    n_gpu: usize,

    /// Layers buffered in pinned RAM; 0 skips the stage
    #[arg(long, value_name = "N", default_value_t = Settings::default().n_cpu_pinned, help_heading = "Pipeline")]
    n_cpu_pinned: usize,

    /// Layers buffered in pageable RAM; 0 skips the stage
    #[arg(long, value_name = "N", default_value_t = Settings::default().n_cpu, help_heading = "Pipeline")]
    n_cpu: usize,

    /// Layers handed to compute at once, at most n-gpu; 0 means one by one
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Pipeline")]
    batch_gpu: usize,

    /// Layers handed from pinned RAM to the transfer at once, at most n-cpu-pinned
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Pipeline")]
    batch_cpu_pinned: usize,

    /// Layers handed from pageable RAM at once, at most n-cpu
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Pipeline")]
    batch_cpu: usize,

    /// Where layers live between passes: disk, ram, pinned or gpu, such as 0-7=pinned,8-11=gpu [default: all on disk]
    #[arg(long, value_name = "LIST", help_heading = "Pipeline")]
    home: Option<String>,

    /// Print nothing but the text (and errors)
    #[arg(long)]
    quiet: bool,

    /// The text to continue (after --, if it begins with a dash)
    #[arg(required_unless_present = "prompt_ids")]
    prompt: Option<String>,
}

fn main() {
    let options = Options::parse();
    let outcome = device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, &options, &|| None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &options, &|| device.memory().ok()),
    });
    if let Err(error) = outcome {
        say!("error: {error}");
        std::process::exit(1);
    }
}

/// `memory`: of a device that has its own, bytes free and in all.
fn run<D: Kernels>(device: &D, options: &Options, memory: &dyn Fn() -> Option<(usize, usize)>) -> Result<(), Failure> {
    let (begun, before) = (Instant::now(), memory());
    let mut model = Model::open(&options.model)?;
    Home::parse(options.home.as_deref().unwrap_or(""), &mut model.units)?;
    let needs_tokenizer = options.prompt_ids.is_none() || !options.print_ids;
    let tokenizer = if needs_tokenizer { load_tokenizer(options)? } else { None };
    let prompt = match (&options.prompt_ids, &options.prompt, &tokenizer) {
        (Some(ids), _, _) => ids.clone(),
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text.as_str(), true)?.get_ids().to_vec(),
        _ => Vec::new(),
    };
    if prompt.is_empty() {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    let wanted = prompt.len().saturating_add(options.max_new_tokens);
    let context = options.context.unwrap_or_else(|| wanted.min(model.config.max_positions).max(prompt.len()));
    if prompt.len() > context {
        return Err(
            format!("the prompt is {} tokens long, the context {context}; raise --context", prompt.len()).into()
        );
    }
    // Opened before the long work, so that a path that cannot be written is known at once.
    let dump = options.dump_logits.as_deref().map(Dump::create).transpose()?;
    let settings = Settings {
        n_gpu: options.n_gpu,
        n_cpu_pinned: options.n_cpu_pinned,
        n_cpu: options.n_cpu,
        batch_gpu: options.batch_gpu,
        batch_cpu_pinned: options.batch_cpu_pinned,
        batch_cpu: options.batch_cpu,
        ..Settings::default()
    };
    if !options.quiet {
        let rows = Decoder::memory(device, &model, &settings, 1, context)?;
        print_memory(&device.describe(), &rows, options.n_cpu == 0 && options.n_cpu_pinned == 0);
    }
    let mut decoder = Decoder::new(device, &model, &settings, 1, context)?;
    let bar = progress_bar(options.quiet, model.config.layers);
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
    let mut count = 0usize;
    let mut text = tokenizer.as_ref().filter(|_| !options.print_ids).map(|tokenizer| tokenizer.decode_stream(true));
    let mut out = io::stdout().lock();
    let shared_line = out.is_terminal();
    decoder.decode(&[0], options.max_new_tokens, &model.config.stop, |_, token| {
        count += 1;
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
        if let Some((before, (free, total))) = before.zip(memory()) {
            let bytes = |bytes: usize| HumanBytes(bytes as u64);
            let (used, idle) = (bytes(total - free), bytes(total.saturating_sub(before.0)));
            say!("device memory in use: {used} of {}, {idle} of it before the model was loaded", bytes(total));
        }
    }
    Ok(())
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
