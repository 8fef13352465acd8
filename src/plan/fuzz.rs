//! The planner, asked for anything: tables that nobody has, numbers at the edge of what there is. It refuses with an error, or
//! its plan reads what is needed once, puts it where nothing else lies, and keeps to the budget; and where a budget is too
//! small, the least that it names is the least. How long, and from which seed: see `tests/support/src/fuzz.rs`.

mod draw;

use draw::{Asked, Holes, settings};
use support::fuzz::{number, rounds};

use super::*;
use crate::{
    checkpoint::TensorEntry,
    dtype::DType,
    error::MemoryKind,
    layout::{Cast, CopyRange, Dequantise, Extent, MAX_GAP, REPACK_ALIGN, Space, StageLayout},
    quantised::Recipe,
};

/// Ranges of one space: none overlaps another, all end by `end`.
fn apart(mut ranges: Vec<(usize, usize)>, end: usize, what: &str) {
    ranges.sort_unstable();
    let last = ranges.into_iter().fold(0, |last, (start, length)| {
        assert!(start >= last, "{what}: one at {start} where another ends at {last}");
        start + length
    });
    assert!(last <= end, "{what}: to {last} of {end}");
}

/// What a matrix is made by.
fn recipe(checkpoint: &Checkpoint, arrival: &Arrival) -> Option<Recipe> {
    let ArrivalOp::Dequantise { scheme, shape, .. } = arrival.op else { return None };
    let tensors: Vec<_> = arrival.inputs.iter().map(|input| checkpoint.describe(input).unwrap()).collect();
    Some(Recipe::new(scheme, shape, &tensors).unwrap())
}

/// Type and shape of what arrives.
fn made(checkpoint: &Checkpoint, arrival: &Arrival) -> (DType, Vec<usize>) {
    let (stored, shape) = checkpoint.describe(&arrival.inputs[0]).unwrap();
    match arrival.op {
        ArrivalOp::Keep => (stored, shape.to_vec()),
        ArrivalOp::To(to) => (to, shape.to_vec()),
        ArrivalOp::Dequantise { shape, to, .. } => {
            (to.unwrap_or_else(|| recipe(checkpoint, arrival).unwrap().as_blocks()), shape.to_vec())
        }
    }
}

/// The tier that a unit is planned in, and whether it is used in place.
fn expected(checkpoint: &Checkpoint, unit: &Unit, sharing: Sharing) -> (Tier, bool) {
    let as_it_lies = |arrival: &Arrival| {
        let (entry, (to, shape)) = (checkpoint.entry(&arrival.inputs[0]).unwrap(), made(checkpoint, arrival));
        // Of nothing nothing is converted.
        let stays = entry.packed.is_none() && to == entry.dtype && arrival.inputs.len() == 1 || shape.contains(&0);
        stays && entry.offset.is_multiple_of(to.align() as u64)
    };
    let mut inputs = unit.arrivals().iter().flat_map(|arrival| &arrival.inputs);
    let some = inputs.any(|input| checkpoint.entry(input).unwrap().bytes > 0);
    let in_place = some && unit.tier != Tier::PinnedPacked && unit.arrivals().iter().all(as_it_lies);
    match (sharing, unit.tier) {
        (Sharing::Own, tier) => (tier, false),
        (_, Tier::Ram | Tier::Pinned | Tier::GpuPacked) if in_place => (Tier::Gpu, true),
        (_, Tier::Ram) => (Tier::Pinned, false),
        (_, tier) => (tier, in_place),
    }
}

/// Tensors that make a matrix lie apart in a staging block, where kernels take them.
fn check_staged(made: &Dequantise) {
    assert!(made.inputs.iter().all(|input| input.staged_at.is_multiple_of(REPACK_ALIGN)), "{made:?}");
    apart(made.inputs.iter().map(|input| (input.staged_at, input.bytes)).collect(), made.staged_bytes(), "staged");
}

/// Reads are whole pages, one behind the other in files and in the slot.
fn check_extents(checkpoint: &Checkpoint, plan: &UnitLayout) {
    let mut before: Option<&Extent> = None;
    for extent in &plan.extents {
        let length = checkpoint.length(extent.file);
        assert!(extent.offset < extent.end && extent.end <= length, "{extent:?} of {length}");
        assert!([extent.offset as usize, extent.len, extent.at].iter().all(|at| at.is_multiple_of(PAGE)));
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
    let read =
        |extent: &Extent| (extent.offset + extent.len as u64).min(checkpoint.length(extent.file)) - extent.offset;
    assert_eq!(plan.read_bytes as u64, plan.extents.iter().map(read).sum::<u64>());
}

/// Nothing is read that is not needed, but for the rest of pages and small gaps: file, start, end and name of what is.
fn check_needed(plan: &UnitLayout, mut needed: Vec<(usize, u64, u64, &String)>) {
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
}

/// A unit's tensors are read once, and arrive where nothing else does, or stay where they were read to.
fn check_unit(checkpoint: &Checkpoint, unit: &Unit, plan: &UnitLayout, sharing: Sharing) {
    assert_eq!((plan.tier, plan.in_place), expected(checkpoint, unit, sharing));
    assert_eq!((plan.name.as_str(), plan.tensors.len()), (unit.name(), unit.arrivals().len()));
    let aligned = |at: usize, to: usize| at.is_multiple_of(to);
    check_extents(checkpoint, plan);
    let position = |entry: &TensorEntry| {
        let within =
            |extent: &&Extent| extent.file == entry.file && extent.offset <= entry.offset && entry.end() <= extent.end;
        let found: Vec<_> = plan.extents.iter().filter(within).collect();
        let [extent] = found[..] else { panic!("{entry:?}: {found:?}") };
        extent.at + (entry.offset - extent.offset) as usize
    };
    let (mut places, mut needed, mut kept, mut arriving) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for arrival in unit.arrivals() {
        let inputs: Vec<_> = arrival.inputs.iter().map(|input| checkpoint.entry(input).unwrap()).collect();
        let (entry, (to, shape)) = (inputs[0], made(checkpoint, arrival));
        let placed = &plan.tensors[plan.find(&arrival.output).unwrap()];
        let elements = shape.iter().product();
        assert_eq!((placed.dtype, &placed.shape), (to, &shape));
        assert!(aligned(placed.at, if plan.in_place { to.align() } else { DEVICE_ALIGN }));
        places.push((placed.at, to.bytes(elements)));
        let read = arrival.inputs.iter().zip(&inputs).filter(|(_, entry)| entry.bytes > 0);
        needed.extend(read.map(|(name, entry)| (entry.file, entry.offset, entry.end(), name)));
        if elements == 0 {
            continue;
        }
        let from = position(entry);
        if plan.in_place {
            assert_eq!(placed.at, from);
        } else if let Some(recipe) = recipe(checkpoint, arrival) {
            let found: Vec<_> = plan.dequantises.iter().filter(|found| found.to == placed.at).collect();
            let [found] = found[..] else { panic!("{}: {found:?}", arrival.output) };
            assert_eq!((found.recipe, found.to_type), (recipe, to));
            let from: Vec<_> = inputs.iter().map(|entry| (position(entry), entry.bytes)).collect();
            assert_eq!(found.inputs.iter().map(|input| (input.from, input.bytes)).collect::<Vec<_>>(), from);
            check_staged(found);
            kept.extend(match found.is_kept_stored() {
                true => found.inputs.iter().map(|input| (input.kept_at, input.bytes)).collect(),
                false => vec![(found.kept_at, to.bytes(elements))],
            });
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
        apart(kept, plan.packed_bytes, "what matrices are made of, where it is kept");
    }
    let copied: usize = plan.copies.iter().map(|copy| copy.bytes).sum();
    let count = places.iter().filter(|(_, bytes)| *bytes > 0).count();
    assert!(copied == arriving && plan.casts.len() <= count, "{copied} bytes are copied of {arriving}");
    check_needed(plan, needed);
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
    let staged = plan.units.iter().flat_map(|unit| &unit.dequantises).map(Dequantise::staged_bytes).max();
    assert!(sharing == Sharing::Ram || plan.layout.staging.block_bytes >= staged.unwrap_or(0));
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
