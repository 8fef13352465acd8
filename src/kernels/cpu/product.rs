//! Matrix products, straight from the weights' rows: tiles of four rows and some tokens, or of eight rows and one, whose sums stay
//! in registers. Quantised weights that `digits` does not take are expanded a block of some rows at a time, for all tokens.
//!
//! An element's sum has the same order whatever the number of tokens and wherever its row and token lie: the lanes of a vector
//! over [`BLOCK`] weights, then the lanes' sums over the blocks.

use std::{ops::Range, ptr};

use half::{bf16, f16};

use super::{
    Matrix, Parts, Weight, blocks,
    lanes::{Lanes, Stored, Vectors, Work},
};
use crate::dtype::DType;

/// Weights of a row that are multiplied at a time: six tokens' F32 and four rows of BF16 stay in a cache of 32 KiB.
const BLOCK: usize = 768;

/// Most tokens with which a product takes as long as its weights take to arrive. A row is then read to its end before the next.
const FEW: usize = 16;

/// Rows of a piece for more tokens than that: a block of them stays in the cache.
const ROWS: usize = 32;

/// Pieces for each thread where there are more tokens than that, so that none waits long for the last.
const PIECES: usize = 8;

/// Most tokens of a tile.
const TILE: usize = 6;

/// Fewest tokens of such a piece: several tiles; and as many as make up for the expansion of its weights.
const LEAST: usize = 4 * TILE;
const LEAST_OF_BLOCKS: usize = 16 * TILE;

/// `out[t, n] = Σ x[t, k] · weight[n, k]`, with what is added to it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: Matrix<'a>,
    pub(super) bias: Option<Weight<'a>>,
    pub(super) tokens: usize,
    pub(super) k: usize,
    /// Rows of `out` are so many elements apart.
    pub(super) stride: usize,
}

impl Product<'_> {
    /// Rows of the weight, and tokens, that a thread multiplies at a time, of `n` rows for so many threads.
    pub(super) fn piece(&self, n: usize, threads: usize) -> [usize; 2] {
        if self.tokens <= FEW {
            // Long stretches, since what is fetched ahead of a piece's end is lost.
            return [n.div_ceil(8 * threads).next_multiple_of(4).max(ROWS), self.tokens];
        }
        let least = if let Matrix::Blocks(..) = self.weight { LEAST_OF_BLOCKS } else { LEAST };
        let across = (PIECES * threads).div_ceil(n.div_ceil(ROWS).max(1));
        [ROWS, self.tokens.div_ceil(across).next_multiple_of(TILE).max(least)]
    }

    /// What these rows of the weight give of these tokens.
    ///
    /// # Safety
    /// `out` has a row of `stride` elements for each token, and nobody else uses these columns of these rows.
    pub(super) unsafe fn part(&self, vectors: Vectors, rows: Range<usize>, tokens: Range<usize>, out: Parts) {
        vectors.run(Part { product: self, rows, tokens, out });
    }
}

struct Part<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: Parts,
}

impl Work for Part<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.product.weight {
            Matrix::Plain(Weight::F32(weight)) => self.compute::<L, f32>(weight),
            Matrix::Plain(Weight::F16(weight)) => self.compute::<L, f16>(weight),
            Matrix::Plain(Weight::BF16(weight)) => self.compute::<L, bf16>(weight),
            Matrix::Blocks(dtype, weight) => self.blocks_of::<L>(dtype, weight),
        }
    }
}

/// Some weights of some rows, which are `stride` weights apart.
struct Panel<'a, W> {
    weights: &'a [W],
    stride: usize,
    /// How much further on the weights are that are fetched meanwhile: four rows' worth. 0: none are.
    ahead: usize,
}

impl Part<'_> {
    /// Some rows at a time, and for each of these the blocks of their weights: at least one, which writes the bias.
    fn blocks(&self, height: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let (k, end) = (self.product.k, self.rows.end);
        self.rows.clone().step_by(height).flat_map(move |first| {
            let rows = first..end.min(first + height);
            (0..k.max(1)).step_by(BLOCK).map(move |start| (rows.clone(), start..k.min(start + BLOCK)))
        })
    }

    #[inline(always)]
    fn compute<L: Lanes, W: Stored>(self, weight: &[W]) {
        let Product { tokens, k, .. } = *self.product;
        let weight = &weight[..self.rows.end * k];
        let height = if tokens <= FEW { 4 } else { ROWS };
        for (rows, ks) in self.blocks(height) {
            let weights = &weight[rows.start * k + ks.start..rows.end * k];
            // Two tiles further on, in the order of addresses.
            let ahead = if tokens <= FEW { 8 * k + 3 * ks.start } else { 0 };
            self.all::<L, W>(Panel { weights, stride: k, ahead }, rows, ks);
        }
    }

    /// The same with quantised weights.
    #[inline(always)]
    fn blocks_of<L: Lanes>(mut self, dtype: DType, weight: &[u8]) {
        if self.product.tokens == 1 {
            self.rows = self.dots::<L>(dtype, weight);
            if self.rows.is_empty() {
                return;
            }
        }
        let (mut few, mut many);
        let panel: &mut [_] = if self.product.tokens <= FEW {
            few = [[0.0; BLOCK]; 8];
            &mut few
        } else {
            many = [[0.0; BLOCK]; ROWS];
            &mut many
        };
        // Called in one place: it is compiled for each type of blocks.
        self.expand::<L>(dtype, weight, panel);
    }

    /// With weights that are expanded, a panel of rows at a time: to the bits that they would have as F32.
    #[inline(always)]
    fn expand<L: Lanes>(self, dtype: DType, weight: &[u8], panel: &mut [[f32; BLOCK]]) {
        let (row_bytes, height) = (dtype.bytes(self.product.k), panel.len());
        for (rows, ks) in self.blocks(height) {
            for (row, out) in rows.clone().zip(&mut *panel) {
                let weights = &weight[row * row_bytes..][dtype.bytes(ks.start)..dtype.bytes(ks.end)];
                // What is needed so many rows further on.
                for line in (0..weights.len()).step_by(64) {
                    L::fetch(weights.as_ptr().wrapping_add(height * row_bytes + line).cast());
                }
                blocks::expand::<L>(dtype, weights, &mut out[..ks.len()]);
            }
            let weights = panel.as_flattened();
            self.all::<L, f32>(Panel { weights, stride: BLOCK, ahead: 0 }, rows, ks);
        }
    }

    /// The same for one token: to the same bits, but what is expanded stays in registers. Four rows at a time: those that are left
    /// are returned.
    #[inline(always)]
    fn dots<L: Lanes>(&self, dtype: DType, weight: &[u8]) -> Range<usize> {
        /// Weights of a row at a time: those of the largest block.
        const SOME: usize = 256;
        let (Product { x, k, .. }, row_bytes) = (*self.product, dtype.bytes(self.product.k));
        let (token, left) = (self.tokens.start, self.rows.end - self.rows.len() % 4..self.rows.end);
        let whole = Part { rows: self.rows.start..left.start, tokens: self.tokens.clone(), ..*self };
        for (rows, ks) in whole.blocks(4) {
            let ahead = weight.as_ptr().wrapping_add((rows.start + 8) * row_bytes);
            let mut sums = [L::splat(0.0); 4];
            for start in ks.clone().step_by(SOME) {
                let some = start..ks.end.min(start + SOME);
                let bytes = dtype.bytes(some.start)..dtype.bytes(some.end);
                // In the order of addresses, as in the tiles of other products.
                for line in (4 * bytes.start..4 * bytes.end).step_by(64) {
                    L::fetch(ahead.wrapping_add(line).cast());
                }
                let mut four = [[].as_slice(); 4];
                for (row, weights) in rows.clone().zip(&mut four) {
                    *weights = &weight[row * row_bytes..][bytes.clone()];
                }
                blocks::dots::<L, 4>(dtype, four, &x[token * k..][some], &mut sums);
            }
            self.put(token, rows.start, ks.start == 0, &L::four_sums(sums));
        }
        left
    }

    /// A block of some rows, for all tokens.
    #[inline(always)]
    fn all<L: Lanes, W: Stored>(&self, panel: Panel<'_, W>, rows: Range<usize>, ks: Range<usize>) {
        let Range { start, end } = self.tokens;
        for token in (start..end).step_by(L::TOKENS) {
            self.some::<L, W>(&panel, rows.clone(), &ks, token..end.min(token + L::TOKENS));
        }
    }

    /// The same for at most as many tokens as a tile has.
    #[inline(always)]
    fn some<L: Lanes, W: Stored>(
        &self,
        panel: &Panel<'_, W>,
        rows: Range<usize>,
        ks: &Range<usize>,
        tokens: Range<usize>,
    ) {
        let mut row = 0;
        while tokens.len() == 1 && row + 8 <= rows.len() {
            self.tile::<L, W, 8, 1>(panel, &rows, row, ks, tokens.start);
            row += 8;
        }
        while row + 4 <= rows.len() {
            match tokens.len() {
                6 => self.tile::<L, W, 4, 6>(panel, &rows, row, ks, tokens.start),
                5 => self.tile::<L, W, 4, 5>(panel, &rows, row, ks, tokens.start),
                4 => self.tile::<L, W, 4, 4>(panel, &rows, row, ks, tokens.start),
                3 => self.tile::<L, W, 4, 3>(panel, &rows, row, ks, tokens.start),
                2 => self.tile::<L, W, 4, 2>(panel, &rows, row, ks, tokens.start),
                _ => self.tile::<L, W, 4, 1>(panel, &rows, row, ks, tokens.start),
            }
            row += 4;
        }
        for row in row..rows.len() {
            for token in tokens.clone() {
                self.tile::<L, W, 1, 1>(panel, &rows, row, ks, token);
            }
        }
    }

    /// R rows of a panel, from number `row` on, by T tokens.
    #[inline(always)]
    fn tile<L: Lanes, W: Stored, const R: usize, const T: usize>(
        &self,
        panel: &Panel<'_, W>,
        rows: &Range<usize>,
        row: usize,
        ks: &Range<usize>,
        token: usize,
    ) {
        let Product { x, k, .. } = *self.product;
        let weights = &panel.weights[row * panel.stride..][..(R - 1) * panel.stride + ks.len()];
        let mut tokens = [x.as_ptr(); T];
        for (place, x_row) in tokens.iter_mut().enumerate() {
            *x_row = x[(token + place) * k..][..k][ks.clone()].as_ptr();
        }
        // What the first of few tokens' tiles fetch is there for the others'.
        let fetches = token == 0 && panel.ahead > 0;
        let ahead = if fetches { weights.as_ptr().wrapping_add(panel.ahead) } else { ptr::null() };
        // SAFETY: `weights` has R rows of so many elements, and the tokens have as many.
        let sums = unsafe { dots::<L, W, R, T>(tokens, weights.as_ptr(), panel.stride, ks.len(), ahead) };
        for (place, sums) in sums.iter().enumerate() {
            self.put(token + place, rows.start + row, ks.start == 0, sums);
        }
    }

    /// Adds sums to the columns of a token from `column` on, or, of the first weights, to the bias.
    #[inline(always)]
    fn put<const R: usize>(&self, token: usize, column: usize, is_first: bool, sums: &[f32; R]) {
        // SAFETY: the caller of `part` has promised rows of `stride` elements, and that these columns are this call's alone.
        let out = unsafe { self.out.slice(token * self.product.stride + column, R) };
        for (place, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
            let before = if is_first { self.product.bias.map_or(0.0, |bias| bias.at(column + place)) } else { *out };
            *out = before + sum;
        }
    }
}

/// The products of T vectors of `k` elements with R rows, which are `stride` elements apart. Four rows' worth from `ahead` on, if
/// it is not null, is fetched meanwhile, in the order of addresses: that is what makes processors read ahead themselves.
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
        if R == 4 && !ahead.is_null() {
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
