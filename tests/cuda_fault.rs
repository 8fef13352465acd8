//! What remains after a kernel has faulted: an executable of its own, since the context dies with it.
#![cfg(feature = "cuda")]

mod common;

use std::time::Instant;

use common::{descriptors, fixture, gpu, nothing_left, threads};
use layer_streamer::{
    DType, Error, LayerStreamer, Settings,
    device::{Device, DevicePtr},
};

#[test]
fn after_a_fault_every_call_returns_the_first_error_and_the_streamer_ends() {
    let Some(device) = gpu() else { return };
    let fixture = fixture(6, &[60_000, 7], 1);
    let stream = device.stream().unwrap();
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 1, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    assert!(threads() >= 2 && descriptors(fixture.folder.path()) >= 1);
    let pass = streamer.run_pass(&stream, (), |(), layer| {
        if layer.index() == 2 {
            let (nowhere, from) = (DevicePtr::new(std::ptr::without_provenance_mut(4096)), layer.tensor("t0")?);
            // SAFETY: none. The address is nobody's: this is the fault.
            unsafe { device.transform((nowhere, DType::F32), (from.ptr(), DType::BF16), 1000, &stream)? };
            // A fault shows when someone asks.
            device.drain(&stream)?;
        }
        Ok(())
    });
    let first = pass.expect_err("a kernel faulted");
    assert!(matches!(&first, Error::Cuda { name: "cudaErrorIllegalAddress", .. }), "{first}");
    let first = first.to_string();
    let start = Instant::now();
    for _ in 0..3 {
        let again = streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap_err().to_string();
        assert_eq!(again, first);
    }
    assert_eq!(device.allocate("a test", 1).err().expect("the context is lost").to_string(), first);
    assert_eq!(device.bind_thread().unwrap_err().to_string(), first);
    assert!(matches!(streamer.close(), Err(Error::Leaked { bytes }) if bytes > 60_000));
    drop(stream);
    assert!(start.elapsed().as_secs() < 10, "it took {:?}", start.elapsed());
    // The checkpoint holds files open as well.
    let folder = fixture.folder.path().to_owned();
    drop(fixture.checkpoint);
    nothing_left(&folder);
}
