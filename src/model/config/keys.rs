//! The keys of `config.json`, as transformers reads them: what is absent has the default of the family's class, what is null has
//! not.

use std::{io, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    files,
};

/// The most layers, heads, tokens and so on that a configuration may speak of.
const MOST: u64 = u32::MAX as u64;

/// Why a configuration is refused.
#[derive(Debug)]
pub(super) enum ConfigFault {
    /// It says what cannot be.
    Wrong(String),
    /// It says what is not computed here.
    Unsupported(String),
}

impl ConfigFault {
    /// As an error of this file.
    pub(super) fn at(self, path: &Path) -> Error {
        match self {
            Self::Wrong(cause) => Error::checkpoint(path, cause),
            Self::Unsupported(what) => Error::Unsupported {
                what: format!("{}: {what}", path.display()),
                remedy: "take a model without it".into(),
            },
        }
    }
}

/// [`ConfigFault::Wrong`] unless `holds`, or where the number is too large for F32.
pub(super) fn within(key: &str, value: f64, holds: bool) -> Result<(), ConfigFault> {
    if holds && (value as f32).is_finite() {
        Ok(())
    } else {
        Err(ConfigFault::Wrong(format!("{key} is {value}, out of range")))
    }
}

/// What a key has that is absent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fallback {
    Count(u64),
    Number(f64),
    Flag(bool),
    Word(&'static str),
}

/// An object of `config.json`, and what its absent keys have.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    given: &'a Map<String, Value>,
    fallbacks: &'static [(&'static str, Fallback)],
}

impl<'a> Keys<'a> {
    pub(super) fn new(given: &'a Map<String, Value>, fallbacks: &'static [(&'static str, Fallback)]) -> Self {
        Self { given, fallbacks }
    }

    /// Whether a key is there, if only as null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// The value of a key that is there and not null.
    pub(super) fn given(&self, key: &str) -> Option<&'a Value> {
        self.given.get(key).filter(|value| !value.is_null())
    }

    /// The default of a key that is absent. One that is null has none.
    fn fallback(&self, key: &str) -> Option<Fallback> {
        let found = self.fallbacks.iter().find(|(name, _)| *name == key && !self.has(key));
        found.map(|(_, fallback)| *fallback)
    }

    /// A whole number.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, ConfigFault> {
        match (self.given(key), self.fallback(key)) {
            (Some(value), _) => match value.as_u64().filter(|&count| count <= MOST) {
                Some(count) => Ok(Some(count as usize)),
                None => Err(wrong(key, value, "a whole number")),
            },
            (None, Some(Fallback::Count(count))) => Ok(Some(count as usize)),
            (None, _) => Ok(None),
        }
    }

    /// A whole number of at least 1, which must be there.
    pub(super) fn size(&self, key: &str) -> Result<usize, ConfigFault> {
        match self.count(key)? {
            Some(0) => Err(ConfigFault::Wrong(format!("{key} is 0, expected at least 1"))),
            Some(size) => Ok(size),
            None => Err(ConfigFault::Wrong(format!("{key} is null, expected a whole number"))),
        }
    }

    /// A number that F32 holds.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigFault> {
        match (self.given(key), self.fallback(key)) {
            (Some(value), _) => {
                let number = value.as_f64().ok_or_else(|| wrong(key, value, "a number"))?;
                within(key, number, true)?;
                Ok(Some(number))
            }
            (None, Some(Fallback::Number(number))) => Ok(Some(number)),
            (None, _) => Ok(None),
        }
    }

    /// A number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, ConfigFault> {
        let number = self.number(key)?;
        number.map_or(Ok(()), |number| within(key, number, number > 0.0))?;
        Ok(number)
    }

    /// Numbers above 0.
    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigFault> {
        let Some(value) = self.given(key) else { return Ok(None) };
        let numbers = value.as_array().and_then(|all| all.iter().map(Value::as_f64).collect::<Option<Vec<_>>>());
        let numbers = numbers.ok_or_else(|| wrong(key, value, "a list of numbers"))?;
        numbers.iter().try_for_each(|&number| within(key, number, number > 0.0))?;
        Ok(Some(numbers))
    }

    /// True or false; false where nothing is said.
    pub(super) fn flag(&self, key: &str) -> Result<bool, ConfigFault> {
        match (self.given(key), self.fallback(key)) {
            (Some(value), _) => value.as_bool().ok_or_else(|| wrong(key, value, "true or false")),
            (None, fallback) => Ok(fallback == Some(Fallback::Flag(true))),
        }
    }

    pub(super) fn word(&self, key: &str) -> Result<Option<&'a str>, ConfigFault> {
        match (self.given(key), self.fallback(key)) {
            (Some(value), _) => value.as_str().map(Some).ok_or_else(|| wrong(key, value, "a text")),
            (None, Some(Fallback::Word(word))) => Ok(Some(word)),
            (None, _) => Ok(None),
        }
    }

    /// An object, and nothing if it is empty: Python takes that for none.
    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigFault> {
        let Some(value) = self.given(key) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| wrong(key, value, "an object"))?;
        Ok((!object.is_empty()).then(|| Keys::new(object, &[])))
    }

    /// One value for each of so many layers, and more if there may be.
    pub(super) fn by_layer<T>(
        &self,
        key: &str,
        (layers, may_be_longer): (usize, bool),
        of: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ConfigFault> {
        let Some(value) = self.given(key) else { return Ok(None) };
        let values = value.as_array().and_then(|all| all.iter().map(of).collect::<Option<Vec<_>>>());
        let values = values.ok_or_else(|| wrong(key, value, "a list with a value for each layer"))?;
        if values.len() < layers || values.len() > layers && !may_be_longer {
            return Err(ConfigFault::Wrong(format!("{key} names {} layers of {layers}", values.len())));
        }
        Ok(Some(values))
    }

    /// The tokens that end a text.
    pub(super) fn stop(&self) -> Result<Option<Vec<u32>>, ConfigFault> {
        let Some(value) = self.given("eos_token_id") else {
            return Ok(match self.fallback("eos_token_id") {
                Some(Fallback::Count(id)) => Some(vec![id as u32]),
                _ => None,
            });
        };
        let ids = OneOrMany::deserialize(value);
        ids.map(|ids| Some(ids.into_vec())).map_err(|_| wrong("eos_token_id", value, "a token id or a list of them"))
    }
}

fn wrong(key: &str, value: &Value, expected: &str) -> ConfigFault {
    let mut said = value.to_string();
    if said.len() > 60 {
        said = said.chars().take(60).chain("…".chars()).collect();
    }
    ConfigFault::Wrong(format!("{key} is {said}, expected {expected}"))
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// The object that a file holds.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Map<String, Value>> {
    let malformed = |error| Error::checkpoint(path, format!("is no valid JSON: {error}"));
    match serde_json::from_slice(text).map_err(malformed)? {
        Value::Object(object) => Ok(object),
        _ => Err(Error::checkpoint(path, "is no JSON object")),
    }
}

/// What `config.json` says.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>> {
    let text = files::read_small(path, files::LONGEST_CONFIG)?;
    let text = text.ok_or_else(|| Error::io("read", path)(io::Error::from_raw_os_error(libc::ENOENT)))?;
    parse(path, &text)
}
