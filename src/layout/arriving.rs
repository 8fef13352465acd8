//! What becomes of the stored bytes of a unit: copies, casts, packed weights, quantised ones.

use std::{iter, ops::Range};

use super::{DEVICE_ALIGN, Offsets, REPACK_ALIGN};
use crate::{
    checkpoint::{PackedRange, TensorEntry},
    dtype::DType,
    packed::Parts,
    quantised::{INPUTS, Recipe},
};

/// Bytes that go to the device unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Where it goes among what is kept [packed](crate::unit::Tier::GpuPacked).
    pub(crate) kept_at: usize,
    pub(crate) bytes: usize,
}

impl CopyRange {
    /// What of it lies in `window`, a range of the host slot.
    pub(crate) fn within(&self, window: &Range<usize>) -> Option<Self> {
        let (start, end) = (self.from.max(window.start), (self.from + self.bytes).min(window.end));
        let skipped = start.saturating_sub(self.from);
        (start < end).then(|| Self {
            from: start,
            to: self.to + skipped,
            kept_at: self.kept_at + skipped,
            bytes: end - start,
        })
    }
}

/// A tensor that is converted on the device: `elements` of `from_type` at `from` in the host slot become `to_type` at `to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cast {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// As for copies.
    pub(crate) kept_at: usize,
    pub(crate) elements: usize,
    pub(crate) from_type: DType,
    pub(crate) to_type: DType,
}

impl Cast {
    /// Bytes before the cast.
    pub(crate) fn bytes(&self) -> usize {
        self.from_type.bytes(self.elements)
    }

    /// Bytes after it.
    pub(crate) fn bytes_after(&self) -> usize {
        self.to_type.bytes(self.elements)
    }

    /// Whether it is kept as it is stored where packed tensors are, and cast from there: if that is less.
    pub(crate) fn is_kept_stored(&self) -> bool {
        self.bytes() < self.bytes_after()
    }

    /// The elements that begin in `window`, a range of the host slot, whole blocks of them, in pieces of up to `block_bytes` before the
    /// cast.
    pub(crate) fn pieces(&self, window: &Range<usize>, block_bytes: usize) -> impl Iterator<Item = Self> {
        let (cast, size, elements) = (*self, self.from_type.size(), self.from_type.block_elements());
        let to_size = self.to_type.bytes(elements);
        let begin_before = |end: usize| end.saturating_sub(cast.from).div_ceil(size).min(cast.elements / elements);
        let (first, end, most) = (begin_before(window.start), begin_before(window.end), block_bytes / size);
        (first..end).step_by(most).map(move |start| Self {
            from: cast.from + start * size,
            to: cast.to + start * to_size,
            kept_at: cast.kept_at + start * to_size,
            elements: most.min(end - start) * elements,
            ..cast
        })
    }
}

/// A tensor that is unpacked on the device: its parts, at `from` in the host slot, become weights of BF16 at `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unpack {
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Where its parts go as they are.
    pub(crate) kept_at: usize,
    pub(crate) packed: PackedRange,
    /// The number of its report of corrupt weights among those of the unit.
    pub(crate) report: usize,
    /// For messages.
    pub(crate) file: usize,
    pub(crate) tensor: String,
}

/// Some of its parts, likewise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnpackPiece<'a> {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) parts: Parts<'a>,
}

impl Unpack {
    /// Bytes before it is unpacked.
    pub(crate) fn bytes(&self) -> usize {
        self.packed.parts().bytes()
    }

    /// Each part by itself.
    pub(super) fn parts(&self) -> impl Iterator<Item = UnpackPiece<'_>> {
        let all = self.packed.parts();
        let (mut from, mut to, mut left) = (self.from, self.to, all.weights);
        all.lengths.chunks(1).map(move |lengths| {
            let parts = Parts { weights: all.part.min(left), lengths, ..all };
            let piece = UnpackPiece { from, to, parts };
            (from, to, left) = (from + parts.bytes(), to + WEIGHT * parts.weights, left - parts.weights);
            piece
        })
    }

    /// The parts that begin in `window`, a range of the host slot, as many at a time as lie in `block_bytes`: one at least.
    pub(crate) fn pieces(&self, window: &Range<usize>, block_bytes: usize) -> impl Iterator<Item = UnpackPiece<'_>> {
        let lengths = self.packed.parts().lengths;
        let (mut first, window) = (0, window.clone());
        let mut parts = self.parts().peekable();
        iter::from_fn(move || {
            while parts.next_if(|part| part.from < window.start).is_some() {
                first += 1;
            }
            let mut piece = parts.next_if(|part| part.from < window.end)?;
            let (begin, end) = (first, piece.from.saturating_add(block_bytes));
            first += 1;
            while let Some(next) = parts.next_if(|next| next.from < window.end && next.from + next.parts.bytes() <= end)
            {
                piece.parts.weights += next.parts.weights;
                first += 1;
            }
            piece.parts.lengths = &lengths[begin..first];
            Some(piece)
        })
    }
}

/// Bytes of a weight that was unpacked.
pub(super) const WEIGHT: usize = DType::BF16.size();

/// One of the stored tensors of a [`Dequantise`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Input {
    /// Where it lies in the host slot.
    pub(crate) from: usize,
    /// Where it goes among what is kept [packed](crate::plan::Tier::GpuPacked), if it is kept so.
    pub(crate) kept_at: usize,
    /// Where it goes in a staging block.
    pub(crate) staged_at: usize,
    pub(crate) bytes: usize,
}

/// A matrix that is made of several stored tensors, at `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dequantise {
    /// No more than [`INPUTS`].
    pub(crate) inputs: Vec<Input>,
    pub(crate) to: usize,
    /// Where the matrix goes among what is kept packed, if it is not kept as it is stored.
    pub(crate) kept_at: usize,
    pub(crate) to_type: DType,
    pub(crate) recipe: Recipe,
}

impl Dequantise {
    /// Of inputs that lie there in the host slot; where it goes is not said yet.
    pub(crate) fn new(recipe: Recipe, to_type: DType, from: &[(usize, &TensorEntry)]) -> Self {
        let mut staged = Offsets::aligned_to(REPACK_ALIGN);
        let input = |&(from, entry): &(usize, &TensorEntry)| {
            // They are parts of files, which are shorter than what can be addressed.
            let staged_at = staged.push(entry.bytes).unwrap_or(usize::MAX);
            Input { from, kept_at: 0, staged_at, bytes: entry.bytes }
        };
        Self { inputs: from.iter().map(input).collect(), to: 0, kept_at: 0, to_type, recipe }
    }

    /// Bytes of the matrix; `None` where that is more than can be addressed.
    pub(crate) fn bytes(&self) -> Option<usize> {
        self.to_type.bytes_of(&[self.recipe.rows, self.recipe.columns])
    }

    /// What its inputs take in a staging block.
    pub(crate) fn staged_bytes(&self) -> usize {
        self.inputs.last().map_or(0, |last| last.staged_at.saturating_add(last.bytes))
    }

    /// Whether it is kept as it is stored where packed tensors are: if that is less. Blocks are about as small.
    pub(crate) fn is_kept_stored(&self) -> bool {
        let stored: usize = self.inputs.iter().map(|input| input.bytes.next_multiple_of(DEVICE_ALIGN)).sum();
        !self.to_type.is_blocks() && self.bytes().is_some_and(|bytes| stored < bytes)
    }

    /// Something for each input; of inputs that there are not, the first's.
    pub(crate) fn each<T: Copy>(&self, of: impl Fn(&Input) -> T) -> [T; INPUTS] {
        std::array::from_fn(|at| of(self.inputs.get(at).unwrap_or(&self.inputs[0])))
    }
}
