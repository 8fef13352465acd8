//! A trace that the options ask for: recorded while its streamer is open, written when it is closed.

use std::{path::Path, sync::Arc};

use super::{any::AnyDevice, ffi::Result};
use crate::{
    pipeline::LayerStreamer,
    trace::timeline::{Timeline, TraceFile},
};

/// The file, and what is recorded for it.
pub(super) struct Traced {
    file: TraceFile,
    pub(super) timeline: Arc<Timeline>,
}

impl Traced {
    /// Refuses a path that cannot be written, before the long work.
    pub(super) fn create(path: &Path) -> Result<Self> {
        Ok(Self { file: TraceFile::create(path)?, timeline: Timeline::new() })
    }
}

/// Ends a streamer and then writes its trace, in which that end is: also where the end failed, which is the error then.
pub(super) fn end(streamer: &mut LayerStreamer<AnyDevice>, trace: Option<Traced>) -> Result<()> {
    let findings = streamer.findings();
    let ended = streamer.end();
    let written = trace.map_or(Ok(()), |Traced { file, timeline }| {
        let mut recording = timeline.recording(None);
        recording.verdict = findings;
        file.write(&recording)
    });
    Ok(ended.and(written)?)
}
