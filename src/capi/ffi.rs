//! The edge between C and Rust: statuses, the last error, and what is checked of every pointer before it is followed.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CStr, CString, OsStr, c_char},
    os::unix::ffi::OsStrExt,
    panic::{self, AssertUnwindSafe},
    path::Path,
    ptr::{self, NonNull},
    slice,
};

use crate::error::{Error, MemoryKind};

/// How a call ended. New codes are added at the end; a code never changes its meaning.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ls_status {
    /// It did what was asked.
    LS_OK = 0,
    /// A pointer was NULL that must not be.
    LS_NULL = 1,
    /// An argument or setting is out of range; the message names it.
    LS_INVALID = 2,
    /// The handle is not open: it never was, or was closed, or is a layer that was released.
    LS_CLOSED = 3,
    /// The handle is in use by another thread, or by the call whose callback this was called from.
    LS_BUSY = 4,
    /// A bug in the library. The handle can only be closed; others are not affected.
    LS_PANICKED = 5,
    /// A callback returned that it failed.
    LS_CALLBACK = 6,
    /// A file could not be opened or read.
    LS_IO = 7,
    /// A checkpoint is malformed, or lacks what was asked for.
    LS_CHECKPOINT = 8,
    /// A unit could not be read while it streamed.
    LS_READ = 9,
    /// Memory could not be had.
    LS_MEMORY = 10,
    /// A thread could not be started.
    LS_THREAD = 11,
    /// There is no tensor of that name; the message lists those there are.
    LS_NO_TENSOR = 12,
    /// Layers are held: more than the settings allow, or any at all where none may be.
    LS_LAYERS_HELD = 13,
    /// The pass was cancelled.
    LS_CANCELLED = 14,
    /// A kernel was given tensors that do not fit together.
    LS_KERNEL = 15,
    /// CUDA failed.
    LS_CUDA = 16,
    /// This build or machine cannot do it.
    LS_UNSUPPORTED = 17,
    /// Device or disk did not answer when a streamer was closed, which it is nevertheless. What it may still use stays reserved: memory
    /// that was lent must not be freed or used before the process ends, and the library must not be unloaded: a thread of it may be
    /// in a call that does not return.
    LS_LEAKED = 18,
    /// A budget is less than the least that will do; the message says how much that is, and so do ls_streamer_plan and
    /// ls_model_plan.
    LS_TOO_LITTLE = 19,
}

use ls_status::*;

/// Every status with its name, in order.
const NAMES: [(ls_status, &CStr); 20] = [
    (LS_OK, c"LS_OK"),
    (LS_NULL, c"LS_NULL"),
    (LS_INVALID, c"LS_INVALID"),
    (LS_CLOSED, c"LS_CLOSED"),
    (LS_BUSY, c"LS_BUSY"),
    (LS_PANICKED, c"LS_PANICKED"),
    (LS_CALLBACK, c"LS_CALLBACK"),
    (LS_IO, c"LS_IO"),
    (LS_CHECKPOINT, c"LS_CHECKPOINT"),
    (LS_READ, c"LS_READ"),
    (LS_MEMORY, c"LS_MEMORY"),
    (LS_THREAD, c"LS_THREAD"),
    (LS_NO_TENSOR, c"LS_NO_TENSOR"),
    (LS_LAYERS_HELD, c"LS_LAYERS_HELD"),
    (LS_CANCELLED, c"LS_CANCELLED"),
    (LS_KERNEL, c"LS_KERNEL"),
    (LS_CUDA, c"LS_CUDA"),
    (LS_UNSUPPORTED, c"LS_UNSUPPORTED"),
    (LS_LEAKED, c"LS_LEAKED"),
    (LS_TOO_LITTLE, c"LS_TOO_LITTLE"),
];

/// Version of this header: programs compiled with one run with any library of the same major and minor number.
pub const LS_VERSION_MAJOR: u32 = 0;
/// See LS_VERSION_MAJOR.
pub const LS_VERSION_MINOR: u32 = 1;
/// See LS_VERSION_MAJOR.
pub const LS_VERSION_PATCH: u32 = 0;

/// The version of the library that is running: `major << 16 | minor << 8 | patch`. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn ls_version() -> u32 {
    LS_VERSION_MAJOR << 16 | LS_VERSION_MINOR << 8 | LS_VERSION_PATCH
}

/// The name of a status, as in "LS_BUSY"; "unknown" for a number that is none. From any thread; the text is static.
#[unsafe(no_mangle)]
pub extern "C" fn ls_status_name(status: i32) -> *const c_char {
    let known = usize::try_from(status).ok().and_then(|status| NAMES.get(status));
    known.map_or(c"unknown", |(_, name)| name).as_ptr()
}

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// The message of the last call that failed in this thread, and "" before the first. It says what was tried, on what, why it
/// failed, and what to do. The text is the library's, UTF-8, and stays until the next call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn ls_last_error() -> *const c_char {
    let last = LAST.try_with(|last| last.borrow().as_ref().map(|message| message.as_ptr()));
    last.ok().flatten().unwrap_or(c"".as_ptr())
}

/// An error on its way to C.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: ls_status,
    message: String,
    /// With `LS_TOO_LITTLE`: the least bytes of RAM, or of the device's memory, that will do.
    pub(super) least: [usize; 2],
}

pub(super) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub(super) fn new(status: ls_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), least: [0; 2] }
    }

    /// Why, for people.
    pub(super) fn line(self) -> CString {
        c_line(self.message)
    }

    /// [`LS_INVALID`] for the argument called `name`.
    pub(super) fn invalid(name: &str, cause: impl std::fmt::Display) -> Self {
        Self::new(LS_INVALID, format!("{name}: {cause}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. } => LS_IO,
            Error::Checkpoint { .. } => LS_CHECKPOINT,
            Error::Read { .. } => LS_READ,
            Error::Setting { .. } => LS_INVALID,
            Error::TooLittle { .. } => LS_TOO_LITTLE,
            Error::Memory { .. } | Error::Pages { .. } => LS_MEMORY,
            Error::Thread { .. } => LS_THREAD,
            Error::NoTensor { .. } => LS_NO_TENSOR,
            Error::LayersHeld { .. } | Error::LayerLeaked { .. } => LS_LAYERS_HELD,
            Error::Leaked { .. } => LS_LEAKED,
            Error::Busy { .. } => LS_BUSY,
            Error::Cancelled => LS_CANCELLED,
            Error::Kernel { .. } => LS_KERNEL,
            Error::Cuda { .. } => LS_CUDA,
            Error::Unsupported { .. } => LS_UNSUPPORTED,
            Error::Panicked { .. } => LS_PANICKED,
        };
        let least = match error {
            Error::TooLittle { memory: MemoryKind::Device, least, .. } => [0, least],
            Error::TooLittle { least, .. } => [least, 0],
            _ => [0; 2],
        };
        Self { status, message: error.to_string(), least }
    }
}

/// Runs the body of a function that C calls: no panic gets out, and a failure is kept for [`ls_last_error`].
#[inline]
pub(super) fn ffi(call: impl FnOnce() -> Result<()>) -> ls_status {
    match panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => LS_OK,
        Ok(Err(failure)) => keep(failure),
        Err(payload) => keep(panicked(payload)),
    }
}

#[cold]
fn panicked(payload: Box<dyn Any + Send>) -> Failure {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    Failure::new(LS_PANICKED, format!("the library panicked: {text}; this is a bug, please report it"))
}

#[cold]
fn keep(Failure { status, message, .. }: Failure) -> ls_status {
    let message = c_line(message);
    // A thread that is ending keeps nothing.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Some(message));
    status
}

#[cold]
fn null(name: &str) -> Failure {
    Failure::new(LS_NULL, format!("{name} is NULL"))
}

#[cold]
fn misaligned(name: &str) -> Failure {
    Failure::invalid(name, "is not aligned for its type")
}

/// A pointer that was checked.
///
/// # Errors
/// [`LS_NULL`], or [`LS_INVALID`] where it is not aligned.
#[inline]
pub(super) fn place<T>(pointer: *const T, name: &str) -> Result<NonNull<T>> {
    let pointer = NonNull::new(pointer.cast_mut()).ok_or_else(|| null(name))?;
    if pointer.is_aligned() { Ok(pointer) } else { Err(misaligned(name)) }
}

/// A callback that must be there.
pub(super) fn callback<F>(function: Option<F>, name: &str) -> Result<F> {
    function.ok_or_else(|| null(name))
}

/// A list of C's.
///
/// # Safety
/// `pointer` is NULL or starts `count` values that live for `'a`.
pub(super) unsafe fn list<'a, T>(pointer: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    let pointer = place(pointer, name)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Failure::invalid(name, format!("{count} of them are more than can be addressed")));
    }
    // SAFETY: the caller promised that so many values live there for `'a`; length and alignment were checked above.
    Ok(unsafe { slice::from_raw_parts(pointer.as_ptr(), count) })
}

/// A text of C's.
///
/// # Safety
/// `pointer` is NULL or starts a terminated text that lives for `'a`.
pub(super) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    let pointer = place(pointer, name)?;
    // SAFETY: it is not NULL, and the caller promised that a terminated text lies there for `'a`.
    let text = unsafe { CStr::from_ptr(pointer.as_ptr()) };
    text.to_str().map_err(|_| Failure::invalid(name, "is not UTF-8"))
}

/// A path of C's, in whatever encoding.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path<'a>(pointer: *const c_char, name: &str) -> Result<&'a Path> {
    let pointer = place(pointer, name)?;
    // SAFETY: it is not NULL, and the caller promised that a terminated path lies there for `'a`.
    let bytes = unsafe { CStr::from_ptr(pointer.as_ptr()) }.to_bytes();
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// A text for C.
pub(super) fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Failure::new(LS_UNSUPPORTED, format!("{text:?} contains a zero: C cannot name it")))
}

/// A text for people to read, in one line and without zeros, whatever the names in it have.
pub(super) fn c_line(text: String) -> CString {
    CString::new(text.replace('\0', "?").replace(['\n', '\r'], " ")).expect("the zeros are replaced")
}

/// A structure that may grow at its end, and whose first field says how long the caller's is.
///
/// # Safety
/// `repr(C)`, the first field a `usize`, without padding, every field valid whatever its bits but for what NULL means.
pub(super) unsafe trait Grows: Copy {
    /// Its length in the first version that had it.
    const FIRST: usize;
}

/// Far above any structure: a length beyond was never set.
const LONGEST: usize = 4096;

/// How much of a structure of `size` bytes is known here.
///
/// # Errors
/// [`LS_INVALID`] for a length that no version had.
fn known<T: Grows>(size: usize, name: &str) -> Result<usize> {
    // Versions differ by whole fields.
    if size < T::FIRST || size > LONGEST || !size.is_multiple_of(size_of::<usize>()) {
        let cause = format!("its size is {size}, which no version has; the first has {}: set it to sizeof", T::FIRST);
        return Err(Failure::invalid(name, cause));
    }
    Ok(size.min(size_of::<T>()))
}

/// Reads options. What a shorter structure lacks has its default; what a longer one adds must be zero.
///
/// # Safety
/// `pointer` is NULL or starts as many bytes as its first field says.
pub(super) unsafe fn read_options<T: Grows>(pointer: *const T, name: &str, default: T) -> Result<T> {
    let pointer = place(pointer, name)?.as_ptr().cast_const();
    let mut options = default;
    // SAFETY: the caller promised as many bytes as the first field says, and no more are read.
    unsafe {
        let size = pointer.cast::<usize>().read();
        let known = known::<T>(size, name)?;
        let rest = slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known);
        if rest.iter().any(|byte| *byte != 0) {
            let cause = format!("{name} sets options that this version, which knows {known} bytes, does not have");
            return Err(Failure::new(LS_UNSUPPORTED, cause));
        }
        ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut options).cast(), known);
    }
    Ok(options)
}

/// Fills a structure of the caller's, which is `size` bytes long, with zeros beyond what is known here.
///
/// # Safety
/// `pointer` is NULL or starts `size` bytes.
pub(super) unsafe fn write_options<T: Grows>(pointer: *mut T, size: usize, name: &str, value: T) -> Result<()> {
    let pointer = place(pointer, name)?.as_ptr();
    let known = known::<T>(size, name)?;
    // SAFETY: it is not NULL, and the caller promised that it starts as many bytes as its first field says.
    unsafe {
        ptr::write_bytes(pointer.cast::<u8>(), 0, size);
        ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), pointer.cast(), known);
        pointer.cast::<usize>().write(size);
    }
    Ok(())
}

/// As [`write_options`], with the length that the structure's first field says.
///
/// # Safety
/// `pointer` is NULL or starts as many bytes as its first field says.
pub(super) unsafe fn write_sized<T: Grows>(pointer: NonNull<T>, name: &str, value: T) -> Result<()> {
    // SAFETY: the caller says that so many bytes may be written.
    unsafe { write_options(pointer.as_ptr(), pointer.cast::<usize>().read(), name, value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_whatever_is_in_it() {
        assert_eq!(c_line("unit a\nb\0c\r: cannot".into()).as_c_str(), c"unit a b?c : cannot");
    }

    #[test]
    fn names_and_versions_are_those_they_stand_for() {
        for (number, (status, name)) in NAMES.iter().enumerate() {
            assert_eq!((*status as usize, format!("{status:?}")), (number, name.to_str().unwrap().to_owned()));
        }
        let version = format!("{LS_VERSION_MAJOR}.{LS_VERSION_MINOR}.{LS_VERSION_PATCH}");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}
