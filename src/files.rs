//! Files beside the weights. The small ones that come with a model are read with care: nothing that they are, or say of their
//! length, makes a program hang or takes its memory. New ones appear whole or not at all.

use std::{
    ffi::{CString, OsString},
    fs::{self, File, OpenOptions},
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process,
};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The longest `config.json` that is read, in bytes: far more than any has.
pub(crate) const LONGEST_CONFIG: u64 = 4 << 20;

/// Reads a small regular file that comes with a model; `None` if there is no such file.
///
/// ```
/// let text = layer_streamer::files::read_small("examples/speller/config.json".as_ref(), 1 << 20)?;
/// assert!(text.is_some_and(|text| text.starts_with(b"{")));
/// assert_eq!(layer_streamer::files::read_small("examples/speller/no.json".as_ref(), 1 << 20)?, None);
/// # Ok::<_, layer_streamer::Error>(())
/// ```
///
/// # Errors
/// [`Error::Io`] where it cannot be read; [`Error::Checkpoint`] for what is no regular file (a pipe, a device, a folder), which is
/// not waited for, for one of more than `most` bytes, which is not read, and for one that is empty or has
/// [something else](wrong_contents) in it.
pub fn read_small(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    let Some(bytes) = read_up_to(path, most)? else {
        return Ok(None);
    };
    if bytes.is_empty() {
        return Err(Error::checkpoint(path, "is empty; take it anew from where it came from"));
    }
    match wrong_contents(&bytes) {
        Some(cause) => Err(Error::checkpoint(path, cause)),
        None => Ok(Some(bytes)),
    }
}

/// As [`read_small`], whatever is in it: of a file that comes from elsewhere.
///
/// # Errors
/// As there, but for the contents.
pub(crate) fn read_up_to(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    // Without O_NONBLOCK a pipe would be waited for until someone writes to it.
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        return Err(Error::checkpoint(path, "is no regular file"));
    }
    let too_long =
        |length: u64| Error::checkpoint(path, format!("is {length} bytes long; {most} are the most for such a file"));
    if metadata.len() > most {
        return Err(too_long(metadata.len()));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    // It may grow meanwhile.
    file.take(most + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > most {
        return Err(too_long(bytes.len() as u64));
    }
    Ok(Some(bytes))
}

/// What files begin with that often lie in the place of a model's file.
const BEGINNINGS: [(&[u8], &str); 6] = [
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download the file again",
    ),
    (b"GGUF", "is a GGUF file; name it as the model by itself, or take the model's safetensors version"),
    (b"PK\x03\x04", "is a zip archive, such as PyTorch's; take the model's safetensors version"),
    (b"\x80\x02\x8a\x0a", "is a Python pickle, such as PyTorch's; take the model's safetensors version"),
    (b"\x89HDF", "is an HDF5 file; take the model's safetensors version"),
    (b"\x1f\x8b\x08", "is compressed by gzip; unpack it"),
];

/// How web pages begin, in small letters.
const PAGES: [&str; 4] = ["<!doctype html", "<html", "<?xml", "<error"];

/// What servers answer in plain text in place of a file.
const ANSWERS: [&str; 7] = [
    "Entry not found",
    "Repository not found",
    "Access to model",
    "Invalid username or password",
    "Invalid credentials",
    "Not Found",
    "404: Not Found",
];

/// The longest message of a server that is looked for, in bytes.
const LONGEST_ANSWER: usize = 4096;

/// What lies in the place of a model's file, if that is something well known: a git-lfs pointer, a web page, a server's error
/// message, weights of another format. `contents` may be the first kilobyte alone. The text says what to do, as an error does
/// after the file's name; `None`: nothing is wrong that can be seen from the beginning.
///
/// ```
/// let said = layer_streamer::files::wrong_contents(b"version https://git-lfs.github.com/spec/v1\noid sha256:0");
/// assert!(said.is_some_and(|said| said.contains("git lfs pull")));
/// assert_eq!(layer_streamer::files::wrong_contents(b"{}"), None);
/// ```
pub fn wrong_contents(contents: &[u8]) -> Option<String> {
    if let Some((_, cause)) = BEGINNINGS.iter().find(|(beginning, _)| contents.starts_with(beginning)) {
        return Some((*cause).into());
    }
    let contents = contents.strip_prefix(b"\xef\xbb\xbf").unwrap_or(contents).trim_ascii_start();
    let begins =
        |text: &str| contents.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text.as_bytes()));
    if PAGES.iter().any(|page| begins(page)) {
        return Some("is a web page (HTML or XML), such as a server's error page; download the file again".into());
    }
    let message = match ANSWERS.iter().any(|answer| begins(answer)) {
        true => String::from_utf8_lossy(contents).into_owned(),
        false => error_message(contents)?,
    };
    let shown: String = message.trim().chars().take(160).collect();
    Some(format!("is a server's error message, {shown:?}; download the file again"))
}

/// The message of a JSON object that has nothing but an error to tell.
fn error_message(contents: &[u8]) -> Option<String> {
    if contents.first() != Some(&b'{') || contents.len() > LONGEST_ANSWER {
        return None;
    }
    let fields = serde_json::from_slice::<Map<String, Value>>(contents).ok()?;
    let told = fields.get("error").or_else(|| {
        let told = fields.get("message").or_else(|| fields.get("detail"));
        told.filter(|told| told.is_string() && fields.len() <= 3)
    })?;
    Some(told.as_str().map_or_else(|| told.to_string(), str::to_owned))
}

/// What a file system has for its users, in bytes; `u64::MAX` where it keeps no count (ramfs, some in user space).
///
/// # Errors
/// The operating system's, for a folder that is not there.
pub fn free_bytes(folder: &Path) -> io::Result<u64> {
    let folder = File::open(folder)?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the descriptor is open and `stat` is room for what the call writes.
    if unsafe { libc::fstatvfs(folder.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled `stat`.
    let stat = unsafe { stat.assume_init() };
    Ok(if stat.f_blocks == 0 { u64::MAX } else { stat.f_bavail * stat.f_frsize })
}

/// A file that has no name until it is whole: whatever ends the process before that leaves nothing behind, and what had the name
/// is as it was. Where the file system knows no files without a name it has another one, `NAME.partial-PID` in the same folder.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    file: File,
    /// Its name meanwhile, if it has one.
    partial: Option<PathBuf>,
}

impl NewFile {
    /// Makes sure that a file can be written there, and takes the place.
    ///
    /// # Errors
    /// The operating system's, for a folder that is not there or must not be written to; and where the name is that of a folder or
    /// of anything else that is no regular file.
    pub fn create(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {
                return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder; name a file"));
            }
            Ok(metadata) if !metadata.is_file() => {
                let cause = "it is no regular file; name one that can be replaced";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, cause));
            }
            _ => {}
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let unnamed = OpenOptions::new().write(true).mode(0o666).custom_flags(libc::O_TMPFILE).open(folder);
        match unnamed {
            Ok(file) => Ok(Self { path, file, partial: None }),
            // What file systems and kernels without such files answer.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
                let partial = Self::partial(&path);
                let file = OpenOptions::new().write(true).create_new(true).open(&partial)?;
                Ok(Self { path, file, partial: Some(partial) })
            }
            Err(error) => Err(error),
        }
    }

    fn partial(path: &Path) -> PathBuf {
        let mut partial = OsString::from(path);
        partial.push(format!(".partial-{}", process::id()));
        PathBuf::from(partial)
    }

    /// The name that it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name, in place of what has it.
    ///
    /// # Errors
    /// The operating system's. Nothing is left of the new file then.
    pub fn keep(mut self) -> io::Result<()> {
        if self.partial.is_none() {
            // A link cannot replace a file, a rename can.
            let partial = Self::partial(&self.path);
            let of = |path: &Path| CString::new(path.as_os_str().as_bytes());
            let (from, to) = (of(Path::new(&format!("/proc/self/fd/{}", self.file.as_raw_fd())))?, of(&partial)?);
            // One of a process that had this number, and could not tidy up.
            let _ = fs::remove_file(&partial);
            let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
            // SAFETY: both names end with their zero.
            if unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) } != 0 {
                return Err(io::Error::last_os_error());
            }
            self.partial = Some(partial);
        }
        match &self.partial {
            Some(partial) => fs::rename(partial, &self.path),
            None => Ok(()),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Gone already if all went well.
        let _ = self.partial.as_ref().map(fs::remove_file);
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::symlink, time::Instant};

    use super::*;

    #[test]
    fn what_is_no_small_regular_file_is_refused_at_once_and_unread() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("small"), "text").unwrap();
        fs::create_dir(at("folder")).unwrap();
        // A hole: no disk space, much memory.
        fs::File::create(at("hole")).unwrap().set_len(1 << 36).unwrap();
        let pipe = CString::new(at("pipe").as_os_str().as_bytes()).unwrap();
        // SAFETY: the name ends with its zero.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        symlink("/dev/zero", at("device")).unwrap();
        let start = Instant::now();
        assert_eq!(read_small(&at("small"), 4).unwrap().unwrap(), b"text");
        assert_eq!(read_small(&at("none"), 4).unwrap(), None);
        for (name, most, said) in [
            ("small", 3, "is 4 bytes long"),
            ("hole", 1 << 20, "is 68719476736 bytes long"),
            ("pipe", 4, "is no regular file"),
            ("device", 4, "is no regular file"),
            ("folder", 4, "is no regular file"),
        ] {
            let error = read_small(&at(name), most).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(name), "{name}: {error}");
        }
        assert!(start.elapsed().as_secs() < 5);
    }

    #[test]
    fn what_lies_in_the_place_of_a_file_is_told_from_what_the_file_may_be() {
        for (contents, said) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid"[..], "git lfs pull"),
            (b"\xef\xbb\xbf \n<!doctype HTML><p>", "web page"),
            (b"<HTML>", "web page"),
            (br#"{"error": {"code": 401}}"#, r#"{\"code\":401}"#),
            (br#"{"statusCode": 404, "message": "Not here"}"#, "Not here"),
            (b"Access to model x is restricted", "is restricted"),
            (b"GGUF\x03\0\0\0", "GGUF"),
        ] {
            let found = wrong_contents(contents).unwrap_or_default();
            assert!(found.contains(said) && !found.contains('\n'), "{found:?} lacks {said:?}");
        }
        for contents in [
            &b""[..],
            b"{}",
            br#"{"errors": "replace", "model_max_length": 512}"#,
            br#"{"message": "a", "model_type": "llama", "x": 1, "y": 2}"#,
            br#"{"detail": 3}"#,
            b"<|im_start|>system",
            b"{% for message in messages %}",
            b"version 2",
            b"\x80\x02\0\0\0\0\0\0{",
        ] {
            assert_eq!(wrong_contents(contents), None, "{:?}", String::from_utf8_lossy(contents));
        }
    }

    #[test]
    fn a_new_file_has_no_name_before_it_is_whole_and_then_replaces_what_had_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let names = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let new = NewFile::create(&path).unwrap();
        assert!(names().is_empty() || new.partial.is_some());
        drop(new);
        assert!(names().is_empty(), "nothing is left of one that was not kept");
        fs::write(&path, "older").unwrap();
        for text in ["first", "second"] {
            let new = NewFile::create(&path).unwrap();
            // Two at once have places of their own.
            let other = NewFile::create(&path);
            new.file().write_all(text.as_bytes()).unwrap();
            new.keep().unwrap();
            drop(other);
            assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names().len()), (text, 1));
        }
        for (name, kind) in [(".", io::ErrorKind::IsADirectory), ("missing/new", io::ErrorKind::NotFound)] {
            assert_eq!(NewFile::create(folder.path().join(name)).unwrap_err().kind(), kind, "{name}");
        }
    }
}
