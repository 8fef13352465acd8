//! The answer, as it comes: printed token by token, or kept.

use std::{
    io::{self, IsTerminal, StdoutLock, Write},
    ops::ControlFlow,
    path::PathBuf,
};

use indicatif::ProgressBar;
use tokenizers::Tokenizer;

use crate::{Failure, prompt::guarded};

/// What a token adds to the text.
type Words<'a> = Box<dyn FnMut(u32) -> Result<String, Failure> + 'a>;

/// Goes to stdout, as text or as token ids; or nowhere, where it is asked for as JSON. Then the text is kept.
pub struct Answer<'a> {
    out: StdoutLock<'static>,
    words: Option<Words<'a>>,
    kept: Option<String>,
    is_printed: bool,
    is_begun: bool,
}

impl<'a> Answer<'a> {
    /// `tokenizer`, with its file: that of an answer in words.
    pub fn new(tokenizer: Option<(&'a Tokenizer, PathBuf)>, json: bool) -> Self {
        let words = tokenizer.map(|(tokenizer, file)| {
            let mut text = tokenizer.decode_stream(true);
            Box::new(move |token| Ok(guarded(&file, || text.step(token))?.unwrap_or_default())) as Words<'a>
        });
        let kept = (json && words.is_some()).then(String::new);
        Self { out: io::stdout().lock(), words, kept, is_printed: !json, is_begun: false }
    }

    /// The next token. To break off is what a reader that went away (`| head`) wants: that is no error.
    pub fn push(&mut self, token: u32, bar: &ProgressBar) -> Result<ControlFlow<()>, Failure> {
        let piece = match &mut self.words {
            Some(words) => words(token)?,
            None => format!("{}{token}", if self.is_begun { "," } else { "" }),
        };
        self.is_begun = true;
        if let Some(kept) = &mut self.kept {
            kept.push_str(&piece);
        }
        if !self.is_printed {
            return Ok(ControlFlow::Continue(()));
        }
        if self.out.is_terminal() {
            // The bar would be drawn over the text.
            bar.finish_and_clear();
        }
        self.print(&piece)
    }

    /// After the last token. Returns the text, where it is kept.
    pub fn end(mut self) -> Result<Option<String>, Failure> {
        if self.is_printed {
            let _ = self.print("\n")?;
        }
        Ok(self.kept)
    }

    fn print(&mut self, piece: &str) -> Result<ControlFlow<()>, Failure> {
        match self.out.write_all(piece.as_bytes()).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
            Err(error) => Err(format!("cannot write to stdout: {error}").into()),
            Ok(()) => Ok(ControlFlow::Continue(())),
        }
    }
}
