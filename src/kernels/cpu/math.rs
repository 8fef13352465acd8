//! exp and tanh for vectors, to one or two units in the last place, with the polynomials of Moshier's Cephes library (expf,
//! tanhf). NaN stays NaN.

#![allow(clippy::excessive_precision, reason = "constants as their source has them")]

use super::lanes::Lanes;

/// eˣ; zero below the smallest normal number, and its value at 88.37 above that.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    // What is added to round to an integer: 1.5 · 2²³, whose last bit counts ones.
    const ROUND: f32 = 12_582_912.0;
    const LEAST: f32 = -87.336;
    let clamped = L::splat(LEAST).max(L::splat(88.37).min(x));
    let shifted = clamped.times_plus(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND));
    let n = shifted.minus(L::splat(ROUND));
    // x - n · ln 2, with ln 2 in two parts.
    let rest = n.times_plus(L::splat(-0.693359375), clamped);
    let rest = n.times_plus(L::splat(2.12194440e-4), rest);
    let coefficients = [1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1];
    let polynomial =
        coefficients.into_iter().fold(L::splat(1.9875691500e-4), |sum, c| sum.times_plus(rest, L::splat(c)));
    let power = polynomial.times_plus(rest.times(rest), rest).plus(L::splat(1.0)).times(shifted.power_of_two());
    x.if_below(L::splat(LEAST), L::splat(0.0), power)
}

#[inline(always)]
pub(super) fn tanh<L: Lanes>(x: L) -> L {
    let (zero, one) = (L::splat(0.0), L::splat(1.0));
    let size = zero.minus(x).max(x);
    // Near zero a polynomial, further off by the exponential.
    let square = x.times(x);
    let coefficients = [2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1];
    let polynomial =
        coefficients.into_iter().fold(L::splat(-5.70498872745e-3), |sum, c| sum.times_plus(square, L::splat(c)));
    let near = polynomial.times(square).times_plus(x, x);
    let far = one.minus(L::splat(2.0).over(exp(size.plus(size)).plus(one)));
    let far = x.if_below(zero, zero.minus(far), far);
    size.if_below(L::splat(0.625), near, far)
}
