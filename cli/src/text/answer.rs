//! The text of an answer, piece by piece: what its tokens become, up to a text that ends it.

use std::ops::Deref;

use super::{StopTexts, Text, Words};
use crate::Failure;

/// A piece of an answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// The text that the answer ends before. Nothing is to follow.
    pub stop: Option<String>,
}

/// The text of an answer as its tokens come.
pub struct AnswerText<T> {
    words: Words<T>,
    stops: StopTexts,
    /// Characters that the tokens became, those that are held back or that ended the answer too.
    said: usize,
    /// Characters that were given out.
    given: usize,
}

impl<T: Deref<Target = Text>> AnswerText<T> {
    /// It ends before any of `stops`, none of which is empty.
    pub fn new(text: T, stops: &[String]) -> Self {
        Self { words: Words::new(text), stops: StopTexts::new(stops), said: 0, given: 0 }
    }

    /// The next token. What may yet become a stop text, or is no whole character yet, is held back.
    ///
    /// # Errors
    /// A message that names `tokenizer.json`, for a decoder in it that fails.
    pub fn push(&mut self, token: u32) -> Result<Piece, Failure> {
        let words = self.words.push(token)?;
        Ok(self.pass(&words))
    }

    /// After the last token, unless a stop text ended the answer: what was held back.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn end(&mut self) -> Result<Piece, Failure> {
        let words = self.words.end()?;
        let mut piece = self.pass(&words);
        // Nothing is held back where a stop text was found.
        let rest = self.stops.rest();
        self.given += rest.chars().count();
        piece.text += &rest;
        Ok(piece)
    }

    /// Where the text of the next token begins, in characters of all that tokens became.
    pub fn said(&self) -> usize {
        self.said
    }

    /// How many characters were given out.
    pub fn given(&self) -> usize {
        self.given
    }

    fn pass(&mut self, words: &str) -> Piece {
        let (text, stop) = self.stops.push(words);
        self.said += words.chars().count();
        self.given += text.chars().count();
        Piece { text, stop }
    }
}

#[cfg(test)]
mod tests {
    use support::speller;

    use super::*;

    #[test]
    fn an_answer_ends_before_a_stop_text_that_lies_across_tokens_and_says_where_tokens_begin() {
        let text = Text::open(&speller()).unwrap().unwrap();
        let tokens = text.encode_turns(" four thousand ninety-six").unwrap();
        assert!(tokens.len() > 3, "{tokens:?}");
        let mut answer = AnswerText::new(&text, &["sand nine".into()]);
        let (mut said, mut begins) = (String::new(), Vec::new());
        let stop = tokens.iter().find_map(|token| {
            begins.push(answer.said());
            let piece = answer.push(*token).unwrap();
            said += &piece.text;
            assert_eq!(answer.given(), said.len());
            piece.stop
        });
        assert_eq!((said.as_str(), stop.as_deref(), &begins[..]), (" four thou", Some("sand nine"), &[0, 5, 14][..]));
        let mut answer = AnswerText::new(&text, &["sand, nine".into()]);
        let pieces: String = tokens.iter().map(|token| answer.push(*token).unwrap().text).collect();
        assert_eq!(pieces + &answer.end().unwrap().text, " four thousand ninety-six");
    }
}
