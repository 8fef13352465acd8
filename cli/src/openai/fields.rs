//! The fields of a JSON object, taken one by one: what has the wrong type is refused by name, and so is what is left.

use serde_json::{Map, Value};

use crate::sampling::SamplingOptions;

/// The longest list of stop texts.
const MOST_STOPS: usize = 64;

/// The fields that nobody has taken yet. One that is `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    left: Map<String, Value>,
    /// What was asked for, for whoever misspelt a name.
    known: Vec<&'static str>,
}

/// A value of another type, for people; long ones are cut.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{} …", &text[..at]),
        None => text,
    }
}

impl Fields {
    pub fn new(object: Map<String, Value>) -> Self {
        Self { left: object, known: Vec::new() }
    }

    pub fn has(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(|value| !value.is_null())
    }

    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.left.remove(name).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        what: &str,
        of: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.take(name) else { return Ok(None) };
        of(&value).map(Some).ok_or_else(|| format!("{name}: is {}, must be {what}", shown(&value)))
    }

    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, String> {
        self.typed(name, "a text", |value| value.as_str().map(str::to_owned))
    }

    pub fn number(&mut self, name: &'static str) -> Result<Option<f64>, String> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub fn whole(&mut self, name: &'static str) -> Result<Option<u64>, String> {
        self.typed(name, "a whole number from 0 on", Value::as_u64)
    }

    pub fn size(&mut self, name: &'static str) -> Result<Option<usize>, String> {
        self.typed(name, "a whole number from 0 on", |value| value.as_u64()?.try_into().ok())
    }

    pub fn ids(&mut self, name: &'static str) -> Result<Option<Vec<u32>>, String> {
        self.typed(name, "a list of token ids", ids)
    }

    pub fn object(&mut self, name: &'static str) -> Result<Option<Map<String, Value>>, String> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    /// A text, or a list of them; none may be empty.
    pub fn stops(&mut self) -> Result<Option<Vec<String>>, String> {
        let stops = self.typed("stop", "a text or a list of texts", |value| match value {
            Value::String(stop) => Some(vec![stop.clone()]),
            Value::Array(stops) => stops.iter().map(|stop| stop.as_str().map(str::to_owned)).collect(),
            _ => None,
        })?;
        match &stops {
            Some(stops) if stops.iter().any(String::is_empty) => {
                Err("stop: has an empty text, which every answer begins with; leave it out".into())
            }
            Some(stops) if stops.len() > MOST_STOPS => Err(format!("stop: has more than {MOST_STOPS} texts")),
            _ => Ok(stops),
        }
    }

    /// How tokens are to be drawn. Of the numbers it is known here that they are some, not that they are in range.
    pub fn sampling(&mut self) -> Result<SamplingOptions, String> {
        Ok(SamplingOptions {
            sample: false,
            temperature: self.number("temperature")?,
            top_k: self.size("top_k")?,
            top_p: self.number("top_p")?,
            min_p: self.number("min_p")?,
            repetition_penalty: self.number("repetition_penalty")?,
            presence_penalty: self.number("presence_penalty")?,
            seed: self.whole("seed")?,
        })
    }

    /// A field that changes nothing about the answer.
    pub fn ignore(&mut self, names: &[&'static str]) {
        for name in names {
            let _ = self.take(name);
        }
    }

    /// A field that must have one of these values, which ask for nothing, if it is there.
    pub fn only(&mut self, name: &'static str, values: &[Value]) -> Result<(), String> {
        match self.take(name) {
            Some(value) if !values.contains(&value) => {
                let other = values
                    .first()
                    .map_or_else(|| "leave it out".into(), |value| format!("give {value}, or leave it out"));
                Err(format!("{name}: {} is not supported; {other}", shown(&value)))
            }
            _ => Ok(()),
        }
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), String> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(format!("{name}: is not known here; known are {}", self.known.join(", "))),
            None => Ok(()),
        }
    }
}

pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64()?.try_into().ok()).collect()
}
