//! Each weight by itself, as the formats' formulas have it.

use super::{INPUTS, NF4_NESTED, Recipe, Scheme};
use crate::dtype::{DType, NF4, f8e4m3_to_f32, f32_to_bf16, widened};

/// The bytes of a matrix's tensors, by their place in the [`Scheme`]; of those that it has not, none.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) recipe: Recipe,
    /// Groups of columns; of NF4, blocks of weights in all.
    groups: usize,
    inputs: [&'a [u8]; INPUTS],
}

impl<'a> Matrix<'a> {
    pub(super) fn new(recipe: &Recipe, inputs: [&'a [u8]; INPUTS]) -> Self {
        let weights = if let Scheme::Nf4 { .. } = recipe.scheme { recipe.rows } else { 1 } * recipe.columns;
        Self { recipe: *recipe, groups: weights.div_ceil(recipe.block[1]), inputs }
    }

    /// Word `at` of a tensor.
    #[inline(always)]
    fn word(&self, input: usize, at: usize) -> u32 {
        u32::from_le_bytes(self.inputs[input].as_chunks().0[at])
    }

    fn float(&self, input: usize, at: usize) -> f32 {
        f32::from_bits(self.word(input, at))
    }

    /// Words of a tensor, so many apart.
    #[inline(always)]
    fn words(&self, first: usize, apart: usize) -> [u32; 8] {
        let words = &self.inputs[0].as_chunks().0[first..][..7 * apart + 1];
        std::array::from_fn(|at| u32::from_le_bytes(words[at * apart]))
    }

    /// The codes of eight columns of eight rows from `first` on, a multiple of 8: the first column's in the lowest bits. Where there are
    /// fewer rows the others' are any.
    #[inline(always)]
    pub(super) fn octets(&self, first: usize, octet: usize) -> [u32; 8] {
        let (Recipe { scheme, rows, .. }, in_row) = (self.recipe, self.recipe.columns / 8);
        match scheme {
            Scheme::Gptq { .. } => self.words(octet * rows + first, 1),
            Scheme::Awq => {
                let words = transposed(self.words(octet * 8 * (rows / 8) + first / 8, rows / 8));
                AWQ.map(|at| words[at])
            }
            _ => {
                let words = match rows - first {
                    8.. => self.words(first * in_row + octet, in_row),
                    count => std::array::from_fn(|at| self.word(0, (first + at.min(count - 1)) * in_row + octet)),
                };
                match scheme {
                    // The upper half of a byte is the first.
                    Scheme::Nf4 { .. } => words.map(|word| (word >> 4 & 0x0f0f_0f0f) | (word & 0x0f0f_0f0f) << 4),
                    _ => words,
                }
            }
        }
    }

    /// The codes of one byte each of some columns of a row.
    pub(super) fn bytes(&self, row: usize, first: usize, count: usize) -> &'a [u8] {
        &self.inputs[0][row * self.recipe.columns + first..][..count]
    }

    /// The number of the group that a column belongs to. A column of a group that there is not, by a file that is wrong, has the last.
    fn group(&self, column: usize) -> usize {
        let order = match self.recipe.scheme {
            Scheme::Rows { zeros, order: true } => 2 + usize::from(zeros),
            Scheme::Gptq { order: true, .. } => 3,
            _ => return column / self.recipe.block[1],
        };
        (self.word(order, column) as usize).min(self.groups - 1)
    }

    /// The scale of a row's columns of this group; of NF4 the group is a block of the matrix.
    #[inline(always)]
    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        let Recipe { scheme, rows, block, scale, .. } = self.recipe;
        let at = match scheme {
            Scheme::Fp8 => row / block[0] * self.groups + group,
            Scheme::Rows { .. } => row * self.groups + group,
            Scheme::Gptq { .. } | Scheme::Awq => group * rows + row,
            Scheme::Nf4 { .. } => group,
        };
        match (scheme, scale) {
            (Scheme::Nf4 { offset: Some(offset), .. }, _) => {
                let code = usize::from(self.inputs[1][at]);
                self.float(3, code) * self.float(2, at / NF4_NESTED) + f32::from_bits(offset)
            }
            (_, DType::F32) => self.float(1, at),
            (_, dtype) => widened(dtype, self.inputs[1].as_chunks().0[at]),
        }
    }

    /// What is taken off the codes of a row's columns of this group.
    #[inline(always)]
    pub(super) fn zero(&self, row: usize, group: usize) -> f32 {
        let Recipe { scheme, rows, .. } = self.recipe;
        let (at, nibble, added) = match scheme {
            Scheme::Rows { zeros: true, .. } => (row / 8 * self.groups + group, row % 8, 0),
            Scheme::Gptq { zero, .. } => (group * (rows / 8) + row / 8, row % 8, zero),
            Scheme::Awq => (group * (rows / 8) + row / 8, AWQ[row % 8], 0),
            _ => return 8.0,
        };
        f32::from((self.word(2, at) >> (4 * nibble)) as u8 % 16) + f32::from(added)
    }
}

/// Where AWQ has each row of eight in a word.
const AWQ: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A square of 8 × 8 codes with its rows as columns (Warren, Hacker's Delight, section 7-3).
#[inline(always)]
fn transposed(mut rows: [u32; 8]) -> [u32; 8] {
    for (step, mask) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f)] {
        for at in (0..8).filter(|at| at & step == 0) {
            let moved = (rows[at] >> (4 * step) ^ rows[at + step]) & mask;
            rows[at + step] ^= moved;
            rows[at] ^= moved << (4 * step);
        }
    }
    rows
}

/// Makes rows of the matrix from `start` on, of F32 or BF16.
///
/// # Panics
/// If the lengths are others than the recipe's, or the type is.
pub(super) fn make(recipe: &Recipe, inputs: [&[u8]; INPUTS], to: DType, start: usize, dst: &mut [u8]) {
    let Recipe { scheme, columns, block, .. } = *recipe;
    assert!(matches!(to, DType::F32 | DType::BF16), "{to} is no type that weights are made of");
    let (matrix, row_bytes) = (Matrix::new(recipe, inputs), to.bytes(columns));
    let end = start + dst.len() / row_bytes.max(1);
    let mut put = |row: usize, column: usize, weight: f32| {
        let at = &mut dst[(row - start) * row_bytes + column * to.size()..];
        match to {
            DType::F32 => at[..4].copy_from_slice(&weight.to_le_bytes()),
            _ => at[..2].copy_from_slice(&f32_to_bf16(weight.to_bits()).to_le_bytes()),
        }
    };
    if scheme == Scheme::Fp8 {
        for row in start..end {
            for first in (0..columns).step_by(block[1]) {
                let scale = matrix.scale(row, first / block[1]);
                let codes = matrix.bytes(row, first, block[1].min(columns - first));
                for (column, code) in (first..).zip(codes) {
                    put(row, column, f32::from_bits(f8e4m3_to_f32(*code)) * scale);
                }
            }
        }
        return;
    }
    for first in (start..end).step_by(8) {
        let count = 8.min(end - first);
        for octet in 0..columns / 8 {
            let octets = matrix.octets(first, octet);
            for column in octet * 8..octet * 8 + 8 {
                let group = matrix.group(column);
                for (row, octet) in (first..first + count).zip(octets) {
                    let code = octet >> (4 * (column % 8)) & 15;
                    let weight = match scheme {
                        Scheme::Nf4 { .. } => {
                            NF4[code as usize] * matrix.scale(row, (row * columns + column) / block[1])
                        }
                        _ => (code as f32 - matrix.zero(row, group)) * matrix.scale(row, group),
                    };
                    put(row, column, weight);
                }
            }
        }
    }
}
