//! From a line to a request of the engine.

use std::sync::Arc;

use layer_streamer::{engine::Request, model::Sampling};

use super::{
    answer::Place,
    input::{self, RawLine},
    line::Line,
};
use crate::{
    Failure,
    openai::{Ask, Prompt},
    sampling::SamplingOptions,
    text::{ChatTemplate, Message, Text},
};

/// What lines become requests with.
pub struct Preparing {
    pub words: Words,
    /// Where a line says nothing of these.
    pub sampling: SamplingOptions,
    pub stop: Vec<String>,
    pub most: usize,
    /// What the model is called.
    pub name: String,
    /// What the model suggests.
    pub suggested: Sampling,
    /// Tokens that end its answers.
    pub stop_tokens: Vec<u32>,
    /// Tokens that a sequence may have.
    pub context: usize,
    /// The most that the model was made for.
    pub max_positions: usize,
}

/// A line on its way to the engine.
pub struct Prepared {
    pub place: Place,
    pub job: Result<Job, String>,
}

pub struct Job {
    pub request: Request,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Where tokens are drawn.
    pub seed: Option<u64>,
    pub model: String,
}

/// How text goes in and out.
pub struct Words {
    pub text: Option<Arc<Text>>,
    /// Conversations go through it, and prompts, unless they are to be left as they are.
    pub template: Option<ChatTemplate>,
    pub raw: bool,
    pub system: Option<String>,
    pub thinking: Option<bool>,
    /// Whether answers are text.
    pub in_words: bool,
}

impl Preparing {
    pub fn prepare(&self, RawLine { number, digest, bytes }: RawLine) -> Prepared {
        let Line { form, id, ask } = parse(bytes.as_deref());
        let job = ask.and_then(|ask| self.job(number, ask));
        Prepared { place: Place { number, digest, form, id }, job }
    }

    /// What a line asks for, as a request.
    pub fn job(&self, number: u64, ask: Ask) -> Result<Job, String> {
        let Ask { prompt, most, stop, sampling, model } = ask;
        let (tokens, is_turn) = self.tokens(prompt)?;
        let (length, context) = (tokens.len(), self.context);
        if length == 0 {
            return Err("prompt: is empty; give at least one token".into());
        }
        if length > context {
            let remedy = if context < self.max_positions { "raise --context" } else { "give a shorter one" };
            return Err(format!("prompt: is {length} tokens long, the context {context}; {remedy}"));
        }
        let stop = stop.unwrap_or_else(|| self.stop.clone());
        if !self.words.in_words && !stop.is_empty() {
            return Err("stop: the answer is token ids, in which there is no text to look for".into());
        }
        // Each line draws by a seed of its own, whatever the other lines are; `generate` with that seed draws the same.
        let other_seed = || self.sampling.seed.unwrap_or(0).wrapping_add(number);
        let usual = SamplingOptions { seed: self.sampling.seed.map(|_| other_seed()), ..self.sampling.clone() };
        let sampling = usual.after(&sampling).over(&self.suggested, other_seed).map_err(|error| error.to_string())?;
        let mut request = Request::new(tokens, most.unwrap_or(self.most));
        request.stop.clone_from(&self.stop_tokens);
        if is_turn {
            request.stop.extend(self.words.text.as_ref().and_then(|text| text.end_of_turn()));
        }
        if let Some(sampling) = sampling {
            request.sampling = sampling;
        }
        let seed = sampling.map(|sampling| sampling.seed);
        Ok(Job { request, stop, seed, model: model.unwrap_or_else(|| self.name.clone()) })
    }

    /// Tokens around a short prompt, and some to spare.
    pub fn around(&self) -> usize {
        self.tokens(Prompt::Turn("1".into())).map_or(0, |(tokens, _)| tokens.len()) + 16
    }

    /// The prompt's tokens, and whether they are turns of a conversation.
    fn tokens(&self, prompt: Prompt) -> Result<(Vec<u32>, bool), String> {
        let said = |error: Failure| error.to_string();
        if let Prompt::Ids(ids) = prompt {
            return Ok((ids, false));
        }
        let text = self.words.text.as_ref().ok_or("prompt: the model has no tokenizer; give prompt_ids")?;
        let turns = match (prompt, &self.words.template) {
            (Prompt::Turn(prompt), Some(_)) if !self.words.raw => {
                let system = self.words.system.iter().map(|system| Message::new("system", system));
                system.chain([Message::new("user", prompt)]).collect::<Vec<_>>()
            }
            (Prompt::Turn(prompt) | Prompt::Text(prompt), _) => {
                return Ok((text.encode(&prompt).map_err(said)?, false));
            }
            (Prompt::Messages(turns), _) => turns,
            (Prompt::Ids(ids), _) => return Ok((ids, false)),
        };
        let Some(template) = &self.words.template else {
            return Err("messages: the model has no chat template, so it takes nothing but text; give a prompt".into());
        };
        let rendered = template.render(&turns, self.words.thinking).map_err(said)?;
        Ok((text.encode_turns(&rendered).map_err(said)?, true))
    }
}

/// What a line asks for, if it is not too long.
pub fn parse(bytes: Option<&[u8]>) -> Line {
    bytes.map_or_else(|| Line::bad(input::too_long()), Line::parse)
}
