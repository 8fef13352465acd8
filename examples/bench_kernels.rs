//! Each kernel: first held against its twin on the CPU on fresh random data, then timed: many launches in a row, between two
//! waits for the device. Kernels that only move memory stand beside the device's own copy, in the same run.
//!
//! Bytes are those that must move, each read or written once; operations are a multiplication and an addition each, of pairs
//! that the causal mask lets through.

#[path = "device/mod.rs"]
mod device;
#[path = "bench/twin.rs"]
mod twin;

use std::time::Instant;

use clap::Parser;
use device::{Chosen, Wanted};
use layer_streamer::{
    DType, Result,
    kernels::{AttentionMask, Kernels, RopeLayout},
};
use twin::{Batch, On, Tensor, off, random};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Check each kernel against its twin on the CPU, then measure it.
#[derive(Parser)]
struct Options {
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Small tensors and short times: that it runs, not how fast
    #[arg(long)]
    quick: bool,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

/// How far a kernel may be from its twin: BF16 rounds to 2⁻⁹ of a value.
const OFF: f64 = 1e-2;

/// One line of the table.
struct Row {
    name: String,
    /// From the twin, where this line was checked.
    off: Option<f64>,
    seconds: f64,
    bytes: usize,
    operations: f64,
}

struct Bench<'a, D: Kernels> {
    on: &'a On<D>,
    rng: fastrand::Rng,
    /// How long one figure takes, in seconds.
    time: f64,
    /// Tensors are this many times smaller than on a GPU.
    divisor: usize,
    rows: Vec<Row>,
}

fn main() {
    let options = Options::parse();
    let outcome = device::choose(options.device).map_err(Failure::from).and_then(|chosen| match chosen {
        Chosen::Cpu(device) => run(&device, &options, 64),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &options, 1),
    });
    if let Err(error) = outcome {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run<D: Kernels>(device: &D, options: &Options, divisor: usize) -> Result<(), Failure> {
    let on = On::new(device)?;
    let (time, divisor) = if options.quick { (0.01, divisor.max(64)) } else { (0.1, divisor) };
    let mut bench = Bench { on: &on, rng: fastrand::Rng::new(), time, divisor, rows: Vec::new() };
    if !options.json {
        println!("{}", device.describe());
        println!("{:50} {:>9} {:>11} {:>9} {:>8} {:>9}", "kernel", "off", "time", "GB/s", "of copy", "TFLOP/s");
    }
    let copy = bench.copy()?;
    bench.print(copy, options.json);
    for part in [Bench::casts, Bench::rows_of_the_residual, Bench::activations, Bench::products, Bench::attention] {
        let first = bench.rows.len();
        part(&mut bench)?;
        (!options.json).then(|| bench.rows[first..].iter().for_each(|row| row.print(copy)));
    }
    if options.json {
        let rows: Vec<_> = bench.rows.iter().map(|row| row.json(copy)).collect();
        println!("{}", serde_json::json!({ "device": device.describe(), "copy_gb_s": copy, "kernels": rows }));
    }
    let wrong: Vec<_> =
        bench.rows.iter().filter(|row| row.off.is_some_and(|off| off > OFF)).map(|row| &row.name).collect();
    if wrong.is_empty() { Ok(()) } else { Err(format!("further than {OFF} from the twin: {wrong:?}").into()) }
}

impl Row {
    fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }

    fn print(&self, copy: f64) {
        let off = self.off.map_or("".into(), |off| format!("{off:.1e}"));
        let tera = self.operations / self.seconds / 1e12;
        let tera = if self.operations > 0.0 { format!("{tera:.2}") } else { String::new() };
        let (rate, micros) = (self.rate(), self.seconds * 1e6);
        println!("{:50} {off:>9} {micros:>8.1} µs {rate:>9.1} {:>8.2} {tera:>9}", self.name, rate / copy);
    }

    fn json(&self, copy: f64) -> serde_json::Value {
        serde_json::json!({
            "kernel": self.name, "off": self.off, "seconds": self.seconds, "bytes": self.bytes, "gb_s": self.rate(),
            "of_copy": self.rate() / copy, "tflop_s": self.operations / self.seconds / 1e12,
        })
    }
}

impl<D: Kernels> Bench<'_, D> {
    fn print(&self, copy: f64, json: bool) {
        if !json {
            println!("{:50} {:>9} {:>11} {copy:>9.1} {:>8.2}", "copy on the device", "", "", 1.0);
        }
    }

    /// Seconds of one launch. `launch` is given its number, so that it may use other memory each time.
    fn seconds(&self, mut launch: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let On { device, stream } = self.on;
        // Warm, and long enough for a guess at how many to enqueue.
        let mut of_some = |count: usize| -> Result<f64> {
            device.drain(stream)?;
            let start = Instant::now();
            (0..count).try_for_each(&mut launch)?;
            device.drain(stream)?;
            Ok(start.elapsed().as_secs_f64() / count as f64)
        };
        of_some(1)?;
        let guess = of_some(2)?;
        of_some(((self.time / guess) as usize).clamp(2, 10_000))
    }

    fn record(
        &mut self,
        name: String,
        off: Option<f64>,
        bytes: usize,
        operations: f64,
        launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let seconds = self.seconds(launch)?;
        self.rows.push(Row { name, off, seconds, bytes, operations });
        Ok(())
    }

    /// A large dimension, smaller where the device is slow.
    fn many(&self, count: usize) -> usize {
        (count / self.divisor).max(1)
    }

    /// A tensor of random values, some of them over and over: to make all anew would take longer than the kernels.
    fn fill(&mut self, dtype: DType, shape: &[usize]) -> Result<Tensor<D>> {
        let some = random(&mut self.rng, shape.iter().product::<usize>().clamp(1, 1 << 18));
        self.on.repeated(dtype, shape, &some)
    }

    /// GB/s of a copy within the device, read and written bytes together.
    fn copy(&mut self) -> Result<f64> {
        let count = self.many(128 << 20);
        let (from, mut to) = (self.fill(DType::F32, &[count])?, self.on.empty(DType::F32, &[count])?);
        let seconds = self.seconds(|_| self.on.device.cast(&self.on.stream, from.get(), to.out()))?;
        Ok(2.0 * from.bytes() as f64 / seconds / 1e9)
    }

    fn casts(&mut self) -> Result<()> {
        let (here, count) = (self.on, self.many(128 << 20));
        let pairs = [
            (DType::F32, DType::BF16),
            (DType::F16, DType::BF16),
            (DType::F8E4M3, DType::BF16),
            (DType::BF16, DType::F32),
        ];
        for (from, to) in pairs {
            let bytes: Vec<u8> = (0..99_999).map(|_| self.rng.u8(..)).collect();
            let elements = bytes.len() / from.size();
            let both = on_both!(here, |on| {
                let raw = on.tensor(&[bytes.len()], &bytes)?;
                let mut out = on.empty(to, &[elements])?;
                on.device.cast(&on.stream, raw.cast(from, &[elements]), out.out())?;
                on.read(&out)?
            });
            let (x, mut out) = (here.empty(from, &[count])?, here.empty(to, &[count])?);
            let moved = x.bytes() + out.bytes();
            self.record(format!("cast {from} to {to}, {count}"), Some(off(&both.0, &both.1)), moved, 0.0, |_| {
                here.device.cast(&here.stream, x.get(), out.out())
            })?;
        }
        Ok(())
    }

    fn rows_of_the_residual(&mut self) -> Result<()> {
        let (here, rows) = (self.on, self.many(32_768));
        let activation = here.device.precision().activation;
        for hidden in [896, 3584, 8192] {
            let few = 33;
            let (values, weights, added) = (
                random(&mut self.rng, few * hidden),
                random(&mut self.rng, hidden),
                random(&mut self.rng, few * hidden),
            );
            let both = on_both!(here, |on| {
                let (mut x, y) =
                    (on.values(DType::F32, &[few, hidden], &values)?, on.activation(&[few, hidden], &added)?);
                let weight = on.weight(&[hidden], &weights)?;
                let mut out = on.empty(on.device.precision().activation, &[few, hidden])?;
                on.device.rms_norm(&on.stream, x.get(), weight.get(), 1e-6, out.out())?;
                let mut found = on.read(&out)?;
                on.device.add_rms_norm(&on.stream, x.out(), y.get(), weight.get(), 1e-6, out.out())?;
                found.extend(on.read(&out)?);
                found
            });
            let checked = Some(off(&both.0, &both.1));
            let shape = [rows, hidden];
            let (mut x, y) = (self.fill(DType::F32, &shape)?, self.fill(activation, &shape)?);
            let (weight, mut out) = (here.weight(&[hidden], &weights)?, here.empty(activation, &shape)?);
            let moved = x.bytes() + out.bytes();
            self.record(format!("rms_norm [{rows}, {hidden}]"), checked, moved, 0.0, |_| {
                here.device.rms_norm(&here.stream, x.get(), weight.get(), 1e-6, out.out())
            })?;
            let moved = 2 * x.bytes() + y.bytes() + out.bytes();
            self.record(format!("add_rms_norm [{rows}, {hidden}]"), checked, moved, 0.0, |_| {
                here.device.add_rms_norm(&here.stream, x.out(), y.get(), weight.get(), 1e-6, out.out())
            })?;
            let moved = 2 * x.bytes() + y.bytes();
            self.record(format!("add [{rows}, {hidden}]"), None, moved, 0.0, |_| {
                here.device.add(&here.stream, x.out(), y.get())
            })?;
        }
        Ok(())
    }

    fn activations(&mut self) -> Result<()> {
        let (here, tokens, few) = (self.on, self.many(32_768), 9);
        let activation = here.device.precision().activation;
        let size = 128;
        let inv_freq: Vec<f32> = (0..size / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / size as f32)).collect();
        for (heads, layout) in [(28, RopeLayout::Halves), (4, RopeLayout::Halves), (28, RopeLayout::Interleaved)] {
            let values = random(&mut self.rng, few * heads * size);
            let positions: Vec<u32> = (0..tokens.max(few)).map(|_| self.rng.u32(..32_768)).collect();
            let both = on_both!(here, |on| {
                let shape = [few, heads, size];
                let (x, mut out) =
                    (on.values(DType::F32, &shape, &values)?, on.empty(on.device.precision().activation, &shape)?);
                let (at, frequencies) = (on.tensor(&[few], &positions[..few])?, on.tensor(&[size / 2], &inv_freq)?);
                on.device.rope(&on.stream, x.get(), at.get(), frequencies.get(), layout, out.out())?;
                on.read(&out)?
            });
            let shape = [tokens, heads, size];
            let (x, mut out) = (self.fill(DType::F32, &shape)?, here.empty(activation, &shape)?);
            let (at, frequencies) =
                (here.tensor(&[tokens], &positions[..tokens])?, here.tensor(&[size / 2], &inv_freq)?);
            let moved = x.bytes() + out.bytes();
            let name = format!("rope [{tokens}, {heads}, {size}], {layout:?}");
            self.record(name, Some(off(&both.0, &both.1)), moved, 0.0, |_| {
                here.device.rope(&here.stream, x.get(), at.get(), frequencies.get(), layout, out.out())
            })?;
        }
        let rows = tokens * 28;
        let weight = self.fill(DType::BF16, &[size])?;
        let mut x = self.fill(DType::F32, &[rows, size])?;
        self.record(format!("rms_norm_in_place [{rows}, {size}]"), None, 2 * x.bytes(), 0.0, |_| {
            here.device.rms_norm_in_place(&here.stream, x.out(), weight.get(), 1e-6)
        })?;

        let (rows, ffn) = (self.many(8192), 18_944);
        let (gates, ups) = (random(&mut self.rng, few * ffn), random(&mut self.rng, few * ffn));
        let both = on_both!(here, |on| {
            let (mut gate, up) = (on.activation(&[few, ffn], &gates)?, on.activation(&[few, ffn], &ups)?);
            on.device.swiglu(&on.stream, gate.out(), up.get())?;
            on.read(&gate)?
        });
        let (mut gate, up) = (self.fill(activation, &[rows, ffn])?, self.fill(activation, &[rows, ffn])?);
        let moved = 3 * gate.bytes();
        self.record(format!("swiglu [{rows}, {ffn}]"), Some(off(&both.0, &both.1)), moved, 0.0, |_| {
            here.device.swiglu(&here.stream, gate.out(), up.get())
        })?;

        let vocab = 152_064;
        let (x, mut best) = (self.fill(DType::F32, &[16, vocab])?, here.empty(DType::U32, &[16])?);
        self.record(format!("argmax [16, {vocab}]"), None, x.bytes(), 0.0, |_| {
            here.device.argmax(&here.stream, x.get(), best.out())
        })
    }

    fn products(&mut self) -> Result<()> {
        let here = self.on;
        let activation = here.device.precision().activation;
        let (tokens, k, n) = (33, 257, 129);
        let (values, weights, biases) =
            (random(&mut self.rng, tokens * k), random(&mut self.rng, n * k), random(&mut self.rng, n));
        let both = on_both!(here, |on| {
            let (x, weight) = (on.activation(&[tokens, k], &values)?, on.weight(&[n, k], &weights)?);
            let (bias, mut out) =
                (on.weight(&[n], &biases)?, on.empty(on.device.precision().activation, &[tokens, n])?);
            on.device.linear(&on.stream, x.get(), weight.get(), Some(bias.get()), out.out())?;
            on.read(&out)?
        });
        let checked = Some(off(&both.0, &both.1));
        let (k, n, vocab) = (self.many(3584 * 8) / 8, self.many(18_944 * 8) / 8, self.many(152_064 * 8) / 8);
        for (tokens, n, to) in [(256, n, activation), (16, n, activation), (1, n, activation), (1, vocab, DType::F32)] {
            let (k, n) = (k.max(8), n.max(8));
            let (x, weight) = (self.fill(activation, &[tokens, k])?, self.fill(DType::BF16, &[n, k])?);
            let mut out = here.empty(to, &[tokens, n])?;
            let (moved, operations) = (x.bytes() + weight.bytes() + out.bytes(), 2.0 * (tokens * k * n) as f64);
            self.record(
                format!("linear [{tokens}, {k}] · [{n}, {k}]ᵀ to {to}"),
                checked,
                moved,
                operations,
                |_| here.device.linear(&here.stream, x.get(), weight.get(), None, out.out()),
            )?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        const HEADS: usize = 28;
        const GROUPS: usize = 4;
        const SIZE: usize = 128;
        let here = self.on;
        let activation = here.device.precision().activation;
        let mask = AttentionMask { scale: (SIZE as f32).powf(-0.5), window: None };
        // A cache that no other memory of the device is large enough to keep, used row by row.
        let pool = self.many(1 << 29);
        let contexts = [1 << 10, 4 << 10, 8 << 10].map(|context| (0, context));
        let decodes = [4 << 10, 32 << 10, 128 << 10].map(|context| (context - 1, 1));
        for (before, new) in contexts.into_iter().chain(decodes) {
            let (before, new) = (before / self.divisor.min(64), (new / self.divisor.min(64)).max(1));
            let capacity = before + new;
            // Held against the twin with a short context, where it is prefill, and with one that is split, where it is not.
            let past = if new == 1 { before.min(3000) } else { 100 };
            let short = Batch { lengths: vec![(past, new.min(130))], rows: vec![0] };
            let shape = [1, GROUPS, past + 130, SIZE];
            let [keys, values] = [(); 2].map(|()| random(&mut self.rng, shape.iter().product()));
            let queries = random(&mut self.rng, short.tokens() * HEADS * SIZE);
            let both = on_both!(here, |on| {
                let [keys, values] = [on.cache(&shape, &keys)?, on.cache(&shape, &values)?];
                let (of, q) = (short.on(on)?, on.activation(&[short.tokens(), HEADS, SIZE], &queries)?);
                let mut out = on.empty(on.device.precision().activation, &[short.tokens(), HEADS, SIZE])?;
                on.device.attention(&on.stream, q.get(), keys.get(), values.get(), of.get(), mask, out.out())?;
                on.read(&out)?
            });
            let rows = (pool / (2 * GROUPS * capacity * SIZE * here.device.precision().cache.size())).clamp(1, 256);
            let shape = [rows, GROUPS, capacity, SIZE];
            let cache_type = here.device.precision().cache;
            let (keys, values) = (self.fill(cache_type, &shape)?, self.fill(cache_type, &shape)?);
            let q = self.fill(activation, &[new, HEADS, SIZE])?;
            let mut out = here.empty(activation, &[new, HEADS, SIZE])?;
            let batches: Vec<_> = (0..rows)
                .map(|row| Batch { lengths: vec![(before, new)], rows: vec![row as u32] }.on(here))
                .collect::<Result<_>>()?;
            let cached = 2 * GROUPS * capacity * SIZE * cache_type.size();
            let pairs = new * before + new * (new + 1) / 2;
            let (moved, operations) = (cached + q.bytes() + out.bytes(), 4.0 * (pairs * HEADS * SIZE) as f64);
            let what = if new == 1 { format!("decode, context {capacity}") } else { format!("prefill, {new} tokens") };
            let name = format!("attention {HEADS}/{GROUPS} heads of {SIZE}, {what}");
            self.record(name, Some(off(&both.0, &both.1)), moved, operations, |number| {
                let of = batches[number % rows].get();
                here.device.attention(&here.stream, q.get(), keys.get(), values.get(), of, mask, out.out())
            })?;
        }
        Ok(())
    }
}
