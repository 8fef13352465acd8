//! The fields of a request's JSON, taken one by one, so that what is left is known to be understood by nobody.

use std::{fmt::Display, ops::RangeInclusive};

use serde_json::{Map, Value};

use crate::serve::error::Refused;

/// The fields of an object. One that is null is as if it was not there.
pub struct Fields {
    /// What names of fields begin with: where the object lies in the request.
    within: String,
    fields: Map<String, Value>,
}

impl Fields {
    /// `name`: of the field that has this value; empty for the request itself.
    pub fn of(value: Value, name: &str) -> Result<Self, Refused> {
        match value {
            Value::Object(mut fields) => {
                fields.retain(|_, value| !value.is_null());
                let within = if name.is_empty() { String::new() } else { format!("{name}.") };
                Ok(Self { within, fields })
            }
            other if name.is_empty() => {
                Err(Refused::field("body", format!("is {}; send one JSON object", kind(&other))))
            }
            other => Err(Refused::field(name, format!("is {}; give an object", kind(&other)))),
        }
    }

    /// The whole name of a field.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.within)
    }

    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field)
    }

    /// The field, which has to be there.
    pub fn require(&mut self, field: &str) -> Result<Value, Refused> {
        self.take(field).ok_or_else(|| Refused::field(self.name(field), "is missing; give it"))
    }

    pub fn object(&mut self, field: &str) -> Result<Option<Self>, Refused> {
        let name = self.name(field);
        self.take(field).map(|value| Self::of(value, &name)).transpose()
    }

    pub fn string(&mut self, field: &str) -> Result<Option<String>, Refused> {
        self.typed(field, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub fn boolean(&mut self, field: &str) -> Result<Option<bool>, Refused> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub fn number(&mut self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Refused> {
        let found = self.typed(field, "a number", Value::as_f64)?;
        self.within(field, found, range)
    }

    pub fn integer(&mut self, field: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Refused> {
        let found = self.typed(field, "a whole number that is not negative", Value::as_u64)?;
        self.within(field, found, range)
    }

    /// A number of things.
    pub fn count(&mut self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, Refused> {
        let found = self.integer(field, *range.start() as u64..=*range.end() as u64)?;
        Ok(found.map(|found| found as usize))
    }

    /// Any whole number of 64 bits, with a sign or without.
    pub fn seed(&mut self, field: &str) -> Result<Option<u64>, Refused> {
        self.typed(field, "a whole number of 64 bits", |value| {
            value.as_u64().or_else(|| value.as_i64().map(|negative| negative as u64))
        })
    }

    /// Refuses a field that would change the answer, unless it has a value that does not.
    pub fn refuse_unless(
        &mut self,
        field: &str,
        is_harmless: impl FnOnce(&Value) -> bool,
        remedy: &str,
    ) -> Result<(), Refused> {
        match self.take(field) {
            Some(value) if !is_harmless(&value) => {
                Err(Refused::field(self.name(field), format!("is not supported; {remedy}")).with_code("unsupported"))
            }
            _ => Ok(()),
        }
    }

    /// Leaves fields aside that change no answer.
    pub fn ignore(&mut self, fields: &[&str]) {
        fields.iter().for_each(|field| _ = self.take(field));
    }

    /// Refuses what nobody took.
    pub fn end(self) -> Result<(), Refused> {
        match self.fields.keys().next() {
            Some(field) => {
                let refused = Refused::field(self.name(field), "is not known; leave it out");
                Err(refused.with_code("unknown_parameter"))
            }
            None => Ok(()),
        }
    }

    fn typed<T>(
        &mut self,
        field: &str,
        wanted: &str,
        take: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Refused> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match take(&value) {
            Some(found) => Ok(Some(found)),
            None => Err(Refused::field(self.name(field), format!("is {}; give {wanted}", kind(&value)))),
        }
    }

    fn within<T: PartialOrd + Display>(
        &self,
        field: &str,
        found: Option<T>,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, Refused> {
        match found {
            Some(found) if !range.contains(&found) => {
                let cause = format!("is {found}; give a number from {} to {}", range.start(), range.end());
                Err(Refused::field(self.name(field), cause))
            }
            found => Ok(found),
        }
    }
}

/// What a value is, for people.
pub fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Whether a value asks for nothing: an empty list, object or string, false or 0.
pub fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::of(value, "").unwrap()
    }

    /// What the client is told: the message and the field.
    fn told<T>(result: Result<T, Refused>) -> [String; 2] {
        let error = result.err().unwrap().json();
        ["message", "param"].map(|name| error["error"][name].as_str().unwrap().to_owned())
    }

    #[test]
    fn a_field_of_another_type_or_out_of_range_is_named_with_what_to_give() {
        let mut all = fields(json!({ "a": "x", "b": 3, "c": 1.5, "d": -1, "e": 1, "f": null }));
        assert_eq!(told(all.number("a", 0.0..=2.0)), ["a: is a string; give a number", "a"]);
        assert_eq!(told(all.number("b", 0.0..=2.0)), ["b: is 3; give a number from 0 to 2", "b"]);
        assert!(told(all.integer("c", 0..=2))[0].contains("is 1.5; give a whole number"));
        assert!(told(all.count("d", 0..=2))[0].contains("is -1; give a whole number that is not negative"));
        assert!(told(all.boolean("e"))[0].contains("give true or false"));
        assert_eq!(all.string("f").unwrap(), None, "null is as good as absent");
        assert!(all.end().is_ok());
        assert_eq!(told(Fields::of(json!([]), ""))[1], "body");
    }

    #[test]
    fn what_nobody_took_is_refused_by_its_whole_name() {
        let mut all = fields(json!({ "inner": { "odd": 1 }, "user": "x", "tools": [], "echo": true }));
        assert_eq!(told(all.object("inner").unwrap().unwrap().end())[1], "inner.odd");
        all.ignore(&["user"]);
        all.refuse_unless("tools", is_nothing, "").unwrap();
        assert_eq!(
            told(all.refuse_unless("echo", is_nothing, "leave it out"))[0],
            "echo: is not supported; leave it out"
        );
        assert!(all.end().is_ok());
        let seeds =
            [json!(-1), json!(u64::MAX), json!(7)].map(|seed| fields(json!({ "seed": seed })).seed("seed").unwrap());
        assert_eq!(seeds, [Some(u64::MAX), Some(u64::MAX), Some(7)]);
    }
}
