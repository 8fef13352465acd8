//! What was done of a folder, a line for each step: from it the same command goes on after whatever ended it.

use std::{
    collections::HashMap,
    fs::{self, File, TryLockError},
    io::{Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use layer_streamer::packed::Description;
use serde::{Deserialize, Serialize};

use super::{Failure, cannot};
use crate::called;

pub const NAME: &str = "layer-streamer.journal";

/// By what a file is known again: its length and when it was last changed, in seconds and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct State(u64, i64, i64);

impl State {
    pub fn of(file: &File, path: &Path) -> Result<Self, Failure> {
        let metadata = file.metadata().map_err(cannot("examine", path))?;
        Ok(Self(metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
    }
}

/// Which work it is the journal of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// The program's command.
    pub command: String,
    /// Its folder, without links.
    pub source: String,
}

impl Work {
    /// The command that goes on with it in this folder.
    pub fn again(&self, folder: &Path) -> String {
        format!("{} {} {} {}", called().display(), self.command, self.source, folder.display())
    }
}

#[derive(Serialize, Deserialize)]
enum Line {
    Work(Work),
    /// A file is begun, or begun anew.
    Begin(PathBuf, State),
    /// The next tensor of this file is written.
    Tensor(PathBuf, Written),
}

/// A tensor that is written.
#[derive(Clone, Serialize, Deserialize)]
pub struct Written {
    pub name: String,
    /// XXH3 of its bytes when it is not packed.
    pub checksum: u64,
    /// Bytes that it takes.
    pub stored: u64,
    /// Its description, if it is packed.
    packed: Option<String>,
}

impl Written {
    pub fn new(name: &str, checksum: u64, stored: u64, packed: Option<&Description>) -> Self {
        Self { name: name.into(), checksum, stored, packed: packed.map(Description::to_json) }
    }

    pub fn packed(&self) -> Result<Option<Description>, Failure> {
        self.packed.as_deref().map(Description::from_json).transpose().map_err(Failure::from)
    }
}

/// A file that was begun.
#[derive(Clone)]
pub struct Begun {
    /// Of the source's file at that time.
    pub state: State,
    pub tensors: Vec<Written>,
}

impl Begun {
    /// Whether what is written are the first of these tensors.
    pub fn suits<'a>(&self, names: impl Iterator<Item = &'a String>) -> bool {
        let names: Vec<_> = names.take(self.tensors.len()).collect();
        names.len() == self.tensors.len() && self.tensors.iter().zip(names).all(|(written, name)| written.name == *name)
    }
}

pub struct Journal {
    path: PathBuf,
    file: File,
    begun: HashMap<PathBuf, Begun>,
}

/// The work that a folder holds a part of; `None` if there is no journal, or one that was ended before its first line.
pub fn work_in(folder: &Path) -> Result<Option<Work>, Failure> {
    let path = folder.join(NAME);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(&path).map_err(cannot("read", &path))?;
    let Some(end) = text.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
    match serde_json::from_slice(&text[..end]) {
        Ok(Line::Work(work)) => Ok(Some(work)),
        _ => Err(damaged(&path)),
    }
}

fn damaged(path: &Path) -> Failure {
    let folder = path.parent().unwrap_or(path).display();
    format!("{} is damaged; remove the folder {folder} and begin anew", path.display()).into()
}

impl Journal {
    /// Begins a journal in this folder, or goes on with the one that is there.
    ///
    /// # Errors
    /// Where another process has it, or where it is of other work.
    pub fn open(folder: &Path, work: &Work) -> Result<Self, Failure> {
        let path = folder.join(NAME);
        let options = File::options().read(true).append(true).create(true).clone();
        let mut file = options.open(&path).map_err(cannot("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!("{}: another process writes this folder; wait for it", folder.display()).into());
            }
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &path)(error)),
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(cannot("read", &path))?;
        // Whatever ended the process may have cut off the last line.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        file.set_len(whole as u64).and_then(|()| file.rewind()).map_err(cannot("write", &path))?;
        let mut journal = Self { path, file, begun: HashMap::new() };
        let mut lines = text[..whole].split_inclusive(|byte| *byte == b'\n');
        match lines.next().map(serde_json::from_slice) {
            None => journal.write(&Line::Work(work.clone()))?,
            Some(Ok(Line::Work(there))) if there == *work => {}
            Some(_) => return Err(damaged(&journal.path)),
        }
        for line in lines {
            match serde_json::from_slice(line) {
                Ok(Line::Begin(file, state)) => {
                    journal.begun.insert(file, Begun { state, tensors: Vec::new() });
                }
                Ok(Line::Tensor(file, written)) => {
                    let begun = journal.begun.get_mut(&file).ok_or_else(|| damaged(&journal.path))?;
                    begun.tensors.push(written);
                }
                _ => return Err(damaged(&journal.path)),
            }
        }
        Ok(journal)
    }

    pub fn begun(&self, file: &Path) -> Option<&Begun> {
        self.begun.get(file)
    }

    /// Begins a file, or begins it anew.
    pub fn begin(&mut self, file: &Path, state: State) -> Result<(), Failure> {
        self.write(&Line::Begin(file.to_owned(), state))
    }

    /// Notes the next tensor of a file that was begun.
    pub fn note(&mut self, file: &Path, written: Written) -> Result<(), Failure> {
        self.write(&Line::Tensor(file.to_owned(), written))
    }

    /// All is done.
    pub fn remove(self) -> Result<(), Failure> {
        fs::remove_file(&self.path).map_err(cannot("remove", &self.path))
    }

    fn write(&mut self, line: &Line) -> Result<(), Failure> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(cannot("write", &self.path))
    }
}
