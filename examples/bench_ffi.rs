//! What the C API costs: taking a layer and giving it back through it, beside the same through Rust, in turns.
//!
//! The units are kept on the device and are there when a burst begins, so that what is timed is the calls alone.

#[path = "bench/report/mod.rs"]
mod report;

use std::{
    ffi::CString,
    fs,
    mem::MaybeUninit,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use layer_streamer::{
    Checkpoint, DType, LayerStreamer, Settings, StoredTensor, Unit,
    capi::{ls_status::LS_OK, *},
    device::{Cpu, Device},
    plan::Tier,
};
use report::{Column, Common, Failure, Figure, Report, Show, Spread, by_default, column, quantile};
use serde_json::json;

/// Time ls_next_layer + ls_release_layer beside the Rust pull loop.
///
/// Checks first that both hand over the same layers. A figure is what nine of ten bursts of 256 layers do not beat: the time that
/// nothing else on the machine disturbs.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.15")), mut_arg("rounds", by_default("10")))]
#[command(after_help = "\
Examples:
  bench_ffi                          what the C API adds to taking a layer and giving it back
  bench_ffi --rounds 40              a quieter figure on a busy machine
  bench_ffi --most 50                fail where it adds more than 50 ns
  bench_ffi --json | jq .ffi_ns   one figure, for a script")]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Fail if the C API costs more nanoseconds a layer beyond Rust's own
    #[arg(long, value_name = "NS", default_value_t = 100.0)]
    most: f64,
}

const COLUMNS: [Column; 2] = [
    column("through", "through", Show::Text, ""),
    column("ns", "ns a layer", Show::Spread(1), "taking it and giving it back, ± half of the range over the rounds"),
];

/// Layers of a pass, and of a burst.
const UNITS: usize = 256;

fn made<T>(call: impl FnOnce(*mut T) -> ls_status) -> T {
    let mut to = MaybeUninit::uninit();
    assert_eq!(call(to.as_mut_ptr()), LS_OK);
    // SAFETY: a call that succeeds writes its result.
    unsafe { to.assume_init() }
}

/// Nanoseconds a layer.
fn time(work: impl FnOnce()) -> f64 {
    // Long enough for the pipeline to have the next pass ready.
    thread::sleep(Duration::from_millis(2));
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / UNITS as f64
}

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, None, || run(&options))
}

fn run(options: &Options) -> Result<Report, Failure> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("weights");
    fs::write(&file, vec![7; UNITS * 64]).expect("a file in a temporary folder");
    let row = |unit: usize| StoredTensor {
        name: unit.to_string(),
        file: file.clone(),
        offset: unit as u64 * 64,
        dtype: DType::U8,
        shape: vec![64],
    };
    let checkpoint = Checkpoint::from_table((0..UNITS).map(row))?;
    let unit = |number: usize| {
        let mut unit = Unit::new(number.to_string());
        unit.keep("t", number.to_string()).set_tier(Tier::Gpu);
        unit
    };
    let units: Vec<_> = (0..UNITS).map(unit).collect();
    let stream = Cpu.stream()?;
    let streamer = LayerStreamer::new(&Cpu, &checkpoint, &units, &Settings::default())?;
    let (c_streamer, c_stream) = open_in_c(&file);

    let rust = || (0..UNITS).for_each(|_| streamer.next(&stream).and_then(|layer| layer.release()).expect("a layer"));
    let in_c = || {
        for _ in 0..UNITS {
            // SAFETY: the handles are open, and the result goes to a local.
            let layer = made(|to| unsafe { ls_next_layer(c_streamer, c_stream, to) });
            assert_eq!(ls_release_layer(layer, c_stream), LS_OK);
        }
    };
    // The first pass fills the tiers.
    rust();
    in_c();
    check(&streamer, &stream, c_streamer, c_stream);
    let bar = report::progress(options.common.rounds.into(), &options.common)?;
    let [mut rust_ns, mut c_ns] = [(); 2].map(|()| Vec::new());
    for _ in 0..options.common.rounds {
        let [mut with_rust, mut with_c] = [(); 2].map(|()| Vec::new());
        let start = Instant::now();
        while start.elapsed() < options.common.window || with_c.len() < 10 {
            with_rust.push(time(rust));
            with_c.push(time(in_c));
        }
        rust_ns.push(quantile(&mut with_rust, 0.1));
        c_ns.push(quantile(&mut with_c, 0.1));
        bar.inc(1);
    }
    bar.finish_and_clear();
    assert_eq!((ls_streamer_close(c_streamer), ls_stream_close(c_stream)), (LS_OK, LS_OK));
    let pairs = || c_ns.iter().zip(&rust_ns);
    let ffi = Spread::of(&pairs().map(|(c, rust)| c - rust).collect::<Vec<_>>());
    let mut report = Report::new("bench_ffi", Cpu.describe(), &COLUMNS);
    report.row([json!("C"), json!(Spread::of(&c_ns))]);
    report.row([json!("Rust"), json!(Spread::of(&rust_ns))]);
    report.line("ffi", ffi.text(|ns| format!("{ns:.1}")) + " ns a layer: what the C API adds");
    report.field("ffi_ns", ffi.median);
    let ratios: Vec<_> = pairs().map(|(c, rust)| c / rust).collect();
    report.compare(
        Figure::new("a layer through the C API", "ns", &c_ns),
        Figure::new("a layer through Rust", "ns", &rust_ns),
        "time through C / time through Rust",
        &ratios,
    );
    let most = options.most;
    report.failed =
        (ffi.median > most).then(|| format!("the C API adds {:.1} ns, more than {most} (--most)", ffi.median));
    Ok(report)
}

/// The same streamer through the C API.
fn open_in_c(file: &std::path::Path) -> (ls_streamer, ls_stream) {
    let c = |text: String| CString::new(text).expect("no zeros");
    let (file, names) = (c(file.display().to_string()), (0..UNITS).map(|n| c(n.to_string())).collect::<Vec<_>>());
    let shape = [64usize];
    let (u8s, gpu) = (ls_dtype::LS_U8 as i32, ls_tier::LS_TIER_GPU as i32);
    let rows: Vec<_> = (names.iter().enumerate())
        .map(|(unit, name)| ls_stored_tensor {
            name: name.as_ptr(),
            file: file.as_ptr(),
            offset: unit as u64 * 64,
            shape: shape.as_ptr(),
            rank: 1,
            dtype: u8s,
        })
        .collect();
    let tensors: Vec<_> = names
        .iter()
        .map(|name| ls_unit_tensor { name: c"t".as_ptr(), stored: name.as_ptr(), dtype: 0, rows: 0, columns: 0 })
        .collect();
    let units: Vec<_> = (names.iter().zip(&tensors))
        .map(|(name, tensor)| ls_unit { name: name.as_ptr(), tensors: tensor, count: 1, tier: gpu })
        .collect();
    // SAFETY: every pointer is to a local, and every result goes to one.
    unsafe {
        let device = made(|to| ls_device_cpu(to));
        let stream = made(|to| ls_stream_open(device, to));
        let checkpoint = made(|to| ls_checkpoint_from_table(rows.as_ptr(), rows.len(), to));
        let mut options = made(|to| ls_streamer_options_init(to, size_of::<ls_streamer_options>()));
        (options.units, options.unit_count) = (units.as_ptr(), units.len());
        let streamer = made(|to| ls_streamer_open(device, checkpoint, &options, to));
        assert_eq!((ls_checkpoint_close(checkpoint), ls_device_close(device)), (LS_OK, LS_OK));
        (streamer, stream)
    }
}

/// Both hand over the same layers.
fn check(streamer: &LayerStreamer<Cpu>, stream: &<Cpu as Device>::Stream, in_c: ls_streamer, c_stream: ls_stream) {
    for _ in 0..UNITS {
        let layer = streamer.next(stream).expect("a layer");
        // SAFETY: the handles are open, the results go to locals, and the layer's memory is RAM.
        unsafe {
            let other = made(|to| ls_next_layer(in_c, c_stream, to));
            assert_eq!(made(|to| ls_layer_index(other, to)), layer.index());
            let tensor = made(|to| ls_layer_tensor(other, c"t".as_ptr(), to));
            assert_eq!(std::slice::from_raw_parts(tensor.data.cast::<u8>(), 64), [7; 64]);
            assert_eq!(ls_release_layer(other, c_stream), LS_OK);
        }
    }
}
