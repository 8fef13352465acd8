//! What the tests of `make-checkpoint` share.

use std::{path::Path, process::Output};

use crate::common;

pub fn run(path: &Path, args: &str) -> Output {
    common::program("make-checkpoint").arg(path).args(args.split_whitespace()).output().unwrap()
}

pub fn make(path: &Path, args: &str) -> String {
    let output = run(path, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs it, expects a failure without a panic, and returns the message.
pub fn refused(path: &Path, args: &str) -> String {
    let output = run(path, args);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !message.contains("panicked"), "{message}");
    message
}
