//! Which settings, tiers and tables make a decoder the fastest within a budget of memory.

use super::{
    buffers::{self, Capacity},
    decoder::Decoder,
    tables::Tables,
    weights::Model,
};
use crate::{
    error::Result,
    kernels::Kernels,
    plan::{Bandwidths, Budget, FixedOverhead, Forecast, Part, Placement, Settings, fastest},
};

impl<D: Kernels> Decoder<D> {
    /// The settings with which the model runs fastest within `budget`, for which its layers are given tiers and its
    /// [tables](Model::tables) their place.
    ///
    /// # Errors
    /// [`Error::TooLittle`](crate::Error::TooLittle) if the budget is less than the minimum, which it names; else as [`Decoder::memory`].
    pub fn fit(
        device: &D,
        model: &mut Model,
        budget: Budget,
        bandwidths: Bandwidths,
        batch: usize,
        context: usize,
    ) -> Result<Settings> {
        let capacity = Capacity::new(&model.config, batch, context)?;
        let fit = BudgetFit { device, budget, bandwidths, capacity, settings: None };
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
        let capacity = Capacity::new(&model.config, batch, context)?;
        let fit = BudgetFit { device, budget, bandwidths, capacity, settings: Some(settings) };
        fit.fastest(model).map(drop)
    }
}

/// What a decoder is to fit into.
struct BudgetFit<'a, D> {
    device: &'a D,
    budget: Budget,
    bandwidths: Bandwidths,
    capacity: Capacity,
    /// Where they are given.
    settings: Option<&'a Settings>,
}

impl<D: Kernels> BudgetFit<'_, D> {
    /// The model with these tables, and what it takes whatever its tiers.
    fn with(&self, model: &Model, tables: Tables) -> Result<(Model, FixedOverhead)> {
        let model = model.with_tables(tables);
        let [device_bytes, host_bytes] = Part::totals(&buffers::parts(self.device, &model, self.capacity)?);
        Ok((model, FixedOverhead { device_bytes, host_bytes }))
    }

    /// The fastest with these tables.
    fn plan(&self, model: &Model, tables: Tables) -> Result<(Model, Settings, Forecast)> {
        let (mut model, overhead) = self.with(model, tables)?;
        let (source, units) = (model.source(), model.units_for(self.device.precision()));
        let Placement { settings, tiers, .. } = match self.settings {
            None => self.budget.plan(source, &units, overhead, self.bandwidths)?,
            Some(settings) => self.budget.plan_with(source, &units, overhead, self.bandwidths, settings)?,
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
        let plans = Tables::ALL.into_iter().filter_map(|tables| self.plan(model, tables).ok());
        let best = fastest(plans.map(|plan| (plan.2.cost(), plan)), 0.0);
        // Where none fits, the error of that which lacks least of the device's memory, then of RAM.
        let lacking = |tables: Tables| self.lacking(model, tables).unwrap_or((usize::MAX, usize::MAX));
        let nearest = || Tables::ALL.into_iter().min_by_key(|tables| lacking(*tables)).unwrap_or_default();
        let (fitted, settings, _) = best.map_or_else(|| self.plan(model, nearest()), Ok)?;
        *model = fitted;
        Ok(settings)
    }
}
