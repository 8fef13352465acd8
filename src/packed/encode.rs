//! Weights → a part.

use super::{ALIGN, BLOCK, Entry, Escapes, FIXED, PART, Table, exponent, index_bytes, rest, weight};

/// Encodes parts by one table.
#[derive(Clone, Debug)]
pub struct Encoder {
    table: Table,
    /// Each exponent's place in the table; beyond it for those that have none.
    ranks: [u8; 256],
}

impl Encoder {
    /// By this table, in which no exponent should be twice.
    pub fn new(table: Table) -> Self {
        let mut ranks = [table.0.len() as u8; 256];
        for (rank, exponent) in table.0.into_iter().enumerate() {
            ranks[usize::from(exponent)] = rank as u8;
        }
        Self { table, ranks }
    }

    /// Up to [`PART`] weights as a part.
    ///
    /// # Panics
    /// For more weights.
    pub fn part(&self, weights: &[u16]) -> Vec<u8> {
        assert!(weights.len() <= PART);
        let length = index_bytes(weights.len());
        let (mut index, mut bytes) = (Vec::with_capacity(length), vec![0; length]);
        for weights in weights.chunks(BLOCK) {
            let start = bytes.len() - length;
            let escapes = self.block(weights, &mut bytes);
            index.extend_from_slice(&Entry { start, escapes }.to_bytes());
        }
        bytes[..index.len()].copy_from_slice(&index);
        bytes
    }

    /// Appends up to [`BLOCK`] weights as a block.
    fn block(&self, weights: &[u16], bytes: &mut Vec<u8>) -> Escapes {
        let (mut second, mut third, mut plain) = (Codes::default(), Codes::default(), Vec::new());
        let start = bytes.len();
        bytes.resize(start + FIXED, 0);
        let (rests, first) = bytes[start..].split_at_mut(BLOCK);
        // The last block of a tensor is filled up with what takes no escape.
        let filling = weight(self.table.0[0], 0);
        for at in 0..BLOCK {
            let weight = weights.get(at).copied().unwrap_or(filling);
            rests[at] = rest(weight);
            let rank = self.ranks[usize::from(exponent(weight))];
            first[at / 4] |= rank.min(3) << (2 * (at % 4));
            if rank >= 3 {
                second.push((rank - 3).min(3), 2);
            }
            if rank >= 6 {
                third.push((rank - 6).min(7), 3);
            }
            if rank >= 13 {
                plain.push(exponent(weight));
            }
        }
        let escapes = Escapes { first: second.count, second: third.count };
        bytes.extend(second.finish());
        bytes.extend(third.finish());
        bytes.extend(plain);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        escapes
    }
}

/// A plane that grows by codes, the first in the lowest bits.
#[derive(Default)]
struct Codes {
    bytes: Vec<u8>,
    /// The last bits, which fill no byte yet, and how many they are.
    last: u32,
    bits: usize,
    count: usize,
}

impl Codes {
    fn push(&mut self, code: u8, length: usize) {
        self.last |= u32::from(code) << self.bits;
        self.bits += length;
        self.count += 1;
        if self.bits >= 8 {
            self.bytes.push(self.last as u8);
            self.last >>= 8;
            self.bits -= 8;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        if self.bits > 0 {
            self.bytes.push(self.last as u8);
        }
        self.bytes
    }
}
