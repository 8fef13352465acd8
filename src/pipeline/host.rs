//! Host memory: the slots of the host stages, and the homes of the units that live in RAM.

use std::{ptr::NonNull, sync::Arc};

use crate::{
    arena::Arena,
    device::Device,
    error::Result,
    plan::{Home, Plan, StagePlan, UnitPlan},
};

/// All of a streamer's host memory. Absent parts take none.
///
/// **Invariant**: a home is written by the reader alone, and by nobody once its unit was handed over for the first time.
pub(crate) struct HostMemory {
    ram: Option<(Arena, StagePlan)>,
    pinned: Option<(Arena, StagePlan)>,
    ram_homes: Option<Arena>,
    pinned_homes: Option<Arena>,
}

impl HostMemory {
    /// `registers`: the device takes note of pinned memory, and for that needs it present.
    pub(crate) fn new(plan: &Plan, registers: bool) -> Result<Arc<Self>> {
        let slots = |what, stage: &Option<StagePlan>| {
            let made =
                stage.as_ref().map(|stage| Ok((Arena::new(what, stage.slots, stage.slot_bytes)?, stage.clone())));
            made.transpose()
        };
        let homes = |what, bytes: usize, at_once: bool| {
            let arena = || if at_once { Arena::new(what, 1, bytes) } else { Arena::filled_once(what, bytes) };
            (bytes > 0).then(arena).transpose()
        };
        // Homes first: what does not fit is most often they, and is refused before time was spent on the rest.
        Ok(Arc::new(Self {
            ram_homes: homes("units living in RAM", plan.residents.ram, false)?,
            pinned_homes: homes("units living in pinned RAM", plan.residents.pinned, registers)?,
            ram: slots("RAM slots", &plan.ram)?,
            pinned: slots("pinned slots", &plan.pinned)?,
        }))
    }

    /// Makes the pinned parts known to the device.
    ///
    /// # Safety
    /// The registrations are dropped before the memory.
    pub(crate) unsafe fn register<D: Device>(&self, device: &D) -> Result<Vec<D::Registration>> {
        let pinned = self.pinned.iter().map(|(arena, _)| arena).chain(&self.pinned_homes);
        let register = |arena: &Arena| {
            let (start, bytes) = arena.whole();
            // SAFETY: the caller's.
            unsafe { device.register(start.as_ptr(), bytes) }
        };
        pinned.map(register).collect()
    }

    /// The slots that the disk fills.
    pub(crate) fn first(&self) -> &(Arena, StagePlan) {
        self.ram.as_ref().or(self.pinned.as_ref()).expect("a plan has a host stage")
    }

    /// The slots that the transfer empties.
    pub(crate) fn last(&self) -> &(Arena, StagePlan) {
        self.pinned.as_ref().or(self.ram.as_ref()).expect("a plan has a host stage")
    }

    /// Where a unit that lives in RAM, pageable or pinned, has its home.
    pub(crate) fn home(&self, unit: &UnitPlan) -> NonNull<u8> {
        let homes = if unit.home == Home::Pinned { &self.pinned_homes } else { &self.ram_homes };
        // SAFETY: the plan placed the unit inside its homes.
        homes.as_ref().map_or(NonNull::dangling(), |homes| unsafe { homes.slot(0).add(unit.resident_at) })
    }

    /// What the disk fills again and again: start and length. Not the homes, which are read into once: making all of them
    /// known to the kernel would cost more than it saves, and have them present at once.
    pub(crate) fn read_targets(&self) -> [(*mut u8, usize); 1] {
        let (start, bytes) = self.first().0.whole();
        [(start.as_ptr(), bytes)]
    }

    /// All of it, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let slots = self.ram.iter().chain(&self.pinned).map(|(arena, _)| arena);
        slots.chain(&self.ram_homes).chain(&self.pinned_homes).map(|arena| arena.whole().1).sum()
    }
}
