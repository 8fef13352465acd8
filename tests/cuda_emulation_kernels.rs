//! That the emulation of kernels finds what it is there to find: `cuda/emulation/check.cpp` has a kernel for
//! each mistake.
#![cfg(cuda_emulated)]

use std::{
    ffi::{c_char, c_int},
    thread,
};

// The kernels come with the library.
use layer_streamer as _;

unsafe extern "C" {
    fn emulation_check(seed: u64, wrong: *mut c_char, bytes: usize) -> c_int;
}

/// What the first kernel did that it must not, in the order of a seed.
fn wrong(seed: u64) -> String {
    let mut said = [0_u8; 512];
    // SAFETY: it writes no more than so many bytes.
    let len = unsafe { emulation_check(seed, said.as_mut_ptr().cast(), said.len()) };
    String::from_utf8_lossy(&said[..(len as usize).min(said.len() - 1)]).into_owned()
}

#[test]
fn every_mistake_is_found_in_every_order_and_leaves_nothing_behind() {
    thread::scope(|scope| {
        for first in [0, 1] {
            scope.spawn(move || {
                for seed in (first..64).step_by(2) {
                    assert_eq!(wrong(seed), "", "in the order of seed {seed}, see above");
                }
            });
        }
    });
}
