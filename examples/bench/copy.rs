//! The plain copy: what one thread's memcpy gives between memory of the pipeline's sizes.

use std::{
    fs, ptr,
    time::{Duration, Instant},
};

use memmap2::MmapRaw;

use super::{Failure, Moved, clock, memory};

/// Copies a layer's tensors, one after the other, from place to place of a source, to place after place of a target.
///
/// Like is compared with like: the pipeline copies from memory of this size to memory of this size in these pieces, and a
/// source that fitted in a cache would flatter the plain copy.
pub struct PlainCopy {
    from: MmapRaw,
    to: MmapRaw,
    /// Bytes of a layer's tensors.
    pieces: Vec<usize>,
    from_at: usize,
    to_at: usize,
}

impl PlainCopy {
    /// A source of up to `from` bytes, less if that is more than 1 GiB and than a quarter of the memory that is free.
    pub fn new(from: usize, to: usize, pieces: Vec<usize>) -> Result<Self, Failure> {
        let layer: usize = pieces.iter().sum();
        let from = from.min((available() / 4).max(1 << 30)).max(layer);
        let (from, to) = (memory(from)?, memory(to.max(layer))?);
        Ok(Self { from, to, pieces, from_at: 0, to_at: 0 })
    }

    pub fn name(&self) -> String {
        format!("plain copy by one thread, from {:.2} GB to {:.2} GB", gb(self.from.len()), gb(self.to.len()))
    }

    /// Copies for this long, and no less than one layer.
    pub fn window(&mut self, window: Duration) -> Moved {
        let (start, cpu) = (Instant::now(), clock::own_thread());
        let mut bytes = 0;
        while bytes == 0 || start.elapsed() < window {
            for &piece in &self.pieces {
                let place = |at: usize, len: usize| if at + piece > len { 0 } else { at };
                (self.from_at, self.to_at) = (place(self.from_at, self.from.len()), place(self.to_at, self.to.len()));
                // SAFETY: both mappings are as long as a layer or longer, both places were just checked, nobody else uses them.
                unsafe {
                    let (from, to) = (self.from.as_ptr().add(self.from_at), self.to.as_mut_ptr().add(self.to_at));
                    ptr::copy_nonoverlapping(from, to, piece);
                }
                (self.from_at, self.to_at, bytes) = (self.from_at + piece, self.to_at + piece, bytes + piece as u64);
            }
        }
        Moved { bytes, seconds: start.elapsed().as_secs_f64(), cpu_seconds: clock::own_thread() - cpu }
    }
}

fn gb(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

/// Bytes of memory that can be had without swapping; 0 if that cannot be told.
fn available() -> usize {
    let table = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok()).unwrap_or(0) << 10
}
