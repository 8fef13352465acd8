//! Each kernel on a GPU beside its twin on the CPU, on fresh random data of any shape. Without a GPU there is nothing to test,
//! and the tests say so.

#[path = "cuda/casts.rs"]
mod casts;
mod common;
#[path = "../examples/bench/twin.rs"]
#[allow(dead_code, reason = "a benchmark uses the rest")]
mod twin;
#[path = "cuda/unpack.rs"]
mod unpack;

use half::bf16;
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Result, Settings,
    device::{self, Cuda},
    kernels::{AttentionMask, Kernels, PAGE, RopeLayout},
};
use twin::{Batch, On, off, random};

/// BF16 rounds to 2⁻⁹ of a value.
const OFF: f64 = 1e-2;

/// Runs `test` on a GPU with a few seeds, which it prints.
fn on_gpu(rounds: usize, test: impl Fn(&On<Cuda>, &mut fastrand::Rng) -> Result<()>) {
    let Some(device) = common::gpu() else { return };
    let on = On::new(&device).unwrap();
    for _ in 0..rounds {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        test(&on, &mut fastrand::Rng::with_seed(seed)).unwrap();
    }
}

fn near(what: &str, (got, expected): (Vec<f32>, Vec<f32>)) {
    let off = off(&got, &expected);
    assert!(off <= OFF, "{what} is off by {off:.1e}");
}

/// To the bit, but that all NaN are alike.
fn same(what: &str, (got, expected): (Vec<f32>, Vec<f32>)) {
    let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    let wrong = got.iter().zip(&expected).position(|(a, b)| !same(a, b));
    assert!(got.len() == expected.len() && wrong.is_none(), "{what}[{wrong:?}] of {}", got.len());
}

/// A length that is small, odd, or a multiple of what kernels take at once, up to about `most`.
fn length(rng: &mut fastrand::Rng, most: usize) -> usize {
    match rng.u8(..4) {
        0 => 1 + rng.usize(..9.min(most)),
        1 => 1 + rng.usize(..most),
        _ => (1 + rng.usize(..most)).next_multiple_of([4, 8, 32, 256][rng.usize(..4)]),
    }
}

#[test]
fn norms_of_any_width() {
    on_gpu(60, |gpu, rng| {
        // Rows that fit the registers of a warp, of a block, and of neither.
        let most = [512, 16384, 30_000][rng.usize(..3)];
        let (rows, width) = (length(rng, 20), length(rng, most));
        let count = rows * width;
        let scale = 2f32.powi(rng.i32(-6..7));
        let values: Vec<f32> = (0..count).map(|_| (rng.f32() - 0.5) * scale).collect();
        let (weights, added, eps) = (random(rng, width), random(rng, count), 1e-6);
        let offset = [0.0, 1.0, -0.5][rng.usize(..3)];
        let what = format!("[{rows}, {width}]");
        near(
            &format!("rms_norm of {what}"),
            on_both!(gpu, |on| {
                let (x, weight) = (on.values(DType::F32, &[rows, width], &values)?, on.weight(&[width], &weights)?);
                let mut out = on.empty(on.device.precision().activation, &[rows, width])?;
                on.device.rms_norm(&on.stream, x.get(), weight.get(), offset, eps, out.out())?;
                on.read(&out)?
            }),
        );
        let mut sums = [Vec::new(), Vec::new()];
        near(
            &format!("add_rms_norm of {what}"),
            on_both!(gpu, |on| {
                let (mut x, weight) = (on.values(DType::F32, &[rows, width], &values)?, on.weight(&[width], &weights)?);
                let y = on.activation(&[rows, width], &added)?;
                let mut out = on.empty(on.device.precision().activation, &[rows, width])?;
                on.device.add_rms_norm(&on.stream, x.out(), y.get(), weight.get(), offset, eps, out.out())?;
                sums.swap(0, 1);
                sums[1] = on.read(&x)?;
                on.read(&out)?
            }),
        );
        let [on_gpu, expected] = sums;
        same(&format!("the sum of {what}"), (on_gpu, expected));
        near(
            &format!("rms_norm_in_place of {what}"),
            on_both!(gpu, |on| {
                let (mut x, weight) = (on.values(DType::F32, &[rows, width], &added)?, on.weight(&[width], &weights)?);
                on.device.rms_norm_in_place(&on.stream, x.out(), weight.get(), offset, eps)?;
                on.read(&x)?
            }),
        );
        Ok(())
    });
}

#[test]
fn rope_in_both_layouts_for_any_size_share_and_position() {
    on_gpu(60, |gpu, rng| {
        let (tokens, heads) = (length(rng, 70), 1 + rng.usize(..33));
        let size = if rng.bool() { [32, 64, 96, 128, 256][rng.usize(..5)] } else { length(rng, 200) };
        // All pairs turn, or some, most often a number of them that goes with wide accesses, or none.
        let half = match rng.u8(..6) {
            0 => 0,
            1 => rng.usize(..=size / 2),
            2 => size / 4 / 4 * 4,
            _ => size / 2,
        };
        let scale = if rng.bool() { 1.0 } else { 1.19 };
        let positions: Vec<u32> = (0..tokens).map(|_| rng.u32(..131_072)).collect();
        let inv_freq: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-2.0 * i as f32 / size as f32)).collect();
        let values = random(rng, tokens * heads * size);
        for layout in [RopeLayout::Halves, RopeLayout::Interleaved, RopeLayout::ToHalves] {
            near(
                &format!("rope of [{tokens}, {heads}, {size}], {half} pairs, {layout:?}"),
                on_both!(gpu, |on| {
                    let x = on.values(DType::F32, &[tokens, heads, size], &values)?;
                    let (at, frequencies) = (on.tensor(&[tokens], &positions)?, on.tensor(&[half], &inv_freq)?);
                    let mut out = on.empty(on.device.precision().activation, &[tokens, heads, size])?;
                    on.device.rope(&on.stream, x.get(), at.get(), frequencies.get(), scale, layout, out.out())?;
                    on.read(&out)?
                }),
            );
        }
        Ok(())
    });
}

#[test]
fn gates_factors_soft_caps_and_add_of_any_length() {
    on_gpu(40, |gpu, rng| {
        let (rows, width) = (length(rng, 40), length(rng, 3000));
        let gates: Vec<f32> = random(rng, rows * width).into_iter().map(|x| x * 64.0).collect();
        let (ups, values) = (random(rng, rows * width), random(rng, rows * width));
        // GELU turns where SiLU does, nearer to 0.
        for (name, by) in [("swiglu", 1.0), ("geglu", 1.0 / 16.0)] {
            let gates: Vec<f32> = gates.iter().map(|x| x * by).collect();
            near(
                &format!("{name} of [{rows}, {width}]"),
                on_both!(gpu, |on| {
                    let (mut gate, up) = (on.activation(&[rows, width], &gates)?, on.activation(&[rows, width], &ups)?);
                    match name {
                        "swiglu" => on.device.swiglu(&on.stream, gate.out(), up.get())?,
                        _ => on.device.geglu(&on.stream, gate.out(), up.get())?,
                    }
                    on.read(&gate)?
                }),
            );
        }
        let (count, factor, cap) = (rows * width, rng.f32() * 90.0, [0.25, 30.0, 1e6][rng.usize(..3)]);
        for (wide, most) in [(false, OFF), (true, 1e-6)] {
            // Not from the first element on.
            let skip = rng.usize(..9).min(count);
            let both = on_both!(gpu, |on| {
                let dtype = if wide { DType::F32 } else { on.device.precision().activation };
                let mut x = on.values(dtype, &[count], &values)?;
                let (at, shape) = (x.out().ptr().offset(skip * dtype.size()), device::Shape::new(&[count - skip])?);
                // SAFETY: a part of the tensor, which outlives the kernels.
                let mut part = unsafe { device::TensorMut::from_raw(at, dtype, shape) };
                on.device.scale(&on.stream, part.borrow(), factor)?;
                let scaled = on.read(&x)?;
                if wide {
                    on.device.soft_cap(&on.stream, part, cap)?;
                }
                [scaled, on.read(&x)?]
            });
            for (i, what) in [format!("scale by {factor}"), format!("soft_cap at {cap}")].into_iter().enumerate() {
                let off = off(&both.0[i], &both.1[i]);
                assert!(off <= most, "{what} of [{count}] from {skip} on, F32 {wide}, is off by {off:.1e}");
            }
        }
        same(
            &format!("add of [{rows}, {width}]"),
            on_both!(gpu, |on| {
                let (mut x, y) =
                    (on.values(DType::F32, &[rows, width], &values)?, on.activation(&[rows, width], &ups)?);
                on.device.add(&on.stream, x.out(), y.get())?;
                on.read(&x)?
            }),
        );
        Ok(())
    });
}

#[test]
fn lookups_are_exact() {
    on_gpu(30, |gpu, rng| {
        let (vocab, width, tokens) = (length(rng, 300), length(rng, 2000), length(rng, 90));
        let (table, ids) =
            (random(rng, vocab * width), (0..tokens).map(|_| rng.u32(..vocab as u32)).collect::<Vec<_>>());
        same(
            &format!("embed of [{vocab}, {width}]"),
            on_both!(gpu, |on| {
                let (table, ids) = (on.weight(&[vocab, width], &table)?, on.tensor(&[tokens], &ids)?);
                let mut out = on.empty(DType::F32, &[tokens, width])?;
                on.device.embed(&on.stream, table.get(), ids.get(), out.out())?;
                on.read(&out)?
            }),
        );
        same(
            &format!("gather of [{vocab}, {width}]"),
            on_both!(gpu, |on| {
                let (x, ids) = (on.tensor(&[vocab, width], &table)?, on.tensor(&[tokens], &ids)?);
                let mut out = on.empty(DType::F32, &[tokens, width])?;
                on.device.gather(&on.stream, x.get(), ids.get(), out.out())?;
                on.read(&out)?
            }),
        );
        Ok(())
    });
}

#[test]
fn an_id_beyond_the_table_harms_no_other_row() {
    on_gpu(3, |gpu, rng| {
        let (vocab, width) = (length(rng, 40), length(rng, 700));
        let values = random(rng, vocab * width);
        let table = gpu.weight(&[vocab, width], &values)?;
        let ids = gpu.tensor(&[4], &[0u32, vocab as u32, u32::MAX, vocab as u32 - 1])?;
        let mut out = gpu.empty(DType::F32, &[4, width])?;
        gpu.device.embed(&gpu.stream, table.get(), ids.get(), out.out())?;
        let (rows, known) = (gpu.read(&out)?, |row: usize| values[row * width..][..width].to_vec());
        near("the first row", (rows[..width].to_vec(), known(0)));
        near("the last row", (rows[3 * width..].to_vec(), known(vocab - 1)));
        Ok(())
    });
}

#[test]
fn argmax_takes_the_first_of_equals_and_marks_a_row_with_a_nan() {
    on_gpu(40, |gpu, rng| {
        let most = [100, 5000, 160_000][rng.usize(..3)];
        let (rows, columns) = (1 + rng.usize(..6), length(rng, most));
        let levels = [3, 1000, 1 << 20][rng.usize(..3)];
        let mut values: Vec<f32> = (0..rows * columns).map(|_| rng.i32(-levels..levels) as f32).collect();
        for value in &mut values {
            match rng.u32(..20_000) {
                0 => *value = f32::NAN,
                1 => *value = f32::INFINITY,
                2..20 => *value = f32::NEG_INFINITY,
                _ => {}
            }
        }
        match rng.u8(..4) {
            // One alone, of either sign, in any place.
            0 => values[rng.usize(..rows * columns)] = [f32::NAN, -f32::NAN][rng.usize(..2)],
            1 => values[..columns].fill(f32::NEG_INFINITY),
            2 => values[..columns].fill(f32::NAN),
            _ => {}
        }
        same(
            &format!("argmax of [{rows}, {columns}]"),
            on_both!(gpu, |on| {
                let x = on.tensor(&[rows, columns], &values)?;
                let mut out = on.tensor(&[rows], &vec![7u32; rows])?;
                on.device.argmax(&on.stream, x.get(), out.out())?;
                on.read(&out)?
            }),
        );
        Ok(())
    });
}

/// A product with and without a bias, to both types.
fn linear_case(gpu: &On<Cuda>, rng: &mut fastrand::Rng, [tokens, k, n]: [usize; 3]) -> Result<()> {
    let (values, weights, biases) = (random(rng, tokens * k), random(rng, n * k), random(rng, n));
    for (bias, wide) in [(false, false), (true, false), (false, true), (true, true)] {
        near(
            &format!("linear of [{tokens}, {k}] and [{n}, {k}], bias {bias}, F32 {wide}"),
            on_both!(gpu, |on| {
                let (x, weight) = (on.activation(&[tokens, k], &values)?, on.weight(&[n, k], &weights)?);
                let with = on.weight(&[n], &biases)?;
                let to = if wide { DType::F32 } else { on.device.precision().activation };
                let mut out = on.empty(to, &[tokens, n])?;
                on.device.linear(&on.stream, x.get(), weight.get(), bias.then(|| with.get()), out.out())?;
                on.read(&out)?
            }),
        );
    }
    Ok(())
}

#[test]
fn linear_of_any_shape_with_and_without_bias_to_both_types() {
    on_gpu(40, |gpu, rng| {
        let shape = [length(rng, 300), length(rng, 900), length(rng, 900)];
        linear_case(gpu, rng, shape)
    });
    // So deep that stages take places in turn, and so wide that a block takes more rows.
    on_gpu(1, |gpu, rng| {
        [[3, 1700, 20], [2, 500, 8200]].into_iter().try_for_each(|shape| linear_case(gpu, rng, shape))
    });
}

/// Writes a batch's keys and values to a cache that is NaN wherever it must not be read, and attends.
fn attention_case(
    gpu: &On<Cuda>,
    rng: &mut fastrand::Rng,
    batch: &Batch,
    [heads, kv_heads, size]: [usize; 3],
    (window, soft_cap): (Option<usize>, Option<f32>),
) -> Result<()> {
    let tokens = batch.tokens();
    let shape = [batch.cache_pages(), kv_heads, PAGE, size];
    // Of each page how many places are known: those that a sequence had before.
    let mut known = vec![0; shape[0]];
    for (pages, (before, _)) in batch.pages.iter().zip(&batch.lengths) {
        for (page, start) in pages.iter().zip((0..).step_by(PAGE)) {
            known[*page as usize] = before.saturating_sub(start).min(PAGE);
        }
    }
    let mut caches = [0, 1].map(|_| random(rng, shape.iter().product()));
    for (page, known) in caches.iter_mut().flat_map(|cache| cache.chunks_mut(kv_heads * PAGE * size).zip(&known)) {
        page.chunks_mut(PAGE * size).for_each(|head| head[known * size..].fill(f32::NAN));
    }
    if let Some(window) = window {
        // Values that no query sees are great: one that counts would show.
        let mut seen = vec![false; shape[0] * PAGE];
        for (pages, (before, _)) in batch.pages.iter().zip(&batch.lengths) {
            for key in before.saturating_sub(window - 1)..*before {
                seen[pages[key / PAGE] as usize * PAGE + key % PAGE] = true;
            }
        }
        for (at, value) in caches[1].iter_mut().enumerate() {
            let key = at / (kv_heads * PAGE * size) * PAGE + at / size % PAGE;
            *value *= if seen[key] { 1.0 } else { 1e6 };
        }
    }
    let new = [0, 1].map(|_| random(rng, tokens * kv_heads * size));
    // Queries long enough for some keys to matter more than others, in every second head far more.
    let scale = |i: usize| if (i / size % heads).is_multiple_of(2) { 4.0 } else { 1024.0 };
    let queries: Vec<f32> =
        random(rng, tokens * heads * size).into_iter().enumerate().map(|(i, x)| x * scale(i)).collect();
    let what = format!("{batch:?}, {heads} heads, {kv_heads} key heads of {size}, window {window:?}, cap {soft_cap:?}");
    let mut written = [Vec::new(), Vec::new()];
    let both = on_both!(gpu, |on| {
        let of = batch.on(on)?;
        let [mut keys, mut values] = [on.cache(&shape, &caches[0])?, on.cache(&shape, &caches[1])?];
        for (cache, new) in [(&mut keys, &new[0]), (&mut values, &new[1])] {
            let block = on.activation(&[tokens, kv_heads, size], new)?;
            on.device.append_kv(&on.stream, block.get(), of.get(), cache.out())?;
        }
        written.swap(0, 1);
        written[1] = on.read(&keys)?;
        let q = on.activation(&[tokens, heads, size], &queries)?;
        let mut out = on.empty(on.device.precision().activation, &[tokens, heads, size])?;
        let mask = AttentionMask { scale: (size as f32).powf(-0.5), window, soft_cap };
        on.device.attention(&on.stream, q.get(), keys.get(), values.get(), of.get(), mask, out.out())?;
        on.read(&out)?
    });
    assert!(both.1.iter().all(|x| x.is_finite()), "{what}: the twin read what it must not");
    let [on_gpu, expected] = written;
    same(&format!("append_kv, {what}"), (on_gpu, expected));
    near(&format!("attention, {what}"), both);
    Ok(())
}

/// Sequences of any lengths, some without a new token.
fn random_batch(rng: &mut fastrand::Rng, sequences: usize, before: usize, new: usize) -> Batch {
    let mut lengths: Vec<_> = (0..sequences)
        .map(|_| (rng.usize(..=before), if rng.u8(..5) == 0 { 0 } else { 1 + rng.usize(..new) }))
        .collect();
    lengths[sequences - 1].1 = lengths[sequences - 1].1.max(1);
    Batch::scattered(lengths, rng)
}

#[test]
fn attention_is_causal_grouped_windowed_capped_and_ragged_for_every_head_size() {
    on_gpu(4, |gpu, rng| {
        for size in [32, 64, 96, 128, 256] {
            for (sequences, before, new) in
                [(1, 0, 1), (1, 700, 1), (5, 300, 1), (3, 60, 12), (4, 200, 130), (1, 0, 300)]
            {
                let kv_heads = 1 + rng.usize(..4);
                let heads = kv_heads * (1 + rng.usize(..8));
                let window = [None, None, Some(1), Some(1 + rng.usize(..100)), Some(5000)][rng.usize(..5)];
                // Next to caps of models, one that scores reach in every head, and one that none does.
                let cap = [None, None, Some(50.0), Some(1.0), Some(1e4)][rng.usize(..5)];
                let batch = random_batch(rng, sequences, before, new);
                attention_case(gpu, rng, &batch, [heads, kv_heads, size], (window, cap))?;
            }
        }
        Ok(())
    });
}

#[test]
fn attention_at_the_edges_of_tables_tiles_and_parts() {
    on_gpu(2, |gpu, rng| {
        // Tables that fill what is allocated for them: nobody may look beyond.
        let many = Batch { width: 1, ..random_batch(rng, 63, 20, 1) };
        attention_case(gpu, rng, &many, [2, 1, 32], (None, None))?;
        // As many parts as there is room for, beside those of a head whose scores are far greater.
        let batch = Batch::scattered(vec![(820, 1)], rng);
        attention_case(gpu, rng, &batch, [2, 1, 64], (None, None))?;
        // Tiles that end a few tokens before or behind the end of a part.
        for (before, new) in [(150, 100), (100, 200), (60, 200), (200, 60)] {
            let batch = Batch::scattered(vec![(2000, 0), (before, new)], rng);
            let size = [32, 64, 96, 128, 256][rng.usize(..5)];
            attention_case(gpu, rng, &batch, [1, 1, size], (None, None))?;
        }
        // Windows that begin where a tile of keys does, or next to it.
        for window in [63, 64, 65, 78, 79, 80, 95, 111, 127, 128, 129] {
            for lengths in [(64, 60), (window + 64, 1)] {
                let batch = Batch::scattered(vec![lengths], rng);
                attention_case(gpu, rng, &batch, [2, 1, 64], (Some(window), None))?;
            }
        }
        // Lengths around a tile.
        for new in [1, 8, 9, 15, 16, 17, 63, 64, 65] {
            let batch = Batch::scattered(vec![(new / 2, new), (127, 1)], rng);
            let size = [32, 64, 96, 128, 256][rng.usize(..5)];
            attention_case(gpu, rng, &batch, [17, 1, size], (None, None))?;
        }
        // A cap, of few tokens and of many, at every head size: masked scores stay masked.
        for size in [32, 64, 96, 128, 256] {
            for new in [1, 40, 150] {
                let batch = Batch::scattered(vec![(30, new)], rng);
                attention_case(gpu, rng, &batch, [2, 1, size], (Some(33), Some(2.0)))?;
            }
        }
        Ok(())
    });
}

#[test]
fn attention_over_long_contexts_and_more_heads_to_a_group_than_a_tile_has() {
    on_gpu(1, |gpu, rng| {
        for (lengths, shape) in [
            (vec![(131_071, 1)], [4, 1, 64]),
            (vec![(40_000, 1), (10, 1), (0, 1)], [28, 4, 128]),
            (vec![(30_000, 40)], [4, 2, 128]),
            (vec![(100, 1), (7, 3)], [40, 1, 64]),
            (vec![(0, 2000)], [2, 1, 128]),
        ] {
            let batch = Batch::scattered(lengths, rng);
            attention_case(gpu, rng, &batch, shape, (None, None))?;
        }
        Ok(())
    });
}

#[test]
fn matrices_that_several_tensors_make_are_what_the_cpu_makes_of_them_to_the_bit_in_every_tier() {
    on_gpu(1, |gpu, rng| {
        common::check_matrices(&gpu.device, rng);
        common::check_formats(&gpu.device);
        Ok(())
    });
}

#[test]
fn a_matrix_of_blocks_is_refused_before_the_first_pass() {
    on_gpu(1, |gpu, _| {
        let checkpoint = Checkpoint::open(support::data("quantised"))?;
        let open = |to| {
            let units = [common::unit_of_formats(&checkpoint, to)];
            LayerStreamer::new(&gpu.device, &checkpoint, &units, &Settings::default()).map(drop)
        };
        let refused = open(None).unwrap_err().to_string();
        assert!(["formats", "U4_128", "BF16 or F32"].iter().all(|word| refused.contains(word)), "{refused}");
        open(Some(DType::BF16))
    });
}

#[test]
fn nothing_to_do_is_done_without_a_launch() {
    on_gpu(1, |on, _| {
        let none = |dtype, shape: &[usize]| on.empty(dtype, shape);
        let (mut x, y) = (none(DType::F32, &[0, 64])?, none(DType::BF16, &[0, 64])?);
        let (weight, mut out) = (on.weight(&[64], &[1.0; 64])?, none(DType::BF16, &[0, 64])?);
        let ids = none(DType::U32, &[0])?;
        on.device.add_rms_norm(&on.stream, x.out(), y.get(), weight.get(), 0.0, 1e-6, out.out())?;
        on.device.rms_norm(&on.stream, x.get(), weight.get(), 0.0, 1e-6, out.out())?;
        on.device.rms_norm_in_place(&on.stream, x.out(), weight.get(), 0.0, 1e-6)?;
        on.device.swiglu(&on.stream, out.out(), y.get())?;
        on.device.geglu(&on.stream, out.out(), y.get())?;
        on.device.scale(&on.stream, out.out(), 2.0)?;
        on.device.scale(&on.stream, x.out(), 2.0)?;
        on.device.soft_cap(&on.stream, x.out(), 30.0)?;
        on.device.cast(&on.stream, y.get(), x.out())?;
        let table = on.weight(&[1, 64], &[0.0; 64])?;
        on.device.embed(&on.stream, table.get(), ids.get(), x.out())?;
        on.device.linear(&on.stream, y.get(), table.get(), None, none(DType::BF16, &[0, 1])?.out())?;
        // A product over nothing is the bias.
        let (wide, narrow) = (none(DType::BF16, &[2, 0])?, none(DType::BF16, &[3, 0])?);
        let bias = on.weight(&[3], &[1.0, 2.0, 3.0])?;
        for to in [DType::BF16, DType::F32] {
            let mut out = on.empty(to, &[2, 3])?;
            on.device.linear(&on.stream, wide.get(), narrow.get(), Some(bias.get()), out.out())?;
            assert_eq!(on.read(&out)?, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        }
        Ok(())
    });
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    on_gpu(1, |on, _| {
        let zeros = |shape: &[usize]| on.tensor(shape, &vec![bf16::ZERO; shape.iter().product()]);
        let (x, weight, mut out) = (zeros(&[2, 8])?, zeros(&[4, 8])?, zeros(&[2, 4])?);
        let unprepared = device::Device::stream(&on.device)?;
        let refused = on.device.linear(&unprepared, x.get(), weight.get(), None, out.out()).unwrap_err();
        assert!(matches!(refused, Error::Kernel { kernel: "linear", .. }) && refused.to_string().contains("prepare"));
        let floats = on.tensor(&[2, 8], &[0.0f32; 16])?;
        let refused = on.device.linear(&on.stream, floats.get(), weight.get(), None, out.out()).unwrap_err();
        assert!(refused.to_string().contains("F32"), "{refused}");
        let batch = Batch::new(vec![(0, 2)], 0).on(on)?;
        let (q, cache, mut mixed) = (zeros(&[2, 1, 80])?, zeros(&[1, 1, PAGE, 80])?, zeros(&[2, 1, 80])?);
        let mask = AttentionMask { scale: 1.0, window: None, soft_cap: None };
        let (keys, values) = (cache.get(), cache.get());
        let refused =
            on.device.attention(&on.stream, q.get(), keys, values, batch.get(), mask, mixed.out()).unwrap_err();
        assert!(refused.to_string().contains("heads of 80"), "{refused}");
        let (q, cache, mut mixed) = (zeros(&[2, 1, 64])?, zeros(&[1, 1, PAGE, 64])?, zeros(&[2, 1, 64])?);
        for cap in [1e-5, 2e4] {
            let (keys, values, mask) = (cache.get(), cache.get(), AttentionMask { soft_cap: Some(cap), ..mask });
            let refused =
                on.device.attention(&on.stream, q.get(), keys, values, batch.get(), mask, mixed.out()).unwrap_err();
            let said = format!("a soft cap of {cap} on a GPU, which computes those from 0.0001 to 10000;");
            assert!(refused.to_string().contains(&said), "{refused}");
        }
        Ok(())
    });
}
