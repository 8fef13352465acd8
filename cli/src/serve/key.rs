//! The key that clients have to name.

use std::hint::black_box;

/// A secret, which no message shows.
#[derive(Clone)]
pub struct Key(String);

impl Key {
    /// # Errors
    /// For a key that no client could send.
    pub fn new(key: String) -> Result<Self, &'static str> {
        match key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Err("an API key has at least one character, and only visible ones of ASCII; give another"),
            false => Ok(Self(key)),
        }
    }

    /// Whether this header names the key: `Bearer KEY`. How long that takes tells nothing of the key but its length.
    pub fn is_in(&self, authorization: &[u8]) -> bool {
        let (scheme, rest) = authorization.split_at_checked(7).unwrap_or_default();
        let given = rest.trim_ascii();
        let key = self.0.as_bytes();
        let differing =
            key.iter().zip(given.iter().chain(std::iter::repeat(&0))).fold(0, |all, (a, b)| black_box(all | (a ^ b)));
        scheme.eq_ignore_ascii_case(b"Bearer ") & (given.len() == key.len()) & (differing == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_key_is_compared_and_nothing_else_will_do() {
        let key = Key::new("sesame".into()).unwrap();
        for (header, is_key) in [
            ("Bearer sesame", true),
            ("bearer  sesame", true),
            ("Bearer sesam", false),
            ("Bearer sesamee", false),
            ("Bearer sesamf", false),
            ("Bearer ", false),
            ("Basic sesame", false),
            ("sesame", false),
            ("", false),
        ] {
            assert_eq!(key.is_in(header.as_bytes()), is_key, "{header}");
        }
        assert!(Key::new(String::new()).is_err() && Key::new("a b".into()).is_err());
    }
}
