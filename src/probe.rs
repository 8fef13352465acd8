//! What the links carry, measured in well under a second and kept for the next start.

use std::{
    env, fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    arena::{Arena, PAGE},
    checkpoint::Checkpoint,
    device::{Device, DevicePtr},
    error::{Error, Result},
    io::{self, CHUNK, Engine, Source},
    plan::{Bandwidths, CachePolicy, Extent, Reader},
    sync::Signal,
};

/// How long the disk is read, and how long bytes are copied, at the least: reads and copies under way are waited for.
const DISK_TIME: Duration = Duration::from_millis(300);
const COPY_TIME: Duration = Duration::from_millis(100);

/// How long a result is trusted: disks fill up and age, and machines are moved.
const VALID: Duration = Duration::from_secs(30 * 24 * 3600);

/// Chunks of memory to read to and copy from: as many as keep a disk busy, and little enough to be there quickly and to take
/// less than what a process is allowed beside its budget.
const BLOCKS: usize = 8;

/// Copies of half of them that are enqueued at once.
const COPIES: usize = 8;

impl Bandwidths {
    /// What the disk of the checkpoint's largest file and the way to the device carry: as measured in the last thirty days on
    /// this machine, file system and device, from the user's cache folder, else measured now, which takes less than a second.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Read`] where the file cannot be read, or the device's own.
    pub fn measured<D: Device>(device: &D, checkpoint: &Checkpoint) -> Result<Self> {
        let file = (0..checkpoint.files().len()).max_by_key(|&file| checkpoint.length(file)).unwrap_or(0);
        let kept = kept_in(&checkpoint.files()[file], &device.describe());
        if let Some(known) = kept.as_deref().and_then(recall) {
            return Ok(known);
        }
        let found = match Self::measure(device, checkpoint, file) {
            // There is none to try it with.
            Err(Error::Memory { .. }) => return Ok(Self::default()),
            found => found?,
        };
        if let Some(path) = kept {
            // What cannot be kept is measured again.
            let _ = keep(&path, found);
        }
        Ok(found)
    }

    fn measure<D: Device>(device: &D, checkpoint: &Checkpoint, file: usize) -> Result<Self> {
        device.bind_thread()?;
        let blocks = Arena::new("a probe of disk and link", BLOCKS, CHUNK)?;
        let sources = io::open_all(checkpoint, CachePolicy::Direct)?;
        let disk = disk_rate(&sources, file, checkpoint.length(file), &blocks)?;
        Ok(Self { disk, copy: copy_rate(device, &blocks)? })
    }
}

/// Reads one file from the start on, and over again.
fn disk_rate(sources: &Arc<[Source]>, file: usize, length: u64, blocks: &Arena) -> Result<f64> {
    let signal = Signal::new();
    // SAFETY: there are no registered buffers.
    let (mut engine, ..) = unsafe { Engine::new(Reader::Auto, sources, &[], &signal) }?;
    let failed = |error| Error::io("read with io_uring from", &sources[file].path)(error);
    let (start, mut bytes, mut at) = (Instant::now(), 0, 0);
    let mut free: Vec<_> = (0..BLOCKS).collect();
    loop {
        let ticket = signal.ticket();
        while start.elapsed() < DISK_TIME && engine.has_room() {
            let Some(block) = free.pop() else { break };
            let len = (length - at).min(CHUNK as u64);
            let extent = Extent { file, offset: at, len: (len as usize).next_multiple_of(PAGE), end: at + len, at: 0 };
            // SAFETY: the block holds a chunk, and is not handed out again before this one has come.
            unsafe { engine.submit(io::chunk_at(&sources[file], &extent, 0, blocks.slot(block).as_ptr(), block)) };
            at = if at + len < length { at + len } else { 0 };
        }
        if engine.in_flight() == 0 {
            return Ok(bytes as f64 / start.elapsed().as_secs_f64());
        }
        engine.flush().map_err(failed)?;
        let Some(done) = engine.completion() else {
            engine.wait(&signal, ticket).map_err(failed)?;
            continue;
        };
        free.push(done.tag);
        bytes += done.result.map_err(|failure| Error::Read {
            unit: "a probe".into(),
            tensor: String::new(),
            path: sources[file].path.clone(),
            offset: failure.offset,
            source: failure.source(),
        })?;
    }
}

/// Copies half of the blocks to the device, again and again: on one that computes in RAM to where the other half is.
fn copy_rate<D: Device>(device: &D, blocks: &Arena) -> Result<f64> {
    let ((from, both), stream) = (blocks.whole(), device.named_stream(c"layer-streamer probe")?);
    let bytes = both / 2;
    let own = device.free_memory()?.map(|_| device.allocate("a probe of the link", bytes)).transpose()?;
    let to = own.as_ref().map_or(DevicePtr::new(blocks.slot(BLOCKS / 2).as_ptr()), |memory| device.address(memory));
    // SAFETY: a local declared after the memory it is about, which the caller keeps.
    let _registered = unsafe { device.register(from.as_ptr(), bytes)? };
    // As many as make one wait for them next to nothing.
    let copy = || {
        // SAFETY: both sides are that long and apart, and the copies are waited for, also where one of them fails.
        let enqueued =
            (0..COPIES).try_for_each(|_| unsafe { device.copy_to_device(to, from.as_ptr(), bytes, &stream) });
        let done = device.drain(&stream);
        enqueued.and(done)
    };
    copy()?;
    let (start, mut copied) = (Instant::now(), 0);
    while start.elapsed() < COPY_TIME {
        copy()?;
        copied += COPIES * bytes;
    }
    Ok(copied as f64 / start.elapsed().as_secs_f64())
}

/// The file for this machine, the file system of `file`, and this device; `None` where there is no cache folder.
fn kept_in(file: &Path, device: &str) -> Option<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    let machine = ["/etc/machine-id", "/proc/sys/kernel/hostname"].into_iter().find_map(|path| {
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    })?;
    let path = std::ffi::CString::new(file.as_os_str().as_bytes()).ok()?;
    let mut about = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a terminated path, and a structure of the call's.
    let system = match unsafe { libc::statvfs(path.as_ptr(), about.as_mut_ptr()) } {
        // SAFETY: the call succeeded.
        0 => unsafe { about.assume_init() }.f_fsid,
        _ => return None,
    };
    let name = format!("{machine} {system:x} {:x} {device}", fs::metadata(file).ok()?.dev());
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Some(cache.join("layer-streamer").join(name))
}

fn recall(path: &Path) -> Option<Bandwidths> {
    // A date in the future is a clock's mistake.
    let age = fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()?;
    if age > VALID {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    let rate = |name: &str| -> Option<f64> {
        let rate = text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok();
        rate.filter(|rate: &f64| rate.is_finite() && *rate > 0.0)
    };
    Some(Bandwidths { disk: rate("disk ")?, copy: rate("copy ")? })
}

fn keep(path: &Path, Bandwidths { disk, copy }: Bandwidths) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    // Whole or not at all, whoever else writes it.
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, format!("disk {disk:.0}\ncopy {copy:.0}\n"))?;
    fs::rename(partial, path)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::device::Cpu;

    #[test]
    fn a_probe_ends_in_time_and_what_it_found_is_recalled() {
        let folder = tempfile::tempdir_in(option_env!("CARGO_TARGET_TMPDIR").unwrap_or(".")).unwrap();
        let file = folder.path().join("weights");
        fs::write(&file, vec![7; (5 << 20) + 100]).unwrap();
        let tensor = crate::StoredTensor {
            name: "w".into(),
            file: file.clone(),
            offset: 0,
            dtype: crate::DType::U8,
            shape: vec![100],
        };
        let checkpoint = Checkpoint::from_table([tensor]).unwrap();
        // Less than a second by itself; beside other tests the memory alone may take longer.
        let start = Instant::now();
        let found = Bandwidths::measure(&Cpu, &checkpoint, 0).unwrap();
        let took = start.elapsed();
        assert!(took >= DISK_TIME + COPY_TIME && took < Duration::from_secs(9), "{took:?}");
        assert!(found.disk > 1e6 && found.copy > 1e8, "{found:?}");
        let path = folder.path().join("cache/a");
        keep(&path, found).unwrap();
        let again = recall(&path).unwrap();
        assert!((again.disk / found.disk - 1.0).abs() < 1e-3 && (again.copy / found.copy - 1.0).abs() < 1e-3);
        for (age, fresh) in [(VALID - Duration::from_secs(60), true), (VALID + Duration::from_secs(60), false)] {
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
            assert_eq!(recall(&path).is_some(), fresh);
        }
        fs::write(&path, "disk 0\ncopy 1\n").unwrap();
        assert_eq!(recall(&path), None);
        if let [Some(here), Some(there)] = ["cpu", "cuda:0"].map(|device| kept_in(&file, device)) {
            assert!(here != there && here.is_absolute());
        }
    }
}
