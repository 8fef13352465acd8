//! Where a probe is kept, and for how long.

use std::{
    env, fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{Probe, judge::Judgement};
use crate::plan::Bandwidths;

/// How long a probe is used again: disks fill up and age, and machines are moved.
pub(super) const VALID: Duration = Duration::from_secs(30 * 24 * 3600);

/// The same for one that was disturbed: so long that a few starts in a row do not each measure again.
pub(super) const VALID_DISTURBED: Duration = Duration::from_secs(10 * 60);

/// The present layout of the file. A file of another is measured anew.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    /// In seconds since 1970.
    taken: u64,
    /// Bytes per second.
    disk: f64,
    copy: f64,
    disk_spread: f64,
    copy_spread: f64,
    disturbed: Option<String>,
}

/// The file for this machine, the file system of `file`, and this device; `None` where there is no cache folder.
pub(super) fn path(file: &Path, device: &str) -> Option<PathBuf> {
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

/// The probe that is kept there, unless it is too old, or the file is damaged or of another version.
pub(super) fn recall(path: &Path) -> Option<Probe> {
    let kept: Kept = serde_json::from_str(&fs::read_to_string(path).ok()?).ok()?;
    let taken = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(kept.taken))?;
    // A date in the future is a clock's mistake.
    let age = taken.elapsed().ok()?;
    let valid = if kept.disturbed.is_some() { VALID_DISTURBED } else { VALID };
    let sensible = [kept.disk, kept.copy].iter().all(|rate| rate.is_finite() && *rate > 0.0);
    (kept.version == VERSION && age <= valid && sensible).then(|| Probe {
        verdict: Judgement {
            bandwidths: Bandwidths { disk: kept.disk, copy: kept.copy },
            spread: Bandwidths { disk: kept.disk_spread, copy: kept.copy_spread },
            disturbed: kept.disturbed,
        },
        taken,
        kept: Some(path.to_owned()),
    })
}

/// Keeps a probe where its path says.
pub(super) fn keep(probe: &Probe) -> io::Result<()> {
    let Some(path) = &probe.kept else { return Ok(()) };
    let Judgement { bandwidths, spread, disturbed } = &probe.verdict;
    let text = serde_json::to_string_pretty(&Kept {
        version: VERSION,
        taken: seconds(probe.taken),
        disk: bandwidths.disk.round(),
        copy: bandwidths.copy.round(),
        disk_spread: spread.disk,
        copy_spread: spread.copy,
        disturbed: disturbed.clone(),
    })?;
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    // Whole or not at all, whoever else writes it.
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, text + "\n")?;
    fs::rename(partial, path)
}

/// Removes what is kept there, unless that is a newer probe, of another process.
pub(super) fn forget(probe: &Probe) {
    if let Some(path) = &probe.kept
        && recall(path).is_none_or(|found| seconds(found.taken) <= seconds(probe.taken))
    {
        // A file that cannot be removed is used again.
        let _ = fs::remove_file(path);
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
