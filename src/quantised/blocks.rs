//! The same numbers as blocks, one behind the other in a row: what a CPU multiplies by. `dtype/blocks.rs` tells the layouts.

use super::{INPUTS, Recipe, Scheme, weights::Matrix};
use crate::dtype::DType;

/// Makes rows of the matrix from `first` on, of [this type](Recipe::as_blocks).
///
/// # Panics
/// If the lengths are others than the recipe's, or the type is.
pub(super) fn make(recipe: &Recipe, inputs: [&[u8]; INPUTS], to: DType, first: usize, dst: &mut [u8]) {
    let Recipe { scheme, columns, block: [_, group], .. } = *recipe;
    assert!(to == recipe.as_blocks(), "{to} is not what the matrix is made of");
    let (matrix, in_block, row_bytes) = (Matrix::new(recipe, inputs), to.block_elements(), to.bytes(columns));
    // Eight rows at a time, which have their codes in the same words, or side by side.
    for (tile, dst) in dst.chunks_mut(8 * row_bytes).enumerate() {
        let first = first + tile * 8;
        for (number, column) in (0..columns).step_by(in_block).enumerate() {
            for (at, dst) in dst.chunks_exact_mut(row_bytes).enumerate() {
                let (row, block) = (first + at, &mut dst[number * to.size()..][..to.size()]);
                let scale = match scheme {
                    Scheme::Nf4 { .. } => matrix.scale(row, (row * columns + column) / group),
                    _ => matrix.scale(row, column / group),
                };
                block[..4].copy_from_slice(&scale.to_le_bytes());
                match scheme {
                    Scheme::Fp8 => block[4..].copy_from_slice(matrix.bytes(row, column, in_block)),
                    Scheme::Nf4 { .. } => {}
                    _ => block[4..8].copy_from_slice(&matrix.zero(row, column / group).to_le_bytes()),
                }
            }
            if scheme == Scheme::Fp8 {
                continue;
            }
            let codes = number * to.size() + to.size() - in_block / 2;
            match in_block {
                32 => put::<2>(&matrix, first, column / 8, row_bytes, &mut dst[codes..]),
                64 => put::<4>(&matrix, first, column / 8, row_bytes, &mut dst[codes..]),
                _ => put::<8>(&matrix, first, column / 8, row_bytes, &mut dst[codes..]),
            }
        }
    }
}

/// Writes the codes of eight rows' blocks, of twice H octets: those of the first half of a block's columns in the lower halves of the
/// bytes. Rows are so many bytes apart, and as many as there is room for.
fn put<const H: usize>(matrix: &Matrix<'_>, first: usize, octet: usize, row_bytes: usize, dst: &mut [u8]) {
    for at in 0..H {
        let [lower, upper] = [at, H + at].map(|at| matrix.octets(first, octet + at));
        for (row, dst) in dst.chunks_mut(row_bytes).enumerate() {
            let both = spread(lower[row]) | spread(upper[row]) << 4;
            dst[8 * at..][..8].copy_from_slice(&both.to_le_bytes());
        }
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
