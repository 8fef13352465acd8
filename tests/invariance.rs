//! The promise that a sequence's logits are the same bits alone and in any company: whatever other sequences a pass has, however
//! prompts are cut, wherever layers, embedding and head are kept.

mod common;

use std::collections::VecDeque;

use common::BLOCKS;
use layer_streamer::{
    DType, Error, Settings,
    device::{Cpu, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::Kernels,
    model::{Decoder, Model, Sequence, Tables},
    plan::Tier,
};
use support::{cases, data};

const CONTEXT: usize = 720;

/// A model of the tests, for longer contexts than it was made for.
fn model(name: &str) -> Model {
    let mut model = Model::open(data(name)).unwrap();
    model.config.max_positions = CONTEXT;
    model
}

/// A prompt, and how many tokens come after it.
struct Request {
    prompt: Vec<u32>,
    more: usize,
    /// The pass in which it comes.
    arrives: usize,
}

impl Request {
    /// With more short prompts than long ones, of `longest` tokens at most.
    fn drawn(rng: &mut fastrand::Rng, longest: usize, vocabulary: u32) -> Self {
        let length = (longest as f64).powf(rng.f64()).round() as usize;
        let prompt = (0..length.max(1)).map(|_| rng.u32(3..vocabulary)).collect();
        Self { prompt, more: rng.usize(0..4), arrives: rng.usize(0..8) }
    }
}

/// The bits of a sequence's logits: after its prompt, and after each of its further tokens.
type Answer = Vec<Vec<u32>>;

fn most_likely(logits: &[u32]) -> u32 {
    let value = |at: usize| f32::from_bits(logits[at]);
    (0..logits.len()).reduce(|best, at| if value(at) > value(best) { at } else { best }).unwrap() as u32
}

fn last_logits<D: Kernels>(decoder: &mut Decoder<D>) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    let told = decoder.last_logits(|row| {
        rows.push(row.iter().map(|logit| logit.to_bits()).collect());
        Ok::<_, Error>(())
    });
    told.unwrap();
    rows
}

fn alone<D: Kernels>(device: &D, model: &Model, request: &Request) -> Answer {
    let mut decoder = Decoder::new(device, model, &Settings::default(), 1, CONTEXT).unwrap();
    let (mut answer, mut tokens) = (Answer::new(), request.prompt.clone());
    while answer.len() <= request.more {
        decoder.forward(&[Sequence { row: 0, tokens: &tokens }]).unwrap();
        answer.append(&mut last_logits(&mut decoder));
        tokens = vec![most_likely(answer.last().unwrap())];
    }
    answer
}

/// A sequence on its way.
struct Going {
    request: usize,
    row: usize,
    /// Tokens of the prompt that are still to come, or the one that was chosen.
    left: VecDeque<u32>,
}

/// All requests in the rows of one decoder, each pass with any of those that have come, in any order, and any of their tokens.
fn together<D: Kernels>(
    device: &D,
    model: &Model,
    settings: &Settings,
    rows: usize,
    requests: &[Request],
    rng: &mut fastrand::Rng,
) -> Vec<Answer> {
    let mut decoder = Decoder::new(device, model, settings, rows, CONTEXT).unwrap();
    let mut answers: Vec<Answer> = requests.iter().map(|_| Answer::new()).collect();
    let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
    let (mut free, mut going): (Vec<usize>, Vec<Going>) = ((0..rows).collect(), Vec::new());
    for pass in 0.. {
        while let (Some(&request), Some(&row)) = (waiting.front(), free.last()) {
            if requests[request].arrives > pass && !going.is_empty() {
                break;
            }
            decoder.truncate(row, 0).unwrap();
            going.push(Going { request, row, left: requests[request].prompt.iter().copied().collect() });
            waiting.pop_front();
            free.pop();
        }
        if going.is_empty() {
            return answers;
        }
        rng.shuffle(&mut going);
        // Some sit a pass out.
        let taking = rng.usize(1..=going.len());
        let pieces: Vec<Vec<u32>> = going[..taking]
            .iter_mut()
            .map(|going| {
                let whole = rng.bool();
                let count = if whole { going.left.len() } else { rng.usize(1..=going.left.len()) };
                going.left.drain(..count).collect()
            })
            .collect();
        let batch: Vec<_> =
            going.iter().zip(&pieces).map(|(going, tokens)| Sequence { row: going.row, tokens }).collect();
        decoder.forward(&batch).unwrap();
        for (going, logits) in going.iter_mut().zip(last_logits(&mut decoder)) {
            if going.left.is_empty() {
                going.left.push_back(most_likely(&logits));
                answers[going.request].push(logits);
            }
        }
        going.retain(|going| {
            let ended = answers[going.request].len() > requests[going.request].more;
            free.extend(ended.then_some(going.row));
            !ended
        });
    }
    unreachable!()
}

/// One drawing of everything.
fn check<D: Kernels>(device: &D, name: &str, sequences: usize, longest: usize, rng: &mut fastrand::Rng) {
    let plain = model(name);
    let vocabulary = plain.config.vocab as u32;
    let requests: Vec<_> = (0..sequences).map(|_| Request::drawn(rng, longest, vocabulary)).collect();
    let mut placed = plain.clone();
    placed.tables = [Tables::OnDevice, Tables::EmbeddingInFile, Tables::HeadStreamed][rng.usize(0..3)];
    for unit in &mut placed.units {
        unit.set_tier([Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked][rng.usize(0..5)]);
    }
    let settings = Settings { n_gpu: rng.usize(1..4), n_cpu_pinned: rng.usize(0..3), ..Settings::default() };
    let rows = rng.usize(1..=sequences);
    let found = together(device, &placed, &settings, rows, &requests, rng);
    for (request, found) in requests.iter().zip(found) {
        let expected = alone(device, &plain, request);
        let what = format!("{name}, {:?}, {} tokens, then {}", placed.tables, request.prompt.len(), request.more);
        assert!(found == expected, "{what}: other bits in the company of {} others", sequences - 1);
    }
}

fn drawings<D: Kernels>(device: &D, count: u32, longest: usize) {
    for _ in 0..count {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let name = ["qwen2-tied", "mistral", "qwen3"][rng.usize(0..3)];
        let sequences = rng.usize(1..7);
        check(device, name, sequences, longest, &mut rng);
    }
}

#[test]
fn on_a_cpu_a_sequence_has_the_same_bits_alone_and_in_any_company() {
    drawings(&Cpu, cases(200), 120);
}

#[test]
fn on_a_cpu_so_have_sixty_four_of_up_to_700_tokens() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    check(&Cpu, "qwen2-tied", 64, 700, &mut fastrand::Rng::with_seed(seed));
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
