//! Checkpoints whose weights are packed: what they say of themselves, what is refused, and that nothing corrupt is computed with.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{Fixture, SIZES, bytes_of, checked_pass, packed, packed_fixture, settings, weights_fixture};
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, Unit,
    device::{Cpu, Device},
    model::{Decoder, Model, Sequence, Tables},
    packed::{Description, KEY, VERSION},
    plan::{ArrivalOp, Tier},
    trace::{PackedInRam, Stage, Stats},
};
use support::data;

#[test]
fn every_unit_arrives_unpacked_in_every_tier_and_static_tensors_do() {
    let mut fixture = packed_fixture(6, &SIZES, 3);
    for tier in [Tier::Disk, Tier::Ram, Tier::Pinned, Tier::Gpu, Tier::GpuPacked] {
        fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 2, 2)).unwrap();
        (0..3).for_each(|_| checked_pass(&fixture, &mut streamer));
        streamer.check_arrivals().unwrap();
    }
    // Longer than what is read at once, with parts across its borders.
    let large = packed_fixture(2, &[3, 6_000_000, 70_000], 4);
    let streamer = LayerStreamer::new(&Cpu, &large.checkpoint, &large.units, &settings(1, 1, 0)).unwrap();
    let names = ["0.1", "1.2", "1.0"];
    let statics = streamer.load_static(&names).unwrap();
    for name in names {
        assert!(bytes_of(&Cpu, statics.tensor(name).unwrap()) == large.stored(name), "{name}");
    }
}

/// Passes until no unit is yet to be packed.
fn pass_until_packed(fixture: &Fixture, streamer: &mut LayerStreamer<Cpu>) {
    let start = Instant::now();
    while streamer.stats().packed.to_pack() > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "units are still to be packed");
        checked_pass(fixture, streamer);
        let Stats { packed, steady, .. } = streamer.stats();
        assert!(packed.to_pack() == 0 || steady.is_none(), "a pass is steady before all units are packed: {steady:?}");
    }
}

#[test]
fn units_stored_plain_are_packed_in_ram_while_passes_go_by_and_arrive_as_they_were() {
    // Of random bits nothing is packed; of these weights the large tensors are, in several parts and across several reads.
    let mut fixture = weights_fixture(6, &[1, 60_000, 3, 3_000_000, 40, 5000], 3);
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::PinnedPacked));
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 2, 2)).unwrap();
    let bytes = |streamer: &LayerStreamer<Cpu>, stage: Stage| streamer.stats().stage(stage).bytes;
    let whole = streamer.plan().bytes_per_pass() as u64;
    pass_until_packed(&fixture, &mut streamer);
    assert_eq!(streamer.stats().packed, PackedInRam { units: 6, packed: 6, given_up: 0 });
    // Some of them had been read ahead.
    (0..10).for_each(|_| checked_pass(&fixture, &mut streamer));
    let before = Stage::ALL.map(|stage| bytes(&streamer, stage));
    (0..10).for_each(|_| checked_pass(&fixture, &mut streamer));
    assert_eq!(bytes(&streamer, Stage::Read), before[Stage::Read as usize], "units are still read from disk");
    let moved = (bytes(&streamer, Stage::Transfer) - before[Stage::Transfer as usize]) as f64 / (10 * whole) as f64;
    assert!((0.6..0.72).contains(&moved), "{moved:.3} of the bytes are transferred");
    let steady = streamer.stats().steady.unwrap();
    assert_eq!((steady.direct_bytes, steady.buffered_bytes), (0.0, 0.0), "passes that read units are no steady ones");
    assert_eq!(steady.transferred_bytes, moved * whole as f64);
    drop(streamer);
    // Ended in the middle of it, at any time.
    for _ in 0..20 {
        let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(2, 2, 2)).unwrap();
        checked_pass(&fixture, &mut streamer);
    }
}

#[test]
fn units_that_pack_worse_than_expected_stay_on_disk_and_arrive_all_the_same() {
    let mut fixture = common::fixture(5, &SIZES, 9);
    fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(Tier::PinnedPacked));
    let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings(1, 2, 0)).unwrap();
    pass_until_packed(&fixture, &mut streamer);
    let PackedInRam { units, packed, given_up } = streamer.stats().packed;
    assert!(units == 5 && given_up > 0 && packed + given_up == 5, "{packed} packed, {given_up} given up");
    let read = |streamer: &LayerStreamer<Cpu>| streamer.stats().stage(Stage::Read).bytes;
    let before = read(&streamer);
    // More than are read ahead.
    (0..30).for_each(|_| checked_pass(&fixture, &mut streamer));
    assert!(read(&streamer) > before);
}

#[test]
fn a_checkpoint_tells_what_is_packed_and_describes_it_as_it_was_before() {
    let (plain, folder) = (Checkpoint::open(data("qwen2-tied")).unwrap(), packed(&data("qwen2-tied")));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<_> = plain.names().collect();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
    for name in names {
        assert_eq!(checkpoint.describe(name), plain.describe(name));
        assert_eq!(plain.packing(name), None);
        let packing = checkpoint.packing(name).unwrap();
        assert_eq!(packing.shape, plain.describe(name).unwrap().1);
    }
    let (plain, packed) = (plain.layers().unwrap(), checkpoint.layers().unwrap());
    assert_eq!(plain, packed);
}

#[test]
fn a_packed_tensor_is_converted_to_no_other_type() {
    let fixture = packed_fixture(1, &[5000], 1);
    let mut unit = fixture.units[0].clone();
    let refused = |unit: &Unit| {
        let streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, std::slice::from_ref(unit), &Settings::default());
        streamer.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refused(unit.convert(DType::F32)).contains("tensor 0.0: cannot be converted from packed BF16 to F32"));
    assert_eq!(unit.arrivals()[0].op, ArrivalOp::To(DType::F32));
}

/// Spoils the `at`th byte of the tensor `name` of the checkpoint in this folder.
fn spoil(folder: &Path, name: &str, at: usize) -> PathBuf {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let (path, offset) = checkpoint.location(name).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset + at as u64).unwrap();
    file.write_all_at(&[!byte[0]], offset + at as u64).unwrap();
    path.to_owned()
}

#[test]
fn what_is_computed_with_corrupt_weights_is_never_told() {
    const LAYER: &str = "model.layers.1.mlp.up_proj.weight";
    const TABLE: &str = "model.embed_tokens.weight";
    for (tensor, tables) in [
        (LAYER, Tables::OnDevice),
        (LAYER, Tables::HeadStreamed),
        (TABLE, Tables::OnDevice),
        (TABLE, Tables::EmbeddingInFile),
        (TABLE, Tables::HeadStreamed),
    ] {
        for tier in [Tier::Disk, Tier::Pinned, Tier::Gpu, Tier::GpuPacked] {
            let folder = packed(&data("qwen2-tied"));
            // How many escapes the first block has.
            let path = spoil(folder.path(), tensor, 4);
            let mut model = Model::open(folder.path()).unwrap();
            model.tables = tables;
            model.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
            let made = Decoder::new(&Cpu, &model, &Settings::default(), 1, 16);
            let mut said = Vec::new();
            let mut decoder = match made {
                Ok(decoder) => decoder,
                Err(error) => {
                    assert!(tensor == TABLE && tables != Tables::HeadStreamed, "{error}");
                    assert_corrupt(&error, &path, tensor);
                    continue;
                }
            };
            for _pass in 0..3 {
                // A row of another block would be read without a fault; no logits come of the head either.
                let passed = decoder.forward(&[Sequence { row: 0, tokens: &[3, 4] }]);
                said.push(passed.and_then(|()| decoder.greedy(&mut Vec::new())).unwrap_err());
            }
            said.iter().for_each(|error| assert_corrupt(error, &path, tensor));
        }
    }
}

fn assert_corrupt(error: &Error, path: &Path, name: &str) {
    let Error::Checkpoint { path: at, tensor: Some(tensor), cause } = error else { panic!("{error}") };
    assert!(at == path && tensor.starts_with(name), "{error}");
    assert!(cause.contains("packed weights are corrupt; download the file, or pack the model, again"), "{error}");
}

#[test]
fn a_header_that_says_nonsense_of_packed_tensors_is_refused_with_file_and_tensor() {
    let folder = packed(&data("qwen2-tied"));
    let path = folder.path().join("model.safetensors");
    let original = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
    let (header, data) = original[8..].split_at(length);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = header.clone();
        change(&mut changed);
        assert_ne!(changed, header);
        let text = serde_json::to_vec(&changed).unwrap();
        fs::write(&path, [&(text.len() as u64).to_le_bytes(), text.as_slice(), data].concat()).unwrap();
        let said = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        said
    };
    const NAME: &str = "model.norm.weight";
    let key = format!("{KEY}:{NAME}");
    let metadata = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        refused(&|header: &mut serde_json::Value| change(header["__metadata__"].as_object_mut().unwrap()))
    };
    let newer = metadata(&|of| _ = of.insert(KEY.into(), "2".into()));
    assert!(
        newer.contains("packed weights in version \"2\" of their format is not supported: this program"),
        "{newer}"
    );
    assert!(metadata(&|of| _ = of.remove(KEY)).contains("packed weights in no version"));
    let malformed = metadata(&|of| _ = of.insert(key.clone(), "{}".into()));
    assert!(
        malformed.contains("tensor model.norm.weight: the file's description of its packed weights")
            && malformed.ends_with("; download the file, or pack the model, again"),
        "{malformed}"
    );
    let absent = metadata(&|of| {
        let description = of.remove(&key).unwrap();
        of.insert(format!("{KEY}:other"), description);
    });
    assert!(
        absent.contains("tensor other: is not in the file, which describes its packed weights; download"),
        "{absent}"
    );
    let longer = metadata(&|of| {
        let description = Description::from_json(of[&key].as_str().unwrap()).unwrap();
        let lengths = vec![description.lengths[0] + 16];
        of.insert(key.clone(), Description { lengths, ..description }.to_json().into());
    });
    assert!(longer.contains("tensor model.norm.weight: is U8 ["), "{longer}");
    let other_type = refused(&|header: &mut serde_json::Value| header[NAME]["dtype"] = "I8".into());
    assert!(other_type.contains("tensor model.norm.weight: is I8 ["), "{other_type}");
    assert_eq!(VERSION, "1");
}

#[test]
fn a_description_that_no_tensor_can_have_is_refused_with_file_and_tensor() {
    let fixture = packed_fixture(1, &[50_000], 1);
    let (stored, description) = (&fixture.table["0.0"], &fixture.packed["0.0"]);
    for wrong in [
        Description { part: 0, ..description.clone() },
        Description { shape: vec![1 << 20], ..description.clone() },
        Description { part: 1 << 30, lengths: vec![description.bytes() as u32], ..description.clone() },
    ] {
        let table = Checkpoint::from_table([stored.clone()]).unwrap();
        let error = table.with_packed([("0.0".to_owned(), wrong)]).unwrap_err();
        let Error::Checkpoint { path, tensor: Some(tensor), cause } = &error else { panic!("{error}") };
        assert_eq!((path, tensor.as_str()), (&stored.file, "0.0"));
        assert!(cause.contains("the description of its packed weights is malformed"), "{error}");
    }
}

#[test]
fn a_stream_of_packed_units_whose_file_was_spoilt_fails_for_good() {
    for (at, tier) in [(0, Tier::Disk), (4, Tier::Disk), (6, Tier::Disk), (4, Tier::PinnedPacked)] {
        let mut fixture = packed_fixture(4, &[50_000, 9000, 5000], 8);
        fixture.units.iter_mut().for_each(|unit| _ = unit.set_tier(tier));
        let stored = &fixture.table["2.1"];
        let file = File::options().write(true).open(&stored.file).unwrap();
        file.write_all_at(&[0xff; 2], stored.offset + at).unwrap();
        let checkpoint = fixture.opened_again();
        let mut streamer = LayerStreamer::new(&Cpu, &checkpoint, &fixture.units, &settings(1, 2, 0)).unwrap();
        let stream = Cpu.stream().unwrap();
        for _ in 0..2 {
            let failed = streamer.run_pass(&stream, (), |(), _| Ok::<_, Error>(())).unwrap_err();
            assert_corrupt(&failed, &stored.file, "2.1");
        }
        assert_corrupt(&streamer.check_arrivals().unwrap_err(), &stored.file, "2.1");
    }
}
