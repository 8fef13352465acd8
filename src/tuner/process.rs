//! A worker as the tuner sees it: started, listened to, ended. Whatever it does costs its own configuration alone.

use std::{
    env,
    ffi::OsString,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use super::worker::{Message, Task, VARIABLE};

/// Longest line that a worker may write. Every message is far shorter.
const LONGEST: usize = 1 << 16;

/// How much of what a worker writes to stderr is kept, from the end.
const KEPT: usize = 1 << 12;

/// How long the search sleeps at most before it asks whether to go on.
const TICK: Duration = Duration::from_millis(100);

/// How long a worker that is done, or has closed its channel, may take to end.
const FAREWELL: Duration = Duration::from_secs(5);

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
pub(super) fn measure(
    task: &Task,
    limits: &Limits<'_>,
    mut tell: impl FnMut(Option<(usize, f64)>) -> bool,
) -> (Vec<f64>, End) {
    let mut runs = Vec::with_capacity(task.runs);
    let mut worker = match Worker::start(task, limits) {
        Ok(worker) => worker,
        Err(error) => return (runs, End::Refused(format!("cannot start a worker: {error}"))),
    };
    let sleep = Duration::try_from_secs_f64(task.sleep).unwrap_or_default();
    let (mut begun, mut deadline) = (false, Instant::now() + limits.patience);
    loop {
        // The first run is not measured.
        let limit = limits.measured.filter(|_| begun && !runs.is_empty());
        let line = match worker.hear(deadline, || tell(None)) {
            Heard::Line(line) => line,
            Heard::Interrupted => return (runs, End::Interrupted),
            Heard::Late => {
                return match limit {
                    Some(limit) => (runs, End::Stopped(limit)),
                    None => {
                        let what = if begun { format!("run {}", runs.len() + 1) } else { "its set-up".into() };
                        let seconds = limits.patience.as_secs_f64();
                        (runs, End::Refused(format!("hung: {what} took more than {seconds} s; killed")))
                    }
                };
            }
            Heard::Closed => return (runs, End::Refused(worker.obituary())),
            Heard::Nonsense(text) => return (runs, End::Refused(text)),
        };
        match serde_json::from_slice(&line) {
            Ok(Message::Begun) if !begun => {
                begun = true;
                let measured = limits
                    .measured
                    .filter(|_| !runs.is_empty())
                    .and_then(|limit| Some(Duration::try_from_secs_f64(limit).ok()? + DELIVERY));
                deadline = Instant::now() + measured.map_or(limits.patience, |limit| limit.min(limits.patience));
            }
            Ok(Message::Took(seconds)) if begun && seconds >= 0.0 => {
                begun = false;
                runs.push(seconds);
                let goes_on = tell(Some((runs.len(), seconds)));
                if let Some(limit) = limit.filter(|limit| seconds > *limit) {
                    return (runs, End::Stopped(limit));
                }
                if runs.len() == task.runs {
                    worker.wait();
                    return (runs, End::Done);
                }
                if !goes_on {
                    return (runs, End::Interrupted);
                }
                deadline = Instant::now() + sleep + limits.patience;
            }
            Ok(Message::Refused(reason)) => return (runs, End::Refused(reason)),
            _ => return (runs, End::Refused(nonsense(&line))),
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

struct Worker {
    child: Child,
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

impl Worker {
    fn start(task: &Task, limits: &Limits<'_>) -> io::Result<Self> {
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
        // A group of its own: Ctrl-C on the terminal reaches the tuner alone, and what the worker starts ends with it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(OwnedFd::from(its_stderr)).process_group(0);
        // SAFETY: nothing but system calls, on values that were copied.
        unsafe { command.pre_exec(move || prepare(parent, descriptor, memory)) };
        let mut worker =
            Self { child: command.spawn()?, channel, heard: Vec::new(), stderr, silent: false, said: Vec::new() };
        let line = serde_json::to_string(task).map_err(io::Error::other)? + "\n";
        // A few hundred bytes, which the socket has room for. Where the worker is gone already, its end says why.
        let _ = worker.channel.write_all(line.as_bytes());
        Ok(worker)
    }

    /// The next line, unless something else comes first.
    fn hear(&mut self, deadline: Instant, mut goes_on: impl FnMut() -> bool) -> Heard {
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                return Heard::Line(self.heard.drain(..=end).collect());
            }
            if self.heard.len() > LONGEST {
                return Heard::Nonsense(nonsense(&self.heard));
            }
            if !goes_on() {
                return Heard::Interrupted;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.sleep(left.min(TICK));
            self.listen();
            let mut bytes = [0; 4096];
            match self.channel.read(&mut bytes) {
                Ok(0) => return Heard::Closed,
                Ok(count) => self.heard.extend(&bytes[..count]),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Heard::Closed,
                Err(_) if left.is_zero() => return Heard::Late,
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
        let deadline = Instant::now() + FAREWELL;
        while !self.has_ended() && Instant::now() < deadline {
            self.listen();
            std::thread::sleep(Duration::from_millis(1));
        }
        let by_itself = self.has_ended();
        self.listen();
        self.kill().filter(|_| by_itself)
    }

    /// Whether it has ended; its id is not free yet.
    fn has_ended(&self) -> bool {
        // SAFETY: all zeros are a value of it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let how = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: the structure is the call's; whatever was not filled in stays zero.
        unsafe { libc::waitid(libc::P_PID, self.child.id(), &raw mut info, how) == 0 && info.si_pid() != 0 }
    }

    /// Ends the process and all in its group, and waits for it.
    fn kill(&mut self) -> Option<ExitStatus> {
        // SAFETY: no memory is involved. The group is the worker's own, whose id is not free before it was waited for.
        unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
        self.child.wait().ok()
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

impl Drop for Worker {
    fn drop(&mut self) {
        // After `wait` the id may be another's.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill();
        }
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
                // The hard one stays, so that a limit above it is no error.
                limit.rlim_cur = bytes.min(limit.rlim_max);
                checked(libc::setrlimit(resource, &raw const limit))?;
            }
        }
    }
    Ok(())
}
