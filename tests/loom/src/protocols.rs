//! What the stages promise one another, with the real links, control and loop, and stages that move nothing.

use std::sync::Arc;

use loom::{cell::UnsafeCell, model::Builder, thread};

use crate::{
    error::{Error, Result},
    pipeline::{
        link::{Entry, Inlet, Message, Outlet, Place, Slot, link},
        stage::{Advance, Advanced, Control, run},
    },
    sync::Signal,
    trace::{Activity, Stage, Trace},
};

/// Tries every interleaving with at most `preemptions` preemptions, or as many as the environment says.
pub(crate) fn model(preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = 20_000;
    builder.check(f);
}

/// The bytes of a link's slots: loom sees it when two threads may touch one at once.
#[derive(Clone)]
struct Slots(Arc<Vec<UnsafeCell<(u64, usize)>>>);

// SAFETY: loom watches each access.
unsafe impl Send for Slots {}

impl Slots {
    fn new(count: usize) -> Self {
        Self(Arc::new((0..count).map(|_| UnsafeCell::new((0, 0))).collect()))
    }

    fn write(&self, slot: Slot, bytes: (u64, usize)) {
        // SAFETY: loom watches each access.
        self.0[slot.0].with_mut(|to| unsafe { *to = bytes });
    }

    fn read(&self, slot: Slot) -> (u64, usize) {
        // SAFETY: loom watches each access.
        self.0[slot.0].with(|from| unsafe { *from })
    }
}

/// Stands for the read stage: fills slots with unit after unit, or fails at one.
struct Source {
    slots: Slots,
    outlet: Outlet,
    cursor: usize,
    units: usize,
    fails_at: Option<usize>,
    /// How many more units it loads, over all epochs: models must be small.
    left: usize,
}

impl Advance for Source {
    const STAGE: Stage = Stage::Read;

    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)> {
        let unit = self.cursor;
        if self.fails_at == Some(unit) {
            return Err((unit, Error::setting("epoch", epoch.to_string())));
        }
        let slot = if self.left > 0 && self.outlet.room() > 0 { self.outlet.slot() } else { None };
        let Some(slot) = slot else {
            self.outlet.flush_if_starving();
            return Ok(Advanced::Waiting(Activity::Blocked));
        };
        self.left -= 1;
        self.slots.write(slot, (epoch, unit));
        self.cursor = (unit + 1) % self.units;
        let entry = Entry { epoch, unit, pass: 0, place: Place::Slot(slot) };
        Ok(Advanced::Ready { entry, ends_pass: self.cursor == 0, moved: None })
    }

    fn rewind(&mut self) {
        self.cursor = 0;
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }
}

/// Stands for the pin stage.
struct Relay {
    from: Slots,
    to: Slots,
    inlet: Inlet,
    outlet: Outlet,
}

impl Advance for Relay {
    const STAGE: Stage = Stage::Pin;

    fn advance(&mut self, epoch: u64) -> Result<Advanced, (usize, Error)> {
        let Some(message) = self.inlet.peek(epoch) else {
            self.inlet.nudge();
            return Ok(Advanced::Waiting(Activity::Starved));
        };
        let slot = if self.outlet.room() > 0 { self.outlet.slot() } else { None };
        let Some(slot) = slot else {
            self.outlet.flush_if_starving();
            return Ok(Advanced::Waiting(Activity::Blocked));
        };
        self.inlet.take();
        let entry = match message {
            Message::Unit(entry) => entry,
            Message::Failed { unit, .. } => {
                self.outlet.put_back(slot);
                return Ok(Advanced::Failed { unit });
            }
        };
        let Place::Slot(source) = entry.place else { panic!("{entry:?}") };
        self.to.write(slot, self.from.read(source));
        self.inlet.release(source);
        Ok(Advanced::Ready { entry: Entry { place: Place::Slot(slot), ..entry }, ends_pass: true, moved: None })
    }

    fn outlet(&mut self) -> &mut Outlet {
        &mut self.outlet
    }
}

/// A source in a thread of its own and the end from which its units are taken.
struct Streamed {
    control: Arc<Control>,
    signal: Arc<Signal>,
    inlet: Inlet,
    slots: Slots,
    source: Option<thread::JoinHandle<Source>>,
}

impl Streamed {
    /// Of a link with so many slots and such batches, and so many units in a pass and in all.
    fn new([count, batch, units, left]: [usize; 4], fails_at: Option<usize>) -> Self {
        let (read, signal) = (Signal::new(), Signal::new());
        let control = Control::new(vec![read.clone(), signal.clone()], Trace::default());
        let (outlet, inlet) = link(count, 0, batch, &read, &signal);
        let slots = Slots::new(count);
        let mut source = Source { slots: slots.clone(), outlet, cursor: 0, units, fails_at, left };
        let inside = control.clone();
        let source = thread::spawn(move || {
            run(&mut source, &inside, &read);
            source
        });
        Self { control, signal, inlet, slots, source: Some(source) }
    }

    /// The next unit of `epoch`, which must be this one, with its own bytes.
    fn take(&mut self, epoch: u64, unit: usize) -> Slot {
        let entry = self.control.next_entry(epoch, &mut self.inlet, &self.signal).unwrap();
        let Place::Slot(slot) = entry.place else { panic!("{entry:?}") };
        assert_eq!((entry.epoch, entry.unit, self.slots.read(slot)), (epoch, unit, (epoch, unit)));
        slot
    }

    /// The next in order is the error of `epoch`.
    fn fails(&mut self, epoch: u64) {
        let failed = self.control.next_entry(epoch, &mut self.inlet, &self.signal);
        assert!(matches!(failed, Err(Error::Setting { cause, .. }) if cause == epoch.to_string()));
    }

    /// Stops the source; then every slot must be with the producer again, once those in the ring are handed back.
    fn end(&mut self) {
        self.control.stop();
        let mut source = self.source.take().unwrap().join().unwrap();
        assert!(self.inlet.peek(u64::MAX).is_none());
        source.outlet().discard_pending();
        let mut back: Vec<_> = std::iter::from_fn(|| source.outlet.slot()).map(|slot| slot.0).collect();
        back.sort();
        assert_eq!(back, (0..self.slots.0.len()).collect::<Vec<_>>());
    }
}

#[test]
fn loom_units_come_whole_and_in_order_and_a_stage_that_sleeps_is_woken_by_stop() {
    model(2, || {
        let mut streamed = Streamed::new([1, 1, 2, 2], None);
        for unit in [0, 1] {
            let slot = streamed.take(1, unit);
            streamed.inlet.release(slot);
        }
        streamed.end();
    });
}

#[test]
fn loom_a_batch_that_cannot_fill_up_is_handed_over_to_a_consumer_that_waits() {
    model(2, || {
        let mut streamed = Streamed::new([2, 2, 9, 3], None);
        let held = [streamed.take(1, 0), streamed.take(1, 1)];
        streamed.inlet.release(held[0]);
        // One slot is free and one held: the batch of two stays half full.
        let third = streamed.take(1, 2);
        streamed.inlet.release(third);
        streamed.inlet.release(held[1]);
        streamed.end();
    });
}

#[test]
fn loom_after_a_rewind_no_old_unit_is_handed_over_and_no_slot_is_lost() {
    model(2, || {
        let mut streamed = Streamed::new([1, 1, 3, 3], None);
        // Unit 0 of the first epoch is in the ring, being filled, or not begun.
        streamed.control.rewind();
        let epoch = streamed.control.epoch();
        let slot = streamed.take(epoch, 0);
        streamed.inlet.release(slot);
        streamed.end();
    });
}

#[test]
fn loom_an_error_comes_after_what_was_loaded_before() {
    model(2, || {
        let mut streamed = Streamed::new([1, 1, 2, 2], Some(1));
        let slot = streamed.take(1, 0);
        streamed.inlet.release(slot);
        streamed.fails(1);
        streamed.end();
    });
}

#[test]
fn loom_an_error_is_that_of_its_epoch() {
    model(2, || {
        let mut streamed = Streamed::new([1, 1, 2, 2], Some(0));
        streamed.fails(1);
        streamed.control.rewind();
        streamed.fails(2);
        streamed.end();
    });
}

#[test]
fn loom_a_relay_with_old_units_on_both_sides_hands_on_only_new_ones_after_a_rewind() {
    model(2, || {
        let [read, pin, signal] = std::array::from_fn(|_| Signal::new());
        let control = Control::new(vec![pin.clone(), signal.clone()], Trace::default());
        let (mut outlet, read_in) = link(2, 0, 1, &read, &pin);
        let (pin_out, mut inlet) = link(1, 0, 1, &pin, &signal);
        let (first, last) = (Slots::new(2), Slots::new(1));
        let mut publish = |epoch| {
            let slot = outlet.slot().expect("there are two");
            first.write(slot, (epoch, 0));
            outlet.publish(Entry { epoch, unit: 0, pass: 0, place: Place::Slot(slot) }, true);
        };
        publish(1);
        let mut relay = Relay { from: first.clone(), to: last.clone(), inlet: read_in, outlet: pin_out };
        let inside = control.clone();
        let relay = thread::spawn(move || run(&mut relay, &inside, &pin));
        control.rewind();
        publish(2);
        let entry = control.next_entry(2, &mut inlet, &signal).unwrap();
        assert_eq!((entry.epoch, last.read(Slot(0))), (2, (2, 0)));
        control.stop();
        relay.join().unwrap();
        assert_eq!(std::iter::from_fn(|| outlet.slot()).count(), 2);
    });
}

/// A consumer to which nothing ever comes, and what ends its wait.
fn waits_in_vain(end: impl Fn(&Control) + Send + Sync + Copy + 'static) {
    model(4, move || {
        let (producer, signal) = (Signal::new(), Signal::new());
        let control = Control::new(vec![producer.clone(), signal.clone()], Trace::default());
        let (_outlet, mut inlet) = link(1, 0, 1, &producer, &signal);
        let other = control.clone();
        let ends = thread::spawn(move || end(&other));
        assert!(control.next_entry(1, &mut inlet, &signal).is_err());
        ends.join().unwrap();
    });
}

#[test]
fn loom_a_cancel_ends_any_wait() {
    waits_in_vain(|control| control.cancel());
}

#[test]
fn loom_the_end_of_the_streamer_ends_any_wait() {
    waits_in_vain(|control| control.fail_for_good(Error::Cancelled));
}

#[test]
fn loom_the_first_error_of_an_epoch_stays() {
    model(4, || {
        let control = Control::new(Vec::new(), Trace::default());
        let other = control.clone();
        let error = |cause: &str| Error::setting("error", cause);
        let fails = thread::spawn(move || other.fail(1, error("a")));
        control.fail(1, error("b"));
        let first = control.error_of(1).unwrap().to_string();
        fails.join().unwrap();
        control.fail(1, error("c"));
        assert_eq!(control.error_of(1).unwrap().to_string(), first);
        control.fail(2, error("newer"));
        control.fail(1, error("older"));
        assert!(control.error_of(1).is_none() && control.error_of(2).unwrap().to_string().contains("newer"));
    });
}
