//! Runs transformers whose weights do not fit on the GPU: weights flow, unit after unit, pass after pass,
//!
//! ```text
//! disk ──read──► RAM slots ──pin──► pinned slots ──transfer──► GPU slots ──compute──► the caller's layer function
//! ```
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod device;
#[cfg(feature = "model")]
pub mod kernels;
#[cfg(feature = "model")]
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod trace;

mod arena;
mod checkpoint;
mod dtype;
mod error;
mod io;
mod ring;
mod sync;

pub use checkpoint::{Checkpoint, StoredTensor};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use pipeline::{Layer, LayerStreamer, Progress, StaticTensors};
pub use plan::{Plan, Settings, Unit};
