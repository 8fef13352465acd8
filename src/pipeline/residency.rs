//! Which of the units that are kept between passes are there: one state for each.
//!
//! ```text
//! absent ──begin──► filling ──fill──► there
//!        ◄─give up──
//! ```
//!
//! The reader begins and gives up. Who brings the last byte says that the unit is there: the reader for RAM, the transfer for the
//! device. That a unit is there stays true to the end.

use crate::sync::{AtomicU32, Ordering};

/// The state of a unit that is kept. One that stays on disk is absent for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Residency {
    /// Passes through slots, if it comes at all.
    Absent,
    /// Is on its way to where it is kept.
    Filling,
    /// Needs no reading any more; on the device, no copying either.
    There,
}

/// The states of all units, which reader and transfer share.
pub(crate) struct Residencies(Vec<AtomicU32>);

impl Residencies {
    pub(crate) fn new(units: usize) -> Self {
        Self((0..units).map(|_| AtomicU32::new(Residency::Absent as u32)).collect())
    }

    pub(crate) fn of(&self, unit: usize) -> Residency {
        // Acquire: what was written before the unit was said to be there is seen by whoever finds it there.
        match self.0[unit].load(Ordering::Acquire) {
            state if state == Residency::Absent as u32 => Residency::Absent,
            state if state == Residency::Filling as u32 => Residency::Filling,
            _ => Residency::There,
        }
    }

    /// The next copy of the unit stays.
    pub(crate) fn begin(&self, unit: usize) {
        self.change(unit, Residency::Absent, Residency::Filling);
    }

    /// What was begun did not come to its end.
    pub(crate) fn give_up(&self, unit: usize) {
        self.change(unit, Residency::Filling, Residency::Absent);
    }

    /// All of it is there, or on the device's way there.
    pub(crate) fn fill(&self, unit: usize) {
        self.0[unit].store(Residency::There as u32, Ordering::Release);
    }

    /// Only from that state: a unit may have come to be there meanwhile.
    fn change(&self, unit: usize, from: Residency, to: Residency) {
        let _ = self.0[unit].compare_exchange(from as u32, to as u32, Ordering::AcqRel, Ordering::Acquire);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_stays_there_whatever_is_begun_or_given_up() {
        let states = Residencies::new(2);
        states.give_up(0);
        assert_eq!(states.of(0), Residency::Absent);
        states.begin(0);
        assert_eq!((states.of(0), states.of(1)), (Residency::Filling, Residency::Absent));
        states.give_up(0);
        assert_eq!(states.of(0), Residency::Absent);
        // Given up by the reader while the transfer was at it, and begun again.
        states.begin(0);
        states.give_up(0);
        states.fill(0);
        states.begin(0);
        states.give_up(0);
        assert_eq!(states.of(0), Residency::There);
    }
}
