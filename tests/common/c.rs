//! Calls of the C API from Rust.

use std::{
    ffi::{CStr, CString},
    mem,
};

use layer_streamer::capi::{ls_status::*, *};

/// What went wrong last in this thread.
pub fn message() -> String {
    // SAFETY: it is never NULL, and the library's until the next failure.
    unsafe { CStr::from_ptr(ls_last_error()) }.to_str().unwrap().to_owned()
}

/// What a call wrote, if it succeeded.
pub fn made<T>(call: impl FnOnce(*mut T) -> ls_status) -> T {
    let mut to = mem::MaybeUninit::uninit();
    assert_eq!(call(to.as_mut_ptr()), LS_OK, "{}", message());
    // SAFETY: a call that succeeds writes its result.
    unsafe { to.assume_init() }
}

/// A text for C.
pub fn c(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).unwrap()
}
