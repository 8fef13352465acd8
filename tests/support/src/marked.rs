//! Processes that a test, or what it started, has started: found by a mark.

use std::{
    fs,
    path::Path,
    process, thread,
    time::{Duration, Instant},
};

/// Processes with `mark` in their command line or environment, but this one.
pub fn marked(mark: &Path) -> Vec<String> {
    let mark = mark.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let processes = processes.filter(|id| id.parse() != Ok(process::id()) && id.bytes().all(|b| b.is_ascii_digit()));
    // One that has ended, and was not waited for by whoever inherited it, has neither any more.
    let texts = processes.filter_map(|id| {
        let text = |name| Some(String::from_utf8_lossy(&fs::read(format!("/proc/{id}/{name}")).ok()?).into_owned());
        let (line, variables) = (text("cmdline")?, text("environ")?);
        (line.contains(mark) || variables.contains(mark)).then(|| format!("{id}: {line}"))
    });
    texts.collect()
}

/// Nothing with `mark` runs any more, or will not in a moment.
pub fn nothing_is_left(mark: &Path) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !marked(mark).is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", marked(mark));
        thread::sleep(Duration::from_millis(10));
    }
}
