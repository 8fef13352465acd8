//! What a unit that is stored plain takes where it is kept packed in RAM: expected before, laid out once it is there.

use super::{Cast, CopyRange, Dequantise, Placed, UnitLayout, Unpack, pages};
use crate::{
    checkpoint::{PackedRange, TensorEntry},
    dtype::DType,
    packed::{self, Description},
};

/// Each tensor begins on such a boundary there, in bytes.
pub(crate) const REPACK_ALIGN: usize = 16;

/// How a tensor of such a unit is kept.
#[derive(Clone, Debug)]
pub(crate) enum Repacked {
    /// As it is stored.
    Stored,
    /// Packed, as this says.
    Packed(Description),
}

impl Placed {
    /// Whether it is worth packing where it is kept, as far as can be known beforehand.
    pub(crate) fn can_pack(&self) -> bool {
        let [stored] = self.stored.as_slice() else { return false };
        let plain = stored.packed.is_none() && stored.dtype == DType::BF16;
        plain && self.dtype == DType::BF16 && stored.elements() >= packed::LEAST
    }
}

impl UnitLayout {
    /// What it is expected to take packed in RAM, in whole pages, and how many bytes of weights are unpacked from that.
    pub(crate) fn expected_packed(&self) -> [usize; 2] {
        let mut sums = [0usize; 2];
        for tensor in &self.tensors {
            for stored in &tensor.stored {
                let (stored, weights) = match stored {
                    stored if tensor.can_pack() => (packed::expected_bytes(stored.elements()), stored.bytes),
                    stored if stored.packed.is_some() => (stored.bytes, DType::BF16.bytes(stored.elements())),
                    stored => (stored.bytes, 0),
                };
                let stored = stored.checked_next_multiple_of(REPACK_ALIGN).unwrap_or(usize::MAX);
                sums = [sums[0].saturating_add(stored), sums[1].saturating_add(weights)];
            }
        }
        [pages(sums[0]), sums[1]]
    }

    /// The same unit, kept in RAM with each of its tensors, in their order, where and as this says. So many bytes in all.
    pub(crate) fn repacked(&self, tensors: Vec<(usize, Repacked)>, bytes: usize) -> Self {
        let mut kept = Self {
            extents: Vec::new(),
            copies: Vec::new(),
            casts: Vec::new(),
            unpacks: Vec::new(),
            dequantises: Vec::new(),
            disk_bytes: bytes,
            host_bytes: bytes,
            ..self.clone()
        };
        for (number, (placed, (from, how))) in self.tensors.iter().zip(tensors).enumerate() {
            let (to, kept_at, stored) = (placed.at, 0, &placed.stored[0]);
            match how {
                _ if stored.bytes == 0 => {}
                Repacked::Stored if placed.stored.len() > 1 => {
                    let made = self.dequantises.iter().find(|made| made.to == to).expect("the unit makes it");
                    let mut from = from;
                    let mut input = |entry: &TensorEntry| {
                        let at = from;
                        from = (from + entry.bytes).next_multiple_of(REPACK_ALIGN);
                        at
                    };
                    let inputs: Vec<_> = placed.stored.iter().map(|entry| (input(entry), entry)).collect();
                    let made = Dequantise { to, ..Dequantise::new(made.recipe, made.to_type, &inputs) };
                    kept.dequantises.push(made);
                }
                Repacked::Packed(description) => {
                    let (packed, report) = (PackedRange::all(description), self.unpacks.len() + number);
                    let (file, tensor) = (stored.file, placed.name.clone());
                    kept.unpacks.push(Unpack { from, to, kept_at, packed, report, file, tensor });
                }
                Repacked::Stored if stored.packed.is_some() => {
                    let unpack = self.unpacks.iter().find(|unpack| unpack.to == to).expect("the unit unpacks it");
                    kept.unpacks.push(Unpack { from, ..unpack.clone() });
                }
                Repacked::Stored if placed.dtype == stored.dtype => {
                    kept.copies.push(CopyRange { from, to, kept_at, bytes: stored.bytes });
                }
                Repacked::Stored => {
                    let (elements, from_type, to_type) = (stored.elements(), stored.dtype, placed.dtype);
                    kept.casts.push(Cast { from, to, kept_at, elements, from_type, to_type });
                }
            }
        }
        kept
    }
}
