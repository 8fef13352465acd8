//! The library's own API in one page: streams the layers of a checkpoint through slots for a few of them, and computes with each
//! while the next are being read. What stands for a model here is the root mean square of each layer's weights, which needs no
//! kernels: on the CPU device a tensor's pointer is an address in RAM.
//!
//! ```sh
//! cargo run --release --example stream                # the model that comes with the project
//! cargo run --release --example stream -- ~/models/Qwen2.5-7B-Instruct
//! ```

use std::env;

use half::bf16;
use layer_streamer::{
    Checkpoint, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device},
    plan::Tier,
};

fn main() -> Result<(), Error> {
    let speller = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/speller");
    let folder = env::args_os().nth(1).unwrap_or_else(|| speller.into());
    let checkpoint = Checkpoint::open(&folder)?;

    // What travels together: one unit for each layer. `Unit::new` and `Unit::keep` make units of any other tensors.
    let mut units: Vec<Unit> = checkpoint.layers()?;
    // The first layer stays in memory after its first arrival; the others are read in every pass.
    units[0].set_tier(Tier::Gpu);

    // Two layers ahead on the device, two in pinned RAM, none in pageable RAM.
    let settings = Settings { n_gpu: 2, n_cpu_pinned: 2, ..Settings::default() };
    let device = Cpu;
    let stream = device.stream()?;
    let mut streamer = LayerStreamer::new(&device, &checkpoint, &units, &settings)?;

    for pass in 0..4 {
        // The value goes from layer to layer, as a model's activations do.
        let sums = streamer.run_pass(&stream, Vec::new(), |mut sums, layer| {
            // The stream waits for the layer. This function reads the weights on its own thread, so it waits too.
            device.drain(&stream)?;
            let (mut squares, mut count) = (0.0, 0);
            for (_name, tensor) in layer.tensors() {
                // On the CPU device the weights are seen where they lie; this example knows one type of them.
                let values: &[bf16] = tensor.as_slice()?;
                count += values.len();
                squares += values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
            }
            sums.push((layer.name().to_owned(), (squares / count as f64).sqrt()));
            Ok::<_, Error>(sums)
        })?;
        if pass == 0 {
            sums.iter().for_each(|(name, mean)| println!("{name}: {mean:.4}"));
        }
    }
    let stats = streamer.stats();
    let read = stats.direct_bytes + stats.buffered_bytes;
    println!("{} passes over {} layers, {read} bytes read by {}", stats.passes, units.len(), stats.reader);
    println!("{}", streamer.verdict().expect("a pass is complete"));
    Ok(())
}
