//! The embedding of tokens where the table stays in its file.

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf, slice, sync::Arc};

use super::{
    batch::BLOCK,
    exchange::Exchange,
    workspace::{Region, Workspace},
};
use crate::{
    checkpoint::{Checkpoint, FileState},
    device::Device,
    dtype::{self, DType},
    error::{Error, Result},
};

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
    /// One row as it is stored, and in the type that the table would have on the device: results do not depend on where it is.
    row: Vec<u8>,
    rounded: (DType, Vec<u8>),
    exchange: Exchange<D>,
}

impl<D: Device> EmbeddingRows<D> {
    /// What it takes in RAM, for passes of up to so many tokens of so many elements.
    pub(super) fn bytes(tokens: usize, width: usize) -> usize {
        Exchange::<D>::bytes(Self::words(tokens, width))
    }

    fn words(tokens: usize, width: usize) -> usize {
        tokens.min(BLOCK).saturating_mul(width)
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
            row: vec![0; width * entry.dtype.size()],
            rounded: (weight, vec![0; width * weight.size()]),
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
        let (width, mut ids, mut first) = (self.row.len() / self.dtype.size(), ids.peekable(), 0);
        while ids.peek().is_some() {
            let Self { file, name, path, offset, dtype, row, rounded: (weight, rounded), exchange, .. } = self;
            let words = exchange.words()?;
            let mut count = 0;
            for (id, words) in ids.by_ref().take(words.len() / width).zip(words.chunks_exact_mut(width)) {
                let at = *offset + u64::from(id) * row.len() as u64;
                file.read_exact_at(row, at).map_err(|source| Error::Read {
                    unit: "the embedding".into(),
                    tensor: name.clone(),
                    path: path.clone(),
                    offset: at,
                    source: Arc::new(source),
                })?;
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
