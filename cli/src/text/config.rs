//! `tokenizer_config.json`.

use std::path::{Path, PathBuf};

use layer_streamer::files;
use serde_json::Value;

use crate::Failure;

/// The largest file that is read, in bytes: it may list all added tokens.
const LARGEST: u64 = 64 << 20;

/// What a model's `tokenizer_config.json` says; nothing where there is no such file.
pub struct TokenizerConfig {
    file: PathBuf,
    value: Value,
}

impl TokenizerConfig {
    /// # Errors
    /// A message that names the file and what is wrong with it.
    pub fn read(model: &Path) -> Result<Self, Failure> {
        let file = model.join("tokenizer_config.json");
        let value = read_json(&file)?.unwrap_or(Value::Null);
        Ok(Self { file, value })
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether a text to continue begins with the BOS token even if `tokenizer.json` does not put it there.
    pub fn adds_bos(&self) -> bool {
        self.value["add_bos_token"] == Value::Bool(true)
    }

    /// What it says about `chat_template`; null if nothing.
    pub fn chat_template(&self) -> &Value {
        &self.value["chat_template"]
    }

    /// A special token, such as `bos_token`: a string, or an object with its `content`.
    pub fn special(&self, name: &str) -> Option<String> {
        let token = &self.value[name];
        token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
    }
}

/// Reads a file of JSON; `None` if there is no such file.
///
/// # Errors
/// A message that names the file and what is wrong with it.
pub fn read_json(file: &Path) -> Result<Option<Value>, Failure> {
    let Some(bytes) = files::read_small(file, LARGEST)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes).map_err(|error| format!("{}: is no JSON: {error}", file.display()))?;
    Ok(Some(value))
}
