//! Generates text with a model that is streamed layer by layer.
//!
//! Only the generated text goes to stdout; the memory table, the progress bar and the closing line go to stderr.

mod answer;
mod dump;
mod report;

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use answer::Answer;
use clap::Args;
use dump::Dump;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use layer_streamer::{
    Error,
    kernels::Kernels,
    model::{Choice, Decoder, Model, Sampler, Sequence},
    plan::{Part, Purpose},
    trace::{
        Observer,
        timeline::{Timeline, TraceFile},
    },
};
use report::{Report, Run};
use tokenizers::Tokenizer;

use crate::{
    BEGUN, Failure,
    budget::Measure,
    device::Chosen,
    interrupt::{self, Interrupts},
    placing::Placing,
    prompt::Source,
    sampling::SamplingOptions,
    units,
    waiting::{Silence, Waiting},
};

/// Generate text with a model whose layers are streamed from disk while they compute
#[derive(Args)]
#[command(
    mut_arg("prompt", |prompt| prompt.required_unless_present_any(["prompt_ids", "prompt_file"])),
    after_help = "\
Examples:
  layer-streamer generate '4096='                                     the speller that comes with the project
  layer-streamer generate --model ~/models/Qwen2.5-7B 'Once upon a'   any Llama, Mistral, Qwen2 or Qwen3 folder from the hub
  layer-streamer generate --model Qwen/Qwen2.5-7B-Instruct 'Once …'   the same by its name there, downloaded once
  layer-streamer generate --model DIR --prompt-ids 1,2,3 --print-ids  a checkpoint without a tokenizer
  layer-streamer generate --model DIR --prompt-file story.txt         a long prompt; - is standard input
  layer-streamer generate --model DIR --sample 'Once upon a'          drawn at random, as the model's makers suggest
  layer-streamer generate --model DIR --trace run.html 'Once upon a'  a picture of what every stage did and waited for
  layer-streamer generate --model DIR --json 'Once upon a' | jq .verdict
  layer-streamer generate --vram 8GB --ram 32GB --model DIR …         the best plan for so much memory [default: for what is free]
  layer-streamer generate --n-gpu 1 --n-cpu-pinned 1 --model DIR …    a plan of your own
  layer-streamer generate --config tuned.json --model DIR …           the fastest that `tune --json tuned.json` found

`plan` in place of `generate` prints what would be reserved and where the layers would be kept, and stops."
)]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    #[command(flatten)]
    source: Source,

    #[command(flatten)]
    sampling: SamplingOptions,

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
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options, &|| None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options, &|| device.memory().ok()),
    }
}

/// `memory`: of a device that has its own, bytes free and in all.
fn run_on<D: Kernels>(
    device: &D,
    options: &Options,
    memory: &dyn Fn() -> Option<(usize, usize)>,
) -> Result<(), Failure> {
    let Options { placing, source, sampling, print_ids, dump_logits, trace, json } = options;
    let before = memory();
    // Opened before the long work, so that paths that cannot be written are known at once.
    let trace = trace.as_deref().map(TraceFile::create).transpose()?;
    let dump = dump_logits.as_deref().map(Dump::create).transpose()?;
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers and the prompt", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let sampling = sampling.chosen(&model)?;
    let sampler = sampling.map(|sampling| Sampler::new(sampling, model.config.vocab)).transpose()?;
    let (tokenizer, prompt) = source.read(&placing.model, !print_ids, placing.quiet)?;
    if prompt.is_empty() {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    let context = placing.context(prompt.len(), &model)?;
    drop(waiting);
    // What the links carry is shown in the picture too.
    let measure = if trace.is_some() { Measure::Always } else { Measure::IfItCounts };
    let (settings, probe) = placing.settle(device, &mut model, context, measure)?;
    placing.tell(probe.as_ref(), placing.probe);
    let mut parts = Decoder::memory(device, &model, &settings, 1, context)?;
    let timeline = trace.as_ref().map(|_| Timeline::new());
    parts.extend(timeline.as_ref().map(|of| Part { purpose: Purpose::Trace, bytes: of.bytes() }));
    if !placing.quiet {
        print_memory(&device.describe(), &parts, settings.n_cpu == 0 && settings.n_cpu_pinned == 0);
    }
    let waiting = Waiting::on("reserving memory and loading what stays", placing.quiet);
    let mut observers: Vec<_> = timeline.iter().map(|timeline| timeline.clone() as Arc<dyn Observer>).collect();
    if !placing.quiet {
        observers.push(Arc::new(Silence));
    }
    let mut decoder = Decoder::with_observers(device, &model, &settings, 1, context, &observers)?;
    drop(waiting);
    let ran = generate(&mut decoder, options, &prompt, tokenizer.as_ref(), dump, sampler).map(|mut run| {
        run.done.device_memory = before.zip(memory()).map(|((before, _), (free, all))| [before, free, all]);
        let report = Report::new(&mut decoder, &settings, &parts, probe.clone(), run.done);
        if *json {
            // Whoever reads it may have gone away.
            let _ = io::stdout().write_all(format!("{}\n", report.json(run.text.as_deref())).as_bytes());
        }
        if !placing.quiet {
            say!("{}", report.text());
        }
    });
    let findings = decoder.streamer().findings();
    drop(decoder);
    // After the figures, so that a disk that is full costs the trace alone; also of a run that failed, which is the error then.
    let written = trace.zip(timeline).map_or(Ok(()), |(file, timeline)| {
        let mut recording = timeline.recording(probe.map(|probe| probe.bandwidths()));
        recording.facts.insert(0, ("model".into(), placing.model.display().to_string()));
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
    dump: Option<Dump>,
    mut sampler: Option<Sampler>,
) -> Result<Generated, Failure> {
    let placing = &options.placing;
    let bar = progress_bar(placing.quiet, decoder.streamer().plan().units());
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
    let waiting = Waiting::on("reading the prompt", placing.quiet || io::stderr().is_terminal());
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
        sampling: sampler.as_ref().map(|sampler| *sampler.sampling()),
    };
    let mut forward = forward.map_err(Failure::from);
    if let Some(dump) = dump.filter(|_| forward.is_ok()) {
        forward = dump.write(decoder, prompt.len());
    }
    let decoding = Instant::now();
    let (stop, tokenizer_file) = (decoder.model().config.stop.clone(), placing.model.join("tokenizer.json"));
    let in_words = tokenizer.filter(|_| !options.print_ids).map(|tokenizer| (tokenizer, tokenizer_file));
    let mut answer = Answer::new(in_words, options.json);
    let decoded = forward.and_then(|()| {
        let choice = sampler.as_mut().map_or(Choice::Greedy, Choice::Sample);
        decoder.decode(&[0], placing.max_new_tokens, &stop, choice, |_, token| {
            done.first_token.get_or_insert_with(|| BEGUN.elapsed());
            done.tokens.push(token);
            let next = answer.push(token, &bar)?;
            done.interrupted = interrupt::is_noted();
            Ok::<_, Failure>(if done.interrupted { ControlFlow::Break(()) } else { next })
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
    Ok(Generated { done, text: answer.end()? })
}

fn print_memory(device: &str, rows: &[Part], hidden_slot: bool) {
    say!("device: {device}");
    if hidden_slot {
        say!("no stage ahead of the transfer: each layer is read when the one before has been copied");
    }
    let rows: Vec<_> = rows.iter().map(|part| (part.purpose.to_string(), part.bytes)).collect();
    let total = rows.iter().map(|(_, bytes)| bytes).sum();
    let width = rows.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
    for (what, bytes) in rows.into_iter().chain([("total".into(), total)]) {
        say!("  {what:width$}  {:>10}", units::bytes(bytes as u64));
    }
}

fn progress_bar(quiet: bool, layers: usize) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} layers").expect("a valid template");
    ProgressBar::with_draw_target(Some(layers as u64), target).with_style(style.progress_chars("=> "))
}
