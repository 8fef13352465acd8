//! The prompt: text, token ids, a file or standard input.

use std::{
    fs,
    io::{self, Read},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
};

use clap::Args;
use layer_streamer::files;
use tokenizers::Tokenizer;

use crate::Failure;

#[derive(Args)]
pub struct Source {
    /// The prompt as token ids, comma separated, in place of PROMPT
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Option<Vec<u32>>,

    /// Read the prompt from a file (UTF-8, up to 64 MB); - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_ids"])]
    prompt_file: Option<PathBuf>,

    /// The text to continue (after --, if it begins with a dash)
    prompt: Option<String>,
}

impl Source {
    /// The tokenizer of the model in that folder, where one is needed: for a prompt in words, or as the answer is to be in words.
    /// And the prompt's tokens, none where there is no prompt.
    pub fn read(&self, model: &Path, in_words: bool, quiet: bool) -> Result<(Option<Tokenizer>, Vec<u32>), Failure> {
        let text = match &self.prompt_file {
            Some(path) => Some(read_prompt(path)?),
            None => self.prompt.clone(),
        };
        let tokenizer =
            if text.is_some() || in_words { load_tokenizer(model, self.prompt_ids.is_some(), quiet)? } else { None };
        let prompt = match (&self.prompt_ids, &text, &tokenizer) {
            (Some(ids), _, _) => ids.clone(),
            (None, Some(text), Some(tokenizer)) => {
                let path = model.join("tokenizer.json");
                guarded(&path, || tokenizer.encode(text.as_str(), true))?.get_ids().to_vec()
            }
            _ => Vec::new(),
        };
        Ok((tokenizer, prompt))
    }
}

/// The largest tokenizer.json that is read, in bytes; those of vocabularies of 262,144 tokens have 33 million.
const LARGEST_TOKENIZER: u64 = 256 << 20;

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

/// Reads `tokenizer.json`. Without one, a prompt of ids (`has_ids`) can still go in, and ids out.
fn load_tokenizer(model: &Path, has_ids: bool, quiet: bool) -> Result<Option<Tokenizer>, Failure> {
    let path = model.join("tokenizer.json");
    let Some(text) = files::read_small(&path, LARGEST_TOKENIZER)? else {
        if !has_ids {
            let message =
                format!("{}: there is no such file; give --prompt-ids 1,2,3 in place of text", path.display());
            return Err(message.into());
        }
        if !quiet {
            say!("no tokenizer.json in {}: printing token ids", model.display());
        }
        return Ok(None);
    };
    guarded(&path, || Tokenizer::from_bytes(text)).map(Some)
}

/// What the tokenizer is asked. A file that it does not understand can make it panic: that is the file's fault, which is named.
pub fn guarded<T>(path: &Path, ask: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, Failure> {
    // One thread asks, and the message of its panic would say nothing to people.
    let told = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let answer = panic::catch_unwind(AssertUnwindSafe(ask));
    panic::set_hook(told);
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("{}: {error}", path.display()).into()),
        Err(_) => Err(format!("{}: is malformed: the tokenizer cannot work with it", path.display()).into()),
    }
}
