//! Kernels on any device, given the same values: what one of them computes, the others must.

use half::{bf16, f16};
use layer_streamer::{
    DType, Element, Result,
    device::{self, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::{Kernels, PAGE, Ragged},
};

/// A tensor in memory of its own.
pub struct Tensor<D: Device> {
    ptr: DevicePtr,
    dtype: DType,
    shape: Vec<usize>,
    _memory: D::Memory,
}

impl<D: Device> Tensor<D> {
    pub fn get(&self) -> TensorRef<'_, D> {
        // SAFETY: the memory holds the tensor and lives as long as self.
        unsafe { TensorRef::from_raw(self.ptr, self.dtype, Shape::new(&self.shape).expect("few dimensions")) }
    }

    pub fn out(&mut self) -> TensorMut<'_, D> {
        // SAFETY: as above, and self is borrowed mutably.
        unsafe { TensorMut::from_raw(self.ptr, self.dtype, Shape::new(&self.shape).expect("few dimensions")) }
    }

    /// The same bytes as elements of another type.
    pub fn cast(&self, dtype: DType, shape: &[usize]) -> TensorRef<'_, D> {
        assert!(dtype.bytes_of(shape).is_some_and(|bytes| bytes <= self.bytes()));
        // SAFETY: as above, for as many bytes or fewer; device memory is aligned for any type.
        unsafe { TensorRef::from_raw(self.ptr, dtype, Shape::new(shape).expect("few dimensions")) }
    }

    pub fn bytes(&self) -> usize {
        self.get().bytes()
    }
}

/// A device with a stream that is ready for kernels.
pub struct On<D: Kernels> {
    pub device: D,
    pub stream: D::Stream,
}

impl<D: Kernels> On<D> {
    pub fn new(device: &D) -> Result<Self> {
        device.bind_thread()?;
        let stream = device.stream()?;
        device.prepare(&stream)?;
        Ok(Self { device: device.clone(), stream })
    }

    pub fn tensor<T: Element>(&self, shape: &[usize], values: &[T]) -> Result<Tensor<D>> {
        let mut tensor = self.empty(T::DTYPE, shape)?;
        device::upload(&self.device, &self.stream, values, &mut tensor.out())?;
        Ok(tensor)
    }

    /// A tensor with whatever is in its memory.
    pub fn empty(&self, dtype: DType, shape: &[usize]) -> Result<Tensor<D>> {
        let bytes = dtype.bytes_of(shape).expect("it fits");
        let memory = self.device.allocate("a tensor", bytes.max(1))?;
        Ok(Tensor { ptr: self.device.address(&memory), dtype, shape: shape.to_vec(), _memory: memory })
    }

    /// Values as elements of `dtype`, rounded if they must be.
    pub fn values(&self, dtype: DType, shape: &[usize], values: &[f32]) -> Result<Tensor<D>> {
        match dtype {
            DType::F32 => self.tensor(shape, values),
            DType::BF16 => self.tensor(shape, &values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
            DType::F16 => self.tensor(shape, &values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
            other => panic!("no values of type {other}"),
        }
    }

    /// A tensor of these values, over and over.
    pub fn repeated(&self, dtype: DType, shape: &[usize], values: &[f32]) -> Result<Tensor<D>> {
        let tensor = self.empty(dtype, shape)?;
        let some = self.values(dtype, &[values.len()], values)?;
        let mut bytes = vec![0u8; some.bytes()];
        // SAFETY: the pieces lie inside the tensors, and all copies are waited for.
        unsafe {
            self.device.copy_to_host(bytes.as_mut_ptr(), some.ptr, bytes.len(), &self.stream)?;
            self.device.drain(&self.stream)?;
            for at in (0..tensor.bytes()).step_by(bytes.len()) {
                let len = bytes.len().min(tensor.bytes() - at);
                self.device.copy_to_device(tensor.ptr.offset(at), bytes.as_ptr(), len, &self.stream)?;
            }
        }
        self.device.drain(&self.stream)?;
        Ok(tensor)
    }

    pub fn activation(&self, shape: &[usize], values: &[f32]) -> Result<Tensor<D>> {
        self.values(self.device.precision().activation, shape, values)
    }

    pub fn cache(&self, shape: &[usize], values: &[f32]) -> Result<Tensor<D>> {
        self.values(self.device.precision().cache, shape, values)
    }

    /// BF16 on every device.
    pub fn weight(&self, shape: &[usize], values: &[f32]) -> Result<Tensor<D>> {
        self.values(DType::BF16, shape, values)
    }

    /// What a tensor holds, once everything before is done.
    pub fn read(&self, tensor: &Tensor<D>) -> Result<Vec<f32>> {
        let count = tensor.get().elements();
        Ok(match tensor.dtype {
            DType::F32 => self.download(tensor, vec![0.0f32; count])?,
            DType::BF16 => self.download(tensor, vec![bf16::ZERO; count])?.into_iter().map(bf16::to_f32).collect(),
            DType::U32 => self.download(tensor, vec![0u32; count])?.into_iter().map(|x| x as f32).collect(),
            other => panic!("no values of type {other}"),
        })
    }

    fn download<T: Element>(&self, tensor: &Tensor<D>, mut values: Vec<T>) -> Result<Vec<T>> {
        device::download(&self.device, &self.stream, tensor.get(), &mut values)?;
        Ok(values)
    }
}

/// Values from -1 to 1 that BF16 holds, so that every device is given the same.
pub fn random(rng: &mut fastrand::Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| bf16::from_f32(rng.f32() * 2.0 - 1.0).to_f32()).collect()
}

/// Sequences as (tokens in the cache before, new ones), and the pages of each.
#[derive(Clone, Debug)]
pub struct Batch {
    pub lengths: Vec<(usize, usize)>,
    pub pages: Vec<Vec<u32>>,
    /// Pages that the table has room for, of each sequence; those that it has not are none of any cache.
    pub width: usize,
}

/// The same on a device.
pub struct BatchOn<D: Device>([Tensor<D>; 3]);

impl Batch {
    /// In pages that follow each other, from this one on.
    pub fn new(lengths: Vec<(usize, usize)>, first: u32) -> Self {
        let mut pages = first..;
        let of = |(before, new): &(usize, usize)| pages.by_ref().take((before + new).div_ceil(PAGE)).collect();
        let pages: Vec<Vec<u32>> = lengths.iter().map(of).collect();
        let width = pages.iter().map(Vec::len).max().unwrap_or(0);
        Self { lengths, pages, width }
    }

    /// In pages of any order. Some sequences have those in common that hold what both had before.
    pub fn scattered(lengths: Vec<(usize, usize)>, rng: &mut fastrand::Rng) -> Self {
        let mut batch = Self::new(lengths, 0);
        let mut numbers: Vec<u32> = (0..batch.cache_pages() as u32).collect();
        rng.shuffle(&mut numbers);
        batch.pages.iter_mut().flatten().for_each(|page| *page = numbers[*page as usize]);
        for i in 1..batch.pages.len() {
            let both = batch.lengths[i - 1].0.min(batch.lengths[i].0) / PAGE;
            let shared = batch.pages[i - 1][..if rng.bool() { rng.usize(..=both) } else { 0 }].to_vec();
            batch.pages[i][..shared.len()].copy_from_slice(&shared);
        }
        batch.width += rng.usize(..3);
        batch
    }

    /// Pages of a cache that has all of these, and one that is nobody's.
    pub fn cache_pages(&self) -> usize {
        self.pages.iter().flatten().max().map_or(1, |last| *last as usize + 2)
    }

    pub fn tokens(&self) -> usize {
        self.lengths.iter().map(|(_, new)| new).sum()
    }

    pub fn on<D: Kernels>(&self, on: &On<D>) -> Result<BatchOn<D>> {
        let mut offsets = vec![0u32];
        self.lengths.iter().for_each(|(_, new)| offsets.push(offsets[offsets.len() - 1] + *new as u32));
        let lens: Vec<u32> = self.lengths.iter().map(|(before, new)| (before + new) as u32).collect();
        let words = |words: &[u32]| on.tensor(&[words.len()], words);
        let mut pages = vec![u32::MAX; self.lengths.len() * self.width];
        for (to, own) in pages.chunks_mut(self.width.max(1)).zip(&self.pages) {
            to[..own.len()].copy_from_slice(own);
        }
        let pages = on.tensor(&[self.lengths.len(), self.width], &pages)?;
        Ok(BatchOn([words(&offsets)?, words(&lens)?, pages]))
    }
}

impl<D: Device> BatchOn<D> {
    pub fn get(&self) -> Ragged<'_, D> {
        let [q_offsets, kv_lens, pages] = self.0.each_ref().map(Tensor::get);
        Ragged { q_offsets, kv_lens, pages }
    }
}

/// How far values are from what they should be: ‖Δ‖ / ‖expected‖, or the greatest difference by the greatest value if that is
/// more. Infinite where only one is a number.
pub fn off(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    if got.iter().zip(expected).any(|(a, b)| a.is_finite() != b.is_finite()) {
        return f64::INFINITY;
    }
    let pairs =
        || got.iter().zip(expected).filter(|(a, _)| a.is_finite()).map(|(a, b)| (f64::from(a - b), f64::from(*b)));
    let norm = |f: fn((f64, f64)) -> f64| pairs().map(|pair| f(pair).powi(2)).sum::<f64>().sqrt();
    let most = |f: fn((f64, f64)) -> f64| pairs().map(|pair| f(pair).abs()).fold(0.0, f64::max);
    let share = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
    share(norm(|x| x.0), norm(|x| x.1)).max(share(most(|x| x.0), most(|x| x.1)))
}

/// Computes the same on the CPU and on a device; gives what the device made of it, then what the CPU did.
#[macro_export]
macro_rules! on_both {
    ($device:expr, |$on:ident| $body:expr) => {{
        let got = {
            let $on = $device;
            $body
        };
        let expected = {
            let $on = &twin::On::new(&layer_streamer::device::Cpu)?;
            $body
        };
        (got, expected)
    }};
}
