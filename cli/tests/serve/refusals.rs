//! What is refused, and how that is told.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{copy_of, speller};

use crate::{
    common::program,
    models::{TEMPLATE, chat_model, endless},
    server::{Reply, Server, request},
};

fn assert_refused(reply: &Reply, status: u16, param: Option<&str>, part: &str) {
    assert_eq!(
        (reply.status, reply.headers["content-type"].as_str()),
        (status, "application/json"),
        "{}",
        reply.text()
    );
    let json = reply.json();
    let error = &json["error"];
    let fields: Vec<_> = error.as_object().unwrap().keys().map(String::as_str).collect();
    assert!(["message", "type", "param", "code"].iter().all(|name| fields.contains(name)), "{json}");
    assert_eq!(error["param"].as_str(), param, "{json}");
    assert!(error["type"].as_str().unwrap().ends_with("_error"), "{json}");
    assert!(error["message"].as_str().unwrap().contains(part), "{json} lacks {part}");
}

#[test]
fn a_field_that_cannot_be_taken_is_named() {
    let model = chat_model(TEMPLATE);
    let server = Server::start(model.path(), &[]);
    let turns = json!([{ "role": "user", "content": "7" }]);
    let refused = |path: &str, fields: Value, param: &str, part: &str| {
        let mut body = if path == "/v1/completions" { json!({ "prompt": "7=" }) } else { json!({ "messages": turns }) };
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_refused(&server.post(path, &body), 400, Some(param), part);
    };
    for (fields, param, part) in [
        (json!({ "temperature": 2.1 }), "temperature", "from 0 to 2"),
        (json!({ "temperature": "hot" }), "temperature", "give a number"),
        (json!({ "top_p": -0.1 }), "top_p", "from 0 to 1"),
        (json!({ "presence_penalty": 3 }), "presence_penalty", "from -2 to 2"),
        (json!({ "frequency_penalty": 0.5 }), "frequency_penalty", "not supported"),
        (json!({ "logit_bias": { "5": 1 } }), "logit_bias", "not supported"),
        (json!({ "seed": 1.5 }), "seed", "whole number"),
        (json!({ "max_tokens": 0 }), "max_tokens", "from 1"),
        (json!({ "n": 0 }), "n", "from 1 to 128"),
        (json!({ "n": 129 }), "n", "from 1 to 128"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "stop", "up to 4"),
        (json!({ "stop": "" }), "stop", "none of them empty"),
        (json!({ "stop": [1] }), "stop", "up to 4"),
        (json!({ "stop": ["a", "b".repeat(1025)] }), "stop", "up to 1024"),
        (json!({ "stream": 1 }), "stream", "true or false"),
        (json!({ "stream_options": { "include_usage": true } }), "stream_options", "set stream"),
        (json!({ "stream": true, "stream_options": { "odd": 1 } }), "stream_options.odd", "leave it out"),
        (json!({ "tmperature": 1 }), "tmperature", "not known"),
        (json!({ "model": 5 }), "model", "give a string"),
    ] {
        refused("/v1/completions", fields.clone(), param, part);
        refused("/v1/chat/completions", fields, param, part);
    }
    for (fields, param, part) in [
        (json!({ "prompt": null }), "prompt", "is missing"),
        (json!({ "prompt": [] }), "prompt", "empty list"),
        (json!({ "prompt": "" }), "prompt", "no tokens"),
        (json!({ "prompt": 5 }), "prompt", "give a text"),
        (json!({ "prompt": [5, "a"] }), "prompt", "in a list of tokens"),
        (json!({ "prompt": [343] }), "prompt", "0 to 342"),
        (json!({ "prompt": ["7=", 5] }), "prompt[1]", "give a text"),
        (json!({ "prompt": [[1], [-1]] }), "prompt[1]", "has -1"),
        (json!({ "prompt": vec![23; 128] }), "prompt", "--context"),
        (json!({ "prompt": "7".repeat(2_000_000) }), "prompt", "has 2000000 bytes, more than 128 tokens can be"),
        (json!({ "prompt": vec!["7="; 129] }), "prompt", "at most 128"),
        (json!({ "prompt": vec!["7="; 65], "n": 2 }), "n", "at most 128 answers"),
        (json!({ "echo": true }), "echo", "not supported"),
        (json!({ "suffix": "x" }), "suffix", "not supported"),
        (json!({ "best_of": 2 }), "best_of", "not supported"),
        (json!({ "logprobs": 6 }), "logprobs", "from 0 to 5"),
        (json!({ "logprobs": true }), "logprobs", "whole number"),
        (json!({ "messages": turns }), "messages", "not known"),
    ] {
        refused("/v1/completions", fields, param, part);
    }
    let message = |message: Value| json!({ "messages": [message] });
    for (fields, param, part) in [
        (json!({ "messages": null }), "messages", "is missing"),
        (json!({ "messages": [] }), "messages", "is empty"),
        (json!({ "messages": "hello" }), "messages", "give a list"),
        (json!({ "messages": ["hello"] }), "messages[0]", "give an object"),
        (message(json!({ "content": "x" })), "messages[0].role", "is missing"),
        (message(json!({ "role": "tool", "content": "x" })), "messages[0].role", "there are system"),
        (message(json!({ "role": "user" })), "messages[0].content", "is missing"),
        (message(json!({ "role": "user", "content": 1 })), "messages[0].content", "give a text"),
        (
            message(json!({ "role": "user", "content": [{ "type": "image_url" }] })),
            "messages[0].content[0].type",
            "image_url",
        ),
        (message(json!({ "role": "user", "content": "x", "name": "me" })), "messages[0].name", "not supported"),
        (message(json!({ "role": "user", "content": "x", "odd": 1 })), "messages[0].odd", "not known"),
        (message(json!({ "role": "user", "content": "7".repeat(200) })), "messages", "--context"),
        (message(json!({ "role": "user", "content": "7".repeat(200_000) })), "messages", "has 200000 bytes"),
        (json!({ "tools": [{ "type": "function" }] }), "tools", "not supported"),
        (json!({ "functions": [{}] }), "functions", "not supported"),
        (json!({ "tool_choice": "required" }), "tool_choice", "not supported"),
        (json!({ "response_format": { "type": "json_object" } }), "response_format", "not supported"),
        (json!({ "modalities": ["audio"] }), "modalities", "not supported"),
        (json!({ "logprobs": 2 }), "logprobs", "true or false"),
        (json!({ "top_logprobs": 2 }), "top_logprobs", "takes logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs", "from 0 to 20"),
        (json!({ "max_tokens": 3, "max_completion_tokens": 4 }), "max_tokens", "give one of them"),
        (json!({ "max_completion_tokens": 0 }), "max_completion_tokens", "from 1"),
        (json!({ "chat_template_kwargs": { "odd": 1 } }), "chat_template_kwargs.odd", "not known"),
        (json!({ "prompt": "x" }), "prompt", "not known"),
    ] {
        refused("/v1/chat/completions", fields, param, part);
    }
    // What asks for nothing is no reason to refuse.
    let harmless = json!({
        "messages": turns, "tools": [], "tool_choice": "none", "response_format": { "type": "text" }, "logit_bias": {},
        "frequency_penalty": 0, "seed": -3, "user": "me", "service_tier": "auto", "max_tokens": 3, "max_completion_tokens": 3,
    });
    assert_eq!(server.post("/v1/chat/completions", &harmless).status, 200);
    assert_eq!(server.figure("requests_ended_total"), 1);
}

#[test]
fn a_model_a_path_a_method_or_a_body_that_is_not_known_is_refused() {
    let refuses = chat_model("{{ raise_exception('no such role') }}");
    let server = Server::start(refuses.path(), &["--body-limit", "100kB"]);
    let turns = json!([{ "role": "user", "content": "7" }]);
    let other = server.post("/v1/completions", &json!({ "prompt": "7=", "model": "gpt-4" }));
    assert_refused(&other, 404, Some("model"), "\"gpt-4\"");
    assert_eq!(other.json()["error"]["code"], "model_not_found");
    assert_refused(&server.get("/v1/models/gpt%2F4"), 404, Some("model"), "\"gpt/4\"");
    let said = server.post("/v1/chat/completions", &json!({ "messages": turns }));
    assert_refused(&said, 400, Some("messages"), "no such role");
    assert_refused(&server.get("/v1/embeddings"), 404, None, "there is no /v1/embeddings");
    assert_refused(&server.get("/v1/completions"), 405, None, "POST");
    assert_refused(&server.ask("POST", "/v1/models", &[], ""), 405, None, "GET");
    assert_refused(&server.ask("POST", "/v1/completions", &[], "{\"prompt\": "), 400, Some("body"), "JSON");
    assert_refused(&server.ask("POST", "/v1/completions", &[], "[]"), 400, Some("body"), "object");
    let deep = "[".repeat(90_000);
    assert_refused(&server.ask("POST", "/v1/completions", &[], &deep), 400, Some("body"), "JSON");
    let plain = server.ask("POST", "/v1/completions", &[("Content-Type", "text/plain")], "{\"prompt\": \"7=\"}");
    assert_refused(&plain, 415, None, "application/json");
    let long = json!({ "prompt": "7".repeat(100_000) }).to_string();
    assert_refused(&server.ask("POST", "/v1/completions", &[], &long), 413, None, "--body-limit");
    let unannounced = format!("{:x}\r\n{long}\r\n0\r\n\r\n", long.len());
    let chunked = [("Transfer-Encoding", "chunked"), ("Content-Length", "")];
    let head = request("POST", "/v1/completions", &chunked, "").replace("Content-Length: \r\n", "");
    let mut stream = server.connect();
    stream.write_all((head + &unannounced).as_bytes()).unwrap();
    assert_refused(&Reply::read(stream), 413, None, "--body-limit");
    let no_template = Server::start(&speller(), &[]);
    let told = no_template.post("/v1/chat/completions", &json!({ "messages": turns }));
    assert_refused(&told, 400, Some("messages"), "/v1/completions");
    let costly = format!("{{\"prompt\": [{}0]}}", "{\"\":0},".repeat(200_000));
    assert_refused(&no_template.ask("POST", "/v1/completions", &[], &costly), 413, None, "to read the request takes");
}

#[test]
fn escaped_text_counts_by_its_bytes_and_what_is_too_long_is_told_as_such() {
    let server = Server::start(&speller(), &["--body-limit", "1MB"]);
    for (character, times) in [("\u{430}", 160_000), ("\u{4e2d}", 160_000), ("\u{1f600}", 80_000)] {
        let units: String = character.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        let body = format!("{{\"prompt\": \"{}\"}}", units.repeat(times));
        let reply = server.ask("POST", "/v1/completions", &[], &body);
        assert_refused(&reply, 400, Some("prompt"), &format!("has {} bytes, more than", character.len() * times));
        assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    }
    // What is left aside is not cut into tokens.
    let padded = json!({ "prompt": "4096=", "max_tokens": 5, "temperature": 0, "user": "x".repeat(900_000) });
    assert_eq!(server.completed(&padded), " four thousand ninety-six");
}

#[test]
fn a_request_that_can_never_fit_is_refused_before_it_is_answered() {
    let model = endless();
    let server = Server::start(model.path(), &["--context", "20000", "--ram", "2GB"]);
    let mut asked = json!({ "prompt": "7=", "n": 128 });
    for (fields, param) in [
        (json!({ "max_tokens": 1_000_000 }), "n"),
        (json!({ "max_tokens": 15_000, "n": 4, "logprobs": 5 }), "logprobs"),
    ] {
        asked.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_refused(&server.post("/v1/completions", &asked), 400, Some(param), "or stream");
    }
    assert_eq!(server.figure("requests_ended_total"), 0);
    asked["stream"] = true.into();
    let stream = server.send("/v1/completions", &asked);
    server.wait_for("requests_running", 4);
    drop(stream);
}

#[test]
fn a_key_is_asked_for_and_other_sites_names_are_not_answered() {
    for from_environment in [false, true] {
        let mut command = program("serve");
        command.args(["--device", "cpu", "--no-probe", "--port", "0"]);
        match from_environment {
            true => command.env("LAYER_STREAMER_API_KEY", "sesame"),
            false => command.env("LAYER_STREAMER_API_KEY", "another").args(["--api-key", "sesame"]),
        };
        let server = Server::run(&mut command);
        let asked = |path: &str, key: &str| server.ask("GET", path, &[("Authorization", key)], "");
        for path in ["/v1/models", "/metrics", "/nowhere"] {
            for wrong in ["", "Bearer sesam", "Bearer another", "sesame"] {
                assert_refused(&asked(path, wrong), 401, None, "Authorization: Bearer");
            }
        }
        assert_eq!(asked("/v1/models", "Bearer sesame").status, 200);
        assert_eq!([server.get("/health").status, server.get("/").status], [200, 200]);
        let posted = server.post("/v1/completions", &json!({ "prompt": "7=" }));
        assert_refused(&posted, 401, None, "API key");
    }
    let server = Server::start(&speller(), &[]);
    let of_host = |host: &str| server.ask("GET", "/v1/models", &[("Host", host)], "");
    assert_refused(&of_host("evil.example:80"), 403, None, "--api-key");
    assert_eq!([of_host("127.0.0.1:1").status, of_host("localhost").status], [200, 200]);
}

#[test]
fn a_head_that_is_too_long_is_refused_and_ends_its_own_connection() {
    let server = Server::start(&speller(), &[]);
    let limit = 16 << 10;
    let asked = |length: usize, connection: &str| {
        let headers = |padding| [("Connection", connection), ("X-Padding", padding)];
        let bare = request("GET", "/v1/models", &headers(""), "").len();
        server.ask("GET", "/v1/models", &headers(&"x".repeat(length - bare)), "")
    };
    assert_eq!(asked(limit, "close").status, 200);
    for length in [limit + 1, 2 * limit, 100 * limit] {
        // It is the server that closes, and says so.
        let reply = asked(length, "keep-alive");
        assert_eq!((reply.status, reply.headers["connection"].as_str()), (431, "close"), "{length} bytes");
        assert_eq!((reply.headers["content-length"].as_str(), reply.text().as_str()), ("0", ""));
    }
    // One that has not come whole by now, and never will.
    let mut stream = server.connect();
    stream.write_all(format!("GET /v1/models HTTP/1.1\r\nX-Padding: {}", "x".repeat(limit)).as_bytes()).unwrap();
    assert_eq!(Reply::read(stream).status, 431);
    // The request itself has four.
    let many = |count: usize| server.ask("GET", "/v1/models", &vec![("X-Padding", "x"); count - 4], "").status;
    assert_eq!([many(100), many(101)], [200, 431]);
    server.wait_for("connections", 1);
}

#[test]
fn a_request_that_comes_too_slowly_is_ended() {
    let server = Server::start(&speller(), &["--patience", "1"]);
    let begun = Instant::now();
    let mut silent = server.connect();
    let mut half = server.connect();
    half.write_all(&request("POST", "/v1/completions", &[("Content-Length", "100")], "{\"prompt\"").into_bytes())
        .unwrap();
    assert_refused(&Reply::read(half), 408, None, "within 1 s");
    let mut nothing = Vec::new();
    let _ = std::io::Read::read_to_end(&mut silent, &mut nothing);
    assert!(begun.elapsed() < Duration::from_secs(30));
    server.wait_for("connections", 1);
}

#[test]
fn what_it_cannot_begin_with_is_told_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let bare = copy_of(&speller());
    fs::remove_file(bare.path().join("tokenizer.json")).unwrap();
    let folder = bare.path().to_str().unwrap();
    for (options, part) in [
        (&["--port", &port][..], "give another --port"),
        (&["--host", "no-such-host.invalid", "--port", "0"], "--host"),
        (&["--port", "0", "--api-key", ""], "at least one character"),
        (&["--port", "0", "--model", folder], "no tokenizer.json"),
        (&["--port", "0", "--sequences", "0"], "from 1 on"),
        (&["--port", "0", "--body-limit", "auto"], "--body-limit"),
    ] {
        let done = program("serve").args(["--device", "cpu", "--no-probe"]).args(options).output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(part), "{options:?}: {said}");
    }
}
