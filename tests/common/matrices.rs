//! Matrices that several stored tensors make: of every scheme, of random codes.

use std::fs;

use half::{bf16, f16};
use layer_streamer::{
    Checkpoint, DType, Error, Layer, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device, TensorRef},
    plan::{Arrival, ArrivalOp, Tier},
    quantised::Scheme,
};
use support::folder;

use super::blocks::{bits, values};

/// Type, shape and bytes of a tensor to be.
type Content = (DType, Vec<usize>, Vec<u8>);

/// What a matrix is made of.
struct Matrix {
    scheme: Scheme,
    shape: [usize; 2],
    inputs: Vec<Content>,
}

/// Types of scales, but for those that are quantised.
const SCALES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

const TIERS: [Tier; 6] = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked];

/// Numbers of about this size; of eight one is any that the type has.
fn numbers(dtype: DType, shape: &[usize], size: f32, rng: &mut fastrand::Rng) -> Content {
    let mut number = || {
        let number = size * (0.5 + rng.f32()) * if rng.bool() { 1.0 } else { -1.0 };
        let any: [u8; 4] = std::array::from_fn(|_| rng.u8(..));
        match dtype {
            _ if rng.u8(..8) == 0 => any[..dtype.size()].to_vec(),
            DType::F32 => number.to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
            _ => bf16::from_f32(number).to_le_bytes().to_vec(),
        }
    };
    let bytes = (0..shape.iter().product()).flat_map(|_| number()).collect();
    (dtype, shape.to_vec(), bytes)
}

fn any_bytes(dtype: DType, shape: &[usize], rng: &mut fastrand::Rng) -> Content {
    let bytes = (0..dtype.bytes_of(shape).unwrap()).map(|_| rng.u8(..)).collect();
    (dtype, shape.to_vec(), bytes)
}

/// A group for each column: some that there are not.
fn order(columns: usize, groups: usize, rng: &mut fastrand::Rng) -> Content {
    let mut group = || match rng.u8(..6) {
        0 => [groups as i32, -1, i32::MIN, i32::MAX][rng.usize(..4)],
        _ => rng.usize(..groups) as i32,
    };
    (DType::I32, vec![columns], (0..columns).flat_map(|_| group().to_le_bytes()).collect())
}

/// Nothing too.
const FP8_SHAPES: [[usize; 2]; 8] = [[1, 1], [0, 8], [8, 0], [3, 5], [130, 136], [1, 4096], [300, 131], [257, 264]];

/// Matrices with a scale for all, for each row and for blocks, of rows that are whole accesses and others.
fn fp8(rng: &mut fastrand::Rng) -> Vec<Matrix> {
    let mut made = Vec::new();
    for shape in FP8_SHAPES {
        let [rows, columns] = shape;
        let grids =
            [vec![], vec![1], vec![1, 1], vec![rows], vec![rows, 1], vec![rows.div_ceil(128), columns.div_ceil(128)]];
        for scales in grids {
            let scales = numbers(SCALES[rng.usize(..3)], &scales, 0.01, rng);
            made.push(Matrix {
                scheme: Scheme::Fp8,
                shape,
                inputs: vec![any_bytes(DType::F8E4M3, &shape, rng), scales],
            });
        }
    }
    made
}

/// Scales and zeros as GPTQ and AWQ have them.
fn by_group([rows, _]: [usize; 2], groups: usize, scale: DType, rng: &mut fastrand::Rng) -> [Content; 2] {
    [numbers(scale, &[groups, rows], 0.01, rng), any_bytes(DType::I32, &[groups, rows / 8], rng)]
}

fn awq(shape @ [rows, columns]: [usize; 2], groups: usize, scale: DType, rng: &mut fastrand::Rng) -> Matrix {
    let [scales, zeros] = by_group(shape, groups, scale, rng);
    let codes = any_bytes(DType::I32, &[columns, rows / 8], rng);
    Matrix { scheme: Scheme::Awq, shape, inputs: vec![codes, scales, zeros] }
}

fn gptq(shape: [usize; 2], groups: usize, scale: DType, is_ordered: bool, rng: &mut fastrand::Rng) -> Matrix {
    let [rows, columns] = shape;
    let [scales, zeros] = by_group(shape, groups, scale, rng);
    let mut inputs = vec![any_bytes(DType::I32, &[columns / 8, rows], rng), scales, zeros];
    inputs.extend(is_ordered.then(|| order(columns, groups, rng)));
    Matrix { scheme: Scheme::Gptq { zero: rng.u8(..2), order: is_ordered }, shape, inputs }
}

/// compressed-tensors' int4, with or without zeros and an order.
fn rows(shape: [usize; 2], groups: usize, scale: DType, with: [bool; 2], rng: &mut fastrand::Rng) -> Matrix {
    let ([rows, columns], [zeros, is_ordered]) = (shape, with);
    let codes = any_bytes(DType::I32, &[rows, columns / 8], rng);
    let mut inputs = vec![codes, numbers(scale, &[rows, groups], 0.01, rng)];
    inputs.extend(zeros.then(|| any_bytes(DType::I32, &[rows.div_ceil(8), groups], rng)));
    inputs.extend(is_ordered.then(|| order(columns, groups, rng)));
    Matrix { scheme: Scheme::Rows { zeros, order: is_ordered }, shape, inputs }
}

/// These, with groups of 8 columns up to all: tiles of a GPU that are whole and others.
fn with_zeros(rng: &mut fastrand::Rng) -> Vec<Matrix> {
    let mut made = Vec::new();
    for (shape, groups) in [([8, 8], 1), ([128, 256], 2), ([136, 520], 65), ([272, 24], 1), ([264, 264], 11)] {
        for scale in SCALES {
            made.push(awq(shape, groups, scale, rng));
            for is_ordered in [false, true] {
                made.push(gptq(shape, groups, scale, is_ordered, rng));
                // Rows in any number.
                let shape = [shape[0] - rng.usize(..8), shape[1]];
                made.push(rows(shape, groups, scale, [rng.bool(), is_ordered], rng));
            }
        }
    }
    made
}

/// Those of which something lies right before the end of memory, if they are kept there alone: what is read beyond the last row or
/// column of a tile is not there.
fn at_the_end(rng: &mut fastrand::Rng) -> [Matrix; 3] {
    [
        awq([272, 24], 1, DType::F16, rng),
        gptq([192, 64], 8, DType::F16, false, rng),
        rows([4, 128], 16, DType::F32, [false; 2], rng),
    ]
}

/// NF4, with scales that are quantised and others.
fn nf4(rng: &mut fastrand::Rng) -> Vec<Matrix> {
    let mut made = Vec::new();
    for (shape @ [rows, columns], block) in
        [([1, 64], 64), ([24, 72], 64), ([700, 96], 64), ([260, 512], 128), ([24, 72], 24)]
    {
        let (weights, blocks) = (rows * columns, rows * columns / block);
        let codes = any_bytes(DType::U8, &[weights / 2, 1], rng);
        let scales = numbers(DType::F32, &[blocks], 0.02, rng);
        made.push(Matrix { scheme: Scheme::Nf4 { block, offset: None }, shape, inputs: vec![codes, scales] });
        let scheme = Scheme::Nf4 { block, offset: Some((0.03 * rng.f32()).to_bits()) };
        let inputs = vec![
            any_bytes(DType::U8, &[weights / 2, 1], rng),
            any_bytes(DType::U8, &[blocks], rng),
            numbers(DType::F32, &[blocks.div_ceil(256)], 0.05, rng),
            numbers(DType::F32, &[256], 0.5, rng),
        ];
        made.push(Matrix { scheme, shape, inputs });
    }
    made
}

/// A checkpoint of the matrices' tensors, and two units: all of them as F32, and as BF16.
fn stored(matrices: &[Matrix], rng: &mut fastrand::Rng) -> (tempfile::TempDir, Checkpoint, [Unit; 2]) {
    let (folder, mut file, mut tensors) = (folder(), Vec::new(), Vec::new());
    let path = folder.path().join("matrices");
    let mut units = [Unit::new("F32"), Unit::new("BF16")];
    for (number, Matrix { scheme, shape, inputs }) in matrices.iter().enumerate() {
        let mut names = Vec::new();
        for (dtype, shape, bytes) in inputs {
            // Anywhere in the file.
            let offset = (file.len() + rng.usize(..60)).next_multiple_of(dtype.align());
            file.resize(offset, 0xee);
            file.extend(bytes);
            names.push(format!("{number}.{}", names.len()));
            let (name, file) = (names[names.len() - 1].clone(), path.clone());
            tensors.push(StoredTensor { name, file, offset: offset as u64, dtype: *dtype, shape: shape.clone() });
        }
        for (unit, to) in units.iter_mut().zip([DType::F32, DType::BF16]) {
            let output = format!("{number}: {scheme:?} {shape:?}, scales {} {:?}", inputs[1].0, inputs[1].1);
            let op = ArrivalOp::Dequantise { scheme: *scheme, shape: *shape, to: Some(to) };
            unit.add(Arrival { output, inputs: names.clone(), op });
        }
    }
    fs::write(path, file).unwrap();
    (folder, Checkpoint::from_table(tensors).unwrap(), units)
}

/// The bits of a tensor's numbers, as F32.
fn bits_of<D: Device>(device: &D, stream: &D::Stream, tensor: TensorRef<'_, D>) -> Vec<u32> {
    match tensor.dtype() {
        DType::F32 => values(device, stream, tensor, 0.0f32).into_iter().map(bits).collect(),
        _ => values(device, stream, tensor, bf16::ZERO).into_iter().map(|number| bits(number.to_f32())).collect(),
    }
}

/// Holds what a device makes of stored codes, scales, zeros and orders, as F32 and as BF16, against what the CPU makes of them.
pub fn check_matrices<D: Device>(device: &D, rng: &mut fastrand::Rng) {
    let matrices: Vec<Matrix> = [fp8, with_zeros, nf4].into_iter().flat_map(|some| some(rng)).collect();
    let alone = at_the_end(rng).map(|matrix| [matrix]);
    check(device, &matrices, &TIERS, rng);
    alone.iter().for_each(|alone| check(device, alone, &[Tier::GpuPacked], rng));
}

/// The same of these.
fn check<D: Device>(device: &D, matrices: &[Matrix], tiers: &[Tier], rng: &mut fastrand::Rng) {
    let (_folder, checkpoint, mut units) = stored(matrices, rng);
    let mut expected: Vec<Vec<u32>> = Vec::new();
    pass(&Cpu, &checkpoint, &units, 1, |stream, layer| {
        expected.extend(layer.tensors().map(|(_, tensor)| bits_of(&Cpu, stream, tensor)));
    });
    for &tier in tiers {
        units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        pass(device, &checkpoint, &units, 2, |stream, layer| {
            for (number, (name, tensor)) in layer.tensors().enumerate() {
                let (made, expected) =
                    (bits_of(device, stream, tensor), &expected[layer.index() * matrices.len() + number]);
                let wrong = made.iter().zip(expected).position(|(made, expected)| made != expected);
                let dtype = tensor.dtype();
                assert!(wrong.is_none() && made.len() == expected.len(), "{name}, {dtype} {tier}, {wrong:?}");
            }
        });
    }
}

/// So many passes.
fn pass<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    units: &[Unit],
    passes: usize,
    mut see: impl FnMut(&D::Stream, &Layer<'_, D>),
) {
    let stream = device.stream().unwrap();
    let mut streamer = LayerStreamer::new(device, checkpoint, units, &Settings::default()).unwrap();
    for _ in 0..passes {
        let seen = streamer.run_pass(&stream, 0, |count, layer| {
            see(&stream, layer);
            Ok::<_, Error>(count + 1)
        });
        assert_eq!(seen.unwrap(), units.len());
    }
}
