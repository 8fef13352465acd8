//! The process that measures one configuration, and what it and the tuner say to each other.
//!
//! ```text
//! tuner  → worker   Task                            one JSON object a line, on a socket of their own, so that whatever the
//! worker → tuner    Begun, Took, Begun, Took, …     host prints does no harm
//!                   or Refused, and the end
//! ```

use std::{
    env,
    fmt::Display,
    fs,
    io::{BufRead, BufReader, Write},
    os::{fd::FromRawFd, unix::net::UnixStream},
    process, thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::plan::Placement;

/// Set for a worker: the number of the descriptor of its end of the socket, a comma, and the process that started it.
pub(super) const VARIABLE: &str = "LAYER_STREAMER_TUNER_WORKER";

/// What a worker is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) placement: Placement,
    pub(super) runs: usize,
    /// Seconds between runs.
    pub(super) sleep: f64,
}

/// What it says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum WorkerMessage {
    /// A run begins.
    Begun,
    /// It has ended, after so many seconds.
    Took(f64),
    /// The set-up, or a run, failed for this reason.
    Refused(String),
}

/// Call it first of all in `main`. In a process that a [`Tuner`](super::Tuner) started it never returns: it has `setup` make
/// the streamer, or whatever the host has on top of one, with the placement given, runs the closure that this returns once per
/// run, and ends the process. In any other process it returns at once.
///
/// The closure runs one pass and returns when the device is done with it: on a GPU it [drains](crate::device::Device::drain) the stream. An error of
/// either is reported as the reason why there is no time for these settings, and so is whatever else ends the process.
pub fn worker<P, E>(setup: impl FnOnce(Placement) -> Result<P, E>)
where
    P: FnMut() -> Result<(), E>,
    E: Display,
{
    worker_by(setup, |pass| {
        let start = Instant::now();
        pass().map(|()| start.elapsed().as_secs_f64())
    });
}

/// The same, where `time` runs a pass and says how many seconds that took.
pub(super) fn worker_by<P, E: Display>(
    setup: impl FnOnce(Placement) -> Result<P, E>,
    time: impl Fn(&mut P) -> Result<f64, E>,
) {
    let Some(channel) = channel() else { return };
    // Should memory run out, it is not the tuner that is killed. A system that does not know of this loses nothing.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let code = match serve(&channel, setup, time) {
        Ok(()) => 0,
        // The tuner is gone, and with it whoever wants to know.
        Err(_) => 1,
    };
    process::exit(code);
}

/// Whether this process was started as a worker.
pub(super) fn is_worker() -> bool {
    descriptor().is_some()
}

fn descriptor() -> Option<i32> {
    let text = env::var(VARIABLE).ok()?;
    let (descriptor, parent) = text.split_once(',')?;
    // What a worker starts inherits the variable, but not the descriptor.
    // SAFETY: no memory is involved.
    (parent.parse() == Ok(unsafe { libc::getppid() })).then_some(())?;
    descriptor.parse().ok()
}

fn channel() -> Option<UnixStream> {
    let descriptor = descriptor()?;
    // What the host starts is not to have it, or the tuner would wait for that process too.
    // SAFETY: no memory is involved.
    (unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } == 0).then_some(())?;
    // SAFETY: the tuner opened it for this process alone, which has not touched it yet.
    Some(unsafe { UnixStream::from_raw_fd(descriptor) })
}

fn serve<P, E: Display>(
    channel: &UnixStream,
    setup: impl FnOnce(Placement) -> Result<P, E>,
    time: impl Fn(&mut P) -> Result<f64, E>,
) -> std::io::Result<()> {
    let say = |message: &WorkerMessage| {
        let line = serde_json::to_string(message).map_err(std::io::Error::other)? + "\n";
        (&mut &*channel).write_all(line.as_bytes())
    };
    let mut line = String::new();
    BufReader::new(channel).read_line(&mut line)?;
    let task: Task = serde_json::from_str(&line).map_err(std::io::Error::other)?;
    let mut pass = match setup(task.placement) {
        Ok(pass) => pass,
        Err(error) => return say(&WorkerMessage::Refused(error.to_string())),
    };
    for run in 0..task.runs {
        if run > 0 {
            thread::sleep(Duration::try_from_secs_f64(task.sleep).unwrap_or_default());
        }
        say(&WorkerMessage::Begun)?;
        match time(&mut pass) {
            Ok(took) => say(&WorkerMessage::Took(took))?,
            Err(error) => return say(&WorkerMessage::Refused(error.to_string())),
        }
    }
    Ok(())
}
