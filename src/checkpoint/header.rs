//! The header of a safetensors file (<https://huggingface.co/docs/safetensors>): eight bytes of little-endian length, then
//! JSON that maps each name to its type, shape and byte range in the rest of the file.

use std::{
    collections::HashMap,
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
    checkpoint::StoredTensor,
    dtype::DType,
    error::{Error, Result},
};

/// The format's own limit on the JSON's length.
const MAX_HEADER: u64 = 100_000_000;

/// Reads and checks the header of the file at `path`. The byte ranges must follow one another without hole or overlap up to
/// the end of the file, as the format demands; whether they leave the file is for [`super::Checkpoint`] to see.
///
/// What the `safetensors` crate refuses is refused, except in fields of a tensor that the format does not have: those are
/// skipped unread. Of what it accepts, duplicate names and types that [`DType`] lacks are refused.
pub(super) fn read(path: &Path) -> Result<Vec<StoredTensor>> {
    let malformed = |cause: String| Error::checkpoint(path, cause);
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        return Err(malformed("is no regular file".into()));
    }
    let length = metadata.len();
    if length < 8 {
        return Err(malformed(format!("is {length} bytes long, too short for a safetensors file; is it truncated?")));
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
    let Header(records) =
        serde_json::from_slice(&json).map_err(|e| malformed(format!("its header is malformed: {e}")))?;

    let mut tensors = Vec::with_capacity(records.len());
    let mut ranges = Vec::with_capacity(records.len());
    for (name, HeaderEntry { dtype: dtype_name, shape, data_offsets: [start, end] }) in records {
        let tensor_error = |cause: String| Error::tensor(path, &name, cause);
        let dtype =
            DType::from_name(&dtype_name).ok_or_else(|| tensor_error(format!("has the unknown type {dtype_name}")))?;
        let bytes = dtype.bytes_of(&shape).map(|bytes| bytes as u64);
        if end.checked_sub(start).is_none_or(|span| Some(span) != bytes) {
            return Err(tensor_error(format!("its range {start}..{end} does not fit {dtype} {shape:?}")));
        }
        let offset =
            data.checked_add(start).ok_or_else(|| tensor_error(format!("starts at {start}, outside any file")))?;
        ranges.push((start, end, tensors.len()));
        tensors.push(StoredTensor { name, file: PathBuf::from(path), offset, dtype, shape });
    }
    ranges.sort_unstable();
    let (mut filled, mut before) = (0, "");
    for (start, end, index) in ranges {
        let name = &tensors[index].name;
        if start > filled {
            return Err(Error::tensor(path, name, format!("a hole of {} bytes lies before it", start - filled)));
        }
        if start < filled {
            return Err(Error::tensor(path, name, format!("overlaps tensor {before}")));
        }
        (filled, before) = (end, name);
    }
    // A range past the end is left to the caller's check, which names the tensor.
    if filled < length - data {
        return Err(malformed(format!("has {} bytes after its last tensor", length - data - filled)));
    }
    Ok(tensors)
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The JSON object in file order, duplicates kept so that they can be refused; `__metadata__` is checked and dropped.
struct Header(Vec<(String, HeaderEntry)>);

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
                Ok(Header(records))
            }
        }
        deserializer.deserialize_map(Records)
    }
}
