//! The same promise on a GPU: a sequence's logits are the same bits alone and in any company.

mod common;
#[path = "common/company.rs"]
mod company;
#[path = "../examples/bench/twin.rs"]
#[allow(dead_code, reason = "a benchmark uses the rest")]
mod twin;

use company::{check_companies, check_company};
use layer_streamer::{
    DType,
    kernels::{AttentionMask, Kernels, PAGE},
};
use support::cases;
use twin::{Batch, On, random};

/// How many drawings: emulated threads take their time.
const DRAWINGS: u32 = if cfg!(cuda_emulated) { 20 } else { 200 };

#[test]
fn on_a_gpu_a_sequence_has_the_same_bits_alone_and_in_any_company() {
    let Some(device) = common::gpu() else { return };
    check_companies(&device, cases(DRAWINGS), 90);
}

#[test]
fn on_a_gpu_so_have_sixty_four_of_up_to_700_tokens() {
    let Some(device) = common::gpu() else { return };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    check_company(&device, "qwen2-tied", 64, 700, &mut fastrand::Rng::with_seed(seed));
}

/// The weights of a 7B model, and of a small one; where threads are emulated, what they compute in a minute.
fn weights() -> (&'static [[usize; 2]], usize) {
    match cfg!(cuda_emulated) {
        true => (&[[200, 40], [16, 24], [128, 128], [128, 64], [160, 128], [64, 160]], 600),
        false => {
            (&[[3584, 3584], [3584, 512], [3584, 18944], [18944, 3584], [576, 192], [576, 1536], [1536, 576]], 2048)
        }
    }
}

#[test]
fn on_a_gpu_a_row_of_a_product_has_the_same_bits_at_every_place_among_1_to_2048() {
    const ROWS: usize = 3;
    let Some(device) = common::gpu() else { return };
    let on = On::new(&device).unwrap();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let (shapes, most) = weights();
    let around = |count: usize| [count - 1, count, count + 1];
    let counts = (1..=17).chain([16, 64, 128, 256, 512, 1024].into_iter().flat_map(around)).chain([2047, 2048, 1, 128]);
    for &[k, n] in shapes {
        // The same few rows over and over: each is at every place, beside others.
        let rows = random(&mut rng, ROWS * k);
        let x = on.repeated(DType::BF16, &[most, k], &rows).unwrap();
        let weight = on.weight(&[n, k], &random(&mut rng, n * k)).unwrap();
        for to in [DType::BF16, DType::F32] {
            let alone: Vec<Vec<u32>> = (0..ROWS)
                .map(|row| {
                    let x = on.weight(&[1, k], &rows[row * k..][..k]).unwrap();
                    let mut out = on.empty(to, &[1, n]).unwrap();
                    device.linear(&on.stream, x.get(), weight.get(), None, out.out()).unwrap();
                    on.read(&out).unwrap().into_iter().map(f32::to_bits).collect()
                })
                .collect();
            for count in counts.clone().filter(|count| *count <= most) {
                let mut out = on.empty(to, &[count, n]).unwrap();
                let some = x.cast(DType::BF16, &[count, k]);
                device.linear(&on.stream, some, weight.get(), None, out.out()).unwrap();
                let found = on.read(&out).unwrap();
                let same =
                    |row: usize| found[row * n..][..n].iter().zip(&alone[row % ROWS]).all(|(a, b)| a.to_bits() == *b);
                let differs = (0..count).find(|row| !same(*row));
                assert_eq!(differs, None, "a row of {count} by [{n}, {k}] to {to}");
            }
        }
    }
}

/// Values change their sign from each part of the context to the next, so that little is left of sums: it shows where one is rounded.
#[test]
fn on_a_gpu_a_token_attends_with_the_same_bits_alone_and_in_a_prompt() {
    const PART: usize = 512;
    const NEW: usize = 48;
    let Some(device) = common::gpu() else { return };
    let on = On::new(&device).unwrap();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let before = 3 * PART + rng.usize(..PART);
    for [heads, size] in [[8, 64], [4, 128]] {
        let batch = Batch::new(vec![(before, NEW)], 0);
        let shape = [batch.cache_pages(), 1, PAGE, size];
        let many = shape.iter().product();
        // Of nearly the same scores, of which none outweighs the others.
        let keys: Vec<f32> = random(&mut rng, many).into_iter().map(|key| key / 32.0).collect();
        let sign = |at: usize| if (at / size / PART).is_multiple_of(2) { 1.0 } else { -1.0 };
        let base = random(&mut rng, PART * size);
        let values: Vec<f32> = (0..many).map(|at| sign(at) * base[at % base.len()]).collect();
        let queries = random(&mut rng, NEW * heads * size);
        let [keys, values] = [keys, values].map(|of| on.cache(&shape, &of).unwrap());
        let mask = AttentionMask { scale: (size as f32).powf(-0.5), window: None, soft_cap: None };
        let attend = |first: usize, count: usize| {
            let lengths = vec![(before + first, count)];
            let of = Batch { lengths, ..batch.clone() }.on(&on).unwrap();
            let shape = [count, heads, size];
            let q = on.activation(&shape, &queries[first * heads * size..][..count * heads * size]).unwrap();
            let mut out = on.empty(device.precision().activation, &shape).unwrap();
            device.attention(&on.stream, q.get(), keys.get(), values.get(), of.get(), mask, out.out()).unwrap();
            on.read(&out).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let together = attend(0, NEW);
        let differs = (0..NEW).find(|token| attend(*token, 1) != together[token * heads * size..][..heads * size]);
        assert_eq!(differs, None, "heads of {size}, {before} tokens before");
    }
}
