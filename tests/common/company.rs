//! Sequences alone and in company: the promise that their logits are the same bits.

use std::collections::VecDeque;

use layer_streamer::{
    Error, Settings,
    kernels::{Kernels, PAGE},
    model::{Cache, Decoder, Model, Sequence, Tables},
    plan::Tier,
};
use support::data;

const CONTEXT: usize = 1344;

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
    /// The first is as long as may be. Of the others, of `longest` tokens at most, more are short than long, and many begin as one of
    /// `others` does.
    fn drawn(rng: &mut fastrand::Rng, longest: usize, vocabulary: u32, others: &[Self]) -> Self {
        let share = if others.is_empty() { 1.0 } else { rng.f64() };
        let length = (longest as f64).powf(share).round().max(1.0) as usize;
        let mut prompt: Vec<u32> = (0..length).map(|_| rng.u32(3..vocabulary)).collect();
        if let (Some(other), true) = (rng.choice(others), rng.bool()) {
            let shared = rng.usize(0..=other.prompt.len());
            // Longer than it would be, if need be: pages are shared as a whole.
            prompt.splice(..shared.min(length), other.prompt[..shared].iter().copied());
            prompt.truncate(longest);
        }
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
    /// Its prompt, and the tokens that were chosen; the row holds the first of them.
    tokens: Vec<u32>,
}

/// What has come of requests so far.
struct Company<D: Kernels> {
    decoder: Decoder<D>,
    answers: Vec<Answer>,
    going: Vec<Going>,
    free: Vec<usize>,
    waiting: VecDeque<usize>,
    /// How often there were no pages for a batch, and how many tokens were there already when a sequence began.
    short: usize,
    reused: usize,
}

impl<D: Kernels> Company<D> {
    /// Begins those that have come, as long as there are rows, and pages for the next one alone.
    fn begin(&mut self, requests: &[Request], pass: usize) {
        while let (Some(&request), Some(&row)) = (self.waiting.front(), self.free.last()) {
            let chosen = self.answers[request].iter().map(|logits| most_likely(logits));
            let tokens: Vec<u32> = requests[request].prompt.iter().copied().chain(chosen).collect();
            let has_pages = self.decoder.pages_for(row, tokens.len()) <= self.decoder.free_pages();
            if !self.going.is_empty() && (requests[request].arrives > pass || !has_pages) {
                break;
            }
            let taken = self.decoder.begin(row, &tokens).unwrap();
            assert!(taken < tokens.len() && self.decoder.tokens(row) == &tokens[..taken]);
            self.reused += taken;
            self.going.push(Going { request, row, tokens });
            self.waiting.pop_front();
            self.free.pop();
        }
    }

    /// Runs some tokens of some sequences; where there are no pages for them, one sequence gives back its own, and waits.
    fn pass(&mut self, rng: &mut fastrand::Rng) {
        let Self { decoder, going, .. } = self;
        rng.shuffle(going);
        // Some sit a pass out.
        let taking = rng.usize(1..=going.len());
        let mut batch = Vec::new();
        for Going { row, tokens, .. } in &going[..taking] {
            let left = &tokens[decoder.length(*row)..];
            let count = if rng.bool() { left.len() } else { rng.usize(1..=left.len()) };
            batch.push(Sequence { row: *row, tokens: &left[..count] });
        }
        let needed = batch.iter().map(|of| decoder.pages_for(of.row, of.tokens.len())).sum::<usize>();
        let (available, lengths) = (decoder.free_pages(), going.iter().map(|of| decoder.length(of.row)));
        let lengths: Vec<_> = lengths.collect();
        match decoder.forward(&batch) {
            Ok(()) => {}
            Err(Error::Pages { needed: said, available: free }) => {
                assert!(said > available && said <= needed && free == available && decoder.free_pages() == available);
                assert!(going.iter().zip(lengths).all(|(of, length)| decoder.length(of.row) == length));
                let waits = going.pop().unwrap();
                decoder.truncate(waits.row, 0).unwrap();
                self.free.push(waits.row);
                self.waiting.push_back(waits.request);
                self.short += 1;
                return;
            }
            Err(error) => panic!("{error}"),
        }
        for (going, logits) in going.iter_mut().zip(last_logits(decoder)) {
            if decoder.length(going.row) == going.tokens.len() {
                going.tokens.push(most_likely(&logits));
                self.answers[going.request].push(logits);
            }
        }
    }
}

/// All requests in the rows of one decoder, each pass with any of those that have come, in any order, and any of their tokens.
fn together<D: Kernels>(
    decoder: Decoder<D>,
    rows: usize,
    requests: &[Request],
    rng: &mut fastrand::Rng,
) -> Vec<Answer> {
    let mut company = Company {
        decoder,
        answers: requests.iter().map(|_| Answer::new()).collect(),
        going: Vec::new(),
        free: (0..rows).collect(),
        waiting: (0..requests.len()).collect(),
        short: 0,
        reused: 0,
    };
    for pass in 0.. {
        company.begin(requests, pass);
        if company.going.is_empty() {
            println!("{} batches were too large, {} tokens were there already", company.short, company.reused);
            return company.answers;
        }
        company.pass(rng);
        let Company { decoder, answers, going, free, .. } = &mut company;
        going.retain(|going| {
            let ended = answers[going.request].len() > requests[going.request].more;
            if ended {
                decoder.truncate(going.row, 0).unwrap();
                free.push(going.row);
            }
            !ended
        });
    }
    unreachable!()
}

/// One drawing of everything.
pub fn check_company<D: Kernels>(device: &D, name: &str, sequences: usize, longest: usize, rng: &mut fastrand::Rng) {
    let plain = model(name);
    let vocabulary = plain.config.vocab as u32;
    let mut requests = Vec::new();
    for _ in 0..sequences {
        requests.push(Request::drawn(rng, longest, vocabulary, &requests));
    }
    let mut placed = plain.clone();
    placed.tables = [Tables::OnDevice, Tables::EmbeddingInFile, Tables::HeadStreamed][rng.usize(0..3)];
    for unit in &mut placed.units {
        unit.set_tier([Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked][rng.usize(0..5)]);
    }
    let settings = Settings { n_gpu: rng.usize(1..4), n_cpu_pinned: rng.usize(0..3), ..Settings::default() };
    let rows = rng.usize(1..=sequences);
    // Room for the longest, or for some more.
    let context = (longest + 4).next_multiple_of(PAGE);
    let tokens = context + rng.usize(0..=(rows - 1) * context / 2);
    let cache = Cache { sequences: rows, context, tokens };
    let found = together(Decoder::with_cache(device, &placed, &settings, cache).unwrap(), rows, &requests, rng);
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
        let longest = rng.usize(1..=longest);
        check_company(device, name, sequences, longest, &mut rng);
    }
}
