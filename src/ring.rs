//! A bounded single-producer single-consumer queue: the only thing that two stages share.
//!
//! `head` counts the entries taken, `tail` the entries published; both only grow (wrapping), and an entry's place is its
//! count modulo the capacity, a power of two. **Invariant**: places in `head..tail` are initialised and the consumer's;
//! all others are the producer's. Each side stores one counter (release) and keeps a copy of the other's, which it loads
//! (acquire) only when the copy says that the ring is full or empty, so that in steady state the cache lines stay put.

use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicUsize, Ordering, UnsafeCell};

struct RingState<T> {
    head: CachePadded<AtomicUsize>,
    tail: CachePadded<AtomicUsize>,
    places: Box<[UnsafeCell<Option<T>>]>,
}

impl<T> RingState<T> {
    fn place(&self, count: usize) -> &UnsafeCell<Option<T>> {
        &self.places[count & (self.places.len() - 1)]
    }
}

// SAFETY: by the module's invariant each place is touched by one side at a time, handed over by release and acquire.
unsafe impl<T: Send> Sync for RingState<T> {}
// SAFETY: entries are handed from thread to thread whole, and the places own them.
unsafe impl<T: Send> Send for RingState<T> {}

/// The end that puts entries in.
pub(crate) struct Producer<T> {
    shared: Arc<RingState<T>>,
    tail: usize,
    head_seen: usize,
}

/// The end that takes entries out.
pub(crate) struct Consumer<T> {
    shared: Arc<RingState<T>>,
    head: usize,
    tail_seen: usize,
}

/// A ring for at least `capacity` entries.
pub(crate) fn ring<T: Copy>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    let shared = Arc::new(RingState {
        head: CachePadded::new(AtomicUsize::new(0)),
        tail: CachePadded::new(AtomicUsize::new(0)),
        places: (0..capacity.next_power_of_two()).map(|_| UnsafeCell::new(None)).collect(),
    });
    (Producer { shared: shared.clone(), tail: 0, head_seen: 0 }, Consumer { shared, head: 0, tail_seen: 0 })
}

impl<T: Copy> Producer<T> {
    /// Puts `entries` in and publishes them all at once; returns how many found room (the rest is not taken).
    pub(crate) fn push_all(&mut self, entries: &[T]) -> usize {
        let capacity = self.shared.places.len();
        if capacity - self.tail.wrapping_sub(self.head_seen) < entries.len() {
            self.head_seen = self.shared.head.load(Ordering::Acquire);
        }
        let room = capacity - self.tail.wrapping_sub(self.head_seen);
        let entries = &entries[..room.min(entries.len())];
        for &entry in entries {
            // SAFETY: tail - head_seen < capacity, so this place is outside head..tail and the producer's.
            self.shared.place(self.tail).with_mut(|place| unsafe { *place = Some(entry) });
            self.tail = self.tail.wrapping_add(1);
        }
        self.shared.tail.store(self.tail, Ordering::Release);
        entries.len()
    }

    /// Puts one entry in; `false` if the ring is full.
    pub(crate) fn push(&mut self, entry: T) -> bool {
        self.push_all(&[entry]) == 1
    }

    /// How many entries find room.
    pub(crate) fn room(&mut self) -> usize {
        self.head_seen = self.shared.head.load(Ordering::Acquire);
        self.shared.places.len() - self.tail.wrapping_sub(self.head_seen)
    }

    /// Whether the consumer has taken everything.
    pub(crate) fn is_drained(&mut self) -> bool {
        self.head_seen = self.shared.head.load(Ordering::Acquire);
        self.head_seen == self.tail
    }
}

impl<T: Copy> Consumer<T> {
    /// The oldest entry, left where it is.
    pub(crate) fn peek(&mut self) -> Option<T> {
        if self.tail_seen == self.head {
            self.tail_seen = self.shared.tail.load(Ordering::Acquire);
            if self.tail_seen == self.head {
                return None;
            }
        }
        // SAFETY: head is in head..tail_seen, so this place is initialised and the consumer's.
        self.shared.place(self.head).with(|place| unsafe { *place })
    }

    /// Takes the oldest entry.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let entry = self.peek()?;
        self.head = self.head.wrapping_add(1);
        self.shared.head.store(self.head, Ordering::Release);
        Some(entry)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::Signal;

    #[test]
    fn full_and_empty_are_values_and_order_is_kept() {
        let (mut tx, mut rx) = ring::<usize>(3);
        assert_eq!(rx.pop(), None);
        assert_eq!(tx.push_all(&[0, 1, 2, 3, 4]), 4, "three rounds up to four places");
        assert!(!tx.push(9) && !tx.is_drained());
        for lap in 0..100 {
            assert_eq!((rx.peek(), rx.pop()), (Some(lap), Some(lap)));
            assert!(tx.push(lap + 4));
        }
        assert_eq!((0..4).map(|_| rx.pop().unwrap()).collect::<Vec<_>>(), [100, 101, 102, 103]);
        assert!(rx.pop().is_none() && tx.is_drained());
    }

    #[test]
    fn two_threads_hand_over_every_entry_once_and_in_order() {
        let (mut tx, mut rx) = ring::<usize>(4);
        let (filled, emptied) = (Signal::new(), Signal::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..200_000 {
                    loop {
                        let ticket = emptied.ticket();
                        if tx.push(i) {
                            break;
                        }
                        emptied.wait(ticket);
                    }
                    filled.notify();
                }
            });
            for i in 0..200_000 {
                loop {
                    let ticket = filled.ticket();
                    if let Some(entry) = rx.pop() {
                        assert_eq!(entry, i);
                        break;
                    }
                    filled.wait(ticket);
                }
                emptied.notify();
            }
        });
    }
}

/// The crate in `tests/loom` runs every interleaving of these.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::sync::Signal;

    #[test]
    fn loom_entries_arrive_whole_and_in_order_round_the_ring() {
        loom::model(|| {
            let (mut tx, mut rx) = ring::<usize>(2);
            let producer = loom::thread::spawn(move || {
                let mut sent = tx.push_all(&[0, 1]);
                for _ in 0..2 {
                    sent += usize::from(tx.push(sent));
                }
                sent
            });
            let mut received = 0;
            for _ in 0..3 {
                if let Some(entry) = rx.pop() {
                    assert_eq!(entry, received);
                    received += 1;
                }
            }
            let sent = producer.join().unwrap();
            while let Some(entry) = rx.pop() {
                assert_eq!(entry, received);
                received += 1;
            }
            assert_eq!(received, sent);
        });
    }

    #[test]
    fn loom_a_wake_up_is_never_lost() {
        loom::model(|| {
            let (mut tx, mut rx) = ring::<usize>(2);
            let signal = Signal::new();
            let other = signal.clone();
            let producer = loom::thread::spawn(move || {
                assert!(tx.push(7));
                other.notify();
            });
            loop {
                let ticket = signal.ticket();
                if rx.pop() == Some(7) {
                    break;
                }
                signal.wait(ticket);
            }
            producer.join().unwrap();
        });
    }
}
