//! The lines of a file, one after the other, whatever its length and theirs.

use std::{
    hash::Hasher,
    io::{self, BufRead},
};

use twox_hash::XxHash3_64;

/// The longest line, in bytes.
const LONGEST: usize = 64_000_000;

/// A line that is not blank.
#[derive(Debug, PartialEq, Eq)]
pub struct RawLine {
    /// Counted from 1, with those that are blank.
    pub number: u64,
    /// XXH3 of its bytes, by which it is known again.
    pub digest: u64,
    /// Without its end; `None` if there are too many.
    pub bytes: Option<Vec<u8>>,
}

/// Why a line has no bytes.
pub fn too_long() -> String {
    format!("is longer than {LONGEST} bytes; give shorter ones")
}

pub struct Lines<R> {
    reader: R,
    number: u64,
    longest: usize,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, number: 0, longest: LONGEST }
    }

    /// The next line that is not blank.
    ///
    /// # Errors
    /// The reader's.
    pub fn next(&mut self) -> io::Result<Option<RawLine>> {
        loop {
            let mut line = Vec::new();
            let (mut digest, mut length) = (XxHash3_64::new(), 0);
            let has_ended = loop {
                let buffer = match self.reader.fill_buf() {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    buffer => buffer?,
                };
                let end = buffer.iter().position(|byte| *byte == b'\n');
                let piece = &buffer[..end.unwrap_or(buffer.len())];
                digest.write(piece);
                length += piece.len();
                if length <= self.longest {
                    line.extend_from_slice(piece);
                }
                let (is_over, taken) = (buffer.is_empty(), piece.len() + usize::from(end.is_some()));
                self.reader.consume(taken);
                if is_over || end.is_some() {
                    break is_over;
                }
            };
            if has_ended && length == 0 {
                return Ok(None);
            }
            self.number += 1;
            let bytes = (length <= self.longest).then_some(line);
            if bytes.as_ref().is_none_or(|bytes| !bytes.trim_ascii().is_empty()) {
                return Ok(Some(RawLine { number: self.number, digest: digest.finish(), bytes }));
            }
            if has_ended {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    fn lines(text: &str, buffer: usize, longest: usize) -> Vec<(u64, Option<String>)> {
        let reader = BufReader::with_capacity(buffer, text.as_bytes());
        let mut lines = Lines { longest, ..Lines::new(reader) };
        let mut found = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            found.push((line.number, line.bytes.map(|bytes| String::from_utf8(bytes).unwrap())));
        }
        found
    }

    #[test]
    fn lines_are_numbered_with_blank_ones_and_the_last_needs_no_end() {
        for buffer in 1..9 {
            let some = |text: &str| Some(text.to_owned());
            assert_eq!(lines("a\n\nbc\n \t\r\nd", buffer, 9), [(1, some("a")), (3, some("bc")), (5, some("d"))]);
            assert_eq!(lines("a\n", buffer, 9), [(1, some("a"))]);
            assert_eq!(lines("", buffer, 9), []);
            assert_eq!(lines("\n  ", buffer, 9), []);
            assert_eq!(lines("abcd\nefghi\njk", buffer, 4), [(1, some("abcd")), (2, None), (3, some("jk"))]);
        }
    }

    #[test]
    fn a_digest_is_of_the_lines_bytes_alone() {
        let digest = |text: &str, nth: usize| {
            let mut lines = Lines::new(BufReader::with_capacity(3, text.as_bytes()));
            (0..=nth).map(|_| lines.next().unwrap().unwrap().digest).last()
        };
        assert_eq!(digest("first\nsecond\n", 1), digest("second", 0));
        assert_ne!(digest("first\nsecond\n", 1), digest("sEcond", 0));
    }
}
