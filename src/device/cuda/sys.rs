//! The CUDA runtime and the kernels' launchers, raw: what bindgen makes of the toolkit's own headers and `cuda/kernels.h`.
#![allow(missing_docs, dead_code, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(clippy::all, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/cuda.rs"));
