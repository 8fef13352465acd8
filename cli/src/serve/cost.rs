//! What a request takes while it is read, as far as its bytes tell before it is parsed.

use serde_json::Value;

/// What a byte of text takes while it is cut into tokens, in bytes.
pub const TOKENIZED: usize = 250;

/// A text apart from its bytes, in bytes.
const TEXT: usize = 64;

/// A value in a list, or a field in an object: lists grow by doubling and begin with four places, and objects are half full at least.
const VALUE: usize = 4 * size_of::<Value>() + 32;

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

/// The most bytes that a body takes while it is parsed and its texts are cut into tokens, of which those longer than `longest_text`
/// are refused.
pub fn of(body: &[u8], texts: Texts, longest_text: usize) -> usize {
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
            b'[' | b',' => parsed += VALUE,
            _ => {}
        }
    }
    let tokenized = if texts == Texts::Together { all } else { longest };
    // A text is parsed, and copied.
    parsed + 2 * all + TOKENIZED.saturating_mul(tokenized.min(longest_text))
}

/// The length of a text, up to its end.
fn text(bytes: &mut std::slice::Iter<'_, u8>) -> usize {
    let mut length = 0;
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => break,
            b'\\' => _ = bytes.next(),
            _ => {}
        }
        length += 1;
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_count_outside_of_texts_and_texts_by_their_length() {
        let cost = |body: &str, texts| of(body.as_bytes(), texts, 100);
        assert_eq!(cost("17", Texts::Together), 0);
        assert_eq!(cost("[1,2,3]", Texts::Together), 3 * VALUE);
        assert_eq!(cost(r#"{"[,{\"":1}"#, Texts::Together), OBJECT + TEXT + 4 * (2 + TOKENIZED));
        let two = r#"["abc","de"]"#;
        assert_eq!(cost(two, Texts::Together) - cost(two, Texts::OneByOne), 2 * TOKENIZED);
        assert_eq!(cost(&format!("\"{}\"", "x".repeat(1000)), Texts::Together), TEXT + 2000 + 100 * TOKENIZED);
        // Cut off anywhere.
        (0..two.len()).for_each(|end| _ = cost(&two[..end], Texts::Together));
    }
}
