//! What is to be planned, drawn at random: tables, units, settings.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use support::fuzz::number;

use crate::{
    checkpoint::{Checkpoint, StoredTensor},
    dtype::DType,
    layout::MAX_GAP,
    packed::{self, Description},
    plan::{Settings, Tier, tests::hole},
    quantised::Scheme,
    unit::{Arrival, ArrivalOp, Unit},
};

const TYPES: [DType; 13] = [
    DType::BF16,
    DType::F16,
    DType::F32,
    DType::F8E4M3,
    DType::U8,
    DType::Bool,
    DType::I64,
    DType::F64,
    DType::F8E5M2,
    DType::Q4_K,
    DType::Q8_0,
    DType::Q6_K,
    DType::MXFP4,
];

/// Files of any length.
pub(super) struct Holes(Vec<(File, PathBuf)>);

impl Holes {
    pub(super) fn new() -> Self {
        Self((0..3).map(|_| hole()).collect())
    }
}

/// What is to be planned.
pub(super) struct Asked {
    pub(super) checkpoint: Checkpoint,
    pub(super) units: Vec<Unit>,
}

/// A matrix that several tensors make.
struct Matrix {
    scheme: Scheme,
    shape: [usize; 2],
    inputs: Vec<String>,
}

/// What a checkpoint is made of.
#[derive(Default)]
struct Drawn {
    table: Vec<StoredTensor>,
    packed: Vec<(String, Description)>,
    matrices: Vec<Matrix>,
}

/// Dimensions of a tensor of up to `most` elements; where the caller is careless, also others.
fn shape(rng: &mut fastrand::Rng, most: usize, careless: bool) -> Vec<usize> {
    let rank = if careless && rng.u8(..20) == 0 { rng.usize(..12) } else { rng.usize(..5) };
    let (mut shape, mut left) = (Vec::new(), most);
    for _ in 0..rank {
        let dim = match rng.u8(..16) {
            0 => 0,
            1..8 => 1 + rng.usize(..9),
            8..12 => [255, 256, 257, 2047, 4095, 4096, 4097][rng.usize(..7)],
            12..15 => {
                let most = left >> rng.u32(..64);
                rng.usize(..=most)
            }
            _ if careless => number(rng),
            _ => left,
        };
        if dim > left && !careless {
            continue;
        }
        left = left.checked_div(dim).unwrap_or(left);
        shape.push(dim);
    }
    rng.shuffle(&mut shape);
    shape
}

/// What packed weights of this shape could be said to be.
fn description(rng: &mut fastrand::Rng, shape: &[usize]) -> Description {
    let (weights, part) = (shape.iter().product::<usize>(), packed::BLOCK * (1 + rng.usize(..64)));
    let part = if rng.bool() { Description::part_of(shape) } else { part };
    let lengths = (0..weights.div_ceil(part)).map(|number| {
        let blocks = part.min(weights - number * part).div_ceil(packed::BLOCK);
        (blocks * 8).next_multiple_of(16) as u32 + blocks as u32 * (5120 + 16 * rng.u32(..400))
    });
    Description { shape: shape.to_vec(), table: packed::Table([0; 13]), checksum: 0, part, lengths: lengths.collect() }
}

/// Type and shape of a tensor.
type Kind = (DType, Vec<usize>);

/// A matrix of up to `most` weights, and the tensors that make it.
fn matrix(rng: &mut fastrand::Rng, most: usize) -> (Scheme, [usize; 2], Vec<Kind>) {
    let group = 8 << rng.usize(..5);
    let columns = group * (1 + rng.usize(..33));
    let rows = (most / columns) >> rng.u32(..40);
    let rows = if rng.u8(..16) == 0 { 0 } else { rows.next_multiple_of(8).max(8) };
    let (groups, some) = (columns / group, rng.bool());
    let scale = [DType::F32, DType::F16, DType::BF16][rng.usize(..3)];
    let order = some.then(|| (DType::I32, vec![columns]));
    let (scheme, tensors) = match rng.u8(..5) {
        0 => {
            let blocks = vec![rows.div_ceil(128), columns.div_ceil(128)];
            let scales = [vec![], vec![1], vec![rows], vec![rows, 1], blocks];
            (Scheme::Fp8, vec![(DType::F8E4M3, vec![rows, columns]), (scale, scales[rng.usize(..5)].clone())])
        }
        1 => {
            let tensors = [(DType::I32, vec![rows, columns / 8]), (scale, vec![rows, groups])];
            let zeros = rng.bool().then(|| (DType::I32, vec![rows / 8, groups]));
            let scheme = Scheme::Rows { zeros: zeros.is_some(), order: some };
            (scheme, tensors.into_iter().chain(zeros).chain(order).collect())
        }
        2 => {
            let codes = (DType::I32, vec![columns / 8, rows]);
            let tensors = [codes, (scale, vec![groups, rows]), (DType::I32, vec![groups, rows / 8])];
            (Scheme::Gptq { zero: rng.u8(..2), order: some }, tensors.into_iter().chain(order).collect())
        }
        3 => {
            let codes = (DType::I32, vec![columns, rows / 8]);
            (Scheme::Awq, vec![codes, (scale, vec![groups, rows]), (DType::I32, vec![groups, rows / 8])])
        }
        _ => {
            let (block, codes) = (group, (DType::U8, vec![rows * columns / 2, 1]));
            let scales = rows * columns / block;
            let nested = [(DType::F32, vec![scales.div_ceil(256)]), (DType::F32, vec![256])];
            let scheme = Scheme::Nf4 { block, offset: some.then(|| 1f32.to_bits()) };
            let dtype = if some { DType::U8 } else { DType::F32 };
            let nested = nested.into_iter().filter(|_| some);
            (scheme, [codes, (dtype, vec![scales])].into_iter().chain(nested).collect())
        }
    };
    (scheme, [rows, columns], tensors)
}

/// Where the next tensor begins.
fn next_offset(rng: &mut fastrand::Rng, end: u64) -> u64 {
    let gap = match rng.u8(..8) {
        0..4 => 0,
        4 => rng.u64(..64),
        5 => MAX_GAP + rng.u64(..9000) - 4500,
        6 => rng.u64(..1 << 20),
        _ => {
            let most = (i64::MAX as u64 - end) >> rng.u32(..63);
            rng.u64(..=most)
        }
    };
    end.saturating_add(gap).min(i64::MAX as u64)
}

impl Drawn {
    /// Tensors side by side, or nearly so, in files that end where the last one does or later.
    fn new(rng: &mut fastrand::Rng, holes: &Holes, careless: bool) -> Self {
        // Sizes of everyday, of large models, and of no disk.
        let most = 1usize << [10, 20, 26, 34, 50, 62][rng.usize(..6)];
        let mut drawn = Self::default();
        let files = &holes.0[..1 + rng.usize(..holes.0.len())];
        for (file, path) in files {
            let mut end = [0, 8, 4096, rng.u64(..100_000)][rng.usize(..4)];
            for _ in 0..rng.usize(..9) {
                match rng.u8(..6) {
                    0 => drawn.add_matrix(rng, path, &mut end, most),
                    _ => drawn.add_tensor(rng, path, &mut end, most, careless),
                }
            }
            let beyond = [0, 1, 4096, rng.u64(..1 << 20)][rng.usize(..4)];
            let length = end.saturating_add(beyond).min(i64::MAX as u64);
            let cut = if careless && rng.u8(..20) == 0 { rng.u64(..=length) } else { 0 };
            file.set_len(length - cut).unwrap();
        }
        rng.shuffle(&mut drawn.table);
        drawn
    }

    /// Adds a tensor behind byte `end` of a file, which it moves on, or none if there is no room.
    fn add_tensor(&mut self, rng: &mut fastrand::Rng, file: &Path, end: &mut u64, most: usize, careless: bool) {
        let offset = next_offset(rng, *end);
        let mut dtype = TYPES[rng.usize(..TYPES.len())];
        let room = (i64::MAX as u64 - offset) as usize;
        let mut shape = shape(rng, most.min(room) / dtype.size(), careless);
        if dtype.is_blocks() && !(careless && rng.u8(..30) == 0) {
            let row = shape.pop().unwrap_or(1).saturating_mul(dtype.block_elements());
            shape.push(row);
        }
        let weights = dtype.bytes_of(&shape).unwrap_or(0) / 2;
        let packs = dtype == DType::BF16 && (1..1 << 24).contains(&weights) && rng.bool();
        let described = packs.then(|| description(rng, &shape));
        if let Some(description) = &described {
            (dtype, shape) = (DType::U8, vec![description.bytes()]);
        }
        let bytes = dtype.bytes_of(&shape).unwrap_or(0) as u64;
        if bytes as usize > room && !careless {
            return;
        }
        let overlaps = careless && rng.u8(..30) == 0;
        let name = format!("{}{}", self.table.len(), ["", ".weight", "\"\n\0é", "[0..1]"][rng.usize(..4)]);
        self.packed.extend(described.map(|description| (name.clone(), description)));
        self.table.push(StoredTensor { name, file: file.to_owned(), offset, dtype, shape });
        *end = if overlaps { offset } else { offset.saturating_add(bytes).min(i64::MAX as u64) };
    }

    /// Adds what makes a matrix likewise, in any order.
    fn add_matrix(&mut self, rng: &mut fastrand::Rng, file: &Path, end: &mut u64, most: usize) {
        let (scheme, shape, tensors) = matrix(rng, most);
        let (mut order, mut inputs) = ((0..tensors.len()).collect::<Vec<_>>(), vec![String::new(); tensors.len()]);
        rng.shuffle(&mut order);
        for at in order {
            let ((dtype, shape), offset) = (tensors[at].clone(), next_offset(rng, *end));
            let bytes = dtype.bytes_of(&shape).expect("a matrix is no larger than can be addressed") as u64;
            if bytes > i64::MAX as u64 - offset {
                return;
            }
            inputs[at] = format!("{} of a matrix", self.table.len());
            self.table.push(StoredTensor { name: inputs[at].clone(), file: file.to_owned(), offset, dtype, shape });
            *end = offset + bytes;
        }
        self.matrices.push(Matrix { scheme, shape, inputs });
    }
}

/// How a matrix arrives; where the caller is careless, sometimes of other tensors or as a type that it cannot become.
fn dequantised(rng: &mut fastrand::Rng, matrix: &Matrix, output: String, careless: bool) -> Arrival {
    let Matrix { scheme, shape, mut inputs } = Matrix { inputs: matrix.inputs.clone(), ..*matrix };
    let mut to = [None, Some(DType::F32), Some(DType::BF16)][rng.usize(..3)];
    match rng.u8(..60) {
        0 if careless => _ = inputs.pop(),
        1 if careless => inputs.rotate_left(1),
        2 if careless => to = Some(TYPES[rng.usize(..TYPES.len())]),
        _ => {}
    }
    Arrival { output, inputs, op: ArrivalOp::Dequantise { scheme, shape, to } }
}

/// A unit of some of these tensors and matrices.
fn unit(
    rng: &mut fastrand::Rng,
    checkpoint: &Checkpoint,
    (names, matrices): (&[String], &[Matrix]),
    careless: bool,
) -> Unit {
    let mut unit = Unit::new(format!("unit {}", rng.u8(..)));
    for index in 0..rng.usize(..9) {
        let twice = careless && rng.u8(..30) == 0;
        let output = format!("{}{}", if twice { 0 } else { index }, ["", ".a", "é\0"][rng.usize(..3)]);
        if !matrices.is_empty() && rng.u8(..3) == 0 {
            let matrix = &matrices[rng.usize(..matrices.len())];
            unit.add(dequantised(rng, matrix, output, careless));
            continue;
        }
        let name = &names[rng.usize(..names.len())];
        let wrong = careless && rng.u8(..30) == 0;
        let inputs = match rng.u8(..3) {
            0 if wrong => vec![],
            1 if wrong => vec![name.clone(), name.clone()],
            _ if wrong => vec!["no such tensor".into()],
            _ => vec![name.clone()],
        };
        let dtype = checkpoint.describe(name).expect("it is there").0;
        let is_packed = checkpoint.entry(name).unwrap().packed.is_some();
        let op = match TYPES[rng.usize(..TYPES.len())] {
            to if rng.bool() && (careless || to == dtype || dtype.converts_to(to) && !is_packed) => ArrivalOp::To(to),
            _ => ArrivalOp::Keep,
        };
        unit.add(Arrival { output, inputs, op });
    }
    unit.set_tier(Tier::ALL[rng.usize(..Tier::ALL.len())]);
    unit
}

impl Asked {
    pub(super) fn new(rng: &mut fastrand::Rng, holes: &Holes) -> Option<Self> {
        let careless = rng.u8(..4) == 0;
        let Drawn { table, packed, matrices } = Drawn::new(rng, holes, careless);
        let mut checkpoint = Checkpoint::from_table(table).ok()?.with_packed(packed).unwrap();
        let mut names: Vec<_> = checkpoint.names().map(str::to_owned).collect();
        if rng.u8(..4) == 0 {
            // Rows of a matrix lie inside it. Not one tensor for each of a great many.
            let name = names[rng.usize(..names.len())].clone();
            let height = checkpoint.describe(&name).map_or(0, |(_, shape)| shape.first().copied().unwrap_or(0));
            let rows = number(rng).max(height / 8);
            let (with_rows, parts) = checkpoint.with_rows(&name, rows).ok()?;
            checkpoint = with_rows;
            names.extend(parts);
        }
        // A few units of which there may be many, so that some are alike.
        let kinds: Vec<_> =
            (0..1 + rng.usize(..3)).map(|_| unit(rng, &checkpoint, (&names, &matrices), careless)).collect();
        let units =
            (0..rng.usize(..if careless { 12 } else { 11 }) + usize::from(!careless)).map(|_| match rng.u8(..4) {
                0 => unit(rng, &checkpoint, (&names, &matrices), careless),
                _ => {
                    let mut unit = kinds[rng.usize(..kinds.len())].clone();
                    unit.set_tier(Tier::ALL[rng.usize(..Tier::ALL.len())]);
                    unit
                }
            });
        Some(Self { units: units.collect(), checkpoint })
    }
}

pub(super) fn settings(rng: &mut fastrand::Rng) -> Settings {
    let [n_gpu, n_cpu_pinned, n_cpu] = match rng.u8(..8) {
        0 => [number(rng), number(rng), number(rng)],
        _ => [1 + rng.usize(..4), rng.usize(..4), rng.usize(..4)],
    };
    let batch =
        |rng: &mut fastrand::Rng, n: usize| if rng.u8(..30) == 0 { number(rng) } else { rng.usize(..=n.min(9)) };
    let [batch_gpu, batch_cpu_pinned, batch_cpu] = [n_gpu, n_cpu_pinned, n_cpu].map(|n| batch(rng, n));
    Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, ..Settings::default() }
}
