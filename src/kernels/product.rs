//! Products on CUDA: of few rows by the crate's own kernel, of more by cuBLAS, where that gives the same bits.
//!
//! An element is a sum over the columns. The own kernel (`cuda/product.cu`) adds them up from the first to the last, sixteen at a
//! time, as tensor cores do. So do cuBLAS's algorithms that split no sum, whatever the shape of their tiles: then a row's bits depend
//! neither on how many rows there are nor on its place among them. cuBLAS does not promise that. So each of its algorithms is
//! tried before it is used: on the first product of a shape, some of whose rows the own kernel computes too. Where none passes, or none is
//! faster, the own kernel computes all.

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    ffi::c_int,
    iter,
    ops::Range,
    sync::{LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::cublas::{Algorithm, Cublas, Description, Shape, Tensors, WORKSPACE};
use crate::{
    device::{
        Cuda, CudaMemory, CudaStream, Device, DevicePtr,
        cuda::{code_of, sys},
    },
    dtype::DType,
    error::{Error, Result},
};

/// Rows that the own kernel's blocks take.
const FEW: usize = sys::LSK_FEW_ROWS as usize;

/// Rows of cuBLAS's smallest product, and of its largest. Those between are twice as many each time, so that there are few shapes.
const ROWS: usize = 128;
pub(super) const MOST_ROWS: usize = 16 * ROWS;

/// A weight with fewer elements stays in the GPU's caches, where the own kernel may read it as often as it must; and in BF16, in which other
/// orders of adding up are seen in a thousandth of all elements or less, a trial would have too few of them. Where threads are emulated they
/// take long to read it again, and the wrong algorithm is one that is seen at once.
const SMALL: usize = if cfg!(cuda_emulated) { 1 << 12 } else { 1 << 20 };

/// Of so many rows and more the first algorithm that cuBLAS names is about the fastest.
const MANY: usize = 512;

/// Room for what the own kernel computes while algorithms are tried, and for the answer, which comes first.
const TRIAL: usize = 4 << 20;
const ANSWER: usize = 256;

/// What products take on the device.
pub(super) const SCRATCH: usize = WORKSPACE + TRIAL;

/// How many rows a product of so many should have: those that are missing may be any.
pub(super) fn rows(tokens: usize) -> usize {
    if tokens <= FEW { tokens } else { tokens.next_multiple_of(ROWS) }
}

/// The rows in pieces that are computed one after the other.
fn pieces(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    iter::from_fn(move || {
        let left = rows - start;
        let most = if left < ROWS { left } else { (1 << left.ilog2()).min(MOST_ROWS) };
        let piece = start..start + most;
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A product as its caller has it: `out [T, N] = x [T, K] · weight [N, K]ᵀ + bias`, of BF16; `out` may be F32.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// T, K, N.
    pub(super) sizes: [usize; 3],
    pub(super) tensors: Tensors,
    pub(super) out: DType,
    pub(super) bias: Option<DevicePtr>,
}

impl Product {
    /// Some of its rows.
    fn rows(self, rows: Range<usize>) -> Self {
        let [_, k, n] = self.sizes;
        let Tensors { x, weight, out } = self.tensors;
        let tensors = Tensors {
            x: x.offset(rows.start * k * DType::BF16.size()),
            weight,
            out: out.offset(rows.start * n * self.out.size()),
        };
        Self { sizes: [rows.len(), k, n], tensors, ..self }
    }

    fn shape(self) -> Shape {
        let Tensors { x, weight, out } = self.tensors;
        // cuBLAS is told of no more than 256.
        let aligned = [weight, x, out].map(|at| 1 << at.as_ptr().addr().trailing_zeros().min(8));
        Shape { sizes: self.sizes, out: self.out, aligned }
    }
}

/// What trials came to on each device, for other streams: it stays the same as long as the process lives.
static TRIED: LazyLock<Mutex<Tried>> = LazyLock::new(Mutex::default);
type Tried = HashMap<(u32, Shape), Option<Algorithm>>;

/// How products of a shape are computed: by an algorithm of cuBLAS, or by the own kernel.
type Plan = Option<(Description, Algorithm)>;

/// One stream's products.
pub(super) struct Products {
    cuda: Cuda,
    cublas: Cublas,
    plans: RefCell<HashMap<Shape, Plan>>,
    trial: CudaMemory,
}

impl Products {
    pub(super) fn new(cuda: &Cuda) -> Result<Self> {
        let trial = cuda.allocate("trials of cuBLAS's algorithms", TRIAL)?;
        Ok(Self { cuda: cuda.clone(), cublas: Cublas::new(cuda)?, plans: RefCell::default(), trial })
    }

    /// Enqueues a product. The first of a shape on a device waits for the stream.
    ///
    /// # Safety
    /// The tensors are on the device for as long as the stream works on them. It is the same stream in every call.
    pub(super) unsafe fn enqueue(&self, product: Product, stream: &CudaStream) -> Result<()> {
        // SAFETY: a piece of the product is as the caller promises of the whole.
        pieces(product.sizes[0]).try_for_each(|rows| unsafe { self.piece(product.rows(rows), stream) })
    }

    /// # Safety
    /// As for [`enqueue`](Self::enqueue).
    unsafe fn piece(&self, product: Product, stream: &CudaStream) -> Result<()> {
        let [rows, k, n] = product.sizes;
        if rows <= FEW || k * n < SMALL {
            // SAFETY: as the caller promises.
            return unsafe { self.few_rows(product, stream) };
        }
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(product.shape()) {
            Entry::Occupied(known) => known.into_mut(),
            // SAFETY: as the caller promises.
            Entry::Vacant(new) => new.insert(unsafe { self.choose(product, stream)? }),
        };
        match plan {
            // SAFETY: as the caller promises.
            Some((description, algorithm)) => unsafe { self.by_cublas(product, description, algorithm, stream) },
            // SAFETY: as the caller promises.
            None => unsafe { self.few_rows(product, stream) },
        }
    }

    /// How products of a shape are computed: by an algorithm of cuBLAS that gives the own kernel's bits. Of many rows it is the first one,
    /// of fewer the fastest, or the own kernel: with narrow weights cuBLAS counts on split sums, and what it names without is sometimes
    /// ten times as slow.
    ///
    /// # Safety
    /// As for [`enqueue`](Self::enqueue).
    unsafe fn choose(&self, product: Product, stream: &CudaStream) -> Result<Plan> {
        let description = self.cublas.describe(product.shape())?;
        let known = (self.cuda.ordinal(), product.shape());
        let tried = || TRIED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = tried().get(&known) {
            return Ok(found.map(|algorithm| (description, algorithm)));
        }
        let takes = |run: &dyn Fn() -> Result<()>| {
            self.cuda.drain(stream)?;
            let start = Instant::now();
            run()?;
            self.cuda.drain(stream)?;
            Ok::<_, Error>(start.elapsed())
        };
        let (mut found, mut best) = (None, Duration::MAX);
        for algorithm in self.cublas.algorithms(&description)? {
            // SAFETY: as the caller promises.
            if !unsafe { self.passes(product, &description, &algorithm, stream)? } {
                continue;
            }
            if product.sizes[0] >= MANY {
                found = Some(algorithm);
                break;
            }
            // SAFETY: as the caller promises.
            let time = takes(&|| unsafe { self.by_cublas(product, &description, &algorithm, stream) })?;
            if time < best {
                (found, best) = (Some(algorithm), time);
            }
        }
        // SAFETY: as the caller promises.
        let own = || unsafe { self.few_rows(product, stream) };
        if best < Duration::MAX && takes(&own)? < best {
            found = None;
        }
        tried().insert(known, found);
        Ok(found.map(|algorithm| (description, algorithm)))
    }

    /// Whether rows at the beginning and in the middle of a product come out of an algorithm as the own kernel makes them.
    ///
    /// # Safety
    /// As for [`enqueue`](Self::enqueue).
    unsafe fn passes(
        &self,
        product: Product,
        description: &Description,
        algorithm: &Algorithm,
        stream: &CudaStream,
    ) -> Result<bool> {
        // SAFETY: as the caller promises.
        if unsafe { self.by_cublas(product, description, algorithm, stream) }.is_err() {
            return self.cuda.alive().map(|()| false);
        }
        let [rows, _, n] = product.sizes;
        let answer = self.cuda.address(&self.trial);
        let (out, some) = (answer.offset(ANSWER), ((TRIAL - ANSWER) / (n * product.out.size())).min(FEW));
        if some == 0 {
            // A row has no room.
            return Ok(false);
        }
        for start in [0, rows / 2] {
            let part = product.rows(start..rows.min(start + some));
            let (theirs, count) = (part.tensors.out, part.sizes[0] * n);
            let own = Product { tensors: Tensors { out, ..part.tensors }, ..part };
            let mut differ = 1u32;
            // SAFETY: as the caller promises; what the own kernel writes has room in the trial's memory, which this stream alone uses, behind
            // the answer. That is four bytes long, and copied before `drain` returns.
            unsafe {
                self.few_rows(own, stream)?;
                let [at, theirs, own] = [answer, theirs, out].map(|at| at.as_ptr());
                let dtype = code_of(product.out);
                let compare = || sys::lsk_compare(at.cast(), theirs.cast(), own.cast(), dtype, count, stream.raw());
                self.cuda.call(|| "run compare".into(), compare)?;
                self.cuda.copy_to_host((&raw mut differ).cast(), answer, size_of::<u32>(), stream)?;
                self.cuda.drain(stream)?;
            }
            if differ != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// # Safety
    /// As for [`enqueue`](Self::enqueue).
    unsafe fn by_cublas(
        &self,
        product: Product,
        description: &Description,
        algorithm: &Algorithm,
        stream: &CudaStream,
    ) -> Result<()> {
        let (Product { sizes: [rows, _, n], tensors, out, bias }, mut beta) = (product, 0.0);
        if let Some(bias) = bias {
            let [to, bias] = [tensors.out, bias].map(|at| at.as_ptr());
            // SAFETY: the caller promises N biases in BF16 and an `out` [T, N] of that type on the device.
            let launch = || unsafe {
                sys::lsk_broadcast_row(to.cast(), code_of(out), bias.cast(), rows as i64, n as i64, stream.raw())
            };
            self.cuda.call(|| "run linear".into(), launch)?;
            beta = 1.0;
        }
        // SAFETY: as the caller promises; the description is of the product's shape.
        unsafe { self.cublas.multiply(description, algorithm, beta, tensors, stream) }
    }

    /// # Safety
    /// As for [`enqueue`](Self::enqueue).
    unsafe fn few_rows(&self, product: Product, stream: &CudaStream) -> Result<()> {
        let Product { sizes: [rows, k, n], tensors, out, bias } = product;
        let [to, x, weight] = [tensors.out, tensors.x, tensors.weight].map(|at| at.as_ptr());
        let bias = bias.map_or(std::ptr::null(), |bias| bias.as_ptr().cast_const());
        // SAFETY: the caller promises `x` [T, K], `weight` [N, K] and N biases in BF16, and an `out` [T, N], on the device.
        let launch = || unsafe {
            let (dtype, x, weight, bias) = (code_of(out), x.cast(), weight.cast(), bias.cast());
            sys::lsk_few_rows(to.cast(), dtype, x, weight, bias, rows as c_int, n as i64, k as i64, stream.raw())
        };
        self.cuda.call(|| product.shape().operation(), launch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_of_few_sizes_and_take_each_row_once() {
        let sizes = |rows| pieces(rows).map(|piece| piece.len()).collect::<Vec<_>>();
        assert!(sizes(0).is_empty());
        assert_eq!(sizes(9), [9]);
        assert_eq!(sizes(rows(700)), [512, 256]);
        assert_eq!(sizes(5000), [2048, 2048, 512, 256, 128, 8]);
        for rows in [1, 127, 128, 129, 4999] {
            let mut end = 0;
            pieces(rows).for_each(|piece| {
                assert_eq!(piece.start, end);
                end = piece.end;
            });
            assert_eq!(end, rows);
        }
        assert_eq!([1, 16, 17, 128, 129].map(rows), [1, 16, 128, 128, 256]);
    }
}
