//! Requests to `/v1/chat/completions`: the turns of a conversation, which the model's chat template makes a text of.

use serde_json::Value;

use super::{
    Asked, Form, Terms, common,
    fields::{Fields, is_nothing, kind},
};
use crate::{serve::error::Refused, text::Message};

/// The most likeliest tokens that are told, as in OpenAI's API.
const MOST_LOGPROBS: usize = 20;

pub(super) fn read(terms: &Terms<'_>, fields: &mut Fields) -> Result<Asked, Refused> {
    let Some(template) = terms.template else {
        return Err(Refused::field(
            "messages",
            "this model has no chat template, so it knows no turns; ask /v1/completions",
        ));
    };
    let mut asked = common(terms, Form::Chat, fields, usize::MAX)?;
    asked.stop_tokens.extend(terms.text.end_of_turn());
    asked.logprobs = logprobs(fields)?;
    refuse_what_is_not_there(fields)?;
    let thinking = thinking(fields)?;
    let messages = messages(fields.require("messages")?)?;
    let refused = |error| Refused::field("messages", format!("{error}"));
    let all: usize = messages.iter().map(|message| message.content.len()).sum();
    super::check_text(terms, "messages", all)?;
    let text = template.render(&messages, thinking).map_err(refused)?;
    super::check_text(terms, "messages", text.len())?;
    asked.prompts = vec![terms.text.encode_turns(&text).map_err(refused)?];
    Ok(asked)
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, Refused> {
    let (wanted, top) =
        (fields.boolean("logprobs")?.unwrap_or(false), fields.count("top_logprobs", 0..=MOST_LOGPROBS)?);
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, Some(1..)) => Err(Refused::field("top_logprobs", "takes logprobs: set that to true")),
        (false, _) => Ok(None),
    }
}

fn refuse_what_is_not_there(fields: &mut Fields) -> Result<(), Refused> {
    for name in ["tools", "functions"] {
        fields.refuse_unless(name, is_nothing, "describe them in a message, and read the answer yourself")?;
    }
    for name in ["tool_choice", "function_call"] {
        fields.refuse_unless(name, |choice| choice == "none" || choice == "auto", "there are no tools to choose")?;
    }
    let is_text =
        |format: &Value| format["type"] == "text" && format.as_object().is_some_and(|fields| fields.len() == 1);
    fields.refuse_unless("response_format", is_text, "answers are text: ask for a form in a message")?;
    fields.refuse_unless("modalities", |all| *all == serde_json::json!(["text"]), "answers are text")
}

/// Whether the model is to think first, where its template asks for that.
fn thinking(fields: &mut Fields) -> Result<Option<bool>, Refused> {
    let Some(mut variables) = fields.object("chat_template_kwargs")? else { return Ok(None) };
    let thinking = variables.boolean("enable_thinking")?;
    variables.end()?;
    Ok(thinking)
}

/// The turns of a conversation.
///
/// # Errors
/// That name the turn.
pub fn messages(value: Value) -> Result<Vec<Message>, Refused> {
    let Value::Array(values) = value else {
        return Err(Refused::field("messages", format!("is {}; give a list of turns", kind(&value))));
    };
    if values.is_empty() {
        return Err(Refused::field("messages", "is empty; give at least one turn"));
    }
    values.into_iter().enumerate().map(|(number, value)| message(value, &format!("messages[{number}]"))).collect()
}

fn message(value: Value, name: &str) -> Result<Message, Refused> {
    let mut fields = Fields::of(value, name)?;
    let role = fields.require("role")?;
    let role = match role.as_str() {
        // Its name in newer models of OpenAI.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        _ => {
            let cause = format!("is {role}; there are system, developer, user and assistant");
            return Err(Refused::field(fields.name("role"), cause));
        }
    };
    let content_name = fields.name("content");
    let content = content(fields.require("content")?, &content_name)?;
    for field in ["tool_calls", "function_call", "audio", "refusal", "annotations"] {
        fields.refuse_unless(field, is_nothing, "turns are text alone: leave it out")?;
    }
    fields.refuse_unless("name", is_nothing, "no chat template is told who speaks: say so in the content")?;
    fields.end()?;
    Ok(Message::new(role, content))
}

/// A text, or a list of parts that are texts.
fn content(value: Value, name: &str) -> Result<String, Refused> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(Refused::field(name, format!("is {}; give a text, or a list of parts", kind(&other)))),
    };
    let mut text = String::new();
    for (number, part) in parts.into_iter().enumerate() {
        let mut part = Fields::of(part, &format!("{name}[{number}]"))?;
        let kind = part.require("type")?;
        if kind != "text" {
            let cause = format!("is {kind}, which this server does not read; give parts of type \"text\"");
            return Err(Refused::field(part.name("type"), cause).with_code("unsupported"));
        }
        let piece =
            part.string("text")?.ok_or_else(|| Refused::field(part.name("text"), "is missing; give a string"))?;
        text += &piece;
        part.end()?;
    }
    Ok(text)
}
