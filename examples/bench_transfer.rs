//! What the link between host and device gives: copies to the device from pageable, registered and huge-page memory by the
//! size of a copy, what registering costs, and how fast the device copies within its own memory.
//!
//! The streamer cannot beat the best figure of the registered columns; how far a smaller copy falls behind says how small the
//! tensors may be before it pays to move them together.

#[path = "../cli/src/budget.rs"]
#[allow(dead_code, reason = "the program uses the rest")]
mod budget;
#[path = "../cli/src/device.rs"]
mod device;
#[path = "bench/report/mod.rs"]
mod report;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use budget::Amount;
use clap::Parser;
use device::{Chosen, Wanted};
use layer_streamer::{
    Result,
    device::{Device, DevicePtr},
};
use memmap2::{Advice, MmapMut};
use report::{
    Column, Common, Failure, Figure, Line, Panel, Plot, PlotTo, Report, Show, Spread, by_default, column, units,
};
use serde_json::json;

/// Measure copies from host to device, and within the device.
///
/// Checks first that what was copied comes back unchanged.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.1")), mut_arg("rounds", by_default("3")))]
#[command(after_help = "\
Examples:
  bench_transfer                                what copies to the device give, by size and kind of memory
  bench_transfer --plot transfer.svg            the same as curves
  bench_transfer --device cuda:1 --size 2GB     another GPU, and more memory on either side
  bench_transfer --json | jq .limit.median      GB/s that no streamer can beat on this link")]
struct Options {
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Memory on either side, such as 512MiB or 1GB
    #[arg(long, default_value = "512MiB", value_parser = size)]
    size: usize,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    plot: PlotTo,
}

/// From the smallest copy up.
fn size(text: &str) -> Result<usize, &'static str> {
    match text.parse()? {
        Amount::Bytes(bytes) if bytes >= CHUNKS[0] => Ok(bytes),
        _ => Err("give an amount of 64KiB or more"),
    }
}

const CHUNKS: [usize; 7] = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

/// Kinds of host memory: a name, the pages, and whether it is registered with the device.
const KINDS: [(&str, Advice, bool); 3] = [
    ("pageable", Advice::NoHugePage, false),
    ("registered", Advice::NoHugePage, true),
    ("registered, huge pages", Advice::HugePage, true),
];

const COLUMNS: [Column; 4] = [
    column("copy_bytes", "copies of", Show::Bytes, "bytes of one copy; all are enqueued, and waited for together"),
    column(
        "pageable_gb_s",
        "pageable GB/s",
        Show::Spread(2),
        "from ordinary memory, ± half of the range over the rounds",
    ),
    column("registered_gb_s", "registered GB/s", Show::Spread(2), "from memory that the device knows (pinned)"),
    column(
        "huge_gb_s",
        "huge pages GB/s",
        Show::Spread(2),
        "registered too, in huge pages, as the pipeline's slots are",
    ),
];

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, Some(&options.plot), || match device::choose(options.device)? {
        Chosen::Cpu(device) => run(&device, &options, None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => {
            // SAFETY: `run` gives two halves of its own memory, and drains the stream before it ends.
            let copy = |to, from, bytes, stream: &_| unsafe { device.copy_on_device(to, from, bytes, stream) };
            run(&device, &options, Some(&copy))
        }
    })
}

/// A copy within the device: to, from, bytes, stream.
type CopyOnDevice<'a, D> = &'a dyn Fn(DevicePtr, DevicePtr, usize, &<D as Device>::Stream) -> Result<()>;

/// Host memory of one kind.
struct Host<D: Device> {
    /// Dropped before the memory that it is about.
    _registration: Option<D::Registration>,
    memory: MmapMut,
    /// What registering it took.
    seconds_per_gb: Option<f64>,
}

fn run<D: Device>(device: &D, options: &Options, on_device: Option<CopyOnDevice<'_, D>>) -> Result<Report, Failure> {
    let (bytes, window) = (options.size, options.common.window);
    let stream = device.stream()?;
    let memory = device.allocate("the target of the copies", bytes)?;
    let base = device.address(&memory);
    let mut hosts = Vec::new();
    for (_, pages, registered) in KINDS {
        let host = Host::new(device, bytes, pages, registered)?;
        check(device, &stream, base, &host.memory)?;
        hosts.push(host);
    }
    let chunks: Vec<_> = CHUNKS.into_iter().filter(|chunk| *chunk <= bytes).collect();
    // GB/s by size, kind and round.
    let mut rates = vec![[(); 3].map(|()| Vec::new()); chunks.len()];
    let mut within = Vec::new();
    let bar = report::progress(u64::from(options.common.rounds) * (3 * chunks.len()) as u64, &options.common)?;
    bar.set_message("copying");
    for _ in 0..options.common.rounds {
        for (&chunk, rates) in chunks.iter().zip(&mut rates) {
            for (host, rates) in hosts.iter().zip(rates) {
                let from = host.memory.as_ptr();
                // SAFETY: both sides are `bytes` long, and stay until the stream is drained.
                let copy = |at: usize| unsafe { device.copy_to_device(base.offset(at), from.add(at), chunk, &stream) };
                rates.push(rate(device, &stream, window, bytes, chunk, copy)?);
                bar.inc(1);
            }
        }
        if let Some(copy) = on_device {
            let half = bytes / 2;
            let copy = |_| copy(base.offset(half), base, half, &stream);
            // Bytes read and bytes written.
            within.push(2.0 * rate(device, &stream, window, half, half, copy)?);
        }
    }
    bar.finish_and_clear();

    let mut report = Report::new("bench_transfer", device.describe(), &COLUMNS);
    for (chunk, rates) in chunks.iter().zip(&rates) {
        let [pageable, registered, huge] = rates.each_ref().map(|rates| json!(Spread::of(rates)));
        report.row([json!(chunk), pageable, registered, huge]);
    }
    let costs = hosts.iter().map(|host| host.seconds_per_gb).collect::<Vec<_>>();
    if let [_, Some(small), Some(huge)] = costs[..] {
        // For the CPU there is nothing to do.
        if small.max(huge) > 1e-6 {
            report.line("registering", format!("{small:.3} s/GB, {huge:.3} s/GB in huge pages"));
        }
        report.field("register_s_per_gb", json!({"registered": small, "huge": huge}));
    }
    let within = (!within.is_empty()).then(|| Spread::of(&within));
    if let Some(within) = within {
        report.line("within", format!("{:.1} GB/s in the device's own memory, read and written", within.median));
    }
    report.field("on_device_read_and_written_gb_s", json!(within));
    let candidates = chunks.iter().zip(&rates).flat_map(|(chunk, rates)| {
        KINDS.iter().zip(rates).filter(|(kind, _)| kind.2).map(move |((name, ..), rates)| {
            let what = format!("the best of the registered columns, copies of {}, {name}", units::bytes(*chunk as u64));
            Figure::new(what, "GB/s", rates)
        })
    });
    let best = candidates.max_by(|a, b| a.spread.median.total_cmp(&b.spread.median));
    report.limit(best.expect("the size is at least that of the smallest copy"));
    report.plot = Some(plot(&chunks, &rates));
    Ok(report)
}

fn plot(chunks: &[usize], rates: &[[Vec<f64>; 3]]) -> Plot {
    let line = |kind: usize| Line {
        name: KINDS[kind].0.to_owned(),
        points: chunks.iter().zip(rates).map(|(&x, rates)| (x as f64, Spread::of(&rates[kind]))).collect(),
    };
    let panel = Panel {
        x: "bytes of a copy",
        y: "GB/s",
        format: |bytes| units::bytes(bytes as u64),
        lines: (0..KINDS.len()).map(line).collect(),
        limit: None,
    };
    Plot { title: "Copies to the device, by size and kind of memory".to_owned(), panels: vec![panel] }
}

impl<D: Device> Host<D> {
    /// Present memory full of random bytes, in pages of that kind as far as the system grants them.
    fn new(device: &D, bytes: usize, pages: Advice, registered: bool) -> Result<Self, Failure> {
        let mut memory = MmapMut::map_anon(bytes)?;
        let _ = memory.advise(pages);
        let mut random = fastrand::Rng::new();
        for word in memory.as_chunks_mut().0 {
            *word = random.u64(..).to_le_bytes();
        }
        let start = Instant::now();
        // SAFETY: the memory lives beside its registration, which is dropped first.
        let registration =
            registered.then(|| unsafe { device.register(memory.as_ptr().cast_mut(), bytes) }).transpose()?;
        let seconds_per_gb = registered.then(|| start.elapsed().as_secs_f64() / bytes as f64 * 1e9);
        Ok(Self { _registration: registration, memory, seconds_per_gb })
    }
}

/// GB/s of copies of `chunk` bytes from place to place in `bytes`, all enqueued and waited for together.
fn rate<D: Device>(
    device: &D,
    stream: &D::Stream,
    window: Duration,
    bytes: usize,
    chunk: usize,
    copy: impl Fn(usize) -> Result<()>,
) -> Result<f64> {
    let round = || (0..bytes / chunk).try_for_each(|index| copy(index * chunk)).and_then(|()| device.drain(stream));
    round()?;
    let (start, mut moved) = (Instant::now(), 0);
    while moved == 0 || start.elapsed() < window {
        round()?;
        moved += bytes / chunk * chunk;
    }
    Ok(moved as f64 / 1e9 / start.elapsed().as_secs_f64())
}

/// There and back again: the bytes must be the same.
fn check<D: Device>(device: &D, stream: &D::Stream, base: DevicePtr, host: &[u8]) -> Result<(), Failure> {
    let (mut back, zeroes) = (vec![0u8; host.len()], vec![0u8; host.len()]);
    // SAFETY: all four are as long as the host's memory, and the stream is drained before they are used again.
    unsafe {
        device.copy_to_device(base, zeroes.as_ptr(), zeroes.len(), stream)?;
        device.copy_to_device(base, host.as_ptr(), host.len(), stream)?;
        device.copy_to_host(back.as_mut_ptr(), base, host.len(), stream)?;
    }
    device.drain(stream)?;
    if back == host { Ok(()) } else { Err("the bytes came back changed".into()) }
}
