//! Writes files of random weights as fast as the disk takes them.
//!
//! What a file has is planned first, so its size is known before the first byte is written. It is then cut into chunks, and a few
//! threads each take the next chunk, generate it and write it where it belongs: while some wait for the disk, others generate.
//! Writes bypass the page cache where the file system allows it.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt, unix::fs::OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};

use indicatif::{DecimalBytes, ProgressBar};
use layer_streamer::files;
use memmap2::MmapMut;

use super::{cannot, shapes::Tensor, weights::Weights};
use crate::waiting::progress;

/// What O_DIRECT asks of memory addresses, file offsets and lengths.
const PAGE: u64 = 4096;
/// Bytes of one write: large enough that the disk, not the system call, sets the pace.
const CHUNK: u64 = 16 << 20;
/// Threads that generate and write: a few keep up with the disk, the others keep its queue filled.
const WORKERS: usize = 8;

/// What a file has: a header, then tensors, each with where it begins after the header, and zeros between them.
pub struct Contents {
    pub header: Vec<u8>,
    pub tensors: Vec<(Tensor, u64)>,
}

impl Contents {
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.last().map_or(0, |(tensor, start)| start + tensor.bytes())
    }

    /// Puts the file's bytes from `at` on into `out`, zeros past its end.
    fn fill(&self, at: u64, mut out: &mut [u8], weights: &Weights) {
        let header = self.header.get(at as usize..).unwrap_or_default();
        let header = &header[..header.len().min(out.len())];
        take(&mut out, header.len() as u64).copy_from_slice(header);

        let mut at = (at + header.len() as u64).saturating_sub(self.header.len() as u64);
        let first = self.tensors.partition_point(|(tensor, start)| start + tensor.bytes() <= at);
        for (tensor, start) in &self.tensors[first..] {
            let gap = take(&mut out, start.saturating_sub(at));
            gap.fill(0);
            at += gap.len() as u64;
            if out.is_empty() {
                return;
            }
            let piece = take(&mut out, start + tensor.bytes() - at);
            weights.fill(tensor, at - start, piece);
            at += piece.len() as u64;
        }
        out.fill(0);
    }
}

/// Cuts so many bytes off the start, or all if there are fewer.
fn take<'a>(out: &mut &'a mut [u8], bytes: u64) -> &'a mut [u8] {
    let bytes = bytes.min(out.len() as u64) as usize;
    out.split_off_mut(..bytes).unwrap_or_default()
}

/// Writes the files of one checkpoint.
pub struct Writer {
    weights: Weights,
    buffers: Vec<MmapMut>,
    bar: ProgressBar,
}

impl Writer {
    /// For files of so many bytes in all in this folder, which must have room for them.
    pub fn new(dir: &Path, bytes: u64, weights: Weights) -> Result<Self, String> {
        let free = files::free_bytes(dir).map_err(cannot("inspect", dir))?;
        if bytes > free {
            let (free, need) = (DecimalBytes(free), DecimalBytes(bytes));
            let cause = format!("{} has {free} free, the checkpoint takes {need}", dir.display());
            return Err(format!("{cause}; name a folder on another disk, or make room"));
        }
        let buffers = (0..WORKERS).map(|_| MmapMut::map_anon(CHUNK as usize)).collect::<io::Result<Vec<_>>>();
        let buffers = buffers.map_err(|error| format!("cannot reserve {WORKERS} write buffers: {error}"))?;
        Ok(Self { weights, buffers, bar: progress(bytes, false).with_message("writing") })
    }

    /// Writes a file, in place of what is there.
    pub fn write(&mut self, path: &Path, contents: &Contents) -> io::Result<()> {
        let Self { weights, buffers, bar } = self;
        let (bytes, next) = (contents.bytes(), AtomicU64::new(0));
        let file = create(path, bytes, &buffers[0][..PAGE as usize])?;
        // The first error ends the work of all threads.
        let stop = |_: &io::Error| next.store(bytes, Relaxed);
        let work = |buffer: &mut MmapMut| {
            loop {
                let at = next.fetch_add(CHUNK, Relaxed);
                if at >= bytes {
                    return Ok(());
                }
                let left = CHUNK.min(bytes - at);
                let chunk = &mut buffer[..left.next_multiple_of(PAGE) as usize];
                contents.fill(at, chunk, weights);
                file.write_all_at(chunk, at).inspect_err(stop)?;
                bar.inc(left);
            }
        };
        thread::scope(|scope| {
            let spawn = |buffer| thread::Builder::new().spawn_scoped(scope, || work(buffer)).inspect_err(stop);
            let workers = buffers.iter_mut().map(spawn).collect::<io::Result<Vec<_>>>()?;
            let panicked = |_| Err(io::Error::other("a generator thread panicked"));
            workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(panicked))
        })?;
        // The last write went on to the end of its page.
        file.set_len(bytes)?;
        file.sync_all()
    }
}

/// Opens a file of `bytes` bytes for writes past the page cache, or, where one page shows that the file system cannot, for
/// writes that return when the disk has them: either way no more than the chunks in flight is ever dirty.
fn create(path: &Path, bytes: u64, page: &[u8]) -> io::Result<File> {
    let open = |flag| File::options().write(true).create(true).truncate(true).custom_flags(flag).open(path);
    let file = match open(libc::O_DIRECT).and_then(|file| file.write_all_at(page, 0).map(|()| file)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(libc::O_DSYNC)?,
        direct => direct?,
    };
    // Space reserved at once lies together, and writes that do not extend the file go to the disk side by side.
    // SAFETY: the descriptor is open; the call takes no pointers.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) } != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
            return Err(error);
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use layer_streamer::DType;

    use super::{
        super::{
            blocks::Recipe,
            weights::{Scales, Values},
        },
        *,
    };

    #[test]
    fn any_part_of_a_file_is_what_the_whole_has_there() {
        let tensor = |name: &str, dtype, shape: &[u64]| {
            let (name, shape) = (name.into(), shape.into());
            Tensor { name, shape, dtype, values: Values::Weights }
        };
        for dtype in [DType::F16, DType::MXFP4, DType::Q4_1, DType::Q6_K] {
            let [matrix, bias] = [tensor("a", dtype, &[3, 256]), tensor("b", DType::F32, &[7])];
            let (end, header) = (matrix.bytes(), b"a header".to_vec());
            let (after, gap) = (header.len() + end as usize, 9);
            let contents = Contents { header, tensors: vec![(matrix, 0), (bias, end + gap)] };
            let weights = Weights::new(1, Recipe::of(dtype));
            let part = |at: usize, bytes: usize| {
                let mut part = vec![0xff; bytes];
                contents.fill(at as u64, &mut part, &weights);
                part
            };
            let length = contents.bytes() as usize;
            assert_eq!(length, after + gap as usize + 28);
            // Zeros between tensors and past the end.
            let whole = part(0, length + 10);
            assert_eq!(whole[..8], *b"a header");
            assert!([&whole[after..][..9], &whole[length..]].iter().all(|zeros| zeros.iter().all(|&byte| byte == 0)));
            assert!(whole[8..after].iter().filter(|&&byte| byte == 0).count() < after / 4, "{dtype}");
            for bytes in [1, 7, 16, 64, 333] {
                let parts: Vec<_> = (0..whole.len()).step_by(bytes).flat_map(|at| part(at, bytes)).collect();
                assert!(parts.starts_with(&whole), "{dtype} in parts of {bytes}");
            }
        }
    }

    #[test]
    fn any_part_of_quantised_tensors_is_what_the_whole_has_there() {
        let scales = |usual| Values::Scales(Scales { usual, signed: true });
        let tensors = [
            (DType::F8E4M3, 37, Values::Codes(|random| random)),
            (DType::F32, 5, scales(0.1)),
            (DType::F16, 7, scales(0.2)),
            (DType::BF16, 3, scales(0.3)),
            (DType::I32, 70, Values::Groups(32)),
            (DType::U8, 21, Values::Bytes((100..121).collect())),
        ];
        let mut end = 0;
        let tensors = tensors.into_iter().map(|(dtype, length, values)| {
            let (tensor, start) = (Tensor { name: dtype.to_string(), shape: vec![length], dtype, values }, end);
            end += tensor.bytes();
            (tensor, start)
        });
        let contents = Contents { header: Vec::new(), tensors: tensors.collect() };
        let weights = Weights::new(1, None);
        let part = |at: usize, bytes: usize| {
            let mut part = vec![0xff; bytes];
            contents.fill(at as u64, &mut part, &weights);
            part
        };
        let whole = part(0, contents.bytes() as usize);
        for bytes in [1, 3, 7, 16, 64] {
            let parts: Vec<_> = (0..whole.len()).step_by(bytes).flat_map(|at| part(at, bytes)).collect();
            assert!(parts.starts_with(&whole), "in parts of {bytes}");
        }
    }
}
