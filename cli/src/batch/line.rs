//! What a line of the input asks for, in either form.

use serde_json::{Map, Value};

use crate::{
    sampling::SamplingOptions,
    serve::{
        error::Refused,
        request::{self, Fields, Form as Endpoint},
    },
    text::Message,
};

/// The most stop texts of a line in the plain form.
const MOST_STOPS: usize = 64;

/// A line that was understood, or why it was not.
#[derive(Debug)]
pub struct Line {
    pub form: Form,
    /// By which whoever wrote the line knows it again: a text, a number or null.
    pub id: Value,
    pub ask: Result<Ask, Refused>,
}

/// In which form a line is written, and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `{"id", "prompt" | "prompt_ids" | "messages", …}`.
    Plain,
    /// `{"custom_id", "method", "url", "body"}` of OpenAI's batches; what it is sent to, if that is known.
    OpenAi(Option<Endpoint>),
}

/// What is to be answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Plain(Plain),
    /// The body of a request, which `serve` would take too: it is read with the model's words.
    OpenAi(Endpoint, Value),
}

/// A line in the plain form, as far as it says something.
#[derive(Clone, Debug, PartialEq)]
pub struct Plain {
    pub prompt: Prompt,
    pub most: Option<usize>,
    pub stop: Option<Vec<String>>,
    pub sampling: SamplingOptions,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// What a user says, where the model has a chat template; else text to go on from.
    Text(String),
    Ids(Vec<u32>),
    /// A conversation, which takes a chat template.
    Messages(Vec<Message>),
}

impl Line {
    pub fn parse(bytes: &[u8]) -> Self {
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let object = match serde_json::from_slice(bytes) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return Self::bad("is no JSON object; give {\"id\": …, \"prompt\": …}"),
            // The number is that of the line's own lines.
            Err(error) => {
                return Self::bad(format!("is no JSON: {error}").replace(" at line 1 column ", " at column "));
            }
        };
        if ["custom_id", "method", "url", "body"].iter().any(|name| object.contains_key(*name)) {
            openai(object)
        } else {
            plain(object)
        }
    }

    /// A line without a form of its own.
    pub fn bad(why: impl AsRef<str>) -> Self {
        Self { form: Form::Plain, id: Value::Null, ask: Err(Refused::field("line", why)) }
    }
}

impl Ask {
    /// The most new tokens, where the line says so.
    pub fn most(&self) -> Option<usize> {
        match self {
            Self::Plain(plain) => plain.most,
            Self::OpenAi(_, body) => ["max_completion_tokens", "max_tokens"]
                .into_iter()
                .find_map(|name| body[name].as_u64())
                .map(|most| usize::try_from(most).unwrap_or(usize::MAX)),
        }
    }
}

fn endpoint(url: &str) -> Option<Endpoint> {
    match url {
        "/v1/chat/completions" => Some(Endpoint::Chat),
        "/v1/completions" => Some(Endpoint::Completion),
        _ => None,
    }
}

fn openai(object: Map<String, Value>) -> Line {
    let id = object.get("custom_id").filter(|id| id.is_string()).cloned().unwrap_or(Value::Null);
    let endpoint = object.get("url").and_then(Value::as_str).and_then(endpoint);
    Line { form: Form::OpenAi(endpoint), id, ask: openai_ask(object, endpoint) }
}

fn openai_ask(object: Map<String, Value>, endpoint: Option<Endpoint>) -> Result<Ask, Refused> {
    let mut fields = Fields::of(Value::Object(object), "")?;
    let missing = |name: &str, remedy: &str| Refused::field(name, format!("is missing; {remedy}"));
    fields.string("custom_id")?.ok_or_else(|| missing("custom_id", "give a text by which the answer is known"))?;
    let method = fields.string("method")?.ok_or_else(|| missing("method", "give POST"))?;
    if method != "POST" {
        return Err(Refused::field("method", format!("is {method}; give POST")));
    }
    let known = "give /v1/chat/completions or /v1/completions";
    let url = fields.string("url")?.ok_or_else(|| missing("url", known))?;
    let endpoint = endpoint.ok_or_else(|| Refused::field("url", format!("{url} is not supported; {known}")))?;
    let body = fields.require("body")?;
    fields.end()?;
    if !body.is_object() {
        return Err(Refused::field("body", "is no object; give the request's JSON"));
    }
    Ok(Ask::OpenAi(endpoint, body))
}

fn plain(object: Map<String, Value>) -> Line {
    let id = object.get("id").filter(|id| id.is_string() || id.is_number()).cloned().unwrap_or(Value::Null);
    Line { form: Form::Plain, id, ask: plain_ask(object).map(Ask::Plain) }
}

fn plain_ask(object: Map<String, Value>) -> Result<Plain, Refused> {
    let mut fields = Fields::of(Value::Object(object), "")?;
    match fields.take("id") {
        None | Some(Value::String(_) | Value::Number(_)) => {}
        Some(_) => return Err(Refused::field("id", "is neither text nor number; give one of these")),
    }
    let text = fields.string("prompt")?;
    let ids = fields.take("prompt_ids");
    let turns = fields.take("messages");
    let given = [("prompt", text.is_some()), ("prompt_ids", ids.is_some()), ("messages", turns.is_some())];
    let most = fields.count("max_new_tokens", 1..=u32::MAX as usize)?;
    let (stop, sampling) = (request::stop_texts(&mut fields, MOST_STOPS)?, sampling(&mut fields)?);
    // First of all, so that whoever misspelt the prompt's name is told so.
    fields.end()?;
    let given: Vec<_> = given.into_iter().filter_map(|(name, is_given)| is_given.then_some(name)).collect();
    if let [first, second, ..] = given[..] {
        return Err(Refused::field(first, format!("and {second} are given both; leave one out")));
    }
    let prompt = match (text, ids, turns) {
        (Some(text), ..) => Prompt::Text(text),
        (_, Some(ids), _) => Prompt::Ids(token_ids(&ids)?),
        (.., Some(turns)) => Prompt::Messages(request::messages(turns)?),
        _ => return Err(Refused::field("prompt", "is missing; give a text, or prompt_ids or messages in its place")),
    };
    Ok(Plain { prompt, most, stop, sampling })
}

fn token_ids(value: &Value) -> Result<Vec<u32>, Refused> {
    let id = |id: &Value| id.as_u64()?.try_into().ok();
    let ids = value.as_array().and_then(|ids| ids.iter().map(id).collect::<Option<Vec<u32>>>());
    ids.ok_or_else(|| Refused::field("prompt_ids", "is no list of token ids; give one, such as [1, 2]"))
}

/// How tokens are to be drawn.
fn sampling(fields: &mut Fields) -> Result<SamplingOptions, Refused> {
    let any = f64::MIN..=f64::MAX;
    // What is in range the sampling itself knows, and names it.
    Ok(SamplingOptions {
        sample: false,
        temperature: fields.number("temperature", any.clone())?,
        top_k: fields.count("top_k", 0..=u32::MAX as usize)?,
        top_p: fields.number("top_p", any.clone())?,
        min_p: fields.number("min_p", any.clone())?,
        repetition_penalty: fields.number("repetition_penalty", any.clone())?,
        presence_penalty: fields.number("presence_penalty", any)?,
        seed: fields.integer("seed", 0..=u64::MAX)?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn why(line: Line) -> String {
        line.ask.unwrap_err().message().to_owned()
    }

    #[test]
    fn a_plain_line_has_one_prompt_in_one_of_three_ways_and_what_generate_takes() {
        let turns = json!([{ "role": "user", "content": "a" }]);
        for (name, value, prompt) in [
            ("prompt", json!("a"), Prompt::Text("a".into())),
            ("prompt_ids", json!([7, 8]), Prompt::Ids(vec![7, 8])),
            ("messages", turns, Prompt::Messages(vec![Message::new("user", "a")])),
        ] {
            let line =
                json!({ "id": 5, name: value, "max_new_tokens": 3, "stop": ["x", "y"], "top_k": 4, "seed": null });
            let found = Line::parse(line.to_string().as_bytes());
            let sampling = SamplingOptions { top_k: Some(4), ..Default::default() };
            let stop = Some(vec!["x".into(), "y".into()]);
            assert_eq!((found.form, found.id), (Form::Plain, json!(5)));
            assert_eq!(found.ask, Ok(Ask::Plain(Plain { prompt, most: Some(3), stop, sampling })));
        }
        assert!(Line::parse("\u{feff}{\"prompt\": \"a\"}".as_bytes()).ask.is_ok());
    }

    #[test]
    fn a_line_of_openais_batches_is_known_by_any_of_its_fields() {
        let body = json!({ "model": "m", "prompt": "a", "max_tokens": 3 });
        let whole = json!({ "custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body });
        let line = Line::parse(whole.to_string().as_bytes());
        assert_eq!((line.form, &line.id), (Form::OpenAi(Some(Endpoint::Completion)), &json!("x")));
        let ask = line.ask.unwrap();
        assert_eq!((ask.most(), ask), (Some(3), Ask::OpenAi(Endpoint::Completion, body)));
        for (name, value, said) in [
            ("custom_id", json!(null), "custom_id: is missing"),
            ("custom_id", json!(5), "custom_id: is 5; give a string"),
            ("method", json!("GET"), "method: is GET; give POST"),
            ("url", json!("/v1/embeddings"), "url: /v1/embeddings is not supported"),
            ("body", json!([]), "body: is no object"),
            ("body", json!(null), "body: is missing"),
            ("more", json!(1), "more: is not known"),
        ] {
            let mut line = whole.clone();
            line[name] = value;
            let found = Line::parse(line.to_string().as_bytes());
            assert!(matches!(found.form, Form::OpenAi(_)), "{line}");
            let why = why(found);
            assert!(why.starts_with(said), "{line}: {why}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name_and_keeps_its_id() {
        for (line, said) in [
            (r#"{"id": "a", "prompt": "b", "max_tokens": 3}"#, "max_tokens: is not known"),
            (r#"{"id": "a", "promt": "b"}"#, "promt: is not known"),
            (r#"{"id": "a"}"#, "prompt: is missing"),
            (r#"{"id": "a", "prompt": 5}"#, "prompt: is 5; give a string"),
            (r#"{"id": "a", "prompt": "b", "prompt_ids": [1]}"#, "prompt: and prompt_ids are given both"),
            (r#"{"id": "a", "prompt_ids": [1.5]}"#, "prompt_ids: is no list of token ids"),
            (r#"{"id": "a", "prompt_ids": [4294967296]}"#, "prompt_ids: is no list of token ids"),
            (r#"{"id": "a", "prompt": "b", "max_new_tokens": 0}"#, "max_new_tokens: is 0"),
            (r#"{"id": "a", "prompt": "b", "stop": ""}"#, "stop: has to be"),
            (r#"{"id": "a", "prompt": "b", "seed": -1}"#, "seed: is -1; give a whole number"),
            (r#"{"id": "a", "messages": [{"role": "tool", "content": "b"}]}"#, "messages[0].role: "),
        ] {
            let found = Line::parse(line.as_bytes());
            assert_eq!(found.id, json!("a"));
            let why = why(found);
            assert!(why.starts_with(said), "{line}: {why}");
        }
        for (line, said) in [
            (&b"[1]"[..], "line: is no JSON object"),
            (b"{\"id\": ", "line: is no JSON: EOF while parsing a value at column 7"),
            (b"{\"prompt\": \"\x01\"}", "line: is no JSON: "),
            (b"{\"prompt\": \"\xff\"}", "line: is no JSON: "),
            (br#"{"id": [], "prompt": "b"}"#, "id: is neither text nor number"),
        ] {
            let found = Line::parse(line);
            assert!(found.id.is_null());
            let why = why(found);
            assert!(why.starts_with(said), "{why}");
        }
    }
}
