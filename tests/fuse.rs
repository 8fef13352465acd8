//! A file system that fails on demand, behind the kernel's own page cache and io_uring: a server that speaks FUSE (protocol 7.31,
//! `linux/fuse.h`) over one file, and answers reads with errors, late, short, or never. Where /dev/fuse cannot be mounted the
//! tests say so.

mod common;

use std::{
    ffi::{CStr, CString},
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use common::{Fixture, check, fixture, settings};
use layer_streamer::{
    Error, LayerStreamer, Settings,
    device::{Cpu, Device},
    plan::{CachePolicy, Reader},
    trace::{Mark, Observer},
};
use support::limits::in_child;

/// What becomes of a read at an offset.
#[derive(Clone, Copy)]
enum Answer {
    Right,
    Errno(i32),
    Late(Duration),
    /// So many bytes fewer, as at the end of a file.
    Short(usize),
    Never,
}

type Plan = Arc<Mutex<Box<dyn FnMut(u64) -> Answer + Send>>>;

/// The root and its one file.
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Serves `content` as `name`, until it is unmounted. Reads that are answered never keep their place until then.
struct Server {
    channel: File,
    name: String,
    content: Vec<u8>,
    plan: Plan,
}

impl Server {
    fn serve(mut self) {
        let mut buffer = vec![0u8; (1 << 20) + 4096];
        while let Ok(count) = self.channel.read(&mut buffer) {
            let request = &buffer[..count];
            let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
            let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
            // The header of a request is 40 bytes long.
            let (opcode, unique, node) = (word(4), long(8), long(16));
            let answer: Result<Vec<u8>, i32> = match opcode {
                // LOOKUP, FORGET, GETATTR
                1 if request[40..].split(|byte| *byte == 0).next() == Some(self.name.as_bytes()) => {
                    Ok([&[FILE, 0, 1, 1, 0].map(u64::to_le_bytes).concat()[..], &self.attributes(FILE)].concat())
                }
                1 => Err(libc::ENOENT),
                2 | 42 => continue,
                3 => Ok([&[1u64, 0].map(u64::to_le_bytes).concat()[..], &self.attributes(node)].concat()),
                // OPEN and OPENDIR: the kernel may keep nothing of what it read.
                14 | 27 => Ok(vec![0; 16]),
                // READ
                15 => {
                    let (offset, size) = (long(48), word(56) as usize);
                    let end = self.content.len().min(offset as usize + size);
                    let bytes = &self.content[(offset as usize).min(end)..end];
                    let planned = (self.plan.lock().unwrap())(offset);
                    match planned {
                        Answer::Right => Ok(bytes.to_vec()),
                        Answer::Errno(errno) => Err(errno),
                        Answer::Short(less) => Ok(bytes[..bytes.len().saturating_sub(less)].to_vec()),
                        Answer::Never => continue,
                        Answer::Late(time) => {
                            let (mut channel, bytes) = (self.channel.try_clone().unwrap(), bytes.to_vec());
                            thread::spawn(move || {
                                thread::sleep(time);
                                let _ = channel.write_all(&reply(unique, &Ok(bytes)));
                            });
                            continue;
                        }
                    }
                }
                // RELEASE, FLUSH, RELEASEDIR, INTERRUPT, which has no answer
                18 | 25 | 29 => Ok(vec![]),
                36 => continue,
                // STATFS, by which a file system is known for what it is
                17 => Ok(vec![0; 80]),
                // INIT: version 7.31, reads up to 128 KiB ahead, requests of up to 256 pages
                26 => {
                    let mut init = [7u32, 31, 128 << 10, 1 << 22].map(u32::to_le_bytes).concat();
                    init.extend([16u16, 16].map(u16::to_le_bytes).concat());
                    init.extend([1u32 << 20, 1].map(u32::to_le_bytes).concat());
                    init.extend([256u16, 0].map(u16::to_le_bytes).concat());
                    init.resize(64, 0);
                    Ok(init)
                }
                _ => Err(libc::ENOSYS),
            };
            if self.channel.write_all(&reply(unique, &answer)).is_err() && opcode == 26 {
                return;
            }
        }
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (size, mode) = match node {
            ROOT => (0, libc::S_IFDIR | 0o755),
            _ => (self.content.len() as u64, libc::S_IFREG | 0o644),
        };
        let mut bytes = [node, size, size.div_ceil(512), 1, 1, 1].map(u64::to_le_bytes).concat();
        bytes.extend([0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].map(u32::to_le_bytes).concat());
        bytes
    }
}

fn reply(unique: u64, answer: &Result<Vec<u8>, i32>) -> Vec<u8> {
    let (errno, body) = match answer {
        Ok(body) => (0, body.as_slice()),
        Err(errno) => (-errno, &[][..]),
    };
    let mut bytes = (16 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(errno.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A file system that is mounted for longer hangs.
const LONGEST: Duration = Duration::from_secs(100);

/// A checkpoint on such a file system, which is unmounted with it.
struct Mounted {
    fixture: Fixture,
    folder: tempfile::TempDir,
    at: CString,
    plan: Plan,
    over: Arc<AtomicBool>,
}

impl Mounted {
    fn new() -> Option<Self> {
        let mut fixture = fixture(5, &common::SIZES, 31);
        // One file for all: the second begins where the first ends.
        let [first, second] = ["a.bin", "b.bin"].map(|name| std::fs::read(fixture.file(name)).unwrap());
        let folder = support::folder();
        let moved = folder.path().join("weights");
        for tensor in fixture.table.values_mut() {
            let begins = if tensor.file.ends_with("b.bin") { first.len() as u64 } else { 0 };
            (tensor.offset, tensor.file) = (tensor.offset + begins, moved.clone());
        }
        let plan: Plan = Arc::new(Mutex::new(Box::new(|_| Answer::Right)));
        let at = CString::new(folder.path().to_str().unwrap()).unwrap();
        let mounted = OpenOptions::new().read(true).write(true).open("/dev/fuse").and_then(|channel| {
            let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", channel.as_raw_fd());
            let options = CString::new(options).unwrap();
            // SAFETY: strings that end in zero and live through the call.
            let mounted =
                unsafe { libc::mount(c"layer".as_ptr(), at.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
            if mounted == 0 { Ok(channel) } else { Err(std::io::Error::last_os_error()) }
        });
        let channel = match mounted {
            Ok(channel) => channel,
            Err(error) => {
                eprintln!("skipped: FUSE cannot be mounted: {error}");
                return None;
            }
        };
        let content = [first, second].concat();
        // A process that serves itself cannot even be killed while it waits for itself.
        let (forced, over) = (at.clone(), Arc::new(AtomicBool::new(false)));
        let (ended, start) = (over.clone(), Instant::now());
        thread::spawn(move || {
            while !ended.load(SeqCst) {
                thread::sleep(Duration::from_millis(50));
                if start.elapsed() > LONGEST {
                    unmount(&forced);
                    std::process::abort();
                }
            }
        });
        // SAFETY: no memory is involved. The alarm of who started this process is for one mount.
        unsafe { libc::alarm(LONGEST.as_secs() as u32 + 10) };
        let server = Server { channel, name: "weights".into(), content, plan: plan.clone() };
        thread::spawn(|| server.serve());
        let mut mounted = Self { fixture, folder, at, plan, over };
        mounted.fixture.checkpoint = mounted.fixture.opened_again();
        Some(mounted)
    }

    fn plan(&self, plan: impl FnMut(u64) -> Answer + Send + 'static) {
        *self.plan.lock().unwrap() = Box::new(plan);
    }

    /// None where the system has no such reader.
    fn streamer(
        &self,
        reader: Reader,
        cache: CachePolicy,
        observers: &[Arc<dyn Observer>],
    ) -> Option<LayerStreamer<Cpu>> {
        let settings = Settings { reader, cache, ..settings(2, 2, 1) };
        let Fixture { checkpoint, units, .. } = &self.fixture;
        match LayerStreamer::with_observers(&Cpu, checkpoint, units, &settings, observers) {
            Err(Error::Unsupported { what, .. }) => {
                eprintln!("skipped in part: {what}");
                None
            }
            other => Some(other.unwrap()),
        }
    }

    /// The file as it is, for comparing with; not by way of the mount, which may be failing.
    fn pass(&self, original: &Fixture, streamer: &mut LayerStreamer<Cpu>) -> Result<(), Error> {
        let stream = Cpu.stream()?;
        streamer.run_pass(&stream, (), |(), layer| {
            check(original, &Cpu, layer);
            Ok(())
        })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("weights")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.at);
        self.over.store(true, SeqCst);
    }
}

/// Reads that wait for an answer end with it.
fn unmount(at: &CStr) {
    // SAFETY: a string that ends in zero.
    unsafe { libc::umount2(at.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
}

/// How often a file was said to be silent.
#[derive(Default)]
struct Silent(AtomicUsize);

impl Observer for Silent {
    fn mark(&self, mark: &Mark) {
        self.0.fetch_add(usize::from(matches!(mark, Mark::Silent { .. })), SeqCst);
    }
}

const READERS: [Reader; 3] = [Reader::UringFixed, Reader::Uring, Reader::Pread];

#[test]
#[ignore = "mounts a file system; ci/full runs it"]
fn a_file_system_that_fails_is_an_error_and_one_that_is_slow_is_none() {
    if !in_child("a_file_system_that_fails_is_an_error_and_one_that_is_slow_is_none") {
        return;
    }
    let original = fixture(5, &common::SIZES, 31);
    let Some(mounted) = Mounted::new() else { return };
    let (mut tried, mut right, mut refused) = (0, 0, 0);
    for (reader, cache) in
        READERS.into_iter().flat_map(|reader| [(reader, CachePolicy::Buffered), (reader, CachePolicy::Auto)])
    {
        let Some(mut streamer) = mounted.streamer(reader, cache, &[]) else { continue };
        mounted.pass(&original, &mut streamer).unwrap();
        for k in 0..40 {
            let mut rng = fastrand::Rng::with_seed(k);
            let kind = k % 4;
            let mut left = 1 + k / 4;
            mounted.plan(move |_| {
                left = left.wrapping_sub(1);
                match kind {
                    0 if left == 0 => Answer::Errno(libc::EIO),
                    1 if left == 0 => Answer::Short(1 + rng.usize(..5000)),
                    2 => Answer::Late(Duration::from_micros(rng.u64(..3000))),
                    3 if left == 0 => Answer::Late(Duration::from_millis(50)),
                    _ => Answer::Right,
                }
            });
            tried += 1;
            match mounted.pass(&original, &mut streamer) {
                Ok(()) => right += 1,
                Err(error) => {
                    let text = error.to_string();
                    assert!(kind < 2 && text.contains(mounted.path().to_str().unwrap()), "{reader}, {k}: {text}");
                    refused += 1;
                    streamer.rewind().unwrap();
                }
            }
            mounted.plan(|_| Answer::Right);
            for attempt in 0.. {
                // What was read ahead may hold the fault still.
                match mounted.pass(&original, &mut streamer) {
                    Ok(()) => break,
                    Err(error) => assert!(attempt < 2 && kind < 2, "{reader}, {k}: {error}"),
                }
            }
        }
        streamer.close().unwrap();
    }
    assert!(right > 20 && refused > 5, "{right} right, {refused} refused");
    eprintln!("counted: FUSE: {tried} tried, {right} right, {refused} errors, 0 wrong");
}

#[test]
#[ignore = "mounts a file system; ci/full runs it"]
fn a_file_system_that_never_answers_holds_nobody_up() {
    if !in_child("a_file_system_that_never_answers_holds_nobody_up") {
        return;
    }
    for reader in READERS {
        let Some(mounted) = Mounted::new() else { return };
        let silent = Arc::new(Silent::default());
        let observers = [silent.clone() as Arc<dyn Observer>];
        // The units that are read ahead at once are answered, the others are not.
        let mut asked = 0;
        let opened = Arc::new(AtomicBool::new(false));
        let is_open = opened.clone();
        mounted.plan(move |_| {
            asked += usize::from(is_open.load(SeqCst));
            if asked > 6 { Answer::Never } else { Answer::Right }
        });
        let Some(mut streamer) = mounted.streamer(reader, CachePolicy::Auto, &observers) else { continue };
        opened.store(true, SeqCst);
        let canceller = streamer.canceller();
        let (heard, start) = (silent.clone(), Instant::now());
        let cancels = thread::spawn(move || {
            // Once the reader has said for which file it waits, which it does after ten seconds.
            while heard.0.load(SeqCst) == 0 && start.elapsed() < Duration::from_secs(40) {
                thread::sleep(Duration::from_millis(10));
            }
            canceller.cancel();
        });
        let stream = Cpu.stream().unwrap();
        let error = loop {
            if let Err(error) = streamer.next(&stream) {
                break error;
            }
        };
        assert!(matches!(error, Error::Cancelled), "{reader}: {error}");
        cancels.join().unwrap();
        assert_eq!(silent.0.load(SeqCst), 1, "{reader}: nobody said that the file is silent");
        let start = Instant::now();
        streamer.rewind().unwrap();
        let closed = streamer.close();
        assert!(matches!(closed, Err(Error::Leaked { .. })), "{reader}: {closed:?}");
        assert!(start.elapsed() < Duration::from_secs(3), "{reader}: {:?}", start.elapsed());
        eprintln!("counted: FUSE, never, {reader}: cancelled and closed in {:?}: {closed:?}", start.elapsed());
    }
}
