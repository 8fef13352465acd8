//! What the threads of the CPU kernels promise a call.

use loom::cell::UnsafeCell;

use crate::{pool::Pool, protocols::model};

/// A place for each piece: loom sees it when two threads may touch one at once.
struct Places([UnsafeCell<usize>; 2]);

// SAFETY: loom watches each access.
unsafe impl Sync for Places {}

/// A call of two pieces, each of which must be done once and be seen by the caller.
fn call(pool: &Pool, marks: usize) {
    let places = Places([UnsafeCell::new(0), UnsafeCell::new(0)]);
    let places = &places;
    // SAFETY: loom watches each access.
    pool.deal(2, |piece| places.0[piece].with_mut(|place| unsafe { *place += marks }));
    for place in &places.0 {
        // SAFETY: loom watches each access.
        assert_eq!(place.with(|place| unsafe { *place }), marks);
    }
}

#[test]
fn loom_calls_one_after_the_other_have_their_own_pieces_done_once_and_the_end_wakes_who_sleeps() {
    model(3, || {
        let pool = Pool::start(1).unwrap();
        call(&pool, 1);
        call(&pool, 2);
    });
}

#[test]
fn loom_two_threads_share_a_call_and_both_end() {
    model(2, || call(&Pool::start(2).unwrap(), 1));
}

#[test]
fn loom_callers_at_once_take_turns() {
    model(2, || {
        let pool = std::sync::Arc::new(Pool::start(1).unwrap());
        let other = pool.clone();
        let calls = loom::thread::spawn(move || call(&other, 1));
        call(&pool, 2);
        calls.join().unwrap();
    });
}
