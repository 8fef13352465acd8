//! The promise that a sequence's logits are the same bits alone and in any company: whatever other sequences a pass has, however
//! prompts are cut, wherever layers, embedding and head are kept.

mod common;
#[path = "common/company.rs"]
mod company;

use common::BLOCKS;
use company::{check_companies, check_company};
use layer_streamer::{
    DType,
    device::{Cpu, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::Kernels,
};
use support::cases;

#[test]
fn on_a_cpu_a_sequence_has_the_same_bits_alone_and_in_any_company() {
    check_companies(&Cpu, cases(200), 120);
}

#[test]
fn on_a_cpu_so_have_sixty_four_of_up_to_700_tokens() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    check_company(&Cpu, "qwen2-tied", 64, 700, &mut fastrand::Rng::with_seed(seed));
}

#[test]
fn on_a_cpu_so_has_one_whose_keys_are_several_stretches_which_threads_share() {
    for _ in 0..2 {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        check_company(&Cpu, "qwen2-tied", 3, 1300, &mut fastrand::Rng::with_seed(seed));
    }
}

/// `x · weightᵀ` for `tokens` rows of `x`.
fn product(x: &[f32], (dtype, weight): (DType, &[u8]), [tokens, k, n]: [usize; 3]) -> Vec<u32> {
    let mut out = vec![f32::NAN; tokens * n];
    let stream = Cpu.stream().unwrap();
    Cpu.prepare(&stream).unwrap();
    let at = |start: *const u8| DevicePtr::new(start.cast_mut());
    let shape = |shape: [usize; 2]| Shape::new(&shape).unwrap();
    // SAFETY: each is memory of that many elements, and only `out`, which nobody else uses, is written.
    unsafe {
        let x = TensorRef::<Cpu>::from_raw(at(x.as_ptr().cast()), DType::F32, shape([tokens, k]));
        let weight = TensorRef::from_raw(at(weight.as_ptr()), dtype, shape([n, k]));
        let out = TensorMut::from_raw(at(out.as_mut_ptr().cast::<u8>()), DType::F32, shape([tokens, n]));
        Cpu.linear(&stream, x, weight, None, out).unwrap();
    }
    out.into_iter().map(f32::to_bits).collect()
}

#[test]
fn on_a_cpu_a_row_of_a_product_has_the_same_bits_among_any_others_and_at_any_place() {
    const ROWS: usize = 2048;
    let [k, n] = [1280, 36];
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let x: Vec<f32> = (0..ROWS * k).map(|_| rng.f32() * 2.0 - 1.0).collect();
    let own = [DType::F32, DType::F16, DType::BF16, DType::F8_64, DType::U4_32, DType::U4_128, DType::NF4_64];
    for dtype in own.into_iter().chain(BLOCKS) {
        // Any bytes are weights. Without the highest two bits, a number or scale is small, and none is infinite.
        let weight: Vec<u8> = (0..dtype.bytes(n * k)).map(|_| rng.u8(..0x40)).collect();
        let of = |rows: std::ops::Range<usize>| {
            let tokens = rows.len();
            product(&x[rows.start * k..rows.end * k], (dtype, &weight), [tokens, k, n])
        };
        let all = of(0..ROWS);
        assert!(all.iter().any(|bits| f32::from_bits(*bits).is_normal()), "{dtype}");
        for row in 0..ROWS {
            assert!(of(row..row + 1) == all[row * n..][..n], "{dtype}: row {row} alone");
        }
        for count in [2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 2047] {
            let first = rng.usize(0..=ROWS - count);
            assert!(of(first..first + count) == all[first * n..][..count * n], "{dtype}: {count} rows from {first} on");
        }
    }
}
