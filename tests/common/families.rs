//! Random small models of all families, and what Hugging Face transformers computes with them. `tests/families/draw.py` makes
//! the drawings: a configuration, a prompt, and logits. Some are stored beside it; LAYER_STREAMER_FAMILIES names a folder of others,
//! which are held instead.
#![allow(dead_code, reason = "each test uses a part")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use layer_streamer::{
    Error, Settings,
    kernels::Kernels,
    model::{Decoder, Model, Sequence},
};
use safetensors::{Dtype, tensor::TensorView};
use serde::Deserialize;
use serde_json::Value;

use crate::common::{distance, logits};

/// A line of what `draw.py` writes; its head explains the fields.
#[derive(Deserialize)]
pub struct Drawing {
    pub family: String,
    rope: String,
    pub config: Value,
    pub shift: i32,
    pub tensors: Vec<(String, Vec<usize>)>,
    pub ids: Vec<u32>,
    rows: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

pub fn stored() -> PathBuf {
    support::root().join("tests/families")
}

/// All drawings of a folder, each with its place for people: FILE:LINE.
pub fn drawings(folder: &Path) -> Vec<(String, Drawing)> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("read {}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    let mut drawings = Vec::new();
    for path in files {
        for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let place = format!("{}:{}", path.file_name().unwrap().display(), index + 1);
            let drawing = serde_json::from_str(line).unwrap_or_else(|error| panic!("{place}: {error}"));
            drawings.push((place, drawing));
        }
    }
    drawings
}

fn fnv1a64(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hashed, byte| (hashed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

fn splitmix64(number: u64) -> u64 {
    let z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Drawing {
    /// What a tensor holds: `values` of `draw.py`, bit by bit.
    fn values(&self, name: &str, shape: &[usize]) -> Vec<u8> {
        let seed = fnv1a64(name);
        let unit = |i: u64| ((splitmix64(seed.wrapping_add(i)) >> 40) as i32 - (1 << 23)) as f32 * 2f32.powi(-23);
        let value: &dyn Fn(f32) -> f32 = if shape.len() > 1 {
            let smaller = if name.contains("embed_tokens") { self.shift } else { 0 };
            let down = (shape[shape.len() - 1].ilog2() as i32 / 2 - 1).max(0) + smaller;
            &move |unit| unit * 2f32.powi(-down)
        } else if name.contains("norm") {
            let mean = if self.family.starts_with("gemma") { 0.0 } else { 1.0 };
            &move |unit| mean + unit / 8.0
        } else {
            &|unit| unit / 4.0
        };
        (0..shape.iter().product::<usize>() as u64).flat_map(|i| value(unit(i)).to_le_bytes()).collect()
    }

    /// The width of a head, as the tensors have it.
    #[cfg(feature = "cuda")]
    pub fn head_dim(&self) -> usize {
        let folder = support::folder();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        layer_streamer::model::ModelConfig::read(folder.path()).map_or(0, |config| config.head_dim)
    }

    pub fn write(&self, folder: &Path) {
        let tensors = self.tensors.iter().map(|(name, shape)| (name, shape, self.values(name, shape)));
        let tensors: Vec<_> = tensors.collect();
        let view = |(name, shape, bytes)| (name, TensorView::new(Dtype::F32, Vec::clone(shape), bytes).unwrap());
        let views = tensors.iter().map(|(name, shape, bytes)| view((*name, *shape, bytes.as_slice())));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
    }

    /// How far off the logits are, of the whole prompt at once and of its pieces, or what is wrong.
    fn hold<D: Kernels>(&self, device: &D, tolerance: f64) -> Result<f64, String> {
        let folder = support::folder();
        self.write(folder.path());
        let model = Model::open(folder.path()).map_err(said)?;
        let vocab = model.config.vocab;
        let mut decoder = Decoder::new(device, &model, &Settings::default(), 1, self.ids.len()).map_err(said)?;
        decoder.forward(&[Sequence { row: 0, tokens: &self.ids }]).map_err(said)?;
        let all = logits(&mut decoder);
        let found: Vec<f32> = self.rows.iter().flat_map(|row| &all[row * vocab..][..vocab]).copied().collect();
        let whole = near("the logits", &found, &self.logits.concat(), tolerance)?;

        // The same again, so that later tokens see what the cache kept of earlier ones.
        decoder.truncate(0, 0).map_err(said)?;
        let pieces = self.ids.chunks(self.ids.len().div_ceil(2 + self.ids.len() % 2));
        let count = pieces.len();
        for tokens in pieces {
            decoder.forward(&[Sequence { row: 0, tokens }]).map_err(said)?;
        }
        let mut last = Vec::new();
        let told = decoder.last_logits(|row| {
            last.extend_from_slice(row);
            Ok::<_, Error>(())
        });
        told.map_err(said)?;
        let of_last = self.logits.last().expect("the last position is stored");
        Ok(whole.max(near(&format!("the last logits, the prompt in {count} pieces"), &last, of_last, tolerance)?))
    }
}

fn said(error: Error) -> String {
    error.to_string()
}

fn near(what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> Result<f64, String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, {} expected", found.len(), expected.len()));
    }
    let off = distance(found, expected);
    // Not a number is not near.
    if off <= tolerance { Ok(off) } else { Err(format!("{what}: off by {off:.1e}, tolerated {tolerance:.1e}")) }
}

/// Holds a device against all drawings that it takes.
pub fn hold<D: Kernels>(device: &D, tolerance: f64, takes: impl Fn(&Drawing) -> bool) {
    let folder = env::var_os("LAYER_STREAMER_FAMILIES").map_or_else(stored, PathBuf::from);
    let mut drawings = drawings(&folder);
    drawings.retain(|(_, drawing)| takes(drawing));
    assert!(!drawings.is_empty(), "no drawings in {}: tests/families/draw.py makes them", folder.display());
    let (mut wrong, mut families) = (Vec::new(), BTreeMap::<&str, (usize, usize, f64)>::new());
    for (place, drawing) in &drawings {
        let (right, all, most) = families.entry(&drawing.family).or_default();
        *all += 1;
        match drawing.hold(device, tolerance) {
            Ok(off) => (*right, *most) = (*right + 1, most.max(off)),
            Err(said) => {
                println!("{place}: {said}");
                wrong.push(format!(
                    "{place}, {} of rope {}: {said}\n    {}",
                    drawing.family, drawing.rope, drawing.config
                ));
            }
        }
    }
    for (family, (right, all, most)) in families {
        println!("{family}: {right} of {all} drawings right, logits off by {most:.1e} at most");
    }
    let count = wrong.len();
    wrong.truncate(20);
    assert!(count == 0, "{count} of {} are wrong; the first:\n{}", drawings.len(), wrong.join("\n"));
}
