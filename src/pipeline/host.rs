//! Host memory: the slots of the host stages, and the memory of the units kept in RAM.

use std::{ops::Range, ptr::NonNull, sync::Arc};

use crate::{
    arena::Arena,
    device::Device,
    error::{Error, Result},
    layout::{DEVICE_ALIGN, PAGE, Space, StageLayout, UnitLayout},
    plan::{Plan, Tier},
};

/// Memory of the caller's: where it starts and how long it is (bytes).
type LentRange = (NonNull<u8>, usize);

/// What the caller lends a streamer for its slots, and for the units that are kept there; the rest the streamer reserves. Each starts
/// an address and has a length in bytes, of at least what [`Plan::slot_memory`] says.
#[derive(Clone, Copy, Debug, Default)]
pub struct LentMemory {
    /// Pageable RAM, on a boundary of 4096 bytes. It should be present: first touch is slower than a disk.
    pub ram: Option<(NonNull<u8>, usize)>,
    /// RAM that the device knows already, on a boundary of 4096 bytes.
    pub pinned: Option<(NonNull<u8>, usize)>,
    /// The device's memory, on a boundary of [`DEVICE_ALIGN`] bytes.
    pub gpu: Option<(NonNull<u8>, usize)>,
}

impl LentMemory {
    /// Whether anything is lent.
    pub(crate) fn is_some(&self) -> bool {
        self.ram.or(self.pinned).or(self.gpu).is_some()
    }

    /// Whether everything lent is large enough and begins where it must.
    pub(crate) fn check(&self, plan: &Plan) -> Result<()> {
        let [ram, pinned, gpu] = plan.layout.spaces();
        for (name, lent, space, align) in [
            ("ram_memory", self.ram, ram, PAGE),
            ("pinned_memory", self.pinned, pinned, PAGE),
            ("gpu_memory", self.gpu, gpu, DEVICE_ALIGN),
        ] {
            let (Some((start, bytes)), needed) = (lent, space.bytes()) else { continue };
            if bytes < needed {
                return Err(Error::setting(name, format!("is {bytes} bytes long, these settings need {needed}")));
            }
            if !start.addr().get().is_multiple_of(align) {
                return Err(Error::setting(name, format!("must begin on a multiple of {align} bytes")));
            }
        }
        Ok(())
    }
}

/// All of a streamer's host memory. Absent parts take none.
///
/// **Invariant**: a resident is written by the reader alone, and by nobody once its unit was handed over as
/// [`Place::Resident`](crate::pipeline::link::Place::Resident).
pub(crate) struct HostMemory {
    ram: Option<(Arena, StageLayout)>,
    pinned: Option<(Arena, StageLayout)>,
    ram_residents: Option<Arena>,
    pinned_residents: Option<Arena>,
    pinned_is_lent: bool,
}

impl HostMemory {
    /// # Safety
    /// What is lent outlives this, is used by nothing else meanwhile, and was [checked](LentMemory::check).
    pub(crate) unsafe fn new(plan: &Plan, lent: &LentMemory) -> Result<Arc<Self>> {
        let slots = |what, stage: &Option<StageLayout>, lent: Option<LentRange>| {
            let made = stage.as_ref().map(|stage| {
                let arena = match lent {
                    // SAFETY: what is lent is long enough for the slots, as was checked, and outlives this, as the caller promised.
                    Some((start, _)) => unsafe { Arena::lent(start, stage.slots, stage.slot_bytes) },
                    None => Arena::new(what, stage.slots, stage.slot_bytes)?,
                };
                Ok((arena, stage.clone()))
            });
            made.transpose()
        };
        let residents = |what, Space { slots, kept }: Space, lent: Option<LentRange>| {
            let arena = || match lent {
                // SAFETY: what is lent is long enough for the slots and, behind them, the residents, and outlives this.
                Some((start, _)) => unsafe { Ok(Arena::lent(start.add(slots), 1, kept)) },
                None => Arena::prefaulting(what, kept, |_| true),
            };
            (kept > 0).then(arena).transpose()
        };
        let [ram, pinned, _] = plan.layout.spaces();
        // Residents last: they start threads, which map memory and would have to wait for the slots.
        Ok(Arc::new(Self {
            ram: slots("RAM slots", &plan.layout.ram, lent.ram)?,
            pinned: slots("pinned slots", &plan.layout.pinned, lent.pinned)?,
            ram_residents: residents("units kept in RAM", ram, lent.ram)?,
            pinned_residents: residents("units kept in pinned RAM", pinned, lent.pinned)?,
            pinned_is_lent: lent.pinned.is_some(),
        }))
    }

    /// Makes the pinned slots known to the device, unless they are lent.
    ///
    /// # Safety
    /// The registration is dropped before the memory.
    pub(crate) unsafe fn register_slots<D: Device>(&self, device: &D) -> Result<Option<D::Registration>> {
        let pinned = self.pinned.as_ref().filter(|_| !self.pinned_is_lent);
        // SAFETY: the caller promised to drop the registration before the memory.
        pinned.map(|(arena, _)| unsafe { device.register(arena.whole().0.as_ptr(), arena.whole().1) }).transpose()
    }

    /// The same for a unit kept in pinned RAM, which lies there. Each has pages of its own.
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn register_resident<D: Device>(
        &self,
        device: &D,
        start: *mut u8,
        bytes: usize,
    ) -> Result<Option<D::Registration>> {
        if self.pinned_is_lent || bytes == 0 {
            return Ok(None);
        }
        // SAFETY: the caller promised to drop the registration before the memory.
        unsafe { device.register(start, bytes) }.map(Some)
    }

    /// The slots that the disk fills.
    pub(crate) fn first(&self) -> &(Arena, StageLayout) {
        self.ram.as_ref().or(self.pinned.as_ref()).expect("a plan has a host stage")
    }

    /// The slots that the transfer empties.
    pub(crate) fn last(&self) -> &(Arena, StageLayout) {
        self.pinned.as_ref().or(self.ram.as_ref()).expect("a plan has a host stage")
    }

    /// Where a unit is kept in RAM, pageable or pinned.
    pub(crate) fn resident(&self, unit: &UnitLayout) -> NonNull<u8> {
        let residents = if unit.tier == Tier::Pinned { &self.pinned_residents } else { &self.ram_residents };
        // SAFETY: the plan placed the unit among its tier's residents.
        residents.as_ref().map_or(NonNull::dangling(), |residents| unsafe { residents.slot(0).add(unit.resident_at) })
    }

    /// Room for units that are packed while the stream runs, behind those that are kept pinned. It is prefaulted from now on: where no
    /// unit is kept pinned nobody else asks for that, and what was used would still count as promised.
    pub(crate) fn packing_room(&self, plan: &Plan) -> Range<*mut u8> {
        self.pinned_residents.iter().for_each(Arena::prefault);
        let kept = |tier: Tier| plan.layout.kept(tier);
        let start = self.pinned_residents.as_ref().map_or(NonNull::dangling(), |arena| arena.slot(0)).as_ptr();
        let start = start.wrapping_add(kept(Tier::Pinned));
        start..start.wrapping_add(kept(Tier::PinnedPacked))
    }

    /// Whether a unit that is kept in RAM would wait for its memory to be prefaulted, though slots could take it.
    pub(crate) fn is_late(&self, unit: &UnitLayout) -> bool {
        let residents = if unit.tier == Tier::Pinned { &self.pinned_residents } else { &self.ram_residents };
        // Asked of small slots too, since that is what begins it.
        let absent =
            residents.as_ref().is_some_and(|residents| !residents.is_prefaulted(unit.resident_at + unit.host_bytes));
        absent && unit.host_bytes <= self.first().1.slot_bytes.min(self.last().1.slot_bytes)
    }

    /// What the disk fills again and again: start and length. Not the residents, which are read into once: making all of them
    /// known to the kernel would cost more than it saves, and have them present at once.
    pub(crate) fn read_targets(&self) -> [(*mut u8, usize); 1] {
        let (start, bytes) = self.first().0.whole();
        [(start.as_ptr(), bytes)]
    }

    /// It will never be dropped.
    pub(crate) fn abandon(&self) {
        self.ram_residents.iter().chain(&self.pinned_residents).for_each(Arena::abandon);
    }

    /// All of it, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let slots = self.ram.iter().chain(&self.pinned).map(|(arena, _)| arena);
        slots.chain(&self.ram_residents).chain(&self.pinned_residents).map(|arena| arena.whole().1).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;
    use crate::{
        fixtures::weights_fixture,
        plan::{Settings, Sharing},
    };

    #[test]
    fn room_for_packing_becomes_present_where_no_unit_is_kept_pinned() {
        let mut fixture = weights_fixture(1, &[300_000], 1);
        fixture.units[0].set_tier(Tier::PinnedPacked);
        let plan = Plan::new(&fixture.checkpoint, &fixture.units, &Settings::default(), Sharing::Own).unwrap();
        // SAFETY: nothing is lent.
        let host = unsafe { HostMemory::new(&plan, &LentMemory::default()).unwrap() };
        let Range { start, end } = host.packing_room(&plan);
        let bytes = end.addr() - start.addr();
        assert!(bytes > 64 * PAGE, "{bytes} bytes, of which not all are present from the start");
        let mut present = vec![0u8; bytes / PAGE];
        for _ in 0..1000 {
            // SAFETY: the room is that long, and the vector has a byte for each page.
            assert_eq!(unsafe { libc::mincore(start.cast(), bytes, present.as_mut_ptr()) }, 0);
            if present.iter().all(|page| page & 1 == 1) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("not within ten seconds");
    }
}
