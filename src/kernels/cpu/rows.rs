//! Norms, gates and what else is done to each row or element by itself.

use half::{bf16, f16};

use super::{
    Weight,
    lanes::{Lanes, Stored, Work},
    math::{exp, tanh},
};
use crate::dtype::{self, DType};

/// `x · factor · (offset + weight)` with `factor = 1 / sqrt(mean(x²) + eps)`, of a row.
pub(super) struct Norm<'a> {
    /// What is read; `None`: what is in `out`.
    pub(super) x: Option<&'a [f32]>,
    pub(super) weight: Weight<'a>,
    pub(super) offset: f32,
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Work for Norm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        match self.weight {
            Weight::F32(weight) => self.compute::<L, f32>(weight),
            Weight::F16(weight) => self.compute::<L, f16>(weight),
            Weight::BF16(weight) => self.compute::<L, bf16>(weight),
        }
    }
}

impl Norm<'_> {
    #[inline(always)]
    fn compute<L: Lanes, W: Stored>(self, weight: &[W]) {
        let Self { x, offset, eps, out, .. } = self;
        let len = out.len();
        assert!(weight.len() == len && x.is_none_or(|x| x.len() == len));
        let out = out.as_mut_ptr();
        let x = x.map_or(out.cast_const(), <[f32]>::as_ptr);
        let mut sums = L::splat(0.0);
        for at in (0..len).step_by(L::COUNT) {
            // SAFETY: so many elements are left from `at` on.
            let part: L = unsafe { some(x.add(at), len - at) };
            sums = part.times_plus(part, sums);
        }
        let factor = L::splat(1.0 / (sums.sum() / len as f32 + eps).sqrt());
        for at in (0..len).step_by(L::COUNT) {
            // SAFETY: so many elements are left from `at` on.
            let (part, weight): (L, L) =
                unsafe { (some(x.add(at), len - at), some(weight.as_ptr().add(at), len - at)) };
            let normed = part.times(factor).times(weight.plus(L::splat(offset)));
            // SAFETY: so many elements are left from `at` on, and `out` is this call's.
            unsafe { put(normed, out.add(at), len - at) };
        }
    }
}

/// What is done to each element of a row.
#[derive(Clone, Copy)]
pub(super) enum Each<'a> {
    /// `x · (up / (1 + e⁻ˣ))`
    Swiglu(&'a [f32]),
    /// `gelu(x) · up`, the form with a hyperbolic tangent
    Geglu(&'a [f32]),
    /// `x + y`
    Add(&'a [f32]),
    Scale(f32),
    /// `cap · tanh(x / cap)`
    SoftCap(f32),
}

pub(super) struct Elements<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) each: Each<'a>,
}

impl Work for Elements<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (len, x) = (self.x.len(), self.x.as_mut_ptr());
        let other = match self.each {
            Each::Swiglu(other) | Each::Geglu(other) | Each::Add(other) => other[..len].as_ptr(),
            Each::Scale(_) | Each::SoftCap(_) => x.cast_const(),
        };
        for at in (0..len).step_by(L::COUNT) {
            // SAFETY: so many elements are left from `at` on.
            let (part, other): (L, L) = unsafe { (some(x.add(at), len - at), some(other.add(at), len - at)) };
            let one = L::splat(1.0);
            let made = match self.each {
                Each::Swiglu(_) => part.times(other.over(exp(L::splat(0.0).minus(part)).plus(one))),
                Each::Geglu(_) => {
                    // √(2/π)
                    let root = L::splat(0.797_884_6);
                    let cubic = part.times(part).times(part).times_plus(L::splat(0.044715), part);
                    part.times(L::splat(0.5)).times(tanh(root.times(cubic)).plus(one)).times(other)
                }
                Each::Add(_) => part.plus(other),
                Each::Scale(factor) => part.times(L::splat(factor)),
                Each::SoftCap(cap) => tanh(part.over(L::splat(cap))).times(L::splat(cap)),
            };
            // SAFETY: so many elements are left from `at` on, and `x` is this call's.
            unsafe { put(made, x.add(at), len - at) };
        }
    }
}

/// The greatest of some, -∞ where there is none, a NaN where one of them is.
pub(super) struct Greatest<'a>(pub(super) &'a [f32]);

impl Work for Greatest<'_> {
    type Out = f32;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        // Several, since each waits for what came before it.
        let mut greatest = [L::splat(f32::NEG_INFINITY); 4];
        // 1 where something was not below ∞, which is rare.
        let mut odd = L::splat(0.0);
        let (infinity, one) = (L::splat(f32::INFINITY), L::splat(1.0));
        let whole = self.0.chunks_exact(4 * L::COUNT);
        let rest = whole.remainder();
        for part in whole {
            for (number, greatest) in greatest.iter_mut().enumerate() {
                // SAFETY: a chunk is four vectors.
                let part = unsafe { L::load(part.as_ptr().add(number * L::COUNT)) };
                *greatest = part.max(*greatest);
                odd = part.if_below(infinity, odd, one);
            }
        }
        let is_odd = odd.greatest() > 0.0 || rest.iter().any(|x| x.is_nan());
        if is_odd && self.0.iter().any(|x| x.is_nan()) {
            return f32::NAN;
        }
        let [a, b, c, d] = greatest;
        rest.iter().fold(a.max(b).max(c.max(d)).greatest(), |most, &x| if x > most { x } else { most })
    }
}

/// Elements of one type as another.
pub(super) struct Convert<'a> {
    pub(super) from: DType,
    pub(super) src: &'a [u8],
    pub(super) to: DType,
    pub(super) dst: &'a mut [u8],
}

impl Work for Convert<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        dtype::convert(self.from, self.src, self.to, self.dst);
    }
}

/// A vector, or what is left of one and zeros.
///
/// # Safety
/// `left` elements lie there.
#[inline(always)]
pub(super) unsafe fn some<L: Lanes, W: Stored>(at: *const W, left: usize) -> L {
    // SAFETY: the caller promises `left` elements.
    unsafe { if left >= L::COUNT { W::load(at) } else { W::load_some(at, left) } }
}

/// # Safety
/// There is room for `left` elements, which nobody else uses.
#[inline(always)]
pub(super) unsafe fn put<L: Lanes>(x: L, at: *mut f32, left: usize) {
    // SAFETY: the caller promises room for `left` elements.
    unsafe { if left >= L::COUNT { x.store(at) } else { x.store_some(at, left) } }
}
