//! What a request takes while it is read, as far as its bytes tell before it is parsed.

use serde_json::Value;

/// What a byte of text takes while it is cut into tokens, in bytes.
pub const TOKENIZED: usize = 250;

/// A text apart from its bytes, in bytes.
const TEXT: usize = 64;

/// A value more in a list, or a field more in an object: a list that grows has twice the places that it needs, beside those that it had.
/// An object is half full at least.
const VALUE: usize = 3 * size_of::<Value>();

/// A list with its first value: places for four.
const LIST: usize = 4 * size_of::<Value>() + 32;

/// An object with its first field: places for eleven fields.
const OBJECT: usize = 11 * (size_of::<Value>() + size_of::<String>()) + 64;

/// Texts of a body that are cut into tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Texts {
    /// All of them, in one piece.
    Together,
    /// One after the other.
    OneByOne,
}

/// What a body takes while it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// While it is parsed, in bytes.
    pub parsed: usize,
    /// The most bytes of text that are cut into tokens at a time.
    pub text: usize,
}

impl Cost {
    /// The most bytes that a text may have, where there are `most` bytes to read the body with.
    pub fn longest_text(self, most: usize) -> usize {
        most.saturating_sub(self.parsed) / TOKENIZED
    }

    /// What is taken, in bytes, of the `most` that there are. Texts longer than `longest_text` are not cut into tokens.
    pub fn taken(self, longest_text: usize, most: usize) -> usize {
        self.parsed.saturating_add(TOKENIZED.saturating_mul(self.text.min(longest_text))).min(most)
    }
}

/// What a body takes at most while it is parsed and its texts are cut into tokens.
pub fn of(body: &[u8], texts: Texts) -> Cost {
    let (mut parsed, mut all, mut longest) = (0, 0, 0);
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => {
                let length = text(&mut bytes);
                parsed += TEXT;
                all += length;
                longest = length.max(longest);
            }
            b'{' => parsed += OBJECT,
            b'[' => parsed += LIST,
            b',' => parsed += VALUE,
            _ => {}
        }
    }
    // A text is parsed, and copied.
    Cost { parsed: parsed + 2 * all, text: if texts == Texts::Together { all } else { longest } }
}

/// The length of a text, up to its end.
fn text(bytes: &mut std::slice::Iter<'_, u8>) -> usize {
    let mut length = 0;
    while let Some(byte) = bytes.next() {
        length += match byte {
            b'"' => break,
            b'\\' if bytes.next() == Some(&b'u') => escaped(bytes),
            _ => 1,
        };
    }
    length
}

/// The length of a character that is written as four digits. Halves of a pair, which is four bytes long, have two each.
fn escaped(bytes: &mut std::slice::Iter<'_, u8>) -> usize {
    let digits: Vec<u8> = bytes.by_ref().take(4).copied().collect();
    let value = str::from_utf8(&digits).ok().and_then(|digits| u32::from_str_radix(digits, 16).ok());
    match value {
        Some(..0x80) => 1,
        Some(..0x800 | 0xd800..0xe000) => 2,
        // What is no number ends the parsing.
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_count_outside_of_texts_and_texts_by_their_length() {
        let cost = |body: &str, texts| of(body.as_bytes(), texts);
        let together = |body: &str| cost(body, Texts::Together);
        assert_eq!(together("17"), Cost::default());
        assert_eq!(together("[1,2,3]"), Cost { parsed: LIST + 2 * VALUE, text: 0 });
        assert_eq!(together(r#"{"[,{\"":1}"#), Cost { parsed: OBJECT + TEXT + 2 * 4, text: 4 });
        let two = r#"["abc","de"]"#;
        assert_eq!((together(two).text, cost(two, Texts::OneByOne).text), (5, 3));
        // Cut off anywhere.
        (0..two.len()).for_each(|end| _ = cost(&two[..end], Texts::Together));
    }

    #[test]
    fn an_escaped_character_counts_by_its_bytes() {
        for body in
            [r#""\u0041""#, r#""\u0430""#, r#""\u4e2d""#, r#""\ud83d\ude00""#, r#""\n\\\"""#, r#""a\u0430\u4E2Db""#]
        {
            let parsed: String = serde_json::from_str(body).unwrap();
            assert_eq!(of(body.as_bytes(), Texts::Together).text, parsed.len(), "{body}");
            (0..body.len()).for_each(|end| _ = of(&body.as_bytes()[..end], Texts::Together));
        }
    }

    #[test]
    fn what_is_parsed_and_cut_into_tokens_is_never_more_than_there_is() {
        let most = 1_000_000;
        for (parsed, text) in
            [(0, 0), (0, 3999), (0, 4001), (500_000, 1500), (500_000, 100_000), (999_999, 7), (most, 1)]
        {
            let cost = Cost { parsed, text };
            let longest = cost.longest_text(most).min(4100);
            let taken = cost.taken(4100, most);
            assert!(taken <= most && taken >= parsed + TOKENIZED * text.min(longest), "{cost:?}: {taken}");
        }
    }
}
