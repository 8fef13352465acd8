//! A system that refuses: io_uring, registered buffers, O_DIRECT, descriptors, threads, memory, more than a memory cgroup allows.
//! Each time the right bytes come another way and the reason is kept, or there is one clear error at once, nothing is left behind,
//! and the next start works. Each test limits a process of its own.

mod common;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{Fixture, LentSlots, SIZES, bytes_of, checked_pass, fixture, settings};
use layer_streamer::{
    Checkpoint, DType, Error, LayerStreamer, Settings, StoredTensor, Unit,
    device::{Cpu, Device, DevicePtr, Shape, TensorMut, TensorRef},
    kernels::Kernels,
    plan::{CachePolicy, Reader, Tier},
    trace::Stats,
};
use support::limits::{Holdings, become_unique_user, forbidden, give_up, in_child, limited};

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

fn start(fixture: &Fixture, settings: &Settings) -> Result<LayerStreamer<Cpu>, Error> {
    LayerStreamer::new(&Cpu, &fixture.checkpoint, &fixture.units, settings)
}

/// Two passes and static tensors, byte for byte.
fn exact(fixture: &Fixture, mut streamer: LayerStreamer<Cpu>) -> Stats {
    (0..2).for_each(|_| checked_pass(fixture, &mut streamer));
    let statics = streamer.load_static(&["0.3", "1.1"]).unwrap();
    ["0.3", "1.1"]
        .iter()
        .for_each(|name| assert!(bytes_of(&Cpu, statics.tensor(name).unwrap()) == fixture.stored(name)));
    streamer.stats()
}

fn works(fixture: &Fixture, settings: &Settings) -> Stats {
    exact(fixture, start(fixture, settings).unwrap())
}

/// The one error, told at once.
fn refused(start: impl FnOnce() -> Result<LayerStreamer<Cpu>, Error>) -> Error {
    let begin = Instant::now();
    let error = start().expect_err("it cannot start");
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}: {error}", begin.elapsed());
    error
}

fn reader(reader: Reader) -> Settings {
    Settings { reader, ..settings(2, 2, 1) }
}

/// Which backend this system gives when nothing limits it.
fn usual(fixture: &Fixture) -> Reader {
    let usual = works(fixture, &reader(Reader::Auto)).reader;
    if usual == Reader::Pread {
        eprintln!("skipped in part: this system has no io_uring to refuse");
    }
    usual
}

#[test]
fn where_io_uring_is_forbidden_threads_read_and_the_reason_is_kept() {
    if !in_child("where_io_uring_is_forbidden_threads_read_and_the_reason_is_kept") {
        return;
    }
    let fixture = fixture(5, &SIZES, 31);
    let (usual, before) = (usual(&fixture), Holdings::at_rest());
    for call in [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter] {
        for (errno, said) in [(libc::EPERM, "Operation not permitted"), (libc::ENOSYS, "Function not implemented")] {
            forbidden(&[(call, None, errno)], || {
                let stats = works(&fixture, &reader(Reader::Auto));
                assert_eq!(stats.reader, Reader::Pread);
                assert_eq!(stats.reader_reason.matches(said).count(), 2, "{}", stats.reader_reason);
                for backend in [Reader::Uring, Reader::UringFixed] {
                    let error = refused(|| start(&fixture, &reader(backend)));
                    assert!(matches!(error, Error::Unsupported { .. }));
                    let message = error.to_string();
                    assert!(message.contains(said) && message.contains("use the reader \"auto\""), "{message}");
                }
            });
            before.assert_back("after refusals");
            assert_eq!(works(&fixture, &reader(Reader::Auto)).reader, usual);
        }
    }
}

#[test]
fn where_buffers_cannot_be_registered_the_ring_reads_without_and_says_what_to_raise() {
    if !in_child("where_buffers_cannot_be_registered_the_ring_reads_without_and_says_what_to_raise") {
        return;
    }
    let fixture = fixture(5, &SIZES, 32);
    let (usual, before) = (usual(&fixture), Holdings::at_rest());
    if usual != Reader::UringFixed {
        eprintln!("skipped: buffers cannot be registered here at all");
        return;
    }
    std::thread::scope(|scope| {
        let limited = scope.spawn(|| {
            give_up(&[CAP_IPC_LOCK]);
            limited(libc::RLIMIT_MEMLOCK, 64 << 10, || {
                let stats = works(&fixture, &reader(Reader::Auto));
                assert_eq!(stats.reader, Reader::Uring);
                assert!(stats.reader_reason.contains("registered buffers refused"), "{}", stats.reader_reason);
                assert!(stats.reader_reason.contains("ulimit -l"), "{}", stats.reader_reason);
                let message = refused(|| start(&fixture, &reader(Reader::UringFixed))).to_string();
                assert!(message.contains("ulimit -l") && message.contains("use the reader \"auto\""), "{message}");
            });
        });
        limited.join().unwrap();
    });
    before.assert_back("after a refusal");
    assert_eq!(works(&fixture, &reader(Reader::Auto)).reader, usual);
}

#[test]
fn where_o_direct_is_refused_files_are_read_through_the_page_cache_and_the_reason_is_kept() {
    if !in_child("where_o_direct_is_refused_files_are_read_through_the_page_cache_and_the_reason_is_kept") {
        return;
    }
    let (fixture, before) = (fixture(5, &SIZES, 33), Holdings::at_rest());
    let direct = |backend| Settings { cache: CachePolicy::Direct, ..reader(backend) };
    let usual = works(&fixture, &direct(Reader::Auto));
    for errno in [libc::EINVAL, libc::EOPNOTSUPP] {
        forbidden(&[(libc::SYS_openat, Some((2, libc::O_DIRECT)), errno)], || {
            for backend in [Reader::Auto, Reader::Pread] {
                let stats = works(&fixture, &direct(backend));
                assert_eq!((stats.direct_bytes, stats.buffered_files.len()), (0, 2), "{:?}", stats.buffered_files);
                assert!(stats.buffered_files.iter().all(|(_, why)| why.contains("O_DIRECT refused")));
            }
        });
        before.assert_back("after a refusal");
    }
    // Any other answer is an error, and no reason to read another way.
    forbidden(&[(libc::SYS_openat, Some((2, libc::O_DIRECT)), libc::EACCES)], || {
        let message = refused(|| start(&fixture, &direct(Reader::Auto))).to_string();
        assert!(message.contains(".bin") && message.contains("Permission denied"), "{message}");
    });
    before.assert_back("after an error");
    let again = works(&fixture, &direct(Reader::Auto));
    assert_eq!(again.buffered_files, usual.buffered_files);
    // A file system in memory, which may or may not have it; links may put any shard there.
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped in part: there is no /dev/shm");
        return;
    };
    let (path, there) = (fixture.file("b.bin"), memory.path().join("b.bin"));
    fs::copy(&path, &there).unwrap();
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&there, &path).unwrap();
    let checkpoint = fixture.opened_again();
    let streamer = LayerStreamer::new(&Cpu, &checkpoint, &fixture.units, &direct(Reader::Auto)).unwrap();
    exact(&fixture, streamer);
}

#[test]
fn without_descriptors_for_the_ring_threads_read_and_without_those_for_the_files_the_error_says_what_to_raise() {
    if !in_child(
        "without_descriptors_for_the_ring_threads_read_and_without_those_for_the_files_the_error_says_what_to_raise",
    ) {
        return;
    }
    let fixture = fixture(5, &SIZES, 34);
    let (usual, before) = (usual(&fixture), Holdings::at_rest());
    // The number that the next descriptor gets; those above are free.
    let free = std::os::fd::AsRawFd::as_raw_fd(&fs::File::open("/").unwrap()) as u64;
    for (backend, files) in [(Reader::Auto, 4), (Reader::Pread, 4)] {
        for more in 0..8 {
            let settings = Settings { cache: CachePolicy::Direct, ..reader(backend) };
            let begun = limited(libc::RLIMIT_NOFILE, free + more, || {
                if more >= files {
                    return Ok(start(&fixture, &settings).unwrap());
                }
                Err(refused(|| start(&fixture, &settings)).to_string())
            });
            match begun {
                Err(message) => {
                    assert!(message.contains(".bin") && message.contains("(ulimit -n)"), "{more}: {message}");
                    before.assert_back(&message);
                }
                Ok(streamer) => {
                    let stats = exact(&fixture, streamer);
                    let starved = backend == Reader::Auto && usual != Reader::Pread && more == files;
                    assert_eq!(
                        stats.reader == Reader::Pread,
                        backend == Reader::Pread || usual == Reader::Pread || starved
                    );
                    assert_eq!(stats.reader_reason.contains("Too many open files"), starved, "{}", stats.reader_reason);
                }
            }
        }
    }
    // Static tensors that are loaded when the descriptors have gone are read by threads.
    let streamer = start(&fixture, &reader(Reader::Auto)).unwrap();
    let statics = limited(libc::RLIMIT_NOFILE, free, || streamer.load_static(&["0.1"])).unwrap();
    assert!(bytes_of(&Cpu, statics.tensor("0.1").unwrap()) == fixture.stored("0.1"));
    drop((streamer, statics));
    before.assert_back("after all");
    assert_eq!(works(&fixture, &reader(Reader::Auto)).reader, usual);
}

#[test]
fn without_threads_the_error_says_what_to_raise() {
    if !in_child("without_threads_the_error_says_what_to_raise") {
        return;
    }
    let fixture = fixture(5, &SIZES, 35);
    let (usual, before) = (usual(&fixture), Holdings::at_rest());
    let no_threads =
        [(libc::SYS_clone3, None, libc::EAGAIN), (libc::SYS_clone, Some((0, libc::CLONE_THREAD)), libc::EAGAIN)];
    for backend in [Reader::Auto, Reader::Pread] {
        let error = forbidden(&no_threads, || refused(|| start(&fixture, &reader(backend))));
        assert!(matches!(error, Error::Thread { .. }), "{error}");
        assert!(error.to_string().contains("ulimit -u"), "{error}");
        before.assert_back("after a refusal");
    }
    assert_eq!(works(&fixture, &reader(Reader::Auto)).reader, usual);
}

#[test]
fn a_start_that_runs_out_of_threads_at_any_of_them_ends_those_it_has_started() {
    if !in_child("a_start_that_runs_out_of_threads_at_any_of_them_ends_those_it_has_started") {
        return;
    }
    let fixture = fixture(5, &SIZES, 36);
    let usual = usual(&fixture);
    if let Err(error) = become_unique_user() {
        eprintln!("skipped: cannot become another user: {error}");
        return;
    }
    std::thread::scope(|scope| {
        let body = || {
            give_up(&[CAP_SYS_ADMIN, CAP_SYS_RESOURCE]);
            let before = Holdings::at_rest();
            // The stages' threads, those that help the pin stage to copy, and eight that read.
            let stages = 2 + std::thread::available_parallelism().map_or(1, usize::from).min(8);
            let auto = if usual == Reader::Pread { stages + 8 } else { stages };
            for (backend, needed) in [(Reader::Auto, auto), (Reader::Pread, stages + 8)] {
                for cache in [CachePolicy::Direct, CachePolicy::Buffered] {
                    let settings = Settings { cache, ..reader(backend) };
                    let lent = LentSlots::new(&fixture.checkpoint, &fixture.units, &settings, Tier::Gpu);
                    for more in 0..needed + 3 {
                        limited(libc::RLIMIT_NPROC, (before.threads + more) as u64, || {
                            if more < needed {
                                let error =
                                    refused(|| lent.streamer(&fixture.checkpoint, &fixture.units, &settings, &[]));
                                assert!(matches!(error, Error::Thread { .. }), "{more}: {error}");
                            } else {
                                let mut streamer =
                                    lent.streamer(&fixture.checkpoint, &fixture.units, &settings, &[]).unwrap();
                                (0..2).for_each(|_| checked_pass(&fixture, &mut streamer));
                            }
                        });
                        before.assert_back(&format!("{backend}, {cache:?}, {more} threads"));
                    }
                }
            }
        };
        scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn kernels_whose_threads_cannot_be_started_say_so_and_work_once_they_can() {
    if !in_child("kernels_whose_threads_cannot_be_started_say_so_and_work_once_they_can") {
        return;
    }
    if let Err(error) = become_unique_user() {
        eprintln!("skipped: cannot become another user: {error}");
        return;
    }
    let (rows, width) = (64, 4096);
    let stream = Cpu.stream().unwrap();
    let [x, weight, out] = [rows * width, width, rows * width].map(|elements| (vec![1f32; elements], elements));
    let shape = |elements| Shape::new(&[elements / width, width][usize::from(elements == width)..]).unwrap();
    // SAFETY: the vectors hold so many elements, and live to the end.
    let tensor = |(values, elements): &(Vec<f32>, usize)| unsafe {
        TensorRef::from_raw(DevicePtr::new(values.as_ptr().cast_mut().cast()), DType::F32, shape(*elements))
    };
    let norm = || {
        // SAFETY: as above, and the kernel alone has it.
        let out = unsafe { TensorMut::from_raw(tensor(&out).ptr(), DType::F32, shape(out.1)) };
        Cpu.rms_norm(&stream, tensor(&x), tensor(&weight), 0.0, 0.0, out)
    };
    std::thread::scope(|scope| {
        let body = || {
            give_up(&[CAP_SYS_ADMIN, CAP_SYS_RESOURCE]);
            let before = Holdings::at_rest();
            // From none of its threads to all but one; the caller's own is there.
            for more in 0..std::thread::available_parallelism().unwrap().get() - 1 {
                let limit = (before.threads + more) as u64;
                let error = limited(libc::RLIMIT_NPROC, limit, norm).expect_err("there are no threads").to_string();
                assert!(error.contains("cannot start the kernels thread") && error.contains("ulimit -u"), "{error}");
                before.assert_back(&error);
            }
        };
        scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    norm().unwrap();
    assert!(out.0.iter().all(|value| (value - 1.0).abs() < 1e-6));
}

#[test]
fn without_memory_the_error_says_how_much_for_what_and_nothing_is_left_behind() {
    if !in_child("without_memory_the_error_says_how_much_for_what_and_nothing_is_left_behind") {
        return;
    }
    let fixture = fixture(5, &SIZES, 37);
    let settings = settings(9, 9, 9);
    usual(&fixture);
    let (before, mut seen) = (Holdings::at_rest(), BTreeSet::new());
    let address_space = || {
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
    };
    // The memory that is lent is not the streamer's to reserve; nor are there slots to copy to where none is.
    for lent in [None, Some(Tier::Gpu), Some(Tier::Pinned)] {
        let lent = lent.map(|tier| LentSlots::new(&fixture.checkpoint, &fixture.units, &settings, tier));
        let begin = || match &lent {
            None => start(&fixture, &settings),
            Some(lent) => lent.streamer(&fixture.checkpoint, &fixture.units, &settings, &[]),
        };
        let all: u64 = begin().unwrap().plan().memory().iter().map(|part| part.bytes as u64).sum();
        before.assert_back("after a start");
        // In steps of less than an arena, from too little for the first on.
        let needed = if lent.is_some() { all / 3 * 2 } else { all };
        for more in (1 << 20..needed).step_by(5 << 20) {
            let error = limited(libc::RLIMIT_AS, address_space() + more, || refused(begin));
            match &error {
                Error::Memory { what, .. } => _ = seen.insert(*what),
                Error::Thread { .. } => {}
                _ => panic!("{more} of {needed} bytes: {error}"),
            }
            let message = error.to_string();
            assert!(message.contains("free memory") || message.contains("ulimit -v"), "{message}");
            before.assert_back(&message);
        }
    }
    assert_eq!(seen, BTreeSet::from(["device slots", "RAM slots", "pinned slots"]));
    works(&fixture, &settings);
}

/// A memory cgroup of this process's own, below the one that it is in; gone when this is dropped.
struct Group {
    at: PathBuf,
    parent: PathBuf,
}

impl Group {
    /// Limits this process to so many bytes of memory.
    fn of(bytes: usize) -> io::Result<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let (root, group, file) = groups
            .lines()
            .find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
                [_, "memory", group] => Some(("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes")),
                ["0", "", group] if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() => {
                    Some(("/sys/fs/cgroup", group, "memory.max"))
                }
                _ => None,
            })
            .ok_or(io::ErrorKind::NotFound)?;
        let parent = Path::new(root).join(group.trim_start_matches('/'));
        // Those of processes that were killed are still there.
        for other in fs::read_dir(&parent)?.flatten() {
            let process =
                other.file_name().to_str().and_then(|name| name.strip_prefix("layer-streamer-")?.parse().ok());
            if process.is_some_and(|process: u32| !Path::new("/proc").join(process.to_string()).exists()) {
                let _ = fs::remove_dir(other.path());
            }
        }
        let at = parent.join(format!("layer-streamer-{}", std::process::id()));
        fs::create_dir(&at)?;
        let group = Self { at, parent };
        fs::write(group.at.join(file), bytes.to_string())?;
        fs::write(group.at.join("cgroup.procs"), "0")?;
        Ok(group)
    }

    /// The kernel takes rings apart in its own time, and until then counts the memory that was registered with them.
    fn assert_freed(&self) {
        let read = |name: &str| fs::read_to_string(self.at.join(name)).ok();
        let stat = |stat: &str, name: &str| -> usize {
            let value = stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            value.unwrap_or_else(|| panic!("memory.stat has no {name}: {stat}"))
        };
        let used = || {
            let used = read("memory.current").or_else(|| read("memory.usage_in_bytes")).expect("its usage");
            let files = read("memory.stat").expect("its statistics");
            let files = stat(&files, "active_file ") + stat(&files, "inactive_file ");
            used.trim().parse::<usize>().unwrap().saturating_sub(files)
        };
        for _ in 0..1000 {
            if used() < 16 << 20 {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{} bytes are not freed", used());
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Once nobody is in it.
        let _ = fs::write(self.parent.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.at);
    }
}

#[test]
fn in_a_memory_cgroup_what_does_not_fit_is_refused_and_what_fits_is_not_killed() {
    if !in_child("in_a_memory_cgroup_what_does_not_fit_is_refused_and_what_fits_is_not_killed") {
        return;
    }
    let (fixture, before) = (fixture(5, &SIZES, 38), Holdings::at_rest());
    let group = match Group::of(64 << 20) {
        Ok(group) => group,
        Err(error) => {
            eprintln!("skipped: no memory cgroup of its own: {error}");
            return;
        }
    };
    // The machine has room for these, the group has not; a process that took them would be killed, also one that took all there is
    // to the last byte, which is tried.
    for more in 1..40 {
        let settings = settings(more, 1, 0);
        match start(&fixture, &settings) {
            Ok(mut streamer) => (0..2).for_each(|_| checked_pass(&fixture, &mut streamer)),
            Err(error) => assert!(matches!(error, Error::Memory { .. }), "{more}: {error}"),
        }
    }
    let error = refused(|| start(&fixture, &settings(40, 40, 40)));
    let Error::Memory { free: Some(few), .. } = error else { panic!("{error}") };
    let message = error.to_string();
    assert!(message.contains("bytes are available") && message.contains("free memory"), "{message}");
    assert!(few < 64 << 20, "{message}");
    before.assert_back(&message);
    group.assert_freed();
    // A ring whose buffers cannot be registered within the group reads without.
    works(&fixture, &settings(2, 2, 1));
    before.assert_back("after passes");
    drop(group);
    works(&fixture, &settings(40, 40, 40));
}

#[test]
fn a_tier_that_does_not_fit_is_refused_with_both_sizes() {
    if !in_child("a_tier_that_does_not_fit_is_refused_with_both_sizes") {
        return;
    }
    // More than there is, and than a system that promises more than it has would promise, in a file that is all hole.
    const UNIT: usize = 16 << 20;
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap().trim().trim_end_matches(" kB");
    let count = 2 * 1024 * total.parse::<usize>().unwrap() / UNIT;
    let (folder, bytes) = (support::folder(), count * UNIT);
    let file = folder.path().join("huge");
    if let Err(error) = fs::File::create(&file).unwrap().set_len(bytes as u64) {
        eprintln!("skipped: this file system has no room for a hole of {bytes} bytes: {error}");
        return;
    }
    let stored = |number: usize| StoredTensor {
        name: number.to_string(),
        file: file.clone(),
        offset: (number * UNIT) as u64,
        dtype: DType::F16,
        shape: vec![UNIT / 2],
    };
    let checkpoint = Checkpoint::from_table((0..count).map(stored)).unwrap();
    // To a device that computes in RAM they are one. What is converted goes from where it is kept in RAM to the device.
    for (tier, converts, what) in [
        ("ram", false, "units kept on the device"),
        ("pinned", false, "units kept on the device"),
        ("gpu", false, "units kept on the device"),
        ("ram", true, "units kept in pinned RAM"),
        ("pinned", true, "units kept in pinned RAM"),
    ] {
        let mut units: Vec<_> = (0..count).map(|number| Unit::new(format!("unit {number}"))).collect();
        for (number, unit) in units.iter_mut().enumerate() {
            unit.keep("weight", number.to_string());
            if converts {
                unit.convert(DType::F32);
            }
        }
        Tier::parse(&format!("0-{}={tier}", count - 1), &mut units).unwrap();
        let message = refused(|| LayerStreamer::new(&Cpu, &checkpoint, &units, &settings(1, 1, 0))).to_string();
        for part in [what, &bytes.to_string(), "only ", "bytes are available", "free memory"] {
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert_eq!(Holdings::now().arenas, 0);
    }
}

#[test]
fn a_tier_that_names_no_unit_is_refused_with_what_there_is() {
    let mut units: Vec<_> = (0..12).map(|number| Unit::new(format!("unit {number}"))).collect();
    for (text, said) in [
        ("12=ram", "\"12=ram\": there are 12 units, 0 to 11"),
        ("0-3=ram,4-12=gpu", "\"4-12=gpu\": there are 12 units, 0 to 11"),
        ("5-4=disk", "\"5-4=disk\": there are 12 units, 0 to 11"),
        ("0-18446744073709551615=ram", "there are 12 units"),
        ("0-99999999999999999999=ram", "expected UNIT=TIER or FIRST-LAST=TIER"),
        ("3=tape", "TIER being disk, ram, pinned, gpu, gpu-packed or pinned-packed"),
        ("ram", "expected UNIT=TIER"),
        ("-1=ram", "expected UNIT=TIER"),
    ] {
        let error = Tier::parse(text, &mut units).unwrap_err();
        assert!(matches!(error, Error::Setting { name: "tier", .. }));
        assert!(error.to_string().contains(said), "{text}: {error}");
    }
    Tier::parse("0-11=ram,3=gpu", &mut units).unwrap();
}
