//! All atomics, cells and blocking go through here, so that loom can replace them; and the
//! [`Signal`] on which every pipeline thread sleeps.

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::{JoinHandle, yield_now},
};
#[cfg(not(loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
    },
    thread::{JoinHandle, yield_now},
};

use std::{
    io,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

/// Starts a thread and returns once it has run `begin`, whose result `work` takes: what starting a thread allocates, in the
/// thread too, is then allocated before anything streams. Tools show the thread under its name (feature `nvtx`).
pub(crate) fn spawn<B, T: Send + 'static>(
    name: &str,
    begin: impl FnOnce() -> B + Send + 'static,
    work: impl FnOnce(B) -> T + Send + 'static,
) -> io::Result<thread::JoinHandle<T>> {
    let begun = Arc::new(Barrier::new(2));
    let inside = begun.clone();
    #[cfg(feature = "nvtx")]
    let shown_as = std::ffi::CString::new(name)?;
    let body = move || {
        #[cfg(feature = "nvtx")]
        // SAFETY: the call takes nothing and cannot fail.
        nvtx_sys::name_os_thread_ascii(unsafe { libc::gettid() } as u32, &shown_as);
        let state = begin();
        inside.wait();
        drop(inside);
        work(state)
    };
    let thread = thread::Builder::new().name(name.into()).spawn(body)?;
    begun.wait();
    Ok(thread)
}

/// The same without a beginning, for threads that loom runs in its models.
pub(crate) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    #[cfg(loom)]
    return loom::thread::Builder::new().name(name.into()).spawn(work);
    #[cfg(not(loom))]
    spawn(name, || (), |()| work())
}

/// What comes to an end makes progress within so long a wait; what makes none is taken for something that never does.
pub(crate) const STILL: Duration = Duration::from_millis(500);

/// Waits until `left` counts nothing; false if in a wait of `still` it counted nothing less. While the process was stopped it did
/// not wait.
pub(crate) fn until_none(still: Duration, mut left: impl FnMut() -> usize) -> bool {
    let (mut waited, mut pause, mut least) = (Duration::ZERO, Duration::from_micros(50), usize::MAX);
    loop {
        match left() {
            0 => return true,
            left if left < least => (waited, least) = (Duration::ZERO, left),
            _ if waited > still => return false,
            _ => {}
        }
        let begun = Instant::now();
        thread::sleep(pause);
        waited += begun.elapsed().min(4 * pause);
        pause = (2 * pause).min(Duration::from_millis(1));
    }
}

/// `std::cell::UnsafeCell` with the interface of loom's.
#[cfg(not(loom))]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

/// Wakes one waiting thread: an event count. The waiter takes a [`ticket`](Signal::ticket), looks whether there is work,
/// and if not waits with that ticket; a notification after the ticket was taken ends the wait at once, so none is lost.
pub(crate) struct Signal {
    count: AtomicU32,
    asleep: AtomicBool,
    lock: Mutex<()>,
    woken: Condvar,
}

impl Signal {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            count: AtomicU32::new(0),
            asleep: AtomicBool::new(false),
            lock: Mutex::new(()),
            woken: Condvar::new(),
        })
    }

    /// What to hand to [`wait`](Signal::wait). Take it before looking for work.
    pub(crate) fn ticket(&self) -> u32 {
        self.count.load(Ordering::Acquire)
    }

    /// Says that there may be work. Any thread may call it.
    pub(crate) fn notify(&self) {
        self.count.fetch_add(1, Ordering::Release);
        // A fence on both sides: either this load sees the sleeper, or the sleeper's load of `count` sees the line above.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            // It is being woken: until it sleeps again nobody else has to, each for the price of a system call.
            self.asleep.store(false, Ordering::Relaxed);
            // Taking the lock puts this after the sleeper's last look at `count`, so that the wake-up cannot come too early.
            drop(self.lock.lock());
            self.woken.notify_one();
        }
    }

    /// Returns once there has been a notification since `ticket`: spins briefly, then sleeps. One thread at a time.
    pub(crate) fn wait(&self, ticket: u32) {
        self.sleep(ticket, None);
    }

    /// The same, for so long at most.
    pub(crate) fn wait_for(&self, ticket: u32, time: Duration) {
        self.sleep(ticket, Some(Instant::now() + time));
    }

    fn sleep(&self, ticket: u32, until: Option<Instant>) {
        #[cfg(not(loom))]
        {
            let backoff = crossbeam_utils::Backoff::new();
            while !backoff.is_completed() {
                if self.ticket() != ticket {
                    return;
                }
                backoff.snooze();
            }
        }
        let mut guard = self.lock.lock().expect("nothing panics under this lock");
        loop {
            // Anew each time: a late wake-up may be for the sleep before, and has taken the flag with it.
            self.asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.ticket() != ticket {
                break;
            }
            guard = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.woken.wait(guard).expect("nothing panics under this lock"),
                Some(Duration::ZERO) => break,
                Some(left) => self.woken.wait_timeout(guard, left).expect("nothing panics under this lock").0,
            };
        }
        self.asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn who_was_stopped_while_he_waited_looks_again() {
        let mut looks = 0;
        let left = || {
            looks += 1;
            // As a process that is stopped and goes on.
            thread::sleep(if looks == 2 { 2 * STILL } else { Duration::ZERO });
            usize::from(looks < 5)
        };
        assert!(until_none(STILL, left));
        let begun = Instant::now();
        assert!(!until_none(Duration::from_millis(20), || 1));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }
}
