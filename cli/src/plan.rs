//! Says how `generate` would run: what takes memory, where the layers live, and how long a pass takes for what it moves.

use std::io::{self, Write};

use clap::Args;
use layer_streamer::{
    kernels::Kernels,
    model::{Decoder, Model},
};

use crate::{
    Failure,
    budget::{self, Measure},
    device::Chosen,
    placing::Placing,
    prompt::Source,
    waiting::Waiting,
};

/// Print what a run would reserve, where the layers would live, and what a pass would take
#[derive(Args)]
#[command(after_help = "\
It takes the options of `generate` that choose model, memory and pipeline. A prompt, if there is one, counts for the KV cache.

Examples:
  layer-streamer plan --model DIR                            for the memory that is free
  layer-streamer plan --model DIR --ram 4GB                  for so much of it
  layer-streamer plan --model DIR --vram 8GB --context 8192  on a GPU, with a longer KV cache
  layer-streamer plan --model DIR --tier 0-7=gpu --n-gpu 1   for a pipeline of your own")]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    #[command(flatten)]
    source: Source,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options),
    }
}

fn run_on<D: Kernels>(device: &D, Options { placing, source }: &Options) -> Result<(), Failure> {
    let waiting = Waiting::on("reading the checkpoint's headers and the prompt", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let (_, prompt) = source.read(&placing.model, false, placing.quiet)?;
    let context = placing.context(prompt.len(), &model)?;
    drop(waiting);
    // The forecast goes by what the links carry.
    let (settings, probe) = placing.settle(device, &mut model, context, Measure::Always)?;
    // The table says what was measured and when, but not what disturbed it.
    placing.tell(probe.as_ref(), false);
    let parts = Decoder::memory(device, &model, &settings, 1, context)?;
    let plan = Decoder::plan(device, &model, &settings)?;
    let own = !device.memory_is_ram();
    let table = budget::table(&device.describe(), own, &model, &parts, &plan, probe.as_ref());
    // Whoever reads it may have gone away.
    let _ = io::stdout().write_all(table.as_bytes());
    Ok(())
}
