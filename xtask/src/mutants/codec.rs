//! Mutants of the codec of packed weights, `src/packed`, and of what cuts packed tensors into pieces.

use regex::Regex;

use super::{Built, Change, Mutant, judge, pick, replace, with_switch};
use crate::run::Failure;

/// Tests that concern them.
const TESTS: [&str; 3] = ["packed::", "plan::fuzz", "pipeline::tests::every_unit"];

const CHANGES: &[Change] = &[
    ("src/packed/encode.rs", "bytes.len() - blocks", "0"),
    ("src/packed/encode.rs", "index + number * ENTRY", "index"),
    ("src/packed/encode.rs", "usize::from(code == escaped)", "1"),
    (
        "src/packed/encode.rs",
        "codes[..count.next_multiple_of(8)].chunks_exact(8)",
        "codes[..count / 8 * 8].chunks_exact(8)",
    ),
    ("src/packed/encode.rs", "(BITS * count).div_ceil(8)", "BITS * count / 8"),
    ("src/packed/encode.rs", "bytes.len().next_multiple_of(ALIGN)", "bytes.len()"),
    ("src/packed/encode.rs", "(rank - first) as u8", "rank as u8"),
    ("src/packed/mod.rs", "FIXED + self.first.div_ceil(4)", "FIXED + self.first / 4"),
    ("src/packed/mod.rs", "(3 * self.second).div_ceil(8)", "3 * self.second / 8"),
    ("src/packed/mod.rs", "block + 1 < self.blocks()", "block + 2 < self.blocks()"),
    ("src/packed/decode.rs", "(found? == escapes)", "(found? == escapes || true)"),
    ("src/packed/decode.rs", "planes.first[at / 4] >> (2 * (at % 4)) & 3", "planes.first[at / 4] >> (at % 4) & 3"),
    ("src/packed/decode.rs", "self.bytes.get(at..at + 8)", "self.bytes.get(at + 1..at + 9)"),
    (
        "src/packed/decode.rs",
        "self.bytes.get(at..).unwrap_or_default()",
        "self.bytes.get(at + 1..).unwrap_or_default()",
    ),
    ("src/packed/x86.rs", "rank + usize::from(rank >= 3) + usize::from(rank >= 6)", "rank + usize::from(rank >= 3)"),
    ("src/packed/x86.rs", "codes >> (16 * eighth)", "codes >> (8 * eighth)"),
    ("src/packed/x86.rs", "unknown &= unknown - 1", "unknown = 0"),
    ("src/packed/x86.rs", "&there[..there.len().min(32)]", "&there[there.len().min(32)..]"),
    ("src/packed/description.rs", "lengths.len() != weights.div_ceil(part)", "false"),
    ("src/packed/description.rs", "possible.contains(&length)", "true"),
    ("src/packed/description.rs", "length.is_multiple_of(ALIGN)", "true"),
    ("src/packed/description.rs", "number * self.part / BLOCK + corrupt.block", "corrupt.block"),
    ("src/layout/unit.rs", "all.part.min(left)", "all.part"),
    ("src/layout/unit.rs", "part.from < window.start", "part.from <= window.start"),
    ("src/layout/unit.rs", "part.from < window.end", "part.from <= window.end"),
    ("src/layout/unit.rs", "next.from + next.parts.bytes() <= end", "true"),
    ("src/layout/unit.rs", "across(part.from, part.parts.bytes())", "false"),
];

pub fn run(pattern: &Regex) -> Result<(), Failure> {
    let tree = super::copy_tree()?;
    let mut mutants = Vec::new();
    replace(&tree, CHANGES, &mut mutants)?;
    with_switch(&tree)?;
    let built = Built::new(&tree, "--lib", "layer_streamer", &[])?;
    built.passes(&TESTS)?;
    judge(&pick(mutants, pattern), |mutant: &Mutant| built.failure(&TESTS, mutant.number))
}
