//! Products with Q4_K blocks in whole numbers, on machines that multiply bytes (AVX-512 VNNI): several times as many at once as F32,
//! and nothing of what is stored is expanded.
//!
//! An activation is rounded to a whole number of 21 bits, by the greatest of its 256, and has three [digits](split). Digits by codes,
//! and the sums of 32 of these by scales, are whole numbers that fit into what they are computed in: nothing is rounded, so their
//! order does not matter. What a block comes to is added up in F32, block after block. A row of sums is that of a tile of [`SIDE`] rows
//! of the weight, a lane each: an element does not depend on how many tokens or rows there are.

mod split;
mod tile;

use std::{arch::x86_64::*, array, iter, ops::Range};

use super::{Parts, for_parts, for_ranges, product::Product, room::room, x86::first};
use crate::{dtype::DType, error::Result};
use split::Digits;
use tile::{Scales, Tile};

/// Rows of a tile.
const SIDE: usize = 16;

/// Weights of a block.
const BLOCK: usize = 256;

/// Most tokens that are multiplied by a tile at once: their sums stay in registers.
const AT_ONCE: usize = 4;

/// Most tokens with which rows are read to their end before the next.
const SEVERAL: usize = 16;

/// Rows of a piece for more tokens than that, if there are many: the tokens' digits stay in a cache for all of them.
const ROWS: usize = 8 * SIDE;

/// Fewest tokens of such a piece: they make up for what a tile takes to be made.
const LEAST: usize = 32;

/// So many blocks further on a tile's bytes are fetched, for more than few tokens.
const AHEAD: usize = 6;

/// Most tokens whose digits are in the room together, of as many blocks as it then has room for.
const TOKENS: usize = 128;

/// The machine was found to have the instructions: only [`of_this_machine`](Self::of_this_machine) makes it.
#[derive(Clone, Copy)]
pub(super) struct Vnni(());

impl Vnni {
    pub(super) fn of_this_machine() -> Option<Self> {
        super::x86::has_avx512().filter(|_| is_x86_feature_detected!("avx512vnni")).map(|_| Self(()))
    }
}

/// `out = x · weightᵀ + bias`, with `n` rows of the weight, which are not empty.
///
/// # Safety
/// `out` has a row of `stride` elements for each token, and nobody else uses its first `n` columns.
pub(super) unsafe fn multiply(_: Vnni, product: &Product<'_>, weight: &[u8], n: usize, out: Parts) -> Result<()> {
    let Product { x, k, tokens, .. } = *product;
    assert!(k > 0 && k.is_multiple_of(BLOCK) && x.len() == tokens * k && weight.len() == DType::Q4_K.bytes(n * k));
    let mut room = room();
    let room = Digits::room(&mut room.0);
    for first in (0..tokens).step_by(TOKENS) {
        let tokens = first..tokens.min(first + TOKENS);
        let (blocks, at_once) = (k / BLOCK, room.len() / tokens.len());
        for first in (0..blocks).step_by(at_once) {
            let some = first..blocks.min(first + at_once);
            let digits = &mut room[..tokens.len() * some.len()];
            let parts = Parts { start: digits.as_mut_ptr(), len: digits.len() };
            for_ranges(digits.len(), 4 * BLOCK * digits.len(), |numbers| {
                for number in numbers {
                    let (token, block) = (tokens.start + number / some.len(), some.start + number % some.len());
                    let x = x[token * k + block * BLOCK..].first_chunk().expect("the tokens have so many");
                    // SAFETY: each is given to one thread only, and the room is this call's; the machine has AVX-512.
                    unsafe { parts.slice(number, 1)[0].split(x) };
                }
            })?;
            Share { product, weight, out, digits, tokens: tokens.clone(), blocks: some }.deal(n)?;
        }
    }
    Ok(())
}

/// Rows of the weight, of `n`, and tokens that a thread multiplies at a time.
fn piece(n: usize, tokens: usize, threads: usize) -> [usize; 2] {
    if tokens <= SEVERAL {
        // Long stretches: what is fetched ahead of a piece's end is lost.
        return [n.div_ceil(8 * threads).next_multiple_of(SIDE).max(2 * SIDE), tokens];
    }
    let few = n.div_ceil(ROWS) * tokens.div_ceil(LEAST) < 4 * threads;
    let high = if few { 2 * SIDE } else { ROWS };
    let across = (8 * threads).div_ceil(n.div_ceil(high).max(1));
    [high, tokens.div_ceil(across).next_multiple_of(AT_ONCE).max(LEAST)]
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
    fn deal(&self, n: usize) -> Result<()> {
        let (count, work) = (self.tokens.len(), self.tokens.len() * n * self.blocks.len() * BLOCK);
        // SAFETY: `multiply` was given a `Vnni` and its caller has promised the output, of which each piece is one thread's only.
        let part = |rows: Range<usize>, some: Range<usize>| unsafe { self.part(rows, some) };
        for_parts(n, self.tokens.clone(), work, |threads| piece(n, count, threads), part)
    }

    /// What these rows give of these tokens.
    ///
    /// # Safety
    /// The machine has the instructions, and nobody else uses that part of the output.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    unsafe fn part(&self, rows: Range<usize>, tokens: Range<usize>) {
        // SAFETY: the caller promises these.
        unsafe {
            match tokens.len() {
                1 => self.few::<1>(rows, tokens.start),
                2 => self.few::<2>(rows, tokens.start),
                _ => self.many(rows, tokens),
            }
        }
    }

    /// The same for so few tokens that weights take as long to arrive: each lane reads on through rows of its own, so that processors fetch ahead by themselves.
    ///
    /// # Safety
    /// As for [`part`](Self::part).
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    unsafe fn few<const T: usize>(&self, rows: Range<usize>, token: usize) {
        let step = rows.len().div_ceil(SIDE);
        for first in rows.start..rows.start + step {
            let (starts, lanes) = self.starts((first..rows.end).step_by(step));
            let places: [_; T] = array::from_fn(|number| (token + number) * self.product.stride + first);
            let mut sums = [[0.0; SIDE]; T];
            for (sums, place) in sums.iter_mut().zip(places) {
                for (lane, sum) in sums[..lanes].iter_mut().enumerate() {
                    // SAFETY: the caller promises this element.
                    let before = || unsafe { self.out.slice(place + lane * step, 1)[0] };
                    let bias = || self.product.bias.map_or(0.0, |bias| bias.at(first + lane * step));
                    *sum = if self.blocks.start == 0 { bias() } else { before() };
                }
            }
            for block in self.blocks.clone() {
                // SAFETY: the weight has these rows, and their blocks.
                let more = unsafe { Scales::of(&starts, block).few(&starts, block, self.digits::<T>(block, token)) };
                for (sums, more) in sums.iter_mut().zip(more) {
                    // SAFETY: they are as many as lanes.
                    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), more)) };
                }
            }
            for (sums, place) in sums.iter().zip(places) {
                for (lane, sum) in sums[..lanes].iter().enumerate() {
                    // SAFETY: the caller promises this element.
                    unsafe { self.out.slice(place + lane * step, 1)[0] = *sum };
                }
            }
        }
    }

    /// The same for more.
    ///
    /// # Safety
    /// As for [`part`](Self::part).
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    unsafe fn many(&self, rows: Range<usize>, tokens: Range<usize>) {
        // All blocks of some rows, or a block of all rows.
        let some = if tokens.len() <= SEVERAL { SIDE } else { rows.len().max(1) };
        for first in rows.clone().step_by(some) {
            for block in self.blocks.clone() {
                for row in (first..rows.end.min(first + some)).step_by(SIDE) {
                    let (starts, lanes) = self.starts(row..rows.end);
                    // What comes later, in the order of addresses: that is what makes processors read ahead themselves.
                    let ahead = starts[0].wrapping_add(SIDE * (block + AHEAD) * tile::BYTES);
                    // SAFETY: the weight has these rows, and their blocks; the rest the caller promises.
                    unsafe {
                        let tile = Tile::new(&starts, block, Scales::of(&starts, block), ahead);
                        self.multiplied(&tile, row..row + lanes, block, tokens.clone());
                    }
                }
            }
        }
    }

    /// Where the first of these rows begin, as many as there are lanes for, and how many they are. Lanes without a row repeat the last.
    fn starts(&self, rows: impl ExactSizeIterator<Item = usize>) -> ([*const u8; SIDE], usize) {
        let (lanes, row_bytes) = (rows.len().min(SIDE), DType::Q4_K.bytes(self.product.k));
        let (mut starts, mut last) = ([self.weight.as_ptr(); SIDE], 0);
        for (start, row) in starts.iter_mut().zip(rows.map(Some).chain(iter::repeat(None))) {
            last = row.unwrap_or(last);
            *start = self.weight[last * row_bytes..(last + 1) * row_bytes].as_ptr();
        }
        (starts, lanes)
    }

    /// What a tile of these rows gives of these tokens.
    ///
    /// # Safety
    /// As for [`part`](Self::part).
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    unsafe fn multiplied(&self, tile: &Tile, rows: Range<usize>, block: usize, tokens: Range<usize>) {
        let mut token = tokens.start;
        while token < tokens.end {
            let some = if tokens.end - token >= AT_ONCE { AT_ONCE } else { 1 };
            // SAFETY: the caller promises these.
            unsafe {
                match some {
                    AT_ONCE => {
                        self.put(tile.multiply(self.digits::<AT_ONCE>(block, token)), rows.clone(), block, token)
                    }
                    _ => self.put(tile.multiply(self.digits::<1>(block, token)), rows.clone(), block, token),
                }
            }
            token += some;
        }
    }

    /// The digits of a block of T tokens.
    #[inline]
    fn digits<const T: usize>(&self, block: usize, token: usize) -> [&Digits; T] {
        let mut digits = [&self.digits[0]; T];
        for (number, digits) in digits.iter_mut().enumerate() {
            let at = (token + number - self.tokens.start) * self.blocks.len() + block - self.blocks.start;
            *digits = &self.digits[at];
        }
        digits
    }

    /// Adds what a block of some rows comes to with some tokens to the output; that of the first to the bias.
    ///
    /// # Safety
    /// As for [`part`](Self::part).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn put<const T: usize>(&self, sums: [__m512; T], rows: Range<usize>, block: usize, token: usize) {
        let (lanes, mut bias) = (first(rows.len()), [0.0; SIDE]);
        if let (0, Some(weight)) = (block, self.product.bias) {
            bias.iter_mut().zip(rows.clone()).for_each(|(bias, row)| *bias = weight.at(row));
        }
        for (number, sums) in sums.into_iter().enumerate() {
            let at = (token + number) * self.product.stride + rows.start;
            // SAFETY: the caller promises this part.
            let out = unsafe { self.out.slice(at, rows.len()) };
            let before = if block == 0 { bias.as_ptr() } else { out.as_ptr() };
            // SAFETY: so many elements are there, and no others are loaded or stored.
            unsafe {
                let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, before), sums);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), lanes, sum);
            }
        }
    }
}
