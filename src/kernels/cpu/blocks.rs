//! Blocks of quantised weights → F32, in vectors: to the bits that `dtype/blocks.rs` gives, where the formats are told.

use std::hint::black_box;

use super::lanes::{Codes, Lanes};
use crate::dtype::{self, DType, E2M1, IQ4, LARGE, NF4, SMALL, f8e4m3_to_f32, mxfp4_scale, scales_and_minimums};

/// Large blocks whose scales are computed at a time.
const SOME: usize = 3;

/// Expands blocks of this type.
///
/// # Panics
/// If it is no type of blocks, or the lengths disagree.
#[inline(always)]
pub(super) fn expand<L: Lanes>(from: DType, src: &[u8], dst: &mut [f32]) {
    assert!(src.len() == from.bytes(dst.len()) && dst.len().is_multiple_of(from.block_elements()));
    // No closures: they would be compiled without the instructions.
    macro_rules! each {
        ($block:ident) => {
            for (block, out) in src.as_chunks().0.iter().zip(dst.as_chunks_mut().0) {
                $block::<L>(block, out);
            }
        };
    }
    // The scales of some blocks come first, so that no weight waits for its scale to be stored and loaded.
    macro_rules! with_scales {
        ($block:ident) => {
            for (blocks, out) in src.as_chunks().0.chunks(SOME).zip(dst.as_chunks_mut().0.chunks_mut(SOME)) {
                let mut scales = [const { Sixteen([0.0; 16]) }; SOME];
                for (block, scales) in blocks.iter().zip(&mut scales) {
                    scales_of_eight::<L>(block, scales);
                }
                black_box(&mut scales);
                for ((block, scales), out) in blocks.iter().zip(&scales).zip(out) {
                    $block::<L>(block, &scales.0, out);
                }
            }
        };
    }
    match from {
        DType::Q4_0 => each!(q4_0),
        DType::Q4_1 => each!(q4_1),
        DType::Q5_0 => each!(q5_0),
        DType::Q5_1 => each!(q5_1),
        DType::Q8_0 => each!(q8_0),
        DType::Q2_K => each!(q2_k),
        DType::Q3_K => each!(q3_k),
        DType::Q4_K => with_scales!(q4_k),
        DType::Q5_K => with_scales!(q5_k),
        DType::Q6_K => each!(q6_k),
        DType::IQ4_NL => each!(iq4_nl),
        DType::IQ4_XS => each!(iq4_xs),
        DType::MXFP4 => each!(mxfp4),
        DType::F8_64 => each!(f8),
        DType::U4_32 => each!(u4_32),
        DType::U4_128 => each!(u4_128),
        DType::NF4_64 => each!(nf4),
        _ => unreachable!("{from} is no type of blocks"),
    }
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
    L::splat(dtype::half(block, at))
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
fn of<L: Lanes>(numbers: &[f32; 16], at: usize) -> L {
    let numbers = &numbers[at..at + L::COUNT];
    // SAFETY: as many numbers as there are lanes.
    unsafe { L::load(numbers.as_ptr()) }
}

/// Weights by the halves of some bytes from `from` on: the lower ones to the start of `out`, the upper ones to `upper`, by a table
/// each. A byte is loaded once for both.
#[inline(always)]
fn by_halves<L: Lanes>(block: &[u8], from: usize, tables: [&[f32; 16]; 2], out: &mut [f32], upper: usize) {
    for at in (0..upper).step_by(L::COUNT) {
        let codes = load::<L>(block, from + at);
        put(codes.pick(tables[0]), out, at);
        put(codes.right(4).pick(tables[1]), out, upper + at);
    }
}

#[inline(always)]
fn q4_0<L: Lanes>(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let table = scaled::<L>(&FROM_MINUS_EIGHT, half::<L>(block, 0));
    by_halves::<L>(block, 2, [&table; 2], out, 16);
}

#[inline(always)]
fn q4_1<L: Lanes>(block: &[u8; 20], out: &mut [f32; SMALL]) {
    let [scale, least] = [half::<L>(block, 0), half::<L>(block, 2)];
    let table = scaled_from::<L>(least, scale);
    by_halves::<L>(block, 4, [&table; 2], out, 16);
}

/// Codes of five bits, of which the fifth are the bits of these four bytes.
#[inline(always)]
fn fives<L: Lanes>(fifths: &[u8], halves: &[u8], at: usize) -> L::Codes {
    let fifths = u32::from_le_bytes([fifths[0], fifths[1], fifths[2], fifths[3]]) >> at;
    self::halves::<L>(halves, at % 16, at / 16 * 4).and(15).or(L::Codes::bits(fifths).left(4))
}

#[inline(always)]
fn q5_0<L: Lanes>(block: &[u8; 22], out: &mut [f32; SMALL]) {
    let [scale, sixteen] = [half::<L>(block, 0), L::splat(16.0)];
    for at in (0..SMALL).step_by(L::COUNT) {
        put(fives::<L>(&block[2..6], &block[6..], at).number().minus(sixteen).times(scale), out, at);
    }
}

#[inline(always)]
fn q5_1<L: Lanes>(block: &[u8; 24], out: &mut [f32; SMALL]) {
    let [scale, least] = [half::<L>(block, 0), half::<L>(block, 2)];
    for at in (0..SMALL).step_by(L::COUNT) {
        put(fives::<L>(&block[4..8], &block[8..], at).number().times_plus(scale, least), out, at);
    }
}

#[inline(always)]
fn q8_0<L: Lanes>(block: &[u8; 34], out: &mut [f32; SMALL]) {
    let scale = half::<L>(block, 0);
    for at in (0..SMALL).step_by(L::COUNT) {
        put(load::<L>(block, 2 + at).signed().number().times(scale), out, at);
    }
}

#[inline(always)]
fn iq4_nl<L: Lanes>(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let table = scaled::<L>(&IQ4, half::<L>(block, 0));
    by_halves::<L>(block, 2, [&table; 2], out, 16);
}

#[inline(always)]
fn mxfp4<L: Lanes>(block: &[u8; 17], out: &mut [f32; SMALL]) {
    let table = scaled::<L>(&E2M1, L::splat(mxfp4_scale(block[0])));
    by_halves::<L>(block, 1, [&table; 2], out, 16);
}

// The compiler makes vectors of it.
#[inline(always)]
fn f8<L: Lanes>(block: &[u8; 68], out: &mut [f32; 64]) {
    let scale = dtype::word(block, 0);
    for (out, code) in out.iter_mut().zip(&block[4..]) {
        *out = f32::from_bits(f8e4m3_to_f32(*code)) * scale;
    }
}

/// Codes from zero, less a number, by the scale.
#[inline(always)]
fn u4<L: Lanes>(block: &[u8], out: &mut [f32]) {
    let [scale, zero] = [L::splat(dtype::word(block, 0)), L::splat(dtype::word(block, 4))];
    let mut table = [0.0; 16];
    for at in (0..16).step_by(L::COUNT) {
        put(of::<L>(&FROM_ZERO, at).minus(zero).times(scale), &mut table, at);
    }
    let half = out.len() / 2;
    by_halves::<L>(block, 8, [&table; 2], out, half);
}

#[inline(always)]
fn u4_32<L: Lanes>(block: &[u8; 24], out: &mut [f32; 32]) {
    u4::<L>(block, out);
}

#[inline(always)]
fn u4_128<L: Lanes>(block: &[u8; 72], out: &mut [f32; 128]) {
    u4::<L>(block, out);
}

#[inline(always)]
fn nf4<L: Lanes>(block: &[u8; 36], out: &mut [f32; 64]) {
    let table = scaled::<L>(&NF4, L::splat(dtype::word(block, 0)));
    by_halves::<L>(block, 4, [&table; 2], out, 32);
}

/// Sixteen numbers in a line of the cache: across two, what was stored at once would not be there for loads for many cycles.
#[repr(align(64))]
struct Sixteen([f32; 16]);

/// The scales of eight groups of 32 weights each, then what is added to their weights. They go through memory: a load spreads one
/// over all lanes by itself, where from a register that takes a shuffle, and shuffles are what limits the expansion.
#[inline(always)]
fn scales_of_eight<L: Lanes>(block: &[u8], scales: &mut Sixteen) {
    let (codes, mut factors) = (scales_and_minimums(block, 4), [dtype::half(block, 0); 16]);
    factors[8..].fill(-dtype::half(block, 2));
    for at in (0..16).step_by(L::COUNT) {
        put(load::<L>(&codes, at).number().times(of::<L>(&factors, at)), &mut scales.0, at);
    }
}

#[inline(always)]
fn q4_k<L: Lanes>(block: &[u8; 144], scales: &[f32; 16], out: &mut [f32; LARGE]) {
    for pair in 0..4 {
        let low = scaled_from::<L>(L::splat(scales[8 + 2 * pair]), L::splat(scales[2 * pair]));
        let high = scaled_from::<L>(L::splat(scales[9 + 2 * pair]), L::splat(scales[1 + 2 * pair]));
        by_halves::<L>(block, 16 + pair * 32, [&low, &high], &mut out[pair * 64..], 32);
    }
}

#[inline(always)]
fn q5_k<L: Lanes>(block: &[u8; 176], scales: &[f32; 16], out: &mut [f32; LARGE]) {
    for group in 0..8 {
        let [scale, least] = [L::splat(scales[group]), L::splat(scales[8 + group])];
        for at in (0..32).step_by(L::COUNT) {
            let fifths = load::<L>(block, 16 + at).right(group as u32).and(1).left(4);
            let codes = halves::<L>(block, 48 + group / 2 * 32 + at, group % 2 * 4).and(15).or(fifths);
            put(codes.number().times_plus(scale, least), out, group * 32 + at);
        }
    }
}

#[inline(always)]
fn q2_k<L: Lanes>(block: &[u8; 84], out: &mut [f32; LARGE]) {
    let [scale, minimum] = [half::<L>(block, 80), half::<L>(block, 82)];
    for group in 0..16 {
        let [of_scale, of_minimum] = [f32::from(block[group] & 15), f32::from(block[group] >> 4)];
        let [scale, minimum] = [L::splat(of_scale).times(scale), L::splat(of_minimum).times(minimum)];
        for at in (0..16).step_by(L::COUNT) {
            let codes =
                load::<L>(block, 16 + group / 8 * 32 + group % 2 * 16 + at).right((group % 8 / 2 * 2) as u32).and(3);
            put(codes.number().times(scale).minus(minimum), out, group * 16 + at);
        }
    }
}

#[inline(always)]
fn q3_k<L: Lanes>(block: &[u8; 110], out: &mut [f32; LARGE]) {
    let [scale, four] = [half::<L>(block, 108), L::splat(4.0)];
    for group in 0..16 {
        let [low, high] =
            [block[96 + group % 8] >> (group / 8 * 4) & 15, block[104 + group % 4] >> (group / 4 * 2) & 3];
        let scale = L::splat(f32::from((low | high << 4) as i8 - 32)).times(scale);
        for at in (0..16).step_by(L::COUNT) {
            let at_32 = group % 2 * 16 + at;
            let thirds = load::<L>(block, at_32).right((group / 2) as u32).and(1).left(2);
            let codes =
                load::<L>(block, 32 + group / 8 * 32 + at_32).right((group % 8 / 2 * 2) as u32).and(3).or(thirds);
            put(codes.number().minus(four).times(scale), out, group * 16 + at);
        }
    }
}

#[inline(always)]
fn q6_k<L: Lanes>(block: &[u8; 210], out: &mut [f32; LARGE]) {
    let [scale, thirty_two] = [half::<L>(block, 208), L::splat(32.0)];
    for group in 0..16 {
        let scale = L::splat(f32::from(block[192 + group] as i8)).times(scale);
        for at in (0..16).step_by(L::COUNT) {
            let at = group * 16 + at;
            let upper =
                load::<L>(block, 128 + at / 128 * 32 + at % 32).right((at % 128 / 32 * 2) as u32).and(3).left(4);
            let codes = halves::<L>(block, at / 128 * 64 + at % 64, at % 128 / 64 * 4).and(15).or(upper);
            put(codes.number().minus(thirty_two).times(scale), out, at);
        }
    }
}

#[inline(always)]
fn iq4_xs<L: Lanes>(block: &[u8; 136], out: &mut [f32; LARGE]) {
    let (scale, upper) = (half::<L>(block, 0), u16::from_le_bytes([block[2], block[3]]));
    for group in 0..8 {
        let [low, high] = [block[4 + group / 2] >> (group % 2 * 4) & 15, (upper >> (group * 2) & 3) as u8];
        let scale = L::splat(f32::from((low | high << 4) as i8 - 32)).times(scale);
        let table = scaled::<L>(&IQ4, scale);
        by_halves::<L>(block, 8 + group * 16, [&table; 2], &mut out[group * 32..], 16);
    }
}
