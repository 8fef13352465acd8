//! `tokenizer_config.json`, and `special_tokens_map.json` beside it.

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
    /// What `special_tokens_map.json` says, where that counts.
    special_tokens: Value,
}

impl TokenizerConfig {
    /// # Errors
    /// A message that names the file and what is wrong with it.
    pub fn read(model: &Path) -> Result<Self, Failure> {
        let file = model.join("tokenizer_config.json");
        let value = read_json(&file)?.unwrap_or(Value::Null);
        // As in transformers: a configuration that lists the tokens that were added is newer than the map.
        let special_tokens = match value["added_tokens_decoder"].is_null() {
            true => read_json(&model.join("special_tokens_map.json"))?.unwrap_or(Value::Null),
            false => Value::Null,
        };
        Ok(Self { file, value, special_tokens })
    }

    /// What a model in one file says.
    pub fn of_file(file: &Path, value: Value) -> Self {
        Self { file: file.to_owned(), value, special_tokens: Value::Null }
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
        let token = self.special_tokens.get(name).unwrap_or(&self.value[name]);
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

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn special_tokens_are_those_of_their_map_unless_the_configuration_lists_the_added_ones() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value: Value| fs::write(folder.path().join(name), value.to_string()).unwrap();
        let tokens = || {
            let config = TokenizerConfig::read(folder.path()).unwrap();
            ["bos_token", "eos_token"].map(|name| config.special(name))
        };
        let some = |texts: [&str; 2]| texts.map(|text| (!text.is_empty()).then(|| text.to_owned()));
        assert_eq!(tokens(), some(["", ""]));
        write("special_tokens_map.json", json!({ "bos_token": { "content": "<s>", "lstrip": false } }));
        assert_eq!(tokens(), some(["<s>", ""]));
        write("tokenizer_config.json", json!({ "bos_token": "<bos>", "eos_token": "<eos>" }));
        assert_eq!(tokens(), some(["<s>", "<eos>"]));
        write("tokenizer_config.json", json!({ "bos_token": "<bos>", "added_tokens_decoder": {} }));
        assert_eq!(tokens(), some(["<bos>", ""]));
    }
}
