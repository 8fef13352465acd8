//! Runs transformers whose weights do not fit on the GPU. Weights flow, unit after unit, pass after pass,
//!
//! ```text
//! disk ──read──► RAM slots ──pin──► pinned slots ──transfer──► device slots ──compute──► the caller's layer function
//! ```
//!
//! each arrow a stage with its own thread (compute: the caller's), each pair of stages joined by a lock-free ring. The modules
//! follow the data: [`Checkpoint`] (where the bytes lie), [`plan`] (what every stage does, worked out once), the arena and the
//! reader (slots, O_DIRECT), [`pipeline`] (the stages, and [`LayerStreamer`] that owns them), [`device`] (the seam to whatever
//! computes), [`kernels`] and [`model`] (decoder-only models on top, feature `model`).
//!
//! # Guarantees
//! - Units arrive in order, byte for byte, whatever the settings; a slot is never refilled while anything may still read it.
//! - The pipeline does not drain: while the last units of a pass compute, the first of the next are being read.
//! - Pipeline threads, [`LayerStreamer::next`] and [`Layer::release`] allocate nothing once the first pass runs.
//! - The first error of a pass is returned in its place in the order, names unit, tensor, file and offset, and the next pass
//!   starts afresh. Nothing hangs and no bad input panics.
//!
//! # The invariant of the `unsafe` code
//! A slot has one owner at a time: free, or filled by one stage, or held by the next; the rings hand it on, and events of the
//! device extend ownership to work that was enqueued but is not done. Each module that touches slots says what it relies on.
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "capi")]
pub mod capi;
pub mod device;
pub mod files;
#[cfg(feature = "model")]
pub mod kernels;
#[cfg(feature = "model")]
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod probe;
pub mod trace;
#[cfg(feature = "tuner")]
pub mod tuner;

#[cfg(cuda_emulated)]
#[doc(hidden)]
#[path = "../tests/cuda_emulation/mod.rs"]
pub mod cuda_emulation;

mod arena;
mod checkpoint;
mod dtype;
mod error;
mod io;
mod memory;
mod ring;
mod sync;

pub use checkpoint::{Checkpoint, StoredTensor};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use pipeline::{Canceller, Layer, LayerStreamer, LayerToken, LentMemory, Meter, Progress, StaticTensors};
pub use plan::{Plan, Settings, Unit};

// Integration tests and unit tests share fixtures, which know the crate by its name.
#[cfg(test)]
extern crate self as layer_streamer;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
#[cfg(test)]
#[path = "../tests/common/limits.rs"]
mod limits;

#[cfg(doctest)]
#[path = "../tests/rules.rs"]
mod rules;

/// The README's Rust code runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
