//! The two forms of answers in OpenAI's API: those of completions and those of chats.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

use super::Outline;
use crate::{
    sampling,
    serve::{
        choices::{Spoken, Usage},
        request::Form,
        server::{self, Server},
    },
};

/// What stands for a probability of 0, as in OpenAI's API.
const LEAST: f32 = -9999.0;

impl Form {
    /// What an answer, or a piece of one, is called.
    pub fn object(self, is_piece: bool) -> &'static str {
        match (self, is_piece) {
            (Self::Completion, _) => "text_completion",
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
        }
    }
}

/// What all pieces of an answer have in common.
pub struct Head {
    pub form: Form,
    /// Whether probabilities were asked for.
    pub logprobs: bool,
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Head {
    pub fn new(asked: &Outline, server: &Server) -> Self {
        static ANSWERS: AtomicU64 = AtomicU64::new(0);
        let prefix = if asked.form == Form::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:08x}{:08x}", sampling::drawn(), ANSWERS.fetch_add(1, Relaxed));
        Self { form: asked.form, logprobs: asked.logprobs, id, created: server::now(), model: server.name.clone() }
    }

    pub fn envelope(&self, object: &str) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model })
    }

    /// One of the answers.
    pub fn whole(&self, index: usize, text: &str, tokens: &[Spoken], end: &str) -> Value {
        let logprobs = self.logprobs(tokens);
        match self.form {
            Form::Completion => json!({ "text": text, "index": index, "logprobs": logprobs, "finish_reason": end }),
            Form::Chat => {
                let message = json!({ "role": "assistant", "content": text, "refusal": null });
                json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": end })
            }
        }
    }

    /// What a chat's answer begins with.
    pub fn first(&self, index: usize) -> Value {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null })
    }

    /// A piece of one of the answers.
    pub fn piece(&self, index: usize, text: &str, tokens: &[Spoken], end: Option<&str>) -> Value {
        let logprobs = if tokens.is_empty() { Value::Null } else { self.logprobs(tokens) };
        match self.form {
            Form::Completion => json!({ "text": text, "index": index, "logprobs": logprobs, "finish_reason": end }),
            Form::Chat => {
                let is_last = end.is_some() && text.is_empty();
                let delta = if is_last { json!({}) } else { json!({ "content": text }) };
                json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end })
            }
        }
    }

    fn logprobs(&self, tokens: &[Spoken]) -> Value {
        match self.form {
            _ if !self.logprobs => Value::Null,
            Form::Completion => of_completion(tokens),
            Form::Chat => json!({ "content": tokens.iter().map(of_chat).collect::<Value>(), "refusal": null }),
        }
    }
}

fn of_completion(tokens: &[Spoken]) -> Value {
    let top = |token: &Spoken| {
        let named = |(bytes, logprob): &(Vec<u8>, f32)| (name(bytes), json!(logprob.max(LEAST)));
        // Of two tokens with one text the likelier counts.
        Value::Object(token.top.iter().rev().map(named).collect())
    };
    json!({
        "tokens": tokens.iter().map(|token| name(&token.bytes)).collect::<Value>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob.max(LEAST)).collect::<Value>(),
        "top_logprobs": tokens.iter().map(top).collect::<Value>(),
        "text_offset": tokens.iter().map(|token| token.at).collect::<Value>(),
    })
}

fn of_chat(token: &Spoken) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob.max(LEAST), "bytes": bytes });
    let mut said = one(&token.bytes, token.logprob);
    said["top_logprobs"] = token.top.iter().map(|(bytes, logprob)| one(bytes, *logprob)).collect();
    said
}

/// A token's text; of a part of a character its bytes, as OpenAI writes them.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |all, byte| format!("{all}\\x{byte:02x}")),
    }
}

pub fn usage(Usage { prompt, new }: Usage) -> Value {
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
