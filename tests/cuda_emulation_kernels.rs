//! That the emulation of kernels finds what it is there to find: `tests/cuda_emulation/kernels/check.cpp` has a kernel for
//! each mistake.
#![cfg(cuda_emulated)]

use std::{ffi::c_int, thread};

// The kernels come with the library.
use layer_streamer as _;

unsafe extern "C" {
    safe fn emulation_check(seed: u64) -> c_int;
}

#[test]
fn every_mistake_is_found_in_every_order_and_leaves_nothing_behind() {
    thread::scope(|scope| {
        for first in [0, 1] {
            scope.spawn(move || {
                for seed in (first..64).step_by(2) {
                    assert_eq!(emulation_check(seed), 0, "in the order of seed {seed}, see above");
                }
            });
        }
    });
}
