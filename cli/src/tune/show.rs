//! What was found, for people, and as a command for a shell.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use layer_streamer::{
    Settings,
    plan::Placement,
    tuner::{Answer, Comparison, Outcome, Ranking, Refusal, Round, Trial},
};

use super::Options;
use crate::{called, text};

/// `n_gpu` / `n_cpu_pinned` / `n_cpu`, each with its batch if it has one.
pub fn short(placement: &Placement) -> String {
    rings(&placement.settings)
}

fn rings(settings: &Settings) -> String {
    let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = *settings;
    let ring = |(n, batch): (usize, usize)| if batch > 0 { format!("{n} by {batch}") } else { n.to_string() };
    [(n_gpu, batch_gpu), (n_cpu_pinned, batch_cpu_pinned), (n_cpu, batch_cpu)].map(ring).join(" / ")
}

/// With four digits or so.
pub fn time(seconds: f64) -> String {
    match seconds {
        0.0..0.01 => format!("{:.3} ms", 1e3 * seconds),
        0.01..1.0 => format!("{:.1} ms", 1e3 * seconds),
        _ => format!("{seconds:.2} s"),
    }
}

/// What came of a trial.
pub fn came_to(trial: &Trial) -> String {
    match &trial.outcome {
        Outcome::Done => format!("{} a token", time(trial.seconds().unwrap_or(0.0))),
        Outcome::Stopped { limit } => format!("more than {} a token", time(*limit)),
        // It may be anything that a worker wrote.
        Outcome::Refused { reason } => format!("refused: {}", reason.replace(char::is_control, " ")),
    }
}

/// What came of a round of the comparison.
pub fn round(round: &Round) -> String {
    match round.seconds {
        Some([default, challenger]) => format!("{} and {} a token", time(challenger), time(default)),
        None => "one of the two could not be measured".into(),
    }
}

/// Everything that was tried.
pub fn table(ranking: &Ranking, default: &Placement, refused: &[Refusal]) -> String {
    let fastest = ranking.fastest().and_then(Trial::seconds).unwrap_or(f64::INFINITY);
    let all = ranking.trials.iter().map(|trial| &trial.placement.settings);
    let all = all.chain(refused.iter().map(|refusal| &refusal.settings));
    let width = all.map(|settings| rings(settings).len()).max().unwrap_or(0).max(8);
    let mut text = format!("{:width$}  {:>8}  {:>10}  {:>6}  {:>6}\n", "settings", "kept", "a token", "±", "slower");
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
        let kept = format!("{}/{}", trial.placement.kept(), trial.placement.tiers.len());
        let mark = if trial.placement == *default { "  the default" } else { "" };
        text += &format!("{:width$}  {kept:>8}  {row}{mark}\n", short(&trial.placement));
    }
    for Refusal { settings, reason } in refused {
        text += &format!("{:width$}  left out: {reason}\n", rings(settings));
    }
    text += "settings: n_gpu / n_cpu_pinned / n_cpu, and how many layers are handed over at once where that is not one\n\
             kept: layers, and parts of a streamed output head, that are not read in every pass\n";
    if ranking.trials.len() < ranking.candidates {
        text += &format!("{} of {} candidates were tried\n", ranking.trials.len(), ranking.candidates);
    }
    text
}

/// What the answer is, and why.
pub fn answer(answer: &Answer) -> String {
    let why = match &answer.verdict {
        Comparison::Kept => "the default was kept: nothing tried was clearly faster".to_owned(),
        Comparison::Faster { ratio, won, rounds } => format!(
            "clearly faster than the default: {ratio:.2} of its time in the median of {rounds} rounds in turn, by 3 % or more in {won}"
        ),
        Comparison::NoDefault => "the fastest; the default could not be measured".to_owned(),
        _ => "the default, as the search ended before anything was found to be clearly faster".to_owned(),
    };
    let placement = &answer.placement;
    let (kept, of) = (placement.kept(), placement.tiers.len());
    format!("best: {}, {kept} of {of} kept, at {} a token\n{why}", short(placement), time(answer.seconds))
}

/// A command that runs the model so, on the device that the command line calls `device`; a line for a shell.
pub fn command(options: &Options, device: &str, answer: &Answer) -> Vec<u8> {
    let mut line = quoted(called().as_bytes());
    let mut add = |words: &[&OsStr]| {
        for word in words {
            line.push(b' ');
            line.extend(quoted(word.as_bytes()));
        }
    };
    add(&["generate", "--device", device, "--model"].map(OsStr::new));
    // What begins with a dash would be taken for an option.
    let folder = || Path::new(".").join(&*options.model);
    add(&[options.model.hub_name().map_or_else(folder, Path::to_owned).as_os_str()]);
    match &options.json {
        Some(path) => add(&[OsStr::new("--config"), Path::new(".").join(path).as_os_str()]),
        None => flags(&answer.placement).iter().for_each(|word| add(&[OsStr::new(word)])),
    }
    if let Some(context) = options.context {
        add(&["--context", &context.to_string()].map(OsStr::new));
    }
    let is_speller = options.model.ends_with("examples/speller");
    match text::tokenizer_file(&options.model).exists() {
        true => add(&[OsStr::new(if is_speller { "4096=" } else { "Once upon a time" })]),
        false => add(&["--prompt-ids", "1,2,3", "--print-ids"].map(OsStr::new)),
    }
    line.push(b'\n');
    line
}

/// As `generate` takes them.
fn flags(placement: &Placement) -> Vec<String> {
    let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = placement.settings;
    let rings = [("--n-gpu", n_gpu), ("--n-cpu-pinned", n_cpu_pinned), ("--n-cpu", n_cpu)];
    let batches = [("--batch-gpu", batch_gpu), ("--batch-cpu-pinned", batch_cpu_pinned), ("--batch-cpu", batch_cpu)];
    let batches = batches.into_iter().filter(|(_, batch)| *batch > 0);
    let numbers = rings.into_iter().chain(batches).map(|(name, value)| (name, value.to_string()));
    let lists = [("--tables", placement.statics.clone()), ("--tier", placement.list())];
    let lists = lists.into_iter().filter(|(_, list)| !list.is_empty());
    numbers.chain(lists).flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

/// A word as a shell takes it back.
fn quoted(word: &[u8]) -> Vec<u8> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:,=+@%".contains(byte);
    if !word.is_empty() && word.iter().all(plain) {
        return word.to_vec();
    }
    let mut text = vec![b'\''];
    for &byte in word {
        match byte {
            b'\'' => text.extend(b"'\\''"),
            _ => text.push(byte),
        }
    }
    text.push(b'\'');
    text
}
