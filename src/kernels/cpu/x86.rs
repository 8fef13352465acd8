//! The vectors of x86-64.
//!
//! **Invariant**: values of [`Avx2`] and [`Avx512`] are made and used only by what [`run_avx2`], [`run_avx512`] and
//! `digits::Instructions::run` call, which take the proof that the machine has the instructions.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::lanes::{Codes, Lanes, Work};

/// The machine was found to have the instructions: only [`has_avx2`] and [`has_avx512`] make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proven(());

pub(super) fn has_avx2() -> Option<Proven> {
    let there = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    there.then_some(Proven(()))
}

pub(super) fn has_avx512() -> Option<Proven> {
    has_avx2()
        .filter(|_| is_x86_feature_detected!("avx512f"))
        .filter(|_| is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl"))
}

pub(super) fn run_avx2<W: Work>(_: Proven, work: W) -> W::Out {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn run<W: Work>(work: W) -> W::Out {
        work.run::<Avx2>()
    }
    // SAFETY: the machine has the instructions.
    unsafe { run(work) }
}

pub(super) fn run_avx512<W: Work>(_: Proven, work: W) -> W::Out {
    // Without VL the upper sixteen registers would stay unused: their parts could not be added up.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    fn run<W: Work>(work: W) -> W::Out {
        work.run::<Avx512>()
    }
    // SAFETY: the machine has the instructions.
    unsafe { run(work) }
}

/// Methods that are instructions.
macro_rules! instructions {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty { $body:expr })*) => { $(
        #[inline(always)]
        fn $name($($argument: $type),*) -> $out {
            // SAFETY: the machine has the instructions, by the module's invariant.
            unsafe { $body }
        }
    )* };
}

pub(super) use instructions;

/// Methods that load or store.
macro_rules! moves {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty { $body:expr })*) => { $(
        #[inline(always)]
        unsafe fn $name($($argument: $type),*) -> $out {
            // SAFETY: the machine has the instructions, by the module's invariant; the caller promises the elements or the room
            // for them, and these instructions demand no alignment.
            unsafe { $body }
        }
    )* };
}

#[derive(Clone, Copy)]
pub(super) struct Codes256(pub(super) __m256i);

impl Codes for Codes256 {
    type Numbers = Avx2;

    instructions! {
        fn bits(bits: u32) -> Self {{
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            Self(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits as i32), lanes), _mm256_set1_epi32(1)))
        }}
        fn right(self: Self, bits: u32) -> Self { Self(_mm256_srl_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        fn left(self: Self, bits: u32) -> Self { Self(_mm256_sll_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        fn and(self: Self, mask: u32) -> Self { Self(_mm256_and_si256(self.0, _mm256_set1_epi32(mask as i32))) }
        fn or(self: Self, other: Self) -> Self { Self(_mm256_or_si256(self.0, other.0)) }
        fn number(self: Self) -> Avx2 { Avx2(_mm256_cvtepi32_ps(self.0)) }
        fn pick(self: Self, table: &[f32; 16]) -> Avx2 {{
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), self.0);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table[8..].as_ptr()), self.0);
            // By the fourth bit.
            Avx2(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(self.0))))
        }}
    }

    moves! {
        fn load(at: *const u8) -> Self { Self(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))) }
        fn load_signed(at: *const i8) -> Self { Self(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx2(pub(super) __m256);

impl Lanes for Avx2 {
    type Codes = Codes256;

    const COUNT: usize = 8;
    const TOKENS: usize = 2;

    instructions! {
        fn splat(x: f32) -> Self { Self(_mm256_set1_ps(x)) }
        fn plus(self: Self, other: Self) -> Self { Self(_mm256_add_ps(self.0, other.0)) }
        fn minus(self: Self, other: Self) -> Self { Self(_mm256_sub_ps(self.0, other.0)) }
        fn times(self: Self, other: Self) -> Self { Self(_mm256_mul_ps(self.0, other.0)) }
        fn over(self: Self, other: Self) -> Self { Self(_mm256_div_ps(self.0, other.0)) }
        fn times_plus(self: Self, factor: Self, more: Self) -> Self { Self(_mm256_fmadd_ps(self.0, factor.0, more.0)) }
        fn max(self: Self, other: Self) -> Self { Self(_mm256_max_ps(self.0, other.0)) }
        fn min(self: Self, other: Self) -> Self { Self(_mm256_min_ps(self.0, other.0)) }
        fn if_below(self: Self, bound: Self, then: Self, otherwise: Self) -> Self {
            Self(_mm256_blendv_ps(otherwise.0, then.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, bound.0)))
        }
        fn power_of_two(self: Self) -> Self {{
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
            Self(_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1.0)))))
        }}
        fn sum(self: Self) -> f32 {{
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }}
        fn fetch(at: *const i8) -> () { _mm_prefetch::<_MM_HINT_T1>(at) }
    }

    moves! {
        fn load(at: *const f32) -> Self { Self(_mm256_loadu_ps(at)) }
        fn load_f16(at: *const f16) -> Self { Self(_mm256_cvtph_ps(_mm_loadu_si128(at.cast()))) }
        fn load_bf16(at: *const bf16) -> Self {{
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }}
        fn splat_f16(at: *const u8, number: usize) -> Self {{
            let four = _mm256_castps128_ps256(_mm_cvtph_ps(_mm_loadl_epi64(at.cast())));
            Self(_mm256_permutevar8x32_ps(four, _mm256_set1_epi32(number as i32)))
        }}
        fn store(self: Self, at: *mut f32) -> () { _mm256_storeu_ps(at, self.0) }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Codes512(pub(super) __m512i);

impl Codes for Codes512 {
    type Numbers = Avx512;

    instructions! {
        fn bits(bits: u32) -> Self { Self(_mm512_maskz_set1_epi32(bits as __mmask16, 1)) }
        fn right(self: Self, bits: u32) -> Self { Self(_mm512_srl_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        fn left(self: Self, bits: u32) -> Self { Self(_mm512_sll_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        fn and(self: Self, mask: u32) -> Self { Self(_mm512_and_si512(self.0, _mm512_set1_epi32(mask as i32))) }
        fn or(self: Self, other: Self) -> Self { Self(_mm512_or_si512(self.0, other.0)) }
        fn number(self: Self) -> Avx512 { Avx512(_mm512_cvtepi32_ps(self.0)) }
        fn pick(self: Self, table: &[f32; 16]) -> Avx512 {
            Avx512(_mm512_permutexvar_ps(self.0, _mm512_loadu_ps(table.as_ptr())))
        }
    }

    moves! {
        fn load(at: *const u8) -> Self { Self(_mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()))) }
        fn load_signed(at: *const i8) -> Self { Self(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx512(pub(super) __m512);

impl Lanes for Avx512 {
    type Codes = Codes512;

    const COUNT: usize = 16;
    const TOKENS: usize = 6;

    instructions! {
        fn splat(x: f32) -> Self { Self(_mm512_set1_ps(x)) }
        fn plus(self: Self, other: Self) -> Self { Self(_mm512_add_ps(self.0, other.0)) }
        fn minus(self: Self, other: Self) -> Self { Self(_mm512_sub_ps(self.0, other.0)) }
        fn times(self: Self, other: Self) -> Self { Self(_mm512_mul_ps(self.0, other.0)) }
        fn over(self: Self, other: Self) -> Self { Self(_mm512_div_ps(self.0, other.0)) }
        fn times_plus(self: Self, factor: Self, more: Self) -> Self { Self(_mm512_fmadd_ps(self.0, factor.0, more.0)) }
        fn max(self: Self, other: Self) -> Self { Self(_mm512_max_ps(self.0, other.0)) }
        fn min(self: Self, other: Self) -> Self { Self(_mm512_min_ps(self.0, other.0)) }
        fn if_below(self: Self, bound: Self, then: Self, otherwise: Self) -> Self {
            Self(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0), otherwise.0, then.0))
        }
        fn power_of_two(self: Self) -> Self {{
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(_mm512_set1_ps(1.0)))))
        }}
        fn sum(self: Self) -> f32 { _mm512_reduce_add_ps(self.0) }
        // Halves of two vectors at a time, then quarters of all four, then within quarters: the order of `_mm512_reduce_add_ps`.
        fn four_sums(four: [Self; 4]) -> [f32; 4] {{
            let [a, b, c, d] = [four[0].0, four[1].0, four[2].0, four[3].0];
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            let all = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            let all = _mm512_add_ps(all, _mm512_permute_ps::<0x4e>(all));
            let all = _mm512_add_ps(all, _mm512_permute_ps::<0xb1>(all));
            let firsts = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), all);
            std::mem::transmute::<__m128, [f32; 4]>(_mm512_castps512_ps128(firsts))
        }}
        fn fetch(at: *const i8) -> () { _mm_prefetch::<_MM_HINT_T1>(at) }
    }

    moves! {
        fn load(at: *const f32) -> Self { Self(_mm512_loadu_ps(at)) }
        fn load_f16(at: *const f16) -> Self { Self(_mm512_cvtph_ps(_mm256_loadu_si256(at.cast()))) }
        fn load_bf16(at: *const bf16) -> Self {{
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }}
        fn splat_f16(at: *const u8, number: usize) -> Self {{
            let four = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64(at.cast())));
            Self(_mm512_permutexvar_ps(_mm512_set1_epi32(number as i32), four))
        }}
        fn load_some(at: *const f32, count: usize) -> Self { Self(_mm512_maskz_loadu_ps(first(count), at)) }
        fn load_some_f16(at: *const f16, count: usize) -> Self {
            Self(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), at.cast())))
        }
        fn load_some_bf16(at: *const bf16, count: usize) -> Self {{
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), at.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }}
        fn store_some(self: Self, at: *mut f32, count: usize) -> () { _mm512_mask_storeu_ps(at, first(count), self.0) }
        fn store(self: Self, at: *mut f32) -> () { _mm512_storeu_ps(at, self.0) }
    }
}

/// A mask of the first `count` of sixteen lanes, or of all.
#[inline(always)]
pub(super) fn first(count: usize) -> __mmask16 {
    ((1u32 << count.min(16)) - 1) as __mmask16
}
