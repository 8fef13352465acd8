//! Weights → a part.

use super::{ALIGN, BLOCK, ENTRY, Entry, Escapes, FIXED, PART, Table, index_bytes, weight};

/// Encodes parts by one table.
#[derive(Clone, Debug)]
pub struct Encoder {
    table: Table,
    /// The first, second and third code of each exponent; of those that have none, the escape.
    codes: [[u8; 256]; 3],
}

/// The codes of a block's weights, or the exponents of those that escape, of which there may be fewer.
type Codes = [u8; BLOCK];

impl Encoder {
    /// By this table, in which no exponent should be twice.
    pub fn new(table: Table) -> Self {
        let mut codes = [[3; 256], [3; 256], [7; 256]];
        for (rank, exponent) in table.0.into_iter().enumerate() {
            let (plane, first) = match rank {
                0..3 => (0, 0),
                3..6 => (1, 3),
                _ => (2, 6),
            };
            for codes in &mut codes[..plane] {
                codes[usize::from(exponent)] = 3;
            }
            codes[plane][usize::from(exponent)] = (rank - first) as u8;
        }
        Self { table, codes }
    }

    /// Up to [`PART`] weights as a part.
    ///
    /// # Panics
    /// For more weights.
    pub fn part(&self, weights: &[u16]) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.append(weights, &mut bytes);
        bytes
    }

    /// Appends up to [`PART`] weights as a part.
    ///
    /// # Panics
    /// For more weights.
    pub fn append(&self, weights: &[u16], bytes: &mut Vec<u8>) {
        assert!(weights.len() <= PART);
        let index = bytes.len();
        let blocks = index + index_bytes(weights.len());
        bytes.resize(blocks, 0);
        for (number, weights) in weights.chunks(BLOCK).enumerate() {
            let start = bytes.len() - blocks;
            let escapes = match weights.try_into() {
                Ok(weights) => self.block(weights, bytes),
                Err(_) => {
                    // The last block of a tensor is filled up with what takes no escape.
                    let mut whole = [weight(self.table.0[0], 0); BLOCK];
                    whole[..weights.len()].copy_from_slice(weights);
                    self.block(&whole, bytes)
                }
            };
            let entry = index + number * ENTRY;
            bytes[entry..entry + ENTRY].copy_from_slice(&Entry { start, escapes }.to_bytes());
        }
    }

    /// So many bytes are the most that a tensor takes in so many parts, whose exponents are met so often. It takes less by no more
    /// than the rounding of its blocks.
    pub fn most_bytes(&self, counts: &[u64; 256], parts: usize) -> u64 {
        let [first_codes, second_codes, third_codes] = &self.codes;
        let (mut weights, mut first, mut second, mut plain) = (0, 0, 0, 0);
        for (exponent, count) in counts.iter().enumerate() {
            let escapes = [first_codes[exponent] == 3, second_codes[exponent] == 3, third_codes[exponent] == 7];
            weights += count;
            first += if escapes[0] { *count } else { 0 };
            second += if escapes[0] && escapes[1] { *count } else { 0 };
            plain += if escapes == [true; 3] { *count } else { 0 };
        }
        // Two planes of each block begin with a whole byte, and each block and each index ends with a multiple.
        let blocks = weights.div_ceil(BLOCK as u64) * (FIXED + ENTRY + 2 + ALIGN) as u64;
        blocks + (parts * ALIGN) as u64 + first.div_ceil(4) + (3 * second).div_ceil(8) + plain
    }

    /// Appends a block.
    fn block(&self, weights: &[u16; BLOCK], bytes: &mut Vec<u8>) -> Escapes {
        let [mut exponents, mut rests, mut codes]: [Codes; 3] = [[0; BLOCK]; 3];
        for ((weight, exponent), rest) in weights.iter().zip(&mut exponents).zip(&mut rests) {
            (*exponent, *rest) = (super::exponent(*weight), super::rest(*weight));
        }
        bytes.extend_from_slice(&rests);
        let [first_codes, second_codes, third_codes] = &self.codes;
        let first = escape(first_codes, 3, &mut exponents, BLOCK, &mut codes);
        put::<2>(&mut codes, BLOCK, bytes);
        let second = escape(second_codes, 3, &mut exponents, first, &mut codes);
        put::<2>(&mut codes, first, bytes);
        let plain = escape(third_codes, 7, &mut exponents, second, &mut codes);
        put::<3>(&mut codes, second, bytes);
        bytes.extend_from_slice(&exponents[..plain]);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        Escapes { first, second }
    }
}

/// The codes of so many exponents. Those that are `escaped` are left, in their order; returns how many. No branch depends on them.
fn escape(code_of: &[u8; 256], escaped: u8, exponents: &mut Codes, count: usize, codes: &mut Codes) -> usize {
    let mut left = 0;
    for at in 0..count.min(BLOCK) {
        let exponent = exponents[at];
        let code = code_of[usize::from(exponent)];
        codes[at] = code;
        // It stands at `at` or before, so nothing is lost.
        exponents[left % BLOCK] = exponent;
        left += usize::from(code == escaped);
    }
    left
}

/// Appends so many codes of `BITS` bits, the first in the lowest bits; zeros up to the next whole byte.
fn put<const BITS: usize>(codes: &mut Codes, count: usize, bytes: &mut Vec<u8>) {
    codes[count..count.next_multiple_of(8)].fill(0);
    let end = bytes.len() + (BITS * count).div_ceil(8);
    for eight in codes[..count.next_multiple_of(8)].chunks_exact(8) {
        let mut word = u64::from_le_bytes(eight.try_into().expect("eight of them"));
        // Pairs, then pairs of pairs, and so on come together.
        word = (word | word >> (8 - BITS)) & (0x0001_0001_0001_0001 * ((1 << (2 * BITS)) - 1));
        word = (word | word >> (16 - 2 * BITS)) & (0x0000_0001_0000_0001 * ((1 << (4 * BITS)) - 1));
        word |= word >> (32 - 4 * BITS);
        bytes.extend_from_slice(&word.to_le_bytes()[..BITS]);
    }
    bytes.truncate(end);
}
