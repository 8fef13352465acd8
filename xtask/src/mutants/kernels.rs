//! Mutants of `cuda/*.cu` and `*.cuh`.

use std::{fs, path::Path, sync::LazyLock};

use regex::{Captures, Regex};

use super::{Built, Mutant, Source, VARIABLE, judge, pick};
use crate::run::Failure;

/// For files with this word in their name: the tests that concern them, the quickest first, and how often those are run on random
/// data before a mutant counts as a survivor. Other files: all tests.
const TESTS: &[(&[&str], &[&str], usize)] = &[
    (&["attention"], &["attention_at", "attention_is", "attention_over"], 1),
    (&["append_kv"], &["attention_at", "attention_is"], 1),
    (&["norm"], &["norms"], 5),
    (&["rope"], &["rope"], 5),
    (&["rows"], &["lookups", "an_id", "argmax", "gates_factors", "linear"], 5),
    (&["product"], &["linear"], 2),
    (&["unpack"], &["unpack"], 3),
    (&["blocks"], &["casts"], 3),
    (&["dequantise"], &["matrices"], 1),
    (&["elementwise", "cast", "gated", "in_place"], &["gates_factors", "cast"], 5),
];

pub fn run(pattern: &Regex) -> Result<(), Failure> {
    let tree = super::copy_tree()?;
    let mut mutants = Vec::new();
    for path in super::files(&tree.join("cuda"), &["cu", "cuh"])? {
        let name = format!("cuda/{}", path.file_name().unwrap_or_default().display());
        fs::write(&path, mutate(&name, &fs::read_to_string(&path)?, &mut mutants)?)?;
    }
    with_switch(&tree)?;
    let built = Built::new(
        &tree,
        "--features cuda --test cuda_kernels",
        "cuda_kernels",
        &[("LAYER_STREAMER_CUDA", "emulated")],
    )?;
    built.passes(&[""])?;
    let stale = if pattern.as_str().is_empty() { super::equivalent::stale(&mutants) } else { Vec::new() };
    let attempt = |mutant: &Mutant| {
        let row = TESTS.iter().find(|row| row.0.iter().any(|word| mutant.file.contains(word)));
        let (tests, rounds) = row.map_or((&[""][..], 1), |row| (row.1, row.2));
        (0..rounds).find_map(|_| built.failure(tests, mutant.number).transpose()).transpose()
    };
    judge(&pick(mutants, pattern), attempt)?;
    match stale.is_empty() {
        true => Ok(()),
        false => Err(format!("a reason for no mutant, in equivalent.rs:\n{}", stale.join("\n")).into()),
    }
}

/// Gives common.cuh of a copy of the tree the function that says which mutant is chosen.
pub fn with_switch(tree: &Path) -> Result<(), Failure> {
    const LAST_INCLUDE: &str = "\n#include <utility>\n";
    let path = tree.join("cuda/common.cuh");
    let text = fs::read_to_string(&path)?;
    let switch = format!(
        "{LAST_INCLUDE}\n#include <stdlib.h>\ninline const int mutant = getenv(\"{VARIABLE}\") != nullptr ? \
         atoi(getenv(\"{VARIABLE}\")) : 0;\ninline bool mutated(int number) {{ return mutant == number; }}\n"
    );
    if !text.contains(LAST_INCLUDE) {
        return Err("cuda/common.cuh does not include <utility>, behind which the switch goes".into());
    }
    Ok(fs::write(path, text.replacen(LAST_INCLUDE, &switch, 1))?)
}

macro_rules! regexes {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])* static $name: LazyLock<Regex> = LazyLock::new(|| Regex::new($text).expect("a regex"));)*
    };
}

regexes! {
    DEVICE_FUNCTION = r"(?m)^( *)(?:template <.*>\n *)?(?:__global__|__device__)";
    BARRIER = r"__syncthreads\(\);|__syncwarp\(\);|cp_async_wait<.*?>\(\);";
    IF = r"\bif \(";
    JUMP = r"^\s*(return|continue|break)\b";
    COMPARES = r" [<>]=? ";
    CHOICE = r"(?:\(|= |return |\+= )([^=(;?{]*? [<>]=? [^=;?{]*?) \? ";
    FLAG = r"const bool \w+ = ([^;]*? [<>]=? [^;]*);|, (\w+ < \w+)\);";
    COMPARISON = r" ([<>]=?) ";
    MIN = r"\bmin\(";
    WORD = r"[\w:.\->\[\]]+";
    /// What is known when it is compiled.
    CONSTANT = r"^(\d+|k[A-Z]\w*|[A-Z][A-Z0-9]*|Shape(::\w+)?|Warp::\w+)$";
}

/// The text with all its mutants, each behind its number. What they add never overlaps: it is put in between.
fn mutate(file: &str, text: &str, mutants: &mut Vec<Mutant>) -> Result<String, Failure> {
    let mut source = Source::new(file, text);
    for (begin, end) in device_code(text)? {
        let part = &text[begin..end];
        let at = |found: &Captures<'_>, group: usize| {
            found.get(group).map(|found| (begin + found.start(), begin + found.end())).expect("the group is matched")
        };
        for found in BARRIER.find_iter(part) {
            let number = source.mutant(begin + found.start(), found.as_str(), "left out", mutants);
            source.insert(begin + found.start(), format!("if (!mutated({number})) "));
        }
        for found in IF.find_iter(part) {
            let open = begin + found.end() - 1;
            let close = closing(text, open)?;
            if JUMP.is_match(&text[close + 1..]) {
                choose(&mut source, (open + 1, close), false, mutants);
            } else if COMPARES.is_match(&text[open + 1..close]) {
                choose(&mut source, (open + 1, close), true, mutants);
            }
        }
        let choices = CHOICE.captures_iter(part).map(|found| at(&found, 1)).collect::<Vec<_>>();
        for range in &choices {
            choose(&mut source, *range, true, mutants);
        }
        for found in FLAG.captures_iter(part) {
            let group = if found.get(1).is_some() { 1 } else { 2 };
            choose(&mut source, at(&found, group), true, mutants);
        }
        for found in COMPARISON.captures_iter(part) {
            let (_, right) = at(&found, 0);
            let is_choice = choices.iter().any(|(first, last)| (*first..*last).contains(&right));
            if !is_choice {
                weaken(&mut source, &found[1], right, mutants)?;
            }
        }
        for found in MIN.find_iter(part) {
            let at = begin + found.start();
            let last = closing(text, at + 3)?;
            let (first, second) = text[at + 4..last].split_once(", ").ok_or("min without two arguments")?;
            let code = &text[at..=last];
            let (one, other) = (source.mutant(at, code, first, mutants), source.mutant(at, code, second, mutants));
            source.insert(at, format!("(mutated({one}) ? ({first}) : mutated({other}) ? ({second}) : "));
            source.insert(last + 1, ")".to_owned());
        }
    }
    Ok(source.finish())
}

/// A condition that mutants decide: against it, and also for it where `both`.
fn choose(source: &mut Source<'_>, (begin, end): (usize, usize), both: bool, mutants: &mut Vec<Mutant>) {
    let code = &source.text[begin..end];
    let never = source.mutant(begin, code, "always false", mutants);
    let always = both.then(|| source.mutant(begin, code, "always true", mutants));
    let always = always.map_or(String::new(), |number| format!("mutated({number}) || "));
    source.insert(begin, format!("({always}(("));
    source.insert(end, format!(") && !mutated({never})))"));
}

/// A comparison that lets one more pass, unless its bound is known when it is compiled. `at` is where its right side begins.
fn weaken(source: &mut Source<'_>, sign: &str, at: usize, mutants: &mut Vec<Mutant>) -> Result<(), Failure> {
    let text = source.text;
    let right = &text[at..operand(text, at)?];
    if is_constant(right) {
        return Ok(());
    }
    let begin = text[..at].rfind('\n').map_or(0, |end| end + 1);
    let end = text[at..].find('\n').map_or(text.len(), |end| at + end);
    let (weaker, minus) = match sign {
        "<" => ("<=", ""),
        ">=" => (">", ""),
        "<=" => ("<", "-"),
        _ => (">=", "-"),
    };
    let change = format!("{sign} {} becomes {weaker}", right.trim());
    let number = source.mutant(at, &text[begin..end], &change, mutants);
    source.insert(at, format!("{minus}mutated({number}) + "));
    Ok(())
}

/// The parts of a source that run on the device, as ranges of bytes.
fn device_code(text: &str) -> Result<Vec<(usize, usize)>, Failure> {
    let mut parts = Vec::new();
    for found in DEVICE_FUNCTION.captures_iter(text) {
        let head = found.get(0).expect("a match has a whole");
        let line_end = text[head.end()..].find('\n').map_or(text.len(), |end| head.end() + end);
        let end = if text[head.end()..line_end].trim_end().ends_with('}') {
            line_end
        } else {
            let close = format!("\n{}}}", &found[1]);
            head.end() + text[head.end()..].find(&close).ok_or_else(|| format!("no end of {}", head.as_str()))?
        };
        parts.push((head.start(), end));
    }
    Ok(parts)
}

/// Whether all of an expression is known when it is compiled.
fn is_constant(expression: &str) -> bool {
    let mut words = WORD.find_iter(expression).map(|word| word.as_str()).peekable();
    words.peek().is_some() && words.all(|word| word == "-" || CONSTANT.is_match(word))
}

/// Where the bracket at `open` is closed.
pub fn closing(text: &str, open: usize) -> Result<usize, Failure> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate().skip(open) {
        match byte {
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok(at);
        }
    }
    Err(format!("no end of {}", text[open..].lines().next().unwrap_or_default()).into())
}

/// The end of the expression right of a comparison at `start`.
fn operand(text: &str, start: usize) -> Result<usize, Failure> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate().skip(start) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        let ends =
            || matches!(byte, b',' | b';' | b'?') || ["&&", "||", " = "].iter().any(|end| text[at..].starts_with(end));
        if depth < 0 || depth == 0 && text.is_char_boundary(at) && ends() {
            return Ok(at);
        }
    }
    Err("no end of an expression".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "__global__ void k(int n) {\n  if (i >= n) return;\n  __syncthreads();\n  x = i < kSize ? a : b;\n  y = \
                          min(n, 4);\n}\nvoid host() { if (a < b) return; }\n";

    #[test]
    fn barriers_bounds_and_choices_of_device_code_become_mutants() {
        let mut mutants = Vec::new();
        let text = mutate("cuda/a.cu", KERNEL, &mut mutants).unwrap();
        let found = mutants.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            found,
            [
                "cuda/a.cu:3: __syncthreads();: left out",
                "cuda/a.cu:2: i >= n: always false",
                "cuda/a.cu:4: i < kSize: always false",
                "cuda/a.cu:4: i < kSize: always true",
                "cuda/a.cu:2: if (i >= n) return;: >= n becomes >",
                "cuda/a.cu:5: min(n, 4): n",
                "cuda/a.cu:5: min(n, 4): 4",
            ]
        );
        assert!(text.contains("if ((((i >= mutated(5) + n) && !mutated(2)))) return;"), "{text}");
        assert!(text.contains("if (!mutated(1)) __syncthreads();"), "{text}");
        assert!(text.ends_with("void host() { if (a < b) return; }\n"));
    }

    #[test]
    fn brackets_that_do_not_close_are_refused() {
        assert!(mutate("cuda/a.cu", "__device__ void f() {\n  if (a\n}\n", &mut Vec::new()).is_err());
        assert!(mutate("cuda/a.cu", "__device__ void f() {\n", &mut Vec::new()).is_err());
    }
}
