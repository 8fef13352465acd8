//! A disk that is full costs what was to be written there, and nothing else. It is mounted in a namespace of the test's own;
//! where that is not allowed the test says so.

mod common;

use std::fs;

use common::program;
use support::limits::in_child;
use support::mounts::{fill, mount, own_mounts, said};
use support::{folder, speller};

#[test]
fn a_full_disk_costs_what_was_to_be_written_there_and_nothing_else() {
    if !in_child("a_full_disk_costs_what_was_to_be_written_there_and_nothing_else") || !own_mounts() {
        return;
    }
    let full = folder();
    fill(full.path());
    let file = |name: &str| full.path().join(name).to_str().unwrap().to_owned();
    let generate = ["--device", "cpu", "--quiet", "4096="];
    for (command, arguments, option, name, answer) in [
        ("generate", &generate[..], "--dump-logits", "logits.safetensors", ""),
        ("generate", &generate, "--trace", "trace.json", " four thousand ninety-six"),
        ("generate", &generate, "--trace", "trace.html", " four thousand ninety-six"),
    ] {
        let (done, said) = said(program(command).args(arguments).args([option, &file(name)]));
        let printed = String::from_utf8_lossy(&done.stdout);
        assert!(!done.status.success() && printed.contains(answer), "{command} {option}: {printed}{said}");
        assert!(said.contains("No space left on device") && said.contains(&file(name)), "{command} {option}: {said}");
        let left: Vec<_> = fs::read_dir(full.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["filler"], "{command} {option}");
    }
    // What is known before the work is refused before it.
    fs::write(full.path().join("filler"), vec![0; 64 << 10]).unwrap();
    let record = file("record");
    for (command, arguments, cause) in [
        ("make-checkpoint", &["--shape", "tiny", &file("model")][..], "free, the checkpoint takes"),
        ("pack", &[speller().to_str().unwrap(), &file("packed")], "B free, this may take 3.29 MB"),
        ("tune", &["--device", "cpu", "--json", &record], "No space left on device"),
    ] {
        let (done, said) = said(program(command).args(arguments));
        assert!(!done.status.success() && done.stdout.is_empty() && said.contains(cause), "{command}: {said}");
        let left = ["record", "packed"].iter().any(|name| full.path().join(name).exists());
        assert!(!left, "{command}: {said}");
    }
    // What fills up on the way ends with what to do: this disk has bytes enough, and no room for a third file.
    let few = folder();
    mount("none", few.path(), Some("tmpfs"), 0, "size=64m,nr_inodes=3").unwrap();
    let (done, said) = said(program("pack").arg(speller()).arg(few.path().join("packed")));
    assert!(!done.status.success() && said.contains(".partial: No space left on device"), "{said}");
    assert!(said.contains("; make room, then the same command goes on from there"), "{said}");
    mount("none", few.path(), None, libc::MS_REMOUNT, "nr_inodes=99").unwrap();
    assert!(program("pack").arg(speller()).arg(few.path().join("packed")).output().unwrap().status.success());
}
