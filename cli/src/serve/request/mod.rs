//! What a client asks for: the JSON of a request, checked field by field, with its prompts as tokens.

mod chat;
mod completion;
mod fields;

pub use chat::messages;
pub use fields::Fields;
use fields::is_nothing;
use layer_streamer::model::Sampling;
use serde_json::Value;

use super::error::Refused;
use crate::text::{ChatTemplate, Text};

/// The most answers to one request.
const MOST_CHOICES: usize = 128;

/// The most stop texts, as in OpenAI's API.
const MOST_STOPS: usize = 4;

/// The longest stop text, in bytes: so much of an answer may be held back, and is searched with each token.
const LONGEST_STOP: usize = 1024;

/// Fields of OpenAI's API that change no answer here.
const HARMLESS: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
];

/// Which of the two ways to ask, and so to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Completion,
    Chat,
}

/// What requests are read with: the model's words, and what a request leaves out.
pub struct Terms<'a> {
    pub text: &'a Text,
    pub template: Option<&'a ChatTemplate>,
    /// What a request has to call the model, if it calls it anything; `None`: whatever it likes.
    pub name: Option<&'a str>,
    pub vocab: usize,
    /// Tokens that a prompt may have with its answer.
    pub context: usize,
    /// Bytes that a text may have: a longer one has more tokens than the context, or takes more to be cut into them than there is.
    pub longest_text: usize,
    /// The most tokens of an answer.
    pub most: usize,
    /// Those of an answer whose request does not say; `None`: as OpenAI's API has it.
    pub usual: Option<usize>,
    pub sampling: Sampling,
    /// Of a request without one.
    pub seed: &'a dyn Fn() -> u64,
    pub stop_tokens: &'a [u32],
}

/// A request that can be answered.
#[derive(Debug)]
pub struct Asked {
    pub form: Form,
    pub prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub choices: usize,
    /// The most tokens of an answer.
    pub most: usize,
    pub sampling: Sampling,
    pub stop_texts: Vec<String>,
    pub stop_tokens: Vec<u32>,
    /// Each token's probability, and those of so many likeliest ones.
    pub logprobs: Option<usize>,
    pub stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub usage: bool,
}

impl Asked {
    /// Reads a request's body. Takes time: tokenizers and templates run.
    pub fn read(terms: &Terms<'_>, form: Form, body: &[u8]) -> Result<Self, Refused> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Refused::field("body", format!("is no JSON: {error}; send one JSON object")))?;
        Self::parse(terms, form, value)
    }

    /// The same of a body that is JSON already.
    pub fn parse(terms: &Terms<'_>, form: Form, body: Value) -> Result<Self, Refused> {
        let mut fields = Fields::of(body, "")?;
        let asked = match form {
            Form::Completion => completion::read(terms, &mut fields)?,
            Form::Chat => chat::read(terms, &mut fields)?,
        };
        fields.end()?;
        let (choices, prompts) = (asked.choices, asked.prompts.len());
        if choices.saturating_mul(prompts) > MOST_CHOICES {
            let cause =
                format!("is {choices} for each of {prompts} prompts; a request has at most {MOST_CHOICES} answers");
            return Err(Refused::field("n", cause));
        }
        asked.prompts.iter().try_for_each(|prompt| check_length(terms, form, prompt.len()))?;
        Ok(asked)
    }
}

/// Refuses a text of so many bytes that has more tokens than the context, however it is cut into them, or takes too much to be cut.
fn check_text(terms: &Terms<'_>, name: &str, length: usize) -> Result<(), Refused> {
    if length <= terms.longest_text {
        return Ok(());
    }
    let (context, most) = (terms.context, terms.longest_text);
    let limit = match length > context.saturating_mul(terms.text.longest_token()) {
        true => format!("{context} tokens can be"),
        false => format!("the {most} for which there is memory"),
    };
    let cause = format!("has {length} bytes, more than {limit}: shorten it, or start with a larger --context");
    Err(Refused::field(name, cause).with_code("context_length_exceeded"))
}

fn check_length(terms: &Terms<'_>, form: Form, length: usize) -> Result<(), Refused> {
    let name = if form == Form::Chat { "messages" } else { "prompt" };
    if length == 0 {
        return Err(Refused::field(name, "has no tokens; give some text"));
    }
    if length >= terms.context {
        let cause = format!(
            "has {length} tokens, and with its answer it may have {}: shorten it, or start with a larger --context",
            terms.context
        );
        return Err(Refused::field(name, cause).with_code("context_length_exceeded"));
    }
    Ok(())
}

/// What both forms have in common, without prompts. `usual`: the most tokens where the request does not say.
fn common(terms: &Terms<'_>, form: Form, fields: &mut Fields, usual: usize) -> Result<Asked, Refused> {
    let model = fields.string("model")?;
    if let Some((asked, there)) = model.as_deref().zip(terms.name).filter(|(asked, there)| asked != there) {
        return Err(Refused::no_model(asked, there));
    }
    let suggested = terms.sampling;
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(suggested.temperature),
        top_k: fields.count("top_k", 0..=u32::MAX as usize)?.unwrap_or(suggested.top_k),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(suggested.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(suggested.min_p),
        repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(suggested.repetition_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(suggested.presence_penalty),
        seed: fields.seed("seed")?.unwrap_or_else(terms.seed),
    };
    let (stream, choices) =
        (fields.boolean("stream")?.unwrap_or(false), fields.count("n", 1..=MOST_CHOICES)?.unwrap_or(1));
    let most = most(form, fields)?.or(terms.usual).unwrap_or(usual);
    let asked = Asked {
        form,
        prompts: Vec::new(),
        choices,
        most: most.min(terms.most),
        sampling,
        stop_texts: stop_texts(fields, MOST_STOPS)?.unwrap_or_default(),
        stop_tokens: terms.stop_tokens.to_vec(),
        logprobs: None,
        stream,
        usage: usage(fields, stream)?,
    };
    fields.refuse_unless("logit_bias", is_nothing, "leave it out")?;
    fields.refuse_unless("frequency_penalty", is_nothing, "presence_penalty and repetition_penalty are")?;
    fields.ignore(&HARMLESS);
    Ok(asked)
}

/// The most tokens of an answer, by either name.
fn most(form: Form, fields: &mut Fields) -> Result<Option<usize>, Refused> {
    let older = fields.count("max_tokens", 1..=u32::MAX as usize)?;
    if form == Form::Completion {
        return Ok(older);
    }
    let newer = fields.count("max_completion_tokens", 1..=u32::MAX as usize)?;
    match (older, newer) {
        (Some(older), Some(newer)) if older != newer => {
            let cause = format!("is {older}, and max_completion_tokens, which is the same, {newer}; give one of them");
            Err(Refused::field("max_tokens", cause))
        }
        _ => Ok(newer.or(older)),
    }
}

/// The field `stop`: a text, or a list of up to `most`.
///
/// # Errors
/// Where one is empty or longer than [`LONGEST_STOP`].
pub fn stop_texts(fields: &mut Fields, most: usize) -> Result<Option<Vec<String>>, Refused> {
    let Some(value) = fields.take("stop") else { return Ok(None) };
    let texts = match value {
        Value::String(text) => Some(vec![text]),
        Value::Array(texts) => texts.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let is_good = |texts: &Vec<String>| texts.len() <= most && !texts.iter().any(String::is_empty);
    let texts = texts.filter(is_good).ok_or_else(|| {
        Refused::field("stop", format!("has to be a text or a list of up to {most} texts, none of them empty"))
    })?;
    match texts.iter().map(String::len).find(|length| *length > LONGEST_STOP) {
        Some(length) => {
            Err(Refused::field("stop", format!("has a text of {length} bytes; give texts of up to {LONGEST_STOP}")))
        }
        None => Ok(Some(texts)),
    }
}

/// Whether a stream is to end with the numbers of tokens.
fn usage(fields: &mut Fields, stream: bool) -> Result<bool, Refused> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(Refused::field("stream_options", "is for streams alone; set stream to true, or leave it out"));
    }
    let usage = options.boolean("include_usage")?.unwrap_or(false);
    options.ignore(&["include_obfuscation"]);
    options.end()?;
    Ok(usage)
}
