//! The CPU kernels against plain f64 arithmetic written from the papers' formulas, on fresh random data.

use std::f64::consts::PI;

use half::{bf16, f16};
use layer_streamer::{
    DType, Element, Error,
    device::{Cpu, CpuMemory, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::{AttentionMask, Kernels, PAGE, Ragged, RopeLayout},
};

/// A tensor in memory of its own, filled from host values.
struct Tensor {
    _memory: CpuMemory,
    ptr: DevicePtr,
    dtype: DType,
    shape: Vec<usize>,
}

impl Tensor {
    fn new<T: Element>(shape: &[usize], values: &[T]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let memory = Cpu.allocate("a test", size_of_val(values).max(1)).unwrap();
        let tensor = Self { ptr: Cpu.address(&memory), _memory: memory, dtype: T::DTYPE, shape: shape.to_vec() };
        let stream = Cpu.stream().unwrap();
        // SAFETY: the memory is as long as the values.
        unsafe { Cpu.copy_to_device(tensor.ptr, values.as_ptr().cast(), size_of_val(values), &stream).unwrap() };
        tensor
    }

    fn zeros(shape: &[usize]) -> Self {
        Self::new(shape, &vec![f32::NAN; shape.iter().product()])
    }

    fn get(&self) -> TensorRef<'_, Cpu> {
        // SAFETY: the memory holds the tensor and lives as long as self.
        unsafe { TensorRef::from_raw(self.ptr, self.dtype, Shape::new(&self.shape).unwrap()) }
    }

    fn out(&mut self) -> TensorMut<'_, Cpu> {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { TensorMut::from_raw(self.ptr, self.dtype, Shape::new(&self.shape).unwrap()) }
    }

    fn values<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE);
        let count = self.shape.iter().product();
        // SAFETY: the memory holds that many elements of the type just checked.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast::<T>(), count) }.to_vec()
    }
}

struct Random(fastrand::Rng);

impl Random {
    fn new() -> Self {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        Self(fastrand::Rng::with_seed(seed))
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.0.f32() * 2.0 - 1.0).collect()
    }

    fn tensor(&mut self, shape: &[usize]) -> (Tensor, Vec<f64>) {
        let values = self.floats(shape.iter().product());
        (Tensor::new(shape, &values), values.iter().map(|&x| x.into()).collect())
    }

    /// A weight of one of the three types, with the values it holds after rounding.
    fn weight(&mut self, shape: &[usize]) -> (Tensor, Vec<f64>) {
        let values = self.floats(shape.iter().product());
        match self.0.u8(..3) {
            0 => (Tensor::new(shape, &values), values.iter().map(|&x| x.into()).collect()),
            1 => {
                let rounded: Vec<_> = values.iter().map(|&x| f16::from_f32(x)).collect();
                (Tensor::new(shape, &rounded), rounded.iter().map(|x| x.to_f64()).collect())
            }
            _ => {
                let rounded: Vec<_> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                (Tensor::new(shape, &rounded), rounded.iter().map(|x| x.to_f64()).collect())
            }
        }
    }
}

fn close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let off = (f64::from(got) - expected).abs();
        assert!(off <= tolerance * expected.abs().max(1.0), "{what}[{i}] is {got}, expected {expected}");
    }
}

#[test]
fn linear_multiplies_every_shape_and_type_with_and_without_bias() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    for (tokens, k, n) in
        [(1, 1, 1), (1, 640, 384), (3, 17, 5), (15, 96, 33), (16, 300, 70), (40, 1100, 129), (0, 8, 8)]
    {
        for _ in 0..4 {
            let ((x, xs), (w, ws), (b, bs)) =
                (random.tensor(&[tokens, k]), random.weight(&[n, k]), random.weight(&[n]));
            for bias in [false, true] {
                let mut out = Tensor::zeros(&[tokens, n]);
                Cpu.linear(&stream, x.get(), w.get(), bias.then(|| b.get()), out.out()).unwrap();
                let cell = |t: usize, j: usize| {
                    (0..k).map(|i| xs[t * k + i] * ws[j * k + i]).sum::<f64>() + if bias { bs[j] } else { 0.0 }
                };
                let expected: Vec<_> = (0..tokens * n).map(|at| cell(at / n, at % n)).collect();
                close("linear", &out.values(), &expected, 1e-5 * (k as f64).sqrt().max(4.0));
            }
        }
    }
}

#[test]
fn norms_gates_add_and_lookups_follow_their_formulas() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    for (tokens, width, offset) in [(1, 2, 0.0), (5, 36, 1.0), (70, 1030, -0.25), (3, 8192, 1.0)] {
        let ((mut x, xs), (w, ws)) = (random.tensor(&[tokens, width]), random.weight(&[width]));
        let expected: Vec<f64> = (0..tokens * width)
            .map(|at| {
                let row = &xs[at / width * width..][..width];
                let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
                xs[at] / (mean + 1e-5).sqrt() * (f64::from(offset) + ws[at % width])
            })
            .collect();
        let mut out = Tensor::zeros(&[tokens, width]);
        Cpu.rms_norm(&stream, x.get(), w.get(), offset, 1e-5, out.out()).unwrap();
        close("rms_norm", &out.values(), &expected, 1e-5);
        let (halves, mut out) = (x.values::<f32>().iter().map(|x| x / 2.0).collect::<Vec<_>>(), out);
        let (mut half, y) = (Tensor::new(&[tokens, width], &halves), Tensor::new(&[tokens, width], &halves));
        Cpu.add_rms_norm(&stream, half.out(), y.get(), w.get(), offset, 1e-5, out.out()).unwrap();
        close("add_rms_norm", &out.values(), &expected, 1e-5);
        Cpu.rms_norm_in_place(&stream, x.out(), w.get(), offset, 1e-5).unwrap();
        close("rms_norm in place", &x.values(), &expected, 1e-5);

        let ((mut gate, gates), (up, ups)) = (random.tensor(&[tokens, width]), random.tensor(&[tokens, width]));
        Cpu.swiglu(&stream, gate.out(), up.get()).unwrap();
        let expected: Vec<_> = gates.iter().zip(&ups).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        close("swiglu", &gate.values(), &expected, 1e-6);
        let gates: Vec<_> = gates.iter().map(|g| (g * 6.0) as f32).collect();
        let mut gate = Tensor::new(&[tokens, width], &gates);
        Cpu.geglu(&stream, gate.out(), up.get()).unwrap();
        let gelu = |x: f64| x / 2.0 * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        let expected: Vec<_> = gates.iter().zip(&ups).map(|(&g, u)| gelu(g.into()) * u).collect();
        close("geglu", &gate.values(), &expected, 1e-6);

        let ((mut sum, sums), (y, ys)) = (random.tensor(&[tokens, width]), random.tensor(&[tokens, width]));
        Cpu.add(&stream, sum.out(), y.get()).unwrap();
        close("add", &sum.values(), &sums.iter().zip(&ys).map(|(a, b)| a + b).collect::<Vec<_>>(), 1e-6);

        let (table, rows) = random.weight(&[9, width]);
        let ids: Vec<u32> = (0..tokens).map(|_| random.0.u32(..9)).collect();
        let mut out = Tensor::zeros(&[tokens, width]);
        Cpu.embed(&stream, table.get(), Tensor::new(&[tokens], &ids).get(), out.out()).unwrap();
        let expected: Vec<f64> = ids.iter().flat_map(|&id| rows[id as usize * width..][..width].to_vec()).collect();
        close("embed", &out.values(), &expected, 0.0);
    }
    let x = Tensor::new(&[3, 4], &[1.0f32, 5.0, 5.0, 2.0, -4.0, -3.0, -9.0, -3.0, 0.0, 0.0, 0.0, 0.0]);
    let mut best = Tensor::new(&[3], &[9u32; 3]);
    Cpu.argmax(&stream, x.get(), best.out()).unwrap();
    assert_eq!(best.values::<u32>(), [1, 1, 0], "the first of equals");
}

#[test]
fn argmax_takes_the_first_of_the_greatest_of_any_row_and_marks_a_row_with_a_nan() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    for width in [1, 15, 16, 129, 4096, 4097, 70_000, 300_001] {
        // Rows with a few equal ones that are the greatest, with NaN, with +∞, and all -∞.
        let mut rows = random.floats(4 * width);
        for (row, values) in rows.chunks_mut(width).enumerate() {
            for _ in 0..4 {
                values[random.0.usize(..width)] = if row == 1 { f32::NAN } else { 2.0 };
            }
            match row {
                2 => values[random.0.usize(..width)] = f32::INFINITY,
                3 => values.fill(f32::NEG_INFINITY),
                _ => {}
            }
        }
        let better = |row: &[f32]| (0..width).reduce(|best, at| if row[at] > row[best] { at } else { best });
        let index = |row: &[f32]| if row.iter().any(|x| x.is_nan()) { u32::MAX } else { better(row).unwrap() as u32 };
        let expected: Vec<u32> = rows.chunks(width).map(index).collect();
        let mut best = Tensor::new(&[4], &[9u32; 4]);
        Cpu.argmax(&stream, Tensor::new(&[4, width], &rows).get(), best.out()).unwrap();
        assert_eq!(best.values::<u32>(), expected, "{width}");
    }
}

#[test]
fn rope_turns_the_pairs_that_have_a_frequency_scales_them_and_passes_the_others_on() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    for (tokens, heads, size, half) in
        [(1, 3, 2, 1), (5, 2, 36, 18), (70, 3, 1030, 515), (5, 3, 36, 9), (9, 1, 7, 3), (2, 4, 10, 1), (3, 2, 6, 0)]
    {
        let positions: Vec<u32> = (0..tokens).map(|_| random.0.u32(..5000)).collect();
        let frequencies = random.floats(half);
        let (p, f) = (Tensor::new(&[tokens], &positions), Tensor::new(&[half], &frequencies));
        let layouts = [RopeLayout::Halves, RopeLayout::Interleaved, RopeLayout::ToHalves];
        for (layout, scale) in layouts.into_iter().flat_map(|layout| [(layout, 1.0), (layout, 1.25)]) {
            let (x, values) = random.tensor(&[tokens, heads, size]);
            let mut expected = values.clone();
            let mut out = Tensor::zeros(&[tokens, heads, size]);
            Cpu.rope(&stream, x.get(), p.get(), f.get(), scale, layout, out.out()).unwrap();
            for (head, (values, expected)) in values.chunks(size).zip(expected.chunks_mut(size)).enumerate() {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = f64::from(positions[head / heads] as f32 * frequency).sin_cos();
                    let (halves, pairs) = ([i, i + half], [2 * i, 2 * i + 1]);
                    let (from, to) = match layout {
                        RopeLayout::Halves => (halves, halves),
                        RopeLayout::Interleaved => (pairs, pairs),
                        RopeLayout::ToHalves => (pairs, halves),
                    };
                    let [a, b] = from.map(|at| values[at] * f64::from(scale));
                    (expected[to[0]], expected[to[1]]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            close("rope", &out.values(), &expected, 1e-5);
        }
    }
}

#[test]
fn a_factor_and_a_soft_cap_change_every_element_in_place() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    for count in [1, 37, 4096, 20_011] {
        let (mut x, xs) = random.tensor(&[1, count]);
        Cpu.scale(&stream, x.out(), 48.5).unwrap();
        close("scale", &x.values(), &xs.iter().map(|x| x * 48.5).collect::<Vec<_>>(), 1e-6);
        // What is above the cap, far below it, and in between.
        for cap in [0.5, 30.0, 1e9] {
            let mut capped = Tensor::new(&[1, count], &x.values::<f32>());
            Cpu.soft_cap(&stream, capped.out(), cap).unwrap();
            let cap = f64::from(cap);
            let expected: Vec<_> = x.values::<f32>().iter().map(|&x| cap * (f64::from(x) / cap).tanh()).collect();
            close("soft_cap", &capped.values(), &expected, 1e-6);
        }
    }
    let mut x = Tensor::zeros(&[4]);
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let refused = Cpu.soft_cap(&stream, x.out(), cap).unwrap_err().to_string();
        assert_eq!(refused, format!("soft_cap: a cap of {cap}, expected a number above 0"));
    }
}

#[test]
fn cast_converts_between_the_float_types() {
    let stream = Cpu.stream().unwrap();
    let source = [1.0f32, -0.5, 3.140625, 65504.0];
    let halves = source.map(f16::from_f32);
    let mut narrow = Tensor::new(&[4], &[bf16::ZERO; 4]);
    Cpu.cast(&stream, Tensor::new(&[4], &source).get(), narrow.out()).unwrap();
    assert_eq!(narrow.values::<bf16>(), source.map(bf16::from_f32));
    let mut wide = Tensor::zeros(&[4]);
    Cpu.cast(&stream, Tensor::new(&[4], &halves).get(), wide.out()).unwrap();
    assert_eq!(wide.values::<f32>(), halves.map(f16::to_f32));
    // As many as several threads share.
    let many: Vec<f32> = (0..200_003).map(|at| at as f32 / 7.0).collect();
    let mut narrow = Tensor::new(&[many.len()], &vec![bf16::ZERO; many.len()]);
    Cpu.cast(&stream, Tensor::new(&[many.len()], &many).get(), narrow.out()).unwrap();
    assert!(narrow.values::<bf16>().into_iter().eq(many.into_iter().map(bf16::from_f32)));
    let refused = Cpu.cast(&stream, Tensor::new(&[4], &[0u32; 4]).get(), wide.out()).unwrap_err();
    assert!(matches!(refused, Error::Kernel { kernel: "cast", .. }), "{refused}");
}

/// A batch of sequences with these (cached before, new) lengths; attention reads only what it may.
fn attention_case(
    random: &mut Random,
    lengths: &[(usize, usize)],
    (heads, kv_heads, size): (usize, usize, usize),
    (window, soft_cap): (Option<usize>, Option<f32>),
) {
    let stream = Cpu.stream().unwrap();
    let tokens: usize = lengths.iter().map(|(_, new)| new).sum();
    let mut offsets = vec![0u32];
    lengths.iter().for_each(|(_, new)| offsets.push(offsets.last().unwrap() + *new as u32));
    let kv_lens: Vec<u32> = lengths.iter().map(|(before, new)| (before + new) as u32).collect();
    // Pages in any order, and one that is nobody's.
    let width = kv_lens.iter().max().unwrap().div_ceil(PAGE as u32) as usize + 1;
    let mut numbers: Vec<u32> = (0..=(lengths.len() * width) as u32).collect();
    random.0.shuffle(&mut numbers);
    let pages = &numbers[1..];
    let of = |values: &[u32]| Tensor::new(&[values.len()], values);
    let (q_offsets, lens, table) = (of(&offsets), of(&kv_lens), Tensor::new(&[lengths.len(), width], pages));
    let batch = Ragged { q_offsets: q_offsets.get(), kv_lens: lens.get(), pages: table.get() };
    // Where a place of a sequence lies, in the cache of a head.
    let at = |s: usize, head: usize, place: usize| {
        ((pages[s * width + place / PAGE] as usize * kv_heads + head) * PAGE + place % PAGE) * size
    };

    // What is cached already is random; what is not yet is NaN, which would spread to any sum that includes it.
    let shape = [numbers.len(), kv_heads, PAGE, size];
    let mut caches = [0, 1].map(|_| {
        let mut values = vec![f32::NAN; shape.iter().product()];
        for (s, &(before, _)) in lengths.iter().enumerate() {
            for (head, place) in (0..kv_heads).flat_map(|head| (0..before).map(move |place| (head, place))) {
                values[at(s, head, place)..][..size].copy_from_slice(&random.floats(size));
            }
        }
        Tensor::new(&shape, &values)
    });
    let new = [random.floats(tokens * kv_heads * size), random.floats(tokens * kv_heads * size)];
    for (cache, new) in caches.iter_mut().zip(&new) {
        Cpu.append_kv(&stream, Tensor::new(&[tokens, kv_heads, size], new).get(), batch, cache.out()).unwrap();
    }
    let (q, qs) = random.tensor(&[tokens, heads, size]);
    let mut out = Tensor::zeros(&[tokens, heads, size]);
    let mask = AttentionMask { scale: 0.3, window, soft_cap };
    Cpu.attention(&stream, q.get(), caches[0].get(), caches[1].get(), batch, mask, out.out()).unwrap();

    let [keys, values] = caches.map(|cache| cache.values::<f32>());
    let mut expected = Vec::new();
    for (s, &(before, new)) in lengths.iter().enumerate() {
        for t in 0..new {
            for head in 0..heads {
                let end = before + t + 1;
                let start = window.map_or(0, |w| end.saturating_sub(w));
                let at = |place: usize| at(s, head / (heads / kv_heads), place);
                let query = &qs[((offsets[s] as usize + t) * heads + head) * size..][..size];
                let score = |place| {
                    let score = (0..size).map(|i| query[i] * f64::from(keys[at(place) + i])).sum::<f64>() * 0.3;
                    soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let weights: Vec<f64> = (start..end).map(|place| score(place).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..size {
                    let mixed: f64 = (start..end).zip(&weights).map(|(p, w)| w * f64::from(values[at(p) + i])).sum();
                    expected.push(mixed / sum);
                }
            }
        }
    }
    close("attention", &out.values(), &expected, 1e-5);
}

#[test]
fn attention_is_causal_grouped_windowed_capped_and_ragged() {
    let mut random = Random::new();
    for heads in [(1, 1, 2), (4, 2, 64), (6, 2, 5), (7, 7, 33), (14, 2, 128)] {
        for mask in [
            (None, None),
            (Some(1), None),
            (Some(4), None),
            (Some(1000), None),
            (None, Some(0.5)),
            (Some(4), Some(2.0)),
        ] {
            for lengths in [
                &[(0, 1)][..],
                &[(0, 9)],
                &[(30, 1), (0, 1), (7, 1)],
                &[(5, 4), (0, 11), (2, 0), (64, 3), (600, 2), (190, 70)],
            ] {
                attention_case(&mut random, lengths, heads, mask);
            }
        }
    }
}

#[test]
fn tensors_that_do_not_fit_together_are_refused_by_name() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    let ((x, _), (w, _), mut out) = (random.tensor(&[2, 8]), random.tensor(&[4, 9]), Tensor::zeros(&[2, 4]));
    let refused = Cpu.linear(&stream, x.get(), w.get(), None, out.out()).unwrap_err().to_string();
    assert!(refused.contains("linear") && refused.contains("[2, 8]") && refused.contains("[4, 9]"), "{refused}");
    assert!(Cpu.rms_norm(&stream, x.get(), w.get(), 0.0, 1e-5, out.out()).is_err());
    assert!(Cpu.add(&stream, out.out(), x.get()).is_err());
    let (q, (cache, _)) = (Tensor::zeros(&[1, 2, 4]), random.tensor(&[3, 2, PAGE, 4]));
    let mut out = Tensor::zeros(&[1, 2, 4]);
    let of = |values: &[u32]| Tensor::new(&[values.len()], values);
    let mask = AttentionMask { scale: 1.0, window: None, soft_cap: None };
    for (offsets, lens, pages, part) in [
        (vec![0, 2], vec![1], [0, 1], "offsets"),
        (vec![0, 1], vec![129], [0, 1], "129 in the cache do not fit 2 pages of 64"),
        (vec![0, 1], vec![0], [0, 1], "do not fit"),
        (vec![0, 1], vec![1], [3, 1], "page 3 of a cache of 3 pages"),
        (vec![0, 1], vec![65], [1, u32::MAX], "page 4294967295 of a cache of 3 pages"),
    ] {
        let (offsets, lens, pages) = (of(&offsets), of(&lens), Tensor::new(&[1, 2], &pages));
        let batch = Ragged { q_offsets: offsets.get(), kv_lens: lens.get(), pages: pages.get() };
        let refused = Cpu.attention(&stream, q.get(), cache.get(), cache.get(), batch, mask, out.out()).unwrap_err();
        assert!(refused.to_string().contains(part), "{refused}");
        let (new, mut cache) = (Tensor::zeros(&[1, 2, 4]), random.tensor(&[3, 2, PAGE, 4]).0);
        let refused = Cpu.append_kv(&stream, new.get(), batch, cache.out()).unwrap_err();
        assert!(refused.to_string().contains(part), "{refused}");
    }
    let (offsets, one, page) = (of(&[0, 1]), of(&[1]), Tensor::new(&[1, 1], &[0u32]));
    let batch = Ragged { q_offsets: offsets.get(), kv_lens: one.get(), pages: page.get() };
    let short = random.tensor(&[3, 2, PAGE - 1, 4]).0;
    let refused = Cpu.attention(&stream, q.get(), short.get(), short.get(), batch, mask, out.out()).unwrap_err();
    assert_eq!(refused.to_string(), "attention: the cache is [3, 2, 63, 4], expected pages of 64 tokens");
    for cap in [0.0, -50.0, f32::NAN, f32::INFINITY] {
        let mask = AttentionMask { scale: 1.0, window: None, soft_cap: Some(cap) };
        let refused = Cpu.attention(&stream, q.get(), cache.get(), cache.get(), batch, mask, out.out()).unwrap_err();
        assert_eq!(refused.to_string(), format!("attention: a soft cap of {cap}, expected a number above 0"));
    }
}

#[test]
fn a_refusal_says_which_tensor_is_what_and_what_was_expected() {
    let (stream, mut random) = (Cpu.stream().unwrap(), Random::new());
    let mut of = |shape: &[usize]| random.tensor(shape).0;
    let (x, y, w, p) = (of(&[2, 8]), of(&[3, 8]), of(&[9]), Tensor::new(&[2], &[0u32; 2]));
    let (heads, f, mut out) = (of(&[2, 1, 8]), of(&[5]), of(&[2, 8]));
    let refused = |result: Result<(), Error>, message: &str| assert_eq!(result.unwrap_err().to_string(), message);
    refused(
        Cpu.rms_norm(&stream, x.get(), w.get(), 0.0, 1e-5, out.out()),
        "rms_norm: weight is F32 [9], expected F32 [8] beside x [2, 8]",
    );
    refused(
        Cpu.swiglu(&stream, out.out(), y.get()),
        "swiglu: up is F32 [3, 8], expected F32 [2, 8] beside gate [2, 8]",
    );
    refused(
        Cpu.rope(&stream, x.get(), p.get(), f.get(), 1.0, RopeLayout::Halves, out.out()),
        "rope: x is F32 [2, 8], expected F32 [T, heads, D]",
    );
    refused(
        Cpu.rope(&stream, heads.get(), p.get(), f.get(), 1.0, RopeLayout::Halves, of(&[2, 1, 8]).out()),
        "rope: 5 frequencies for heads of 8",
    );
    refused(Cpu.gather(&stream, x.get(), f.get(), out.out()), "gather: indices is F32 [5], expected U32 [5]");
    refused(
        Cpu.linear(&stream, x.get(), p.get(), None, out.out()),
        "linear: weights of type U32; convert them on arrival",
    );
    let scalar = of(&[]);
    refused(
        Cpu.rms_norm(&stream, scalar.get(), w.get(), 0.0, 1e-5, out.out()),
        "rms_norm: x is F32 [], expected F32 [.., H]",
    );
}

/// Memory that is said to hold a tensor of blocks.
fn blocks(dtype: DType, shape: &[usize]) -> Tensor {
    Tensor { dtype, shape: shape.to_vec(), ..Tensor::new(&[512], &[0u8; 512]) }
}

#[test]
fn blocks_are_weights_of_products_alone_and_in_whole_rows() {
    let stream = Cpu.stream().unwrap();
    let (x, half, mut out) = (Tensor::zeros(&[1, 32]), Tensor::zeros(&[1, 16]), Tensor::zeros(&[1, 32]));
    let (norm, weight, bias) = (blocks(DType::Q8_0, &[32]), blocks(DType::Q8_0, &[32, 32]), blocks(DType::Q8_0, &[1]));
    let said = |result: Result<(), Error>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error} lacks {part}");
    };
    said(Cpu.rms_norm(&stream, x.get(), norm.get(), 0.0, 1e-5, out.out()), "weights of type Q8_0");
    said(Cpu.linear(&stream, x.get(), weight.get(), Some(norm.get()), out.out()), "weights of type Q8_0");
    said(
        Cpu.linear(&stream, x.get(), weight.get(), Some(bias.get()), out.out()),
        "bias is Q8_0 [1]: its rows are no whole blocks",
    );
    let short = blocks(DType::Q4_0, &[32, 16]);
    said(
        Cpu.linear(&stream, half.get(), short.get(), None, out.out()),
        "weight is Q4_0 [32, 16]: its rows are no whole blocks",
    );
    Cpu.linear(&stream, x.get(), weight.get(), None, out.out()).unwrap();
}
