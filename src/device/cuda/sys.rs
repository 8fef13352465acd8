//! The CUDA runtime and the kernels' launchers, raw: the crate `cuda-sys`, and what bindgen makes of `cuda/kernels.h`.
//!
//! The launchers' bindings name the runtime's types without a path: they are those of `cuda-sys`.
#![allow(missing_docs, dead_code, non_camel_case_types)]
#![allow(clippy::all, clippy::undocumented_unsafe_blocks)]

pub(crate) use cuda_sys::*;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
