use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use support::limits::{Holdings, in_child};

use super::{
    kept::{VALID, VALID_DISTURBED},
    *,
};
use crate::{
    device::Cpu,
    io::{
        CHUNK,
        faults::{Faults, no_rings},
    },
};

/// A probe of 2 and 10 GB/s, taken so long ago.
fn probe(age: Duration, disturbed: Option<&str>, kept: Option<&Path>) -> Probe {
    let verdict = Judgement {
        bandwidths: Bandwidths { disk: 2e9, copy: 10e9 },
        spread: Bandwidths { disk: 0.02, copy: 0.01 },
        disturbed: disturbed.map(str::to_owned),
    };
    Probe { verdict, taken: SystemTime::now() - age, kept: kept.map(Path::to_owned) }
}

/// One file of a few chunks, in the folder.
fn checkpoint(folder: &Path) -> Checkpoint {
    let file = folder.join("weights");
    fs::write(&file, vec![7; (5 << 20) + 100]).unwrap();
    let tensor = crate::StoredTensor { name: "w".into(), file, offset: 0, dtype: crate::DType::U8, shape: vec![100] };
    Checkpoint::from_table([tensor]).unwrap()
}

#[test]
fn a_probe_whose_reads_may_still_come_leaves_them_the_memory_and_the_next_one_works() {
    const THIS: &str = "probe::tests::a_probe_whose_reads_may_still_come_leaves_them_the_memory_and_the_next_one_works";
    if no_rings() || !in_child(THIS) {
        return;
    }
    let folder = support::folder();
    let checkpoint = checkpoint(folder.path());
    let before = Holdings::at_rest();
    let faults = Faults::of_a_ring_that_fails_with_reads_that_never_end();
    let error = measure::measure(&Cpu, &checkpoint, 0).expect_err("the ring fails").to_string();
    assert!(error.contains("io_uring") && error.contains("os error 5"), "{error}");
    assert_eq!(Holdings::at_rest().arenas - before.arenas, measure::BLOCKS * CHUNK, "what the reads go to");
    faults.end();
    measure::measure(&Cpu, &checkpoint, 0).unwrap();
    assert_eq!(Holdings::at_rest().arenas - before.arenas, measure::BLOCKS * CHUNK);
}

#[test]
fn a_probe_ends_in_time_and_finds_rates() {
    let folder = support::folder();
    let checkpoint = checkpoint(folder.path());
    // About a second at most by itself; beside other tests the memory alone may take longer.
    let start = Instant::now();
    let Judgement { bandwidths, spread, .. } = measure::measure(&Cpu, &checkpoint, 0).unwrap();
    let took = start.elapsed();
    assert!(took >= measure::DISK_TIME + measure::COPY_TIME && took < Duration::from_secs(20), "{took:?}");
    assert!(bandwidths.disk > 1e6 && bandwidths.copy > 1e8, "{bandwidths:?}");
    assert!(spread.disk >= 0.0 && spread.copy >= 0.0, "{spread:?}");
}

#[test]
fn a_probe_is_recalled_for_thirty_days_and_a_disturbed_one_for_ten_minutes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache/a");
    let near = Duration::from_secs(60);
    for (disturbed, valid) in [(None, VALID), (Some("others"), VALID_DISTURBED)] {
        for (age, fresh) in [(Duration::ZERO, true), (valid - near, true), (valid + near, false)] {
            let kept = probe(age, disturbed, Some(&path));
            kept::keep(&kept).unwrap();
            let found = kept::recall(&path);
            assert_eq!(found.is_some(), fresh, "{age:?} {disturbed:?}");
            let Some(found) = found else { continue };
            assert_eq!(found.verdict, kept.verdict);
            let apart = kept.taken.duration_since(found.taken).unwrap();
            assert!(apart <= Duration::from_secs(1), "the date is the file's, not its modification time: {apart:?}");
        }
    }
    assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn a_file_that_is_damaged_or_of_another_version_or_of_the_future_is_not_recalled() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    kept::keep(&probe(Duration::ZERO, None, Some(&path))).unwrap();
    let good = fs::read_to_string(&path).unwrap();
    assert!(kept::recall(&path).is_some());
    let taken = good.lines().find(|line| line.contains("taken")).unwrap();
    for damaged in [
        String::new(),
        "disk 2000000000\ncopy 10000000000\n".into(),
        good[..good.len() / 2].into(),
        good.replace("\"version\": 1", "\"version\": 2"),
        good.replace("\"disk\": 2", "\"disk\": -2"),
        good.replace("\"disk\": 2", "\"disk\": 0"),
        good.replace("disk_spread", "spread"),
        good.replace(taken, "  \"taken\": 18446744073709551615,"),
        good.replace(taken, "  \"taken\": 40000000000,"),
    ] {
        assert_ne!(damaged, good);
        fs::write(&path, &damaged).unwrap();
        assert_eq!(kept::recall(&path), None, "{damaged}");
    }
}

#[test]
fn probes_are_kept_apart_by_device() {
    if let [Some(here), Some(there)] = ["cpu", "cuda:0"].map(|device| kept::path(Path::new("/"), device)) {
        assert!(here != there && here.is_absolute());
    }
}

#[test]
fn an_age_is_told_in_words() {
    let day = 24 * 3600;
    for (seconds, words) in [
        (59, "just now"),
        (60, "1 minute ago"),
        (3599, "59 minutes ago"),
        (2 * 3600, "2 hours ago"),
        (day, "1 day ago"),
        (3 * day + 5, "3 days ago"),
    ] {
        assert_eq!(probe(Duration::from_secs(seconds), None, None).age(), words);
    }
}

/// Ten seconds at so many GB/s.
fn seen(gigabytes_per_second: f64, bound: bool) -> Option<Seen> {
    Some(Seen { bytes: (gigabytes_per_second * 1e10) as u64, seconds: 10.0, bound })
}

#[test]
fn faster_passes_always_disagree_and_slower_ones_where_the_link_bound_them() {
    let probe = probe(Duration::from_secs(3 * 24 * 3600), None, None);
    for (disk, copy, link) in [
        (seen(2.4, true), seen(8.5, true), None),
        (seen(1.7, true), seen(12.0, false), None),
        (seen(0.5, false), seen(1.0, false), None),
        (seen(2.6, false), None, Some(BindingLink::Disk)),
        (seen(1.5, true), None, Some(BindingLink::Disk)),
        (seen(1.5, false), seen(13.0, false), Some(BindingLink::Copy)),
        (None, seen(7.5, true), Some(BindingLink::Copy)),
        (None, None, None),
    ] {
        assert_eq!(probe.disagreement(disk, copy).map(|found| found.link), link, "{disk:?} {copy:?}");
    }
    let said = probe.disagreement(seen(0.52, true), None).unwrap().to_string();
    assert_eq!(
        said,
        "passes read from disk at 0.52 GB/s, not at 2.00 as measured 3 days ago: the next start measures anew"
    );
}

#[test]
fn too_few_bytes_or_too_short_a_time_tell_nothing() {
    let probe = probe(Duration::ZERO, None, None);
    for (bytes, seconds, tells) in [
        (900_000_000, 100.0, false),
        (900_000_000, 0.01, false),
        (9_000_000_000, 0.9, false),
        (9_000_000_000, 1.0, true),
        (1_000_000_000, 100.0, true),
        (9_000_000_000, 0.0, false),
        (0, 0.0, false),
        (9_000_000_000, f64::NAN, false),
    ] {
        let found = probe.disagreement(Some(Seen { bytes, seconds, bound: true }), None);
        assert_eq!(found.is_some(), tells, "{bytes} bytes in {seconds} s: {found:?}");
    }
}

#[test]
fn a_probe_that_passes_disagree_with_is_forgotten_unless_a_newer_one_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let old = probe(Duration::from_secs(3600), None, Some(&path));
    kept::keep(&old).unwrap();
    assert_eq!(old.observe(seen(2.1, true), None), None);
    assert!(path.exists(), "they agree");
    let newer = probe(Duration::from_secs(60), None, Some(&path));
    kept::keep(&newer).unwrap();
    assert!(old.observe(seen(0.5, true), None).is_some() && path.exists(), "another process has measured since");
    assert!(newer.observe(seen(0.5, true), None).is_some());
    assert!(!path.exists());
}
