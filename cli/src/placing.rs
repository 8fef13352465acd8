//! The options that `generate` and `plan` have in common: which model runs, on what, in how much memory, and how.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use layer_streamer::{
    Settings,
    kernels::Kernels,
    model::{Cache, Fit, Model, Tables},
    plan::{FixedOverhead, Pack, Part, Placement},
    probe::Probe,
    tuner::{self, CheckpointId, Record},
};

use crate::{
    Failure,
    budget::{self, Amount, Measure},
    device::{self, Chosen, Wanted},
    hub::{self, ModelFolder},
    waiting::Waiting,
};

#[derive(Args)]
pub struct Placing {
    /// Folder with config.json, safetensors shards and tokenizer.json; a GGUF file; or ORG/NAME or ORG/NAME@REVISION of the
    /// Hugging Face hub, which is downloaded once
    #[arg(long, value_name = "MODEL", value_parser = hub::parser(), default_value_os_t = crate::speller().into(),
          hide_default_value = true)]
    pub model: ModelFolder,

    /// Where to compute: cpu, cuda or cuda:N [default: cuda if there is one]
    #[arg(long)]
    device: Option<Wanted>,

    /// Tokens that the KV cache holds [default: prompt + new tokens]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_new_tokens: usize,

    /// GPU memory to use, such as 8GB or 7.5GiB; auto: what is free, less a sixteenth and at least 256 MiB [default: auto]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    vram: Option<Amount>,

    /// RAM to use, likewise
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    ram: Option<Amount>,

    /// Whether layers that are stored plain are packed, without loss, where they are kept in RAM, by idle cores while the first passes go
    /// by: auto, where passes are expected to be faster for it; never; always [default: auto]
    #[arg(long, value_name = "WHEN", help_heading = "Memory")]
    pack: Option<Pack>,

    /// Measure disk and link anew (about half a second), even if what was measured in the last 30 days is kept
    #[arg(long, help_heading = "Memory", conflicts_with = "no_probe")]
    pub probe: bool,

    /// Do not measure disk and link: assume 2 and 10 GB/s
    #[arg(long, help_heading = "Memory")]
    no_probe: bool,

    /// Layers buffered ahead on the device, at least 1 [default: 2 if any of these is given, else by the memory]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_gpu: Option<usize>,

    /// Layers buffered in pinned RAM; 0 skips the stage [default: 4 likewise]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_cpu_pinned: Option<usize>,

    /// Layers buffered in pageable RAM; 0 skips the stage [default: 0]
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    n_cpu: Option<usize>,

    /// Layers handed to compute at once, at most n-gpu; 0 means one by one
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_gpu: Option<usize>,

    /// Layers handed from pinned RAM to the transfer at once, at most n-cpu-pinned
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_cpu_pinned: Option<usize>,

    /// Layers handed from pageable RAM at once, at most n-cpu
    #[arg(long, value_name = "N", help_heading = "Pipeline, in place of a budget")]
    batch_cpu: Option<usize>,

    /// Where layers are kept between passes: disk, ram, pinned, gpu, pinned-packed or gpu-packed, such as 0-7=pinned,8-11=gpu [default:
    /// all on disk]. The parts of a streamed output head are numbered after the layers
    #[arg(long, value_name = "LIST", help_heading = "Pipeline, in place of a budget")]
    tier: Option<String>,

    /// Where embedding table and output head are kept: on-device, embedding-in-file, or head-streamed, which streams the head after
    /// the layers [default: on-device]
    #[arg(long, value_name = "WAY", help_heading = "Pipeline, in place of a budget")]
    tables: Option<Tables>,

    /// All of these as `layer-streamer tune --json FILE` found them: the answer of that search
    #[arg(long, value_name = "FILE", help_heading = "Pipeline, in place of a budget",
          conflicts_with_all = ["n_gpu", "n_cpu_pinned", "n_cpu", "batch_gpu", "batch_cpu_pinned", "batch_cpu", "tier", "tables"])]
    config: Option<PathBuf>,

    /// Print nothing but the answer (and errors)
    #[arg(long)]
    pub quiet: bool,
}

impl Placing {
    /// The device to compute on.
    pub fn device(&self) -> Result<Chosen, Failure> {
        let _waiting = Waiting::on("looking for a device", self.quiet);
        Ok(device::choose(self.device)?)
    }

    /// How many tokens the KV cache holds, where the prompt has so many.
    pub fn context(&self, prompt: usize, model: &Model) -> Result<usize, Failure> {
        let (wanted, most) = (prompt.saturating_add(self.max_new_tokens), model.config.max_positions);
        if prompt > most {
            return Err(
                format!("the prompt is {prompt} tokens long, this model takes {most}; give a shorter one").into()
            );
        }
        let context = self.context.unwrap_or(wanted.clamp(1, most));
        if prompt > context {
            return Err(format!("the prompt is {prompt} tokens long, the context {context}; raise --context").into());
        }
        Ok(context)
    }

    /// The settings that were given, else the fastest for the memory there is and a KV cache of such a size, for which layers get tiers; and
    /// what the links carry, where that was measured. `own` is what the program takes of RAM besides the model. `measure` is when to do so unless
    /// an option says it.
    pub fn settle<D: Kernels>(
        &self,
        device: &D,
        model: &mut Model,
        cache: Cache,
        own: &[Part],
        measure: Measure,
    ) -> Result<(Settings, Option<Probe>), Failure> {
        let placement = self.placement(device, model)?;
        if placement.is_some() && (self.vram.is_some() || self.ram.is_some() || self.pack.is_some()) {
            let cause = "--vram, --ram and --pack choose the pipeline and the tiers; leave out either them or your own";
            return Err(cause.into());
        }
        let _waiting = Waiting::on("measuring disk and link", self.quiet);
        let measure = match (self.probe, self.no_probe) {
            (true, _) => Measure::Anew,
            (_, true) => Measure::Never,
            _ => measure,
        };
        match placement {
            None => {
                let budget = budget::budget(device, self.vram, self.ram)?;
                // What is free may lack the tokenizer already: then so much more stays free.
                let (overhead, pack) = (FixedOverhead::of(own), self.pack.unwrap_or_default());
                let fit = Fit { overhead, pack, ..Fit::new(device, budget, cache) };
                Ok(budget::fastest(fit, model, measure)?)
            }
            Some(placement) => {
                model.place(&placement)?;
                // What the links carry decides nothing here: it is for the table, or was asked for.
                let measure = if measure == Measure::IfItCounts { Measure::Before } else { measure };
                Ok((placement.settings, budget::probe(device, model, measure)?))
            }
        }
    }

    /// Says what a probe found, where something disturbed it, or where all are told.
    pub fn tell(&self, probe: Option<&Probe>, all: bool) {
        if let Some(probe) = probe.filter(|probe| all || probe.disturbed().is_some())
            && !self.quiet
        {
            say!("{}", budget::measured(probe));
        }
    }

    /// How the model is to run on this device, where any part of that, or a file with it, is given.
    fn placement<D: Kernels>(&self, device: &D, model: &Model) -> Result<Option<Placement>, Failure> {
        if let Some(path) = &self.config {
            let record = Record::read(path)?;
            let answer = record.answer_for(&checkpoint_id(&self.model, model), path)?;
            if !self.quiet {
                let within = record.budget.map(|budget| format!(", within {}", budget::describe(budget)));
                let (on, from) = (&record.device, &record.machine);
                say!("settings: found for {}, on {on} of {from}{}", record.checkpoint, within.unwrap_or_default());
                let present = [("machine", from, tuner::machine()), ("device", on, device.describe())];
                for (what, then, now) in present.iter().filter(|(_, then, now)| *then != now) {
                    say!("warning: this {what} is another, {now}, not {then}: search again to find its own");
                }
            }
            return Ok(Some(answer.placement.clone()));
        }
        let given = [self.n_gpu, self.n_cpu_pinned, self.n_cpu, self.batch_gpu, self.batch_cpu_pinned, self.batch_cpu];
        if !given.iter().any(Option::is_some) && self.tier.is_none() && self.tables.is_none() {
            return Ok(None);
        }
        let usual = Settings::default();
        let settings = Settings {
            n_gpu: self.n_gpu.unwrap_or(usual.n_gpu),
            n_cpu_pinned: self.n_cpu_pinned.unwrap_or(usual.n_cpu_pinned),
            n_cpu: self.n_cpu.unwrap_or(usual.n_cpu),
            batch_gpu: self.batch_gpu.unwrap_or(usual.batch_gpu),
            batch_cpu_pinned: self.batch_cpu_pinned.unwrap_or(usual.batch_cpu_pinned),
            batch_cpu: self.batch_cpu.unwrap_or(usual.batch_cpu),
            ..usual
        };
        let mut model = model.clone();
        model.tables = self.tables.unwrap_or_default();
        let Placement { tiers, statics, .. } = model.placement(&settings);
        Ok(Some(Placement { statics, ..Placement::new(settings, tiers.len(), self.tier.as_deref().unwrap_or(""))? }))
    }
}

/// What a model's checkpoint is told from others by.
pub fn checkpoint_id(folder: &Path, model: &Model) -> CheckpointId {
    let name = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()).display().to_string();
    CheckpointId::new(name, &model.checkpoint, model.config.layers)
}
