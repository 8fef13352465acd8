//! Raw bindings of the CUDA runtime: the functions, flags and types that `layer-streamer` uses, and no others.
//!
//! They are made while this crate is built, from `cuda_runtime_api.h` of the toolkit that is installed, and they have the names
//! and the types of that header. What each function does is in NVIDIA's documentation of the CUDA Runtime API. There is nothing
//! safe here: `layer_streamer::device::Cuda` is.
//!
//! # Why not the published `cuda-sys`
//! Its newest release, 0.2.0 of 2018, was generated from CUDA 8: a constant or a structure that has changed since is wrong, and
//! nobody notices. Its error codes are a Rust `enum`, so a code that a newer driver returns is undefined behaviour. And it links
//! the shared runtime, while a program with `layer-streamer` must also start where no CUDA is installed. Here the bindings belong
//! to the toolkit that is used, error codes are integers in a type of their own, and the runtime is linked in.
//!
//! # Toolkits
//! CUDA 12.0 and newer, on Linux, x86-64 and Arm servers: NVIDIA's packages, a distribution's, or PyPI's wheels. The head of
//! `build.rs` says which toolkit is taken where there are several, and what it tells build scripts of crates that depend on this
//! one. A machine that only runs the program needs a driver, and no toolkit.
//!
//! cuBLAS is not bound. It is opened at run time, and toolkits often come without its headers.
//!
//! # Tests without a GPU
//! With `LAYER_STREAMER_CUDA=emulated` nothing is linked: whoever makes the program defines the functions itself, as
//! `layer-streamer` does in its tests.
#![no_std]
#![deny(clippy::undocumented_unsafe_blocks)]

/// What bindgen makes of the header, in a module of its own: only this is excused from the rules of style.
#[allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/cudart.rs"));
}

pub use bindings::*;

const _: () = {
    assert!(CUDART_VERSION >= 12_000, "the headers are of a CUDA toolkit older than 12.0, the oldest that works");
    // What C passes as an enum must be passed as the same number of bytes here.
    assert!(size_of::<cudaError>() == size_of::<core::ffi::c_uint>());
    assert!(cudaError::cudaSuccess.0 == 0);
};

#[cfg(all(test, not(cuda_emulated)))]
mod tests {
    use super::*;

    /// Headers and library may come from different packages. It needs no driver.
    #[test]
    fn the_runtime_that_is_linked_is_the_one_that_the_headers_describe() {
        let mut version = 0;
        // SAFETY: the result goes to a local.
        let code = unsafe { cudaRuntimeGetVersion(&mut version) };
        assert_eq!((code.0, version), (0, CUDART_VERSION));
    }
}
