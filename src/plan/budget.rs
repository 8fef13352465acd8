//! From an amount of memory to the fastest plan: which units stay, where, and how deep the rings are.
//!
//! Units are used cyclically, so the best cache keeps a fixed set: the share kept is the share saved, whereas a cache of the most
//! recent units would never hit. Units that are still read should come at even distances, so that the disk and the link work all
//! the time while rings stay short.
//!
//! [`choose`] goes through a family of plans that does not depend on the budget, and takes the fastest that fits. Hence more
//! memory is never slower, and no plan is slower than the rings alone, which are one of the family. The exception: units whose
//! sizes differ by up to 1/64 count as equal.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Bandwidths, Forecast, Part, Placement, Settings, Sharing, Tier, Unit, fastest};
use crate::{
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, MemoryKind, Result},
    layout::{MOST, Rings, Sizes, Staging, StreamLayout, Tallies, Tally, UnitLayout},
    memory,
};

/// Whether units that are stored plain may be packed where they are [kept in RAM](Tier::PinnedPacked).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pack {
    /// Where passes are expected to be faster for it.
    #[default]
    Auto,
    /// They are kept as they are stored.
    Never,
    /// All of them.
    Always,
}

impl FromStr for Pack {
    type Err = Error;

    /// From `auto`, `never` or `always`.
    ///
    /// # Errors
    /// [`Error::Setting`] for anything else.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            _ => Err(Error::setting("pack", format!("is {text:?}, expected auto, never or always"))),
        }
    }
}

/// How much memory may be used, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Of the device's own memory; `None` for a device that computes in the host's, whose budget is then for both. A plan keeps
    /// to it on a device of that kind.
    pub device_bytes: Option<usize>,
    /// Of RAM.
    pub host_bytes: usize,
}

/// Memory that is taken whatever the plan, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FixedOverhead {
    /// On the device.
    pub device_bytes: usize,
    /// In RAM.
    pub host_bytes: usize,
}

impl FixedOverhead {
    /// What these take.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a Part>) -> Self {
        let [device_bytes, host_bytes] = Part::totals(parts);
        Self { device_bytes, host_bytes }
    }
}

impl Budget {
    /// What is free now, on the device and in RAM, limits of control groups honoured, less a reserve for everything else: a
    /// sixteenth of it, and at least 256 MiB; a quarter where that would be too much.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the system does not tell, or the device's own.
    pub fn free<D: Device>(device: &D) -> Result<Self> {
        Self::given_or_free(device, None, None)
    }

    /// So many bytes of the device's own memory and of RAM; of what is not given, what is [free](Self::free), which is asked for
    /// nothing else: not every system tells. `device_bytes` does not count where the device computes in RAM.
    ///
    /// # Errors
    /// As there.
    pub fn given_or_free<D: Device>(
        device: &D,
        device_bytes: Option<usize>,
        host_bytes: Option<usize>,
    ) -> Result<Self> {
        let on_device = || device_bytes.map_or_else(|| Ok(memory::less_reserve(device.free_memory()?)), Ok);
        let in_ram = || {
            memory::free().map(memory::less_reserve).ok_or_else(|| Error::Unsupported {
                what: "finding out how much memory is free (no MemAvailable in /proc/meminfo)".into(),
                remedy: "say how much may be used".into(),
            })
        };
        Ok(Self {
            device_bytes: if device.memory_is_ram() { None } else { Some(on_device()?) },
            host_bytes: host_bytes.map_or_else(in_ram, Ok)?,
        })
    }

    /// The settings, and the tiers of `units`, with which a pass is fastest, where `overhead` is taken as well: whatever static
    /// tensors and computation take. Where memory is short, fewer layers can be held at a time (`n_gpu`). Units are kept in RAM as they
    /// are stored.
    ///
    /// # Errors
    /// [`Error::TooLittle`] if the budget is less than the minimum, which it names; else as [`Plan::new`](super::Plan::new).
    pub fn plan(
        self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        overhead: FixedOverhead,
        bandwidths: Bandwidths,
    ) -> Result<Placement> {
        self.plan_packing(checkpoint, units, overhead, bandwidths, None, Pack::Never)
    }

    /// The same where the settings are given: what their slots leave of the budget keeps units.
    ///
    /// # Errors
    /// [`Error::TooLittle`] if the budget is less than the least that will do with these settings, which it names, or for settings
    /// that cannot work; else as [`Plan::new`](super::Plan::new).
    pub fn plan_with(
        self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        overhead: FixedOverhead,
        bandwidths: Bandwidths,
        settings: &Settings,
    ) -> Result<Placement> {
        self.plan_packing(checkpoint, units, overhead, bandwidths, Some(settings), Pack::Never)
    }

    /// The same with settings or without, where units may be packed in RAM.
    ///
    /// # Errors
    /// As there.
    pub fn plan_packing(
        self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        overhead: FixedOverhead,
        bandwidths: Bandwidths,
        settings: Option<&Settings>,
        pack: Pack,
    ) -> Result<Placement> {
        settings.map_or(Ok(()), Settings::validate)?;
        let survey = Survey::new(checkpoint, units, overhead, self.sharing())?;
        let given = settings.map(|settings| [settings.rings()]);
        let among = given.as_ref().map_or(&RINGS[..], |rings| rings);
        let (tiers, [n_gpu, n_cpu_pinned, n_cpu]) = choose(&survey, self, bandwidths, among, pack)?;
        let settings = settings.cloned().unwrap_or_default();
        Ok(Placement { settings: Settings { n_gpu, n_cpu_pinned, n_cpu, ..settings }, tiers, ..Placement::default() })
    }

    /// The least budget that will do where this one is wanted: of one memory or of two, as that is.
    ///
    /// # Errors
    /// As [`Plan::new`](super::Plan::new).
    pub fn least(self, checkpoint: &Checkpoint, units: &[Unit], overhead: FixedOverhead) -> Result<Self> {
        self.least_with(checkpoint, units, overhead, None)
    }

    /// The same where the settings may be given.
    pub(crate) fn least_with(
        self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        overhead: FixedOverhead,
        settings: Option<&Settings>,
    ) -> Result<Self> {
        let survey = Survey::new(checkpoint, units, overhead, self.sharing())?;
        let rings = settings.map_or(SHORTEST, Settings::rings);
        Ok(least(&families(&survey, &classes(&survey.sizes), self.sharing()), self, rings))
    }
}

/// What the units move and take, and what is taken whatever their tiers.
struct Survey {
    sizes: Vec<Sizes>,
    /// Staging blocks included.
    overhead: FixedOverhead,
    /// By how much staging blocks grow where units are packed in RAM.
    packing: usize,
}

impl Survey {
    fn new(checkpoint: &Checkpoint, units: &[Unit], overhead: FixedOverhead, sharing: Sharing) -> Result<Self> {
        if units.is_empty() {
            return Err(Error::setting("units", "there must be at least one"));
        }
        let planned = units.iter().map(|unit| UnitLayout::new(checkpoint, unit)).collect::<Result<Vec<_>>>();
        let mut planned = planned?;
        for unit in &mut planned {
            unit.tier = Tier::Disk;
            if sharing == Sharing::Ram {
                unit.share_memory();
            }
        }
        let sizes: Vec<_> = planned.iter().map(UnitLayout::sizes).collect();
        let all = sizes.iter().fold(Sizes::default(), |sum, &size| sum.plus(size));
        // Sums of them would mean nothing.
        if all.host.max(all.device) > MOST {
            return Err(Error::setting("units", "are larger together than can be addressed"));
        }
        let staging = Staging::of(&planned, sharing).bytes();
        planned.iter_mut().for_each(|unit| unit.tier = Tier::PinnedPacked);
        let packing = Staging::of(&planned, sharing).bytes() - staging;
        let device_bytes = overhead.device_bytes.saturating_add(staging);
        Ok(Self { sizes, overhead: FixedOverhead { device_bytes, ..overhead }, packing })
    }
}

/// Those that a plan chooses from; the first of equally fast ones is taken, with which the first pass is fastest. Deeper rings
/// than these win nothing that a unit kept in their place does not, on a machine that is as even as the forecast takes it to be.
const RINGS: [Rings; 3] = [[1, 2, 0], [1, 1, 0], SHORTEST];

/// Those that take least.
const SHORTEST: Rings = [1, 0, 0];

/// Units in an order in which they are given tiers: the first `gpu` are kept on the device, plain or packed, from there up to `kept` in
/// pinned RAM.
/// Sums and maxima by number of units make any such plan's memory and time a matter of a few additions.
struct PlanFamily {
    order: Vec<usize>,
    /// Sums over the first units of the order.
    first: Vec<Sizes>,
    /// The largest of the first units, and of the rest.
    largest: Vec<[Sizes; 2]>,
    overhead: FixedOverhead,
    packing: usize,
    sharing: Sharing,
}

/// One plan of a family.
#[derive(Clone, Copy)]
struct Member {
    rings: Rings,
    gpu: usize,
    kept: usize,
    ways: Ways,
}

/// The tiers of units that are kept on the device, and in RAM.
#[derive(Clone, Copy)]
struct Ways {
    on_device: Tier,
    in_ram: Tier,
}

/// As they arrive, and as they are stored.
const PLAIN: Ways = Ways { on_device: Tier::Gpu, in_ram: Tier::Pinned };

impl PlanFamily {
    /// The units in `order`; those alike count as the largest of them, so that they can be exchanged.
    fn new(order: Vec<usize>, sizes: &[Sizes], survey: &Survey, sharing: Sharing) -> Self {
        let (mut first, mut largest) = (vec![Sizes::default()], vec![[Sizes::default(); 2]; order.len() + 1]);
        for (i, &unit) in order.iter().enumerate() {
            first.push(first[i].plus(sizes[unit]));
            largest[i + 1][0] = largest[i][0].max(sizes[unit]);
        }
        for (i, &unit) in order.iter().enumerate().rev() {
            largest[i][1] = largest[i + 1][1].max(sizes[unit]);
        }
        let Survey { overhead, packing, .. } = *survey;
        Self { order, first, largest, overhead, packing, sharing }
    }

    fn len(&self) -> usize {
        self.order.len()
    }

    /// What its units come to, tier by tier.
    fn tallies(&self, Member { gpu, kept, ways, .. }: Member) -> Tallies {
        let (all, [on_device, in_ram]) = (self.first[self.len()], [self.first[gpu], self.first[kept]]);
        let [on_disk, not_on_device] = [kept, gpu].map(|number| self.largest[number][1]);
        let mut tallies = Tallies::default();
        tallies.0[ways.on_device as usize] = Tally { units: gpu, sum: on_device, largest: self.largest[gpu][0] };
        // No larger than the larger of these and of those on disk, with which they pass through the device's slots.
        tallies.0[ways.in_ram as usize] =
            Tally { units: kept - gpu, sum: in_ram.minus(on_device), largest: not_on_device };
        tallies.0[Tier::Disk as usize] = Tally { units: self.len() - kept, sum: all.minus(in_ram), largest: on_disk };
        tallies
    }

    fn layout(&self, member: Member) -> StreamLayout {
        StreamLayout::new(&self.tallies(member), member.rings, [0; 3], self.sharing, Staging::default())
    }

    /// What it takes on the device and in RAM.
    fn memory(&self, member: Member) -> [usize; 2] {
        let [device, host] = self.layout(member).memory();
        let packs = member.ways.in_ram == Tier::PinnedPacked && member.kept > member.gpu;
        let staging = if packs { self.packing } else { 0 };
        let device = device.saturating_add(staging).saturating_add(self.overhead.device_bytes);
        [device, host.saturating_add(self.overhead.host_bytes)]
    }

    fn forecast(&self, member: Member, bandwidths: Bandwidths) -> Forecast {
        Forecast::new(&self.tallies(member), &self.layout(member), bandwidths)
    }

    /// The most that can be kept in RAM beside so many units on the device.
    fn most_kept(&self, member: Member, budget: Budget) -> Option<Member> {
        let (gpu, packs) = (member.gpu, member.ways.in_ram == Tier::PinnedPacked);
        let in_ram = |sum: &Sizes| if packs { sum.repacked[0] } else { sum.host };
        // The kept units alone must fit, which cuts the search short: slots ask for a few units less.
        let tiers = |sum: &Sizes| in_ram(sum) - in_ram(&self.first[gpu]) <= budget.host_bytes;
        let [device, _] = self.memory(Member { kept: gpu, ..member });
        if device > budget.device_bytes.unwrap_or(budget.host_bytes) {
            // However many are kept in RAM.
            return None;
        }
        let end = gpu + self.first[gpu..].partition_point(tiers);
        let mut members = (gpu..end).rev().map(|kept| Member { kept, ..member });
        members.find(|&member| budget.holds(self.memory(member)))
    }
}

impl Budget {
    /// That of the memory that it is for.
    fn sharing(self) -> Sharing {
        if self.device_bytes.is_none() { Sharing::Ram } else { Sharing::Own }
    }

    /// How units of these sizes may be kept. On a device with memory of its own they may stay packed, since unpacking costs that next to
    /// nothing; where it computes in RAM, they may as well be packed in that.
    fn ways(self, sizes: &[Sizes], pack: Pack) -> impl Iterator<Item = Ways> {
        let on_device = match sizes.iter().any(|unit| unit.packed < unit.device) && self.device_bytes.is_some() {
            true => &[Tier::Gpu, Tier::GpuPacked][..],
            false => &[Tier::Gpu],
        };
        // Norms of units that are stored packed would make them smaller too, by nothing that is worth reading them once more.
        let shrinks = |unit: &Sizes| unit.repacked[0] < unit.host - unit.host / 64;
        let in_ram = match (sizes.iter().any(shrinks), pack) {
            (false, _) | (_, Pack::Never) => &[Tier::Pinned][..],
            (true, Pack::Auto) => &[Tier::Pinned, Tier::PinnedPacked],
            (true, Pack::Always) => &[Tier::PinnedPacked],
        };
        let pairs = on_device.iter().flat_map(|on_device| in_ram.iter().map(move |in_ram| (on_device, in_ram)));
        pairs.map(|(&on_device, &in_ram)| Ways { on_device, in_ram })
    }

    fn holds(self, [device, host]: [usize; 2]) -> bool {
        match self.device_bytes {
            Some(device_bytes) => device <= device_bytes && host <= self.host_bytes,
            None => device.saturating_add(host) <= self.host_bytes,
        }
    }
}

/// The tiers and the rings of the fastest plan that fits, with some of these rings.
fn choose(
    survey: &Survey,
    budget: Budget,
    bandwidths: Bandwidths,
    among: &[Rings],
    pack: Pack,
) -> Result<(Vec<Tier>, Rings)> {
    let sizes = &survey.sizes;
    let classes = classes(sizes);
    let families = families(survey, &classes, budget.sharing());
    let members = families.iter().flat_map(|family| {
        let ways = budget.ways(sizes, pack).flat_map(|ways| among.iter().map(move |&rings| (ways, rings)));
        let members =
            ways.flat_map(|(ways, rings)| (0..=family.len()).map(move |gpu| Member { rings, gpu, kept: gpu, ways }));
        let fit = members.filter_map(|member| family.most_kept(member, budget));
        fit.map(move |member| (family.forecast(member, bandwidths).cost(), (family, member)))
    });
    let Some((family, member)) = fastest(members, 0.0) else {
        if pack == Pack::Always {
            // A unit that is kept may take less than the slots that it passes through until it is packed.
            return choose(survey, budget, bandwidths, among, Pack::Never);
        }
        let shortest = *among.last().expect("there are rings");
        let remedy = if among == RINGS { "a shorter context" } else { "shorter rings or a shorter context" };
        return Err(too_small(budget, least(&families, budget, shortest), remedy));
    };
    let mut tiers = vec![Tier::Disk; sizes.len()];
    for class in &classes {
        let among =
            |first: usize| family.order[..first].iter().filter(|unit| class.binary_search(unit).is_ok()).count();
        let kept: Vec<_> = spread(class, among(member.kept)).collect();
        for &unit in &kept {
            // Where the device computes in RAM, what is used in place there is on the device.
            let in_place = member.ways.in_ram == Tier::Pinned && sizes[unit].in_place > 0;
            tiers[unit] = if in_place { member.ways.on_device } else { member.ways.in_ram };
        }
        spread(&kept, among(member.gpu)).for_each(|unit| tiers[unit] = member.ways.on_device);
    }
    Ok((tiers, member.rings))
}

/// Plans that give tiers to small units first, which leaves the least room unused, and to large ones first, which makes the
/// slots small.
fn families(survey: &Survey, classes: &[Vec<usize>], sharing: Sharing) -> [PlanFamily; 2] {
    let sizes = &survey.sizes;
    let mut uniform = sizes.clone();
    for class in classes {
        let largest = class.iter().fold(Sizes::default(), |largest, &unit| largest.max(sizes[unit]));
        class.iter().for_each(|&unit| uniform[unit] = largest);
    }
    let orders = [classes.concat(), classes.iter().rev().flatten().copied().collect()];
    orders.map(|order| PlanFamily::new(order, &uniform, survey, sharing))
}

/// Units by number, those alike together, the smallest first.
fn classes(sizes: &[Sizes]) -> Vec<Vec<usize>> {
    let mut order: Vec<_> = (0..sizes.len()).collect();
    order.sort_by_key(|&unit| (sizes[unit].host, sizes[unit].device, sizes[unit].in_place, unit));
    let mut classes = Vec::<Vec<usize>>::new();
    for unit in order {
        match classes.last_mut() {
            Some(class) if sizes[class[0]].is_like(&sizes[unit]) => class.push(unit),
            _ => classes.push(vec![unit]),
        }
    }
    classes.iter_mut().for_each(|class| class.sort_unstable());
    classes
}

/// `count` of `units`, at distances round the pass that differ by one at most.
fn spread(units: &[usize], count: usize) -> impl Iterator<Item = usize> {
    let before = move |i: usize| i * count / units.len();
    units.iter().enumerate().filter(move |(i, _)| before(i + 1) > before(*i)).map(|(_, &unit)| unit)
}

/// The least that any of the plans takes with these rings where `given` is: of one memory; or of two, the device's first, then RAM
/// beside as much of that as is given, or at least needed. Units kept in RAM may take less there than slots for them; those kept packed
/// on the device take slots there besides.
fn least(families: &[PlanFamily], given: Budget, rings: Rings) -> Budget {
    let members = || {
        families.iter().flat_map(move |family| {
            let pairs = (0..=family.len()).flat_map(move |gpu| (gpu..=family.len()).map(move |kept| (gpu, kept)));
            pairs.map(move |(gpu, kept)| family.memory(Member { rings, gpu, kept, ways: PLAIN }))
        })
    };
    let Some(given) = given.device_bytes else {
        let host_bytes = members().map(|[device, host]| device.saturating_add(host)).min().unwrap_or(0);
        return Budget { device_bytes: None, host_bytes };
    };
    let least = members().map(|[device, _]| device).min().unwrap_or(0);
    let beside = members().filter(|[device, _]| *device <= given.max(least));
    Budget { device_bytes: Some(least), host_bytes: beside.map(|[_, host]| host).min().unwrap_or(0) }
}

fn too_small(given: Budget, least: Budget, remedy: &'static str) -> Error {
    let (memory, given, least) = match (given.device_bytes, least.device_bytes) {
        (Some(given), Some(least)) if given < least => (MemoryKind::Device, given, least),
        (Some(_), _) => (MemoryKind::Ram, given.host_bytes, least.host_bytes),
        (None, _) => (MemoryKind::Shared, given.host_bytes, least.host_bytes),
    };
    Error::TooLittle { memory, given, least, remedy }
}

#[cfg(test)]
mod tests;
