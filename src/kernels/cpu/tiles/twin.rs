//! What tiles compute, to the bit, by vectors: for a single token, of which a tile would multiply fifteen empty places.

use std::arch::x86_64::*;

use half::bf16;

use super::{Amx, Block, PARTS, SIDE, STEP, Tile, Tiles, parts::transposed};

/// Lanes are rows of the weight.
#[derive(Clone, Copy)]
pub(in super::super) struct Twin(());

impl Twin {
    /// Where there are tiles there is AVX-512.
    pub(in super::super) fn of(_: Amx) -> Self {
        Self(())
    }

    /// Without tiles, to be held against their reference.
    #[cfg(test)]
    pub(in super::super) fn of_this_machine() -> Option<Self> {
        super::super::x86::has_avx512().map(|_| Self(()))
    }
}

// SAFETY: both ways to make one ask for AVX-512.
unsafe impl Tiles for Twin {
    unsafe fn multiply(self, block: &Block, sums: &mut [Tile; 4]) {
        assert!(block.width == 1 && block.group == 0, "a single token");
        // SAFETY: there is AVX-512, and the caller promises weights and activations.
        unsafe { multiply(block, sums) }
    }
}

/// Steps ahead of their use that weights are fetched.
const AHEAD: usize = 4;

/// What is written sixteen times, so that all of it stays in registers.
macro_rules! sixteen {
    ($with:ident) => {
        $with!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
}

/// # Safety
/// As [`Tiles::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn multiply(block: &Block, sums: &mut [Tile; 4]) {
    let Block { weights, stride, rows, x, steps, .. } = *block;
    // One tile's rows after the other's, so that each load goes through its row evenly.
    for (upper, tile) in (0..rows).step_by(SIDE).zip([0, 2]) {
        let weights = weights.wrapping_byte_add(upper * stride);
        let mut total = _mm512_setzero_ps();
        for step in 0..steps {
            // SAFETY: the caller promises the parts of so many steps, and their weights of so many rows.
            unsafe {
                let x = widened(x.add(step * PARTS * SIDE));
                total = add(total, weights.add(step * STEP), stride, (rows - upper).min(SIDE), &x);
            }
        }
        let mut sum = [0.0; SIDE];
        // SAFETY: an array of as many as a vector has.
        unsafe { _mm512_storeu_ps(sum.as_mut_ptr(), total) };
        sums[tile].0.iter_mut().zip(sum).for_each(|(row, sum)| row[0] = sum);
    }
}

/// A step of a tile's rows, added to what there is. Where there are fewer rows the last one stands for those that are missing.
///
/// # Safety
/// A step's weights of so many rows, one at least, lie there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add(total: __m512, weights: *const bf16, stride: usize, rows: usize, x: &Step) -> __m512 {
    macro_rules! fetched {
        ($($row:literal)*) => { $(
            _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(AHEAD * STEP).wrapping_byte_add($row * stride).cast());
        )* };
    }
    macro_rules! loaded {
        ($($row:literal)*) => {
            // SAFETY: the caller promises a step's weights of each row.
            unsafe { [$(_mm512_loadu_si512(weights.wrapping_byte_add($row.min(rows - 1) * stride).cast())),*] }
        };
    }
    sixteen!(fetched);
    let pairs = transposed(sixteen!(loaded));
    let zero = _mm512_setzero_ps();
    let (mut a, mut b, mut c, mut d, mut e, mut f) = (zero, zero, zero, zero, zero, zero);
    macro_rules! multiplied {
        ($($pair:literal)*) => { $({
            let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs[$pair]));
            let second = _mm512_castsi512_ps(_mm512_and_si512(pairs[$pair], _mm512_set1_epi32(!0xffff)));
            a = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0][0][$pair]), a);
            b = _mm512_fmadd_ps(second, _mm512_set1_ps(x[0][1][$pair]), b);
            c = _mm512_fmadd_ps(first, _mm512_set1_ps(x[1][0][$pair]), c);
            d = _mm512_fmadd_ps(second, _mm512_set1_ps(x[1][1][$pair]), d);
            e = _mm512_fmadd_ps(first, _mm512_set1_ps(x[2][0][$pair]), e);
            f = _mm512_fmadd_ps(second, _mm512_set1_ps(x[2][1][$pair]), f);
        })* };
    }
    sixteen!(multiplied);
    let parts = [_mm512_add_ps(a, b), _mm512_add_ps(c, d), _mm512_add_ps(e, f)];
    parts.into_iter().fold(total, |total, part| _mm512_add_ps(total, part))
}

/// A step's activations of a single token: of each part the first numbers of its pairs, and the second.
type Step = [[[f32; SIDE]; 2]; PARTS];

/// Them in F32.
///
/// # Safety
/// They lie there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widened(x: *const u32) -> Step {
    let mut wide = [[[0.0; SIDE]; 2]; PARTS];
    for (part, [first, second]) in wide.iter_mut().enumerate() {
        // SAFETY: the caller promises them, and an array has as many as a vector.
        unsafe {
            let pairs = _mm512_loadu_si512(x.add(part * SIDE).cast());
            _mm512_storeu_si512(first.as_mut_ptr().cast(), _mm512_slli_epi32::<16>(pairs));
            _mm512_storeu_si512(second.as_mut_ptr().cast(), _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
        }
    }
    wide
}
