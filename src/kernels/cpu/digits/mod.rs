//! Products with blocks of quantised weights in whole numbers, by instructions that multiply bytes (AVX2, AVX-512 VNNI): several
//! times as many at once as F32, and nothing of what is stored is expanded.
//!
//! An activation is rounded to a whole number of 21 bits, by the greatest of its 256, and has three [digits](split). Digits by codes,
//! and the sums of these by scales that are whole numbers, fit into what they are computed in: nothing is rounded there, so their
//! order does not matter. What remains is computed in F32, block after block, a row of the weight in each lane: an element
//! depends neither on how many tokens or rows there are, nor on the instructions.

mod bytes;
mod formats;
mod split;
mod tile;

use std::{array, iter, marker::PhantomData, ops::Range};

use super::{
    Parts, for_parts, for_ranges,
    lanes::{Lanes, MOST},
    product::Product,
    room::room,
};
use crate::{dtype::DType, error::Result};
pub(super) use bytes::Instructions;
use bytes::{Bytes, Rows, Work};
use formats::{Format, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0};
use split::Digits;
use tile::{Tile, few};

/// Weights, and activations, that are multiplied at a time.
const BLOCK: usize = 256;

/// Most tokens that are multiplied by a tile at once: their sums stay in registers.
const AT_ONCE: usize = 4;

/// Most tokens with which rows are read to their end before the next.
const SEVERAL: usize = 16;

/// Rows of a piece for more tokens than that, if there are many: the tokens' digits stay in a cache for all of them.
const ROWS: usize = 8 * MOST;

/// Fewest tokens of such a piece: they make up for what a tile takes to be made.
const LEAST: usize = 32;

/// So many blocks further on a tile's bytes are fetched, for more than few tokens.
const AHEAD: usize = 6;

/// Most tokens whose digits are in the room together, of as many blocks as it then has room for.
const TOKENS: usize = 128;

/// Whether there are products in whole numbers with this format.
pub(super) fn take(dtype: DType) -> bool {
    matches!(dtype, DType::Q4_0 | DType::Q4_1 | DType::Q8_0 | DType::Q4_K | DType::Q5_K | DType::Q6_K)
}

/// `out = x · weightᵀ + bias`, with `n` rows of the weight, which are not empty and of a type that is [taken](take).
///
/// # Safety
/// `out` has a row of `stride` elements for each token, and nobody else uses its first `n` columns.
pub(super) unsafe fn multiply(
    instructions: Instructions,
    product: &Product<'_>,
    (dtype, weight): (DType, &[u8]),
    n: usize,
    out: Parts,
) -> Result<()> {
    let Product { x, k, tokens, .. } = *product;
    assert!(k > 0 && k.is_multiple_of(dtype.block_elements()));
    assert!(x.len() == tokens * k && weight.len() == dtype.bytes(n * k));
    let mut room = room();
    let room = Digits::room(&mut room.0);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..tokens.min(first + TOKENS);
        let (blocks, at_once) = (k.div_ceil(BLOCK), room.len() / tokens.len());
        for first in (0..blocks).step_by(at_once) {
            let some = first..blocks.min(first + at_once);
            let digits = &mut room[..tokens.len() * some.len()];
            let parts = Parts { start: digits.as_mut_ptr(), len: digits.len() };
            for_ranges(digits.len(), 4 * BLOCK * digits.len(), |numbers| {
                // SAFETY: each is given to one thread only, and the room is this call's.
                let digits = unsafe { parts.slice(numbers.start, numbers.len()) };
                instructions.run(Split { x, k, tokens: tokens.start, blocks: some.clone(), numbers, digits });
            })?;
            let share = Share { product, weight, out, digits, tokens: tokens.clone(), blocks: some };
            // SAFETY: the caller promises the output.
            unsafe { share.deal(instructions, dtype, n)? };
        }
    }
    Ok(())
}

/// Rows of the weight, of `n`, and tokens that a thread multiplies at a time.
fn piece(n: usize, tokens: usize, threads: usize) -> [usize; 2] {
    if tokens <= SEVERAL {
        // Long stretches: what is fetched ahead of a piece's end is lost.
        return [n.div_ceil(8 * threads).next_multiple_of(MOST).max(2 * MOST), tokens];
    }
    let few = n.div_ceil(ROWS) * tokens.div_ceil(LEAST) < 4 * threads;
    let high = if few { 2 * MOST } else { ROWS };
    let across = (8 * threads).div_ceil(n.div_ceil(high).max(1));
    [high, tokens.div_ceil(across).next_multiple_of(AT_ONCE).max(LEAST)]
}

/// Some tokens' activations, of some blocks, to digits.
struct Split<'a> {
    x: &'a [f32],
    k: usize,
    /// The first token.
    tokens: usize,
    blocks: Range<usize>,
    /// By token, then by block.
    numbers: Range<usize>,
    digits: &'a mut [Digits],
}

impl Work for Split<'_> {
    #[inline(always)]
    fn run<B: Bytes>(self) {
        for (number, digits) in self.numbers.zip(self.digits) {
            let (token, block) =
                (self.tokens + number / self.blocks.len(), self.blocks.start + number % self.blocks.len());
            let of_token = &self.x[token * self.k..][..self.k];
            digits.split(&of_token[block * BLOCK..self.k.min((block + 1) * BLOCK)]);
        }
    }
}

/// A product of some of its tokens and blocks.
struct Share<'a> {
    product: &'a Product<'a>,
    weight: &'a [u8],
    out: Parts,
    /// By token, then by block.
    digits: &'a [Digits],
    tokens: Range<usize>,
    blocks: Range<usize>,
}

impl Share<'_> {
    /// All rows, in parallel if that pays.
    ///
    /// # Safety
    /// As for [`multiply`].
    unsafe fn deal(&self, instructions: Instructions, dtype: DType, n: usize) -> Result<()> {
        let (count, work) = (self.tokens.len(), self.tokens.len() * n * self.blocks.len() * BLOCK);
        // SAFETY: the caller promises the output, and each piece of it is one thread's only.
        let part = |rows: Range<usize>, tokens: Range<usize>| unsafe {
            match dtype {
                DType::Q4_0 => self.part::<Q4_0>(instructions, rows, tokens),
                DType::Q4_1 => self.part::<Q4_1>(instructions, rows, tokens),
                DType::Q8_0 => self.part::<Q8_0>(instructions, rows, tokens),
                DType::Q4_K => self.part::<Q4_K>(instructions, rows, tokens),
                DType::Q5_K => self.part::<Q5_K>(instructions, rows, tokens),
                DType::Q6_K => self.part::<Q6_K>(instructions, rows, tokens),
                _ => unreachable!("{dtype} is not taken"),
            }
        };
        for_parts(n, self.tokens.clone(), work, |threads| piece(n, count, threads), part)
    }

    /// What these rows give of these tokens.
    ///
    /// # Safety
    /// The output is there, and nobody else uses this part of it.
    unsafe fn part<F: Format>(&self, instructions: Instructions, rows: Range<usize>, tokens: Range<usize>) {
        let part = Part { share: self, rows, tokens, format: PhantomData::<F> };
        // Each is compiled by itself, which takes half the time that one function of all of them takes.
        match part.tokens.len() {
            1 => instructions.run(Few::<F, 1>(part)),
            2 => instructions.run(Few::<F, 2>(part)),
            _ => instructions.run(Many(part)),
        }
    }
}

/// What some rows give of some tokens, whose part of the output is this thread's alone: [`Share::part`] alone makes it, whose caller
/// promises that.
struct Part<'a, F> {
    share: &'a Share<'a>,
    rows: Range<usize>,
    tokens: Range<usize>,
    format: PhantomData<F>,
}

/// So many tokens.
struct Few<'a, F, const T: usize>(Part<'a, F>);

/// Any number of them.
struct Many<'a, F>(Part<'a, F>);

impl<F: Format, const T: usize> Work for Few<'_, F, T> {
    #[inline(always)]
    fn run<B: Bytes>(self) {
        self.0.few::<B, T>();
    }
}

impl<F: Format> Work for Many<'_, F> {
    #[inline(always)]
    fn run<B: Bytes>(self) {
        self.0.many::<B>();
    }
}

impl<F: Format> Part<'_, F> {
    /// For so few tokens that weights take as long to arrive: each lane reads on through rows of its own, so that processors fetch
    /// ahead by themselves.
    #[inline(always)]
    fn few<B: Bytes, const T: usize>(&self) {
        let (share, Range { start, end }, token) = (self.share, self.rows.clone(), self.tokens.start);
        let step = self.rows.len().div_ceil(B::Numbers::COUNT);
        for first in start..start + step {
            let (starts, lanes) = self.starts::<B>((first..end).step_by(step));
            let mut sums = [[0.0; MOST]; T];
            for (number, sums) in sums.iter_mut().enumerate() {
                for (lane, sum) in sums[..lanes].iter_mut().enumerate() {
                    let row = first + lane * step;
                    *sum = self.before(token + number, row);
                }
            }
            for block in share.blocks.clone() {
                for start in &starts[..B::Numbers::COUNT] {
                    for line in (0..F::BYTES).step_by(64) {
                        B::Numbers::fetch(start.wrapping_add((block + AHEAD) * F::BYTES + line).cast());
                    }
                }
                // SAFETY: the weight has these rows, and their blocks.
                let more =
                    unsafe { few::<B, F, T>(&starts, block * F::BYTES, self.parts(block), self.digits(block, token)) };
                for (sums, more) in sums.iter_mut().zip(more) {
                    // SAFETY: they are at least as many as lanes.
                    unsafe { <B::Numbers as Lanes>::load(sums.as_ptr()).plus(more).store(sums.as_mut_ptr()) };
                }
            }
            for (number, sums) in sums.iter().enumerate() {
                for (lane, sum) in sums[..lanes].iter().enumerate() {
                    // SAFETY: this element is this thread's, by what the type says.
                    unsafe {
                        share.out.slice((token + number) * share.product.stride + first + lane * step, 1)[0] = *sum
                    };
                }
            }
        }
    }

    /// The same for more.
    #[inline(always)]
    fn many<B: Bytes>(&self) {
        let (rows, side) = (self.rows.clone(), B::Numbers::COUNT);
        // All blocks of some rows, or a block of all rows.
        let some = if self.tokens.len() <= SEVERAL { side } else { rows.len().max(1) };
        for first in rows.clone().step_by(some) {
            for block in self.share.blocks.clone() {
                for row in (first..rows.end.min(first + some)).step_by(side) {
                    let (starts, lanes) = self.starts::<B>(row..rows.end);
                    // What comes later, in the order of addresses: that is what makes processors read ahead themselves.
                    let ahead = starts[0].wrapping_add(side * (block + AHEAD) * F::BYTES);
                    // SAFETY: the weight has these rows, and their blocks.
                    let tile = unsafe { Tile::<B, F>::new(&starts, block * F::BYTES, self.parts(block), ahead) };
                    self.multiplied(&tile, row..row + lanes, block);
                }
            }
        }
    }

    /// What a tile of these rows gives of the tokens.
    #[inline(always)]
    fn multiplied<B: Bytes>(&self, tile: &Tile<B, F>, rows: Range<usize>, block: usize) {
        let Range { start: mut token, end } = self.tokens;
        while token < end {
            if end - token >= AT_ONCE {
                self.put(tile.multiply::<AT_ONCE>(self.digits(block, token)), &rows, block, token);
                token += AT_ONCE;
            } else {
                self.put(tile.multiply::<1>(self.digits(block, token)), &rows, block, token);
                token += 1;
            }
        }
    }

    /// Where the first of these rows begin, as many as there are lanes for, and how many they are. Lanes without a row repeat the last.
    #[inline(always)]
    fn starts<B: Bytes>(&self, rows: impl ExactSizeIterator<Item = usize>) -> (Rows, usize) {
        let (lanes, row_bytes) = (rows.len().min(B::Numbers::COUNT), F::BYTES * self.share.product.k / BLOCK);
        let (mut starts, mut last) = ([self.share.weight.as_ptr(); MOST], 0);
        for (start, row) in starts.iter_mut().zip(rows.map(Some).chain(iter::repeat(None))) {
            last = row.unwrap_or(last);
            *start = self.share.weight[last * row_bytes..(last + 1) * row_bytes].as_ptr();
        }
        (starts, lanes)
    }

    /// How many parts a block has: the last of a row may have fewer.
    #[inline(always)]
    fn parts(&self, block: usize) -> usize {
        (self.share.product.k - block * BLOCK).min(BLOCK) / F::PART
    }

    /// The digits of a block of T tokens.
    #[inline(always)]
    fn digits<const T: usize>(&self, block: usize, token: usize) -> [&Digits; T] {
        let share = self.share;
        array::from_fn(|number| {
            &share.digits[(token + number - share.tokens.start) * share.blocks.len() + block - share.blocks.start]
        })
    }

    /// What blocks of this row are added to: what those before gave, or the bias.
    #[inline(always)]
    fn before(&self, token: usize, row: usize) -> f32 {
        let share = self.share;
        match share.blocks.start {
            0 => share.product.bias.map_or(0.0, |bias| bias.at(row)),
            // SAFETY: this element is this thread's, by what the type says.
            _ => unsafe { share.out.slice(token * share.product.stride + row, 1)[0] },
        }
    }

    /// Adds what a block of some rows comes to with some tokens to the output; that of the first to the bias.
    #[inline(always)]
    fn put<L: Lanes, const T: usize>(&self, sums: [L; T], rows: &Range<usize>, block: usize, token: usize) {
        let (share, mut bias) = (self.share, [0.0; MOST]);
        if let (0, Some(weight)) = (block, share.product.bias) {
            bias.iter_mut().zip(rows.clone()).for_each(|(bias, row)| *bias = weight.at(row));
        }
        for (number, sums) in sums.into_iter().enumerate() {
            let at = (token + number) * share.product.stride + rows.start;
            // SAFETY: this part is this thread's, by what the type says.
            let out = unsafe { share.out.slice(at, rows.len()) };
            let before = if block == 0 { bias.as_ptr() } else { out.as_ptr() };
            // SAFETY: so many elements are there, and no others are loaded or stored.
            unsafe {
                if rows.len() == L::COUNT {
                    L::load(before).plus(sums).store(out.as_mut_ptr());
                } else {
                    L::load_some(before, rows.len()).plus(sums).store_some(out.as_mut_ptr(), rows.len());
                }
            }
        }
    }
}
