//! What a stream of units takes: the slots of its stages, the units that are kept in each tier, the staging blocks.

use super::{DEVICE_ALIGN, Sizes, UnitLayout, Unpack, pages, slot_bytes};
use crate::unit::Tier;

/// When the memory that units are kept in on the device can be written without waiting for page faults. It decides whether such
/// units ever pass through the device's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// As soon as it is reserved: a GPU's own memory, or memory that the caller lends. They never do.
    AtOnce,
    /// In the course of the first pass: RAM, which is prefaulted meanwhile. In that pass they may.
    InFirstPass,
}

/// `n_gpu`, `n_cpu_pinned` and `n_cpu`; or the batches of the three.
pub(crate) type Rings = [usize; 3];

/// What the units of one tier come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) units: usize,
    pub(crate) sum: Sizes,
    /// The largest of each size, not always of one unit.
    pub(crate) largest: Sizes,
}

/// The same by [`Tier`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tallies(pub(crate) [Tally; Tier::ALL.len()]);

impl Tallies {
    pub(crate) fn of(units: &[UnitLayout]) -> Self {
        let mut tallies = Self::default();
        for unit in units {
            let (Tally { units, sum, largest }, sizes) = (&mut tallies.0[unit.tier as usize], unit.sizes());
            (*units, *sum, *largest) = (*units + 1, sum.plus(sizes), largest.max(sizes));
        }
        tallies
    }

    pub(crate) fn in_tier(&self, tier: Tier) -> &Tally {
        &self.0[tier as usize]
    }

    /// How many units are not read in every pass.
    pub(crate) fn kept(&self) -> usize {
        Tier::KEPT.iter().map(|tier| self.in_tier(*tier).units).sum()
    }

    /// What comes to the device in a pass once all tiers are filled.
    pub(crate) fn moved(&self) -> Sizes {
        let passing = [Tier::Disk, Tier::Ram, Tier::Pinned].map(|tier| self.in_tier(tier).sum);
        let Sizes { copied, repacked: [expected, weights], .. } = self.in_tier(Tier::PinnedPacked).sum;
        // Rounding may make it more. All of it is unpacked but for norms and the like.
        let copied = copied.min(expected);
        let packed = Sizes { copied, unpacked: [copied.min(weights), weights], ..Sizes::default() };
        passing.into_iter().fold(packed, Sizes::plus)
    }

    fn largest(&self, tiers: &[Tier], bytes: fn(&Sizes) -> usize) -> usize {
        tiers.iter().map(|tier| bytes(&self.in_tier(*tier).largest)).max().unwrap_or(0)
    }
}

/// What a stage needs to know: its slots, how many units it hands over at once.
#[derive(Clone, Debug)]
pub(crate) struct StageLayout {
    pub(crate) slots: usize,
    pub(crate) slot_bytes: usize,
    pub(crate) batch: usize,
}

impl StageLayout {
    /// A stage that buffers `n` units: one more slot is what its consumer holds. `largest`: the bytes of the largest unit that
    /// passes through it.
    fn new(n: usize, batch: usize, largest: usize) -> Self {
        Self { slots: n + 1, slot_bytes: slot_bytes(largest), batch: batch.max(1) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.slots.saturating_mul(self.slot_bytes)
    }
}

/// The two staging blocks through which stored bytes pass on their way to a cast, or to being unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Staging {
    /// Of one block; 0 if nothing passes through them, and then there are none.
    pub(crate) block_bytes: usize,
}

impl Staging {
    pub(crate) const BLOCKS: usize = 2;

    /// Largest piece of a tensor that is cast or unpacked at once (bytes, before that): many parts of a packed one.
    const MOST: usize = 32 << 20;

    /// Those that these units need. Packed weights need none where the device's memory is RAM: it unpacks them from where they lie.
    pub(crate) fn of(units: &[UnitLayout], presence: Presence) -> Self {
        let casts = units.iter().flat_map(|unit| &unit.casts).map(|cast| cast.bytes());
        let unpacks = units.iter().filter(|_| presence == Presence::AtOnce).flat_map(|unit| &unit.unpacks);
        let repacked = units.iter().filter(|unit| presence == Presence::AtOnce && unit.tier == Tier::PinnedPacked);
        let repacked = repacked.flat_map(|unit| &unit.tensors).filter(|tensor| tensor.can_pack());
        let repacked = repacked.map(|tensor| tensor.stored.bytes);
        let largest = casts.chain(unpacks.map(Unpack::bytes)).chain(repacked).max();
        Self { block_bytes: largest.unwrap_or(0).min(Self::MOST).next_multiple_of(DEVICE_ALIGN) }
    }

    /// The same where no piece is larger than this, a multiple of [`DEVICE_ALIGN`] of at least a packed part.
    pub(crate) fn at_most(self, piece: usize) -> Self {
        Self { block_bytes: self.block_bytes.min(piece) }
    }

    /// Where a block begins.
    pub(crate) fn block_at(self, block: usize) -> usize {
        block * self.block_bytes
    }

    /// What both take.
    pub(crate) fn bytes(self) -> usize {
        Self::BLOCKS * self.block_bytes
    }
}

/// Memory of one kind: slots, and behind them the units that are kept there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// Bytes of slots, which is also where the units begin.
    pub(crate) slots: usize,
    /// Bytes of the units.
    pub(crate) kept: usize,
}

impl Space {
    pub(crate) fn bytes(self) -> usize {
        self.slots.saturating_add(self.kept)
    }
}

/// What a stream takes. With both host stages skipped the reader fills one hidden pinned slot, from which the transfer copies.
#[derive(Clone, Debug)]
pub(crate) struct StreamLayout {
    pub(crate) ram: Option<StageLayout>,
    pub(crate) pinned: Option<StageLayout>,
    pub(crate) gpu: StageLayout,
    pub(crate) staging: Staging,
    pub(crate) presence: Presence,
    /// Bytes of the units that are kept, by [`Tier::KEPT`].
    kept: [usize; Tier::KEPT.len()],
}

impl StreamLayout {
    pub(crate) fn new(tallies: &Tallies, rings: Rings, batches: Rings, presence: Presence, staging: Staging) -> Self {
        let [[n_gpu, n_cpu_pinned, n_cpu], [batch_gpu, batch_cpu_pinned, batch_cpu]] = [rings, batches];
        // Slots are for the units that pass through them. What is kept on the device came through the host's.
        let read = [Tier::Disk, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked];
        let from_disk = tallies.largest(&read, |sizes| sizes.host);
        let to_pin = tallies.largest(&[Tier::Ram], |sizes| sizes.host).max(from_disk);
        let passing = match presence {
            Presence::AtOnce => &[Tier::Disk, Tier::Ram, Tier::Pinned, Tier::GpuPacked, Tier::PinnedPacked][..],
            Presence::InFirstPass => &Tier::ALL,
        };
        let to_device = tallies.largest(passing, |sizes| sizes.device);
        let [ram, pinned, gpu, packed, repacked] = Tier::KEPT.map(|tier| tallies.in_tier(tier).sum);
        // Units that are kept in RAM need the pin stage, and that a RAM slot for the others.
        let has_ram = n_cpu > 0 || (ram.host > 0 && n_cpu_pinned > 0);
        let has_pinned = n_cpu_pinned > 0 || n_cpu == 0;
        // An arena is whole pages.
        let rest = match presence {
            Presence::AtOnce => 0,
            Presence::InFirstPass => {
                let all = gpu.device.saturating_add(packed.packed);
                pages(all).saturating_sub(all)
            }
        };
        let [gpu, packed] = match tallies.in_tier(Tier::GpuPacked).units {
            0 => [gpu.device.saturating_add(rest), 0],
            _ => [gpu.device, packed.packed.saturating_add(rest)],
        };
        Self {
            ram: has_ram.then(|| StageLayout::new(n_cpu, batch_cpu, from_disk)),
            pinned: has_pinned.then(|| StageLayout::new(n_cpu_pinned, batch_cpu_pinned, to_pin)),
            gpu: StageLayout::new(n_gpu, batch_gpu, to_device),
            staging,
            presence,
            kept: [ram.host, pinned.host, gpu, packed, repacked.repacked[0]],
        }
    }

    /// Bytes of the units that are kept there.
    pub(crate) fn kept(&self, tier: Tier) -> usize {
        Tier::KEPT.iter().position(|kept| *kept == tier).map_or(0, |at| self.kept[at])
    }

    /// Memory that can be lent: pageable RAM, pinned RAM, the device's.
    pub(crate) fn spaces(&self) -> [Space; 3] {
        let slots = |stage: &Option<StageLayout>| stage.as_ref().map_or(0, StageLayout::bytes);
        let [ram, pinned, gpu, packed, repacked] = self.kept;
        [
            Space { slots: slots(&self.ram), kept: ram },
            Space { slots: slots(&self.pinned), kept: pinned.saturating_add(repacked) },
            Space { slots: self.gpu.bytes(), kept: gpu.saturating_add(packed) },
        ]
    }

    /// All that is taken on the device, and in RAM.
    pub(crate) fn memory(&self) -> [usize; 2] {
        let [ram, pinned, gpu] = self.spaces().map(Space::bytes);
        [gpu.saturating_add(self.staging.bytes()), ram.saturating_add(pinned)]
    }

    /// How many units are read ahead of the transfer.
    pub(crate) fn read_ahead(&self) -> usize {
        self.ram.iter().chain(&self.pinned).map(|stage| stage.slots - 1).sum()
    }
}
