//! What only an emulated runtime shows: two devices, machines and refusals of any kind, what is copied from where, and that
//! everything is given back. And that the emulation notices the mistakes it is there for.
#![cfg(cuda_emulated)]

mod common;

use std::{
    sync::{Mutex, MutexGuard},
    thread,
};

use common::{Fixture, SIZES, fixture, settings};
use layer_streamer::{
    DType, Error, Layer, LayerStreamer, Result, Settings,
    cuda_emulation::{self as emulation, Live, Operation},
    device::{Cuda, Device},
    plan::Tier,
};

/// What tests set holds for the whole process: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(|failed| failed.into_inner());
    emulation::reset();
    alone
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn check(fixture: &Fixture, device: &Cuda, stream: &<Cuda as Device>::Stream, layer: &Layer<'_, Cuda>) {
    for arrival in fixture.units[layer.index()].arrivals() {
        let tensor = layer.tensor(&arrival.output).unwrap();
        let mut bytes = vec![0; tensor.bytes()];
        // SAFETY: the vector has the tensor's length, and the copy is waited for.
        unsafe { device.copy_to_host(bytes.as_mut_ptr(), tensor.ptr(), bytes.len(), stream).unwrap() };
        device.drain(stream).unwrap();
        assert!(bytes == fixture.stored(&arrival.inputs[0]), "{} of {}", arrival.output, layer.name());
    }
}

fn checked_passes(ordinal: u32, fixture: &Fixture, settings: &Settings, passes: usize) {
    let device = Cuda::new(ordinal).unwrap();
    let stream = device.stream().unwrap();
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, settings).unwrap();
    for _ in 0..passes {
        let pass = streamer.run_pass(&stream, (), |(), layer| {
            check(fixture, &device, &stream, layer);
            Ok::<_, Error>(())
        });
        pass.unwrap();
    }
}

#[test]
fn two_devices_stream_at_once_and_each_gets_its_own_bytes() {
    let _alone = alone();
    let fixtures = [fixture(7, &SIZES, 1), fixture(5, &SIZES, 2)];
    thread::scope(|scope| {
        for (ordinal, fixture) in (0..).zip(&fixtures) {
            scope.spawn(move || checked_passes(ordinal, fixture, &settings(2, 2, 1), 4));
        }
    });
    assert_eq!(emulation::live(), Live::default());
}

#[test]
fn a_stream_of_another_gpu_is_refused_before_anything_runs_on_it() {
    let _alone = alone();
    let [here, there] = [0, 1].map(|ordinal| Cuda::new(ordinal).unwrap());
    let elsewhere = there.stream().unwrap();
    // The thread's device is the other one now.
    here.bind_thread().unwrap();
    // SAFETY: the stream outlives the handle that is not made.
    let refused = message(unsafe { here.stream_from_raw(elsewhere.as_ptr()) });
    assert!(refused.contains("cudaErrorInvalidResourceHandle") && refused.contains("another GPU"), "{refused}");
    let fixture = fixture(3, &[5000], 4);
    let mut streamer = LayerStreamer::new(&here, &fixture.checkpoint, &fixture.units, &Settings::default()).unwrap();
    let refused = message(streamer.run_pass(&elsewhere, (), |(), _| Ok::<_, Error>(())));
    assert!(refused.contains("cudaErrorInvalidResourceHandle"), "{refused}");
    // Nothing says when the layer's work on that stream is done: it is over, and its memory stays.
    assert_eq!(message(streamer.rewind()), refused);
    drop(streamer);
    assert_ne!(emulation::live().allocations, 0);
}

#[test]
fn machines_that_cannot_serve_are_told_apart() {
    let _alone = alone();
    for (machine, parts) in [
        ((2, 0, 90), ["cudaErrorInsufficientDriver", "no usable GPU: there is no NVIDIA driver"]),
        ((2, 11_040, 90), ["cudaErrorInsufficientDriver", "the driver serves CUDA 11.4"]),
        ((0, i32::MAX, 90), ["cudaErrorNoDevice", "no usable GPU"]),
        ((1, i32::MAX, 75), ["sm_75", "sm_80"]),
    ] {
        let (devices, driver, capability) = machine;
        emulation::machine(devices, driver, capability);
        let refused = message(Cuda::new(0));
        assert!(parts.iter().all(|part| refused.contains(part)) && refused.contains("cuda:0"), "{refused}");
    }
    emulation::machine(1, i32::MAX, 80);
    let refused = message(Cuda::new(1));
    assert!(refused.contains("cudaErrorInvalidDevice") && refused.contains("cuda:0 is the only GPU"), "{refused}");
    Cuda::new(0).unwrap();
}

#[test]
fn memory_that_cannot_be_locked_or_had_is_an_error_with_a_remedy_and_leaves_nothing() {
    let _alone = alone();
    let fixture = fixture(4, &SIZES, 3);
    let device = Cuda::new(0).unwrap();
    let start = |settings: &Settings| LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, settings);
    emulation::fail(Operation::Register, 0);
    let refused = message(start(&settings(1, 2, 0)));
    assert!(
        refused.contains("register") && refused.contains("n_cpu_pinned") && refused.contains("ulimit"),
        "{refused}"
    );
    assert_eq!(emulation::live(), Live::default());
    emulation::device_memory(1 << 20);
    let refused = message(start(&settings(1, 2, 0)));
    for part in ["cudaErrorMemoryAllocation", "device slots", "1048576 of the GPU's 1048576 bytes are free"] {
        assert!(refused.contains(part), "{refused}");
    }
    assert_eq!(emulation::live(), Live::default());
    emulation::device_memory(1 << 30);
    drop(start(&settings(1, 2, 0)).unwrap());
    assert_eq!(emulation::live(), Live::default());
}

#[test]
fn a_pass_copies_from_registered_memory_alone_wherever_units_live() {
    let _alone = alone();
    let mut fixture = fixture(6, &SIZES, 5);
    for (number, unit) in fixture.units.iter_mut().enumerate() {
        unit.set_tier([Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu][number % 4]);
    }
    let device = Cuda::new(0).unwrap();
    let stream = device.stream().unwrap();
    let copies = |settings: &Settings| {
        let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, settings).unwrap();
        let before = emulation::unregistered_copies();
        (0..3).for_each(|_| streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap());
        drop(streamer);
        emulation::unregistered_copies() - before
    };
    for n_cpu in [0, 2] {
        assert_eq!(copies(&settings(2, 2, n_cpu)), 0);
    }
    assert!(copies(&settings(2, 0, 2)) > 0, "without the pinned stage they must");
}

#[test]
fn what_is_left_out_of_a_pass_or_a_start_is_given_back() {
    let _alone = alone();
    let fixture = fixture(6, &SIZES, 6);
    let device = Cuda::new(0).unwrap();
    for operation in [Operation::Allocate, Operation::Register, Operation::Copy] {
        // Each of them fails in turn, until the start and a pass need no more.
        for others in 0.. {
            emulation::fail(operation, others);
            let stream = device.stream().unwrap();
            let started = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings(1, 1, 1));
            let passed = started.and_then(|mut streamer| {
                let _statics = streamer.load_static(&["0.0", "1.3"])?;
                streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(()))
            });
            drop(stream);
            assert_eq!(emulation::live(), Live::default(), "{operation:?} {others}");
            match passed {
                Err(Error::Cuda { .. }) => {}
                Err(other) => panic!("{other}"),
                Ok(()) => {
                    assert!(others > 0, "{operation:?}");
                    break;
                }
            }
        }
    }
}

/// A device whose context is lost without anybody having run a kernel that faults.
fn lost(device: &Cuda) -> bool {
    // Work on other streams is done after that.
    emulation::live();
    let refused = device.stream().and_then(|stream| device.drain(&stream));
    matches!(refused, Err(Error::Cuda { name: "cudaErrorIllegalAddress", .. }))
}

#[test]
fn a_fault_of_one_device_is_not_the_other_s() {
    let _alone = alone();
    let [here, there] = [0, 1].map(|ordinal| Cuda::new(ordinal).unwrap());
    let memory = there.allocate("a test", 1000).unwrap();
    let stream = there.stream().unwrap();
    emulation::fail(Operation::Fault, 0);
    let zeroes = [0; 1000];
    // SAFETY: both are that long, and stay until the device is lost, which is at once.
    unsafe { there.copy_to_device(there.address(&memory), zeroes.as_ptr(), 1000, &stream).unwrap() };
    assert!(lost(&there) && !lost(&here));
    assert!(message(there.allocate("a test", 1)).contains("cudaErrorIllegalAddress"));
    drop((memory, stream));
    checked_passes(0, &fixture(3, &SIZES, 7), &settings(1, 1, 0), 2);
    emulation::reset();
    checked_passes(1, &fixture(3, &SIZES, 7), &settings(1, 1, 0), 2);
}

#[test]
fn the_emulation_notices_writes_beyond_memory_and_uses_after_the_end() {
    let _alone = alone();
    let device = || Cuda::new(0).unwrap();
    let fresh = |device: &Cuda| {
        let memory = device.allocate("a test", 1000).unwrap();
        (device.address(&memory), memory)
    };
    {
        let device = device();
        let (at, memory) = fresh(&device);
        // SAFETY: emulated memory is memory, and what is behind this piece of it is the emulation's own: this is the mistake.
        unsafe { at.offset(1000).as_ptr().write(0) };
        assert!(lost(&device), "a byte after the end was written");
        drop(memory);
    }
    emulation::reset();
    {
        let device = device();
        let (at, memory) = fresh(&device);
        let stream = device.stream().unwrap();
        // SAFETY: none that CUDA asks for: the copies are too long, or of memory that is gone.
        unsafe {
            let mut bytes = [0; 1001];
            let beyond = device.copy_to_host(bytes.as_mut_ptr(), at, 1001, &stream);
            assert!(message(beyond).contains("cudaErrorInvalidValue"));
            drop(memory);
            let gone = device.copy_to_host(bytes.as_mut_ptr(), at, 1000, &stream);
            assert!(message(gone).contains("cudaErrorInvalidValue"));
            device.cast_raw((at.offset(512), DType::F32), (at, DType::BF16), 100, &stream).unwrap();
        }
        assert!(lost(&device), "a kernel used memory that was freed");
    }
    emulation::reset();
    {
        let device = device();
        let (at, _memory) = fresh(&device);
        let (stream, mut host) = (device.stream().unwrap(), vec![0u8; 1000]);
        // SAFETY: the vector outlives the copies, since the device is drained.
        unsafe {
            let registration = device.register(host.as_mut_ptr(), host.len()).unwrap();
            (0..500).for_each(|_| device.copy_to_device(at, host.as_ptr(), 1000, &stream).unwrap());
            drop(registration);
        }
        assert!(lost(&device), "memory was unregistered while it was being copied");
        emulation::reset();
    }
    assert_eq!(emulation::live(), Live::default());
}

/// Kernels and products: what a decoder takes, it gives back.
#[cfg(feature = "model")]
#[test]
fn a_decoder_gives_back_everything_and_refuses_what_does_not_fit() {
    use layer_streamer::model::{Decoder, Model};

    let _alone = alone();
    let (device, model) = (Cuda::new(1).unwrap(), Model::open(support::speller()).unwrap());
    let start = || Decoder::new(&device, &model, &Settings::default(), 2, 40);
    let mut decoder = start().unwrap();
    let before = common::generate(&mut decoder, &[&[5, 6, 7, 8], &[9]], 8, &[]);
    drop(decoder);
    assert_eq!(emulation::live(), Live::default());
    for others in 0.. {
        emulation::fail(Operation::Allocate, others);
        match start() {
            Ok(mut decoder) => {
                assert_eq!(common::generate(&mut decoder, &[&[5, 6, 7, 8], &[9]], 8, &[]), before);
                break;
            }
            Err(error) => assert!(matches!(error, Error::Cuda { .. }), "{error}"),
        }
        assert_eq!(emulation::live(), Live::default(), "allocation {others}");
    }
    assert_eq!(emulation::live(), Live::default());
}
