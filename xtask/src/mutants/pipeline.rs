//! Mutants of `src/pipeline`.

use std::fs;

use regex::Regex;

use super::{Built, Mutant, Source, judge, kernels::closing, pick, with_switch};
use crate::run::Failure;

/// What must come late and is done too early.
struct Early {
    file: &'static str,
    what: &'static str,
    before: &'static str,
    called: &'static str,
}

const EARLY: [Early; 1] = [Early {
    file: "compute.rs",
    what: "if let Place::Slot(slot) = place {\n            self.inlet.release(slot);\n        }",
    before: "let timed = match (&mut self.timer",
    called: "the slot is handed back before the record",
}];

/// Seeds are drawn anew each time.
const ROUNDS: usize = 5;

pub fn run(pattern: &Regex) -> Result<(), Failure> {
    let tree = super::copy_tree()?;
    let mut mutants = Vec::new();
    for path in super::files(&tree.join("src/pipeline"), &["rs"])? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::write(&path, mutate(&name, &fs::read_to_string(&path)?, &mut mutants)?)?;
    }
    with_switch(&tree)?;
    let built = Built::new(&tree, "--lib", "layer_streamer", &[])?;
    built.passes(&["pipeline::"])?;
    let attempt = |mutant: &Mutant| {
        (0..ROUNDS).find_map(|_| built.failure(&["pipeline::"], mutant.number).transpose()).transpose()
    };
    judge(&pick(mutants, pattern), attempt)
}

/// The text with each wait, record and query of an event left out by a mutant, and with what is done too early.
fn mutate(name: &str, text: &str, mutants: &mut Vec<Mutant>) -> Result<String, Failure> {
    let mut source = Source::new(&format!("src/pipeline/{name}"), text);
    let call = Regex::new(r"\bself\.device\.(wait|record|query)\(").expect("a regex");
    for found in call.captures_iter(text) {
        let whole = found.get(0).expect("a match has a whole");
        let (begin, end) = (whole.start(), closing(text, whole.end() - 1)? + 1);
        let number = source.mutant(begin, &text[begin..end], "left out", mutants);
        let nothing = if &found[1] == "query" { "true" } else { "()" };
        source.insert(begin, format!("(if crate::mutated({number}) {{ Ok({nothing}) }} else {{ "));
        source.insert(end, " })".to_owned());
    }
    for early in EARLY.iter().filter(|early| early.file == name) {
        let find = |what: &str| text.find(what).ok_or_else(|| format!("src/pipeline/{name} does not have: {what}"));
        let (late, before) = (find(early.what)?, find(early.before)?);
        let number = source.mutant(late, early.called, "too early", mutants);
        // Long enough for another thread to take it.
        let pause = "std::thread::sleep(std::time::Duration::from_micros(300));";
        source.insert(before, format!("if crate::mutated({number}) {{ {} {pause} }} ", early.what));
        source.insert(late, format!("if !crate::mutated({number}) {{ "));
        source.insert(late + early.what.len(), " }".to_owned());
    }
    Ok(source.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_left_out_by_its_number() {
        let mut mutants = Vec::new();
        let text = mutate("pin.rs", "fn f() {\n    self.device.wait(&stream, (a)(b))?;\n}\n", &mut mutants).unwrap();
        assert_eq!(mutants[0].to_string(), "src/pipeline/pin.rs:2: self.device.wait(&stream, (a)(b)): left out");
        let expected = "(if crate::mutated(1) { Ok(()) } else { self.device.wait(&stream, (a)(b)) })?;";
        assert!(text.contains(expected), "{text}");
        assert!(mutate("compute.rs", "fn f() {}\n", &mut mutants).is_err(), "the late part is not there");
    }
}
