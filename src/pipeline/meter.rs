//! [`Meter`]: what a streamer has moved so far, for whoever asks.

use std::sync::Arc;

use crate::{
    io::Source,
    pipeline::{packer::PackedUnits, stage::Control},
    plan::Reader,
    trace::Stats,
};

/// Tells, from any thread and at any time, what a streamer has moved. It may outlive the streamer, whose files it keeps open.
#[derive(Clone)]
pub struct Meter {
    pub(super) control: Arc<Control>,
    pub(super) sources: Arc<[Source]>,
    /// Which backend reads, and why not a higher one.
    pub(super) reader: (Reader, String),
    pub(super) packed: Arc<PackedUnits>,
}

impl Meter {
    /// Where the time and the bytes went since the streamer's start.
    pub fn stats(&self) -> Stats {
        let mut stats = self.control.trace.stats();
        stats.packed = self.packed.progress();
        (stats.reader, stats.reader_reason) = self.reader.clone();
        stats.buffered_files = (self.sources.iter())
            .filter_map(|source| Some((source.path.clone(), source.why_buffered()?.to_owned())))
            .collect();
        stats
    }
}
