//! What joins two stages: a ring of loaded slots one way, a ring of free slots the other way, and a wake-up for each side.
//!
//! **Invariant**: a slot is in exactly one place: free (in the free ring or the outlet's spare list), being filled by the
//! producing stage, pending or loaded (in the ring), or held by the consuming stage. Whoever has it may touch its bytes.

use std::sync::Arc;

use crate::{
    ring::{Consumer, Producer, ring},
    sync::Signal,
};

/// Which slot of a stage's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) usize);

/// What travels between stages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    Unit(Entry),
    /// The epoch failed at this unit: nothing more of it comes.
    Failed {
        epoch: u64,
        unit: usize,
    },
}

impl Message {
    fn epoch(&self) -> u64 {
        match *self {
            Self::Unit(Entry { epoch, .. }) | Self::Failed { epoch, .. } => epoch,
        }
    }

    fn slot(&self) -> Option<Slot> {
        match *self {
            Self::Unit(Entry { place: Place::Slot(slot), .. }) => Some(slot),
            _ => None,
        }
    }
}

/// A unit that is handed over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) epoch: u64,
    pub(crate) unit: usize,
    /// On which of the reader's trips through the units.
    pub(crate) pass: u64,
    pub(crate) place: Place,
}

/// Where a unit that is handed over lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a slot, which goes back when it has been used.
    Slot(Slot),
    /// Where it is kept, filled: the entry only keeps its place in the order.
    Resident,
    /// In the page cache, [mapped](crate::io::MappedUnit), in this pass: likewise.
    Mapped,
}

/// The producing end.
pub(crate) struct Outlet {
    loaded: Producer<Message>,
    free: Consumer<Slot>,
    spare: Vec<Slot>,
    pending: Vec<Message>,
    batch: usize,
    consumer: Arc<Signal>,
}

/// The consuming end.
pub(crate) struct Inlet {
    loaded: Consumer<Message>,
    free: Producer<Slot>,
    producer: Arc<Signal>,
}

/// Joins two stages by `slots` slots, handed over `batch` at a time, and room for `residents` units without a slot.
pub(crate) fn link(
    slots: usize,
    residents: usize,
    batch: usize,
    producer: &Arc<Signal>,
    consumer: &Arc<Signal>,
) -> (Outlet, Inlet) {
    // One place more, to say that an epoch failed.
    let (loaded_in, loaded_out) = ring(slots + residents + 1);
    let (free_in, free_out) = ring(slots);
    let outlet = Outlet {
        loaded: loaded_in,
        free: free_out,
        spare: (0..slots).rev().map(Slot).collect(),
        pending: Vec::with_capacity(slots + residents),
        batch,
        consumer: consumer.clone(),
    };
    (outlet, Inlet { loaded: loaded_out, free: free_in, producer: producer.clone() })
}

impl Outlet {
    /// A slot to fill.
    pub(crate) fn slot(&mut self) -> Option<Slot> {
        self.spare.pop().or_else(|| self.free.pop())
    }

    /// Puts back a slot that was not filled after all.
    pub(crate) fn put_back(&mut self, slot: Slot) {
        self.spare.push(slot);
    }

    /// How many more units can be published now.
    pub(crate) fn room(&mut self) -> usize {
        self.loaded.room().min(self.pending.capacity()).saturating_sub(self.pending.len())
    }

    /// Hands over a unit: at once, or with the rest of its batch. A pass's last unit completes any batch. There must be room.
    pub(crate) fn publish(&mut self, entry: Entry, ends_pass: bool) {
        self.pending.push(Message::Unit(entry));
        if self.pending.len() >= self.batch || ends_pass {
            self.flush();
        }
    }

    fn flush(&mut self) {
        // Failures of epochs that the consumer has not looked at yet take places too: what finds none stays pending.
        let pushed = self.loaded.push_all(&self.pending);
        if pushed > 0 {
            self.pending.drain(..pushed);
            self.consumer.notify();
        }
    }

    /// Completes the batch early if waiting for the rest could be for ever: no slot is free and the consumer, which holds
    /// them, has nothing left to take.
    pub(crate) fn flush_if_starving(&mut self) {
        if self.loaded.is_drained() {
            self.flush();
        }
    }

    /// Says that the epoch failed at `unit`, after everything that was loaded before; `false` if there is no room just now.
    pub(crate) fn fail(&mut self, epoch: u64, unit: usize) -> bool {
        self.flush();
        let pushed = self.pending.is_empty() && self.loaded.push(Message::Failed { epoch, unit });
        self.consumer.notify();
        pushed
    }

    /// Forgets the batch that was not yet handed over.
    pub(crate) fn discard_pending(&mut self) {
        self.spare.extend(self.pending.drain(..).filter_map(|message| message.slot()));
    }
}

impl Inlet {
    /// The next message of `epoch`, left in the ring until [`take`](Self::take); older ones are handed back unused.
    pub(crate) fn peek(&mut self, epoch: u64) -> Option<Message> {
        loop {
            let message = self.loaded.peek()?;
            if message.epoch() >= epoch {
                return (message.epoch() == epoch).then_some(message);
            }
            self.take();
            if let Some(slot) = message.slot() {
                self.release(slot);
            }
        }
    }

    /// Takes the message just peeked at, which makes room for another.
    pub(crate) fn take(&mut self) {
        self.loaded.pop();
        self.producer.notify();
    }

    /// Hands a slot back to be filled again.
    pub(crate) fn release(&mut self, slot: Slot) {
        let pushed = self.free.push(slot);
        debug_assert!(pushed, "the free ring has a place for every slot");
        self.producer.notify();
    }

    /// Tells the producer that this side is out of work.
    pub(crate) fn nudge(&self) {
        self.producer.notify();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn entry(epoch: u64, unit: usize, slot: Slot) -> Entry {
        Entry { epoch, unit, pass: 0, place: Place::Slot(slot) }
    }

    fn handed(inlet: &mut Inlet, epoch: u64) -> Entry {
        let Some(Message::Unit(entry)) = inlet.peek(epoch) else { panic!("no unit") };
        entry
    }

    #[test]
    fn a_batch_is_handed_over_whole_and_cut_short_at_the_end_of_a_pass() {
        let signal = Signal::new();
        let (mut outlet, mut inlet) = link(4, 0, 3, &signal, &signal);
        for unit in 0..2 {
            let slot = outlet.slot().unwrap();
            outlet.publish(entry(1, unit, slot), false);
            assert!(inlet.peek(1).is_none());
        }
        let slot = outlet.slot().unwrap();
        outlet.publish(entry(1, 2, slot), true);
        for unit in 0..3 {
            assert_eq!(handed(&mut inlet, 1).unit, unit);
            inlet.take();
        }
        let slot = outlet.slot().unwrap();
        outlet.publish(entry(1, 0, slot), false);
        assert!(inlet.peek(1).is_none());
        outlet.flush_if_starving();
        assert_eq!(handed(&mut inlet, 1).unit, 0);
    }

    #[test]
    fn failures_that_nobody_looked_at_cost_no_entry() {
        let signal = Signal::new();
        let (mut outlet, mut inlet) = link(2, 0, 2, &signal, &signal);
        let told = (1..=9).filter(|&epoch| outlet.fail(epoch, 0)).count();
        assert!(told < 9, "the ring is full of failures");
        for unit in 0..2 {
            let slot = outlet.slot().unwrap();
            outlet.publish(entry(10, unit, slot), false);
        }
        for unit in 0..2 {
            if inlet.peek(10).is_none() {
                outlet.flush_if_starving();
            }
            assert_eq!(handed(&mut inlet, 10).unit, unit);
            inlet.take();
        }
    }

    #[test]
    fn entries_of_an_older_epoch_are_handed_back_and_newer_ones_wait() {
        let signal = Signal::new();
        let (mut outlet, mut inlet) = link(2, 0, 1, &signal, &signal);
        let (a, b) = (outlet.slot().unwrap(), outlet.slot().unwrap());
        outlet.publish(entry(1, 0, a), false);
        assert!(outlet.fail(1, 1));
        outlet.publish(entry(2, 0, b), false);
        assert!(outlet.slot().is_none());
        assert_eq!(handed(&mut inlet, 2).place, Place::Slot(b));
        assert_eq!(outlet.slot(), Some(a));
        assert!(inlet.peek(1).is_none(), "a newer entry is not for this epoch");
        assert_eq!(handed(&mut inlet, 2).place, Place::Slot(b));
    }
}
