//! A GGUF file: keys, a tokenizer whose tokens are bytes, and tensors as converters of models name them.

use std::{os::fd::AsRawFd, path::Path};

use layer_streamer::{DType, files::NewFile, gguf};

use super::{
    blocks::{RECIPES, Recipe},
    cannot,
    shapes::{CONTEXT, EOS, RMS_EPS, ROPE_BASE, Shape, Tensor, tensors},
    weights::Weights,
    writing::{Contents, Writer},
};

/// Where tensors begin: at multiples of so many bytes, unless the file says otherwise.
const ALIGNMENT: u64 = 32;
/// The version of the format.
const VERSION: u32 = 3;
/// The code of tokens that are nothing special.
const NORMAL: i32 = 1;

/// What stands for a Hugging Face name, or a part of it, in GGUF files.
const NAMES: [(&str, &str); 13] = [
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The types that matrices may have.
pub fn types() -> impl Iterator<Item = DType> {
    [DType::F32, DType::F16, DType::BF16].into_iter().chain(RECIPES.iter().map(|recipe| recipe.dtype))
}

/// Refuses a shape of which some matrix's rows are no whole blocks of this type.
fn refuse_cut_blocks(shape: &Shape, dtype: DType) -> Result<(), String> {
    let rows = [shape.hidden, shape.ffn];
    let suits = |dtype: &DType| rows.iter().all(|row| row.is_multiple_of(dtype.block_elements() as u64));
    if suits(&dtype) {
        return Ok(());
    }
    let others: Vec<_> = types().filter(suits).map(DType::name).collect();
    let (name, [hidden, ffn], block) = (shape.name, rows, dtype.block_elements());
    let others = others.join(", ");
    Err(format!("{name} has rows of {hidden} and {ffn} weights, but {dtype} has blocks of {block}; {others} would do"))
}

/// A value of the metadata.
enum Value {
    Count(u64),
    Number(f64),
    Text(&'static str),
    Texts(Vec<String>),
    Signed(Vec<i32>),
}

/// What a file has before its tensors, as far as it is written.
#[derive(Default)]
struct Head(Vec<u8>);

impl Head {
    fn put<const N: usize>(&mut self, bytes: [u8; N]) {
        self.0.extend(bytes);
    }

    fn text(&mut self, text: &str) {
        self.put((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    /// A key with its value: whole numbers of 32 bits, since other programs demand that.
    fn pair(&mut self, key: &str, value: &Value) {
        self.text(key);
        let mut kind = |codes: &[u32]| codes.iter().for_each(|code| self.put(code.to_le_bytes()));
        match value {
            Value::Count(_) => kind(&[4]),
            Value::Number(_) => kind(&[6]),
            Value::Text(_) => kind(&[8]),
            Value::Texts(_) => kind(&[9, 8]),
            Value::Signed(_) => kind(&[9, 5]),
        }
        match value {
            Value::Count(number) => self.put((*number as u32).to_le_bytes()),
            Value::Number(number) => self.put((*number as f32).to_le_bytes()),
            Value::Text(text) => self.text(text),
            Value::Texts(texts) => {
                self.put((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| self.text(text));
            }
            Value::Signed(numbers) => {
                self.put((numbers.len() as u64).to_le_bytes());
                numbers.iter().for_each(|number| self.put(number.to_le_bytes()));
            }
        }
    }

    /// A tensor that begins at this byte after the head.
    fn tensor(&mut self, tensor: &Tensor, start: u64) {
        let known_as = NAMES.iter().fold(tensor.name.clone(), |name, (theirs, ours)| name.replace(theirs, ours));
        self.text(&known_as);
        self.put((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| self.put(size.to_le_bytes()));
        self.put(gguf::type_code(tensor.dtype).expect("all types that are offered have one").to_le_bytes());
        self.put(start.to_le_bytes());
    }
}

/// Tokens that are bytes, as GPT-2 writes them, and others that no text becomes. Nothing is merged.
fn tokens(vocab: u64) -> Vec<String> {
    let mut more = 256..;
    let mut letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae.. => byte.into(),
        _ => more.next().and_then(char::from_u32).unwrap_or_default(),
    };
    let bytes = (0..=255).map(|byte| letter(byte).to_string());
    bytes.chain((256..vocab).map(|id| format!("[{id}]"))).take(vocab as usize).collect()
}

fn metadata(shape: &Shape, layers: u64) -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::Text("qwen2")),
        ("qwen2.block_count", Value::Count(layers)),
        ("qwen2.context_length", Value::Count(CONTEXT)),
        ("qwen2.embedding_length", Value::Count(shape.hidden)),
        ("qwen2.feed_forward_length", Value::Count(shape.ffn)),
        ("qwen2.attention.head_count", Value::Count(shape.heads)),
        ("qwen2.attention.head_count_kv", Value::Count(shape.kv)),
        ("qwen2.attention.layer_norm_rms_epsilon", Value::Number(RMS_EPS)),
        ("qwen2.rope.freq_base", Value::Number(ROPE_BASE)),
        ("tokenizer.ggml.model", Value::Text("gpt2")),
        ("tokenizer.ggml.pre", Value::Text("qwen2")),
        ("tokenizer.ggml.tokens", Value::Texts(tokens(shape.vocab))),
        ("tokenizer.ggml.token_type", Value::Signed(vec![NORMAL; shape.vocab as usize])),
        ("tokenizer.ggml.merges", Value::Texts(Vec::new())),
        ("tokenizer.ggml.eos_token_id", Value::Count(EOS.min(shape.vocab - 1))),
    ]
}

/// Plans the file.
fn contents(shape: &Shape, layers: u64, dtype: DType) -> Contents {
    let mut end = 0u64;
    let place = |tensor: Tensor| {
        let start = end.next_multiple_of(ALIGNMENT);
        end = start + tensor.bytes();
        (tensor, start)
    };
    let tensors: Vec<_> = tensors(shape, layers, [dtype, DType::F32]).into_iter().map(place).collect();
    let metadata = metadata(shape, layers);
    let mut head = Head::default();
    head.put(*b"GGUF");
    head.put(VERSION.to_le_bytes());
    head.put((tensors.len() as u64).to_le_bytes());
    head.put((metadata.len() as u64).to_le_bytes());
    metadata.iter().for_each(|(key, value)| head.pair(key, value));
    tensors.iter().for_each(|(tensor, start)| head.tensor(tensor, *start));
    let Head(mut header) = head;
    header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
    Contents { header, tensors }
}

/// Makes the file, which has its name once it is whole, and returns how many bytes it has.
pub fn make(path: &Path, shape: &Shape, layers: u64, seed: u64, dtype: DType) -> Result<u64, String> {
    refuse_cut_blocks(shape, dtype)?;
    if path.exists() {
        return Err(format!("{} already exists; name another file or remove it", path.display()));
    }
    let contents = contents(shape, layers, dtype);
    let bytes = contents.bytes();
    let file = NewFile::create(path).map_err(cannot("create", path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut writer = Writer::new(folder, bytes, Weights::new(seed, Recipe::of(dtype)))?;
    // The file has no name by which it could be opened for writes past the page cache.
    let unnamed = format!("/proc/self/fd/{}", file.file().as_raw_fd());
    writer.write(Path::new(&unnamed), &contents).and_then(|()| file.keep()).map_err(cannot("write", path))?;
    Ok(bytes)
}
