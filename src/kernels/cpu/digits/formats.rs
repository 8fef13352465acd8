//! How blocks of each format are unpacked, and what is made of the codes' products. The layouts are told in `dtype/blocks.rs`.

#![allow(non_camel_case_types, reason = "the formats' own names")]

use super::{
    BLOCK,
    bytes::{Bytes, Rows},
    split::{DIGITS, Digits},
    tile::{Sums, add, joined, two},
};
use crate::{dtype::DType, kernels::cpu::lanes::Lanes};

/// Weights of a small block.
const SMALL: usize = 32;

/// A format of blocks, 256 weights at a time: of one block, or of eight small ones, of which the last of a row may lack some.
pub(super) trait Format {
    /// Bytes of 256 weights.
    const BYTES: usize;
    /// Weights that are unpacked together.
    const PART: usize;
    /// What is made of the codes' products.
    type Scales<B: Bytes>;

    /// Those of `parts` parts.
    ///
    /// # Safety
    /// These weights of each row lie there.
    unsafe fn scales<B: Bytes>(rows: &Rows, at: usize, parts: usize) -> Self::Scales<B>;

    /// The codes of a part, which have no sign, four columns each.
    ///
    /// # Safety
    /// This part of each row lies there.
    unsafe fn codes<B: Bytes>(rows: &Rows, at: usize, part: usize, codes: &mut [B]);

    /// Adds what a part gives.
    fn add<B: Bytes, const T: usize>(
        scales: &Self::Scales<B>,
        part: usize,
        codes: &[B],
        tokens: [&Digits; T],
        sums: &mut [Sums<B>; T],
    );

    /// What all parts come to, but for the token's scale.
    fn total<B: Bytes>(scales: &Self::Scales<B>, token: &Digits, sums: Sums<B>) -> B::Numbers;
}

/// The lower halves of sixteen bytes of each row, then, so many vectors further on, their upper halves.
///
/// # Safety
/// They lie there.
#[inline(always)]
unsafe fn halves<B: Bytes>(rows: &Rows, at: usize, codes: &mut [B], further: usize) {
    // SAFETY: the caller promises them.
    for (number, both) in unsafe { B::columns(rows, at) }.into_iter().enumerate() {
        codes[number] = both.and(0x0f0f_0f0f);
        codes[further + number] = both.right(4).and(0x0f0f_0f0f);
    }
}

/// Eight groups of 32 weights, which have a scale and a minimum of six bits each, as Q4_K and Q5_K have them.
pub(super) struct Groups<B: Bytes> {
    scales: [B; 8],
    minimums: [B; 8],
    /// What scales and minimums are multiplied by.
    factors: [B::Numbers; 2],
}

impl<B: Bytes> Groups<B> {
    /// # Safety
    /// The first sixteen bytes of the blocks lie there.
    #[inline(always)]
    unsafe fn of(rows: &Rows, at: usize) -> Self {
        // SAFETY: the caller promises these.
        let [factors, low, mid, high] = unsafe { B::columns(rows, at) };
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
        let first = [low.and(six), mid.and(six)];
        let others = [high.and(four).or(low.right(2).and(two)), high.right(4).and(four).or(mid.right(2).and(two))];
        let (mut scales, mut minimums) = ([low; 8], [low; 8]);
        for (at, [of_scales, of_minimums]) in [first, others].into_iter().enumerate() {
            for number in 0..4 {
                scales[4 * at + number] = of_scales.scale_of(number as u32);
                minimums[4 * at + number] = of_minimums.twice(number as u32);
            }
        }
        Self { scales, minimums, factors: [factors.half(), factors.right(16).half()] }
    }

    /// Adds what two groups give.
    #[inline(always)]
    fn add<const T: usize>(
        &self,
        pair: usize,
        (codes, most): (&[B], i32),
        tokens: [&Digits; T],
        sums: &mut [Sums<B>; T],
    ) {
        for (number, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
            let group = 2 * pair + number;
            add((codes, most), Some(self.scales[group]), tokens, 32 * group, sums);
        }
    }

    #[inline(always)]
    fn total(&self, token: &Digits, sums: Sums<B>) -> B::Numbers {
        let mut less = [B::splat(0); DIGITS];
        for (group, minimums) in self.minimums.iter().enumerate() {
            for (sum, less) in less.iter_mut().zip(&token.less) {
                *sum = minimums.pairs(two(less, group), *sum);
            }
        }
        joined(sums.whole).times_plus(self.factors[0], joined(less).times(self.factors[1]))
    }
}

/// Blocks of eight groups; the fifth bits of their codes, if they have any, lie in front of the others.
pub(super) struct Grouped<const FIFTHS: bool>;

pub(super) type Q4_K = Grouped<false>;
pub(super) type Q5_K = Grouped<true>;

impl<const FIFTHS: bool> Format for Grouped<FIFTHS> {
    const BYTES: usize = if FIFTHS { DType::Q5_K } else { DType::Q4_K }.bytes(BLOCK);
    const PART: usize = 64;
    type Scales<B: Bytes> = Groups<B>;

    #[inline(always)]
    unsafe fn scales<B: Bytes>(rows: &Rows, at: usize, _: usize) -> Groups<B> {
        // SAFETY: the caller promises the blocks.
        unsafe { Groups::of(rows, at) }
    }

    #[inline(always)]
    unsafe fn codes<B: Bytes>(rows: &Rows, at: usize, part: usize, codes: &mut [B]) {
        for some in 0..2 {
            let (codes, at) = (&mut codes[4 * some..], at + 16 + 16 * some);
            // SAFETY: the caller promises the blocks.
            unsafe { halves(rows, at + if FIFTHS { 32 } else { 0 } + 32 * part, codes, 8) };
            if FIFTHS {
                // SAFETY: the caller promises the blocks.
                for (number, fifths) in unsafe { B::columns(rows, at) }.into_iter().enumerate() {
                    let two = fifths.right(2 * part as u32);
                    codes[number] = codes[number].or(two.and(0x0101_0101).left(4));
                    codes[8 + number] = codes[8 + number].or(two.and(0x0202_0202).left(3));
                }
            }
        }
    }

    #[inline(always)]
    fn add<B: Bytes, const T: usize>(
        scales: &Groups<B>,
        part: usize,
        codes: &[B],
        tokens: [&Digits; T],
        sums: &mut [Sums<B>; T],
    ) {
        scales.add(part, (codes, if FIFTHS { 31 } else { 15 }), tokens, sums);
    }

    #[inline(always)]
    fn total<B: Bytes>(scales: &Groups<B>, token: &Digits, sums: Sums<B>) -> B::Numbers {
        scales.total(token, sums)
    }
}

/// Sixteen groups of 16 weights, whose codes are counted from 32.
pub(super) struct Q6_K;

pub(super) struct Sixteens<B: Bytes> {
    scales: [B; 16],
    /// 32 times the scales, of two groups each.
    minimums: [B; 8],
    factor: B::Numbers,
}

impl Format for Q6_K {
    const BYTES: usize = DType::Q6_K.bytes(BLOCK);
    const PART: usize = 128;
    type Scales<B: Bytes> = Sixteens<B>;

    #[inline(always)]
    unsafe fn scales<B: Bytes>(rows: &Rows, at: usize, _: usize) -> Sixteens<B> {
        // SAFETY: the caller promises the blocks; the last sixteen bytes end with the factor.
        let (four, [.., last]) = unsafe { (B::columns(rows, at + 192), B::columns(rows, at + 194)) };
        let (mut scales, mut minimums) = ([last; 16], [last; 8]);
        for (number, bytes) in four.into_iter().enumerate() {
            for byte in 0..4 {
                scales[4 * number + byte] = bytes.signed(byte as u32).scale();
            }
            for pair in 0..2 {
                let [first, second] = [bytes.signed(2 * pair), bytes.signed(2 * pair + 1)];
                minimums[2 * number + pair as usize] = first.left(5).and(0xffff).or(second.left(16 + 5));
            }
        }
        Sixteens { scales, minimums, factor: last.right(16).half() }
    }

    #[inline(always)]
    unsafe fn codes<B: Bytes>(rows: &Rows, at: usize, part: usize, codes: &mut [B]) {
        for some in 0..2 {
            // SAFETY: the caller promises the blocks.
            let upper = unsafe {
                halves(rows, at + 64 * part + 16 * some, &mut codes[4 * some..], 16);
                halves(rows, at + 64 * part + 32 + 16 * some, &mut codes[8 + 4 * some..], 16);
                B::columns(rows, at + 128 + 32 * part + 16 * some)
            };
            for (number, upper) in upper.into_iter().enumerate() {
                let at = 4 * some + number;
                codes[at] = codes[at].or(upper.left(4).and(0x3030_3030));
                codes[8 + at] = codes[8 + at].or(upper.left(2).and(0x3030_3030));
                codes[16 + at] = codes[16 + at].or(upper.and(0x3030_3030));
                codes[24 + at] = codes[24 + at].or(upper.right(2).and(0x3030_3030));
            }
        }
    }

    #[inline(always)]
    fn add<B: Bytes, const T: usize>(
        scales: &Sixteens<B>,
        part: usize,
        codes: &[B],
        tokens: [&Digits; T],
        sums: &mut [Sums<B>; T],
    ) {
        for (number, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
            let group = 8 * part + number;
            add((codes, 63), Some(scales.scales[group]), tokens, 16 * group, sums);
        }
    }

    #[inline(always)]
    fn total<B: Bytes>(scales: &Sixteens<B>, token: &Digits, mut sums: Sums<B>) -> B::Numbers {
        for (pair, minimums) in scales.minimums.iter().enumerate() {
            for (sum, less) in sums.whole.iter_mut().zip(&token.less) {
                *sum = minimums.pairs(two(less, pair), *sum);
            }
        }
        joined(sums.whole).times(scales.factor)
    }
}

/// Blocks of 32 weights of so many bytes: an F16, by which codes are multiplied; where the codes begin at the fourth byte, another,
/// which is added to them; and the codes up to `MOST`, counted from `ZERO`.
pub(super) struct Small<const BYTES: usize, const CODES: usize, const ZERO: i32, const MOST: i32>;

pub(super) type Q4_0 = Small<18, 2, 8, 15>;
pub(super) type Q4_1 = Small<20, 4, 0, 15>;
pub(super) type Q8_0 = Small<34, 2, 128, 255>;

impl<const BYTES: usize, const CODES: usize, const ZERO: i32, const MOST: i32> Format
    for Small<BYTES, CODES, ZERO, MOST>
{
    const BYTES: usize = BLOCK / SMALL * BYTES;
    const PART: usize = SMALL;
    /// The first four bytes of each block.
    type Scales<B: Bytes> = [B; BLOCK / SMALL];

    #[inline(always)]
    unsafe fn scales<B: Bytes>(rows: &Rows, at: usize, parts: usize) -> Self::Scales<B> {
        let mut scales = [B::splat(0); BLOCK / SMALL];
        for (part, scales) in scales.iter_mut().enumerate().take(parts) {
            // SAFETY: the caller promises so many blocks, which have more than sixteen bytes.
            *scales = unsafe { B::columns(rows, at + part * BYTES) }[0];
        }
        scales
    }

    #[inline(always)]
    unsafe fn codes<B: Bytes>(rows: &Rows, at: usize, part: usize, codes: &mut [B]) {
        let at = at + part * BYTES + CODES;
        if MOST < 16 {
            // SAFETY: the caller promises the blocks, which have sixteen bytes of codes.
            return unsafe { halves(rows, at, codes, 4) };
        }
        for (some, codes) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            // SAFETY: the caller promises the blocks, which have 32 bytes of codes.
            let columns = unsafe { B::columns(rows, at + 16 * some) };
            for (codes, columns) in codes.iter_mut().zip(columns) {
                // With 128 added, that is, without a sign.
                *codes = columns.flip(0x8080_8080);
            }
        }
    }

    #[inline(always)]
    fn add<B: Bytes, const T: usize>(
        scales: &Self::Scales<B>,
        part: usize,
        codes: &[B],
        tokens: [&Digits; T],
        sums: &mut [Sums<B>; T],
    ) {
        let mut small = [Sums::<B>::none(); T];
        if ZERO > 0 {
            for (sums, token) in small.iter_mut().zip(tokens) {
                for (sum, less) in sums.whole.iter_mut().zip(&token.less) {
                    *sum = B::splat(ZERO | ZERO << 16).pairs(two(less, part), *sum);
                }
            }
        }
        add((codes, MOST), None, tokens, SMALL * part, &mut small);
        let scale = scales[part].half();
        for ((sums, small), token) in sums.iter_mut().zip(small).zip(tokens) {
            if CODES == 4 {
                let least = scales[part].right(16).half();
                sums.float = least.times_plus(Lanes::splat(token.sums[part]), sums.float);
            }
            sums.float = joined(small.whole).times_plus(scale, sums.float);
        }
    }

    #[inline(always)]
    fn total<B: Bytes>(_: &Self::Scales<B>, _: &Digits, sums: Sums<B>) -> B::Numbers {
        sums.float
    }
}
