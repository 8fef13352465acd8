//! References with something changed, and what is said of them: for tests of folders as they lie about.
#![allow(dead_code, reason = "each test uses a part")]

use std::{collections::BTreeMap, fs, path::Path};

use layer_streamer::{
    Settings,
    device::Cpu,
    model::{Decoder, Model, Sequence},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use support::{data, folder};
use tempfile::TempDir;

use crate::common::logits;

const SINGLE: &str = "model.safetensors";
const PROMPT: [u32; 6] = [3, 77, 150, 42, 300, 9];

/// Type, shape, bytes.
pub type Tensor = (Dtype, Vec<usize>, Vec<u8>);
pub type Tensors = BTreeMap<String, Tensor>;

/// The tensors of a reference.
pub fn tensors_of(reference: &str) -> Tensors {
    let bytes = fs::read(data(reference).join(SINGLE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    file.tensors().into_iter().map(|(name, view)| (name, tensor(view))).collect()
}

pub fn config_of(reference: &str) -> Value {
    serde_json::from_slice(&fs::read(data(reference).join("config.json")).unwrap()).unwrap()
}

pub fn write<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) {
    let views = tensors
        .into_iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A folder of these tensors in one file.
pub fn saved(config: &Value, tensors: &Tensors) -> TempDir {
    let folder = folder();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    write(&folder.path().join(SINGLE), tensors);
    folder
}

/// A copy of a reference with other tensors.
pub fn changed(reference: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> TempDir {
    let (mut config, mut tensors) = (config_of(reference), tensors_of(reference));
    change(&mut config, &mut tensors);
    saved(&config, &tensors)
}

pub fn logits_of(model: &Model) -> Vec<f32> {
    let mut decoder = Decoder::new(&Cpu, model, &Settings::default(), 1, 8).unwrap();
    decoder.forward(&[Sequence { row: 0, tokens: &PROMPT }]).unwrap();
    logits(&mut decoder)
}

/// What a folder of a reference gives, and what one gives that is to compute the same.
#[track_caller]
pub fn assert_same(folder: &Path, reference: &str) {
    assert_eq!(logits_of(&Model::open(folder).unwrap()), logits_of(&Model::open(data(reference)).unwrap()));
}

#[track_caller]
pub fn assert_says(error: Option<layer_streamer::Error>, parts: &[&str]) {
    let said = error.unwrap_or_else(|| panic!("accepted, but should be refused with {parts:?}")).to_string();
    assert!(!said.contains('\n') && parts.iter().all(|part| said.contains(part)), "{said:?} lacks one of {parts:?}");
}

#[track_caller]
pub fn assert_refused(folder: &Path, parts: &[&str]) {
    assert_says(Model::open(folder).err(), parts);
}

/// One byte, of any type that has such.
pub fn byte(dtype: Dtype) -> Tensor {
    (dtype, vec![1], vec![0])
}
