//! The prompt: text, token ids, a file or standard input.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    Failure,
    text::{self, Message, Text},
};

#[derive(Args)]
pub struct Source {
    /// The prompt as token ids, comma separated, in place of PROMPT
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "system", "thinking"])]
    prompt_ids: Option<Vec<u32>>,

    /// Read the prompt from a file (UTF-8, up to 64 MB); - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_ids"])]
    prompt_file: Option<PathBuf>,

    /// The text to continue; what the user says, where the model has a chat template (after --, if it begins with a dash)
    prompt: Option<String>,

    /// Send the text as it is, even if the model has a chat template
    #[arg(long, conflicts_with_all = ["prompt_ids", "system", "thinking"])]
    raw: bool,

    #[command(flatten)]
    talk: Talk,
}

/// What a conversation begins with.
#[derive(Args)]
pub struct Talk {
    /// The system prompt, which comes before what the user says
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Whether the model is to think before it answers, for templates that ask for that (enable_thinking) [default: the template's]
    #[arg(long, value_name = "true|false")]
    pub thinking: Option<bool>,
}

/// What is to be answered.
pub struct Prompt {
    pub text: Option<Text>,
    pub tokens: Vec<u32>,
    /// The file with the chat template that it went through, if it did.
    pub template: Option<PathBuf>,
}

/// Says how to do without a chat template that fails.
fn or_raw(error: Failure) -> Failure {
    format!("{error}; --raw sends the text as it is").into()
}

impl Source {
    /// The prompt's tokens, none where there is no prompt; with the tokenizer of the model in that folder, where one is needed: for
    /// a prompt in words, or as the answer is to be in words.
    pub fn read(&self, model: &Path, in_words: bool, quiet: bool) -> Result<Prompt, Failure> {
        let prompt = match &self.prompt_file {
            Some(path) => Some(read_prompt(path)?),
            None => self.prompt.clone(),
        };
        let text = if prompt.is_some() || in_words { self.open(model, quiet)? } else { None };
        match (&self.prompt_ids, prompt, text) {
            (None, Some(prompt), Some(text)) => self.encode(prompt, text),
            (ids, _, text) => Ok(Prompt { text, tokens: ids.clone().unwrap_or_default(), template: None }),
        }
    }

    /// A prompt in words: a user's turn where the model has a chat template, unless it is to be left as it is.
    fn encode(&self, prompt: String, text: Text) -> Result<Prompt, Failure> {
        let template = if self.raw { None } else { text.template().map_err(or_raw)? };
        let Some(template) = template else {
            if self.talk.system.is_some() || self.talk.thinking.is_some() {
                return Err(
                    "--system and --thinking: the model has no chat template, so it takes nothing but text".into()
                );
            }
            let tokens = text.encode(&prompt)?;
            return Ok(Prompt { text: Some(text), tokens, template: None });
        };
        let mut turns: Vec<_> = self.talk.system.iter().map(|system| Message::new("system", system)).collect();
        turns.push(Message::new("user", prompt));
        let tokens = text.encode_turns(&template.render(&turns, self.talk.thinking).map_err(or_raw)?)?;
        Ok(Prompt { tokens, template: Some(template.file().to_owned()), text: Some(text) })
    }

    /// The model's tokenizer. Without one, a prompt of ids can still go in, and ids out.
    fn open(&self, model: &Path, quiet: bool) -> Result<Option<Text>, Failure> {
        let text = Text::open(model)?;
        if text.is_none() && self.prompt_ids.is_none() {
            let why = if model.is_file() { "it has no tokenizer" } else { "there is no such file" };
            let path = text::tokenizer_file(model);
            return Err(format!("{}: {why}; give --prompt-ids 1,2,3 in place of text", path.display()).into());
        }
        if text.is_none() && !quiet {
            let what = if model.is_file() { "tokenizer" } else { "tokenizer.json" };
            say!("no {what} in {}: printing token ids", model.display());
        }
        Ok(text)
    }
}

/// The longest prompt that is read from a file, in bytes.
const LONGEST_PROMPT: u64 = 64_000_000;

/// Reads a prompt from a file, or from standard input.
fn read_prompt(path: &Path) -> Result<String, Failure> {
    let failed = |error: io::Error| Failure::from(format!("cannot read --prompt-file {}: {error}", path.display()));
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        io::stdin().take(LONGEST_PROMPT + 1).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        let file = fs::File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        file.take(LONGEST_PROMPT + 1).read_to_end(&mut bytes).map_err(failed)?;
    }
    if bytes.len() as u64 > LONGEST_PROMPT {
        return Err(format!("--prompt-file {}: is longer than {LONGEST_PROMPT} bytes", path.display()).into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("--prompt-file {}: is not UTF-8 from byte {at} on", path.display()).into()
    })
}
