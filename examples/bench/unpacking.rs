//! Packed weights → BF16: on a GPU as many as a layer has, and a tensor; on the CPU in every way of decoding.

use std::{array, iter, ptr};

use half::bf16;
use layer_streamer::{
    DType, Result,
    device::{self, Device},
    kernels::Kernels,
    packed::{Decoding, Encoder, PART, Packed, Parts, Table, count},
};

use super::{Bench, Row};

/// Parts of all matrices of a layer of Qwen2.5-7B, and of a tensor of 64 MB.
const LAYER: usize = 889;
const MATRIX: usize = 122;

/// Weights that are packed, in parts that follow one another: to make all anew would take longer than to unpack them.
struct Some {
    weights: Vec<u16>,
    table: Table,
    parts: Vec<Vec<u8>>,
}

impl Some {
    /// Exponents are met about as often as in a trained model.
    fn new(rng: &mut fastrand::Rng, weights: usize) -> Self {
        let mut normal = || (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
        let weights: Vec<u16> = iter::repeat_with(|| bf16::from_f32(normal()).to_bits()).take(weights).collect();
        let mut counts = [0; 256];
        count(&weights, &mut counts);
        let table = Table::new(&counts);
        let encoder = Encoder::new(table);
        let parts = weights.chunks(PART).map(|weights| encoder.part(weights)).collect();
        Self { weights, table, parts }
    }

    /// The lengths of so many parts, and their bytes.
    fn repeated(&self, parts: usize) -> (Vec<u32>, Vec<u8>) {
        let parts = || self.parts.iter().cycle().take(parts);
        (parts().map(|part| part.len() as u32).collect(), parts().flatten().copied().collect())
    }

    /// Whether these are they, over and over.
    fn is(&self, weights: impl Iterator<Item = u16>) -> bool {
        weights.zip(self.weights.iter().cycle()).all(|(decoded, weight)| decoded == *weight)
    }
}

/// A page of the host's that the device may write to.
#[repr(C, align(4096))]
struct Page([u32; 1024]);

impl<D: Kernels> Bench<'_, D> {
    pub fn unpacking(&mut self) -> Result<()> {
        let some = Some::new(&mut self.rng, 8 * PART);
        if self.on.device.memory_is_ram() {
            return self.ways_of_decoding(&some);
        }
        let mut page = Box::new(Page(array::from_fn(|_| 0)));
        let report = ptr::from_mut(&mut *page).cast::<u32>();
        // SAFETY: the page is dropped after its registration.
        let _registered = unsafe { self.on.device.register(report.cast(), size_of::<Page>())? };
        for parts in [self.many(LAYER), self.many(MATRIX)] {
            self.unpack(&some, parts, report)?;
        }
        Ok(())
    }

    /// Parts that lie in the device's memory, decoded by the device.
    fn unpack(&mut self, some: &Some, parts: usize, report: *mut u32) -> Result<()> {
        let here = self.on;
        let (lengths, bytes) = some.repeated(parts);
        let weights = parts * PART;
        let packed = here.tensor(&[bytes.len()], &bytes)?;
        let mut out = here.empty(DType::BF16, &[weights])?;
        let (from, to) = (packed.get().ptr(), out.out().ptr());
        let parts = Parts { table: some.table, part: PART, weights, lengths: &lengths };
        // SAFETY: both tensors outlive the work, which is waited for; the caller has registered the report.
        let launch = || unsafe { here.device.unpack_raw(to, from, parts, report, &here.stream) };
        launch()?;
        let mut decoded = vec![bf16::ZERO; weights];
        device::download(&here.device, &here.stream, out.get(), &mut decoded)?;
        // SAFETY: the device is done with it.
        let good = unsafe { report.read_volatile() } == 0 && some.is(decoded.into_iter().map(bf16::to_bits));
        let row = Row::new("unpack", format!("[{weights}]"), Some(off(good)), packed.bytes() + out.bytes());
        self.record(Row { weights: out.bytes(), ..row }, |_| launch())
    }

    /// As many parts as a device would be given, by one thread.
    fn ways_of_decoding(&mut self, some: &Some) -> Result<()> {
        let (lengths, bytes) = some.repeated(self.many(LAYER));
        let mut out = vec![0; lengths.len() * PART];
        for decoding in Decoding::ALL.into_iter().filter(|decoding| decoding.is_supported()) {
            let decode = |out: &mut [u16]| {
                let mut rest = &bytes[..];
                lengths.iter().zip(out.chunks_mut(PART)).all(|(length, out)| {
                    let (part, others) = rest.split_at(*length as usize);
                    rest = others;
                    let packed = Packed::new(some.table, PART, part).map(|packed| packed.decoded_by(decoding));
                    packed.and_then(|packed| packed.decode(out)).is_ok()
                })
            };
            let good = decode(&mut out) && some.is(out.iter().copied());
            let (shape, moved) = (format!("[{}], {decoding:?}", out.len()), bytes.len() + 2 * out.len());
            let row = Row { weights: 2 * out.len(), ..Row::new("unpack", shape, Some(off(good)), moved) };
            self.record(row, |_| {
                decode(&mut out);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// How many rows of the table these are.
pub fn rows(device: &impl Device) -> u64 {
    let ways = || Decoding::ALL.into_iter().filter(|decoding| decoding.is_supported()).count();
    if device.memory_is_ram() { ways() as u64 } else { 2 }
}

/// Bits that are not the same are no number.
fn off(good: bool) -> f64 {
    if good { 0.0 } else { f64::INFINITY }
}
