//! Each weight by itself, as the formats' formulas have it.

use super::{INPUTS, NF4_NESTED, Recipe, Scheme};
use crate::dtype::{DType, NF4, f8e4m3_to_f32, f32_to_bf16, widened};

/// The bytes of a matrix's tensors, by their place in the [`Scheme`]; of those that it has not, none.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) recipe: Recipe,
    inputs: [&'a [u8]; INPUTS],
}

impl<'a> Matrix<'a> {
    pub(super) fn new(recipe: &Recipe, inputs: [&'a [u8]; INPUTS]) -> Self {
        Self { recipe: *recipe, inputs }
    }

    /// Word `at` of a tensor.
    #[inline(always)]
    fn word(&self, input: usize, at: usize) -> u32 {
        u32::from_le_bytes(self.inputs[input].as_chunks().0[at])
    }

    fn float(&self, input: usize, at: usize) -> f32 {
        f32::from_bits(self.word(input, at))
    }

    /// The codes of eight columns of a row, the first in the lowest bits.
    #[inline(always)]
    pub(super) fn octet(&self, row: usize, octet: usize) -> u32 {
        let Recipe { scheme, rows, columns, .. } = self.recipe;
        match scheme {
            Scheme::Gptq { .. } => self.word(0, octet * rows + row),
            Scheme::Awq => {
                let of_column = |at: usize| self.word(0, (octet * 8 + at) * (rows / 8) + row / 8) >> (4 * in_awq(row));
                (0..8).fold(0, |all, at| all | (of_column(at) & 15) << (4 * at))
            }
            Scheme::Nf4 { .. } => {
                // The upper half of a byte is the first.
                let word = self.word(0, row * (columns / 8) + octet);
                (word >> 4 & 0x0f0f_0f0f) | (word & 0x0f0f_0f0f) << 4
            }
            _ => self.word(0, row * (columns / 8) + octet),
        }
    }

    /// The codes of one byte each of some columns of a row.
    pub(super) fn bytes(&self, row: usize, first: usize, count: usize) -> &'a [u8] {
        &self.inputs[0][row * self.recipe.columns + first..][..count]
    }

    /// The number of the group that a column belongs to. A column of a group that there is not, by a file that is wrong, has the last.
    pub(super) fn group(&self, column: usize) -> usize {
        let last = self.recipe.columns / self.recipe.block[1] - 1;
        match self.recipe.scheme {
            Scheme::Rows { zeros, order: true } => (self.word(2 + usize::from(zeros), column) as usize).min(last),
            Scheme::Gptq { order: true, .. } => (self.word(3, column) as usize).min(last),
            _ => column / self.recipe.block[1],
        }
    }

    /// The scale of a row's columns of this group; of NF4 the group is a block of the matrix.
    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        let Recipe { scheme, rows, columns, block, scale } = self.recipe;
        let groups = columns.div_ceil(block[1]);
        let at = match scheme {
            Scheme::Fp8 => row / block[0] * groups + group,
            Scheme::Rows { .. } => row * groups + group,
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
    pub(super) fn zero(&self, row: usize, group: usize) -> u8 {
        let Recipe { scheme, rows, columns, block, .. } = self.recipe;
        let groups = columns / block[1];
        let (at, nibble, added) = match scheme {
            Scheme::Rows { zeros: true, .. } => (row / 8 * groups + group, row % 8, 0),
            Scheme::Gptq { zero, .. } => (group * (rows / 8) + row / 8, row % 8, zero),
            Scheme::Awq => (group * (rows / 8) + row / 8, in_awq(row), 0),
            _ => return 8,
        };
        (self.word(2, at) >> (4 * nibble)) as u8 % 16 + added
    }

    fn weight(&self, row: usize, column: usize) -> f32 {
        let Recipe { scheme, columns, block, .. } = self.recipe;
        let code = || self.octet(row, column / 8) >> (4 * (column % 8)) & 15;
        match scheme {
            Scheme::Fp8 => {
                let code = self.bytes(row, column, 1)[0];
                f32::from_bits(f8e4m3_to_f32(code)) * self.scale(row, column / block[1])
            }
            Scheme::Nf4 { block, .. } => NF4[code() as usize] * self.scale(row, (row * columns + column) / block),
            _ => {
                let group = self.group(column);
                (code() as f32 - f32::from(self.zero(row, group))) * self.scale(row, group)
            }
        }
    }
}

/// Where AWQ has a row in its word of eight.
#[inline(always)]
fn in_awq(row: usize) -> usize {
    row % 2 * 4 + row % 8 / 2
}

/// Makes the matrix, of F32 or BF16.
///
/// # Panics
/// If the lengths are others than the recipe's, or the type is.
pub(super) fn make(recipe: &Recipe, inputs: [&[u8]; INPUTS], to: DType, dst: &mut [u8]) {
    let Recipe { rows, columns, .. } = *recipe;
    assert_eq!(dst.len(), to.bytes(rows * columns), "a matrix of another size");
    let matrix = Matrix::new(recipe, inputs);
    for (row, dst) in dst.chunks_exact_mut(to.bytes(columns).max(1)).enumerate() {
        for (column, dst) in dst.chunks_exact_mut(to.size()).enumerate() {
            let weight = matrix.weight(row, column).to_bits();
            match to {
                DType::F32 => dst.copy_from_slice(&weight.to_le_bytes()),
                DType::BF16 => dst.copy_from_slice(&f32_to_bf16(weight).to_le_bytes()),
                _ => unreachable!("{to} is no type that weights are made of"),
            }
        }
    }
}
