//! BF16 weights in 10.7 bits each, without loss: an escape chain of fixed-length codes for exponents. `docs/packed.md` specifies the
//! format.
//!
//! Sign and mantissa of trained weights do not compress. Their exponents do: of the 256 that are possible, three are met in seven
//! weights of ten. These have codes of two bits; the fourth code says that another two bits follow elsewhere, for the next three,
//! and so on. So decoding is counting: where a weight's further codes lie is the number of escapes before it.
//!
//! ```
//! use layer_streamer::packed::{Encoder, Packed, Table, count};
//!
//! let weights: Vec<u16> = (0..100_000).map(|i| 0x3c00 | (i % 128) as u16).collect();
//! let mut counts = [0; 256];
//! count(&weights, &mut counts);
//! let table = Table::new(&counts);
//! let bytes = Encoder::new(table).part(&weights);
//! let mut same = vec![0; weights.len()];
//! Packed::new(table, weights.len(), &bytes)?.decode(&mut same)?;
//! assert!(same == weights && bytes.len() < weights.len() * 3 / 2);
//! # Ok::<(), layer_streamer::packed::Corrupt>(())
//! ```
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | a part of a tensor: its index and its blocks |
//! | `description.rs` | a tensor: its parts, and what a file says of it beside its bytes |
//! | `encode.rs` | weights → a part |
//! | `decode.rs` | a block → weights, in plain code |
//! | `rate.rs` | how fast that is on this machine |
//! | `x86.rs` | the same with AVX2 and BMI2, and with AVX-512 |

mod decode;
mod description;
mod encode;
mod rate;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(feature = "model")]
use std::ops::Range;
use std::{cmp::Reverse, fmt};

pub use decode::Decoding;
pub use description::{Description, KEY, Parts, VERSION};
pub use encode::Encoder;
pub(crate) use rate::core_rate;

/// Weights of a block.
pub const BLOCK: usize = 4096;

/// The most weights of a part.
pub const PART: usize = 64 * BLOCK;

/// Tensors of fewer weights are better left as they are: what a device spends on one more piece is worth more than the bytes.
pub const LEAST: usize = 4 * BLOCK;

/// Blocks begin at multiples of this, in bytes.
const ALIGN: usize = 16;
/// Bytes of a block's first two planes: sign and mantissa of each weight, and a code of two bits for its exponent.
const FIXED: usize = BLOCK + BLOCK / 4;
/// Bytes of a block whose weights all have the longest code.
const LONGEST: usize = FIXED + BLOCK / 4 + 3 * BLOCK / 8 + BLOCK;
/// Bytes of an entry of the index.
const ENTRY: usize = 8;

/// The exponents of a tensor that have codes, by rank: three of two bits, three of two more, seven of three more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table(pub [u8; 13]);

impl Table {
    /// The table with which a tensor is shortest, by how often each exponent is met in it.
    pub fn new(counts: &[u64; 256]) -> Self {
        let mut exponents: [u8; 256] = std::array::from_fn(|exponent| exponent as u8);
        // Stable: of those that are met equally often the smaller comes first.
        exponents.sort_by_key(|&exponent| Reverse(counts[usize::from(exponent)]));
        Self(std::array::from_fn(|rank| exponents[rank]))
    }
}

/// The exponent's 8 bits of a BF16 number.
const fn exponent(weight: u16) -> u8 {
    (weight >> 7) as u8
}

/// All else: the sign in bit 7, the mantissa below.
const fn rest(weight: u16) -> u8 {
    (weight >> 8 & 0x80) as u8 | (weight & 0x7f) as u8
}

const fn weight(exponent: u8, rest: u8) -> u16 {
    (rest as u16 & 0x80) << 8 | (exponent as u16) << 7 | rest as u16 & 0x7f
}

/// Counts the exponents of these weights.
pub fn count(weights: &[u16], counts: &mut [u64; 256]) {
    // Four tables: an addition need not wait for the one before, which is often to the same number.
    let mut tables = [[0u64; 256]; 4];
    let (fours, rest) = weights.as_chunks::<4>();
    for four in fours {
        for (table, weight) in tables.iter_mut().zip(four) {
            table[usize::from(exponent(*weight))] += 1;
        }
    }
    for weight in rest {
        counts[usize::from(exponent(*weight))] += 1;
    }
    for table in tables {
        counts.iter_mut().zip(table).for_each(|(count, more)| *count += more);
    }
}

/// Why bytes are no packed weights, or not those that were packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt {
    /// Which block; the number of blocks if it is the index.
    pub block: usize,
    what: &'static str,
}

/// The same of a tensor, for people.
pub(crate) const CORRUPT: &str = "its packed weights are corrupt; download the file, or pack the model, again";

/// What to do about a file whose description of packed tensors is damaged.
pub(crate) const AGAIN: &str = "download the file, or pack the model, again";

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}: {}", self.block, self.what)
    }
}

impl std::error::Error for Corrupt {}

/// How many escapes two of the planes have: by that the others' places are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Escapes {
    /// Of the first codes.
    first: usize,
    /// Of the second ones.
    second: usize,
}

impl Escapes {
    /// Where the planes of third codes and of plain exponents begin, from the block's first byte.
    fn planes(self) -> [usize; 2] {
        let third = FIXED + self.first.div_ceil(4);
        [third, third + (3 * self.second).div_ceil(8)]
    }
}

/// A block's entry in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// From the end of the index, in bytes.
    start: usize,
    escapes: Escapes,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let start = ((self.start / ALIGN) as u32).to_le_bytes();
        let [first, second] = [self.escapes.first, self.escapes.second].map(|count| (count as u16).to_le_bytes());
        [start[0], start[1], start[2], start[3], first[0], first[1], second[0], second[1]]
    }

    fn from_bytes(bytes: [u8; ENTRY]) -> Self {
        let number = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let start = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize * ALIGN;
        Self { start, escapes: Escapes { first: number(4), second: number(6) } }
    }
}

/// What so many weights of a trained model are expected to take: 11 bits each, the rest of their last block included; most models'
/// take 10.7 to 10.8.
pub(crate) const fn expected_bytes(weights: usize) -> usize {
    weights.div_ceil(BLOCK).saturating_mul(11 * BLOCK / 8)
}

/// Bytes of the index of a part of so many weights.
pub(crate) const fn index_bytes(weights: usize) -> usize {
    (weights.div_ceil(BLOCK) * ENTRY).next_multiple_of(ALIGN)
}

/// A packed part in memory.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    decoding: Decoding,
    table: Table,
    weights: usize,
    index: &'a [u8],
    blocks: &'a [u8],
}

impl<'a> Packed<'a> {
    /// So many weights in these bytes.
    ///
    /// # Errors
    /// [`Corrupt`] for fewer bytes than the index has.
    pub fn new(table: Table, weights: usize, bytes: &'a [u8]) -> Result<Self, Corrupt> {
        let (index, blocks) = bytes
            .split_at_checked(index_bytes(weights))
            .ok_or(Corrupt { block: weights.div_ceil(BLOCK), what: "the index is cut off" })?;
        Ok(Self { decoding: Decoding::fastest(), table, weights, index, blocks })
    }

    /// The same, decoded in a certain way.
    pub fn decoded_by(self, decoding: Decoding) -> Self {
        Self { decoding, ..self }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.weights.div_ceil(BLOCK)
    }

    /// Decodes a block: all its weights, [`BLOCK`] of them but for the last one.
    ///
    /// # Errors
    /// [`Corrupt`] if it lies outside the bytes, or its planes disagree with the index. Then `out` has any weights.
    ///
    /// # Panics
    /// If there is no such block, or `out` has another length.
    pub fn decode_block(&self, block: usize, out: &mut [u16]) -> Result<(), Corrupt> {
        let length = BLOCK.min(self.weights - block * BLOCK);
        assert_eq!(out.len(), length, "the length of block {block}");
        let corrupt = |what| Corrupt { block, what };
        let (bytes, escapes) = self.block(block).ok_or(corrupt("lies outside its part"))?;
        let decoded = match <&mut [u16; BLOCK]>::try_from(&mut *out) {
            Ok(out) => self.decoding.decode(self.table, bytes, escapes, out),
            Err(_) => {
                let mut whole = [0; BLOCK];
                let decoded = self.decoding.decode(self.table, bytes, escapes, &mut whole);
                out.copy_from_slice(&whole[..length]);
                decoded
            }
        };
        decoded.ok_or(corrupt("has other codes than its index says"))
    }

    /// Decodes all weights.
    ///
    /// # Errors
    /// As [`decode_block`](Self::decode_block).
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn decode(&self, out: &mut [u16]) -> Result<(), Corrupt> {
        assert_eq!(out.len(), self.weights);
        out.chunks_mut(BLOCK).enumerate().try_for_each(|(block, out)| self.decode_block(block, out))
    }

    /// Where the bytes of a block lie among those of the part; `None` if the index, which may be all that is there yet, says nonsense.
    #[cfg(feature = "model")]
    pub(crate) fn place(&self, block: usize) -> Option<Range<usize>> {
        let (bytes, _) = self.block(block)?;
        let start = self.index.len() + self.entry(block)?.start;
        Some(start..start + bytes.len())
    }

    /// The bytes of a block, to its end or a little further, and its escapes.
    fn block(&self, block: usize) -> Option<(&'a [u8], Escapes)> {
        let Entry { start, escapes } = self.entry(block)?;
        let end = if block + 1 < self.blocks() { self.entry(block + 1)?.start } else { self.blocks.len() };
        Some((self.blocks.get(start..end)?, escapes))
    }

    fn entry(&self, block: usize) -> Option<Entry> {
        let bytes = self.index.get(block * ENTRY..(block + 1) * ENTRY)?;
        Some(Entry::from_bytes(bytes.try_into().ok()?))
    }
}
