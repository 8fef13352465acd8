//! What tests of whole models share: references, the speller, and how a decoder is asked.

use std::{collections::HashMap, fs, ops::ControlFlow, path::Path};

use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Cache, Choice, Decoder, Fit, Model, Tables},
    packed::{self, Description},
    plan::{Bandwidths, Budget, Part},
};
use safetensors::{SafeTensors, tensor::TensorView};

use super::pack;
use support::{copy_of, data, folder, speller};

/// A model with its tables in each of the places.
pub fn everywhere(folder: &Path) -> [Model; 3] {
    let model = Model::open(folder).unwrap();
    [Tables::OnDevice, Tables::EmbeddingInFile, Tables::HeadStreamed].map(|tables| {
        let mut model = model.clone();
        model.tables = tables;
        model
    })
}

/// A reference with a larger vocabulary, of random tokens, so that the head is larger than a layer.
pub fn with_more_tokens(name: &str, folder: &Path) {
    const VOCABULARY: usize = 3001;
    let bytes = fs::read(data(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        let (mut shape, mut bytes) = (view.shape().to_vec(), view.data().to_vec());
        if name.ends_with("embed_tokens.weight") || name == "lm_head.weight" {
            let missing = (VOCABULARY - shape[0]) * shape[1];
            let more = (0..missing).flat_map(|_| half::bf16::from_f32(4.0 * (rng.f32() - 0.5)).to_le_bytes());
            bytes.extend(more);
            shape[0] = VOCABULARY;
        }
        (name, shape, bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    let config = fs::read_to_string(data(name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["vocab_size"] = VOCABULARY.into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// A copy of a model whose tensors of BF16 are packed, whether that makes them smaller or not.
pub fn packed(original: &Path) -> tempfile::TempDir {
    let copy = copy_of(original);
    for entry in fs::read_dir(copy.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors")
            && !path.ends_with("expected.safetensors")
        {
            pack_file(&path);
        }
    }
    copy
}

fn pack_file(path: &Path) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut metadata = HashMap::from([(packed::KEY.to_owned(), packed::VERSION.to_owned())]);
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        if view.dtype() != safetensors::Dtype::BF16 || view.data().is_empty() {
            tensors.push((name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            continue;
        }
        let weights: Vec<_> = view.data().as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
        let (description, bytes) = pack(view.shape(), Description::part_of(view.shape()), &weights);
        metadata.insert(format!("{}:{name}", packed::KEY), description.to_json());
        tensors.push((name, safetensors::Dtype::U8, vec![bytes.len()], bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

/// The dimensions of a Llama.
#[derive(Debug)]
pub struct Dimensions {
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    /// Of queries, and of keys and values.
    pub heads: [usize; 2],
    pub vocab: usize,
    pub tied: bool,
}

/// A model on paper: a file of BF16 that is all hole but for its header.
pub fn hollow(dimensions: &Dimensions, folder: &Path) {
    let &Dimensions { hidden, ffn, layers, heads: [heads, kv_heads], vocab, tied } = dimensions;
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied,
    });
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !tied {
        tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    let kv = hidden / heads * kv_heads;
    for layer in 0..layers {
        for (name, rows, columns) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, columns]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![hidden]));
        }
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let path = folder.join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat()).unwrap();
    fs::File::options().append(true).open(&path).unwrap().set_len((8 + header.len() + end) as u64).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// What transformers computed for a reference checkpoint.
pub struct Expected {
    pub prompt: Vec<u32>,
    pub continuation: Vec<u32>,
    pub floats: HashMap<String, Vec<f32>>,
}

pub fn expected(folder: &Path) -> Expected {
    let bytes = fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| {
        let view = file.tensor(name).unwrap();
        view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
    };
    let floats =
        |name: &str| file.tensor(name).unwrap().data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let names = file.names().into_iter().filter(|name| name.starts_with("hidden") || *name == "logits");
    Expected {
        prompt: ids("prompt"),
        continuation: ids("continuation"),
        floats: names.map(|name| (name.to_owned(), floats(name))).collect(),
    }
}

/// ‖a − b‖ / ‖b‖
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

/// The reference spelling, written down independently of the model.
pub fn spell(n: u32) -> String {
    const ONES: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let joined = |head: String, glue: &str, rest: u32| if rest == 0 { head } else { head + glue + &spell(rest) };
    match n {
        0..20 => ONES[n as usize].into(),
        20..100 => joined(TENS[n as usize / 10].into(), "-", n % 10),
        100..1000 => joined(format!("{} hundred", ONES[n as usize / 100]), " ", n % 100),
        _ => joined(format!("{} thousand", spell(n / 1000)), " ", n % 1000),
    }
}

/// The logits of every token of the pass before.
pub fn logits<D: Kernels>(decoder: &mut Decoder<D>) -> Vec<f32> {
    let mut all = Vec::new();
    let read = decoder.all_logits(|rows| {
        all.extend_from_slice(rows);
        Ok::<_, Error>(())
    });
    read.unwrap();
    all
}

/// What follows each prompt.
pub fn generate<D: Kernels>(decoder: &mut Decoder<D>, prompts: &[&[u32]], most: usize, stop: &[u32]) -> Vec<Vec<u32>> {
    let mut found = vec![Vec::new(); prompts.len()];
    let generated = decoder.generate(prompts, most, stop, Choice::Greedy, |row, token| {
        found[row].push(token);
        Ok::<_, Error>(ControlFlow::Continue(()))
    });
    generated.unwrap();
    found
}

/// Empties the first rows of the cache.
pub fn forget<D: Kernels>(decoder: &mut Decoder<D>, rows: usize) {
    (0..rows).for_each(|row| decoder.truncate(row, 0).unwrap());
}

/// The speller's words: what its `tokenizer.json` says, as far as numbers and their spellings go.
pub struct Words(HashMap<String, u32>);

impl Words {
    pub fn of_the_speller() -> Self {
        let text = fs::read_to_string(speller().join("tokenizer.json")).unwrap();
        let tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
        Self(serde_json::from_value(tokenizer["model"]["vocab"].clone()).unwrap())
    }

    /// The tokens that ask for a number's spelling: one for each digit, and one for the sign.
    pub fn asks(&self, number: u32) -> Vec<u32> {
        format!("{number}=").chars().map(|character| self.0[character.encode_utf8(&mut [0; 4]) as &str]).collect()
    }

    /// The text of such tokens, up to the end of a text.
    pub fn text(&self, tokens: &[u32]) -> String {
        let piece = |token: &u32| {
            let (piece, _) = self.0.iter().find(|(_, id)| *id == token).expect("a token of the speller");
            if piece.starts_with("<|") { String::new() } else { piece.replace('Ġ', " ") }
        };
        tokens.iter().map(piece).collect()
    }
}

/// 500 random numbers, always the same.
pub fn numbers() -> Vec<u32> {
    let mut rng = fastrand::Rng::with_seed(20);
    (0..500).map(|_| rng.u32(..1_000_000)).collect()
}

/// How many numbers a decoder with room for 100 sequences of 48 tokens spells right.
pub fn spelled_right<D: Kernels>(decoder: &mut Decoder<D>, numbers: &[u32]) -> usize {
    let (words, stop, mut right) = (Words::of_the_speller(), decoder.model().config.stop.clone(), 0);
    for numbers in numbers.chunks(100) {
        forget(decoder, 100);
        let asked: Vec<_> = numbers.iter().map(|n| words.asks(*n)).collect();
        let prompts: Vec<&[u32]> = asked.iter().map(Vec::as_slice).collect();
        for (n, found) in numbers.iter().zip(generate(decoder, &prompts, 32, &stop)) {
            right += usize::from(words.text(&found) == format!(" {}", spell(*n)));
        }
    }
    right
}

/// What the errors name as the least: of RAM alone, or of GPU memory and then of RAM beside that.
pub fn least<D: Kernels>(device: &D, model: &Model, batch: usize, context: usize) -> Budget {
    let named = |budget: Budget| -> usize {
        let fitted = Fit::new(device, budget, Cache::full(batch, context)).fastest(&mut model.clone());
        match fitted.expect_err("nothing is too little") {
            Error::TooLittle { least, .. } => least,
            error => panic!("{error}"),
        }
    };
    if device.memory_is_ram() {
        return Budget { device_bytes: None, host_bytes: named(Budget { device_bytes: None, host_bytes: 0 }) };
    }
    let device_bytes = Some(named(Budget { device_bytes: Some(0), host_bytes: usize::MAX }));
    Budget { device_bytes, host_bytes: named(Budget { device_bytes, host_bytes: 0 }) }
}

/// Checks plans for random models and budgets: whatever the model, they keep to the budget, are no slower than plain rings, and
/// no slower with more memory; and the least is the least.
pub fn check_plans<D: Kernels>(device: &D, cases: u32) {
    let shared = device.memory_is_ram();
    let start = fastrand::u64(..);
    for seed in (0..cases).map(|i| start.wrapping_add(i.into())) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let folder = folder();
        let dimensions = Dimensions {
            hidden: [64, 256][rng.usize(..2)],
            ffn: [64, 1000][rng.usize(..2)],
            layers: rng.usize(1..9),
            heads: [4, 2],
            vocab: [5, 343, 3001, 40_000][rng.usize(..4)],
            tied: rng.bool(),
        };
        hollow(&dimensions, folder.path());
        let model = Model::open(folder.path()).unwrap();
        let (batch, context) = ([1, 40][rng.usize(..2)], [1, 300][rng.usize(..2)]);
        let what = format!("seed {seed}: {dimensions:?}, batch {batch}, context {context}");
        let by = Bandwidths { disk: 1e8 + 1e10 * rng.f64(), copy: 1e8 + 1e11 * rng.f64() };
        let taken = |model: &Model, settings: &Settings| -> Budget {
            let parts = Decoder::memory(device, model, settings, Cache::full(batch, context)).unwrap();
            let [device, host] = Part::totals(&parts);
            match shared {
                true => Budget { device_bytes: None, host_bytes: device + host },
                false => Budget { device_bytes: Some(device), host_bytes: host },
            }
        };
        let fits = |taken: Budget, budget: Budget| {
            taken.device_bytes <= budget.device_bytes && taken.host_bytes <= budget.host_bytes
        };
        let time = |model: &Model, settings: &Settings| {
            Decoder::plan(device, model, settings).unwrap().forecast(by).pass_seconds
        };
        let plain: Vec<_> = everywhere(folder.path())
            .into_iter()
            .flat_map(|model| {
                [0, 1, 2]
                    .map(|n_cpu_pinned| (model.clone(), Settings { n_gpu: 1, n_cpu_pinned, ..Settings::default() }))
            })
            .map(|(model, settings)| (taken(&model, &settings), time(&model, &settings)))
            .collect();
        let mut budget = least(device, &model, batch, context);
        for below in [
            Budget { host_bytes: budget.host_bytes - 1, ..budget },
            Budget { device_bytes: budget.device_bytes.map(|bytes| bytes - 1), ..budget },
        ] {
            let fitted = Fit { bandwidths: by, ..Fit::new(device, below, Cache::full(batch, context)) }
                .fastest(&mut model.clone());
            assert_eq!(fitted.is_ok(), below == budget, "{what}: {below:?}");
        }
        let mut before = f64::INFINITY;
        let all = fs::metadata(folder.path().join("model.safetensors")).unwrap().len() as usize;
        for round in 0..16 {
            let mut model = model.clone();
            let settings = Fit { bandwidths: by, ..Fit::new(device, budget, Cache::full(batch, context)) }
                .fastest(&mut model)
                .unwrap();
            let (memory, now) = (taken(&model, &settings), time(&model, &settings));
            assert!(fits(memory, budget), "{what}: {memory:?} for {budget:?}");
            // Units that are alike but for a sixty-fourth count as one another, which shows in both comparisons.
            for (memory, time) in plain.iter().filter(|(memory, _)| fits(*memory, budget)) {
                assert!(now <= time * 1.02, "{what}: {now} s, {time} s with {memory:?} of {budget:?}");
            }
            assert!(now <= before * 1.02, "{what}, round {round}: {before} s became {now} s with {budget:?}");
            before = now;
            budget.host_bytes += rng.usize(..1 + all / 4);
            budget.device_bytes = budget.device_bytes.map(|bytes| bytes + rng.usize(..1 + all / 4));
        }
    }
}
