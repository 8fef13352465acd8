//! Weights → blocks.

use super::{ALIGN, BLOCK, ENTRY, Entry, Escapes, FIXED, Table, exponent, index_bytes, rest, weight};

/// Encodes tensors by one table.
#[derive(Clone, Debug)]
pub struct Encoder {
    table: Table,
    /// Each exponent's place in the table; beyond it for those that have none.
    ranks: [u8; 256],
}

/// A block whose place is not known yet.
#[derive(Clone, Debug)]
pub struct Block {
    bytes: Vec<u8>,
    escapes: Escapes,
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

    /// Up to [`BLOCK`] weights as a block.
    ///
    /// # Panics
    /// For more weights.
    pub fn block(&self, weights: &[u16]) -> Block {
        assert!(weights.len() <= BLOCK);
        let mut bytes = vec![0; FIXED];
        let [mut second, mut third] = [Codes::default(), Codes::default()];
        let mut plain = Vec::new();
        // The last block of a tensor is filled up with what takes no escape.
        let filling = weight(self.table.0[0], 0);
        for at in 0..BLOCK {
            let weight = weights.get(at).copied().unwrap_or(filling);
            bytes[at] = rest(weight);
            let rank = self.ranks[usize::from(exponent(weight))];
            bytes[BLOCK + at / 4] |= rank.min(3) << (2 * (at % 4));
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
        bytes.extend(second.bytes.into_iter().chain(third.bytes).chain(plain));
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        Block { bytes, escapes }
    }
}

/// A plane that grows by codes of the same length, the first in the lowest bits.
#[derive(Default)]
struct Codes {
    bytes: Vec<u8>,
    bits: usize,
    count: usize,
}

impl Codes {
    fn push(&mut self, code: u8, length: usize) {
        for bit in 0..length {
            if self.bits.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().expect("a byte was pushed for the first bit") |=
                (code >> bit & 1) << (self.bits % 8);
            self.bits += 1;
        }
        self.count += 1;
    }
}

/// Puts blocks one behind the other, and keeps the index.
#[derive(Debug)]
pub struct Index {
    bytes: Vec<u8>,
    end: usize,
    length: usize,
}

impl Index {
    /// Of a tensor of so many weights.
    pub fn new(weights: usize) -> Self {
        let length = index_bytes(weights);
        Self { bytes: Vec::with_capacity(length), end: 0, length }
    }

    /// Takes note of the next block, and returns its bytes, to be put behind those before. `None` if the tensor is longer than
    /// an index can say: 64 GiB.
    pub fn push(&mut self, block: Block) -> Option<Vec<u8>> {
        u32::try_from(self.end / ALIGN).ok()?;
        self.bytes.extend_from_slice(&Entry { start: self.end, escapes: block.escapes }.to_bytes());
        self.end += block.bytes.len();
        Some(block.bytes)
    }

    /// The index, which comes before the blocks.
    ///
    /// # Panics
    /// If it is not that of all blocks.
    pub fn finish(mut self) -> Vec<u8> {
        assert!(self.length - self.bytes.len() < ALIGN.max(ENTRY), "blocks are missing");
        self.bytes.resize(self.length, 0);
        self.bytes
    }
}

/// A whole tensor; `None` if it is longer than an index can say.
pub fn encode(table: Table, weights: &[u16]) -> Option<Vec<u8>> {
    let (encoder, mut index, mut blocks) = (Encoder::new(table), Index::new(weights.len()), Vec::new());
    for weights in weights.chunks(BLOCK) {
        blocks.extend(index.push(encoder.block(weights))?);
    }
    let mut bytes = index.finish();
    bytes.append(&mut blocks);
    Some(bytes)
}
