//! What remains after a kernel has faulted: an executable of its own, since the context dies with it.

mod common;

use std::time::Instant;

use common::{fixture, gpu};
use layer_streamer::{
    DType, Error, LayerStreamer, Settings,
    device::{Device, DevicePtr},
    plan::Tier,
};
use support::{descriptors, nothing_left, threads};

#[test]
fn after_a_fault_every_call_returns_the_first_error_and_the_streamer_ends() {
    let Some(device) = gpu() else { return };
    let mut fixture = fixture(8, &[20_000_000, 7], 1);
    // Threads wait to touch its memory until the reader gets that far, which is never.
    Tier::parse("7=pinned", &mut fixture.units).unwrap();
    let stream = device.stream().unwrap();
    let settings = Settings { n_gpu: 1, n_cpu_pinned: 1, ..Settings::default() };
    let mut streamer = LayerStreamer::new(&device, &fixture.checkpoint, &fixture.units, &settings).unwrap();
    assert!(threads() >= 2 && descriptors(fixture.folder.path()) >= 1);
    #[cfg(feature = "capi")]
    let end_in_c = in_c::opened();
    let pass = streamer.run_pass(&stream, (), |(), layer| {
        if layer.index() == 2 {
            let (nowhere, from) = (DevicePtr::new(std::ptr::without_provenance_mut(4096)), layer.tensor("t0")?);
            // SAFETY: none. The address is nobody's: this is the fault.
            unsafe { device.cast_raw((nowhere, DType::F32), (from.ptr(), DType::BF16), 1000, &stream)? };
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
    #[cfg(feature = "capi")]
    end_in_c();
    assert!(matches!(streamer.close(), Err(Error::Leaked { bytes }) if bytes > 60_000));
    drop(stream);
    assert!(start.elapsed().as_secs() < 10, "it took {:?}", start.elapsed());
    // The checkpoint holds files open as well.
    let folder = fixture.folder.path().to_owned();
    drop(fixture.checkpoint);
    nothing_left(&folder);
}

#[cfg(feature = "capi")]
mod in_c {
    use std::{
        ffi::{CStr, CString, c_char, c_void},
        ptr::null,
        sync::Mutex,
    };

    use layer_streamer::capi::{ls_status::*, *};

    static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

    extern "C" fn log(_: *mut c_void, level: i32, message: *const c_char) {
        if level == ls_log_level::LS_LOG_ERROR as i32 {
            // SAFETY: a text of the library's.
            ERRORS.lock().unwrap().push(unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned());
        }
    }

    /// A streamer and a model through the C API, whose ends, once the device has failed, are to be called.
    pub fn opened() -> impl FnOnce() {
        let folder = CString::new(support::speller().to_str().unwrap()).unwrap();
        let [mut device, mut checkpoint, mut streamer, mut model] = [0u64; 4];
        // SAFETY: handles are structures of one word, and open when they are used.
        unsafe {
            assert_eq!(ls_device_cuda(0, (&raw mut device).cast()), LS_OK);
            assert_eq!(ls_checkpoint_open(folder.as_ptr(), (&raw mut checkpoint).cast()), LS_OK);
            let mut options = std::mem::MaybeUninit::<ls_streamer_options>::uninit();
            assert_eq!(ls_streamer_options_init(options.as_mut_ptr(), size_of::<ls_streamer_options>()), LS_OK);
            let mut options = options.assume_init();
            options.log = Some(log as _);
            let (on, of) = (ls_device { id: device }, ls_checkpoint { id: checkpoint });
            assert_eq!(ls_streamer_open(on, of, &options, (&raw mut streamer).cast()), LS_OK);
            assert_eq!(ls_model_open(on, folder.as_ptr(), null(), (&raw mut model).cast()), LS_OK);
            assert_eq!((ls_checkpoint_close(of), ls_device_close(on)), (LS_OK, LS_OK));
        }
        move || {
            let (streamer, model) = (ls_streamer { id: streamer }, ls_model { id: model });
            assert_eq!((ls_streamer_close(streamer), ls_model_close(model)), (LS_LEAKED, LS_LEAKED));
            // SAFETY: it is never NULL.
            let last = unsafe { CStr::from_ptr(ls_last_error()) }.to_str().unwrap();
            assert!(last.contains("bytes stay reserved"), "{last}");
            assert!(ERRORS.lock().unwrap().last().unwrap().contains("bytes stay reserved"));
            // They are closed nevertheless.
            assert_eq!((ls_streamer_close(streamer), ls_model_close(model)), (LS_CLOSED, LS_CLOSED));
        }
    }
}
