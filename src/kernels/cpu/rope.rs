//! Rotary embeddings: pairs of a head's elements, turned by angles that all heads of a token share.

#![allow(clippy::excessive_precision, reason = "constants as their source has them")]

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2};

use super::{
    lanes::{Lanes, Work},
    rows::{put, some},
};
use crate::kernels::RopeLayout;

/// Frequencies at a time.
const SOME: usize = 64;

/// All heads of one token.
pub(super) struct Turn<'a> {
    pub(super) x: &'a [f32],
    pub(super) position: u32,
    pub(super) inv_freq: &'a [f32],
    pub(super) scale: f32,
    pub(super) layout: RopeLayout,
    /// Of a head.
    pub(super) size: usize,
    pub(super) out: &'a mut [f32],
}

impl Work for Turn<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { x, position, inv_freq, scale, layout, size, out } = self;
        let half = inv_freq.len();
        let heads = || x.chunks_exact(size);
        assert_eq!(x.len(), out.len());
        for (out, x) in out.chunks_exact_mut(size).zip(heads()) {
            out[2 * half..].copy_from_slice(&x[2 * half..]);
        }
        for first in (0..half).step_by(SOME) {
            let count = (half - first).min(SOME);
            let (sines, cosines) = sines_and_cosines(&inv_freq[first..][..count], position, scale);
            for (out, x) in out.chunks_exact_mut(size).zip(heads()) {
                match layout {
                    RopeLayout::Halves => {
                        let (a, b) = (&x[first..][..count], &x[half + first..][..count]);
                        let (to_a, to_b) = out[first..half + first + count].split_at_mut(half);
                        turn_halves::<L>([a, b], [&mut to_a[..count], to_b], [&sines, &cosines]);
                    }
                    RopeLayout::ToHalves => {
                        let (to_a, to_b) = out[first..half + first + count].split_at_mut(half);
                        let to = to_a[..count].iter_mut().zip(to_b);
                        turn_pairs(&x[2 * first..][..2 * count], to, [&sines, &cosines]);
                    }
                    RopeLayout::Interleaved => {
                        let part = 2 * first..2 * (first + count);
                        let to = out[part.clone()].as_chunks_mut().0.iter_mut().map(|[a, b]| (a, b));
                        turn_pairs(&x[part], to, [&sines, &cosines]);
                    }
                }
            }
        }
    }
}

/// The first elements of pairs, and the second ones.
#[inline(always)]
fn turn_halves<L: Lanes>(x: [&[f32]; 2], out: [&mut [f32]; 2], turns: [&[f32; SOME]; 2]) {
    let count = x[0].len();
    assert!(count <= SOME && x[1].len() == count && out.iter().all(|out| out.len() == count));
    let ([a, b], [sin, cos]) = (x.map(<[f32]>::as_ptr), turns.map(|turns| turns.as_ptr()));
    let [to_a, to_b] = out.map(<[f32]>::as_mut_ptr);
    for at in (0..count).step_by(L::COUNT) {
        let load = |from: *const f32| -> L {
            // SAFETY: each has so many elements left from `at` on.
            unsafe { some(from.add(at), count - at) }
        };
        let (a, b, sin, cos) = (load(a), load(b), load(sin), load(cos));
        // SAFETY: each has room for so many elements from `at` on, and both are borrowed.
        unsafe {
            put(a.times(cos).minus(b.times(sin)), to_a.add(at), count - at);
            put(b.times(cos).plus(a.times(sin)), to_b.add(at), count - at);
        }
    }
}

/// Pairs of neighbours, which the compiler makes vectors of.
#[inline(always)]
fn turn_pairs<'a>(
    x: &[f32],
    out: impl Iterator<Item = (&'a mut f32, &'a mut f32)>,
    [sines, cosines]: [&[f32; SOME]; 2],
) {
    for (((to_a, to_b), [a, b]), (sin, cos)) in out.zip(x.as_chunks().0).zip(sines.iter().zip(cosines)) {
        (*to_a, *to_b) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// Of the angles `position · frequency`, times `scale`.
#[inline(always)]
fn sines_and_cosines(frequencies: &[f32], position: u32, scale: f32) -> ([f32; SOME], [f32; SOME]) {
    let (mut angles, mut sines, mut cosines) = ([0.0; SOME], [0.0; SOME], [0.0; SOME]);
    angles.iter_mut().zip(frequencies).for_each(|(angle, frequency)| *angle = position as f32 * frequency);
    for ((angle, sin), cos) in angles.iter().zip(&mut sines).zip(&mut cosines) {
        (*sin, *cos) = sin_cos(*angle);
    }
    let beyond = |angle: &f32| angle.is_nan() || angle.abs() >= MOST;
    if angles.iter().any(beyond) {
        let all = angles.iter().zip(&mut sines).zip(&mut cosines);
        all.filter(|((angle, _), _)| beyond(angle)).for_each(|((angle, sin), cos)| (*sin, *cos) = angle.sin_cos());
    }
    (sines.map(|sin| sin * scale), cosines.map(|cos| cos * scale))
}

/// What [`sin_cos`] is given is below this.
const MOST: f32 = (1u32 << 31) as f32;

/// To 1.2e-7, without branches, so that the compiler makes vectors of it. F64 has the angle less its quarter turns to 1e-7 even
/// for the largest; the polynomials are of Moshier's Cephes library (sinf, cosf).
#[inline(always)]
fn sin_cos(angle: f32) -> (f32, f32) {
    // What is added to round to an integer: 1.5 · 2⁵², whose last bit counts ones.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let angle = f64::from(angle);
    let shifted = angle * FRAC_2_PI + ROUND;
    let (x, quarters) = ((angle - (shifted - ROUND) * FRAC_PI_2) as f32, shifted.to_bits() as u32);
    let square = x * x;
    let sin = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x;
    let cos =
        ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square;
    let cos = cos - 0.5 * square + 1.0;
    let (sin, cos) = if quarters & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let negated = |x: f32, sign: u32| f32::from_bits(x.to_bits() ^ (sign & 2) << 30);
    (negated(sin, quarters), negated(cos, quarters.wrapping_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sines_and_cosines_are_right_to_a_millionth_at_any_position() {
        let mut rng = fastrand::Rng::new();
        for round in 0..20_000 {
            let position = rng.u32(..) >> rng.u32(..32);
            let frequencies = [rng.f32(), -rng.f32(), rng.f32() * 1e-3, rng.f32() * 1e6, 1.0];
            let (sines, cosines) = sines_and_cosines(&frequencies, position, 1.0);
            for ((frequency, sin), cos) in frequencies.iter().zip(sines).zip(cosines) {
                let angle = position as f32 * frequency;
                let (exact_sin, exact_cos) = f64::from(angle).sin_cos();
                let off = (f64::from(sin) - exact_sin).abs().max((f64::from(cos) - exact_cos).abs());
                assert!(off < 3e-7, "{round}: {off} at {angle}");
            }
        }
        for odd in [f32::INFINITY, f32::NAN] {
            let (sines, cosines) = sines_and_cosines(&[odd, 0.5], 1, 1.0);
            assert!(sines[0].is_nan() && cosines[0].is_nan() && (sines[1] - 0.5f32.sin()).abs() < 1e-6);
        }
    }
}
