//! An answer as server-sent events.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper::body::{Body, Bytes, Frame};
use tokio::time::{Instant, Sleep, sleep};

use super::form::{Head, Part};
use crate::serve::{
    choices::{Choices, Delta},
    error::Refused,
    request::Form,
};

/// So often something is sent while nothing happens, so that neither side takes the other for gone.
const BEAT: Duration = Duration::from_secs(15);

/// Events are gathered up to so many bytes, where they come faster than they are sent.
const GATHERED: usize = 16 << 10;

/// The body of a streamed answer. It is asked for more only while the client takes it.
pub struct Stream {
    head: Head,
    /// `None` after the last event.
    choices: Option<Choices>,
    /// Whether the last event is the numbers of tokens.
    usage: bool,
    /// What is ready to be sent.
    text: String,
    beat: Pin<Box<Sleep>>,
}

impl Stream {
    pub fn new(head: Head, choices: Choices, usage: bool) -> Self {
        let count = choices.count();
        let mut stream = Self { head, choices: Some(choices), usage, text: String::new(), beat: Box::pin(sleep(BEAT)) };
        if stream.head.form == Form::Chat {
            (0..count).for_each(|number| stream.put(&stream.head.first(number, usage)));
        }
        stream
    }

    fn put(&mut self, event: &str) {
        self.text += "data: ";
        self.text += event;
        self.text += "\n\n";
    }

    /// What came from the engine. `None`: all answers have ended.
    fn take(&mut self, came: Option<Result<Delta, Refused>>) {
        match came {
            Some(Ok(Delta { choice: index, text, tokens, end })) => {
                // As in OpenAI's API, a chat's last piece has no text.
                let is_apart = self.head.form == Form::Chat && !(text.is_empty() && tokens.is_empty());
                let said = Part { index, text: &text, tokens: &tokens, end: end.filter(|_| !is_apart) };
                self.put(&self.head.piece(&said, self.usage));
                if is_apart && end.is_some() {
                    self.put(&self.head.piece(&Part { index, text: "", tokens: &[], end }, self.usage));
                }
            }
            Some(Err(refused)) => {
                self.put(&refused.json().to_string());
                self.choices = None;
            }
            None => {
                let usage = self.choices.take().map(|choices| choices.usage()).filter(|_| self.usage);
                if let Some(usage) = usage {
                    self.put(&self.head.last(usage));
                }
                self.put("[DONE]");
            }
        }
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let stream = self.get_mut();
        while stream.text.len() < GATHERED
            && let Some(choices) = &mut stream.choices
            && let Poll::Ready(came) = choices.poll(context)
        {
            stream.take(came);
        }
        if stream.text.is_empty() {
            if stream.choices.is_none() {
                return Poll::Ready(None);
            }
            if stream.beat.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            // A comment.
            stream.text += ":\n\n";
        }
        stream.beat.as_mut().reset(Instant::now() + BEAT);
        Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut stream.text).into()))))
    }
}
