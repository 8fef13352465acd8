//! Matrices that several stored tensors make: as many weights as a tensor of 64 MB has in BF16.

use half::f16;
use layer_streamer::{
    DType, Result,
    device::Device,
    kernels::Kernels,
    quantised::{INPUTS, Recipe, Scheme},
};

use super::{Bench, Row, off, twin};
use crate::{
    on_both,
    twin::{On, Tensor, random},
};

const WEIGHTS: usize = 32 << 20;
const COLUMNS: usize = 4096;
/// Columns that have one scale where codes have 4 bits, and weights that have one in NF4.
const GROUP: usize = 128;
const NF4_BLOCK: usize = 64;

/// Formats as most models have them.
pub const FORMATS: [(&str, Scheme); 5] = [
    ("FP8 in blocks of 128 × 128", Scheme::Fp8),
    ("int4 of compressed-tensors in groups of 128", Scheme::Rows { zeros: false, order: false }),
    ("GPTQ in groups of 128", Scheme::Gptq { zero: 1, order: false }),
    ("AWQ in groups of 128", Scheme::Awq),
    ("NF4 with quantised scales", Scheme::Nf4 { block: NF4_BLOCK, offset: Some(0.1f32.to_bits()) }),
];

/// How many rows of the table these are: on the CPU blocks are made besides, which is what arrives there.
pub fn rows(device: &impl Device) -> u64 {
    let ways = if device.memory_is_ram() { 2 } else { 1 };
    FORMATS.len() as u64 * ways
}

/// Types and shapes of what makes a matrix of so many rows.
fn tensors(scheme: Scheme, rows: usize) -> Vec<(DType, Vec<usize>)> {
    let (words, groups) = (DType::I32, COLUMNS / GROUP);
    match scheme {
        Scheme::Rows { .. } => vec![(words, vec![rows, COLUMNS / 8]), (DType::F16, vec![rows, groups])],
        Scheme::Gptq { .. } => {
            let (codes, scales) = (vec![COLUMNS / 8, rows], vec![groups, rows]);
            vec![(words, codes), (DType::F16, scales), (words, vec![groups, rows / 8])]
        }
        Scheme::Awq => {
            let (codes, scales) = (vec![COLUMNS, rows / 8], vec![groups, rows]);
            vec![(words, codes), (DType::F16, scales), (words, vec![groups, rows / 8])]
        }
        Scheme::Nf4 { .. } => {
            let scales = rows * COLUMNS / NF4_BLOCK;
            let nested = [(DType::F32, vec![scales.div_ceil(256)]), (DType::F32, vec![256])];
            [(DType::U8, vec![rows * COLUMNS / 2, 1]), (DType::U8, vec![scales])].into_iter().chain(nested).collect()
        }
        _ => {
            let blocks = vec![rows.div_ceil(128), COLUMNS.div_ceil(128)];
            vec![(DType::F8E4M3, vec![rows, COLUMNS]), (DType::F32, blocks)]
        }
    }
}

/// Random codes, or scales that are numbers, some of them over and over.
fn stored(rng: &mut fastrand::Rng, dtype: DType, shape: &[usize]) -> Vec<u8> {
    let bytes = dtype.bytes_of(shape).expect("it fits");
    let some: Vec<u8> = match dtype {
        DType::F16 => random(rng, 1 << 16).into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::F32 => random(rng, 1 << 16).into_iter().flat_map(f32::to_le_bytes).collect(),
        _ => (0..1 << 18).map(|_| rng.u8(..)).collect(),
    };
    some.into_iter().cycle().take(bytes).collect()
}

/// A matrix to be made on a device.
struct Matrix<D: Kernels> {
    recipe: Recipe,
    inputs: Vec<Tensor<D>>,
    out: Tensor<D>,
}

impl<D: Kernels> Matrix<D> {
    fn new(on: &On<D>, recipe: Recipe, stored: &[Vec<u8>], to: DType) -> Result<Self> {
        let inputs = stored.iter().map(|bytes| on.tensor(&[bytes.len()], bytes)).collect::<Result<_>>()?;
        Ok(Self { recipe, inputs, out: on.empty(to, &[recipe.rows, recipe.columns])? })
    }

    fn make(&mut self, on: &On<D>) -> Result<()> {
        let input = |at: usize| self.inputs.get(at).unwrap_or(&self.inputs[0]).get().ptr();
        let (from, to) = (std::array::from_fn::<_, INPUTS, _>(input), self.out.out().ptr());
        // SAFETY: these are the recipe's tensors, apart from the matrix, and all outlive the work, which is waited for.
        unsafe { on.device.dequantise_raw((to, self.out.get().dtype()), from, &self.recipe, &on.stream) }
    }
}

impl<D: Kernels> Bench<'_, D> {
    pub fn dequantising(&mut self) -> Result<()> {
        for (format, scheme) in FORMATS {
            let [few, many] = [136, self.many(WEIGHTS) / COLUMNS];
            let [(small, some), (recipe, all)] = [few, many].map(|rows| self.matrix(scheme, rows));
            let both = on_both!(self.on, |on| {
                let mut matrix = Matrix::new(on, small, &some, DType::BF16)?;
                matrix.make(on)?;
                on.read(&matrix.out)?
            });
            let here = self.on;
            let checked = [(DType::BF16, Some(off(&both.0, &both.1))), (recipe.as_blocks(), None)];
            for (to, off) in checked.into_iter().filter(|(to, _)| here.device.dequantises_to(*to)) {
                let mut matrix = Matrix::new(here, recipe, &all, to)?;
                let (shape, made) = (format!("{format}, [{many}, {COLUMNS}] to {to}"), matrix.out.bytes());
                let moved = matrix.inputs.iter().map(Tensor::bytes).sum::<usize>() + made;
                let row = Row { weights: made, ..Row::new("dequantise", shape, off, moved) };
                self.record(row, |_| matrix.make(here))?;
            }
        }
        Ok(())
    }

    /// How a matrix of so many rows is made, and the bytes that it is made of.
    fn matrix(&mut self, scheme: Scheme, rows: usize) -> (Recipe, Vec<Vec<u8>>) {
        let tensors = tensors(scheme, rows);
        let described: Vec<_> = tensors.iter().map(|(dtype, shape)| (*dtype, shape.as_slice())).collect();
        let recipe = Recipe::new(scheme, [rows, COLUMNS], &described).expect("they fit together");
        (recipe, tensors.iter().map(|(dtype, shape)| stored(&mut self.rng, *dtype, shape)).collect())
    }
}
