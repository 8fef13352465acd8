//! Each kernel: first held against its twin on the CPU on fresh random data, then timed: many launches in a row, between two
//! waits for the device. Kernels that only move memory stand beside the device's own copy, in the same run.
//!
//! Bytes are those that must move, each read or written once; operations are a multiplication and an addition each, of pairs
//! that the causal mask lets through.

#[path = "bench/dequantising.rs"]
mod dequantising;
#[path = "../cli/src/device.rs"]
mod device;
#[path = "bench/expansion.rs"]
mod expansion;
#[path = "bench/kernel_row.rs"]
mod kernel_row;
#[path = "bench/processors.rs"]
mod processors;
#[path = "bench/report/mod.rs"]
mod report;
#[path = "bench/twin.rs"]
mod twin;
#[path = "bench/unpacking.rs"]
mod unpacking;

use std::{process::ExitCode, time::Instant};

use clap::Parser;
use device::{Chosen, Wanted};
use indicatif::ProgressBar;
use kernel_row::{COLUMNS, Row};
use layer_streamer::{
    DType, Result,
    kernels::{AttentionMask, Kernels, PAGE, RopeLayout},
};
use processors::Processors;
use report::{Common, Failure, Figure, Line, Panel, Plot, PlotTo, Report, Spread, by_default};
use twin::{Batch, On, Tensor, off, random};

/// Check each kernel against its twin on the CPU, then measure it.
#[derive(Parser)]
#[command(mut_arg("window", by_default("0.05")), mut_arg("rounds", by_default("3")))]
#[command(after_help = "\
Examples:
  bench_kernels                                   every kernel, beside a copy within the device
  bench_kernels --plot attention.svg              decoding and prompts over the length of the context
  bench_kernels --small --window 0.01             that they run and are right, not how fast; for sanitizers
  bench_kernels --json | jq '.rows[] | select(.tflop_s) | {kernel, tflop_s}'")]
struct Options {
    /// cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,
    /// Tensors 64 times smaller, as on the CPU: that it runs, not how fast
    #[arg(long)]
    small: bool,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    plot: PlotTo,
}

/// Rows of the table besides those of expansion, dequantising and unpacking, for the progress bar.
const ROWS: u64 = 39;

/// How far a kernel may be from its twin: BF16 rounds to 2⁻⁹ of a value.
const OFF: f64 = 1e-2;

struct Bench<'a, D: Kernels> {
    on: &'a On<D>,
    rng: fastrand::Rng,
    /// How long one figure takes, in seconds.
    time: f64,
    rounds: u32,
    /// Tensors are this many times smaller than on a GPU.
    divisor: usize,
    /// Weights are; on the CPU, too, they must not fit into a cache.
    weights_divisor: usize,
    /// On the CPU.
    processors: Option<Processors>,
    /// What is copied to compare with.
    copied: [Tensor<D>; 2],
    rows: Vec<Row>,
    bar: ProgressBar,
}

fn main() -> ExitCode {
    let options = Options::parse();
    report::run(&options.common, Some(&options.plot), || match device::choose(options.device)? {
        Chosen::Cpu(device) => {
            run(&device, &options, [64, if options.small { 64 } else { 2 }], Some(Processors::new()))
        }
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run(&device, &options, [if options.small { 64 } else { 1 }; 2], None),
    })
}

fn run<D: Kernels>(
    device: &D,
    options: &Options,
    [divisor, weights_divisor]: [usize; 2],
    processors: Option<Processors>,
) -> Result<Report, Failure> {
    let on = On::new(device)?;
    let count = (128 << 20) / divisor;
    let mut rng = fastrand::Rng::new();
    let copied = [on.repeated(DType::F32, &[count], &random(&mut rng, 1 << 18))?, on.empty(DType::F32, &[count])?];
    let (time, rounds) = (options.common.window.as_secs_f64(), options.common.rounds);
    let more = expansion::TYPES.len() as u64 + dequantising::rows(device) + unpacking::rows(device);
    let bar = report::progress((ROWS + more) * u64::from(rounds), &options.common)?;
    let rows = Vec::new();
    let mut bench = Bench { on: &on, rng, time, rounds, divisor, weights_divisor, processors, copied, rows, bar };
    let weights = [Bench::casts, Bench::expansion, Bench::dequantising, Bench::unpacking];
    let others = [Bench::rows_of_the_residual, Bench::activations, Bench::products, Bench::attention];
    for part in weights.into_iter().chain(others) {
        part(&mut bench)?;
    }
    bench.bar.finish_and_clear();
    let rows = bench.rows;

    let mut report = Report::new("bench_kernels", device.describe(), &COLUMNS);
    rows.iter().for_each(|row| report.row(row.cells()));
    let moving = || rows.iter().filter(|row| row.moves());
    let copies: Vec<_> = rows.iter().flat_map(|row| row.copies.iter().copied()).collect();
    let ratios: Vec<_> = moving().map(|row| Spread::of(&row.of_copy()).median).collect();
    report.compare(
        Figure::new(
            "casts, norms, rope, gates, scale and soft_cap, which only move memory",
            "GB/s",
            &moving().flat_map(Row::rates).collect::<Vec<_>>(),
        ),
        Figure::new("a copy within the device, read and written bytes together", "GB/s", &copies),
        "kernels that only move memory / a copy, kernel by kernel",
        &ratios,
    );
    report.plot = Some(plot(&rows, Spread::of(&copies).median));
    let wrong: Vec<_> = rows.iter().filter(|row| row.off.is_some_and(|off| off > OFF)).collect();
    let wrong: Vec<_> = wrong.iter().map(|row| format!("{} {}", row.kernel, row.shape)).collect();
    report.failed = (!wrong.is_empty()).then(|| format!("further than {OFF} from the twin: {}", wrong.join(", ")));
    Ok(report)
}

/// Attention over the length of the context.
fn plot(rows: &[Row], copy: f64) -> Plot {
    let points = |prefill: bool, values: fn(&Row) -> Vec<f64>| -> Vec<_> {
        let found = rows.iter().filter_map(|row| Some((row, row.tokens?)));
        let found = found.filter(|(_, (_, new))| (*new > 1) == prefill);
        found.map(|(row, (before, new))| ((before + new) as f64, Spread::of(&values(row)))).collect()
    };
    let panel = |y, name: &str, points, limit| Panel {
        x: "tokens of context",
        y,
        format: |tokens| format!("{tokens}"),
        lines: vec![Line { name: name.to_owned(), points }],
        limit,
    };
    let decoding =
        panel("GB/s of KV cache", "decoding", points(false, Row::rates), Some(("limit: a copy".to_owned(), copy)));
    let prompts = panel("TFLOP/s", "prompts", points(true, Row::tera), None);
    Plot { title: "Attention over the length of the context".to_owned(), panels: vec![decoding, prompts] }
}

/// Seconds of one launch, of as many as take about `time`. `launch` is given its number, so that it may use other memory each time.
fn seconds<D: Kernels>(on: &On<D>, time: f64, mut launch: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let On { device, stream } = on;
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
    of_some(((time / guess) as usize).clamp(2, 10_000))
}

/// The gate by its name.
fn gated<D: Kernels>(on: &On<D>, name: &str, gate: &mut Tensor<D>, up: &Tensor<D>) -> Result<()> {
    match name {
        "swiglu" => on.device.swiglu(&on.stream, gate.out(), up.get()),
        _ => on.device.geglu(&on.stream, gate.out(), up.get()),
    }
}

impl<D: Kernels> Bench<'_, D> {
    /// Measures a kernel and a copy in turn.
    fn record(&mut self, mut row: Row, mut launch: impl FnMut(usize) -> Result<()>) -> Result<()> {
        let [from, to] = &mut self.copied;
        self.bar.set_message(row.kernel);
        for _ in 0..self.rounds {
            row.seconds.push(seconds(self.on, self.time, &mut launch)?);
            let copy = |_| self.on.device.cast(&self.on.stream, from.get(), to.out());
            row.copies.push(2.0 * from.bytes() as f64 / seconds(self.on, self.time, copy)? / 1e9);
            row.limits.extend(self.processors.as_ref().map(Processors::measure));
            self.bar.inc(1);
        }
        self.rows.push(row);
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
            let shape = format!("{from} to {to}, [{count}]");
            self.record(Row::new("cast", shape, Some(off(&both.0, &both.1)), moved), |_| {
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
                on.device.rms_norm(&on.stream, x.get(), weight.get(), 0.0, 1e-6, out.out())?;
                let mut found = on.read(&out)?;
                on.device.add_rms_norm(&on.stream, x.out(), y.get(), weight.get(), 0.0, 1e-6, out.out())?;
                found.extend(on.read(&out)?);
                found
            });
            let checked = Some(off(&both.0, &both.1));
            let shape = [rows, hidden];
            let (mut x, y) = (self.fill(DType::F32, &shape)?, self.fill(activation, &shape)?);
            let (weight, mut out) = (here.weight(&[hidden], &weights)?, here.empty(activation, &shape)?);
            let moved = x.bytes() + out.bytes();
            self.record(Row::new("rms_norm", format!("[{rows}, {hidden}]"), checked, moved), |_| {
                here.device.rms_norm(&here.stream, x.get(), weight.get(), 0.0, 1e-6, out.out())
            })?;
            let moved = 2 * x.bytes() + y.bytes() + out.bytes();
            self.record(Row::new("add_rms_norm", format!("[{rows}, {hidden}]"), checked, moved), |_| {
                here.device.add_rms_norm(&here.stream, x.out(), y.get(), weight.get(), 0.0, 1e-6, out.out())
            })?;
            let moved = 2 * x.bytes() + y.bytes();
            self.record(Row::new("add", format!("[{rows}, {hidden}]"), None, moved), |_| {
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
                on.device.rope(&on.stream, x.get(), at.get(), frequencies.get(), 1.0, layout, out.out())?;
                on.read(&out)?
            });
            let shape = [tokens, heads, size];
            let (x, mut out) = (self.fill(DType::F32, &shape)?, here.empty(activation, &shape)?);
            let (at, frequencies) =
                (here.tensor(&[tokens], &positions[..tokens])?, here.tensor(&[size / 2], &inv_freq)?);
            let moved = x.bytes() + out.bytes();
            let shape = format!("[{tokens}, {heads}, {size}], {layout:?}");
            self.record(Row::new("rope", shape, Some(off(&both.0, &both.1)), moved), |_| {
                here.device.rope(&here.stream, x.get(), at.get(), frequencies.get(), 1.0, layout, out.out())
            })?;
        }
        // Each head by itself, and all of a token's together.
        for (rows, size) in [(tokens * 28, size), (tokens, 28 * size)] {
            // Factors of one: by smaller ones the launches would make subnormal numbers, with which some processors are slow.
            let weight = here.repeated(DType::BF16, &[size], &[1.0, -1.0].repeat(size / 2))?;
            let mut x = self.fill(DType::F32, &[rows, size])?;
            let row = Row::new("rms_norm_in_place", format!("[{rows}, {size}]"), None, 2 * x.bytes());
            self.record(row, |_| here.device.rms_norm_in_place(&here.stream, x.out(), weight.get(), 0.0, 1e-6))?;
        }

        let (rows, ffn) = (self.many(8192), 18_944);
        let (gates, ups) = (random(&mut self.rng, few * ffn), random(&mut self.rng, few * ffn));
        for name in ["swiglu", "geglu"] {
            let both = on_both!(here, |on| {
                let (mut gate, up) = (on.activation(&[few, ffn], &gates)?, on.activation(&[few, ffn], &ups)?);
                gated(on, name, &mut gate, &up)?;
                on.read(&gate)?
            });
            // Numbers that stay as they are, however often they go through the gate.
            let (shape, ones) = ([rows, ffn], [1.0; 1 << 15]);
            let large: Vec<f32> = random(&mut self.rng, 1 << 18).iter().map(|x| 30.0 + 10.0 * x).collect();
            let (mut gate, up) =
                (here.repeated(activation, &shape, &large)?, here.repeated(activation, &shape, &ones)?);
            let moved = 3 * gate.bytes();
            let row = Row::new(name, format!("[{rows}, {ffn}]"), Some(off(&both.0, &both.1)), moved);
            self.record(row, |_| gated(here, name, &mut gate, &up))?;
        }
        self.in_place(few)?;

        let vocab = 152_064;
        let (x, mut best) = (self.fill(DType::F32, &[16, vocab])?, here.empty(DType::U32, &[16])?);
        self.record(Row::new("argmax", format!("[16, {vocab}]"), None, x.bytes()), |_| {
            here.device.argmax(&here.stream, x.get(), best.out())
        })
    }

    /// A factor and a soft cap, of logits.
    fn in_place(&mut self, few: usize) -> Result<()> {
        let (here, rows, width) = (self.on, self.many(512), 152_064);
        let values: Vec<f32> = random(&mut self.rng, few * width).iter().map(|x| x * 40.0).collect();
        let both = on_both!(here, |on| {
            let mut x = on.values(DType::F32, &[few, width], &values)?;
            on.device.scale(&on.stream, x.out(), 1.5)?;
            on.device.soft_cap(&on.stream, x.out(), 30.0)?;
            on.read(&x)?
        });
        let checked = Some(off(&both.0, &both.1));
        let mut x = self.fill(DType::F32, &[rows, width])?;
        let (shape, moved) = (format!("[{rows}, {width}]"), 2 * x.bytes());
        self.record(Row::new("scale", shape.clone(), checked, moved), |_| {
            here.device.scale(&here.stream, x.out(), -1.0)
        })?;
        self.record(Row::new("soft_cap", shape, checked, moved), |_| here.device.soft_cap(&here.stream, x.out(), 30.0))
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
        // On the CPU fewer rows, not shorter ones.
        let [k, n, vocab] = match self.weights_divisor {
            1 | 2 => [3584, 18_944 / self.weights_divisor, 152_064 / self.weights_divisor.pow(3)],
            divisor => [3584 / divisor, 18_944 / divisor, 152_064 / divisor],
        };
        for (tokens, n, to) in [(256, n, activation), (16, n, activation), (1, n, activation), (1, vocab, DType::F32)] {
            let (x, weight) = (self.fill(activation, &[tokens, k])?, self.fill(DType::BF16, &[n, k])?);
            let mut out = here.empty(to, &[tokens, n])?;
            let (moved, operations) = (x.bytes() + weight.bytes() + out.bytes(), 2.0 * (tokens * k * n) as f64);
            let row = Row::new("linear", format!("[{tokens}, {k}] · [{n}, {k}]ᵀ to {to}"), checked, moved);
            self.record(Row { operations, ..row }, |_| {
                here.device.linear(&here.stream, x.get(), weight.get(), None, out.out())
            })?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        const LARGE: [usize; 3] = [28, 4, 128];
        let divisor = self.divisor.min(64);
        let contexts = [1 << 10, 2 << 10, 4 << 10, 8 << 10].map(|context| (0, context / divisor));
        let decodes = [4 << 10, 8 << 10, 32 << 10, 128 << 10].map(|context| ((context - 1) / divisor, 1));
        for (before, new) in contexts.into_iter().chain(decodes) {
            self.attention_of(LARGE, (before, new), None, Some((before, new)))?;
        }
        // What a soft cap costs, beside two of these.
        for lengths in [contexts[3], decodes[2]] {
            self.attention_of(LARGE, lengths, Some(50.0), None)?;
        }
        // A small model's, with few heads to share among threads, at contexts that are long on the CPU too.
        let divisor = if self.weights_divisor > 2 { 64 } else { 1 };
        for lengths in [(0, 2048 / divisor), (8191 / divisor, 1)] {
            self.attention_of([14, 2, 64], lengths, None, None)?;
        }
        Ok(())
    }

    /// Some tokens of one sequence after others, and how the plot has them, if it does.
    fn attention_of(
        &mut self,
        [heads, groups, size]: [usize; 3],
        (before, new): (usize, usize),
        soft_cap: Option<f32>,
        tokens: Option<(usize, usize)>,
    ) -> Result<()> {
        let here = self.on;
        let activation = here.device.precision().activation;
        // A cache that no other memory of the device is large enough to keep, used sequence by sequence.
        let pool = self.many(1 << 29);
        let mask = AttentionMask { scale: (size as f32).powf(-0.5), window: None, soft_cap };
        let capacity = before + new;
        // Held against the twin with a short context, where it is prefill, and with one that is split, where it is not.
        let past = if new == 1 { before.min(3000) } else { 100 };
        let short = Batch::scattered(vec![(past, new.min(130))], &mut self.rng);
        let shape = [short.cache_pages(), groups, PAGE, size];
        let [keys, values] = [(); 2].map(|()| random(&mut self.rng, shape.iter().product()));
        let queries = random(&mut self.rng, short.tokens() * heads * size);
        let both = on_both!(here, |on| {
            let [keys, values] = [on.cache(&shape, &keys)?, on.cache(&shape, &values)?];
            let (of, q) = (short.on(on)?, on.activation(&[short.tokens(), heads, size], &queries)?);
            let mut out = on.empty(on.device.precision().activation, &[short.tokens(), heads, size])?;
            on.device.attention(&on.stream, q.get(), keys.get(), values.get(), of.get(), mask, out.out())?;
            on.read(&out)?
        });
        let cache_type = here.device.precision().cache;
        let pages = capacity.div_ceil(PAGE);
        let sequences = (pool / (2 * groups * pages * PAGE * size * cache_type.size())).clamp(1, 256);
        let shape = [sequences * pages, groups, PAGE, size];
        let (keys, values) = (self.fill(cache_type, &shape)?, self.fill(cache_type, &shape)?);
        let q = self.fill(activation, &[new, heads, size])?;
        let mut out = here.empty(activation, &[new, heads, size])?;
        let batches: Vec<_> = (0..sequences)
            .map(|sequence| Batch::new(vec![(before, new)], (sequence * pages) as u32).on(here))
            .collect::<Result<_>>()?;
        let cached = 2 * groups * capacity * size * cache_type.size();
        let pairs = new * before + new * (new + 1) / 2;
        let (moved, operations) = (cached + q.bytes() + out.bytes(), 4.0 * (pairs * heads * size) as f64);
        let what = if new == 1 { format!("decoding at {capacity}") } else { format!("a prompt of {new}") };
        let with = if soft_cap.is_some() { ", soft cap" } else { "" };
        let shape = format!("{heads}/{groups} heads of {size}, {what}{with}");
        let row = Row::new("attention", shape, Some(off(&both.0, &both.1)), moved);
        self.record(Row { operations, tokens, ..row }, |number| {
            let of = batches[number % sequences].get();
            here.device.attention(&here.stream, q.get(), keys.get(), values.get(), of, mask, out.out())
        })
    }
}
