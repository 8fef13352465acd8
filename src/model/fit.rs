//! Which settings, tiers and tables make a decoder the fastest within a budget of memory.

use super::{
    buffers::{self, Cache, Capacity},
    decoder::Decoder,
    tables::Tables,
    weights::Model,
};
use crate::{
    error::Result,
    kernels::Kernels,
    plan::{Bandwidths, Budget, FixedOverhead, Forecast, Pack, Placement, Settings, fastest},
};

/// How a decoder becomes the fastest that fits into a budget of memory.
///
/// ```no_run
/// use layer_streamer::{
///     device::Cpu,
///     model::{Cache, Decoder, Fit, Model},
///     plan::Budget,
/// };
///
/// let mut model = Model::open("model")?;
/// let fit = Fit::new(&Cpu, Budget::free(&Cpu)?, Cache::full(1, 4096));
/// let settings = fit.fastest(&mut model)?;
/// let decoder = Decoder::with_cache(&Cpu, &model, &settings, fit.cache)?;
/// # Ok::<(), layer_streamer::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Fit<'a, D> {
    /// Where it computes.
    pub device: &'a D,
    /// What it may take, together with `overhead`.
    pub budget: Budget,
    /// What else is taken of the budget: a host's tokenizer, for example.
    pub overhead: FixedOverhead,
    /// What disk and link carry.
    pub bandwidths: Bandwidths,
    /// As for [`Decoder::with_cache`].
    pub cache: Cache,
    /// Where they are given: what they leave of the budget decides on tiers and tables.
    pub settings: Option<&'a Settings>,
    /// Whether layers may be packed where they are kept in RAM.
    pub pack: Pack,
}

impl<'a, D: Kernels> Fit<'a, D> {
    /// Nothing else is taken, bandwidths are assumed, and settings are free.
    pub fn new(device: &'a D, budget: Budget, cache: Cache) -> Self {
        let (overhead, bandwidths) = (FixedOverhead::default(), Bandwidths::default());
        Self { device, budget, overhead, bandwidths, cache, settings: None, pack: Pack::Auto }
    }

    /// The settings with which the model runs fastest. Its layers are given tiers, and its [tables](Model::tables) their place.
    ///
    /// # Errors
    /// [`Error::TooLittle`](crate::Error::TooLittle) if the budget is less than the minimum, which it names; else as
    /// [`Decoder::memory`].
    pub fn fastest(&self, model: &mut Model) -> Result<Settings> {
        let capacity = Capacity::new(self.device, &model.config, self.cache)?;
        let plan = |tables: Tables| self.plan(model, capacity, tables);
        let plans = Tables::ALL.into_iter().filter_map(|tables| plan(tables).ok());
        let best = fastest(plans.map(|plan| (plan.2.cost(), plan)), 0.0);
        // Where none fits, the error of that which lacks least of the device's memory, then of RAM.
        let lacking = |tables: Tables| self.lacking(model, capacity, tables).unwrap_or((usize::MAX, usize::MAX));
        let nearest = || Tables::ALL.into_iter().min_by_key(|tables| lacking(*tables)).unwrap_or_default();
        let (fitted, settings, _) = best.map_or_else(|| plan(nearest()), Ok)?;
        *model = fitted;
        Ok(settings)
    }

    /// The model with these tables, and what it takes whatever its tiers.
    fn with(&self, model: &Model, capacity: Capacity, tables: Tables) -> Result<(Model, FixedOverhead)> {
        let model = model.with_tables(tables);
        let own = FixedOverhead::of(&buffers::parts(self.device, &model, capacity)?);
        let overhead = FixedOverhead {
            device_bytes: self.overhead.device_bytes.saturating_add(own.device_bytes),
            host_bytes: self.overhead.host_bytes.saturating_add(own.host_bytes),
        };
        Ok((model, overhead))
    }

    /// The fastest with these tables.
    fn plan(&self, model: &Model, capacity: Capacity, tables: Tables) -> Result<(Model, Settings, Forecast)> {
        let (mut model, overhead) = self.with(model, capacity, tables)?;
        let (source, units) = (model.source(), model.units_for(self.device.precision()));
        let planned = self.budget.plan_packing(source, &units, overhead, self.bandwidths, self.settings, self.pack);
        let Placement { settings, tiers, .. } = planned?;
        model.settle(tiers);
        let forecast = Decoder::plan(self.device, &model, &settings)?.forecast(self.bandwidths);
        Ok((model, settings, forecast))
    }

    /// How much of the device's memory is missing with these tables, and how much RAM it takes at least.
    fn lacking(&self, model: &Model, capacity: Capacity, tables: Tables) -> Result<(usize, usize)> {
        let (model, overhead) = self.with(model, capacity, tables)?;
        let units = model.units_for(self.device.precision());
        let least = self.budget.least_with(model.source(), &units, overhead, self.settings)?;
        let device = least.device_bytes.zip(self.budget.device_bytes);
        let device = device.map(|(least, given)| least.saturating_sub(given));
        Ok((device.unwrap_or(0), least.host_bytes))
    }
}
