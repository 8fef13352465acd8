//! The plain copy: what one thread's memcpy gives between memory of the pipeline's sizes.

use std::{
    fs, ptr,
    time::{Duration, Instant},
};

use layer_streamer::{
    device::{Cpu, Device},
    plan::DEVICE_ALIGN,
};
use memmap2::MmapRaw;

use super::{Failure, Moved, clock, memory, units};

/// One tensor of a layer.
#[derive(Clone, Copy)]
pub struct Piece {
    pub bytes: usize,
    /// Where in its file it starts: that decides how it lies in a page of host memory.
    pub offset: u64,
}

/// Copies a layer's tensors, one after the other, from place after place of a source to place after place of a target.
///
/// Like is compared with like: the pipeline copies from memory of this size to memory of this size, in these pieces
/// with these alignments, and a source that fitted in a cache would flatter the plain copy.
pub struct PlainCopy {
    from: MmapRaw,
    to: MmapRaw,
    pieces: Vec<Piece>,
    from_at: usize,
    to_at: usize,
}

const PAGE: usize = 4096;

impl PlainCopy {
    /// A source of up to `from` bytes, less if that is more than 1 GiB and than a quarter of the memory that is free.
    pub fn new(from: usize, to: usize, pieces: Vec<Piece>) -> Result<Self, Failure> {
        let layer: usize = pieces.iter().map(|piece| piece.bytes + 2 * PAGE).sum();
        let from = from.min((available() / 4).max(1 << 30)).max(layer);
        let (from, to) = (memory(from)?, memory(to.max(layer))?);
        let mut copy = Self { from, to, pieces, from_at: 0, to_at: 0 };
        // Once through all of it: in a virtual machine the first use of memory may be slow even where it is present.
        for _ in 0..=copy.from.len().max(copy.to.len()) / layer.max(1) {
            copy.window(Duration::ZERO);
        }
        Ok(copy)
    }

    pub fn name(&self) -> String {
        let [from, to] = [&self.from, &self.to].map(|memory| units::bytes(memory.len() as u64));
        format!("plain copy by one thread, from {from} to {to}")
    }

    /// Copies for this long, and no less than one layer.
    pub fn window(&mut self, window: Duration) -> Moved {
        let (start, cpu) = (Instant::now(), clock::own_thread());
        let mut bytes = 0;
        loop {
            for &piece in &self.pieces {
                let from = self.from_at.next_multiple_of(PAGE) + piece.offset as usize % PAGE;
                let to = self.to_at.next_multiple_of(DEVICE_ALIGN);
                let from = if from + piece.bytes > self.from.len() { piece.offset as usize % PAGE } else { from };
                let to = if to + piece.bytes > self.to.len() { 0 } else { to };
                // SAFETY: both mappings hold a layer with its alignments, both places were just checked, nobody else
                // uses them.
                unsafe {
                    ptr::copy_nonoverlapping(self.from.as_ptr().add(from), self.to.as_mut_ptr().add(to), piece.bytes);
                }
                (self.from_at, self.to_at, bytes) = (from + piece.bytes, to + piece.bytes, bytes + piece.bytes as u64);
            }
            if start.elapsed() >= window {
                let seconds = start.elapsed().as_secs_f64();
                return Moved { bytes, seconds, cpu_seconds: clock::own_thread() - cpu };
            }
        }
    }
}

/// Bytes of memory that can be had without swapping and without meeting a limit; the most there is if that cannot be told.
pub fn available() -> usize {
    Cpu.free_memory().unwrap_or(usize::MAX)
}
