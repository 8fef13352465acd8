//! 256 weights of some rows, with a row in each lane.

use super::{
    BLOCK,
    bytes::{Bytes, Rows},
    formats::Format,
    split::{BASE, DIGITS, Digits},
};
use crate::kernels::cpu::lanes::Lanes;

/// Vectors that have the codes of 256 weights, four columns each.
const COLUMNS: usize = BLOCK / 4;

/// What 256 weights of some rows come to with a token, so far.
#[derive(Clone, Copy)]
pub(super) struct Sums<B: Bytes> {
    /// In whole numbers, by digit.
    pub(super) whole: [B; DIGITS],
    pub(super) float: B::Numbers,
}

impl<B: Bytes> Sums<B> {
    #[inline(always)]
    pub(super) fn none() -> Self {
        Self { whole: [B::splat(0); DIGITS], float: Lanes::splat(0.0) }
    }
}

/// What whole numbers come to whose digits were multiplied and added up.
#[inline(always)]
pub(super) fn joined<B: Bytes>([first, second, third]: [B; DIGITS]) -> B::Numbers {
    let base = <B::Numbers as Lanes>::splat(BASE as f32);
    first.number().times_plus(base, second.number()).times_plus(base, third.number())
}

/// The products of codes with the digits of tokens from the columns of this number on.
#[inline(always)]
fn products<B: Bytes, const T: usize, const N: usize>(
    codes: &[B; N],
    tokens: [&Digits; T],
    first: usize,
) -> [[B; DIGITS]; T] {
    assert!(first <= COLUMNS - N);
    let mut sums = [[B::splat(0); DIGITS]; T];
    for (step, codes) in codes.iter().enumerate() {
        for (sums, token) in sums.iter_mut().zip(tokens) {
            for (sum, digits) in sums.iter_mut().zip(&token.digits) {
                let four = i32::from_le_bytes(digits.as_chunks().0[first + step].map(i8::cast_unsigned));
                *sum = B::products(*codes, four, *sum);
            }
        }
    }
    sums
}

/// Adds the products of codes, N vectors of them at a time, by their scale if they have one.
#[inline(always)]
fn add_some<B: Bytes, const T: usize, const N: usize>(
    codes: &[B],
    scale: Option<B>,
    tokens: [&Digits; T],
    first: usize,
    sums: &mut [Sums<B>; T],
) {
    for (number, codes) in codes.as_chunks::<N>().0.iter().enumerate() {
        let products = products(codes, tokens, first + N * number);
        for (sums, products) in sums.iter_mut().zip(products) {
            for (sum, product) in sums.whole.iter_mut().zip(products) {
                *sum = match scale {
                    Some(scale) => product.pairs(scale, *sum),
                    None => product.widened(*sum),
                };
            }
        }
    }
}

/// Adds the products of codes up to `most`, whose columns begin with the one of this number, by their scale if they have one.
#[inline(always)]
pub(super) fn add<B: Bytes, const T: usize>(
    (codes, most): (&[B], i32),
    scale: Option<B>,
    tokens: [&Digits; T],
    column: usize,
    sums: &mut [Sums<B>; T],
) {
    let (steps, first) = (if scale.is_some() { B::steps(most) } else { B::plain_steps(most) }, column / 4);
    match steps.min(codes.len()) {
        8.. => add_some::<B, T, 8>(codes, scale, tokens, first, sums),
        4.. => add_some::<B, T, 4>(codes, scale, tokens, first, sums),
        2.. => add_some::<B, T, 2>(codes, scale, tokens, first, sums),
        _ => add_some::<B, T, 1>(codes, scale, tokens, first, sums),
    }
}

/// Two of a token's sums that are taken off, for [`Bytes::pairs`].
#[inline(always)]
pub(super) fn two<B: Bytes>(less: &[i16], pair: usize) -> B {
    let [first, second] = less.as_chunks().0[pair];
    B::splat(i32::from(first) & 0xffff | i32::from(second) << 16)
}

/// What `parts` parts of a block come to with few tokens: their codes are used once they are there.
///
/// # Safety
/// The blocks lie there.
#[inline(always)]
pub(super) unsafe fn few<B: Bytes, F: Format, const T: usize>(
    rows: &Rows,
    at: usize,
    parts: usize,
    tokens: [&Digits; T],
) -> [B::Numbers; T] {
    // SAFETY: the caller promises the blocks.
    let scales = unsafe { F::scales::<B>(rows, at, parts) };
    let mut sums = [Sums::<B>::none(); T];
    let mut codes = [B::splat(0); COLUMNS];
    let codes = &mut codes[..F::PART / 4];
    for part in 0..parts {
        // SAFETY: the caller promises the blocks.
        unsafe { F::codes::<B>(rows, at, part, codes) };
        F::add(&scales, part, codes, tokens, &mut sums);
    }
    totals::<B, F, T>(&scales, tokens, sums)
}

#[inline(always)]
fn totals<B: Bytes, F: Format, const T: usize>(
    scales: &F::Scales<B>,
    tokens: [&Digits; T],
    sums: [Sums<B>; T],
) -> [B::Numbers; T] {
    let mut out = [<B::Numbers as Lanes>::splat(0.0); T];
    for ((out, sums), token) in out.iter_mut().zip(sums).zip(tokens) {
        *out = F::total(scales, token, sums).times(Lanes::splat(token.scale));
    }
    out
}

/// Blocks of some rows, for many tokens.
pub(super) struct Tile<B: Bytes, F: Format> {
    codes: [B; COLUMNS],
    parts: usize,
    scales: F::Scales<B>,
}

impl<B: Bytes, F: Format> Tile<B, F> {
    /// Of `parts` parts. Meanwhile as many bytes from `ahead` on are fetched.
    ///
    /// # Safety
    /// The blocks lie there.
    #[inline(always)]
    pub(super) unsafe fn new(rows: &Rows, at: usize, parts: usize, ahead: *const u8) -> Self {
        // SAFETY: the caller promises the blocks.
        let scales = unsafe { F::scales::<B>(rows, at, parts) };
        let mut tile = Self { codes: [B::splat(0); COLUMNS], parts, scales };
        for (part, codes) in tile.codes.chunks_mut(F::PART / 4).enumerate().take(parts) {
            let bytes = F::BYTES * F::PART / BLOCK * B::Numbers::COUNT;
            for line in (part * bytes..(part + 1) * bytes).step_by(64) {
                B::Numbers::fetch(ahead.wrapping_add(line).cast());
            }
            // SAFETY: the caller promises the blocks.
            unsafe { F::codes::<B>(rows, at, part, codes) };
        }
        tile
    }

    /// What the rows come to with T tokens.
    #[inline(always)]
    pub(super) fn multiply<const T: usize>(&self, tokens: [&Digits; T]) -> [B::Numbers; T] {
        let mut sums = [Sums::<B>::none(); T];
        for (part, codes) in self.codes.chunks(F::PART / 4).enumerate().take(self.parts) {
            F::add(&self.scales, part, codes, tokens, &mut sums);
        }
        totals::<B, F, T>(&self.scales, tokens, sums)
    }
}
