//! A checkpoint: a validated table that says where each tensor lies.
//!
//! It comes from a Hugging Face folder or a GGUF file ([`Checkpoint::open`]), or from the caller ([`Checkpoint::from_table`]). All
//! pass the same checks before anything is reserved, so that whatever is planned from a table can be read as planned.

mod decoder;
mod folder;
pub mod gguf;
mod header;
mod quantisation;

use std::{
    collections::HashMap,
    fmt,
    fs::{File, Metadata},
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    dtype::DType,
    error::{Error, Result},
    packed::{Description, Parts},
};
pub use quantisation::Quantisation;
#[cfg(feature = "model")]
pub(crate) use quantisation::not_read;

/// Where one tensor lies, what it holds, and how it is shaped (row-major).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// The full name, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// The file that holds the bytes.
    pub file: PathBuf,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
}

/// A tensor of a checkpoint, with its file as an index into [`Checkpoint::files`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorEntry {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    /// As it is stored.
    pub(crate) bytes: usize,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// How, if its bytes are packed.
    pub(crate) packed: Option<PackedRange>,
}

impl TensorEntry {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes as u64
    }

    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// So many rows of this matrix of rows of `width` elements, from row `start` on: whole parts, where it is packed.
    fn rows(&self, start: usize, count: usize, width: usize) -> Self {
        let (before, bytes, packed) = match &self.packed {
            None => {
                let row = self.dtype.bytes(width);
                (start * row, count * row, None)
            }
            Some(packed) => {
                let (all, part) = (packed.parts(), packed.parts().part);
                let range = start * width / part..((start + count) * width).div_ceil(part);
                let bytes = |range: Range<usize>| Parts { lengths: &all.lengths[range], ..all }.bytes();
                let (before, of_rows) = (bytes(0..range.start), bytes(range.clone()));
                (before, of_rows, Some(packed.among(range)))
            }
        };
        Self { offset: self.offset + before as u64, bytes, shape: vec![count, width], packed, ..*self }
    }
}

/// Parts of a packed tensor that follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PackedRange {
    of: Arc<Description>,
    parts: Range<usize>,
}

impl PackedRange {
    /// All of a tensor's.
    pub(crate) fn all(of: Description) -> Self {
        Self { parts: 0..of.lengths.len(), of: Arc::new(of) }
    }

    /// Those among these parts, by number.
    fn among(&self, range: Range<usize>) -> Self {
        let first = self.parts.start;
        Self { of: self.of.clone(), parts: first + range.start..first + range.end }
    }

    /// What they are.
    pub(crate) fn parts(&self) -> Parts<'_> {
        let whole = self.of.parts();
        let Range { start, end } = self.parts;
        let weights = (end * whole.part).min(whole.weights) - start * whole.part;
        Parts { weights, lengths: &whole.lengths[start..end], ..whole }
    }
}

/// By what a file is known again: length in bytes, and when it was last written to (seconds, nanoseconds). Not by its inode,
/// which some network file systems number anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileState(u64, i64, i64);

impl FileState {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self(metadata.len(), metadata.mtime(), metadata.mtime_nsec())
    }

    /// Whether `file` is still the one that had this state. Who writes through a shared mapping, or sets the time back, is not
    /// found out.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is another now; [`Error::Io`] if it cannot be examined.
    pub(crate) fn check(self, file: &File, path: &Path) -> Result<()> {
        // A closure, since an error takes memory, and this is asked in every pass.
        let now = file.metadata().map_err(|error| Error::io("examine", path)(error))?;
        if Self::of(&now) == self {
            return Ok(());
        }
        Err(Error::checkpoint(path, "has changed since the checkpoint was opened; open it again"))
    }
}

/// A validated table of tensors. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Checkpoint(Arc<TensorTable>);

#[derive(Clone, Debug)]
struct TensorTable {
    source: PathBuf,
    files: Vec<PathBuf>,
    /// By file: what it was when the table was checked against it.
    states: Vec<FileState>,
    entries: HashMap<String, TensorEntry>,
    /// Tensors that the folder names and that cannot be read. That is no fault as long as nobody asks for them.
    unreadable: HashMap<String, Unreadable>,
}

/// Why a tensor that a folder names cannot be read.
#[derive(Clone, Debug)]
enum Unreadable {
    /// The index places it in this shard, which does not have it.
    Absent(Arc<Path>),
    /// It is in this file, of a type that [`DType`] lacks.
    Type(Arc<Path>, String),
    /// It is in this GGUF file, under this name, of a type that is not read.
    Blocks(Arc<Path>, String, String),
    /// Both of these shards have it, and the index names neither.
    Twice(Arc<Path>, Arc<Path>),
    /// Its shard cannot be read.
    Shard(Arc<Error>),
}

impl Unreadable {
    fn error(&self, name: &str) -> Error {
        match self {
            Self::Absent(shard) => {
                Error::tensor(&**shard, name, "is not in this file, where the index places it; download both again")
            }
            Self::Type(file, dtype) => Error::tensor(&**file, name, format!("has the unknown type {dtype}")),
            Self::Blocks(file, stored, kind) => Error::Unsupported {
                what: format!("{}: tensor {stored}: the type {kind}", file.display()),
                remedy: "take a file of the model in another type, such as Q4_K_M or Q8_0, or its safetensors version"
                    .into(),
            },
            Self::Twice(one, other) => {
                let cause = format!("is in {} too, and the index does not say which counts", other.display());
                Error::tensor(&**one, name, cause)
            }
            Self::Shard(error) => (**error).clone(),
        }
    }
}

impl Checkpoint {
    /// Opens a Hugging Face folder: `model.safetensors`, or else `model.safetensors.index.json` with its shards, as transformers
    /// does. Shards may lie in subfolders. A link must lead to a file in the folder, or to the hub's cache that the folder is in.
    /// Or opens a GGUF file, or the first part of one that is split; its tensors have the names of the Hugging Face folder.
    ///
    /// A shard that is missing or malformed, a tensor of an unknown type, and one that the index lists and no shard has are
    /// errors for those alone who ask for such a tensor: see [`unreadable`](Self::unreadable).
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be read, [`Error::Checkpoint`] where one is malformed, naming file and tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if let Some(file) = gguf::Gguf::if_file(path)? {
            return Self::of_gguf(&file);
        }
        let folder::Found { tensors, packed, unreadable } = folder::read(path)?;
        Self::readable(path, tensors, unreadable)?.with_packed(packed)
    }

    /// The tensors of a GGUF file.
    pub(crate) fn of_gguf(file: &gguf::Gguf) -> Result<Self> {
        let (tensors, unreadable) = file.tensors()?;
        Self::readable(file.path(), tensors, unreadable)
    }

    /// The same as [`build`](Self::build); where nothing can be read, why.
    fn readable(source: &Path, tensors: Vec<StoredTensor>, unreadable: HashMap<String, Unreadable>) -> Result<Self> {
        if tensors.is_empty()
            && let Some((name, why)) = unreadable.iter().min_by_key(|(name, _)| *name)
        {
            return Err(why.error(name));
        }
        Self::build(source, tensors, unreadable)
    }

    /// Takes the caller's own table, for weights in files of any layout. Tensors must lie inside their files and must not
    /// overlap; names must be unique.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_table(tensors: impl IntoIterator<Item = StoredTensor>) -> Result<Self> {
        Self::build(Path::new("tensor table"), tensors.into_iter().collect(), HashMap::new())
    }

    fn build(source: &Path, tensors: Vec<StoredTensor>, unreadable: HashMap<String, Unreadable>) -> Result<Self> {
        if tensors.is_empty() {
            return Err(Error::checkpoint(source, "holds no tensor"));
        }
        let (mut files, mut states) = (Vec::<PathBuf>::new(), Vec::new());
        let mut indices = HashMap::<PathBuf, usize>::new();
        let mut entries = HashMap::<String, TensorEntry>::with_capacity(tensors.len());
        for StoredTensor { name, file: path, offset, dtype, shape } in tensors {
            let file = match indices.get(&path) {
                Some(&file) => file,
                None => {
                    let metadata = std::fs::metadata(&path).map_err(Error::io("open", &path))?;
                    if !metadata.is_file() {
                        return Err(Error::tensor(path, &name, "its file is no regular file"));
                    }
                    indices.insert(path.clone(), files.len());
                    files.push(path.clone());
                    states.push(FileState::of(&metadata));
                    files.len() - 1
                }
            };
            let (bytes, length) = (dtype.bytes_of(&shape), states[file].0);
            let bytes = bytes_within(&path, &name, bytes, format_args!("{dtype} {shape:?}"), offset, length)?;
            if entries.contains_key(&name) {
                return Err(Error::tensor(&path, &name, "is listed twice"));
            }
            entries.insert(name, TensorEntry { file, offset, bytes, dtype, shape, packed: None });
        }
        refuse_overlap(&files, &entries)?;
        Ok(Self(Arc::new(TensorTable { source: source.to_owned(), files, states, entries, unreadable })))
    }

    /// The same table, in which the bytes of these tensors, of [`DType::U8`] in one dimension, are packed weights. They are tensors of
    /// [`DType::BF16`] then.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no such tensor, its bytes are others than its description says, or no tensor can be as that
    /// says.
    pub fn with_packed(self, packed: impl IntoIterator<Item = (String, Description)>) -> Result<Self> {
        let mut packed = packed.into_iter().peekable();
        if packed.peek().is_none() {
            return Ok(self);
        }
        let mut table = Arc::unwrap_or_clone(self.0);
        for (name, description) in packed {
            let Some(entry) = table.entries.get_mut(&name) else {
                return Err(Error::tensor(
                    &table.source,
                    &name,
                    "is not in the file that describes its packed weights",
                ));
            };
            description.check().map_err(|cause| {
                let cause = format!("the description of its packed weights is malformed: {cause}");
                Error::tensor(&table.files[entry.file], &name, cause)
            })?;
            if entry.dtype != DType::U8 || entry.shape != [description.bytes()] {
                let (dtype, shape, bytes) = (entry.dtype, &entry.shape, description.bytes());
                let cause =
                    format!("is {dtype} {shape:?}, but its packed weights are U8 [{bytes}] by their description");
                return Err(Error::tensor(&table.files[entry.file], &name, cause));
            }
            let (dtype, shape) = (DType::BF16, description.shape.clone());
            *entry = TensorEntry { dtype, shape, packed: Some(PackedRange::all(description)), ..*entry };
        }
        Ok(Self(Arc::new(table)))
    }

    /// The tensors that can be read, by name.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<_> = self.0.entries.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// Tensors that the folder names and that cannot be read, by name, with the reason: what is said to those who ask for one.
    pub fn unreadable(&self) -> impl Iterator<Item = (&str, Error)> {
        let mut unreadable: Vec<_> = self.0.unreadable.iter().collect();
        unreadable.sort_unstable_by_key(|(name, _)| *name);
        unreadable.into_iter().map(|(name, why)| (name.as_str(), why.error(name)))
    }

    /// Element type and shape of a tensor, if there is one of that name that can be read.
    pub fn describe(&self, name: &str) -> Option<(DType, &[usize])> {
        self.0.entries.get(name).map(|entry| (entry.dtype, entry.shape.as_slice()))
    }

    /// What is known of a tensor's packed weights; `None` if it is stored as it is, or there is none of that name.
    pub fn packing(&self, name: &str) -> Option<&Description> {
        self.0.entries.get(name)?.packed.as_ref().map(|packed| &*packed.of)
    }

    /// The file that holds a tensor, and where in it the tensor starts (bytes).
    pub fn location(&self, name: &str) -> Option<(&Path, u64)> {
        self.0.entries.get(name).map(|entry| (self.0.files[entry.file].as_path(), entry.offset))
    }

    /// The same table, in which the rows of the matrix `name` are tensors of their own besides, `rows` at a time, under the names
    /// that are returned, in order: for units of a part of an output head, say. Of a packed matrix as many as whole parts of it
    /// have: up to `rows`, or one part; all, if its parts are no whole rows.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no such tensor, or it is no matrix.
    pub fn with_rows(&self, name: &str, rows: usize) -> Result<(Self, Vec<String>)> {
        let (mut table, whole) = ((*self.0).clone(), self.entry(name)?.clone());
        let [height, width] = whole.shape[..] else {
            return Err(Error::tensor(&self.0.source, name, format!("has the shape {:?}, no rows", whole.shape)));
        };
        let rows = match whole.packed.as_ref().map(|packed| packed.parts().part) {
            None => rows.max(1),
            Some(part) if part.is_multiple_of(width) => (rows / (part / width)).max(1) * (part / width),
            Some(_) => height,
        };
        let mut parts = Vec::new();
        for start in (0..height).step_by(rows) {
            let count = rows.min(height - start);
            let part = format!("{name}[{start}..{}]", start + count);
            table.entries.insert(part.clone(), whole.rows(start, count, width));
            parts.push(part);
        }
        Ok((Self(Arc::new(table)), parts))
    }

    /// The folder or file it was opened from, for messages.
    pub fn source(&self) -> &Path {
        &self.0.source
    }

    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.0.files
    }

    /// The files with what they were when the table was checked.
    pub(crate) fn file_states(&self) -> impl Iterator<Item = (&PathBuf, FileState)> {
        self.0.files.iter().zip(self.0.states.iter().copied())
    }

    /// Bytes of file `file`.
    pub(crate) fn length(&self, file: usize) -> u64 {
        self.0.states[file].0
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&TensorEntry> {
        let none = || Error::tensor(&self.0.source, name, "is not in the checkpoint");
        self.0.entries.get(name).ok_or_else(|| self.why_unreadable(name).unwrap_or_else(none))
    }

    /// Why this tensor cannot be read, if the folder names it.
    pub(crate) fn why_unreadable(&self, name: &str) -> Option<Error> {
        self.0.unreadable.get(name).map(|why| why.error(name))
    }
}

/// `bytes`, those of a tensor at `offset`, which is `described`, in a file of `length` bytes.
///
/// # Errors
/// [`Error::Checkpoint`] if there is no such number of bytes (`None`), or they do not lie in the file.
fn bytes_within(
    path: &Path,
    name: &str,
    bytes: Option<usize>,
    described: fmt::Arguments<'_>,
    offset: u64,
    length: u64,
) -> Result<usize> {
    let Some(bytes) = bytes.filter(|&bytes| bytes <= isize::MAX as usize) else {
        return Err(Error::tensor(
            path,
            name,
            format!("{described} is more than can be addressed, or has rows that are no whole blocks"),
        ));
    };
    if offset.checked_add(bytes as u64).is_none_or(|end| end > length) {
        let cause = format!(
            "its {bytes} bytes from byte {offset} on do not fit in the file of {length} bytes; is it truncated?"
        );
        return Err(Error::tensor(path, name, cause));
    }
    Ok(bytes)
}

fn refuse_overlap(files: &[PathBuf], entries: &HashMap<String, TensorEntry>) -> Result<()> {
    let mut order: Vec<_> = entries.iter().filter(|(_, entry)| entry.bytes > 0).collect();
    order.sort_unstable_by_key(|(_, entry)| (entry.file, entry.offset));
    for pair in order.windows(2) {
        let ((name, entry), (next_name, next)) = (pair[0], pair[1]);
        if entry.file == next.file && next.offset < entry.end() {
            return Err(Error::tensor(&files[entry.file], next_name, format!("overlaps tensor {name}")));
        }
    }
    Ok(())
}
