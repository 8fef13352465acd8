//! What is answered.

use std::thread;

use serde_json::{Value, json};
use support::speller;

use crate::{
    models::{TEMPLATE, chat_model, endless},
    server::Server,
};

const COMPLETIONS: &str = "/v1/completions";
const CHATS: &str = "/v1/chat/completions";
const ANSWER: &str = " four thousand ninety-six";

/// A request with other fields.
fn with(mut body: Value, fields: Value) -> Value {
    let Value::Object(fields) = fields else { panic!("fields are an object") };
    body.as_object_mut().unwrap().extend(fields);
    body
}

fn asked(prompt: impl Into<Value>) -> Value {
    json!({ "prompt": prompt.into(), "temperature": 0 })
}

fn turn(content: impl Into<Value>) -> Value {
    json!({ "messages": [{ "role": "user", "content": content.into() }], "temperature": 0 })
}

#[test]
fn every_path_answers() {
    let server = Server::start(&speller(), &["--sequences", "3"]);
    let page = server.get("/");
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, "text/html; charset=utf-8"));
    let text = page.text();
    // The page brings all that it needs.
    assert!(text.contains("/v1/chat/completions") && !text.contains("http://") && !text.contains("https://"), "{text}");
    assert_eq!(server.get("/health").json(), json!({ "status": "ok" }));
    let models = server.get("/v1/models").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("speller")));
    assert_eq!(server.get("/v1/models/speller").json(), models["data"][0]);
    assert_eq!(server.completed(&asked("4096=")), ANSWER);
    assert_eq!([server.figure("requests_ended_total"), server.figure("new_tokens_total")], [1, 5]);
    let figures = server.get("/metrics").text();
    let counted = "layer_streamer_http_requests_total{path=\"/v1/completions\",status=\"200\"} 1";
    assert!(figures.lines().any(|line| line == counted), "{figures}");
}

#[test]
fn it_says_what_memory_it_takes_where_it_listens_and_how_to_try_it() {
    let mut command = crate::common::program("serve");
    let command =
        command.args(["--device", "cpu", "--no-probe", "--port", "0", "--sequences", "3", "--context", "100"]);
    let server = Server::run(command);
    let address = server.address;
    assert!(address.ip().is_loopback());
    assert!(server.expect("curl").contains(&format!("curl http://{address}/v1/completions")));
    // A prompt may have as many tokens as the context, less one for its answer.
    let most = asked(vec![23; 99]);
    assert_eq!(server.post(COMPLETIONS, &most).status, 200);
    assert_eq!(server.post(COMPLETIONS, &asked(vec![23; 100])).status, 400);
    let planned = crate::common::program("serve").arg("--help").output().unwrap();
    assert!(String::from_utf8(planned.stdout).unwrap().contains("--sequences <N>"));
}

#[test]
fn a_prompt_is_continued_in_the_form_of_openai() {
    let server = Server::start(&speller(), &[]);
    let reply =
        server.post(COMPLETIONS, &with(asked("4096="), json!({ "user": "me", "metadata": {}, "store": false })));
    assert_eq!((reply.status, reply.headers["content-type"].as_str()), (200, "application/json"));
    let answer = reply.json();
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-") && answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("speller")));
    let choice = json!({ "text": ANSWER, "index": 0, "logprobs": null, "finish_reason": "stop" });
    assert_eq!(answer["choices"], json!([choice]));
    let usage = json!({ "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10 });
    assert_eq!(answer["usage"], usage);
    let short = server.post(COMPLETIONS, &with(asked("4096="), json!({ "max_tokens": 2 }))).json();
    assert_eq!(short["choices"][0]["text"], " four thousand");
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    // `7=`, as tokens and in lists; and the model by its name.
    for (prompt, texts) in [
        (json!([23, 29]), &[" seven"][..]),
        (json!(["7=", "4096="]), &[" seven", ANSWER]),
        (json!([[23, 29], [24, 29]]), &[" seven", " eight"]),
    ] {
        let answer = server.post(COMPLETIONS, &with(asked(prompt), json!({ "model": "speller" }))).json();
        let choices = answer["choices"].as_array().unwrap();
        let found: Vec<_> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(found, texts, "{answer}");
        assert!(choices.iter().enumerate().all(|(number, choice)| choice["index"] == number));
    }
}

#[test]
fn a_chat_is_answered_by_the_model_s_template() {
    let model = chat_model(TEMPLATE);
    let server = Server::start(model.path(), &["--name", "numbers"]);
    let answer = server.post(CHATS, &turn("4096")).json();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("numbers")));
    let message = json!({ "role": "assistant", "content": ANSWER, "refusal": null });
    let choice = json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": "stop" });
    assert_eq!(answer["choices"], json!([choice]));
    assert_eq!(answer["usage"]["prompt_tokens"], 5, "no token is put around a turn");
    let content = |body: &Value| server.post(CHATS, body).json()["choices"][0]["message"]["content"].clone();
    let parts = json!([{ "type": "text", "text": "40" }, { "type": "text", "text": "96" }]);
    assert_eq!(content(&turn(parts)), ANSWER);
    for role in ["system", "developer"] {
        let turns = json!([{ "role": role, "content": "40" }, { "role": "user", "content": "96" }]);
        assert_eq!(content(&with(turn(""), json!({ "messages": turns }))), ANSWER);
    }
    let turns = json!([
        { "role": "user", "content": "4096" }, { "role": "assistant", "content": ANSWER, "refusal": null },
        { "role": "user", "content": "7" },
    ]);
    let told = server.completed(&asked(format!("4096={ANSWER}<|endoftext|>7=")));
    assert_eq!(content(&with(turn(""), json!({ "messages": turns }))), told);
    for name in ["max_tokens", "max_completion_tokens"] {
        assert_eq!(content(&with(turn("4096"), json!({ name: 2 }))), " four thousand");
    }
    let thinks = chat_model("{{ '7=' if enable_thinking else '8=' }}");
    let server = Server::start(thinks.path(), &[]);
    for (thinking, text) in [(true, " seven"), (false, " eight")] {
        let body = with(turn(""), json!({ "chat_template_kwargs": { "enable_thinking": thinking } }));
        assert_eq!(server.post(CHATS, &body).json()["choices"][0]["message"]["content"], text);
    }
}

#[test]
fn a_stream_gives_the_same_piece_by_piece_and_then_the_numbers_of_tokens() {
    let model = chat_model(TEMPLATE);
    let server = Server::start(model.path(), &[]);
    let streamed = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let reply = server.post(COMPLETIONS, &with(asked("4096="), streamed.clone()));
    assert_eq!((reply.status, reply.headers["content-type"].as_str()), (200, "text/event-stream"));
    let mut events = reply.events();
    let usage = json!({ "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10 });
    let last = events.pop().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
    assert!(events.len() >= 5, "{events:?}");
    assert!(events.iter().all(|event| event["id"] == last["id"] && event["usage"].is_null()));
    let text = |event: &Value| event["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(events.iter().map(text).collect::<String>(), ANSWER);
    let ends: Vec<_> = events.iter().filter(|event| !event["choices"][0]["finish_reason"].is_null()).collect();
    assert!(matches!(ends[..], [end] if end["choices"][0]["finish_reason"] == "stop" && end == events.last().unwrap()));

    let events = server.post(CHATS, &with(turn("4096"), json!({ "stream": true, "max_tokens": 2 }))).events();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event.get("usage").is_none()));
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "", "refusal": null }));
    let said = |event: &Value| event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
    assert_eq!(events.iter().map(said).collect::<String>(), " four thousand");
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
}

#[test]
fn nothing_of_a_stop_text_is_told_however_it_lies_across_tokens() {
    let server = Server::start(&speller(), &[]);
    // The tokens are ` four`, ` thousand`, ` ninety`, `-` and `six`.
    for (stop, text, tokens) in [
        (json!("sand nine"), " four thou", &[" four"][..]),
        (json!(["never", "y-s"]), " four thousand ninet", &[" four", " thousand"]),
        (json!(" four"), "", &[]),
        (json!(["ninety", "thousand", "six", "-"]), " four ", &[" four"]),
        (json!("ninety-seven"), ANSWER, &[" four", " thousand", " ninety", "-", "six"]),
        (json!([]), ANSWER, &[" four", " thousand", " ninety", "-", "six"]),
    ] {
        let body = with(asked("4096="), json!({ "stop": stop, "logprobs": 0 }));
        let choice = server.post(COMPLETIONS, &body).json()["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("stop")), "{stop}");
        assert_eq!(choice["logprobs"]["tokens"], json!(tokens), "{stop}");
        let events = server.post(COMPLETIONS, &with(body, json!({ "stream": true }))).events();
        let (mut streamed, mut named) = (String::new(), Vec::new());
        for event in &events {
            streamed += event["choices"][0]["text"].as_str().unwrap();
            assert!(text.starts_with(&streamed), "{stop}: {events:?}");
            named.extend(event["choices"][0]["logprobs"]["tokens"].as_array().into_iter().flatten().cloned());
        }
        assert_eq!((streamed.as_str(), named), (text, tokens.iter().map(|token| json!(token)).collect()), "{stop}");
    }
}

#[test]
fn a_seed_gives_the_same_text_again_alone_and_in_company() {
    let model = endless();
    let server = Server::start(model.path(), &["--sequences", "7", "--context", "64"]);
    let drawn = |seed: u64| json!({ "prompt": "4096=", "temperature": 1.9, "seed": seed, "max_tokens": 24 });
    let alone: Vec<_> = (0..21).map(|seed| server.completed(&drawn(seed))).collect();
    let passes = server.figure("passes_total");
    assert_eq!(server.completed(&drawn(3)), alone[3]);
    let together: Vec<_> = thread::scope(|scope| {
        let server = &server;
        let asking: Vec<_> = (0..21).map(|seed| scope.spawn(move || server.completed(&drawn(seed)))).collect();
        asking.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
    // They did share passes.
    assert!(server.figure("passes_total") < 2 * passes, "{passes}");
    assert!(alone.iter().any(|text| *text != alone[0]), "{alone:?}");
    let unseeded = |number: u64| server.completed(&with(drawn(number), json!({ "seed": null })));
    assert!((0..8).map(unseeded).any(|text| text != alone[0]));
}

#[test]
fn several_answers_differ_and_the_first_is_the_one_that_a_single_one_is() {
    let model = endless();
    let server = Server::start(model.path(), &["--context", "64"]);
    let drawn =
        |n: usize| json!({ "prompt": ["4096=", "7="], "temperature": 1.9, "seed": 5, "n": n, "max_tokens": 24 });
    let texts = |n: usize| -> Vec<Value> {
        let answer = server.post(COMPLETIONS, &drawn(n)).json();
        assert_eq!(answer["usage"]["prompt_tokens"], 7, "{answer}");
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect()
    };
    let (one, six) = (texts(1), texts(6));
    assert_eq!((one.len(), six.len()), (2, 12));
    assert_eq!([&one[0], &one[1]], [&six[0], &six[6]]);
    assert!(six[1..6].iter().any(|text| *text != six[0]), "{six:?}");
    let mut streamed = vec![String::new(); 12];
    for event in server.post(COMPLETIONS, &with(drawn(6), json!({ "stream": true }))).events() {
        let choice = &event["choices"][0];
        streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed.into_iter().map(Value::from).collect::<Vec<_>>(), six);
}

#[test]
fn probabilities_come_in_both_forms() {
    let model = chat_model(TEMPLATE);
    let server = Server::start(model.path(), &[]);
    let of = server.post(COMPLETIONS, &with(asked("4096="), json!({ "logprobs": 2 }))).json()["choices"][0]["logprobs"]
        .clone();
    assert_eq!(of["tokens"], json!([" four", " thousand", " ninety", "-", "six"]));
    assert_eq!(of["text_offset"], json!([0, 5, 14, 21, 22]));
    for (number, top) in of["top_logprobs"].as_array().unwrap().iter().enumerate() {
        let (token, chosen) = (of["tokens"][number].as_str().unwrap(), of["token_logprobs"][number].as_f64().unwrap());
        let values: Vec<f64> = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).collect();
        // The most likely token is the one that was taken.
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!(values.len() == 2 && top[token] == chosen && chosen == largest && chosen < 0.0, "{top}");
        assert!(values.iter().map(|value| value.exp()).sum::<f64>() <= 1.0 + 1e-5);
    }
    let body = with(turn("4096"), json!({ "logprobs": true, "top_logprobs": 3 }));
    let content = server.post(CHATS, &body).json()["choices"][0]["logprobs"]["content"].clone();
    assert_eq!((content.as_array().unwrap().len(), &content[0]["token"]), (5, &json!(" four")));
    assert_eq!(content[0]["bytes"], json!(" four".as_bytes()));
    assert_eq!(content[1]["logprob"], of["token_logprobs"][1]);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(content[0]["top_logprobs"][0]["token"], " four");
    let plain = server.post(CHATS, &with(turn("4096"), json!({ "logprobs": true }))).json();
    assert_eq!(plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    let events = server.post(CHATS, &with(body, json!({ "stream": true }))).events();
    let streamed = events.iter().flat_map(|event| event["choices"][0]["logprobs"]["content"].as_array().cloned());
    assert_eq!(streamed.flatten().collect::<Value>(), content);
}

#[test]
fn what_a_request_leaves_out_is_what_the_model_s_makers_suggest() {
    let model = endless();
    let suggested = json!({ "do_sample": true, "temperature": 1.9, "top_k": 1 });
    std::fs::write(model.path().join("generation_config.json"), suggested.to_string()).unwrap();
    let server = Server::start(model.path(), &["--max-new-tokens", "24", "--context", "64"]);
    let text = |fields: Value| server.completed(&with(json!({ "prompt": "4096=", "max_tokens": 30 }), fields));
    let greedy = text(json!({ "temperature": 0 }));
    assert!((0..6).all(|seed| text(json!({ "seed": seed })) == greedy));
    assert!((0..6).any(|seed| text(json!({ "seed": seed, "top_k": 0 })) != greedy));
    let tokens = server.post(COMPLETIONS, &with(asked("4096="), json!({ "max_tokens": 30 }))).json();
    assert_eq!(tokens["usage"]["completion_tokens"], 24, "no answer is longer than the server allows");
}
