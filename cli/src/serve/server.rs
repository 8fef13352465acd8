//! What all connections share: the engine, the model's words, and what the server was told.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use layer_streamer::{
    engine::Engine,
    model::{Model, Sampling},
};
use tokio::sync::Semaphore;

use super::{
    body,
    closing::Closing,
    counts::{HttpCounts, Memory},
    key::Key,
    request::Terms,
    room::{self, Room},
};
use crate::{
    sampling,
    text::{ChatTemplate, Text},
};

/// A body that is longer than this counts as long, in bytes.
pub const LONG_BODY: usize = 16 << 10;

/// So many of the longest bodies are read at a time, or more that are shorter.
pub const LONG_BODIES: usize = 4;

/// The server, as its connections see it.
pub struct Server {
    pub engine: Engine,
    pub text: Arc<Text>,
    pub template: Option<ChatTemplate>,
    /// What clients call the model.
    pub name: String,
    /// When the server began, in seconds since 1970.
    pub begun: u64,
    pub vocab: usize,
    /// Tokens that a prompt may have with its answer.
    pub context: usize,
    /// The most bytes that those can be: what is longer need not be tokenized, which takes hundreds of times its bytes.
    pub longest_text: usize,
    /// The most tokens of an answer.
    pub most: usize,
    /// What a request leaves out.
    pub sampling: Sampling,
    pub stop_tokens: Vec<u32>,
    pub rules: Rules,
    pub http: HttpCounts,
    pub closing: Closing,
    /// Permits for long bodies, in KiB.
    pub long_bodies: Arc<Semaphore>,
    /// Permits for what requests take while they are parsed and cut into tokens, in KiB.
    pub reading: Arc<Semaphore>,
    /// For prompts that wait and answers that are not taken.
    pub room: Arc<Room>,
    pub memory: Memory,
}

/// Whom the server answers, and how patiently.
pub struct Rules {
    pub key: Option<Key>,
    /// Whether it can be reached from this machine alone.
    pub is_local: bool,
    /// The longest body, in bytes.
    pub body: usize,
    /// How long a client may take for its request, and for taking what it is sent.
    pub patience: Duration,
}

impl Server {
    pub fn new(
        engine: Engine,
        (text, template): (Text, Option<ChatTemplate>),
        model: &Model,
        (name, context, most): (String, usize, usize),
        rules: Rules,
        (memory, room): (Memory, Room),
    ) -> Self {
        let reading = (room::reading(context, rules.body) >> 10).min(u32::MAX as usize);
        let longest_text = context.saturating_mul(text.longest_token());
        Self {
            engine,
            longest_text,
            text: Arc::new(text),
            template,
            name,
            begun: now(),
            vocab: model.config.vocab,
            context,
            most,
            sampling: model.config.suggested.sampling,
            stop_tokens: model.config.stop.clone(),
            http: HttpCounts::default(),
            closing: Closing::default(),
            long_bodies: Arc::new(Semaphore::new(LONG_BODIES * body::permits(rules.body) as usize)),
            rules,
            reading: Arc::new(Semaphore::new(reading)),
            room: Arc::new(room),
            memory,
        }
    }

    /// What requests are read with; a text may have so many bytes.
    pub fn terms(&self, longest_text: usize) -> Terms<'_> {
        Terms {
            text: &self.text,
            template: self.template.as_ref(),
            name: Some(&self.name),
            vocab: self.vocab,
            context: self.context,
            longest_text,
            most: self.most,
            usual: None,
            sampling: self.sampling,
            seed: &sampling::drawn,
            stop_tokens: &self.stop_tokens,
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
