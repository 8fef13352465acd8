//! Sixteen lanes at a time: F32 as the sum of three BF16, and transposing.

use std::arch::x86_64::*;

use super::SIDE;

/// The same, with NaN that its upper half shows too.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn quiet(x: __m512) -> __m512 {
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let bits = _mm512_castps_si512(x);
    _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, is_nan, bits, _mm512_set1_epi32(1 << 22)))
}

/// The BF16 that the upper halves of these F32 are, in their order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn upper_halves([low, high]: [__m512; 2]) -> __m512i {
    const ODD: [u16; 32] = {
        let (mut odd, mut at) = ([0; 32], 0);
        while at < 32 {
            odd[at] = 2 * at as u16 + 1;
            at += 1;
        }
        odd
    };
    // SAFETY: an array of as many as a vector has.
    let odd = unsafe { _mm512_loadu_si512(ODD.as_ptr().cast()) };
    _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high))
}

/// What is left of F32 without their upper halves: exact, since both have the same sign and exponent. Nothing is left of
/// infinity and NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn rest(x: __m512) -> __m512 {
    let is_finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), _mm512_set1_ps(f32::INFINITY));
    let upper = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(!0xffff));
    _mm512_maskz_sub_ps(is_finite, x, _mm512_castsi512_ps(upper))
}

/// Sixteen rows of sixteen, by column: in quarters of a vector, then the quarters.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn transposed(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let (mut pairs, mut quarters, mut columns) = (rows, rows, rows);
    for at in 0..8 {
        let [a, b] = [rows[2 * at], rows[2 * at + 1]];
        pairs[2 * at] = _mm512_unpacklo_epi32(a, b);
        pairs[2 * at + 1] = _mm512_unpackhi_epi32(a, b);
    }
    for at in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| pairs[4 * at + row]);
        quarters[4 * at] = _mm512_unpacklo_epi64(a, c);
        quarters[4 * at + 1] = _mm512_unpackhi_epi64(a, c);
        quarters[4 * at + 2] = _mm512_unpacklo_epi64(b, d);
        quarters[4 * at + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for at in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|rows| quarters[rows + at]);
        let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
        columns[at] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        columns[4 + at] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        columns[8 + at] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        columns[12 + at] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}
