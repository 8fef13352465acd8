//! Probabilities against the formulas, written down plainly in F64; draws against probabilities.

use super::*;

/// The probabilities by the formulas, in the order and with the words of transformers. `seen` and `chosen` say which tokens are.
fn reference(logits: &[f32], seen: &[bool], chosen: &[bool], sampling: &Sampling) -> Vec<f64> {
    let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, .. } = *sampling;
    let mut scores: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    for (token, score) in scores.iter_mut().enumerate() {
        if seen[token] {
            *score = if *score < 0.0 { *score * repetition_penalty } else { *score / repetition_penalty };
        }
        if chosen[token] {
            *score -= presence_penalty;
        }
        *score /= temperature;
    }
    if top_k > 0 {
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let last = sorted[top_k.min(sorted.len()) - 1];
        scores.iter_mut().filter(|score| **score < last).for_each(|score| *score = f64::NEG_INFINITY);
    }
    if top_p < 1.0 {
        // From the least likely on; of equally likely ones the last comes first.
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*a].partial_cmp(&scores[*b]).unwrap().then(b.cmp(a)));
        let (probabilities, mut sum) = (softmax(&scores), 0.0);
        for token in &order[..order.len() - 1] {
            sum += probabilities[*token];
            if sum <= 1.0 - top_p {
                scores[*token] = f64::NEG_INFINITY;
            }
        }
    }
    let probabilities = softmax(&scores);
    let largest = probabilities.iter().copied().fold(0.0, f64::max);
    for (score, probability) in scores.iter_mut().zip(probabilities) {
        if probability < min_p * largest {
            *score = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// What the sampler draws with, where the sequence has these tokens, and then chose those.
fn found(logits: &[f32], prompt: &[u32], chosen: &[u32], sampling: Sampling) -> Vec<f64> {
    let mut sampler = Sampler::new(sampling, logits.len()).unwrap();
    sampler.begin(0, prompt).unwrap();
    choose_all(&mut sampler, 0, chosen);
    let (history, vocab) = (&sampler.sequences[&0], logits.len());
    assert_eq!(history.length as usize, prompt.len() + chosen.len());
    let logits = logits.iter().enumerate().map(|(token, x)| penalised(history, token, *x));
    sampler.candidates.fill(logits);
    sampler.candidates.probabilities(&sampling, vocab)
}

/// Has these tokens chosen, by logits that leave no choice.
fn choose_all(sampler: &mut Sampler, sequence: usize, tokens: &[u32]) {
    for token in tokens {
        let mut only = vec![f32::NEG_INFINITY; sampler.vocab];
        only[*token as usize] = 0.0;
        assert_eq!(sampler.choose(sequence, &only).unwrap(), *token);
    }
}

fn flags(vocab: usize, tokens: &[u32]) -> Vec<bool> {
    (0..vocab as u32).map(|token| tokens.contains(&token)).collect()
}

fn assert_near(found: &[f64], expected: &[f64], what: &str) {
    for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() < 1e-12 && (*found == 0.0) == (*expected == 0.0),
            "{what}: token {token} has {found}, expected {expected}"
        );
    }
}

#[test]
fn each_filter_alone_and_all_together_give_the_probabilities_of_the_formulas() {
    let mut rng = fastrand::Rng::with_seed(11);
    for case in 0..6000 {
        let vocab = [1, 5, 60, 700][rng.usize(..4)];
        let mut logits: Vec<f32> = (0..vocab).map(|_| 10.0 * (rng.f32() - 0.5)).collect();
        // Ties, also at the top, and tokens that can never come.
        if rng.bool() {
            logits.iter_mut().for_each(|x| *x = x.round());
        }
        for _ in 0..rng.usize(..4) {
            logits[rng.usize(1.min(vocab - 1)..vocab)] = f32::NEG_INFINITY;
        }
        logits[0] = logits[0].max(-9.0);
        let mut tokens = || (0..rng.usize(..8)).map(|_| rng.u32(..vocab as u32)).collect::<Vec<_>>();
        let (prompt, chosen) = (tokens(), tokens());
        let only = if rng.bool() { Some(rng.usize(..6)) } else { None };
        let mut is_on = |field: usize| only.map_or_else(|| rng.bool(), |only| only == field);
        let on: Vec<_> = (0..6).map(&mut is_on).collect();
        let none = Sampling::default();
        let sampling = Sampling {
            temperature: if on[0] { 0.1 + 2.0 * rng.f64() } else { none.temperature },
            top_k: if on[1] { rng.usize(1..2 * vocab + 1) } else { none.top_k },
            top_p: if on[2] { rng.f64() } else { none.top_p },
            min_p: if on[3] { rng.f64() * rng.f64() } else { none.min_p },
            repetition_penalty: if on[4] { 0.2 + 2.0 * rng.f64() } else { none.repetition_penalty },
            presence_penalty: if on[5] { 4.0 * rng.f64() - 2.0 } else { none.presence_penalty },
            seed: 0,
        };
        let seen = flags(vocab, &[prompt.as_slice(), &chosen].concat());
        let expected = reference(&logits, &seen, &flags(vocab, &chosen), &sampling);
        let what = format!("case {case}: {sampling:?}, {prompt:?} and {chosen:?}");
        assert_near(&found(&logits, &prompt, &chosen, sampling), &expected, &what);
    }
}

#[test]
fn what_lies_on_a_border_stays_or_goes_as_documented() {
    let none = Sampling::default();
    let of = |logits: &[f32], sampling: Sampling| found(logits, &[], &[], sampling);
    let even = [0.25; 4];
    // As likely as the last of the top k: stays. The k is larger than the vocabulary: all stay.
    assert_near(&of(&[1.0, 2.0, 1.0, 0.0], Sampling { top_k: 2, ..none })[3..], &[0.0], "top_k 2");
    assert!(of(&[1.0, 2.0, 1.0, 0.0], Sampling { top_k: 2, ..none })[..3].iter().all(|p| *p > 0.2));
    assert_near(&of(&[1.0; 4], Sampling { top_k: 1, ..none }), &even, "all tie");
    assert_near(&of(&[1.0; 4], Sampling { top_k: usize::MAX, ..none }), &even, "top_k of usize::MAX");
    // Two quarters reach a half: the others go. Of ties the first stay.
    assert_near(&of(&[1.0; 4], Sampling { top_p: 0.5, ..none }), &[0.5, 0.5, 0.0, 0.0], "top_p 0.5");
    assert_near(&of(&[1.0; 4], Sampling { top_p: 0.0, ..none }), &[1.0, 0.0, 0.0, 0.0], "top_p 0");
    assert_near(
        &of(&[-80.0, 9.0, -80.0, 9.0], Sampling { top_p: 1.0, ..none })[..1],
        &[(-89f64).exp() / 2.0],
        "top_p 1",
    );
    // Half as likely as the likeliest is not less than min_p 0.5.
    let (half, third) = (-std::f32::consts::LN_2 + 1e-6, -1.1);
    assert!(of(&[0.0, half, third], Sampling { min_p: 0.5, ..none })[1] > 0.3);
    assert_eq!(of(&[0.0, half, third], Sampling { min_p: 0.5, ..none })[2], 0.0);
    assert_near(&of(&[3.0, 3.0, 2.9], Sampling { min_p: 1.0, ..none }), &[0.5, 0.5, 0.0], "min_p 1");
    // As small as temperatures get: the most likely tokens alone, and evenly.
    for temperature in [1e-6, 1e-30, f64::MIN_POSITIVE, 5e-324] {
        let sampling = Sampling { temperature, ..none };
        assert_near(&of(&[3.0, f32::MAX, f32::MAX, f32::MIN], sampling), &[0.0, 0.5, 0.5, 0.0], "a tiny temperature");
    }
    let zero = Sampling { temperature: 0.0, ..none };
    assert_near(&of(&[3.0, 7.0, 7.0, f32::NEG_INFINITY], zero), &[0.0, 1.0, 0.0, 0.0], "temperature 0");
    assert_near(&of(&[3.0, f32::MIN, 3.0, 2.9], Sampling { temperature: 1e300, ..none }), &even, "a huge temperature");
    // Penalties that leave nothing but what was not seen, and never NaN.
    for repetition_penalty in [1e-300, 1e300, f64::MAX, f64::MIN_POSITIVE] {
        let sampling = Sampling { repetition_penalty, ..none };
        let all = found(&[-f32::MAX, f32::MAX, f32::NEG_INFINITY, 0.0], &[0, 1, 2], &[], sampling);
        assert!((all.iter().sum::<f64>() - 1.0).abs() < 1e-12 && all[2] == 0.0, "{repetition_penalty}: {all:?}");
    }
    let greedy = Sampling { temperature: 0.0, repetition_penalty: 2.0, ..none };
    assert_near(&found(&[3.0, 2.0], &[0], &[], greedy), &[0.0, 1.0], "the most likely after penalties");
}

#[test]
fn logits_of_which_nothing_can_be_chosen_are_an_error_and_change_nothing() {
    let mut sampler = Sampler::new(Sampling { presence_penalty: 1.0, ..Sampling::default() }, 3).unwrap();
    let none = f32::NEG_INFINITY;
    let said = |error: Result<u32>| error.unwrap_err().to_string();
    assert!(said(sampler.choose(4, &[0.0; 3])).contains("sequence: 4 was not begun"));
    assert!(sampler.begin(4, &[3]).unwrap_err().to_string().contains("3 is not in the vocabulary of 3"));
    sampler.begin(4, &[2]).unwrap();
    for (logits, part) in [
        (&[0.0, f32::NAN, 1.0][..], "NaN for token 1"),
        (&[0.0, -f32::NAN, 1.0], "NaN for token 1"),
        (&[f32::INFINITY, 0.0, 1.0], "inf for token 0"),
        (&[none; 3], "all -inf"),
        (&[0.0; 2], "are 2, the vocabulary has 3"),
    ] {
        assert!(said(sampler.choose(4, logits)).contains(part), "{part}");
        assert_eq!((sampler.sequences[&4].length, sampler.sequences[&4].chosen.0[0]), (1, 0));
    }
    for _ in 0..50 {
        assert_eq!(sampler.choose(4, &[none, -3.0, none]).unwrap(), 1);
    }
    assert_eq!((sampler.sequences[&4].length, sampler.sequences[&4].chosen.0[0]), (51, 1 << 1));
    sampler.forget(4);
    assert!(sampler.choose(4, &[0.0; 3]).is_err());
    assert!(Sampler::new(Sampling::default(), 0).is_err());
}

#[test]
fn a_value_out_of_range_is_refused_by_name() {
    let none = Sampling::default();
    for (sampling, name) in [
        (Sampling { temperature: -0.1, ..none }, "temperature: is -0.1"),
        (Sampling { temperature: f64::INFINITY, ..none }, "temperature: is inf"),
        (Sampling { temperature: f64::NAN, ..none }, "temperature: is NaN"),
        (Sampling { top_p: 1.1, ..none }, "top_p: is 1.1"),
        (Sampling { top_p: -0.1, ..none }, "top_p: is -0.1"),
        (Sampling { top_p: f64::NAN, ..none }, "top_p"),
        (Sampling { min_p: 1.1, ..none }, "min_p: is 1.1"),
        (Sampling { min_p: -1.0, ..none }, "min_p: is -1"),
        (Sampling { repetition_penalty: 0.0, ..none }, "repetition_penalty: is 0"),
        (Sampling { repetition_penalty: -1.0, ..none }, "repetition_penalty: is -1"),
        (Sampling { repetition_penalty: f64::INFINITY, ..none }, "repetition_penalty"),
        (Sampling { presence_penalty: 2.5, ..none }, "presence_penalty: is 2.5"),
        (Sampling { presence_penalty: f64::NAN, ..none }, "presence_penalty"),
    ] {
        let said = Sampler::new(sampling, 5).unwrap_err().to_string();
        assert!(said.starts_with(name), "{said}");
    }
    none.check().unwrap();
    Sampling { temperature: 0.0, top_p: 0.0, min_p: 1.0, presence_penalty: -2.0, ..none }.check().unwrap();
}

/// How far counts are from what is expected: χ², less what it is on average, in standard deviations. Cells of fewer than five
/// expected draws count together.
fn off(counts: &[usize], probabilities: &[f64]) -> f64 {
    let draws = counts.iter().sum::<usize>() as f64;
    let (mut square, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        square += (count - expected).powi(2) / expected;
        cells += 1.0;
    };
    for (&count, &probability) in counts.iter().zip(probabilities) {
        assert!(probability > 0.0 || count == 0, "a token that is left out was drawn");
        match probability * draws {
            expected if expected >= 5.0 => add(count as f64, expected),
            expected => rest = (rest.0 + count as f64, rest.1 + expected),
        }
    }
    if rest.1 >= 5.0 {
        add(rest.0, rest.1);
    }
    assert!(cells > 1.0, "nothing to compare");
    (square - (cells - 1.0)) / (2.0 * (cells - 1.0)).sqrt()
}

#[test]
fn tokens_are_drawn_as_often_as_their_probabilities_say() {
    const DRAWS: usize = 20_000;
    let logits: Vec<f32> = (0..40).map(|i| (i * 7919 % 97) as f32 / 20.0 - 2.0).collect();
    let (prompt, chosen) = ([3, 8, 8, 20], [21, 33]);
    let none = Sampling::default();
    for sampling in [
        none,
        Sampling { temperature: 0.5, ..none },
        Sampling { temperature: 2.0, ..none },
        Sampling { top_k: 7, ..none },
        Sampling { top_p: 0.6, ..none },
        Sampling { min_p: 0.2, ..none },
        Sampling { repetition_penalty: 1.8, ..none },
        Sampling { presence_penalty: 1.5, ..none },
        Sampling {
            temperature: 1.3,
            top_k: 30,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.2,
            presence_penalty: 0.5,
            seed: 77,
        },
    ] {
        let seen = flags(40, &[&prompt[..], &chosen].concat());
        let expected = reference(&logits, &seen, &flags(40, &chosen), &sampling);
        let (mut sampler, mut counts) = (Sampler::new(sampling, 40).unwrap(), vec![0; 40]);
        for sequence in 0..DRAWS {
            sampler.begin(sequence, &prompt).unwrap();
            choose_all(&mut sampler, sequence, &chosen);
            counts[sampler.choose(sequence, &logits).unwrap() as usize] += 1;
            sampler.forget(sequence);
        }
        // Of a good generator more than 4 comes once in some thousand cases; another probability of any token gives far more.
        let found = off(&counts, &expected);
        assert!((-4.0..4.0).contains(&found), "{sampling:?}: {found}");
        // Along one sequence, if no draw changes the next one's probabilities.
        if sampling.repetition_penalty == 1.0 && sampling.presence_penalty == 0.0 {
            sampler.begin(0, &prompt).unwrap();
            let mut counts = vec![0; 40];
            (0..DRAWS).for_each(|_| counts[sampler.choose(0, &logits).unwrap() as usize] += 1);
            let found = off(&counts, &expected);
            assert!((-4.0..4.0).contains(&found), "along a sequence, {sampling:?}: {found}");
        }
    }
}

#[test]
fn the_first_draw_is_the_last_that_allocates_and_takes_what_was_said() {
    let logits: Vec<f32> = (0..3000).map(|i| (i * 7919 % 997) as f32 / 200.0).collect();
    let sampling =
        Sampling { top_k: 2000, top_p: 0.95, repetition_penalty: 1.1, presence_penalty: 0.1, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, 3000).unwrap();
    sampler.begin(0, &[1, 2, 3]).unwrap();
    let memory = |sampler: &Sampler| {
        let History { seen, chosen, .. } = &sampler.sequences[&0];
        [seen, chosen]
            .map(|set| (set.0.as_ptr().addr(), 8 * set.0.capacity()))
            .into_iter()
            .chain(sampler.candidates.memory())
            .collect()
    };
    sampler.choose(0, &logits).unwrap();
    let before: Vec<(usize, usize)> = memory(&sampler);
    let logits_of_a_decoder = 3000 * 4;
    let taken: usize = before.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(taken + logits_of_a_decoder, sampler.memory(1).bytes);
    for _ in 0..200 {
        sampler.choose(0, &logits).unwrap();
    }
    sampler.begin(0, &[4]).unwrap();
    sampler.choose(0, &logits).unwrap();
    assert_eq!(memory(&sampler), before);
}
