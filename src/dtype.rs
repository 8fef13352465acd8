//! Element types of stored tensors, by their names in safetensors and GGUF files, and the conversions between them that a host can do.

mod blocks;

use std::fmt;

use half::{bf16, f16};

pub(crate) use blocks::NF4;
#[cfg(all(test, feature = "model"))]
pub(crate) use blocks::expand;
#[cfg(feature = "model")]
pub(crate) use blocks::{E2M1, IQ4, LARGE, SMALL, mxfp4_scale, scales_and_minimums, word};

/// Element type of a tensor, named as in the safetensors format; or a type of quantised weights in blocks, named as in GGUF files.
/// Rows of such a tensor are whole blocks. The last four are the library's own: in them a CPU has weights that are stored as
/// [several tensors](crate::quantised), with the scale beside the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant is the type of that name")]
#[allow(non_camel_case_types, reason = "these are the types' names")]
pub enum DType {
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    F8_64,
    U4_32,
    U4_128,
    NF4_64,
}

/// Every type with its name, and the elements and bytes of a block: of one element, where each is stored by itself.
const TABLE: [(DType, &str, usize, usize); 32] = [
    (DType::Bool, "BOOL", 1, 1),
    (DType::U8, "U8", 1, 1),
    (DType::I8, "I8", 1, 1),
    (DType::F8E4M3, "F8_E4M3", 1, 1),
    (DType::F8E5M2, "F8_E5M2", 1, 1),
    (DType::U16, "U16", 1, 2),
    (DType::I16, "I16", 1, 2),
    (DType::F16, "F16", 1, 2),
    (DType::BF16, "BF16", 1, 2),
    (DType::U32, "U32", 1, 4),
    (DType::I32, "I32", 1, 4),
    (DType::F32, "F32", 1, 4),
    (DType::U64, "U64", 1, 8),
    (DType::I64, "I64", 1, 8),
    (DType::F64, "F64", 1, 8),
    (DType::Q4_0, "Q4_0", 32, 18),
    (DType::Q4_1, "Q4_1", 32, 20),
    (DType::Q5_0, "Q5_0", 32, 22),
    (DType::Q5_1, "Q5_1", 32, 24),
    (DType::Q8_0, "Q8_0", 32, 34),
    (DType::Q2_K, "Q2_K", 256, 84),
    (DType::Q3_K, "Q3_K", 256, 110),
    (DType::Q4_K, "Q4_K", 256, 144),
    (DType::Q5_K, "Q5_K", 256, 176),
    (DType::Q6_K, "Q6_K", 256, 210),
    (DType::IQ4_NL, "IQ4_NL", 32, 18),
    (DType::IQ4_XS, "IQ4_XS", 256, 136),
    (DType::MXFP4, "MXFP4", 32, 17),
    (DType::F8_64, "F8_64", 64, 68),
    (DType::U4_32, "U4_32", 32, 24),
    (DType::U4_128, "U4_128", 128, 72),
    (DType::NF4_64, "NF4_64", 64, 36),
];

impl DType {
    /// The type that safetensors calls `name`, or `None`.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0).filter(|dtype| !dtype.is_blocks())
    }

    /// All types, in the order of their codes in C.
    #[cfg(feature = "capi")]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The name in safetensors files, or in GGUF files, or the library's.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Bytes of one element, or of a block, where elements are in [blocks](Self::block_elements).
    pub const fn size(self) -> usize {
        TABLE[self as usize].3
    }

    /// Elements of a block; 1 where each is stored by itself.
    pub const fn block_elements(self) -> usize {
        TABLE[self as usize].2
    }

    /// Whether it is a type of quantised weights in blocks.
    pub const fn is_blocks(self) -> bool {
        self.block_elements() > 1
    }

    /// Bytes of so many elements: of whole blocks, which must be no more than can be addressed.
    pub const fn bytes(self, elements: usize) -> usize {
        elements / self.block_elements() * self.size()
    }

    /// Elements in so many bytes.
    pub const fn elements(self, bytes: usize) -> usize {
        bytes / self.size() * self.block_elements()
    }

    /// Its elements lie on multiples of so many bytes; blocks, which are read byte by byte, lie anywhere.
    pub const fn align(self) -> usize {
        if self.is_blocks() { 1 } else { self.size() }
    }

    /// Bytes of a tensor of this type and `shape`, or `None` if that overflows, or its rows are no whole blocks.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1usize, |elements, &dim| elements.checked_mul(dim))?;
        let whole = shape.last().copied().unwrap_or(1).is_multiple_of(self.block_elements());
        if whole { (elements / self.block_elements()).checked_mul(self.size()) } else { None }
    }

    /// Whether this type can be converted to `to`, on arrival or by a kernel.
    pub fn converts_to(self, to: DType) -> bool {
        let from = self.is_blocks() || matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3);
        from && matches!(to, DType::F32 | DType::BF16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type whose values are the elements of a tensor.
///
/// # Safety
/// `DTYPE` is no type of blocks, `DTYPE.size()` is the size of `Self`, and every bit pattern is a value.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The tensor type that stores `Self`.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {$(
        // SAFETY: plain numbers of the size that TABLE states (asserted below), without invalid bit patterns.
        unsafe impl Element for $rust { const DTYPE: DType = DType::$dtype; }
        const _: () = assert!(DType::$dtype.size() == size_of::<$rust>() && !DType::$dtype.is_blocks());
    )*};
}
elements!(u8 => U8, u32 => U32, i64 => I64, f32 => F32, f16 => F16, bf16 => BF16);

/// Converts `src`, elements of `from`, into `dst`, elements of `to`, both little-endian as safetensors stores them.
/// Rounding is to nearest even; F16, BF16 and F8E4M3 to F32 are exact. NaN stays NaN. Without branches, so that the compiler
/// makes vectors of it, with the instructions of the function that it is inlined into.
///
/// # Panics
/// If the lengths disagree or [`DType::converts_to`] says no: callers check both when they plan.
#[inline(always)]
pub(crate) fn convert(from: DType, src: &[u8], to: DType, dst: &mut [u8]) {
    assert!(from == to || from.converts_to(to), "{from} to {to} is no conversion");
    assert_eq!(from.elements(src.len()), to.elements(dst.len()), "conversion between different lengths");
    match (from, to) {
        _ if from == to => dst.copy_from_slice(src),
        _ if from.is_blocks() => {
            let mut weights = [0.0; blocks::LARGE];
            let weights = &mut weights[..from.block_elements()];
            for (src, dst) in src.chunks_exact(from.size()).zip(dst.chunks_exact_mut(to.bytes(weights.len()))) {
                blocks::expand(from, src, weights);
                match to {
                    DType::F32 => put(weights, dst, |weight| weight.to_le_bytes()),
                    _ => put(weights, dst, |weight| f32_to_bf16(weight.to_bits()).to_le_bytes()),
                }
            }
        }
        (DType::BF16, DType::F32) => map(src, dst, |b| (u32::from(u16::from_le_bytes(b)) << 16).to_le_bytes()),
        (DType::F16, DType::F32) => map(src, dst, |b| f16_to_f32(u16::from_le_bytes(b)).to_le_bytes()),
        (DType::F8E4M3, DType::F32) => map(src, dst, |[b]| f8e4m3_to_f32(b).to_le_bytes()),
        (DType::F32, DType::BF16) => map(src, dst, |b| f32_to_bf16(u32::from_le_bytes(b)).to_le_bytes()),
        (DType::F16, DType::BF16) => map(src, dst, |b| f32_to_bf16(f16_to_f32(u16::from_le_bytes(b))).to_le_bytes()),
        (DType::F8E4M3, DType::BF16) => map(src, dst, |[b]| f32_to_bf16(f8e4m3_to_f32(b)).to_le_bytes()),
        _ => unreachable!("converts_to names the pairs above"),
    }
}

#[inline(always)]
fn map<const A: usize, const B: usize>(src: &[u8], dst: &mut [u8], f: impl Fn([u8; A]) -> [u8; B]) {
    for (s, d) in src.as_chunks::<A>().0.iter().zip(dst.as_chunks_mut::<B>().0) {
        *d = f(*s);
    }
}

#[inline(always)]
fn put<const B: usize>(weights: &[f32], dst: &mut [u8], f: impl Fn(f32) -> [u8; B]) {
    for (weight, dst) in weights.iter().zip(dst.as_chunks_mut::<B>().0) {
        *dst = f(*weight);
    }
}

/// The number of two bytes, of F16 or BF16.
pub(crate) fn widened(dtype: DType, bytes: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bytes);
    f32::from_bits(if dtype == DType::F16 { f16_to_f32(bits) } else { u32::from(bits) << 16 })
}

/// The bits of the nearest BF16, of a tie the even one; NaN becomes quiet.
#[inline(always)]
pub(crate) fn f32_to_bf16(bits: u32) -> u16 {
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The bits of the same number as F32; NaN becomes quiet.
#[inline(always)]
fn f16_to_f32(bits: u16) -> u32 {
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    sign | match magnitude >> 23 {
        0 => subnormal(magnitude, 113),
        31 => (magnitude + (224 << 23)) | if magnitude << 9 == 0 { 0 } else { 1 << 22 },
        _ => magnitude + (112 << 23),
    }
}

/// The bits of an OCP 8-bit float as F32 (E4M3FN: no infinities, 0x7f and 0xff are NaN; OCP 8-bit Floating Point Specification
/// 1.0, table 1).
#[inline(always)]
pub(crate) fn f8e4m3_to_f32(bits: u8) -> u32 {
    let (sign, magnitude) = (u32::from(bits & 0x80) << 24, u32::from(bits & 0x7f) << 20);
    sign | match magnitude >> 20 {
        0x7f => f32::NAN.to_bits(),
        0..8 => subnormal(magnitude, 121),
        _ => magnitude + (120 << 23),
    }
}

/// `mantissa`, in F32's place, times two to the `exponent - 127`: with the leading one that it does not have, less that one.
#[inline(always)]
fn subnormal(mantissa: u32, exponent: u32) -> u32 {
    (f32::from_bits(mantissa | exponent << 23) - f32::from_bits(exponent << 23)).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_stand_at_their_own_rows() {
        for (row, (dtype, name, elements, size)) in TABLE.into_iter().enumerate() {
            assert_eq!((dtype as usize, dtype.name(), dtype.size()), (row, name, size));
            assert_eq!(DType::from_name(name), Some(dtype).filter(|_| elements == 1), "{name}");
        }
        assert_eq!(DType::from_name("F4"), None);
        assert_eq!(DType::F32.bytes_of(&[usize::MAX, 2]), None);
    }

    #[test]
    fn every_sixteen_bit_float_widens_exactly() {
        for bits in 0..=u16::MAX {
            let mut out = [0; 4];
            convert(DType::BF16, &bits.to_le_bytes(), DType::F32, &mut out);
            assert_eq!(u32::from_le_bytes(out), u32::from(bits) << 16);
            convert(DType::F16, &bits.to_le_bytes(), DType::F32, &mut out);
            let expected = f16::from_bits(bits).to_f64();
            assert!(f64::from(f32::from_le_bytes(out)) == expected || expected.is_nan());
            assert_eq!(u32::from_le_bytes(out), f16::from_bits(bits).to_f32().to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn e4m3_has_the_values_of_the_specification() {
        for (bits, value) in
            [(0x00, 0.0), (0x01, 0.001953125), (0x08, 0.015625), (0x38, 1.0), (0x7e, 448.0), (0xc4, -3.0)]
        {
            assert_eq!(f32::from_bits(f8e4m3_to_f32(bits)), value, "{bits:#x}");
        }
        assert!([0x7f, 0xff].iter().all(|&bits| f32::from_bits(f8e4m3_to_f32(bits)).is_nan()));
        for bits in 0..=u8::MAX {
            let (exponent, mantissa) = (i32::from(bits >> 3 & 0xf), f32::from(bits & 7));
            let magnitude = match (exponent, bits & 7) {
                (0xf, 7) => f32::NAN,
                (0, _) => mantissa / 512.0,
                _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
            };
            let value = if bits & 0x80 == 0 { magnitude } else { -magnitude };
            assert_eq!(f8e4m3_to_f32(bits), value.to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        let mut out = [0; 2];
        // Ties go to the even neighbour: down from 1 + 1/256, up from 1 + 3/256.
        for (value, bits) in
            [(1.0f32, 0x3f80u16), (257.0 / 256.0, 0x3f80), (259.0 / 256.0, 0x3f82), (f32::INFINITY, 0x7f80)]
        {
            convert(DType::F32, &value.to_le_bytes(), DType::BF16, &mut out);
            assert_eq!(u16::from_le_bytes(out), bits, "{value}");
        }
    }

    #[test]
    fn narrowing_has_the_bits_of_the_half_crate() {
        let mut rng = fastrand::Rng::new();
        // Each upper half, with lower halves about a tie and at random; so all NaN of BF16, infinities and subnormal numbers.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, rng.u16(..)] {
                let bits = u32::from(upper) << 16 | u32::from(lower);
                assert_eq!(f32_to_bf16(bits), bf16::from_f32(f32::from_bits(bits)).to_bits(), "{bits:#x}");
            }
            let mut out = [0; 2];
            convert(DType::F16, &upper.to_le_bytes(), DType::BF16, &mut out);
            let expected = bf16::from_f32(f16::from_bits(upper).to_f32());
            assert_eq!(u16::from_le_bytes(out), expected.to_bits(), "{upper:#x}");
        }
    }
}
