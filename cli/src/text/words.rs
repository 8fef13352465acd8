//! Tokens become text as they come. A character of several tokens comes out when it is whole.

use std::ops::Deref;

use super::Text;
use crate::Failure;

/// A character has at most so many bytes, and so many tokens.
const LONGEST_CHARACTER: usize = 4;

/// What stands for bytes that are no character, or are not one yet.
const UNKNOWN: char = char::REPLACEMENT_CHARACTER;

/// The text of a sequence of tokens, piece by piece.
pub struct Words<T> {
    of: T,
    /// The tokens of the last piece that was whole, then those that came since. A decoder may treat the first token of a text
    /// in its own way, so none that follows is decoded alone.
    window: Vec<u32>,
    /// How many came since.
    new: usize,
    /// What was given out of the window's text.
    given: String,
}

impl<T: Deref<Target = Text>> Words<T> {
    pub fn new(of: T) -> Self {
        Self { of, window: Vec::new(), new: 0, given: String::new() }
    }

    /// What this token adds to the text; nothing while a character is not whole.
    ///
    /// # Errors
    /// A message that names `tokenizer.json`, for a decoder in it that fails.
    pub fn push(&mut self, token: u32) -> Result<String, Failure> {
        if !self.of.has_words(token) {
            return Ok(String::new());
        }
        self.window.push(token);
        self.new += 1;
        let text = self.of.decode(&self.window)?;
        let is_partial = text.ends_with(UNKNOWN);
        if is_partial && self.new < LONGEST_CHARACTER {
            return Ok(String::new());
        }
        let text = self.anew_if_changed(text)?;
        if is_partial {
            // So many tokens are more than one character, and what is before the last of them will not change.
            let mut sure = text.as_str();
            for _ in 1..LONGEST_CHARACTER {
                sure = sure.strip_suffix(UNKNOWN).unwrap_or(sure);
            }
            return Ok(self.give(sure));
        }
        let piece = self.give(&text);
        if !piece.is_empty() {
            self.window.drain(..self.window.len() - self.new);
            self.new = 0;
            self.given = self.of.decode(&self.window)?;
        }
        Ok(piece)
    }

    /// After the last token: what is left. Bytes that are no character come out as U+FFFD.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn end(&mut self) -> Result<String, Failure> {
        if self.new == 0 {
            return Ok(String::new());
        }
        let text = self.of.decode(&self.window)?;
        let text = self.anew_if_changed(text)?;
        Ok(self.give(&text))
    }

    /// The window's text, which begins with what was given out of it. Some decoders take bytes that follow each other for
    /// unreadable as a whole if one is: then the window begins anew, with the tokens that came since.
    fn anew_if_changed(&mut self, text: String) -> Result<String, Failure> {
        if text.starts_with(&self.given) {
            return Ok(text);
        }
        self.window.drain(..self.window.len() - self.new);
        self.given.clear();
        self.of.decode(&self.window)
    }

    /// What of this text was not given out before.
    fn give(&mut self, text: &str) -> String {
        let Some(piece) = text.strip_prefix(&self.given).map(str::to_owned) else { return String::new() };
        self.given.push_str(&piece);
        piece
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use support::{copy_of, speller};

    use super::*;

    /// A tokenizer whose tokens are bytes and some words, which its decoder knows as `<0xFF>` or as GPT-2's letters.
    fn tokenizer(bytes: impl Fn(u8) -> String, decoder: Value) -> Text {
        let folder = copy_of(&speller());
        let mut vocab = serde_json::Map::new();
        (0..=255u8).for_each(|byte| _ = vocab.insert(bytes(byte), byte.into()));
        vocab.insert("▁word".into(), 256.into());
        let json = json!({
            "added_tokens": [{ "id": 257, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true }],
            "decoder": decoder,
            "model": { "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true },
        });
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        Text::open(folder.path()).unwrap().unwrap()
    }

    fn llama() -> Text {
        let replace = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let decoders = json!([replace, { "type": "ByteFallback" }, { "type": "Fuse" }, strip]);
        tokenizer(|byte| format!("<0x{byte:02X}>"), json!({ "type": "Sequence", "decoders": decoders }))
    }

    fn gpt2() -> Text {
        let (mut letters, mut more) = (Vec::new(), 256..);
        for byte in 0..=255u8 {
            let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..);
            letters.push(char::from_u32(if own { byte.into() } else { more.next().unwrap() }).unwrap());
        }
        let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        tokenizer(move |byte| letters[usize::from(byte)].to_string(), decoder)
    }

    fn pieces(text: &Text, tokens: impl IntoIterator<Item = u32>) -> Vec<String> {
        let mut words = Words::new(text);
        let mut pieces: Vec<_> = tokens.into_iter().map(|token| words.push(token).unwrap()).collect();
        pieces.push(words.end().unwrap());
        pieces
    }

    fn bytes(text: &[u8]) -> impl Iterator<Item = u32> {
        text.iter().map(|byte| u32::from(*byte))
    }

    #[test]
    fn a_character_of_several_tokens_comes_out_when_it_is_whole() {
        for text in [llama(), gpt2()] {
            assert_eq!(pieces(&text, bytes("aé€".as_bytes())), ["a", "", "é", "", "", "€", ""]);
            assert_eq!(pieces(&text, bytes("😀😀".as_bytes())), ["", "", "", "😀", "", "", "", "😀", ""]);
        }
    }

    #[test]
    fn bytes_that_are_no_character_come_out_as_what_they_are_and_never_fail() {
        for (text, word) in [(llama(), " word"), (gpt2(), "▁word")] {
            let all = |some: &[u8]| pieces(&text, bytes("😀".as_bytes()).chain(bytes(some)).chain([256])).concat();
            assert_eq!(all(b"\xFF"), format!("😀\u{FFFD}{word}"));
            // Right after a character, whose bytes must not be given out twice or split.
            assert_eq!(all(&[0xFF; 9]), format!("😀{}{word}", "\u{FFFD}".repeat(9)));
            assert_eq!(pieces(&text, bytes(b"a\xE2")), ["a", "", "\u{FFFD}"]);
            assert_eq!(pieces(&text, bytes("😀\u{7}".as_bytes()).chain(bytes(b"\xF0"))).concat(), "😀\u{7}\u{FFFD}");
        }
        // Where characters follow such bytes at once, they are still found: many bytes, then a euro.
        let after = pieces(&gpt2(), bytes(b"\xFF\xFF\xFF\xFF\xFF\xE2\x82\xAC!")).concat();
        assert_eq!(after, format!("{}€!", "\u{FFFD}".repeat(5)));
    }

    #[test]
    fn what_comes_out_by_pieces_is_what_all_tokens_together_become() {
        let mut rng = fastrand::Rng::with_seed(7);
        for text in [llama(), gpt2()] {
            for _ in 0..300 {
                let some: String =
                    (0..rng.usize(1..12)).map(|_| rng.choice(["a", " ", "é", "€", "😀", "中"]).unwrap()).collect();
                let mut tokens: Vec<_> = bytes(some.as_bytes()).collect();
                tokens.insert(0, 256);
                tokens.push(256);
                assert_eq!(pieces(&text, tokens.iter().copied()).concat(), text.decode(&tokens).unwrap(), "{some}");
            }
        }
    }

    #[test]
    fn special_tokens_and_those_beyond_the_vocabulary_are_no_text() {
        for text in [llama(), gpt2()] {
            assert_eq!(pieces(&text, [257, u32::from(b'a'), 300, u32::MAX, u32::from(b'b')]).concat(), "ab");
        }
        assert_eq!(pieces(&llama(), [256, 257, 256]), ["word", "", " word", ""], "the space of a later word stays");
    }
}
