//! Qwen2.5 on the library's own API, end to end: what `layer_streamer::model` does for every family, written out for one. Read it to
//! learn how an engine with layers of its own embeds the streamer.
//!
//! ```sh
//! cargo run --release -p qwen                                   # Qwen2.5-Coder-7B-Instruct, 15 GB, downloaded once
//! cargo run --release -p qwen -- Qwen/Qwen2.5-0.5B-Instruct "Write a quicksort in Rust."
//! cargo run --release -p qwen -- examples/speller "4096="       # three megabytes, no download
//! ```
//!
//! Any folder of a Qwen2 or Qwen2.5 model will do, or its name on the Hugging Face hub. One prompt, one sequence, greedy.

mod memory;

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use layer_streamer::{
    Checkpoint, DType, Error, Layer, LayerStreamer, StaticTensors,
    device::Cpu,
    kernels::{AttentionMask, Kernels, PAGE, Ragged, RopeLayout},
    plan::{Bandwidths, Budget, FixedOverhead},
};
use layer_streamer_hub::Name;
use memory::Buffer;
use serde::Deserialize;
use tokenizers::Tokenizer;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const EMBED: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// Tokens of prompt and answer together.
const CONTEXT: usize = 2048;

const USUAL_MODEL: &str = "Qwen/Qwen2.5-Coder-7B-Instruct";

/// A model's folder: what is said, if it is one; or else that of the hub's model of this name, which is downloaded once.
fn find(said: &Path) -> Result<PathBuf, Failure> {
    if said.is_dir() {
        return Ok(said.to_owned());
    }
    let text = said.display().to_string();
    let name = Name::parse(&text).ok_or_else(|| format!("{text} is no folder, nor a name such as {USUAL_MODEL}"))?;
    Ok(name.folder(false)?)
}

/// What the folder's `config.json` says of the model's shape.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    rms_norm_eps: f32,
    #[serde(default)]
    rope_theta: Option<f32>,
    #[serde(default)]
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    max_position_embeddings: Option<usize>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: f32,
}

impl Config {
    fn read(folder: &Path) -> Result<Self, Failure> {
        let path = folder.join("config.json");
        let text = fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let config: Self = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        if config.model_type != "qwen2" {
            return Err(format!("{}: a {} model, this is for qwen2", path.display(), config.model_type).into());
        }
        Ok(config)
    }

    fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// How fast each pair of a head's elements rotates: `theta^(-2i / size)` radians per position.
    fn frequencies(&self) -> Vec<f32> {
        let theta = self.rope_parameters.as_ref().map(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let size = self.head_size();
        (0..size / 2).map(|i| theta.powf(-2.0 * i as f32 / size as f32)).collect()
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let mut arguments = env::args_os().skip(1);
    let model = arguments.next().unwrap_or_else(|| USUAL_MODEL.into());
    let folder = find(Path::new(&model))?;
    let prompt = arguments
        .next()
        .map_or_else(|| "Write a quicksort in Rust.".into(), |text| text.to_string_lossy().into_owned());
    #[cfg(feature = "cuda")]
    if let Ok(device) = layer_streamer::device::Cuda::new(0) {
        return answer(&device, &folder, &prompt);
    }
    answer(&Cpu, &folder, &prompt)
}

/// Prints what the model answers.
fn answer<D: Kernels>(device: &D, folder: &Path, prompt: &str) -> Result<(), Failure> {
    let config = Config::read(folder)?;
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let end = tokenizer.token_to_id("<|im_end|>");
    // Qwen's chat template, for a question without a system message; a model without its tokens continues the text.
    let text = match end {
        Some(_) => format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"),
        None => prompt.to_owned(),
    };
    let mut tokens = tokenizer.encode(text, true)?.get_ids().to_vec();
    let stop = [end, tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<eos>")];

    let mut qwen = Qwen::new(device, folder, config)?;
    let mut words = tokenizer.decode_stream(true);
    let mut new = tokens.clone();
    while tokens.len() < qwen.context {
        let next = qwen.forward(&new)?;
        if stop.contains(&Some(next)) {
            break;
        }
        print!("{}", words.step(next)?.unwrap_or_default());
        io::stdout().flush()?;
        tokens.push(next);
        new = vec![next];
    }
    println!();
    eprintln!("{}", qwen.streamer.verdict().map_or_else(String::new, |verdict| verdict.to_string()));
    Ok(())
}

/// The model: a streamer for its layers, and what stays on the device.
struct Qwen<D: Kernels> {
    streamer: LayerStreamer<D>,
    statics: StaticTensors<D>,
    state: State<D>,
    context: usize,
}

/// What layers compute with, besides their weights.
struct State<D: Kernels> {
    device: D,
    stream: D::Stream,
    config: Config,
    /// Keys and values by layer, each `[pages, kv_heads, PAGE, head_size]`.
    cache: Vec<[Buffer<D>; 2]>,
    /// Which pages the sequence has, `[1, pages]`.
    pages: Buffer<D>,
    /// Tokens that the cache holds.
    held: usize,
    frequencies: Buffer<D>,
}

impl<D: Kernels> Qwen<D> {
    fn new(device: &D, folder: &Path, config: Config) -> Result<Self, Failure> {
        let checkpoint = Checkpoint::open(folder)?;
        // One unit for each layer, with weights of the type that the device computes with.
        let precision = device.precision();
        let mut units = checkpoint.layers()?;
        if let Some(dtype) = precision.weight {
            units.iter_mut().for_each(|unit| _ = unit.convert(dtype));
        }
        let context = CONTEXT.min(config.max_position_embeddings.unwrap_or(CONTEXT));
        let pages = context.div_ceil(PAGE);
        let cached = [pages, config.num_key_value_heads, PAGE, config.head_size()];
        let cache_bytes = 2 * config.num_hidden_layers * precision.cache.bytes_of(&cached).unwrap_or(usize::MAX);
        let head_bytes = 2 * config.vocab_size * config.hidden_size * 2;

        // As many layers stay in memory as what is free allows; the others are streamed in every pass.
        let overhead = FixedOverhead { device_bytes: cache_bytes + head_bytes, ..FixedOverhead::default() };
        let placement = Budget::free(device)?.plan(&checkpoint, &units, overhead, Bandwidths::default())?;
        placement.apply_to(&mut units)?;
        let streamer = LayerStreamer::new(device, &checkpoint, &units, &placement.settings)?;
        let names = if config.tie_word_embeddings { &[EMBED, NORM][..] } else { &[EMBED, NORM, HEAD] };
        let statics = streamer.load_static(names)?;

        let stream = device.stream()?;
        device.prepare(&stream)?;
        let cache = (0..config.num_hidden_layers).map(|_| {
            Ok([(); 2].map(|()| Buffer::new(device, precision.cache, &cached))).and_then(|[k, v]| Ok([k?, v?]))
        });
        let cache = cache.collect::<Result<Vec<_>, Error>>()?;
        let frequencies = Buffer::filled(device, &stream, &config.frequencies())?;
        // There is one sequence, which has all pages of the cache, in order.
        let mut pages = Buffer::filled(device, &stream, &(0..pages as u32).collect::<Vec<_>>())?;
        pages.reshape(&[1, cached[0]])?;
        let state = State { device: device.clone(), stream, config, cache, pages, held: 0, frequencies };
        Ok(Self { streamer, statics, state, context })
    }

    /// Sends tokens through the model, after those before, and returns the most likely next one.
    fn forward(&mut self, tokens: &[u32]) -> Result<u32, Failure> {
        let Self { streamer, statics, state, .. } = self;
        let (device, stream, config) = (&state.device, &state.stream, &state.config);
        let (hidden, count) = (config.hidden_size, tokens.len());

        let mut residual = Buffer::new(device, DType::F32, &[count, hidden])?;
        let ids = Buffer::filled(device, stream, tokens)?;
        device.embed(stream, statics.tensor(EMBED)?, ids.read(), residual.write())?;

        // The layers, each as it arrives: the next are on their way meanwhile.
        let pass = Pass::new(state, count)?;
        let residual = streamer.run_pass(stream, residual, |mut residual, layer| {
            state.layer(layer, &mut residual, &pass)?;
            Ok::<_, Error>(residual)
        })?;

        // The last token's norm and logits.
        let mut last = Buffer::new(device, DType::F32, &[1, hidden])?;
        let number = Buffer::filled(device, stream, &[count as u32 - 1])?;
        device.gather(stream, residual.read(), number.read(), last.write())?;
        let mut normed = Buffer::new(device, device.precision().activation, &[1, hidden])?;
        device.rms_norm(stream, last.read(), statics.tensor(NORM)?, 0.0, config.rms_norm_eps, normed.write())?;
        let mut logits = Buffer::new(device, DType::F32, &[1, config.vocab_size])?;
        let head = statics.tensor(if config.tie_word_embeddings { EMBED } else { HEAD })?;
        device.linear(stream, normed.read(), head, None, logits.write())?;
        let mut best = Buffer::new(device, DType::U32, &[1])?;
        device.argmax(stream, logits.read(), best.write())?;
        state.held += count;
        match best.to_host::<u32>(&state.stream)?[0] {
            u32::MAX => Err("the model computed logits that are NaN".into()),
            token => Ok(token),
        }
    }
}

/// What the layers of a pass have in common.
struct Pass<D: Kernels> {
    count: usize,
    positions: Buffer<D>,
    offsets: Buffer<D>,
    lengths: Buffer<D>,
}

impl<D: Kernels> Pass<D> {
    fn new(state: &State<D>, count: usize) -> Result<Self, Error> {
        let (first, end) = (state.held as u32, (state.held + count) as u32);
        let words = |words: &[u32]| Buffer::filled(&state.device, &state.stream, words);
        Ok(Self {
            count,
            positions: words(&(first..end).collect::<Vec<_>>())?,
            // One sequence: all of these tokens, which are the last of so many.
            offsets: words(&[0, count as u32])?,
            lengths: words(&[end])?,
        })
    }
}

impl<D: Kernels> State<D> {
    /// A layer of one's own: grouped-query attention with rotated queries and keys, then SwiGLU, each after a norm and added to
    /// the residual stream. Weights are read on the stream, which waits for the layer's arrival.
    fn layer(&self, layer: &Layer<'_, D>, residual: &mut Buffer<D>, pass: &Pass<D>) -> Result<(), Error> {
        let Self { device, stream, config, .. } = self;
        let (count, hidden, eps) = (pass.count, config.hidden_size, config.rms_norm_eps);
        let activation = device.precision().activation;

        let mut normed = Buffer::new(device, activation, &[count, hidden])?;
        let weight = layer.tensor("input_layernorm.weight")?;
        device.rms_norm(stream, residual.read(), weight, 0.0, eps, normed.write())?;
        let attended = self.attention(layer, &normed, pass)?;

        let weight = layer.tensor("post_attention_layernorm.weight")?;
        device.add_rms_norm(stream, residual.write(), attended.read(), weight, 0.0, eps, normed.write())?;
        let wide = [count, config.intermediate_size];
        let mut gate = self.linear(layer, &normed, "mlp.gate_proj", activation, &wide)?;
        let up = self.linear(layer, &normed, "mlp.up_proj", activation, &wide)?;
        device.swiglu(stream, gate.write(), up.read())?;
        let down = self.linear(layer, &gate, "mlp.down_proj", activation, &[count, hidden])?;
        device.add(stream, residual.write(), down.read())
    }

    fn attention(&self, layer: &Layer<'_, D>, x: &Buffer<D>, pass: &Pass<D>) -> Result<Buffer<D>, Error> {
        let Self { device, stream, config, .. } = self;
        let (count, size, activation) = (pass.count, config.head_size(), device.precision().activation);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let batch = Ragged { q_offsets: pass.offsets.read(), kv_lens: pass.lengths.read(), pages: self.pages.read() };
        let rotated = |name: &str, heads: usize| {
            let flat = self.linear(layer, x, name, DType::F32, &[count, heads * size])?;
            let mut out = Buffer::new(device, activation, &[count, heads, size])?;
            let (positions, frequencies) = (pass.positions.read(), self.frequencies.read());
            let x = flat.shaped(&[count, heads, size])?;
            device.rope(stream, x, positions, frequencies, 1.0, RopeLayout::Halves, out.write())?;
            Ok::<_, Error>(out)
        };
        let (queries, new_keys) = (rotated("self_attn.q_proj", heads)?, rotated("self_attn.k_proj", kv_heads)?);
        let new_values = self.linear(layer, x, "self_attn.v_proj", activation, &[count, kv_heads * size])?;

        // New keys and values go to their places in the cache; the queries see all of it up to their own.
        let [keys, values] = &self.cache[layer.index()];
        device.append_kv(stream, new_keys.read(), batch, keys.write_shared())?;
        device.append_kv(stream, new_values.shaped(&[count, kv_heads, size])?, batch, values.write_shared())?;
        let mut out = Buffer::new(device, activation, &[count, heads, size])?;
        let mask = AttentionMask { scale: (size as f32).powf(-0.5), window: None, soft_cap: None };
        device.attention(stream, queries.read(), keys.read(), values.read(), batch, mask, out.write())?;
        out.reshape(&[count, heads * size])?;
        self.linear(layer, &out, "self_attn.o_proj", activation, &[count, config.hidden_size])
    }

    /// `x` by a projection, with its bias where it has one.
    fn linear(
        &self,
        layer: &Layer<'_, D>,
        x: &Buffer<D>,
        name: &str,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Buffer<D>, Error> {
        let mut out = Buffer::new(&self.device, dtype, shape)?;
        let (weight, bias) = (layer.tensor(&format!("{name}.weight"))?, layer.get(&format!("{name}.bias")));
        self.device.linear(&self.stream, x.read(), weight, bias, out.write())?;
        Ok(out)
    }
}
