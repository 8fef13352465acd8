//! A streamer from a budget: the library chooses the settings and where units are kept, and says what it would choose.

use std::{mem, ptr::NonNull};

use super::{
    any::AnyDevice,
    checkpoint::{CHECKPOINTS, ls_checkpoint},
    device::{DEVICES, ls_device},
    ffi::{Failure, Grows, Result, ffi, ls_status, place, write_sized},
    options::{StreamOptions, ls_streamer_options},
};
use crate::{
    checkpoint::Checkpoint,
    device::Device,
    model::{Cache, Fit, Model},
    plan::{Budget, Pack, Part, Placement, Plan, Settings, Sharing, Tier, Unit},
};

/// What a streamer or a model would choose and take. Set `size` before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ls_placement {
    /// sizeof(ls_placement).
    pub size: usize,
    /// As in ls_streamer_options, and so the next five.
    pub n_gpu: usize,
    /// Units buffered in pinned RAM.
    pub n_cpu_pinned: usize,
    /// Units buffered in pageable RAM.
    pub n_cpu: usize,
    /// Units handed over at once from the device's buffer.
    pub batch_gpu: usize,
    /// The same from pinned RAM.
    pub batch_cpu_pinned: usize,
    /// The same from pageable RAM.
    pub batch_cpu: usize,
    /// How many units a pass has.
    pub units: usize,
    /// How many of them are read from disk in every pass.
    pub units_disk: usize,
    /// How many are kept in pageable RAM.
    pub units_ram: usize,
    /// How many are kept in pinned RAM.
    pub units_pinned: usize,
    /// How many are kept on the device.
    pub units_gpu: usize,
    /// Bytes of RAM that are taken in all; of a device that computes in RAM also what it takes there.
    pub host_bytes: usize,
    /// Bytes of the device's own memory that are taken in all.
    pub device_bytes: usize,
    /// With LS_TOO_LITTLE, where RAM is too little: the least that will do. Else 0.
    pub least_host_bytes: usize,
    /// The same of the device's own memory.
    pub least_device_bytes: usize,
    /// How many units are kept on the device with packed and quantised tensors as they are stored.
    pub units_gpu_packed: usize,
    /// How many are kept in pinned RAM, packed there.
    pub units_pinned_packed: usize,
}

// SAFETY: `repr(C)`, all fields words, the first of them the size.
unsafe impl Grows for ls_placement {
    const FIRST: usize = mem::offset_of!(ls_placement, least_device_bytes) + size_of::<usize>();
}

impl ls_placement {
    /// Writes what was planned, or why it cannot be, where the caller wants it.
    ///
    /// # Safety
    /// `to` points to a placement whose size is set; `tiers` is NULL or starts as many codes as there is room for.
    pub(super) unsafe fn write(
        to: NonNull<Self>,
        planned: Result<(Placement, Vec<Part>)>,
        memory_is_ram: bool,
        (tiers, room): (*mut i32, usize),
    ) -> Result<()> {
        let size = size_of::<Self>();
        let (placement, memory) = match planned {
            Ok(planned) => planned,
            Err(failure) if failure.status != ls_status::LS_TOO_LITTLE => return Err(failure),
            Err(failure) => {
                let [least_host_bytes, least_device_bytes] = failure.least;
                let told = Self { size, least_host_bytes, least_device_bytes, ..Self::default() };
                // SAFETY: the caller says that as many bytes may be written as its size says.
                unsafe { write_sized(to, "placement", told)? };
                return Err(failure);
            }
        };
        let count = |tier| placement.tiers.iter().filter(|other| **other == tier).count();
        let [on_device, in_ram] = Part::totals(&memory);
        let (host_bytes, device_bytes) =
            if memory_is_ram { (in_ram.saturating_add(on_device), 0) } else { (in_ram, on_device) };
        let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = placement.settings;
        let told = Self {
            size,
            n_gpu,
            n_cpu_pinned,
            n_cpu,
            batch_gpu,
            batch_cpu_pinned,
            batch_cpu,
            units: placement.tiers.len(),
            units_disk: count(Tier::Disk),
            units_ram: count(Tier::Ram),
            units_pinned: count(Tier::Pinned),
            units_gpu: count(Tier::Gpu),
            units_gpu_packed: count(Tier::GpuPacked),
            units_pinned_packed: count(Tier::PinnedPacked),
            host_bytes,
            device_bytes,
            ..Self::default()
        };
        // SAFETY: the caller says that as many bytes may be written as its size says.
        unsafe { write_sized(to, "placement", told)? };
        let Some(tiers) = NonNull::new(tiers) else { return Ok(()) };
        let tiers = place(tiers.as_ptr(), "tiers")?;
        for (number, tier) in placement.tiers.iter().take(room).enumerate() {
            // SAFETY: the caller says that there is room for so many.
            unsafe { tiers.add(number).write(*tier as i32) };
        }
        Ok(())
    }
}

/// What ls_streamer_open with these arguments would choose and take, within its budgets if there are any; nothing is reserved or
/// read. `options` may be NULL: the defaults. Set `placement->size` to sizeof(ls_placement) before. `tiers` may be NULL, or has room for `room` ls_tier: those of the
/// first so many units.
///
/// LS_TOO_LITTLE if a budget is less than the least that will do, which `placement` then tells.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_streamer_plan(
    device: ls_device,
    checkpoint: ls_checkpoint,
    options: *const ls_streamer_options,
    placement: *mut ls_placement,
    tiers: *mut i32,
    room: usize,
) -> ls_status {
    ffi(|| {
        let to = place(placement, "placement")?;
        // SAFETY: the caller says that, but for NULL, options lie there.
        let chosen = unsafe { StreamOptions::read(options)? };
        let device = DEVICES.enter(device.id)?.device.clone();
        let checkpoint = CHECKPOINTS.enter(checkpoint.id)?.checkpoint.clone();
        let mut units = chosen.units(&checkpoint)?;
        let planned = chosen.fit(&device, &checkpoint, &mut units).and_then(|settings| {
            let plan = Plan::new(&checkpoint, &units, &settings, Sharing::of(&device))?;
            let tiers = units.iter().map(Unit::tier).collect();
            Ok((Placement { settings, tiers, statics: String::new() }, plan.memory()))
        });
        // SAFETY: the caller says that a placement and, but for NULL, so many tiers may be written.
        unsafe { ls_placement::write(to, planned, device.memory_is_ram(), (tiers, room)) }
    })
}

/// The value that stands for what is free.
const FREE: usize = usize::MAX;

impl StreamOptions {
    /// The budget on this device, if one was given.
    fn budget_on(&self, device: &AnyDevice) -> Result<Option<Budget>> {
        let [host, on_device] = self.budgets;
        if host == 0 {
            return match on_device {
                0 if self.pack == Pack::Auto => Ok(None),
                0 => Err(Failure::invalid("pack", "is given without a host_budget")),
                _ => Err(Failure::invalid("device_budget", "is given without a host_budget")),
            };
        }
        if self.tiers.is_some() {
            return Err(Failure::invalid("tiers", "are chosen within a budget: leave them NULL"));
        }
        if self.lends() {
            return Err(Failure::invalid("memory", "is the library's own within a budget: leave it NULL"));
        }
        if device.memory_is_ram() && on_device != 0 {
            return Err(Failure::invalid("device_budget", "is for devices with memory of their own: leave it 0"));
        }
        let given = |bytes: usize| Some(bytes).filter(|bytes| ![0, FREE].contains(bytes));
        Ok(Some(Budget::given_or_free(device, given(on_device), given(host))?))
    }

    fn within(&self, planned: Settings) -> Settings {
        Settings { reader: self.settings.reader, cache: self.settings.cache, ..planned }
    }

    /// The settings for these units, which are given their tiers if there is a budget.
    pub(super) fn fit(&self, device: &AnyDevice, checkpoint: &Checkpoint, units: &mut [Unit]) -> Result<Settings> {
        let Some(budget) = self.budget_on(device)? else { return Ok(self.settings.clone()) };
        let pack = if self.pack == Pack::Auto { Pack::Never } else { self.pack };
        let (overhead, bandwidths) = Default::default();
        let placement = budget.plan_packing(checkpoint, units, overhead, bandwidths, None, pack)?;
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
        let fit = Fit { pack: self.pack, ..Fit::new(device, budget, Cache::full(batch, context)) };
        Ok(self.within(fit.fastest(model)?))
    }
}
