//! The embedding table and the output head, which of small models are most of the bytes, and of large ones gigabytes.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

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
    plan::{Bandwidths, Besides, Budget, Forecast, Settings, Unit},
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
    /// The same, and the head is streamed after the layers, as units that are no larger than these and have homes as they do. The
    /// pass itself then finds its sequences' next tokens; all tokens' logits take passes of their own.
    HeadStreamed,
}

impl Tables {
    /// Of equally fast ones the first is taken.
    const ALL: [Self; 3] = [Self::OnDevice, Self::EmbeddingInFile, Self::HeadStreamed];

    pub(super) fn reads_rows(self) -> bool {
        self != Self::OnDevice
    }

    pub(super) fn streams_head(self) -> bool {
        self == Self::HeadStreamed
    }
}

impl<D: Kernels> Decoder<D> {
    /// The settings with which the model runs fastest within `budget`, for which its layers are given homes and its
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
        let precision = device.precision();
        let with = |tables: Tables| -> Result<(Model, Besides)> {
            let model = Model { tables, ..model.clone() };
            let mut besides = Besides::default();
            for part in Self::besides(device, &model, batch, context)? {
                let bytes = if part.on_device { &mut besides.device_bytes } else { &mut besides.host_bytes };
                *bytes = bytes.saturating_add(part.bytes);
            }
            Ok((model, besides))
        };
        let plan = |tables: Tables| -> Result<(Model, Settings, Forecast)> {
            let (mut model, besides) = with(tables)?;
            let (homes, settings) = budget.plan(model.source(), &model.units_for(precision), besides, bandwidths)?;
            model.settle(homes);
            let forecast = Self::plan(device, &model, &settings)?.forecast(bandwidths);
            Ok((model, settings, forecast))
        };
        let time = |forecast: &Forecast| (forecast.pass_seconds, forecast.disk_seconds + forecast.copy_seconds);
        let mut best: Option<(Model, Settings, Forecast)> = None;
        for found in Tables::ALL.into_iter().filter_map(|tables| plan(tables).ok()) {
            if best.as_ref().is_none_or(|(.., best)| time(&found.2) < time(best)) {
                best = Some(found);
            }
        }
        // Where none fits, the error of that which lacks least of the device's memory, then of RAM.
        let lacking = |tables: Tables| -> Result<(usize, usize)> {
            let (model, besides) = with(tables)?;
            let least = budget.least(model.source(), &model.units_for(precision), besides)?;
            let device = least.device_bytes.zip(budget.device_bytes).map(|(least, given)| least.saturating_sub(given));
            Ok((device.unwrap_or(0), least.host_bytes))
        };
        let nearest =
            || Tables::ALL.into_iter().min_by_key(|tables| lacking(*tables).unwrap_or((usize::MAX, usize::MAX)));
        let (fitted, settings, _) = best.map_or_else(|| plan(nearest().unwrap_or_default()), Ok)?;
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
        if FileState::of(&file.metadata().map_err(Error::io("examine", path))?) != state {
            return Err(Error::checkpoint(path, "has changed since the checkpoint was opened; open it again"));
        }
        Ok(Self {
            file,
            name,
            path: path.clone(),
            offset: entry.offset,
            dtype: entry.dtype,
            row: vec![0; width * entry.dtype.size()],
            rounded: (weight, vec![0; width * weight.size()]),
            exchange: Exchange::new(device, "embedding rows on their way", tokens.min(BLOCK) * width)?,
        })
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
            let Self { file, name, path, offset, dtype, row, rounded: (weight, rounded), exchange } = self;
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
        Ok(())
    }
}

/// Converts stored elements to the bits of F32.
fn widen(dtype: DType, row: &[u8], words: &mut [u32]) {
    // SAFETY: the same memory as bytes, which any word is made of.
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) };
    dtype::convert(dtype, row, DType::F32, bytes);
}
