//! A Q4_K block of each of sixteen rows, with a row in each lane.

use std::arch::x86_64::*;

use super::{
    SIDE,
    split::{DIGITS, Digits, joined},
};

/// Groups of 32 weights, which have a scale and a minimum each.
const GROUPS: usize = 8;

/// Steps of a group: of four weights.
const STEPS: usize = 8;

/// Bytes of a block: two F16, twelve bytes of scales and minimums, codes of four bits.
pub(super) const BYTES: usize = 16 + GROUPS * STEPS * 2;

/// The codes of a group, four columns a step.
type Codes = [__m512i; STEPS];

/// Whole numbers of a token, by digit.
type Sums = [__m512i; DIGITS];

/// What is made of the codes' products.
pub(super) struct Scales {
    /// The scale of a group, above which is nothing.
    scales: [__m512i; GROUPS],
    /// The minimums of two groups.
    minimums: [__m512i; GROUPS / 2],
    /// What scales and minimums are multiplied by.
    factors: [__m512; 2],
}

/// Fetches as many bytes as a tile has into the cache, a quarter of them at a time.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch(ahead: *const u8, quarter: usize) {
    let bytes = SIDE * BYTES / 4;
    for line in (quarter * bytes..(quarter + 1) * bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T2>(ahead.wrapping_add(line).cast());
    }
}

/// Sixteen bytes of each row from `at` on: their first four, their second, and so on.
///
/// # Safety
/// They lie there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn columns(rows: &[*const u8; SIDE], at: usize) -> [__m512i; 4] {
    let mut quarters = [_mm512_setzero_si512(); 4];
    for (first, quarter) in quarters.iter_mut().enumerate() {
        let part = |number: usize| {
            // SAFETY: the caller promises sixteen bytes of this row.
            unsafe { _mm_loadu_si128(rows[4 * number + first].wrapping_add(at).cast()) }
        };
        let two = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(part(0)), part(1));
        *quarter = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(two, part(2)), part(3));
    }
    let [a, b, c, d] = quarters;
    let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
    let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
    [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ]
}

/// The codes of two groups: the lower halves of 32 bytes, and their upper halves.
///
/// # Safety
/// The blocks lie there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn codes(rows: &[*const u8; SIDE], block: usize, pair: usize) -> [Codes; 2] {
    let (low, mut codes) = (_mm512_set1_epi8(15), [[_mm512_setzero_si512(); STEPS]; 2]);
    for part in 0..2 {
        // SAFETY: these bytes are within the blocks.
        let columns = unsafe { columns(rows, block * BYTES + 16 + 32 * pair + 16 * part) };
        for (number, both) in columns.into_iter().enumerate() {
            codes[0][4 * part + number] = _mm512_and_si512(both, low);
            codes[1][4 * part + number] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
        }
    }
    codes
}

/// Adds the products with a group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add_group(sums: &mut Sums, codes: &Codes, scales: __m512i, token: &Digits, group: usize) {
    let mut products = [_mm512_setzero_si512(); DIGITS];
    for (step, codes) in codes.iter().enumerate() {
        for (product, digits) in products.iter_mut().zip(&token.digits) {
            let [a, b, c, d] = digits.as_chunks().0[group * STEPS + step];
            let four = i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]);
            *product = _mm512_dpbusd_epi32(*product, *codes, _mm512_set1_epi32(four));
        }
    }
    for (sum, product) in sums.iter_mut().zip(products) {
        // At most 32 · 15 · 64: the lower half of a lane has all of it, and the upper half is multiplied by nothing.
        *sum = _mm512_dpwssd_epi32(*sum, product, scales);
    }
}

impl Scales {
    /// Those of a block of each row.
    ///
    /// # Safety
    /// The blocks lie there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    pub(super) unsafe fn of(rows: &[*const u8; SIDE], block: usize) -> Self {
        // SAFETY: these bytes are within the blocks.
        let [factors, low, mid, high] = unsafe { columns(rows, block * BYTES) };
        let (six, four, two) = (_mm512_set1_epi8(0x3f), _mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x30));
        let upper = |of: __m512i| _mm512_and_si512(_mm512_srli_epi32::<2>(of), two);
        let first = [_mm512_and_si512(low, six), _mm512_and_si512(mid, six)];
        let others = [
            _mm512_or_si512(_mm512_and_si512(high, four), upper(low)),
            _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32::<4>(high), four), upper(mid)),
        ];
        let (mut scales, mut minimums) = ([low; GROUPS], [low; GROUPS / 2]);
        for (at, [of_scales, of_minimums]) in [first, others].into_iter().enumerate() {
            let byte = _mm512_set1_epi32(0xff);
            scales[4 * at] = _mm512_and_si512(of_scales, byte);
            scales[4 * at + 1] = _mm512_and_si512(_mm512_srli_epi32::<8>(of_scales), byte);
            scales[4 * at + 2] = _mm512_and_si512(_mm512_srli_epi32::<16>(of_scales), byte);
            scales[4 * at + 3] = _mm512_srli_epi32::<24>(of_scales);
            // Bytes to words.
            let pair = |two: __m512i| {
                let second = _mm512_and_si512(_mm512_slli_epi32::<8>(two), _mm512_set1_epi32(0xff_0000));
                _mm512_or_si512(_mm512_and_si512(two, byte), second)
            };
            minimums[2 * at] = pair(of_minimums);
            minimums[2 * at + 1] = pair(_mm512_srli_epi32::<16>(of_minimums));
        }
        let half = |words: __m512i| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
        Self { scales, minimums, factors: [half(factors), half(_mm512_srli_epi32::<16>(factors))] }
    }

    /// What the rows come to with a token, whose products are these.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn total(&self, sums: Sums, token: &Digits) -> __m512 {
        let mut taken = [_mm512_setzero_si512(); DIGITS];
        for (pair, minimums) in self.minimums.iter().enumerate() {
            for (taken, sums) in taken.iter_mut().zip(&token.sums) {
                let [first, second] = sums.as_chunks().0[pair];
                let two = i32::from(first) & 0xffff | i32::from(second) << 16;
                *taken = _mm512_dpwssd_epi32(*taken, *minimums, _mm512_set1_epi32(two));
            }
        }
        let taken = _mm512_mul_ps(joined(taken), self.factors[1]);
        let all = _mm512_fmsub_ps(joined(sums), self.factors[0], taken);
        _mm512_mul_ps(all, _mm512_set1_ps(token.scale))
    }

    /// The same for few tokens: the codes stay in registers.
    ///
    /// # Safety
    /// The blocks lie there, which these scales are of.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c")]
    pub(super) unsafe fn few<const T: usize>(
        &self,
        rows: &[*const u8; SIDE],
        block: usize,
        tokens: [&Digits; T],
    ) -> [__m512; T] {
        let mut sums = [[_mm512_setzero_si512(); DIGITS]; T];
        for pair in 0..GROUPS / 2 {
            // SAFETY: the caller promises the blocks.
            let codes = unsafe { codes(rows, block, pair) };
            for (sums, token) in sums.iter_mut().zip(tokens) {
                add_group(sums, &codes[0], self.scales[2 * pair], token, 2 * pair);
                add_group(sums, &codes[1], self.scales[2 * pair + 1], token, 2 * pair + 1);
            }
        }
        let mut out = [_mm512_setzero_ps(); T];
        for ((out, sums), token) in out.iter_mut().zip(sums).zip(tokens) {
            *out = self.total(sums, token);
        }
        out
    }
}

/// A block of each row, for many tokens.
pub(super) struct Tile {
    codes: [Codes; GROUPS],
    scales: Scales,
}

impl Tile {
    /// Meanwhile a tile's bytes from `ahead` on are fetched.
    ///
    /// # Safety
    /// The blocks lie there, which the scales are of.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    pub(super) unsafe fn new(rows: &[*const u8; SIDE], block: usize, scales: Scales, ahead: *const u8) -> Self {
        let mut all = [[_mm512_setzero_si512(); STEPS]; GROUPS];
        for (pair, groups) in all.as_chunks_mut().0.iter_mut().enumerate() {
            fetch(ahead, pair);
            // SAFETY: the caller promises the blocks.
            *groups = unsafe { codes(rows, block, pair) };
        }
        Self { codes: all, scales }
    }

    /// What the rows come to with T tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn multiply<const T: usize>(&self, tokens: [&Digits; T]) -> [__m512; T] {
        let mut sums = [[_mm512_setzero_si512(); DIGITS]; T];
        for (group, (codes, scales)) in self.codes.iter().zip(&self.scales.scales).enumerate() {
            for (sums, token) in sums.iter_mut().zip(tokens) {
                add_group(sums, codes, *scales, token, group);
            }
        }
        let mut out = [_mm512_setzero_ps(); T];
        for ((out, sums), token) in out.iter_mut().zip(sums).zip(tokens) {
            *out = self.scales.total(sums, token);
        }
        out
    }
}
