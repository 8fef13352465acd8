//! `serve`: clients that take all that a server lets them have, at once.

use std::{
    io::Read,
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{judge, total};
use crate::{
    run::Failure,
    server::{Server, client::Client},
};

const SEQUENCES: u64 = 8;
const QUEUE: u64 = 24;
const CONTEXT: u64 = 1024;
const CACHE_TOKENS: u64 = SEQUENCES * CONTEXT;
/// Tokens of each prompt, roughly: four pages of the cache. The cache is reserved as a whole at the start.
const PROMPT: u64 = 240;
/// Clients that send what takes much to read.
const READERS: usize = 8;
/// What a server sets aside for reading, with the usual limit of bodies and so short a context, in bytes.
const READING: usize = 64 << 20;
/// How long sequences may take to fill the cache.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn check(program: &Path, model: &Path) -> Result<(), Failure> {
    let launch = |more: &str| {
        let all =
            format!("--sequences {SEQUENCES} --queue {QUEUE} --context {CONTEXT} --cache-tokens {CACHE_TOKENS} {more}");
        Server::start(program, model, &all)
    };
    // With all layers kept; then a tenth less, so that some are not.
    let mut server = launch("")?;
    let budget = total(&server.said()?) / 10 * 9;
    server.end()?;
    let mut server = launch(&format!("--ram {budget}"))?;
    let taken = load(&server)?;
    let peak = server.memory("VmHWM")?;
    println!("a server: {taken}");
    judge("a server", &server.said()?, &["kv_cache", "requests", "tokenizer"], peak, Some(budget))?;
    // It answers as before.
    server.wait_until_quiet(PATIENCE)?;
    server.client().whole(&json!({ "prompt": "1, 2, 3,", "max_tokens": 4 }))?;
    server.end()
}

/// All that a server lets clients have; what that was, when they are gone.
fn load(server: &Server) -> Result<String, Failure> {
    // They fill pages of the cache, and are not read.
    let mut open = Vec::new();
    for number in 0..SEQUENCES {
        let prompt = words(number, PROMPT);
        let asked = json!({ "prompt": prompt, "max_tokens": 700, "stream": true, "logprobs": 5, "seed": number });
        open.push(server.client().send(&asked.to_string())?);
    }
    let waiting = thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|number| scope.spawn(move || read(&server.client(), number))).collect();
        // They wait, with bodies that are long.
        for number in 0..QUEUE {
            let padding = "x".repeat(1 << 20);
            let prompt = words(100 + number, PROMPT);
            let asked = json!({ "prompt": prompt, "max_tokens": 256, "user": padding });
            open.push(server.client().send(&asked.to_string())?);
        }
        let (mut waiting, begun) = (0, Instant::now());
        while waiting < QUEUE / 2 && begun.elapsed() < PATIENCE {
            waiting = waiting.max(server.figure("requests_waiting")?);
            thread::sleep(Duration::from_millis(20));
        }
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))?;
        Ok::<_, Failure>(waiting)
    })?;
    if waiting < QUEUE / 2 {
        return Err(format!("{waiting} requests wait, of {QUEUE}").into());
    }
    let filled = SEQUENCES * PROMPT * 3 / 4;
    let begun = Instant::now();
    while server.figure("prompt_tokens_total")? < filled {
        if begun.elapsed() > PATIENCE {
            return Err("the cache does not fill".into());
        }
        thread::sleep(Duration::from_millis(50));
    }
    let (prompts, new) = (server.figure("prompt_tokens_total")?, server.figure("new_tokens_total")?);
    Ok(format!("{waiting} requests waited, {prompts} tokens of prompts were computed, {new} new ones not read"))
}

/// A text of about so many tokens, which no other number's text begins with.
fn words(number: u64, tokens: u64) -> String {
    (0..tokens / 4).map(|word| format!("{:03} ", (number * 331 + word * 7) % 1000)).collect()
}

/// Requests that take much to read, of which none is answered: JSON of many small objects, lists, texts and numbers, and long texts.
fn read(client: &Client, number: usize) -> Result<(), Failure> {
    let bodies = bodies(READING);
    for turn in 0..bodies.len() {
        let (body, expected) = &bodies[(number + turn) % bodies.len()];
        let begun = Instant::now();
        loop {
            let reply = status(client.send(body)?)?;
            if reply.contains(expected) {
                break;
            }
            // Others are read just now.
            if !reply.contains(" 503 ") || begun.elapsed() > PATIENCE {
                let start = &body[..body.len().min(30)];
                return Err(format!("{start}…, of {} bytes, got {reply:?} in place of {expected}", body.len()).into());
            }
        }
    }
    Ok(())
}

/// Bodies of which reading takes nearly so many bytes, all that there are, and more; and how they are refused.
fn bodies(reading: usize) -> Vec<(String, &'static str)> {
    let mut bodies = Vec::new();
    // What each piece counts for, as cli/src/serve/cost.rs has it: an object with a field, lists, a text and a number.
    for (piece, cost) in [("{\"\":0},", 840), ("[0],", 256), ("[0,0,0,0,0],", 640), ("\"x\",", 162), ("-1,", 96)] {
        let body = |bytes: usize| format!("{{\"prompt\": [{}-1]}}", piece.repeat(bytes / cost));
        bodies.push((body(reading - 2000), " 400 "));
        bodies.push((body(reading + 2000), " 413 "));
    }
    for text in ["The quick brown fox. ".repeat(2900), "x,".repeat(500_000), "\u{4e2d}".repeat(20_000)] {
        bodies.push((json!({ "prompt": text }).to_string(), " 400 "));
    }
    bodies
}

/// The first line of an answer.
fn status(mut stream: TcpStream) -> Result<String, Failure> {
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_differ_from_the_first_word_on() {
        let texts: Vec<String> = (0..SEQUENCES).map(|number| words(number, 64)).collect();
        let firsts: std::collections::BTreeSet<&str> = texts.iter().map(|text| &text[..4]).collect();
        assert_eq!(firsts.len() as u64, SEQUENCES);
    }

    /// To parse the large ones would take memory, which the peaks that other tests measure begin with.
    #[test]
    fn bodies_are_json_within_the_usual_limit() {
        assert!(bodies(READING).iter().all(|(body, _)| body.len() < 4 << 20));
        for (body, _) in bodies(10_000).iter().filter(|(body, _)| body.len() < 10_000) {
            assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
        }
    }
}
