//! Activations as whole numbers of three digits from -63 to 64.

use super::BLOCK;

/// Digits of a number, the first worth the most.
pub(super) const DIGITS: usize = 3;

/// What a digit is worth beside the next.
pub(super) const BASE: i32 = 128;

/// The greatest digit.
pub(super) const GREATEST: i32 = BASE / 2;

/// The greatest whole number: its first digit is 63.
const MOST: f32 = 1_040_000.0;

/// Lesser ones are not made larger: that would not fit into an F32.
const LEAST: f32 = 1e-30;

/// Activations whose digits are added up.
const SUMMED: usize = 16;

/// Added to a number that is far below, this leaves it rounded in the lowest bits.
const ROUNDS: f32 = 12_582_912.0;

/// 256 activations of a token.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Digits {
    pub(super) digits: [[i8; BLOCK]; DIGITS],
    /// Their sums over 16 each, negative: what is taken off codes or weights goes by these.
    pub(super) less: [[i16; BLOCK / SUMMED]; DIGITS],
    /// The sums of the whole numbers over 32 each.
    pub(super) sums: [f32; BLOCK / 32],
    /// What the whole numbers are multiplied by; NaN where there is something infinite, or no number.
    pub(super) scale: f32,
}

impl Digits {
    /// As many as there is room for.
    pub(super) fn room(room: &mut [f32]) -> &mut [Self] {
        // SAFETY: they are numbers alone, for which any bits will do.
        unsafe { room.align_to_mut() }.1
    }

    /// Makes it of these, and of zeros behind them. The compiler makes vectors of the loops.
    #[inline(always)]
    pub(super) fn split(&mut self, x: &[f32]) {
        let mut all = [0.0; BLOCK];
        all[..x.len()].copy_from_slice(x);
        let mut greatest = 0;
        for x in &all {
            // Without the sign: as whole numbers they are in the same order, with infinity and NaN above all.
            greatest = greatest.max(x.to_bits() as i32 & i32::MAX);
        }
        let greatest = f32::from_bits(greatest as u32);
        let is_finite = greatest.is_finite();
        let greatest = greatest.max(LEAST);
        // Of what is not finite nothing comes but NaN, by the scale.
        let factor = if is_finite { MOST / greatest } else { 0.0 };
        self.scale = if is_finite { greatest / MOST } else { f32::NAN };
        let [first, second, third] = &mut self.digits;
        for (((x, first), second), third) in all.iter().zip(first).zip(second).zip(third) {
            let number = (x * factor + ROUNDS).to_bits() as i32 - ROUNDS.to_bits() as i32;
            let last = ((number + GREATEST - 1) & (BASE - 1)) - (GREATEST - 1);
            let number = (number - last) >> BASE.ilog2();
            let middle = ((number + GREATEST - 1) & (BASE - 1)) - (GREATEST - 1);
            *third = last as i8;
            *second = middle as i8;
            *first = ((number - middle) >> BASE.ilog2()) as i8;
        }
        for (digits, less) in self.digits.iter().zip(&mut self.less) {
            for (digits, less) in digits.as_chunks::<SUMMED>().0.iter().zip(less) {
                let mut sum = 0;
                for digit in digits {
                    sum += i16::from(*digit);
                }
                *less = -sum;
            }
        }
        for (group, sum) in self.sums.iter_mut().enumerate() {
            let mut whole = 0;
            for less in &self.less {
                whole = whole * BASE - i32::from(less[2 * group]) - i32::from(less[2 * group + 1]);
            }
            *sum = whole as f32;
        }
    }
}
