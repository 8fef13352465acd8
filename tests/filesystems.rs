//! File systems that are not the usual one: tmpfs, overlay and read-only, from which the bytes are right; and one that is full,
//! which costs what was to be written there, and nothing else. They are mounted in a namespace of the test's own; where that is not
//! allowed the tests say so.

mod common;

use std::{fs, path::Path};

use common::{checked_pass, example, fixture, settings};
use layer_streamer::{
    LayerStreamer, Settings, StoredTensor,
    device::Cpu,
    plan::{CachePolicy, Reader},
};
use support::limits::in_child;
use support::mounts::{fill, mount, own_mounts, said};
use support::speller;

#[test]
fn from_tmpfs_overlay_and_a_read_only_file_system_every_byte_is_right() {
    if !in_child("from_tmpfs_overlay_and_a_read_only_file_system_every_byte_is_right") || !own_mounts() {
        return;
    }
    let (mut fixture, folder) = (fixture(5, &common::SIZES, 31), support::folder());
    let place = |name: &str| {
        let place = folder.path().join(name);
        fs::create_dir_all(&place).unwrap();
        place
    };
    let original = fixture.table.clone();
    for kind in ["tmpfs", "overlay", "read-only"] {
        let at = place(kind);
        let copy_to = |to: &Path| {
            for entry in fs::read_dir(fixture.folder.path()).unwrap() {
                let path = entry.unwrap().path();
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        };
        let mounted = match kind {
            "tmpfs" => mount("none", &at, Some("tmpfs"), 0, ""),
            "overlay" => {
                // The upper layer may not lie on an overlay itself.
                let layers = place("layers");
                mount("none", &layers, Some("tmpfs"), 0, "").unwrap();
                let [lower, upper, work] = ["lower", "upper", "work"].map(|name| layers.join(name));
                [&lower, &upper, &work].iter().for_each(|path| fs::create_dir(path).unwrap());
                copy_to(&lower);
                let of = |path: &Path| path.to_str().unwrap().to_owned();
                let options = format!("lowerdir={},upperdir={},workdir={}", of(&lower), of(&upper), of(&work));
                mount("none", &at, Some("overlay"), 0, &options)
            }
            _ => {
                copy_to(&at);
                let here = at.to_str().unwrap();
                let bound = mount(here, &at, None, libc::MS_BIND, "");
                bound.and_then(|()| mount(here, &at, None, libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY, ""))
            }
        };
        if let Err(error) = mounted {
            eprintln!("skipped: {kind} cannot be mounted: {error}");
            continue;
        }
        if kind == "tmpfs" {
            copy_to(&at);
        }
        assert_eq!(fs::write(at.join("new"), "").is_err(), kind == "read-only");
        let moved =
            |tensor: &StoredTensor| StoredTensor { file: at.join(tensor.file.file_name().unwrap()), ..tensor.clone() };
        fixture.table = original.iter().map(|(name, tensor)| (name.clone(), moved(tensor))).collect();
        fixture.checkpoint = fixture.opened_again();
        for (reader, cache) in [
            (Reader::Auto, CachePolicy::Auto),
            (Reader::Auto, CachePolicy::Direct),
            (Reader::Pread, CachePolicy::Direct),
        ] {
            let settings = Settings { reader, cache, ..settings(2, 2, 1) };
            let mut streamer = LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, &settings).unwrap();
            (0..2).for_each(|_| checked_pass(&fixture, &mut streamer));
            eprintln!("counted: {kind}, {reader}: right; {:?}", streamer.stats().reader_reason);
        }
    }
}

#[test]
fn a_full_disk_costs_what_was_to_be_written_there_and_nothing_else() {
    if !in_child("a_full_disk_costs_what_was_to_be_written_there_and_nothing_else") || !own_mounts() {
        return;
    }
    let full = support::folder();
    fill(full.path());
    let file = |name: &str| full.path().join(name).to_str().unwrap().to_owned();
    let model = speller().to_str().unwrap().to_owned();
    let bench = ["--model", &model, "--device", "cpu", "--rounds", "1", "--window", "0.02", "--warm-up", "0.05"];
    let shard = format!("{model}/model-00001-of-00002.safetensors");
    let read = [&shard, "--rounds", "1", "--window", "0.005", "--warm-up", "0.05"];
    for (program, arguments, option, name, answer) in [
        ("bench_stream", &bench[..], "--trace", "trace.html", "GB/s"),
        ("bench_read", &read, "--plot", "plot.svg", "GB/s"),
    ] {
        let (done, said) = said(example(program).args(arguments).args([option, &file(name)]));
        let printed = String::from_utf8_lossy(&done.stdout);
        assert!(!done.status.success() && printed.contains(answer), "{program} {option}: {printed}{said}");
        assert!(said.contains("No space left on device") && said.contains(&file(name)), "{program} {option}: {said}");
        let left: Vec<_> = fs::read_dir(full.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["filler"], "{program} {option}");
    }
}
