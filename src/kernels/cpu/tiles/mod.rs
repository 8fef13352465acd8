//! Products with BF16 weights in tiles of AMX, where LAYER_STREAMER_AMX=1 asks for them: several tokens are multiplied in less
//! time than by vectors, one in more. An F32 is the sum of three BF16, so that the products that are
//! summed up, in F32, are those of vectors, and nothing is rounded that they do not round; only what is below 2⁻¹²⁶ counts as
//! zero.
//!
//! An element's sum has the same order whatever the number of tokens and wherever its row and token lie: the three parts of a
//! step of [`STEP`] weights, the steps of a block, the blocks.

mod amx;
mod parts;
mod twin;

use std::{
    arch::x86_64::*,
    ops::Range,
    ptr,
    sync::{Mutex, OnceLock, PoisonError},
};

use half::bf16;

use super::{Parts, for_ranges, parallel, product::Product, x86::first};
use crate::{arena::Arena, device::pool::pool, error::Result};
pub(super) use amx::Amx;
use parts::{quiet, rest, transposed, upper_halves};
pub(super) use twin::Twin;

/// Rows of a weight, and tokens, that a tile has.
pub(super) const SIDE: usize = 16;

/// Weights of a row that a tile has.
pub(super) const STEP: usize = 32;

/// BF16 that make an F32.
pub(super) const PARTS: usize = 3;

/// Steps of a block: as much of 128 rows, and of 32 tokens, stays in the cache of a core beside what comes next.
const BLOCK: usize = 48;

/// Rows that are multiplied at once.
const ROWS: usize = 2 * SIDE;

/// Rows and groups of tokens of a piece, where there are more tokens than a tile has.
const PIECE: [usize; 2] = [4 * ROWS, 4];

/// Memory for the tokens of a product in parts (bytes); more tokens take turns.
pub(super) const SCRATCH_BYTES: usize = 8 << 20;

/// By row of the weight, or by token once it is [`transposed`].
#[repr(align(64))]
pub(super) struct Tile(pub(super) [[f32; SIDE]; SIDE]);

/// Some rows of a weight by one or two groups of tokens, over some steps.
pub(super) struct Block {
    pub(super) weights: *const bf16,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// At most [`ROWS`].
    pub(super) rows: usize,
    /// By step, then by part, a tile of [`SIDE`] rows: pairs of activations, of `width` tokens.
    pub(super) x: *const u32,
    /// Where the second group begins, counted from the first, or 0.
    pub(super) group: usize,
    /// Tokens of a group.
    pub(super) width: usize,
    pub(super) steps: usize,
    /// From where on to fetch as many weights as these, or null.
    pub(super) ahead: *const bf16,
}

/// What multiplies tiles.
///
/// # Safety
/// There is one only where the machine has AVX-512.
pub(super) unsafe trait Tiles: Copy + Sync {
    /// The sums of the block: its first rows by both groups, then its other rows. What is beyond the rows, tokens and groups
    /// of the block is unspecified.
    ///
    /// For each step and part two chains of fused multiplications and additions begin at zero, one of the pairs' first
    /// numbers and one of their second; what they come to is added up, and added to the sum.
    ///
    /// # Safety
    /// Its weights and activations lie there.
    unsafe fn multiply(self, block: &Block, sums: &mut [Tile; 4]);
}

/// The memory for tokens in parts, which one product uses at a time.
fn scratch() -> Result<&'static Mutex<Arena>> {
    static SCRATCH: OnceLock<Mutex<Arena>> = OnceLock::new();
    if let Some(scratch) = SCRATCH.get() {
        return Ok(scratch);
    }
    let reserved = Mutex::new(Arena::new("activations in parts", 1, SCRATCH_BYTES)?);
    // Of two that are made at once, one is kept.
    Ok(SCRATCH.get_or_init(|| reserved))
}

/// Reserves what products take.
pub(super) fn prepare() -> Result<()> {
    scratch().map(|_| ())
}

/// Whether rows of `k` weights are multiplied in tiles: if a group of tokens has room.
pub(super) fn take(k: usize) -> bool {
    k > 0 && k <= SCRATCH_BYTES / (SIDE * PARTS * size_of::<bf16>()) / STEP * STEP
}

/// `out = x · weightᵀ + bias`, with `n` rows of the weight.
///
/// # Safety
/// `out` has a row of `stride` elements for each token, and nobody else uses its first `n` columns.
pub(super) unsafe fn multiply<T: Tiles>(
    tiles: T,
    product: &Product<'_>,
    weight: &[bf16],
    n: usize,
    out: Parts,
) -> Result<()> {
    let Product { x, k, tokens, .. } = *product;
    assert!(take(k) && x.len() == tokens * k && weight.len() == n * k);
    let scratch = scratch()?.lock().unwrap_or_else(PoisonError::into_inner);
    let (width, steps) = (tokens.clamp(1, SIDE), k.div_ceil(STEP));
    let group = steps * words_of_a_step(width);
    let room = SCRATCH_BYTES / size_of::<u32>() / group;
    let at_once = if room > PIECE[1] { room / PIECE[1] * PIECE[1] } else { room } * width;
    for first in (0..tokens).step_by(at_once) {
        let tokens = first..tokens.min(first + at_once);
        let groups = tokens.len().div_ceil(width);
        let parts = Parts { start: scratch.slot(0).as_ptr().cast::<u32>(), len: groups * group };
        let (splits, work) = (groups * steps, tokens.len() * n * k);
        let share = Share { product, weight, out, parts, tokens, width, steps, group };
        // Where there are several tokens they are transposed.
        let splitting = share.tokens.len() * k * if width > 1 { 8 } else { 1 };
        // SAFETY: tiles are there, and with them AVX-512; the scratch is this call's while it has the lock.
        for_ranges(splits, splitting, |splits| splits.for_each(|split| unsafe { share.split(split) }))?;
        let [rows, high] = piece(n, groups, if parallel(work) { pool()?.size() } else { 1 });
        let wide = groups.div_ceil(high);
        let one = |piece: usize| {
            let (row, group) = (piece / wide * rows, piece % wide * high);
            // SAFETY: the caller promises `out`, of which this piece's rows and tokens are no other's.
            unsafe { share.multiply(tiles, row..n.min(row + rows), group..groups.min(group + high)) };
        };
        deal(n.div_ceil(rows) * wide, work, one)?;
    }
    Ok(())
}

/// Calls `f` with each number below `pieces`, in parallel if that pays for so much work in all.
fn deal(pieces: usize, work: usize, f: impl Fn(usize) + Sync) -> Result<()> {
    if parallel(work) {
        pool()?.deal(pieces, f);
    } else {
        (0..pieces).for_each(f);
    }
    Ok(())
}

/// Rows of the weight, and groups of tokens, that a thread multiplies at a time.
fn piece(n: usize, groups: usize, threads: usize) -> [usize; 2] {
    if groups == 1 {
        // Long stretches, since what is fetched ahead of a piece's end is lost.
        return [n.div_ceil(8 * threads).next_multiple_of(ROWS), 1];
    }
    let [rows, high] = PIECE;
    [if n.div_ceil(rows) * groups.div_ceil(high) < 2 * threads { ROWS } else { rows }, high]
}

/// Words of the parts of a step of so many tokens.
fn words_of_a_step(width: usize) -> usize {
    PARTS * SIDE * width
}

/// A product of some of its tokens.
struct Share<'a> {
    product: &'a Product<'a>,
    weight: &'a [bf16],
    out: Parts,
    /// By group of `width` tokens, then as [`Block::x`] has it.
    parts: Parts<u32>,
    tokens: Range<usize>,
    width: usize,
    /// Steps of a row.
    steps: usize,
    /// Words of a group.
    group: usize,
}

impl Share<'_> {
    /// The tokens of a group.
    fn tokens(&self, group: usize) -> Range<usize> {
        let first = self.tokens.start + group * self.width;
        first..self.tokens.end.min(first + self.width)
    }

    /// Splits a step of a group's activations into parts: each is the upper half of what is left of them, in pairs, transposed.
    ///
    /// # Safety
    /// The machine has AVX-512, and nobody else uses this split's words.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn split(&self, split: usize) {
        let (group, step, k) = (split / self.steps, split % self.steps, self.product.k);
        let words = words_of_a_step(self.width);
        // SAFETY: the caller promises these words.
        let out = unsafe { self.parts.slice(split * words, words) };
        let left = k - step * STEP;
        let mut parts = [[_mm512_setzero_si512(); SIDE]; PARTS];
        for (place, token) in self.tokens(group).enumerate() {
            let x = self.product.x[token * k + step * STEP..].as_ptr();
            // SAFETY: so many elements of the token are left, and no others are loaded.
            let mut x = unsafe {
                [
                    quiet(_mm512_maskz_loadu_ps(first(left), x)),
                    quiet(_mm512_maskz_loadu_ps(first(left.saturating_sub(SIDE)), x.wrapping_add(SIDE))),
                ]
            };
            for part in &mut parts {
                part[place] = upper_halves(x);
                x = [rest(x[0]), rest(x[1])];
            }
        }
        for (part, out) in parts.into_iter().zip(out.chunks_exact_mut(SIDE * self.width)) {
            let part = if self.width == 1 { part } else { transposed(part) };
            let row = if self.width == 1 { SIDE } else { self.width };
            for (pairs, out) in part.iter().zip(out.chunks_exact_mut(row)) {
                // SAFETY: there is room for a row, and no more is stored.
                unsafe { _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), first(row), *pairs) };
            }
        }
    }

    /// Multiplies these rows by the tokens of these groups.
    ///
    /// # Safety
    /// `out` has their columns, which nobody else uses, and the groups are split.
    unsafe fn multiply<T: Tiles>(&self, tiles: T, rows: Range<usize>, groups: Range<usize>) {
        // A single group has its rows read to their end before the next.
        let height = if groups.len() == 1 { ROWS } else { rows.len() };
        for first in rows.clone().step_by(height) {
            let some = first..rows.end.min(first + height);
            for step in (0..self.steps).step_by(BLOCK) {
                let steps = step..self.steps.min(step + BLOCK);
                for group in groups.clone().step_by(2) {
                    let pair = group..groups.end.min(group + 2);
                    for row in some.clone().step_by(ROWS) {
                        // SAFETY: the caller promises the columns and the groups.
                        unsafe { self.block(tiles, row..some.end.min(row + ROWS), steps.clone(), pair.clone()) };
                    }
                }
            }
        }
    }

    /// A block: what does not fill a step at the end of the rows is a block of its own.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply).
    unsafe fn block<T: Tiles>(&self, tiles: T, rows: Range<usize>, steps: Range<usize>, groups: Range<usize>) {
        let k = self.product.k;
        let whole = steps.start..steps.end.min(k / STEP);
        let end = whole.end..steps.end;
        // Of one group: a group's weights are in a cache by the second.
        let fetches = self.tokens.len() <= SIDE;
        let compute = |weights: *const bf16, stride: usize, steps: Range<usize>, ahead: *const bf16| {
            let step = groups.start * self.group + steps.start * words_of_a_step(self.width);
            let block = Block {
                weights,
                stride,
                rows: rows.len(),
                x: self.parts.start.wrapping_add(step),
                group: if groups.len() > 1 { self.group } else { 0 },
                width: self.width,
                steps: steps.len(),
                ahead,
            };
            let mut sums = [const { Tile([[0.0; SIDE]; SIDE]) }; 4];
            // SAFETY: so many steps of these rows lie at `weights`, and of these groups in the scratch; the caller promises the
            // columns, and where there are tiles there is AVX-512.
            unsafe {
                tiles.multiply(&block, &mut sums);
                self.add(&sums, rows.clone(), groups.clone(), steps.start == 0);
            }
        };
        if !whole.is_empty() {
            let ahead = self.weight.as_ptr().wrapping_add((rows.start + ROWS) * k + ROWS * whole.start * STEP);
            let weights = self.weight[rows.start * k + whole.start * STEP..].as_ptr();
            compute(weights, k * size_of::<bf16>(), whole, if fetches { ahead } else { ptr::null() });
        }
        if !end.is_empty() {
            let mut ends = [[bf16::ZERO; STEP]; ROWS];
            for (row, padded) in rows.clone().zip(&mut ends) {
                let left = &self.weight[row * k..(row + 1) * k][end.start * STEP..];
                padded[..left.len()].copy_from_slice(left);
            }
            compute(ends.as_ptr().cast(), size_of_val(&ends[0]), end, ptr::null());
        }
    }

    /// Adds a block's sums to the output, or, of its first steps, to the bias.
    ///
    /// # Safety
    /// `out` has these columns for these groups, and nobody else uses them; the machine has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn add(&self, sums: &[Tile; 4], rows: Range<usize>, groups: Range<usize>, is_first: bool) {
        for (upper, row) in rows.clone().step_by(SIDE).enumerate() {
            let count = rows.end.min(row + SIDE) - row;
            let mut bias = [0.0; SIDE];
            if let (true, Some(weight)) = (is_first, self.product.bias) {
                bias.iter_mut().zip(row..row + count).for_each(|(bias, row)| *bias = weight.at(row));
            }
            for (other, group) in groups.clone().enumerate() {
                let Tile(sums) = &sums[2 * upper + other];
                // SAFETY: an array of as many as a vector has.
                let sums = sums.each_ref().map(|row| unsafe { _mm512_loadu_si512(row.as_ptr().cast()) });
                for (token, sums) in self.tokens(group).zip(transposed(sums)) {
                    // SAFETY: the caller promises these columns.
                    let out = unsafe { self.out.slice(token * self.product.stride + row, count) };
                    let before = if is_first { bias.as_ptr() } else { out.as_ptr() };
                    // SAFETY: so many elements are there, and no others are loaded or stored.
                    unsafe {
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(first(count), before), _mm512_castsi512_ps(sums));
                        _mm512_mask_storeu_ps(out.as_mut_ptr(), first(count), sum);
                    }
                }
            }
        }
    }
}
