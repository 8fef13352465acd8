//! Each set of instructions against formulas in f64, and bits that must not depend on the company. `tests/kernels.rs` has what
//! the widest computes for every shape.

mod attention;
#[cfg(target_arch = "x86_64")]
mod digits;

use std::{
    panic::catch_unwind,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use super::{
    lanes::{Lanes, Work},
    math::{exp, tanh},
    *,
};
use crate::{
    device::pool::Pool,
    dtype::{self, convert},
    kernels::RopeLayout,
};

fn floats(rng: &mut fastrand::Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

fn multiply(vectors: Vectors, product: Product<'_>, rows: Range<usize>) -> Vec<f32> {
    let mut out = vec![f32::NAN; product.tokens * product.stride];
    // SAFETY: `out` is as long as that, and nobody else's.
    unsafe { product.part(vectors, rows, 0..product.tokens, Parts::new(&mut out)) };
    out
}

/// Calls `f` with random weights of each type.
fn for_each_type(rng: &mut fastrand::Rng, count: usize, mut f: impl FnMut(Weight<'_>)) {
    let values = floats(rng, count);
    f(Weight::F32(&values));
    f(Weight::F16(&values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()));
    f(Weight::BF16(&values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()));
}

#[test]
fn every_set_of_instructions_multiplies_every_type() {
    let mut rng = fastrand::Rng::new();
    for (tokens, k, n) in [(1, 1, 1), (1, 2000, 9), (2, 31, 4), (7, 800, 38), (13, 129, 70)] {
        let (x, biases) = (floats(&mut rng, tokens * k), floats(&mut rng, n));
        for_each_type(&mut rng, n * k, |weight| {
            let (all, bias) = (Matrix::Plain(weight), Some(Weight::F32(&biases)));
            let product = Product { x: &x, weight: all, bias, tokens, k, stride: n };
            for vectors in Vectors::all() {
                for (at, &got) in multiply(vectors, product, 0..n).iter().enumerate() {
                    let (token, row) = (at / n, at % n);
                    let sum: f64 =
                        (0..k).map(|i| f64::from(x[token * k + i]) * f64::from(weight.at(row * k + i))).sum();
                    let off = (f64::from(got) - sum - f64::from(biases[row])).abs();
                    assert!(
                        off < 1e-6 * (k as f64).sqrt().max(4.0),
                        "{vectors:?}, {tokens} × {k} × {n} at {at}: {off}"
                    );
                }
            }
        });
    }
}

#[test]
fn products_of_blocks_have_the_bits_of_those_of_the_same_weights_in_f32() {
    let small = [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::IQ4_NL, DType::MXFP4];
    let large = [DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::IQ4_XS];
    let own = [DType::F8_64, DType::U4_32, DType::U4_128, DType::NF4_64];
    let (mut rng, n) = (fastrand::Rng::new(), 39);
    for dtype in small.into_iter().chain(large).chain(own) {
        for (tokens, k) in [(1, 256), (2, 1024), (6, 1792), (16, 256), (17, 1024), (40, 1792)] {
            let mut blocks = vec![0; dtype.bytes(n * k)];
            rng.fill(&mut blocks);
            let (mut weights, x) = (vec![0.0; n * k], floats(&mut rng, tokens * k));
            dtype::expand(dtype, &blocks, &mut weights);
            // Of random bits some scales are no numbers; they make NaN of whatever bits.
            let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            for vectors in Vectors::all() {
                let [blocks, plain] =
                    [Matrix::Blocks(dtype, &blocks), Matrix::Plain(Weight::F32(&weights))].map(|weight| {
                        let product = Product { x: &x, weight, bias: None, tokens, k, stride: n };
                        multiply(vectors, product, 0..n).into_iter().map(bits).collect::<Vec<_>>()
                    });
                assert!(blocks == plain, "{vectors:?}, {dtype}, {tokens} × {k}");
            }
        }
    }
}

#[test]
fn a_product_of_many_tokens_has_pieces_for_all_threads_and_of_many_rows_few_tokens_are_not_parted() {
    let (x, weight) = ([], Weight::F32(&[]));
    let pieces = |weight, tokens, n: usize| {
        let [rows, some] = Product { x: &x, weight, bias: None, tokens, k: 576, stride: n }.piece(n, 16);
        [n.div_ceil(rows), tokens.div_ceil(some)]
    };
    let (plain, blocks) = (Matrix::Plain(weight), Matrix::Blocks(DType::Q4_K, &[]));
    assert_eq!(pieces(plain, 512, 192), [6, 22]);
    assert_eq!(pieces(plain, 512, 576), [18, 8]);
    assert_eq!(pieces(blocks, 512, 192), [6, 6]);
    assert_eq!(pieces(plain, 512, 18944), [592, 1]);
    assert_eq!(pieces(plain, 8, 576), [18, 1]);
    assert_eq!(pieces(plain, 8, 18944), [128, 1]);
}

#[test]
fn the_bits_of_a_product_depend_neither_on_the_other_tokens_nor_on_the_other_rows() {
    let (mut rng, tokens, k, n) = (fastrand::Rng::new(), 15, 1701, 39);
    let x = floats(&mut rng, tokens * k);
    for_each_type(&mut rng, n * k, |weight| {
        let weight = Matrix::Plain(weight);
        for vectors in Vectors::all() {
            let all = multiply(vectors, Product { x: &x, weight, bias: None, tokens, k, stride: n }, 0..n);
            for (at, together) in all.iter().enumerate() {
                let (token, row) = (at / n, at % n);
                let x = &x[token * k..][..k];
                let alone = multiply(vectors, Product { x, weight, bias: None, tokens: 1, k, stride: n }, row..row + 1);
                assert_eq!(together.to_bits(), alone[row].to_bits(), "{vectors:?}, token {token}, row {row}");
            }
            // Fifteen tokens are few, forty-five are not.
            let x = x.repeat(3);
            let product = Product { x: &x, weight, bias: None, tokens: 3 * tokens, k, stride: n };
            let mut parted = vec![f32::NAN; 3 * tokens * n];
            for first in (0..3 * tokens).step_by(12) {
                let some = first..(first + 12).min(3 * tokens);
                // SAFETY: `parted` is as long as that, and nobody else's.
                unsafe { product.part(vectors, 0..n, some, Parts::new(&mut parted)) };
            }
            for (at, parted) in parted.iter().enumerate() {
                assert_eq!(parted.to_bits(), all[at % all.len()].to_bits(), "{vectors:?}, number {at} in parts");
            }
        }
    });
}

#[test]
fn every_set_of_instructions_converts_every_number_as_one_by_one() {
    let mut rng = fastrand::Rng::new();
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let eights: Vec<u8> = (0..=u8::MAX).collect();
    // Each exponent and sign, beside ties, NaN with payloads and anything.
    let lower = |rng: &mut fastrand::Rng| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, rng.u16(..)][rng.usize(..7)];
    let floats: Vec<u8> =
        (0..=u16::MAX).flat_map(|x| (u32::from(x) << 16 | u32::from(lower(&mut rng))).to_le_bytes()).collect();
    for (from, bytes) in [(DType::F8E4M3, &eights), (DType::F16, &all), (DType::BF16, &all), (DType::F32, &floats)] {
        for to in [DType::F32, DType::BF16] {
            let mut expected = vec![0; bytes.len() / from.size() * to.size()];
            for (src, dst) in bytes.chunks(from.size()).zip(expected.chunks_mut(to.size())) {
                convert(from, src, to, dst);
            }
            for vectors in Vectors::all() {
                for skipped in [0, 1, 5] {
                    let (src, expected) = (&bytes[skipped * from.size()..], &expected[skipped * to.size()..]);
                    let mut dst = vec![0; expected.len()];
                    vectors.run(Convert { from, src, to, dst: &mut dst });
                    assert!(dst == expected, "{vectors:?}: {from} to {to}");
                }
            }
        }
    }
}

#[test]
fn every_set_of_instructions_finds_the_greatest_number_or_a_nan() {
    let mut rng = fastrand::Rng::new();
    for len in (0..140).chain([1000, 4096, 5001]) {
        let mut x = floats(&mut rng, len);
        for _ in 0..len / 7 {
            x[rng.usize(..len)] = [f32::INFINITY, f32::NEG_INFINITY, 3.0, -0.0][rng.usize(..4)];
        }
        let expected = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for vectors in Vectors::all() {
            assert_eq!(vectors.run(Greatest(&x)), expected, "{vectors:?}: {x:?}");
        }
        if len > 0 {
            x[rng.usize(..len)] = [f32::NAN, -f32::NAN][rng.usize(..2)];
            let found = Vectors::all().into_iter().map(|vectors| vectors.run(Greatest(&x)));
            assert!(found.into_iter().all(f32::is_nan), "{x:?}");
        }
    }
}

#[test]
fn every_set_of_instructions_turns_to_the_same_bits() {
    let mut rng = fastrand::Rng::new();
    for (heads, size, half) in [(1, 2, 1), (3, 7, 3), (2, 40, 11), (2, 128, 64), (3, 300, 150)] {
        let (x, inv_freq) = (floats(&mut rng, heads * size), floats(&mut rng, half));
        for layout in [RopeLayout::Halves, RopeLayout::Interleaved, RopeLayout::ToHalves] {
            let position = rng.u32(..) >> rng.u32(..32);
            let turned = |vectors: Vectors| {
                let mut out = vec![f32::NAN; x.len()];
                vectors.run(Turn { x: &x, position, inv_freq: &inv_freq, scale: 1.5, layout, size, out: &mut out });
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let plain = turned(Vectors::Plain);
            Vectors::all()
                .into_iter()
                .for_each(|vectors| assert_eq!(turned(vectors), plain, "{vectors:?}, {layout:?}"));
        }
    }
}

struct Apply<'a>(&'a [f32], bool);

impl Work for Apply<'_> {
    type Out = Vec<f32>;

    #[inline(always)]
    fn run<L: Lanes>(self) -> Vec<f32> {
        let of = |x: &f32| if self.1 { tanh(L::splat(*x)) } else { exp(L::splat(*x)) };
        self.0.iter().map(|x| of(x).array()[L::COUNT - 1]).collect()
    }
}

#[test]
fn exp_and_tanh_are_right_to_two_units_in_the_last_place() {
    let points: Vec<f32> = (-87_000..88_000).map(|at| at as f32 / 1000.0 + 1e-4).collect();
    let near: Vec<f32> = (-40_000..40_000).map(|at| (at as f32 / 2000.0).powi(3) / 500.0).collect();
    for vectors in Vectors::all() {
        for (x, got) in points.iter().zip(vectors.run(Apply(&points, false))) {
            let exact = f64::from(*x).exp();
            assert!(
                (f64::from(got) / exact - 1.0).abs() < 2.0 * f64::from(f32::EPSILON),
                "{vectors:?}: exp({x}) is {got}"
            );
        }
        for (x, got) in near.iter().zip(vectors.run(Apply(&near, true))) {
            let exact = f64::from(*x).tanh();
            let off = (f64::from(got) - exact).abs();
            assert!(off <= 2.0 * f64::from(f32::EPSILON) * exact.abs(), "{vectors:?}: tanh({x}) is {got}");
        }
        let ends = [f32::NEG_INFINITY, -100.0, f32::NAN];
        let [zero, small, nan] = vectors.run(Apply(&ends, false))[..] else { unreachable!("three") };
        assert!(zero == 0.0 && small == 0.0 && nan.is_nan(), "{vectors:?}");
        let ends = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN];
        let [least, most, nan] = vectors.run(Apply(&ends, true))[..] else { unreachable!("three") };
        assert!(least == -1.0 && most == 1.0 && nan.is_nan(), "{vectors:?}");
    }
}

#[test]
fn callers_at_once_have_each_piece_done_once_and_a_panic_reaches_its_own_caller() {
    let pool = Pool::start(3).unwrap();
    thread::scope(|scope| {
        for caller in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..300 {
                    let pieces = (caller + round) % 50;
                    let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                    pool.deal(pieces, |piece| _ = done[piece].fetch_add(1, Relaxed));
                    assert!(done.iter().all(|count| count.load(Relaxed) == 1));
                    let bad = || pool.deal(9, |piece| assert!(piece != caller, "piece {caller}"));
                    let payload = catch_unwind(std::panic::AssertUnwindSafe(bad)).unwrap_err();
                    assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("piece {caller}"));
                }
            });
        }
    });
}

#[test]
fn threads_help_and_without_work_they_sleep() {
    let pool = Pool::start(2).unwrap();
    let helped = AtomicUsize::new(0);
    let caller = thread::current().id();
    let until = Instant::now() + Duration::from_secs(20);
    while helped.load(Relaxed) == 0 {
        assert!(Instant::now() < until, "nobody helped");
        pool.deal(8, |_| {
            helped.fetch_add(usize::from(thread::current().id() != caller), Relaxed);
            thread::sleep(Duration::from_millis(1));
        });
    }
    while pool.asleep() < 2 {
        assert!(Instant::now() < until, "they never sleep");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Tiles as their reference has them, in plain code.
#[cfg(target_arch = "x86_64")]
mod in_tiles {
    use super::{
        super::{
            tiles::{Amx, Block, PARTS, SIDE, STEP, Tile, Tiles, Twin, multiply},
            x86::has_avx512,
        },
        *,
    };

    #[derive(Clone, Copy)]
    struct Emulated(());

    // SAFETY: tests make one only where the machine has AVX-512.
    unsafe impl Tiles for Emulated {
        unsafe fn multiply(self, block: &Block, sums: &mut [Tile; 4]) {
            let groups = if block.group > 0 { 2 } else { 1 };
            for (row, group, token) in (0..block.rows * groups * block.width)
                .map(|at| (at / block.width / groups, at / block.width % groups, at % block.width))
            {
                let mut sum = 0f32;
                for part in 0..block.steps * PARTS {
                    let [mut even, mut odd] = [0f32; 2];
                    for pair in 0..STEP / 2 {
                        let at = block.group * group + (part * SIDE + pair) * block.width + token;
                        let column = part / PARTS * STEP + 2 * pair;
                        // SAFETY: the caller promises weights and activations.
                        let (x, weights) = unsafe {
                            let row = block.weights.byte_add(row * block.stride);
                            (*block.x.add(at), [*row.add(column), *row.add(column + 1)])
                        };
                        even = weights[0].to_f32().mul_add(f32::from_bits(x << 16), even);
                        odd = weights[1].to_f32().mul_add(f32::from_bits(x & !0xffff), odd);
                    }
                    sum += even + odd;
                }
                sums[2 * (row / SIDE) + group].0[row % SIDE][token] = sum;
            }
        }
    }

    /// A product in the tiles of this machine, if it has them, and in emulated ones, where that is possible.
    fn each_tiles(product: Product<'_>, weight: &[bf16]) -> Vec<(&'static str, Vec<f32>)> {
        fn of(tiles: impl Tiles, product: Product<'_>, weight: &[bf16]) -> Vec<f32> {
            let mut out = vec![f32::NAN; product.tokens * product.stride];
            // SAFETY: `out` is as long as that, and nobody else's.
            unsafe { multiply(tiles, &product, weight, weight.len() / product.k, Parts::new(&mut out)) }.unwrap();
            out
        }
        let emulated = has_avx512().map(|_| ("emulated", of(Emulated(()), product, weight)));
        let twin = Twin::of_this_machine().filter(|_| product.tokens == 1);
        let twin = twin.map(|tiles| ("the twin", of(tiles, product, weight)));
        let real = Amx::of_this_machine().map(|tiles| ("AMX", of(tiles, product, weight)));
        let each: Vec<_> = emulated.into_iter().chain(twin).chain(real).collect();
        for (tiles, out) in each.iter().skip(1) {
            let bits = |out: &[f32]| out.iter().map(|x| if x.is_nan() { 0 } else { x.to_bits() }).collect::<Vec<_>>();
            assert!(bits(out) == bits(&each[0].1), "{tiles}: other bits than emulated");
        }
        each
    }

    fn weights(rng: &mut fastrand::Rng, count: usize) -> Vec<bf16> {
        floats(rng, count).into_iter().map(bf16::from_f32).collect()
    }

    #[test]
    fn tiles_multiply_as_formulas_say() {
        let mut rng = fastrand::Rng::new();
        let shapes = [(1, 1, 1), (1, 3100, 9), (2, 31, 4), (7, 800, 38), (16, 64, 32), (17, 1600, 33), (40, 96, 300)];
        for (tokens, k, n) in shapes {
            let (x, biases, weight) = (floats(&mut rng, tokens * k), floats(&mut rng, n), weights(&mut rng, n * k));
            let product = Product {
                x: &x,
                weight: Matrix::Plain(Weight::BF16(&weight)),
                bias: Some(Weight::F32(&biases)),
                tokens,
                k,
                stride: n,
            };
            for (tiles, out) in each_tiles(product, &weight) {
                for (at, got) in out.into_iter().enumerate() {
                    let (token, row) = (at / n, at % n);
                    let sum: f64 =
                        (0..k).map(|i| f64::from(x[token * k + i]) * f64::from(weight[row * k + i].to_f32())).sum();
                    let off = (f64::from(got) - sum - f64::from(biases[row])).abs();
                    assert!(off < 1e-6 * (k as f64).sqrt().max(4.0), "{tiles}, {tokens} × {k} × {n} at {at}: {off}");
                }
            }
        }
    }

    #[test]
    fn bits_from_tiles_depend_neither_on_the_other_tokens_nor_on_the_other_rows() {
        let mut rng = fastrand::Rng::new();
        // The last has more tokens than are split at once.
        for (tokens, k, n) in [(15, 1701, 39), (53, 1601, 70), (90, 32768, 2)] {
            let (x, weight) = (floats(&mut rng, tokens * k), weights(&mut rng, n * k));
            let product =
                Product { x: &x, weight: Matrix::Plain(Weight::BF16(&weight)), bias: None, tokens, k, stride: n };
            let all = each_tiles(product, &weight);
            for at in (0..tokens * n).step_by(7) {
                let (token, row) = (at / n, at % n);
                let alone = Product { x: &x[token * k..][..k], tokens: 1, stride: 1, ..product };
                for (tiles, alone) in each_tiles(alone, &weight[row * k..][..k]) {
                    assert_eq!(all[0].1[at].to_bits(), alone[0].to_bits(), "{tiles}, token {token}, row {row}");
                }
            }
        }
    }

    #[test]
    fn what_is_split_is_whole_again() {
        let mut rng = fastrand::Rng::new();
        let random = (0..500).map(|_| f32::from_bits(rng.u32(..))).filter(|x| x.abs() > 1e-20 || x.is_nan());
        let ends = [
            f32::MAX,
            f32::MIN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            0.0,
            f32::from_bits(0x3fff_ffff),
            f32::from_bits(0x7f80_0001),
        ];
        let x: Vec<_> = random.chain(ends).collect();
        let one = [bf16::ONE];
        let product =
            Product { x: &x, weight: Matrix::Plain(Weight::BF16(&one)), bias: None, tokens: x.len(), k: 1, stride: 1 };
        for (tiles, out) in each_tiles(product, &one) {
            for (x, out) in x.iter().zip(out) {
                assert!(out == *x || out.is_nan() && x.is_nan(), "{tiles}: {x:e} became {out:e}");
            }
        }
    }
}
