//! Memory for requests on their way: so much is set aside, as a part of the budget, and who wants more waits or is refused.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use layer_streamer::{
    engine::Token,
    plan::{Part, Purpose},
};

use super::{choices::Happened, server::LONG_BODIES};

/// What a connection takes, in bytes: buffers of both directions, a short body, an event on its way, and its task.
const CONNECTION: usize = 96 << 10;

/// What is set aside for prompts that wait and answers that are not taken, in bytes.
const KEPT: usize = 64 << 20;

/// The least that is set aside for reading requests, in bytes.
const READING: usize = 32 << 20;

/// The text of a token, as it is gathered and written, in bytes.
const TEXT: usize = 64;

/// A token's probability as it is written, with its text and bytes, in bytes.
const PROBABILITY: usize = 192;

/// A token of a prompt; the engine's list of them grows by doubling.
const PROMPT_TOKEN: usize = 2 * size_of::<u32>();

/// How many bytes requests may take while they are read: as much as the longest that make sense do, which are a prompt of the whole context,
/// and lists of tokens in a body of the longest.
pub fn reading(context: usize, body_limit: usize) -> usize {
    let text = context.saturating_mul(8 * super::cost::TOKENIZED);
    READING.max(text).max(body_limit.saturating_mul(12))
}

/// What all requests take of RAM, where so many connections may be open.
pub fn memory(connections: usize, sequences: usize, context: usize, body_limit: usize) -> Part {
    let running = sequences.saturating_mul(context).saturating_mul(PROMPT_TOKEN);
    let bytes = [
        connections.saturating_mul(CONNECTION),
        LONG_BODIES.saturating_mul(body_limit),
        reading(context, body_limit),
        KEPT,
        running,
    ];
    Part { purpose: Purpose::Requests, bytes: bytes.into_iter().fold(0, usize::saturating_add) }
}

/// What is kept of all requests together.
#[derive(Debug)]
pub struct Room {
    most: usize,
    taken: AtomicUsize,
}

impl Default for Room {
    fn default() -> Self {
        Self { most: KEPT, taken: AtomicUsize::new(0) }
    }
}

/// What is kept of one request; it is given back when this is dropped.
#[derive(Debug)]
pub struct Kept {
    room: Arc<Room>,
    own: AtomicUsize,
    /// Whether it is a stream, whose tokens leave as they are taken. Else they are gathered, and written as a whole.
    is_stream: bool,
    was_full: AtomicBool,
}

impl Kept {
    pub fn new(room: &Arc<Room>, is_stream: bool) -> Self {
        Self { room: Arc::clone(room), own: AtomicUsize::new(0), is_stream, was_full: AtomicBool::new(false) }
    }

    /// Whether there was too little room for something of it.
    pub fn was_full(&self) -> bool {
        self.was_full.load(Relaxed)
    }

    /// Keeps a prompt of so many tokens, if there is room.
    pub fn take_prompt(&self, tokens: usize) -> bool {
        self.take(tokens.saturating_mul(PROMPT_TOKEN))
    }

    /// Keeps a new token, if there is room.
    pub fn take_token(&self, token: &Token) -> bool {
        self.take(self.of(token))
    }

    /// The token has been taken out of the channel.
    pub fn passed(&self, token: &Token) {
        if self.is_stream {
            let bytes = self.of(token);
            self.own.fetch_sub(bytes, Relaxed);
            self.room.taken.fetch_sub(bytes, Relaxed);
        }
    }

    /// What a token takes until it is sent.
    fn of(&self, Token { logprobs, .. }: &Token) -> usize {
        let top = logprobs.as_ref().map_or(0, |logprobs| logprobs.top.len());
        let event = size_of::<Happened>() + top * size_of::<(u32, f32)>();
        match logprobs {
            _ if self.is_stream => event,
            None => event + TEXT,
            Some(_) => event + TEXT + (1 + top) * PROBABILITY,
        }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |taken: usize| taken.checked_add(bytes).filter(|taken| *taken <= self.room.most);
        let is_taken = self.room.taken.fetch_update(Relaxed, Relaxed, fits).is_ok();
        match is_taken {
            true => _ = self.own.fetch_add(bytes, Relaxed),
            false => self.was_full.store(true, Relaxed),
        }
        is_taken
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.room.taken.fetch_sub(*self.own.get_mut(), Relaxed);
    }
}

/// An answer on its way to a client, and its room.
pub struct Sent {
    text: String,
    _kept: Arc<Kept>,
}

impl Sent {
    pub fn new(text: String, kept: Arc<Kept>) -> Self {
        Self { text, _kept: kept }
    }
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use layer_streamer::engine::Logprobs;

    use super::*;

    #[test]
    fn what_is_kept_is_given_back_once_and_no_more_is_taken_than_there_is() {
        let room = Arc::new(Room { most: 20_000, taken: AtomicUsize::new(0) });
        let taken = || room.taken.load(Relaxed);
        let token = |top| Token { id: 7, logprobs: Some(Logprobs { chosen: 0.0, top: vec![(7, 0.0); top] }) };
        let (stream, whole) = (Kept::new(&room, true), Kept::new(&room, false));
        assert!(stream.take_prompt(100) && stream.take_token(&token(5)) && stream.take_token(&token(0)));
        let before = taken();
        stream.passed(&token(5));
        assert_eq!(before - taken(), size_of::<Happened>() + 40);
        assert!(whole.take_token(&token(20)));
        let before = taken();
        whole.passed(&token(20));
        assert_eq!(taken(), before, "it is gathered");
        assert!(!whole.take_prompt(2500) && whole.was_full() && !stream.was_full());
        assert_eq!(taken(), before);
        drop(whole);
        drop(stream);
        assert_eq!(taken(), 0);
    }

    #[test]
    fn all_that_requests_take_grows_with_what_they_may_be() {
        let usual = memory(528, 16, 4096, 4 << 20).bytes;
        assert!((150 << 20..200 << 20).contains(&usual), "{usual}");
        assert_eq!(memory(529, 16, 4096, 4 << 20).bytes - usual, CONNECTION);
        assert_eq!(memory(528, 16, 4096, 8 << 20).bytes - usual, (16 + 48) << 20);
        assert!(memory(528, 16, 131_072, 4 << 20).bytes > usual + (200 << 20));
        assert_eq!(memory(usize::MAX, 1, 1, 1).bytes, usize::MAX);
    }
}
