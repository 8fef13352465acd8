//! The instructions that multiply bytes.
//!
//! **Invariant**: values are made and used only by what [`Instructions::run`] calls, which is the proof that the machine has the
//! instructions.

use std::arch::x86_64::*;

use super::{
    super::{
        lanes::{Codes, MOST},
        x86::{self, Codes256, Codes512, Proven, instructions},
    },
    split::GREATEST,
};

/// Where a row of the weight begins, for each lane.
pub(super) type Rows = [*const u8; MOST];

/// Four bytes in each lane, or what comes of them, of a row of the weight each.
pub(super) trait Bytes: Codes {
    /// Sums of products that a lane holds beside one another until [`widened`](Self::widened) or [`pairs`](Self::pairs) adds them.
    const SUMS: i32;

    fn splat(bits: i32) -> Self;

    /// Of codes up to `most`, so many times four are multiplied before sums have to be scaled: these must fit into 16 bits, with a
    /// sign.
    fn steps(most: i32) -> usize {
        (i16::MAX as i32 / (most * GREATEST * (4 / Self::SUMS))) as usize
    }

    /// The same where sums are only widened.
    fn plain_steps(most: i32) -> usize;

    /// Sixteen bytes of each row from `at` on: their first four, their second, and so on.
    ///
    /// # Safety
    /// They lie there.
    unsafe fn columns(rows: &Rows, at: usize) -> [Self; 4];

    /// These bits changed.
    fn flip(self, bits: u32) -> Self;

    /// The byte of this number, which has a sign.
    fn signed(self, number: u32) -> Self;

    /// The F16 of the lower 16 bits.
    fn half(self) -> Self::Numbers;

    /// Adds to sums the products of codes and four digits.
    fn products(codes: Self, four: i32, sums: Self) -> Self;

    /// Such sums as one number.
    fn widened(self, more: Self) -> Self;

    /// The products of pairs of 16 bits, added up.
    fn pairs(self, by: Self, more: Self) -> Self;

    /// A whole number of 16 bits as what sums are scaled by, in [`pairs`](Self::pairs).
    fn scale(self) -> Self;

    /// The byte of this number, which has no sign, as such a scale.
    fn scale_of(self, number: u32) -> Self;

    /// The byte of this number, which has no sign, as both numbers of a pair.
    fn twice(self, number: u32) -> Self;
}

/// Inner loops for any such instructions.
pub(super) trait Work {
    /// Must be `inline(always)`, and all that it calls; closures would be compiled without the instructions.
    fn run<B: Bytes>(self);
}

/// The machine was found to have AVX-512 with VNNI: only [`Instructions::widest`] makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct HasVnni(());

/// Instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Instructions {
    Avx2(Proven),
    Vnni(HasVnni),
}

impl Instructions {
    /// The widest of this machine.
    pub(in super::super) fn widest() -> Option<Self> {
        let vnni = x86::has_avx512().filter(|_| is_x86_feature_detected!("avx512vnni"));
        vnni.map(|_| Self::Vnni(HasVnni(()))).or_else(|| x86::has_avx2().map(Self::Avx2))
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(in super::super) fn all() -> Vec<Self> {
        let avx2 = x86::has_avx2().map(Self::Avx2);
        avx2.into_iter().chain(Self::widest().filter(|widest| Some(*widest) != avx2)).collect()
    }

    pub(super) fn run(self, work: impl Work) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn by_avx2(work: impl Work) {
            work.run::<Codes256>();
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn by_vnni(work: impl Work) {
            work.run::<Codes512>();
        }
        // SAFETY: the machine has the instructions: each value has the proof of that.
        unsafe {
            match self {
                Self::Avx2(_) => by_avx2(work),
                Self::Vnni(_) => by_vnni(work),
            }
        }
    }
}

/// A transposition: of four vectors, whose lanes of 128 bits each have four numbers.
macro_rules! transposed {
    ($unpacklo32:ident, $unpackhi32:ident, $unpacklo64:ident, $unpackhi64:ident, $four:expr) => {{
        let [a, b, c, d] = $four;
        let [low, other_low] = [$unpacklo32(a, b), $unpacklo32(c, d)];
        let [high, other_high] = [$unpackhi32(a, b), $unpackhi32(c, d)];
        [
            $unpacklo64(low, other_low),
            $unpackhi64(low, other_low),
            $unpacklo64(high, other_high),
            $unpackhi64(high, other_high),
        ]
    }};
}

/// Which byte of four lanes goes where so that the one of this number is both numbers of a pair; upper halves are zero.
#[inline(always)]
fn twice(number: u32) -> __m128i {
    let both = |lane: u32| (0x8000_8000 | ((4 * lane + number) * 0x0001_0001)).cast_signed();
    // SAFETY: all processors with 64 bits have this instruction.
    unsafe { _mm_setr_epi32(both(0), both(1), both(2), both(3)) }
}

impl Bytes for Codes256 {
    /// Of two products each.
    const SUMS: i32 = 2;

    #[inline(always)]
    fn plain_steps(most: i32) -> usize {
        Self::steps(most)
    }

    #[inline(always)]
    unsafe fn columns(rows: &Rows, at: usize) -> [Self; 4] {
        // SAFETY: the machine has the instructions, by the module's invariant; the caller promises sixteen bytes of each row.
        unsafe {
            let mut four = [_mm256_setzero_si256(); 4];
            for (first, part) in four.iter_mut().enumerate() {
                let low = _mm256_castsi128_si256(_mm_loadu_si128(rows[first].wrapping_add(at).cast()));
                let high = _mm_loadu_si128(rows[4 + first].wrapping_add(at).cast());
                *part = _mm256_inserti128_si256::<1>(low, high);
            }
            let [a, b, c, d] = transposed!(
                _mm256_unpacklo_epi32,
                _mm256_unpackhi_epi32,
                _mm256_unpacklo_epi64,
                _mm256_unpackhi_epi64,
                four
            );
            [Self(a), Self(b), Self(c), Self(d)]
        }
    }

    instructions! {
        fn splat(bits: i32) -> Self { Self(_mm256_set1_epi32(bits)) }
        fn flip(self: Self, bits: u32) -> Self { Self(_mm256_xor_si256(self.0, _mm256_set1_epi32(bits as i32))) }
        fn signed(self: Self, number: u32) -> Self {{
            let high = _mm256_sll_epi32(self.0, _mm_cvtsi32_si128(24 - 8 * number as i32));
            Self(_mm256_srai_epi32::<24>(high))
        }}
        fn twice(self: Self, number: u32) -> Self {
            Self(_mm256_shuffle_epi8(self.0, _mm256_broadcastsi128_si256(twice(number))))
        }
        fn half(self: Self) -> Self::Numbers {{
            let low = _mm256_and_si256(self.0, _mm256_set1_epi32(0xffff));
            let packed = _mm256_permute4x64_epi64::<0x08>(_mm256_packus_epi32(low, low));
            x86::Avx2(_mm256_cvtph_ps(_mm256_castsi256_si128(packed)))
        }}
        fn products(codes: Self, four: i32, sums: Self) -> Self {
            Self(_mm256_add_epi16(sums.0, _mm256_maddubs_epi16(codes.0, _mm256_set1_epi32(four))))
        }
        fn widened(self: Self, more: Self) -> Self {
            Self(_mm256_add_epi32(more.0, _mm256_madd_epi16(self.0, _mm256_set1_epi16(1))))
        }
        fn pairs(self: Self, by: Self, more: Self) -> Self {
            Self(_mm256_add_epi32(more.0, _mm256_madd_epi16(self.0, by.0)))
        }
    }

    #[inline(always)]
    fn scale(self) -> Self {
        self.and(0xffff).or(self.left(16))
    }

    #[inline(always)]
    fn scale_of(self, number: u32) -> Self {
        self.twice(number)
    }
}

impl Bytes for Codes512 {
    const SUMS: i32 = 1;

    /// They are wide already.
    #[inline(always)]
    fn plain_steps(_: i32) -> usize {
        usize::MAX
    }

    #[inline(always)]
    unsafe fn columns(rows: &Rows, at: usize) -> [Self; 4] {
        // SAFETY: the machine has the instructions, by the module's invariant; the caller promises sixteen bytes of each row.
        unsafe {
            let mut four = [_mm512_setzero_si512(); 4];
            for (first, part) in four.iter_mut().enumerate() {
                let mut parts = [_mm_setzero_si128(); 4];
                for (number, part) in parts.iter_mut().enumerate() {
                    *part = _mm_loadu_si128(rows[4 * number + first].wrapping_add(at).cast());
                }
                let two = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(parts[0]), parts[1]);
                *part = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(two, parts[2]), parts[3]);
            }
            let [a, b, c, d] = transposed!(
                _mm512_unpacklo_epi32,
                _mm512_unpackhi_epi32,
                _mm512_unpacklo_epi64,
                _mm512_unpackhi_epi64,
                four
            );
            [Self(a), Self(b), Self(c), Self(d)]
        }
    }

    instructions! {
        fn splat(bits: i32) -> Self { Self(_mm512_set1_epi32(bits)) }
        fn flip(self: Self, bits: u32) -> Self { Self(_mm512_xor_si512(self.0, _mm512_set1_epi32(bits as i32))) }
        fn signed(self: Self, number: u32) -> Self {{
            let high = _mm512_sll_epi32(self.0, _mm_cvtsi32_si128(24 - 8 * number as i32));
            Self(_mm512_srai_epi32::<24>(high))
        }}
        fn twice(self: Self, number: u32) -> Self {
            Self(_mm512_shuffle_epi8(self.0, _mm512_broadcast_i32x4(twice(number))))
        }
        fn half(self: Self) -> Self::Numbers { x86::Avx512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(self.0))) }
        fn products(codes: Self, four: i32, sums: Self) -> Self {
            Self(_mm512_dpbusd_epi32(sums.0, codes.0, _mm512_set1_epi32(four)))
        }
        fn widened(self: Self, more: Self) -> Self { Self(_mm512_add_epi32(self.0, more.0)) }
        fn pairs(self: Self, by: Self, more: Self) -> Self { Self(_mm512_dpwssd_epi32(more.0, self.0, by.0)) }
    }

    /// The lower half of a sum has all of it, and the upper half is multiplied by nothing.
    #[inline(always)]
    fn scale(self) -> Self {
        self.and(0xffff)
    }

    #[inline(always)]
    fn scale_of(self, number: u32) -> Self {
        self.right(8 * number).and(0xff)
    }
}
