//! The values of all tensors, at random.
//!
//! A piece of a tensor, four weights or a block, is a function of the seed, the tensor's name and the piece's number: any part of
//! any tensor is as cheap to start at as its beginning, and neither threads nor the order of files change a weight.

use half::{bf16, f16};
use layer_streamer::DType;

use super::{
    blocks::{Blocks, Recipe},
    shapes::Tensor,
};

/// Standard deviation of weights and biases, `initializer_range` in the configuration.
pub const DEVIATION: f64 = 0.02;
/// 2^64 divided by the golden ratio, the step of SplitMix64.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a tensor is filled with.
pub enum Values {
    /// In norms 1, else what weights are.
    Weights,
    /// Random bytes, eight at a time, as this changes them.
    Codes(fn(u64) -> u64),
    Scales(Scales),
    /// The group of each column, of so many, as 32 bits.
    Groups(u64),
    /// These.
    Bytes(Vec<u8>),
}

/// Scales at random, whose mean square is the usual one's square.
#[derive(Clone, Copy)]
pub struct Scales {
    pub usual: f64,
    /// Half of them are negative.
    pub signed: bool,
}

impl Scales {
    fn at(&self, random: Random, number: u64) -> f64 {
        let random = random.at(number);
        let scale = even(self.usual, ((random & 0xff) as f64 + 0.5) / 256.0);
        if self.signed && random & 0x100 > 0 { -scale } else { scale }
    }
}

/// Scales from half the usual to one and a half of it, as `step` goes from 0 to 1, whose mean square is the usual one's square.
pub fn even(usual: f64, step: f64) -> f64 {
    usual * (0.5 + step) / (13.0f64 / 12.0).sqrt()
}

/// As many samples as 16 bits can choose from.
type Samples = Box<[u16; 1 << 16]>;

/// SplitMix64 picks from a table of normal samples; blocks are made of what it gives.
pub struct Weights {
    seed: u64,
    /// As BF16, which F32 widens: models were trained in it.
    samples: Samples,
    /// The same as F16.
    halves: Samples,
    blocks: Option<Blocks>,
}

impl Weights {
    /// The table is the Box–Muller transform on an even grid of 256 radii by 256 angles: normal without sampling noise.
    pub fn new(seed: u64, recipe: Option<&'static Recipe>) -> Self {
        let (mut samples, mut halves) = (Box::new([0; 1 << 16]), Box::new([0; 1 << 16]));
        for (index, (sample, half)) in samples.iter_mut().zip(halves.iter_mut()).enumerate() {
            let [radius, angle] = [index >> 8, index & 0xff].map(|step| (step as f64 + 0.5) / 256.0);
            let normal = (-2.0 * radius.ln()).sqrt() * (std::f64::consts::PI * angle).cos();
            let rounded = bf16::from_f64(DEVIATION * normal);
            (*sample, *half) = (rounded.to_bits(), f16::from_f32(rounded.to_f32()).to_bits());
        }
        Self { seed, samples, halves, blocks: recipe.map(Blocks::new) }
    }

    /// Puts the bytes of `tensor` from `at` on into `out`.
    pub fn fill(&self, tensor: &Tensor, at: u64, out: &mut [u8]) {
        let random = Random(tensor.name.bytes().fold(mix(self.seed), |key, byte| mix(key ^ u64::from(byte))));
        match &tensor.values {
            Values::Weights => self.weights(tensor, random, at, out),
            Values::Codes(code) => pieces(at, out, |number, piece| *piece = code(random.at(number)).to_le_bytes()),
            Values::Scales(scales) => match tensor.dtype {
                DType::F32 => pieces(at, out, |number, one| *one = (scales.at(random, number) as f32).to_le_bytes()),
                DType::F16 => {
                    pieces(at, out, |number, one| *one = f16::from_f64(scales.at(random, number)).to_le_bytes());
                }
                _ => pieces(at, out, |number, one| *one = bf16::from_f64(scales.at(random, number)).to_le_bytes()),
            },
            Values::Groups(group) => pieces(at, out, |column, one| *one = ((column / group) as u32).to_le_bytes()),
            Values::Bytes(bytes) => out.copy_from_slice(&bytes[at as usize..][..out.len()]),
        }
    }

    /// Ones, normal samples or blocks.
    fn weights(&self, tensor: &Tensor, random: Random, at: u64, out: &mut [u8]) {
        let four = |table: &Samples, number| {
            let random = random.at(number);
            [0, 16, 32, 48].map(|shift| table[usize::from((random >> shift) as u16)])
        };
        let is_norm = tensor.name.ends_with("norm.weight");
        match (tensor.dtype, &self.blocks) {
            (DType::F32, _) if is_norm => pieces(at, out, |_, one| *one = 1f32.to_le_bytes()),
            _ if is_norm => pieces(at, out, |_, one| *one = bf16::ONE.to_le_bytes()),
            (DType::F32, _) => pieces::<16>(at, out, |number, piece| {
                let wide = four(&self.samples, number).into_iter().rev();
                let wide = wide.fold(0, |wide, sample| wide << 32 | u128::from(sample) << 16);
                *piece = wide.to_le_bytes();
            }),
            (_, Some(blocks)) => blocks.fill(random, at, out),
            (dtype, None) => {
                let table = if dtype == DType::F16 { &self.halves } else { &self.samples };
                pieces(at, out, |number, piece| {
                    let word =
                        four(table, number).into_iter().rev().fold(0, |word, sample| word << 16 | u64::from(sample));
                    *piece = word.to_le_bytes();
                });
            }
        }
    }
}

/// Random numbers of a tensor, by their index.
#[derive(Clone, Copy)]
pub struct Random(u64);

impl Random {
    #[inline(always)]
    pub fn at(self, index: u64) -> u64 {
        mix(self.0.wrapping_add(index.wrapping_mul(STEP)))
    }
}

/// Puts the bytes from `at` on of pieces of N bytes, each made by its number, into `out`, which may begin and end within one.
#[inline(always)]
pub fn pieces<const N: usize>(at: u64, out: &mut [u8], make: impl Fn(u64, &mut [u8; N])) {
    let (mut number, skipped) = (at / N as u64, (at % N as u64) as usize);
    let cut = |number, from: usize, out: &mut [u8]| {
        let mut whole = [0; N];
        make(number, &mut whole);
        out.copy_from_slice(&whole[from..][..out.len()]);
    };
    let begun = if skipped > 0 { (N - skipped).min(out.len()) } else { 0 };
    let (begun, out) = out.split_at_mut(begun);
    if !begun.is_empty() {
        cut(number, skipped, begun);
        number += 1;
    }
    let (whole, rest) = out.as_chunks_mut();
    for piece in whole {
        make(number, piece);
        number += 1;
    }
    if !rest.is_empty() {
        cut(number, 0, rest);
    }
}

/// SplitMix64's output function (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(STEP);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
