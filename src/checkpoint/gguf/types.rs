//! The types of tensors: which are read, and what the others are called.

use crate::dtype::DType;

/// A type that is read. Its elements lie in blocks, of one element where they are stored as they are.
pub(super) struct Type {
    code: u32,
    pub(super) dtype: DType,
    /// Elements of a block, and its bytes.
    block: [usize; 2],
}

impl Type {
    /// The type of this code, if it is read.
    pub(super) fn of(code: u32) -> Option<&'static Self> {
        TYPES.iter().find(|known| known.code == code)
    }

    /// Bytes of a tensor of this shape, or `None` if its rows are no whole blocks, or that overflows.
    pub(super) fn bytes_of(&self, shape: &[usize]) -> Option<usize> {
        let [elements, bytes] = self.block;
        let row = shape.last().copied().unwrap_or(1);
        let all = shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size))?;
        if row.is_multiple_of(elements) { (all / elements).checked_mul(bytes) } else { None }
    }
}

const TYPES: [Type; 3] = [
    Type { code: 0, dtype: DType::F32, block: [1, 4] },
    Type { code: 1, dtype: DType::F16, block: [1, 2] },
    Type { code: 30, dtype: DType::BF16, block: [1, 2] },
];

/// What the types are called that are not read: mostly blocks of quantised weights.
const OTHERS: [(u32, &str); 29] = [
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// What a type is called that is not read.
pub(super) fn name_of(code: u32) -> String {
    let known = OTHERS.iter().find(|(known, _)| *known == code);
    known.map_or_else(|| format!("number {code}"), |(_, name)| (*name).into())
}
