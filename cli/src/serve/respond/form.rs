//! The two forms of answers in OpenAI's API: those of completions and those of chats.
//!
//! They are written as they are read, token by token, so that an answer takes the memory of its text and not many times that.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::{Serialize, Serializer, ser::SerializeStruct};
use serde_json::{Value, json};

use super::Outline;
use crate::{
    sampling,
    serve::{
        choices::{Spoken, Usage},
        request::Form,
        server::{self, Server},
    },
    text::Text,
};

/// What stands for a probability of 0, as in OpenAI's API.
const LEAST: f32 = -9999.0;

/// What all pieces of an answer have in common.
pub struct Head {
    pub form: Form,
    /// Whether probabilities were asked for.
    logprobs: bool,
    id: String,
    created: u64,
    model: String,
    text: Arc<Text>,
}

/// An answer, or a piece of one.
#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

/// One of the answers, or a piece of one.
#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Value>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<&'a str>,
}

/// What one of the answers consists of.
pub struct Part<'a> {
    pub index: usize,
    pub text: &'a str,
    pub tokens: &'a [Spoken],
    pub end: Option<&'a str>,
}

impl Head {
    pub fn new(asked: &Outline, server: &Server) -> Self {
        static ANSWERS: AtomicU64 = AtomicU64::new(0);
        let prefix = if asked.form == Form::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            form: asked.form,
            logprobs: asked.logprobs,
            id: format!("{prefix}-{:08x}{:08x}", sampling::drawn(), ANSWERS.fetch_add(1, Relaxed)),
            created: server::now(),
            model: server.name.clone(),
            text: Arc::clone(&server.text),
        }
    }

    fn write(&self, object: &'static str, choices: &[Choice<'_>], usage: Option<Value>) -> String {
        let (id, created, model) = (self.id.as_str(), self.created, self.model.as_str());
        let envelope = Envelope { id, object, created, model, choices, usage };
        serde_json::to_string(&envelope).expect("its keys are texts, and nothing of it fails")
    }

    /// All answers.
    pub fn whole(&self, parts: &[Part<'_>], usage: Usage) -> String {
        let object = if self.form == Form::Chat { "chat.completion" } else { "text_completion" };
        let choices: Vec<_> = parts.iter().map(|part| self.choice(part)).collect();
        self.write(object, &choices, Some(numbers(usage)))
    }

    /// One of the answers, all of it.
    fn choice<'a>(&'a self, part: &Part<'a>) -> Choice<'a> {
        let logprobs = self.logprobs.then_some(Logprobs { head: self, tokens: part.tokens });
        let (text, message) = match self.form {
            Form::Completion => (Some(part.text), None),
            Form::Chat => (None, Some(json!({ "role": "assistant", "content": part.text, "refusal": null }))),
        };
        Choice { index: part.index, text, message, delta: None, logprobs, finish_reason: part.end }
    }

    /// A piece of one of the answers. `usage`: whether the stream ends with the numbers of tokens.
    pub fn piece(&self, part: &Part<'_>, usage: bool) -> String {
        let is_last = part.end.is_some() && part.text.is_empty();
        let delta = if is_last { json!({}) } else { json!({ "content": part.text }) };
        let logprobs = (!part.tokens.is_empty()).then_some(Logprobs { head: self, tokens: part.tokens });
        let (text, delta) = match self.form {
            Form::Completion => (Some(part.text), None),
            Form::Chat => (None, Some(delta)),
        };
        let choice = Choice { index: part.index, text, message: None, delta, logprobs, finish_reason: part.end };
        self.write(self.piece_object(), &[choice], usage.then_some(Value::Null))
    }

    /// What a chat's answer begins with.
    pub fn first(&self, index: usize, usage: bool) -> String {
        let delta = Some(json!({ "role": "assistant", "content": "", "refusal": null }));
        let choice = Choice { index, text: None, message: None, delta, logprobs: None, finish_reason: None };
        self.write(self.piece_object(), &[choice], usage.then_some(Value::Null))
    }

    /// What a stream may end with.
    pub fn last(&self, usage: Usage) -> String {
        self.write(self.piece_object(), &[], Some(numbers(usage)))
    }

    fn piece_object(&self) -> &'static str {
        if self.form == Form::Chat { "chat.completion.chunk" } else { "text_completion" }
    }
}

/// The probabilities of tokens.
struct Logprobs<'a> {
    head: &'a Head,
    tokens: &'a [Spoken],
}

/// Writes a list, one at a time.
struct Each<'a, F>(&'a [Spoken], F);

fn each<T: Serialize, F: Fn(&Spoken) -> T>(tokens: &[Spoken], of: F) -> Each<'_, F> {
    Each(tokens, of)
}

impl<T: Serialize, F: Fn(&Spoken) -> T> Serialize for Each<'_, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(&self.1))
    }
}

impl Serialize for Logprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { head: Head { form, text, .. }, tokens } = self;
        let of = |id: u32| text.bytes_of(id);
        if *form == Form::Chat {
            let mut all = serializer.serialize_struct("logprobs", 2)?;
            all.serialize_field("content", &each(tokens, |token| ChatToken::of(text, token)))?;
            all.serialize_field("refusal", &())?;
            return all.end();
        }
        // Of two tokens with one text the likelier counts.
        let top = |token: &Spoken| -> BTreeMap<String, f32> {
            token.top.iter().rev().map(|(id, logprob)| (name(&of(*id)), logprob.max(LEAST))).collect()
        };
        let mut all = serializer.serialize_struct("logprobs", 4)?;
        all.serialize_field("tokens", &each(tokens, |token| name(&of(token.id))))?;
        all.serialize_field("token_logprobs", &each(tokens, |token| token.logprob.max(LEAST)))?;
        all.serialize_field("top_logprobs", &each(tokens, top))?;
        all.serialize_field("text_offset", &each(tokens, |token| token.at))?;
        all.end()
    }
}

/// A token as chats tell it.
#[derive(Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatToken>>,
}

impl ChatToken {
    fn of(text: &Text, Spoken { id, logprob, top, .. }: &Spoken) -> Self {
        let top = top.iter().map(|(id, logprob)| Self::one(text, *id, *logprob)).collect();
        Self { top_logprobs: Some(top), ..Self::one(text, *id, *logprob) }
    }

    fn one(text: &Text, id: u32, logprob: f32) -> Self {
        let bytes = text.bytes_of(id);
        let token = String::from_utf8_lossy(&bytes).into_owned();
        Self { token, logprob: logprob.max(LEAST), bytes, top_logprobs: None }
    }
}

/// A token's text; of a part of a character its bytes, as OpenAI writes them.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |all, byte| format!("{all}\\x{byte:02x}")),
    }
}

fn numbers(Usage { prompt, new }: Usage) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_characters_are_told_by_their_bytes() {
        assert_eq!([name(" four".as_bytes()), name(&[0xe2, 0x82])], [" four", "bytes:\\xe2\\x82"]);
    }
}
