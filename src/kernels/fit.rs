//! Holds the tensors of a call against the kernel's row of the table.

use std::{cell::Cell, ops::Range};

use super::{Kernels, Precision, Ragged};
use crate::{
    device::{Shape, StreamId, TensorMut, TensorRef},
    dtype::DType,
    error::{Error, Result},
};

/// [`Error::Kernel`] with `cause`, unless `holds`.
pub(super) fn check(kernel: &'static str, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Kernel { kernel, cause: cause() }) }
}

/// What a tensor's elements must be.
#[derive(Clone, Copy)]
pub(super) enum Type {
    /// Anything.
    Any,
    F32,
    U32,
    /// [`Precision::activation`]
    Activation,
    /// The same, or F32.
    ActivationOrF32,
    /// [`Precision::cache`]
    Cache,
    /// [`Precision::weight`]
    Weight,
    /// The same; where weights are as stored, blocks of quantised ones too.
    Matrix,
}

/// A dimension of a kernel. Its size is what the first tensor has that names it.
pub(super) struct Dim {
    name: &'static str,
    size: Cell<Option<usize>>,
}

impl Dim {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, size: Cell::new(None) }
    }

    /// The size, once the tensors that name it were found to fit.
    pub(super) fn size(&self) -> usize {
        self.size.get().unwrap_or(0)
    }

    /// Whether it has this size, or had none.
    fn takes(&self, size: usize) -> bool {
        let known = self.size.get().unwrap_or(size);
        self.size.set(Some(known));
        known == size
    }
}

/// What a tensor must be: its type, and its dimensions, after others if `rest`.
#[derive(Clone, Copy)]
pub(super) struct Pattern<'a> {
    pub(super) dtype: Type,
    pub(super) rest: bool,
    pub(super) dims: &'a [&'a Dim],
}

/// More tensors than any kernel has.
const TENSORS: usize = 12;

/// One call of a kernel, while its tensors are held against the row one after the other.
pub(super) struct Fit {
    kernel: &'static str,
    precision: Precision,
    stream: StreamId,
    /// What `..` stands for.
    rest: Option<Shape>,
    first: Option<(&'static str, Shape)>,
    /// Where each tensor so far lies, and whether it is written.
    spans: [(Range<usize>, bool); TENSORS],
    tensors: usize,
}

impl Fit {
    pub(super) fn new<D: Kernels>(kernel: &'static str, device: &D, stream: &D::Stream) -> Self {
        let (precision, stream) = (device.precision(), device.stream_id(stream));
        let spans = [const { (0..0, false) }; TENSORS];
        Self { kernel, precision, stream, rest: None, first: None, spans, tensors: 0 }
    }

    pub(super) fn check(&self, holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
        check(self.kernel, holds, cause)
    }

    pub(super) fn read<D: Kernels>(
        &mut self,
        what: &'static str,
        tensor: &TensorRef<'_, D>,
        pattern: Pattern<'_>,
    ) -> Result<()> {
        self.tensor(what, *tensor, pattern, false)
    }

    pub(super) fn write<D: Kernels>(
        &mut self,
        what: &'static str,
        tensor: &TensorMut<'_, D>,
        pattern: Pattern<'_>,
    ) -> Result<()> {
        self.tensor(what, tensor.as_ref(), pattern, true)
    }

    pub(super) fn maybe<D: Kernels>(
        &mut self,
        what: &'static str,
        tensor: &Option<TensorRef<'_, D>>,
        pattern: Pattern<'_>,
    ) -> Result<()> {
        tensor.map_or(Ok(()), |tensor| self.tensor(what, tensor, pattern, false))
    }

    pub(super) fn ragged<D: Kernels>(&mut self, batch: &Ragged<'_, D>, sequences: &Dim, pages: &Dim) -> Result<()> {
        let pattern = Pattern { dtype: Type::U32, rest: false, dims: &[sequences] };
        self.read("kv_lens", &batch.kv_lens, pattern)?;
        self.read("pages", &batch.pages, Pattern { dims: &[sequences, pages], ..pattern })?;
        let bounds = Dim { name: "S + 1", size: Cell::new(Some(sequences.size() + 1)) };
        self.read("q_offsets", &batch.q_offsets, Pattern { dims: &[&bounds], ..pattern })
    }

    fn tensor<D: Kernels>(
        &mut self,
        what: &'static str,
        tensor: TensorRef<'_, D>,
        pattern: Pattern<'_>,
        written: bool,
    ) -> Result<()> {
        tensor.check_stream(self.kernel, self.stream)?;
        let whole = tensor.dtype().bytes_of(tensor.shape()).is_some();
        self.check(whole, || {
            format!("{what} is {} {:?}: its rows are no whole blocks", tensor.dtype(), tensor.shape())
        })?;
        let fits = self.binds(tensor.shape(), pattern);
        let dtype = self.expected(pattern.dtype, tensor.dtype())?;
        self.check(fits && tensor.dtype() == dtype, || {
            let expected = self.sizes(pattern);
            let beside =
                self.first.filter(|_| !fits).map(|(first, shape)| format!(" beside {first} {:?}", shape.dims()));
            let beside = beside.unwrap_or_default();
            format!("{what} is {} {:?}, expected {dtype} [{expected}]{beside}", tensor.dtype(), tensor.shape())
        })?;
        if self.first.is_none() {
            self.first = Some((what, Shape::new(tensor.shape())?));
        }
        let start = tensor.ptr().as_ptr().addr();
        self.lies_apart(start..start.saturating_add(tensor.bytes()), written)
    }

    /// Whether a shape has the sizes that the pattern's dimensions had before; those that had none take its.
    fn binds(&mut self, shape: &[usize], Pattern { rest, dims, .. }: Pattern<'_>) -> bool {
        let Some(leading) = shape.len().checked_sub(dims.len()) else { return false };
        let (leading, last) = shape.split_at(leading);
        if rest && self.rest.is_none() {
            self.rest = Shape::new(leading).ok();
        }
        let expected = if rest { self.rest.as_ref().map_or(&[][..], Shape::dims) } else { &[] };
        leading == expected && dims.iter().zip(last).all(|(dim, size)| dim.takes(*size))
    }

    /// The type that a tensor must have, which has type `found`.
    fn expected(&self, dtype: Type, found: DType) -> Result<DType> {
        Ok(match dtype {
            Type::Any => found,
            Type::F32 => DType::F32,
            Type::U32 => DType::U32,
            Type::ActivationOrF32 if found == DType::F32 => DType::F32,
            Type::Activation | Type::ActivationOrF32 => self.precision.activation,
            Type::Cache => self.precision.cache,
            Type::Weight | Type::Matrix => {
                let holds = match self.precision.weight {
                    Some(dtype) => found == dtype,
                    None if found.is_blocks() => matches!(dtype, Type::Matrix),
                    None => matches!(found, DType::F32 | DType::F16 | DType::BF16),
                };
                self.check(holds, || format!("weights of type {found}; convert them on arrival"))?;
                found
            }
        })
    }

    /// A pattern's sizes as far as they are known, and the names of the others.
    fn sizes(&self, Pattern { rest, dims, .. }: Pattern<'_>) -> String {
        let leading = match &self.rest {
            Some(leading) if rest => leading.dims().iter().map(usize::to_string).collect(),
            _ if rest => vec!["..".to_owned()],
            _ => vec![],
        };
        let named = dims.iter().map(|dim| dim.size.get().map_or_else(|| dim.name.to_owned(), |size| size.to_string()));
        leading.into_iter().chain(named).collect::<Vec<_>>().join(", ")
    }

    /// What a kernel writes must not be what it reads, nor what else it writes.
    fn lies_apart(&mut self, span: Range<usize>, written: bool) -> Result<()> {
        let meets = |(other, other_written): &(Range<usize>, bool)| {
            (written || *other_written) && span.start < other.end && other.start < span.end
        };
        let apart = !self.spans[..self.tensors].iter().any(meets);
        self.check(apart, || "what is written overlaps what is read".into())?;
        self.spans[self.tensors] = (span, written);
        self.tensors += 1;
        Ok(())
    }
}
