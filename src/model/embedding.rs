//! The embedding of tokens where the table stays in its file.

use std::{fs::File, mem, os::unix::fs::FileExt, path::PathBuf, slice, sync::Arc};

use super::{
    exchange::Exchange,
    workspace::{Region, Workspace},
};
use crate::{
    checkpoint::{Checkpoint, FileState, PackedRange},
    device::Device,
    dtype::{self, DType},
    error::{Error, Result},
    packed::{self, CORRUPT, Packed},
};

/// Rows that are read before they are sent.
const AT_ONCE: usize = 256;

/// An embedding table in its file, whose rows are read as they are needed: a few kilobytes a token.
pub(super) struct EmbeddingRows<D: Device> {
    file: File,
    /// What it was when the checkpoint was opened.
    state: FileState,
    /// For messages.
    name: String,
    path: PathBuf,
    offset: u64,
    dtype: DType,
    packed: Option<PackedRows>,
    /// One row, and the same in the type that the table would have on the device: results do not depend on where it is.
    row: Vec<u8>,
    width: usize,
    rounded: (DType, Vec<u8>),
    exchange: Exchange<D>,
}

/// What reading rows of a packed table takes.
struct PackedRows {
    range: PackedRange,
    /// Where each part begins, from the table's first byte.
    starts: Vec<u64>,
    /// A part, of which only what is needed is read.
    part: Vec<u8>,
    block: Vec<u16>,
}

impl PackedRows {
    fn new(range: PackedRange) -> Self {
        let lengths = range.parts().lengths;
        let starts = lengths.iter().scan(0, |end, length| Some(mem::replace(end, *end + u64::from(*length))));
        let longest = lengths.iter().max().map_or(0, |length| *length as usize);
        Self { starts: starts.collect(), part: vec![0; longest], block: vec![0; packed::BLOCK], range }
    }

    /// Reads the weights from number `first` on that fill `row`, with `read`, which is given bytes of the table and where they begin.
    /// False if they are corrupt.
    fn read(
        &mut self,
        first: usize,
        row: &mut [u8],
        mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<bool> {
        let (mut at, mut row) = (first, row.as_chunks_mut::<2>().0);
        let all = self.range.parts();
        while !row.is_empty() {
            let (number, in_part) = (at / all.part, at % all.part);
            let (block, in_block) = (in_part / packed::BLOCK, in_part % packed::BLOCK);
            let weights = all.part.min(all.weights - number * all.part);
            let (start, bytes) = (self.starts[number], &mut self.part[..all.lengths[number] as usize]);
            read(&mut bytes[..packed::index_bytes(weights)], start)?;
            let Some(place) = Packed::new(all.table, weights, bytes).ok().and_then(|part| part.place(block)) else {
                return Ok(false);
            };
            read(&mut bytes[place.clone()], start + place.start as u64)?;
            let decoded = &mut self.block[..packed::BLOCK.min(weights - block * packed::BLOCK)];
            if Packed::new(all.table, weights, bytes).and_then(|part| part.decode_block(block, decoded)).is_err() {
                return Ok(false);
            }
            let found = &decoded[in_block..];
            let (filled, rest) = row.split_at_mut(found.len().min(row.len()));
            filled.iter_mut().zip(found).for_each(|(bytes, weight)| *bytes = weight.to_le_bytes());
            (at, row) = (at + filled.len(), rest);
        }
        Ok(true)
    }
}

impl<D: Device> EmbeddingRows<D> {
    /// What it takes in RAM, for passes of up to so many tokens, from the table of this name.
    pub(super) fn bytes(checkpoint: &Checkpoint, name: &str, tokens: usize) -> Result<usize> {
        let entry = checkpoint.entry(name)?;
        let part = entry.packed.as_ref().and_then(|packed| packed.parts().lengths.iter().max().copied());
        Ok(Exchange::<D>::bytes(Self::words(tokens, entry.shape[1])) + part.unwrap_or(0) as usize)
    }

    fn words(tokens: usize, width: usize) -> usize {
        tokens.min(AT_ONCE).saturating_mul(width)
    }

    /// For passes of up to so many tokens, from a table whose type on the device would be `weight`, or that of the file.
    pub(super) fn new(
        device: &D,
        checkpoint: &Checkpoint,
        name: &str,
        weight: Option<DType>,
        tokens: usize,
    ) -> Result<Self> {
        let (entry, width) = (checkpoint.entry(name)?, checkpoint.entry(name)?.shape[1]);
        let weight = weight.unwrap_or(entry.dtype);
        let (path, state) = checkpoint.file_states().nth(entry.file).expect("an entry's file is in the table");
        let file = File::open(path).map_err(Error::io("open", path))?;
        let reader = Self {
            file,
            state,
            name: name.to_owned(),
            path: path.clone(),
            offset: entry.offset,
            dtype: entry.dtype,
            packed: entry.packed.clone().map(PackedRows::new),
            row: vec![0; entry.dtype.bytes(width)],
            width,
            rounded: (weight, vec![0; weight.bytes(width)]),
            exchange: Exchange::new(device, "embedding rows on their way", Self::words(tokens, width))?,
        };
        reader.state.check(&reader.file, &reader.path)?;
        Ok(reader)
    }

    /// Reads the rows of `ids`, and enqueues their copies, as F32, to the rows of `to`.
    pub(super) fn send(
        &mut self,
        ids: impl Iterator<Item = u32>,
        work: &Workspace<D>,
        to: Region,
        stream: &D::Stream,
    ) -> Result<()> {
        let (width, mut ids, mut first) = (self.width, ids.peekable(), 0);
        while ids.peek().is_some() {
            let Self { file, name, path, offset, dtype, packed, row, rounded: (weight, rounded), exchange, .. } = self;
            let read = |bytes: &mut [u8], at: u64| {
                file.read_exact_at(bytes, at).map_err(|source| Error::Read {
                    unit: "the embedding".into(),
                    tensor: name.clone(),
                    path: path.clone(),
                    offset: at,
                    source: Arc::new(source),
                })
            };
            let words = exchange.words()?;
            let mut count = 0;
            for (id, words) in ids.by_ref().take(words.len() / width).zip(words.chunks_exact_mut(width)) {
                match packed {
                    None => {
                        let at = *offset + u64::from(id) * row.len() as u64;
                        read(row, at)?
                    }
                    Some(packed) => {
                        let is_whole = packed.read(id as usize * width, row, |bytes, at| read(bytes, *offset + at))?;
                        if !is_whole {
                            return Err(Error::tensor(&**path, name, CORRUPT));
                        }
                    }
                }
                dtype::convert(*dtype, row, *weight, rounded);
                widen(*weight, rounded, words);
                count += 1;
            }
            exchange.send(work.write(to, first * width, &[count, width])?, stream)?;
            first += count;
        }
        // Rows of another file beside layers of this one would be a wrong answer.
        self.state.check(&self.file, &self.path)
    }
}

/// Converts stored elements to the bits of F32.
fn widen(dtype: DType, row: &[u8], words: &mut [u32]) {
    // SAFETY: the slice starts at the words and is as long as they are in bytes; any four bytes are a word, and `words` is not
    // used while the slice lives.
    let bytes = unsafe { slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) };
    dtype::convert(dtype, row, DType::F32, bytes);
}
