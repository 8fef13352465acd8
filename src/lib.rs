//! Runs transformers whose weights do not fit on the GPU. Weights stream, unit by unit, pass after pass:
//!
//! ```text
//! disk ──read──► RAM slots ──pin──► pinned slots ──transfer──► device slots ──compute──► the caller's layer function
//! ```
//!
//! Each arrow is a stage with a thread of its own (compute: the caller's). Each pair of stages is joined by a lock-free ring.
//!
//! # Where to start
//! [`Checkpoint::open`] reads which tensors a folder has. [`LayerStreamer`] streams them, and hands each unit to your function
//! as a [`Layer`]. [`model::Decoder`] is a whole decoder-only transformer on top (feature `model`), `capi` the same from C, and
//! [`plan`] decides from a budget of memory what is kept where. `docs/architecture.md` shows how the modules depend on one
//! another.
//!
//! # Words
//! | word | meaning |
//! | --- | --- |
//! | checkpoint | a validated table of tensors: name → file, offset, stored type, shape |
//! | unit | a named list of tensors that travels together, usually a layer |
//! | arrival | what happens to a tensor between its stored bytes and the layer function: it is kept as it is, or cast |
//! | layer | a unit on the device, in the hands of the caller |
//! | static tensor | a tensor that is loaded once, before the first pass, and stays on the device |
//! | slot | a buffer for one unit at a stage |
//! | ring, link | the queue between two threads; the pair of rings that joins two stages, for units and for free slots |
//! | tier | where a unit is kept between passes: disk, RAM, pinned RAM, GPU |
//! | resident | a unit that is kept on another tier than disk: it is read once |
//! | residency | the state of a resident: absent, being filled, or there |
//! | placement | what the planner decides: a tier for each unit, and how deep the rings are |
//! | budget | how much RAM and device memory may be used |
//! | fixed overhead | memory that is taken whatever the placement: static tensors, KV cache, activations |
//! | pass, steady pass | one trip through all units; any pass after those that fill the tiers |
//! | epoch | the time between two rewinds; what was on its way in an earlier one is dropped |
//! | backend | a way of reading: io_uring with registered buffers, io_uring, pread |
//! | prefault | to make memory present before it is used |
//! | probe | a short measurement of disk and link, from which a placement's time is forecast |
//!
//! # Guarantees
//! - Units arrive in order, byte for byte, whatever the settings. A slot is never refilled while anything may still read it.
//! - The pipeline does not drain between passes: while the last units of a pass compute, the first of the next are being read.
//! - Pipeline threads, [`LayerStreamer::next`] and [`Layer::release`] allocate nothing once the first pass runs, but for an error
//!   that carries names, and device memory that cuBLAS may take when it first meets a new shape.
//! - The first error of a pass is returned in its place in the order. A read that failed names unit, tensor, file and offset. The
//!   next pass starts afresh. Nothing hangs, and no bad input panics.
//!
//! # The invariant of the `unsafe` code
//! A slot has one owner at a time: free, or filled by one stage, or held by the next. The rings hand it on. Events of the device
//! extend ownership to work that was enqueued but is not done. Each module that touches slots says what it relies on.
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "capi")]
pub mod capi;
pub mod device;
#[cfg(feature = "model")]
pub mod engine;
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
pub use device::cuda::emulation as cuda_emulation;

mod arena;
mod checkpoint;
mod dtype;
mod error;
mod io;
mod layout;
mod memory;
pub mod packed;
pub mod quantised;
mod ring;
mod shape;
mod sync;
mod unit;

pub use checkpoint::{Checkpoint, Quantisation, StoredTensor, gguf};
pub use dtype::{DType, Element};
pub use error::{Error, MemoryKind, Result};
pub use pipeline::{Canceller, Layer, LayerStreamer, LayerToken, LentMemory, Meter, Progress, StaticTensors};
pub use plan::{Plan, Settings, Unit};

// Integration tests and unit tests share fixtures, which know the crate by its name.
#[cfg(test)]
extern crate self as layer_streamer;
#[cfg(test)]
mod fixtures;

#[cfg(doctest)]
mod rules;

/// The README's Rust code runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
