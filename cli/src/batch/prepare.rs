//! From a line to a request of the engine.

use std::sync::Arc;

use layer_streamer::{engine::Request, model::Sampling};
use serde_json::Value;

use super::{
    answer::Place,
    input::{self, RawLine},
    line::{Ask, Line, Plain, Prompt},
};
use crate::{
    Failure,
    sampling::SamplingOptions,
    serve::{
        cost::{self, Cost, Texts},
        error::Refused,
        request::{Asked, Form as Endpoint, Terms},
        room,
    },
    text::{ChatTemplate, Message, Text},
};

/// The longest line that `serve` would take as it is usually started, in bytes. Longer ones are refused only where they take more to read.
const BODY_LIMIT: usize = 4 << 20;

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
    pub vocab: usize,
    /// Tokens that a sequence may have.
    pub context: usize,
    /// The most that the model was made for.
    pub max_positions: usize,
    /// Bytes of the tokenizer's longest token.
    pub longest_token: usize,
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

/// A line on its way to the engine.
pub struct Prepared {
    pub place: Place,
    pub job: Result<Job, Refused>,
}

pub struct Job {
    pub request: Request,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Where tokens are drawn.
    pub seed: Option<u64>,
    /// What the request calls the model, or its name.
    pub model: String,
}

impl Preparing {
    pub fn prepare(&self, RawLine { number, digest, bytes }: RawLine) -> Prepared {
        let cost = self.cost(bytes.as_deref());
        let Line { form, id, ask } = self.parse(bytes.as_deref(), cost);
        let job = ask.and_then(|ask| self.job(number, ask, cost));
        Prepared { place: Place { number, digest, form, id }, job }
    }

    /// What a line of that cost asks for, if it is not too long, nor takes too much to parse.
    pub fn parse(&self, bytes: Option<&[u8]>, Cost { parsed, .. }: Cost) -> Line {
        let Some(line) = bytes else { return Line::bad(input::too_long()) };
        let most = self.reading();
        match parsed > most {
            true => Line::bad(format!("takes {parsed} bytes to read, more than the {most} that there are; shorten it")),
            false => Line::parse(line),
        }
    }

    /// What a line takes while it is read, with its bytes.
    pub fn cost(&self, bytes: Option<&[u8]>) -> Cost {
        bytes.map_or_else(Cost::default, |bytes| {
            let cost = cost::of(bytes, Texts::Together);
            Cost { parsed: bytes.len() + cost.parsed, ..cost }
        })
    }

    /// The most bytes that reading a line may take.
    pub fn reading(&self) -> usize {
        room::reading(self.context, BODY_LIMIT)
    }

    /// What reading a line of that cost takes, in bytes.
    pub fn taken(&self, cost: Cost) -> usize {
        cost.taken(self.longest_text(), self.reading())
    }

    /// What a line of that cost asks for, as a request.
    pub fn job(&self, number: u64, ask: Ask, cost: Cost) -> Result<Job, Refused> {
        let longest_text = self.longest_text().min(cost.longest_text(self.reading()));
        let job = match ask {
            Ask::Plain(plain) => self.plain(number, plain, longest_text)?,
            Ask::OpenAi(endpoint, body) => self.openai(number, endpoint, body, longest_text)?,
        };
        if !self.words.in_words && !job.stop.is_empty() {
            return Err(Refused::field("stop", "the answer is token ids, which have no text; leave it out"));
        }
        let (length, context) = (job.request.prompt.len(), self.context);
        if length == 0 {
            return Err(Refused::field("prompt", "is empty; give at least one token"));
        }
        if let Some(id) = job.request.prompt.iter().find(|id| **id as usize >= self.vocab) {
            return Err(Refused::field("prompt", format!("token {id} is not in the vocabulary of {}", self.vocab)));
        }
        if length > context {
            let remedy = self.remedy();
            return Err(Refused::field("prompt", format!("is {length} tokens long, the context {context}; {remedy}")));
        }
        Ok(job)
    }

    /// What helps where a prompt is longer than the context.
    fn remedy(&self) -> &'static str {
        if self.context < self.max_positions { "raise --context" } else { "give a shorter one" }
    }

    /// Bytes that a text may have: a longer one has more tokens than the context. To cut it into tokens would take memory and time, for
    /// nothing.
    fn longest_text(&self) -> usize {
        self.context.saturating_mul(self.longest_token)
    }

    fn check_text(&self, name: &'static str, text: &str, most: usize) -> Result<(), Refused> {
        if text.len() <= most {
            return Ok(());
        }
        let (length, context, remedy) = (text.len(), self.context, self.remedy());
        let limit = match length > self.longest_text() {
            true => format!("{context} tokens can be"),
            false => format!("the {most} for which there is memory"),
        };
        Err(Refused::field(name, format!("has {length} bytes, more than {limit}; {remedy}")))
    }

    /// The seed of a line that has none: each draws by another, whatever the other lines are.
    fn seed(&self, number: u64) -> u64 {
        self.sampling.seed.unwrap_or(0).wrapping_add(number)
    }

    fn plain(
        &self,
        number: u64,
        Plain { prompt, most, stop, sampling }: Plain,
        longest_text: usize,
    ) -> Result<Job, Refused> {
        let (tokens, is_turn) = self.tokens(prompt, longest_text)?;
        let usual = SamplingOptions { seed: self.sampling.seed.map(|_| self.seed(number)), ..self.sampling.clone() };
        let sampling = usual.after(&sampling).over(&self.suggested, || self.seed(number))?;
        let mut request = Request::new(tokens, most.unwrap_or(self.most));
        request.stop.clone_from(&self.stop_tokens);
        if is_turn {
            request.stop.extend(self.words.text.as_ref().and_then(|text| text.end_of_turn()));
        }
        if let Some(sampling) = sampling {
            request.sampling = sampling;
        }
        let stop = stop.unwrap_or_else(|| self.stop.clone());
        Ok(Job { request, stop, seed: sampling.map(|sampling| sampling.seed), model: self.name.clone() })
    }

    /// A body means what it means to `serve`, but that its seed is the line's and not drawn.
    fn openai(&self, number: u64, endpoint: Endpoint, body: Value, longest_text: usize) -> Result<Job, Refused> {
        let Some(text) = &self.words.text else {
            return Err(Refused::field(
                "body",
                "takes a tokenizer, which the model lacks; give a line with prompt_ids",
            ));
        };
        let model = body["model"].as_str().unwrap_or(&self.name).to_owned();
        let sampling = SamplingOptions { sample: true, ..self.sampling.clone() }.over(&self.suggested, || 0)?;
        let terms = Terms {
            text,
            template: self.words.template.as_ref(),
            name: None,
            vocab: self.vocab,
            context: self.context,
            longest_text,
            most: usize::MAX,
            usual: Some(self.most),
            sampling: sampling.unwrap_or_default(),
            seed: &|| self.seed(number),
            stop_tokens: &self.stop_tokens,
        };
        let Asked { mut prompts, choices, most, sampling, stop_texts, stop_tokens, logprobs, stream, .. } =
            Asked::parse(&terms, endpoint, body)?;
        let prompt = match (prompts.pop(), prompts.len()) {
            (Some(prompt), 0) => prompt,
            _ => return Err(Refused::field("prompt", "is a list; give each prompt a line of its own")),
        };
        if choices != 1 {
            return Err(Refused::field("n", "a line has one answer; give each a line of its own, and leave it out"));
        }
        for (name, is_asked) in [("logprobs", logprobs.is_some()), ("stream", stream)] {
            if is_asked {
                return Err(Refused::field(name, "is not supported in a batch; leave it out"));
            }
        }
        let request = Request { stop: stop_tokens, sampling, ..Request::new(prompt, most) };
        let stop = if stop_texts.is_empty() { self.stop.clone() } else { stop_texts };
        Ok(Job { request, stop, seed: Some(sampling.seed), model })
    }

    /// The prompt's tokens, and whether they are turns of a conversation. A text may have so many bytes.
    fn tokens(&self, prompt: Prompt, longest_text: usize) -> Result<(Vec<u32>, bool), Refused> {
        let refused = |name: &'static str| move |error: Failure| Refused::field(name, error.to_string());
        let Words { text, template, raw, system, thinking, .. } = &self.words;
        let name = if let Prompt::Messages(_) = prompt { "messages" } else { "prompt" };
        let no_tokenizer = || Refused::field(name, "the model has no tokenizer; give prompt_ids in its place");
        let turns = match prompt {
            Prompt::Ids(ids) => return Ok((ids, false)),
            Prompt::Text(prompt) if *raw || template.is_none() => {
                let text = text.as_ref().ok_or_else(no_tokenizer)?;
                self.check_text(name, &prompt, longest_text)?;
                return Ok((text.encode(&prompt).map_err(refused(name))?, false));
            }
            Prompt::Text(prompt) => {
                let system = system.iter().map(|system| Message::new("system", system));
                system.chain([Message::new("user", prompt)]).collect()
            }
            Prompt::Messages(turns) => turns,
        };
        let Some(template) = template else {
            return Err(Refused::field(name, "the model has no chat template, so it knows no turns; give a prompt"));
        };
        let rendered = template.render(&turns, *thinking).map_err(refused(name))?;
        let text = text.as_ref().ok_or_else(no_tokenizer)?;
        self.check_text(name, &rendered, longest_text)?;
        Ok((text.encode_turns(&rendered).map_err(refused(name))?, true))
    }

    /// Tokens around a short prompt, and some to spare.
    pub fn around(&self) -> usize {
        self.tokens(Prompt::Text("1".into()), usize::MAX).map_or(0, |(tokens, _)| tokens.len()) + 16
    }
}
