//! What `generate` and `chat` have in common: a model made ready to run, and one answer of it.

mod answer;
mod report;

use std::{
    io::{self, IsTerminal},
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

pub use answer::Answer;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Cache, Choice, Decoder, Model, Sequence},
    plan::{Part, Purpose, Tier},
    probe::Probe,
    trace::{Observer, timeline::Timeline},
};
pub use report::{Report, Run};

use crate::{
    BEGUN, Failure,
    budget::Measure,
    interrupt::{self, Interrupts},
    placing::Placing,
    text::Text,
    units,
    waiting::{Silence, Waiting},
};

/// A model that is ready to run, and how it was placed.
pub struct Loaded<D: Kernels> {
    pub decoder: Decoder<D>,
    pub settings: Settings,
    pub parts: Vec<Part>,
    pub probe: Option<Probe>,
}

/// Places the model and reserves its memory, with a KV cache of such a size; says on stderr what that takes, with
/// what the program takes itself, `own`.
pub fn load<D: Kernels>(
    device: &D,
    placing: &Placing,
    model: &mut Model,
    cache: Cache,
    mut own: Vec<Part>,
    timeline: Option<&Arc<Timeline>>,
) -> Result<Loaded<D>, Failure> {
    own.extend(timeline.map(|of| Part { purpose: Purpose::Trace, bytes: of.bytes() }));
    // What the links carry is shown in the picture too.
    let measure = if timeline.is_some() { Measure::Always } else { Measure::IfItCounts };
    let (settings, probe) = placing.settle(device, model, cache, &own, measure)?;
    placing.tell(probe.as_ref(), placing.probe);
    let mut parts = Decoder::memory(device, model, &settings, cache)?;
    parts.extend(own);
    if !placing.quiet {
        print_memory(&device.describe(), &parts);
    }
    let _waiting = Waiting::on("reserving memory and loading what stays", placing.quiet);
    let mut observers: Vec<_> = timeline.into_iter().map(|timeline| timeline.clone() as Arc<dyn Observer>).collect();
    if !placing.quiet {
        observers.push(Arc::new(Silence));
    }
    let decoder = Decoder::with_observers(device, model, &settings, cache, &observers)?;
    Ok(Loaded { decoder, settings, parts, probe })
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The model said so, with this token.
    StopToken(u32),
    /// By `--stop`: with this text.
    StopText(String),
    /// It has as many tokens as it may have.
    Limit,
    /// The KV cache is full.
    Context,
    /// By Ctrl-C.
    Interrupt,
    /// Whoever read it went away.
    ReaderGone,
}

impl End {
    /// For programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::StopToken(_) => "stop token",
            Self::StopText(_) => "stop text",
            Self::Limit => "max new tokens",
            Self::Context => "context",
            Self::Interrupt => "interrupt",
            Self::ReaderGone => "reader gone",
        }
    }
}

/// When an answer ends by itself.
pub struct Limits<'a> {
    pub most: usize,
    pub stop: &'a [u32],
}

/// Sends `tokens` through the model, after those that its KV cache holds, and continues them token by token. `between` runs when
/// the tokens are through. Returns what was done, and the answer's text, where it is one of words.
pub fn answer<D: Kernels>(
    decoder: &mut Decoder<D>,
    tokens: &[u32],
    limits: &Limits<'_>,
    choice: Choice<'_>,
    mut answer: Answer<'_>,
    quiet: bool,
    between: impl FnOnce(&mut Decoder<D>) -> Result<(), Failure>,
) -> Result<(Run, Option<String>), Failure> {
    let sampling = match &choice {
        Choice::Greedy => None,
        Choice::Sample(sampler) => Some(*sampler.sampling()),
    };
    let bar = progress_bar(quiet, decoder.streamer().plan().units());
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
    let waiting = Waiting::on("reading the prompt", quiet || io::stderr().is_terminal());
    let forward = decoder.forward(&[Sequence { row: 0, tokens }]);
    drop(waiting);
    let prompt_time = start.elapsed();
    let forward = forward.map_err(Failure::from).and_then(|()| between(decoder));
    let (mut found, mut first_token, mut end) = (Vec::new(), None, None);
    // When the first token came, and how many passes after that brought one, the last of them when.
    let (mut first, mut passes, mut last) = (None, 0, Instant::now());
    let decoded = forward.and_then(|()| {
        // Stop tokens are looked for here, so that it is known which one it was.
        decoder.decode(&[0], limits.most, &[], choice, |_, token| {
            last = Instant::now();
            passes += usize::from(first.is_some());
            first.get_or_insert(last);
            if limits.stop.contains(&token) {
                end = Some(End::StopToken(token));
                return Ok::<_, Failure>(ControlFlow::Break(()));
            }
            first_token.get_or_insert_with(|| BEGUN.elapsed());
            found.push(token);
            if let ControlFlow::Break(why) = answer.push(token, &bar)? {
                end = Some(why);
            } else if interrupt::is_noted() {
                end = Some(End::Interrupt);
            }
            Ok(if end.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
    });
    bar.finish_and_clear();
    drop(interrupts);
    match decoded {
        // By Ctrl-C: what came is the answer.
        Err(error) if interrupt::is_noted() && matches!(error.downcast_ref(), Some(Error::Cancelled)) => {
            end = Some(End::Interrupt);
        }
        other => other?,
    }
    let by_itself = || if found.len() < limits.most { End::Context } else { End::Limit };
    let mut end = end.unwrap_or_else(by_itself);
    let text = answer.end(&mut end, &bar)?;
    let run = Run {
        prompt_tokens: tokens.len(),
        prompt_time,
        tokens: found,
        decode_passes: passes,
        decode_time: first.map_or(Duration::ZERO, |first| last - first),
        first_token,
        end,
        device_memory: None,
        sampling,
    };
    Ok((run, text))
}

/// Why there is nothing to see of an answer that is empty, and what to try; `None` for one that is not.
pub fn why_empty(run: &Run, text: Option<&str>, tokenizer: Option<&Text>, is_turn: bool) -> Option<String> {
    if text.map_or(!run.tokens.is_empty(), |text| !text.is_empty()) {
        return None;
    }
    Some(match &run.end {
        End::StopToken(token) if run.tokens.is_empty() => {
            let spelled = tokenizer.and_then(|text| text.spelled(*token)).map(|token| format!(" ({token})"));
            let remedy = match is_turn {
                true => "ask in other words, or with another system prompt (--system)",
                false => "give a longer prompt, or one that stops in the middle of a sentence",
            };
            format!(
                "no answer: the model ended at once, with its stop token {token}{}; {remedy}",
                spelled.unwrap_or_default()
            )
        }
        End::StopText(stop) => format!("no answer: it began with what --stop names, {stop:?}"),
        End::Limit if run.tokens.is_empty() => "no answer: --max-new-tokens is 0".into(),
        End::Context if run.tokens.is_empty() => "no answer: the prompt fills the context; raise --context".into(),
        End::Interrupt | End::ReaderGone => return None,
        _ => format!("no answer: the {} tokens that came have no text; --print-ids shows them", run.tokens.len()),
    })
}

fn print_memory(device: &str, rows: &[Part]) {
    say!("device: {device}");
    // Of one slot the transfer has what the disk could fill.
    let several = |part: &Part| matches!(part.purpose, Purpose::Slots { tier: Tier::Ram | Tier::Pinned, count: 2.. });
    if !rows.iter().any(several) {
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
