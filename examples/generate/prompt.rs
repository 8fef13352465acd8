//! The prompt: text, token ids, a file or standard input.

use std::{
    fs,
    io::{self, Read, Write},
    path::Path,
};

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
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text.as_str(), true)?.get_ids().to_vec(),
        _ => Vec::new(),
    };
    if prompt.is_empty() && !options.plan {
        return Err("the prompt is empty; give some text, or --prompt-ids 1,2,3".into());
    }
    Ok((tokenizer, prompt))
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

/// Reads `tokenizer.json`. Without one, ids can still go in and out.
fn load_tokenizer(options: &Options) -> Result<Option<Tokenizer>, Failure> {
    let path = options.model.join("tokenizer.json");
    if !path.exists() {
        if options.prompt_ids.is_none() {
            let message =
                format!("{}: there is no such file; give --prompt-ids 1,2,3 in place of text", path.display());
            return Err(message.into());
        }
        if !options.quiet {
            say!("no tokenizer.json in {}: printing token ids", options.model.display());
        }
        return Ok(None);
    }
    Tokenizer::from_file(&path).map(Some).map_err(|e| format!("{}: {e}", path.display()).into())
}
