//! Answers the prompts of a file, many at a time, and goes on after whatever ended it.
//!
//! The state is in the output alone: each answer says to which line of the input it belongs, and by which digest that line is known.
//! A run reads the answers that are there, cuts off one that is not whole, and answers the other lines.

mod answer;
mod feed;
mod input;
mod journal;
mod known;
mod line;
mod order;
mod output;
mod prepare;
mod progress;
mod scan;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, builder::NonEmptyStringValueParser};
use feed::{Ended, Feed};
use input::Lines;
use journal::Work;
use layer_streamer::{
    Error,
    engine::{Engine, Limits},
    kernels::Kernels,
    model::{Cache, Model, Sampler, Sampling},
    plan::Part,
};
use output::{Opened, Output};
use prepare::{Preparing, Words};
use progress::{Progress, Summary, Tally};
use scan::{Scan, scan};
use serde_json::{Value, json};

use crate::{
    Failure,
    device::Chosen,
    interrupt::Interrupts,
    placing::Placing,
    prompt::Talk,
    run::{self, Loaded},
    sampling::SamplingOptions,
    text::{self, Text},
    waiting::Waiting,
};

/// How many sequences run at once where nobody says so.
const USUAL_SEQUENCES: usize = 64;

/// How much longer a pass may take so that prompts go on: nobody waits for the next token of an answer, so all that fit may.
const DELAY: f64 = 1e6;

/// Tokens that a sequence may have where nobody says so and the lines cannot be looked at beforehand.
const USUAL_CONTEXT: usize = 4096;

/// Answer all prompts of a file, many at a time; a run that was ended goes on where it was
#[derive(Args)]
#[command(
    mut_arg("max_new_tokens", |most| most
        .default_value("256")
        .help("Stop an answer after this many tokens, where its line does not say")),
    mut_arg("context", |context| context
        .help("Tokens that a prompt and its answer may have together [default: as many as the longest line of a file takes; else 4096]")),
    mut_arg("seed", |seed| seed
        .help("Line N draws by the seed SEED + N, unless it has its own: `generate --seed` with that draws the same [default: 0]")),
    mut_arg("system", |system| system.help("The system prompt, which comes before each \"prompt\"; \"messages\" have their own")),
    after_help = "\
Each line of FILE is a JSON object, in one of two forms, and each line of the output answers one:
  {\"id\": \"a\", \"prompt\": \"Why?\", \"max_new_tokens\": 50}   or \"prompt_ids\": [1, 2], or \"messages\": [{\"role\": \"user\", \"content\": \"Why?\"}]
  {\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {…}}   OpenAI's batches, also /v1/completions
A line may have temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed, stop and the most new tokens of its own.
Text is what `generate` gives for that prompt with these options, whatever else the file holds.

Examples:
  layer-streamer batch prompts.jsonl                              answers go to prompts.answers.jsonl
  layer-streamer batch prompts.jsonl                              the same again, after whatever ended it: it goes on
  layer-streamer batch --model ~/models/Qwen3-8B --sample prompts.jsonl
  layer-streamer batch --model DIR --output answers.jsonl --as-they-end prompts.jsonl
  layer-streamer batch --model DIR --sequences 256 --vram 20GB prompts.jsonl   more at a time, in so much memory
  layer-streamer batch --strict --quiet --json prompts.jsonl | jq .answered    stops at a line that is not understood
  printf '{\"prompt\": \"7=\"}\\n' | layer-streamer batch --quiet -               from a pipe, to standard output"
)]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    #[command(flatten)]
    talk: Talk,

    #[command(flatten)]
    sampling: SamplingOptions,

    /// The prompts, a JSON object a line; - is standard input
    file: PathBuf,

    /// Where the answers go, a line each; - is standard output [default: FILE with .answers.jsonl in place of .jsonl; for standard
    /// input standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Write answers as they end, not in the order of their lines: each says which line it belongs to
    #[arg(long)]
    as_they_end: bool,

    /// How many prompts to work on at once [default: 64, fewer where memory is short]
    #[arg(long, value_name = "N")]
    sequences: Option<usize>,

    /// Stop at a line that is not understood, in place of an answer that says why
    #[arg(long)]
    strict: bool,

    /// Send prompts as they are, even if the model has a chat template
    #[arg(long, conflicts_with_all = ["system", "thinking"])]
    raw: bool,

    /// Answer with token ids in place of text
    #[arg(long)]
    print_ids: bool,

    /// End answers before this text, where their lines do not say; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,

    /// Print one JSON object on stdout when all is done: prompts, tokens, times
    #[arg(long, help_heading = "Figures")]
    json: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options),
    }
}

/// From where to where.
struct Paths {
    /// `None`: standard input.
    input: Option<PathBuf>,
    /// Whether the input can be read twice.
    is_file: bool,
    /// `None`: standard output.
    output: Option<PathBuf>,
}

impl Paths {
    fn of(options: &Options) -> Result<Self, Failure> {
        let Options { file, output, json, .. } = options;
        let is_dash = |path: &Path| path == Path::new("-");
        let input = (!is_dash(file)).then(|| file.clone());
        let is_file = match &input {
            Some(path) => {
                path.metadata().map_err(|error| format!("cannot read {}: {error}", path.display()))?.is_file()
            }
            None => false,
        };
        if input.as_ref().is_some_and(|path| path.is_dir()) {
            return Err(format!("{}: is a folder; give a file with a JSON object a line", file.display()).into());
        }
        let output = match (output, &input) {
            (Some(path), _) => (!is_dash(path)).then(|| path.clone()),
            (None, Some(path)) if is_file => Some(beside(path)),
            (None, Some(path)) => {
                return Err(format!(
                    "{}: is no regular file, so say where the answers go: --output FILE, or - for standard output",
                    path.display()
                )
                .into());
            }
            (None, None) => None,
        };
        if output.is_none() && *json {
            return Err("--json: the answers go to standard output; give --output FILE too".into());
        }
        if let (Some(input), Some(output)) = (&input, &output)
            && input.canonicalize().ok().is_some_and(|path| output.canonicalize().is_ok_and(|other| path == other))
        {
            return Err(format!("{}: is the input too; give another --output", output.display()).into());
        }
        Ok(Self { input, is_file, output })
    }

    /// The lines, from the first on.
    fn lines(&self) -> Result<Lines<BufReader<Box<dyn Read + Send>>>, Failure> {
        let reader: Box<dyn Read + Send> = match &self.input {
            Some(path) => {
                Box::new(File::open(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?)
            }
            None => Box::new(io::stdin()),
        };
        Ok(Lines::new(BufReader::with_capacity(1 << 16, reader)))
    }

    fn input_name(&self) -> String {
        self.input.as_ref().map_or_else(|| "standard input".into(), |path| path.display().to_string())
    }
}

/// `prompts.answers.jsonl` for `prompts.jsonl`.
fn beside(input: &Path) -> PathBuf {
    let ending = input.extension().is_some_and(|ending| ending == "jsonl");
    let mut name = OsString::from(if ending { input.with_extension("") } else { input.to_owned() });
    name.push(".answers.jsonl");
    name.into()
}

fn run_on<D: Kernels>(device: &D, options: &Options) -> Result<(), Failure> {
    let placing = &options.placing;
    let paths = Paths::of(options)?;
    if placing.max_new_tokens == 0 || options.sequences == Some(0) {
        return Err("--max-new-tokens and --sequences: must be 1 or more".into());
    }
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers and the prompts", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let mut preparing = preparing(options, &model)?;
    let work = work(device, options)?;
    let in_order = !options.as_they_end;
    let opened = match &paths.output {
        Some(path) => Output::open(path, work, in_order)?,
        None => Output::stdout(work),
    };
    let found = match paths.is_file {
        true => {
            let found = scan(paths.lines()?, opened.known().clone(), &preparing, options.strict);
            text::give_back_memory();
            Some(found.map_err(|error| format!("{}: {error}", paths.input_name()))?)
        }
        false => None,
    };
    drop(waiting);
    let usual = || found.map_or(USUAL_CONTEXT.min(model.config.max_positions), |scan| scan.context);
    preparing.context = placing.context.unwrap_or_else(usual);
    let before = opened.known().len() as u64;
    let errors = opened.known().errors() as u64;
    let tally = Tally { all: found.map(|Scan { prompts, .. }| prompts), before, answered: 0, errors };
    say_beginning(options, &paths, &tally);
    if tally.all == Some(before) {
        opened.begin()?.0.complete()?;
        return finish(options, &paths, Ended::Complete, &Summary::of(tally), 0, &[]);
    }
    // The context may be shorter now than when the lines were looked through.
    let reading = found.map_or(usize::MAX, |scan| scan.reading).min(preparing.reading());
    let besides = reading.saturating_add(opened.known().bytes());
    compute(device, options, &paths, &mut model, (preparing, besides), opened, tally)
}

/// Loads the model, and answers what is not answered. `besides`: what lines take while they are read, and those that are known.
fn compute<D: Kernels>(
    device: &D,
    options: &Options,
    paths: &Paths,
    model: &mut Model,
    (preparing, besides): (Preparing, usize),
    opened: Opened,
    tally: Tally,
) -> Result<(), Failure> {
    let left = tally.all.map_or(usize::MAX, |all| (all - tally.before) as usize);
    let (mut loaded, sequences) = load(device, options, model, (preparing.context, besides), left)?;
    let canceller = loaded.decoder.streamer().canceller();
    let interrupts = Interrupts::cancel(canceller);
    let engine = Engine::new(loaded.decoder, Limits { waiting: 4 * sequences, delay: DELAY })?;
    let (mut output, known) = opened.begin()?;
    let mut progress = Progress::begin(tally, options.placing.quiet);
    let feed = Feed {
        engine: &engine,
        preparing: Arc::new(preparing),
        sequences,
        strict: options.strict,
        by_input: !options.as_they_end,
        output: &mut output,
        progress: &mut progress,
    };
    let ended = feed.run(paths.lines()?, known);
    let summary = progress.end(&engine.stats());
    // What still runs is given up, at the end of its pass.
    drop(engine);
    drop(interrupts);
    let ended = ended.map_err(|error| format!("{}: {error}", paths.input_name()))?;
    if ended == Ended::Complete {
        output.complete()?;
    }
    finish(options, paths, ended, &summary, sequences, &loaded.parts)
}

/// Reserves memory for as many sequences as are asked for; where nobody asks, for as many as there is memory for.
fn load<D: Kernels>(
    device: &D,
    options: &Options,
    model: &mut Model,
    (context, besides): (usize, usize),
    left: usize,
) -> Result<(Loaded<D>, usize), Failure> {
    let placing = &options.placing;
    let wanted = options.sequences.unwrap_or(USUAL_SEQUENCES).min(left);
    let mut sequences = wanted;
    loop {
        let sampler = Sampler::new(Sampling::default(), model.config.vocab)?.memory(sequences);
        let requests = feed::memory(sequences, context, besides);
        let own = text::memory(&placing.model, model).into_iter().chain([sampler, requests]).collect();
        match run::load(device, placing, model, Cache::full(sequences, context), own, None) {
            Err(error) if sequences > 1 && is_too_little(&error) => {
                if options.sequences.is_some() {
                    return Err(format!("{error}, or fewer --sequences").into());
                }
                sequences /= 2;
            }
            loaded => {
                if sequences < wanted && loaded.is_ok() && !placing.quiet {
                    say!(
                        "{sequences} prompts at a time: the memory is too little for {wanted} of up to {context} tokens"
                    );
                }
                return Ok((loaded?, sequences));
            }
        }
    }
}

fn is_too_little(error: &Failure) -> bool {
    matches!(error.downcast_ref(), Some(Error::TooLittle { .. }))
}

/// How lines become requests.
fn preparing(options: &Options, model: &Model) -> Result<Preparing, Failure> {
    let Options { placing, talk, sampling, raw, print_ids, stop, .. } = options;
    let text = Text::open(&placing.model)?;
    if text.is_none() && !print_ids {
        let file = text::tokenizer_file(&placing.model);
        return Err(format!(
            "{}: there is no tokenizer; give --print-ids, and prompt_ids in place of text",
            file.display()
        )
        .into());
    }
    if *print_ids && !stop.is_empty() {
        return Err("--stop: the answers are token ids, in which there is no text to look for".into());
    }
    let template = text.as_ref().map(Text::template).transpose()?.flatten();
    if template.is_none() && (talk.system.is_some() || talk.thinking.is_some()) {
        return Err("--system and --thinking: the model has no chat template, so it takes nothing but text".into());
    }
    // Whatever is out of range is known before anything is loaded.
    sampling.over(&model.config.suggested.sampling, || 0)?;
    let longest_token = text.as_ref().map_or(1, Text::longest_token);
    let words = Words {
        text: text.map(Arc::new),
        template,
        raw: *raw,
        system: talk.system.clone(),
        thinking: talk.thinking,
        in_words: !print_ids,
    };
    let said = placing.model.hub_name().unwrap_or(&placing.model);
    let name = match placing.model.hub_name() {
        Some(name) => name.display().to_string(),
        None => said.file_name().unwrap_or(said.as_os_str()).display().to_string(),
    };
    Ok(Preparing {
        words,
        sampling: sampling.clone(),
        stop: stop.clone(),
        most: placing.max_new_tokens,
        name,
        suggested: model.config.suggested.sampling,
        stop_tokens: model.config.stop.clone(),
        vocab: model.config.vocab,
        context: placing.context.unwrap_or(model.config.max_positions),
        max_positions: model.config.max_positions,
        longest_token,
    })
}

/// All that answers depend on, beside the input.
fn work<D: Kernels>(device: &D, options: &Options) -> Result<Work, Failure> {
    let Options { placing, talk, sampling, raw, print_ids, stop, .. } = options;
    let mut given: BTreeMap<String, Value> = BTreeMap::new();
    if let Value::Object(values) = serde_json::to_value(sampling)? {
        given.extend(values.into_iter().map(|(name, value)| (format!("--{}", name.replace('_', "-")), value)));
    }
    for (name, value) in [
        ("--max-new-tokens", json!(placing.max_new_tokens)),
        ("--context", json!(placing.context)),
        ("--system", json!(talk.system)),
        ("--thinking", json!(talk.thinking)),
        ("--raw", json!(raw)),
        ("--print-ids", json!(print_ids)),
        ("--stop", json!(stop)),
    ] {
        given.insert(name.into(), value);
    }
    let model = placing.model.display().to_string();
    Ok(Work { model, model_digest: journal::digest(&placing.model)?, device: device.arithmetic(), options: given })
}

fn say_beginning(options: &Options, paths: &Paths, tally: &Tally) {
    if options.placing.quiet {
        return;
    }
    match &paths.output {
        None => {
            say!("answers go to standard output: a run that is ended cannot go on; --output FILE makes that possible")
        }
        Some(path) if tally.before > 0 => say!("{} has {} answers; going on after them", path.display(), tally.before),
        Some(path) if !paths.is_file => say!(
            "answers go to {}: a run that is ended goes on, if it is given the same input from its beginning",
            path.display()
        ),
        Some(path) => say!("answers go to {}", path.display()),
    }
}

fn finish(
    options: &Options,
    paths: &Paths,
    ended: Ended,
    summary: &Summary,
    sequences: usize,
    memory: &[Part],
) -> Result<(), Failure> {
    if options.json {
        let interrupted = ended != Ended::Complete;
        // Whoever reads it may have gone away.
        let _ = io::stdout().write_all(format!("{}\n", summary.json(interrupted, sequences, memory)).as_bytes());
    }
    if !options.placing.quiet {
        say!("{}", summary.text());
    }
    match (ended, &paths.output) {
        (Ended::Interrupted, Some(_)) if paths.is_file => say!("interrupted: the same command goes on"),
        (Ended::Interrupted, Some(_)) => {
            say!("interrupted: the same command goes on, with the same input from its beginning")
        }
        (Ended::Interrupted, None) => say!("interrupted: the answers went to standard output, so nothing can go on"),
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_lie_beside_the_prompts() {
        for (input, expected) in [
            ("a/prompts.jsonl", "a/prompts.answers.jsonl"),
            ("prompts", "prompts.answers.jsonl"),
            ("v1.2", "v1.2.answers.jsonl"),
            ("x.jsonl.jsonl", "x.jsonl.answers.jsonl"),
        ] {
            assert_eq!(beside(Path::new(input)), Path::new(expected));
        }
    }
}
