//! Says how `generate` would run: what takes memory, where the layers are kept, and how long a pass takes for what it moves.

use std::io::{self, Write};

use clap::Args;
use layer_streamer::{
    Error,
    kernels::Kernels,
    model::{Cache, Decoder, Model},
    plan::{Bandwidths, Part},
    probe::Probe,
};
use serde_json::{Value, json};

use crate::{
    Failure,
    budget::{self, Measure},
    device::Chosen,
    placing::Placing,
    prompt::Source,
    text,
    waiting::Waiting,
};

/// Print what a run would reserve, where the layers would be kept, and what a pass would take
#[derive(Args)]
#[command(after_help = "\
It takes the options of `generate` that choose model, memory and pipeline. A prompt, if there is one, counts for the KV cache.

Examples:
  layer-streamer plan --model DIR                            for the memory that is free
  layer-streamer plan --model Qwen/Qwen2.5-7B-Instruct       of a model that is downloaded if it is not there
  layer-streamer plan --model DIR --ram 4GB                  for so much of it
  layer-streamer plan --model DIR --vram 8GB --context 8192  on a GPU, with a longer KV cache
  layer-streamer plan --model DIR --tier 0-7=gpu --n-gpu 1   for a pipeline of your own
  layer-streamer plan --model DIR --ram 1 --json             the least that will do: .refused.least, in bytes")]
pub struct Options {
    #[command(flatten)]
    placing: Placing,

    #[command(flatten)]
    source: Source,

    /// Print JSON. Where the memory is too little: which memory that is, the bytes given and the least that will do
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    match options.placing.device()? {
        Chosen::Cpu(device) => run_on(&device, options),
        #[cfg(feature = "cuda")]
        Chosen::Cuda(device) => run_on(&device, options),
    }
}

fn run_on<D: Kernels>(device: &D, Options { placing, source, json }: &Options) -> Result<(), Failure> {
    placing.model.fetch(placing.quiet)?;
    let waiting = Waiting::on("reading the checkpoint's headers and the prompt", placing.quiet);
    let mut model = Model::open(&placing.model)?;
    let prompt = source.read(&placing.model, false, placing.quiet)?;
    let context = placing.context(prompt.tokens.len(), &model)?;
    drop(waiting);
    // The forecast goes by what the links carry.
    let own = Vec::from_iter(text::memory(&placing.model, &model));
    let settled = placing.settle(device, &mut model, Cache::full(1, context), &own, Measure::Always);
    if let (true, Err(error)) = (*json, &settled) {
        refused(error);
    }
    let (settings, probe) = settled?;
    // The table says what was measured and when, but not what disturbed it.
    placing.tell(probe.as_ref(), false);
    let mut parts = Decoder::memory(device, &model, &settings, Cache::full(1, context))?;
    parts.extend(own);
    let plan = Decoder::plan(device, &model, &settings)?;
    let own = !device.memory_is_ram();
    print(&match *json {
        false => budget::table(&device.describe(), own, &model, &parts, &plan, probe.as_ref()),
        true => {
            let bandwidths = probe.as_ref().map_or_else(Bandwidths::default, Probe::bandwidths);
            let [device_bytes, host_bytes] = Part::totals(&parts);
            let found = json!({
                "device": device.describe(), "placement": model.placement(&settings),
                "tiers": plan.tiers().collect::<Vec<_>>(), "memory": memory(&parts),
                "device_bytes": device_bytes, "host_bytes": host_bytes, "bandwidths": bandwidths,
                "stored_bytes": plan.bytes_per_pass(), "weight_bytes": plan.weight_bytes(),
                "measured": probe.is_some(), "forecast": plan.forecast(bandwidths),
                "binds": plan.forecast(bandwidths).binds(),
            });
            format!("{found:#}\n")
        }
    });
    Ok(())
}

/// What takes memory, for programs.
pub fn memory(parts: &[Part]) -> Value {
    let row = |part: &Part| {
        let mut row = json!(part);
        (row["what"], row["on_device"]) = (part.purpose.to_string().into(), part.is_on_device().into());
        row
    };
    parts.iter().map(row).collect()
}

/// Tells programs that a budget is too little, beside the error.
fn refused(error: &Failure) {
    if let Some(Error::TooLittle { memory, given, least, .. }) = error.downcast_ref() {
        print(&format!("{:#}\n", json!({ "refused": { "memory": memory, "given": given, "least": least } })));
    }
}

/// Whoever reads it may have gone away.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}
