//! The container: numbers, texts and lists, one after the other, each held against what is left of the file before it is believed.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use super::{Kind, List, Value};
use crate::error::{Error, Result};

/// The longest names of keys that the format allows, in bytes; tensors' are shorter.
const LONGEST_NAME: u64 = 65_535;

/// The longest text that is kept, in bytes: far more than chat templates have.
const LONGEST_TEXT: u64 = 4 << 20;

/// How deep lists may lie in lists. No key of a language model has more than one.
const DEEPEST: usize = 4;

/// The most dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 4;

/// Where tensors begin unless the file says otherwise: at multiples of so many bytes.
const ALIGNMENT: u64 = 32;

/// What a file says of a tensor.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) name: String,
    /// Slowest first.
    pub(super) shape: Vec<usize>,
    /// Code of its type.
    pub(super) code: u32,
    /// From the start of the file.
    pub(super) offset: u64,
}

/// All that one file says.
pub(super) struct Container {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) records: Vec<Record>,
}

/// Why something cannot be read.
pub(super) enum Fault {
    Io(io::Error),
    /// The file ends within it.
    Ends,
    Wrong(String),
}

impl Fault {
    /// As an error of `what` in this file, at this byte.
    pub(super) fn of(self, path: &Path, what: &str, at: u64) -> Error {
        match self {
            Self::Io(error) => Error::io("read", path)(error),
            Self::Ends => {
                let cause = format!("ends within {what}, at byte {at}; is it truncated? Download it again");
                Error::checkpoint(path, cause)
            }
            Self::Wrong(cause) => Error::checkpoint(path, format!("{what}, at byte {at}, {cause}")),
        }
    }
}

/// A file from some place on.
pub(super) struct Reader<'a> {
    file: BufReader<&'a File>,
    at: u64,
    length: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a File, length: u64, at: u64) -> io::Result<Self> {
        let mut file = BufReader::with_capacity(64 << 10, file);
        file.seek(SeekFrom::Start(at))?;
        Ok(Self { file, at, length })
    }

    fn left(&self) -> u64 {
        self.length.saturating_sub(self.at)
    }

    /// So many bytes more, which the file must have. Nothing is reserved for what it has not.
    fn claim(&mut self, bytes: u64) -> Result<(), Fault> {
        if bytes > self.left() {
            return Err(Fault::Ends);
        }
        self.at += bytes;
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        self.claim(bytes.len() as u64)?;
        self.file.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Fault::Ends,
            _ => Fault::Io(error),
        })
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), Fault> {
        self.claim(bytes)?;
        // What a file has is less than this.
        self.file.seek_relative(bytes as i64).map_err(Fault::Io)
    }

    /// A number of things, each of which takes at least `least` bytes.
    fn count(&mut self, least: u64) -> Result<u64, Fault> {
        let count = self.u64()?;
        if count.checked_mul(least).is_none_or(|bytes| bytes > self.left()) {
            return Err(Fault::Wrong(format!("counts {count}, more than the file has room for; is it truncated?")));
        }
        Ok(count)
    }

    pub(super) fn text(&mut self, longest: u64) -> Result<String, Fault> {
        let length = self.u64()?;
        if length > self.left() {
            return Err(Fault::Ends);
        }
        if length > longest {
            return Err(Fault::Wrong(format!("has a text of {length} bytes; {longest} are the most")));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| {
            Fault::Wrong(format!("is not UTF-8 from its byte {} on", error.utf8_error().valid_up_to()))
        })
    }

    fn kind(&mut self) -> Result<Kind, Fault> {
        let code = self.u32()?;
        Kind::of(code).ok_or_else(|| Fault::Wrong(format!("has the unknown type {code}")))
    }

    /// A value of one number.
    pub(super) fn scalar(&mut self, kind: Kind) -> Result<Value, Fault> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(self.array::<1>()?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            Kind::U32 => Value::Unsigned(self.u32()?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            Kind::U64 => Value::Unsigned(self.u64()?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            Kind::Bool => match self.array::<1>()?[0] {
                byte @ (0 | 1) => Value::Bool(byte == 1),
                byte => return Err(Fault::Wrong(format!("is {byte}, neither true nor false"))),
            },
            Kind::Text => Value::Text(self.text(LONGEST_TEXT)?),
            Kind::List => Value::List(self.list(1)?),
        })
    }

    /// A list, whose elements are not read but gone over: where they lie is kept.
    fn list(&mut self, depth: usize) -> Result<List, Fault> {
        let kind = self.kind()?;
        let count = self.count(kind.least())?;
        let at = self.at;
        match kind {
            Kind::Text => (0..count).try_for_each(|_| {
                let length = self.u64()?;
                self.skip(length)
            })?,
            Kind::List if depth == DEEPEST => {
                return Err(Fault::Wrong(format!("has lists within lists, more than {DEEPEST} deep")));
            }
            Kind::List => (0..count).try_for_each(|_| self.list(depth + 1).map(|_| ()))?,
            // `count` has made sure that there are so many bytes.
            _ => self.skip(count * kind.least())?,
        }
        Ok(List { kind, count, at })
    }

    /// One key with its value.
    fn pair(&mut self, path: &Path, number: u64) -> Result<(String, Value)> {
        let at = self.at;
        let key = self.text(LONGEST_NAME).map_err(|fault| fault.of(path, &format!("key {number}"), at))?;
        let at = self.at;
        let value = self.kind().and_then(|kind| self.scalar(kind));
        let value = value.map_err(|fault| fault.of(path, &format!("the value of {key:?}"), at))?;
        Ok((key, value))
    }

    /// What is said of one tensor; its offset is from where the data begin.
    fn record(&mut self, path: &Path, number: u64) -> Result<Record> {
        let at = self.at;
        let name = self.text(LONGEST_NAME).map_err(|fault| fault.of(path, &format!("tensor {number}"), at))?;
        let at = self.at;
        let mut rest = || {
            let dimensions = self.u32()?;
            if dimensions > MOST_DIMENSIONS {
                return Err(Fault::Wrong(format!("has {dimensions} dimensions; {MOST_DIMENSIONS} are the most")));
            }
            let mut shape = Vec::with_capacity(MOST_DIMENSIONS as usize);
            for _ in 0..dimensions {
                let size = self.u64()?;
                let size = usize::try_from(size).ok().filter(|&size| size <= isize::MAX as usize);
                shape.push(size.ok_or_else(|| Fault::Wrong("is more than can be addressed".into()))?);
            }
            shape.reverse();
            Ok((shape, self.u32()?, self.u64()?))
        };
        let rest = rest();
        let (shape, code, offset) = rest.map_err(|fault| fault.of(path, &format!("tensor {name:?}"), at))?;
        Ok(Record { name, shape, code, offset })
    }
}

/// Reads all but the tensors' bytes of the file at `path`.
pub(super) fn read(file: &File, path: &Path, length: u64) -> Result<Container> {
    let mut reader = Reader::new(file, length, 0).map_err(Error::io("read", path))?;
    let head = |reader: &mut Reader<'_>| {
        let [magic, version] = [reader.array::<4>()?, reader.array::<4>()?];
        Ok((magic, version))
    };
    let (magic, version) = head(&mut reader).map_err(|fault: Fault| fault.of(path, "its first bytes", 0))?;
    check_version(path, magic, u32::from_le_bytes(version))?;
    // A tensor has a name, dimensions, type and offset; a key a name, a type and a value.
    let counts = reader.count(8 + 4 + 4 + 8).and_then(|tensors| Ok((tensors, reader.count(8 + 4 + 1)?)));
    let (tensors, keys) = counts.map_err(|fault| fault.of(path, "its number of tensors or keys", 8))?;
    let mut metadata = BTreeMap::new();
    for number in 0..keys {
        let (key, value) = reader.pair(path, number)?;
        if metadata.contains_key(&key) {
            return Err(Error::checkpoint(path, format!("has the key {key:?} twice")));
        }
        metadata.insert(key, value);
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Unsigned(size)) if size.is_power_of_two() && *size <= 1 << 30 => *size,
        Some(other) => {
            let cause = format!("general.alignment is {other}, expected a power of two up to 2^30");
            return Err(Error::checkpoint(path, cause));
        }
    };
    let mut records = Vec::new();
    for number in 0..tensors {
        records.push(reader.record(path, number)?);
    }
    let data = reader.at.next_multiple_of(alignment);
    let mut names = HashSet::with_capacity(records.len());
    for Record { name, offset, .. } in &mut records {
        let name: &str = name;
        if !names.insert(name) {
            return Err(Error::tensor(path, name, "is listed twice"));
        }
        let fault = |cause: String| Error::tensor(path, name, cause);
        if !offset.is_multiple_of(alignment) {
            return Err(fault(format!("begins at {offset} of the data, no multiple of the alignment, {alignment}")));
        }
        *offset = data
            .checked_add(*offset)
            .ok_or_else(|| fault(format!("begins at {offset} of the data, outside any file")))?;
    }
    Ok(Container { metadata, records })
}

fn check_version(path: &Path, magic: [u8; 4], version: u32) -> Result<()> {
    let unsupported = |what: String, remedy: &str| {
        Err(Error::Unsupported { what: format!("{}: {what}", path.display()), remedy: remedy.into() })
    };
    match (&magic, version) {
        (b"GGUF", 2 | 3) => Ok(()),
        (b"FUGG", _) | (b"GGUF", 0x0100_0000..) => {
            unsupported("a big-endian GGUF file".into(), "take the little-endian one, which is the usual")
        }
        (b"GGUF", _) => unsupported(
            format!("version {version} of GGUF"),
            "versions 2 and 3 are read; convert the model anew with current tools",
        ),
        _ => Err(Error::checkpoint(path, "is no folder; name the folder that a model was saved to, or a GGUF file")),
    }
}
