//! A packed tensor: what a file says of it beside its bytes, and its parts.

use serde::{Deserialize, Serialize};

use super::{ALIGN, BLOCK, Corrupt, FIXED, LONGEST, PART, Packed, Table, index_bytes};
use crate::dtype::DType;

/// A safetensors file whose metadata have this key holds packed tensors. The value is the [`VERSION`]; the description of the tensor
/// `NAME` stands under this key, a colon and `NAME`.
pub const KEY: &str = "layer_streamer.packed";

/// The version of the format that this module writes, and the only one that it reads.
pub const VERSION: &str = "1";

/// What there is to know of a packed tensor beside its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Dimensions of the tensor that was packed, slowest first. It is of BF16, and not empty.
    pub shape: Vec<usize>,
    /// Its table.
    pub table: Table,
    /// XXH3 (64 bits, seed 0) of the bytes that were packed.
    pub checksum: u64,
    /// Weights of each part but the last: a multiple of [`BLOCK`], [`PART`] at most.
    pub part: usize,
    /// Bytes of each part, as they follow one another in the tensor.
    pub lengths: Vec<u32>,
}

/// As it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    dtype: String,
    shape: Vec<usize>,
    table: [u8; 13],
    xxh3: String,
    part: usize,
    lengths: Vec<u32>,
}

impl Description {
    /// How many weights a part of a tensor of this shape has: whole rows where these fill whole blocks, so that rows can be read by
    /// themselves.
    pub fn part_of(shape: &[usize]) -> usize {
        let row: usize = shape.iter().skip(1).product();
        // So many rows fill whole blocks: a block is a power of two.
        let rows = BLOCK >> row.trailing_zeros().min(BLOCK.trailing_zeros());
        match row.checked_mul(rows) {
            Some(step) if (1..=PART).contains(&step) => PART / step * step,
            _ => PART,
        }
    }

    /// As a file's metadata have it.
    pub fn to_json(&self) -> String {
        let Self { shape, table, checksum, part, lengths } = self.clone();
        let (dtype, xxh3) = (DType::BF16.name().to_owned(), format!("{checksum:016x}"));
        let written = Written { dtype, shape, table: table.0, xxh3, part, lengths };
        serde_json::to_string(&written).expect("it has strings and numbers")
    }

    /// From what a file says.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Written { dtype, shape, table, xxh3, part, lengths } = written;
        if dtype != DType::BF16.name() {
            return Err(format!("{dtype} is no type that is packed"));
        }
        let checksum = Some(xxh3.as_str()).filter(|text| text.len() == 16 && !text.starts_with('+'));
        let checksum = checksum.and_then(|text| u64::from_str_radix(text, 16).ok());
        let checksum = checksum.ok_or_else(|| format!("{xxh3:?} is no checksum of 16 hexadecimal digits"))?;
        let description = Self { shape, table: Table(table), checksum, part, lengths };
        description.check()?;
        Ok(description)
    }

    /// Whether there can be such a tensor.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self { ref shape, part, ref lengths, .. } = *self;
        if !part.is_multiple_of(BLOCK) || !(BLOCK..=PART).contains(&part) {
            return Err(format!("parts of {part} weights: must be a multiple of {BLOCK}, {PART} at most"));
        }
        let bytes = DType::BF16.bytes_of(shape).filter(|bytes| (1..=isize::MAX as usize).contains(bytes));
        let weights = bytes.ok_or_else(|| format!("a tensor of shape {shape:?} is not packed"))? / 2;
        if lengths.len() != weights.div_ceil(part) {
            let needed = weights.div_ceil(part);
            return Err(format!("{} parts for {weights} weights, which have {needed}", lengths.len()));
        }
        for (number, &length) in lengths.iter().enumerate() {
            let weights = part.min(weights - number * part);
            let (index, blocks, length) = (index_bytes(weights), weights.div_ceil(BLOCK), length as usize);
            let possible = index + blocks * FIXED..=index + blocks * LONGEST;
            if !length.is_multiple_of(ALIGN) || !possible.contains(&length) {
                return Err(format!("part {number} of {weights} weights cannot be {length} bytes long"));
            }
        }
        Ok(())
    }

    /// How many weights the tensor has.
    pub fn weights(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes it takes packed.
    pub fn bytes(&self) -> usize {
        self.parts().bytes()
    }

    /// All its parts.
    pub fn parts(&self) -> Parts<'_> {
        let Self { table, part, ref lengths, .. } = *self;
        Parts { table, part, weights: self.weights(), lengths }
    }
}

/// Parts of a packed tensor that follow one another.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The tensor's table.
    pub table: Table,
    /// Weights of each part but the last.
    pub part: usize,
    /// Weights of all of them.
    pub weights: usize,
    /// Bytes of each.
    pub lengths: &'a [u32],
}

impl Parts<'_> {
    /// What all of them take.
    pub fn bytes(&self) -> usize {
        self.lengths.iter().map(|length| *length as usize).sum()
    }

    /// Decodes them.
    ///
    /// # Errors
    /// [`Corrupt`], with the number of the block among those of all parts. Then `out` has any weights.
    ///
    /// # Panics
    /// If `bytes` or `out` has another length.
    pub fn decode(&self, bytes: &[u8], out: &mut [u16]) -> Result<(), Corrupt> {
        assert_eq!((bytes.len(), out.len()), (self.bytes(), self.weights));
        let mut rest = bytes;
        for (number, (out, length)) in out.chunks_mut(self.part).zip(self.lengths).enumerate() {
            let (bytes, others) = rest.split_at(*length as usize);
            rest = others;
            let decoded = Packed::new(self.table, out.len(), bytes).and_then(|packed| packed.decode(out));
            decoded.map_err(|corrupt| Corrupt { block: number * self.part / BLOCK + corrupt.block, ..corrupt })?;
        }
        Ok(())
    }
}
