//! What the compiler keeps safe code from, rule by rule: each is a program that compiles, and the same with one line changed,
//! which does not. They run as documentation tests; the codes of the errors are compared where rustdoc may
//! (`RUSTC_BOOTSTRAP=1`).

macro_rules! rules {
    ($($rule:ident: $code:literal, $setup:expr, $good:literal, $bad:literal;)*) => {$(
        #[doc = concat!("```no_run\n", $setup, $good, "\n# }\n```")]
        #[doc = concat!("```compile_fail,", $code, "\n", $setup, $bad, "\n# }\n```")]
        #[allow(dead_code, reason = "it stands for its documentation")]
        struct $rule;
    )*};
}

macro_rules! uses {
    () => {
        "use layer_streamer::{device::*, kernels::*, *};\n"
    };
}

/// A streamer on the CPU with its stream.
macro_rules! streaming {
    () => {
        concat!(
            uses!(),
            "fn f(mut streamer: LayerStreamer<Cpu>, stream: CpuStream, mut data: Vec<f32>) {\n",
            "let layer = streamer.next(&stream).unwrap();\n"
        )
    };
}

rules! {
    ATensorIsOfOneDevice: "E0308",
        concat!(uses!(), "fn f<D: Device>(other: &D, at: &D::Stream, stream: &CpuStream, x: TensorRef<'_, D>, to: &mut [f32]) {\n"),
        "download(other, at, x, to).unwrap();",
        "download(&Cpu, stream, x, to).unwrap();";
    AKernelTakesTensorsOfItsDevice: "E0308",
        concat!(uses!(), "fn f<D: Device>(stream: &CpuStream, cpu: TensorRef<'_, Cpu>, other: TensorRef<'_, D>, x: TensorMut<'_, Cpu>) {\n"),
        "Cpu.add(stream, x, cpu).unwrap();",
        "Cpu.add(stream, x, other).unwrap();";
    AnAddressIsBelievedUnderUnsafeAlone: "E0133",
        concat!(uses!(), "fn f(at: DevicePtr, shape: Shape) {\n"),
        // SAFETY: a program that is compiled and never run.
        "let _: TensorRef<'_, Cpu> = unsafe { TensorRef::from_raw(at, DType::F32, shape) };",
        "let _: TensorRef<'_, Cpu> = TensorRef::from_raw(at, DType::F32, shape);";
    AnInputIsNoOutput: "E0502",
        concat!(uses!(), "fn f(stream: &CpuStream, mut x: TensorMut<'_, Cpu>, y: TensorMut<'_, Cpu>) {\n"),
        "Cpu.add(stream, x.borrow(), y.as_ref()).unwrap();",
        "Cpu.add(stream, x.borrow(), x.as_ref()).unwrap();";
    ATensorEndsWithItsLayer: "E0505",
        concat!(streaming!(), "let tensor = layer.tensor(\"weight\").unwrap();\n"),
        "download(&Cpu, &stream, tensor, &mut data).unwrap(); layer.release().unwrap();",
        "layer.release().unwrap(); download(&Cpu, &stream, tensor, &mut data).unwrap();";
    ALayerIsNotWritten: "E0308",
        streaming!(),
        "download(&Cpu, &stream, layer.tensor(\"weight\").unwrap(), &mut data).unwrap();",
        "upload(&Cpu, &stream, &data, &mut layer.tensor(\"weight\").unwrap()).unwrap();";
    ALayerEndsBeforeItsStreamer: "E0505",
        streaming!(),
        "drop(layer); drop(streamer);",
        "drop(streamer); drop(layer);";
    ALayerEndsBeforeItsStream: "E0505",
        streaming!(),
        "drop(layer); drop(stream);",
        "drop(stream); drop(layer);";
    NothingIsHeldAcrossARewind: "E0502",
        streaming!(),
        "drop(layer); streamer.rewind().unwrap();",
        "streamer.rewind().unwrap(); drop(layer);";
    ALayerStaysInItsThread: "E0277",
        streaming!(),
        "std::thread::scope(|scope| { scope.spawn(|| data.clear()); }); drop(layer);",
        "std::thread::scope(|scope| { scope.spawn(|| drop(layer)); });";
    AStaticTensorEndsWithItsMemory: "E0505",
        concat!(uses!(), "fn f(statics: StaticTensors<Cpu>, stream: CpuStream, mut data: Vec<f32>) {\n",
            "let tensor = statics.tensor(\"weight\").unwrap();\n"),
        "download(&Cpu, &stream, tensor, &mut data).unwrap(); drop(statics);",
        "drop(statics); download(&Cpu, &stream, tensor, &mut data).unwrap();";
}

/// A device that hands out addresses, of which only the word `unsafe` says that they are good.
macro_rules! device {
    ($promise:literal) => {
        concat!(
            uses!(),
            "# #[derive(Clone)] struct Mine;\n",
            $promise,
            "impl Device for Mine {
                type Stream = (); type Event = (); type Memory = (); type Registration = ();
                fn address(&self, _: &()) -> DevicePtr { DevicePtr::new(std::ptr::null_mut()) }
                // And so on.
            #   fn describe(&self) -> String { String::new() }
            #   fn bind_thread(&self) -> Result<()> { Ok(()) }
            #   fn memory_is_ram(&self) -> bool { true }
            #   fn free_memory(&self) -> Result<usize> { Ok(0) }
            #   fn allocate(&self, _: &'static str, _: usize) -> Result<()> { Ok(()) }
            #   unsafe fn register(&self, _: *mut u8, _: usize) -> Result<()> { Ok(()) }
            #   fn stream(&self) -> Result<()> { Ok(()) }
            #   fn stream_id(&self, _: &()) -> StreamId { StreamId::CALLER }
            #   fn event(&self) -> Result<()> { Ok(()) }
            #   unsafe fn copy_to_device(&self, _: DevicePtr, _: *const u8, _: usize, _: &()) -> Result<()> { Ok(()) }
            #   unsafe fn copy_to_host(&self, _: *mut u8, _: DevicePtr, _: usize, _: &()) -> Result<()> { Ok(()) }
            #   unsafe fn copy_on_device(&self, _: DevicePtr, _: DevicePtr, _: usize, _: &()) -> Result<()> { Ok(()) }
            #   unsafe fn dequantise_raw(&self, _: (DevicePtr, DType), _: [DevicePtr; 4], _: &layer_streamer::quantised::Recipe, _: &()) -> Result<()> { Ok(()) }
            #   unsafe fn cast_raw(&self, _: (DevicePtr, DType), _: (DevicePtr, DType), _: usize, _: &()) -> Result<()> { Ok(()) }
            #   unsafe fn unpack_raw(&self, _: DevicePtr, _: DevicePtr, _: layer_streamer::packed::Parts<'_>, _: *mut u32, _: &()) -> Result<()> { Ok(()) }
            #   fn record(&self, _: &(), _: &()) -> Result<()> { Ok(()) }
            #   fn wait(&self, _: &(), _: &()) -> Result<()> { Ok(()) }
            #   fn query(&self, _: &()) -> Result<bool> { Ok(true) }
            #   fn synchronize(&self, _: &()) -> Result<()> { Ok(()) }
            }"
        )
    };
}

#[doc = concat!("```no_run\n", device!("unsafe "), "\n```")]
#[doc = concat!("```compile_fail,E0200\n", device!(""), "\n```")]
#[allow(dead_code, reason = "it stands for its documentation")]
struct ADeviceIsAPromise;
