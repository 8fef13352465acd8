//! The answers to a request: its sequences in the engine, and what their tokens become.

use std::{
    ops::ControlFlow,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::http::StatusCode;
use layer_streamer::engine::{End, Event, Logprobs, Request, Ticket, Token};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::{closing::Answering, error::Refused, request::Asked, room::Kept, server::Server};
use crate::{Failure, text::AnswerText, text::Text};

/// All answers to a request, as they come.
///
/// The channel has no bound, so that the engine's thread never waits for a client; an answer ends with an error where there is no
/// [`Room`](super::room::Room) for more. Dropping this cancels what has not ended.
pub struct Choices {
    events: UnboundedReceiver<Happened>,
    choices: Vec<Choice>,
    left: usize,
    prompt_tokens: usize,
    kept: Arc<Kept>,
    server: Arc<Server>,
    /// The server does not end before.
    _answering: Answering,
}

/// Which answer, and what happened to it.
pub type Happened = (usize, Event);

/// What is new of one answer.
#[derive(Debug)]
pub struct Delta {
    /// Which answer.
    pub choice: usize,
    pub text: String,
    /// The tokens of that text, if their probabilities were asked for.
    pub tokens: Vec<Spoken>,
    /// Why the answer ends, if it does, in OpenAI's words.
    pub end: Option<&'static str>,
}

/// A token and how likely it was.
#[derive(Debug)]
pub struct Spoken {
    pub id: u32,
    pub logprob: f32,
    /// The likeliest ones.
    pub top: Vec<(u32, f32)>,
    /// Where its text begins in the answer, in characters.
    pub at: usize,
    /// Where that ends, once it is known: that of a part of a character with the character.
    until: usize,
}

/// The numbers of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub prompt: usize,
    pub new: usize,
}

struct Choice {
    text: AnswerText<Arc<Text>>,
    /// Tokens whose text is held back.
    held: Vec<Spoken>,
    tokens: usize,
    /// Until it ends.
    ticket: Option<Ticket>,
}

impl Choices {
    /// Hands the request's sequences to the engine.
    pub fn begin(server: Arc<Server>, asked: Asked, answering: Answering) -> Result<Self, Refused> {
        let (sender, events) = mpsc::unbounded_channel();
        let prompt_tokens = asked.prompts.iter().map(Vec::len).sum();
        let kept = Arc::new(Kept::new(&server.room, asked.stream));
        if !kept.take_prompt(asked.choices.saturating_mul(prompt_tokens)) {
            return Err(Refused::no_room());
        }
        let choices = Vec::new();
        let mut all = Self { events, choices, left: 0, prompt_tokens, kept, server, _answering: answering };
        for prompt in &asked.prompts {
            for number in 0..asked.choices {
                let request = Request {
                    stop: asked.stop_tokens.clone(),
                    sampling: asked.sampling,
                    number: number as u64,
                    logprobs: asked.logprobs,
                    ..Request::new(prompt.clone(), asked.most)
                };
                let (sender, choice, kept) = (sender.clone(), all.choices.len(), Arc::clone(&all.kept));
                let sink = move |event| {
                    let fits = if let Event::Token(token) = &event { kept.take_token(token) } else { true };
                    match fits && sender.send((choice, event)).is_ok() {
                        true => ControlFlow::Continue(()),
                        false => ControlFlow::Break(()),
                    }
                };
                // Where this one is refused, those before are cancelled.
                let ticket = all.server.engine.submit(request, sink)?;
                let text = AnswerText::new(Arc::clone(&all.server.text), &asked.stop_texts);
                all.choices.push(Choice { text, held: Vec::new(), tokens: 0, ticket: Some(ticket) });
                all.left += 1;
            }
        }
        Ok(all)
    }

    /// How many answers there are.
    pub fn count(&self) -> usize {
        self.choices.len()
    }

    /// What is kept of the answers, while they are on their way to the client.
    pub fn kept(&self) -> Arc<Kept> {
        Arc::clone(&self.kept)
    }

    pub fn usage(&self) -> Usage {
        Usage { prompt: self.prompt_tokens, new: self.choices.iter().map(|choice| choice.tokens).sum() }
    }

    /// What comes next; `None` when all answers have ended.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Delta, Refused>>> {
        while self.left > 0 {
            let Some((number, event)) = ready!(self.events.poll_recv(context)) else {
                // A sink was dropped without the last event: the engine's thread is gone.
                self.server.closing.begin();
                return Poll::Ready(Some(Err(broken(
                    "the engine has ended by a panic: see the server's stderr, and start it anew",
                ))));
            };
            if let Event::Token(token) = &event {
                self.kept.passed(token);
            }
            if self.kept.was_full() {
                return Poll::Ready(Some(Err(Refused::no_room())));
            }
            let choice = &mut self.choices[number];
            // What follows a stop text until the engine has noticed.
            if choice.ticket.is_none() {
                continue;
            }
            let delta = match choice.take(number, event) {
                Ok(delta) => delta,
                Err(refused) => return Poll::Ready(Some(Err(refused))),
            };
            if delta.end.is_some() {
                self.left -= 1;
                if let Some(ticket) = choice.ticket.take() {
                    self.server.engine.cancel(ticket);
                }
            }
            if !delta.text.is_empty() || !delta.tokens.is_empty() || delta.end.is_some() {
                return Poll::Ready(Some(Ok(delta)));
            }
        }
        Poll::Ready(None)
    }
}

impl Drop for Choices {
    fn drop(&mut self) {
        for ticket in self.choices.iter().filter_map(|choice| choice.ticket) {
            self.server.engine.cancel(ticket);
        }
    }
}

impl Choice {
    fn take(&mut self, number: usize, event: Event) -> Result<Delta, Refused> {
        let (piece, mut end) = match event {
            Event::Token(Token { id, logprobs }) => {
                self.tokens += 1;
                let at = self.text.said();
                self.held.extend(logprobs.map(|Logprobs { chosen, top }| Spoken {
                    id,
                    logprob: chosen,
                    top,
                    at,
                    until: at,
                }));
                let piece = self.text.push(id).map_err(unreadable)?;
                let said = self.text.said();
                self.held.iter_mut().filter(|token| token.until == token.at).for_each(|token| token.until = said);
                (piece, None)
            }
            Event::End(End::Failed(error)) => return Err(broken(&error.to_string())),
            Event::End(End::Cancelled) => return Err(Refused::closing()),
            Event::End(end) => {
                let name = if matches!(end, End::Stop(_)) { "stop" } else { "length" };
                (self.text.end().map_err(unreadable)?, Some(name))
            }
        };
        let given = self.text.given();
        let mut ready = self.held.iter().take_while(|token| token.at < token.until && token.until <= given).count();
        if piece.stop.is_some() {
            // Tokens that the stop text is made of are not told, nor one that has its beginning.
            self.held.truncate(ready);
            end = Some("stop");
        } else if end.is_some() {
            ready = self.held.len();
        }
        Ok(Delta { choice: number, text: piece.text, tokens: self.held.drain(..ready).collect(), end })
    }
}

fn broken(message: &str) -> Refused {
    Refused::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn unreadable(error: Failure) -> Refused {
    broken(&error.to_string())
}
