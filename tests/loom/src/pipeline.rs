//! The two files of the pipeline that know neither plan nor device.

#[path = "../../../src/pipeline/link.rs"]
pub(crate) mod link;
#[path = "../../../src/pipeline/stage.rs"]
pub(crate) mod stage;
