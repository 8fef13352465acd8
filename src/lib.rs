//! Runs transformers whose weights do not fit on the GPU: weights flow, unit after unit, pass after pass,
//!
//! ```text
//! disk ──read──► RAM slots ──pin──► pinned slots ──transfer──► GPU slots ──compute──► the caller's layer function
//! ```
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![allow(dead_code)]

pub mod device;
pub mod plan;

mod arena;
mod checkpoint;
mod dtype;
mod error;
mod ring;
mod sync;

pub use checkpoint::{Checkpoint, StoredTensor};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use plan::{Plan, Settings, Unit};
