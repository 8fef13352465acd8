//! Blocks of quantised weights → F32, in vectors: to the bits that `dtype/blocks.rs` gives, where the formats are told.

mod large;

use std::hint::black_box;

use super::lanes::{Codes, Lanes};
use crate::dtype::{self, DType, E2M1, IQ4, LARGE, NF4, SMALL, f8e4m3_to_f32, mxfp4_scale};
use large::*;

/// Large blocks that are prepared at a time.
const SOME: usize = 3;

/// Where the weights of a block go: vectors of them, in ascending order.
trait Sink<L> {
    /// The weights from number `at` on.
    fn put(&mut self, weights: L, at: usize);
}

/// They are stored.
struct Store<'a, const N: usize>(&'a mut [f32; N]);

impl<L: Lanes, const N: usize> Sink<L> for Store<'_, N> {
    #[inline(always)]
    fn put(&mut self, weights: L, at: usize) {
        put(weights, self.0, at);
    }
}

/// They are multiplied by these and added up.
struct Dot<'a, L, const N: usize> {
    x: &'a [f32; N],
    sum: L,
}

impl<L: Lanes, const N: usize> Sink<L> for Dot<'_, L, N> {
    #[inline(always)]
    fn put(&mut self, weights: L, at: usize) {
        self.sum = of::<L>(self.x, at).times_plus(weights, self.sum);
    }
}

/// Calls `$each` with the function of a type's blocks and how many weights these have; or `$prepared` with one that prepares large
/// blocks, and the one that follows.
macro_rules! by_type {
    ($dtype:ident, $each:ident, $prepared:ident) => {
        match $dtype {
            DType::Q4_0 => $each!(q4_0, SMALL),
            DType::Q4_1 => $each!(q4_1, SMALL),
            DType::Q5_0 => $each!(q5_0, SMALL),
            DType::Q5_1 => $each!(q5_1, SMALL),
            DType::Q8_0 => $each!(q8_0, SMALL),
            DType::Q2_K => $prepared!(prepare_q2_k, q2_k),
            DType::Q3_K => $prepared!(prepare_q3_k, q3_k),
            DType::Q4_K => $prepared!(prepare_q4_k, q4_k),
            DType::Q5_K => $prepared!(prepare_q5_k, q5_k),
            DType::Q6_K => $prepared!(prepare_q6_k, q6_k),
            DType::IQ4_NL => $each!(iq4_nl, SMALL),
            DType::IQ4_XS => $prepared!(prepare_iq4_xs, iq4_xs),
            DType::MXFP4 => $each!(mxfp4, SMALL),
            DType::F8_64 => $each!(f8, 64),
            DType::U4_32 => $each!(u4_32, 32),
            DType::U4_128 => $each!(u4_128, 128),
            DType::NF4_64 => $each!(nf4, 64),
            _ => unreachable!("{} is no type of blocks", $dtype),
        }
    };
}

/// Expands blocks of this type.
///
/// # Panics
/// If it is no type of blocks, or the lengths disagree.
#[inline(always)]
pub(super) fn expand<L: Lanes>(from: DType, src: &[u8], dst: &mut [f32]) {
    assert!(src.len() == from.bytes(dst.len()) && dst.len().is_multiple_of(from.block_elements()));
    // No closures: they would be compiled without the instructions.
    macro_rules! each {
        ($block:ident, $weights:expr) => {
            for (block, out) in src.as_chunks().0.iter().zip(dst.as_chunks_mut::<{ $weights }>().0) {
                $block::<L>(block, &mut Store(out));
            }
        };
    }
    let mut ready = [const { Ready::NEW }; SOME];
    macro_rules! prepared {
        ($prepare:ident, $block:ident) => {
            for (blocks, out) in src.as_chunks().0.chunks(SOME).zip(dst.as_chunks_mut::<LARGE>().0.chunks_mut(SOME)) {
                for (block, ready) in blocks.iter().zip(&mut ready) {
                    $prepare::<L>(block, ready);
                }
                black_box(&mut ready);
                for ((block, ready), out) in blocks.iter().zip(&ready).zip(out) {
                    for part in 0..LARGE / PART {
                        $block::<L>(block, ready, part, &mut Store(out));
                    }
                }
            }
        };
    }
    by_type!(from, each, prepared);
}

/// Adds to `sums` the lanes of `x` by R rows of blocks of this type: in the order, and to the bits, of products with the weights
/// once they are expanded.
///
/// # Panics
/// If it is no type of blocks, or the lengths disagree.
#[inline(always)]
pub(super) fn dots<L: Lanes, const R: usize>(from: DType, rows: [&[u8]; R], x: &[f32], sums: &mut [L; R]) {
    for row in rows {
        assert!(row.len() == from.bytes(x.len()) && x.len().is_multiple_of(from.block_elements()));
    }
    macro_rules! each {
        ($block:ident, $weights:expr) => {
            for (number, x) in x.as_chunks::<{ $weights }>().0.iter().enumerate() {
                for (row, sum) in rows.iter().zip(&mut *sums) {
                    let mut dot = Dot { x, sum: *sum };
                    $block::<L>(&row.as_chunks().0[number], &mut dot);
                    *sum = dot.sum;
                }
            }
        };
    }
    let mut ready = [const { Ready::NEW }; R];
    macro_rules! prepared {
        ($prepare:ident, $block:ident) => {
            for (number, x) in x.as_chunks::<LARGE>().0.iter().enumerate() {
                for (row, ready) in rows.iter().zip(&mut ready) {
                    $prepare::<L>(&row.as_chunks().0[number], ready);
                }
                black_box(&mut ready);
                // Row by row for each part: a row's products wait for one another.
                for part in 0..LARGE / PART {
                    for ((row, ready), sum) in rows.iter().zip(&ready).zip(&mut *sums) {
                        let mut dot = Dot { x, sum: *sum };
                        $block::<L>(&row.as_chunks().0[number], ready, part, &mut dot);
                        *sum = dot.sum;
                    }
                }
            }
        };
    }
    by_type!(from, each, prepared);
}

/// The bytes from `at` on, one a lane.
#[inline(always)]
fn load<L: Lanes>(block: &[u8], at: usize) -> L::Codes {
    let bytes = &block[at..at + L::COUNT];
    // SAFETY: as many bytes as there are lanes.
    unsafe { L::Codes::load(bytes.as_ptr()) }
}

/// Halves of bytes from `at` on, the lower ones if `shift` is 0, the upper ones if it is 4; above them are any bits.
#[inline(always)]
fn halves<L: Lanes>(block: &[u8], at: usize, shift: usize) -> L::Codes {
    load::<L>(block, at).right(shift as u32)
}

#[inline(always)]
fn put<L: Lanes>(weights: L, out: &mut [f32], at: usize) {
    let out = &mut out[at..at + L::COUNT];
    // SAFETY: there is room for as many as there are lanes.
    unsafe { weights.store(out.as_mut_ptr()) };
}

/// The F16 that begins at this byte, in all lanes.
#[inline(always)]
fn half<L: Lanes>(block: &[u8], at: usize) -> L {
    // Four are loaded: from there on, or, near the end, up to there.
    let (first, number) = if at + 8 <= block.len() { (at, 0) } else { (at - 6, 3) };
    let four = &block[first..first + 8];
    // SAFETY: these are eight bytes.
    unsafe { L::splat_f16(four.as_ptr(), number) }
}

/// What codes of four bits are, before they are multiplied by a scale.
const FROM_ZERO: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
const FROM_MINUS_EIGHT: [f32; 16] =
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// What codes of four bits stand for: these numbers by the scale.
#[inline(always)]
fn scaled<L: Lanes>(numbers: &[f32; 16], scale: L) -> [f32; 16] {
    let mut table = [0.0; 16];
    for at in (0..16).step_by(L::COUNT) {
        put(of::<L>(numbers, at).times(scale), &mut table, at);
    }
    table
}

/// The same, and something added.
#[inline(always)]
fn scaled_from<L: Lanes>(least: L, scale: L) -> [f32; 16] {
    let mut table = [0.0; 16];
    for at in (0..16).step_by(L::COUNT) {
        put(of::<L>(&FROM_ZERO, at).times_plus(scale, least), &mut table, at);
    }
    table
}

#[inline(always)]
fn of<L: Lanes>(numbers: &[f32], at: usize) -> L {
    let numbers = &numbers[at..at + L::COUNT];
    // SAFETY: as many numbers as there are lanes.
    unsafe { L::load(numbers.as_ptr()) }
}

/// Weights from number `first` on by the halves of `half` bytes, at most 64, from `from` on: by the lower ones, then by the upper
/// ones, with a table each. A byte is loaded once for both.
#[inline(always)]
fn by_halves<L: Lanes>(
    block: &[u8],
    from: usize,
    tables: [&[f32; 16]; 2],
    out: &mut impl Sink<L>,
    first: usize,
    half: usize,
) {
    match half / L::COUNT {
        1 => by_vectors_of_halves::<L, 1>(block, from, tables, out, first),
        2 => by_vectors_of_halves::<L, 2>(block, from, tables, out, first),
        4 => by_vectors_of_halves::<L, 4>(block, from, tables, out, first),
        _ => by_vectors_of_halves::<L, 8>(block, from, tables, out, first),
    }
}

/// The same by N vectors of bytes.
#[inline(always)]
fn by_vectors_of_halves<L: Lanes, const N: usize>(
    block: &[u8],
    from: usize,
    tables: [&[f32; 16]; 2],
    out: &mut impl Sink<L>,
    first: usize,
) {
    let mut codes = [load::<L>(block, from); N];
    for (number, codes) in codes.iter_mut().enumerate().skip(1) {
        *codes = load::<L>(block, from + number * L::COUNT);
    }
    for (number, codes) in codes.iter().enumerate() {
        out.put(codes.pick(tables[0]), first + number * L::COUNT);
    }
    for (number, codes) in codes.iter().enumerate() {
        out.put(codes.right(4).pick(tables[1]), first + (N + number) * L::COUNT);
    }
}

#[inline(always)]
fn q4_0<L: Lanes>(block: &[u8; 18], out: &mut impl Sink<L>) {
    let table = scaled::<L>(&FROM_MINUS_EIGHT, half::<L>(block, 0));
    by_halves::<L>(block, 2, [&table; 2], out, 0, 16);
}

#[inline(always)]
fn q4_1<L: Lanes>(block: &[u8; 20], out: &mut impl Sink<L>) {
    let [scale, least] = [half::<L>(block, 0), half::<L>(block, 2)];
    let table = scaled_from::<L>(least, scale);
    by_halves::<L>(block, 4, [&table; 2], out, 0, 16);
}

/// Codes of five bits, of which the fifth are the bits of these four bytes.
#[inline(always)]
fn fives<L: Lanes>(fifths: &[u8], halves: &[u8], at: usize) -> L::Codes {
    let fifths = u32::from_le_bytes([fifths[0], fifths[1], fifths[2], fifths[3]]) >> at;
    self::halves::<L>(halves, at % 16, at / 16 * 4).and(15).or(L::Codes::bits(fifths).left(4))
}

#[inline(always)]
fn q5_0<L: Lanes>(block: &[u8; 22], out: &mut impl Sink<L>) {
    let [scale, sixteen] = [half::<L>(block, 0), L::splat(16.0)];
    for at in (0..SMALL).step_by(L::COUNT) {
        out.put(fives::<L>(&block[2..6], &block[6..], at).number().minus(sixteen).times(scale), at);
    }
}

#[inline(always)]
fn q5_1<L: Lanes>(block: &[u8; 24], out: &mut impl Sink<L>) {
    let [scale, least] = [half::<L>(block, 0), half::<L>(block, 2)];
    for at in (0..SMALL).step_by(L::COUNT) {
        out.put(fives::<L>(&block[4..8], &block[8..], at).number().times_plus(scale, least), at);
    }
}

#[inline(always)]
fn q8_0<L: Lanes>(block: &[u8; 34], out: &mut impl Sink<L>) {
    let scale = half::<L>(block, 0);
    for at in (0..SMALL).step_by(L::COUNT) {
        // SAFETY: as many bytes as there are lanes.
        let codes = unsafe { L::Codes::load_signed(block[2 + at..2 + at + L::COUNT].as_ptr().cast()) };
        out.put(codes.number().times(scale), at);
    }
}

#[inline(always)]
fn iq4_nl<L: Lanes>(block: &[u8; 18], out: &mut impl Sink<L>) {
    let table = scaled::<L>(&IQ4, half::<L>(block, 0));
    by_halves::<L>(block, 2, [&table; 2], out, 0, 16);
}

#[inline(always)]
fn mxfp4<L: Lanes>(block: &[u8; 17], out: &mut impl Sink<L>) {
    let table = scaled::<L>(&E2M1, L::splat(mxfp4_scale(block[0])));
    by_halves::<L>(block, 1, [&table; 2], out, 0, 16);
}

#[inline(always)]
fn f8<L: Lanes>(block: &[u8; 68], out: &mut impl Sink<L>) {
    let (scale, mut weights) = (dtype::word(block, 0), [0.0; 64]);
    // The compiler makes vectors of it.
    for (weight, code) in weights.iter_mut().zip(&block[4..]) {
        *weight = f32::from_bits(f8e4m3_to_f32(*code)) * scale;
    }
    for at in (0..64).step_by(L::COUNT) {
        out.put(of::<L>(&weights, at), at);
    }
}

/// Codes from zero, less a number, by the scale.
#[inline(always)]
fn u4<L: Lanes>(block: &[u8], out: &mut impl Sink<L>) {
    let [scale, zero] = [L::splat(dtype::word(block, 0)), L::splat(dtype::word(block, 4))];
    let mut table = [0.0; 16];
    for at in (0..16).step_by(L::COUNT) {
        put(of::<L>(&FROM_ZERO, at).minus(zero).times(scale), &mut table, at);
    }
    by_halves::<L>(block, 8, [&table; 2], out, 0, block.len() - 8);
}

#[inline(always)]
fn u4_32<L: Lanes>(block: &[u8; 24], out: &mut impl Sink<L>) {
    u4::<L>(block, out);
}

#[inline(always)]
fn u4_128<L: Lanes>(block: &[u8; 72], out: &mut impl Sink<L>) {
    u4::<L>(block, out);
}

#[inline(always)]
fn nf4<L: Lanes>(block: &[u8; 36], out: &mut impl Sink<L>) {
    let table = scaled::<L>(&NF4, L::splat(dtype::word(block, 0)));
    by_halves::<L>(block, 4, [&table; 2], out, 0, 32);
}
