//! A small model in blocks of quantised weights, beside a folder that has what they stand for.

use std::{collections::HashMap, fs, path::Path};

use half::f16;
use layer_streamer::{
    Checkpoint, DType,
    device::{Cpu, Device, DevicePtr},
};
use safetensors::{SafeTensors, tensor::TensorView};
use support::gguf::GgufFile;

use super::gguf::converted;

/// Types whose blocks fit into rows of small models, by their codes in GGUF files.
const TYPES: [(DType, u32); 5] =
    [(DType::Q4_0, 2), (DType::Q5_1, 7), (DType::Q8_0, 8), (DType::IQ4_NL, 20), (DType::MXFP4, 39)];

/// Gives a folder's matrices, in BF16, random weights that blocks of these types in turn stand for. Its GGUF file has the blocks.
pub fn quantised(folder: &Path, rng: &mut fastrand::Rng) -> GgufFile {
    let path = folder.join("model.safetensors");
    let stored = fs::read(&path).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let (mut tensors, mut quantised) = (Vec::new(), HashMap::new());
    for (number, (name, view)) in stored.tensors().into_iter().enumerate() {
        let (shape, mut bytes) = (view.shape().to_vec(), view.data().to_vec());
        if shape.len() == 2 {
            let (dtype, code) = TYPES[number % TYPES.len()];
            let blocks = random_blocks(dtype, bytes.len() / 2, rng);
            bytes = expanded(dtype, &blocks);
            quantised.insert(name.clone(), (code, blocks));
        }
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &path).unwrap();

    let mut file = converted(folder);
    let checkpoint = Checkpoint::open(folder).unwrap();
    for (name, tensor) in checkpoint.names().zip(&mut file.tensors) {
        if let Some(blocks) = quantised.remove(name) {
            (tensor.code, tensor.bytes) = blocks;
        }
    }
    file
}

/// Blocks of so many weights, about as large as a small model's.
fn random_blocks(dtype: DType, weights: usize, rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut blocks: Vec<u8> = (0..dtype.bytes(weights)).map(|_| rng.u8(..)).collect();
    for block in blocks.chunks_mut(dtype.size()) {
        let mut halves = |scale: f32, least: Option<f32>| {
            let by = 0.5 + rng.f32();
            let halves = [Some(scale), least].into_iter().flatten().map(|half| f16::from_f32(by * half));
            for (half, at) in halves.zip(block.as_chunks_mut().0) {
                *at = half.to_le_bytes();
            }
        };
        match dtype {
            DType::Q4_0 => halves(0.015, None),
            DType::Q5_1 => halves(0.008, Some(-0.12)),
            DType::MXFP4 => block[0] = rng.u8(119..122),
            _ => halves(0.001, None),
        }
    }
    blocks
}

/// What the CPU makes of blocks, in BF16.
fn expanded(dtype: DType, blocks: &[u8]) -> Vec<u8> {
    let weights = dtype.elements(blocks.len());
    let mut made = vec![0; 2 * weights];
    let at = |bytes: *const u8| DevicePtr::new(bytes.cast_mut());
    // SAFETY: both are that long, and the CPU's streams are done when a call returns.
    unsafe {
        let (to, from) = ((at(made.as_mut_ptr()), DType::BF16), (at(blocks.as_ptr()), dtype));
        Cpu.cast_raw(to, from, weights, &Cpu.stream().unwrap()).unwrap();
    }
    made
}
