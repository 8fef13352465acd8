//! Requests to `/v1/completions`: prompts that are continued as they are.

use serde_json::Value;

use super::{
    Asked, Form, Terms, common,
    fields::{Fields, is_nothing, kind},
};
use crate::serve::error::Refused;

/// The most tokens of an answer where the request does not say, as in OpenAI's API.
const USUAL: usize = 16;

/// The most likeliest tokens that are told, likewise.
const MOST_LOGPROBS: usize = 5;

pub(super) fn read(terms: &Terms<'_>, fields: &mut Fields) -> Result<Asked, Refused> {
    let mut asked = common(terms, Form::Completion, fields, USUAL)?;
    asked.logprobs = fields.count("logprobs", 0..=MOST_LOGPROBS)?;
    fields.refuse_unless("echo", is_nothing, "put the prompt before the answer yourself")?;
    fields.refuse_unless("suffix", is_nothing, "no model here fills gaps: leave it out")?;
    let choices = asked.choices as u64;
    fields.refuse_unless("best_of", |best| best.as_u64() == Some(choices), "ask for n answers and choose one")?;
    asked.prompts = prompts(terms, fields.require("prompt")?)?;
    Ok(asked)
}

/// A text, a list of texts, a list of tokens, or a list of lists of tokens.
fn prompts(terms: &Terms<'_>, value: Value) -> Result<Vec<Vec<u32>>, Refused> {
    match value {
        Value::Array(values) if values.first().is_some_and(Value::is_number) => {
            Ok(vec![tokens(terms, "prompt", &values)?])
        }
        Value::Array(values) if values.is_empty() => {
            Err(Refused::field("prompt", "is an empty list; give a text, or a list of texts or tokens"))
        }
        Value::Array(values) if values.len() > super::MOST_CHOICES => {
            let most = super::MOST_CHOICES;
            Err(Refused::field(
                "prompt",
                format!("is a list of {} prompts; a request has at most {most}", values.len()),
            ))
        }
        Value::Array(values) => {
            let prompt = |(number, value): (usize, &Value)| one(terms, &format!("prompt[{number}]"), value);
            values.iter().enumerate().map(prompt).collect()
        }
        value => Ok(vec![one(terms, "prompt", &value)?]),
    }
}

fn one(terms: &Terms<'_>, name: &str, value: &Value) -> Result<Vec<u32>, Refused> {
    match value {
        Value::String(text) => {
            super::check_text(terms, name, text.len())?;
            terms.text.encode(text).map_err(|error| Refused::field(name, format!("cannot be tokenized: {error}")))
        }
        Value::Array(values) => tokens(terms, name, values),
        other => Err(Refused::field(name, format!("is {}; give a text, or a list of texts or tokens", kind(other)))),
    }
}

fn tokens(terms: &Terms<'_>, name: &str, values: &[Value]) -> Result<Vec<u32>, Refused> {
    let token = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|id| (*id as usize) < terms.vocab).ok_or_else(|| {
            let (what, most) = (kind(value), terms.vocab - 1);
            Refused::field(name, format!("has {what} in a list of tokens; those of this model are 0 to {most}"))
        })
    };
    values.iter().map(token).collect()
}
