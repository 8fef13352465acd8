//! Tokens that a decoder draws: as often as the model's probabilities say, the same for the same seed whatever memory and company
//! a sequence has, and by penalties that know all of its tokens.

mod common;

use std::ops::ControlFlow;

use common::{everywhere, forget, generate};
use layer_streamer::{
    Error, Settings,
    device::Cpu,
    model::{Cache, Choice, Decoder, Fit, Model, Sampler, Sampling, Sequence},
    plan::{Budget, Tier},
};
use support::data;

const PROMPT: [u32; 5] = [3, 40, 41, 200, 7];

fn model() -> Model {
    Model::open(data("qwen2-tied")).unwrap()
}

fn decoder(model: &Model, batch: usize, context: usize) -> Decoder<Cpu> {
    Decoder::new(&Cpu, model, &Settings::default(), batch, context).unwrap()
}

fn sampler(model: &Model, sampling: Sampling) -> Sampler {
    Sampler::new(sampling, model.config.vocab).unwrap()
}

/// A text of enough chance that two that are drawn apart never agree.
fn lively(seed: u64) -> Sampling {
    Sampling { temperature: 1.2, top_k: 200, top_p: 0.98, repetition_penalty: 1.1, seed, ..Sampling::default() }
}

/// Continues the sequences that the cache has in these rows, after new tokens of each: what is drawn for each row.
fn continued(
    decoder: &mut Decoder<Cpu>,
    batch: &[Sequence<'_>],
    most: usize,
    sampler: &mut Sampler,
) -> Vec<(usize, Vec<u32>)> {
    decoder.forward(batch).unwrap();
    let rows: Vec<_> = batch.iter().map(|sequence| sequence.row).collect();
    let mut found: Vec<_> = rows.iter().map(|row| (*row, Vec::new())).collect();
    let decoded = decoder.decode(&rows, most, &[], Choice::Sample(sampler), |row, token| {
        found.iter_mut().find(|(of, _)| *of == row).unwrap().1.push(token);
        Ok::<_, Error>(ControlFlow::Continue(()))
    });
    decoded.unwrap();
    found
}

/// The prompt in row `row` of an empty cache, alone, and so many tokens after it.
fn alone(decoder: &mut Decoder<Cpu>, row: usize, most: usize, sampling: Sampling) -> Vec<u32> {
    decoder.truncate(row, 0).unwrap();
    let mut sampler = sampler(decoder.model(), sampling);
    continued(decoder, &[Sequence { row, tokens: &PROMPT }], most, &mut sampler).remove(0).1
}

#[test]
fn a_decoder_s_tokens_come_as_often_as_the_model_s_probabilities_say() {
    const ROWS: usize = 100;
    let model = model();
    let vocab = model.config.vocab;
    let (mut decoder, mut logits) = (decoder(&model, ROWS, PROMPT.len()), Vec::new());
    decoder.forward(&[Sequence { row: 0, tokens: &PROMPT }]).unwrap();
    let kept = decoder.last_logits(|row| {
        logits.extend(row.iter().map(|x| f64::from(*x)));
        Ok::<_, Error>(())
    });
    kept.unwrap();
    let none = Sampling::default();
    for (sampling, changed) in [
        (Sampling { temperature: 0.6, ..none }, logits.iter().map(|x| x / 0.6).collect::<Vec<_>>()),
        (Sampling { top_k: 12, ..none }, {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            logits.iter().map(|x| if *x >= sorted[11] { *x } else { f64::NEG_INFINITY }).collect()
        }),
        (Sampling { repetition_penalty: 3.0, temperature: 0.6, ..none }, {
            let of = |(token, x): (usize, &f64)| match PROMPT.contains(&(token as u32)) {
                true => {
                    if *x > 0.0 {
                        x / 3.0 / 0.6
                    } else {
                        x * 3.0 / 0.6
                    }
                }
                false => x / 0.6,
            };
            logits.iter().enumerate().map(of).collect()
        }),
    ] {
        let (mut counts, prompts) = (vec![0usize; vocab], [&PROMPT[..]; ROWS]);
        for seed in 0..20 {
            forget(&mut decoder, ROWS);
            let mut sampler = sampler(&model, Sampling { seed, ..sampling });
            let generated = decoder.generate(&prompts, 1, &[], Choice::Sample(&mut sampler), |_, token| {
                counts[token as usize] += 1;
                Ok::<_, Error>(ControlFlow::Continue(()))
            });
            generated.unwrap();
        }
        let largest = changed.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<_> = changed.iter().map(|x| (x - largest).exp()).collect();
        let draws = counts.iter().sum::<usize>() as f64;
        assert_eq!(draws as usize, 20 * ROWS);
        let scale = draws / weights.iter().sum::<f64>();
        // χ² over tokens of five expected draws or more, and all others together.
        let (mut square, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
        for (count, expected) in counts.iter().zip(&weights).map(|(count, weight)| (*count as f64, weight * scale)) {
            assert!(expected > 0.0 || count == 0.0, "{sampling:?}: a token that is left out came");
            match expected >= 5.0 {
                true => (square, cells) = (square + (count - expected).powi(2) / expected, cells + 1.0),
                false => rest = (rest.0 + count, rest.1 + expected),
            }
        }
        if rest.1 >= 5.0 {
            (square, cells) = (square + (rest.0 - rest.1).powi(2) / rest.1, cells + 1.0);
        }
        let off = (square - (cells - 1.0)) / (2.0 * (cells - 1.0f64)).sqrt();
        assert!(cells > 5.0 && (-4.0..4.0).contains(&off), "{sampling:?}: {off} over {cells} cells");
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens_wherever_weights_are_kept_and_whoever_else_is_in_the_batch() {
    let expected = alone(&mut decoder(&model(), 3, 40), 1, 20, lively(9));
    assert_eq!(expected.len(), 20);
    for (number, mut model) in everywhere(&data("qwen2-tied")).into_iter().enumerate() {
        let settings = [
            Settings::default(),
            Settings { n_gpu: 1, n_cpu_pinned: 0, n_cpu: 2, ..Settings::default() },
            Settings { n_gpu: 3, n_cpu_pinned: 1, ..Settings::default() },
        ];
        model.units[0].set_tier([Tier::Disk, Tier::Gpu, Tier::Ram][number]);
        let mut decoder = Decoder::new(&Cpu, &model, &settings[number], 3, 40).unwrap();
        assert_eq!(alone(&mut decoder, 1, 20, lively(9)), expected, "{:?}", model.tables);
        // Others come along, in any order, end before it, and have other prompts.
        forget(&mut decoder, 3);
        let mut sampler = sampler(&model, lively(9));
        let batch = [(2, &[9u32; 30][..]), (0, &[5, 6]), (1, &PROMPT)].map(|(row, tokens)| Sequence { row, tokens });
        let found = continued(&mut decoder, &batch, 20, &mut sampler);
        assert_eq!((found[0].1.len(), &found[2].1), (11, &expected), "{:?}", model.tables);
    }
    for more in [0, 1_000_000, usize::MAX / 2] {
        let (mut model, least) = (model(), common::least(&Cpu, &model(), 3, 40));
        let budget = Budget { host_bytes: least.host_bytes + more, ..least };
        let settings = Fit::new(&Cpu, budget, Cache::full(3, 40)).fastest(&mut model).unwrap();
        let mut decoder = Decoder::new(&Cpu, &model, &settings, 3, 40).unwrap();
        assert_eq!(alone(&mut decoder, 1, 20, lively(9)), expected, "the least and {more} bytes");
    }
}

#[test]
fn another_seed_and_another_row_give_other_tokens_and_a_text_in_two_calls_is_that_of_one() {
    let model = model();
    let mut decoder = decoder(&model, 2, 60);
    let expected = alone(&mut decoder, 0, 20, lively(1));
    assert_ne!(alone(&mut decoder, 0, 20, lively(2)), expected);
    assert_ne!(alone(&mut decoder, 1, 20, lively(1)), expected);
    assert_eq!(alone(&mut decoder, 0, 20, lively(1)), expected, "a sampler made anew");
    let mut parts = alone(&mut decoder, 0, 7, lively(1));
    // The last token is not in the cache yet.
    let mut sampler = sampler(&model, lively(1));
    let last = [parts[6]];
    parts.append(&mut continued(&mut decoder, &[Sequence { row: 0, tokens: &last }], 13, &mut sampler).remove(0).1);
    assert_eq!(parts, expected);
    assert_eq!(decoder.tokens(0), [&PROMPT[..], &expected[..19]].concat());
    decoder.truncate(0, 6).unwrap();
    assert_eq!((decoder.tokens(0), decoder.length(0)), (&[&PROMPT[..], &expected[..1]].concat()[..], 6));
}

#[test]
fn what_the_cache_holds_counts_for_the_repetition_penalty_and_new_tokens_for_both() {
    let model = model();
    let none = Sampling { temperature: 0.05, ..Sampling::default() };
    let mut decoder = decoder(&model, 2, 120);
    let repeats = |tokens: &[u32]| {
        let mut sorted = tokens.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        tokens.len() - sorted.len()
    };
    let free = alone(&mut decoder, 0, 60, none);
    assert!(repeats(&free) > 10, "without penalties it repeats itself: {free:?}");
    // As large as this, the penalty leaves only what is new, also to a second call.
    let sampling = Sampling { repetition_penalty: 1e6, ..none };
    let mut text = [&PROMPT[..], &alone(&mut decoder, 0, 30, sampling)].concat();
    let (last, mut sampler) = ([text[34]], sampler(&model, sampling));
    text.append(&mut continued(&mut decoder, &[Sequence { row: 0, tokens: &last }], 30, &mut sampler).remove(0).1);
    assert_eq!((text.len(), repeats(&text)), (65, 0), "{text:?}");
    let present = alone(&mut decoder, 0, 60, Sampling { presence_penalty: 2.0, ..none });
    assert!(repeats(&present) < repeats(&free), "{present:?}");
    let again = alone(&mut decoder, 0, 60, Sampling { presence_penalty: -2.0, ..none });
    assert!(repeats(&again) > repeats(&present), "{again:?}");
}

#[test]
fn a_temperature_of_0_and_one_token_to_choose_from_are_greedy() {
    let model = model();
    let mut decoder = decoder(&model, 1, 40);
    let greedy = generate(&mut decoder, &[&PROMPT], 20, &[]).remove(0);
    let none = Sampling::default();
    for sampling in [
        Sampling { temperature: 0.0, top_k: 5, top_p: 0.5, ..none },
        Sampling { temperature: 1e-9, ..none },
        Sampling { top_k: 1, ..none },
        Sampling { top_p: 0.0, ..none },
        Sampling { min_p: 1.0, ..none },
        // Too small a penalty to change anything, but for the way that is taken.
        Sampling { temperature: 0.0, presence_penalty: 1e-12, ..none },
    ] {
        assert_eq!(alone(&mut decoder, 0, 20, sampling), greedy, "{sampling:?}");
    }
}

#[test]
fn a_sampler_of_another_vocabulary_and_rows_that_cannot_be_are_errors() {
    let model = model();
    let mut decoder = decoder(&model, 2, 20);
    let go_on = |_: usize, _: u32| Ok::<_, Error>(ControlFlow::Continue(()));
    decoder.forward(&[Sequence { row: 1, tokens: &PROMPT }]).unwrap();
    let mut small = Sampler::new(Sampling::default(), 100).unwrap();
    let said = decoder.decode(&[1], 1, &[], Choice::Sample(&mut small), go_on).unwrap_err().to_string();
    assert!(said.contains("not in the vocabulary of 100"), "{said}");
    let mut large = Sampler::new(Sampling::default(), 400).unwrap();
    let said = decoder.decode(&[1], 1, &[], Choice::Sample(&mut large), go_on).unwrap_err().to_string();
    assert!(said.contains("the vocabulary has 400"), "{said}");
    let mut right = sampler(&model, Sampling::default());
    for choice in [Choice::Greedy, Choice::Sample(&mut right)] {
        let said = decoder.decode(&[2], 1, &[], choice, go_on).unwrap_err().to_string();
        assert!(said.contains("rows: have 2, the KV cache has 2 rows"), "{said}");
    }
    let said = decoder.sample(&[1], &mut right, &mut Vec::new()).unwrap_err().to_string();
    assert!(said.contains("sequence: 1 was not begun"), "{said}");
    let (mut two, mut out) = (sampler(&model, Sampling::default()), Vec::new());
    assert!(decoder.sample(&[0, 1], &mut two, &mut out).is_err());
    two.begin(1, &PROMPT).unwrap();
    decoder.sample(&[1], &mut two, &mut out).unwrap();
    assert_eq!(out.len(), 1);
}
