//! The library's own API in one page: streams the layers of a checkpoint through slots for a few of them, and computes with each
//! while the next are being read. What stands for a model here is the root mean square of each layer's weights, which needs no
//! kernels: on the CPU device a tensor's pointer is an address in RAM.
//!
//! ```sh
//! cargo run --release --example stream                # the model that comes with the project
//! cargo run --release --example stream -- ~/models/Qwen2.5-7B-Instruct
//! ```

use std::{env, slice};

use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device, TensorRef},
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
                let values = values(tensor);
                count += values.len();
                squares += values.iter().map(|value| value * value).sum::<f64>();
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

/// The values of a tensor in BF16, which is the upper half of F32.
fn values(tensor: TensorRef<'_, Cpu>) -> Vec<f64> {
    assert_eq!(tensor.dtype(), DType::BF16, "this example reads weights in BF16 only");
    // SAFETY: on the CPU device the pointer is an address of so many bytes in RAM, which nothing writes to while the layer is held.
    let bytes = unsafe { slice::from_raw_parts(tensor.ptr().as_ptr(), tensor.bytes()) };
    let (pairs, _) = bytes.as_chunks::<2>();
    pairs.iter().map(|pair| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16))).collect()
}
