//! A program on a terminal of its own, with someone who types and reads.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus},
    ptr,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

/// Nothing that is waited for takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    /// What was shown since the last text that was waited for.
    shown: String,
}

impl Terminal {
    /// Starts a program on a new terminal, of 100 columns.
    pub fn start(mut command: Command) -> Self {
        let size = libc::winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let (mut ours, mut theirs) = (0, 0);
        // SAFETY: the call writes two descriptors and reads the size; it takes null for a name and for settings.
        let opened = unsafe { libc::openpty(&mut ours, &mut theirs, ptr::null_mut(), ptr::null(), &raw const size) };
        assert_eq!(opened, 0, "{}", io::Error::last_os_error());
        // SAFETY: both were opened just now, and nothing else owns them.
        let [ours, theirs] = [ours, theirs].map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) });
        let of = |end: &OwnedFd| end.try_clone().unwrap();
        command.stdin(of(&theirs)).stdout(of(&theirs)).stderr(of(&theirs)).env("TERM", "xterm");
        let terminal = theirs.as_raw_fd();
        // SAFETY: the calls are allowed between fork and exec, and the descriptor is open in the child too.
        unsafe {
            command.pre_exec(move || match libc::setsid() >= 0 && libc::ioctl(terminal, libc::TIOCSCTTY, 0) == 0 {
                true => Ok(()),
                false => Err(io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        drop((command, theirs));
        let (keyboard, mut screen) = (File::from(of(&ours)), File::from(ours));
        let (seen, shown) = mpsc::channel();
        // Ends when the program has let go of the terminal.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                if seen.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard, screen: shown, shown: String::new() }
    }

    /// Types keys.
    pub fn send(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown, after what was waited for before.
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return;
            }
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("{text:?} was waited for in vain, after {:?}", self.shown)
                }
            }
        }
    }

    /// How the program ended.
    pub fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end, after {:?}", self.shown);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
