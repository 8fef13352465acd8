//! The tokenizer in a GGUF file's metadata: tokens, with merges or scores, and the name of a pre-tokeniser.

#[cfg(test)]
mod tests;

use std::path::Path;

use layer_streamer::gguf::Gguf;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
    models::bpe::{BPE, Merges, Vocab},
};

use super::{config::TokenizerConfig, guarded};
use crate::Failure;

/// The longest token of a tokenizer with scores, in bytes: how it can be split takes the square of that to find out.
const LONGEST_SCORED: usize = 1024;

/// What stands for a space in SentencePiece's tokens.
const SPACE: char = '▁';

/// How a text is split before its pieces are merged.
enum Splits {
    /// As GPT-2 does: the byte-level pre-tokeniser by itself.
    Gpt2,
    /// The same, after each digit has become a piece.
    DigitsThenGpt2,
    /// By this expression.
    Regex(&'static str),
}

/// What `tokenizer.ggml.pre` stands for.
struct Pre {
    name: &'static str,
    splits: Splits,
    /// The text is composed first (NFC).
    composes: bool,
    /// A piece that is a token as it is needs no merges.
    whole_pieces: bool,
    /// The text begins with the BOS token unless the file says otherwise.
    adds_bos: bool,
}

const BY_THREE_DIGITS: Splits = Splits::Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const BY_DIGIT: Splits = Splits::Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const PLAIN: Pre = Pre { name: "gpt-2", splits: Splits::Gpt2, composes: false, whole_pieces: false, adds_bos: false };

const PRES: [Pre; 7] = [
    PLAIN,
    Pre { name: "smollm", splits: Splits::DigitsThenGpt2, ..PLAIN },
    Pre { name: "starcoder", splits: Splits::DigitsThenGpt2, ..PLAIN },
    Pre { name: "refact", splits: Splits::DigitsThenGpt2, ..PLAIN },
    Pre { name: "llama-bpe", splits: BY_THREE_DIGITS, whole_pieces: true, adds_bos: true, ..PLAIN },
    Pre { name: "dbrx", splits: BY_THREE_DIGITS, ..PLAIN },
    Pre { name: "qwen2", splits: BY_DIGIT, composes: true, ..PLAIN },
];

/// What a token is, by its number in `tokenizer.ggml.token_type`.
const NORMAL: u8 = 1;
const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const USER_DEFINED: u8 = 4;
const UNUSED: u8 = 5;

/// The tokens that templates may name, and how their keys begin.
const SPECIAL: [(&str, &str); 7] = [
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("sep_token", "seperator"),
    ("pad_token", "padding"),
    ("cls_token", "cls"),
    ("mask_token", "mask"),
];

/// What the file says of tokens.
struct Tokens<'a> {
    file: &'a Gguf,
    texts: Vec<String>,
    kinds: Vec<u8>,
}

/// Reads the tokenizer of the file at `path`, and what `tokenizer_config.json` would say; `None` if it has none.
///
/// # Errors
/// A message that names the file, and the key or what is not understood.
pub fn open(path: &Path) -> Result<Option<(Tokenizer, TokenizerConfig)>, Failure> {
    let file = Gguf::open(path)?;
    let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(None) };
    let wrong = |cause: String| Failure::from(format!("{}: {cause}", path.display()));
    let tokens = Tokens::read(&file)?;
    let (tokenizer, adds_bos) = match model {
        "gpt2" => {
            let pre = file.text("tokenizer.ggml.pre")?.unwrap_or("(none)");
            let pre = PRES.iter().find(|known| known.name == pre).ok_or_else(|| {
                let known = PRES.map(|known| known.name).join(", ");
                wrong(format!("tokenizer.ggml.pre {pre:?} is not known, but {known}; --prompt-ids needs no tokenizer"))
            })?;
            (tokens.byte_level(pre)?, pre.adds_bos)
        }
        "llama" => (tokens.sentence_piece()?, true),
        other => {
            return Err(wrong(format!(
                "tokenizer.ggml.model {other:?} is not known, but gpt2, llama; --prompt-ids needs no tokenizer"
            )));
        }
    };
    let adds_bos = file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let config = TokenizerConfig::of_file(path, tokens.said(adds_bos)?);
    let tokenizer = guarded(path, || Ok(tokens.with_added(tokenizer)))?;
    Ok(Some((tokenizer, config)))
}

impl<'a> Tokens<'a> {
    fn read(file: &'a Gguf) -> Result<Self, Failure> {
        let (key, of_kinds) = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type");
        let wrong = |cause: String| Failure::from(format!("{}: {cause}", file.path().display()));
        let texts = file.texts(key)?.ok_or_else(|| wrong(format!("lacks the key {key}")))?;
        let kinds = match file.numbers(of_kinds)? {
            Some(kinds) => kinds.iter().map(|&kind| kind as u8).collect(),
            None => vec![NORMAL; texts.len()],
        };
        if kinds.len() != texts.len() {
            return Err(wrong(format!("{of_kinds} is a list of {}, for {} tokens", kinds.len(), texts.len())));
        }
        Ok(Self { file, texts, kinds })
    }

    fn wrong(&self, cause: String) -> Failure {
        format!("{}: {cause}", self.file.path().display()).into()
    }

    /// The tokens with their ids, but for those that stand for nothing.
    fn vocabulary(&self) -> Result<Vocab, Failure> {
        let mut vocabulary = Vocab::with_capacity(self.texts.len());
        for (id, text) in self.used() {
            if let Some(other) = vocabulary.insert(text.to_owned(), id) {
                return Err(self.wrong(format!("the tokens {other} and {id} are both {text:?}")));
            }
        }
        Ok(vocabulary)
    }

    fn used(&self) -> impl Iterator<Item = (u32, &str)> {
        let all = (0u32..).zip(&self.texts).zip(&self.kinds);
        all.filter(|(_, kind)| **kind != UNUSED).map(|((id, text), _)| (id, text.as_str()))
    }

    /// A tokenizer of bytes, as GPT-2's.
    fn byte_level(&self, pre: &Pre) -> Result<Tokenizer, Failure> {
        const KEY: &str = "tokenizer.ggml.merges";
        let merges = self.file.texts(KEY)?.ok_or_else(|| self.wrong(format!("lacks the key {KEY}")))?;
        let pair = |merge: String| match merge.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(self.wrong(format!("{KEY} has {merge:?}, no two texts"))),
        };
        let merges = merges.into_iter().map(pair).collect::<Result<Merges, _>>()?;
        let vocabulary = self.vocabulary()?;
        guarded(self.file.path(), || {
            let model = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(pre.whole_pieces).build()?;
            let mut tokenizer = Tokenizer::new(model);
            tokenizer.with_pre_tokenizer(Some(pre.pre_tokenizer()?));
            tokenizer.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(byte_level(true))?));
            if pre.composes {
                tokenizer.with_normalizer(Some(serde_json::from_value::<NormalizerWrapper>(json!({ "type": "NFC" }))?));
            }
            Ok(tokenizer)
        })
    }

    /// A tokenizer of characters, as Llama 2's, in which scores say what is merged first. What is no token becomes its bytes.
    fn sentence_piece(&self) -> Result<Tokenizer, Failure> {
        const KEY: &str = "tokenizer.ggml.scores";
        let scores = self.file.numbers(KEY)?.ok_or_else(|| self.wrong(format!("lacks the key {KEY}")))?;
        if scores.len() != self.texts.len() {
            return Err(self.wrong(format!("{KEY} is a list of {}, for {} tokens", scores.len(), self.texts.len())));
        }
        if self.file.flag("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
            return Err(self.wrong("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported".into()));
        }
        if let Some(longest) = self.texts.iter().map(String::len).max().filter(|&longest| longest > LONGEST_SCORED) {
            return Err(
                self.wrong(format!("has a token of {longest} bytes; {LONGEST_SCORED} are the most beside scores"))
            );
        }
        let prefix = self.file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let vocabulary = self.vocabulary()?;
        let merges = self.merges_by_score(&vocabulary, &scores);
        let unknown = self.special("unknown")?;
        guarded(self.file.path(), || {
            let mut model = BPE::builder().vocab_and_merges(vocabulary, merges).byte_fallback(true).fuse_unk(true);
            if let Some(unknown) = unknown {
                model = model.unk_token(unknown);
            }
            let mut tokenizer = Tokenizer::new(model.build()?);
            let replace =
                |from: char, to: char| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
            let mut normalizers = vec![replace(' ', SPACE)];
            let mut decoders = vec![replace(SPACE, ' '), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
            if prefix {
                normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
                decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
            }
            let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
            tokenizer.with_normalizer(Some(serde_json::from_value::<NormalizerWrapper>(normalizer)?));
            let decoder = json!({ "type": "Sequence", "decoders": decoders });
            tokenizer.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(decoder)?));
            Ok(tokenizer)
        })
    }

    /// All pairs of tokens that make a token, the one with the highest score first. transformers has the same order for those
    /// with equal scores: longer left parts first, then longer right parts, then the tokens' ids.
    fn merges_by_score(&self, vocabulary: &Vocab, scores: &[f64]) -> Merges {
        let mut found = Vec::new();
        for ((text, kind), score) in self.texts.iter().zip(&self.kinds).zip(scores) {
            if !matches!(*kind, NORMAL | USER_DEFINED) {
                continue;
            }
            let splits = text.char_indices().skip(1).filter_map(|(at, _)| {
                let (left, right) = text.split_at(at);
                let ids = (*vocabulary.get(left)?, *vocabulary.get(right)?);
                let lengths = (left.chars().count(), right.chars().count());
                Some((*score, lengths, ids, (left, right)))
            });
            let first = found.len();
            found.extend(splits);
            found[first..].sort_by_key(|(_, _, ids, _)| *ids);
        }
        // A sort that leaves the order of equals.
        found.sort_by(|(score, lengths, ..), (other, others, ..)| other.total_cmp(score).then(others.cmp(lengths)));
        found.into_iter().map(|(_, _, _, (left, right))| (left.to_owned(), right.to_owned())).collect()
    }

    /// Makes the tokens known that are found in a text as they are.
    fn with_added(&self, mut tokenizer: Tokenizer) -> Tokenizer {
        let added = |is_special: bool, kinds: &[u8]| -> Vec<AddedToken> {
            let all = self.texts.iter().zip(&self.kinds).filter(|(_, kind)| kinds.contains(kind));
            all.map(|(text, _)| AddedToken::from(text, is_special).normalized(false)).collect()
        };
        tokenizer.add_special_tokens(&added(true, &[CONTROL, UNKNOWN]));
        tokenizer.add_tokens(&added(false, &[USER_DEFINED]));
        tokenizer
    }

    /// The text of a special token, if the file names one.
    fn special(&self, name: &str) -> Result<Option<String>, Failure> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.file.count(&key)? else { return Ok(None) };
        let text = usize::try_from(id).ok().and_then(|id| self.texts.get(id));
        text.cloned().map(Some).ok_or_else(|| self.wrong(format!("{key} is {id}, of {} tokens", self.texts.len())))
    }

    /// What `tokenizer_config.json` would say.
    fn said(&self, adds_bos: bool) -> Result<Value, Failure> {
        let mut said =
            json!({ "add_bos_token": adds_bos, "chat_template": self.file.text("tokenizer.chat_template")? });
        for (known_as, name) in SPECIAL {
            if let Some(text) = self.special(name)? {
                said[known_as] = text.into();
            }
        }
        Ok(said)
    }
}

/// The byte-level pre-tokeniser, or decoder.
fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

impl Pre {
    fn pre_tokenizer(&self) -> tokenizers::Result<PreTokenizerWrapper> {
        let before = match self.splits {
            Splits::Gpt2 => return Ok(serde_json::from_value(byte_level(true))?),
            Splits::DigitsThenGpt2 => json!({ "type": "Digits", "individual_digits": true }),
            Splits::Regex(regex) => {
                json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
            }
        };
        let by_gpt2 = matches!(self.splits, Splits::DigitsThenGpt2);
        let both = json!({ "type": "Sequence", "pretokenizers": [before, byte_level(by_gpt2)] });
        Ok(serde_json::from_value(both)?)
    }
}
