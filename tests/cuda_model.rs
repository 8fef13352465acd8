//! The decoder on a GPU, in BF16, beside the CPU device, in F32; `tests/cuda_oracle.rs` holds both against what was computed
//! elsewhere. Without a GPU there is nothing to test, and the tests say so.

mod common;
#[path = "common/gguf.rs"]
mod gguf;
#[path = "common/quantised.rs"]
mod quantised;

use common::{
    Words, check_plans, distance, everywhere, expected, forget, generate, gpu, logits, numbers, spelled_right,
    with_more_tokens,
};
use layer_streamer::{
    Settings,
    device::{Cpu, Cuda},
    kernels::Kernels,
    model::{Decoder, Model, Sequence},
    plan::Tier,
};
use support::{cases, copy_of, data, speller};

/// Where the CPU's two best logits are further apart than this, in units of the root mean square of the token's logits, the GPU
/// must find the same: ten times what logits are off on average.
const MARGIN: f32 = 0.2;

fn decoder<D: Kernels>(device: &D, model: &Model, batch: usize, context: usize) -> Decoder<D> {
    Decoder::new(device, model, &Settings::default(), batch, context).unwrap()
}

/// The greatest element, the first if there are several, and how far ahead of the next it is, in units of the root mean square.
fn best(row: &[f32]) -> (usize, f32) {
    let first = (0..row.len()).reduce(|best, i| if row[i] > row[best] { i } else { best }).unwrap();
    let second = (0..row.len()).filter(|i| *i != first).map(|i| row[i]).fold(f32::NEG_INFINITY, f32::max);
    let mean_square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    (first, (row[first] - second) / mean_square.sqrt())
}

/// Of parts of other sizes cuBLAS may add up in another order.
#[test]
fn wherever_the_tables_live_logits_are_the_same_and_the_tokens_theirs() {
    let Some(device) = gpu() else { return };
    let folder = support::folder();
    with_more_tokens("qwen2-tied", folder.path());
    let prompts: Vec<Vec<u32>> = (0..20).map(|i| (0..=i % 3).map(|j| 7 + 131 * i + j).collect()).collect();
    let batch: Vec<_> = prompts.iter().enumerate().map(|(row, tokens)| Sequence { row, tokens }).collect();
    let mut expected = None;
    for model in everywhere(folder.path()) {
        let mut decoder = decoder(&device, &model, 20, 4);
        decoder.forward(&batch).unwrap();
        let (found, mut tokens) = (logits(&mut decoder), Vec::new());
        decoder.greedy(&mut tokens).unwrap();
        let off = distance(&found, expected.get_or_insert_with(|| found.clone()));
        println!("{:?}: off by {off:.1e}", model.tables);
        assert!(off < 1e-2, "{:?}: off by {off:.1e}", model.tables);
        let mut rows = found.chunks(model.config.vocab);
        for (prompt, token) in prompts.iter().zip(tokens) {
            let last = rows.by_ref().take(prompt.len()).last().unwrap();
            assert_eq!(best(last).0, token as usize, "{:?}: by its own logits", model.tables);
        }
    }
}

/// Here weights are rounded on arrival, which rows that never arrive as such must be too.
#[test]
fn rows_of_an_embedding_of_f32_are_those_of_the_table_on_the_device_to_the_bit() {
    let Some(device) = gpu() else { return };
    let folder = data("qwen2-f32");
    let prompt = expected(&folder).prompt;
    let found = everywhere(&folder).map(|model| {
        let mut decoder = decoder(&device, &model, 1, prompt.len());
        decoder.forward(&[Sequence { row: 0, tokens: &prompt }]).unwrap();
        logits(&mut decoder)
    });
    // A head in parts may add up in another order.
    let [on_device, in_file, _] = found;
    let off = distance(&in_file, &on_device);
    assert!(off == 0.0, "off by {off:.1e}");
}

#[test]
fn a_model_in_blocks_computes_what_its_expanded_weights_do_to_the_bit_in_every_tier() {
    let Some(device) = gpu() else { return };
    let (folder, seed) = (copy_of(&data("qwen3")), fastrand::u64(..));
    println!("seed {seed}");
    let path = folder.path().join("blocks.gguf");
    let file = quantised::quantised(folder.path(), &mut fastrand::Rng::with_seed(seed));
    std::fs::write(&path, file.bytes()).unwrap();
    let prompt: Vec<u32> = (0..12).map(|i| (i * 37 + 3) % 320).collect();
    let run = |model: &Model| {
        let mut decoder = decoder(&device, model, 1, prompt.len());
        // In the second pass what is kept is there already.
        let mut passes = [(); 2].map(|()| {
            forget(&mut decoder, 1);
            decoder.forward(&[Sequence { row: 0, tokens: &prompt }]).unwrap();
            logits(&mut decoder).into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        assert!(passes[0] == passes[1], "{:?}: the second pass", model.tables);
        std::mem::take(&mut passes[0])
    };
    for (expanded, mut model) in everywhere(folder.path()).iter().zip(everywhere(&path)) {
        let expected = run(expanded);
        assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()) && expected[0] != expected[1]);
        for tier in [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked] {
            model.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
            assert!(run(&model) == expected, "{:?}, {tier}", model.tables);
        }
    }
}

#[test]
fn a_prompt_of_several_blocks_gives_what_pieces_of_any_length_give() {
    // By the same emulation this text, thirty times as long as the reference's, is off by 3.0e-2, its first part by 2.8e-2.
    const AT_MOST: f64 = 3.3e-2;
    let Some(device) = gpu() else { return };
    let model = Model::open(data("qwen2-tied")).unwrap();
    let ids: Vec<u32> = (0..400u32).map(|i| 3 + i * 7919 % 300).collect();
    let (long, short, vocab) = (&ids[..390], &ids[..150], model.config.vocab);
    let mut whole = decoder(&device, &model, 3, 400);
    let batch =
        [Sequence { row: 2, tokens: short }, Sequence { row: 0, tokens: long }, Sequence { row: 1, tokens: &ids[..1] }];
    whole.forward(&batch).unwrap();
    let at_once = logits(&mut whole);
    let mut on_cpu = decoder(&Cpu, &model, 1, 400);
    on_cpu.forward(&[Sequence { row: 0, tokens: long }]).unwrap();
    let reference = logits(&mut on_cpu);
    // One token by one, and pieces that take the other kernel.
    for piece in [1, 13, 64] {
        let mut pieces = decoder(&device, &model, 1, 400);
        let mut found = Vec::new();
        for tokens in long.chunks(piece) {
            pieces.forward(&[Sequence { row: 0, tokens }]).unwrap();
            found.extend(logits(&mut pieces));
        }
        assert!(found == at_once[150 * vocab..540 * vocab], "pieces of {piece} have other bits");
        assert!(found[..150 * vocab] == at_once[..150 * vocab], "pieces of {piece}");
    }
    let off = distance(&at_once[150 * vocab..540 * vocab], &reference);
    assert!(off <= AT_MOST, "off by {off:.1e}");
}

#[test]
fn the_speller_spells_as_on_the_cpu_and_finds_the_same_token_wherever_the_choice_is_clear() {
    let Some(device) = gpu() else { return };
    let (model, numbers, words) = (Model::open(speller()).unwrap(), numbers(), Words::of_the_speller());
    let (mut on_cpu, mut on_gpu) = (decoder(&Cpu, &model, 100, 48), decoder(&device, &model, 100, 48));
    let [right, right_on_gpu] = [spelled_right(&mut on_cpu, &numbers), spelled_right(&mut on_gpu, &numbers)];
    println!("of {} numbers: {right} right on the CPU, {right_on_gpu} on the GPU", numbers.len());
    assert!((right - right_on_gpu.min(right)) * 1000 <= 5 * numbers.len(), "{right_on_gpu} instead of {right}");

    // Both are given what the CPU writes, so that one difference does not lead to others.
    let (vocab, mut tokens, mut others, mut clearest) = (model.config.vocab, 0, 0, 0.0f32);
    for numbers in numbers.chunks(100) {
        let asked: Vec<_> = numbers.iter().map(|n| words.asks(*n)).collect();
        let prompts: Vec<&[u32]> = asked.iter().map(Vec::as_slice).collect();
        forget(&mut on_cpu, 100);
        let written = generate(&mut on_cpu, &prompts, 32, &model.config.stop);
        let texts: Vec<Vec<u32>> = asked.iter().zip(&written).map(|(a, b)| [a.as_slice(), b].concat()).collect();
        let batch: Vec<_> = texts.iter().enumerate().map(|(row, tokens)| Sequence { row, tokens }).collect();
        forget(&mut on_cpu, 100);
        forget(&mut on_gpu, 100);
        on_cpu.forward(&batch).unwrap();
        on_gpu.forward(&batch).unwrap();
        for (a, b) in logits(&mut on_cpu).chunks(vocab).zip(logits(&mut on_gpu).chunks(vocab)) {
            let ((token, margin), (token_on_gpu, _)) = (best(a), best(b));
            tokens += 1;
            if token != token_on_gpu {
                others += 1;
                clearest = clearest.max(margin);
            }
        }
    }
    println!("{others} of {tokens} tokens differ, the clearest of them {clearest} root mean squares apart on the CPU");
    assert!(clearest <= MARGIN, "a token differs that is {clearest} root mean squares apart on the CPU");
}

#[test]
fn a_pass_takes_no_device_memory_and_what_is_given_back_at_the_end_is_all() {
    let Some(device) = gpu() else { return };
    // The second GPU, where there is one: memory of the first is what the other tests take and give back meanwhile.
    let device = Cuda::new(1).unwrap_or(device);
    let free = |device: &Cuda| device.memory().unwrap().0;
    let model = Model::open(speller()).unwrap();
    let run = |decoder: &mut Decoder<Cuda>| generate(decoder, &[&[5, 6, 7, 8], &[9]], 8, &[]);
    // What CUDA and cuBLAS keep for the process is taken by the first run.
    run(&mut decoder(&device, &model, 2, 32));
    let before = free(&device);
    for _ in 0..3 {
        let mut decoder = decoder(&device, &model, 2, 32);
        let found = run(&mut decoder);
        let during = free(&device);
        for _ in 0..5 {
            forget(&mut decoder, 2);
            assert_eq!(run(&mut decoder), found, "the same every time");
        }
        assert_eq!(free(&device), during, "passes took device memory");
        drop(decoder);
        assert_eq!(free(&device), before, "not all device memory was given back");
    }
}

#[test]
fn heads_that_a_gpu_cannot_compute_are_refused_before_anything_is_loaded() {
    let Some(device) = gpu() else { return };
    // Twice as many heads, half as large: every tensor keeps its shape.
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(data("qwen2-tied")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replace(r#""num_attention_heads": 2"#, r#""num_attention_heads": 8"#);
    std::fs::write(&path, config.replace(r#""num_key_value_heads": 1"#, r#""num_key_value_heads": 4"#)).unwrap();
    let model = Model::open(folder.path()).unwrap();
    assert_eq!(model.config.head_dim, 16);
    let error = Decoder::new(&device, &model, &Settings::default(), 1, 8).expect_err("heads of 16").to_string();
    assert!(error.contains("heads of 16") && error.contains("CPU"), "{error}");
}

#[test]
fn plans_for_memory_of_its_own_keep_to_the_budget_are_no_slower_than_plain_rings_and_no_slower_with_more() {
    if let Some(device) = gpu() {
        check_plans(&device, cases(40));
    }
}
