//! The CUDA device by the rules that every device follows, on a real GPU. Without one the tests have nothing to test, and
//! say so.

mod common;

use common::{Fixture, check_blocks, fixture, gpu, random_fixture};
use layer_streamer::{
    DType, Error, Layer, LayerStreamer, Settings, Unit,
    device::{Cpu, Cuda, Device, TensorRef},
    plan::{Arrival, ArrivalOp, Tier},
};

fn bytes_of(device: &Cuda, tensor: TensorRef<'_, Cuda>) -> Vec<u8> {
    let (mut bytes, stream) = (vec![0; tensor.bytes()], device.stream().unwrap());
    // SAFETY: the vector has the tensor's length, and the copy is waited for.
    unsafe { device.copy_to_host(bytes.as_mut_ptr(), tensor.ptr(), bytes.len(), &stream).unwrap() };
    device.drain(&stream).unwrap();
    bytes
}

/// Compares a layer with the files, in the stream's own order: the caller waits for its arrival first.
fn check(fixture: &Fixture, device: &Cuda, stream: &<Cuda as Device>::Stream, layer: &Layer<'_, Cuda>) {
    device.drain(stream).unwrap();
    for arrival in fixture.units[layer.index()].arrivals() {
        let tensor = layer.tensor(&arrival.output).unwrap();
        assert_eq!(tensor.ptr().as_ptr() as usize % 256, 0);
        assert!(
            bytes_of(device, tensor) == fixture.stored(&arrival.inputs[0]),
            "{} of {}",
            arrival.output,
            layer.name()
        );
    }
}

#[test]
fn every_unit_of_every_pass_arrives_byte_for_byte_whatever_the_settings_and_tiers() {
    let Some(device) = gpu() else { return };
    let mut random = fastrand::Rng::with_seed(1);
    for round in 0..12 {
        let fixture = random_fixture(400_000, &mut random);
        let stream = device.stream().unwrap();
        let settings = Settings {
            n_gpu: 1 + random.usize(..3),
            n_cpu_pinned: random.usize(..4),
            n_cpu: random.usize(..3),
            ..Settings::default()
        };
        let mut units = fixture.units.clone();
        for unit in &mut units {
            unit.set_tier([Tier::Disk, Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu][random.usize(..5)]);
        }
        let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &units, &settings).unwrap();
        for pass in 0..4 {
            let seen = streamer.run_pass(&stream, 0, |count, layer| {
                assert_eq!(layer.index(), count);
                check(&fixture, &device, &stream, layer);
                // One pass is given up in the middle.
                if (round + pass, count) == (4, units.len() / 2) { Err(Error::Cancelled) } else { Ok(count + 1) }
            });
            match seen {
                Err(Error::Cancelled) => assert_eq!(round + pass, 4),
                seen => assert_eq!(seen.unwrap(), units.len(), "{settings:?}"),
            }
        }
    }
}

#[test]
fn a_slot_is_not_refilled_while_work_on_it_is_still_queued() {
    let Some(device) = gpu() else { return };
    let fixture = fixture(6, &[3_000_000, 700_001], 2);
    let (stream, settings) = (device.stream().unwrap(), Settings { n_gpu: 1, n_cpu_pinned: 1, ..Settings::default() });
    let bytes: usize = fixture.table.values().map(|tensor| tensor.shape[0] * 2).sum::<usize>() / 6;
    let copies = device.allocate("what compute saw", 4 * 6 * bytes.next_multiple_of(256)).unwrap();
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    // No wait in the pass: each layer's bytes are copied away in the stream's own time, behind slow work.
    let mut expected = Vec::new();
    let mut at = 0;
    for _ in 0..4 {
        let pass = streamer.run_pass(&stream, (), |(), layer| {
            let tensor = layer.tensor("t0")?;
            let to = device.address(&copies).offset(at);
            // SAFETY: the memory has room for every layer of every pass, and the layer is held.
            unsafe {
                for _ in 0..20 {
                    device.copy_on_device(to, tensor.ptr(), tensor.bytes(), &stream)?;
                }
            }
            expected.push((at, fixture.stored(&format!("{}.0", layer.index()))));
            at += tensor.bytes().next_multiple_of(256);
            Ok::<_, Error>(())
        });
        pass.unwrap();
    }
    device.drain(&stream).unwrap();
    for (number, (at, bytes)) in expected.into_iter().enumerate() {
        let mut seen = vec![0; bytes.len()];
        // SAFETY: as above, and the copy is waited for.
        unsafe {
            device.copy_to_host(seen.as_mut_ptr(), device.address(&copies).offset(at), seen.len(), &stream).unwrap()
        };
        device.drain(&stream).unwrap();
        assert!(seen == bytes, "layer {number} was overwritten too early");
    }
}

#[test]
fn tensors_that_change_on_arrival_are_what_the_cpu_makes_of_them() {
    let Some(device) = gpu() else { return };
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..6 {
        let fixture = random_fixture(9_000_000, &mut random);
        let mut units = Vec::new();
        for unit in &fixture.units {
            let mut changed = Unit::new(unit.name());
            for arrival in unit.arrivals() {
                let stored = fixture.table[&arrival.inputs[0]].dtype;
                let to = [DType::BF16, DType::F32][random.usize(..2)];
                let op = if stored.converts_to(to) { ArrivalOp::To(to) } else { ArrivalOp::Keep };
                changed.add(Arrival { op, ..arrival.clone() });
            }
            changed.set_tier([Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked][random.usize(..5)]);
            units.push(changed);
        }
        let (gpu_stream, cpu_stream) = (device.stream().unwrap(), Cpu.stream().unwrap());
        let settings = Settings { n_gpu: 2, ..Settings::default() };
        let mut there = LayerStreamer::new(&device, &fixture.checkpoint, &units, &settings).unwrap();
        let here = LayerStreamer::new(&Cpu, &fixture.checkpoint, &units, &settings).unwrap();
        let pass = there.run_pass(&gpu_stream, (), |(), layer| {
            device.drain(&gpu_stream)?;
            let twin = here.next(&cpu_stream)?;
            for (name, tensor) in twin.tensors() {
                // SAFETY: the CPU device's memory is memory, and the layer is held.
                let expected = unsafe { std::slice::from_raw_parts(tensor.ptr().as_ptr(), tensor.bytes()) };
                let found = bytes_of(&device, layer.tensor(name)?);
                assert!(same(tensor.dtype(), &found, expected), "{name} of {}", layer.name());
            }
            Ok::<_, Error>(())
        });
        pass.unwrap();
    }
}

/// Whether both hold the same values: bits, or NaN in both, whose payload is nobody's business.
fn same(dtype: DType, a: &[u8], b: &[u8]) -> bool {
    let nan = |bytes: &[u8]| match (dtype, bytes) {
        (DType::BF16, [low, high]) => half::bf16::from_le_bytes([*low, *high]).is_nan(),
        (DType::F32, [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]).is_nan(),
        _ => false,
    };
    let size = dtype.size();
    a.len() == b.len() && a.chunks(size).zip(b.chunks(size)).all(|(a, b)| a == b || (nan(a) && nan(b)))
}

#[test]
fn blocks_of_every_type_become_what_gguf_makes_of_them_to_the_bit_in_every_tier() {
    if let Some(device) = gpu() {
        check_blocks(&device);
    }
}

#[test]
fn streams_of_the_caller_s_are_taken_and_those_that_cannot_work_refused() {
    let Some(device) = gpu() else { return };
    // SAFETY: the stream outlives its borrowed handle, and the default stream always exists.
    let (owner, refused) = unsafe {
        let owner = device.stream().unwrap();
        let refused =
            device.stream_from_raw(std::ptr::without_provenance_mut(2)).err().expect("the per-thread default");
        device.stream_from_raw(std::ptr::null_mut()).unwrap();
        (owner, refused.to_string())
    };
    assert!(refused.contains("per-thread"), "{refused}");
    let fixture = fixture(3, &[5000], 4);
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &Settings::default()).unwrap();
    // SAFETY: as above.
    let stream = unsafe { device.stream_from_raw(owner.as_ptr()).unwrap() };
    let pass = streamer.run_pass(&stream, (), |(), layer| {
        check(&fixture, &device, &stream, layer);
        Ok::<_, Error>(())
    });
    pass.unwrap();
}

#[test]
fn what_cannot_be_had_is_an_error_that_says_what_to_do() {
    let Some(device) = gpu() else { return };
    let (free, total) = device.memory().unwrap();
    assert!(0 < free && free <= total);
    let error = device.allocate("a test", 1 << 50).err().expect("a pebibyte").to_string();
    assert!(
        error.contains("cudaErrorMemoryAllocation") && error.contains("a test") && error.contains("free"),
        "{error}"
    );
    let error = Cuda::new(4096).expect_err("no machine has as many").to_string();
    assert!(error.contains("cuda:4096") && error.contains("cudaErrorInvalidDevice"), "{error}");
    let mut page = vec![0u8; 4096];
    // SAFETY: the vector outlives both registrations.
    unsafe {
        let first = device.register(page.as_mut_ptr(), page.len()).unwrap();
        let error = device.register(page.as_mut_ptr(), page.len()).err().expect("it is registered").to_string();
        assert!(error.contains("cudaErrorHostMemoryAlreadyRegistered"), "{error}");
        drop(first);
    }
    // None of these costs the context.
    device.drain(&device.stream().unwrap()).unwrap();
}
