//! A picture of the pipeline's time that anyone can open: a recording, and the files that are made of it.

mod record;
mod recording;

pub use record::Timeline;
pub use recording::{Event, Lane, Link, Moment, RecordedUnit, Recording, Ring};
