//! A model as its folder or file has it: which tensors there must be, and which of them are streamed, as what units, or stay on the
//! device.

use std::{io, path::Path};

use super::{config::ModelConfig, extras, tables::Tables};
use crate::{
    checkpoint::{Checkpoint, Quantisation, TensorEntry, gguf::Gguf},
    dtype::DType,
    error::{Error, Result},
    kernels::Precision,
    layout::UnitLayout,
    plan::{ArrivalOp, Placement, Settings, Tier, Unit},
};

/// What the tensors are called in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// The embedding table: `model.embed_tokens.weight`, as a rule.
    pub(super) embed: String,
    /// The norm before the output head.
    pub(super) norm: String,
    /// The output head; of tied models the same as `embed`.
    pub(super) head: String,
    /// What comes before a layer's number.
    pub(super) layers: String,
}

impl Names {
    /// Finds the decoder of a checkpoint. `tied` is what the configuration says. As in transformers, what is stored counts for
    /// more: a head that is there is used, and where one of embedding and head is missing the other is both.
    fn find(checkpoint: &Checkpoint, tied: bool) -> Result<Self> {
        let prefix = checkpoint.decoder_prefix()?;
        let [embed, norm, layers] =
            ["embed_tokens.weight", "norm.weight", "layers."].map(|name| format!("{prefix}{name}"));
        // Beside the part that the prefix names, or beside one that this is in; of a decoder alone, beside its tensors.
        let above = prefix.match_indices('.').map(|(dot, _)| &prefix[..=dot]).filter(|above| *above != prefix);
        let mut heads = [""].into_iter().chain(above).map(|above| format!("{above}lm_head.weight"));
        let usual = prefix.strip_suffix("model.").filter(|above| above.is_empty() || above.ends_with('.'));
        let usual = format!("{}lm_head.weight", usual.unwrap_or_default());
        let head = heads.find(|name| checkpoint.stores(name));
        Ok(match (tied, head) {
            (true, None) => Self { head: embed.clone(), embed, norm, layers },
            (true, Some(head)) if !checkpoint.stores(&embed) => Self { embed: head.clone(), norm, head, layers },
            (_, head) => Self { embed, norm, head: head.unwrap_or(usual), layers },
        })
    }
}

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
    pub(super) names: Names,
    /// The output head as units, none larger than a layer, and the checkpoint that has their tensors.
    head: (Checkpoint, Vec<Unit>),
}

impl Model {
    /// Opens a Hugging Face folder, or a GGUF file (of one that is split, the first part), and checks that every tensor that the configuration calls for is there, with its shape,
    /// and that no layer has a bias or norm that would be left out of the computation. Other tensors are left alone.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Io`] or [`Error::Unsupported`], naming file and tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if let Some(file) = Gguf::if_file(path)? {
            return Self::of(
                path,
                "the file's metadata",
                ModelConfig::of_gguf(&file)?,
                Checkpoint::of_gguf(&file)?,
                None,
            );
        }
        let config = ModelConfig::read(path).map_err(|error| without_config(path, error))?;
        let quantisation = Quantisation::of(path)?;
        Self::of(path, "config.json", config, Checkpoint::open(path)?, quantisation)
    }

    /// A model by this configuration, which `described_by` holds.
    fn of(
        path: &Path,
        described_by: &str,
        mut config: ModelConfig,
        checkpoint: Checkpoint,
        quantisation: Option<Quantisation>,
    ) -> Result<Self> {
        let names = Names::find(&checkpoint, config.tied)?;
        let needed = Needed { path, described_by, checkpoint: &checkpoint };
        needed.require(&names.embed, &[config.vocab, config.hidden])?;
        needed.require(&names.norm, &[config.hidden])?;
        if !config.tied && checkpoint.describe(&names.head).is_none() {
            let cause = "config.json calls for it, but the checkpoint lacks it; download the checkpoint anew, or set \
                         tie_word_embeddings to true in config.json if the model's output head is its embedding";
            return Err(needed.lacks(&names.head, cause.into()));
        }
        needed.require(&names.head, &[config.vocab, config.hidden])?;
        config.tied = names.head == names.embed;
        let tensors = config.layer_tensors();
        let units = (0..config.layers).map(|layer| {
            let mut unit = Unit::new(format!("layer {layer}"));
            for (name, shape) in &tensors {
                let full = format!("{}{layer}.{name}", names.layers);
                let made = match (quantisation, shape.as_slice()) {
                    (Some(method), &[rows, columns]) => method.arrival(&checkpoint, name, &full, [rows, columns])?,
                    _ => None,
                };
                if let Some(arrival) = made {
                    unit.add(arrival);
                } else {
                    needed.require(&full, shape)?;
                    unit.keep(*name, full);
                }
            }
            // Whether the tensors of a matrix fit together is found before anything is planned.
            if unit.arrivals().iter().any(|arrival| arrival.op != ArrivalOp::Keep) {
                UnitLayout::new(&checkpoint, &unit)?;
            }
            Ok(unit)
        });
        let units = units.collect::<Result<Vec<_>>>()?;
        let known: Vec<_> = tensors.iter().map(|(name, _)| *name).collect();
        extras::refuse_left_out(path, described_by, &checkpoint, &names.layers, config.layers, &known)?;
        let head = head_units(&checkpoint, &names.head, &units)?;
        Ok(Self { config, checkpoint, units, tables: Tables::default(), names, head })
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
        let (Names { norm, embed: table, head: weights, .. }, tied) = (&self.names, self.config.tied);
        for (name, kept) in [(norm, true), (table, embed || head && tied), (weights, head && !tied)] {
            if kept {
                unit.keep(name, name);
            }
        }
        converted(unit, precision)
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

/// What is said of a folder without `config.json`: rather what is wrong with its weights, if they are no safetensors at all.
fn without_config(folder: &Path, error: Error) -> Error {
    let missing = matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound);
    match Checkpoint::open(folder) {
        Err(weights @ Error::Checkpoint { .. }) if missing => weights,
        _ => error,
    }
}

/// Tensors that there must be.
struct Needed<'a> {
    path: &'a Path,
    /// What says so.
    described_by: &'a str,
    checkpoint: &'a Checkpoint,
}

impl Needed<'_> {
    /// Refuses a checkpoint without this tensor in this shape, and of a type that can be computed with.
    fn require(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Some(((dtype, stored), (file, _))) = self.checkpoint.describe(name).zip(self.checkpoint.location(name))
        else {
            let cause = format!("{} calls for it, but the checkpoint lacks it", self.described_by);
            return Err(self.lacks(name, cause));
        };
        let of_blocks = dtype.is_blocks() && shape.len() == 2;
        if !of_blocks && !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            extras::refuse_quantised(file, self.checkpoint, name)?;
            let cause = match dtype.is_blocks() {
                true => format!("is of type {dtype}, of which only matrices may be"),
                false => format!("is of type {dtype}; take a model in F32, F16 or BF16, which are computed with"),
            };
            return Err(Error::tensor(file, name, cause));
        }
        if stored != shape {
            let cause = format!("is {stored:?}, but {shape:?} by {}", self.described_by);
            return Err(Error::tensor(file, name, cause));
        }
        Ok(())
    }

    /// Why this tensor is not there: quantised, not to be read, or else the `cause`.
    fn lacks(&self, name: &str, cause: String) -> Error {
        if let Err(error) = extras::refuse_quantised(self.path, self.checkpoint, name) {
            return error;
        }
        self.checkpoint.why_unreadable(name).unwrap_or_else(|| Error::tensor(self.path, name, cause))
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
    let stored = |entry: &TensorEntry| entry.dtype.bytes_of(&entry.shape).unwrap_or(usize::MAX);
    let expanded = |entry: &TensorEntry| {
        let dtype = if entry.dtype.is_blocks() { DType::BF16 } else { entry.dtype };
        dtype.bytes_of(&entry.shape).unwrap_or(usize::MAX)
    };
    let rows = entry.shape[0];
    // No larger where blocks stay as they are, nor where they become BF16.
    let most_by = |bytes: &dyn Fn(&TensorEntry) -> usize| {
        let of_unit = |unit: &Unit| -> usize {
            let inputs = unit.arrivals().iter().flat_map(|arrival| &arrival.inputs);
            inputs.filter_map(|name| Some(bytes(checkpoint.entry(name).ok()?))).fold(0, usize::saturating_add)
        };
        layers.iter().map(of_unit).max().unwrap_or(0) / (bytes(entry) / rows.max(1)).max(1)
    };
    let most = most_by(&stored).min(most_by(&expanded)).clamp(1, rows.max(1));
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
