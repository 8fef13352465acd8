//! Generates text with a model that is streamed layer by layer.
//!
//! Only the generated text goes to stdout; the memory table, the progress bar and the closing line go to stderr.

mod dump;

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, builder::NonEmptyStringValueParser};
use dump::Dump;
use layer_streamer::{
    kernels::Kernels,
    model::{Cache, Choice, Model, Sampler},
    trace::timeline::{Timeline, TraceFile},
};

use crate::{
    Failure,
    device::Chosen,
    placing::Placing,
    prompt::Source,
    run::{self, Answer, End, Limits, Loaded, Report},
    sampling::SamplingOptions,
    text::{self, Text},
    waiting::Waiting,
};

/// Generate text with a model whose layers are streamed from disk while they compute
#[derive(Args)]
#[command(
    mut_arg("prompt", |prompt| prompt.required_unless_present_any(["prompt_ids", "prompt_file"])),
    after_help = "\
Examples:
  layer-streamer generate '4096='                                     the speller that comes with the project
  layer-streamer generate --model ~/models/Qwen2.5-7B 'Once upon a'   a folder from the hub, of any family that is known
  layer-streamer generate --model Qwen/Qwen2.5-7B-Instruct 'Once …'   the same by its name there, downloaded once
  layer-streamer generate --model model-Q4_K_M.gguf 'Once upon a'     a GGUF file, as it lies
  layer-streamer generate --model DIR --system 'Be brief' 'Why?'      a chat model is asked; with --raw it goes on from the text
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

    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,

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
    let Options { placing, source, sampling, print_ids, stop, dump_logits, trace, json } = options;
    let before = memory();
    // Opened before the long work, so that paths that cannot be written are known at once.
    let trace = trace.as_deref().map(TraceFile::create).transpose()?;
    let dump = dump_logits.as_deref().map(Dump::create).transpose()?;
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers and the prompt", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let sampling = sampling.chosen(&model)?;
    let mut sampler = sampling.map(|sampling| Sampler::new(sampling, model.config.vocab)).transpose()?;
    let prompt = source.read(&placing.model, !print_ids, placing.quiet)?;
    if prompt.tokens.is_empty() {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    let context = placing.context(prompt.tokens.len(), &model)?;
    drop(waiting);
    let in_words = prompt.text.as_ref().filter(|_| !print_ids);
    if in_words.is_none() && !stop.is_empty() {
        return Err("--stop: the answer is token ids, in which there is no text to look for".into());
    }
    let mut stop_tokens = model.config.stop.clone();
    if let Some(template) = &prompt.template {
        stop_tokens.extend(prompt.text.as_ref().and_then(Text::end_of_turn));
        if !placing.quiet {
            say!("the prompt is a user's turn by the chat template of {}; --raw sends it as it is", template.display());
        }
    }
    let timeline = trace.as_ref().map(|_| Timeline::new());
    let tokenizer = prompt.text.as_ref().and_then(|_| text::memory(&placing.model, &model));
    let own = tokenizer.into_iter().chain(sampler.as_ref().map(|sampler| sampler.memory(1))).collect();
    let Loaded { mut decoder, settings, parts, probe } =
        run::load(device, placing, &mut model, Cache::full(1, context), own, timeline.as_ref())?;
    let limits = Limits { most: placing.max_new_tokens, stop: &stop_tokens };
    let choice = sampler.as_mut().map_or(Choice::Greedy, Choice::Sample);
    let answer = Answer::new(in_words, stop, !json);
    let ran = run::answer(&mut decoder, &prompt.tokens, &limits, choice, answer, placing.quiet, |decoder| {
        dump.map_or(Ok(()), |dump| dump.write(decoder, prompt.tokens.len()))
    });
    let ran = ran.map(|(mut done, text)| {
        done.device_memory = before.zip(memory()).map(|((before, _), (free, all))| [before, free, all]);
        if done.end == End::Limit && prompt.template.is_some() && !placing.quiet {
            say!("cut off after {} tokens: --max-new-tokens N allows more", done.tokens.len());
        }
        let why_empty = run::why_empty(&done, text.as_deref(), prompt.text.as_ref(), prompt.template.is_some());
        let report = Report::new(&mut decoder, &settings, &parts, probe.clone(), done);
        if *json {
            // Whoever reads it may have gone away.
            let _ = io::stdout().write_all(format!("{}\n", report.json(text.as_deref())).as_bytes());
        }
        if let Some(why) = why_empty {
            say!("{why}");
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
