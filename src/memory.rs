//! How much memory is free: what the system has, and what the control groups that this process is in leave of it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Bytes that arenas will take and the system does not know of yet.
pub(crate) static PROMISED: AtomicUsize = AtomicUsize::new(0);

/// RAM that can be had without swapping and without meeting a limit, in bytes, if the system tells. It excludes what was promised,
/// and what comes with memory that is used: page tables, what the kernel notes of each page that is registered, stacks. A process
/// that took it to the last byte would be killed in a control group.
pub(crate) fn free() -> Option<usize> {
    let free = free_below(Path::new("/"))?;
    Some(free.saturating_sub(PROMISED.load(Relaxed)).saturating_sub(free / 128 + (8 << 20)))
}

/// The same by the files below `root`.
fn free_below(root: &Path) -> Option<usize> {
    let info = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let available = field(&info, "MemAvailable:")?.checked_mul(1024)?;
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    Some(groups.lines().filter_map(|line| free_in(root, line)).fold(available, usize::min))
}

/// What a line of `/proc/self/cgroup` leaves: the least that any group on the way up leaves below its limits.
fn free_in(root: &Path, line: &str) -> Option<usize> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    // Where systemd and all container engines mount them.
    let (mount, limits, usage, prefix) = match controllers {
        "" => ("sys/fs/cgroup", &["memory.max", "memory.high"][..], "memory.current", ""),
        "memory" => ("sys/fs/cgroup/memory", &["memory.limit_in_bytes"][..], "memory.usage_in_bytes", "total_"),
        _ => return None,
    };
    let mount = root.join(mount);
    // In a container the path may be the host's: then only the mount itself is there, and it is the container's group.
    let group = mount.join(path.trim_start_matches('/'));
    let on_the_way = group.ancestors().take_while(|folder| folder.starts_with(&mount)).map(PathBuf::from);
    let left = |folder: PathBuf| {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let limit = limits.iter().filter_map(|name| read(name)?.trim().parse::<usize>().ok()).min()?;
        let used = read(usage)?.trim().parse::<usize>().ok()?;
        // Pages of files and what the kernel remembers of them count as used, but make room when there is none.
        let stat = read("memory.stat").unwrap_or_default();
        let lists = ["active_file ", "inactive_file ", "slab_reclaimable "];
        let spare =
            lists.iter().filter_map(|list| field(&stat, &format!("{prefix}{list}"))).fold(0, usize::saturating_add);
        Some(limit.saturating_sub(used.saturating_sub(spare)))
    };
    on_the_way.filter_map(left).min()
}

/// The number that follows `name` at the start of a line.
fn field(table: &str, name: &str) -> Option<usize> {
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What may be used of so much that is free: all but a reserve for everything else.
pub(crate) fn less_reserve(free: usize) -> usize {
    free - (free / 16).max(256 << 20).min(free / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const INFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8000 kB\n");

    fn free_with(files: &[(&str, &str)]) -> Option<usize> {
        free_below(root(&[&[INFO], files].concat()).path())
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        assert_eq!(free_with(&[]), Some(8_192_000));
        let version_2 = [
            ("proc/self/cgroup", "0::/user/app\n"),
            ("sys/fs/cgroup/user/app/memory.max", "max\n"),
            ("sys/fs/cgroup/user/app/memory.high", "6000000\n"),
            ("sys/fs/cgroup/user/app/memory.current", "1000000\n"),
        ];
        assert_eq!(free_with(&version_2), Some(5_000_000));
        let above = [
            ("sys/fs/cgroup/user/memory.max", "4000000\n"),
            ("sys/fs/cgroup/user/memory.current", "3000000\n"),
            ("sys/fs/cgroup/user/memory.stat", "anon 5\ninactive_file 200000\nactive_file 50000\nslab_reclaimable 7\n"),
        ];
        assert_eq!(free_with(&[&version_2[..], &above].concat()), Some(1_250_007));
        let used_up = [("sys/fs/cgroup/memory.max", "1000\n"), ("sys/fs/cgroup/memory.current", "2000\n")];
        assert_eq!(free_with(&[&version_2[..], &used_up].concat()), Some(0));
    }

    #[test]
    fn limits_of_version_1_count_also_where_the_path_is_that_of_another_root() {
        let version_1 = [
            ("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/docker/abc\n3:cpu:/docker/abc\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "7000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "4000000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "active_file 9\ntotal_active_file 500000\n"),
        ];
        assert_eq!(free_with(&version_1), Some(3_500_000));
        let unlimited = [("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n")];
        assert_eq!(free_with(&[&version_1[..], &unlimited].concat()), Some(3_500_000));
    }

    #[test]
    fn a_reserve_is_left_of_what_is_free_that_is_no_more_than_a_quarter() {
        assert_eq!([0, 4, 1 << 30, 16 << 30].map(less_reserve), [0, 3, 768 << 20, 15 << 30]);
    }

    #[test]
    fn this_system_tells() {
        assert!(free().is_some_and(|bytes| bytes > 0));
    }
}
