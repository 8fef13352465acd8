//! Activations as whole numbers of three digits from -64 to 63.

use std::arch::x86_64::*;

use super::BLOCK;

/// Digits of a number, the first worth the most.
pub(super) const DIGITS: usize = 3;

/// What a digit is worth beside the next.
const BASE: i32 = 128;

/// The greatest whole number: its first digit is 63, with something to spare.
const MOST: f32 = 1_040_000.0;

/// Lesser ones are not made larger: that would not fit into an F32.
const LEAST: f32 = 1e-30;

/// 256 activations of a token.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Digits {
    pub(super) digits: [[i8; BLOCK]; DIGITS],
    /// Their sums over 32 each.
    pub(super) sums: [[i16; BLOCK / 32]; DIGITS],
    /// What the whole numbers are multiplied by; NaN where there is something infinite, or no number.
    pub(super) scale: f32,
}

impl Digits {
    /// As many as there is room for.
    pub(super) fn room(room: &mut [f32]) -> &mut [Self] {
        // SAFETY: they are numbers alone, for which any bits will do.
        unsafe { room.align_to_mut() }.1
    }

    const NONE: Self = Self { digits: [[0; BLOCK]; DIGITS], sums: [[0; BLOCK / 32]; DIGITS], scale: 0.0 };

    /// Makes it of these.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn split(&mut self, x: &[f32; BLOCK]) {
        let mut greatest = _mm512_setzero_si512();
        for x in x.as_chunks::<16>().0 {
            // SAFETY: as many as a vector has.
            let bits = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
            // Without the sign: as whole numbers they are in the same order, with infinity and NaN above all.
            greatest = _mm512_max_epi32(greatest, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
        }
        let greatest = f32::from_bits(_mm512_reduce_max_epi32(greatest) as u32);
        if !greatest.is_finite() {
            *self = Self { scale: f32::NAN, ..Self::NONE };
            return;
        }
        let greatest = if greatest > LEAST { greatest } else { LEAST };
        self.scale = greatest / MOST;
        let factor = _mm512_set1_ps(MOST / greatest);
        for (number, x) in x.as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: as many as a vector has.
            let mut left = _mm512_cvtps_epi32(_mm512_mul_ps(unsafe { _mm512_loadu_ps(x.as_ptr()) }, factor));
            for digits in self.digits.iter_mut().rev() {
                let half = _mm512_set1_epi32(BASE / 2);
                let digit = _mm512_and_si512(_mm512_add_epi32(left, half), _mm512_set1_epi32(BASE - 1));
                let digit = _mm512_sub_epi32(digit, half);
                left = _mm512_srai_epi32::<7>(_mm512_sub_epi32(left, digit));
                // SAFETY: the part has as many bytes as a vector has lanes.
                unsafe {
                    let to = digits.as_chunks_mut::<16>().0[number].as_mut_ptr();
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(digit));
                }
            }
        }
        for (digits, sums) in self.digits.iter().zip(&mut self.sums) {
            for (digits, sum) in digits.as_chunks::<32>().0.iter().zip(sums) {
                // SAFETY: as many bytes as the vector has.
                let digits = unsafe { _mm256_loadu_si256(digits.as_ptr().cast()) };
                // From 64 to 191, so that they are added up as bytes without a sign.
                let eights =
                    _mm256_sad_epu8(_mm256_xor_si256(digits, _mm256_set1_epi8(i8::MIN)), _mm256_setzero_si256());
                let two = _mm_add_epi64(_mm256_castsi256_si128(eights), _mm256_extracti128_si256::<1>(eights));
                let all = _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
                *sum = (all - 32 * 128) as i16;
            }
        }
    }
}

/// What the whole numbers of digits that were multiplied and added up come to.
#[target_feature(enable = "avx512f")]
pub(super) fn joined(sums: [__m512i; DIGITS]) -> __m512 {
    let [first, second, third] = [0, 1, 2].map(|digit| _mm512_cvtepi32_ps(sums[digit]));
    let base = _mm512_set1_ps(BASE as f32);
    _mm512_fmadd_ps(_mm512_fmadd_ps(first, base, second), base, third)
}
