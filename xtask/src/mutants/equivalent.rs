//! Mutants of the kernels that compute the same, with the reason.

use super::Mutant;

/// File, code and change as the table names them, and why no test can notice.
type Row = (&'static str, &'static str, &'static str, &'static str);

const AGAIN: &str = "what it guards is checked again inside";
const NO_BLOCK: &str = "no bytes are no block: its planes do not fit";
const UNSEEN: &str = "keys of which no query sees any: all are masked, and add nothing";
const NO_TILE: &str = "zeros for a tile of no keys, which nobody reads";
const NO_STAGE: &str = "zeros for a stage that there is not";
const ALL: &str = "every token is some sequence's: q_offsets end where tokens do";

#[rustfmt::skip]
const EQUIVALENT: &[Row] = &[
    ("cuda/attention.cuh", "for (int base = 0; base < call.sequences; base += 32) {",
     "< call.sequences becomes <=", "a round without sequences finds nothing"),
    ("cuda/attention.cuh", "count - first < size",
     "always true", "keys that no query of the tile sees; its rows are counted again"),
    ("cuda/attention.cuh", "tile.past + 1 > call.window",
     "always false", UNSEEN),
    ("cuda/attention.cuh", "later.d == 0.0f",
     "always false", "sums of no keys are zeros, of which only the sign matters"),
    ("cuda/attention.cuh", "next < end",
     "always true", UNSEEN),
    ("cuda/attention.cuh", "key < end",
     "always true", NO_TILE),
    ("cuda/attention.cuh", "if (key < end) {",
     "< end becomes <=", NO_TILE),
    ("cuda/attention.cuh", "over + kMore >= 0 && over - (kKeys - 1) < call.window",
     "always true", UNSEEN),
    ("cuda/attention.cuh", "over < kKeys - 1 || over + kMore >= call.window",
     "always true", AGAIN),
    ("cuda/attention.cuh", "__ballot_sync(kWarp, next[0] > m[t][0] + kSlack || next[1] > m[t][1] + kSlack) != 0",
     "always true", "sums are lowered more often than they must be"),
    ("cuda/attention.cuh", "if (__ballot_sync(kWarp, next[0] > m[t][0] + kSlack || next[1] > m[t][1] + kSlack) != 0) {",
     "> m[t][0] + kSlack becomes >=", "a slack of 7 for 8"),
    ("cuda/attention.cuh", "if (__ballot_sync(kWarp, next[0] > m[t][0] + kSlack || next[1] > m[t][1] + kSlack) != 0) {",
     "> m[t][1] + kSlack becomes >=", "a slack of 7 for 8"),
    ("cuda/attention_decode.cu", "__syncwarp();",
     "left out", "the last products need what every lane has read of the tiles; it is there for the model of memory"),
    ("cuda/attention_decode.cu", "!find_tile(call, call.first_tile + number, 1, &tile)",
     "always false", ALL),
    ("cuda/attention_decode.cu", "!find_tile(call, call.first_tile + number, 1, &tile) (2)",
     "always false", ALL),
    ("cuda/attention_decode.cu", "min(share - chunk * kHeads, kHeads)",
     "share - chunk * kHeads", "a tile has no more rows"),
    ("cuda/attention_decode.cu", "lane >= distance",
     "always true", "a lane that has none below gets its own"),
    ("cuda/attention_decode.cu", "i % 8 == 0 && base + i >= parts",
     "always false", "parts beyond the last are of no keys"),
    ("cuda/dequantise.cu", "if (at < count) tile[column / 8 * kPitch + column % 8 * kSide + side] = matrix.codes[at];",
     "< count becomes <=", "a word of what lies behind the codes, which is not used"),
    ("cuda/norm.cu", "if (row < rows && (i * lanes + lane) * 4 < size) {",
     "< rows becomes <=", "the sum of a row that is not written"),
    ("cuda/product.cu", "call.n - first < Shape::kRows",
     "always true", "there is no place for more rows"),
    ("cuda/product.cu", "row < rows",
     "always false", "which row is read in place of one that there is not"),
    ("cuda/product.cu", "from < k",
     "always true", NO_STAGE),
    ("cuda/product.cu", "if (from < k) {",
     "< k becomes <=", NO_STAGE),
    ("cuda/product.cu", "for (size_t i = threadIdx.x; i < n; i += kComparing) {",
     "< n becomes <=", "an algorithm that is right may be refused, and another is taken"),
    ("cuda/product.cu", "__syncthreads();",
     "left out", "an algorithm that is wrong in few places might pass; those of the emulation are wrong all over"),
    ("cuda/product.cu", "threadIdx.x != 0",
     "always false", "every thread computes and writes the same"),
    ("cuda/rope.cu", "for (int base = 0; base < items; base += kBlock * kUnroll) {",
     "< items becomes <=", AGAIN),
    ("cuda/rows.cu", "warp > 0",
     "always false", "every warp computes and writes the same"),
    ("cuda/rows.cu", "if (isnan(other) || other > value || (other == value && at < index)) value = other, index = at;",
     "< index becomes <=", "the element that it is already"),
    ("cuda/unpack.cu", "if (units < index_units) return false;",
     "< index_units becomes <=", NO_BLOCK),
    ("cuda/unpack.cu", "if (entry.x > end || end > units - index_units) return false;",
     "> end becomes >=", NO_BLOCK),
    ("cuda/unpack.cu", "count >= kShare",
     "always false", "weights are written one by one"),
];

/// Why this mutant computes the same, if it does.
pub fn reason(mutant: &Mutant) -> Option<&'static str> {
    let known =
        |row: &&Row| (mutant.file.as_str(), mutant.code.as_str(), mutant.change.as_str()) == (row.0, row.1, row.2);
    EQUIVALENT.iter().find(known).map(|row| row.3)
}

/// Rows for which there is no mutant (any more).
pub fn stale(mutants: &[Mutant]) -> Vec<String> {
    let is_known = |row: &&Row| {
        mutants.iter().any(|mutant| mutant.file == row.0 && mutant.code == row.1 && mutant.change == row.2)
    };
    EQUIVALENT.iter().filter(|row| !is_known(row)).map(|row| format!("{}: {}: {}", row.0, row.1, row.2)).collect()
}
