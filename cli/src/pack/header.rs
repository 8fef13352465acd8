//! The header of a safetensors file, with what it says of packed tensors: read, checked and written.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use layer_streamer::{
    DType, files,
    packed::{Description, KEY, LEAST, Table, VERSION},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::{Map, Value, json};

use super::Failure;

/// The format's own limit on the JSON's length.
const LONGEST: u64 = 100_000_000;

/// What to do about a file whose header is damaged.
pub const AGAIN: &str = "take the file anew from where it came from";

/// A packed file has the checksum of each tensor that is not packed under this key, a colon and the tensor's name.
const CHECKSUM: &str = "layer_streamer.xxh3";

/// A tensor, as it is when it is not packed, and where it lies.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// As the file spells it, since it may be unknown.
    pub dtype: String,
    pub shape: Vec<usize>,
    /// From the file's first byte.
    pub start: u64,
    pub end: u64,
    pub packed: Option<Description>,
    /// XXH3 of its bytes when it is not packed, if the file says it.
    pub checksum: Option<u64>,
}

impl Tensor {
    /// Bytes that it takes in the file.
    pub fn stored(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is worth packing, as far as can be known beforehand. Scales of quantised weights are used as they are stored.
    pub fn can_be_packed(&self) -> bool {
        let is_scale = ["scale", "scale_inv", "scales"].iter().any(|end| self.name.ends_with(end));
        let is_plain = self.packed.is_none() && self.dtype == DType::BF16.name();
        is_plain && !is_scale && self.stored() >= 2 * LEAST as u64
    }

    /// Bytes that it takes when it is not packed.
    pub fn bytes(&self) -> u64 {
        self.packed.as_ref().map_or(self.stored(), |packed| 2 * packed.weights() as u64)
    }
}

pub struct Header {
    /// Without what is said of packed tensors.
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub tensors: Vec<Tensor>,
}

impl Header {
    /// Whether a tensor is packed.
    pub fn is_packed(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.packed.is_some())
    }

    /// Reads it, and checks that the tensors fill the file without hole or overlap.
    ///
    /// # Errors
    /// Where the file cannot be read, is no safetensors file, or is packed in a way that is not known.
    pub fn read(file: &File, path: &Path) -> Result<Self, Failure> {
        let refused = |cause: String| Failure::from(format!("{}: {cause}", path.display()));
        let length = file.metadata().map_err(super::cannot("examine", path))?.len();
        let json = match json_of(file, length).map_err(super::cannot("read", path))? {
            Ok(json) => json,
            Err(cause) => return Err(refused(cause)),
        };
        let Records { metadata, records } = serde_json::from_slice(&json)
            .map_err(|error| refused(format!("its header is malformed: {error}; {AGAIN}")))?;
        let data = 8 + json.len() as u64;
        let mut tensors = Vec::with_capacity(records.len());
        for (name, Record { dtype, shape, data_offsets: [start, end] }) in records {
            let known = DType::from_name(&dtype).map(|dtype| dtype.bytes_of(&shape).map(|bytes| bytes as u64));
            let span = end.checked_sub(start);
            if span.is_none() || known.is_some_and(|bytes| bytes != span) || end > length - data {
                let cause = format!("tensor {name}: its range {start}..{end} does not fit {dtype} {shape:?}");
                let file = format!("or a file with {} bytes of tensors; is it truncated? Then {AGAIN}", length - data);
                return Err(refused(format!("{cause}, {file}")));
            }
            let (start, end) = (data + start, data + end);
            tensors.push(Tensor { name, dtype, shape, start, end, packed: None, checksum: None });
        }
        tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
        let mut at = data;
        for Tensor { name, start, end, .. } in &tensors {
            if *start != at {
                return Err(refused(format!("tensor {name} begins at byte {start}, but the one before ends at {at}")));
            }
            at = *end;
        }
        if at != length {
            return Err(refused(format!("has {} bytes after its last tensor", length - at)));
        }
        let mut names: Vec<_> = tensors.iter().map(|tensor| &tensor.name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(refused(format!("tensor {} is listed twice", pair[0])));
        }
        let mut header = Self { metadata, tensors };
        header.describe().map_err(refused)?;
        Ok(header)
    }

    /// Takes what the metadata say of packed tensors.
    fn describe(&mut self) -> Result<(), String> {
        let version = self.metadata.remove(KEY);
        if let Some(version) = version.as_ref().filter(|version| *version != VERSION) {
            let known = format!("this program knows {VERSION} alone; take a newer one");
            return Err(format!("is packed in version {version} of the format, {known}"));
        }
        let is_packed = version.is_some();
        for tensor in self.tensors.iter_mut().filter(|_| is_packed) {
            let name = &tensor.name;
            if let Some(text) = self.metadata.remove(&format!("{CHECKSUM}:{name}")) {
                let checksum = u64::from_str_radix(&text, 16);
                tensor.checksum = Some(checksum.map_err(|_| format!("tensor {name}: {text:?} is no checksum"))?);
            }
            let Some(text) = self.metadata.remove(&format!("{KEY}:{name}")) else { continue };
            let description =
                Description::from_json(&text).map_err(|cause| format!("packed tensor {name}: {cause}; {AGAIN}"))?;
            if tensor.dtype != DType::U8.name() || description.bytes() as u64 != tensor.stored() {
                let (stored, described) = (tensor.stored(), description.bytes());
                let has = format!("has {stored} bytes of {}", tensor.dtype);
                return Err(format!("packed tensor {name}: {has}, its description says {described} of U8; {AGAIN}"));
            }
            (tensor.dtype, tensor.shape) = (DType::BF16.name().into(), description.shape.clone());
            tensor.checksum = Some(description.checksum);
            tensor.packed = Some(description);
        }
        let described = [KEY, CHECKSUM].map(|key| format!("{key}:"));
        let other = |key: &&String| described.iter().any(|described| key.starts_with(described));
        self.metadata
            .keys()
            .find(other)
            .map_or(Ok(()), |key| Err(format!("has {key} in its metadata, but no such tensor or no version; {AGAIN}")))
    }

    /// What a file begins with that has these tensors where their ranges say. Up to the first of them it is filled with spaces.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Failure> {
        let data = self.tensors.first().map(|tensor| tensor.start);
        let mut bytes = vec![0; 8];
        serde_json::to_writer(&mut bytes, &self.to_json(data.unwrap_or(0)))?;
        let length = data.map_or(bytes.len().next_multiple_of(8), |data| data as usize);
        if bytes.len() > length {
            return Err(format!("a header of {} bytes does not fit into {length}", bytes.len()).into());
        }
        bytes.resize(length, b' ');
        bytes[..8].copy_from_slice(&(length as u64 - 8).to_le_bytes());
        Ok(bytes)
    }

    /// Bytes that [`to_bytes`](Self::to_bytes) takes at most when these tensors are packed, or when they are unpacked.
    pub fn most_bytes(&self, packing: bool) -> Result<u64, Failure> {
        let mut at = 0;
        let most = |tensor: &Tensor| {
            let mut tensor = tensor.clone();
            let bytes = tensor.bytes();
            tensor.packed = (packing && tensor.can_be_packed()).then(|| {
                let part = Description::part_of(&tensor.shape);
                let parts = tensor.shape.iter().product::<usize>().div_ceil(part);
                let (table, lengths) = (Table([u8::MAX; 13]), vec![9_999_999; parts]);
                Description { shape: tensor.shape.clone(), table, checksum: u64::MAX, part, lengths }
            });
            tensor.checksum = packing.then_some(u64::MAX);
            (tensor.start, tensor.end) = (at, at + bytes);
            at = tensor.end;
            tensor
        };
        let header = Self { metadata: self.metadata.clone(), tensors: self.tensors.iter().map(most).collect() };
        let bytes = (8 + serde_json::to_vec(&header.to_json(0))?.len() as u64).next_multiple_of(8);
        if bytes > LONGEST {
            return Err(format!("its header would take {bytes} bytes; safetensors allows {LONGEST}").into());
        }
        Ok(bytes)
    }

    fn to_json(&self, data: u64) -> Value {
        let mut metadata: Map<_, _> = self.metadata.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        if self.is_packed() {
            metadata.insert(KEY.into(), VERSION.into());
        }
        let mut json = Map::new();
        for Tensor { name, dtype, shape, start, end, packed, checksum } in &self.tensors {
            let offsets = [start - data, end - data];
            let record = match packed {
                Some(packed) => {
                    metadata.insert(format!("{KEY}:{name}"), packed.to_json().into());
                    json!({ "dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets })
                }
                None => {
                    if let Some(checksum) = checksum.filter(|_| self.is_packed()) {
                        metadata.insert(format!("{CHECKSUM}:{name}"), format!("{checksum:016x}").into());
                    }
                    json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets })
                }
            };
            json.insert(name.clone(), record);
        }
        if !metadata.is_empty() {
            json.insert("__metadata__".into(), metadata.into());
        }
        json.into()
    }
}

/// The JSON of a file of so many bytes, or why it has none.
fn json_of(file: &File, length: u64) -> io::Result<Result<Vec<u8>, String>> {
    let mut file = file;
    let mut prefix = Vec::new();
    io::Seek::rewind(&mut file)?;
    file.take(1024).read_to_end(&mut prefix)?;
    if let Some(cause) = files::wrong_contents(&prefix) {
        return Ok(Err(cause));
    }
    let Some(bytes) = prefix.first_chunk().map(|first| u64::from_le_bytes(*first)) else {
        return Ok(Err(format!("is {length} bytes long, too short for a safetensors file; download it again")));
    };
    if bytes > LONGEST {
        return Ok(Err(format!("claims a header of {bytes} bytes, more than safetensors allows ({LONGEST})")));
    }
    if bytes > length - 8 {
        let end = bytes + 8;
        return Ok(Err(format!("its header ends at byte {end}, the file at byte {length}; is it truncated?")));
    }
    let mut json = vec![0; bytes as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut json, 8)?;
    Ok(Ok(json))
}

#[derive(Deserialize)]
struct Record {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The JSON object in the file's order, with duplicates, so that they can be refused.
#[derive(Default)]
struct Records {
    metadata: BTreeMap<String, String>,
    records: Vec<(String, Record)>,
}

impl<'de> Deserialize<'de> for Records {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Records;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Records, A::Error> {
                let mut all = Records::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        all.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        let record = map.next_value();
                        let record = record.map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                        all.records.push((name, record));
                    }
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_quantised_weights_are_not_packed() {
        let tensor = |name: &str| Tensor {
            name: name.into(),
            dtype: "BF16".into(),
            shape: vec![1 << 20],
            start: 0,
            end: 2 << 20,
            packed: None,
            checksum: None,
        };
        assert!(tensor("model.layers.0.mlp.up_proj.weight").can_be_packed());
        for name in ["weight_scale", "weight_scale_inv", "scales"] {
            assert!(!tensor(&format!("model.layers.0.mlp.up_proj.{name}")).can_be_packed(), "{name}");
        }
    }
}
