//! The C API: what `include/layer_streamer.h` declares. Its rules are stated at the top of that file.
//!
//! Every function is an `ffi` call around a few lines: it checks its pointers, then enters its handles, then calls what Rust
//! hosts call, and writes its results last.
//!
//! **Invariant**: what C passes is what the function's comment in the header asks for. What can be checked of it is.
#![allow(non_camel_case_types, reason = "the names are C's")]
#![allow(clippy::missing_safety_doc, reason = "the header says what each function asks of its arguments")]

mod any;
mod budget;
mod callbacks;
mod checkpoint;
mod device;
mod engine;
mod ffi;
mod handles;
mod kernels;
mod layers;
mod model;
mod options;
mod sampling;
mod streamer;
mod traced;
mod units;

pub use budget::*;
pub use callbacks::*;
pub use checkpoint::*;
pub use device::*;
pub use engine::*;
pub use ffi::*;
pub use kernels::*;
pub use layers::*;
pub use model::*;
pub use options::*;
pub use sampling::*;
pub use streamer::*;
pub use units::*;
