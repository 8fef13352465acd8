//! The header of a safetensors file (<https://huggingface.co/docs/safetensors>): eight bytes of little-endian length, then
//! JSON that maps each name to its type, shape and byte range in the rest of the file.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{
    checkpoint::{StoredTensor, bytes_within},
    dtype::DType,
    error::{Error, Result},
    files,
    packed::{self, Description},
};

/// The format's own limit on the JSON's length.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of one file.
pub(super) struct FileTensors {
    pub(super) known: Vec<StoredTensor>,
    /// Those of a type that [`DType`] lacks: name, and the type as the file spells it.
    pub(super) unknown: Vec<(String, String)>,
    /// What the file says of those of `known` that are packed, by name.
    pub(super) packed: HashMap<String, Description>,
}

/// Reads and checks the header of the file at `path`. The byte ranges must follow one another without hole or overlap up to
/// the end of the file, as the format demands.
///
/// What the `safetensors` crate refuses is refused, with two exceptions: fields of a tensor that the format does not have are
/// skipped unread, and a type that is not known keeps only its own tensor from being read. Duplicate names are refused.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read, [`Error::Checkpoint`] where it is malformed. That error says what the file is
/// instead, if it is something well known.
pub(super) fn read(path: &Path) -> Result<FileTensors> {
    parse(path).map_err(|error| match error {
        Error::Checkpoint { .. } => instead(path).map_or(error, |cause| Error::checkpoint(path, cause)),
        other => other,
    })
}

/// What the file is, if no safetensors file but something that often lies in its place.
fn instead(path: &Path) -> Option<String> {
    // A pipe would be waited for.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut start = [0; 1024];
    let read = File::open(path).ok()?.read_at(&mut start, 0).ok()?;
    let start = &start[..read];
    // The length that a safetensors file begins with is no text: its upper half is zero.
    let of_text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    let text = || {
        let shown = &start[..read.min(80)];
        (read >= 8 && shown.iter().all(of_text)).then(|| {
            let shown = String::from_utf8_lossy(shown);
            format!("is text in place of weights, which begins with {:?}; download the file again", shown.trim())
        })
    };
    files::wrong_contents(start).or_else(text)
}

fn parse(path: &Path) -> Result<FileTensors> {
    let malformed = |cause: String| Error::checkpoint(path, cause);
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        return Err(malformed("is no regular file".into()));
    }
    let length = metadata.len();
    if length < 8 {
        return Err(malformed(format!(
            "is {length} bytes long, too short for a safetensors file; is it truncated? Download it again"
        )));
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0).map_err(Error::io("read", path))?;
    let json_bytes = u64::from_le_bytes(prefix);
    if json_bytes > MAX_HEADER {
        return Err(malformed(format!(
            "claims a header of {json_bytes} bytes, more than safetensors allows ({MAX_HEADER})"
        )));
    }
    let data = 8 + json_bytes;
    if data > length {
        return Err(malformed(format!("its header ends at byte {data}, the file at byte {length}; is it truncated?")));
    }
    let mut json = vec![0; json_bytes as usize];
    file.read_exact_at(&mut json, 8).map_err(Error::io("read", path))?;
    let Header { records, metadata } =
        serde_json::from_slice(&json).map_err(|e| malformed(format!("its header is malformed: {e}")))?;

    check(path, &records, data, length)?;
    let packed = packed(path, &records, &metadata)?;
    let (mut known, mut unknown) = (Vec::with_capacity(records.len()), Vec::new());
    for (name, HeaderEntry { dtype, shape, data_offsets: [start, _] }) in records {
        match DType::from_name(&dtype) {
            Some(dtype) => {
                known.push(StoredTensor { name, file: PathBuf::from(path), offset: data + start, dtype, shape });
            }
            None => unknown.push((name, dtype)),
        }
    }
    Ok(FileTensors { known, unknown, packed })
}

/// What the file's metadata say of packed tensors (`docs/packed.md`).
fn packed(
    path: &Path,
    records: &[(String, HeaderEntry)],
    metadata: &HashMap<String, String>,
) -> Result<HashMap<String, Description>> {
    let version = metadata.get(packed::KEY).map(String::as_str);
    let described = metadata.iter().filter_map(|(key, value)| {
        let name = key.strip_prefix(packed::KEY)?.strip_prefix(':')?;
        Some((name, value))
    });
    let mut described = described.peekable();
    match version {
        None if described.peek().is_none() => return Ok(HashMap::new()),
        Some(packed::VERSION) => {}
        other => {
            let version = other.map_or("no version".into(), |version| format!("version {version:?}"));
            let what = format!("{}: packed weights in {version} of their format", path.display());
            let remedy =
                format!("this program reads version {:?}; take a newer one, or pack the model anew", packed::VERSION);
            return Err(Error::Unsupported { what, remedy });
        }
    }
    let stored: HashSet<&str> = records.iter().map(|(name, _)| name.as_str()).collect();
    let unknown = records.iter().filter(|(_, record)| DType::from_name(&record.dtype).is_none());
    // They cannot be read for that.
    let unknown: HashSet<&str> = unknown.map(|(name, _)| name.as_str()).collect();
    let described = described.filter(|(name, _)| !unknown.contains(name));
    let parse = |(name, value): (&str, &String)| {
        let refused = |cause: String| Error::tensor(path, name, format!("{cause}; {}", packed::AGAIN));
        if !stored.contains(name) {
            return Err(refused("is not in the file, which describes its packed weights".into()));
        }
        let description = Description::from_json(value)
            .map_err(|cause| refused(format!("the file's description of its packed weights is malformed: {cause}")))?;
        Ok((name.to_owned(), description))
    };
    described.map(parse).collect()
}

/// Whether each name comes once, and each range fits its tensor, lies in the file of `length` bytes, whose data begin at `data`,
/// and begins where the one before ends.
fn check(path: &Path, records: &[(String, HeaderEntry)], data: u64, length: u64) -> Result<()> {
    let mut names = HashSet::with_capacity(records.len());
    let mut ranges = Vec::with_capacity(records.len());
    for (name, HeaderEntry { dtype, shape, data_offsets: [start, end] }) in records {
        let fault = |cause: String| Error::tensor(path, name, cause);
        let span = end.checked_sub(*start).and_then(|span| usize::try_from(span).ok());
        // How large the elements of an unknown type are is not known either.
        let fits = match DType::from_name(dtype) {
            Some(known) => span.is_some() && known.bytes_of(shape) == span,
            None => span.is_some(),
        };
        if !fits {
            return Err(fault(format!("its range {start}..{end} does not fit {dtype} {shape:?}")));
        }
        let offset = data.checked_add(*start).ok_or_else(|| fault(format!("starts at {start}, outside any file")))?;
        bytes_within(path, name, span, format_args!("{dtype} {shape:?}"), offset, length)?;
        if !names.insert(name) {
            return Err(fault("is listed twice".into()));
        }
        ranges.push((*start, *end, name));
    }
    ranges.sort_unstable();
    let (mut filled, mut before) = (0, "");
    for (start, end, name) in ranges {
        if start > filled {
            return Err(Error::tensor(path, name, format!("a hole of {} bytes lies before it", start - filled)));
        }
        if start < filled {
            return Err(Error::tensor(path, name, format!("overlaps tensor {before}")));
        }
        (filled, before) = (end, name);
    }
    if filled < length - data {
        let cause = format!("has {} bytes after its last tensor", length - data - filled);
        return Err(Error::checkpoint(path, cause));
    }
    Ok(())
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The JSON object.
struct Header {
    /// In file order, duplicates kept so that they can be refused.
    records: Vec<(String, HeaderEntry)>,
    /// `__metadata__`.
    metadata: HashMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Records;
        impl<'de> Visitor<'de> for Records {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut records, mut metadata) = (Vec::new(), None::<Option<HashMap<String, String>>>);
                while let Some(name) = map.next_key::<String>()? {
                    if name != "__metadata__" {
                        let record = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                        records.push((name, record));
                    } else if metadata.replace(map.next_value()?).is_some() {
                        return Err(A::Error::duplicate_field("__metadata__"));
                    }
                }
                Ok(Header { records, metadata: metadata.flatten().unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Records)
    }
}
