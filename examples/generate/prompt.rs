//! The prompt: text, token ids, a file or standard input.

use std::{
    fs,
    io::{self, Read, Write},
    panic::{self, AssertUnwindSafe},
    path::Path,
};

use layer_streamer::files;
use tokenizers::Tokenizer;

use crate::{Failure, Options};

/// The tokenizer, where one is needed, and the prompt's tokens.
pub fn prompt(options: &Options) -> Result<(Option<Tokenizer>, Vec<u32>), Failure> {
    let text = match &options.prompt_file {
        Some(path) => Some(read_prompt(path)?),
        None => options.prompt.clone(),
    };
    let needs_tokenizer = text.is_some() || !(options.plan || options.print_ids);
    let tokenizer = if needs_tokenizer { load_tokenizer(options)? } else { None };
    let prompt = match (&options.prompt_ids, &text, &tokenizer) {
        (Some(ids), _, _) => ids.clone(),
        (None, Some(text), Some(tokenizer)) => {
            let path = options.model.join("tokenizer.json");
            guarded(&path, || tokenizer.encode(text.as_str(), true))?.get_ids().to_vec()
        }
        _ => Vec::new(),
    };
    if prompt.is_empty() && !options.plan {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    Ok((tokenizer, prompt))
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

/// Reads `tokenizer.json`. Without one, ids can still go in and out.
fn load_tokenizer(options: &Options) -> Result<Option<Tokenizer>, Failure> {
    let path = options.model.join("tokenizer.json");
    let Some(text) = files::read_small(&path, LARGEST_TOKENIZER)? else {
        if options.prompt_ids.is_none() {
            let message =
                format!("{}: there is no such file; give --prompt-ids 1,2,3 in place of text", path.display());
            return Err(message.into());
        }
        if !options.quiet {
            say!("no tokenizer.json in {}: printing token ids", options.model.display());
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
