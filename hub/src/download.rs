//! One file, from its first byte to its place in the cache.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use indicatif::{DecimalBytes, ProgressBar};
use ring::digest::{Context, SHA256};

use crate::{
    cache::Cache,
    error::{Error, ROOM, Result, cannot},
    fetch::{Fault, Hub, Meta, Patience},
};

/// Bytes of one read.
const CHUNK: usize = 256 << 10;

/// Makes sure that a commit's file is in the cache. Other processes may do the same: one of them downloads.
pub fn file(hub: &Hub, cache: &Cache, commit: &str, file: &str, meta: &Meta) -> Result<()> {
    if !cache.has_blob(meta) {
        let waiting = || hub.say(&format!("{file}: another process downloads it; waiting"));
        let _lock = cache.lock(meta, waiting)?;
        if cache.has_blob(meta) {
            hub.bar.inc(meta.length);
        } else {
            receive(hub, cache, commit, file, meta)?;
        }
    } else {
        hub.bar.inc(meta.length);
    }
    cache.link(commit, file, meta)
}

/// Downloads a blob, from where an earlier try has ended. The caller has its lock.
fn receive(hub: &Hub, cache: &Cache, commit: &str, file: &str, meta: &Meta) -> Result<()> {
    let path = cache.partial(meta);
    let mut partial = Partial::open(cache, meta, hub.bar.clone()).map_err(cannot("open", &path))?;
    let (mut patience, mut most_so_far, mut from_before) = (Patience::new(), 0, partial.length > 0);
    loop {
        while partial.length < meta.length {
            let most = most_so_far.max(partial.length);
            most_so_far = most;
            match partial.go_on(hub, commit, file) {
                Ok(()) => {}
                // A break after more bytes than ever is another one, not the same again.
                Err(Fault::Passing(..)) if partial.length > most => patience = Patience::new(),
                // What is there may be of the same wrong file.
                Err(Fault::WrongLength(cause)) => {
                    fs::remove_file(&path).map_err(cannot("remove", &path))?;
                    return Err(Error::Answer(format!(
                        "{cause}; what had come was deleted: try again, and check proxies"
                    )));
                }
                Err(fault) => patience.wait(hub, fault)?,
            }
        }
        if partial.is_right() {
            break;
        }
        if !from_before {
            fs::remove_file(&path).map_err(cannot("remove", &path))?;
            let cause = format!("{file}: what came has another hash than the hub announced, {}", meta.etag);
            return Err(Error::Answer(format!("{cause}; it was deleted: try again, and check proxies")));
        }
        // The bytes from before may have been wrong: once more, all of it.
        from_before = false;
        partial.restart().map_err(cannot("truncate", &path))?;
    }
    // Before it gets the name: a machine that loses power may have kept the name and not the bytes.
    partial.file.sync_all().map_err(cannot("write", &path))?;
    partial.check_place()?;
    fs::rename(&path, cache.blob(meta)).map_err(cannot("rename", &path))
}

/// A blob's beginning.
struct Partial<'a> {
    file: File,
    path: PathBuf,
    meta: &'a Meta,
    length: u64,
    /// Of the bytes so far, where the ETag is their hash.
    hash: Option<Context>,
    bar: ProgressBar,
}

impl<'a> Partial<'a> {
    fn open(cache: &Cache, meta: &'a Meta, bar: ProgressBar) -> io::Result<Self> {
        let path = cache.partial(meta);
        let mut partial = Self { file: opened(&path)?, path, meta, length: 0, hash: hash(meta), bar };
        if partial.file.metadata()?.len() > meta.length {
            partial.restart()?;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            match partial.file.read(&mut chunk)? {
                0 => {
                    // What was there says nothing of how fast the rest comes.
                    partial.bar.reset_eta();
                    return Ok(partial);
                }
                read => partial.count(&chunk[..read]),
            }
        }
    }

    /// These bytes are in the file.
    fn count(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        self.bar.inc(bytes.len() as u64);
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
    }

    /// As if there had been nothing.
    fn restart(&mut self) -> io::Result<()> {
        fs::remove_file(&self.path)?;
        self.file = opened(&self.path)?;
        self.bar.set_position(self.bar.position().saturating_sub(self.length));
        (self.length, self.hash) = (0, hash(self.meta));
        Ok(())
    }

    /// Takes what comes in one answer.
    fn go_on(&mut self, hub: &Hub, commit: &str, file: &str) -> Result<(), Fault> {
        let path = self.path.clone();
        let failed = |error: io::Error| Fault::Final(cannot("write", &path)(error));
        let all = self.meta.length;
        let (start, mut body) = hub.open(commit, file, self.meta, self.length)?;
        if start != self.length {
            self.restart().map_err(failed)?;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = body.read(&mut chunk).map_err(|error| hub.unreachable(file, &error.into()))?;
            let missing = all - self.length;
            if read == 0 {
                return match missing {
                    0 => Ok(()),
                    _ => Err(Fault::Passing(format!("{file}: {missing} of {all} bytes did not come"), None)),
                };
            }
            if read as u64 > missing {
                return Err(Fault::WrongLength(format!(
                    "{file}: more than the {all} bytes come that the hub announced"
                )));
            }
            self.file.write_all(&chunk[..read]).map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull => {
                    let remedy = format!(": {} more are needed; {ROOM}", DecimalBytes(missing));
                    Fault::Final(Error::Cache { operation: "write", path: path.clone(), source: error, remedy })
                }
                _ => failed(error),
            })?;
            self.count(&chunk[..read]);
        }
    }

    /// Makes sure that the file that has the name is the one that was written. Where a file system's locks do nothing, as on some
    /// shared ones, another process may have begun anew.
    fn check_place(&self) -> Result<()> {
        let is_own = |found: fs::Metadata| {
            self.file.metadata().is_ok_and(|own| own.ino() == found.ino() && own.len() == self.meta.length)
        };
        if fs::metadata(&self.path).is_ok_and(is_own) {
            return Ok(());
        }
        let cause = "another process downloads it at the same time, since locks do nothing on this file system";
        Err(Error::Answer(format!("{}: {cause}; try again when that one is done", self.path.display())))
    }

    /// Whether all bytes are those that the ETag stands for, as far as it says.
    fn is_right(&self) -> bool {
        let found = self.hash.clone().map(|hash| hash.finish());
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        found.is_none_or(|found| hex(found.as_ref()).eq_ignore_ascii_case(&self.meta.etag))
    }
}

fn opened(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// The ETag of a large file is its SHA-256. That of a small one depends on who serves it.
fn hash(meta: &Meta) -> Option<Context> {
    let is_hash = meta.etag.len() == 64 && meta.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then(|| Context::new(&SHA256))
}
