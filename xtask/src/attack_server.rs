//! Clients that come, stop reading, hang up and send garbage, beside those that behave.

mod client;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use client::{Kind, Random};
use serde_json::{Value, json};

use crate::{
    run::{self, Failure, Steps},
    server::{Server, client::Failed},
    speller,
};

/// Let many clients at `layer-streamer serve`, of which half misbehave, and check that it takes no harm.
///
/// Half of them ask and read answers, whole and as streams, and compare them with those that were given alone. The others hang up in
/// the middle, stop reading, send requests half, and send garbage. Fails if an answer is wrong, if a sequence or a connection is left,
/// if files stay open or memory grows from the first half of the time to the second, or if the server does not end when told to.
/// Prints what was answered in a second, beside what one client alone gets.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask attack-server                       # a minute
  cargo xtask attack-server 600 --clients 400     # ten minutes, and more of them")]
pub struct Options {
    /// How long the attack takes
    #[arg(default_value_t = 60, value_parser = clap::value_parser!(u64).range(2..))]
    seconds: u64,
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(2..=2000))]
    clients: u64,
    /// Random clients are the same with the same seed, but for who comes first
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A `layer-streamer` that is built already
    #[arg(long, value_parser = run::absolute)]
    program: Option<PathBuf>,
}

/// Clients that stop reading are given up after two seconds, while the attack goes on.
const SERVER: &str = "--patience 2 --sequences 16 --queue 64 --context 4096 --ram 2GB";

/// How long the server may take to have nothing left to do.
const QUIET: Duration = Duration::from_secs(60);

/// How much more memory it may have after the second half, in bytes: heaps of threads and buffers settle late.
const GROWTH: u64 = 16 << 20;

/// What clients counted.
#[derive(Default)]
struct Counts {
    /// By kind: how many came.
    came: [AtomicU64; Kind::ALL.len()],
    answered: AtomicU64,
    tokens: AtomicU64,
    /// Told that the queue is full.
    refused: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let steps = Steps::of("attack-server");
    steps.begin("building");
    let program = match &options.program {
        Some(program) => program.clone(),
        None => run::program()?,
    };
    let model = speller::endless()?;
    let mut server = Server::start(&program, model.path(), SERVER)?;
    steps.begin("one client alone");
    let asked: BTreeMap<u64, Value> = (0..64).map(|number| (number, client::request(number))).collect();
    let answers = asked.values().map(|body| server.client().whole(body)).collect::<Result<Vec<_>, _>>()?;
    let alone = alone(&server, &asked, &answers)?;
    server.wait_until_quiet(QUIET)?;
    let files = server.files_left(0)?;
    let counts = Counts::default();
    let half = Duration::from_secs(options.seconds) / 2;
    let mut memory = Vec::new();
    for round in 0..2 {
        steps.begin(&format!("{} clients, for {} s", options.clients, half.as_secs_f64()));
        attack(&server, options, round, half, &counts, &answers);
        server.wait_until_quiet(QUIET)?;
        memory.push(server.memory("VmRSS")?);
    }
    steps.begin("checked");
    let answers_still = asked.values().map(|body| server.client().whole(body)).collect::<Result<Vec<_>, _>>()?;
    let peak = server.memory("VmHWM")?;
    let files_left = server.files_left(files)?;
    server.end()?;
    tell(options, &counts, alone, [memory[0], memory[1], peak], [files, files_left]);
    let wrong = counts.wrong.into_inner()?;
    if let Some(first) = wrong.first() {
        return Err(format!("{} answers are wrong, the first: {first}", wrong.len()).into());
    }
    if answers_still != answers {
        return Err("after the attack the server gives other answers than before".into());
    }
    if counts.answered.load(Relaxed) == 0 {
        return Err("no client that behaves was answered".into());
    }
    if memory[1] > memory[0] + GROWTH {
        return Err(format!("its memory grows: {} bytes, then {}", memory[0], memory[1]).into());
    }
    if files_left > files {
        return Err(format!("files stay open: {files} before, {files_left} after").into());
    }
    Ok(())
}

/// Tokens and requests a second of one client.
fn alone(server: &Server, asked: &BTreeMap<u64, Value>, answers: &[String]) -> Result<[f64; 2], Failure> {
    let (begun, mut requests, before) = (Instant::now(), 0, server.figure("new_tokens_total")?);
    while begun.elapsed() < Duration::from_secs(3) {
        for (body, answer) in asked.values().zip(answers) {
            let again = server.client().whole(body)?;
            if again != *answer {
                return Err(format!("the same request gives {answer:?}, then {again:?}").into());
            }
            requests += 1;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok([(server.figure("new_tokens_total")? - before) as f64 / seconds, f64::from(requests) / seconds])
}

fn attack(server: &Server, options: &Options, round: u64, time: Duration, counts: &Counts, answers: &[String]) {
    let ends = Instant::now() + time;
    thread::scope(|scope| {
        for number in 0..options.clients {
            let live = move || {
                let mut random = Random::new(options.seed ^ (round << 32) ^ (number << 40));
                // Every second one behaves.
                while Instant::now() < ends {
                    let kind = if number % 2 == 0 { Kind::behaved(&mut random) } else { Kind::misbehaved(&mut random) };
                    counts.came[kind as usize].fetch_add(1, Relaxed);
                    one(server, kind, &mut random, counts, answers);
                }
            };
            let spawned = thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, live);
            if let Err(error) = spawned {
                note(counts, format!("client {number} does not start: {error}"));
            }
        }
    });
}

/// The life of one client.
fn one(server: &Server, kind: Kind, random: &mut Random, counts: &Counts, answers: &[String]) {
    let number = random.below(answers.len() as u64);
    let client = server.client();
    let answer = match kind {
        Kind::Whole => client.whole(&client::request(number)),
        Kind::Stream => client.stream(&client::request(number)),
        _ => {
            // What becomes of these is the server's business.
            let _ = client::misbehave(&client, kind, random);
            return;
        }
    };
    match answer {
        Ok(text) if text == answers[number as usize] => {
            counts.answered.fetch_add(1, Relaxed);
            counts.tokens.fetch_add(client::tokens(number), Relaxed);
        }
        Ok(text) => {
            note(counts, format!("{} gives {text:?}, alone {:?}", client::request(number), answers[number as usize]))
        }
        Err(Failed::Busy) => {
            counts.refused.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(20));
        }
        Err(Failed::Other(cause)) => note(counts, cause),
    }
}

fn note(counts: &Counts, wrong: String) {
    counts.wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(wrong);
}

fn tell(options: &Options, counts: &Counts, alone: [f64; 2], memory: [u64; 3], files: [usize; 2]) {
    let seconds = options.seconds as f64;
    let of = |count: &AtomicU64| count.load(Relaxed);
    let came: Vec<_> =
        Kind::ALL.iter().map(|kind| format!("{} {}", of(&counts.came[*kind as usize]), kind.name())).collect();
    println!("came: {}", came.join(", "));
    println!("one client alone: {:.0} tokens/s, {:.0} answers/s", alone[0], alone[1]);
    println!(
        "{} clients, half of them behaved: {:.0} tokens/s, {:.0} answers/s to the behaved; {} times told that the queue is full",
        options.clients,
        of(&counts.tokens) as f64 / seconds,
        of(&counts.answered) as f64 / seconds,
        of(&counts.refused),
    );
    let megabytes = memory.map(|bytes| bytes as f64 / 1e6);
    println!(
        "memory: {:.1} MB after the first half, {:.1} MB after the second, {:.1} MB at most",
        megabytes[0], megabytes[1], megabytes[2]
    );
    println!("open files: {} before, {} after", files[0], files[1]);
    println!(
        "counted: {}",
        json!({ "answered": of(&counts.answered), "wrong": counts.wrong.lock().map_or(0, |wrong| wrong.len()) })
    );
}
