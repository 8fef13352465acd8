//! An answer, as it comes: printed token by token, or kept.

use std::{
    io::{self, IsTerminal, StdoutLock, Write},
    ops::ControlFlow,
};

use indicatif::ProgressBar;

use super::End;
use crate::{
    Failure,
    text::{AnswerText, Piece, Text},
};

/// Goes to stdout, as text or as token ids, or nowhere. Text is kept besides.
pub struct Answer<'a> {
    out: StdoutLock<'static>,
    words: Option<AnswerText<&'a Text>>,
    kept: String,
    is_printed: bool,
    is_begun: bool,
}

impl<'a> Answer<'a> {
    /// `text`: of an answer in words, which ends before any of `stops`.
    pub fn new(text: Option<&'a Text>, stops: &[String], is_printed: bool) -> Self {
        Self {
            out: io::stdout().lock(),
            words: text.map(|text| AnswerText::new(text, stops)),
            kept: String::new(),
            is_printed,
            is_begun: false,
        }
    }

    /// The next token. The answer may end with it: by a stop text, or as its reader went away (`| head`), which is no error.
    pub fn push(&mut self, token: u32, bar: &ProgressBar) -> Result<ControlFlow<End>, Failure> {
        let Piece { text, stop } = match &mut self.words {
            Some(words) => words.push(token)?,
            None => Piece { text: format!("{}{token}", if self.is_begun { "," } else { "" }), stop: None },
        };
        self.is_begun = true;
        let printed = self.print(&text, bar)?;
        Ok(stop.map_or(printed, |stop| ControlFlow::Break(End::StopText(stop))))
    }

    /// After the last token. Returns the text, where it is one of words. `end`: why it ends, where it has.
    pub fn end(mut self, end: &mut End, bar: &ProgressBar) -> Result<Option<String>, Failure> {
        if !matches!(end, End::StopText(_)) {
            let Piece { text, stop } = self.words.as_mut().map_or_else(|| Ok(Piece::default()), AnswerText::end)?;
            let _ = self.print(&text, bar)?;
            if let Some(stop) = stop {
                *end = End::StopText(stop);
            }
        }
        if self.is_printed && !matches!(end, End::ReaderGone) {
            let _ = self.write("\n")?;
        }
        Ok(self.words.is_some().then_some(self.kept))
    }

    fn print(&mut self, piece: &str, bar: &ProgressBar) -> Result<ControlFlow<End>, Failure> {
        self.kept.push_str(piece);
        if !self.is_printed || piece.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        if self.out.is_terminal() {
            // The bar would be drawn over the text.
            bar.finish_and_clear();
        }
        self.write(piece)
    }

    fn write(&mut self, piece: &str) -> Result<ControlFlow<End>, Failure> {
        match self.out.write_all(piece.as_bytes()).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(End::ReaderGone)),
            Err(error) => Err(format!("cannot write to stdout: {error}").into()),
            Ok(()) => Ok(ControlFlow::Continue(())),
        }
    }
}
