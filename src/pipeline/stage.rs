//! The loop that every pipeline thread runs: advance the stage, sleep when it cannot, start over when the epoch changes,
//! stop when told to.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, mpsc},
    thread,
};

use crate::{
    error::{Error, Result},
    pipeline::link::{Entry, Inlet, Message, Outlet},
    sync::{self, AtomicBool, AtomicU64, Mutex, Ordering, Signal},
    trace::{Activity, Carried, Mark, Stage, Trace},
};

/// What all threads of a streamer share.
pub(crate) struct Control {
    epoch: AtomicU64,
    /// The epoch that was cancelled last; 0 if none was.
    cancelled: AtomicU64,
    stop: AtomicBool,
    /// The first error of the epoch it is tagged with; with [`FATAL`] the streamer is beyond use.
    error: Mutex<Option<(u64, Error)>>,
    /// One for each thread that may sleep, the caller's last.
    signals: Vec<Arc<Signal>>,
    pub(crate) trace: Trace,
}

const FATAL: u64 = u64::MAX;

impl Control {
    pub(crate) fn new(signals: Vec<Arc<Signal>>, trace: Trace) -> Arc<Self> {
        Arc::new(Self {
            epoch: AtomicU64::new(1),
            cancelled: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            error: Mutex::new(None),
            signals,
            trace,
        })
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Sends every stage back to the first unit.
    pub(crate) fn rewind(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.notify_all();
    }

    /// Ends the present epoch for the caller's side, whichever thread that is waiting in.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(self.epoch(), Ordering::SeqCst);
        self.notify_all();
    }

    pub(crate) fn is_cancelled(&self, epoch: u64) -> bool {
        self.cancelled.load(Ordering::SeqCst) == epoch
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.notify_all();
    }

    fn notify_all(&self) {
        self.signals.iter().for_each(|signal| signal.notify());
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Keeps `error` as the epoch's, unless there is one.
    pub(crate) fn fail(&self, epoch: u64, error: Error) {
        if self.keep(epoch, &error) {
            self.trace.mark(&Mark::Failed(error));
        }
    }

    /// Keeps `error` for good, unless there is such a one, and wakes everyone.
    pub(crate) fn fail_for_good(&self, error: Error) {
        let is_first = self.keep(FATAL, &error);
        self.notify_all();
        if is_first {
            self.trace.mark(&Mark::Failed(error));
        }
    }

    /// Whether it is the first of the epoch. The observer is told without the lock: it may take its time, or cancel.
    fn keep(&self, epoch: u64, error: &Error) -> bool {
        let mut kept = self.error.lock().expect("nothing panics under this lock");
        let is_first = kept.as_ref().is_none_or(|(of, _)| *of < epoch);
        if is_first {
            *kept = Some((epoch, error.clone()));
        }
        is_first
    }

    /// The error of `epoch`, if it has failed.
    pub(crate) fn error_of(&self, epoch: u64) -> Option<Error> {
        let kept = self.error.lock().expect("nothing panics under this lock");
        kept.as_ref().filter(|(of, _)| *of == epoch || *of == FATAL).map(|(_, error)| error.clone())
    }

    /// Waits for the next unit of `epoch`, on the caller's side, which sleeps on `signal`. The first error of the epoch comes
    /// in its place in the order, a cancel or the end of the streamer at once.
    pub(crate) fn next_entry(&self, epoch: u64, inlet: &mut Inlet, signal: &Signal) -> Result<Entry> {
        loop {
            let ticket = signal.ticket();
            if let Some(error) = self.fatal() {
                return Err(error);
            }
            if self.is_cancelled(epoch) {
                return Err(Error::Cancelled);
            }
            let Some(message) = inlet.peek(epoch) else {
                inlet.nudge();
                signal.wait(ticket);
                continue;
            };
            inlet.take();
            return match message {
                Message::Unit(entry) => Ok(entry),
                Message::Failed { .. } => Err(self.error_of(epoch).expect("an epoch fails with an error")),
            };
        }
    }

    /// The error that ended the streamer, if one did.
    pub(crate) fn fatal(&self) -> Option<Error> {
        self.error_of(FATAL)
    }
}

/// How a stage's attempt to advance went.
pub(crate) enum Advanced {
    /// A unit is ready to be handed on, which the loop does once it has counted what was moved with it: whoever has a unit finds
    /// it in the sums. A unit that is kept further on passes with nothing moved.
    Ready { entry: Entry, ends_pass: bool, moved: Option<Carried> },
    /// It did something, no unit is done yet.
    Moved,
    /// It can do nothing before its own work, which is under way elsewhere, is done.
    Working,
    /// It can do nothing before another stage does: starved or blocked.
    Waiting(Activity),
    /// The stage before failed at this unit.
    Failed { unit: usize },
}

/// One stage, advanced by the thread that owns it.
pub(crate) trait Advance: Send {
    const STAGE: Stage;

    /// Called first, in the stage's thread.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    /// Does what can be done without waiting, or a little of it. After an error, with the unit at fault, it is not called
    /// again in this epoch.
    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)>;

    /// Sleeps until there may be something to do, usually until `signal` is notified after `ticket`.
    fn wait(&mut self, signal: &Signal, ticket: u32) -> Result<(), (usize, Error)> {
        signal.wait(ticket);
        Ok(())
    }

    /// Goes back to the first unit. Returns when nothing of the old epoch is under way in this stage.
    fn rewind(&mut self) {}

    fn outlet(&mut self) -> &mut Outlet;

    /// Called last: waits for what the stage has set going. After an error the memory it uses must stay mapped.
    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Runs `stage` in a thread of its own until [`Control::stop`].
pub(crate) fn spawn<S: Advance + 'static>(mut stage: S, control: Arc<Control>, signal: Arc<Signal>) -> Result<Running> {
    let name = S::STAGE.name();
    let ending = Arc::new(AtomicBool::new(false));
    let (ends, (ended, outcome)) = (ending.clone(), mpsc::sync_channel(1));
    let begin = move || {
        let begun = panic::catch_unwind(AssertUnwindSafe(|| stage.begin()));
        (stage, begun)
    };
    let work = move |(mut stage, begun): (S, thread::Result<Result<()>>)| {
        let outcome = begun.and_then(|begun| match begun {
            Ok(()) => panic::catch_unwind(AssertUnwindSafe(|| run(&mut stage, &control, &signal))),
            Err(error) => {
                control.fail_for_good(error);
                Ok(())
            }
        });
        if let Err(payload) = outcome {
            control.fail_for_good(Error::Panicked { stage: name, message: panic_message(&*payload) });
        }
        ends.store(true, Ordering::Release);
        let idle = panic::catch_unwind(AssertUnwindSafe(|| stage.end().is_ok())).unwrap_or(false);
        if !idle {
            // The device may still use the stage's own memory.
            std::mem::forget(stage);
        }
        let _ = ended.send(idle);
    };
    let failed = |source: std::io::Error| Error::Thread { stage: name, source: source.into() };
    let thread = sync::spawn(&format!("ls-{name}"), begin, work).map_err(failed)?;
    Ok(Running { thread, ending, outcome, reads: S::STAGE == Stage::Read })
}

/// A stage's thread.
pub(crate) struct Running {
    thread: thread::JoinHandle<()>,
    /// It has left its loop.
    ending: Arc<AtomicBool>,
    /// What it says last: whether the stage's memory is idle.
    outcome: mpsc::Receiver<bool>,
    reads: bool,
}

impl Running {
    /// Waits for its end, after it was told to stop. False if it, or what it enqueued, may still use memory. A thread that reads
    /// is left to itself then: where a file system's server is gone it may be in a call that never returns, and the kernel lets
    /// no thread go that has a read under way in a ring.
    pub(crate) fn join(self) -> bool {
        let left = || usize::from(!self.ending.load(Ordering::Acquire));
        if self.reads && !sync::until_none(sync::STILL, left) {
            return false;
        }
        let idle = self.outcome.recv().unwrap_or(false);
        if self.reads && !idle {
            return false;
        }
        self.thread.join().is_ok() && idle
    }
}

/// The loop itself.
pub(crate) fn run<S: Advance>(stage: &mut S, control: &Control, signal: &Signal) {
    let mut epoch = control.epoch();
    // In a failed epoch: at which unit, and whether the next stage has been told.
    let mut failed: Option<(usize, bool)> = None;
    let trace = &control.trace;
    trace.enter(S::STAGE);
    loop {
        let ticket = signal.ticket();
        if control.stopped() {
            return;
        }
        if control.epoch() != epoch {
            epoch = control.epoch();
            stage.rewind();
            stage.outlet().discard_pending();
            trace.trip_left(S::STAGE);
            failed = None;
        }
        if let Some((unit, told)) = &mut failed {
            *told = *told || stage.outlet().fail(epoch, *unit);
            let wait = trace.begin(S::STAGE, Activity::Blocked, 0);
            signal.wait(ticket);
            trace.end(wait);
            continue;
        }
        let mut fail = |(unit, error)| {
            control.fail(epoch, error);
            failed = Some((unit, false));
        };
        match stage.advance(epoch) {
            Ok(Advanced::Ready { entry, ends_pass, moved }) => {
                if let Some(carried) = moved {
                    trace.count(S::STAGE, carried);
                }
                if ends_pass {
                    trace.trip_ended(S::STAGE);
                }
                stage.outlet().publish(entry, ends_pass);
            }
            Ok(Advanced::Moved) => {}
            Ok(Advanced::Working) => {
                if let Err(error) = stage.wait(signal, ticket) {
                    fail(error);
                }
            }
            Ok(Advanced::Waiting(activity)) => {
                let wait = trace.begin(S::STAGE, activity, 0);
                let outcome = stage.wait(signal, ticket);
                trace.end(wait);
                if let Err(error) = outcome {
                    fail(error);
                }
            }
            Ok(Advanced::Failed { unit }) => failed = Some((unit, false)),
            Err(error) => fail(error),
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
