//! Products in whole numbers against formulas in f64, and bits that depend neither on the company nor on the instructions.

use super::{
    super::{digits::*, *},
    floats,
};
use crate::dtype;

const FORMATS: [DType; 6] = [DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q5_K, DType::Q6_K];

/// Random blocks whose weights are about as large as 1, but for rounding: every bit of their codes and scales is drawn.
fn blocks(rng: &mut fastrand::Rng, dtype: DType, count: usize) -> Vec<u8> {
    let mut blocks = vec![0; dtype.bytes(count)];
    rng.fill(&mut blocks);
    // Where an F16 lies, and how large it may be.
    let halves: &[(usize, f32)] = match dtype {
        DType::Q4_0 => &[(0, 0.1)],
        DType::Q4_1 => &[(0, 0.03), (2, 0.5)],
        DType::Q8_0 => &[(0, 7e-3)],
        DType::Q4_K => &[(0, 7e-4), (2, 5e-3)],
        DType::Q5_K => &[(0, 3e-4), (2, 5e-3)],
        _ => &[(208, 2.5e-4)],
    };
    for block in blocks.chunks_mut(dtype.size()) {
        for &(at, most) in halves {
            block[at..at + 2].copy_from_slice(&f16::from_f32((rng.f32() * 2.0 - 1.0) * most).to_le_bytes());
        }
    }
    blocks
}

/// A weight of `k` columns.
#[derive(Clone, Copy)]
struct Stored<'a> {
    dtype: DType,
    k: usize,
    bytes: &'a [u8],
}

impl Stored<'_> {
    fn rows(&self) -> usize {
        self.bytes.len() / self.dtype.bytes(self.k)
    }

    fn row(&self, row: usize) -> Self {
        let bytes = self.dtype.bytes(self.k);
        Self { bytes: &self.bytes[row * bytes..][..bytes], ..*self }
    }

    /// What each set of instructions gives, once it is known that they give the same bits.
    fn by(&self, x: &[f32], bias: Option<&[f32]>) -> Option<Vec<f32>> {
        let (Self { dtype, k, bytes }, n) = (*self, self.rows());
        let (weight, bias) = (Matrix::Blocks(dtype, bytes), bias.map(Weight::F32));
        let product = Product { x, weight, bias, tokens: x.len() / k, k, stride: n };
        let mut first: Option<Vec<f32>> = None;
        for instructions in Instructions::all() {
            let mut out = vec![f32::NAN; x.len() / k * n];
            // SAFETY: `out` is as long as that, and nobody else's.
            unsafe { multiply(instructions, &product, (dtype, bytes), n, Parts::new(&mut out)).unwrap() };
            let first = first.get_or_insert_with(|| out.clone());
            let same = first.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
            assert!(same, "{instructions:?} gives other bits of {dtype}, {} × {k} × {n}", x.len() / k);
        }
        if first.is_none() {
            println!("skipped: this machine multiplies no bytes");
        }
        first
    }
}

#[test]
fn whole_numbers_come_as_near_as_f32() {
    let mut rng = fastrand::Rng::new();
    // The last two have more blocks, or more tokens, than have room at once.
    for (tokens, k, n) in
        [(1, 256, 1), (1, 2048, 33), (2, 512, 16), (3, 1024, 17), (40, 768, 150), (70, 65536, 3), (300, 512, 5)]
    {
        for dtype in FORMATS {
            // Rows of small blocks end wherever a block does.
            let k = if dtype.block_elements() < 256 { k - 32 * rng.usize(..8) } else { k };
            let (x, biases, bytes) =
                (floats(&mut rng, tokens * k), floats(&mut rng, n), blocks(&mut rng, dtype, n * k));
            let Some(out) = Stored { dtype, k, bytes: &bytes }.by(&x, Some(&biases)) else { return };
            let mut weights = vec![0.0; n * k];
            dtype::expand(dtype, &bytes, &mut weights);
            for (at, got) in out.into_iter().enumerate() {
                let (token, row) = (at / n, at % n);
                let pairs = x[token * k..][..k].iter().zip(&weights[row * k..][..k]);
                let sum: f64 = pairs.map(|(x, weight)| f64::from(*x) * f64::from(*weight)).sum();
                let off = (f64::from(got) - sum - f64::from(biases[row])).abs();
                assert!(off < 1e-6 * (k as f64).sqrt(), "{dtype}, {tokens} × {k} × {n} at {at}: {off}");
            }
        }
    }
}

/// The largest sums: if one did not fit into its 16 or 32 bits, all would be wrong.
#[test]
fn the_greatest_codes_and_digits_have_room() {
    let (k, mut rng) = (512, fastrand::Rng::new());
    for dtype in FORMATS {
        for byte in [0x00, 0xff, 0x7f, 0x80] {
            let mut bytes = vec![byte; dtype.bytes(k * 3)];
            for (block, random) in
                bytes.chunks_mut(dtype.size()).zip(blocks(&mut rng, dtype, k * 3).chunks(dtype.size()))
            {
                let halves = if dtype == DType::Q6_K { 208..210 } else { 0..if block.len() % 4 == 0 { 4 } else { 2 } };
                block[halves.clone()].copy_from_slice(&random[halves]);
            }
            let mut weights = vec![0.0; 3 * k];
            dtype::expand(dtype, &bytes, &mut weights);
            // Of the greatest number the first digit is 63; of the others the second and the third are 64, or -63.
            for x in [1.0, -1.0, 8256.0 / 1_040_000.0, -8127.0 / 1_040_000.0] {
                let mut all = vec![x; k];
                [all[0], all[256]] = [1.0; 2];
                let Some(out) = Stored { dtype, k, bytes: &bytes }.by(&all, None) else { return };
                for (got, weights) in out.iter().zip(weights.chunks(k)) {
                    let pairs = all.iter().zip(weights).map(|(x, weight)| [*x, *weight].map(f64::from));
                    // All activations are the same, and each is off by half a step of its whole number.
                    let (sum, most) = pairs.fold((0.0, 1e-9), |(sum, most), [x, weight]| {
                        (sum + x * weight, most + (2e-6 * x.abs() + 5e-7) * weight.abs())
                    });
                    let off = (f64::from(*got) - sum).abs();
                    assert!(off < most, "{dtype} of {byte:#x} by {x}: {got} and not {sum}");
                }
            }
        }
    }
}

#[test]
fn bits_of_whole_numbers_depend_neither_on_the_other_tokens_nor_on_the_other_rows() {
    let mut rng = fastrand::Rng::new();
    for (tokens, k, n) in [(2, 256, 16), (7, 1024, 39), (45, 512, 300)] {
        for dtype in FORMATS {
            let k = if dtype.block_elements() < 256 { k - 32 * rng.usize(..8) } else { k };
            let (x, bytes) = (floats(&mut rng, tokens * k), blocks(&mut rng, dtype, n * k));
            let weight = Stored { dtype, k, bytes: &bytes };
            let Some(all) = weight.by(&x, None) else { return };
            for at in (0..tokens * n).step_by(7) {
                let (token, row) = (at / n, at % n);
                let alone = weight.row(row).by(&x[token * k..][..k], None).unwrap();
                assert_eq!(
                    all[at].to_bits(),
                    alone[0].to_bits(),
                    "{dtype}, token {token}, row {row} of {tokens} × {n}"
                );
            }
        }
    }
}

#[test]
fn small_and_large_activations_are_multiplied_alike_and_of_none_that_is_finite_nothing_finite_comes() {
    let (mut rng, k, n) = (fastrand::Rng::new(), 512, 20);
    for dtype in FORMATS {
        let (x, bytes) = (floats(&mut rng, k), blocks(&mut rng, dtype, n * k));
        let weight = Stored { dtype, k, bytes: &bytes };
        let Some(plain) = weight.by(&x, None) else { return };
        // The numbers are the same but for their exponent.
        for exponent in [-60, 60] {
            let factor = 2f32.powi(exponent);
            let x: Vec<_> = x.iter().map(|x| x * factor).collect();
            let scaled = weight.by(&x, None).unwrap();
            for (plain, scaled) in plain.iter().zip(scaled) {
                assert!((plain * factor - scaled).abs() <= 1e-6 * factor, "{plain} and {scaled} by {factor}");
            }
        }
        let nothing = weight.by(&vec![0.0; k], Some(&plain[..n])).unwrap();
        assert_eq!(nothing, plain);
        let tiny = weight.by(&vec![1e-42; k], None).unwrap();
        assert!(tiny.iter().all(|x| x.abs() < 1e-38), "{tiny:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut two = [x.clone(), x.clone()].concat();
            two[k - 1] = bad;
            let out = weight.by(&two, None).unwrap();
            assert!(out[..n].iter().all(|x| x.is_nan()), "{bad}: {out:?}");
            assert_eq!(out[n..], plain, "{bad} changes another token");
        }
    }
}
