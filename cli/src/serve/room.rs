//! Memory for requests on their way: so much is set aside, as a part of the budget, and who wants more waits or is refused.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use layer_streamer::{
    engine::Token,
    plan::{Part, Purpose},
};

use super::{
    choices::Happened,
    error::Refused,
    request::{Asked, Form},
    server::LONG_BODIES,
};

/// What a connection takes, in bytes: buffers of both directions, a short body, an event on its way, and its task.
const CONNECTION: usize = 96 << 10;

/// What is set aside for prompts that wait and answers that are not taken, in bytes. Where that is full, there is more for answers that
/// take little.
const KEPT: usize = 64 << 20;

/// The least that is set aside for reading requests, in bytes.
const READING: usize = 32 << 20;

/// The text of a token, as it is gathered and written, in bytes.
const TEXT: usize = 64;

/// A token's probability as it is written, with its text and bytes, in bytes.
const PROBABILITY: usize = 192;

/// A token of a prompt; the engine's list of them grows by doubling.
const PROMPT_TOKEN: usize = 2 * size_of::<u32>();

/// How many bytes requests may take while they are read: as much as the longest that make sense do. Those are a text that fills the context,
/// at 16 bytes a token, and a body of the longest that is a list of tokens, at six bytes each: five digits and a comma, for which parsing
/// takes 96 bytes.
pub fn reading(context: usize, body_limit: usize) -> usize {
    let text = context.saturating_mul(16 * super::cost::TOKENIZED);
    READING.max(text).max(body_limit.saturating_mul(16))
}

/// What an answer of the whole context takes, if it comes whole and without probabilities, in bytes.
fn share(context: usize) -> usize {
    context.saturating_mul(size_of::<Happened>() + TEXT)
}

/// What all requests take of RAM, where so many connections may be open.
pub fn memory(connections: usize, sequences: usize, context: usize, body_limit: usize) -> Part {
    let running = sequences.saturating_mul(context).saturating_mul(PROMPT_TOKEN);
    let bytes = [
        connections.saturating_mul(CONNECTION),
        LONG_BODIES.saturating_mul(body_limit),
        reading(context, body_limit),
        KEPT,
        sequences.saturating_mul(share(context)),
        running,
    ];
    Part { purpose: Purpose::Requests, bytes: bytes.into_iter().fold(0, usize::saturating_add) }
}

/// What is kept of all requests together.
#[derive(Debug)]
pub struct Room {
    /// What all may take.
    most: usize,
    /// What those may take besides that have no more than `share` each: a request that takes all there is does not end their answers.
    more: usize,
    share: usize,
    taken: AtomicUsize,
}

impl Room {
    /// Room for so many sequences that run, each of up to `context` tokens.
    pub fn new(sequences: usize, context: usize) -> Self {
        let share = share(context);
        Self { most: KEPT, more: sequences.saturating_mul(share), share, taken: AtomicUsize::new(0) }
    }

    /// Refuses a request that cannot be answered even if there is no other.
    pub fn check(&self, asked: &Asked, context: usize) -> Result<(), Refused> {
        let Asked { form, prompts, choices, most, logprobs, stream, .. } = asked;
        let of_prompts = prompts.iter().map(|prompt| prompt.len().saturating_mul(PROMPT_TOKEN)).sum::<usize>();
        let with = |logprobs: Option<usize>| {
            let new = |prompt: &Vec<u32>| context.saturating_sub(prompt.len()).min(*most);
            let new = if *stream { 0 } else { prompts.iter().map(new).sum::<usize>() };
            choices.saturating_mul(of_prompts.saturating_add(new.saturating_mul(of_token(false, logprobs))))
        };
        let prompts_fit = choices.saturating_mul(of_prompts) <= self.most;
        let (taken, limit) = (with(*logprobs), self.most.max(self.share));
        if prompts_fit && taken <= limit {
            return Ok(());
        }
        let probabilities = match (form, logprobs) {
            (Form::Chat, Some(1..)) => "top_logprobs",
            _ => "logprobs",
        };
        let name = match () {
            () if prompts_fit && with(None) <= limit => probabilities,
            () if *choices > 1 => "n",
            () => "prompt",
        };
        let remedy = if *stream || !prompts_fit { "" } else { ", set a smaller max_tokens, or stream" };
        let cause = format!(
            "with this the request may take {taken} bytes, more than the {limit} that are set aside; ask for fewer{remedy}"
        );
        Err(Refused::field(name, cause))
    }
}

/// What a token takes until it is sent, with the probabilities of so many likeliest ones, in bytes.
fn of_token(is_stream: bool, logprobs: Option<usize>) -> usize {
    let event = size_of::<Happened>() + logprobs.unwrap_or(0) * size_of::<(u32, f32)>();
    match logprobs {
        _ if is_stream => event,
        None => event + TEXT,
        Some(top) => event + TEXT + (1 + top) * PROBABILITY,
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
        self.take(tokens.saturating_mul(PROMPT_TOKEN), self.room.most)
    }

    /// Keeps a new token, if there is room.
    pub fn take_token(&self, token: &Token) -> bool {
        let bytes = self.of(token);
        let is_small = self.own.load(Relaxed).saturating_add(bytes) <= self.room.share;
        let more = if is_small { self.room.more } else { 0 };
        self.take(bytes, self.room.most.saturating_add(more))
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
        of_token(self.is_stream, logprobs.as_ref().map(|logprobs| logprobs.top.len()))
    }

    /// Takes so many bytes, if all together take no more than `most` then.
    fn take(&self, bytes: usize, most: usize) -> bool {
        let fits = |taken: usize| taken.checked_add(bytes).filter(|taken| *taken <= most);
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
        let room = Arc::new(Room { most: 20_000, more: 0, share: 0, taken: AtomicUsize::new(0) });
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
    fn one_that_takes_all_is_refused_while_small_ones_go_on() {
        let token = Token { id: 7, logprobs: None };
        let each = of_token(false, None);
        let (most, share) = (100 * each, 10 * each);
        let room = Arc::new(Room { most, more: 3 * share, share, taken: AtomicUsize::new(0) });
        let kept = || Kept::new(&room, false);
        let count = |kept: &Kept| (0..1000).take_while(|_| kept.take_token(&token)).count();
        let hog = kept();
        assert_eq!(count(&hog), 100);
        let small = [(); 4].map(|()| kept());
        assert!(!small[0].take_prompt(1) && small[0].was_full(), "prompts wait for what all may take");
        assert_eq!(small.each_ref().map(count), [10, 10, 10, 0]);
        assert!(hog.was_full() && !hog.take_token(&token));
        drop((hog, small));
        assert_eq!(room.taken.load(Relaxed), 0);
    }

    #[test]
    fn a_request_that_can_never_fit_is_refused_by_the_field_that_makes_it_so() {
        let context = 32_768;
        let room = Room::new(1, context);
        let name = |form, prompts: usize, choices, most, logprobs, stream| {
            let asked = Asked {
                form,
                prompts: vec![vec![7; 1000]; prompts],
                choices,
                most,
                sampling: Default::default(),
                stop_texts: Vec::new(),
                stop_tokens: Vec::new(),
                logprobs,
                stream,
                usage: false,
            };
            room.check(&asked, context)
                .err()
                .map(|refused| refused.json()["error"]["param"].as_str().unwrap().to_owned())
        };
        let all = usize::MAX;
        for (asked, expected) in [
            ((Form::Chat, 1, 1, all, None, false), None),
            ((Form::Chat, 1, 128, 1000, None, false), None),
            ((Form::Chat, 1, 128, all, None, false), Some("n")),
            ((Form::Chat, 1, 128, all, Some(20), true), None),
            ((Form::Chat, 1, 1, all, Some(20), false), Some("top_logprobs")),
            ((Form::Chat, 1, 1, 1000, Some(20), false), None),
            ((Form::Chat, 1, 8, all, Some(0), false), Some("logprobs")),
            ((Form::Completion, 1, 3, all, Some(5), false), Some("logprobs")),
            ((Form::Completion, 128, 1, all, None, false), Some("prompt")),
            ((Form::Completion, 100, 100, 1, None, true), Some("n")),
        ] {
            let (form, prompts, choices, most, logprobs, stream) = asked;
            assert_eq!(name(form, prompts, choices, most, logprobs, stream).as_deref(), expected, "{asked:?}");
        }
        // A context so long that a plain answer takes more than all may have together.
        let room = Room::new(1, 1 << 20);
        assert!(room.share > room.most);
    }

    #[test]
    fn all_that_requests_take_grows_with_what_they_may_be() {
        let usual = memory(528, 16, 4096, 4 << 20).bytes;
        // What docs/serve.md says.
        assert!(usual.abs_diff(204 << 20) < 2 << 20, "{usual}");
        assert_eq!(memory(529, 16, 4096, 4 << 20).bytes - usual, CONNECTION);
        assert_eq!(memory(528, 16, 4096, 8 << 20).bytes - usual, (16 + 64) << 20);
        assert!(memory(528, 16, 131_072, 4 << 20).bytes > usual + (200 << 20));
        assert_eq!(memory(usize::MAX, 1, 1, 1).bytes, usize::MAX);
    }
}
