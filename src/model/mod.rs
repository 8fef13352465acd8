//! Decoder-only models on top of the streamer and the kernels.
//!
//! A [`Model`] is what a folder says, checked; a [`Decoder`] holds the memory and computes; [`Decoder::generate`] decodes
//! greedily. Llama, Mistral, Qwen2 and Qwen3 differ by a row of a table in `config.rs`.

mod config;
mod decoder;
mod exchange;
mod generate;
mod head;
mod tables;
mod workspace;

use std::path::Path;

pub use config::ModelConfig;
pub use decoder::{Decoder, Sequence};
pub use tables::Tables;

use crate::{
    checkpoint::Checkpoint,
    dtype::DType,
    error::{Error, Result},
    kernels::Precision,
    plan::{Tier, Unit},
};

/// The embedding table, the norm before the output head, and the output head of untied models.
const EMBED: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A model's configuration and checkpoint, found to agree.
#[derive(Clone, Debug)]
pub struct Model {
    /// Dimensions and constants.
    pub config: ModelConfig,
    /// Where the tensors lie.
    pub checkpoint: Checkpoint,
    /// One unit per layer.
    pub units: Vec<Unit>,
    /// Where the embedding table and the output head live.
    pub tables: Tables,
    /// The output head as units, none larger than a layer, and the checkpoint that has their tensors.
    head: (Checkpoint, Vec<Unit>),
}

impl Model {
    /// Opens a Hugging Face folder and checks that every tensor that the configuration calls for is there, with its shape,
    /// and that no layer has one that would be left out of the computation.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Io`] or [`Error::Unsupported`], naming file and tensor.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = ModelConfig::read(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let require = |name: &str, shape: &[usize]| {
            let Some(((dtype, stored), (file, _))) = checkpoint.describe(name).zip(checkpoint.location(name)) else {
                return Err(Error::tensor(folder, name, "config.json calls for it, but the checkpoint lacks it"));
            };
            if stored != shape {
                return Err(Error::tensor(file, name, format!("is {stored:?}, but {shape:?} by config.json")));
            }
            if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                return Err(Error::tensor(
                    file,
                    name,
                    format!("is of type {dtype}; F32, F16 and BF16 can be computed with"),
                ));
            }
            Ok(())
        };
        require(EMBED, &[config.vocab, config.hidden])?;
        require(NORM, &[config.hidden])?;
        if !config.tied {
            require(HEAD, &[config.vocab, config.hidden])?;
        }
        let tensors = config.layer_tensors();
        let units = (0..config.layers).map(|layer| {
            let mut unit = Unit::new(format!("layer {layer}"));
            for (name, shape) in &tensors {
                let full = format!("model.layers.{layer}.{name}");
                require(&full, shape)?;
                unit.keep(*name, full);
            }
            Ok(unit)
        });
        let units = units.collect::<Result<Vec<_>>>()?;
        for name in checkpoint.names() {
            let Some((layer, local)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
                continue;
            };
            let used = layer.parse::<usize>().is_ok_and(|layer| layer < config.layers)
                && tensors.iter().any(|(known, _)| *known == local);
            // Older Llama checkpoints carry the rotation frequencies, which follow from the configuration.
            if !used && local != "self_attn.rotary_emb.inv_freq" {
                return Err(Error::tensor(
                    folder,
                    name,
                    "config.json knows no such tensor; the model would compute without it",
                ));
            }
        }
        let head = tables::head_units(&checkpoint, if config.tied { EMBED } else { HEAD }, &units)?;
        Ok(Self { config, checkpoint, units, tables: Tables::default(), head })
    }

    /// The units, with weights of the type that the device wants: the layers, then the output head if that is streamed. Their
    /// tensors are those of [`source`](Self::source).
    pub(crate) fn units_for(&self, precision: Precision) -> Vec<Unit> {
        self.streamed().map(|unit| converted(unit.clone(), precision)).collect()
    }

    /// The units as they are in the checkpoint, likewise.
    fn streamed(&self) -> impl Iterator<Item = &Unit> {
        let head = if self.tables.streams_head() { self.head.1.as_slice() } else { &[] };
        self.units.iter().chain(head)
    }

    /// The checkpoint, in which parts of the output head are tensors too.
    pub(crate) fn source(&self) -> &Checkpoint {
        &self.head.0
    }

    /// Gives the units tiers, in the order of [`units_for`](Self::units_for).
    pub(crate) fn settle(&mut self, tiers: impl IntoIterator<Item = Tier>) {
        self.units.iter_mut().chain(&mut self.head.1).zip(tiers).for_each(|(unit, tier)| _ = unit.set_tier(tier));
    }

    /// The tensors that stay on the device, likewise.
    pub(crate) fn statics_for(&self, precision: Precision) -> Unit {
        let mut unit = Unit::new("the static tensors");
        let (embed, head) = (!self.tables.reads_rows(), !self.tables.streams_head());
        for (name, kept) in
            [(NORM, true), (EMBED, embed || head && self.config.tied), (HEAD, head && !self.config.tied)]
        {
            if kept {
                unit.keep(name, name);
            }
        }
        converted(unit, precision)
    }

    /// The name of the output head's weights.
    fn head_name(&self) -> &'static str {
        if self.config.tied { EMBED } else { HEAD }
    }

    /// Rows of the largest part of the head.
    fn part_rows(&self) -> usize {
        let part = self.head.1.first().and_then(|unit| self.head.0.describe(&unit.arrivals()[0].inputs[0]));
        part.map_or(0, |(_, shape)| shape[0])
    }
}

fn converted(mut unit: Unit, precision: Precision) -> Unit {
    if let Some(dtype) = precision.weight {
        unit.convert(dtype);
    }
    unit
}
