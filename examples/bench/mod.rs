//! What the benchmarks of disk and pipeline share: windows and what moved in them, clocks, the raw reader, the plain copy, and
//! the pipeline under measurement.
#![allow(dead_code, unused_imports, reason = "each benchmark uses a part")]

mod clock;
mod copy;
mod disk;
mod lane;
mod link;
mod mapped;
mod stream;

use std::io;

use memmap2::{Advice, MmapRaw};

pub use clock::Clocks;
pub use copy::{Piece, PlainCopy, available};
pub use disk::{CachedFiles, Disk, Way};
pub use lane::{Kind, Lane, Limits, take_turns, time_passes};
pub use link::Link;
pub use mapped::MappedTensors;
pub use stream::{PerPass, Pipeline, Used};

use crate::report::{Failure, units};

/// Bytes moved, and what that took.
#[derive(Clone, Copy, Default)]
pub struct Moved {
    pub bytes: u64,
    pub seconds: f64,
    pub cpu_seconds: f64,
}

impl Moved {
    pub fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.seconds += other.seconds;
        self.cpu_seconds += other.cpu_seconds;
    }

    pub fn gb(self) -> f64 {
        self.bytes as f64 / 1e9
    }

    /// GB/s.
    pub fn rate(self) -> f64 {
        self.gb() / self.seconds
    }

    pub fn cpu_per_gb(self) -> f64 {
        self.cpu_seconds / self.gb()
    }
}

/// Memory like the pipeline's: present, and in huge pages where the system grants them.
fn memory(bytes: usize) -> io::Result<MmapRaw> {
    let map: MmapRaw = memmap2::MmapOptions::new().len(bytes.max(1)).map_anon()?.into();
    let _ = map.advise(Advice::HugePage);
    if map.advise(Advice::PopulateWrite).is_err() {
        // Linux before 5.14 does not know the advice.
        // SAFETY: the whole of a mapping that nobody else knows yet.
        unsafe { map.as_mut_ptr().write_bytes(1, map.len()) };
    }
    Ok(map)
}
