//! Memory for what is computed in between, which calls use one at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// F32 of it: what 14 stretches of keys give of 128 heads of 128.
pub(super) const LEN: usize = 1 << 18;

/// Any numbers.
#[repr(align(64))]
pub(super) struct Room(pub(super) [f32; LEN]);

/// How large it is.
pub(super) const BYTES: usize = size_of::<Room>();

/// The room, once no other call uses it.
pub(super) fn room() -> MutexGuard<'static, Room> {
    /// Zeros, so that the system provides it page by page, as it is used.
    static ROOM: Mutex<Room> = Mutex::new(Room([0.0; LEN]));
    ROOM.lock().unwrap_or_else(PoisonError::into_inner)
}
