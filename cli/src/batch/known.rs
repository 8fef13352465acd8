//! Which lines are answered already, as the output says.

use std::{
    io::{self, BufRead},
    path::Path,
};

use super::answer::{self, Found};
use crate::Failure;

/// The answers that are there, sorted by their lines. The lines of the input are held against them one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    found: Vec<Found>,
    /// How many of them the input has reached.
    reached: usize,
    /// Whether the answers are to be in order: then no line before an answered one may lack its answer.
    in_order: bool,
}

/// What an output holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    pub known: Known,
    /// How many bytes are whole answers; what follows is to be cut off.
    pub whole: u64,
}

impl Known {
    /// What it takes of RAM at most: its list has grown by doubling.
    pub fn bytes(&self) -> usize {
        2 * size_of_val(&self.found[..])
    }

    /// Reads all answers of an output. Whatever ended the process may have cut off the last line. After a power failure some of
    /// what was written last may be zeros, which no JSON has: those lines are lost, and all that follow them are given up.
    ///
    /// # Errors
    /// The reader's; a message that names the line which is no answer, or the second one to the same prompt.
    pub fn read(mut output: impl BufRead, path: &Path, in_order: bool) -> Result<Held, Failure> {
        let (mut found, mut whole, mut number) = (Vec::new(), 0, 0);
        let mut line = Vec::new();
        loop {
            line.clear();
            let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
            let bytes = output.read_until(b'\n', &mut line).map_err(failed)?;
            number += 1;
            if line.pop() != Some(b'\n') || line.contains(&0) {
                break;
            }
            let Some(answer) = answer::read(&line) else {
                return Err(format!(
                    "{}: line {number} is no answer of this program; remove or mend it, or give another --output",
                    path.display()
                )
                .into());
            };
            found.push(answer);
            whole += bytes as u64;
        }
        let is_sorted = found.is_sorted();
        found.sort_unstable();
        if let Some(twice) = found.windows(2).find(|pair| pair[0].number == pair[1].number) {
            let (number, path) = (twice[0].number, path.display());
            return Err(format!("{path}: the prompt in line {number} has two answers; remove one of them").into());
        }
        if in_order && !is_sorted {
            return Err(not_in_order().into());
        }
        Ok(Held { known: Self { found, reached: 0, in_order }, whole })
    }

    pub fn len(&self) -> usize {
        self.found.len()
    }

    pub fn errors(&self) -> usize {
        self.found.iter().filter(|found| found.is_error).count()
    }

    /// Whether the input's next line is answered.
    ///
    /// # Errors
    /// Where the input is not the one that was answered.
    pub fn has(&mut self, number: u64, digest: u64) -> Result<bool, String> {
        match self.found.get(self.reached) {
            Some(next) if next.number == number && next.digest == digest => {
                self.reached += 1;
                Ok(true)
            }
            Some(next) if next.number <= number => Err(format!(
                "line {} is not the one that was answered; give the input as it was, or another --output",
                next.number
            )),
            Some(_) if self.in_order => Err(not_in_order()),
            _ => Ok(false),
        }
    }

    /// The input has ended.
    ///
    /// # Errors
    /// As [`has`](Self::has).
    pub fn end(&self) -> Result<(), String> {
        match self.found.get(self.reached) {
            Some(next) => Err(format!(
                "line {} was answered, but there is no such line now; give the input as it was, or another --output",
                next.number
            )),
            None => Ok(()),
        }
    }
}

fn not_in_order() -> String {
    "the answers that are there are not in order; go on with --as-they-end, or give another --output".into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        batch::{answer::Place, line::Form},
        serve::error::Refused,
    };

    fn place(number: u64) -> Place {
        Place { number, digest: 100 + number, form: Form::Plain, id: json!(number) }
    }

    fn output(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|number| place(*number).line(&Err(Refused::field("a", "why")))).collect()
    }

    fn read(bytes: &[u8], in_order: bool) -> Result<Held, String> {
        Known::read(bytes, Path::new("out"), in_order).map_err(|error| error.to_string())
    }

    /// Which of so many lines are not answered.
    fn left(known: &mut Known, lines: u64) -> Result<Vec<u64>, String> {
        let mut left = Vec::new();
        for number in 1..=lines {
            if !known.has(number, 100 + number)? {
                left.push(number);
            }
        }
        known.end().map(|()| left)
    }

    /// The process may end at any byte: what is whole stays, and nothing is answered twice or left out.
    #[test]
    fn wherever_an_output_is_cut_off_it_goes_on_to_one_answer_for_every_line() {
        let mut rng = fastrand::Rng::new();
        for round in 0..400 {
            let lines = 12;
            let in_order = round % 2 == 0;
            let mut file = Vec::new();
            for _life in 0..4 {
                let Held { mut known, whole } = read(&file, in_order).unwrap();
                assert!(whole as usize <= file.len() && (whole == 0 || file[whole as usize - 1] == b'\n'));
                file.truncate(whole as usize);
                let mut left = left(&mut known, lines).unwrap();
                assert_eq!(left.len() + known.len(), lines as usize);
                if !in_order {
                    rng.shuffle(&mut left);
                }
                let more = output(&left);
                file.extend_from_slice(&more[..rng.usize(..=more.len())]);
                if rng.u8(..4) == 0 && !more.is_empty() {
                    // As a power failure leaves the end.
                    let zeros = rng.usize(..=file.len() - whole as usize);
                    let at = file.len() - zeros;
                    file[at..].fill(0);
                }
            }
            let Held { mut known, whole } = read(&file, in_order).unwrap();
            file.truncate(whole as usize);
            file.extend(output(&left(&mut known, lines).unwrap()));
            let Held { known, whole } = read(&file, in_order).unwrap();
            assert_eq!((known.len(), whole as usize), (lines as usize, file.len()));
            let numbers: Vec<_> = known.found.iter().map(|found| found.number).collect();
            assert_eq!(numbers, (1..=lines).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_input_that_changed_is_refused_by_its_line() {
        let held = |numbers: &[u64]| read(&output(numbers), false).unwrap().known;
        assert_eq!(left(&mut held(&[4, 2]), 5), Ok(vec![1, 3, 5]));
        let said = held(&[1]).has(1, 7).unwrap_err();
        assert!(said.starts_with("line 1 is not the one that was answered"), "{said}");
        // A line that is blank now is not shown at all.
        let said = held(&[2]).has(3, 103).unwrap_err();
        assert!(said.starts_with("line 2 is not the one that was answered"), "{said}");
        let said = left(&mut held(&[2, 9]), 5).unwrap_err();
        assert!(said.starts_with("line 9 was answered, but"), "{said}");
    }

    #[test]
    fn what_is_no_output_of_this_program_is_refused_by_its_line() {
        let mut file = output(&[1, 2]);
        file.extend(b"{}\n");
        file.extend(output(&[3]));
        assert!(read(&file, false).unwrap_err().contains("out: line 3 is no answer of this program"));
        assert!(read(&output(&[1, 2, 1]), false).unwrap_err().contains("the prompt in line 1 has two answers"));
        assert!(read(&output(&[2, 1]), true).unwrap_err().contains("not in order"));
        let mut gap = read(&output(&[1, 3]), true).unwrap().known;
        assert!(left(&mut gap, 3).unwrap_err().contains("not in order"));
    }
}
