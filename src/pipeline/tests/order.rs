//! What safe code may do with a layer: read it where it has arrived and before it is gone, and nowhere else.

use std::{sync::atomic::AtomicBool, thread, time::Duration};

use super::*;
use crate::device::{Shape, download};

#[test]
fn a_layer_is_read_on_the_stream_that_waits_for_it_and_refused_on_any_other() {
    for seed in (0..cases(40)).map(u64::from) {
        let case = Case::new(seed);
        let [with, other] = [(); 2].map(|()| case.device.stream().unwrap());
        let streamer = case.streamer();
        for unit in 0..case.units.len() {
            let layer = streamer.next(&with).unwrap();
            for (name, expected) in &case.expected[unit] {
                let tensor = layer.tensor(name).unwrap();
                // Bytes of any type, to be compared.
                let elements = expected.len();
                // SAFETY: the same memory, by another type; the layer is held, and `with` waits for it.
                let bytes = unsafe {
                    crate::device::TensorRef::from_raw(tensor.ptr(), DType::U8, Shape::new(&[elements]).unwrap())
                };
                let mut got = vec![0u8; elements];
                download(&case.device, &with, bytes, &mut got).unwrap();
                assert_eq!(got, **expected, "{name}");
                if tensor.dtype() == DType::BF16 {
                    let mut got = vec![half::bf16::ZERO; tensor.elements()];
                    download(&case.device, &with, tensor, &mut got).unwrap();
                    let error = download(&case.device, &other, tensor, &mut got).unwrap_err().to_string();
                    assert!(error.contains("download") && error.contains("another stream"), "{error}");
                }
            }
            layer.release_on(&other).unwrap();
        }
    }
}

#[cfg(feature = "model")]
#[test]
fn a_kernel_on_the_cpu_takes_layers_on_any_stream_since_its_work_is_done_when_a_call_returns() {
    use crate::device::{DevicePtr, TensorMut};
    let case = Case::new(3);
    let streamer = LayerStreamer::new(&Cpu, &case.fixture.checkpoint, &case.units, &Settings::default()).unwrap();
    let [with, other] = [(); 2].map(|()| Cpu.stream().unwrap());
    let layer = streamer.next(&with).unwrap();
    for (_, tensor) in layer.tensors().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
        let mut got = vec![0f32; tensor.elements()];
        download(&Cpu, &other, tensor, &mut got).unwrap();
        let mut copy = vec![0f32; tensor.elements()];
        let to = DevicePtr::new(copy.as_mut_ptr().cast());
        // SAFETY: the vector is that long, and nothing else uses it.
        let to = unsafe { TensorMut::from_raw(to, DType::F32, Shape::new(tensor.shape()).unwrap()) };
        crate::kernels::Kernels::cast(&Cpu, &other, tensor, to).unwrap();
        assert!(copy.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn a_unit_that_stays_and_is_held_twice_is_in_use_until_both_uses_have_ended() {
    for (slow, other_stream) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut case = Case::new(5);
        case.units.truncate(1);
        case.units[0].set_tier(Tier::Gpu);
        case.settings = Settings { n_gpu: 2, ..Settings::default() };
        let streams = [(); 4].map(|()| case.device.stream().unwrap());
        let streamer = case.streamer();
        let held = [0, 1].map(|use_of| streamer.next(&streams[use_of]).unwrap());
        let done = Arc::new(AtomicBool::new(false));
        let ends = done.clone();
        case.device.enqueue(&streams[slow], move || {
            thread::sleep(Duration::from_millis(200));
            ends.store(true, SeqCst);
        });
        for (layer, other) in held.into_iter().zip(&streams[2..]) {
            if other_stream { layer.release_on(other).unwrap() } else { layer.release().unwrap() }
        }
        streamer.close().unwrap();
        assert!(done.load(SeqCst), "closed while use {slow} went on");
    }
}
