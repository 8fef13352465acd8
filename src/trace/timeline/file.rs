//! The file that a recording becomes: its name is checked, and its place reserved, before the long work begins.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use super::{Recording, page, perfetto};
use crate::{
    error::{Error, Result},
    files::NewFile,
};

/// A file for a [`Recording`], which appears when it is whole ([`NewFile`]), in place of what had its name.
///
/// ```
/// use layer_streamer::trace::timeline::{Recording, TraceFile};
///
/// # fn main() -> Result<(), layer_streamer::Error> {
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("trace.html");
/// let file = TraceFile::create(&path)?; // before anything is loaded
/// let recording = Recording::default(); // what the run was
/// file.write(&recording)?;
/// # assert!(path.exists());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TraceFile {
    file: NewFile,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// JSON trace events, for Perfetto and chrome://tracing.
    Json,
    /// A page that shows the recording by itself.
    Html,
}

impl TraceFile {
    /// Makes sure that the file can be written, and changes nothing that has its name.
    ///
    /// # Errors
    /// [`Error::Setting`] for a name that ends neither in `.json` nor in `.html`; [`Error::Io`] for a folder or anything else
    /// that is no regular file, and for a folder that is not there or must not be written to.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let format = Format::of(&path)?;
        let file = NewFile::create(&path).map_err(Error::io("create the trace", path))?;
        Ok(Self { file, format })
    }

    /// Where the trace will be.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Writes the recording, and gives the file its name when it is whole.
    ///
    /// # Errors
    /// [`Error::Io`]: the disk is full, or failed. Nothing is left of the new file then, and an older one is as it was.
    pub fn write(self, recording: &Recording) -> Result<()> {
        let Self { file, format } = self;
        let failed = Error::io("write the trace", file.path().to_owned());
        format.write(file.file(), recording).and_then(|()| file.keep()).map_err(failed)
    }
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => Ok(Format::Json),
            Some("html") => Ok(Format::Html),
            _ => Err(Error::setting(
                "trace",
                format!("name a file that ends in .html (a page) or .json (for Perfetto), not {}", path.display()),
            )),
        }
    }

    fn write(self, out: impl Write, recording: &Recording) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 18, out);
        match self {
            Format::Json => perfetto::write(&mut out, recording)?,
            Format::Html => page::write(&mut out, recording)?,
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;
    use crate::trace::timeline::example::example;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_gets_its_name_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        fs::write(&path, "older").unwrap();
        let file = TraceFile::create(&path).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(fs::read(&path).unwrap(), b"older");
        file.write(&example()).unwrap();
        assert_eq!(names(folder.path()), ["trace.json"]);
        assert!(serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap()).unwrap().is_object());
    }

    #[test]
    fn a_file_that_is_not_written_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        drop(TraceFile::create(folder.path().join("trace.html")).unwrap());
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_path_that_cannot_be_written_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("folder.json")).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink("/dev/full", at("device.json")).unwrap();
        for (name, said) in [
            ("trace", "ends in .html (a page) or .json (for Perfetto)"),
            ("trace.svg", "ends in .html (a page) or .json (for Perfetto)"),
            ("", "ends in .html (a page) or .json (for Perfetto)"),
            (".json", "ends in .html (a page) or .json (for Perfetto)"),
            ("folder.json", "it is a folder; name a file"),
            ("device.json", "it is no regular file"),
            ("missing/trace.json", "os error 2"),
            ("file/trace.json", "os error 20"),
        ] {
            let error = TraceFile::create(at(name)).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        assert_eq!(names(folder.path()), ["device.json", "file", "folder.json"]);
    }

    /// A disk that is full after so many bytes.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            let taken = self.0.min(bytes.len());
            self.0 -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_with_its_number_and_a_remedy() {
        for format in [Format::Json, Format::Html] {
            let mut whole = Vec::new();
            format.write(&mut whole, &example()).unwrap();
            for room in [0, 1, 5000, whole.len() - 1] {
                let error = format.write(Full(room), &example()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{format:?} {room}");
                let error = Error::io("write the trace", "trace.json")(error).to_string();
                assert!(error.contains("write the trace trace.json") && error.contains("free some space"), "{error}");
            }
        }
    }

    #[test]
    fn a_folder_that_vanished_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let file = TraceFile::create(inner.join("trace.json")).unwrap();
        fs::remove_dir_all(&inner).unwrap();
        assert!(matches!(file.write(&example()), Err(Error::Io { .. })));
    }
}
