//! Blocks of quantised weights at random: a row for each type.
//!
//! All bytes are random, so each code is as frequent as any other. Then the block's scale is set, and its minimum if the type has
//! one, so that weights have a mean of 0 and the usual standard deviation. The scales of a block's parts stay random. Where parts have
//! minimums too, the highest bit of both is set: a part's minimum is then about what its scale calls for, as in real weights.

use std::ops::Range;

use half::f16;
use layer_streamer::DType;

use super::weights::{DEVIATION, Random, even, pieces};

/// The average of numbers, and that of their squares.
#[derive(Clone, Copy)]
pub struct Moments {
    mean: f64,
    pub square: f64,
}

impl Moments {
    /// Of the whole numbers from `least` to `most`, each as frequent as any other.
    pub const fn of(least: i32, most: i32) -> Self {
        let (mean, count) = ((least + most) as f64 / 2.0, (most - least + 1) as f64);
        Self { mean, square: mean * mean + (count * count - 1.0) / 12.0 }
    }

    pub fn variance(self) -> f64 {
        self.square - self.mean * self.mean
    }
}

/// How blocks of a type are made.
pub struct Recipe {
    pub dtype: DType,
    /// The first byte of the scale, which the minimum follows.
    scale_at: usize,
    /// What codes stand for.
    codes: Moments,
    /// What the scales of parts are, and their minimums likewise; 1 if there are none.
    parts: Moments,
    /// Bytes in which bits of parts' scales are set, and these bits.
    set: (Range<usize>, u8),
    /// The block's minimum in its scales, as it is stored.
    minimum: Option<f64>,
    /// Makes blocks of its size.
    fill: fn(&Blocks, Random, u64, &mut [u8]),
}

const ONE: Moments = Moments::of(1, 1);
/// Of 4 and 6 bits, the highest set.
const UPPER_4: Moments = Moments::of(8, 15);
const UPPER_6: Moments = Moments::of(32, 63);
/// Of 6 bits with a sign, and of 8.
const SIGNED_6: Moments = Moments::of(-32, 31);
const SIGNED_8: Moments = Moments::of(-128, 127);
/// The 16 numbers of IQ4_NL add up to -94, their squares to 72768.
const IQ4: Moments = Moments { mean: -94.0 / 16.0, square: 72768.0 / 16.0 };
/// The numbers of E2M1, whose squares add up to 137.
const E2M1: Moments = Moments { mean: 0.0, square: 137.0 / 16.0 };

/// Of a type whose blocks have N bytes, without minimums.
const fn plain<const N: usize>(dtype: DType, scale_at: usize, codes: Moments, parts: Moments) -> Recipe {
    assert!(dtype.size() == N);
    Recipe { dtype, scale_at, codes, parts, set: (0..0, 0), minimum: None, fill: fill::<N> }
}

pub static RECIPES: [Recipe; 13] = [
    plain::<18>(DType::Q4_0, 0, Moments::of(-8, 7), ONE),
    Recipe { minimum: Some(-7.5), ..plain::<20>(DType::Q4_1, 0, Moments::of(0, 15), ONE) },
    plain::<22>(DType::Q5_0, 0, Moments::of(-16, 15), ONE),
    Recipe { minimum: Some(-15.5), ..plain::<24>(DType::Q5_1, 0, Moments::of(0, 31), ONE) },
    plain::<34>(DType::Q8_0, 0, SIGNED_8, ONE),
    Recipe { minimum: Some(1.5), set: (0..16, 0x88), ..plain::<84>(DType::Q2_K, 80, Moments::of(0, 3), UPPER_4) },
    plain::<110>(DType::Q3_K, 108, Moments::of(-4, 3), SIGNED_6),
    Recipe { minimum: Some(7.5), set: (4..12, 0xa0), ..plain::<144>(DType::Q4_K, 0, Moments::of(0, 15), UPPER_6) },
    Recipe { minimum: Some(15.5), set: (4..12, 0xa0), ..plain::<176>(DType::Q5_K, 0, Moments::of(0, 31), UPPER_6) },
    plain::<210>(DType::Q6_K, 208, Moments::of(-32, 31), SIGNED_8),
    plain::<18>(DType::IQ4_NL, 0, IQ4, ONE),
    plain::<136>(DType::IQ4_XS, 0, IQ4, SIGNED_6),
    plain::<17>(DType::MXFP4, 0, E2M1, ONE),
];

impl Recipe {
    /// The type's recipe, if it is one of blocks.
    pub fn of(dtype: DType) -> Option<&'static Self> {
        RECIPES.iter().find(|recipe| recipe.dtype == dtype)
    }

    /// The standard deviation of weights whose scale is 1.
    fn spread(&self) -> f64 {
        let (Self { codes, parts, .. }, minimum) = (self, self.minimum.unwrap_or(0.0).abs());
        // The mean square of `s · code - m · minimum`, where `s` and `m` are a part's and independent. Without parts both are 1.
        let squares = parts.square * (codes.square + minimum * minimum);
        (squares - 2.0 * minimum * codes.mean * parts.mean * parts.mean).sqrt()
    }
}

/// Makes blocks of one type.
pub struct Blocks {
    recipe: &'static Recipe,
    /// Scales with their minimums, as they are stored, of which each block has one.
    scales: [[u8; 4]; 256],
    /// How many bytes they have.
    scale_bytes: usize,
}

impl Blocks {
    pub fn new(recipe: &'static Recipe) -> Self {
        let usual = DEVIATION / recipe.spread();
        let step = |index: usize| (index as f64 + 0.5) / 256.0;
        let (scale_bytes, scale): (_, &dyn Fn(usize) -> [u8; 4]) = match (recipe.dtype, &recipe.minimum) {
            (DType::MXFP4, _) => (1, &|index| exponent(usual, step(index))),
            (_, None) => (2, &|index| half(usual, step(index), index % 2 == 1)),
            (_, Some(minimum)) => (4, &|index| half_with(usual, step(index), *minimum)),
        };
        Self { recipe, scales: std::array::from_fn(scale), scale_bytes }
    }

    /// Puts the bytes from `at` on of a tensor in such blocks into `out`.
    pub fn fill(&self, random: Random, at: u64, out: &mut [u8]) {
        (self.recipe.fill)(self, random, at, out);
    }
}

/// [`Blocks::fill`] for blocks of N bytes. Short loops are spelled out, since this package is compiled with little optimisation, which
/// leaves calls of iterators in them.
fn fill<const N: usize>(blocks: &Blocks, random: Random, at: u64, out: &mut [u8]) {
    let Blocks { recipe, scales, scale_bytes } = blocks;
    pieces::<N>(at, out, |number, block| {
        let (words, rest) = block.as_chunks_mut::<8>();
        // One more word, of which at most seven bytes are needed: the eighth chooses the scale.
        let mut index = number * (N as u64 / 8 + 1);
        for word in words {
            *word = random.at(index).to_le_bytes();
            index += 1;
        }
        let last = random.at(index).to_le_bytes();
        let mut byte = 0;
        while byte < N % 8 {
            rest[byte] = last[byte];
            byte += 1;
        }
        let scale = &scales[usize::from(last[7])];
        byte = 0;
        while byte < *scale_bytes {
            block[recipe.scale_at + byte] = scale[byte];
            byte += 1;
        }
        let (bytes, bits) = &recipe.set;
        if *bits > 0 {
            block[bytes.clone()].iter_mut().for_each(|byte| *byte |= bits);
        }
    });
}

/// A scale with a sign: where codes have a mean, weights of both signs have none.
fn half(usual: f64, step: f64, negative: bool) -> [u8; 4] {
    let scale = f16::from_f64(even(usual, step));
    let [low, high] = if negative { -scale } else { scale }.to_le_bytes();
    [low, high, 0, 0]
}

/// A scale, and so many times that as the minimum.
fn half_with(usual: f64, step: f64, minimum: f64) -> [u8; 4] {
    let scale = f16::from_f64(even(usual, step));
    let minimum = f16::from_f64(scale.to_f64() * minimum);
    [scale.to_bits(), minimum.to_bits()].map(u16::to_le_bytes).as_flattened().try_into().expect("two times two bytes")
}

/// The powers of two below and above the usual scale, each as often as makes the mean square the usual one's square.
fn exponent(usual: f64, step: f64) -> [u8; 4] {
    let below = usual.log2().floor();
    let above = (usual / below.exp2()).powi(2) - 1.0;
    let exponent = below + if step * 3.0 < above { 1.0 } else { 0.0 };
    [(exponent + 127.0) as u8, 0, 0, 0]
}
