//! Vectors of F32, of the widest instructions that the machine has, chosen at run time.
//!
//! A kernel's inner loops are a [`Work`], written once for any [`Lanes`]. [`Vectors::run`] compiles it for each set of
//! instructions: everything on the way from there must be `inline(always)`, or it is compiled without them. Machines other
//! than x86-64 have the plain loops, which their compiler vectorises.

use std::array;

use half::{bf16, f16};

/// Most lanes that any vector has.
pub(super) const MOST: usize = 16;

/// Some F32 in a register.
pub(super) trait Lanes: Copy {
    /// As many whole numbers.
    type Codes: Codes<Numbers = Self>;
    /// How many.
    const COUNT: usize;
    /// Tokens that a product has in registers at once, beside four rows of a weight.
    const TOKENS: usize;

    fn splat(x: f32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn over(self, other: Self) -> Self;
    /// `self · factor + more`, rounded once where the instructions can.
    fn times_plus(self, factor: Self, more: Self) -> Self;
    /// The greater one; `other` if either is NaN.
    fn max(self, other: Self) -> Self;
    /// The lesser one; `other` if either is NaN.
    fn min(self, other: Self) -> Self;
    /// `then` where `self` is below `bound`, else, and for NaN, `otherwise`.
    fn if_below(self, bound: Self, then: Self, otherwise: Self) -> Self;
    /// 2ⁿ, of `n + 1.5 · 2²³` with an integer n from -126 to 127.
    fn power_of_two(self) -> Self;
    /// The sum, always in the same order.
    fn sum(self) -> f32;

    /// The sums of four, each as [`sum`](Self::sum) has it.
    #[inline(always)]
    fn four_sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        [a.sum(), b.sum(), c.sum(), d.sum()]
    }

    /// The greatest lane.
    #[inline(always)]
    fn greatest(self) -> f32 {
        let (mut lanes, mut count) = (self.array(), Self::COUNT);
        while count > 1 {
            count /= 2;
            for lane in 0..count {
                lanes[lane] = if lanes[lane] > lanes[lane + count] { lanes[lane] } else { lanes[lane + count] };
            }
        }
        lanes[0]
    }

    /// Fetches a line into the cache, if there is one.
    fn fetch(at: *const i8);

    /// # Safety
    /// That many elements lie there.
    unsafe fn load(at: *const f32) -> Self;
    /// # Safety
    /// That many elements lie there.
    unsafe fn load_f16(at: *const f16) -> Self;
    /// # Safety
    /// That many elements lie there.
    unsafe fn load_bf16(at: *const bf16) -> Self;
    /// One of four F16, in all lanes.
    ///
    /// # Safety
    /// Eight bytes lie there, and the number is below four.
    unsafe fn splat_f16(at: *const u8, number: usize) -> Self;
    /// # Safety
    /// There is room for that many elements, which nobody else uses.
    unsafe fn store(self, at: *mut f32);

    /// The first `count`, fewer than the vector has, and zeros after them.
    ///
    /// # Safety
    /// `count` elements lie there.
    #[inline(always)]
    unsafe fn load_some(at: *const f32, count: usize) -> Self {
        // SAFETY: the caller promises `count` elements.
        unsafe { f32::copy_some(at, count) }
    }

    /// The first `count`, fewer than the vector has, and zeros after them.
    ///
    /// # Safety
    /// `count` elements lie there.
    #[inline(always)]
    unsafe fn load_some_f16(at: *const f16, count: usize) -> Self {
        // SAFETY: the caller promises `count` elements.
        unsafe { f16::copy_some(at, count) }
    }

    /// The first `count`, fewer than the vector has, and zeros after them.
    ///
    /// # Safety
    /// `count` elements lie there.
    #[inline(always)]
    unsafe fn load_some_bf16(at: *const bf16, count: usize) -> Self {
        // SAFETY: the caller promises `count` elements.
        unsafe { bf16::copy_some(at, count) }
    }

    /// The lanes, and zeros after them.
    #[inline(always)]
    fn array(self) -> [f32; MOST] {
        const { assert!(Self::COUNT <= MOST) };
        let mut array = [0.0; MOST];
        // SAFETY: the array has room for the lanes.
        unsafe { self.store(array.as_mut_ptr()) };
        array
    }

    /// Stores the first `count` lanes.
    ///
    /// # Safety
    /// There is room for `count` elements, which nobody else uses.
    #[inline(always)]
    unsafe fn store_some(self, at: *mut f32, count: usize) {
        let array = self.array();
        // SAFETY: the caller promises room, and no vector has more lanes than the array.
        unsafe { at.copy_from_nonoverlapping(array.as_ptr(), count.min(Self::COUNT)) };
    }
}

/// Some U32 in a register.
pub(super) trait Codes: Copy {
    /// The same as F32.
    type Numbers: Lanes;

    /// A byte a lane.
    ///
    /// # Safety
    /// That many bytes lie there.
    unsafe fn load(at: *const u8) -> Self;
    /// A byte with a sign a lane.
    ///
    /// # Safety
    /// That many bytes lie there.
    unsafe fn load_signed(at: *const i8) -> Self;
    /// A bit a lane, from the lowest on.
    fn bits(bits: u32) -> Self;
    fn right(self, bits: u32) -> Self;
    fn left(self, bits: u32) -> Self;
    fn and(self, mask: u32) -> Self;
    fn or(self, other: Self) -> Self;
    /// As numbers with a sign.
    fn number(self) -> Self::Numbers;
    /// The element of a table that the lowest four bits say.
    fn pick(self, table: &[f32; 16]) -> Self::Numbers;
}

/// A type of weights, widened to F32 in registers.
pub(super) trait Stored: Copy + Default + Sync {
    /// # Safety
    /// As many elements as the vector has lie there.
    unsafe fn load<L: Lanes>(at: *const Self) -> L;

    /// `count` elements, fewer than the vector has, and zeros after them.
    ///
    /// # Safety
    /// `count` elements lie there.
    unsafe fn load_some<L: Lanes>(at: *const Self, count: usize) -> L;

    /// The same by way of memory.
    ///
    /// # Safety
    /// `count` elements lie there.
    #[inline(always)]
    unsafe fn copy_some<L: Lanes>(at: *const Self, count: usize) -> L {
        let mut some = [Self::default(); MOST];
        // SAFETY: the caller promises `count` elements, and no vector has more lanes than the array.
        unsafe { some.as_mut_ptr().copy_from_nonoverlapping(at, count.min(L::COUNT)) };
        // SAFETY: the array has as many elements as any vector.
        unsafe { Self::load(some.as_ptr()) }
    }
}

macro_rules! stored {
    ($($type:ty: $load:ident, $load_some:ident;)*) => { $(
        impl Stored for $type {
            #[inline(always)]
            unsafe fn load<L: Lanes>(at: *const Self) -> L {
                // SAFETY: the caller promises as many elements as the vector has.
                unsafe { L::$load(at) }
            }

            #[inline(always)]
            unsafe fn load_some<L: Lanes>(at: *const Self, count: usize) -> L {
                // SAFETY: the caller promises `count` elements.
                unsafe { L::$load_some(at, count) }
            }
        }
    )* };
}
stored! {
    f32: load, load_some;
    f16: load_f16, load_some_f16;
    bf16: load_bf16, load_some_bf16;
}

/// Inner loops for any vectors.
pub(super) trait Work {
    type Out;
    /// Must be `inline(always)`.
    fn run<L: Lanes>(self) -> Self::Out;
}

/// A set of instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vectors {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2(super::x86::Proven),
    #[cfg(target_arch = "x86_64")]
    Avx512(super::x86::Proven),
}

impl Vectors {
    /// The widest of this machine.
    pub(super) fn widest() -> Self {
        #[cfg(target_arch = "x86_64")]
        let wide = super::x86::has_avx512().map(Self::Avx512).or_else(|| super::x86::has_avx2().map(Self::Avx2));
        #[cfg(not(target_arch = "x86_64"))]
        let wide = None;
        wide.unwrap_or(Self::Plain)
    }

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain code",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "AVX-512",
        }
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let more = [super::x86::has_avx2().map(Self::Avx2), super::x86::has_avx512().map(Self::Avx512)];
        #[cfg(not(target_arch = "x86_64"))]
        let more = [None];
        [Self::Plain].into_iter().chain(more.into_iter().flatten()).collect()
    }

    pub(super) fn run<W: Work>(self, work: W) -> W::Out {
        match self {
            Self::Plain => work.run::<Plain>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(proven) => super::x86::run_avx2(proven, work),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(proven) => super::x86::run_avx512(proven, work),
        }
    }
}

/// Eight F32 in an array.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; 8]);

impl Plain {
    #[inline(always)]
    fn with(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }
}

impl Codes for [u32; 8] {
    type Numbers = Plain;

    #[inline(always)]
    unsafe fn load(at: *const u8) -> Self {
        // SAFETY: the caller promises eight bytes.
        unsafe { *at.cast::<[u8; 8]>() }.map(u32::from)
    }

    #[inline(always)]
    unsafe fn load_signed(at: *const i8) -> Self {
        // SAFETY: the caller promises eight bytes.
        unsafe { *at.cast::<[i8; 8]>() }.map(|code| i32::from(code) as u32)
    }

    #[inline(always)]
    fn bits(bits: u32) -> Self {
        array::from_fn(|lane| bits >> lane & 1)
    }

    #[inline(always)]
    fn right(self, bits: u32) -> Self {
        self.map(|code| code >> bits)
    }

    #[inline(always)]
    fn left(self, bits: u32) -> Self {
        self.map(|code| code << bits)
    }

    #[inline(always)]
    fn and(self, mask: u32) -> Self {
        self.map(|code| code & mask)
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        array::from_fn(|lane| self[lane] | other[lane])
    }

    #[inline(always)]
    fn number(self) -> Plain {
        Plain(self.map(|code| code as i32 as f32))
    }

    #[inline(always)]
    fn pick(self, table: &[f32; 16]) -> Plain {
        Plain(self.map(|code| table[(code & 15) as usize]))
    }
}

impl Lanes for Plain {
    type Codes = [u32; 8];

    const COUNT: usize = 8;
    const TOKENS: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; 8])
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.with(other, |a, b| a - b)
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self.with(other, |a, b| a * b)
    }

    #[inline(always)]
    fn over(self, other: Self) -> Self {
        self.with(other, |a, b| a / b)
    }

    #[inline(always)]
    fn times_plus(self, factor: Self, more: Self) -> Self {
        self.times(factor).plus(more)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.with(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.with(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn if_below(self, bound: Self, then: Self, otherwise: Self) -> Self {
        let pick = |lane: usize| if self.0[lane] < bound.0[lane] { then.0[lane] } else { otherwise.0[lane] };
        Self(array::from_fn(pick))
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Self(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1f32.to_bits()))))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    fn fetch(_: *const i8) {}

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller promises eight elements; an array is aligned as they are.
        Self(unsafe { *at.cast() })
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16) -> Self {
        // SAFETY: the caller promises eight elements; an array is aligned as they are.
        Self(unsafe { *at.cast::<[f16; 8]>() }.map(f16::to_f32))
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> Self {
        // SAFETY: the caller promises eight elements; an array is aligned as they are.
        Self(unsafe { *at.cast::<[bf16; 8]>() }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)))
    }

    #[inline(always)]
    unsafe fn splat_f16(at: *const u8, number: usize) -> Self {
        // SAFETY: the caller promises eight bytes, and a number below four.
        let two = unsafe { *at.cast::<[u8; 2]>().add(number) };
        Self::splat(f16::from_le_bytes(two).to_f32())
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller promises room for eight elements; an array is aligned as they are.
        unsafe { *at.cast() = self.0 };
    }
}
