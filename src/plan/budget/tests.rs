//! The planner against a plain reckoning of what its plans take and how long they need, over random tables and budgets.

use support::cases;

use super::*;
use crate::{
    checkpoint::StoredTensor,
    dtype::DType,
    fixtures,
    layout::{DEVICE_ALIGN, PAGE},
    plan::{BindingLink, Part, Plan},
};

/// A table of units of a few sizes, such as attention and feed-forward blocks with an output head, in any order. Where memory is shared
/// some are used in place.
fn table(rng: &mut fastrand::Rng, shared: bool) -> Vec<Sizes> {
    let kinds: Vec<_> = (0..1 + rng.usize(..3))
        .map(|_| {
            // Alike to the byte or not at all, so that what is foretold for the largest of a kind holds for each.
            let pages = [1, 3, 8, 20, 50, 140, 400, 1000][rng.usize(..8)];
            let copied = pages * PAGE - 1000;
            // Some grow or shrink on arrival.
            let in_place = shared && rng.bool();
            let device = copied * [1, 1, 2][rng.usize(..3)] / [1, 1, 2][rng.usize(..3)];
            let device = if in_place { pages * PAGE } else { device.next_multiple_of(DEVICE_ALIGN) };
            Sizes {
                read: pages * PAGE,
                arriving: copied,
                in_place: if in_place { copied } else { 0 },
                passing: [if in_place { 0 } else { device }, device],
                through: if in_place { 0 } else { pages * PAGE },
                host: pages * PAGE,
                device,
                packed: device,
                unpacked: [0; 2],
                repacked: [pages * PAGE, 0],
            }
        })
        .collect();
    (0..1 + rng.usize(..24)).map(|_| kinds[rng.usize(..kinds.len())]).collect()
}

fn bandwidths(rng: &mut fastrand::Rng) -> Bandwidths {
    Bandwidths { disk: 1e8 + 1e10 * rng.f64(), copy: 1e8 + 1e11 * rng.f64() }
}

/// One that hardly keeps the disk waiting, so that a single unit ahead does.
const FAST_LINK: Bandwidths = Bandwidths { disk: 2e9, copy: 50e9 };

/// Memory on the device and in RAM, unit by unit.
fn taken(
    sizes: &[Sizes],
    tiers: &[Tier],
    [n_gpu, n_cpu_pinned, n_cpu]: Rings,
    overhead: FixedOverhead,
    shared: bool,
) -> [usize; 2] {
    let of = |wanted: &[Tier]| -> Vec<Sizes> {
        let pairs = sizes.iter().zip(tiers);
        pairs.filter(|(_, tier)| wanted.contains(tier)).map(|(size, _)| *size).collect()
    };
    let slot = |largest: Option<usize>| largest.unwrap_or(0).next_multiple_of(PAGE).max(PAGE);
    let passing = [Tier::Disk, Tier::Pinned, Tier::Gpu];
    let gpu_slot = of(if shared { &passing } else { &passing[..2] }).iter().map(|size| size.passing[0]).max();
    let held = if sizes.iter().any(|size| size.in_place > 0) { n_gpu } else { 0 };
    let gpu_slot = if held > 0 && gpu_slot == Some(0) { 0 } else { slot(gpu_slot) };
    let through = of(&[Tier::Gpu]).iter().map(|size| size.through).max();
    let host_slot = slot(of(&[Tier::Disk]).iter().map(|size| size.host).max().max(through));
    let device: usize = of(&[Tier::Gpu]).iter().map(|size| size.device).sum();
    let device = if shared { device.next_multiple_of(PAGE) } else { device };
    let host: usize = of(&[Tier::Pinned]).iter().map(|size| size.host).sum();
    let ram_slots = if n_cpu > 0 { n_cpu + 1 } else { 0 };
    let pinned_slots = if n_cpu > 0 && n_cpu_pinned == 0 { 0 } else { n_cpu_pinned + 1 };
    let slots = if shared { n_cpu + n_cpu_pinned + held + 1 } else { ram_slots + pinned_slots };
    let host = overhead.host_bytes + slots * host_slot + host;
    [overhead.device_bytes + (n_gpu + 1) * gpu_slot + device, host]
}

/// Seconds of a pass, unit by unit.
fn seconds(sizes: &[Sizes], tiers: &[Tier], rings: Rings, by: Bandwidths) -> f64 {
    let sum = |of: fn(&Sizes) -> usize, tiers_of: &[Tier]| {
        let pairs = sizes.iter().zip(tiers).filter(|(_, tier)| tiers_of.contains(tier));
        pairs.map(|(size, _)| of(size)).sum::<usize>() as f64
    };
    let disk = sum(|size| size.read, &[Tier::Disk]) / by.disk;
    let copy = sum(|size| size.arriving - size.in_place, &[Tier::Disk, Tier::Pinned]) / by.copy;
    let (slower, faster) = (disk.max(copy), disk.min(copy));
    let held = if sizes.iter().any(|size| size.in_place > 0) { rings[0] } else { 0 };
    [1.1 * (slower + faster), slower + 0.25 * faster, slower][(rings[1] + rings[2] + held).min(2)]
}

/// The least budget, by the error that names it.
fn minimum(sizes: &[Sizes], overhead: FixedOverhead, shared: bool) -> Budget {
    let named =
        |budget: Budget| match choose(&surveyed(sizes, overhead), budget, Bandwidths::default(), &RINGS, Pack::Never) {
            Err(Error::TooLittle { memory, least, .. }) => (memory == MemoryKind::Device, least),
            other => panic!("{other:?}"),
        };
    if shared {
        let (vram, host_bytes) = named(Budget { device_bytes: None, host_bytes: 0 });
        assert!(!vram);
        return Budget { device_bytes: None, host_bytes };
    }
    let (vram, device) = named(Budget { device_bytes: Some(0), host_bytes: usize::MAX });
    assert!(vram);
    let (vram, host_bytes) = named(Budget { device_bytes: Some(device), host_bytes: 0 });
    assert!(!vram);
    Budget { device_bytes: Some(device), host_bytes }
}

#[test]
fn plans_keep_to_the_budget_are_no_slower_than_plain_rings_and_no_slower_with_more() {
    let start = fastrand::u64(..);
    for seed in (0..cases(400)).map(|i| start.wrapping_add(i.into())) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (shared, by) = (rng.bool(), bandwidths(&mut rng));
        let sizes = table(&mut rng, shared);
        let overhead = FixedOverhead { device_bytes: rng.usize(..1 << 20), host_bytes: rng.usize(..1 << 20) };
        let least = minimum(&sizes, overhead, shared);
        for below in [
            Budget { host_bytes: least.host_bytes - 1, ..least },
            Budget { device_bytes: least.device_bytes.map(|bytes| bytes - 1), ..least },
        ] {
            assert_eq!(
                choose(&surveyed(&sizes, overhead), below, by, &RINGS, Pack::Never).is_ok(),
                below == least,
                "seed {seed}: {below:?}"
            );
        }
        let all: usize = sizes.iter().map(|size| size.host.max(size.device)).sum();
        let mut budget = least;
        let mut before = f64::INFINITY;
        let step = |rng: &mut fastrand::Rng| rng.usize(..1 + all / 8);
        for round in 0..24 {
            let (tiers, rings) = choose(&surveyed(&sizes, overhead), budget, by, &RINGS, Pack::Never).unwrap();
            let memory = taken(&sizes, &tiers, rings, overhead, shared);
            assert!(budget.holds(memory), "seed {seed}: {memory:?} for {budget:?}");
            let now = seconds(&sizes, &tiers, rings, by);
            for plain in RINGS {
                let all_on_disk = vec![Tier::Disk; sizes.len()];
                let fits = budget.holds(taken(&sizes, &all_on_disk, plain, overhead, shared));
                assert!(!fits || now <= seconds(&sizes, &all_on_disk, plain, by) * 1.000_001, "seed {seed}: {plain:?}");
            }
            assert!(now <= before * 1.000_001, "seed {seed}, round {round}: {before} s became {now} s with {budget:?}");
            before = now;
            budget.host_bytes += step(&mut rng);
            budget.device_bytes = budget.device_bytes.map(|bytes| bytes + step(&mut rng));
        }
        let given = [1 + rng.usize(..4), rng.usize(..4), rng.usize(..4)];
        match choose(&surveyed(&sizes, overhead), budget, by, &[given], Pack::Never) {
            Ok((tiers, rings)) => {
                let memory = taken(&sizes, &tiers, rings, overhead, shared);
                assert!(rings == given && budget.holds(memory), "seed {seed}: {memory:?} for {budget:?}");
                let plain = seconds(&sizes, &vec![Tier::Disk; sizes.len()], given, by);
                assert!(seconds(&sizes, &tiers, given, by) <= plain * 1.000_001, "seed {seed}: {given:?}");
            }
            Err(error) => {
                let all_on_disk = taken(&sizes, &vec![Tier::Disk; sizes.len()], given, overhead, shared);
                assert!(!budget.holds(all_on_disk), "seed {seed}: {error} with {given:?}");
            }
        }
        budget.host_bytes += 12 * all + (16 << 20);
        let (tiers, rings) = choose(&surveyed(&sizes, overhead), budget, by, &RINGS, Pack::Never).unwrap();
        assert!(!tiers.contains(&Tier::Disk), "seed {seed}: {tiers:?} with room for all, {rings:?}");
    }
}

#[test]
fn the_least_with_given_rings_keeps_what_is_larger_than_its_slots_would_be() {
    let of = |pages: usize| Sizes {
        read: pages * PAGE,
        arriving: pages * PAGE,
        in_place: 0,
        passing: [pages * PAGE; 2],
        through: pages * PAGE,
        host: pages * PAGE,
        device: pages * PAGE,
        packed: pages * PAGE,
        unpacked: [0; 2],
        repacked: [pages * PAGE, 0],
    };
    // With slots for the large unit it would be three times 100 pages.
    let (sizes, rings) = ([of(100), of(1), of(2)], [[1, 2, 0]]);
    let by = Bandwidths::default();
    let chosen = |budget: Budget| choose(&surveyed(&sizes, FixedOverhead::default()), budget, by, &rings, Pack::Never);
    let needed = Budget { device_bytes: Some(200 * PAGE), host_bytes: 105 * PAGE };
    assert_eq!(chosen(needed).unwrap().0[0], Tier::Pinned);
    let lacks = |budget: Budget| match chosen(budget).unwrap_err() {
        Error::TooLittle { memory, given, least, .. } => (memory, given, least),
        error => panic!("{error}"),
    };
    let short = needed.host_bytes - 1;
    assert_eq!(lacks(Budget { host_bytes: short, ..needed }), (MemoryKind::Ram, short, needed.host_bytes));
    // On the device it takes more there, and slots of its size on its way.
    assert_eq!(lacks(Budget { device_bytes: Some(0), ..needed }), (MemoryKind::Device, 0, 104 * PAGE));
}

#[test]
fn what_is_kept_of_units_alike_is_the_share_that_fits_at_even_distances() {
    let size = 64 * PAGE;
    let sizes = [Sizes {
        read: size,
        arriving: size,
        in_place: 0,
        passing: [size; 2],
        through: size,
        host: size,
        device: size,
        packed: size,
        unpacked: [0; 2],
        repacked: [size, 0],
    }; 28];
    let least = minimum(&sizes, FixedOverhead::default(), true).host_bytes;
    assert_eq!(least, 3 * size, "two slots on the device, one in RAM");
    for quarters in 0..=4 {
        // One slot more lets the disk read while the device copies.
        let host_bytes = least + size + quarters * sizes.len() / 4 * size;
        let budget = Budget { device_bytes: None, host_bytes };
        let (tiers, rings) =
            choose(&surveyed(&sizes, FixedOverhead::default()), budget, FAST_LINK, &RINGS, Pack::Never).unwrap();
        let kept: Vec<_> = (0..28).filter(|&unit| tiers[unit] == Tier::Gpu).collect();
        let on_disk: Vec<_> = (0..28).filter(|&unit| tiers[unit] == Tier::Disk).collect();
        assert_eq!(kept.len() + on_disk.len(), 28);
        if quarters < 4 {
            // Towards the end a unit more saves more than a slot.
            assert_eq!(kept.len() + rings[1], quarters * 7 + 1, "{tiers:?} with {rings:?}");
            let gaps = on_disk.iter().zip(on_disk.iter().cycle().skip(1)).map(|(a, b)| (b + 28 - a - 1) % 28);
            let (least, most) = gaps.fold((28, 0), |(least, most), gap| (gap.min(least), gap.max(most)));
            assert!(most - least <= 1, "{on_disk:?}");
        }
    }
}

#[test]
fn each_tier_keeps_its_share_at_even_distances() {
    let size = 1 << 20;
    let sizes = [Sizes {
        read: size,
        arriving: size,
        in_place: 0,
        passing: [size; 2],
        through: size,
        host: size,
        device: size,
        packed: size,
        unpacked: [0; 2],
        repacked: [size, 0],
    }; 40];
    let budget = Budget { device_bytes: Some(12 * size), host_bytes: 22 * size };
    let (tiers, rings) =
        choose(&surveyed(&sizes, FixedOverhead::default()), budget, FAST_LINK, &RINGS, Pack::Never).unwrap();
    assert_eq!(rings, [1, 1, 0]);
    let places = |tier: Tier| (0..40).filter(|&unit| tiers[unit] == tier).collect::<Vec<_>>();
    assert_eq!([Tier::Disk, Tier::Pinned, Tier::Gpu].map(|tier| places(tier).len()), [10, 20, 10]);
    for tier in [Tier::Disk, Tier::Gpu] {
        let gaps: Vec<_> = places(tier).windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| (3..=5).contains(gap)), "{tier}: {tiers:?}");
    }
}

#[test]
fn what_a_plan_reserves_is_what_was_counted() {
    for seed in 0..cases(60).into() {
        let mut rng = fastrand::Rng::with_seed(seed);
        let fixture = fixtures::random_fixture(60_000, &mut rng);
        let mut units = fixture.units.clone();
        for unit in &mut units {
            let mut wider = Unit::new(unit.name());
            for arrival in unit.arrivals() {
                let widens = fixture.table[&arrival.inputs[0]].dtype.converts_to(DType::F32) && rng.bool();
                let op = if widens { crate::plan::ArrivalOp::To(DType::F32) } else { arrival.op };
                wider.add(crate::plan::Arrival { op, ..arrival.clone() });
            }
            *unit = wider;
        }
        let shared = rng.bool();
        let device_bytes = (!shared).then(|| rng.usize(300_000..4_000_000));
        let budget = Budget { device_bytes, host_bytes: rng.usize(300_000..4_000_000) };
        let by = bandwidths(&mut rng);
        let overhead = FixedOverhead::default();
        let planned = if rng.bool() {
            budget.plan(&fixture.checkpoint, &units, overhead, by)
        } else {
            let settings = fixtures::settings(1 + rng.usize(..3), rng.usize(..3), rng.usize(..3));
            budget.plan_with(&fixture.checkpoint, &units, overhead, by, &settings)
        };
        let Ok(placement) = planned else { continue };
        placement.apply_to(&mut units).unwrap();
        let settings = placement.settings;
        let sharing = if shared { Sharing::Ram } else { Sharing::Own };
        let plan = Plan::new(&fixture.checkpoint, &units, &settings, sharing).unwrap();
        assert!(budget.holds(Part::totals(&plan.memory())), "seed {seed}: {:?} for {budget:?}", plan.memory());
    }
}

/// Layers of a model whose weights are BF16, in a file that is all hole.
fn layers(folder: &std::path::Path, count: usize, shapes: &[[usize; 2]]) -> (Checkpoint, Vec<Unit>) {
    let (file, mut end, mut table) = (folder.join("hole"), 0, Vec::new());
    let mut units = Vec::new();
    for layer in 0..count {
        let mut unit = Unit::new(format!("layer {layer}"));
        for (number, shape) in shapes.iter().enumerate() {
            let name = format!("{layer}.{number}");
            unit.keep(number.to_string(), &name);
            table.push(StoredTensor {
                name,
                file: file.clone(),
                offset: end,
                dtype: DType::BF16,
                shape: shape.to_vec(),
            });
            end += 2 * (shape[0] * shape[1]) as u64;
        }
        units.push(unit);
    }
    std::fs::File::create(&file).unwrap().set_len(end).unwrap();
    (Checkpoint::from_table(table).unwrap(), units)
}

#[test]
fn layers_of_a_70b_model_fit_8_gb_of_gpu_memory() {
    let folder = support::folder();
    let shapes = [[8192, 8192], [1024, 8192], [1024, 8192], [8192, 8192], [28672, 8192], [28672, 8192], [8192, 28672]];
    let (checkpoint, mut units) = layers(folder.path(), 80, &shapes);
    // The KV cache of 8192 tokens, and a gigabyte of the rest.
    let overhead = FixedOverhead { device_bytes: (80 * 2 * 8 * 128 * 8192 * 2) + 1_000_000_000, host_bytes: 0 };
    let budget = Budget { device_bytes: Some(8_000_000_000), host_bytes: 64_000_000_000 };
    let placement = budget.plan(&checkpoint, &units, overhead, FAST_LINK).unwrap();
    placement.apply_to(&mut units).unwrap();
    let plan = Plan::new(&checkpoint, &units, &placement.settings, Sharing::Own).unwrap();
    let [device, _] = Part::totals(&plan.memory());
    assert!(device + overhead.device_bytes <= 8_000_000_000, "{:?}", plan.memory());
    // 64 GB are 37 times 1.711 GB: two slots, and 35 layers.
    assert_eq!(plan.count(Tier::Pinned), 35, "{:?}", plan.memory());
    let forecast = plan.forecast(FAST_LINK);
    assert_eq!(forecast.binds(), Some(BindingLink::Disk));
    assert!((forecast.disk_seconds - 45.0 * 1.711_276_032 / 2.0).abs() < 0.01, "{forecast:?}");
}

/// Units of these sizes.
fn surveyed(sizes: &[Sizes], overhead: FixedOverhead) -> Survey {
    Survey { sizes: sizes.to_vec(), overhead, packing: 0 }
}

/// A unit that is stored packed, and the bytes of its weights.
fn stored_packed() -> (usize, Sizes) {
    let (size, stored) = (3 << 20, 2 << 20);
    let sizes = Sizes {
        read: stored,
        arriving: stored,
        in_place: 0,
        passing: [size; 2],
        through: stored,
        unpacked: [stored, size],
        host: stored,
        device: size,
        packed: stored,
        repacked: [stored, size],
    };
    (size, sizes)
}

#[test]
fn units_are_packed_in_ram_where_passes_are_faster_for_it_and_then_more_stay() {
    let size = 3 << 20;
    let unit = Sizes {
        read: size,
        arriving: size,
        in_place: 0,
        passing: [size; 2],
        through: size,
        unpacked: [0; 2],
        host: size,
        device: size,
        packed: size,
        repacked: [size / 3 * 2, size],
    };
    let survey = Survey { packing: size, ..surveyed(&[unit; 40], FixedOverhead::default()) };
    let chosen = |host_bytes: usize, device_bytes: usize, pack: Pack| {
        let budget = Budget { device_bytes: Some(device_bytes), host_bytes };
        let (tiers, _) = choose(&survey, budget, FAST_LINK, &RINGS, pack).unwrap();
        [Tier::Disk, Tier::Pinned, Tier::PinnedPacked].map(|tier| tiers.iter().filter(|of| **of == tier).count())
    };
    // Eleven units and two slots; the device has room for one more, or for staging blocks.
    assert_eq!(chosen(13 * size, 3 * size, Pack::Never), [28, 11, 0]);
    assert_eq!(chosen(13 * size, 3 * size, Pack::Auto), [24, 0, 16]);
    assert_eq!(chosen(13 * size, 3 * size, Pack::Always), [24, 0, 16]);
    assert_eq!(chosen(13 * size, 3 * size - 1, Pack::Auto), [29, 11, 0]);
    // All stay either way, and pass the link in less.
    assert_eq!(chosen(44 * size, 3 * size, Pack::Auto), [0, 0, 40]);
}

#[test]
fn units_that_are_stored_packed_are_not_read_once_more_to_pack_their_norms() {
    let (size, unit) = stored_packed();
    let unit = Sizes { repacked: [unit.host - PAGE, size], ..unit };
    for device_bytes in [3 * size, 8 * size].map(Some) {
        let budget = Budget { device_bytes, host_bytes: 20 * size };
        let survey = surveyed(&[unit; 40], FixedOverhead::default());
        let (tiers, _) = choose(&survey, budget, FAST_LINK, &RINGS, Pack::Auto).unwrap();
        assert!(tiers.contains(&Tier::Pinned) && !tiers.contains(&Tier::PinnedPacked), "{tiers:?}");
    }
}

#[test]
fn units_stay_packed_on_the_device_where_more_of_them_fit_and_plain_where_all_do() {
    let (size, unit) = stored_packed();
    let sizes = [unit; 40];
    let chosen = |device_bytes: Option<usize>| {
        let budget = Budget { device_bytes, host_bytes: 64 * size };
        let (tiers, [n_gpu, ..]) =
            choose(&surveyed(&sizes, FixedOverhead::default()), budget, FAST_LINK, &RINGS, Pack::Never).unwrap();
        let count = |tier: Tier| tiers.iter().filter(|found| **found == tier).count();
        ([Tier::Gpu, Tier::GpuPacked, Tier::Pinned].map(count), n_gpu)
    };
    // Two slots take what three packed units would.
    assert_eq!(chosen(Some(22 * size)), ([0, 30, 10], 1));
    assert_eq!(chosen(Some(40 * size + 2 * PAGE)), ([40, 0, 0], 1));
    // In RAM they are packed as well as anywhere.
    assert_eq!(chosen(None).0[1], 0);
}

#[test]
fn a_core_that_unpacks_takes_the_time_for_it_and_a_link_does_not() {
    let sizes = Sizes { read: 60, arriving: 60, unpacked: [40, 80], ..Sizes::default() };
    let by = Bandwidths { disk: 1.0, copy: 10.0 };
    let seconds = |sharing: Sharing| {
        let mut tallies = Tallies::default();
        tallies.0[Tier::Disk as usize] = Tally { units: 1, sum: sizes, largest: sizes };
        let layout = StreamLayout::new(&tallies, [1, 2, 0], [0; 3], sharing, Staging::default());
        Forecast::new(&tallies, &layout, by).copy_seconds
    };
    assert_eq!(seconds(Sharing::Own), 6.0);
    assert_eq!(seconds(Sharing::Ram), 2.0 + 80.0 / crate::packed::core_rate());
}
