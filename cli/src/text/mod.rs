//! Text and tokens: a model's tokenizer as transformers uses it, and the words that tokens become on their way out.

mod answer;
mod config;
mod gguf;
mod python;
mod stop;
mod template;
mod words;

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::Once,
};

pub use answer::{AnswerText, Piece};
use config::TokenizerConfig;
use layer_streamer::{
    files,
    model::Model,
    plan::{Part, Purpose},
};
use stop::StopTexts;
pub use template::{ChatTemplate, Message};
use tokenizers::Tokenizer;
use words::Words;

use crate::Failure;

/// The largest tokenizer.json that is read, in bytes; those of vocabularies of 262,144 tokens have 33 million.
const LARGEST_TOKENIZER: u64 = 256 << 20;

/// What a tokenizer takes of RAM for each token of the vocabulary, in bytes. Those of SmolLM2, Qwen 3, Llama 3, Gemma 2 and Gemma 3
/// take 291 to 371, with what the allocator leaves between their strings.
const BYTES_PER_TOKEN: usize = 384;

/// Where a model's tokenizer is: `tokenizer.json` of its folder, or the model's one file.
pub fn tokenizer_file(model: &Path) -> PathBuf {
    if model.is_file() { model.to_owned() } else { model.join("tokenizer.json") }
}

/// What the tokenizer of a model takes of RAM; `None` if there is none.
pub fn memory(path: &Path, model: &Model) -> Option<Part> {
    let bytes = model.config.vocab.saturating_mul(BYTES_PER_TOKEN);
    tokenizer_file(path).exists().then_some(Part { purpose: Purpose::Tokenizer, bytes })
}

/// A model's tokenizer, and what its `tokenizer_config.json` says about it.
pub struct Text {
    tokenizer: Tokenizer,
    /// The model's folder, or its one file.
    model: PathBuf,
    /// Where the tokenizer is, for messages.
    file: PathBuf,
    config: TokenizerConfig,
}

impl Text {
    /// Reads `tokenizer.json` and `tokenizer_config.json` of a model's folder, or what its one file has in their place; `None` if
    /// there is no tokenizer.
    ///
    /// # Errors
    /// A message that names the file and what is wrong with it.
    pub fn open(model: &Path) -> Result<Option<Self>, Failure> {
        let file = tokenizer_file(model);
        if model.is_file() {
            let found = gguf::open(model)?;
            give_back_memory();
            return Ok(found.map(|(tokenizer, config)| Self { tokenizer, model: file.clone(), file, config }));
        }
        let Some(json) = files::read_small(&file, LARGEST_TOKENIZER)? else { return Ok(None) };
        let mut tokenizer = guarded(&file, || Tokenizer::from_bytes(json))?;
        // What the last call of a training program needed is saved with it, and is not for prompts: transformers ignores it too.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| format!("{}: {error}", file.display()))?;
        give_back_memory();
        Ok(Some(Self { tokenizer, model: model.to_owned(), file, config: TokenizerConfig::read(model)? }))
    }

    /// The tokens of a text to continue, with those that the tokenizer puts around it.
    ///
    /// # Errors
    /// A message that names the file, for one that asks for the impossible.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Failure> {
        let mut tokens = self.ask(|tokenizer| tokenizer.encode(text, true))?.get_ids().to_vec();
        // Some models say so beside tokenizer.json, not in it.
        if self.config.adds_bos()
            && let Some(bos) = self.config.special("bos_token")
        {
            let Some(id) = self.tokenizer.token_to_id(&bos) else {
                let (config, file) = (self.config.file().display(), self.file.display());
                return Err(format!("{config}: add_bos_token is true, but {file} has no token {bos:?}").into());
            };
            if tokens.first() != Some(&id) {
                tokens.insert(0, id);
            }
        }
        Ok(tokens)
    }

    /// The tokens of a text that a chat template made: nothing is put around it.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_turns(&self, text: &str) -> Result<Vec<u32>, Failure> {
        Ok(self.ask(|tokenizer| tokenizer.encode(text, false))?.get_ids().to_vec())
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// As [`ChatTemplate::open`].
    pub fn template(&self) -> Result<Option<ChatTemplate>, Failure> {
        ChatTemplate::open(&self.model, &self.config)
    }

    /// A token as the vocabulary spells it, for people.
    pub fn spelled(&self, token: u32) -> Option<String> {
        self.tokenizer.id_to_token(token)
    }

    /// The token that ends a turn by the tokenizer's configuration, which the model's own may lack.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.tokenizer.token_to_id(&self.config.special("eos_token")?)
    }

    /// A token by itself, as it stands within a text: its bytes, which may be a part of a character.
    pub fn bytes_of(&self, token: u32) -> Vec<u8> {
        let decode = |tokens: &[u32]| self.ask(|tokenizer| tokenizer.decode(tokens, false)).unwrap_or_default();
        // Decoders may treat the first token of a text in their own way.
        let (once, twice) = (decode(&[token]), decode(&[token, token]));
        match twice.strip_prefix(&once) {
            Some(text) if !text.contains(char::REPLACEMENT_CHARACTER) => text.as_bytes().to_vec(),
            _ => self.spelled(token).and_then(|spelled| bytes_spelled(&spelled)).unwrap_or_else(|| once.into_bytes()),
        }
    }

    /// Whether a token adds anything to a text: special tokens do not, nor do those beyond the tokenizer's vocabulary, which many
    /// models have to round theirs up.
    fn has_words(&self, token: u32) -> bool {
        self.tokenizer
            .id_to_token(token)
            .is_some_and(|content| !self.tokenizer.get_added_vocabulary().is_special_token(&content))
    }

    /// The text of these tokens. Bytes that are no UTF-8 become U+FFFD.
    fn decode(&self, tokens: &[u32]) -> Result<String, Failure> {
        self.ask(|tokenizer| tokenizer.decode(tokens, true))
    }

    fn ask<T>(&self, question: impl FnOnce(&Tokenizer) -> tokenizers::Result<T>) -> Result<T, Failure> {
        guarded(&self.file, || question(&self.tokenizer))
    }
}

/// The bytes of a token that is no text: `<0xFF>`, or GPT-2's letters for bytes.
fn bytes_spelled(spelled: &str) -> Option<Vec<u8>> {
    if let Some(hex) = spelled.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]);
    }
    // Visible characters of Latin-1 stand for themselves, and the letters from U+0100 on for the other bytes in their order.
    let is_visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    spelled
        .chars()
        .map(|letter| match u8::try_from(letter) {
            Ok(byte) => Some(byte).filter(is_visible),
            Err(_) => {
                let number = (letter as usize).checked_sub(256)?;
                (0..=255u8).filter(|byte| !is_visible(byte)).nth(number)
            }
        })
        .collect()
}

/// What parsing took and freed, up to twice what the tokenizer keeps, goes back to the system.
fn give_back_memory() {
    // SAFETY: it may be called at any time, in any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

thread_local! {
    /// Whether a panic of this thread is caught and told in other words.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What the tokenizer is asked. A file that it does not understand can make it panic: that is the file's fault, which is named.
fn guarded<T>(file: &Path, ask: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, Failure> {
    static QUIET: Once = Once::new();
    // The message of such a panic would say nothing to people.
    QUIET.call_once(|| {
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !IS_CAUGHT.get() {
                told(panic);
            }
        }));
    });
    IS_CAUGHT.set(true);
    let answer = panic::catch_unwind(AssertUnwindSafe(ask));
    IS_CAUGHT.set(false);
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("{}: {error}", file.display()).into()),
        Err(_) => Err(format!("{}: is malformed: the tokenizer cannot work with it", file.display()).into()),
    }
}
