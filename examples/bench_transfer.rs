//! What the link between host and device gives: copies to the device from pageable, registered and huge-page memory by the
//! size of a copy, what registering costs, and how fast the device copies within its own memory.
//!
//! The streamer cannot beat the best figure of the registered rows; how far a smaller copy falls behind says how small the
//! tensors may be before it pays to move them together.

#[path = "device/mod.rs"]
mod device;

use std::time::{Duration, Instant};

use clap::Parser;
use device::{Chosen, Wanted};
use layer_streamer::{
    Result,
    device::{Device, DevicePtr},
};
use memmap2::{Advice, MmapMut};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measure copies from host to device, and within the device.
#[derive(Parser)]
struct Options {
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Memory on either side, in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    size: u64,
    /// Seconds for each figure
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

/// 64 KiB to 256 MiB.
const CHUNKS: [usize; 7] = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

fn main() {
    let options = Options::parse();
    let outcome = device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, &options, None),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => {
            // SAFETY: `run` gives two halves of its own memory, and drains the stream before it ends.
            let copy = |to, from, bytes, stream: &_| unsafe { device.copy_on_device(to, from, bytes, stream) };
            run(&device, &options, Some(&copy))
        }
    });
    if let Err(error) = outcome {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

/// A copy within the device: to, from, bytes, stream.
type CopyOnDevice<'a, D> = &'a dyn Fn(DevicePtr, DevicePtr, usize, &<D as Device>::Stream) -> Result<()>;

fn run<D: Device>(device: &D, options: &Options, on_device: Option<CopyOnDevice<'_, D>>) -> Result<(), Failure> {
    let bytes = (options.size as usize) << 20;
    let seconds = Duration::try_from_secs_f64(options.seconds)?;
    let stream = device.stream()?;
    let memory = device.allocate("the target of the copies", bytes)?;
    let base = device.address(&memory);
    if !options.json {
        println!("{}", device.describe());
        println!("{:<28}{}", "GB/s to the device by size", CHUNKS.map(|chunk| format!("{:>10}", size(chunk))).concat());
    }
    let mut rows = Vec::new();
    for (name, pages, registered) in [
        ("pageable", Advice::NoHugePage, false),
        ("registered", Advice::NoHugePage, true),
        ("registered, huge pages", Advice::HugePage, true),
    ] {
        let host = host_memory(bytes, pages)?;
        let start = Instant::now();
        // SAFETY: declared after the memory, and so dropped before it.
        let registration =
            registered.then(|| unsafe { device.register(host.as_ptr().cast_mut(), bytes) }).transpose()?;
        let register_s_per_gib = registered.then(|| start.elapsed().as_secs_f64() / bytes as f64 * f64::from(1 << 30));
        check(device, &stream, base, &host)?;
        let mut rates = Vec::new();
        for chunk in CHUNKS.into_iter().filter(|chunk| *chunk <= bytes) {
            // SAFETY: both sides are `bytes` long, and stay until the stream is drained.
            let copy =
                |at: usize| unsafe { device.copy_to_device(base.offset(at), host.as_ptr().add(at), chunk, &stream) };
            rates.push((chunk, rate(device, &stream, seconds, bytes, chunk, copy)?));
        }
        drop(registration);
        if !options.json {
            let cost = register_s_per_gib.map(|cost| format!("   registered in {cost:.3} s/GiB")).unwrap_or_default();
            println!("{name:<28}{}{cost}", rates.iter().map(|(_, rate)| format!("{rate:>10.2}")).collect::<String>());
        }
        let rates: Vec<_> =
            rates.iter().map(|(chunk, rate)| serde_json::json!({"bytes": chunk, "gb_s": rate})).collect();
        rows.push(serde_json::json!({"memory": name, "copies": rates, "register_s_per_gib": register_s_per_gib}));
    }
    let mut within = None;
    if let Some(copy) = on_device {
        let half = bytes / 2;
        let copy = |_| copy(base.offset(half), base, half, &stream);
        // Bytes read and bytes written.
        within = Some(2.0 * rate(device, &stream, seconds, half, half, copy)?);
    }
    if options.json {
        println!(
            "{}",
            serde_json::json!({"device": device.describe(), "to_device": rows, "on_device_read_and_written_gb_s": within})
        );
    } else if let Some(rate) = within {
        println!("within the device            {rate:>10.2} GB/s, read and written");
    }
    Ok(())
}

/// GB/s of copies of `chunk` bytes from place to place in `bytes`, all enqueued and waited for together.
fn rate<D: Device>(
    device: &D,
    stream: &D::Stream,
    seconds: Duration,
    bytes: usize,
    chunk: usize,
    copy: impl Fn(usize) -> Result<()>,
) -> Result<f64> {
    let round = || (0..bytes / chunk).try_for_each(|index| copy(index * chunk)).and_then(|()| device.drain(stream));
    round()?;
    let (start, mut moved) = (Instant::now(), 0);
    while moved == 0 || start.elapsed() < seconds {
        round()?;
        moved += bytes / chunk * chunk;
    }
    Ok(moved as f64 / 1e9 / start.elapsed().as_secs_f64())
}

/// Present memory full of random bytes, in pages of that kind as far as the system grants them.
fn host_memory(bytes: usize, pages: Advice) -> Result<MmapMut, Failure> {
    let mut map = MmapMut::map_anon(bytes)?;
    let _ = map.advise(pages);
    let mut random = fastrand::Rng::new();
    for word in map.as_chunks_mut().0 {
        *word = random.u64(..).to_le_bytes();
    }
    Ok(map)
}

/// There and back again: the bytes must be the same.
fn check<D: Device>(device: &D, stream: &D::Stream, base: DevicePtr, host: &[u8]) -> Result<(), Failure> {
    let mut back = vec![0u8; host.len()];
    // SAFETY: all three are as long as the host's memory, and the stream is drained before they are used again.
    unsafe {
        device.zero(base, host.len(), stream)?;
        device.copy_to_device(base, host.as_ptr(), host.len(), stream)?;
        device.copy_to_host(back.as_mut_ptr(), base, host.len(), stream)?;
    }
    device.drain(stream)?;
    if back == host { Ok(()) } else { Err("the bytes came back changed".into()) }
}

fn size(bytes: usize) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}
