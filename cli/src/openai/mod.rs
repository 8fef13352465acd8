//! Requests and answers in the form of OpenAI's API: one parser for whatever takes them.
//!
//! What a body asks for and this program cannot do is refused by name: to leave it out in silence would give another answer than
//! was asked for.

mod body;
mod fields;
mod reply;

pub use body::{Endpoint, messages};
pub use fields::Fields;
pub use reply::{Usage, completed, refused};

use crate::{sampling::SamplingOptions, text::Message};

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// What a user says, where the model has a chat template; else text.
    Turn(String),
    /// Text, as it is.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// A conversation, which takes a chat template.
    Messages(Vec<Message>),
}

impl Prompt {
    /// No fewer than its tokens, but for what a chat template puts around it: a token has a byte or more.
    pub fn most_tokens(&self) -> usize {
        match self {
            Self::Turn(text) | Self::Text(text) => text.len(),
            Self::Ids(ids) => ids.len(),
            Self::Messages(turns) => turns.iter().map(|turn| turn.role.len() + turn.content.len() + AROUND).sum(),
        }
    }
}

/// A chat template puts fewer tokens around each turn.
const AROUND: usize = 16;

/// A request, as far as it says something.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub prompt: Prompt,
    /// The most new tokens.
    pub most: Option<usize>,
    /// Texts that end the answer.
    pub stop: Option<Vec<String>>,
    pub sampling: SamplingOptions,
    /// The name of the model, which is told back.
    pub model: Option<String>,
}
