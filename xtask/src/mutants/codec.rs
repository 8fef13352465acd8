//! Mutants of the codec of packed weights, `src/packed`, and of what cuts packed tensors into pieces.

use std::fs;

use regex::Regex;

use super::{Built, Mutant, Source, judge, pick, with_switch};
use crate::run::Failure;

/// Tests that concern them.
const TESTS: [&str; 3] = ["packed::", "plan::fuzz", "pipeline::tests::every_unit"];

/// An expression of a file, and what stands in its place. It stands there once.
const CHANGES: &[(&str, &str, &str)] = &[
    ("packed/encode.rs", "bytes.len() - blocks", "0"),
    ("packed/encode.rs", "index + number * ENTRY", "index"),
    ("packed/encode.rs", "usize::from(code == escaped)", "1"),
    (
        "packed/encode.rs",
        "codes[..count.next_multiple_of(8)].chunks_exact(8)",
        "codes[..count / 8 * 8].chunks_exact(8)",
    ),
    ("packed/encode.rs", "(BITS * count).div_ceil(8)", "BITS * count / 8"),
    ("packed/encode.rs", "bytes.len().next_multiple_of(ALIGN)", "bytes.len()"),
    ("packed/encode.rs", "(rank - first) as u8", "rank as u8"),
    ("packed/mod.rs", "FIXED + self.first.div_ceil(4)", "FIXED + self.first / 4"),
    ("packed/mod.rs", "(3 * self.second).div_ceil(8)", "3 * self.second / 8"),
    ("packed/mod.rs", "block + 1 < self.blocks()", "block + 2 < self.blocks()"),
    ("packed/decode.rs", "(found? == escapes)", "(found? == escapes || true)"),
    ("packed/decode.rs", "planes.first[at / 4] >> (2 * (at % 4)) & 3", "planes.first[at / 4] >> (at % 4) & 3"),
    ("packed/decode.rs", "self.bytes.get(at..at + 8)", "self.bytes.get(at + 1..at + 9)"),
    ("packed/decode.rs", "self.bytes.get(at..).unwrap_or_default()", "self.bytes.get(at + 1..).unwrap_or_default()"),
    ("packed/x86.rs", "rank + usize::from(rank >= 3) + usize::from(rank >= 6)", "rank + usize::from(rank >= 3)"),
    ("packed/x86.rs", "codes >> (16 * eighth)", "codes >> (8 * eighth)"),
    ("packed/x86.rs", "unknown &= unknown - 1", "unknown = 0"),
    ("packed/x86.rs", "&there[..there.len().min(32)]", "&there[there.len().min(32)..]"),
    ("packed/description.rs", "lengths.len() != weights.div_ceil(part)", "false"),
    ("packed/description.rs", "possible.contains(&length)", "true"),
    ("packed/description.rs", "length.is_multiple_of(ALIGN)", "true"),
    ("packed/description.rs", "number * self.part / BLOCK + corrupt.block", "corrupt.block"),
    ("layout/unit.rs", "all.part.min(left)", "all.part"),
    ("layout/unit.rs", "part.from < window.start", "part.from <= window.start"),
    ("layout/unit.rs", "part.from < window.end", "part.from <= window.end"),
    ("layout/unit.rs", "next.from + next.parts.bytes() <= end", "true"),
    ("layout/unit.rs", "across(part.from, part.parts.bytes())", "false"),
];

pub fn run(pattern: &Regex) -> Result<(), Failure> {
    let tree = super::copy_tree()?;
    let mut mutants = Vec::new();
    let mut files: Vec<_> = CHANGES.iter().map(|(file, ..)| *file).collect();
    files.dedup();
    for file in files {
        let path = tree.join("src").join(file);
        fs::write(&path, mutate(file, &fs::read_to_string(&path)?, &mut mutants)?)?;
    }
    with_switch(&tree)?;
    let built = Built::new(&tree, "--lib", "layer_streamer", &[])?;
    built.passes(&TESTS)?;
    judge(&pick(mutants, pattern), |mutant: &Mutant| built.failure(&TESTS, mutant.number))
}

/// The text with each of its expressions replaced by a mutant.
fn mutate(file: &str, text: &str, mutants: &mut Vec<Mutant>) -> Result<String, Failure> {
    let mut source = Source::new(&format!("src/{file}"), text);
    for (_, code, instead) in CHANGES.iter().filter(|(of, ..)| *of == file) {
        let places: Vec<_> = text.match_indices(code).map(|(at, _)| at).collect();
        let [at] = places[..] else {
            return Err(format!("src/{file} has {} times what it should have once: {code}", places.len()).into());
        };
        let number = source.mutant(at, code, instead, mutants);
        source.insert(at, format!("(if crate::mutated({number}) {{ {instead} }} else {{ "));
        source.insert(at + code.len(), " })".to_owned());
    }
    Ok(source.finish())
}
