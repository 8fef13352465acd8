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
        let asked = json!({ "prompt": prompt, "max_tokens": 256, "stream": true, "logprobs": 5, "seed": number });
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
        let waiting = server.figure("requests_waiting")?;
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))?;
        Ok::<_, Failure>(waiting)
    })?;
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

/// Requests that take much to read, of which none is answered: JSON of many small objects and lists, numbers, and a text.
fn read(client: &Client, number: usize) -> Result<(), Failure> {
    let fill = |piece: &str, bytes: usize| piece.repeat(bytes / piece.len());
    let most = 4_000_000;
    let bodies = [
        format!("{{\"prompt\": [{}0]}}", fill("{\"\":0},", most)),
        format!("{{\"prompt\": [{}0]}}", fill("[0],", most)),
        format!("{{\"prompt\": [{}-1]}}", fill("0,", most)),
        json!({ "prompt": fill("The quick brown fox. ", 60_000) }).to_string(),
        json!({ "prompt": fill("x,", 1_000_000) }).to_string(),
    ];
    for turn in 0..bodies.len() {
        let reply = status(client.send(&bodies[(number + turn) % bodies.len()])?)?;
        if !reply.contains(" 400 ") && !reply.contains(" 413 ") && !reply.contains(" 503 ") {
            return Err(format!("a request that cannot be answered got {reply}").into());
        }
    }
    Ok(())
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
}
