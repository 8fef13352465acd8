//! The plan: what every stage does, worked out once, before anything is reserved.
//!
//! A stage never computes where bytes go. It walks the units round and round and looks up where each is kept between passes,
//! which extents to read into a host slot, which ranges to copy to the device, and which tensors arrive changed.

mod budget;
mod fastest;
mod forecast;
#[cfg(test)]
mod fuzz;
mod part;
mod placement;
mod settings;

pub use budget::{Budget, FixedOverhead, Pack};
pub(crate) use fastest::{Cost, fastest};
pub use forecast::{Bandwidths, BindingLink, Forecast};
pub use part::{Part, Purpose};
pub use placement::Placement;
pub use settings::{CachePolicy, Reader, Settings};

use crate::{
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, Result},
    layout::{Offsets, PAGE, Space, Staging, StreamLayout, Tallies, UnitLayout},
};
pub use crate::{
    layout::{DEVICE_ALIGN, Sharing},
    unit::{Arrival, ArrivalOp, Tier, Unit},
};

impl Sharing {
    /// That of memory which a streamer reserves on this device.
    pub fn of<D: Device>(device: &D) -> Self {
        if device.memory_is_ram() { Self::Ram } else { Self::Own }
    }
}

/// The whole plan: where every unit's bytes go, and what the stages need for that.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) units: Vec<UnitLayout>,
    pub(crate) tallies: Tallies,
    pub(crate) layout: StreamLayout,
}

impl Plan {
    /// Plans a stream of `units` of `checkpoint`. Nothing is reserved or read. `sharing` is [that of the device](Sharing::of), or
    /// [`Sharing::Own`] for lent memory.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings or units that cannot work, [`Error::Checkpoint`] for a tensor that is not there.
    pub fn new(checkpoint: &Checkpoint, units: &[Unit], settings: &Settings, sharing: Sharing) -> Result<Self> {
        settings.validate()?;
        if units.is_empty() {
            return Err(Error::setting("units", "there must be at least one"));
        }
        let mut units = units.iter().map(|unit| UnitLayout::new(checkpoint, unit)).collect::<Result<Vec<_>>>()?;
        if sharing == Sharing::Ram {
            units.iter_mut().for_each(UnitLayout::share_memory);
        }
        let [mut ram, mut pinned, mut gpu] = [PAGE, PAGE, DEVICE_ALIGN].map(Offsets::aligned_to);
        let mut reports = 0;
        for unit in &mut units {
            unit.reports_at = reports;
            reports += unit.reports().count();
        }
        // Behind the pinned ones there is room for those that are packed while the stream runs, as they come; in front of those on the
        // device are those that are read to where they are kept, which is whole pages.
        let mut order: Vec<_> = units.iter_mut().collect();
        order.sort_by_key(|unit| (unit.tier == Tier::PinnedPacked, !unit.in_place));
        for unit in order {
            let at = match unit.tier {
                Tier::Disk => continue,
                Tier::Ram => ram.push(unit.kept_bytes()),
                Tier::Pinned | Tier::PinnedPacked => pinned.push(unit.kept_bytes()),
                Tier::Gpu | Tier::GpuPacked => gpu.push(unit.kept_bytes()),
            };
            unit.resident_at = at.ok_or_else(|| Error::setting("tier", "more is kept there than can be addressed"))?;
        }
        let (tallies, staging) = (Tallies::of(&units), Staging::of(&units, sharing));
        let layout = StreamLayout::new(&tallies, settings.rings(), settings.batches(), sharing, staging);
        Ok(Self { units, tallies, layout })
    }

    /// How many units a pass has.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Bytes of tensors that one pass brings to the device, as stored.
    pub fn bytes_per_pass(&self) -> usize {
        self.units.iter().map(|unit| unit.disk_bytes).fold(0, usize::saturating_add)
    }

    /// The same as the layer function finds them: more than are stored, if these are packed or become another type.
    pub fn weight_bytes(&self) -> usize {
        let tensors = self.units.iter().flat_map(|unit| &unit.tensors);
        tensors.map(|tensor| tensor.dtype.bytes(tensor.elements())).fold(0, usize::saturating_add)
    }

    /// Bytes of slots and kept units in RAM, in pinned RAM and on the device: what can be [lent](crate::LentMemory).
    pub fn slot_memory(&self) -> [usize; 3] {
        self.layout.spaces().map(Space::bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{AsRawFd, FromRawFd},
        path::PathBuf,
        slice,
    };

    use super::*;
    use crate::{
        checkpoint::StoredTensor,
        dtype::DType,
        layout::Dequantise,
        packed::{BLOCK, Description, PART, Table},
        quantised::Scheme,
        unit::Arrival,
    };

    /// A file in memory that takes no room whatever its length, and its path.
    pub(in crate::plan) fn hole() -> (File, PathBuf) {
        // SAFETY: a name that ends with its zero; the descriptor is nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"hole".as_ptr(), libc::MFD_CLOEXEC)) };
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        (file, path)
    }

    #[test]
    fn sums_that_no_number_holds_are_the_largest_there_is() {
        let (hole, file) = hole();
        hole.set_len(1 << 62).unwrap();
        let tensor = StoredTensor { name: "t".into(), file, offset: 0, dtype: DType::U8, shape: vec![1 << 62] };
        let checkpoint = Checkpoint::from_table([tensor]).unwrap();
        let mut unit = Unit::new("unit");
        unit.keep("t", "t");
        let units = vec![unit; 5];
        let plan = Plan::new(&checkpoint, &units, &Settings::default(), Sharing::Own).unwrap();
        let forecast = plan.forecast(Bandwidths::default());
        assert_eq!([plan.bytes_per_pass(), forecast.disk_bytes, forecast.copy_bytes], [usize::MAX; 3]);
        let budget = Budget { device_bytes: None, host_bytes: usize::MAX };
        let refused = budget.plan(&checkpoint, &units, FixedOverhead::default(), Bandwidths::default()).unwrap_err();
        assert!(refused.to_string().contains("larger together than can be addressed"), "{refused}");
    }

    /// The layout of a unit in which tensors of these types and shapes become one, or each by itself what it is, in this tier.
    fn laid_out(tensors: &[(DType, Vec<usize>)], op: ArrivalOp, tier: Tier, packed: Option<Description>) -> UnitLayout {
        let (hole, file) = hole();
        hole.set_len(1 << 40).unwrap();
        let table = tensors.iter().enumerate().map(|(number, (dtype, shape))| {
            let (name, offset) = (number.to_string(), (number as u64) << 36);
            StoredTensor { name, file: file.clone(), offset, dtype: *dtype, shape: shape.clone() }
        });
        let checkpoint = Checkpoint::from_table(table).unwrap();
        let checkpoint = checkpoint.with_packed(packed.map(|packed| ("0".into(), packed))).unwrap();
        let inputs = (0..tensors.len()).map(|number| number.to_string()).collect();
        let mut unit = Unit::new("unit");
        unit.add(Arrival { output: "w".into(), inputs, op }).set_tier(tier);
        UnitLayout::new(&checkpoint, &unit).unwrap()
    }

    /// Bytes of a staging block for units of a device with memory of its own, and of one that computes in RAM.
    fn staged(units: &[UnitLayout]) -> [usize; 2] {
        [Sharing::Own, Sharing::Ram].map(|sharing| Staging::of(units, sharing).block_bytes)
    }

    #[test]
    fn a_staging_block_takes_32_mib_at_a_time_of_what_can_be_cut_and_all_of_what_makes_a_matrix() {
        const MOST: usize = 32 << 20;
        let cast =
            |bytes: usize| laid_out(&[(DType::F16, vec![bytes / 2])], ArrivalOp::To(DType::F32), Tier::Disk, None);
        for (bytes, block) in [(1000, 1024), (MOST - 2, MOST), (MOST, MOST), (MOST + 2, MOST), (5 * MOST, MOST)] {
            let unit = cast(bytes);
            assert_eq!(staged(slice::from_ref(&unit)), [block; 2], "a cast of {bytes} bytes");
            let pieces: Vec<_> =
                unit.casts[0].pieces(&(0..unit.host_bytes), block).map(|piece| piece.bytes()).collect();
            assert_eq!((pieces.len(), pieces.iter().sum()), (bytes.div_ceil(MOST), bytes));
        }

        let fp8 = |rows: usize, columns: usize| {
            let tensors = [(DType::F8E4M3, vec![rows, columns]), (DType::F32, vec![rows, 1])];
            let op = ArrivalOp::Dequantise { scheme: Scheme::Fp8, shape: [rows, columns], to: None };
            laid_out(&tensors, op, Tier::Disk, None)
        };
        let [small, large] = [fp8(3, 40), fp8((96 << 10) + 1, 1024)];
        assert_eq!(staged(slice::from_ref(&small)), [256, 0]);
        // The codes, then a scale for each row.
        let whole = (3 * MOST + 1024) + 4 * ((96 << 10) + 1);
        assert_eq!(large.dequantises.iter().map(Dequantise::staged_bytes).collect::<Vec<_>>(), [whole]);
        assert_eq!(staged(slice::from_ref(&large)), [whole.next_multiple_of(256), 0]);
        assert_eq!(staged(&[cast(5 * MOST), large, small.clone()]), [whole.next_multiple_of(256), MOST]);
        assert_eq!(staged(&[cast(5 * MOST), small]), [MOST; 2]);

        // Weights that are packed, and those that are to be.
        let parts = 128;
        let length = (PART / BLOCK * 6000).next_multiple_of(16) as u32;
        let (shape, table) = (vec![parts, PART], Table([0; 13]));
        let description =
            Description { shape: shape.clone(), table, checksum: 0, part: PART, lengths: vec![length; parts] };
        let packed = [(DType::U8, vec![description.bytes()])];
        assert!(description.bytes() > MOST);
        let packed = laid_out(&packed, ArrivalOp::Keep, Tier::Disk, Some(description));
        assert_eq!(staged(&[packed]), [MOST, 0]);
        for (tier, block) in [(Tier::Disk, 0), (Tier::PinnedPacked, MOST)] {
            let plain = laid_out(&[(DType::BF16, shape.clone())], ArrivalOp::Keep, tier, None);
            assert_eq!(staged(&[plain]), [block, 0], "{tier}");
        }
    }

    #[test]
    fn a_tensor_counts_once_also_where_another_has_its_bytes() {
        let (hole, file) = hole();
        hole.set_len(4000).unwrap();
        let tensor = StoredTensor { name: "w".into(), file, offset: 0, dtype: DType::U8, shape: vec![4, 1000] };
        let (checkpoint, rows) = Checkpoint::from_table([tensor]).unwrap().with_rows("w", 4).unwrap();
        let mut unit = Unit::new("unit");
        unit.keep("a", "w").keep("b", &rows[0]).keep("c", "w");
        let plan = UnitLayout::new(&checkpoint, &unit).unwrap();
        assert_eq!((plan.disk_bytes, plan.read_bytes), (8000, 4000));
    }

    #[test]
    fn a_read_that_begins_before_its_tensor_is_still_called_by_it() {
        let folder = tempfile::tempdir().unwrap();
        let stored = |name: &str, file: &str, offset: u64, count: usize| {
            let file = folder.path().join(file);
            std::fs::write(&file, vec![0; 500_000]).unwrap();
            StoredTensor { name: name.into(), file, offset, dtype: DType::U8, shape: vec![count] }
        };
        let table = [stored("first", "a", 10, 100), stored("empty", "b", 5, 0), stored("second", "b", 200_100, 9_000)];
        let checkpoint = Checkpoint::from_table(table).unwrap();
        let mut unit = Unit::new("unit");
        ["first", "empty", "second"].iter().for_each(|name| _ = unit.keep(*name, *name));
        let plan = UnitLayout::new(&checkpoint, &unit).unwrap();
        let extent = plan.extents.last().unwrap();
        assert!(extent.offset < 200_100);
        assert_eq!(plan.tensor_at(extent.file, extent.offset), "second");
        assert_eq!(plan.tensor_at(plan.extents[0].file, 0), "first");
    }
}
