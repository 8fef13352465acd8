//! Dimensions of a tensor.

use crate::error::{Error, Result};

/// Dimensions of a tensor in device memory: up to eight, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 8],
    rank: usize,
}

impl Shape {
    /// At most eight dimensions.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more.
    pub fn new(shape: &[usize]) -> Result<Self> {
        let mut dims = [1; 8];
        let Some(used) = dims.get_mut(..shape.len()) else {
            let what = format!("a tensor of {} dimensions", shape.len());
            return Err(Error::Unsupported { what, remedy: "eight is the most".into() });
        };
        used.copy_from_slice(shape);
        Ok(Self { dims, rank: shape.len() })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// The same with another first dimension.
    #[cfg(feature = "model")]
    pub(crate) fn with_rows(mut self, rows: usize) -> Self {
        self.dims[0] = rows;
        self
    }

    /// The product of the dimensions.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}
