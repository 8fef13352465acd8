//! What the user types: on a terminal with line editing and history, else line by line.

use std::io::{self, BufRead, IsTerminal};

use rustyline::{Config, Editor, error::ReadlineError, history::MemHistory};

use crate::Failure;

/// What a line begins with that waits for the user, and one that goes on.
const PROMPTS: [&str; 2] = ["> ", "… "];

/// What stands around a message of several lines.
const QUOTES: &str = "\"\"\"";

/// Where messages come from.
pub enum Input {
    /// A terminal.
    Editor(Box<Editor<(), MemHistory>>),
    /// A file or a pipe.
    Lines(Box<dyn BufRead>),
}

/// A line, or why there is none.
enum Line {
    Text(String),
    /// By Ctrl-C.
    Cleared,
    /// By Ctrl-D, or as the file ends.
    End,
}

impl Input {
    /// Standard input.
    ///
    /// # Errors
    /// Those of a terminal that cannot be edited on.
    pub fn open() -> Result<Self, Failure> {
        // The editor draws on stdout.
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(Self::Lines(Box::new(io::stdin().lock())));
        }
        let editor = Editor::with_history(Config::default(), MemHistory::new());
        Ok(Self::Editor(Box::new(editor.map_err(|error| format!("cannot read from the terminal: {error}"))?)))
    }

    /// Whether someone sits at a terminal.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Editor(_))
    }

    /// The next message: a line; several, where each but the last ends with a backslash; or those between `"""` and `"""`.
    /// `None` at the end of the input.
    ///
    /// # Errors
    /// Those of reading, and for what is not UTF-8.
    pub fn message(&mut self) -> Result<Option<String>, Failure> {
        loop {
            let first = match self.line(PROMPTS[0])? {
                Line::Text(line) => line,
                Line::Cleared => continue,
                Line::End => return Ok(None),
            };
            if let Some(message) = self.rest(first)? {
                return Ok(Some(message));
            }
        }
    }

    /// The message that this line begins; `None` if the user threw it away.
    fn rest(&mut self, first: String) -> Result<Option<String>, Failure> {
        let (mut message, is_block) = match first.trim_start().strip_prefix(QUOTES) {
            Some(begun) => (begun.to_owned(), true),
            None => (first, false),
        };
        loop {
            if is_block {
                if let Some(whole) = message.trim_end().strip_suffix(QUOTES) {
                    // The lines with the quotes are no lines of the message.
                    let whole = whole.strip_prefix('\n').unwrap_or(whole);
                    return Ok(Some(whole.strip_suffix('\n').unwrap_or(whole).to_owned()));
                }
            } else {
                match message.strip_suffix('\\') {
                    Some(begun) => message.truncate(begun.len()),
                    None => return Ok(Some(message)),
                }
            }
            match self.line(PROMPTS[1])? {
                Line::Text(line) => {
                    message.push('\n');
                    message.push_str(&line);
                }
                Line::Cleared => return Ok(None),
                Line::End => return Ok(Some(message)),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line, Failure> {
        match self {
            Self::Editor(editor) => match editor.readline(prompt) {
                Ok(line) => {
                    // Without its place in the history a line is still a line.
                    let _ = editor.add_history_entry(line.as_str());
                    Ok(Line::Text(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Line::Cleared),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(format!("cannot read from the terminal: {error}").into()),
            },
            Self::Lines(lines) => {
                let mut line = Vec::new();
                let read = lines.read_until(b'\n', &mut line);
                if read.map_err(|error| format!("cannot read standard input: {error}"))? == 0 {
                    return Ok(Line::End);
                }
                let text = String::from_utf8(line).map_err(|_| "standard input: a line is not UTF-8")?;
                let text = text.strip_suffix('\n').unwrap_or(&text);
                Ok(Line::Text(text.strip_suffix('\r').unwrap_or(text).to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &'static str) -> Vec<String> {
        let mut input = Input::Lines(Box::new(text.as_bytes()));
        std::iter::from_fn(|| input.message().unwrap()).collect()
    }

    #[test]
    fn a_message_is_a_line_or_lines_that_go_on_or_a_block() {
        assert_eq!(messages("one\ntwo\r\n\nlast"), ["one", "two", "", "last"]);
        assert_eq!(messages("a\\\nb\\\n\nc\n"), ["a\nb\n", "c"]);
        assert_eq!(messages("\"\"\"\na\n b\\\n\"\"\"\nc\n"), ["a\n b\\", "c"]);
        assert_eq!(messages("\"\"\"a\n\nb\"\"\"\n\"\"\"c\"\"\"\n"), ["a\n\nb", "c"]);
        assert_eq!(messages("a\\"), ["a"], "what is begun at the end is sent");
        assert_eq!(messages("\"\"\"a\nb"), ["a\nb"]);
    }

    #[test]
    fn what_is_not_text_is_refused() {
        let mut input = Input::Lines(Box::new(&b"a\xFF\n"[..]));
        assert!(input.message().unwrap_err().to_string().contains("not UTF-8"));
    }
}
