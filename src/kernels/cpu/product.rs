//! Matrix products, straight from the weights' rows: tiles of four rows and some tokens, whose sums stay in registers.
//!
//! An element's sum has the same order whatever the number of tokens and wherever its row and token lie: the lanes of a vector
//! over [`BLOCK`] weights, then the lanes' sums over the blocks.

use std::ops::Range;

use half::{bf16, f16};

use super::{
    Parts, Weight,
    lanes::{Lanes, Stored, Vectors, Work},
};

/// Weights of a row that are multiplied at a time: six tokens' F32 and four rows of BF16 stay in a cache of 32 KiB.
const BLOCK: usize = 768;

/// Most tokens with which a product takes as long as its weights take to arrive. A row is then read to its end before the next.
const FEW: usize = 16;

/// Rows of a piece for more tokens than that: a block of them stays in the cache.
const ROWS: usize = 32;

/// `out[t, n] = Σ x[t, k] · weight[n, k]`, with what is added to it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: Weight<'a>,
    pub(super) bias: Option<Weight<'a>>,
    pub(super) tokens: usize,
    pub(super) k: usize,
    /// Rows of `out` are so many elements apart.
    pub(super) stride: usize,
}

impl Product<'_> {
    /// Rows that a thread multiplies at a time, of `n` for so many threads.
    pub(super) fn rows_of_a_piece(&self, n: usize, threads: usize) -> usize {
        // Long stretches for few tokens, since what is fetched ahead of a piece's end is lost.
        if self.tokens <= FEW { n.div_ceil(8 * threads).next_multiple_of(4).max(ROWS) } else { ROWS }
    }

    /// The columns of `out` that these rows of the weight give.
    ///
    /// # Safety
    /// `out` has a row of `stride` elements for each token, and nobody else uses these columns.
    pub(super) unsafe fn rows(&self, vectors: Vectors, rows: Range<usize>, out: Parts) {
        vectors.run(Columns { product: self, rows, out });
    }
}

struct Columns<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    out: Parts,
}

impl Work for Columns<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.product.weight {
            Weight::F32(weight) => self.compute::<L, f32>(weight),
            Weight::F16(weight) => self.compute::<L, f16>(weight),
            Weight::BF16(weight) => self.compute::<L, bf16>(weight),
        }
    }
}

impl Columns<'_> {
    #[inline(always)]
    fn compute<L: Lanes, W: Stored>(self, weight: &[W]) {
        let Product { tokens, k, .. } = *self.product;
        let weight = &weight[..self.rows.end * k];
        assert_eq!(self.product.x.len(), tokens * k);
        let height = if tokens <= FEW { 4 } else { ROWS };
        for first in self.rows.clone().step_by(height) {
            let rows = first..self.rows.end.min(first + height);
            // At least one block, which writes the bias.
            for start in (0..k.max(1)).step_by(BLOCK) {
                let ks = start..k.min(start + BLOCK);
                for token in (0..tokens).step_by(L::TOKENS) {
                    self.block::<L, W>(weight, rows.clone(), ks.clone(), token..tokens.min(token + L::TOKENS));
                }
            }
        }
    }

    /// A block of some rows, for at most as many tokens as a tile has.
    #[inline(always)]
    fn block<L: Lanes, W: Stored>(&self, weight: &[W], rows: Range<usize>, ks: Range<usize>, tokens: Range<usize>) {
        let mut row = rows.start;
        while row + 4 <= rows.end {
            match tokens.len() {
                6 => self.tile::<L, W, 4, 6>(weight, row, &ks, tokens.start),
                5 => self.tile::<L, W, 4, 5>(weight, row, &ks, tokens.start),
                4 => self.tile::<L, W, 4, 4>(weight, row, &ks, tokens.start),
                3 => self.tile::<L, W, 4, 3>(weight, row, &ks, tokens.start),
                2 => self.tile::<L, W, 4, 2>(weight, row, &ks, tokens.start),
                _ => self.tile::<L, W, 4, 1>(weight, row, &ks, tokens.start),
            }
            row += 4;
        }
        for row in row..rows.end {
            tokens.clone().for_each(|token| self.tile::<L, W, 1, 1>(weight, row, &ks, token));
        }
    }

    #[inline(always)]
    fn tile<L: Lanes, W: Stored, const R: usize, const T: usize>(
        &self,
        weight: &[W],
        row: usize,
        ks: &Range<usize>,
        token: usize,
    ) {
        let Product { x, bias, k, stride, tokens: all, .. } = *self.product;
        // What the first of few tokens' tiles fetch is there for the others'.
        let ahead = if all <= FEW && token == 0 { 8 * k } else { 0 };
        let (weight, mut tokens) = (&weight[row * k..][..R * k], [x.as_ptr(); T]);
        for (place, x_row) in tokens.iter_mut().enumerate() {
            *x_row = x[(token + place) * k + ks.start..].as_ptr();
        }
        // SAFETY: `weight` has R rows of `k` elements and `x` has T from this token on; `ks` ends at `k` at most.
        let sums = unsafe {
            let ahead = weight.as_ptr().wrapping_add(ahead + R * ks.start);
            dots::<L, W, R, T>(tokens, weight.as_ptr().add(ks.start), k, ks.len(), ahead)
        };
        for (place, sums) in sums.iter().enumerate() {
            // SAFETY: the caller of `rows` has promised rows of `stride` elements, and that these columns are this call's alone.
            let out = unsafe { self.out.slice((token + place) * stride + row, R) };
            for (place, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
                let before = if ks.start == 0 { bias.map_or(0.0, |bias| bias.at(row + place)) } else { *out };
                *out = before + sum;
            }
        }
    }
}

/// The products of T vectors of `k` elements with R rows, which are `stride` elements apart. Four rows' worth from `ahead` on is
/// fetched meanwhile, in the order of addresses: that is what makes processors read ahead themselves.
///
/// # Safety
/// The vectors and rows lie there.
#[inline(always)]
pub(super) unsafe fn dots<L: Lanes, W: Stored, const R: usize, const T: usize>(
    x: [*const f32; T],
    rows: *const W,
    stride: usize,
    k: usize,
    ahead: *const W,
) -> [[f32; R]; T] {
    let mut sums = [[L::splat(0.0); R]; T];
    let whole = k / L::COUNT * L::COUNT;
    for at in (0..whole).step_by(L::COUNT) {
        let mut weights = [L::splat(0.0); R];
        for (row, weights) in weights.iter_mut().enumerate() {
            // SAFETY: the caller promises the rows; a vector from `at` on ends at `k` at most.
            *weights = unsafe { W::load(rows.add(row * stride + at)) };
        }
        if R == 4 {
            let ahead = ahead.wrapping_add(4 * at).cast::<i8>();
            (0..4 * L::COUNT * size_of::<W>()).step_by(64).for_each(|line| L::fetch(ahead.wrapping_add(line)));
        }
        for (x, sums) in x.iter().zip(&mut sums) {
            // SAFETY: the caller promises the vectors; a vector from `at` on ends at `k` at most.
            let x: L = unsafe { f32::load(x.add(at)) };
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                *sum = x.times_plus(*weights, *sum);
            }
        }
    }
    if whole < k {
        for (x, sums) in x.iter().zip(&mut sums) {
            // SAFETY: the caller promises the vectors, of which so many elements are left.
            let x: L = unsafe { f32::load_some(x.add(whole), k - whole) };
            for (row, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller promises the rows, of which so many elements are left.
                *sum = x.times_plus(unsafe { W::load_some(rows.add(row * stride + whole), k - whole) }, *sum);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    for (out, sums) in out.iter_mut().zip(&sums) {
        for (out, sums) in out.chunks_mut(4).zip(sums.chunks(4)) {
            match *sums {
                [a, b, c, d] => out.copy_from_slice(&L::four_sums([a, b, c, d])),
                _ => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum.sum()),
            }
        }
    }
    out
}
