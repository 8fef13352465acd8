//! Weights that are made of several stored tensors: codes of few bits, scales, and what else a format keeps beside them.
//!
//! | format | codes | scales | zeros | order |
//! | --- | --- | --- | --- | --- |
//! | FP8 | F8_E4M3 `[N, K]` | one, or `[N, 1]`, or for blocks of 128 × 128 | | |
//! | compressed-tensors | I32 `[N, K/8]` | `[N, K/G]` | I32 `[N/8, K/G]`, or 8 for all | I32 `[K]`, if any |
//! | GPTQ | I32 `[K/8, N]` | `[K/G, N]` | I32 `[K/G, N/8]` | I32 `[K]`, if any |
//! | AWQ | I32 `[K, N/8]` | `[K/G, N]` | I32 `[K/G, N/8]` | |
//! | NF4 | U8, two weights each | one for each block of weights, F32 or itself quantised | | |
//!
//! A weight of the matrix `[N, K]` is `(code - zero) · scale`; of FP8 and NF4 what the code stands for, by the scale. Scales of 4-bit
//! codes are for groups of `G` columns: which one is a column's is told by the order, or else by its place. Codes of 4 bits lie in
//! words of eight, the lowest bits first: along a row, or along a column (GPTQ), or in AWQ's own order along a column's row. Zeros
//! lie likewise. The formats are told by [compressed-tensors](https://github.com/vllm-project/compressed-tensors),
//! [GPTQModel](https://github.com/ModelCloud/GPTQModel), [AutoAWQ](https://github.com/casper-hansen/AutoAWQ) and
//! [bitsandbytes](https://github.com/bitsandbytes-foundation/bitsandbytes) (Dettmers et al. 2023, arXiv:2305.14314).

mod blocks;
mod weights;

use crate::dtype::DType;

/// Where the codes of a matrix lie, and what they stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scheme {
    /// FP8: codes, scales.
    Fp8,
    /// compressed-tensors' int4: codes, scales, then zeros and order where it has such.
    Rows {
        /// There are zeros; else each is 8.
        zeros: bool,
        /// There is an order.
        order: bool,
    },
    /// GPTQ's 4 bits: codes, scales, zeros, then the order where it has one.
    Gptq {
        /// What is added to stored zeros, of four bits: 1, or 0 in version 2.
        zero: u8,
        /// There is an order.
        order: bool,
    },
    /// AWQ's 4 bits, of the version called GEMM: codes, scales, zeros.
    Awq,
    /// bitsandbytes' NF4: codes, scales; where the scales are quantised too, their own scales (F32, for 256 each) and what their codes
    /// stand for (F32, 256 of them).
    Nf4 {
        /// Weights of a block, which have one scale.
        block: usize,
        /// The bits of the F32 that is added to each scale, where scales are quantised.
        offset: Option<u32>,
    },
}

/// Most stored tensors that make one.
pub const INPUTS: usize = 4;

/// How a matrix is made of the tensors of its scheme, which fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recipe {
    /// How they are stored.
    pub scheme: Scheme,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of it, a multiple of 8 where codes have 4 bits.
    pub columns: usize,
    /// Rows and columns that have one scale. Of NF4 the latter counts weights, row after row.
    pub block: [usize; 2],
    /// How scales are stored: F32, F16 or BF16; U8 where they are quantised.
    pub scale: DType,
}

impl Scheme {
    /// How many tensors it has.
    pub(crate) fn inputs(self) -> usize {
        let more = |some: &[bool]| some.iter().filter(|some| **some).count();
        match self {
            Self::Fp8 => 2,
            Self::Rows { zeros, order } => 2 + more(&[zeros, order]),
            Self::Gptq { order, .. } => 3 + more(&[order]),
            Self::Awq => 3,
            Self::Nf4 { offset, .. } => 2 + 2 * more(&[offset.is_some()]),
        }
    }
}

impl Recipe {
    /// For a matrix of this shape, of tensors of these types and shapes, in the order of the scheme.
    ///
    /// # Errors
    /// Which of them does not fit, by its place, and why.
    ///
    /// # Panics
    /// If there are fewer tensors than the scheme has.
    ///
    /// ```
    /// use layer_streamer::{DType, quantised::{Recipe, Scheme}};
    ///
    /// let codes = (DType::F8E4M3, &[256, 512][..]);
    /// let recipe = Recipe::new(Scheme::Fp8, [256, 512], &[codes, (DType::F32, &[2, 4])]).unwrap();
    /// assert_eq!((recipe.block, recipe.as_blocks()), ([128, 128], DType::F8_64));
    /// let (place, cause) = Recipe::new(Scheme::Fp8, [256, 512], &[codes, (DType::F32, &[2, 5])]).unwrap_err();
    /// assert!(place == 1 && cause.contains("expected"), "{cause}");
    /// ```
    pub fn new(
        scheme: Scheme,
        [rows, columns]: [usize; 2],
        tensors: &[(DType, &[usize])],
    ) -> Result<Self, (usize, String)> {
        let is = |at: usize, dtypes: &[DType], shapes: &[&[usize]]| {
            let (dtype, shape) = tensors[at];
            if dtypes.contains(&dtype) && shapes.contains(&shape) {
                return Ok(());
            }
            let list = |all: Vec<String>| all.join(" or ");
            let [dtypes, shapes] = [
                list(dtypes.iter().map(ToString::to_string).collect()),
                list(shapes.iter().map(|shape| format!("{shape:?}")).collect()),
            ];
            Err((at, format!("is {dtype} {shape:?}, expected {dtypes} {shapes} for a matrix [{rows}, {columns}]")))
        };
        let whole = |what: &str, number: usize, by: usize| match by > 0 && number.is_multiple_of(by) {
            true => Ok(number / by),
            false => Err((0, format!("makes a matrix with {number} {what}, which is no multiple of {by}"))),
        };
        // Columns of a group, by how many the scales have.
        let groups = |along: usize| -> Result<usize, (usize, String)> {
            let (dtype, shape) = tensors[1];
            let count = shape.get(along).copied().filter(|count| *count > 0).unwrap_or(1);
            let group = columns / count;
            if columns.is_multiple_of(count) && group > 0 && group.is_multiple_of(8) {
                return Ok(group);
            }
            let expected = "expected groups of a multiple of 8 columns, all alike,";
            Err((1, format!("is {dtype} {shape:?}, {expected} for a matrix [{rows}, {columns}]")))
        };
        let floats = [DType::F32, DType::F16, DType::BF16];
        let (i32, halves) = ([DType::I32], [DType::F16, DType::BF16, DType::F32]);
        let (scale, block) = (
            tensors[1].0,
            match scheme {
                Scheme::Fp8 => {
                    is(0, &[DType::F8E4M3], &[&[rows, columns]])?;
                    let blocks = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
                    is(1, &floats, &[&[], &[1], &[1, 1], &[rows], &[rows, 1], &blocks])?;
                    match tensors[1].1 {
                        [] | [1] | [1, 1] => [rows.max(1), columns.max(1)],
                        shape if shape == blocks => [FP8_BLOCK; 2],
                        _ => [1, columns.max(1)],
                    }
                }
                Scheme::Rows { zeros, order } => {
                    is(0, &i32, &[&[rows, whole("columns", columns, 8)?]])?;
                    let group = groups(1)?;
                    is(1, &halves, &[&[rows, columns / group]])?;
                    if zeros {
                        is(2, &i32, &[&[rows.div_ceil(8), columns / group]])?;
                    }
                    if order {
                        is(2 + usize::from(zeros), &i32, &[&[columns]])?;
                    }
                    [1, group]
                }
                Scheme::Gptq { order, .. } => {
                    is(0, &i32, &[&[whole("columns", columns, 8)?, rows]])?;
                    let group = groups(0)?;
                    is(1, &halves, &[&[columns / group, rows]])?;
                    is(2, &i32, &[&[columns / group, whole("rows", rows, 8)?]])?;
                    if order {
                        is(3, &i32, &[&[columns]])?;
                    }
                    [1, group]
                }
                Scheme::Awq => {
                    is(0, &i32, &[&[columns, whole("rows", rows, 8)?]])?;
                    let group = groups(0)?;
                    is(1, &halves, &[&[columns / group, rows]])?;
                    is(2, &i32, &[&[columns / group, rows / 8]])?;
                    [1, group]
                }
                Scheme::Nf4 { block, offset } => {
                    whole("columns", columns, 8)?;
                    whole("weights of a block", block, 8)?;
                    let weights = rows.saturating_mul(columns);
                    is(0, &[DType::U8], &[&[weights / 2, 1]])?;
                    let scales = whole("weights", weights, block)?;
                    match offset {
                        None => is(1, &[DType::F32], &[&[scales]])?,
                        Some(_) => {
                            is(1, &[DType::U8], &[&[scales]])?;
                            is(2, &[DType::F32], &[&[scales.div_ceil(NF4_NESTED)]])?;
                            is(3, &[DType::F32], &[&[256]])?;
                        }
                    }
                    [1, block]
                }
            },
        );
        Ok(Self { scheme, rows, columns, block, scale })
    }

    /// Bytes of each of the tensors; of those that there are not, 0.
    pub fn input_bytes(&self) -> [usize; INPUTS] {
        let Self { scheme, rows, columns, block, scale } = *self;
        let (weights, word) = (rows * columns, DType::I32.size());
        let grid = rows.div_ceil(block[0]) * columns.div_ceil(block[1]);
        let (scales, order) = (scale.bytes(grid), |some: bool| if some { word * columns } else { 0 });
        match scheme {
            Scheme::Fp8 => [weights, scales, 0, 0],
            Scheme::Rows { zeros: false, order: some } => [weights / 2, scales, order(some), 0],
            Scheme::Rows { zeros: true, order: some } => {
                [weights / 2, scales, word * rows.div_ceil(8) * (columns / block[1]), order(some)]
            }
            Scheme::Gptq { order: some, .. } => [weights / 2, scales, grid / 2, order(some)],
            Scheme::Awq => [weights / 2, scales, grid / 2, 0],
            Scheme::Nf4 { offset: None, .. } => [weights / 2, scale.bytes(weights / block[1]), 0, 0],
            Scheme::Nf4 { offset: Some(_), .. } => {
                let scales = weights / block[1];
                [weights / 2, scales, 4 * scales.div_ceil(NF4_NESTED), 4 * 256]
            }
        }
    }

    /// Makes the matrix, row-major: of F32 or BF16, or of [blocks](Self::as_blocks). A column of a group that there is not belongs to
    /// the last.
    ///
    /// # Panics
    /// If the tensors are shorter than the recipe says, the matrix has another length, or the type is another.
    pub fn make(&self, inputs: [&[u8]; INPUTS], to: DType, matrix: &mut [u8]) {
        assert_eq!(matrix.len(), to.bytes(self.rows * self.columns), "a matrix of another size");
        self.make_rows(inputs, to, 0, matrix);
    }

    /// Makes as many rows of it as there is room for, from `first` on, a multiple of 8: codes of eight rows may share words.
    ///
    /// # Panics
    /// As [`make`](Self::make).
    pub(crate) fn make_rows(&self, inputs: [&[u8]; INPUTS], to: DType, first: usize, rows: &mut [u8]) {
        if to.is_blocks() {
            blocks::make(self, inputs, to, first, rows);
        } else {
            weights::make(self, inputs, to, first, rows);
        }
    }

    /// The type of blocks that holds the same numbers; F32 where none does, since groups are mixed in a row or no whole blocks.
    pub fn as_blocks(&self) -> DType {
        let whole = |dtype: DType, of: usize| of.is_multiple_of(dtype.block_elements());
        let candidates: &[(DType, usize)] = match self.scheme {
            Scheme::Fp8 => &[(DType::F8_64, self.columns.min(self.block[1]))],
            Scheme::Rows { order: true, .. } | Scheme::Gptq { order: true, .. } => &[],
            Scheme::Nf4 { .. } => &[(DType::NF4_64, self.block[1])],
            _ => &[(DType::U4_128, self.block[1]), (DType::U4_32, self.block[1])],
        };
        let found = candidates.iter().find(|(dtype, of)| whole(*dtype, *of) && whole(*dtype, self.columns));
        found.map_or(DType::F32, |(dtype, _)| *dtype)
    }
}

/// Rows and columns of a block of FP8 weights that has a scale.
const FP8_BLOCK: usize = 128;

/// Scales that have a scale, where they are quantised.
pub(crate) const NF4_NESTED: usize = 256;
