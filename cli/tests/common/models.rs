//! Models that are made of the speller.

use std::fs;

use serde_json::Value;
use support::{copy_of, speller};

/// How turns become text for a model that spells numbers: `4096` is asked as `4096=`, and its answers end as it ended them.
pub const TEMPLATE: &str = "\
{%- for m in messages -%}
    {{- m.content | replace('\n', '') + {'system': '', 'user': '=', 'assistant': '<|endoftext|>'}[m.role] -}}
{%- endfor -%}";

/// A copy of the speller that has this template.
pub fn chat_model(template: &str) -> tempfile::TempDir {
    let folder = copy_of(&speller());
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    folder
}

/// One that never ends an answer.
pub fn endless() -> tempfile::TempDir {
    let folder = chat_model(TEMPLATE);
    fs::remove_file(folder.path().join("generation_config.json")).unwrap();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["eos_token_id"] = Value::Null;
    config["max_position_embeddings"] = 20_000.into();
    fs::write(path, config.to_string()).unwrap();
    folder
}
