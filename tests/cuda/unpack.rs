//! Packed weights on a GPU: the same as on the CPU, and where that refuses them, the report says so.

use std::{array, iter, ptr};

use layer_streamer::{
    Result,
    device::{self, Cuda, Device, DevicePtr},
    packed::{BLOCK, Encoder, PART, Parts, Table, count},
};

use super::{On, on_gpu};

/// What must stay around the weights, in weights: memory is aligned to 16 bytes behind the first.
const AROUND: [usize; 2] = [8, 300];
const CANARY: u16 = 0x5a5a;

/// A page of the host's, for the report: no two registrations share one.
#[repr(C, align(4096))]
struct Page([u32; 1024]);

/// A packed tensor.
#[derive(Clone)]
struct Tensor {
    table: Table,
    part: usize,
    weights: usize,
    lengths: Vec<u32>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn new(table: Table, part: usize, weights: &[u16]) -> Self {
        let parts: Vec<_> = weights.chunks(part).map(|weights| Encoder::new(table).part(weights)).collect();
        let lengths = parts.iter().map(|part| part.len() as u32).collect();
        Self { table, part, weights: weights.len(), lengths, bytes: parts.concat() }
    }

    fn parts(&self) -> Parts<'_> {
        Parts { table: self.table, part: self.part, weights: self.weights, lengths: &self.lengths }
    }

    /// Its weights as a GPU makes them, and whether that reports a corrupt block.
    fn on(&self, gpu: &On<Cuda>) -> Result<(Vec<u16>, bool)> {
        // It ends where its memory ends.
        let before = self.bytes.len().next_multiple_of(256) - self.bytes.len();
        let packed = [vec![0xff; before], self.bytes.clone()].concat();
        let packed = gpu.tensor(&[packed.len()], &packed)?;
        let canaries = vec![half::bf16::from_bits(CANARY); AROUND[0] + self.weights + AROUND[1]];
        let mut out = gpu.tensor(&[canaries.len()], &canaries)?;
        let (from, to) = (packed.get().ptr().offset(before), out.out().ptr().offset(2 * AROUND[0]));
        let reported = launched(gpu, to, from, self.parts())?;
        let mut all = canaries;
        device::download(&gpu.device, &gpu.stream, out.get(), &mut all)?;
        let mut all: Vec<u16> = all.into_iter().map(half::bf16::to_bits).collect();
        let behind = all.split_off(AROUND[0] + self.weights);
        let weights = all.split_off(AROUND[0]);
        assert!(all.iter().chain(&behind).all(|weight| *weight == CANARY), "written beside the weights");
        Ok((weights, reported))
    }

    /// Holds a GPU against the CPU; whether the CPU finds it corrupt.
    fn check(&self, gpu: &On<Cuda>, what: &str) -> Result<bool> {
        let mut expected = vec![0; self.weights];
        let corrupt = self.parts().decode(&self.bytes, &mut expected).is_err();
        let (weights, reported) = self.on(gpu)?;
        assert_eq!(reported, corrupt, "the report of {what}");
        let wrong = weights.iter().zip(&expected).position(|(a, b)| a != b);
        assert!(corrupt || wrong.is_none(), "{what}[{wrong:?}] of {}", weights.len());
        Ok(corrupt)
    }
}

/// What a GPU reports of these parts.
fn launched(gpu: &On<Cuda>, to: DevicePtr, from: DevicePtr, parts: Parts<'_>) -> Result<bool> {
    let mut page = Box::new(Page([0; 1024]));
    let report = ptr::from_mut(&mut *page).cast::<u32>();
    // SAFETY: the page is dropped after its registration; memory for parts and weights is the caller's, and all work is done when
    // this returns.
    unsafe {
        let _registered = gpu.device.register(report.cast(), size_of::<Page>())?;
        let unpacked = gpu.device.unpack_raw(to, from, parts, report, &gpu.stream);
        gpu.device.drain(&gpu.stream)?;
        unpacked.map(|()| report.read_volatile() != 0)
    }
}

fn table_of(weights: &[u16]) -> Table {
    let mut counts = [0; 256];
    count(weights, &mut counts);
    Table::new(&counts)
}

fn weight(exponent: u8, rest: u8) -> u16 {
    u16::from(rest & 0x80) << 8 | u16::from(exponent) << 7 | u16::from(rest & 0x7f)
}

/// Weights whose exponents are met about as often as in a trained model.
fn like_a_model(rng: &mut fastrand::Rng, count: usize) -> Vec<u16> {
    let normal = |rng: &mut fastrand::Rng| (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
    iter::repeat_with(|| (normal(rng).to_bits() >> 16) as u16).take(count).collect()
}

#[test]
fn each_kind_of_code_fills_a_block_and_stands_alone() {
    on_gpu(1, |gpu, rng| {
        let first = rng.u8(..);
        let exponent = |rank: u8| first.wrapping_add(rank);
        let table = Table(array::from_fn(|rank| exponent(rank as u8)));
        for rank in 0..14 {
            let weights: Vec<u16> = (0..BLOCK).map(|at| weight(exponent(rank), at as u8)).collect();
            Tensor::new(table, BLOCK, &weights).check(gpu, &format!("a block of rank {rank}"))?;
            for at in [0, 7, 8, 255, 256, 1023, 1024, 4088, 4095] {
                let mut weights = vec![weight(exponent(0), 0x81); BLOCK];
                weights[at] = weight(exponent(rank), 0x7f);
                Tensor::new(table, BLOCK, &weights).check(gpu, &format!("rank {rank} at {at}"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn any_bits_unpack_with_any_table() {
    on_gpu(30, |gpu, rng| {
        let narrow = rng.u32(..8);
        let count = 1 + rng.usize(..9000);
        let weights: Vec<u16> = iter::repeat_with(|| weight(rng.u8(..) >> narrow, rng.u8(..))).take(count).collect();
        Tensor::new(table_of(&weights), BLOCK, &weights).check(gpu, "the best table")?;
        let random = Table(array::from_fn(|_| rng.u8(..)));
        Tensor::new(random, 2 * BLOCK, &weights).check(gpu, "a random table")?;
        Ok(())
    });
}

#[test]
fn parts_unpack_at_every_length_about_a_share_a_row_a_block_and_a_part() {
    on_gpu(1, |gpu, rng| {
        for part in [BLOCK, 2 * BLOCK, 3 * BLOCK] {
            for about in [0, 8, 256, 1024, BLOCK, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK, 6 * BLOCK] {
                for count in [about.saturating_sub(1), about, about + 1, about + 13] {
                    let weights = like_a_model(rng, count);
                    let corrupt = Tensor::new(table_of(&weights), part, &weights)
                        .check(gpu, &format!("{count} weights in parts of {part}"))?;
                    assert!(!corrupt);
                }
            }
        }
        let weights = like_a_model(rng, PART + 5000);
        Tensor::new(table_of(&weights), PART, &weights).check(gpu, "the longest part")?;
        Ok(())
    });
}

#[test]
fn as_many_parts_unpack_as_a_launch_takes_and_more() {
    on_gpu(1, |gpu, rng| {
        for parts in [999, 1000, 1001, 2001] {
            let missing = rng.usize(..BLOCK);
            let weights = like_a_model(rng, parts * BLOCK - missing);
            let corrupt = Tensor::new(table_of(&weights), BLOCK, &weights).check(gpu, &format!("{parts} parts"))?;
            assert!(!corrupt);
        }
        Ok(())
    });
}

#[test]
fn bytes_that_changed_unpack_to_weights_or_a_report_and_nothing_else() {
    on_gpu(60, |gpu, rng| {
        let (blocks, missing) = (1 + rng.usize(..5), rng.usize(..BLOCK));
        let weights = like_a_model(rng, blocks * BLOCK - missing);
        let part = BLOCK * (1 + rng.usize(..3));
        let mut tensor = Tensor::new(table_of(&weights), part, &weights);
        // In the first part's index, or anywhere.
        let among = if rng.bool() { (part / BLOCK).min(blocks) * 8 } else { tensor.bytes.len() };
        for _ in 0..1 + rng.usize(..4) {
            tensor.bytes[rng.usize(..among)] = rng.u8(..);
        }
        tensor.check(gpu, "changed bytes")?;
        Ok(())
    });
}

#[test]
fn an_index_that_disagrees_with_its_blocks_is_reported_when_they_unpack() {
    on_gpu(1, |gpu, rng| {
        let weights = like_a_model(rng, 3 * BLOCK);
        let whole = Tensor::new(table_of(&weights), 3 * BLOCK, &weights);
        let refused = |what: &str, change: &dyn Fn(&mut Tensor)| {
            let mut tensor = whole.clone();
            change(&mut tensor);
            assert!(tensor.check(gpu, what)?, "{what} is no corruption");
            Result::Ok(())
        };
        let half = |tensor: &mut Tensor, at: usize, value: u16| {
            tensor.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        };
        let cut = |tensor: &mut Tensor, to: usize| {
            tensor.bytes.truncate(to);
            tensor.lengths[0] = to as u32;
        };
        let index = 32;
        refused("a block before the one before", &|tensor| half(tensor, 8, 0))?;
        refused("a block beyond its part", &|tensor| half(tensor, 18, 0x7fff))?;
        refused("the farthest block", &|tensor| tensor.bytes[16..20].fill(0xff))?;
        refused("another number of first escapes", &|tensor| tensor.bytes[12] ^= 1)?;
        refused("another number of second escapes", &|tensor| tensor.bytes[14] ^= 1)?;
        refused("more first escapes than weights", &|tensor| half(tensor, 4, 4097))?;
        refused("more second escapes than first", &|tensor| half(tensor, 6, 4096))?;
        for bit in 5..8 {
            refused("far more first escapes", &|tensor| tensor.bytes[5] |= 1 << bit)?;
            refused("far more second escapes", &|tensor| tensor.bytes[7] |= 1 << bit)?;
        }
        refused("a first code that becomes an escape", &|tensor| tensor.bytes[index + BLOCK] = 0xff)?;
        refused("a part without blocks", &|tensor| cut(tensor, index))?;
        refused("half an index", &|tensor| cut(tensor, 16))?;
        refused("nothing", &|tensor| cut(tensor, 0))?;
        refused("a last block that is cut off", &|tensor| cut(tensor, tensor.bytes.len() - 16))?;
        // Two blocks of the same bytes, of which the second begins where the first does.
        let twice = [&weights[..BLOCK], &weights[..BLOCK]].concat();
        let mut tensor = Tensor::new(table_of(&twice), 2 * BLOCK, &twice);
        tensor.bytes[8..12].fill(0);
        assert!(tensor.check(gpu, "a block that is the one before")?);
        // No code for any, and as many exponents as fill the block's bytes: not one may be missing.
        let plain: Vec<u16> = (0..BLOCK).map(|at| weight(200, at as u8)).collect();
        let mut tensor = Tensor::new(Table([1; 13]), BLOCK, &plain);
        assert!(!tensor.check(gpu, "plain exponents")?);
        let cut_off = tensor.bytes.len() - 16;
        cut(&mut tensor, cut_off);
        assert!(tensor.check(gpu, "exponents that are cut off")?);
        Ok(())
    });
}

#[test]
fn what_no_launch_takes_is_refused_and_nothing_unpacks_to_nothing() {
    on_gpu(1, |gpu, rng| {
        let weights = like_a_model(rng, 3 * BLOCK);
        let tensor = Tensor::new(table_of(&weights), 2 * BLOCK, &weights);
        let packed = gpu.tensor(&[tensor.bytes.len()], &tensor.bytes)?;
        let mut out = gpu.tensor(&[weights.len()], &vec![half::bf16::ZERO; weights.len()])?;
        let (from, to) = (packed.get().ptr(), out.out().ptr());
        let good = tensor.parts();
        assert!(!launched(gpu, to, from, good)?);
        let odd = [tensor.lengths[0] - 8, tensor.lengths[1]];
        for (what, to, from, parts) in [
            ("parts that end in a block", to, from, Parts { part: 2 * BLOCK + 8, ..good }),
            ("parts without weights", to, from, Parts { part: 0, ..good }),
            ("parts that are too long", to, from, Parts { part: PART + BLOCK, lengths: &good.lengths[..1], ..good }),
            ("a part too few", to, from, Parts { lengths: &good.lengths[..1], ..good }),
            ("a part too many", to, from, Parts { weights: 2 * BLOCK, ..good }),
            ("parts of nothing", to, from, Parts { weights: 0, ..good }),
            ("a part that ends anywhere", to, from, Parts { lengths: &odd, ..good }),
            ("weights that are not aligned", to.offset(8), from, good),
            ("parts that are not aligned", to, from.offset(8), good),
        ] {
            let said = launched(gpu, to, from, parts).expect_err(what).to_string();
            assert!(said.contains("unpack") && said.contains("cudaErrorInvalidValue"), "{what}: {said}");
        }
        assert!(!launched(gpu, to, from, Parts { weights: 0, lengths: &[], ..good })?);
        Ok(())
    });
}
