//! What a timeline has recorded, ready to be written.

use crate::trace::{Activity, Stage};

/// Everything that a trace file is made of. Times are nanoseconds since the recording began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// Facts for people, such as (`device`, `cpu (2 threads)`), in this order.
    pub facts: Vec<(String, String)>,
    /// By number: the units of a pass.
    pub units: Vec<RecordedUnit>,
    /// In the order of the data. A stage that is skipped has none.
    pub lanes: Vec<Lane>,
    /// In the order of time.
    pub moments: Vec<Moment>,
    /// The rings of slots, in the order of the data.
    pub rings: Vec<Ring>,
    /// The links that bytes move over, with what they were measured to carry.
    pub links: Vec<Link>,
    /// What binds, and what would help, in words: the first line is the verdict.
    pub verdict: Vec<String>,
    /// Events that were overwritten by newer ones.
    pub dropped: u64,
    /// Copies and layers that the device could not time, since too many were under way.
    pub untimed: u64,
}

/// A unit of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedUnit {
    /// Its name.
    pub name: String,
    /// What it has in its files, in bytes.
    pub bytes: usize,
    /// Where it is kept between passes: `on disk`, `in RAM`, `in pinned RAM` or `on the device`.
    pub tier: String,
}

/// One thread, or one stream of the device's.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane {
    /// Whose work it is.
    pub stage: Stage,
    /// The device's own time; else that of the thread, which on a GPU enqueues the work and does not wait for it.
    pub on_device: bool,
    /// In the order in which they ended.
    pub events: Vec<RecordedSpan>,
}

/// A span of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedSpan {
    /// When it began.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// A unit on its way, or a wait.
    pub activity: Activity,
    /// Bytes moved; 0 for waits, and for units that were given up.
    pub bytes: u64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// When.
    pub at: u64,
    /// What kind: `pass begun`, `pass ended`, `rewind`, `cancelled`, `late`, `silent`, `failed` or `leaked`.
    pub kind: &'static str,
    /// The rest in words, such as the error; may be empty.
    pub text: String,
}

/// A ring of slots between two stages. A unit of a pass holds a slot from the moment that `filled_by` begins with it until
/// `emptied_by` is done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// What they are, such as `pinned slots`.
    pub name: String,
    /// How many there are.
    pub slots: usize,
    /// The stage that fills them.
    pub filled_by: Stage,
    /// The stage that empties them.
    pub emptied_by: Stage,
}

/// A link that bytes move over.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// What it is, such as `disk` or `PCIe`.
    pub name: String,
    /// The stage whose spans move bytes over it.
    pub stage: Stage,
    /// What it was measured to carry, in bytes per second, if that is known.
    pub limit: Option<f64>,
}
