//! The decoder beside `tests/oracle.rs`: long prompts, misuse, memory and budgets; and the speller, which anyone can check by eye.

mod common;

use std::{collections::HashMap, fs, ops::ControlFlow, os::unix::fs::FileExt};

use common::{Dimensions, everywhere, expected, forget, generate, hollow, least, logits, with_more_tokens};
use layer_streamer::{
    Error, MemoryKind, Settings,
    device::Cpu,
    kernels::PAGE,
    model::{Cache, Choice, Decoder, Fit, Model, Sequence, Tables},
    plan::{Bandwidths, Budget, Part, Purpose},
    trace::Stage,
};
use safetensors::SafeTensors;
use support::{data, speller};

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

fn decoder(model: &Model, batch: usize, context: usize) -> Decoder<Cpu> {
    Decoder::new(&Cpu, model, &Settings::default(), batch, context).unwrap()
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
    assert!(at_once[150 * vocab..540 * vocab] == one_by_one, "the long sequence has other bits");
    assert!(at_once[..150 * vocab] == one_by_one[..150 * vocab], "the short sequence has other bits");
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
        .generate(&[prompt], 10, &[], Choice::Greedy, |_, token| {
            seen.push(token);
            Ok::<_, Error>(if seen.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
        .unwrap();
    assert_eq!((seen.as_slice(), units(&mut broken)), (&all[..3], 3 * layers));
    assert!(broken.decode(&[0, 0], 1, &[], Choice::Greedy, |_, _| Ok::<_, Error>(ControlFlow::Continue(()))).is_err());
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
    assert!(again == whole[3 * model.config.vocab..]);
}

#[test]
fn a_cancel_ends_a_pass_before_the_next_block_of_tokens_even_in_the_last_layer() {
    let model = Model::open(data("qwen2-tied")).unwrap();
    let mut decoder = decoder(&model, 1, 400);
    let (layers, ids) = (model.config.layers, (0..390u32).map(|i| 3 + i * 7919 % 300).collect::<Vec<_>>());
    let canceller = decoder.streamer().canceller();
    decoder.streamer().track_progress(move |progress| {
        if progress.done == layers {
            canceller.cancel();
        }
    });
    let batch = [Sequence { row: 0, tokens: &ids }];
    assert!(matches!(decoder.forward(&batch), Err(Error::Cancelled)));
    assert_eq!(decoder.length(0), 0);
    decoder.streamer().track_progress(|_| {});
    decoder.forward(&batch).unwrap();
}

#[test]
fn an_embedding_whose_file_becomes_shorter_is_an_error_and_the_next_pass_works() {
    const NAME: &str = "model.embed_tokens.weight";
    let folder = support::folder();
    let (whole, [table, rest]) = (fs::read(data("qwen2-tied").join("model.safetensors")).unwrap(), SHARDS);
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let map: HashMap<_, _> =
        tensors.names().into_iter().map(|name| (name, if name == NAME { table } else { rest })).collect();
    for shard in [table, rest] {
        let views = tensors.iter().filter(|(name, _)| map[name] == shard);
        safetensors::serialize_to_file(views, None, &folder.path().join(shard)).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    fs::copy(data("qwen2-tied").join("config.json"), folder.path().join("config.json")).unwrap();

    let mut model = Model::open(folder.path()).unwrap();
    model.tables = Tables::EmbeddingInFile;
    let mut decoder = decoder(&model, 1, 8);
    let mut step = |tokens: &[u32]| decoder.forward(&[Sequence { row: 0, tokens }]).map_err(|error| error.to_string());
    step(&[3]).unwrap();
    let table = fs::File::options().read(true).write(true).open(folder.path().join(table)).unwrap();
    let modified = table.metadata().unwrap().modified().unwrap();
    let (length, last) = (table.metadata().unwrap().len(), model.config.vocab as u32 - 1);
    let mut end = [0];
    table.read_exact_at(&mut end, length - 1).unwrap();
    table.set_len(length - 1).unwrap();
    let at = format!("byte {}", length - 2 * model.config.hidden as u64);
    let said = step(&[4, last]).unwrap_err();
    assert!(["the embedding", NAME, SHARDS[0], &at, "became shorter"].iter().all(|part| said.contains(part)), "{said}");
    // The rows that are there still are another file's.
    let said = step(&[4, last - 1]).unwrap_err();
    assert!(said.contains(SHARDS[0]) && said.contains("has changed"), "{said}");
    table.write_all_at(&end, length - 1).unwrap();
    table.set_modified(modified).unwrap();
    step(&[last]).unwrap();
}

#[test]
fn the_memory_table_is_the_sum_of_its_parts_by_hand() {
    let (model, settings) = (Model::open(data("qwen2-f32")).unwrap(), Settings::default());
    let c = &model.config;
    let memory = |cache: Cache| Decoder::memory(&Cpu, &model, &settings, cache).unwrap();
    let near = |parts: &[Part], purpose: Purpose, expected: usize| {
        let got = parts.iter().find(|part| part.purpose == purpose).unwrap().bytes;
        assert!(got >= expected && got < expected + expected / 8 + 8192, "{purpose}: {got}, by hand {expected}");
    };
    // Two pages of each sequence.
    let (parts, page) = (&memory(Cache::full(3, 100))[..], 2 * 4 * c.layers * c.kv_heads * PAGE * c.head_dim);
    near(parts, Purpose::KvCache { sequences: 3, tokens: 100 }, 3 * 2 * page);
    let block = 2 * c.hidden + 3 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim + 2 * c.ffn;
    near(parts, Purpose::Activations, 4 * (300 * c.hidden + 256 * block + 16 * (c.hidden + c.vocab) + 3 * c.hidden));
    near(parts, Purpose::Statics, 4 * (2 * c.vocab * c.hidden + c.hidden));
    let shared = memory(Cache { sequences: 3, context: 100, tokens: 200 });
    near(&shared, Purpose::KvCache { sequences: 1, tokens: 4 * PAGE }, 4 * page);
}

#[test]
fn the_speller_is_right_on_at_least_995_in_1000_random_numbers() {
    let numbers = common::numbers();
    let right = everywhere(&speller()).map(|model| {
        let right = common::spelled_right(&mut decoder(&model, 100, 48), &numbers);
        println!("{:?}: {right} of {} right", model.tables, numbers.len());
        right
    });
    assert!(right[0] * 1000 >= 995 * numbers.len() && right == [right[0]; 3], "{right:?} of {}", numbers.len());
}

#[test]
fn a_head_in_several_parts_gives_what_the_whole_one_gives() {
    for name in ["mistral", "qwen2-tied"] {
        let folder = support::folder();
        with_more_tokens(name, folder.path());
        let [whole, .., parts] = everywhere(folder.path());
        let units = |model: &Model| Decoder::plan(&Cpu, model, &Settings::default()).unwrap().units();
        assert!(units(&parts) > units(&whole) + 1, "{name}: the head is one part");
        // Twenty sequences: more than go through the head at once, and the last some alone.
        let prompts: Vec<Vec<u32>> = (0..20).map(|i| (0..=i % 3).map(|j| 7 + 131 * i + j).collect()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let [expected, found] = [whole, parts].map(|model| {
            let mut decoder = decoder(&model, 20, 12);
            let tokens = generate(&mut decoder, &prompts[..17], 8, &[]);
            forget(&mut decoder, 20);
            decoder
                .forward(&prompts.iter().enumerate().map(|(row, tokens)| Sequence { row, tokens }).collect::<Vec<_>>())
                .unwrap();
            let (mut next, logits) = (Vec::new(), logits(&mut decoder));
            // They need not be asked for in this order.
            decoder.greedy(&mut next).unwrap();
            (tokens, next, logits)
        });
        assert_eq!((&found.0, &found.1), (&expected.0, &expected.1), "{name}");
        assert!(expected.0.iter().flatten().any(|token| *token >= 1600), "{name}: no token of a later part");
        assert!(found.2 == expected.2, "{name}");
    }
}

#[test]
fn from_the_least_memory_on_more_of_it_brings_the_same_text_with_less_to_read() {
    let (folder, reference) = (data("qwen2-f32"), expected(&data("qwen2-f32")));
    let open = || Model::open(&folder).unwrap();
    let context = reference.prompt.len() + 16;
    let by = Bandwidths { disk: 1e9, copy: 10e9 };
    let fit = |model: &mut Model, host_bytes: usize| {
        let budget = Budget { device_bytes: None, host_bytes };
        Fit { bandwidths: by, ..Fit::new(&Cpu, budget, Cache::full(1, context)) }.fastest(model)
    };
    let total = |model: &Model, settings: &Settings| -> usize {
        Decoder::memory(&Cpu, model, settings, Cache::full(1, context)).unwrap().iter().map(|part| part.bytes).sum()
    };
    // What it takes with all tables on the device and the shortest of rings.
    let shortest = Settings { n_gpu: 1, n_cpu_pinned: 0, n_cpu: 0, ..Settings::default() };
    let on_device = total(&open(), &shortest);
    let Err(Error::TooLittle { least, .. }) = fit(&mut open(), 1) else { panic!("one byte is enough") };
    assert!(fit(&mut open(), least - 1).is_err(), "{least} is not the least");
    let tables = 4 * 2 * open().config.vocab * open().config.hidden;
    assert!(
        least + tables / 2 < on_device,
        "{least} bytes, {on_device} with all tables on the device, which are {tables}"
    );
    let (mut seen, mut before) = (Vec::new(), usize::MAX);
    for step in 0..24 {
        let mut model = open();
        let settings = fit(&mut model, least + step * (on_device + (8 << 20) - least) / 20).unwrap();
        assert!(total(&model, &settings) <= least + step * (on_device + (8 << 20) - least) / 20);
        let read = Decoder::plan(&Cpu, &model, &settings).unwrap().forecast(by).disk_bytes;
        assert!(read <= before, "{read} bytes after {before}");
        before = read;
        let mut decoder = Decoder::new(&Cpu, &model, &settings, 1, context).unwrap();
        assert_eq!(generate(&mut decoder, &[&reference.prompt], 16, &[])[0], reference.continuation, "step {step}");
        if !seen.contains(&model.tables) {
            seen.push(model.tables);
        }
    }
    println!("{seen:?}, at last {before} bytes from disk");
    assert!(seen.first() == Some(&Tables::HeadStreamed) && before == 0, "{seen:?}, {before}");
}

#[test]
fn a_70b_model_fits_8_gb_of_gpu_memory_and_less_where_its_head_is_streamed() {
    let folder = support::folder();
    hollow(
        &Dimensions { hidden: 8192, ffn: 28672, layers: 80, heads: [64, 8], vocab: 128256, tied: false },
        folder.path(),
    );
    let fit = |device_bytes: usize| {
        let mut model = Model::open(folder.path()).unwrap();
        let budget = Budget { device_bytes: Some(device_bytes), host_bytes: 64_000_000_000 };
        let settings = Fit::new(&Cpu, budget, Cache::full(1, 2048)).fastest(&mut model)?;
        let parts = Decoder::memory(&Cpu, &model, &settings, Cache::full(1, 2048))?;
        let [device, _] = Part::totals(&parts);
        assert!(device <= device_bytes, "{parts:?}");
        Ok::<_, Error>(model.tables)
    };
    assert!(fit(8_000_000_000).is_ok());
    // Two slots of 1.71 GB and a KV cache of 1.34 GB (F32), but no room for a head of 2.1 GB.
    assert_eq!(fit(5_500_000_000).unwrap(), Tables::HeadStreamed);
    let refused = fit(4_000_000_000).unwrap_err();
    assert!(matches!(refused, Error::TooLittle { memory: MemoryKind::Device, .. }), "{refused}");
}

#[test]
fn the_least_memory_for_a_tied_half_billion_is_less_than_its_embedding_and_layers_took() {
    let folder = support::folder();
    hollow(
        &Dimensions { hidden: 896, ffn: 4864, layers: 24, heads: [14, 2], vocab: 151936, tied: true },
        folder.path(),
    );
    let model = Model::open(folder.path()).unwrap();
    let (table, layer) = (2 * 151936 * 896, 2 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 4864 * 896));
    let Budget { host_bytes, .. } = least(&Cpu, &model, 1, 64);
    println!("{host_bytes} bytes");
    // Two slots; of the rest the logits are most.
    assert!(host_bytes < 2 * layer + (20 << 20) && 2 * layer + (20 << 20) < table, "{host_bytes}");
}

#[test]
fn whatever_the_model_plans_keep_to_the_budget_are_no_slower_than_plain_rings_and_no_slower_with_more() {
    common::check_plans(&Cpu, support::cases(40));
}
