//! What a process holds of a streamer, and how long it has worked.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// How long the processor has worked for this thread: what takes time by itself, however busy the machine is.
pub fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is the call's while it runs.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How many of the pipeline's threads there are. A driver has threads and descriptors of its own, which may stay.
pub fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("ls-")).count()
}

/// How many files below `folder` are open, and rings.
pub fn descriptors(folder: &Path) -> usize {
    let targets = fs::read_dir("/proc/self/fd").unwrap().filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    targets.filter(|target| target.starts_with(folder) || target.to_string_lossy().contains("io_uring")).count()
}

/// Of both none are left: at once, but that the kernel lists a thread for a moment after it was joined.
pub fn nothing_left(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while (threads(), descriptors(folder)) != (0, 0) {
        assert!(Instant::now() < deadline, "left: {} threads, {} descriptors", threads(), descriptors(folder));
        std::thread::sleep(Duration::from_millis(1));
    }
}
