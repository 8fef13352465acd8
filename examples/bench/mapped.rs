//! Layers that the page cache has: nothing moves, so a pass is measured as a sum of all their bytes, beside the same sum over the
//! files mapped plainly.

use std::{collections::BTreeMap, fs::File, slice, time::Instant};

use layer_streamer::{Checkpoint, Unit, device::Device};
use memmap2::Mmap;

use super::{Failure, Pipeline};

/// The tensors of the layers, in a plain mapping of each file.
pub struct MappedTensors {
    files: Vec<Mmap>,
    /// The file, where it begins there, and its length.
    tensors: Vec<(usize, usize, usize)>,
}

impl MappedTensors {
    pub fn new(checkpoint: &Checkpoint, units: &[Unit]) -> Result<Self, Failure> {
        let (mut files, mut numbers, mut tensors) = (Vec::new(), BTreeMap::new(), Vec::new());
        for name in units.iter().flat_map(Unit::arrivals).flat_map(|arrival| &arrival.inputs) {
            let (path, at) = checkpoint.location(name).ok_or("a tensor without a place")?;
            let (dtype, shape) = checkpoint.describe(name).ok_or("a tensor without a shape")?;
            let file = match numbers.get(path) {
                Some(number) => *number,
                None => {
                    // SAFETY: nobody cuts the file short while it is measured.
                    files.push(unsafe { Mmap::map(&File::open(path)?)? });
                    numbers.insert(path.to_owned(), files.len() - 1);
                    files.len() - 1
                }
            };
            tensors.push((file, at as usize, dtype.bytes_of(shape).ok_or("a tensor without a size")?));
        }
        Ok(Self { files, tensors })
    }

    fn sum(&self) -> u64 {
        self.tensors.iter().map(|&(file, at, bytes)| sum(&self.files[file][at..][..bytes])).fold(0, u64::wrapping_add)
    }
}

/// Seconds of a pass that sums all bytes, and of the same sum without a pipeline.
pub fn summed<D: Device>(pipeline: &mut Pipeline<D>, tensors: &MappedTensors) -> Result<[f64; 2], Failure> {
    let start = Instant::now();
    let mut by_layer = 0;
    pipeline.each_tensor(|start, bytes| {
        // SAFETY: the page cache has the layer, which is held, so that it lies in memory.
        by_layer = sum(unsafe { slice::from_raw_parts(start, bytes) }).wrapping_add(by_layer);
    })?;
    let pass = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let plain = tensors.sum();
    let seconds = [pass, start.elapsed().as_secs_f64()];
    if by_layer != plain { Err("the layers' bytes are not those of the files".into()) } else { Ok(seconds) }
}

/// Of words of eight bytes, and what is left of one.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8);
    let rest = words.remainder().iter().fold(0u64, |sum, byte| sum.wrapping_add(u64::from(*byte)));
    words.fold(rest, |sum, word| sum.wrapping_add(u64::from_le_bytes(word.try_into().expect("eight bytes"))))
}
