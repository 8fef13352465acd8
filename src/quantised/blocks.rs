//! The same numbers as blocks, one behind the other in a row: what a CPU multiplies by. `dtype/blocks.rs` tells the layouts.

use super::{INPUTS, Recipe, Scheme, weights::Matrix};
use crate::dtype::DType;

/// Makes the matrix, of [this type](Recipe::as_blocks).
///
/// # Panics
/// If the lengths are others than the recipe's, or the type is.
pub(super) fn make(recipe: &Recipe, inputs: [&[u8]; INPUTS], to: DType, dst: &mut [u8]) {
    let Recipe { rows, columns, .. } = *recipe;
    assert!(to == recipe.as_blocks() && dst.len() == to.bytes(rows * columns), "a matrix of another type or size");
    let matrix = Matrix::new(recipe, inputs);
    let (in_block, of_row) = (to.block_elements(), columns / to.block_elements());
    for (at, block) in dst.chunks_exact_mut(to.size()).enumerate() {
        let (row, first) = (at / of_row, at % of_row * in_block);
        match recipe.scheme {
            Scheme::Fp8 => {
                let (scale, codes) = block.split_at_mut(4);
                scale.copy_from_slice(&matrix.scale(row, first / recipe.block[1]).to_le_bytes());
                codes.copy_from_slice(matrix.bytes(row, first, in_block));
            }
            Scheme::Nf4 { block: weights, .. } => {
                let (scale, codes) = block.split_at_mut(4);
                scale.copy_from_slice(&matrix.scale(row, (row * columns + first) / weights).to_le_bytes());
                by_halves(&matrix, row, first, codes);
            }
            _ => {
                let (head, codes) = block.split_at_mut(8);
                let group = first / recipe.block[1];
                head[..4].copy_from_slice(&matrix.scale(row, group).to_le_bytes());
                head[4..].copy_from_slice(&f32::from(matrix.zero(row, group)).to_le_bytes());
                by_halves(&matrix, row, first, codes);
            }
        }
    }
}

/// The codes of a block whose first column this is: of the first half of its columns in the lower halves of the bytes.
#[inline(always)]
fn by_halves(matrix: &Matrix<'_>, row: usize, first: usize, codes: &mut [u8]) {
    let octets = codes.len() / 8;
    for (at, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let [lower, upper] = [0, octets].map(|half| spread(matrix.octet(row, first / 8 + half + at)));
        *codes = (lower | upper << 4).to_le_bytes();
    }
}

/// Eight codes of four bits as bytes.
#[inline(always)]
fn spread(octet: u32) -> u64 {
    let word = u64::from(octet);
    let word = (word | word << 16) & 0x0000_ffff_0000_ffff;
    let word = (word | word << 8) & 0x00ff_00ff_00ff_00ff;
    (word | word << 4) & 0x0f0f_0f0f_0f0f_0f0f
}
