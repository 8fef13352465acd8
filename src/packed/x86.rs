//! Decoding with the vectors of x86-64.
//!
//! A weight's place in the table is a sum of bytes: its first code; where that is 3, one and the second code; where that is 3, one
//! and the third code. So three codes that are 0 to 2, then three, then seven have the places 0 to 2, 4 to 6, 8 to 14, and 15 is an
//! exponent without a code. What remains is to put each further code beneath the escape that it belongs to: `pdep` does that for
//! eight weights at a time, `vpexpandb` for 64.

use std::{arch::x86_64::*, slice};

use super::{
    BLOCK, Escapes, Table,
    decode::{Codes, Planes},
};

/// The place of exponents that have no code.
const PLAIN: i8 = 15;

/// The table by places.
fn places(Table(exponents): Table) -> [u8; 16] {
    let mut places = [0; 16];
    for (rank, exponent) in exponents.into_iter().enumerate() {
        places[rank + usize::from(rank >= 3) + usize::from(rank >= 6)] = exponent;
    }
    places
}

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("popcnt")
}

pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("popcnt")
}

/// A one in each of eight bytes.
const ONES: u64 = 0x0101_0101_0101_0101;

/// Puts exponents that have no code where `unknown` has a bit.
fn fill_in(exponents: &mut [u8], mut unknown: u64, plain: &mut slice::Iter<'_, u8>) -> Option<()> {
    while unknown != 0 {
        exponents[unknown.trailing_zeros() as usize] = *plain.next()?;
        unknown &= unknown - 1;
    }
    Some(())
}

/// As [`plain`](super::decode::Decoding::Plain), 32 weights at a time.
#[target_feature(enable = "avx2,bmi2,popcnt")]
pub(super) fn avx2(table: Table, mut planes: Planes<'_>, out: &mut [u16; BLOCK]) -> Option<Escapes> {
    let places = places(table);
    // SAFETY: 16 bytes lie there.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(places.as_ptr().cast()) });
    let (mut escapes, mut plain) = (Escapes::default(), planes.plain.iter());
    let groups = planes.first.chunks_exact(8).zip(planes.rest.chunks_exact(32)).zip(out.chunks_exact_mut(32));
    for ((codes, rest), out) in groups {
        let codes = u64::from_le_bytes(codes.try_into().expect("eight of them"));
        let mut at = [0u64; 4];
        for (eighth, at) in at.iter_mut().enumerate() {
            let first = _pdep_u64(codes >> (16 * eighth), 3 * ONES);
            let escaped = first & first >> 1 & ONES;
            let second = _pdep_u64(planes.second.window(), 3 * escaped);
            let count = escaped.count_ones() as usize;
            planes.second.bit += 2 * count;
            escapes.first += count;
            *at = first + escaped + second;
            let escaped = second & second >> 1 & ONES;
            if escaped != 0 {
                let third = _pdep_u64(planes.third.window(), 7 * escaped);
                let count = escaped.count_ones() as usize;
                planes.third.bit += 3 * count;
                escapes.second += count;
                *at += escaped + third;
            }
        }
        // SAFETY: 32 bytes lie there.
        let at = unsafe { _mm256_loadu_si256(at.as_ptr().cast()) };
        let mut exponents = _mm256_shuffle_epi8(table, at);
        let unknown = _mm256_movemask_epi8(_mm256_cmpeq_epi8(at, _mm256_set1_epi8(PLAIN))).cast_unsigned();
        if unknown != 0 {
            let mut known = [0u8; 32];
            // SAFETY: 32 bytes lie there.
            unsafe { _mm256_storeu_si256(known.as_mut_ptr().cast(), exponents) };
            fill_in(&mut known, unknown.into(), &mut plain)?;
            // SAFETY: 32 bytes lie there.
            exponents = unsafe { _mm256_loadu_si256(known.as_ptr().cast()) };
        }
        // SAFETY: 32 bytes lie there.
        let rest = unsafe { _mm256_loadu_si256(rest.as_ptr().cast()) };
        let halves = [
            (_mm256_castsi256_si128(exponents), _mm256_castsi256_si128(rest)),
            (_mm256_extracti128_si256(exponents, 1), _mm256_extracti128_si256(rest, 1)),
        ];
        for ((exponents, rest), out) in halves.into_iter().zip(out.chunks_exact_mut(16)) {
            let (exponents, rest) = (_mm256_cvtepu8_epi16(exponents), _mm256_cvtepu8_epi16(rest));
            let sign = _mm256_slli_epi16(_mm256_and_si256(rest, _mm256_set1_epi16(0x80)), 8);
            let mantissa = _mm256_and_si256(rest, _mm256_set1_epi16(0x7f));
            let weights = _mm256_or_si256(_mm256_or_si256(sign, mantissa), _mm256_slli_epi16(exponents, 7));
            // SAFETY: there is room for 16 weights.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), weights) };
        }
    }
    Some(escapes)
}

/// The same, 64 weights at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn avx512(table: Table, mut planes: Planes<'_>, out: &mut [u16; BLOCK]) -> Option<Escapes> {
    let places = places(table);
    // SAFETY: 16 bytes lie there.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(places.as_ptr().cast()) });
    let (mut escapes, mut plain) = (Escapes::default(), planes.plain.iter());
    let (one, three, seven) = (_mm512_set1_epi8(1), _mm512_set1_epi8(3), _mm512_set1_epi8(7));
    let groups = planes.first.chunks_exact(16).zip(planes.rest.chunks_exact(64)).zip(out.chunks_exact_mut(64));
    for ((codes, rest), out) in groups {
        let codes = Codes { bytes: codes, bit: 0 };
        let first = codes.spread::<2>();
        let escaped = _mm512_cmpeq_epi8_mask(first, three);
        let second = _mm512_maskz_expand_epi8(escaped, planes.second.spread::<2>());
        let count = escaped.count_ones() as usize;
        planes.second.bit += 2 * count;
        escapes.first += count;
        let mut at = _mm512_mask_add_epi8(first, escaped, _mm512_add_epi8(first, one), second);
        let mut unknown = 0;
        let escaped = _mm512_cmpeq_epi8_mask(second, three);
        if escaped != 0 {
            let third = _mm512_maskz_expand_epi8(escaped, planes.third.spread::<3>());
            let count = escaped.count_ones() as usize;
            planes.third.bit += 3 * count;
            escapes.second += count;
            at = _mm512_mask_add_epi8(at, escaped, _mm512_add_epi8(at, one), third);
            unknown = _mm512_cmpeq_epi8_mask(third, seven);
        }
        let mut exponents = _mm512_shuffle_epi8(table, at);
        if unknown != 0 {
            let mut known = [0u8; 64];
            // SAFETY: 64 bytes lie there.
            unsafe { _mm512_storeu_si512(known.as_mut_ptr().cast(), exponents) };
            fill_in(&mut known, unknown, &mut plain)?;
            // SAFETY: 64 bytes lie there.
            exponents = unsafe { _mm512_loadu_si512(known.as_ptr().cast()) };
        }
        // SAFETY: 64 bytes lie there.
        let rest = unsafe { _mm512_loadu_si512(rest.as_ptr().cast()) };
        let halves = [
            (_mm512_castsi512_si256(exponents), _mm512_castsi512_si256(rest)),
            (_mm512_extracti64x4_epi64(exponents, 1), _mm512_extracti64x4_epi64(rest, 1)),
        ];
        for ((exponents, rest), out) in halves.into_iter().zip(out.chunks_exact_mut(32)) {
            let (exponents, rest) = (_mm512_cvtepu8_epi16(exponents), _mm512_cvtepu8_epi16(rest));
            let sign = _mm512_slli_epi16(_mm512_and_si512(rest, _mm512_set1_epi16(0x80)), 8);
            let mantissa = _mm512_and_si512(rest, _mm512_set1_epi16(0x7f));
            let weights = _mm512_or_si512(_mm512_or_si512(sign, mantissa), _mm512_slli_epi16(exponents, 7));
            // SAFETY: there is room for 32 weights.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), weights) };
        }
    }
    Some(escapes)
}

impl Codes<'_> {
    /// The next 64 codes of `BITS` bits, two or three, each in a byte; zeros after the end.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn spread<const BITS: i64>(&self) -> __m512i {
        let at = self.bit / 8;
        let bytes = match self.bytes.get(at..at + 32) {
            // SAFETY: 32 bytes lie there.
            Some(bytes) => unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) },
            None => {
                let mut bytes = [0u8; 32];
                let there = self.bytes.get(at..).unwrap_or_default();
                bytes[..there.len().min(32)].copy_from_slice(&there[..there.len().min(32)]);
                // SAFETY: 32 bytes lie there.
                unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
            }
        };
        // The bytes of eight codes, and the one after, in each 64 bits; of these the eight bits from where each code begins.
        let from: [i64; 8] = std::array::from_fn(|group| {
            let first = BITS * group as i64;
            first | ((first + 1) << 8) | ((first + 2) << 16) | ((first + 3) << 24)
        });
        let codes: i64 = (0..8).fold(0, |all, code| all | ((BITS * code) << (8 * code)));
        // SAFETY: 64 bytes lie there.
        let from = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
        let spread = _mm512_permutexvar_epi8(from, _mm512_castsi256_si512(bytes));
        let begin = _mm512_add_epi8(_mm512_set1_epi64(codes), _mm512_set1_epi8((self.bit % 8) as i8));
        _mm512_and_si512(_mm512_multishift_epi64_epi8(begin, spread), _mm512_set1_epi8((1 << BITS) - 1))
    }
}
