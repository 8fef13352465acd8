//! GGUF files: metadata and tensors of a model in one file, or in several, of which the first is named.
//!
//! A file is `GGUF`, version, the numbers of tensors and of keys, the keys with their values, the tensors' names, shapes, types and
//! places, and from the next multiple of the alignment on their bytes. Long lists, such as a vocabulary, are not kept but read for
//! those who ask. A part of a split file beside the first is a file of the same kind.

mod names;
mod reader;
mod types;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use names::Names;
use reader::{Container, Reader, Record};
pub use types::type_code;

use super::{StoredTensor, Unreadable, bytes_within};
use crate::{
    error::{Error, Result},
    files,
};

/// The kind of a value, by its code in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

/// In the order of their codes, with the least bytes that one takes.
const KINDS: [(Kind, u64); 13] = [
    (Kind::U8, 1),
    (Kind::I8, 1),
    (Kind::U16, 2),
    (Kind::I16, 2),
    (Kind::U32, 4),
    (Kind::I32, 4),
    (Kind::F32, 4),
    (Kind::Bool, 1),
    (Kind::Text, 8),
    (Kind::List, 12),
    (Kind::U64, 8),
    (Kind::I64, 8),
    (Kind::F64, 8),
];

impl Kind {
    fn of(code: u32) -> Option<Self> {
        KINDS.get(code as usize).map(|(kind, _)| *kind)
    }

    /// Bytes of a number, and the least of a text or a list.
    fn least(self) -> u64 {
        KINDS[self as usize].1
    }
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// True or false.
    Bool(bool),
    /// A whole number of an unsigned type.
    Unsigned(u64),
    /// A whole number of a signed type.
    Signed(i64),
    /// Any other number.
    Float(f64),
    /// A text.
    Text(String),
    /// A list, which stays in the file.
    List(List),
}

impl Value {
    /// A whole number from 0 on, of whatever type.
    pub fn as_count(&self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(*number),
            Self::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A number of whatever type.
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Unsigned(number) => Some(*number as f64),
            Self::Signed(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Unsigned(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "{:?}", value.chars().take(60).collect::<String>()),
            Self::List(list) => write!(f, "a list of {}", list.count),
        }
    }
}

/// A list of the metadata: where its elements lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    kind: Kind,
    count: u64,
    at: u64,
}

impl List {
    /// How many elements it has.
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// What is said of a model in a GGUF file, and in the other parts if it is the first of several.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    length: u64,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<(Part, Record)>,
}

/// A file that has tensors.
#[derive(Clone, Debug)]
struct Part {
    path: Arc<Path>,
    length: u64,
}

impl Gguf {
    /// Reads what the file says, but for lists. Of a split file it is the first part that must be named; the others lie beside it.
    ///
    /// # Errors
    /// [`Error::Io`] where a part cannot be read; [`Error::Checkpoint`] where one is malformed, naming it and the key or tensor;
    /// [`Error::Unsupported`] for a version that is not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (file, length, Container { metadata, records }) = part(path)?;
        let mut found = Self { path: path.to_owned(), file, length, metadata, tensors: Vec::new() };
        found.take(path, length, records);
        let count = found.count("split.count")?.unwrap_or(1);
        if count > 1 {
            found.take_parts(count)?;
        }
        let mut seen = HashMap::new();
        for (part, Record { name, .. }) in &found.tensors {
            if let Some(other) = seen.insert(name, &part.path) {
                return Err(Error::tensor(&*part.path, name, format!("is in {} too", other.display())));
            }
        }
        Ok(found)
    }

    /// The same where `path` is a file, and no folder.
    pub(crate) fn if_file(path: &Path) -> Result<Option<Self>> {
        let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
        is_file.then(|| Self::open(path)).transpose()
    }

    fn take(&mut self, path: &Path, length: u64, records: Vec<Record>) {
        let part = Part { path: path.into(), length };
        self.tensors.extend(records.into_iter().map(|record| (part.clone(), record)));
    }

    /// The parts after the first, which says that there are so many.
    fn take_parts(&mut self, count: u64) -> Result<()> {
        let whole = Error::checkpoint;
        let number = self.count("split.no")?.unwrap_or(0);
        if number != 0 {
            return Err(whole(&self.path, format!("is part {} of {count}; name the first", number + 1)));
        }
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) else {
            let cause = format!("is the first of {count} parts, so its name must end with -00001-of-{count:05}.gguf");
            return Err(whole(&self.path, cause));
        };
        let stem = stem.to_owned();
        for part_number in 1..count {
            let path = self.path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", part_number + 1));
            let (_, length, Container { metadata, records }) = part(&path)?;
            for (key, expected) in [("split.no", part_number), ("split.count", count)] {
                match metadata.get(key) {
                    Some(value) if value.as_count() == Some(expected) => {}
                    other => {
                        let said = other.map_or("absent".into(), Value::to_string);
                        let cause = format!("{key} is {said}, expected {expected}; download all parts anew");
                        return Err(whole(&path, cause));
                    }
                }
            }
            self.take(&path, length, records);
        }
        let (all, here) = (self.count("split.tensors.count")?, self.tensors.len() as u64);
        match all {
            Some(all) if all != here => {
                let cause = format!("split.tensors.count is {all}, but the parts have {here}; download all parts anew");
                Err(whole(&self.path, cause))
            }
            _ => Ok(()),
        }
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The keys there are.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The value of a key, if it is there.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::checkpoint(&self.path, format!("{key} is {value}, expected {expected}"))
    }

    fn as_kind<'a, T>(&'a self, key: &str, expected: &str, of: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| self.wrong(key, value, expected))
    }

    /// A whole number; `None` if the key is not there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else.
    pub fn count(&self, key: &str) -> Result<Option<u64>> {
        self.as_kind(key, "a whole number", Value::as_count)
    }

    /// A number, likewise.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.as_kind(key, "a number", Value::as_number)
    }

    /// True or false, likewise.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let flag = |value: &Value| if let Value::Bool(flag) = value { Some(*flag) } else { None };
        self.as_kind(key, "true or false", flag)
    }

    /// A text, likewise.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.as_kind(key, "a text", |value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    /// How many elements a list has, likewise.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else.
    pub fn length(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.list(key)?.map(List::count))
    }

    fn list(&self, key: &str) -> Result<Option<&List>> {
        self.as_kind(key, "a list", |value| if let Value::List(list) = value { Some(list) } else { None })
    }

    /// The texts of a list, read from the file, likewise.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is something else, or the file has changed; [`Error::Io`] where it cannot be read.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.elements(
            key,
            "a list of texts",
            |kind| kind == Kind::Text,
            |value| match value {
                Value::Text(text) => Some(text),
                _ => None,
            },
        )
    }

    /// The numbers of a list, likewise.
    ///
    /// # Errors
    /// As [`texts`](Self::texts).
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let is_number = |kind| !matches!(kind, Kind::Text | Kind::List | Kind::Bool);
        self.elements(key, "a list of numbers", is_number, |value| value.as_number())
    }

    fn elements<T>(
        &self,
        key: &str,
        expected: &str,
        suits: impl Fn(Kind) -> bool,
        of: impl Fn(Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(list) = self.list(key)? else { return Ok(None) };
        // An empty one may be of any kind.
        if list.count > 0 && !suits(list.kind) {
            return Err(self.wrong(key, &Value::List(list.clone()), expected));
        }
        let mut reader = Reader::new(&self.file, self.length, list.at).map_err(Error::io("read", &self.path))?;
        let mut found = Vec::with_capacity(list.count as usize);
        for _ in 0..list.count {
            let value = reader.scalar(list.kind).map_err(|fault| fault.of(&self.path, key, list.at))?;
            let value = of(value).ok_or_else(|| self.wrong(key, &Value::List(list.clone()), expected))?;
            found.push(value);
        }
        Ok(Some(found))
    }

    /// Whether it has a tensor of this name.
    #[cfg(feature = "model")]
    pub(crate) fn stores(&self, name: &str) -> bool {
        self.tensors.iter().any(|(_, record)| record.name == name)
    }

    /// The numbers of a small vector of F32, such as factors of frequencies; `None` if there is no such tensor.
    #[cfg(feature = "model")]
    pub(crate) fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        use crate::dtype::DType;

        const MOST: usize = 1 << 16;
        let Some((part, record)) = self.tensors.iter().find(|(_, record)| record.name == name) else { return Ok(None) };
        let is_vector = record.shape.len() == 1 && record.shape[0] <= MOST;
        if !is_vector || types::of(record.code) != Some(DType::F32) {
            return Err(Error::tensor(&*part.path, name, format!("is no vector of F32 of up to {MOST} elements")));
        }
        let mut bytes = vec![0; DType::F32.bytes(record.shape[0])];
        let read = File::open(&part.path).and_then(|file| file.read_exact_at(&mut bytes, record.offset));
        read.map_err(Error::io("read", &*part.path))?;
        Ok(Some(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }

    /// All tensors by the decoder's names, and those that cannot be read.
    pub(super) fn tensors(&self) -> Result<(Vec<StoredTensor>, HashMap<String, Unreadable>)> {
        let names = Names::new(self.tensors.iter().map(|(_, record)| record.name.as_str()));
        let (mut known, mut unreadable) = (Vec::with_capacity(self.tensors.len()), HashMap::new());
        for (Part { path, length }, Record { name, shape, code, offset }) in &self.tensors {
            let known_as = names.known_as(name);
            let Some(dtype) = types::of(*code) else {
                unreadable.insert(known_as, Unreadable::Blocks(path.clone(), name.clone(), types::name_of(*code)));
                continue;
            };
            let shape = shape.clone();
            bytes_within(path, name, dtype.bytes_of(&shape), format_args!("{dtype} {shape:?}"), *offset, *length)?;
            known.push(StoredTensor { name: known_as, file: path.to_path_buf(), offset: *offset, dtype, shape });
        }
        Ok((known, unreadable))
    }
}

/// One file, its length, and what it says.
fn part(path: &Path) -> Result<(File, u64, Container)> {
    // Without O_NONBLOCK a pipe would be waited for until someone writes to it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("examine", path))?;
    if !metadata.is_file() {
        return Err(Error::checkpoint(path, "is no regular file"));
    }
    let container = reader::read(&file, path, metadata.len()).map_err(|error| match error {
        Error::Checkpoint { .. } => instead(&file).map_or(error, |cause| Error::checkpoint(path, cause)),
        other => other,
    })?;
    Ok((file, metadata.len(), container))
}

/// What the file is, if no GGUF file but something that often lies in its place.
fn instead(file: &File) -> Option<String> {
    let mut start = [0; 1024];
    let read = file.read_at(&mut start, 0).ok()?;
    let start = &start[..read];
    if start.starts_with(b"GGUF") { None } else { files::wrong_contents(start) }
}
