//! What people see while nothing else is to be seen.

use std::{
    io::{self, IsTerminal, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use layer_streamer::trace::{Mark, Observer};

/// Whatever takes longer than this is told.
const SOON: Duration = Duration::from_millis(700);

/// Says on stderr what takes so long, once it does, until it is dropped.
pub struct Waiting(Option<mpsc::Sender<()>>, Option<thread::JoinHandle<()>>);

impl Waiting {
    pub fn on(what: &'static str, quiet: bool) -> Self {
        if quiet {
            return Self(None, None);
        }
        let (done, ends) = mpsc::channel::<()>();
        let tell = move || {
            if ends.recv_timeout(SOON) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            if io::stderr().is_terminal() {
                let spinner = ProgressBar::new_spinner().with_message(format!("{what} …"));
                spinner.enable_steady_tick(Duration::from_millis(100));
                let _ = ends.recv();
                spinner.finish_and_clear();
            } else {
                // In one piece; stderr may be closed, which is no reason to stop.
                let _ = io::stderr().write_all(format!("{what} …\n").as_bytes());
            }
        };
        Self(Some(done), thread::Builder::new().spawn(tell).ok())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.take();
        // The spinner is gone before anything else is said.
        let _ = self.1.take().map(thread::JoinHandle::join);
    }
}

/// How many of so many bytes are done.
pub fn progress(bytes: u64, quiet: bool) -> ProgressBar {
    let template = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    ProgressBar::with_draw_target(Some(bytes), target).with_style(style).with_finish(ProgressFinish::AndClear)
}

/// Says on stderr which file does not answer.
pub struct Silence;

impl Observer for Silence {
    fn mark(&self, mark: &Mark) {
        if let Mark::Silent { file, since } = mark {
            let seconds = since.as_secs();
            let line =
                format!("waiting for {}: no read has ended for {seconds} s; Ctrl-C ends the wait\n", file.display());
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }
}
