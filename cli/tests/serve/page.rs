//! The page at `/`, without a browser: the server has all paths and fields of which its script makes use.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    models::{TEMPLATE, chat_model},
    server::Server,
};

fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("the page has no {from}"));
    rest.split_once(to).unwrap_or_else(|| panic!("the page has no {to} after {from}")).0
}

/// What is quoted and begins with this.
fn quoted<'a>(text: &'a str, beginning: &str) -> BTreeSet<&'a str> {
    text.split('"').skip(1).step_by(2).filter(|text| text.starts_with(beginning)).collect()
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_'
}

/// What is read of `of`, as JSON pointers: of `event.choices[0]?.text` it is `/choices/0/text`.
fn read_of(text: &str, of: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(of) {
        if text[..at].ends_with(is_name) {
            continue;
        }
        let (mut rest, mut pointer) = (&text[at + of.len()..], String::new());
        loop {
            rest = rest.strip_prefix('?').unwrap_or(rest);
            let Some(part) = rest.strip_prefix(['.', '[']) else { break };
            let end = part.find(|character| !is_name(character)).unwrap_or(part.len());
            pointer += &format!("/{}", &part[..end]);
            rest = part[end..].strip_prefix(']').unwrap_or(&part[end..]);
        }
        found.insert(pointer);
    }
    found.remove("");
    assert!(!found.is_empty(), "nothing of {of} is read");
    found
}

/// Names of fields in a piece of script: `name: …`, and `asked.name = …`.
fn fields_of(script: &str) -> BTreeSet<String> {
    let before_colon = script.split(':').filter_map(|text| text.rsplit(|character| !is_name(character)).next());
    let assigned = script.split("asked.").skip(1).filter_map(|text| text.split_once(" =").map(|(name, _)| name));
    before_colon.chain(assigned).filter(|name| !name.is_empty()).map(Into::into).collect()
}

/// All names of fields in a request.
fn keys(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            into.insert(name.clone());
            keys(value, into);
        }),
        Value::Array(values) => values.iter().for_each(|value| keys(value, into)),
        _ => {}
    }
}

#[test]
fn the_server_has_every_path_and_field_that_the_page_uses() {
    let model = chat_model(TEMPLATE);
    let server = Server::start(model.path(), &[]);
    let page = server.get("/").text();
    let script = between(&page, "<script>", "</script>");
    let [meets, requests, asks] = [("function meet()", "\n}"), ("function request(", "\n}"), ("function ask(", "\n}")]
        .map(|(from, to)| between(script, from, to));

    // What it asks.
    let usual = json!({
        "stream": true, "stream_options": { "include_usage": true }, "max_tokens": 2, "temperature": 0.0, "seed": 5,
    });
    let with = |name: &str, value: Value| {
        let mut body = usual.clone();
        body[name] = value;
        body
    };
    let turns = json!([{ "role": "system", "content": "" }, { "role": "user", "content": "4096" }]);
    let chat = ("/v1/chat/completions", with("messages", turns));
    let completion = ("/v1/completions", with("prompt", json!("4096=")));
    let mut sent = BTreeSet::new();
    [&chat, &completion].iter().for_each(|(_, body)| keys(body, &mut sent));
    assert_eq!(fields_of(requests), sent, "the page sends other fields than this test does");
    assert_eq!(quoted(requests, "/"), BTreeSet::from([chat.0, completion.0]));
    assert_eq!(quoted(script, "/"), BTreeSet::from([chat.0, completion.0, "/v1/models"]));

    // What it reads of the answers.
    let models = server.get("/v1/models").json();
    let refused = server.get("/v1/nowhere").json();
    let found = |answers: &[Value], pointer: &str| answers.iter().any(|answer| answer.pointer(pointer).is_some());
    let all_found = |answers: &[Value], pointers: BTreeSet<String>| {
        pointers.iter().for_each(|pointer| assert!(found(answers, pointer), "no {pointer} in {answers:?}"));
    };
    all_found(&[models.clone(), refused.clone()], read_of(script, "response.json())"));
    all_found(&[models["data"][0].clone()], read_of(meets, "model"));
    let mut events = Vec::new();
    for (path, body) in [chat, completion] {
        let reply = server.post(path, &body);
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        events.extend(reply.events());
    }
    let choices: Vec<_> = events.iter().map(|event| event["choices"][0].clone()).collect();
    assert!(choices.iter().any(|choice| choice["finish_reason"] == "length") && asks.contains("\"length\""));
    all_found(&choices, read_of(asks, "choice"));
    events.push(refused);
    all_found(&events, read_of(asks, "event"));
}

#[test]
fn the_page_has_every_element_that_its_script_asks_for() {
    let server = Server::start(&support::speller(), &[]);
    let page = server.get("/").text();
    let script = between(&page, "<script>", "</script>");
    let asked: BTreeSet<_> = script.split("at(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let listed = between(script, "const [log,", ".map(at)");
    for id in asked.into_iter().chain(quoted(listed, "")) {
        assert!(page.contains(&format!("id=\"{id}\"")), "there is no {id}");
    }
}
