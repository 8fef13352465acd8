//! Device memory: the slots that compute uses, the memory of the units that stay, and the events that guard both.

use std::{
    ptr,
    sync::{
        Arc,
        atomic::{AtomicPtr, Ordering},
    },
};

use crate::{
    arena::Arena,
    device::{Device, DevicePtr},
    error::Result,
    io::{MappedUnit, Source},
    layout::{Space, UnitLayout},
    pipeline::link::{Place, Slot},
    plan::Plan,
};

/// What the memory of kept units is called in messages.
const KEPT: &str = "units kept on the device";

/// A stretch of device memory.
enum Stretch<D: Device> {
    Own(D::Memory),
    /// Of a device whose memory is RAM: it may become present while it is filled.
    Ram(Arena),
    /// The caller's.
    Lent(DevicePtr),
}

impl<D: Device> Stretch<D> {
    fn start(&self, device: &D) -> DevicePtr {
        match self {
            Self::Own(memory) => device.address(memory),
            Self::Ram(arena) => DevicePtr::new(arena.slot(0).as_ptr()),
            Self::Lent(start) => *start,
        }
    }
}

/// By where a page of the kept units' memory begins: whether it is needed, which it is not while its unit is used from the page cache.
fn needed(
    plan: &Arc<Plan>,
    sources: &Arc<[Source]>,
    mapped: &Arc<[Option<MappedUnit>]>,
) -> impl Fn(usize) -> bool + Clone + Send + 'static {
    let (plan, sources, mapped) = (plan.clone(), sources.clone(), mapped.clone());
    let begins = |(index, _): (usize, &Option<_>)| (plan.units[index].resident_at, index);
    let mut units: Vec<_> = mapped.iter().enumerate().filter(|(_, mapped)| mapped.is_some()).map(begins).collect();
    units.sort_unstable();
    move |page| {
        let of_page = units.partition_point(|(begin, _)| *begin <= page).checked_sub(1);
        let is_used_in_page_cache = of_page.is_some_and(|of_page| {
            let (begin, index) = units[of_page];
            let (mapped, unit) = (&mapped[index], &plan.units[index]);
            page < begin + unit.kept_bytes() && mapped.as_ref().is_some_and(|mapped| mapped.is_chosen(&sources, unit))
        });
        !is_used_in_page_cache
    }
}

/// Device memory with its events; the transfer fills it, compute uses it. A unit that is used in place is not in it: its slot stands for
/// that in host memory where it lies, and is without memory where all units are. While the page cache has such a unit that is
/// kept, it is used there.
///
/// **Invariant**: a slot belongs to the side of the link that has it, and on the device until its event; a resident is written
/// once, while its unit is `Filling`. Once that copy is enqueued, with `arrived` after it, or the read is done where it is used in place,
/// the unit is `There` (see [`residency`](super::residency)).
pub(crate) struct DeviceMemory<D: Device> {
    device: D,
    slots: Stretch<D>,
    slot_bytes: usize,
    /// By slot: where the unit lies in host memory that is used in place.
    in_place: Vec<AtomicPtr<u8>>,
    residents: Option<Stretch<D>>,
    /// By unit, for those that are kept and used in place: where they are while the page cache has them.
    mapped: Arc<[Option<MappedUnit>]>,
    /// By slot: the unit in it is on the device and as the layer function expects it.
    arrived: Vec<D::Event>,
    /// By slot: the layer function is done with it.
    compute_done: Vec<D::Event>,
    /// The same two by unit, for those that are kept on the device.
    resident_events: Vec<Option<[D::Event; 2]>>,
    pub(crate) bytes: usize,
}

impl<D: Device> DeviceMemory<D> {
    /// In memory of the caller's if some is `lent`, which is long enough and outlives this: the residents behind the slots.
    pub(crate) fn new(device: &D, plan: &Arc<Plan>, sources: &Arc<[Source]>, lent: Option<DevicePtr>) -> Result<Self> {
        let (stage, [.., space]) = (&plan.layout.gpu, plan.layout.spaces());
        let Space { slots: slot_bytes, kept } = space;
        let events = || (0..stage.slots).map(|_| device.event()).collect::<Result<Vec<_>>>();
        let mapped: Arc<[_]> = plan.units.iter().map(|unit| MappedUnit::new(sources, unit)).collect();
        let if_resident =
            |unit: &UnitLayout| unit.tier.is_on_device().then(|| Ok([device.event()?, device.event()?])).transpose();
        let slots = || match lent {
            Some(start) => Ok(Stretch::Lent(start)),
            None => device.allocate("device slots", slot_bytes).map(Stretch::Own),
        };
        // Behind the slots.
        let residents_at = || match lent {
            Some(start) => Ok(Stretch::Lent(start.offset(slot_bytes))),
            None if device.memory_is_ram() => {
                Arena::prefaulting(KEPT, kept, needed(plan, sources, &mapped)).map(Stretch::Ram)
            }
            None => device.allocate(KEPT, kept).map(Stretch::Own),
        };
        Ok(Self {
            slots: slots()?,
            residents: (kept > 0).then(residents_at).transpose()?,
            slot_bytes: stage.slot_bytes,
            in_place: (0..stage.slots).map(|_| AtomicPtr::new(ptr::null_mut())).collect(),
            arrived: events()?,
            compute_done: events()?,
            resident_events: plan.units.iter().map(if_resident).collect::<Result<_>>()?,
            mapped,
            bytes: space.bytes(),
            device: device.clone(),
        })
    }

    /// Says where in host memory the unit lies for which a slot stands from now on.
    pub(crate) fn put_in_place(&self, Slot(slot): Slot, at: *mut u8) {
        // Whoever asks has the slot from the ring, which orders this before it.
        self.in_place[slot].store(at, Ordering::Relaxed);
    }

    /// Where `unit` lies.
    pub(crate) fn address(&self, plan: &Plan, unit: usize, place: Place) -> DevicePtr {
        match (place, &self.residents) {
            (Place::Slot(Slot(slot)), _) if plan.units[unit].in_place => {
                DevicePtr::new(self.in_place[slot].load(Ordering::Relaxed))
            }
            (Place::Slot(Slot(slot)), _) => self.slots.start(&self.device).offset(slot * self.slot_bytes),
            (Place::Mapped, _) => DevicePtr::new(self.mapped(unit).expect("it is used so").start()),
            (Place::Resident, Some(residents)) => residents.start(&self.device).offset(plan.units[unit].resident_at),
            // A unit without a byte needs no memory.
            (Place::Resident, None) => self.slots.start(&self.device),
        }
    }

    /// The unit's files, if it may be used from the page cache.
    pub(crate) fn mapped(&self, unit: usize) -> Option<&MappedUnit> {
        self.mapped[unit].as_ref()
    }

    /// It will never be dropped.
    pub(crate) fn abandon(&self) {
        if let Some(Stretch::Ram(arena)) = &self.residents {
            arena.abandon();
        }
    }

    /// Whether a unit that is kept here would wait for its memory to be prefaulted, though a slot could take it: one in host memory, of so
    /// many bytes, if it is used in place.
    pub(crate) fn is_late(&self, unit: &UnitLayout, host_slot: usize) -> bool {
        let absent = match &self.residents {
            Some(Stretch::Ram(arena)) => !arena.is_prefaulted(unit.resident_at + unit.kept_bytes()),
            _ => false,
        };
        absent
            && match unit.in_place {
                true => unit.host_bytes <= host_slot,
                false => unit.device_bytes <= self.slot_bytes,
            }
    }

    /// The event of the unit's arrival there, and that of the end of its use.
    pub(crate) fn events(&self, unit: usize, place: Place) -> [&D::Event; 2] {
        match place {
            Place::Slot(Slot(slot)) => [&self.arrived[slot], &self.compute_done[slot]],
            Place::Resident | Place::Mapped => {
                self.resident_events[unit].as_ref().expect("the unit is kept on the device").each_ref()
            }
        }
    }

    /// All events that say that the device may still use the memory.
    pub(crate) fn all_events(&self) -> impl Iterator<Item = &D::Event> {
        self.arrived.iter().chain(&self.compute_done).chain(self.resident_events.iter().flatten().flatten())
    }
}
