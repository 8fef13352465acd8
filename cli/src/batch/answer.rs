//! The lines of the output, and what is read of them again.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::line::Form;
use crate::{
    run::End,
    serve::{choices::Usage, error::Refused, request::Form as Endpoint, server},
};

/// With what an OpenAI line's `id` begins; the line's number and digest follow.
const OPENAI_ID: &str = "batch_req_";

/// Which line an answer belongs to.
#[derive(Clone, Debug)]
pub struct Place {
    pub number: u64,
    pub digest: u64,
    pub form: Form,
    pub id: Value,
}

/// What a prompt came to.
#[derive(Debug)]
pub struct Done {
    /// The new tokens as text, or as they are.
    pub text: Result<String, Vec<u32>>,
    pub end: End,
    pub usage: Usage,
    /// Of an answer that was drawn.
    pub seed: Option<u64>,
    /// What the request calls the model, or its name.
    pub model: String,
}

/// A line in the plain form.
#[derive(Serialize)]
struct PlainLine<'a> {
    line: u64,
    id: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<&'a Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    end: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    new_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    line_digest: String,
}

fn digest_text(digest: u64) -> String {
    format!("{digest:016x}")
}

impl Place {
    /// The line of an answer, or of why there is none; with its end.
    pub fn line(&self, done: &Result<Done, Refused>) -> Vec<u8> {
        let line = match self.form {
            Form::Plain => serde_json::to_vec(&self.plain(done)),
            Form::OpenAi(_) => serde_json::to_vec(&self.openai(done)),
        };
        let mut line = line.expect("maps with names, and nothing that fails");
        line.push(b'\n');
        line
    }

    fn plain<'a>(&'a self, done: &'a Result<Done, Refused>) -> PlainLine<'a> {
        let (answer, error) = (done.as_ref().ok(), done.as_ref().err().map(Refused::message));
        PlainLine {
            line: self.number,
            id: &self.id,
            text: answer.and_then(|done| done.text.as_deref().ok()),
            ids: answer.and_then(|done| done.text.as_ref().err()),
            error,
            end: answer.map(|done| done.end.name()),
            prompt_tokens: answer.map(|done| done.usage.prompt),
            new_tokens: answer.map(|done| done.usage.new),
            seed: answer.and_then(|done| done.seed),
            line_digest: digest_text(self.digest),
        }
    }

    fn openai(&self, done: &Result<Done, Refused>) -> Value {
        let number = self.number;
        let (status, body) = match (done, self.form) {
            (Ok(done), Form::OpenAi(Some(endpoint))) => (200, done.body(endpoint, number)),
            (Ok(_), _) => unreachable!("what is sent to nowhere is refused"),
            (Err(why), _) => (why.status.as_u16(), why.json()),
        };
        json!({
            "id": format!("{OPENAI_ID}{number}_{}", digest_text(self.digest)), "custom_id": self.id,
            "response": { "status_code": status, "request_id": format!("req_{number}"), "body": body }, "error": null,
        })
    }
}

impl Done {
    /// What `serve` would answer.
    fn body(&self, form: Endpoint, number: u64) -> Value {
        let end = match self.end {
            End::StopToken(_) | End::StopText(_) => "stop",
            _ => "length",
        };
        let ids = |ids: &Vec<u32>| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let text = self.text.as_ref().map_or_else(ids, Clone::clone);
        let (prefix, object, name, said) = match form {
            Endpoint::Completion => ("cmpl", "text_completion", "text", json!(text)),
            Endpoint::Chat => {
                let message = json!({ "role": "assistant", "content": text, "refusal": null });
                ("chatcmpl", "chat.completion", "message", message)
            }
        };
        let Usage { prompt, new } = self.usage;
        json!({
            "id": format!("{prefix}-{number}"), "object": object, "created": server::now(), "model": self.model,
            "choices": [{ "index": 0, name: said, "logprobs": null, "finish_reason": end }],
            "usage": { "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new },
        })
    }
}

/// What says to which line an answer belongs.
#[derive(Deserialize)]
struct Written {
    line: Option<u64>,
    line_digest: Option<String>,
    id: Option<Value>,
    error: Option<Value>,
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    status_code: u16,
}

/// An answer that was read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    pub number: u64,
    pub digest: u64,
    pub is_error: bool,
}

/// Which line this answer belongs to; `None` if it is none of this program's.
pub fn read(line: &[u8]) -> Option<Found> {
    let written: Written = serde_json::from_slice(line).ok()?;
    let digest = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    match (written.line, written.line_digest, written.id, written.response) {
        (Some(number), Some(text), _, None) => {
            Some(Found { number, digest: digest(&text)?, is_error: written.error.is_some() })
        }
        (None, None, Some(Value::String(id)), Some(response)) => {
            let (number, text) = id.strip_prefix(OPENAI_ID)?.split_once('_')?;
            Some(Found { number: number.parse().ok()?, digest: digest(text)?, is_error: response.status_code != 200 })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Refused {
        Refused::field("n", "one\nanswer")
    }

    fn done(text: Result<&str, Vec<u32>>, end: End) -> Result<Done, Refused> {
        let usage = Usage { prompt: 5, new: 2 };
        Ok(Done { text: text.map(Into::into), end, usage, seed: Some(u64::MAX), model: "m".into() })
    }

    #[test]
    fn every_answer_says_to_which_line_it_belongs() {
        let forms = [Form::Plain, Form::OpenAi(Some(Endpoint::Chat)), Form::OpenAi(Some(Endpoint::Completion))];
        for form in forms {
            for digest in [0, 7, u64::MAX] {
                let place = Place { number: 12, digest, form, id: json!("\"\n") };
                for done in [done(Ok("a\nb"), End::Limit), done(Err(vec![1, 2]), End::Context), Err(refused())] {
                    let line = place.line(&done);
                    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
                    assert_eq!(read(&line), Some(Found { number: 12, digest, is_error: done.is_err() }));
                    for cut in 0..line.len() - 1 {
                        assert_eq!(read(&line[..cut]), None, "what is cut off is no answer");
                    }
                }
            }
        }
        // A line whose own id is none has an answer too.
        for id in [json!("x"), Value::Null] {
            let bad = Place { number: 1, digest: 2, form: Form::OpenAi(None), id };
            let found = Found { number: 1, digest: 2, is_error: true };
            assert_eq!(read(&bad.line(&Err(refused()))), Some(found));
        }
        for other in [&b"{}"[..], b"[]", b"", br#"{"line": 5}"#, br#"{"id": "batch_req_5_0", "custom_id": "a"}"#] {
            assert_eq!(read(other), None);
        }
    }

    #[test]
    fn an_answer_in_openais_form_is_what_its_clients_parse() {
        let place = Place { number: 3, digest: 4, form: Form::OpenAi(Some(Endpoint::Chat)), id: json!("x") };
        let line: Value = serde_json::from_slice(&place.line(&done(Ok("t"), End::StopToken(0)))).unwrap();
        assert_eq!(
            (&line["custom_id"], &line["error"], &line["response"]["status_code"]),
            (&json!("x"), &Value::Null, &json!(200))
        );
        let body = &line["response"]["body"];
        assert_eq!(body["choices"][0]["message"], json!({ "role": "assistant", "content": "t", "refusal": null }));
        assert_eq!((&body["choices"][0]["finish_reason"], &body["model"]), (&json!("stop"), &json!("m")));
        assert_eq!(body["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 }));
        let refused: Value = serde_json::from_slice(&place.line(&Err(refused()))).unwrap();
        assert_eq!(refused["response"]["status_code"], 400);
        assert_eq!(refused["response"]["body"]["error"]["param"], "n");
    }
}
