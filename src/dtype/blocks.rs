//! Quantised weights in blocks, as GGUF files have them: blocks → F32, to the bit what the Python package `gguf` makes of them.
//!
//! A block has the codes of its weights, of few bits, and what makes numbers of them: a scale, often a minimum too; a block of 256
//! weights has a scale of few bits for each 16 or 32 of them besides. The layouts are those of ggml's `ggml-common.h`; MXFP4's is
//! also in the OCP Microscaling Formats Specification 1.0, with another order of the weights.
//!
//! The library's own types have their scale as F32 in front, and codes of four bits as Q4_0 has them: those of the first half of a
//! block's weights in the lower halves of the bytes. F8_64 has codes of E4M3, NF4_64 those of bitsandbytes, and the U4 types what is
//! taken off each code, F32 too, behind the scale.
//!
//! A scale has 11 significant bits, and what it is multiplied by 13 at most: products are exact in F32, and a weight is rounded at
//! most once, where a minimum is taken off, or by its scale in the library's own types, whose zeros are whole numbers up to 16. So
//! any order of computing gives the same bits.
//!
//! Everything is `inline(always)` and without branches, so that the compiler makes vectors of it, with the instructions of the
//! function that it is inlined into.

use super::{DType, f8e4m3_to_f32, f16_to_f32};

/// Weights of the small blocks, and of the large ones.
pub(crate) const SMALL: usize = 32;
pub(crate) const LARGE: usize = 256;

/// What a code of IQ4_NL and IQ4_XS stands for.
pub(crate) const IQ4: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// Twice what a code of MXFP4 stands for (E2M1).
pub(crate) const E2M1: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// What a code of NF4 stands for: bitsandbytes' numbers (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
#[allow(clippy::excessive_precision, reason = "as they are published")]
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// Expands blocks of this type.
///
/// # Panics
/// If it is no type of blocks, or the lengths disagree.
#[inline(always)]
pub(crate) fn expand(from: DType, src: &[u8], dst: &mut [f32]) {
    assert!(src.len() == from.bytes(dst.len()) && dst.len().is_multiple_of(from.block_elements()));
    match from {
        DType::Q4_0 => each(src, dst, q4_0),
        DType::Q4_1 => each(src, dst, q4_1),
        DType::Q5_0 => each(src, dst, q5_0),
        DType::Q5_1 => each(src, dst, q5_1),
        DType::Q8_0 => each(src, dst, q8_0),
        DType::Q2_K => each(src, dst, q2_k),
        DType::Q3_K => each(src, dst, q3_k),
        DType::Q4_K => each(src, dst, q4_k),
        DType::Q5_K => each(src, dst, q5_k),
        DType::Q6_K => each(src, dst, q6_k),
        DType::IQ4_NL => each(src, dst, iq4_nl),
        DType::IQ4_XS => each(src, dst, iq4_xs),
        DType::MXFP4 => each(src, dst, mxfp4),
        DType::F8_64 => each(src, dst, f8),
        DType::U4_32 => each::<24, 32>(src, dst, u4),
        DType::U4_128 => each::<72, 128>(src, dst, u4),
        DType::NF4_64 => each(src, dst, nf4),
        _ => unreachable!("{from} is no type of blocks"),
    }
}

/// Blocks of B bytes, of N weights each.
#[inline(always)]
fn each<const B: usize, const N: usize>(src: &[u8], dst: &mut [f32], expand: impl Fn(&[u8; B], &mut [f32; N])) {
    for (block, out) in src.as_chunks().0.iter().zip(dst.as_chunks_mut().0) {
        expand(block, out);
    }
}

/// The F16 that begins at this byte.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f32::from_bits(f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]])))
}

/// So many bytes from `at` on.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a block has its parts")
}

/// The weights of the lower halves of some bytes, then those of the upper ones, by their number and code.
#[inline(always)]
fn by_halves(codes: &[u8], out: &mut [f32], weight: impl Fn(usize, u8) -> f32) {
    let (half, (lower, upper)) = (codes.len(), out.split_at_mut(codes.len()));
    for (at, ((code, lower), upper)) in codes.iter().zip(lower).zip(upper).enumerate() {
        *lower = weight(at, code & 15);
        *upper = weight(at + half, code >> 4);
    }
}

/// The F32 that begins at this byte.
#[inline(always)]
pub(crate) fn word(block: &[u8], at: usize) -> f32 {
    f32::from_le_bytes(*part(block, at))
}

#[inline(always)]
fn f8(block: &[u8; 68], out: &mut [f32; 64]) {
    let scale = word(block, 0);
    out.iter_mut().zip(&block[4..]).for_each(|(out, code)| *out = f32::from_bits(f8e4m3_to_f32(*code)) * scale);
}

#[inline(always)]
fn u4<const B: usize, const N: usize>(block: &[u8; B], out: &mut [f32; N]) {
    let [scale, zero] = [word(block, 0), word(block, 4)];
    by_halves(&block[8..], out, |_, code| (f32::from(code) - zero) * scale);
}

#[inline(always)]
fn nf4(block: &[u8; 36], out: &mut [f32; 64]) {
    let scale = word(block, 0);
    by_halves(&block[4..], out, |_, code| NF4[usize::from(code)] * scale);
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let scale = half(block, 0);
    by_halves(&block[2..], out, |_, code| scale * f32::from(code as i8 - 8));
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; SMALL]) {
    let [scale, least] = [half(block, 0), half(block, 2)];
    by_halves(&block[4..], out, |_, code| scale * f32::from(code) + least);
}

/// Bit `at` of these, as the fifth of a code.
#[inline(always)]
fn fifth(bits: u32, at: usize) -> u8 {
    ((bits >> at & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; SMALL]) {
    let (scale, fifths) = (half(block, 0), u32::from_le_bytes(*part(block, 2)));
    by_halves(&block[6..], out, |at, code| scale * f32::from((code | fifth(fifths, at)) as i8 - 16));
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; SMALL]) {
    let ([scale, least], fifths) = ([half(block, 0), half(block, 2)], u32::from_le_bytes(*part(block, 4)));
    by_halves(&block[8..], out, |at, code| scale * f32::from(code | fifth(fifths, at)) + least);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; SMALL]) {
    let scale = half(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(out, code)| *out = scale * f32::from(*code as i8));
}

#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; SMALL]) {
    let scale = half(block, 0);
    by_halves(&block[2..], out, |_, code| scale * IQ4[usize::from(code)]);
}

/// Half of 2^(exponent - 127), since the codes' numbers are doubled. The least two are subnormal.
#[inline(always)]
pub(crate) fn mxfp4_scale(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 })
}

#[inline(always)]
fn mxfp4(block: &[u8; 17], out: &mut [f32; SMALL]) {
    let scale = mxfp4_scale(block[0]);
    by_halves(&block[1..], out, |_, code| scale * E2M1[usize::from(code)]);
}

/// The scales of 32 weights each, then their minimums, of six bits, from twelve bytes.
#[inline(always)]
pub(crate) fn scales_and_minimums(block: &[u8], at: usize) -> [i8; 16] {
    // Four at a time.
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let low = u32::from_le_bytes(*part(block, at));
    let mid = u32::from_le_bytes(*part(block, at + 4));
    let high = u32::from_le_bytes(*part(block, at + 8));
    let mut all = [0; 16];
    // No closures: in the kernels they would be compiled without the instructions.
    for (at, four) in
        [low & six, high & four | low >> 2 & two, mid & six, high >> 4 & four | mid >> 2 & two].into_iter().enumerate()
    {
        for (byte, number) in four.to_le_bytes().into_iter().enumerate() {
            all[4 * at + byte] = number as i8;
        }
    }
    all
}

#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; LARGE]) {
    let ([scale, minimum], of_groups) = ([half(block, 0), half(block, 2)], scales_and_minimums(block, 4));
    let codes: &[u8; 128] = part(block, 16);
    for (at, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [scale, minimum] = [scale * f32::from(of_groups[at]), minimum * f32::from(of_groups[8 + at])];
        let codes: &[u8; 32] = part(codes, at / 2 * 32);
        let shift = at % 2 * 4;
        for (out, code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code >> shift & 15) - minimum;
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; LARGE]) {
    let ([scale, minimum], of_groups) = ([half(block, 0), half(block, 2)], scales_and_minimums(block, 4));
    let (fifths, codes): (&[u8; 32], &[u8; 128]) = (part(block, 16), part(block, 48));
    for (at, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [scale, minimum] = [scale * f32::from(of_groups[at]), minimum * f32::from(of_groups[8 + at])];
        let codes: &[u8; 32] = part(codes, at / 2 * 32);
        let shift = at % 2 * 4;
        for ((out, code), fifth) in out.iter_mut().zip(codes).zip(fifths) {
            *out = scale * f32::from(code >> shift & 15 | (fifth >> at & 1) << 4) - minimum;
        }
    }
}

#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; LARGE]) {
    let (scales, codes): (&[u8; 16], &[u8; 64]) = (part(block, 0), part(block, 16));
    let [scale, minimum] = [half(block, 80), half(block, 82)];
    for (at, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let [scale, minimum] = [scale * f32::from(scales[at] & 15), minimum * f32::from(scales[at] >> 4)];
        let codes: &[u8; 16] = part(codes, at / 8 * 32 + at % 2 * 16);
        let shift = at % 8 / 2 * 2;
        for (out, code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code >> shift & 3) - minimum;
        }
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; LARGE]) {
    let (thirds, codes, scales): (&[u8; 32], &[u8; 64], &[u8; 12]) = (part(block, 0), part(block, 32), part(block, 96));
    let scale = half(block, 108);
    for (at, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let [low, high] = [scales[at % 8] >> (at / 8 * 4) & 15, scales[8 + at % 4] >> (at / 4 * 2) & 3];
        let scale = scale * f32::from((low | high << 4) as i8 - 32);
        let codes: &[u8; 16] = part(codes, at / 8 * 32 + at % 2 * 16);
        let thirds: &[u8; 16] = part(thirds, at % 2 * 16);
        let shift = at % 8 / 2 * 2;
        for ((out, code), third) in out.iter_mut().zip(codes).zip(thirds) {
            let code = code >> shift & 3 | (third >> (at / 2) & 1) << 2;
            *out = scale * f32::from(code as i8 - 4);
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; LARGE]) {
    let (codes, upper, scales): (&[u8; 128], &[u8; 64], &[u8; 16]) =
        (part(block, 0), part(block, 128), part(block, 192));
    let scale = half(block, 208);
    for (at, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = scale * f32::from(scales[at] as i8);
        // Of 128 weights, four times 32: the lower halves of 64 bytes, then the upper ones.
        let (large, quarter, sixteen) = (at / 8, at % 8 / 2, at % 2 * 16);
        let codes: &[u8; 16] = part(codes, large * 64 + quarter % 2 * 32 + sixteen);
        let upper: &[u8; 16] = part(upper, large * 32 + sixteen);
        for ((out, code), upper) in out.iter_mut().zip(codes).zip(upper) {
            let code = code >> (quarter / 2 * 4) & 15 | (upper >> (quarter * 2) & 3) << 4;
            *out = scale * f32::from(code as i8 - 32);
        }
    }
}

#[inline(always)]
fn iq4_xs(block: &[u8; 136], out: &mut [f32; LARGE]) {
    let (scale, upper, lower) = (half(block, 0), u16::from_le_bytes(*part(block, 2)), part::<4>(block, 4));
    for (at, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [low, high] = [lower[at / 2] >> (at % 2 * 4) & 15, (upper >> (at * 2) & 3) as u8];
        let scale = scale * f32::from((low | high << 4) as i8 - 32);
        by_halves(&block[8 + at * 16..][..16], out, |_, code| scale * IQ4[usize::from(code)]);
    }
}
