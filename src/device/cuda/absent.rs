//! The CUDA device of a build without it.

use crate::error::{Error, Result};

/// An NVIDIA GPU. This build has no such device, and this type no value: it takes feature `cuda`.
#[derive(Clone, Debug)]
pub enum Cuda {}

impl Cuda {
    /// # Errors
    /// [`Error::Unsupported`], always.
    pub fn new(ordinal: u32) -> Result<Self> {
        let remedy = "build with `--features cuda`, which takes the CUDA toolkit".into();
        Err(Error::Unsupported { what: format!("cuda:{ordinal} in this build"), remedy })
    }
}
