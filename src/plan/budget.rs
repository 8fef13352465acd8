//! From an amount of memory to the fastest plan: which units stay, where, and how deep the rings are.
//!
//! Units are used round and round, so the best cache keeps a fixed set: the share kept is the share saved, whereas what keeps
//! the newest keeps nothing that is still there when its turn comes. And units that are still read should come at even
//! distances, so that the disk and the link work all the time while rings stay short.
//!
//! [`choose`] goes through a family of plans that does not depend on the budget, and takes the fastest that fits. Hence more
//! memory is never slower, and no plan is slower than the rings alone, which are one of the family: but for the sixty-fourth
//! in which units that count as alike may differ.

use super::{Bandwidths, DEVICE_ALIGN, Forecast, Home, Settings, Unit, UnitPlan, staging_bytes};
use crate::{
    arena::PAGE,
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, Result},
    memory,
};

/// How much memory may be used, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Of the device's own memory; `None` for a device that computes in the host's, whose budget is then for both. A plan keeps
    /// to it on a device of that kind.
    pub device_bytes: Option<usize>,
    /// Of RAM.
    pub host_bytes: usize,
}

/// Memory that is taken whatever the plan, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Besides {
    /// On the device.
    pub device_bytes: usize,
    /// In RAM.
    pub host_bytes: usize,
}

/// What a unit moves in a pass (bytes read, bytes copied) and takes in a slot or home (in RAM, on the device).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) read: usize,
    pub(crate) copied: usize,
    pub(crate) host: usize,
    pub(crate) device: usize,
}

impl Sizes {
    fn of(unit: &UnitPlan) -> Self {
        let host = unit.host_bytes.next_multiple_of(PAGE);
        let device = unit.device_bytes.next_multiple_of(DEVICE_ALIGN);
        Self { read: unit.read_bytes, copied: unit.disk_bytes, host, device }
    }

    /// Whether the two take the same memory but for what rounding to pages makes of it.
    fn is_like(&self, other: &Self) -> bool {
        let near = |a: usize, b: usize| a.abs_diff(b) <= a.min(b) / 64;
        near(self.host, other.host) && near(self.device, other.device)
    }

    fn plus(self, other: Self) -> Self {
        self.with(other, usize::saturating_add)
    }

    fn max(self, other: Self) -> Self {
        self.with(other, usize::max)
    }

    fn with(self, other: Self, f: fn(usize, usize) -> usize) -> Self {
        Self {
            read: f(self.read, other.read),
            copied: f(self.copied, other.copied),
            host: f(self.host, other.host),
            device: f(self.device, other.device),
        }
    }
}

impl Budget {
    /// What is free now, on the device and in RAM, limits of control groups honoured, less a reserve for everything else: a
    /// sixteenth of it, and at least 256 MiB; a quarter where that would be too much.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the system does not tell, or the device's own.
    pub fn free<D: Device>(device: &D) -> Result<Self> {
        let spare = |free: usize| free - (free / 16).max(256 << 20).min(free / 4);
        let host = memory::free().ok_or_else(|| Error::Unsupported {
            what: "finding out how much memory is free (no MemAvailable in /proc/meminfo)".into(),
            remedy: "say how much may be used".into(),
        })?;
        Ok(Self { device_bytes: device.free_memory()?.map(spare), host_bytes: spare(host) })
    }

    /// The homes of `units`, in their order, and the settings with which a pass is fastest, where `besides` is taken as well:
    /// whatever static tensors and computation take. Where memory is short, fewer layers can be held at a time (`n_gpu`).
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is less than the minimum, which it names; else as [`Plan::new`](super::Plan::new).
    pub fn plan(
        self,
        checkpoint: &Checkpoint,
        units: &[Unit],
        besides: Besides,
        bandwidths: Bandwidths,
    ) -> Result<(Vec<Home>, Settings)> {
        let (sizes, besides) = survey(checkpoint, units, besides)?;
        let (homes, [n_gpu, n_cpu_pinned]) = choose(&sizes, besides, self, bandwidths)?;
        Ok((homes, Settings { n_gpu, n_cpu_pinned, ..Settings::default() }))
    }

    /// The least budget that will do where this one is wanted: of one memory or of two, as that is.
    ///
    /// # Errors
    /// As [`Plan::new`](super::Plan::new).
    pub fn least(self, checkpoint: &Checkpoint, units: &[Unit], besides: Besides) -> Result<Self> {
        let (sizes, besides) = survey(checkpoint, units, besides)?;
        let shared = self.device_bytes.is_none();
        Ok(least(&families(&sizes, &classes(&sizes), besides, shared), shared))
    }
}

/// What the units move and take, and what is taken besides, the staging blocks included.
fn survey(checkpoint: &Checkpoint, units: &[Unit], besides: Besides) -> Result<(Vec<Sizes>, Besides)> {
    if units.is_empty() {
        return Err(Error::setting("units", "there must be at least one"));
    }
    let planned = units.iter().map(|unit| UnitPlan::new(checkpoint, unit)).collect::<Result<Vec<_>>>()?;
    let device_bytes = besides.device_bytes.saturating_add(2 * staging_bytes(&planned));
    Ok((planned.iter().map(Sizes::of).collect(), Besides { device_bytes, ..besides }))
}

/// `n_gpu` and `n_cpu_pinned`; the first of equally fast ones is taken, with which the first pass is fastest. The last takes
/// least. Deeper rings than these win nothing that a unit kept in their place does not.
const RINGS: [[usize; 2]; 3] = [[1, 2], [1, 1], [1, 0]];

/// Units in an order in which they are given homes: the first `gpu` live on the device, from there up to `kept` in pinned RAM.
/// Sums and maxima by number of units make any such plan's memory and time a matter of a few additions.
struct Family {
    order: Vec<usize>,
    /// Sums over the first units of the order.
    first: Vec<Sizes>,
    /// The largest of the first units, and of the rest.
    largest: Vec<[Sizes; 2]>,
    besides: Besides,
    /// Device and host have one memory.
    shared: bool,
}

/// One plan of a family.
#[derive(Clone, Copy)]
struct Member {
    rings: [usize; 2],
    gpu: usize,
    kept: usize,
}

impl Family {
    /// The units in `order`; those alike count as the largest of them, so that they can be exchanged.
    fn new(order: Vec<usize>, sizes: &[Sizes], besides: Besides, shared: bool) -> Self {
        let (mut first, mut largest) = (vec![Sizes::default()], vec![[Sizes::default(); 2]; order.len() + 1]);
        for (i, &unit) in order.iter().enumerate() {
            first.push(first[i].plus(sizes[unit]));
            largest[i + 1][0] = largest[i][0].max(sizes[unit]);
        }
        for (i, &unit) in order.iter().enumerate().rev() {
            largest[i][1] = largest[i + 1][1].max(sizes[unit]);
        }
        Self { order, first, largest, besides, shared }
    }

    fn len(&self) -> usize {
        self.order.len()
    }

    /// What it takes on the device and in RAM.
    fn memory(&self, Member { rings: [n_gpu, n_cpu_pinned], gpu, kept }: Member) -> [usize; 2] {
        let slots = |n: usize, bytes: usize| (n + 1).saturating_mul(bytes.next_multiple_of(PAGE).max(PAGE));
        // What lives on the device came through the host's slots.
        let through = self.largest[gpu][0].host.max(self.largest[kept][1].host);
        // Where the two are one, units may have to wait for their homes, and pass through slots until then.
        let passing = if self.shared { 0 } else { gpu };
        let device = self.first[gpu].device.saturating_add(slots(n_gpu, self.largest[passing][1].device));
        let homes = self.first[kept].host - self.first[gpu].host;
        let host = homes.saturating_add(slots(n_cpu_pinned, through));
        [device.saturating_add(self.besides.device_bytes), host.saturating_add(self.besides.host_bytes)]
    }

    fn forecast(&self, member: Member, bandwidths: Bandwidths) -> Forecast {
        let all = self.first[self.len()];
        let (read, copied) = (all.read - self.first[member.kept].read, all.copied - self.first[member.gpu].copied);
        Forecast::new(read, copied, member.rings[1], bandwidths)
    }

    /// The most that can be kept in RAM beside so many units on the device.
    fn most_kept(&self, rings: [usize; 2], gpu: usize, budget: Budget) -> Option<Member> {
        // The homes alone must fit, which cuts the search short: slots ask for a few units less.
        let homes = |sum: &Sizes| sum.host - self.first[gpu].host <= budget.host_bytes;
        let [device, _] = self.memory(Member { rings, gpu, kept: gpu });
        if device > budget.device_bytes.unwrap_or(budget.host_bytes) {
            // However many are kept in RAM.
            return None;
        }
        let end = gpu + self.first[gpu..].partition_point(homes);
        let members = (gpu..end).rev().map(|kept| Member { rings, gpu, kept });
        members.into_iter().find(|&member| budget.holds(self.memory(member)))
    }
}

impl Budget {
    fn holds(self, [device, host]: [usize; 2]) -> bool {
        match self.device_bytes {
            Some(device_bytes) => device <= device_bytes && host <= self.host_bytes,
            None => device.saturating_add(host) <= self.host_bytes,
        }
    }
}

/// The homes and the rings of the fastest plan that fits.
pub(crate) fn choose(
    sizes: &[Sizes],
    besides: Besides,
    budget: Budget,
    bandwidths: Bandwidths,
) -> Result<(Vec<Home>, [usize; 2])> {
    let classes = classes(sizes);
    let shared = budget.device_bytes.is_none();
    let families = families(sizes, &classes, besides, shared);
    let mut best: Option<((f64, f64), &Family, Member)> = None;
    for family in &families {
        for rings in RINGS {
            for gpu in 0..=family.len() {
                let Some(member) = family.most_kept(rings, gpu, budget) else { continue };
                let forecast = family.forecast(member, bandwidths);
                // Of equally fast ones that which moves less, then the first.
                let cost = (forecast.pass_seconds, forecast.disk_seconds + forecast.copy_seconds);
                if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                    best = Some((cost, family, member));
                }
            }
        }
    }
    let Some((_, family, member)) = best else {
        return Err(too_small(budget, least(&families, shared)));
    };
    let mut homes = vec![Home::Disk; sizes.len()];
    for class in &classes {
        let among =
            |first: usize| family.order[..first].iter().filter(|unit| class.binary_search(unit).is_ok()).count();
        let kept: Vec<_> = spread(class, among(member.kept)).collect();
        kept.iter().for_each(|&unit| homes[unit] = Home::Pinned);
        spread(&kept, among(member.gpu)).for_each(|unit| homes[unit] = Home::Gpu);
    }
    Ok((homes, member.rings))
}

/// Plans that give homes to small units first, which leaves the least room unused, and to large ones first, which makes the
/// slots small.
fn families(sizes: &[Sizes], classes: &[Vec<usize>], besides: Besides, shared: bool) -> [Family; 2] {
    let mut uniform = sizes.to_vec();
    for class in classes {
        let largest = class.iter().fold(Sizes::default(), |largest, &unit| largest.max(sizes[unit]));
        class.iter().for_each(|&unit| uniform[unit] = largest);
    }
    let orders = [classes.concat(), classes.iter().rev().flatten().copied().collect()];
    orders.map(|order| Family::new(order, &uniform, besides, shared))
}

/// Units by number, those alike together, the smallest first.
fn classes(sizes: &[Sizes]) -> Vec<Vec<usize>> {
    let mut order: Vec<_> = (0..sizes.len()).collect();
    order.sort_by_key(|&unit| (sizes[unit].host, sizes[unit].device, unit));
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

/// The least that any of the plans takes, of one memory or of two.
fn least(families: &[Family], shared: bool) -> Budget {
    let rings = RINGS[RINGS.len() - 1];
    let least = |of: fn([usize; 2]) -> usize| {
        let members = families
            .iter()
            .flat_map(|family| (0..=family.len()).map(move |gpu| of(family.memory(Member { rings, gpu, kept: gpu }))));
        members.min().unwrap_or(0)
    };
    if shared {
        Budget { device_bytes: None, host_bytes: least(|[device, host]| device.saturating_add(host)) }
    } else {
        Budget { device_bytes: Some(least(|[device, _]| device)), host_bytes: least(|[_, host]| host) }
    }
}

fn too_small(given: Budget, least: Budget) -> Error {
    let cause = |given: usize, least: usize, what: &str| {
        format!(
            "{given} bytes of {what} are less than the least that will do, {least}; allow that much, or a shorter context"
        )
    };
    match (given.device_bytes, least.device_bytes) {
        (Some(given), Some(least)) if given < least => Error::setting("vram", cause(given, least, "device memory")),
        (Some(_), _) => Error::setting("ram", cause(given.host_bytes, least.host_bytes, "RAM")),
        (None, _) => {
            Error::setting("ram", cause(given.host_bytes, least.host_bytes, "RAM, in which this device computes too,"))
        }
    }
}

#[cfg(test)]
mod tests;
