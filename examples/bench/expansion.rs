//! Blocks of quantised weights → BF16: as many as a tensor of 64 MB has.

use layer_streamer::{DType, Result, kernels::Kernels};

use super::{Bench, Row, off, twin};
use crate::on_both;

/// Those that are met most often, and the one with the oddest blocks.
pub const TYPES: [DType; 6] = [DType::Q4_0, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::IQ4_XS, DType::MXFP4];

/// Weights of the tensor; whole blocks, however much smaller it is.
const WEIGHTS: usize = 32 << 20;

impl<D: Kernels> Bench<'_, D> {
    pub fn expansion(&mut self) -> Result<()> {
        let (here, weights) = (self.on, self.many(WEIGHTS));
        for from in TYPES {
            let blocks: Vec<u8> = (0..99 * from.size()).map(|_| self.rng.u8(..)).collect();
            let few = from.elements(blocks.len());
            let both = on_both!(here, |on| {
                let raw = on.tensor(&[blocks.len()], &blocks)?;
                let mut out = on.empty(DType::BF16, &[few])?;
                on.device.cast(&on.stream, raw.cast(from, &[few]), out.out())?;
                on.read(&out)?
            });
            let (x, mut out) = (here.empty(from, &[weights])?, here.empty(DType::BF16, &[weights])?);
            let row = Row::new(
                "expand",
                format!("{from}, [{weights}]"),
                Some(off(&both.0, &both.1)),
                x.bytes() + out.bytes(),
            );
            self.record(Row { weights: out.bytes(), ..row }, |_| here.device.cast(&here.stream, x.get(), out.out()))?;
        }
        Ok(())
    }
}
