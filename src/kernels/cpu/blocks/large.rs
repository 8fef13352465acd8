//! Blocks of 256 weights, whose scales are themselves of few bits: they are prepared, some blocks at a time, before they are used.

use super::{Sink, by_halves, half, put, scaled, scaled_from};
use crate::{
    dtype::{IQ4, LARGE, scales_and_minimums},
    kernels::cpu::lanes::{Codes, Lanes},
};

/// Weights of a block that are used at a time.
pub(super) const PART: usize = 64;

/// What a block's weights are made of, where its bytes do not say that by themselves. It goes through memory, and that of some
/// blocks is computed before any of it is used: a load spreads a scale over all lanes by itself, where from a register that takes a
/// shuffle; bytes are put together many at once; and nothing waits for what was just stored.
#[repr(align(64))]
pub(super) struct Ready {
    codes: [i8; LARGE],
    /// Of groups of 16 or 32 weights.
    scales: [f32; 16],
    /// What is added to the weights of these groups.
    added: [f32; 16],
}

impl Ready {
    pub(super) const NEW: Self = Self { codes: [0; LARGE], scales: [0.0; 16], added: [0.0; 16] };
}

/// Numbers by a factor, to some of [`Ready`].
#[inline(always)]
fn scale<L: Lanes>(numbers: &[i8; 16], factor: L, out: &mut [f32; 16]) {
    for at in (0..16).step_by(L::COUNT) {
        put(signed::<L>(numbers, at).number().times(factor), out, at);
    }
}

/// Bytes with a sign from `at` on, one a lane.
#[inline(always)]
fn signed<L: Lanes>(bytes: &[i8], at: usize) -> L::Codes {
    let bytes = &bytes[at..at + L::COUNT];
    // SAFETY: as many bytes as there are lanes.
    unsafe { L::Codes::load_signed(bytes.as_ptr()) }
}

/// So many bytes from `at` on.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("they are there")
}

/// Codes by the scales of groups of 16.
#[inline(always)]
fn by_scales<L: Lanes>(ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    for at in (part * PART..(part + 1) * PART).step_by(L::COUNT) {
        out.put(signed::<L>(&ready.codes, at).number().times(L::splat(ready.scales[at / 16])), at);
    }
}

/// Codes by the scales of groups, and what is added to these. The products are exact.
#[inline(always)]
fn by_scales_and_added<L: Lanes>(ready: &Ready, group: usize, part: usize, out: &mut impl Sink<L>) {
    for at in (part * PART..(part + 1) * PART).step_by(L::COUNT) {
        let weights = signed::<L>(&ready.codes, at)
            .number()
            .times_plus(L::splat(ready.scales[at / group]), L::splat(ready.added[at / group]));
        out.put(weights, at);
    }
}

/// The scales of eight groups, and behind eight others what is added to them.
#[inline(always)]
fn scales_of_eight<L: Lanes>(block: &[u8], ready: &mut Ready) {
    let codes = scales_and_minimums(block, 4);
    scale(&codes, half::<L>(block, 0), &mut ready.scales);
    scale(&codes, half::<L>(block, 2).times(L::splat(-1.0)), &mut ready.added);
}

#[inline(always)]
pub(super) fn prepare_q4_k<L: Lanes>(block: &[u8; 144], ready: &mut Ready) {
    scales_of_eight::<L>(block, ready);
}

#[inline(always)]
pub(super) fn q4_k<L: Lanes>(block: &[u8; 144], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    let Ready { scales, added, .. } = ready;
    let low = scaled_from::<L>(L::splat(added[8 + 2 * part]), L::splat(scales[2 * part]));
    let high = scaled_from::<L>(L::splat(added[9 + 2 * part]), L::splat(scales[1 + 2 * part]));
    by_halves::<L>(block, 16 + part * 32, [&low, &high], out, part * PART, 32);
}

#[inline(always)]
pub(super) fn prepare_q5_k<L: Lanes>(block: &[u8; 176], ready: &mut Ready) {
    scales_of_eight::<L>(block, ready);
    ready.added.copy_within(8.., 0);
    let fifths: &[u8; 32] = bytes(block, 16);
    for pair in 0..4 {
        let (codes, out) = (bytes::<32>(block, 48 + pair * 32), &mut ready.codes[pair * 64..][..64]);
        for at in 0..32 {
            out[at] = (codes[at] & 15 | (fifths[at] >> (2 * pair) & 1) << 4) as i8;
            out[32 + at] = (codes[at] >> 4 | (fifths[at] >> (2 * pair + 1) & 1) << 4) as i8;
        }
    }
}

#[inline(always)]
pub(super) fn q5_k<L: Lanes>(_: &[u8; 176], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    by_scales_and_added::<L>(ready, 32, part, out);
}

#[inline(always)]
pub(super) fn prepare_q2_k<L: Lanes>(block: &[u8; 84], ready: &mut Ready) {
    let (mut scales, mut minimums) = ([0; 16], [0; 16]);
    for (at, both) in bytes::<16>(block, 0).iter().enumerate() {
        scales[at] = (both & 15) as i8;
        minimums[at] = (both >> 4) as i8;
    }
    scale(&scales, half::<L>(block, 80), &mut ready.scales);
    scale(&minimums, half::<L>(block, 82).times(L::splat(-1.0)), &mut ready.added);
    for part in 0..2 {
        let (codes, out) = (bytes::<32>(block, 16 + part * 32), &mut ready.codes[part * 128..][..128]);
        for at in 0..32 {
            for two in 0..4 {
                out[two * 32 + at] = (codes[at] >> (2 * two) & 3) as i8;
            }
        }
    }
}

#[inline(always)]
pub(super) fn q2_k<L: Lanes>(_: &[u8; 84], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    by_scales_and_added::<L>(ready, 16, part, out);
}

#[inline(always)]
pub(super) fn prepare_q3_k<L: Lanes>(block: &[u8; 110], ready: &mut Ready) {
    let mut scales = [0; 16];
    let (low, high) = (bytes::<8>(block, 96), bytes::<4>(block, 104));
    for (at, scale) in scales.iter_mut().enumerate() {
        let (low, high) = (low[at % 8] >> (at / 8 * 4) & 15, high[at % 4] >> (at / 4 * 2) & 3);
        *scale = (low | high << 4) as i8 - 32;
    }
    scale(&scales, half::<L>(block, 108), &mut ready.scales);
    let thirds: &[u8; 32] = bytes(block, 0);
    for part in 0..2 {
        let (codes, out) = (bytes::<32>(block, 32 + part * 32), &mut ready.codes[part * 128..][..128]);
        for at in 0..32 {
            for two in 0..4 {
                let third = thirds[at] >> (4 * part + two) & 1;
                out[two * 32 + at] = (codes[at] >> (2 * two) & 3 | third << 2) as i8 - 4;
            }
        }
    }
}

#[inline(always)]
pub(super) fn q3_k<L: Lanes>(_: &[u8; 110], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    by_scales::<L>(ready, part, out);
}

#[inline(always)]
pub(super) fn prepare_q6_k<L: Lanes>(block: &[u8; 210], ready: &mut Ready) {
    let mut scales = [0; 16];
    for (scale, byte) in scales.iter_mut().zip(bytes::<16>(block, 192)) {
        *scale = *byte as i8;
    }
    scale(&scales, half::<L>(block, 208), &mut ready.scales);
    for part in 0..2 {
        let (low, high) = (bytes::<64>(block, part * 64), bytes::<32>(block, 128 + part * 32));
        let out = &mut ready.codes[part * 128..][..128];
        for at in 0..32 {
            out[at] = (low[at] & 15 | (high[at] & 3) << 4) as i8 - 32;
            out[32 + at] = (low[32 + at] & 15 | (high[at] >> 2 & 3) << 4) as i8 - 32;
            out[64 + at] = (low[at] >> 4 | (high[at] >> 4 & 3) << 4) as i8 - 32;
            out[96 + at] = (low[32 + at] >> 4 | (high[at] >> 6) << 4) as i8 - 32;
        }
    }
}

#[inline(always)]
pub(super) fn q6_k<L: Lanes>(_: &[u8; 210], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    by_scales::<L>(ready, part, out);
}

#[inline(always)]
pub(super) fn prepare_iq4_xs<L: Lanes>(block: &[u8; 136], ready: &mut Ready) {
    let (mut scales, upper) = ([0; 16], u16::from_le_bytes([block[2], block[3]]));
    for group in 0..8 {
        let [low, high] = [block[4 + group / 2] >> (group % 2 * 4) & 15, (upper >> (group * 2) & 3) as u8];
        scales[group] = (low | high << 4) as i8 - 32;
    }
    scale(&scales, half::<L>(block, 0), &mut ready.scales);
}

#[inline(always)]
pub(super) fn iq4_xs<L: Lanes>(block: &[u8; 136], ready: &Ready, part: usize, out: &mut impl Sink<L>) {
    for group in 2 * part..2 * part + 2 {
        let table = scaled::<L>(&IQ4, L::splat(ready.scales[group]));
        by_halves::<L>(block, 8 + group * 16, [&table; 2], out, group * 32, 16);
    }
}
