//! A streamer from a budget: the library chooses the settings and where units live.

use super::{
    any::AnyDevice,
    ffi::{Failure, Result},
    options::StreamOptions,
};
use crate::{
    checkpoint::Checkpoint,
    device::Device,
    model::{Decoder, Model},
    plan::{Bandwidths, Budget, FixedOverhead, Settings, Unit},
};

/// The value that stands for what is free.
const FREE: usize = usize::MAX;

impl StreamOptions {
    /// The budget on this device, if one was given.
    fn budget_on(&self, device: &AnyDevice) -> Result<Option<Budget>> {
        let [host, on_device] = self.budgets;
        if host == 0 {
            return match on_device {
                0 => Ok(None),
                _ => Err(Failure::invalid("device_budget", "is given without a host_budget")),
            };
        }
        if self.tiers.is_some() {
            return Err(Failure::invalid("tiers", "are chosen within a budget: leave them NULL"));
        }
        if self.lends() {
            return Err(Failure::invalid("memory", "is the library's own within a budget: leave it NULL"));
        }
        let own = !device.memory_is_ram();
        if !own && on_device != 0 {
            return Err(Failure::invalid("device_budget", "is for devices with memory of their own: leave it 0"));
        }
        // What is free is asked for only where it is wanted: not every system tells.
        if host != FREE && !(own && [0, FREE].contains(&on_device)) {
            return Ok(Some(Budget { device_bytes: own.then_some(on_device), host_bytes: host }));
        }
        let free = Budget::free(device)?;
        let given = |bytes: usize, free: usize| if [0, FREE].contains(&bytes) { free } else { bytes };
        let device_bytes = free.device_bytes.map(|free| given(on_device, free));
        Ok(Some(Budget { device_bytes, host_bytes: given(host, free.host_bytes) }))
    }

    fn within(&self, planned: Settings) -> Settings {
        Settings { reader: self.settings.reader, cache: self.settings.cache, ..planned }
    }

    /// The settings for these units, which are given their tiers if there is a budget.
    pub(super) fn fit(&self, device: &AnyDevice, checkpoint: &Checkpoint, units: &mut [Unit]) -> Result<Settings> {
        let Some(budget) = self.budget_on(device)? else { return Ok(self.settings.clone()) };
        let placement = budget.plan(checkpoint, units, FixedOverhead::default(), Bandwidths::default())?;
        placement.apply_to(units)?;
        Ok(self.within(placement.settings))
    }

    /// The same for a model, all of whose memory counts.
    pub(super) fn fit_model(
        &self,
        device: &AnyDevice,
        model: &mut Model,
        batch: usize,
        context: usize,
    ) -> Result<Settings> {
        let Some(budget) = self.budget_on(device)? else { return Ok(self.settings.clone()) };
        Ok(self.within(Decoder::fit(device, model, budget, Bandwidths::default(), batch, context)?))
    }
}
