//! CPU time by thread, from the clocks that the kernel keeps for each.

use std::fs;

use super::Failure;

/// CPU seconds so far.
#[derive(Clone, Copy, Default)]
pub struct Clocks {
    /// Of the whole process, threads that have ended included.
    pub process: f64,
    /// Of the calling thread.
    pub own: f64,
    /// Of the pipeline's threads: reader (with its `pread` threads), pin, transfer.
    pub stages: [f64; 3],
}

impl Clocks {
    /// Reads all clocks. It allocates, so call it outside what is measured.
    pub fn now() -> Result<Self, Failure> {
        let mut clocks = Self { process: read(libc::CLOCK_PROCESS_CPUTIME_ID), own: own_thread(), ..Self::default() };
        for task in fs::read_dir("/proc/self/task")? {
            let folder = task?.path();
            // A thread may have ended since.
            let Ok(name) = fs::read_to_string(folder.join("comm")) else { continue };
            let stage = match name.trim_end() {
                "ls-read" | "ls-pread" => 0,
                "ls-pin" | "ls-pin-copy" => 1,
                "ls-transfer" => 2,
                _ => continue,
            };
            let thread = folder.file_name().and_then(|tid| tid.to_str()?.parse::<libc::clockid_t>().ok());
            // The kernel's number for the CPU clock of a thread: clock_getcpuclockid(3) makes that of a process alike.
            clocks.stages[stage] += thread.map_or(0.0, |tid| read((!tid << 3) | 6));
        }
        Ok(clocks)
    }

    /// What was spent since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            process: self.process - before.process,
            own: self.own - before.own,
            stages: std::array::from_fn(|stage| self.stages[stage] - before.stages[stage]),
        }
    }

    pub fn add(&mut self, other: Self) {
        self.process += other.process;
        self.own += other.own;
        (0..3).for_each(|stage| self.stages[stage] += other.stages[stage]);
    }

    /// What neither the caller nor the pipeline's threads spent: io_uring's workers in the kernel, which come and go.
    pub fn kernel_workers(self) -> f64 {
        (self.process - self.own - self.stages.iter().sum::<f64>()).max(0.0)
    }
}

/// CPU seconds of the calling thread.
pub fn own_thread() -> f64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU seconds of the process.
pub fn process() -> f64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// Zero for a clock that there is not (a thread that has just ended).
fn read(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is the call's.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
