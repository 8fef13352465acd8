//! Many sequences at once: requests come and go at any time, and share the passes of one [`Decoder`].
//!
//! A pass over streamed layers costs nearly the same for one token as for hundreds. So an [`Engine`] takes whatever there is to do into the
//! next pass: one token of each sequence that is being continued, and as much of the prompts that have begun as its
//! [pace](Limits::delay) allows. What a sequence comes to does not depend on that, to the last bit: neither on the others, nor on when
//! they came ([`Decoder::forward`]). What prompts begin with in common is computed by one of them; the others wait for its pages.
//!
//! ```text
//! submit ──► waiting ──a row of the cache──► running: prompt, then token after token ──► the last event
//!                ▲                                      │
//!                └───────── the cache is full ──────────┘   the youngest of the least important waits again
//! ```

mod pace;
mod schedule;
mod worker;

use std::{
    fmt,
    ops::ControlFlow,
    panic,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

use worker::{Command, Counts, Job, Worker};

use crate::{
    error::{Error, Result},
    kernels::Kernels,
    model::{Decoder, Sampling},
};

/// A prompt that is to be continued.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one token; with the new ones no more than [`Decoder::context`].
    pub prompt: Vec<u32>,
    /// The most new tokens; at least one.
    pub most: usize,
    /// Tokens that end the answer, and are not part of it.
    pub stop: Vec<u32>,
    /// How tokens are chosen; `temperature` 0: the most likely one.
    pub sampling: Sampling,
    /// Sequences of the same seed with different numbers draw differently: one for each of several answers to a prompt.
    pub number: u64,
    /// With each token its probability, and those of so many likeliest ones.
    pub logprobs: Option<usize>,
    /// Of those that wait the greatest is next, and of equal ones the first.
    pub priority: i32,
}

impl Request {
    /// A prompt that is continued by the most likely tokens, up to so many.
    pub fn new(prompt: Vec<u32>, most: usize) -> Self {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        Self { prompt, most, stop: Vec::new(), sampling, number: 0, logprobs: None, priority: 0 }
    }
}

/// What happens to a request. After [`End`](Event::End) there is nothing more.
#[derive(Clone, Debug)]
pub enum Event {
    /// A new token.
    Token(Token),
    /// The answer ends.
    End(End),
}

/// A new token of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its number in the vocabulary.
    pub id: u32,
    /// If asked for.
    pub logprobs: Option<Logprobs>,
}

/// How likely a model holds tokens, before any change by [`Sampling`]: natural logarithms of probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, the most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ends.
#[derive(Clone, Debug)]
pub enum End {
    /// With this one of the request's stop tokens.
    Stop(u32),
    /// It has as many tokens as the request allows.
    Most,
    /// It fills the context.
    Context,
    /// By [`Engine::cancel`], by who was given the events, or since the engine was dropped.
    Cancelled,
    /// The pass failed; the engine goes on.
    Failed(Error),
}

/// What an engine allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The most requests beside those that have a row of the cache; one more is refused. By default 1024.
    pub waiting: usize,
    /// By how much of its time a pass may take longer so that prompts go on, while other sequences are being continued: 0.5, the
    /// default, is half as long again.
    pub delay: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { waiting: 1024, delay: 0.5 }
    }
}

/// What an engine did and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that wait for a row of the cache.
    pub waiting: usize,
    /// Sequences that have one.
    pub running: usize,
    /// Requests that have ended, however.
    pub ended: u64,
    /// Passes over the layers.
    pub passes: u64,
    /// Tokens of prompts that were computed; of sequences that were put back, again.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were there already, of another sequence that begins the same.
    pub reused_tokens: u64,
    /// Tokens that were chosen.
    pub new_tokens: u64,
    /// How often a sequence gave back its place since the cache was full.
    pub put_back: u64,
}

/// A request's number, by which it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

impl Ticket {
    /// For hosts that keep numbers, such as C's.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The ticket of this [`number`](Self::number).
    pub fn of(number: u64) -> Self {
        Self(number)
    }
}

/// Continues any number of prompts at once, on a thread of its own.
///
/// ```
/// use layer_streamer::{
///     Settings,
///     device::Cpu,
///     engine::{Engine, Event, Limits, Request},
///     model::{Decoder, Model},
/// };
///
/// let model = Model::open("examples/speller")?;
/// // Four sequences of up to 32 tokens.
/// let engine = Engine::new(Decoder::new(&Cpu, &model, &Settings::default(), 4, 32)?, Limits::default())?;
/// // `7=` and `8=`.
/// let answers = [[23, 29], [24, 29]].map(|prompt| {
///     engine.answer(Request { stop: model.config.stop.clone(), ..Request::new(prompt.to_vec(), 8) })
/// });
/// for (answer, expected) in answers.into_iter().zip([284, 295]) {
///     let tokens: Vec<_> = answer?.filter_map(|event| if let Event::Token(token) = event { Some(token.id) } else { None }).collect();
///     assert_eq!(tokens, [expected], "` seven`, ` eight`");
/// }
/// # Ok::<(), layer_streamer::Error>(())
/// ```
pub struct Engine {
    commands: Sender<Command>,
    counts: Arc<Counts>,
    tickets: AtomicU64,
    limits: Limits,
    vocab: usize,
    context: usize,
    rows: usize,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("limits", &self.limits).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the thread, which has the decoder from then on; what the decoder's cache holds is forgotten.
    ///
    /// # Errors
    /// [`Error::Setting`] for a delay that is no number from 0 on; [`Error::Thread`].
    pub fn new<D: Kernels>(decoder: Decoder<D>, limits: Limits) -> Result<Self> {
        if !(limits.delay >= 0.0 && limits.delay.is_finite()) {
            return Err(Error::setting("delay", format!("is {}, must be a number from 0 on", limits.delay)));
        }
        let (vocab, context, rows) = (decoder.model().config.vocab, decoder.context(), decoder.rows());
        let (commands, receiver) = mpsc::channel();
        let counts = Arc::new(Counts::default());
        let worker = Worker::new(decoder, limits, receiver, Arc::clone(&counts))?;
        let thread = thread::Builder::new().name("ls-engine".into()).spawn(move || worker.run());
        let thread = thread.map_err(|source| Error::Thread { stage: "engine", source: Arc::new(source) })?;
        Ok(Self { commands, counts, tickets: AtomicU64::new(1), limits, vocab, context, rows, thread: Some(thread) })
    }

    /// Hands in a request. `sink` is given its events by the engine's thread, which waits for it: it must be quick.
    /// [`ControlFlow::Break`], or a panic, cancels the request. Only a panic of the engine itself leaves it without a last event.
    ///
    /// # Errors
    /// [`Error::Setting`] that names what is wrong with the request; [`Error::Busy`] if as many requests wait as may.
    pub fn submit(
        &self,
        request: Request,
        sink: impl FnMut(Event) -> ControlFlow<()> + Send + 'static,
    ) -> Result<Ticket> {
        self.check(&request)?;
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(self.panicked());
        }
        if !self.counts.enter(self.limits.waiting.saturating_add(self.rows)) {
            return Err(Error::Busy { waiting: self.limits.waiting });
        }
        let ticket = Ticket(self.tickets.fetch_add(1, Ordering::Relaxed));
        // If the thread has ended, by a panic, the job is dropped with the channel: its sink sees no event.
        let sent = self.commands.send(Command::Submit(Box::new(Job::new(ticket.0, request, Box::new(sink)))));
        sent.map_err(|_| {
            self.counts.leave();
            self.panicked()
        })?;
        Ok(ticket)
    }

    /// The same; the events come as an iterator. Dropping that cancels the request.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn answer(&self, request: Request) -> Result<Answer> {
        let (sender, events) = mpsc::channel();
        let ticket = self.submit(request, move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        })?;
        Ok(Answer { events, ticket, commands: self.commands.clone() })
    }

    /// Ends a request at the end of the pass that runs; its last event is [`End::Cancelled`]. One that has ended stays as it is.
    pub fn cancel(&self, ticket: Ticket) {
        // A thread that has ended has nothing to cancel.
        let _ = self.commands.send(Command::Cancel(ticket.0));
    }

    /// What the engine did, and does now.
    pub fn stats(&self) -> EngineStats {
        self.counts.stats()
    }

    /// Lets all requests end, and the thread with them.
    ///
    /// # Errors
    /// [`Error::Panicked`]; [`Error::Setting`] in a sink, whose thread cannot wait for itself: there the engine is dropped.
    pub fn finish(mut self) -> Result<()> {
        if self.is_this_thread() {
            return Err(Error::setting("finish", "cannot be called by a sink, whose thread would wait for itself"));
        }
        let _ = self.commands.send(Command::Finish);
        let thread = self.thread.take().expect("taken here or in drop");
        thread.join().map_err(|_| self.panicked())
    }

    /// Whether this is the engine's thread, as in a sink, where its end cannot be waited for.
    pub(crate) fn is_this_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|engine| engine.thread().id() == thread::current().id())
    }

    fn check(&self, request: &Request) -> Result<()> {
        let (length, most) = (request.prompt.len(), self.context);
        if request.prompt.is_empty() {
            return Err(Error::setting("prompt", "is empty; give at least one token"));
        }
        if length > most {
            return Err(Error::setting("prompt", format!("has {length} tokens, the context {most}")));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::setting("prompt", format!("token {id} is not in the vocabulary of {}", self.vocab)));
        }
        if request.most == 0 {
            return Err(Error::setting("most", "is 0; ask for at least one token"));
        }
        request.sampling.check()
    }

    fn panicked(&self) -> Error {
        Error::Panicked { stage: "engine", message: "see what it said on stderr".into() }
    }
}

impl Drop for Engine {
    /// Cancels what has not ended, and waits for the pass that runs; not in a sink, whose thread that is: there the thread ends later.
    fn drop(&mut self) {
        let is_this_thread = self.is_this_thread();
        let Some(thread) = self.thread.take() else { return };
        let _ = self.commands.send(Command::Drop);
        if is_this_thread {
            return;
        }
        if let Err(panic) = thread.join()
            && !thread::panicking()
        {
            panic::resume_unwind(panic);
        }
    }
}

/// The events of a request, one after the other; waits for each. Dropping it cancels the request.
pub struct Answer {
    events: Receiver<Event>,
    ticket: Ticket,
    commands: Sender<Command>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Nothing is left to cancel where the engine has ended.
        let _ = self.commands.send(Command::Cancel(self.ticket.0));
    }
}

impl Iterator for Answer {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.events.recv().ok()
    }
}
