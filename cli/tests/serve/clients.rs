//! Clients that come and go as they like.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use support::speller;

use crate::{
    models::endless,
    server::{PATIENCE, Reply, Server, request},
};

const PATH: &str = "/v1/completions";

/// A request whose answer takes long.
fn long(stream: bool) -> Value {
    json!({ "prompt": "4096=", "temperature": 0, "max_tokens": 15_000, "stream": stream })
}

fn short() -> Value {
    json!({ "prompt": "4096=", "temperature": 0, "max_tokens": 5 })
}

#[test]
fn a_client_that_hangs_up_frees_its_place_running_or_waiting() {
    let model = endless();
    let server = Server::start(model.path(), &["--sequences", "2", "--context", "20000", "--ram", "1GB"]);
    let mut streaming = server.send(PATH, &long(true));
    let whole = server.send(PATH, &long(false));
    server.wait_for("requests_running", 2);
    let waiting = server.send(PATH, &json!({ "prompt": ["7=", "8="], "n": 2, "max_tokens": 15_000 }));
    server.wait_for("requests_waiting", 4);
    streaming.read_exact(&mut [0; 500]).unwrap();
    drop(waiting);
    server.wait_for("requests_waiting", 0);
    assert_eq!(server.figure("requests_running"), 2, "the others go on");
    for (stream, left) in [(streaming, 1), (whole, 0)] {
        let gone = Instant::now();
        drop(stream);
        server.wait_for("requests_running", left);
        assert!(gone.elapsed() < Duration::from_secs(10));
    }
    assert!(server.figure("new_tokens_total") < 15_000, "they were cut short");
    assert_eq!(server.completed(&short()), " four thousand ninety-six");
    server.wait_for("connections", 1);
}

#[test]
fn a_full_queue_refuses_more_until_there_is_room() {
    let model = endless();
    let server =
        Server::start(model.path(), &["--sequences", "1", "--queue", "2", "--context", "20000", "--ram", "1GB"]);
    let first = server.send(PATH, &long(true));
    server.wait_for("requests_running", 1);
    // Of three that are asked for at once, none is taken.
    let many = server.post(PATH, &json!({ "prompt": "7=", "n": 3 }));
    assert_eq!((many.status, &many.json()["error"]["code"]), (429, &json!("queue_full")), "{}", many.text());
    server.wait_for("requests_waiting", 0);
    let waiting: Vec<_> = (0..2).map(|_| server.send(PATH, &short())).collect();
    server.wait_for("requests_waiting", 2);
    let refused = server.post(PATH, &short());
    assert_eq!((refused.status, refused.headers["retry-after"].as_str()), (429, "1"));
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("--queue"));
    drop(first);
    for stream in waiting {
        assert_eq!(Reply::read(stream).json()["choices"][0]["text"], " four thousand ninety-six");
    }
}

#[test]
fn a_client_that_stops_reading_delays_nobody_and_is_given_up() {
    let model = endless();
    let server =
        Server::start(model.path(), &["--sequences", "2", "--context", "20000", "--ram", "1GB", "--patience", "1"]);
    // More than the system holds for a connection.
    let stalled = server
        .send(PATH, &json!({ "prompt": "4096=", "max_tokens": 19_000, "stream": true, "logprobs": 5, "seed": 1 }));
    // What the client's side keeps of it, so that little has to be generated before the server notices.
    let bytes = 4096_i32;
    // SAFETY: the call reads the number, which lives, of a socket that is open.
    let set = unsafe {
        let size = size_of_val(&bytes) as libc::socklen_t;
        libc::setsockopt(stalled.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, (&raw const bytes).cast(), size)
    };
    assert_eq!(set, 0);
    server.wait_for("requests_running", 1);
    let begun = Instant::now();
    let mut answered = 0;
    // Its own client's, and the one that asks.
    while server.figure("connections") > 1 {
        let asked = Instant::now();
        assert_eq!(server.completed(&short()), " four thousand ninety-six");
        assert!(asked.elapsed() < Duration::from_secs(10));
        answered += 1;
        assert!(begun.elapsed() < PATIENCE, "it is never given up");
    }
    assert!(answered > 0);
    server.wait_for("requests_running", 0);
    drop(stalled);
}

#[test]
fn long_requests_that_are_being_answered_keep_no_other_from_being_read() {
    let model = endless();
    let server = Server::start(model.path(), &["--sequences", "2", "--context", "20000", "--ram", "1GB"]);
    let with_padding = |mut body: Value| {
        body["user"] = "x".repeat(100_000).into();
        body
    };
    let answering: Vec<_> = (0..9).map(|_| server.send(PATH, &with_padding(long(false)))).collect();
    server.wait_for("requests_waiting", 7);
    assert_eq!(server.post(PATH, &with_padding(json!({ "prompt": "" }))).status, 400);
    drop(answering);
    server.wait_for("requests_waiting", 0);
}

#[test]
fn slow_clients_with_long_requests_keep_no_other_from_being_read() {
    let server = Server::start(&speller(), &[]);
    let slow: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = server.connect();
            let half = request("POST", PATH, &[("Content-Length", "100000")], &"x".repeat(50_000));
            stream.write_all(half.as_bytes()).unwrap();
            stream
        })
        .collect();
    server.wait_for("connections", 21);
    let mut body = short();
    body["user"] = "x".repeat(1_000_000).into();
    let begun = Instant::now();
    assert_eq!(server.completed(&body), " four thousand ninety-six");
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(slow);
}

#[test]
fn one_connection_serves_many_requests_and_garbage_ends_only_its_own() {
    let server = Server::start(&speller(), &[]);
    let mut stream = server.connect();
    let body = short().to_string();
    let keep = [("Connection", "keep-alive")];
    // The second is sent before the first is answered.
    let both = request("POST", PATH, &keep, &body) + &request("POST", PATH, &[], &body);
    stream.write_all(both.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches(" four thousand ninety-six").count(), 2, "{text}");
    thread::scope(|scope| {
        for garbage in
            [&b"\0\xff\xfe\r\n\r\n"[..], b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", &[b'a'; 200_000]]
        {
            let server = &server;
            scope.spawn(move || {
                let mut stream = server.connect();
                let _ = stream.write_all(garbage);
                let _ = stream.read_to_end(&mut Vec::new());
            });
        }
        (0..8).for_each(|_| assert_eq!(server.completed(&short()), " four thousand ninety-six"));
    });
    server.wait_for("connections", 1);
}

#[test]
fn a_pass_that_fails_is_told_to_those_in_it_and_the_next_request_is_answered() {
    let model = endless();
    // Each pass reads all layers.
    let rings = ["--n-gpu", "1", "--n-cpu-pinned", "1", "--sequences", "2", "--context", "20000"];
    let server = Server::start(model.path(), &rings);
    let shard = model.path().join("model-00002-of-00002.safetensors");
    let whole = support::whole(&shard);
    let mut stream = server.send(PATH, &long(true));
    let waiting = server.send(PATH, &long(false));
    server.wait_for("requests_running", 2);
    let mut begun = [0; 500];
    stream.read_exact(&mut begun).unwrap();
    // As if someone had written it anew.
    File::options().write(true).open(&shard).unwrap().set_modified(SystemTime::now()).unwrap();
    let failed = Reply::read(waiting);
    let error = failed.json()["error"].clone();
    assert_eq!((failed.status, &error["type"]), (500, &json!("server_error")));
    assert!(error["message"].as_str().unwrap().contains("model-00002-of-00002.safetensors"), "{error}");
    let streamed = Reply::read((&begun[..]).chain(stream)).text();
    let last = streamed.split_terminator("\n\n").last().unwrap().strip_prefix("data: ").unwrap();
    assert_eq!(serde_json::from_str::<Value>(last).unwrap()["error"], error);
    support::healed(&shard, &whole);
    assert_eq!(server.completed(&short()), " four thousand ninety-six");
    assert_eq!(server.figure("requests_running"), 0);
}
