//! The decoder against what Hugging Face transformers computes for the same checkpoints (`tests/data/make_reference.py`), and
//! the speller, which anyone can check by eye.

mod common;

use std::{collections::HashMap, ops::ControlFlow};

use common::{REFERENCES, data, distance, expected, forget, generate, logits, speller};
use layer_streamer::{
    Error, Settings, device,
    device::Cpu,
    model::{Decoder, Model, Sequence},
    trace::Stage,
};

fn decoder(model: &Model, batch: usize, context: usize) -> Decoder<Cpu> {
    Decoder::new(&Cpu, model, &Settings::default(), batch, context).unwrap()
}

#[test]
fn prompt_logits_and_every_residual_stream_agree_with_the_reference() {
    for name in REFERENCES {
        let folder = data(name);
        let (model, reference) = (Model::open(&folder).unwrap(), expected(&folder));
        let mut decoder = decoder(&model, 1, reference.prompt.len());
        let batch = [Sequence { row: 0, tokens: &reference.prompt }];
        let mut layers = 0;
        let pass = decoder.forward_observed(&batch, |layer, residual, stream| {
            let mut hidden = vec![0.0; residual.elements()];
            device::download(&Cpu, stream, residual, &mut hidden)?;
            let off = distance(&hidden, &reference.floats[&format!("hidden.{layer}")]);
            assert!(off <= 1e-4, "{name}: residual stream after layer {layer} is off by {off:.1e}");
            layers += 1;
            Ok(())
        });
        pass.unwrap();
        assert_eq!(layers, model.config.layers);
        let off = distance(&logits(&mut decoder), &reference.floats["logits"]);
        assert!(off <= 1e-4, "{name}: logits are off by {off:.1e}");
        println!("{name}: logits off by {off:.1e}");
    }
}

#[test]
fn the_greedy_continuation_is_the_reference_s_alone_and_in_a_batch_of_unequal_lengths() {
    for name in REFERENCES {
        let folder = data(name);
        let (model, reference) = (Model::open(&folder).unwrap(), expected(&folder));
        let prompt = reference.prompt.as_slice();
        let (part, more) = prompt.split_at(prompt.len() / 2);
        let mut decoder = decoder(&model, 2, prompt.len() + 20);
        assert_eq!(generate(&mut decoder, &[prompt], 16, &[])[0], reference.continuation, "{name}");

        forget(&mut decoder, 2);
        let alone = generate(&mut decoder, &[part], 16, &[]).remove(0);
        for (prompts, at) in [([prompt, part], 0), ([part, prompt], 1)] {
            forget(&mut decoder, 2);
            let found = generate(&mut decoder, &prompts, 16, &[]);
            assert_eq!(found[at], reference.continuation, "{name} as sequence {at} of two");
            assert_eq!(found[1 - at], alone, "{name}, the other sequence");
        }

        // The prompt in two passes, something wrong in between, truncated and done again.
        forget(&mut decoder, 2);
        for tokens in [part, &[5, 6, 7][..]] {
            decoder.forward(&[Sequence { row: 1, tokens }]).unwrap();
        }
        decoder.truncate(1, part.len()).unwrap();
        assert_eq!(decoder.length(1), part.len());
        decoder.forward(&[Sequence { row: 1, tokens: more }]).unwrap();
        let mut ids = Vec::new();
        for _ in 0..16 {
            decoder.greedy(&mut ids).unwrap();
            decoder.forward(&[Sequence { row: 1, tokens: &ids[ids.len() - 1..] }]).unwrap();
        }
        assert_eq!(ids, reference.continuation, "{name} after truncate and redo");
    }
}

#[test]
fn a_prompt_of_several_blocks_gives_what_token_by_token_gives_and_streams_as_many_bytes() {
    let model = Model::open(data("qwen2-tied")).unwrap();
    let ids: Vec<u32> = (0..400u32).map(|i| 3 + i * 7919 % 300).collect();
    let (long, short) = (&ids[..390], &ids[..150]);
    let bytes = |decoder: &mut Decoder<Cpu>| decoder.streamer().stats().stage(Stage::Compute).bytes;
    let mut whole = decoder(&model, 3, 400);
    // Three sequences whose borders lie inside blocks; the middle one is the long one.
    let batch =
        [Sequence { row: 2, tokens: short }, Sequence { row: 0, tokens: long }, Sequence { row: 1, tokens: &ids[..1] }];
    whole.forward(&batch).unwrap();
    let at_once = logits(&mut whole);
    let per_pass = whole.streamer().plan().bytes_per_pass() as u64;
    assert_eq!(bytes(&mut whole), per_pass);
    whole.forward(&[Sequence { row: 0, tokens: &ids[..1] }]).unwrap();
    assert_eq!(bytes(&mut whole), 2 * per_pass);

    let vocab = model.config.vocab;
    let mut pieces = decoder(&model, 1, 400);
    let mut one_by_one = Vec::new();
    for tokens in long.chunks(13) {
        pieces.forward(&[Sequence { row: 0, tokens }]).unwrap();
        one_by_one.extend(logits(&mut pieces));
    }
    let off = distance(&at_once[150 * vocab..540 * vocab], &one_by_one);
    assert!(off <= 1e-5, "long sequence off by {off:.1e}");
    let off = distance(&at_once[..150 * vocab], &one_by_one[..150 * vocab]);
    assert!(off <= 1e-5, "short sequence off by {off:.1e}");
}

#[test]
fn misuse_of_the_decoder_is_an_error_and_leaves_the_cache_as_it_was() {
    let model = Model::open(data("qwen2-tied")).unwrap();
    let mut decoder = decoder(&model, 2, 8);
    decoder.forward(&[Sequence { row: 0, tokens: &[3, 4, 5] }]).unwrap();
    let long = [3; 6];
    for (batch, part) in [
        (vec![], "no sequence"),
        (vec![(2, &[3][..])], "2 rows"),
        (vec![(1, &[3][..]), (1, &[4][..])], "twice"),
        (vec![(1, &[][..])], "empty"),
        (vec![(0, &long[..])], "exceed the context of 8"),
        (vec![(1, &[320][..])], "vocabulary of 320"),
    ] {
        let batch: Vec<_> = batch.into_iter().map(|(row, tokens)| Sequence { row, tokens }).collect();
        let message = decoder.forward(&batch).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
        assert_eq!((decoder.length(0), decoder.length(1)), (3, 0));
    }
    assert!(decoder.truncate(0, 4).unwrap_err().to_string().contains("holds 3"));
    assert!(decoder.truncate(9, 0).is_err());
    for (batch, context) in [(0, 8), (1, 0), (1, 513)] {
        assert!(Decoder::new(&Cpu, &model, &Settings::default(), batch, context).is_err());
    }
}

#[test]
fn decoding_ends_where_it_is_told_to_and_makes_no_pass_for_nothing() {
    let model = Model::open(data("qwen2-tied")).unwrap();
    let layers = model.config.layers as u64;
    let prompt: &[u32] = &[3, 4, 5];
    let units = |decoder: &mut Decoder<Cpu>| decoder.streamer().stats().stage(Stage::Compute).units;
    let mut free = decoder(&model, 1, 40);
    let all = generate(&mut free, &[prompt], 10, &[]).remove(0);
    assert_eq!((all.len(), units(&mut free)), (10, 10 * layers), "one pass a token, the prompt's for the first");
    // A context that fills up: its last token is fed, and one more comes out.
    let mut tight = decoder(&model, 1, 6);
    assert_eq!(generate(&mut tight, &[prompt], 100, &[])[0], all[..4]);
    assert_eq!((tight.length(0), units(&mut tight)), (6, 4 * layers));
    let mut stopped = decoder(&model, 1, 40);
    assert_eq!(generate(&mut stopped, &[prompt], 10, &[9999, all[2]])[0], all[..2]);
    let (mut broken, mut seen) = (decoder(&model, 1, 40), Vec::new());
    broken
        .generate(&[prompt], 10, &[], |_, token| {
            seen.push(token);
            Ok::<_, Error>(if seen.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
        .unwrap();
    assert_eq!((seen.as_slice(), units(&mut broken)), (&all[..3], 3 * layers));
    assert!(broken.decode(&[0, 0], 1, &[], |_, _| Ok::<_, Error>(ControlFlow::Continue(()))).is_err());
}

#[test]
fn after_a_pass_that_failed_there_are_no_logits_and_the_sequence_goes_on_where_it_was() {
    let model = Model::open(data("qwen2-tied")).unwrap();
    let mut decoder = decoder(&model, 1, 40);
    let step = |decoder: &mut Decoder<Cpu>, tokens: &[u32]| decoder.forward(&[Sequence { row: 0, tokens }]);
    assert!(decoder.greedy(&mut Vec::new()).is_err(), "no pass yet");
    step(&mut decoder, &[3, 4, 5]).unwrap();
    let batch = [Sequence { row: 0, tokens: &[6, 7] }];
    let failed = decoder.forward_observed(&batch, |layer, _, _| {
        if layer == 1 { Err(Error::Kernel { kernel: "test", cause: "on purpose".into() }) } else { Ok(()) }
    });
    assert!(failed.is_err() && decoder.greedy(&mut Vec::new()).is_err() && decoder.length(0) == 3);
    step(&mut decoder, &[6, 7]).unwrap();
    let again = logits(&mut decoder);
    decoder.truncate(0, 0).unwrap();
    step(&mut decoder, &[3, 4, 5, 6, 7]).unwrap();
    let whole = logits(&mut decoder);
    assert!(distance(&again, &whole[3 * model.config.vocab..]) < 1e-5);
}

#[test]
fn the_memory_table_is_the_sum_of_its_parts_by_hand() {
    let (model, settings) = (Model::open(data("qwen2-f32")).unwrap(), Settings::default());
    let c = &model.config;
    let rows: HashMap<String, usize> = Decoder::memory(&Cpu, &model, &settings, 3, 100)
        .unwrap()
        .into_iter()
        .map(|part| (part.what, part.bytes))
        .collect();
    let near = |what: &str, expected: usize| {
        let got = rows[what];
        assert!(got >= expected && got < expected + expected / 8 + 8192, "{what}: {got}, by hand {expected}");
    };
    near("KV cache of 3 × 100 tokens", 2 * 4 * c.layers * 3 * c.kv_heads * 100 * c.head_dim);
    let block = 2 * c.hidden + 3 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + 2 * c.ffn;
    near("activations", 4 * (300 * c.hidden + 256 * block + 16 * (2 * c.hidden + c.vocab)));
    near("static tensors", 4 * (2 * c.vocab * c.hidden + c.hidden));
}

#[test]
fn the_speller_is_right_on_at_least_995_in_1000_random_numbers() {
    let (model, numbers) = (Model::open(speller()).unwrap(), common::numbers());
    let right = common::spelled_right(&mut decoder(&model, 100, 48), &numbers);
    println!("{right} of {} right", numbers.len());
    assert!(right * 1000 >= 995 * numbers.len(), "{right} of {}", numbers.len());
}

#[test]
fn every_combination_of_stages_and_batches_gives_the_same_text() {
    let (model, tokenizer) = (Model::open(speller()).unwrap(), common::tokenizer());
    let prompt = tokenizer.encode("907613=", false).unwrap();
    for n_cpu in [0, 1, 5] {
        for n_cpu_pinned in [0, 1, 4] {
            for n_gpu in [1, 2, 7] {
                let batches = |n: usize| if n > 1 { vec![0, 2, n] } else { vec![n] };
                for batch_cpu in batches(n_cpu) {
                    for batch_cpu_pinned in batches(n_cpu_pinned) {
                        for batch_gpu in batches(n_gpu) {
                            let settings = Settings {
                                n_gpu,
                                n_cpu_pinned,
                                n_cpu,
                                batch_gpu,
                                batch_cpu_pinned,
                                batch_cpu,
                                ..Settings::default()
                            };
                            let mut decoder = Decoder::new(&Cpu, &model, &settings, 1, 32).unwrap();
                            let found = generate(&mut decoder, &[prompt.get_ids()], 24, &model.config.stop).remove(0);
                            let text = tokenizer.decode(&found, true).unwrap();
                            assert_eq!(text, " nine hundred seven thousand six hundred thirteen", "{settings:?}");
                        }
                    }
                }
            }
        }
    }
}
