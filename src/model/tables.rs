//! The embedding table and the output head, which of small models are most of the bytes, and of large ones gigabytes.

use std::{fs::File, os::unix::fs::FileExt, str::FromStr, sync::Arc};

use super::{
    Decoder, Model,
    decoder::BLOCK,
    exchange::Exchange,
    workspace::{Region, Workspace},
};
use crate::{
    checkpoint::{Checkpoint, FileState},
    device::Device,
    dtype::{self, DType},
    error::{Error, Result},
    kernels::Kernels,
    plan::{Bandwidths, Budget, FixedOverhead, Forecast, Placement, Settings, Unit},
};

/// Where the embedding table and the output head live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tables {
    /// Both on the device.
    #[default]
    OnDevice,
    /// The embedding table stays in its file, from which each pass reads its tokens' rows. The head is on the device; where the
    /// two are one tensor, so is that.
    EmbeddingInFile,
    /// The same, and the head is streamed after the layers, as units that are no larger than these and have tiers as they do. The
    /// pass itself then finds its sequences' next tokens; all tokens' logits take passes of their own.
    HeadStreamed,
}

impl Tables {
    /// Of equally fast ones the first is taken.
    const ALL: [Self; 3] = [Self::OnDevice, Self::EmbeddingInFile, Self::HeadStreamed];

    /// `on-device`, `embedding-in-file` or `head-streamed`.
    pub fn word(self) -> &'static str {
        match self {
            Self::OnDevice => "on-device",
            Self::EmbeddingInFile => "embedding-in-file",
            Self::HeadStreamed => "head-streamed",
        }
    }

    pub(super) fn reads_rows(self) -> bool {
        self != Self::OnDevice
    }

    pub(super) fn streams_head(self) -> bool {
        self == Self::HeadStreamed
    }
}

impl FromStr for Tables {
    type Err = Error;

    /// From its [`word`](Self::word).
    ///
    /// # Errors
    /// [`Error::Setting`] for any other.
    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|tables| tables.word() == text);
        let known = Self::ALL.map(Self::word).join(", ");
        found.ok_or_else(|| Error::setting("tables", format!("there is no way called {text:?}, but {known}")))
    }
}

impl Model {
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
        let model = Self { tables: placement.statics.parse()?, ..self.clone() };
        placement.check_count(model.streamed().count())?;
        self.tables = model.tables;
        self.settle(placement.tiers.iter().copied());
        Ok(())
    }
}

impl<D: Kernels> Decoder<D> {
    /// The settings with which the model runs fastest within `budget`, for which its layers are given tiers and its
    /// [tables](Model::tables) their place.
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is less than the minimum, which it names; else as [`Decoder::memory`].
    pub fn fit(
        device: &D,
        model: &mut Model,
        budget: Budget,
        bandwidths: Bandwidths,
        batch: usize,
        context: usize,
    ) -> Result<Settings> {
        let fit = Fit { device, budget, bandwidths, batch, context, settings: None };
        fit.fastest(model)
    }

    /// As [`fit`](Self::fit) where the settings are given: what they leave of the budget decides on tiers and tables.
    ///
    /// # Errors
    /// As there; the minimum is that with these settings.
    pub fn fit_with(
        device: &D,
        model: &mut Model,
        budget: Budget,
        bandwidths: Bandwidths,
        batch: usize,
        context: usize,
        settings: &Settings,
    ) -> Result<()> {
        let fit = Fit { device, budget, bandwidths, batch, context, settings: Some(settings) };
        fit.fastest(model).map(drop)
    }
}

/// What a decoder is to fit into.
struct Fit<'a, D> {
    device: &'a D,
    budget: Budget,
    bandwidths: Bandwidths,
    batch: usize,
    context: usize,
    /// Where they are given.
    settings: Option<&'a Settings>,
}

impl<D: Kernels> Fit<'_, D> {
    /// The model with these tables, and what it takes whatever its tiers.
    fn with(&self, model: &Model, tables: Tables) -> Result<(Model, FixedOverhead)> {
        let model = Model { tables, ..model.clone() };
        let mut overhead = FixedOverhead::default();
        for part in Decoder::fixed_overhead(self.device, &model, self.batch, self.context)? {
            let bytes = if part.on_device { &mut overhead.device_bytes } else { &mut overhead.host_bytes };
            *bytes = bytes.saturating_add(part.bytes);
        }
        Ok((model, overhead))
    }

    /// The fastest with these tables.
    fn plan(&self, model: &Model, tables: Tables) -> Result<(Model, Settings, Forecast)> {
        let (mut model, overhead) = self.with(model, tables)?;
        let (source, units) = (model.source(), model.units_for(self.device.precision()));
        let (tiers, settings) = match self.settings {
            None => self.budget.plan(source, &units, overhead, self.bandwidths)?,
            Some(settings) => {
                (self.budget.plan_with(source, &units, overhead, self.bandwidths, settings)?, settings.clone())
            }
        };
        model.settle(tiers);
        let forecast = Decoder::plan(self.device, &model, &settings)?.forecast(self.bandwidths);
        Ok((model, settings, forecast))
    }

    /// How much of the device's memory is missing with these tables, and how much RAM it takes at least.
    fn lacking(&self, model: &Model, tables: Tables) -> Result<(usize, usize)> {
        let (model, overhead) = self.with(model, tables)?;
        let units = model.units_for(self.device.precision());
        let least = self.budget.least_with(model.source(), &units, overhead, self.settings)?;
        let device = least.device_bytes.zip(self.budget.device_bytes);
        let device = device.map(|(least, given)| least.saturating_sub(given));
        Ok((device.unwrap_or(0), least.host_bytes))
    }

    /// The fastest of all tables: their place and the tiers go to the model.
    fn fastest(&self, model: &mut Model) -> Result<Settings> {
        let time = |forecast: &Forecast| (forecast.pass_seconds, forecast.disk_seconds + forecast.copy_seconds);
        let mut best: Option<(Model, Settings, Forecast)> = None;
        for found in Tables::ALL.into_iter().filter_map(|tables| self.plan(model, tables).ok()) {
            if best.as_ref().is_none_or(|(.., best)| time(&found.2) < time(best)) {
                best = Some(found);
            }
        }
        // Where none fits, the error of that which lacks least of the device's memory, then of RAM.
        let lacking = |tables: Tables| self.lacking(model, tables).unwrap_or((usize::MAX, usize::MAX));
        let nearest = || Tables::ALL.into_iter().min_by_key(|tables| lacking(*tables)).unwrap_or_default();
        let (fitted, settings, _) = best.map_or_else(|| self.plan(model, nearest()), Ok)?;
        *model = fitted;
        Ok(settings)
    }
}

/// The matrix `name` as units of some of its rows, as equal as can be and none larger than the largest of `layers`; and the
/// checkpoint that has their tensors.
pub(super) fn head_units(checkpoint: &Checkpoint, name: &str, layers: &[Unit]) -> Result<(Checkpoint, Vec<Unit>)> {
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

/// The name of a head unit's only tensor.
pub(super) const PART: &str = "weight";

/// An embedding table in its file, whose rows are read as they are needed: a few kilobytes a token.
pub(super) struct EmbeddingRows<D: Device> {
    file: File,
    /// What it was when the checkpoint was opened.
    state: FileState,
    /// For messages.
    name: &'static str,
    path: std::path::PathBuf,
    offset: u64,
    dtype: DType,
    /// One row as it is stored, and in the type that the table would have on the device: results do not depend on where it is.
    row: Vec<u8>,
    rounded: (DType, Vec<u8>),
    exchange: Exchange<D>,
}

impl<D: Device> EmbeddingRows<D> {
    /// What it takes in RAM, for passes of up to so many tokens of so many elements.
    pub(super) fn bytes(tokens: usize, width: usize) -> usize {
        Exchange::<D>::bytes(tokens.min(BLOCK).saturating_mul(width))
    }

    /// For passes of up to so many tokens, from a table whose type on the device would be `weight`, or that of the file.
    pub(super) fn new(
        device: &D,
        checkpoint: &Checkpoint,
        name: &'static str,
        weight: Option<DType>,
        tokens: usize,
    ) -> Result<Self> {
        let (entry, width) = (checkpoint.entry(name)?, checkpoint.entry(name)?.shape[1]);
        let weight = weight.unwrap_or(entry.dtype);
        let (path, state) = checkpoint.file_states().nth(entry.file).expect("an entry's file is in the table");
        let file = File::open(path).map_err(Error::io("open", path))?;
        let reader = Self {
            file,
            state,
            name,
            path: path.clone(),
            offset: entry.offset,
            dtype: entry.dtype,
            row: vec![0; width * entry.dtype.size()],
            rounded: (weight, vec![0; width * weight.size()]),
            exchange: Exchange::new(device, "embedding rows on their way", tokens.min(BLOCK) * width)?,
        };
        reader.state.check(&reader.file, &reader.path)?;
        Ok(reader)
    }

    /// Reads the rows of `ids`, and enqueues their copies, as F32, to the rows of `to`.
    pub(super) fn send(
        &mut self,
        ids: impl Iterator<Item = u32>,
        work: &Workspace<D>,
        to: Region,
        stream: &D::Stream,
    ) -> Result<()> {
        let (width, mut ids, mut first) = (self.row.len() / self.dtype.size(), ids.peekable(), 0);
        while ids.peek().is_some() {
            let Self { file, name, path, offset, dtype, row, rounded: (weight, rounded), exchange, .. } = self;
            let words = exchange.words()?;
            let mut count = 0;
            for (id, words) in ids.by_ref().take(words.len() / width).zip(words.chunks_exact_mut(width)) {
                let at = *offset + u64::from(id) * row.len() as u64;
                file.read_exact_at(row, at).map_err(|source| Error::Read {
                    unit: "the embedding".into(),
                    tensor: (*name).to_owned(),
                    path: path.clone(),
                    offset: at,
                    source: Arc::new(source),
                })?;
                dtype::convert(*dtype, row, *weight, rounded);
                widen(*weight, rounded, words);
                count += 1;
            }
            exchange.send(work.write(to, first * width, &[count, width])?, stream)?;
            first += count;
        }
        // Rows of another file beside layers of this one would be a wrong answer.
        self.state.check(&self.file, &self.path)
    }
}

/// Converts stored elements to the bits of F32.
fn widen(dtype: DType, row: &[u8], words: &mut [u32]) {
    // SAFETY: the same memory as bytes, which any word is made of.
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) };
    dtype::convert(dtype, row, DType::F32, bytes);
}
