//! Mounts that nobody but the test sees, and a disk that is full.

use std::{
    ffi::CString,
    fs, io,
    path::Path,
    process::{Command, Output},
    ptr,
};

/// Gives this thread, and what it starts, mounts that nobody else sees. Whether that is allowed.
pub fn own_mounts() -> bool {
    // SAFETY: no memory is involved.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
    let private = unshared.then(|| mount("none", Path::new("/"), None, libc::MS_REC | libc::MS_PRIVATE, ""));
    let error = match private {
        Some(Ok(())) => return true,
        Some(Err(error)) => error,
        None => io::Error::last_os_error(),
    };
    eprintln!("skipped: nothing can be mounted: {error}");
    false
}

pub fn mount(source: &str, at: &Path, kind: Option<&str>, flags: u64, options: &str) -> io::Result<()> {
    let text = |text: &str| CString::new(text).unwrap();
    let (source, at, options) = (text(source), text(at.to_str().unwrap()), text(options));
    let kind = kind.map(text);
    let kind = kind.as_ref().map_or(ptr::null(), |kind| kind.as_ptr());
    // SAFETY: strings that end in zero and live through the call.
    match unsafe { libc::mount(source.as_ptr(), at.as_ptr(), kind, flags, options.as_ptr().cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills `folder`: all but one page, so that a file can be begun.
pub fn fill(folder: &Path) {
    mount("none", folder, Some("tmpfs"), 0, "size=64k").unwrap();
    fs::write(folder.join("filler"), vec![0; 60 << 10]).unwrap();
}

/// A run of a program that writes to a full disk, and what it said.
pub fn said(command: &mut Command) -> (Output, String) {
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!said.contains("panicked"), "{command:?}: {said}");
    (done, said)
}
