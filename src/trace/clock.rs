//! The clock by which spans are timed. Tests may put a simulated one in its place, which stands still while anything runs.

/// The time.
#[cfg(any(not(test), loom))]
pub(super) fn now() -> std::time::Instant {
    std::time::Instant::now()
}

#[cfg(all(test, not(loom)))]
pub(super) use simulated::now;

/// A clock on which what takes time is said, and nothing else takes any, however busy the machine is.
///
/// It goes on to the next moment at which a sleeper is due when all threads of the process are asleep: then nothing happens
/// before that moment. So it is for a process in which one test runs alone.
#[cfg(all(test, not(loom)))]
pub(crate) mod simulated {
    use std::{
        fs,
        sync::{Condvar, Mutex, PoisonError},
        thread,
        time::{Duration, Instant},
    };

    struct Time {
        now: Instant,
        /// When sleepers are due, in no order.
        due: Vec<Instant>,
    }

    /// Absent where the system's clock counts.
    static TIME: Mutex<Option<Time>> = Mutex::new(None);
    static MOVED: Condvar = Condvar::new();

    /// From now on, for good, the clock is simulated.
    pub(crate) fn begin() {
        *lock() = Some(Time { now: Instant::now(), due: Vec::new() });
        thread::spawn(|| {
            loop {
                let before = asleep();
                if before.is_some() && asleep() == before {
                    go_on();
                }
                thread::sleep(Duration::from_micros(20));
            }
        });
    }

    fn lock() -> std::sync::MutexGuard<'static, Option<Time>> {
        // A test that fails while it sleeps says why by itself.
        TIME.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now() -> Instant {
        lock().as_ref().map_or_else(Instant::now, |time| time.now)
    }

    /// Sleeps by this clock, or by the system's where it is not simulated.
    pub(crate) fn sleep(time: Duration) {
        sleep_until(now() + time);
    }

    pub(crate) fn sleep_until(due: Instant) {
        let mut time = lock();
        match &mut *time {
            None => {
                drop(time);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            Some(time) if due <= time.now => {}
            Some(simulated) => {
                simulated.due.push(due);
                let still = |time: &mut Option<Time>| time.as_ref().is_some_and(|time| time.now < due);
                drop(MOVED.wait_while(time, still).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    fn go_on() {
        let mut time = lock();
        let simulated = time.as_mut().expect("it is simulated");
        if let Some(&next) = simulated.due.iter().min() {
            simulated.now = next;
            simulated.due.retain(|due| *due > next);
            drop(time);
            MOVED.notify_all();
        }
    }

    /// All threads but this one and how often each has gone to sleep, if all of them sleep now. Where two looks find the same,
    /// all slept between the two.
    fn asleep() -> Option<Vec<(String, String)>> {
        // SAFETY: without arguments, and it cannot fail.
        let own = unsafe { libc::gettid() }.to_string();
        let mut found = Vec::new();
        for task in fs::read_dir("/proc/self/task").ok()? {
            let name = task.ok()?.file_name().into_string().ok()?;
            if name == own {
                continue;
            }
            let status = fs::read_to_string(format!("/proc/self/task/{name}/status")).ok()?;
            let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
            if !field("State:")?.starts_with('S') {
                return None;
            }
            let switches = field("voluntary_ctxt_switches:")?.to_owned();
            found.push((name, switches));
        }
        Some(found)
    }
}
