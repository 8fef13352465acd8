//! The bodies of answers.

use serde_json::{Value, json};

use super::Endpoint;
use crate::run::End;

/// Tokens that were computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub prompt: usize,
    pub new: usize,
}

/// The body of an answer. `created`: seconds since 1970.
pub fn completed(
    endpoint: Endpoint,
    id: &str,
    created: u64,
    model: &str,
    text: &str,
    end: &End,
    usage: Usage,
) -> Value {
    let reason = match end {
        End::StopToken(_) | End::StopText(_) => "stop",
        _ => "length",
    };
    let (id, object, choice) = match endpoint {
        Endpoint::Chat => {
            let message = json!({ "role": "assistant", "content": text, "refusal": null });
            let choice = json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": reason });
            (format!("chatcmpl-{id}"), "chat.completion", choice)
        }
        Endpoint::Completions => {
            let choice = json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason });
            (format!("cmpl-{id}"), "text_completion", choice)
        }
    };
    let Usage { prompt, new } = usage;
    json!({
        "id": id, "object": object, "created": created, "model": model, "choices": [choice],
        "usage": { "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new },
    })
}

/// The body of a refusal. A message that begins with a field's name and a colon names it in `param` too.
pub fn refused(message: &str) -> Value {
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_[].".contains(&byte))
    };
    let param = message.split_once(": ").map(|(name, _)| name).filter(|name| is_name(name));
    json!({ "error": { "message": message, "type": "invalid_request_error", "param": param, "code": null } })
}
