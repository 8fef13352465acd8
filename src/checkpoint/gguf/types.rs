//! The types of tensors: which are read, and what the others are called.

use crate::dtype::DType;

/// Those that are read, by their codes.
const TYPES: [(u32, DType); 16] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (20, DType::IQ4_NL),
    (23, DType::IQ4_XS),
    (30, DType::BF16),
    (39, DType::MXFP4),
];

/// What the types are called that are not read.
const OTHERS: [(u32, &str); 16] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
];

/// The type of this code, if it is read.
pub(super) fn of(code: u32) -> Option<DType> {
    TYPES.iter().find(|(known, _)| *known == code).map(|(_, dtype)| *dtype)
}

/// The code that files have for a type; `None` if no tensor of it is read from them.
pub fn type_code(dtype: DType) -> Option<u32> {
    TYPES.iter().find(|(_, known)| *known == dtype).map(|(code, _)| *code)
}

/// What a type is called that is not read.
pub(super) fn name_of(code: u32) -> String {
    let known = OTHERS.iter().find(|(known, _)| *known == code);
    known.map_or_else(|| format!("number {code}"), |(_, name)| (*name).into())
}
