//! What a line of the input asks for, in either form.

use serde_json::{Map, Value};

use crate::openai::{Ask, Endpoint, Fields, Prompt};

/// A line that was understood, or why it was not.
#[derive(Debug, PartialEq)]
pub struct Line {
    pub form: Form,
    /// By which whoever wrote the line knows it again: a text, a number or null.
    pub id: Value,
    pub ask: Result<Ask, String>,
}

/// In which form a line is written, and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `{"id", "prompt" | "prompt_ids" | "messages", …}`.
    Plain,
    /// `{"custom_id", "method", "url", "body"}` of OpenAI's batches; the endpoint, if it is known.
    OpenAi(Option<Endpoint>),
}

impl Line {
    pub fn parse(bytes: &[u8]) -> Self {
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let object = match serde_json::from_slice(bytes) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return Self::bad("is no JSON object; give {\"id\": …, \"prompt\": …}".into()),
            Err(error) => return Self::bad(format!("is no JSON: {}", without_line(&error))),
        };
        if ["custom_id", "method", "url", "body"].iter().any(|name| object.contains_key(*name)) {
            openai(object)
        } else {
            plain(object)
        }
    }

    /// A line without a form of its own.
    pub fn bad(why: String) -> Self {
        Self { form: Form::Plain, id: Value::Null, ask: Err(why) }
    }
}

/// The line's number is not that of the file, so the column will do.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.replace(" at line 1 column ", " at column ")
}

fn openai(object: Map<String, Value>) -> Line {
    let id = object.get("custom_id").filter(|id| id.is_string()).cloned().unwrap_or(Value::Null);
    let endpoint = object.get("url").and_then(Value::as_str).and_then(Endpoint::of);
    let ask = || {
        let mut fields = Fields::new(object);
        fields.text("custom_id")?.ok_or("custom_id: is missing; give a text by which the answer is known")?;
        match fields.text("method")?.as_deref() {
            Some("POST") => {}
            other => return Err(format!("method: is {}, must be POST", other.unwrap_or("missing"))),
        }
        let url = fields.text("url")?.ok_or("url: is missing")?;
        let known = Endpoint::ALL.map(Endpoint::url).join(" or ");
        let endpoint = endpoint.ok_or(format!("url: {url} is not supported, must be {known}"))?;
        let body = fields.object("body")?.ok_or("body: is missing")?;
        fields.end()?;
        endpoint.parse(body)
    };
    Line { form: Form::OpenAi(endpoint), id, ask: ask() }
}

fn plain(object: Map<String, Value>) -> Line {
    let id = object.get("id").filter(|id| id.is_string() || id.is_number()).cloned().unwrap_or(Value::Null);
    Line { form: Form::Plain, id, ask: plain_ask(Fields::new(object)) }
}

fn plain_ask(mut fields: Fields) -> Result<Ask, String> {
    match fields.take("id") {
        None | Some(Value::String(_) | Value::Number(_)) => {}
        Some(_) => return Err("id: must be a text or a number".into()),
    }
    let given = ["prompt", "prompt_ids", "messages"].into_iter().filter(|name| fields.has(name)).collect::<Vec<_>>();
    if given.len() > 1 {
        return Err(format!("{}: and {} are given both; leave one out", given[0], given[1]));
    }
    let (prompt, ids) = (fields.text("prompt")?, fields.ids("prompt_ids")?);
    let turns = fields.take("messages").map(|turns| crate::openai::messages(&turns)).transpose()?;
    let prompt = match (prompt, ids, turns) {
        (Some(text), ..) => Prompt::Turn(text),
        (_, Some(ids), _) => Prompt::Ids(ids),
        (.., Some(turns)) => Prompt::Messages(turns),
        _ => {
            // Whoever misspelt it is told so.
            fields.ignore(&["max_new_tokens", "stop"]);
            let _ = fields.sampling();
            fields.end()?;
            return Err("prompt: is missing; give a text, or prompt_ids or messages in its place".into());
        }
    };
    let most = fields.size("max_new_tokens")?;
    if most == Some(0) {
        return Err("max_new_tokens: is 0; ask for at least one token".into());
    }
    let (stop, sampling) = (fields.stops()?, fields.sampling()?);
    fields.end()?;
    Ok(Ask { prompt, most, stop, sampling, model: None })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{sampling::SamplingOptions, text::Message};

    fn parse(line: &Value) -> Line {
        Line::parse(line.to_string().as_bytes())
    }

    #[test]
    fn a_plain_line_has_one_prompt_in_one_of_three_ways_and_what_generate_takes() {
        let turns = json!([{ "role": "user", "content": "a" }]);
        for (name, value, expected) in [
            ("prompt", json!("a"), Prompt::Turn("a".into())),
            ("prompt_ids", json!([7, 8]), Prompt::Ids(vec![7, 8])),
            ("messages", turns, Prompt::Messages(vec![Message::new("user", "a")])),
        ] {
            let found = parse(
                &json!({ "id": 5, name: value, "max_new_tokens": 3, "stop": ["x", "y"], "top_k": 4, "seed": null }),
            );
            let sampling = SamplingOptions { top_k: Some(4), ..Default::default() };
            let stop = Some(vec!["x".into(), "y".into()]);
            let ask = Ok(Ask { prompt: expected, most: Some(3), stop, sampling, model: None });
            assert_eq!(found, Line { form: Form::Plain, id: json!(5), ask });
        }
    }

    #[test]
    fn a_line_of_openais_batches_is_known_by_any_of_its_fields() {
        let body = json!({ "model": "m", "prompt": "a", "max_tokens": 3 });
        let line = parse(&json!({ "custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body }));
        assert_eq!((line.form, &line.id), (Form::OpenAi(Some(Endpoint::Completions)), &json!("x")));
        let ask = line.ask.unwrap();
        assert_eq!((ask.prompt, ask.most, ask.model.as_deref()), (Prompt::Text("a".into()), Some(3), Some("m")));
        let whole = json!({ "custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body });
        for (name, value, said) in [
            ("custom_id", json!(null), "custom_id: is missing"),
            ("custom_id", json!(5), "custom_id: is 5, must be a text"),
            ("method", json!("GET"), "method: is GET, must be POST"),
            ("url", json!("/v1/embeddings"), "url: /v1/embeddings is not supported"),
            ("body", json!([]), "body: is [], must be an object"),
            ("body", json!({}), "prompt: is missing"),
            ("more", json!(1), "more: is not known here"),
        ] {
            let mut line = whole.clone();
            line[name] = value;
            let found = parse(&line);
            assert!(matches!(found.form, Form::OpenAi(_)), "{line}");
            let why = found.ask.unwrap_err();
            assert!(why.starts_with(said), "{line}: {why}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name_and_keeps_its_id() {
        for (line, said) in [
            (r#"{"id": "a", "prompt": "b", "max_tokens": 3}"#, "max_tokens: is not known here; known are id, "),
            (r#"{"id": "a", "promt": "b"}"#, "promt: is not known here"),
            (r#"{"id": "a"}"#, "prompt: is missing"),
            (r#"{"id": "a", "prompt": 5}"#, "prompt: is 5, must be a text"),
            (r#"{"id": "a", "prompt": "b", "prompt_ids": [1]}"#, "prompt: and prompt_ids are given both"),
            (r#"{"id": "a", "prompt_ids": [1.5]}"#, "prompt_ids: is [1.5], must be a list of token ids"),
            (r#"{"id": "a", "prompt": "b", "max_new_tokens": 0}"#, "max_new_tokens: is 0"),
            (r#"{"id": "a", "prompt": "b", "stop": ""}"#, "stop: has an empty text"),
            (r#"{"id": "a", "prompt": "b", "seed": -1}"#, "seed: is -1, must be a whole number"),
        ] {
            let found = Line::parse(line.as_bytes());
            let why = found.ask.unwrap_err();
            assert!(why.starts_with(said) && found.id == json!("a"), "{line}: {why}");
        }
        for (line, said) in [
            ("[1]", "is no JSON object"),
            ("{\"id\": ", "is no JSON: EOF while parsing a value at column 7"),
            ("{\"prompt\": \"\u{1}\"}", "is no JSON: "),
            (r#"{"id": [], "prompt": "b"}"#, "id: must be a text or a number"),
        ] {
            let found = Line::parse(line.as_bytes());
            let why = found.ask.unwrap_err();
            assert!(why.starts_with(said) && found.id.is_null(), "{line}: {why}");
        }
        assert!(Line::parse(b"{\"prompt\": \"\xff\"}").ask.unwrap_err().starts_with("is no JSON: "));
        assert!(Line::parse("\u{feff}{\"prompt\": \"a\"}".as_bytes()).ask.is_ok());
    }
}
