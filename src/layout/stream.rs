//! What a stream of units takes: the slots of its stages, the units that are kept in each tier, the staging blocks.

use super::{DEVICE_ALIGN, Dequantise, Sizes, UnitLayout, Unpack, pages, slot_bytes};
use crate::unit::Tier;

/// Whose memory a device computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Its own, or what the caller lends: units are copied to it. It can be written as soon as it is reserved.
    Own,
    /// RAM: units that arrive as they are stored are used where they were read to. What is kept there is prefaulted in the course of the
    /// first pass, in which kept units may pass through slots.
    Ram,
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

    /// What is copied to the device in a pass once all tiers are filled, and of that what is unpacked, and to how much.
    pub(crate) fn copied(&self) -> (usize, [usize; 2]) {
        let Sizes { arriving, repacked: [expected, weights], .. } = self.in_tier(Tier::PinnedPacked).sum;
        // Rounding may make it more. All of it is unpacked but for norms and the like.
        let copied = arriving.min(expected);
        let passing = [Tier::Disk, Tier::Ram, Tier::Pinned].map(|tier| self.in_tier(tier).sum);
        passing.iter().fold((copied, [copied.min(weights), weights]), |(copied, [from, to]), sum| {
            let more = sum.arriving.saturating_sub(sum.in_place);
            let unpacked = [from.saturating_add(sum.unpacked[0]), to.saturating_add(sum.unpacked[1])];
            (copied.saturating_add(more), unpacked)
        })
    }

    /// Whether any units are used in place, or might have been, were they not packed in RAM: that must not take less for want of slots.
    fn some_in_place(&self) -> bool {
        self.0.iter().any(|tally| tally.sum.in_place > 0) || self.in_tier(Tier::PinnedPacked).units > 0
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

    /// The same on the device. Where all units are used in place its slots only count them.
    fn on_device(n: usize, batch: usize, largest: usize, in_place: bool) -> Self {
        let stage = Self::new(n, batch, largest);
        if in_place && largest == 0 { Self { slot_bytes: 0, ..stage } } else { stage }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.slots.saturating_mul(self.slot_bytes)
    }
}

/// The two staging blocks through which stored bytes pass on their way to a cast, to being unpacked, or to a matrix
/// that several tensors make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Staging {
    /// Of one block; 0 if nothing passes through them, and then there are none.
    pub(crate) block_bytes: usize,
}

impl Staging {
    pub(crate) const BLOCKS: usize = 2;

    /// Largest piece of a tensor that is cast or unpacked at once (bytes, before that): many parts of a packed one.
    const MOST: usize = 32 << 20;

    /// Those that these units need. Packed weights, and those of several tensors, need none where the device's memory is RAM: it takes
    /// them from where they lie.
    pub(crate) fn of(units: &[UnitLayout], sharing: Sharing) -> Self {
        let casts = units.iter().flat_map(|unit| &unit.casts).map(|cast| cast.bytes());
        let own = || units.iter().filter(|_| sharing == Sharing::Own);
        let unpacks = own().flat_map(|unit| &unit.unpacks);
        let repacked = own().filter(|unit| unit.tier == Tier::PinnedPacked);
        let repacked = repacked.flat_map(|unit| &unit.tensors).filter(|tensor| tensor.can_pack());
        let repacked = repacked.map(|tensor| tensor.stored[0].bytes);
        let largest = casts.chain(unpacks.map(Unpack::bytes)).chain(repacked).max();
        // What is made of several tensors is made at once.
        let whole = own().flat_map(|unit| &unit.dequantises).map(Dequantise::staged_bytes).max();
        let block_bytes = largest.unwrap_or(0).min(Self::MOST).max(whole.unwrap_or(0));
        Self { block_bytes: block_bytes.next_multiple_of(DEVICE_ALIGN) }
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
    pub(crate) sharing: Sharing,
    /// Bytes of the units that are kept, by [`Tier::KEPT`].
    kept: [usize; Tier::KEPT.len()],
}

impl StreamLayout {
    pub(crate) fn new(tallies: &Tallies, rings: Rings, batches: Rings, sharing: Sharing, staging: Staging) -> Self {
        let [[n_gpu, n_cpu_pinned, n_cpu], [batch_gpu, batch_cpu_pinned, batch_cpu]] = [rings, batches];
        // Slots are for the units that pass through them. What is kept on the device came through the host's.
        let on_device = tallies.largest(&[Tier::Gpu, Tier::GpuPacked], |sizes| sizes.through);
        let from_disk = tallies.largest(&[Tier::Disk, Tier::PinnedPacked], |sizes| sizes.host).max(on_device);
        let to_pin = tallies.largest(&[Tier::Ram], |sizes| sizes.host).max(from_disk);
        let passing = match sharing {
            Sharing::Own => &[Tier::Disk, Tier::Ram, Tier::Pinned, Tier::GpuPacked][..],
            Sharing::Ram => &[Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked],
        };
        let repacked = tallies.largest(&[Tier::PinnedPacked], |sizes| sizes.passing[1]);
        let to_device = tallies.largest(passing, |sizes| sizes.passing[0]).max(repacked);
        let [ram, pinned, gpu, packed, repacked] = Tier::KEPT.map(|tier| tallies.in_tier(tier).sum);
        let shared = sharing == Sharing::Ram;
        // Those that are used in place stay in the slot that they were read into as long as they are held.
        let held = if shared && tallies.some_in_place() { n_gpu } else { 0 };
        // Units that are kept in RAM need the pin stage, and that a RAM slot for the others.
        let has_ram = !shared && (n_cpu > 0 || (ram.host > 0 && n_cpu_pinned > 0));
        let has_pinned = shared || n_cpu_pinned > 0 || n_cpu == 0;
        // Where memory is shared one ring holds what two do elsewhere.
        let (n_pinned, batch_pinned) = match (shared, n_cpu_pinned) {
            (false, _) => (n_cpu_pinned, batch_cpu_pinned),
            (true, 0) => (n_cpu + held, batch_cpu),
            (true, _) => (n_cpu + n_cpu_pinned + held, batch_cpu_pinned),
        };
        // An arena is whole pages.
        let rest = match sharing {
            Sharing::Own => 0,
            Sharing::Ram => {
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
            pinned: has_pinned.then(|| StageLayout::new(n_pinned, batch_pinned, to_pin)),
            gpu: StageLayout::on_device(n_gpu, batch_gpu, to_device, held > 0),
            staging,
            sharing,
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
