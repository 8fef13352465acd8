//! A model as its folder has it: which tensors there must be, and which of them are streamed, as what units, or stay on the
//! device.

use std::path::Path;

use super::{config::ModelConfig, tables::Tables};
use crate::{
    checkpoint::Checkpoint,
    dtype::DType,
    error::{Error, Result},
    kernels::Precision,
    plan::{Placement, Settings, Tier, Unit},
};

/// The embedding table, the norm before the output head, and the output head of untied models.
pub(super) const EMBED: &str = "model.embed_tokens.weight";
pub(super) const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// The name of a head unit's only tensor.
pub(super) const PART: &str = "weight";

/// A model's configuration and checkpoint, found to agree.
#[derive(Clone, Debug)]
pub struct Model {
    /// Dimensions and constants.
    pub config: ModelConfig,
    /// Where the tensors lie.
    pub checkpoint: Checkpoint,
    /// One unit per layer.
    pub units: Vec<Unit>,
    /// Where the embedding table and the output head are kept.
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
        let head = head_units(&checkpoint, if config.tied { EMBED } else { HEAD }, &units)?;
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
    pub(super) fn head_name(&self) -> &'static str {
        if self.config.tied { EMBED } else { HEAD }
    }

    /// Rows of the largest part of the head.
    pub(super) fn part_rows(&self) -> usize {
        let part = self.head.1.first().and_then(|unit| self.head.0.describe(&unit.arrivals()[0].inputs[0]));
        part.map_or(0, |(_, shape)| shape[0])
    }

    /// The same model with its tables elsewhere.
    pub(super) fn with_tables(&self, tables: Tables) -> Self {
        Self { tables, ..self.clone() }
    }

    /// How a decoder runs with these settings, and with the tiers and tables that the model has now.
    pub fn placement(&self, settings: &Settings) -> Placement {
        let tiers = self.streamed().map(|unit| unit.tier).collect();
        Placement { settings: settings.clone(), tiers, statics: self.tables.word().into() }
    }

    /// Gives the layers, and the parts of the output head where that is streamed, their tiers, and the tables their place.
    ///
    /// # Errors
    /// [`Error::Setting`] if the placement was made for another number of units, or no decoder.
    pub fn place(&mut self, placement: &Placement) -> Result<()> {
        let model = self.with_tables(placement.statics.parse()?);
        placement.check_count(model.streamed().count())?;
        self.tables = model.tables;
        self.settle(placement.tiers.iter().copied());
        Ok(())
    }
}

fn converted(mut unit: Unit, precision: Precision) -> Unit {
    if let Some(dtype) = precision.weight {
        unit.convert(dtype);
    }
    unit
}

/// The matrix `name` as units of some of its rows, as equal as can be and none larger than the largest of `layers`; and the
/// checkpoint that has their tensors.
fn head_units(checkpoint: &Checkpoint, name: &str, layers: &[Unit]) -> Result<(Checkpoint, Vec<Unit>)> {
    let entry = checkpoint.entry(name)?;
    let bytes = |unit: &Unit| -> usize {
        let inputs = unit.arrivals().iter().flat_map(|arrival| &arrival.inputs);
        inputs.filter_map(|name| Some(checkpoint.entry(name).ok()?.bytes)).sum()
    };
    let (largest, rows) = (layers.iter().map(bytes).max().unwrap_or(0), entry.shape[0]);
    let most = (largest / (entry.bytes / rows.max(1)).max(1)).clamp(1, rows.max(1));
    // A multiple of this where that is possible, so that parts of the logits start on good boundaries.
    let step = if most < 64 { 1 } else { 64 };
    let most = most / step * step;
    let each = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(step);
    let (checkpoint, parts) = checkpoint.with_rows(name, each)?;
    let count = parts.len();
    let units = parts.into_iter().enumerate().map(|(number, part)| {
        let mut unit = Unit::new(format!("output head, part {} of {count}", number + 1));
        unit.keep(PART, part);
        unit
    });
    let units = units.collect();
    Ok((checkpoint, units))
}
