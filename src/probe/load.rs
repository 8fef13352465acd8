//! What else goes on in the machine: processors taken by the hypervisor or by others, and others' bytes over the same disk.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

/// A round is disturbed where the hypervisor took more than this share of the processor time that was wanted, …
const STOLEN: f64 = 0.1;
/// … if that is more than a few ticks of the kernel's clock, in which it is counted; …
const STOLEN_TICKS: u64 = 4;
/// … where others kept more than this share of the processors busy, or left less than so much of one; …
const OTHERS: f64 = 0.75;
const LEFT: f64 = 0.75;
/// … or where more than this share of the bytes that went over the disk was others'.
const DISK_OTHERS: f64 = 0.1;

/// Processor time of the whole machine since it started, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct CpuTimes {
    processors: u64,
    busy: u64,
    idle: u64,
    stolen: u64,
}

/// The kernel's counts at a moment. What it does not tell is left out.
pub(super) struct KernelCounts {
    at: Instant,
    cpu: Option<CpuTimes>,
    /// Processor time of this process.
    own: Duration,
    /// Bytes that went over the file's disk, read or written.
    disk: Option<u64>,
}

impl KernelCounts {
    /// `file`: one on the disk in question.
    pub(super) fn now(file: &Path) -> Self {
        Self {
            at: Instant::now(),
            cpu: fs::read_to_string("/proc/stat").ok().as_deref().and_then(parse_cpu),
            own: own_time(),
            disk: disk_counts(file).as_deref().and_then(parse_disk),
        }
    }
}

/// What others did between two moments.
#[derive(Debug, Default, PartialEq)]
pub(super) struct OtherLoad {
    /// Taken by the hypervisor, of the processor time that was wanted.
    stolen: f64,
    /// Processors that others kept busy, and how many there are; 0 of 0 where that is not known.
    others: f64,
    processors: f64,
    /// Others' share of the bytes that went over the disk.
    disk_others: f64,
}

impl OtherLoad {
    /// `own_bytes`: read from the disk by this process.
    pub(super) fn between(before: &KernelCounts, after: &KernelCounts, own_bytes: u64) -> Self {
        let mut load = Self::default();
        if let Some((from, to)) = before.cpu.zip(after.cpu) {
            // Idle time has been seen to go back.
            let [busy, idle, stolen] = [(from.busy, to.busy), (from.idle, to.idle), (from.stolen, to.stolen)]
                .map(|(from, to)| to.saturating_sub(from));
            if stolen > STOLEN_TICKS {
                load.stolen = stolen as f64 / (busy + stolen) as f64;
            }
            let seconds = (after.at - before.at).as_secs_f64().max(1e-9);
            let own = after.own.saturating_sub(before.own).as_secs_f64() / seconds;
            load.processors = to.processors as f64;
            let busy = load.processors * busy as f64 / (busy + idle + stolen).max(1) as f64;
            load.others = (busy - own).max(0.0);
        }
        if let Some((from, to)) = before.disk.zip(after.disk) {
            let moved = to.saturating_sub(from);
            load.disk_others = moved.saturating_sub(own_bytes) as f64 / moved.max(1) as f64;
        }
        load
    }

    /// What disturbed a measurement meanwhile, in words.
    pub(super) fn disturbance(&self) -> Option<String> {
        let mut causes = Vec::new();
        if self.stolen > STOLEN {
            causes.push(format!("the hypervisor took {:.0} % of the processor time (steal)", 100.0 * self.stolen));
        }
        if self.processors > 0.0 && self.others > (OTHERS * self.processors).min(self.processors - LEFT) {
            let Self { others, processors, .. } = self;
            causes.push(format!("other processes kept {others:.1} of {processors:.0} processors busy"));
        }
        if self.disk_others > DISK_OTHERS {
            let percent = 100.0 * self.disk_others;
            causes.push(format!("{percent:.0} % of the bytes that went over the disk were other processes'"));
        }
        (!causes.is_empty()).then(|| causes.join(", "))
    }
}

/// Reads `/proc/stat`.
fn parse_cpu(text: &str) -> Option<CpuTimes> {
    let processors = text.lines().filter(|line| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()))
    });
    let all = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = all.split_whitespace().map_while(|number| number.parse().ok()).collect();
    // Time of guests is counted as user time already.
    let [user, nice, system, idle, iowait, irq, softirq, stolen]: [u64; 8] = ticks.get(..8)?.try_into().ok()?;
    let busy = user + nice + system + irq + softirq;
    Some(CpuTimes { processors: processors.count() as u64, busy, idle: idle + iowait, stolen })
}

/// The text of a block device's `stat`; there is none for a file system without one device of its own (btrfs, ZFS, NFS).
fn disk_counts(file: &Path) -> Option<String> {
    let device = fs::metadata(file).ok()?.dev();
    fs::read_to_string(format!("/sys/dev/block/{}:{}/stat", libc::major(device), libc::minor(device))).ok()
}

/// Sectors of 512 bytes read and written.
fn parse_disk(text: &str) -> Option<u64> {
    let number = |index| text.split_whitespace().nth(index)?.parse::<u64>().ok();
    Some(512 * (number(2)? + number(6)?))
}

fn own_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a structure of the call's. This clock is always there; else the time stays 0.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "cpu  100 10 50 800 20 3 7 5 90 0\ncpu0 50 5 25 400 10 1 3 2 45 0\ncpu1 50 5 25 400 10 2 4 3 45 0\nintr 1\n";

    #[test]
    fn the_kernel_s_counts_are_read_or_left_out() {
        assert_eq!(parse_cpu(STAT), Some(CpuTimes { processors: 2, busy: 170, idle: 820, stolen: 5 }));
        for damaged in ["", "cpu  1 2 3\ncpu0 1 2 3\n", "cpu  1 2 x 4 5 6 7 8\n", "intr 1\n"] {
            assert_eq!(parse_cpu(damaged), None, "{damaged}");
        }
        assert_eq!(parse_disk("   10  2  100  5  7  3  50  6 0 0 0\n"), Some(512 * 150));
        assert_eq!(parse_disk("10 2 100"), None);
        let now = KernelCounts::now(Path::new("/"));
        assert!(now.cpu.is_some_and(|cpu| cpu.processors > 0 && cpu.busy > 0) && now.own > Duration::ZERO);
    }

    /// What half a second does to a machine of two processors whose clock ticks a hundred times a second.
    fn half_a_second(own: f64, busy: u64, stolen: u64, disk: u64, own_bytes: u64) -> Option<String> {
        let at = Instant::now();
        let cpu = parse_cpu(STAT);
        let before = KernelCounts { at, cpu, own: Duration::from_secs(9), disk: Some(1 << 40) };
        let after = KernelCounts {
            at: at + Duration::from_millis(500),
            cpu: cpu.map(|cpu| CpuTimes {
                busy: cpu.busy + busy,
                stolen: cpu.stolen + stolen,
                idle: cpu.idle + 100 - busy - stolen,
                ..cpu
            }),
            own: before.own + Duration::from_secs_f64(own),
            disk: Some((1 << 40) + disk),
        };
        OtherLoad::between(&before, &after, own_bytes).disturbance()
    }

    #[test]
    fn others_are_noticed_and_this_process_is_not_taken_for_them() {
        let calm = [
            half_a_second(0.1, 15, 0, 1000, 1000),
            half_a_second(1.0, 100, 0, 1000, 1000),
            half_a_second(0.2, 70, 1, 1000, 950),
            half_a_second(0.1, 15, 4, 0, 1000),
        ];
        assert_eq!(calm, [const { None }; 4]);
        for (disturbed, by) in [
            (half_a_second(0.1, 80, 20, 1000, 1000), "20 % of the processor time (steal)"),
            (half_a_second(0.2, 100, 0, 1000, 1000), "1.6 of 2 processors"),
            (half_a_second(0.1, 15, 0, 1000, 700), "30 % of the bytes"),
        ] {
            assert!(disturbed.as_ref().is_some_and(|said| said.contains(by)), "{disturbed:?} lacks {by}");
        }
        let unknown = || KernelCounts { at: Instant::now(), cpu: None, own: Duration::ZERO, disk: None };
        assert_eq!(OtherLoad::between(&unknown(), &unknown(), 1000).disturbance(), None);
    }
}
