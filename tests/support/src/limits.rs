//! Ways in which a system refuses, for the thread or process that asks for it, and what a process holds.

use std::{fs, io, process::Command, thread, time::Duration};

const CHILD: &str = "LAYER_STREAMER_LIMITED";

/// Runs the test called `name` once more, in a process of its own that may limit itself. `true` is that process.
pub fn in_child(name: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        // A test that hangs is one that fails.
        // SAFETY: no memory is involved.
        unsafe { libc::alarm(60) };
        return true;
    }
    let arguments = ["--exact", name, "--nocapture", "--test-threads=1", "--include-ignored"];
    let output = Command::new(std::env::current_exe().unwrap()).args(arguments).env(CHILD, "1").output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}\n{errors}", output.status);
    let passed_on = |line: &&str| ["skipped", "counted"].iter().any(|word| line.starts_with(word));
    errors.lines().filter(passed_on).for_each(|line| eprintln!("{line}"));
    false
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A system call to refuse: its number, the argument and bits of it that must be set if not all calls are meant, the errno.
pub type Rule = (libc::c_long, Option<(u32, libc::c_int)>, libc::c_int);

/// From now on refuses these calls to this thread and those that it starts.
pub fn forbid(rules: &[Rule]) {
    let op = |code: u32, k: u32, (jt, jf): (u8, u8)| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at: u32| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, (0, 0));
    let answer = |k: u32| op(libc::BPF_RET | libc::BPF_K, k, (0, 0));
    let mut program = Vec::new();
    for &(number, only, errno) in rules {
        let rest = if only.is_some() { 3 } else { 1 };
        program.extend([load(0), op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number as u32, (0, rest))]);
        if let Some((argument, bits)) = only {
            program.extend([
                load(16 + 8 * argument),
                op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, bits as u32, (0, 1)),
            ]);
        }
        program.push(answer(libc::SECCOMP_RET_ERRNO | errno as u32));
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is `len` instructions long, and the kernel copies it.
    unsafe {
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into()).unwrap();
        checked(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter)).unwrap();
    }
}

/// Runs `work` in a thread that is refused these calls; no other is.
pub fn forbidden<T: Send>(rules: &[Rule], work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let limited = scope.spawn(|| {
            forbid(rules);
            work()
        });
        limited.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives up these capabilities in this thread and those that it starts.
pub fn give_up(capabilities: &[u32]) {
    let header = [0x2008_0522u32, 0];
    let mut sets = [[0u32; 3]; 2];
    // SAFETY: the structures of version 3 of the call, two sets of three words.
    unsafe { checked(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr())).unwrap() };
    for &capability in capabilities {
        sets[capability as usize / 32][0] &= !(1 << (capability % 32));
    }
    // SAFETY: as above.
    unsafe { checked(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr())).unwrap() };
}

/// Makes this process a user's of whom there is no other, who still may read what root may.
pub fn become_unique_user() -> io::Result<()> {
    let user = 1_000_000 + std::process::id();
    // SAFETY: no memory is involved.
    checked(unsafe { libc::setresuid(user, 0, 0) }.into())
}

/// Sets a limit for `work` and lifts it again.
pub fn limited<T>(resource: libc::__rlimit_resource_t, soft: u64, work: impl FnOnce() -> T) -> T {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain structures, valid for the calls.
    unsafe {
        checked(libc::getrlimit(resource, &raw mut before).into()).unwrap();
        checked(libc::setrlimit(resource, &libc::rlimit { rlim_cur: soft, ..before }).into()).unwrap();
    }
    let result = work();
    // SAFETY: as above.
    unsafe { checked(libc::setrlimit(resource, &raw const before).into()).unwrap() };
    result
}

/// Flags of a thread in `/proc`: it has ended and is not gone yet; the kernel made it for a ring (PF_EXITING, PF_IO_WORKER of
/// `linux/sched.h`).
const ENDED: u64 = 0x4;
const OF_THE_KERNEL: u64 = 0x10;

/// This process's threads, those with some of the flags only if `with` has them.
fn threads(with: u64) -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    // The flags are the seventh field after the name, which is in parentheses and may hold any of them.
    let flags = stats.filter_map(|stat| stat.rsplit(')').next()?.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.filter(|flags| flags & (ENDED | OF_THE_KERNEL) & !with == 0).count()
}

/// What a streamer takes of a process and must give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: usize,
    /// Its own that have not ended.
    pub threads: usize,
    /// Bytes of memory that neither children nor core dumps get: that of arenas.
    pub arenas: usize,
    pub rings: usize,
}

impl Holdings {
    pub fn now() -> Self {
        let count = |folder| fs::read_dir(folder).unwrap().count();
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut arenas, mut bytes) = (0, 0);
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap_or("");
            if let Some((start, end)) = first.split_once('-') {
                let address = |text| usize::from_str_radix(text, 16).unwrap();
                bytes = address(end) - address(start);
            } else if line.starts_with("VmFlags:") && line.contains(" dc ") && line.contains(" dd ") {
                arenas += bytes;
            }
        }
        let rings = maps.matches("[io_uring]").count();
        Self { descriptors: count("/proc/self/fd"), threads: threads(0), arenas, rings }
    }

    /// Whether no thread has ended that is not gone yet, nor the kernel has one for a ring that is not there any more.
    fn nothing_ends(&self) -> bool {
        threads(if self.rings == 0 { ENDED | OF_THE_KERNEL } else { ENDED }) == self.threads
    }

    /// What they are when nothing changes, and no thread of the kernel's for a ring and none that has ended counts for a limit.
    pub fn at_rest() -> Self {
        let mut before = Self::now();
        for _ in 0..2000 {
            let at_rest = (0..10).all(|_| {
                thread::sleep(Duration::from_millis(5));
                Self::now() == before && before.nothing_ends()
            });
            if at_rest {
                break;
            }
            before = Self::now();
        }
        before
    }

    /// Whether the process comes back to these; what the kernel still does for it may take a moment.
    pub fn assert_back(&self, what: &str) {
        for _ in 0..1000 {
            if Self::now() == *self && self.nothing_ends() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(Self::now(), *self, "{what}");
    }
}
