//! The planner, asked for anything: tables that nobody has, numbers at the edge of what there is. It refuses with an error, or
//! its plan reads what is needed once, puts it where nothing else lies, and keeps to the budget; and where a budget is too
//! small, the least that it names is the least. How long, and from which seed: see `tests/support/src/fuzz.rs`.

use std::{fs::File, path::PathBuf};

use support::fuzz::{number, rounds};

use super::{tests::hole, *};
use crate::{
    checkpoint::StoredTensor,
    dtype::DType,
    error::MemoryKind,
    layout::{Cast, CopyRange, Extent, MAX_GAP, Space, StageLayout},
    packed::{self, Description},
};

const TYPES: [DType; 13] = [
    DType::BF16,
    DType::F16,
    DType::F32,
    DType::F8E4M3,
    DType::U8,
    DType::Bool,
    DType::I64,
    DType::F64,
    DType::F8E5M2,
    DType::Q4_K,
    DType::Q8_0,
    DType::Q6_K,
    DType::MXFP4,
];

/// Files of any length.
struct Holes(Vec<(File, PathBuf)>);

impl Holes {
    fn new() -> Self {
        Self((0..3).map(|_| hole()).collect())
    }
}

/// What is to be planned.
struct Asked {
    checkpoint: Checkpoint,
    units: Vec<Unit>,
}

/// Dimensions of a tensor of up to `most` elements; where the caller is careless, also others.
fn shape(rng: &mut fastrand::Rng, most: usize, careless: bool) -> Vec<usize> {
    let rank = if careless && rng.u8(..20) == 0 { rng.usize(..12) } else { rng.usize(..5) };
    let (mut shape, mut left) = (Vec::new(), most);
    for _ in 0..rank {
        let dim = match rng.u8(..16) {
            0 => 0,
            1..8 => 1 + rng.usize(..9),
            8..12 => [255, 256, 257, 2047, 4095, 4096, 4097][rng.usize(..7)],
            12..15 => {
                let most = left >> rng.u32(..64);
                rng.usize(..=most)
            }
            _ if careless => number(rng),
            _ => left,
        };
        if dim > left && !careless {
            continue;
        }
        left = left.checked_div(dim).unwrap_or(left);
        shape.push(dim);
    }
    rng.shuffle(&mut shape);
    shape
}

/// What packed weights of this shape could be said to be.
fn description(rng: &mut fastrand::Rng, shape: &[usize]) -> Description {
    let (weights, part) = (shape.iter().product::<usize>(), packed::BLOCK * (1 + rng.usize(..64)));
    let part = if rng.bool() { Description::part_of(shape) } else { part };
    let lengths = (0..weights.div_ceil(part)).map(|number| {
        let blocks = part.min(weights - number * part).div_ceil(packed::BLOCK);
        (blocks * 8).next_multiple_of(16) as u32 + blocks as u32 * (5120 + 16 * rng.u32(..400))
    });
    Description { shape: shape.to_vec(), table: packed::Table([0; 13]), checksum: 0, part, lengths: lengths.collect() }
}

/// Tensors side by side, or nearly so, in files that end where the last one does or later; and what is said of those that are packed.
fn table(rng: &mut fastrand::Rng, holes: &Holes, careless: bool) -> (Vec<StoredTensor>, Vec<(String, Description)>) {
    // Sizes of everyday, of large models, and of no disk.
    let most = 1usize << [10, 20, 26, 34, 50, 62][rng.usize(..6)];
    let (mut table, mut all_packed) = (Vec::new(), Vec::new());
    let files = &holes.0[..1 + rng.usize(..holes.0.len())];
    for (file, path) in files {
        let mut end = [0, 8, 4096, rng.u64(..100_000)][rng.usize(..4)];
        for _ in 0..rng.usize(..9) {
            let gap = match rng.u8(..8) {
                0..4 => 0,
                4 => rng.u64(..64),
                5 => MAX_GAP + rng.u64(..9000) - 4500,
                6 => rng.u64(..1 << 20),
                _ => {
                    let most = (i64::MAX as u64 - end) >> rng.u32(..63);
                    rng.u64(..=most)
                }
            };
            let offset = end.saturating_add(gap).min(i64::MAX as u64);
            let mut dtype = TYPES[rng.usize(..TYPES.len())];
            let room = (i64::MAX as u64 - offset) as usize;
            let mut shape = shape(rng, most.min(room) / dtype.size(), careless);
            if dtype.is_blocks() && !(careless && rng.u8(..30) == 0) {
                let row = shape.pop().unwrap_or(1).saturating_mul(dtype.block_elements());
                shape.push(row);
            }
            let weights = dtype.bytes_of(&shape).unwrap_or(0) / 2;
            let packs = dtype == DType::BF16 && (1..1 << 24).contains(&weights) && rng.bool();
            let described = packs.then(|| description(rng, &shape));
            if let Some(description) = &described {
                (dtype, shape) = (DType::U8, vec![description.bytes()]);
            }
            let bytes = dtype.bytes_of(&shape).unwrap_or(0) as u64;
            if bytes as usize > room && !careless {
                continue;
            }
            let overlaps = careless && rng.u8(..30) == 0;
            let name = format!("{}{}", table.len(), ["", ".weight", "\"\n\0é", "[0..1]"][rng.usize(..4)]);
            all_packed.extend(described.map(|description| (name.clone(), description)));
            table.push(StoredTensor { name, file: path.clone(), offset, dtype, shape });
            end = if overlaps { offset } else { offset.saturating_add(bytes).min(i64::MAX as u64) };
        }
        let beyond = [0, 1, 4096, rng.u64(..1 << 20)][rng.usize(..4)];
        let length = end.saturating_add(beyond).min(i64::MAX as u64);
        let cut = if careless && rng.u8(..20) == 0 { rng.u64(..=length) } else { 0 };
        file.set_len(length - cut).unwrap();
    }
    rng.shuffle(&mut table);
    (table, all_packed)
}

fn unit(rng: &mut fastrand::Rng, checkpoint: &Checkpoint, names: &[String], careless: bool) -> Unit {
    let mut unit = Unit::new(format!("unit {}", rng.u8(..)));
    for index in 0..rng.usize(..9) {
        let name = &names[rng.usize(..names.len())];
        let wrong = careless && rng.u8(..30) == 0;
        let inputs = match rng.u8(..3) {
            0 if wrong => vec![],
            1 if wrong => vec![name.clone(), name.clone()],
            _ if wrong => vec!["no such tensor".into()],
            _ => vec![name.clone()],
        };
        let dtype = checkpoint.describe(name).expect("it is there").0;
        let is_packed = checkpoint.entry(name).unwrap().packed.is_some();
        let op = match TYPES[rng.usize(..TYPES.len())] {
            to if rng.bool() && (careless || to == dtype || dtype.converts_to(to) && !is_packed) => ArrivalOp::To(to),
            _ => ArrivalOp::Keep,
        };
        let twice = careless && rng.u8(..30) == 0;
        let output = format!("{}{}", if twice { 0 } else { index }, ["", ".a", "é\0"][rng.usize(..3)]);
        unit.add(Arrival { output, inputs, op });
    }
    unit.set_tier(Tier::ALL[rng.usize(..Tier::ALL.len())]);
    unit
}

impl Asked {
    fn new(rng: &mut fastrand::Rng, holes: &Holes) -> Option<Self> {
        let careless = rng.u8(..4) == 0;
        let (table, packed) = table(rng, holes, careless);
        let mut checkpoint = Checkpoint::from_table(table).ok()?.with_packed(packed).unwrap();
        let mut names: Vec<_> = checkpoint.names().map(str::to_owned).collect();
        if rng.u8(..4) == 0 {
            // Rows of a matrix lie inside it. Not one tensor for each of a great many.
            let name = names[rng.usize(..names.len())].clone();
            let height = checkpoint.describe(&name).map_or(0, |(_, shape)| shape.first().copied().unwrap_or(0));
            let rows = number(rng).max(height / 8);
            let (with_rows, parts) = checkpoint.with_rows(&name, rows).ok()?;
            checkpoint = with_rows;
            names.extend(parts);
        }
        // A few units of which there may be many, so that some are alike.
        let kinds: Vec<_> = (0..1 + rng.usize(..3)).map(|_| unit(rng, &checkpoint, &names, careless)).collect();
        let units =
            (0..rng.usize(..if careless { 12 } else { 11 }) + usize::from(!careless)).map(|_| match rng.u8(..4) {
                0 => unit(rng, &checkpoint, &names, careless),
                _ => {
                    let mut unit = kinds[rng.usize(..kinds.len())].clone();
                    unit.set_tier(Tier::ALL[rng.usize(..Tier::ALL.len())]);
                    unit
                }
            });
        Some(Self { units: units.collect(), checkpoint })
    }
}

fn settings(rng: &mut fastrand::Rng) -> Settings {
    let [n_gpu, n_cpu_pinned, n_cpu] = match rng.u8(..8) {
        0 => [number(rng), number(rng), number(rng)],
        _ => [1 + rng.usize(..4), rng.usize(..4), rng.usize(..4)],
    };
    let batch =
        |rng: &mut fastrand::Rng, n: usize| if rng.u8(..30) == 0 { number(rng) } else { rng.usize(..=n.min(9)) };
    let [batch_gpu, batch_cpu_pinned, batch_cpu] = [n_gpu, n_cpu_pinned, n_cpu].map(|n| batch(rng, n));
    Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, ..Settings::default() }
}

/// Ranges of one space: none overlaps another, all end by `end`.
fn apart(mut ranges: Vec<(usize, usize)>, end: usize, what: &str) {
    ranges.sort_unstable();
    let last = ranges.into_iter().fold(0, |last, (start, length)| {
        assert!(start >= last, "{what}: one at {start} where another ends at {last}");
        start + length
    });
    assert!(last <= end, "{what}: to {last} of {end}");
}

/// The tier that a unit is planned in, and whether it is used in place.
fn expected(checkpoint: &Checkpoint, unit: &Unit, sharing: Sharing) -> (Tier, bool) {
    let as_it_lies = |arrival: &crate::plan::Arrival| {
        let entry = checkpoint.entry(&arrival.inputs[0]).unwrap();
        let to = if let ArrivalOp::To(to) = arrival.op { to } else { entry.dtype };
        // Of nothing nothing is converted.
        let stays = entry.packed.is_none() && to == entry.dtype || entry.elements() == 0;
        stays && entry.offset.is_multiple_of(to.align() as u64)
    };
    let some = unit.arrivals().iter().any(|arrival| checkpoint.entry(&arrival.inputs[0]).unwrap().bytes > 0);
    let in_place = some && unit.tier != Tier::PinnedPacked && unit.arrivals().iter().all(as_it_lies);
    match (sharing, unit.tier) {
        (Sharing::Own, tier) => (tier, false),
        (_, Tier::Ram | Tier::Pinned | Tier::GpuPacked) if in_place => (Tier::Gpu, true),
        (_, Tier::Ram) => (Tier::Pinned, false),
        (_, tier) => (tier, in_place),
    }
}

/// A unit's tensors are read once, and arrive where nothing else does, or stay where they were read to.
fn check_unit(checkpoint: &Checkpoint, unit: &Unit, plan: &UnitLayout, sharing: Sharing) {
    assert_eq!((plan.tier, plan.in_place), expected(checkpoint, unit, sharing));
    assert_eq!((plan.name.as_str(), plan.tensors.len()), (unit.name(), unit.arrivals().len()));
    let aligned = |at: usize, to: usize| at.is_multiple_of(to);
    let mut before: Option<&Extent> = None;
    for extent in &plan.extents {
        let length = checkpoint.length(extent.file);
        assert!(extent.offset < extent.end && extent.end <= length, "{extent:?} of {length}");
        assert!(aligned(extent.offset as usize, PAGE) && aligned(extent.len, PAGE) && aligned(extent.at, PAGE));
        // To the page in which the last tensor ends, and no further.
        let rounded = extent.end.next_multiple_of(PAGE as u64);
        assert_eq!(extent.offset + extent.len as u64, rounded, "{extent:?}");
        if let Some(before) = before {
            assert!(extent.at >= before.at + before.len, "{before:?} and {extent:?}");
            let after = (before.file, before.offset + before.len as u64);
            assert!((extent.file, extent.offset) >= after, "{before:?} and {extent:?} are read twice");
        }
        before = Some(extent);
    }
    assert!(before.map_or(0, |last| last.at + last.len) <= plan.host_bytes);

    let (mut places, mut needed, mut arriving) = (Vec::new(), Vec::new(), 0);
    for arrival in unit.arrivals() {
        let entry = checkpoint.entry(&arrival.inputs[0]).unwrap();
        let placed = &plan.tensors[plan.find(&arrival.output).unwrap()];
        let to = if let ArrivalOp::To(to) = arrival.op { to } else { entry.dtype };
        assert_eq!((placed.dtype, &placed.shape), (to, &entry.shape));
        assert!(aligned(placed.at, if plan.in_place { to.align() } else { DEVICE_ALIGN }));
        let elements = entry.elements();
        places.push((placed.at, to.bytes(elements)));
        if elements == 0 {
            continue;
        }
        let within =
            |extent: &&Extent| extent.file == entry.file && extent.offset <= entry.offset && entry.end() <= extent.end;
        let found: Vec<_> = plan.extents.iter().filter(within).collect();
        let [extent] = found[..] else { panic!("{}: {found:?}", arrival.output) };
        let from = extent.at + (entry.offset - extent.offset) as usize;
        needed.push((entry.file, entry.offset, entry.end(), &arrival.inputs[0]));
        if plan.in_place {
            assert_eq!(placed.at, from);
        } else if let Some(packed) = &entry.packed {
            let (parts, wanted) = (packed.parts(), (from, placed.at, packed));
            assert_eq!((parts.bytes(), parts.weights), (entry.bytes, elements));
            let found = plan.unpacks.iter().filter(|found| (found.from, found.to, &found.packed) == wanted);
            assert_eq!(found.count(), 1, "{}", arrival.output);
        } else if to == entry.dtype {
            arriving += entry.bytes;
            let brings = |copy: &&CopyRange| {
                let skipped = from.checked_sub(copy.from).filter(|skipped| skipped + entry.bytes <= copy.bytes);
                skipped.is_some_and(|skipped| copy.to + skipped == placed.at)
            };
            assert_eq!(plan.copies.iter().filter(brings).count(), 1, "{}", arrival.output);
        } else {
            let (from_type, to_type) = (entry.dtype, to);
            let wanted = |found: &&Cast| {
                **found == Cast { from, to: placed.at, elements, from_type, to_type, kept_at: found.kept_at }
            };
            assert_eq!(plan.casts.iter().filter(wanted).count(), 1, "{}", arrival.output);
        }
    }
    if !plan.in_place {
        apart(places.clone(), plan.device_bytes, "tensors on the device");
    }
    let copied: usize = plan.copies.iter().map(|copy| copy.bytes).sum();
    let count = places.iter().filter(|(_, bytes)| *bytes > 0).count();
    assert!(copied == arriving && plan.casts.len() <= count, "{copied} bytes are copied of {arriving}");

    // Nothing is read that is not needed, but for the rest of pages and small gaps.
    needed.sort_unstable();
    needed.dedup();
    assert_eq!(plan.disk_bytes, needed.iter().map(|(_, start, end, _)| (end - start) as usize).sum::<usize>());
    for extent in &plan.extents {
        let mut last = extent.offset;
        for (_, start, end, _) in needed
            .iter()
            .filter(|(file, start, ..)| *file == extent.file && (extent.offset..extent.end).contains(start))
        {
            assert!(*start <= last + MAX_GAP + 2 * PAGE as u64, "{extent:?}: nothing from {last} to {start}");
            last = last.max(*end);
        }
        assert_eq!(last, extent.end, "{extent:?}");
    }
    let read =
        |extent: &Extent| (extent.offset + extent.len as u64).min(checkpoint.length(extent.file)) - extent.offset;
    assert_eq!(plan.read_bytes as u64, plan.extents.iter().map(read).sum::<u64>());
}

/// Cut into parts and windows anywhere, as static tensors are, all of a unit arrives once, and lies whole in the part that it is
/// taken from.
fn check_parts(rng: &mut fastrand::Rng, unit: &UnitLayout) {
    let longest = unit.unpacks.iter().flat_map(|unpack| unpack.packed.parts().lengths).max();
    let longest = longest.map_or(0, |length| *length as usize);
    let most = PAGE * (2 + rng.usize(..9)) + longest.next_multiple_of(PAGE);
    // Not millions of them.
    if unit.host_bytes / most > 1000 {
        return;
    }
    let block_bytes = DEVICE_ALIGN * (1 + rng.usize(..2 * most / DEVICE_ALIGN));
    let (mut copied, mut cast) = (vec![Vec::new(); unit.copies.len()], vec![Vec::new(); unit.casts.len()]);
    let mut unpacked = vec![(0, 0); unit.unpacks.len()];
    for (part, window) in unit.reads(most) {
        let read = part.at..part.at + part.len;
        assert!(part.len <= most && part.needed() <= part.len);
        assert!(read.start == window.start / PAGE * PAGE && read.end >= window.end);
        for (copy, pieces) in unit.copies.iter().zip(&mut copied) {
            pieces.extend(copy.within(&window).inspect(|piece| {
                assert!(read.start <= piece.from && piece.from + piece.bytes <= read.end, "{piece:?} of {part:?}");
                assert_eq!(piece.to - copy.to, piece.from - copy.from);
            }));
        }
        for (whole, (bytes, weights)) in unit.unpacks.iter().zip(&mut unpacked) {
            for piece in whole.pieces(&window, block_bytes.max(longest)) {
                let of_piece = piece.parts.bytes();
                assert!(read.start <= piece.from && piece.from + of_piece <= read.end, "{piece:?} of {part:?}");
                assert!((1..=block_bytes.max(longest)).contains(&of_piece), "{piece:?}");
                // One behind the other, as they lie in the slot and on the device.
                assert_eq!((piece.from - whole.from, piece.to - whole.to), (*bytes, 2 * *weights));
                (*bytes, *weights) = (*bytes + of_piece, *weights + piece.parts.weights);
            }
        }
        for (whole, pieces) in unit.casts.iter().zip(&mut cast) {
            pieces.extend(whole.pieces(&window, block_bytes).inspect(|piece| {
                assert!(read.start <= piece.from && piece.from + piece.bytes() <= read.end, "{piece:?} of {part:?}");
                assert!((1..=block_bytes).contains(&piece.bytes()), "{piece:?}");
                let before = whole.from_type.elements(piece.from - whole.from);
                assert_eq!(piece.to, whole.to + whole.to_type.bytes(before));
            }));
        }
    }
    for (whole, (bytes, weights)) in unit.unpacks.iter().zip(unpacked) {
        assert_eq!((bytes, weights), (whole.bytes(), whole.packed.parts().weights));
    }
    for (copy, pieces) in unit.copies.iter().zip(copied) {
        assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), copy.bytes, "{copy:?}");
        apart(
            pieces.iter().map(|piece| (piece.from - copy.from, piece.bytes)).collect(),
            copy.bytes,
            "parts of a copy",
        );
    }
    for (whole, pieces) in unit.casts.iter().zip(cast) {
        assert_eq!(pieces.iter().map(|piece| piece.elements).sum::<usize>(), whole.elements, "{whole:?}");
        let places = pieces.iter().map(|piece| (piece.from - whole.from, piece.bytes()));
        apart(places.collect(), whole.bytes(), "parts of a cast");
    }
}

/// Slots take every unit that passes through, tiers take those that are kept there.
fn check_plan(asked: &Asked, settings: &Settings, plan: &Plan, sharing: Sharing) {
    assert_eq!(plan.units(), asked.units.len());
    asked.units.iter().zip(&plan.units).for_each(|(unit, plan)| check_unit(&asked.checkpoint, unit, plan, sharing));
    let of = |tiers: &[Tier], bytes: fn(&UnitLayout) -> usize| -> usize {
        plan.units.iter().filter(|unit| tiers.contains(&unit.tier)).map(bytes).max().unwrap_or(0)
    };
    let counts = |stage: &StageLayout, n: usize, batch: usize| {
        assert_eq!((stage.slots, stage.batch), (n + 1, batch.max(1)));
    };
    let check = |stage: &StageLayout, n: usize, batch: usize, largest: usize| {
        counts(stage, n, batch);
        assert!(stage.slot_bytes.is_multiple_of(PAGE) && stage.slot_bytes >= largest.max(1), "{stage:?} for {largest}");
        assert!(stage.slot_bytes - largest <= PAGE, "{stage:?} for {largest}");
    };
    let passing = [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::GpuPacked, Tier::PinnedPacked];
    let all = if sharing == Sharing::Own { &passing[..] } else { &Tier::ALL[..] };
    let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = *settings;
    let largest = of(all, |unit| if unit.in_place { 0 } else { unit.device_bytes });
    let holds = |unit: &UnitLayout| unit.in_place || unit.tier == Tier::PinnedPacked;
    let held = if sharing == Sharing::Ram && plan.units.iter().any(holds) { n_gpu } else { 0 };
    if held > 0 && largest == 0 {
        counts(&plan.layout.gpu, n_gpu, batch_gpu);
        assert_eq!(plan.layout.gpu.slot_bytes, 0);
    } else {
        check(&plan.layout.gpu, n_gpu, batch_gpu, largest);
    }
    let read = [Tier::Disk, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked];
    let pinned = [Tier::Disk, Tier::Gpu, Tier::GpuPacked, Tier::PinnedPacked, Tier::Ram];
    let in_slot = |unit: &UnitLayout| if unit.in_place && unit.tier == Tier::Gpu { 0 } else { unit.host_bytes };
    if sharing == Sharing::Ram {
        assert!(plan.layout.ram.is_none());
        let (n, batch) = (n_cpu + n_cpu_pinned + held, if n_cpu_pinned > 0 { batch_cpu_pinned } else { batch_cpu });
        check(plan.layout.pinned.as_ref().unwrap(), n, batch, of(&pinned, in_slot));
    } else {
        if let Some(stage) = &plan.layout.ram {
            check(stage, n_cpu, batch_cpu, of(&read, |unit| unit.host_bytes));
        }
        if let Some(stage) = &plan.layout.pinned {
            check(stage, n_cpu_pinned, batch_cpu_pinned, of(&pinned, |unit| unit.host_bytes));
        }
    }
    assert!(plan.layout.ram.is_some() || plan.layout.pinned.is_some());
    let spaces = plan.layout.spaces();
    let memories = [&[Tier::Ram][..], &[Tier::Pinned], &[Tier::Gpu, Tier::GpuPacked]];
    for ((tiers, space), align) in memories.into_iter().zip(spaces).zip([PAGE, PAGE, DEVICE_ALIGN]) {
        // Behind pinned units there is room for those that are packed meanwhile.
        let packing = if tiers == [Tier::Pinned] { plan.layout.kept(Tier::PinnedPacked) } else { 0 };
        let end = space.kept - packing;
        let bytes = |unit: &UnitLayout| match unit.tier {
            Tier::Gpu if !unit.in_place => unit.device_bytes,
            Tier::GpuPacked => unit.packed_bytes,
            _ => unit.host_bytes,
        };
        let live = || plan.units.iter().filter(|unit| tiers.contains(&unit.tier));
        assert!(live().all(|unit| unit.resident_at.is_multiple_of(if unit.in_place { PAGE } else { align })));
        apart(live().map(|unit| (unit.resident_at, bytes(unit))).collect(), end, "tiers");
    }
    assert_eq!(plan.tallies.kept(), plan.tiers().filter(|tier| *tier != Tier::Disk).count());
    let [ram, pinned, gpu] = spaces.map(Space::bytes);
    let [host, device] = memory(plan);
    assert_eq!(
        [host, device],
        [ram.saturating_add(pinned), gpu.saturating_add(Staging::BLOCKS * plan.layout.staging.block_bytes)]
    );
    assert_eq!(plan.layout.memory(), [device, host]);
    let forecast = plan.forecast(Bandwidths::default());
    assert!(forecast.copy_bytes <= plan.bytes_per_pass() && forecast.pass_seconds >= 0.0, "{forecast:?}");
}

/// What it takes in RAM and on the device.
fn memory(plan: &Plan) -> [usize; 2] {
    let [device, host] = Part::totals(&plan.memory());
    [host, device]
}

#[test]
fn a_plan_reads_what_is_needed_once_or_there_is_an_error() {
    let holes = Holes::new();
    rounds("plan", |rng| {
        let Some(asked) = Asked::new(rng, &holes) else { return false };
        let (settings, sharing) = (settings(rng), [Sharing::Own, Sharing::Ram][rng.usize(..2)]);
        let made = Plan::new(&asked.checkpoint, &asked.units, &settings, sharing);
        if let Ok(plan) = &made {
            check_plan(&asked, &settings, plan, sharing);
            plan.units.iter().for_each(|unit| check_parts(rng, unit));
        }
        made.is_ok()
    });
}

/// The least that a refusal names: of device memory, or of RAM.
fn named(error: &Error) -> Option<(bool, usize)> {
    let Error::TooLittle { memory, least, .. } = *error else { return None };
    Some((memory == MemoryKind::Device, least))
}

#[test]
fn a_plan_keeps_to_its_budget_and_the_least_that_is_named_is_the_least() {
    let holes = Holes::new();
    rounds("budget", |rng| {
        let Some(mut asked) = Asked::new(rng, &holes) else { return false };
        let overhead = match rng.u8(..4) {
            0 => FixedOverhead { device_bytes: number(rng), host_bytes: number(rng) },
            1 => FixedOverhead { device_bytes: rng.usize(..1 << 20), host_bytes: rng.usize(..1 << 20) },
            _ => FixedOverhead::default(),
        };
        let speed =
            |rng: &mut fastrand::Rng| [2e9, 1e10 * rng.f64(), 0.0, f64::INFINITY][rng.usize(..4).min(rng.usize(..4))];
        let by = Bandwidths { disk: speed(rng), copy: speed(rng) };
        let given = rng.bool().then(|| settings(rng));
        let Asked { checkpoint, units } = &asked;
        let pack = [Pack::Never, Pack::Auto, Pack::Always][rng.usize(..3)];
        let plan = |budget: Budget| budget.plan_packing(checkpoint, units, overhead, by, given.as_ref(), pack);
        let shared = rng.bool();
        let amount = |rng: &mut fastrand::Rng| rng.usize(..) >> rng.u32(..64);
        let mut budget = Budget { device_bytes: (!shared).then(|| amount(rng)), host_bytes: amount(rng) };
        let mut planned = plan(budget);
        // What is refused for want of memory works with what is named, and not with a byte less.
        for _ in 0..2 {
            let Err(error) = planned else { break };
            let Some((vram, least)) = named(&error) else { return false };
            let with = |bytes: usize| match vram {
                true => Budget { device_bytes: Some(bytes), ..budget },
                false => Budget { host_bytes: bytes, ..budget },
            };
            let before = if vram { budget.device_bytes.unwrap() } else { budget.host_bytes };
            assert!(before < least, "{error}");
            assert_eq!(plan(with(least - 1)).err().as_ref().and_then(named), Some((vram, least)), "{error}");
            budget = with(least);
            planned = plan(budget);
            if vram {
                // There may be too little RAM still.
                let other = planned.as_ref().err().and_then(named);
                assert!(other.is_none_or(|(vram, _)| !vram), "{error}");
            }
        }
        let placement = planned.unwrap_or_else(|error| panic!("{error} with {budget:?}"));
        if given.is_none() {
            let least = budget.least(checkpoint, units, overhead).unwrap();
            assert!(least.host_bytes <= budget.host_bytes && least.device_bytes <= budget.device_bytes);
            plan(least).unwrap_or_else(|error| panic!("{error} with {least:?}"));
        }
        placement.apply_to(&mut asked.units).unwrap();
        let settings = &placement.settings;
        let sharing = if shared { Sharing::Ram } else { Sharing::Own };
        let made = Plan::new(&asked.checkpoint, &asked.units, settings, sharing);
        let made = made.unwrap_or_else(|error| panic!("{error} with {budget:?}, {placement:?}"));
        check_plan(&asked, settings, &made, sharing);
        let [host, device] = memory(&made);
        let (host, device) = (host.saturating_add(overhead.host_bytes), device.saturating_add(overhead.device_bytes));
        let fits = match budget.device_bytes {
            Some(bytes) => device <= bytes && host <= budget.host_bytes,
            None => device.saturating_add(host) <= budget.host_bytes,
        };
        assert!(fits, "{host} bytes of RAM, {device} of the device for {budget:?}");
        true
    });
}
