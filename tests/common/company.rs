//! Sequences alone and in company: the promise that their logits are the same bits.

use std::collections::VecDeque;

use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence, Tables},
    plan::Tier,
};
use support::data;

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
pub fn check_company<D: Kernels>(device: &D, name: &str, sequences: usize, longest: usize, rng: &mut fastrand::Rng) {
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

pub fn check_companies<D: Kernels>(device: &D, count: u32, longest: usize) {
    for _ in 0..count {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let name = ["qwen2-tied", "mistral", "qwen3"][rng.usize(0..3)];
        let sequences = rng.usize(1..7);
        check_company(device, name, sequences, longest, &mut rng);
    }
}
