//! A worker as the tuner sees it: started, listened to, ended. Whatever it does costs its own configuration alone.

use std::{
    env,
    ffi::OsString,
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    ptr, thread,
    time::{Duration, Instant},
};

use super::worker::{Task, VARIABLE, WorkerMessage};

/// Longest line that a worker may write. Every message is far shorter.
const LONGEST: usize = 1 << 16;

/// How much of what a worker writes to stderr is kept, from the end.
const KEPT: usize = 1 << 12;

/// How long the search sleeps at most before it asks whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// How long a worker that is done, or has closed its channel, may take to end.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a worker may take to end after it was killed. Memory by the hundred gigabytes is not given back at once.
const DEATH: Duration = Duration::from_secs(60);

/// A message that was sent in time is also there in time.
const DELIVERY: Duration = Duration::from_millis(20);

/// What one configuration came to.
#[derive(Debug)]
pub(super) enum End {
    Done,
    /// A measured run was over the limit, in seconds.
    Stopped(f64),
    Refused(String),
    /// The search is to end; nothing is known of the configuration.
    Interrupted,
}

/// What a worker is held to.
pub(super) struct Limits<'a> {
    pub(super) arguments: &'a [OsString],
    /// For the set-up, and for each run.
    pub(super) patience: Duration,
    /// Bytes of private memory.
    pub(super) memory: Option<u64>,
    /// Seconds that a measured run may take.
    pub(super) measured: Option<f64>,
}

/// Measures one configuration in a process of its own. `tell` is told of every run, its number and seconds, and asked a few
/// times a second whether to go on.
///
/// # Errors
/// The worker could not be started, which says nothing of the configuration.
pub(super) fn measure(
    task: &Task,
    limits: &Limits<'_>,
    mut tell: impl FnMut(Option<(usize, f64)>) -> bool,
) -> io::Result<(Vec<f64>, End)> {
    let mut runs = Vec::with_capacity(task.runs);
    let mut worker = WorkerProcess::start(task, limits)?;
    let end = watch(&mut worker, task, limits, &mut runs, &mut tell);
    Ok((runs, end))
}

fn watch(
    worker: &mut WorkerProcess,
    task: &Task,
    limits: &Limits<'_>,
    runs: &mut Vec<f64>,
    tell: &mut impl FnMut(Option<(usize, f64)>) -> bool,
) -> End {
    // What is longer than that has no end.
    let after = |time: Duration| Instant::now().checked_add(time);
    let sleep = Duration::try_from_secs_f64(task.sleep).unwrap_or_default();
    let (mut begun, mut deadline) = (false, after(limits.patience));
    loop {
        // The first run is not measured.
        let limit = limits.measured.filter(|_| begun && !runs.is_empty());
        let line = match worker.hear(deadline, || tell(None)) {
            Heard::Line(line) => line,
            Heard::Interrupted => return End::Interrupted,
            Heard::Late => {
                let patience = limits.patience.as_secs_f64();
                // Where the patience was over first, nobody saw the run take that long.
                if let Some(limit) = limit.filter(|limit| *limit <= patience) {
                    return End::Stopped(limit);
                }
                let (what, seconds) = match (begun, runs.len()) {
                    (true, before) => (format!("run {}", before + 1), patience),
                    (false, 0) => ("its set-up".into(), patience),
                    (false, before) => (format!("the pause after run {before}"), patience + sleep.as_secs_f64()),
                };
                return End::Refused(format!("hung: {what} took more than {seconds} s; killed"));
            }
            Heard::Closed => return End::Refused(worker.obituary()),
            Heard::Nonsense(text) => return End::Refused(text),
        };
        match serde_json::from_slice(&line) {
            Ok(WorkerMessage::Begun) if !begun => {
                begun = true;
                let measured = limits
                    .measured
                    .filter(|_| !runs.is_empty())
                    .and_then(|limit| Some(Duration::try_from_secs_f64(limit).ok()?.saturating_add(DELIVERY)));
                deadline = after(measured.map_or(limits.patience, |limit| limit.min(limits.patience)));
            }
            Ok(WorkerMessage::Took(seconds)) if begun && seconds >= 0.0 => {
                begun = false;
                runs.push(seconds);
                let goes_on = tell(Some((runs.len(), seconds)));
                if let Some(limit) = limit.filter(|limit| seconds > *limit) {
                    return End::Stopped(limit);
                }
                if runs.len() == task.runs {
                    worker.wait();
                    return End::Done;
                }
                if !goes_on {
                    return End::Interrupted;
                }
                deadline = after(limits.patience.saturating_add(sleep));
            }
            Ok(WorkerMessage::Refused(reason)) => return End::Refused(reason),
            _ => return End::Refused(nonsense(&line)),
        }
    }
}

fn nonsense(line: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(line).chars().take(60).collect();
    format!("wrote nonsense on its channel: {text:?}")
}

enum Heard {
    Line(Vec<u8>),
    /// The other end is closed, most likely since the process has ended.
    Closed,
    Late,
    Interrupted,
    Nonsense(String),
}

struct WorkerProcess {
    child: Child,
    /// Whether it was ended, with all in its group.
    ended: bool,
    /// In that group, so that the group's id is not free while this lives.
    guardian: Guardian,
    channel: UnixStream,
    /// What has come and is not a whole line yet.
    heard: Vec<u8>,
    /// Of a socket too, since that can be read without waiting.
    stderr: UnixStream,
    /// Whether that is closed.
    silent: bool,
    /// The end of what it wrote there.
    said: Vec<u8>,
}

impl WorkerProcess {
    fn start(task: &Task, limits: &Limits<'_>) -> io::Result<Self> {
        // Before there are sockets that it could hold open.
        let guardian = Guardian::start()?;
        let ((channel, theirs), (stderr, its_stderr)) = (UnixStream::pair()?, UnixStream::pair()?);
        channel.set_nonblocking(true)?;
        stderr.set_nonblocking(true)?;
        let (descriptor, memory) = (theirs.as_raw_fd(), limits.memory);
        // SAFETY: no memory is involved.
        let parent = unsafe { libc::getpid() };
        // This very program, also where its file has been replaced since.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(env::args_os().next().unwrap_or_default())
            .args(limits.arguments)
            .env(VARIABLE, format!("{descriptor},{parent}"));
        // A group of its own: Ctrl-C on the terminal reaches the tuner alone, and what the worker starts ends with it, unless
        // it makes a session of its own. The worker, which leads the group, cannot.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(OwnedFd::from(its_stderr)).process_group(0);
        // SAFETY: nothing but system calls, on values that were copied.
        unsafe { command.pre_exec(move || prepare(parent, descriptor, memory)) };
        let mut worker = Self {
            child: command.spawn()?,
            ended: false,
            guardian,
            channel,
            heard: Vec::new(),
            stderr,
            silent: false,
            said: Vec::new(),
        };
        // Before the worker has its task, without which it does nothing.
        worker.guardian.join(worker.group())?;
        let line = serde_json::to_string(task).map_err(io::Error::other)? + "\n";
        // A few hundred bytes, which the socket has room for. Where the worker is gone already, its end says why.
        let _ = worker.channel.write_all(line.as_bytes());
        Ok(worker)
    }

    /// The next line, unless something else comes first.
    fn hear(&mut self, deadline: Option<Instant>, mut goes_on: impl FnMut() -> bool) -> Heard {
        let mut late = false;
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                return Heard::Line(self.heard.drain(..=end).collect());
            }
            if self.heard.len() > LONGEST {
                return Heard::Nonsense(nonsense(&self.heard));
            }
            // Also one that never stops writing, but never ends its line.
            if late {
                return Heard::Late;
            }
            if !goes_on() {
                return Heard::Interrupted;
            }
            let left = deadline.map_or(TICK, |deadline| deadline.saturating_duration_since(Instant::now()));
            late = left.is_zero();
            self.sleep(left.min(TICK));
            self.listen();
            let mut bytes = [0; 4096];
            match self.channel.read(&mut bytes) {
                Ok(0) => return Heard::Closed,
                Ok(count) => self.heard.extend(&bytes[..count]),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Heard::Closed,
                Err(_) => {}
            }
        }
    }

    /// Until there is something to read, or a signal comes.
    fn sleep(&self, most: Duration) {
        let files = [&self.channel, &self.stderr];
        let mut files = files.map(|file| libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 });
        if self.silent {
            // It is at its end, and would wake us at once.
            files[1].fd = -1;
        }
        // SAFETY: the array is the call's while it runs.
        unsafe { libc::poll(files.as_mut_ptr(), 2, most.as_micros().div_ceil(1000) as libc::c_int) };
    }

    /// Keeps the end of what the worker wrote to stderr so far.
    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        // A worker that never stops writing must not keep the search.
        for _ in 0..64 {
            match self.stderr.read(&mut bytes) {
                Ok(count @ 1..) => {
                    self.said.extend(&bytes[..count]);
                    self.said.drain(..self.said.len().saturating_sub(KEPT));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => return self.silent = true,
            }
        }
    }

    /// Waits for the process to end by itself, for a while, and ends it otherwise. `None` if it had to.
    fn wait(&mut self) -> Option<ExitStatus> {
        let by_itself = self.ends_within(FAREWELL);
        self.kill().filter(|_| by_itself)
    }

    /// Waits for the process to end; its id is not free yet then.
    fn ends_within(&mut self, most: Duration) -> bool {
        let start = Instant::now();
        loop {
            let has_ended = self.has_ended();
            self.listen();
            if has_ended || start.elapsed() > most {
                return has_ended;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn has_ended(&self) -> bool {
        // SAFETY: all zeros are a value of it.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        let how = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // It fails where the host has the system wait for all its children.
        // SAFETY: the structure is the call's; whatever was not filled in stays zero.
        unsafe { libc::waitid(libc::P_PID, self.child.id(), &raw mut info, how) != 0 || info.si_pid() != 0 }
    }

    fn group(&self) -> libc::pid_t {
        self.child.id() as libc::pid_t
    }

    /// Ends the process and all in its group, and waits for it.
    fn kill(&mut self) -> Option<ExitStatus> {
        self.ended = true;
        // SAFETY: no memory is involved. The group is the worker's own, whose id is not free before it was waited for.
        unsafe { libc::kill(-self.group(), libc::SIGKILL) };
        // One that is stuck in a driver ends when that lets go of it, but must not keep the search.
        self.ends_within(DEATH);
        self.child.try_wait().ok().flatten()
    }

    /// Why a process that closed its channel did so.
    fn obituary(&mut self) -> String {
        let status = self.wait();
        let said = String::from_utf8_lossy(&self.said);
        let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(3)..].join(" / ");
        let what = match status {
            Some(status) => format!("ended before it was done ({status})"),
            None => "closed its channel and did not end; killed".into(),
        };
        if last.is_empty() { what } else { format!("{what}: {last}") }
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        // Also where the process has ended: what it started may not have.
        if !self.ended {
            self.kill();
        }
    }
}

/// A process that ends the worker's group when the tuner is gone. The system ends a worker with the tuner, but not what the worker
/// started, and a worker that hangs or is stopped cannot.
struct Guardian(libc::pid_t);

impl Guardian {
    fn start() -> io::Result<Self> {
        // SAFETY: the calls write to sets that live here. The new process does nothing but system calls, as it must where other
        // threads may have held locks.
        unsafe {
            let (parent, group) = (libc::getpid(), libc::getpgrp());
            let [mut all, mut before]: [libc::sigset_t; 2] = mem::zeroed();
            libc::sigfillset(&raw mut all);
            // The host's handlers are not to run there.
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            let id = libc::fork();
            if id == 0 {
                guard(parent, group);
            }
            let started = if id < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(id)) };
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
            started
        }
    }

    fn join(&self, group: libc::pid_t) -> io::Result<()> {
        // SAFETY: no memory is involved.
        if unsafe { libc::setpgid(self.0, group) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // SAFETY: no memory is involved. The id is not free before it was waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, ptr::null_mut(), 0);
        }
    }
}

/// The guardian's life, with all signals blocked: until the tuner, whose group is `group`, is not its parent any more.
fn guard(tuner: libc::pid_t, group: libc::pid_t) -> ! {
    // SAFETY: system calls on a set of their own. Nothing of the tuner's is used that could need the descriptors.
    unsafe {
        // When a thread of the tuner ends, and not a pipe at its end, which whatever else the host forks would hold open. This
        // signal also wakes a group that was stopped.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGCONT);
        // What the tuner closes is to be closed. Linux before 5.9 lacks the call.
        if libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) != 0 {
            (0..1 << 16).for_each(|descriptor| _ = libc::close(descriptor));
        }
        let mut awaited: libc::sigset_t = mem::zeroed();
        libc::sigaddset(&raw mut awaited, libc::SIGCONT);
        while libc::getppid() == tuner {
            libc::sigwaitinfo(&raw const awaited, ptr::null_mut());
        }
        // Itself too. It has no worker yet where it is still in the tuner's group.
        if libc::getpgrp() != group {
            libc::kill(0, libc::SIGKILL);
        }
        libc::_exit(0)
    }
}

/// In the new process, before it becomes the program: it does not outlive the tuner, and is held to its limits.
fn prepare(parent: libc::pid_t, descriptor: RawFd, memory: Option<u64>) -> io::Result<()> {
    let checked = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // A core of gigabytes is of no use to anybody.
    let limits = [(libc::RLIMIT_CORE, Some(0)), (libc::RLIMIT_DATA, memory)];
    // SAFETY: system calls on a structure of their own.
    unsafe {
        // The signal comes when the thread ends that started this process; it waits for this process.
        checked(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() != parent {
            // It ended before the call above.
            libc::_exit(1);
        }
        checked(libc::fcntl(descriptor, libc::F_SETFD, 0))?;
        for (resource, bytes) in limits {
            if let Some(bytes) = bytes {
                let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                checked(libc::getrlimit(resource, &raw mut limit))?;
                // Never more than the user allows.
                limit.rlim_cur = bytes.min(limit.rlim_cur);
                checked(libc::setrlimit(resource, &raw const limit))?;
            }
        }
    }
    Ok(())
}
