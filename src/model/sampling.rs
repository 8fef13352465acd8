//! Choosing the next token at random.
//!
//! The order is that of transformers 5.24 (`_get_logits_processor` in `generation/utils.py`): repetition penalty, temperature,
//! top-k, top-p, min-p, and a draw from what is left. The presence penalty, which transformers does not have, comes where vLLM
//! has it: right after the repetition penalty. All of it is computed in F64.

mod candidates;
mod philox;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt};

use candidates::Candidates;
use serde::Serialize;

use super::buffers::HEAD_BLOCK;
use crate::{
    error::{Error, Result},
    plan::{Part, Purpose},
};

/// How tokens are drawn. The defaults have no effect: every token is drawn with the probability that the model gives it.
///
/// Let `x` be a token's logit, and `p` its probability: `exp(x)` over the sum of all `exp(x)` that are left. Both penalties come
/// first, then the others in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sampling {
    /// `x / temperature`: below 1 likely tokens become more likely, above 1 less. 0: the most likely token, and of equal ones the
    /// first. By default 1.
    pub temperature: f64,
    /// Keeps the so many most likely tokens, and those as likely as the last of them (Fan et al. 2018, arXiv 1805.04833).
    /// 0, the default: all.
    pub top_k: usize,
    /// Keeps the most likely tokens that together reach this probability, and at least one: a token stays if the more likely ones
    /// together have less (Holtzman et al. 2019, arXiv 1904.09751). Of equally likely ones the first come first. From 0 to 1, by
    /// default 1: all.
    pub top_p: f64,
    /// Keeps tokens with `p ≥ min_p · largest p` (Nguyen et al. 2024, arXiv 2407.01082). From 0, the default, to 1.
    pub min_p: f64,
    /// For tokens that the sequence has, in its prompt or after: `x / penalty` if `x > 0`, else `x · penalty`, once for each token
    /// (Keskar et al. 2019, arXiv 1909.05858). Above 0, by default 1; below 1 it rewards them.
    pub repetition_penalty: f64,
    /// For tokens that were chosen for this sequence since it began: `x − penalty`, once for each token (`presence_penalty` of
    /// OpenAI's API). From −2 to 2, by default 0.
    pub presence_penalty: f64,
    /// Other seeds, other texts. By default 0.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether every value is within its range.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the field.
    pub fn check(&self) -> Result<()> {
        for (name, value, holds, range) in [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or more"),
            ("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "from 0 to 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "more than 0"),
            ("presence_penalty", self.presence_penalty, (-2.0..=2.0).contains(&self.presence_penalty), "from -2 to 2"),
        ] {
            if !holds || !value.is_finite() {
                return Err(Error::setting(name, format!("is {value}, must be a number, {range}")));
            }
        }
        Ok(())
    }

    /// Nothing changes which token is the most likely, and that one is taken: the device finds it by itself.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0 && self.presence_penalty == 0.0
    }
}

/// Draws tokens for any number of sequences.
///
/// A draw depends on the seed, the sequence's number and the number of tokens before it, on nothing else: a sequence gets the same
/// text alone and in a batch, in one call and in several. [`Decoder::decode`](super::Decoder::decode) numbers sequences by their
/// rows in the KV cache, and tells the sampler what they hold. A host that runs a model by itself does so by
/// [`begin`](Self::begin), and then asks for token after token.
///
/// ```
/// use layer_streamer::{
///     Error,
///     model::{Sampler, Sampling},
/// };
///
/// let sampling = Sampling { temperature: 0.7, top_k: 2, seed: 1, ..Sampling::default() };
/// let mut sampler = Sampler::new(sampling, 4)?;
/// sampler.begin(0, &[3, 1])?; // sequence 0 and its prompt
/// for _ in 0..100 {
///     let token = sampler.choose(0, &[2.5, -1.0, 2.0, f32::NEG_INFINITY])?;
///     assert!(token == 0 || token == 2);
/// }
/// # Ok::<(), Error>(())
/// ```
pub struct Sampler {
    sampling: Sampling,
    vocab: usize,
    sequences: BTreeMap<usize, History>,
    candidates: Candidates,
    /// Where the decoder puts logits, so that it allocates once.
    pub(super) logits: Vec<f32>,
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler")
            .field("sampling", &self.sampling)
            .field("vocab", &self.vocab)
            .field("sequences", &self.sequences.len())
            .finish_non_exhaustive()
    }
}

/// What is remembered of a sequence.
#[derive(Default)]
struct History {
    sampling: Sampling,
    /// Its draws are other ones than those of a sequence with another number.
    number: u64,
    /// Tokens that it has.
    length: u64,
    /// Which tokens those are; empty where nothing depends on it.
    seen: TokenSet,
    /// Which of them were chosen; likewise.
    chosen: TokenSet,
}

/// A bit for each token of the vocabulary.
#[derive(Default)]
struct TokenSet(Vec<u64>);

impl TokenSet {
    fn bytes(vocab: usize) -> usize {
        vocab.div_ceil(64) * size_of::<u64>()
    }

    /// An empty one, in the same memory if there is some.
    fn clear(&mut self, vocab: usize) {
        self.0.clear();
        self.0.resize(vocab.div_ceil(64), 0);
    }

    fn insert(&mut self, token: u32) {
        if let Some(word) = self.0.get_mut(token as usize / 64) {
            *word |= 1 << (token % 64);
        }
    }

    fn has(&self, token: usize) -> bool {
        self.0.get(token / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }
}

impl Sampler {
    /// For a vocabulary of so many tokens. All memory but what is remembered of each sequence is reserved by the first draw.
    ///
    /// # Errors
    /// As [`Sampling::check`]; [`Error::Setting`] for a vocabulary without tokens.
    pub fn new(sampling: Sampling, vocab: usize) -> Result<Self> {
        sampling.check()?;
        if vocab == 0 || vocab > u32::MAX as usize {
            return Err(Error::setting("vocab", format!("is {vocab} tokens")));
        }
        Ok(Self { sampling, vocab, sequences: BTreeMap::new(), candidates: Candidates::default(), logits: Vec::new() })
    }

    /// What it takes of RAM at most, for so many sequences at once.
    pub fn memory(&self, sequences: usize) -> Part {
        let logits = HEAD_BLOCK.min(sequences) * size_of::<f32>();
        let tokens = self.vocab.saturating_mul(logits + Candidates::BYTES);
        let sets = TokenSet::bytes(self.vocab).saturating_mul(2).saturating_mul(sequences);
        Part { purpose: Purpose::Sampler, bytes: tokens.saturating_add(sets) }
    }

    /// How it draws.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Begins a sequence, or begins it anew: these are all its tokens so far, and none of them was chosen.
    ///
    /// # Errors
    /// [`Error::Setting`] for a token that is not in the vocabulary.
    pub fn begin(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        self.begin_by(sequence, tokens, self.sampling, sequence as u64)
    }

    /// The same for a sequence whose tokens are drawn in a way of their own. Draws depend on `number` in place of the sequence's,
    /// so that a sequence that has this number elsewhere draws the same.
    ///
    /// # Errors
    /// As there, and as [`Sampling::check`].
    pub fn begin_by(&mut self, sequence: usize, tokens: &[u32], sampling: Sampling, number: u64) -> Result<()> {
        sampling.check()?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab) {
            return Err(Error::setting("tokens", format!("{token} is not in the vocabulary of {}", self.vocab)));
        }
        let history = self.sequences.entry(sequence).or_default();
        (history.sampling, history.number, history.length) = (sampling, number, tokens.len() as u64);
        history.seen.0.clear();
        history.chosen.0.clear();
        if sampling.repetition_penalty != 1.0 {
            history.seen.clear(self.vocab);
            tokens.iter().for_each(|token| history.seen.insert(*token));
        }
        if sampling.presence_penalty != 0.0 {
            history.chosen.clear(self.vocab);
        }
        Ok(())
    }

    /// Forgets a sequence, and frees what was remembered of it.
    pub fn forget(&mut self, sequence: usize) {
        self.sequences.remove(&sequence);
    }

    /// Chooses the next token of a sequence by its logits, one for each token of the vocabulary. From then on it is one of the
    /// sequence's tokens.
    ///
    /// A token whose logit is -∞ is never chosen.
    ///
    /// # Errors
    /// [`Error::Setting`] for a sequence that was not begun, another number of logits, a logit that is NaN or +∞, or if all are
    /// -∞. Then the sequence is as it was.
    pub fn choose(&mut self, sequence: usize, logits: &[f32]) -> Result<u32> {
        let Self { vocab, sequences, candidates, .. } = self;
        let Some(history) = sequences.get_mut(&sequence) else {
            return Err(Error::setting("sequence", format!("{sequence} was not begun: give its tokens first")));
        };
        if logits.len() != *vocab {
            return Err(Error::setting("logits", format!("are {}, the vocabulary has {vocab} tokens", logits.len())));
        }
        check_logits(logits)?;
        candidates.fill(logits.iter().enumerate().map(|(token, x)| penalised(history, token, *x)));
        let uniform = philox::uniform(history.sampling.seed, history.number, history.length);
        let Some(token) = candidates.choose(&history.sampling, uniform) else {
            return Err(Error::setting("logits", "are all -inf: there is nothing to choose from"));
        };
        history.length += 1;
        history.seen.insert(token);
        history.chosen.insert(token);
        Ok(token)
    }
}

/// Whether probabilities follow from logits, unless all are -∞.
///
/// # Errors
/// [`Error::Setting`] that names the first token with NaN or +∞.
pub(super) fn check_logits(logits: &[f32]) -> Result<()> {
    let Some(token) = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) else { return Ok(()) };
    let cause = format!("{} for token {token}: the model computed no probabilities", logits[token]);
    Err(Error::setting("logits", cause))
}

/// A token's logit after both penalties. A logit that is a number stays one, however large a penalty is.
fn penalised(history: &History, token: usize, logit: f32) -> f64 {
    let mut x = f64::from(logit);
    if x == f64::NEG_INFINITY {
        return x;
    }
    if history.seen.has(token) {
        let penalty = history.sampling.repetition_penalty;
        x = (if x < 0.0 { x * penalty } else { x / penalty }).clamp(f64::MIN / 4.0, f64::MAX / 4.0);
    }
    if history.chosen.has(token) {
        x -= history.sampling.presence_penalty;
    }
    x
}
