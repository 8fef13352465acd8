//! What chat templates expect of Python: how values are printed and become JSON, and how a date is formatted.

use std::{ffi::CString, fmt::Write};

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// A value as Python's `str()` prints it.
pub fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value, 0),
    }
}

/// The most lists within lists that are printed: a template could nest them without end.
const DEEPEST: usize = 100;

/// A value as it is printed within so many lists.
fn repr(value: &Value, depth: usize) -> String {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth == DEEPEST => "...".into(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<_> = value.try_iter().into_iter().flatten().map(|item| repr(&item, depth + 1)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let value = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key, depth + 1), repr(&value, depth + 1))
            };
            let pairs: Vec<_> = value.try_iter().into_iter().flatten().map(pair).collect();
            format!("{{{}}}", pairs.join(", "))
        }
        _ => value.to_string(),
    }
}

/// A string in quotes: single ones, unless only they are in it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_ascii_control() => _ = write!(out, "\\x{:02x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// A number: where a float would look like an integer it has its point.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    match format!("{float:?}").split_once('e') {
        // Rust writes 1e16, Python 1e+16 and 1e-07.
        Some((digits, exponent)) => {
            let (sign, size) = exponent.strip_prefix('-').map_or(('+', exponent), |size| ('-', size));
            format!("{digits}e{sign}{size:0>2}")
        }
        None => format!("{float:?}"),
    }
}

/// The filter `tojson`, as `json.dumps` writes it: `, ` and `: ` between, all characters as they are, unless `indent`,
/// `separators`, `ensure_ascii` or `sort_keys` say otherwise.
pub fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = options.get("indent")?;
    let indent = indent.filter(|indent| !indent.is_none()).map(|indent| match indent.as_usize() {
        Some(spaces) => " ".repeat(spaces.min(80)),
        None => text(&indent),
    });
    let separators: Option<Vec<String>> = options.get("separators")?;
    let [between, after_key] = match separators.as_deref() {
        Some([between, after_key]) => [between.clone(), after_key.clone()],
        _ => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut json = Json { out: String::new(), indent, between, after_key, ascii, sorted };
    json.value(value, 0)?;
    Ok(Value::from(json.out))
}

struct Json {
    out: String,
    indent: Option<String>,
    between: String,
    after_key: String,
    ascii: bool,
    sorted: bool,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            let cause = format!("tojson: more than {DEEPEST} lists within lists");
            return Err(Error::new(ErrorKind::InvalidOperation, cause));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', value.try_iter()?.collect(), ']', depth, |json, item| json.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.items('{', keys, '}', depth, |json, key| {
                    match key.kind() {
                        ValueKind::String => json.string(key.as_str().unwrap_or_default()),
                        _ => {
                            json.out.push('"');
                            json.value(key, depth)?;
                            json.out.push('"');
                        }
                    }
                    json.out.push_str(&json.after_key.clone());
                    json.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} has no JSON")));
            }
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        items: Vec<Value>,
        close: char,
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (number, item) in items.iter().enumerate() {
            if number > 0 {
                self.out.push_str(&self.between.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    /// Begins a line, where there are lines.
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            let indent = indent.repeat(depth);
            self.out.push('\n');
            self.out.push_str(&indent);
        }
    }

    fn string(&mut self, text: &str) {
        let json = serde_json::Value::from(text).to_string();
        for c in json.chars() {
            if self.ascii && !c.is_ascii() {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(self.out, "\\u{unit:04x}"));
            } else {
                self.out.push(c);
            }
        }
    }
}

/// A moment, in seconds since 1970, as `strftime` writes it in the local time zone.
///
/// # Errors
/// For a format with a zero in it, or a time of no calendar.
pub fn strftime(format: &str, moment: libc::time_t) -> Result<String, Error> {
    let failed = |what: &'static str| Error::new(ErrorKind::InvalidOperation, what);
    // The letter at the end tells a text that is empty from one that has no room.
    let format = CString::new(format!("{format}.")).map_err(|_| failed("strftime_now: the format has a zero in it"))?;
    // SAFETY: integers and a pointer, for all of which zero is a value.
    let mut time: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: the call reads the moment and fills the structure, both of which outlive it.
    if unsafe { libc::localtime_r(&raw const moment, &raw mut time) }.is_null() {
        return Err(failed("strftime_now: the clock shows a time of no calendar"));
    }
    let mut room = vec![0u8; format.count_bytes() * 16 + 64];
    // SAFETY: the call writes at most as many bytes as there are, and the format ends with its zero.
    let length = unsafe { libc::strftime(room.as_mut_ptr().cast(), room.len(), format.as_ptr(), &raw const time) };
    room.truncate(length.saturating_sub(1));
    String::from_utf8(room).map_err(|_| failed("strftime_now: the date is no UTF-8"))
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    use super::*;

    fn said(template: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        environment.set_formatter(|out, _, value| out.write_str(&text(value)).map_err(Error::from));
        environment.render_str(template, ()).unwrap_or_else(|error| panic!("{template}: {error}"))
    }

    // What Python 3.13 prints for the same.
    #[test]
    fn values_become_json_as_python_writes_it() {
        for (template, expected) in [
            ("{{ {'b': [1, 2.0, none, true], 'a': {}} | tojson }}", r#"{"b": [1, 2.0, null, true], "a": {}}"#),
            ("{{ '<é\"\\n\\t>&\\'' | tojson }}", r#""<é\"\n\t>&'""#),
            ("{{ 'é😀' | tojson(ensure_ascii=true) }}", r#""\u00e9\ud83d\ude00""#),
            ("{{ [] | tojson(indent=2) }}", "[]"),
            (
                "{{ {'b': [1, 2], 'a': 1e20} | tojson(indent=2) }}",
                "{\n  \"b\": [\n    1,\n    2\n  ],\n  \"a\": 1e+20\n}",
            ),
            ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":2,"b":1}"#),
            ("{{ {1: 2} | tojson }}", r#"{"1": 2}"#),
        ] {
            assert_eq!(said(template), expected, "{template}");
        }
    }

    #[test]
    fn values_are_printed_as_python_prints_them() {
        for (template, expected) in [
            ("{{ true }} {{ none }} {{ nothing }} {{ 1.0 }} {{ 1e-7 }}", "True None  1.0 1e-07"),
            ("{{ ['a', \"it's\", 1, none] }}", "['a', \"it's\", 1, None]"),
            ("{{ {'a': false, 'b': 'x\\ny'} }}", "{'a': False, 'b': 'x\\ny'}"),
        ] {
            assert_eq!(said(template), expected, "{template}");
        }
    }

    #[test]
    fn a_date_is_written_as_asked_for_and_a_bad_format_is_refused() {
        // Noon of a day, so that it is the same day wherever the test runs.
        let moment = 1_721_995_200;
        assert_eq!(strftime("%d %b %Y", moment).unwrap(), "26 Jul 2024");
        assert_eq!(strftime("%B %d, %Y", moment).unwrap(), "July 26, 2024");
        assert_eq!(strftime("", moment).unwrap(), "");
        assert!(strftime("a\0b", moment).is_err());
    }
}
