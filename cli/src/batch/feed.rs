//! Keeps the engine busy: lines go in as its places become free, and answers come out.
//!
//! ```text
//! reader: a line for each permit ──► waiting in the engine ──► running ──► Order ──► output
//!             ▲                                                              │
//!             └──────────── permits, while not too many are on their way ────┘
//! ```

use std::{
    collections::HashMap,
    io::BufRead,
    ops::ControlFlow,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use axum::http::StatusCode;
use layer_streamer::{
    Error,
    engine::{self, Engine, Event, Ticket},
    plan::{Part, Purpose},
};

use super::{
    answer::{Done, Place},
    input::Lines,
    known::Known,
    order::Order,
    output::Output,
    prepare::{Job, Prepared, Preparing},
    progress::Progress,
};
use crate::{
    Failure, interrupt,
    run::End,
    serve::{choices::Usage, error::Refused},
    text::{AnswerText, Text},
};

/// How long Ctrl-C may go unnoticed.
const PATIENCE: Duration = Duration::from_millis(50);

/// So many times the sequences may be between the first answer that is not written and the last line that was read: those of
/// short answers that wait for a long one before them.
const MOST_HELD: usize = 64;

/// Bytes that those answers may have before no more lines are read.
fn most_held_bytes(sequences: usize) -> usize {
    sequences.saturating_mul(64 << 10).max(4 << 20)
}

/// What lines and answers on their way take of RAM: twice as many as there are sequences, with text or tokens of their answers, and those
/// that are held; and so many bytes besides.
pub fn memory(sequences: usize, context: usize, besides: usize) -> Part {
    /// Of a token: of a prompt or an answer, in lists that grow by doubling; and its text.
    const TOKEN: usize = 2 * size_of::<u32>() + 24;
    let on_their_way = sequences.saturating_mul(2).saturating_mul(context).saturating_mul(TOKEN);
    // Held, and gathered to be written.
    let held = most_held_bytes(sequences).saturating_mul(2);
    Part { purpose: Purpose::Requests, bytes: on_their_way.saturating_add(held).saturating_add(besides) }
}

enum Happening {
    Line(Box<Prepared>),
    /// The input has ended, as it should or not.
    Over(Result<(), Failure>),
    Event(u64, Event),
    /// The engine's thread is gone.
    Lost,
}

/// Where a request's events go. That the engine dropped it without the last one is told too.
struct Sink {
    number: u64,
    to: Sender<Happening>,
    has_ended: bool,
}

impl Sink {
    fn tell(&mut self, event: Event) -> ControlFlow<()> {
        self.has_ended = matches!(event, Event::End(_));
        match self.to.send(Happening::Event(self.number, event)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if !self.has_ended {
            let _ = self.to.send(Happening::Lost);
        }
    }
}

/// A line in the engine.
struct Active {
    /// Its place in the order.
    at: u64,
    place: Place,
    ticket: Ticket,
    words: Option<AnswerText<Arc<Text>>>,
    text: String,
    ids: Vec<u32>,
    new: usize,
    prompt: usize,
    seed: Option<u64>,
    model: String,
}

/// How a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Complete,
    /// By Ctrl-C.
    Interrupted,
    /// Whoever read standard output went away.
    Unread,
}

/// What a batch is run by.
pub struct Feed<'a> {
    pub engine: &'a Engine,
    pub preparing: Arc<Preparing>,
    pub sequences: usize,
    /// A line that is not understood ends the batch.
    pub strict: bool,
    pub by_input: bool,
    pub output: &'a mut Output,
    pub progress: &'a mut Progress,
}

/// Reads lines on a thread of its own, which tokenizes them too: one for each permit. It may wait for its input for ever, so
/// nobody waits for it; a panic is told as an error.
fn read<R: BufRead + Send + 'static>(
    mut lines: Lines<R>,
    mut known: Known,
    preparing: Arc<Preparing>,
    permits: Receiver<()>,
    to: Sender<Happening>,
) -> Result<(), Failure> {
    let mut next = move || -> Result<Option<Prepared>, Failure> {
        while let Some(line) = lines.next().map_err(|error| format!("cannot read the input: {error}"))? {
            if !known.has(line.number, line.digest)? {
                return Ok(Some(preparing.prepare(line)));
            }
        }
        known.end()?;
        Ok(None)
    };
    let read = move || {
        while permits.recv().is_ok() {
            // After a panic nothing is read any more.
            let happening = match panic::catch_unwind(AssertUnwindSafe(&mut next)) {
                Ok(Ok(Some(prepared))) => Happening::Line(Box::new(prepared)),
                Ok(Ok(None)) => Happening::Over(Ok(())),
                Ok(Err(error)) => Happening::Over(Err(error)),
                Err(_) => Happening::Over(Err(
                    "the thread that reads the input panicked; what it said is above. This is a bug, please report it"
                        .into(),
                )),
            };
            let is_over = matches!(happening, Happening::Over(_));
            if to.send(happening).is_err() || is_over {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("batch-input".into())
        .spawn(read)
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    Ok(())
}

/// The state of a feed that runs.
struct Running<'a, 'b> {
    feed: &'b mut Feed<'a>,
    to: Sender<Happening>,
    order: Order,
    active: HashMap<u64, Active>,
    /// Lines that were permitted and have not come.
    awaited: usize,
    is_over: bool,
}

impl Feed<'_> {
    /// Answers all lines that are not known.
    ///
    /// # Errors
    /// Those of input, output and engine; where `strict`, a line that is not understood. What is written stays.
    pub fn run<R: BufRead + Send + 'static>(mut self, lines: Lines<R>, known: Known) -> Result<Ended, Failure> {
        let (to, happenings) = mpsc::channel();
        let (permit, permits) = mpsc::channel();
        read(lines, known, Arc::clone(&self.preparing), permits, to.clone())?;
        let order = Order::new(self.by_input);
        let mut running = Running { feed: &mut self, to, order, active: HashMap::new(), awaited: 0, is_over: false };
        let ended = running.run(&permit, &happenings);
        // Of a batch that failed too: what is answered need not be computed again.
        let written = running.write().and_then(|_| running.feed.output.sync(Duration::ZERO));
        let ended = ended?;
        written?;
        Ok(ended)
    }
}

impl Running<'_, '_> {
    fn run(&mut self, permit: &Sender<()>, happenings: &Receiver<Happening>) -> Result<Ended, Failure> {
        loop {
            while self.has_room() {
                self.awaited += 1;
                // A reader that is gone has said so.
                let _ = permit.send(());
            }
            if self.is_over && self.active.is_empty() {
                return Ok(Ended::Complete);
            }
            match happenings.recv_timeout(PATIENCE) {
                Ok(happening) => self.take(happening)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("the batch's threads are gone; start it again".into());
                }
            }
            while let Ok(happening) = happenings.try_recv() {
                self.take(happening)?;
            }
            if !self.write()? {
                return Ok(Ended::Unread);
            }
            self.feed.progress.tell(&self.feed.engine.stats());
            if interrupt::is_noted() {
                return Ok(Ended::Interrupted);
            }
        }
    }

    /// Whether another line may be read: the engine has as many again as it can run, and not too many answers wait for another.
    fn has_room(&self) -> bool {
        let sequences = self.feed.sequences;
        let on_their_way = self.active.len() + self.awaited;
        let may_be_held = self.order.held() + self.awaited < MOST_HELD * sequences
            && self.order.held_bytes() < most_held_bytes(sequences);
        !self.is_over && on_their_way < 2 * sequences && may_be_held
    }

    fn write(&mut self) -> Result<bool, Failure> {
        let ready = self.order.take_ready();
        let is_read = self.feed.output.write(&ready.lines)?;
        let tally = &mut self.feed.progress.tally;
        (tally.answered, tally.errors) = (tally.answered + ready.count, tally.errors + ready.errors);
        Ok(is_read)
    }

    fn take(&mut self, happening: Happening) -> Result<(), Failure> {
        match happening {
            Happening::Line(prepared) => {
                self.awaited -= 1;
                self.submit(*prepared)
            }
            Happening::Over(result) => {
                self.is_over = true;
                result
            }
            Happening::Event(number, event) => self.event(number, event),
            Happening::Lost => Err("the engine has ended; what it said is above. The same command goes on".into()),
        }
    }

    fn submit(&mut self, Prepared { place, job }: Prepared) -> Result<(), Failure> {
        let at = self.order.enter();
        let job = match job {
            Ok(job) => job,
            Err(why) => return self.refuse(at, &place, why),
        };
        let Job { request, stop, seed, model } = job;
        let prompt = request.prompt.len();
        let mut sink = Sink { number: place.number, to: self.to.clone(), has_ended: false };
        let ticket = match self.feed.engine.submit(request, move |event| sink.tell(event)) {
            Ok(ticket) => ticket,
            Err(error @ Error::Setting { .. }) => return self.refuse(at, &place, error.into()),
            Err(error) => return Err(error.into()),
        };
        let words = &self.feed.preparing.words;
        let text = words.text.as_ref().filter(|_| words.in_words);
        let words = text.map(|text| AnswerText::new(Arc::clone(text), &stop));
        let (text, ids, new) = (String::new(), Vec::new(), 0);
        let number = place.number;
        self.active.insert(number, Active { at, place, ticket, words, text, ids, new, prompt, seed, model });
        Ok(())
    }

    /// A line that is not understood, or that the model cannot answer.
    fn refuse(&mut self, at: u64, place: &Place, why: Refused) -> Result<(), Failure> {
        if self.feed.strict {
            return Err(format!("line {}: {}", place.number, why.message()).into());
        }
        self.order.put(at, place.line(&Err(why)), true);
        Ok(())
    }

    fn event(&mut self, number: u64, event: Event) -> Result<(), Failure> {
        // What follows a text that ended the answer, until the engine has noticed.
        let Some(active) = self.active.get_mut(&number) else { return Ok(()) };
        let end = match event {
            Event::Token(token) => match active.push(token.id) {
                Ok(None) => return Ok(()),
                Ok(Some(stop)) => {
                    self.feed.engine.cancel(active.ticket);
                    Ok(End::StopText(stop))
                }
                Err(error) => {
                    self.feed.engine.cancel(active.ticket);
                    Err(unreadable(&error))
                }
            },
            Event::End(engine::End::Stop(token)) => Ok(End::StopToken(token)),
            Event::End(engine::End::Most) => Ok(End::Limit),
            Event::End(engine::End::Context) => Ok(End::Context),
            // The model's numbers for this prompt are none.
            Event::End(engine::End::Failed(error @ Error::Setting { .. })) => Err(error.into()),
            // By Ctrl-C, which is noticed soon.
            Event::End(engine::End::Failed(Error::Cancelled)) if interrupt::is_noted() => return Ok(()),
            Event::End(engine::End::Failed(error)) => return Err(format!("{error}; the same command goes on").into()),
            Event::End(engine::End::Cancelled) => return Ok(()),
        };
        let active = self.active.remove(&number).expect("it was there just now");
        let (at, place, done) = active.end(end);
        match done {
            Ok(done) => self.order.put(at, place.line(&Ok(done)), false),
            Err(why) => self.refuse(at, &place, why)?,
        }
        Ok(())
    }
}

impl Active {
    /// The next token; the text that ends the answer, if it does.
    fn push(&mut self, token: u32) -> Result<Option<String>, Failure> {
        self.new += 1;
        let Some(words) = &mut self.words else {
            self.ids.push(token);
            return Ok(None);
        };
        let piece = words.push(token)?;
        self.text += &piece.text;
        Ok(piece.stop)
    }

    fn end(mut self, end: Result<End, Refused>) -> (u64, Place, Result<Done, Refused>) {
        let done = end.and_then(|mut end| {
            if let Some(words) = self.words.as_mut().filter(|_| !matches!(end, End::StopText(_))) {
                let piece = words.end().map_err(|error| unreadable(&error))?;
                self.text += &piece.text;
                if let Some(stop) = piece.stop {
                    end = End::StopText(stop);
                }
            }
            let text = if self.words.is_some() { Ok(self.text) } else { Err(self.ids) };
            let usage = Usage { prompt: self.prompt, new: self.new };
            Ok(Done { text, end, usage, seed: self.seed, model: self.model })
        });
        (self.at, self.place, done)
    }
}

/// The tokenizer makes no text of the answer.
fn unreadable(error: &Failure) -> Refused {
    Refused::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufReader, Read};

    use super::*;
    use crate::{batch::prepare::Words, sampling::SamplingOptions};

    struct Panics;

    impl Read for Panics {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("on purpose")
        }
    }

    /// Of a model without a tokenizer.
    fn preparing() -> Preparing {
        let words = Words { text: None, template: None, raw: false, system: None, thinking: None, in_words: false };
        Preparing {
            words,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            most: 1,
            name: String::new(),
            suggested: Default::default(),
            stop_tokens: Vec::new(),
            vocab: 9,
            context: 9,
            max_positions: 9,
            longest_token: 1,
        }
    }

    #[test]
    fn a_panic_where_the_input_is_read_ends_the_batch_with_an_error() {
        let input = Lines::new(BufReader::new((&br#"{"prompt_ids": [1]}"#[..]).chain(&b"\n"[..]).chain(Panics)));
        let (to, happenings) = mpsc::channel();
        let (permit, permits) = mpsc::channel();
        // A batch that runs has this end too: the channel is never closed.
        read(input, Known::default(), Arc::new(preparing()), permits, to.clone()).unwrap();
        let next = || {
            permit.send(()).unwrap();
            happenings.recv_timeout(Duration::from_secs(20)).expect("it says something")
        };
        assert!(matches!(next(), Happening::Line(prepared) if prepared.job.is_ok()));
        let Happening::Over(Err(error)) = next() else { panic!("not an error") };
        assert!(error.to_string().contains("reads the input panicked"), "{error}");
        drop(to);
    }
}
