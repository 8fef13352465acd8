//! A picture of the pipeline's time that anyone can open: a recording, and the files that are made of it.

mod file;
mod page;
mod perfetto;
mod record;
mod recording;
mod series;

#[cfg(test)]
mod example;

pub use file::TraceFile;
pub use record::Timeline;
pub use recording::{Lane, Link, Moment, RecordedSpan, RecordedUnit, Recording, Ring};
