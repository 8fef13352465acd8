//! Conversions between types, to the bit what the CPU makes of them: wherever a piece starts, and nothing beside it is written.

use layer_streamer::{DType, device, kernels::Kernels};

use super::{common::BLOCKS, length, on_gpu, same, twin};
use crate::on_both;

/// What must stay around what is written: a number of BF16.
const CANARY: f32 = 1.5 * (1u64 << 53) as f32;
/// Elements behind it, more than a thread writes.
const BEHIND: usize = 300;

/// How many elements, and their bytes: every pattern of up to 16 bits, then random ones.
fn some(from: DType, rng: &mut fastrand::Rng) -> (usize, Vec<u8>) {
    // Up to a few tiles of a GPU, which may end anywhere in one.
    let count = if from.is_blocks() {
        (1 + rng.usize(..30_000)) / from.block_elements() + 1
    } else {
        65_536 + length(rng, 20_000)
    };
    let bytes = match from.size() {
        1 => (0..count).map(|i| i as u8).collect(),
        2 => (0..count).flat_map(|i| (i as u16).to_le_bytes()).collect(),
        size => (0..count * size).map(|_| rng.u8(..)).collect(),
    };
    (count * from.block_elements(), bytes)
}

#[test]
fn cast_is_exact_for_every_pair_of_types_wherever_a_piece_starts() {
    on_gpu(8, |gpu, rng| {
        for from in [DType::F32, DType::F16, DType::BF16, DType::F8E4M3].into_iter().chain(BLOCKS) {
            for to in [DType::F32, DType::BF16] {
                let (elements, bytes) = some(from, rng);
                // From the first byte on, from anywhere, or up to where the memory ends.
                let skip = match rng.u8(..3) {
                    0 => 0,
                    1 => rng.usize(..16) * from.align(),
                    _ => bytes.len().next_multiple_of(256) - bytes.len(),
                };
                let skip_out = if rng.bool() { 0 } else { rng.usize(..9) };
                let both = on_both!(gpu, |on| {
                    let raw = on.tensor(&[skip + bytes.len()], &[vec![0; skip], bytes.clone()].concat())?;
                    let count = skip_out + elements + BEHIND;
                    let mut out = on.values(to, &[count], &vec![CANARY; count])?;
                    let (from_at, to_at) = (raw.get().ptr().offset(skip), out.out().ptr().offset(skip_out * to.size()));
                    let shape = device::Shape::new(&[elements])?;
                    // SAFETY: parts of the two tensors, which outlive the kernel.
                    let (x, piece) = unsafe {
                        (
                            device::TensorRef::from_raw(from_at, from, shape),
                            device::TensorMut::from_raw(to_at, to, shape),
                        )
                    };
                    on.device.cast(&on.stream, x, piece)?;
                    on.read(&out)?
                });
                same(&format!("{from} as {to}, {elements} from byte {skip} to {skip_out}"), both);
            }
        }
        Ok(())
    });
}
