//! Where answers go: a file that only grows, or standard output.

use std::{
    fs::{File, TryLockError},
    io::{self, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    journal::{Journal, Work, sync_folder},
    known::{Held, Known},
};
use crate::Failure;

/// A power failure costs no more than what was written in so long.
const SYNC_EVERY: Duration = Duration::from_secs(5);

pub enum Output {
    File {
        path: PathBuf,
        file: File,
        journal: Journal,
        /// Since when something is written that may not be on the disk yet.
        unsynced: Option<Instant>,
    },
    Stdout,
}

/// What an output holds, before anything of it is changed.
pub struct Opened {
    output: Output,
    work: Work,
    held: Held,
}

impl Output {
    /// Opens a file for this process alone, and reads the answers in it.
    ///
    /// # Errors
    /// Where it is no file to go on with; what it holds is as it was.
    pub fn open(path: &Path, work: Work, in_order: bool) -> Result<Opened, Failure> {
        let failed = |error: io::Error| Failure::from(format!("cannot write {}: {error}", path.display()));
        let file = File::options().read(true).append(true).create(true).open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(format!("{}: is no regular file; - is standard output", path.display()).into());
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!(
                    "{}: another process writes it; wait for it, or give another --output",
                    path.display()
                )
                .into());
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let journal = Journal::of(path);
        if file.metadata().map_err(failed)?.len() > 0 {
            journal.check(&work, path)?;
        }
        let held = Known::read(BufReader::new(&file), path, in_order)?;
        Ok(Opened { output: Self::File { path: path.into(), file, journal, unsynced: None }, work, held })
    }

    pub fn stdout(work: Work) -> Opened {
        Opened { output: Self::Stdout, work, held: Held { known: Known::default(), whole: 0 } }
    }

    /// Adds answers. Returns whether anybody reads them.
    pub fn write(&mut self, answers: &[u8]) -> Result<bool, Failure> {
        match self {
            _ if answers.is_empty() => {}
            Self::File { path, file, unsynced, .. } => {
                file.write_all(answers).map_err(|error| {
                    let path = path.display();
                    format!(
                        "cannot write {path}: {error}; what is written stays, and the same command goes on after it"
                    )
                })?;
                unsynced.get_or_insert_with(Instant::now);
            }
            Self::Stdout => {
                let mut out = io::stdout().lock();
                match out.write_all(answers).and_then(|()| out.flush()) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                    written => written.map_err(|error| format!("cannot write to stdout: {error}"))?,
                }
            }
        }
        self.sync(SYNC_EVERY)?;
        Ok(true)
    }

    /// Makes durable what has not been so for as long as this.
    pub fn sync(&mut self, after: Duration) -> Result<(), Failure> {
        if let Self::File { path, file, unsynced, .. } = self
            && unsynced.is_some_and(|since| since.elapsed() >= after)
        {
            file.sync_data().map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            *unsynced = None;
        }
        Ok(())
    }

    /// Every prompt has its answer.
    pub fn complete(mut self) -> Result<(), Failure> {
        self.sync(Duration::ZERO)?;
        match self {
            Self::File { journal, .. } => journal.remove(),
            Self::Stdout => Ok(()),
        }
    }
}

impl Opened {
    pub fn known(&self) -> &Known {
        &self.held.known
    }

    /// Ready to be added to: what was begun but is not whole is cut off.
    pub fn begin(self) -> Result<(Output, Known), Failure> {
        let Self { output, work, held } = self;
        if let Output::File { path, file, journal, .. } = &output {
            let failed = |error: io::Error| format!("cannot write {}: {error}", path.display());
            // The journal comes first: an answer without it would be one of unknown work.
            if held.whole == 0 {
                journal.begin(&work)?;
            }
            let mut end = file;
            file.set_len(held.whole).and_then(|()| end.seek(SeekFrom::End(0)).map(drop)).map_err(failed)?;
            file.sync_all().and_then(|()| sync_folder(path)).map_err(failed)?;
        }
        Ok((output, held.known))
    }
}
