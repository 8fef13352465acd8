//! Products in whole numbers against formulas in f64, and bits that do not depend on the company.

use super::{
    super::{digits::*, *},
    floats,
};
use crate::dtype;

/// Random blocks whose weights are from about -0.7 to 1.
fn blocks(rng: &mut fastrand::Rng, count: usize) -> Vec<u8> {
    let mut blocks = vec![0; DType::Q4_K.bytes(count)];
    rng.fill(&mut blocks);
    for block in blocks.chunks_mut(DType::Q4_K.bytes(256)) {
        for (at, most) in [(0, 1e-3), (2, 1e-2)] {
            block[at..at + 2].copy_from_slice(&f16::from_f32(rng.f32() * most).to_le_bytes());
        }
    }
    blocks
}

fn product<'a>(x: &'a [f32], weight: &'a [u8], k: usize, n: usize, bias: Option<&'a [f32]>) -> Product<'a> {
    let (weight, bias) = (Matrix::Blocks(DType::Q4_K, weight), bias.map(Weight::F32));
    Product { x, weight, bias, tokens: x.len() / k, k, stride: n }
}

/// Nothing where the machine has no such instructions.
fn multiply(x: &[f32], weight: &[u8], k: usize, n: usize, bias: Option<&[f32]>) -> Option<Vec<f32>> {
    let Some(vnni) = Vnni::of_this_machine() else {
        println!("skipped: this machine multiplies no bytes");
        return None;
    };
    let mut out = vec![f32::NAN; x.len() / k * n];
    let product = product(x, weight, k, n, bias);
    // SAFETY: `out` is as long as that, and nobody else's.
    unsafe { digits::multiply(vnni, &product, weight, n, Parts::new(&mut out)).unwrap() };
    Some(out)
}

#[test]
fn whole_numbers_come_as_near_as_f32() {
    let mut rng = fastrand::Rng::new();
    // The last two have more blocks, or more tokens, than have room at once.
    for (tokens, k, n) in
        [(1, 256, 1), (1, 2048, 33), (2, 512, 16), (3, 1024, 17), (40, 768, 150), (70, 65536, 3), (300, 512, 5)]
    {
        let (x, biases, weight) = (floats(&mut rng, tokens * k), floats(&mut rng, n), blocks(&mut rng, n * k));
        let Some(out) = multiply(&x, &weight, k, n, Some(&biases)) else { return };
        let mut weights = vec![0.0; n * k];
        dtype::expand(DType::Q4_K, &weight, &mut weights);
        for (at, got) in out.into_iter().enumerate() {
            let (token, row) = (at / n, at % n);
            let pairs = x[token * k..][..k].iter().zip(&weights[row * k..][..k]);
            let sum: f64 = pairs.map(|(x, weight)| f64::from(*x) * f64::from(*weight)).sum();
            let off = (f64::from(got) - sum - f64::from(biases[row])).abs();
            assert!(off < 1e-6 * (k as f64).sqrt(), "{tokens} × {k} × {n} at {at}: {off}");
        }
    }
}

#[test]
fn bits_of_whole_numbers_depend_neither_on_the_other_tokens_nor_on_the_other_rows() {
    let mut rng = fastrand::Rng::new();
    for (tokens, k, n) in [(2, 256, 16), (7, 1024, 39), (45, 512, 300)] {
        let (x, weight) = (floats(&mut rng, tokens * k), blocks(&mut rng, n * k));
        let Some(all) = multiply(&x, &weight, k, n, None) else { return };
        for at in (0..tokens * n).step_by(7) {
            let (token, row) = (at / n, at % n);
            let row_bytes = DType::Q4_K.bytes(k);
            let alone = multiply(&x[token * k..][..k], &weight[row * row_bytes..][..row_bytes], k, 1, None).unwrap();
            assert_eq!(all[at].to_bits(), alone[0].to_bits(), "token {token}, row {row} of {tokens} × {n}");
        }
    }
}

#[test]
fn small_and_large_activations_are_multiplied_alike_and_of_none_that_is_finite_nothing_finite_comes() {
    let (mut rng, k, n) = (fastrand::Rng::new(), 512, 20);
    let (x, weight) = (floats(&mut rng, k), blocks(&mut rng, n * k));
    let Some(plain) = multiply(&x, &weight, k, n, None) else { return };
    // The numbers are the same but for their exponent.
    for exponent in [-60, 60] {
        let factor = 2f32.powi(exponent);
        let x: Vec<_> = x.iter().map(|x| x * factor).collect();
        let scaled = multiply(&x, &weight, k, n, None).unwrap();
        for (plain, scaled) in plain.iter().zip(scaled) {
            assert!((plain * factor - scaled).abs() <= 1e-6 * factor, "{plain} and {scaled} by {factor}");
        }
    }
    let nothing = multiply(&vec![0.0; k], &weight, k, n, Some(&plain[..n])).unwrap();
    assert_eq!(nothing, plain);
    let tiny = multiply(&vec![1e-42; k], &weight, k, n, None).unwrap();
    assert!(tiny.iter().all(|x| x.abs() < 1e-38), "{tiny:?}");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut two = [x.clone(), x.clone()].concat();
        two[k - 1] = bad;
        let out = multiply(&two, &weight, k, n, None).unwrap();
        assert!(out[..n].iter().all(|x| x.is_nan()), "{bad}: {out:?}");
        assert_eq!(out[n..], plain, "{bad} changes another token");
    }
}
