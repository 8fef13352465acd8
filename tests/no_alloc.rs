//! Nothing asks for memory from the first pass to the drop: no pipeline thread, nor `next` and `release`, nor any library
//! below them. Neither do the CPU's kernels once their threads have started. Counted by a shared object that stands before malloc, mmap and their kin, in a child process.
//!
//! Errors that carry names allocate them, so a failed read is left uncounted; what comes after it is counted again.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod common;
#[cfg(feature = "nvtx")]
#[path = "nvtx/tool.rs"]
mod tool;
#[cfg(feature = "model")]
#[path = "../examples/bench/twin.rs"]
#[allow(dead_code, unused_macros, reason = "a benchmark uses the rest")]
mod twin;

use std::{env, ffi::CStr, fs, path::Path, process::Command, slice, sync::Arc};

use common::{Fixture, fixture};
use layer_streamer::{
    DType, Error, Layer, LayerStreamer, Settings, Unit,
    device::{Cpu, Device},
    plan::{Arrival, ArrivalOp, CachePolicy, Reader, Tier},
    trace::{Observer, timeline::Timeline},
};
use support::{healed, whole};

/// The shared object's counter.
struct Counter {
    begin: extern "C" fn(libc::c_int),
    end: extern "C" fn() -> libc::c_ulong,
}

impl Counter {
    /// The counter, where the shared object is loaded.
    fn loaded() -> Option<Self> {
        let find = |name: &CStr| {
            // SAFETY: a terminated string, looked up in what is loaded.
            let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        let (begin, end) = (find(c"no_alloc_begin")?, find(c"no_alloc_end")?);
        // SAFETY: the functions of these names in interpose.c have these types.
        Some(unsafe {
            Self {
                begin: std::mem::transmute::<*mut libc::c_void, extern "C" fn(libc::c_int)>(begin),
                end: std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> libc::c_ulong>(end),
            }
        })
    }

    /// How often memory was asked for meanwhile, by anyone; `loud` shows where.
    fn count(&self, loud: bool, work: impl FnOnce()) -> u64 {
        (self.begin)(loud.into());
        work();
        (self.end)()
    }
}

/// Runs the test called `name` in a child process, with the counter loaded and these variables.
fn run_counted(name: &str, variables: &[(&str, &Path)]) {
    assert!(env::var_os("LD_PRELOAD").is_none(), "the counter was not loaded");
    let folder = tempfile::tempdir().unwrap();
    let object = folder.path().join("interpose.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/no_alloc/interpose.c");
    let mut compiler = Command::new("cc");
    compiler
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&object)
        .arg(source)
        .arg("-ldl");
    assert!(compiler.status().expect("a C compiler").success());
    let child = Command::new(env::current_exe().unwrap())
        // In the main thread: one that waits for the test would say, and allocate for it, that a minute has passed.
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", &object)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = [child.stdout, child.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    println!("{}", said[0]);
    assert!(child.status.success(), "{}{}", said[0], said[1]);
    assert!(said[0].contains("1 passed"), "the child ran another test");
}

/// What each unit's tensors must be on the device.
type Expected = Vec<Vec<(String, Vec<u8>)>>;

/// Compares a layer with what it must be, in place.
fn check(expected: &Expected, layer: &Layer<'_, Cpu>) {
    for (name, bytes) in &expected[layer.index()] {
        let tensor = layer.tensor(name).unwrap();
        // SAFETY: device memory of the CPU is RAM, and the layer is held.
        let arrived = unsafe { slice::from_raw_parts(tensor.ptr().as_ptr(), tensor.bytes()) };
        assert!(arrived == bytes.as_slice());
    }
}

/// The units of `fixture` with these tiers in turn, every third tensor converted, and what must arrive.
fn units(fixture: &Fixture, tiers: &[Tier]) -> (Vec<Unit>, Expected) {
    let describe = |(index, unit): (usize, &Unit)| {
        let (mut changed, mut tensors) = (Unit::new(unit.name()), Vec::new());
        changed.set_tier(tiers[index % tiers.len()]);
        for (number, arrival) in unit.arrivals().iter().enumerate() {
            let (stored, widen) = (fixture.stored(&arrival.inputs[0]), number % 3 == 2);
            let op = if widen { ArrivalOp::To(DType::F32) } else { ArrivalOp::Keep };
            changed.add(Arrival { op, ..arrival.clone() });
            let widened = || stored.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
            tensors.push((arrival.output.clone(), if widen { widened() } else { stored }));
        }
        (changed, tensors)
    };
    fixture.units.iter().enumerate().map(describe).unzip()
}

/// Everything that a host does again and again.
fn stream(streamer: &mut LayerStreamer<Cpu>, expected: &Expected) {
    let (stream, other) = (Cpu.stream().unwrap(), Cpu.stream().unwrap());
    let canceller = streamer.canceller();
    let pass = |streamer: &mut LayerStreamer<Cpu>| {
        let count = streamer.run_pass(&stream, 0, |count, layer| {
            check(expected, layer);
            Ok::<_, Error>(count + 1)
        });
        assert!(matches!(count, Ok(units) if units == expected.len()), "{count:?}");
    };
    (0..3).for_each(|_| pass(streamer));
    // Two layers held at once, released out of order and on another stream, and the pass abandoned.
    for _ in 0..2 {
        let first = streamer.next(&stream).unwrap();
        let second = streamer.next(&other).unwrap();
        check(expected, &first);
        second.release_on(&stream).unwrap();
        drop(first);
        streamer.rewind().unwrap();
    }
    pass(streamer);
    for at in [0, expected.len() - 1] {
        let failed = streamer.run_pass(&stream, (), |(), layer| {
            // An error that carries nothing stands for the layer function's own.
            if layer.index() == at { Err(Error::Cancelled) } else { Ok(()) }
        });
        assert!(matches!(failed, Err(Error::Cancelled)));
        pass(streamer);
    }
    let cancelled = streamer.run_pass(&stream, (), |(), layer| {
        assert!(layer.index() < 2);
        if layer.index() == 1 {
            canceller.cancel();
        }
        Ok::<_, Error>(())
    });
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    pass(streamer);
}

#[test]
fn nothing_is_allocated_from_the_first_pass_to_the_drop() {
    let Some(counter) = Counter::loaded() else {
        return run_counted("nothing_is_allocated_from_the_first_pass_to_the_drop", &[]);
    };
    count_everything(&counter);
}

#[cfg(feature = "nvtx")]
#[test]
fn nothing_is_allocated_where_a_tool_is_attached_or_cannot_be_loaded() {
    let name = "nothing_is_allocated_where_a_tool_is_attached_or_cannot_be_loaded";
    if let Some(counter) = Counter::loaded() {
        return count_everything(&counter);
    }
    let folder = support::folder();
    let (tool, calls) = (tool::compile(folder.path(), &[]), folder.path().join("calls"));
    run_counted(name, &[(tool::ATTACH, &tool), (tool::OUT, &calls)]);
    assert!(fs::read_to_string(&calls).unwrap().matches("\tunit ").count() > 1000, "the tool saw little");
    run_counted(name, &[(tool::ATTACH, &folder.path().join("nowhere.so"))]);
}

fn count_everything(counter: &Counter) {
    assert_eq!(counter.count(false, || drop(std::hint::black_box(vec![1u8; 3]))), 1, "the counter counts");
    assert!(counter.count(false, || drop(memmap2::MmapMut::map_anon(1 << 20).unwrap())) >= 1, "the counter counts");

    let mut fixture = fixture(9, &[1, 60_000, 3, 700_000, 40, 5_000], 21);
    let everywhere = [Tier::Disk, Tier::Ram, Tier::Disk, Tier::Pinned, Tier::Gpu];
    let all = &everywhere[..];
    for (tiers, cache) in [(&all[..1], CachePolicy::Direct), (all, CachePolicy::Direct), (all, CachePolicy::Auto)] {
        let (units, expected) = units(&fixture, tiers);
        for reader in [Reader::Auto, Reader::UringFixed, Reader::Uring, Reader::Pread] {
            for (n_cpu_pinned, n_cpu) in [(0, 0), (2, 0), (0, 2), (2, 3)] {
                let batches = (n_cpu_pinned.min(1), n_cpu / 2);
                let settings = Settings {
                    n_gpu: 2,
                    n_cpu_pinned,
                    n_cpu,
                    batch_gpu: 2,
                    batch_cpu_pinned: batches.0,
                    batch_cpu: batches.1,
                    reader,
                    cache,
                };
                // So few events that new ones overwrite old ones. Without it a streamer does the same, and less.
                let timeline = Timeline::with_events(16);
                let observers = [timeline.clone() as Arc<dyn Observer>];
                let checkpoint = &fixture.checkpoint;
                let mut streamer = match LayerStreamer::with_observers(&Cpu, checkpoint, &units, &settings, &observers)
                {
                    Err(Error::Unsupported { what, .. }) => {
                        println!("left out: {what}");
                        break;
                    }
                    other => other.unwrap(),
                };
                streamer.track_progress(|progress| assert!(progress.done <= progress.units));
                let count = counter.count(true, || stream(&mut streamer, &expected));
                assert_eq!(count, 0, "{settings:?}");

                // A shard that is cut while it is read, and made whole again.
                let path = fixture.file("a.bin");
                let before = whole(&path);
                fs::write(&path, "gone").unwrap();
                let cpu = Cpu.stream().unwrap();
                let failed = (0..9).find_map(|_| streamer.run_pass(&cpu, (), |(), _| Ok::<_, Error>(())).err());
                // The latter where all of it had been read before it was cut.
                assert!(matches!(failed, Some(Error::Read { .. } | Error::Checkpoint { .. })), "{failed:?}");
                healed(&path, &before);
                fixture.checkpoint = fixture.opened_again();
                let count = counter.count(true, || stream(&mut streamer, &expected));
                assert_eq!(count, 0, "after a failed read: {settings:?}");
                println!("{}: {:?}", streamer.stats().reader, (n_cpu_pinned, n_cpu));
            }
        }
    }
}

#[cfg(feature = "capi")]
#[test]
fn taking_and_releasing_through_the_c_api_allocates_nothing() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use layer_streamer::capi::{ls_status::LS_OK, *};

    let Some(counter) = Counter::loaded() else {
        return run_counted("taking_and_releasing_through_the_c_api_allocates_nothing", &[]);
    };
    extern "C" fn look(_: *mut libc::c_void, layer: ls_layer) -> i32 {
        let mut tensor = std::mem::MaybeUninit::uninit();
        // SAFETY: the layer is there, and the result goes to a local.
        unsafe { ls_layer_tensor(layer, c"mlp.up_proj.weight".as_ptr(), tensor.as_mut_ptr()) as i32 }
    }
    extern "C" fn log(lines: *mut libc::c_void, _: i32, _: *const libc::c_char) {
        // SAFETY: what is passed below.
        unsafe { (*lines.cast::<AtomicUsize>()).fetch_add(1, Ordering::Relaxed) };
    }
    let lines = AtomicUsize::new(0);
    let speller = std::ffi::CString::new(support::speller().to_str().unwrap()).unwrap();
    let [mut device, mut checkpoint, mut stream, mut streamer] = [0u64; 4];
    // SAFETY: the handles are structures of one word, and open when they are used.
    let count = unsafe {
        assert_eq!(ls_device_cpu((&raw mut device).cast()), LS_OK);
        let device = ls_device { id: device };
        assert_eq!(ls_stream_open(device, (&raw mut stream).cast()), LS_OK);
        assert_eq!(ls_checkpoint_open(speller.as_ptr(), (&raw mut checkpoint).cast()), LS_OK);
        let checkpoint = ls_checkpoint { id: checkpoint };
        let mut options = std::mem::MaybeUninit::<ls_streamer_options>::uninit();
        assert_eq!(ls_streamer_options_init(options.as_mut_ptr(), size_of::<ls_streamer_options>()), LS_OK);
        let mut options = options.assume_init();
        (options.log, options.log_user) = (Some(log as _), (&raw const lines).cast_mut().cast());
        assert_eq!(ls_streamer_open(device, checkpoint, &options, (&raw mut streamer).cast()), LS_OK);
        let opened = lines.load(Ordering::Relaxed);
        let (streamer, stream) = (ls_streamer { id: streamer }, ls_stream { id: stream });
        let count = counter.count(true, || {
            for _ in 0..20 {
                let mut held = [ls_layer { id: 0 }; 2];
                held.iter_mut().for_each(|layer| assert_eq!(ls_next_layer(streamer, stream, layer), LS_OK));
                held.iter().for_each(|layer| assert_eq!(ls_release_layer(*layer, stream), LS_OK));
            }
            // Which is logged.
            assert_eq!(ls_rewind(streamer), LS_OK);
            assert_eq!(ls_run_pass(streamer, stream, Some(look), std::ptr::null_mut()), LS_OK);
        });
        assert_eq!((ls_streamer_close(streamer), ls_stream_close(stream)), (LS_OK, LS_OK));
        assert!(opened > 1 && lines.load(Ordering::Relaxed) > opened);
        count
    };
    assert_eq!(count, 0);
}

#[cfg(feature = "model")]
#[test]
fn kernels_on_the_cpu_allocate_nothing_once_their_threads_have_started() {
    use layer_streamer::kernels::{AttentionMask, Kernels, PAGE, RopeLayout};

    let Some(counter) = Counter::loaded() else {
        let name = "kernels_on_the_cpu_allocate_nothing_once_their_threads_have_started";
        return run_counted(name, &[("LAYER_STREAMER_THREADS", Path::new("3"))]);
    };
    let on = twin::On::new(&Cpu).unwrap();
    let (device, stream) = (&on.device, &on.stream);
    let mut rng = fastrand::Rng::new();
    // One token, whose kernels one thread computes, and as many as several threads share.
    for tokens in [1, 200] {
        let [heads, groups, size, width] = [6, 2, 64, 6 * 64];
        let mut floats =
            |shape: &[usize]| on.activation(shape, &twin::random(&mut rng, shape.iter().product())).unwrap();
        let (mut x, mut y, mut out) = (floats(&[tokens, width]), floats(&[tokens, width]), floats(&[tokens, width]));
        let (q, mut turned) = (floats(&[tokens, heads, size]), floats(&[tokens, heads, size]));
        let block = floats(&[tokens, groups, size]);
        let [mut keys, mut values] = [(); 2].map(|()| floats(&[11, groups, PAGE, size]));
        let (weight, norm) = (floats(&[width, width]), floats(&[width]));
        let mut narrow = on.empty(DType::BF16, &[tokens, width]).unwrap();
        let places: Vec<u32> = (0..tokens as u32).collect();
        let (places, frequencies) = (on.tensor(&[tokens], &places).unwrap(), floats(&[size / 2]));
        let mut best = on.tensor(&[tokens], &vec![0u32; tokens]).unwrap();
        let batch = twin::Batch::new(vec![(500, tokens)], 0).on(&on).unwrap();
        let mask = AttentionMask { scale: 0.1, window: None, soft_cap: Some(30.0) };
        let mut all = || -> layer_streamer::Result<()> {
            device.cast(stream, x.get(), narrow.out())?;
            device.embed(stream, weight.get(), places.get(), out.out())?;
            device.rms_norm(stream, x.get(), norm.get(), 0.0, 1e-6, out.out())?;
            device.add_rms_norm(stream, x.out(), y.get(), norm.get(), 0.0, 1e-6, out.out())?;
            device.rms_norm_in_place(stream, x.out(), norm.get(), 0.0, 1e-6)?;
            device.linear(stream, x.get(), weight.get(), Some(norm.get()), out.out())?;
            for layout in [RopeLayout::Halves, RopeLayout::Interleaved, RopeLayout::ToHalves] {
                device.rope(stream, q.get(), places.get(), frequencies.get(), 1.0, layout, turned.out())?;
            }
            device.swiglu(stream, y.out(), x.get())?;
            device.geglu(stream, y.out(), x.get())?;
            device.scale(stream, y.out(), 0.5)?;
            device.soft_cap(stream, y.out(), 30.0)?;
            device.add(stream, x.out(), y.get())?;
            device.append_kv(stream, block.get(), batch.get(), keys.out())?;
            device.append_kv(stream, block.get(), batch.get(), values.out())?;
            device.attention(stream, q.get(), keys.get(), values.get(), batch.get(), mask, turned.out())?;
            device.gather(stream, x.get(), places.get(), out.out())?;
            device.argmax(stream, x.get(), best.out())
        };
        all().unwrap();
        assert_eq!(counter.count(true, || (0..9).for_each(|_| all().unwrap())), 0, "{tokens} tokens");
    }
}
