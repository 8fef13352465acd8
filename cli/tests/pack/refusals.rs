//! What is damaged, lies, or lies where it should not is refused by name, and nothing is made of it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::Path,
    process::Command,
};

use layer_streamer::packed::{Description, KEY};
use serde_json::{Value, json};
use support::{folder, speller};

use crate::{common::program, folders::*};

#[test]
fn a_damaged_file_is_told_with_its_tensor_and_nothing_is_made_of_it() {
    let (model, to) = (model(), folder());
    let (from, packed) = (model.path(), to.path().join("packed"));
    does("pack", &[from, &packed]);
    let original = fs::read(packed.join(FIRST)).unwrap();
    // In the signs and mantissas, in the second part's index, and in a tensor that is not packed.
    let description = read(&packed.join(FIRST)).0[&format!("{KEY}:b")].as_str().unwrap().to_owned();
    let second = Description::from_json(&description).unwrap().lengths[0] as usize;
    for (number, (name, at, how)) in
        [("a", 5000, "its checksum is"), ("b", second + 4, "part 1, block 0"), ("c", 3, "its checksum is")]
            .iter()
            .enumerate()
    {
        let unpacked = to.path().join(format!("unpacked {number}"));
        flip(&packed.join(FIRST), start_of(&packed.join(FIRST), name) + at);
        for said in [refused("unpack", &[&packed, &unpacked]), refused("unpack", &[Path::new("--check"), &packed])] {
            let expected = format!("{FIRST}: tensor {name} is damaged: {how}");
            assert!(said.contains(&expected) && said.contains("take the file anew"), "{said}");
        }
        assert!(!unpacked.join(FIRST).exists() && !unpacked.join("config.json").exists());
        fs::write(packed.join(FIRST), &original).unwrap();
        does("unpack", &[&packed, &unpacked]);
    }
    // The key of a description: by what is left of the file, the tensor was never packed.
    let key = format!("{KEY}:b");
    let at = original.windows(key.len()).position(|bytes| bytes == key.as_bytes()).unwrap();
    flip(&packed.join(FIRST), at);
    let said = does("unpack", &[&packed, &to.path().join("warned")]);
    assert!(said.starts_with("warning: ") && said.contains(&format!("{FIRST}: tensor b has no checksum")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    let (model, to) = (model(), folder());
    // The other shard is as it should be.
    let (path, packed) = (model.path().join(SECOND), to.path().join("packed"));
    let record = |weights: u64, start: u64, end: u64| {
        format!(r#"{{"dtype":"BF16","shape":[{weights}],"data_offsets":[{start},{end}]}}"#)
    };
    let described = |key: &str, value: &str| {
        let metadata = json!({ KEY: "1", key: value });
        format!(r#"{{"__metadata__":{metadata},"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#)
    };
    let description = json!({ "dtype": "BF16", "shape": [2], "table": [0,1,2,3,4,5,6,7,8,9,10,11,12], "xxh3": "0123456789abcdef", "part": 4096, "lengths": [5136] });
    for (header, cause) in [
        (r#"{"a":"#.to_owned(), "header is malformed"),
        (format!(r#"{{"a":{}}}"#, record(2, 0, 6)), "does not fit BF16 [2]"),
        (format!(r#"{{"a":{}}}"#, record(2, 4, 0)), "range 4..0"),
        (format!(r#"{{"a":{}}}"#, record(2, 1 << 60, (1 << 60) + 4)), "does not fit BF16 [2]"),
        (format!(r#"{{"a":{},"b":{}}}"#, record(2, 0, 4), record(1, 2, 4)), "tensor b begins at byte"),
        (format!(r#"{{"a":{}}}"#, record(1, 2, 4)), "tensor a begins at byte"),
        (format!(r#"{{"a":{}}}"#, record(1, 0, 2)), "2 bytes after its last tensor"),
        (format!(r#"{{"a":{},"a":{}}}"#, record(2, 0, 4), record(0, 4, 4)), "twice"),
        (r#"{"a":{"dtype":"BF16","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#.into(), "tensor a"),
        (described(&format!("{KEY}:a"), "{}"), "missing field"),
        (described(&format!("{KEY}:a"), &description.to_string()), "packed tensor a"),
        (described(&format!("{KEY}:b"), &description.to_string()), "no such tensor"),
        (described("layer_streamer.xxh3:a", "what"), "no checksum"),
        (described(KEY, "2"), "version 2"),
        (described("", "").replacen(&format!("{KEY}\""), &format!("{KEY}:a\""), 1), "no version"),
    ] {
        write_raw(&path, &header, &[0; 4]);
        for command in ["pack", "unpack"] {
            let said = refused(command, &[model.path(), &packed]);
            assert!(said.contains(cause) && said.contains(SECOND), "{command} {header}: {said}");
        }
        assert!(!packed.exists());
    }
    write(&path, Value::Null, &[weights("a", &[5000], 1)]);
    let whole = fs::read(&path).unwrap();
    for (length, cause) in [(0, "too short"), (7, "too short"), (20, "truncated?"), (whole.len() - 1, "truncated?")] {
        fs::write(&path, &whole[..length]).unwrap();
        let said = refused("pack", &[model.path(), &packed]);
        assert!(said.contains(SECOND) && said.contains(cause), "{length}: {said}");
    }
    fs::write(&path, [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat()).unwrap();
    assert!(refused("pack", &[model.path(), &packed]).contains("1099511627776"));
}

#[test]
fn what_should_not_be_converted_or_overwritten_is_refused_with_what_to_do() {
    let (model, to) = (model(), folder());
    let (from, packed, other) = (model.path(), to.path().join("packed"), to.path().join("other"));
    symlink(from, to.path().join("link")).unwrap();
    // A name that is no UTF-8.
    let odd = to.path().join(OsStr::from_bytes(b"odd \xff"));
    fs::create_dir(&odd).unwrap();
    write(&odd.join("model.safetensors"), Value::Null, &[weights("a", &[90, 1000], 1)]);
    for (command, arguments, cause) in [
        ("pack", [from, from], "lies in the model's own folder"),
        ("pack", [from, &from.join("shards/../new/packed")], "lies in the model's own folder"),
        ("pack", [from, &to.path().join("link/new")], "lies in the model's own folder"),
        ("pack", [&odd, &odd.join("new")], "lies in the model's own folder"),
        ("pack", [to.path(), &packed], "holds neither"),
        ("pack", [Path::new("/nowhere/at/all"), &packed], "/nowhere/at/all"),
        ("pack", [from, &from.join("config.json")], "lies in the model's own folder"),
        ("unpack", [from, &packed], "is not packed"),
        ("unpack", [Path::new("--check"), from], "is not packed"),
    ] {
        let said = refused(command, &arguments);
        assert!(said.contains(cause), "{said}");
        assert!(!packed.exists());
    }
    does("pack", &[from, &packed]);
    let said = refused("pack", &[&packed, &other]);
    assert!(said.contains("is packed already (shards/one.safetensors)"), "{said}");
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("already holds ") && said.contains("name another folder"), "{said}");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes"), "").unwrap();
    assert!(refused("pack", &[from, &other]).contains("already holds notes"));
    fs::write(to.path().join("file"), "").unwrap();
    assert!(refused("pack", &[from, &to.path().join("file")]).contains("is no folder"));

    let f32 = folder();
    write(&f32.path().join("model.safetensors"), Value::Null, &[random("a", "F32", &[9], 36)]);
    assert!(refused("pack", &[f32.path(), &to.path().join("f32")]).contains("has no BF16 weights"));
    assert!(!to.path().join("f32").exists());
}

#[test]
fn shards_that_are_no_files_or_lie_elsewhere_are_refused_and_not_waited_for() {
    let (model, to) = (model(), folder());
    let (shard, packed) = (model.path().join(SECOND), to.path().join("packed"));
    let elsewhere = to.path().join("elsewhere.safetensors");
    fs::rename(&shard, &elsewhere).unwrap();
    symlink(&elsewhere, &shard).unwrap();
    let said = refused("pack", &[model.path(), &packed]);
    assert!(said.contains("two.safetensors leads out of the folder, to ") && said.contains("elsewhere"), "{said}");
    fs::remove_file(&shard).unwrap();
    assert!(refused("pack", &[model.path(), &packed]).contains("two.safetensors: No such file"));
    assert!(Command::new("mkfifo").arg(&shard).status().unwrap().success());
    assert!(refused("pack", &[model.path(), &packed]).contains("two.safetensors is no regular file"));
}

#[test]
fn a_folder_that_is_not_finished_takes_its_own_command_alone() {
    let (model, to) = (model_of(&large(), &small()), folder());
    let (from, packed) = (model.path(), to.path().join("packed"));
    ended_after(IN_THE_THIRD, "pack", &[from, &packed]);
    let another = speller();
    let said = refused("pack", &[&another, &packed]);
    assert!(said.contains("a part of other work") && said.contains(&from.display().to_string()), "{said}");
    let journal = packed.join("layer-streamer.journal");
    let lock = fs::File::open(&journal).unwrap();
    lock.lock().unwrap();
    assert!(refused("pack", &[from, &packed]).contains("another process"));
    lock.unlock().unwrap();
    fs::write(packed.join("notes"), "").unwrap();
    assert!(refused("pack", &[from, &packed]).contains("holds notes, which is no part of this work"));
    fs::remove_file(packed.join("notes")).unwrap();
    // It cannot be used either, not even where all files that a model needs are there.
    fs::write(packed.join("config.json"), "{}").unwrap();
    fs::copy(from.join("model.safetensors.index.json"), packed.join("model.safetensors.index.json")).unwrap();
    for name in [FIRST, SECOND] {
        fs::copy(from.join(name), packed.join(name)).unwrap();
    }
    let the_same = format!("is not complete; finish it with `{} pack ", program("pack").get_program().display());
    let arguments = [packed.as_path(), &to.path().join("unpacked")];
    for (command, arguments) in [("unpack", &arguments[..]), ("plan", &[Path::new("--model"), &packed])] {
        let said = refused(command, arguments);
        assert!(said.contains(&the_same) && said.contains(&from.display().to_string()), "{command}: {said}");
    }
    fs::write(&journal, "nonsense\n").unwrap();
    let said = refused("pack", &[from, &packed]);
    assert!(said.contains("is damaged; remove the folder"), "{said}");
}
