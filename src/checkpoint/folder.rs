//! A Hugging Face folder: which files hold the tensors, and which of several copies of a tensor counts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    checkpoint::{StoredTensor, Unreadable, header},
    error::{Error, Result},
    files,
    packed::Description,
};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Bytes of an index, which has a line for each tensor: those of the largest models have some ten million.
const LONGEST_INDEX: u64 = 100 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// What a folder has: tensors by name, each once, and those that it names but that cannot be read.
pub(super) struct Found {
    pub(super) tensors: Vec<StoredTensor>,
    /// What is said of those of them that are packed, by name.
    pub(super) packed: HashMap<String, Description>,
    pub(super) unreadable: HashMap<String, Unreadable>,
}

/// All tensors of the folder. As in transformers, `config.json` may name the file that counts (`transformers_weights`); else it
/// is `model.safetensors`, and where there is no such file the index.
pub(super) fn read(folder: &Path) -> Result<Found> {
    if !fs::metadata(folder).map_err(Error::io("open", folder))?.is_dir() {
        return Err(Error::checkpoint(folder, "is no folder; name the folder that a model was saved to"));
    }
    let root = Root::new(folder)?;
    if let Some(named) = named_by_config(folder)? {
        let path = folder.join(&named);
        return if named.ends_with(".json") { sharded(&root, &path) } else { single(&root, &path) };
    }
    let (one, index) = (folder.join(SINGLE), folder.join(INDEX));
    let is_file = found(&one, fs::metadata(&one))?.is_some_and(|metadata| metadata.is_file());
    let has_index = found(&index, fs::metadata(&index))?.is_some();
    if is_file || !has_index && found(&one, one.symlink_metadata())?.is_some() {
        return single(&root, &one);
    }
    if found(&index, index.symlink_metadata())?.is_none() {
        return Err(Error::checkpoint(folder, files_instead(folder)));
    }
    sharded(&root, &index)
}

/// What was found out of a file; `None` if there is none. That it could not be found out is no reason to take another file.
fn found<T>(path: &Path, answer: io::Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("examine", path)(error)),
    }
}

/// The file that `config.json` names. A configuration that makes no sense is for those to refuse who need it.
fn named_by_config(folder: &Path) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Config {
        transformers_weights: Option<String>,
    }
    let path = folder.join("config.json");
    let text = match files::read_small(&path, files::LONGEST_CONFIG) {
        Err(error @ Error::Io { .. }) => return Err(error),
        other => other.ok().flatten(),
    };
    let config = text.and_then(|text| serde_json::from_slice::<Config>(&text).ok());
    let Some(named) = config.and_then(|config| config.transformers_weights) else {
        return Ok(None);
    };
    let suits = [".safetensors", ".safetensors.index.json"].iter().any(|end| named.ends_with(end));
    if suits && is_inside(&named) {
        return Ok(Some(named));
    }
    Err(Error::checkpoint(path, format!("its transformers_weights {named:?} is no safetensors file in the folder")))
}

/// Whether this is the plain path of something inside a folder.
fn is_inside(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn single(root: &Root, path: &Path) -> Result<Found> {
    root.check(path)?;
    let header::FileTensors { known, unknown, packed } = header::read(path)?;
    let path = Arc::<Path>::from(path);
    let unreadable = unknown.into_iter().map(|(name, dtype)| (name, Unreadable::Type(path.clone(), dtype)));
    Ok(Found { tensors: known, packed, unreadable: unreadable.collect() })
}

/// What a shard has of a tensor.
struct Copy {
    tensor: Result<StoredTensor, Unreadable>,
    packed: Option<Description>,
    shard: Arc<Path>,
    /// The index places the tensor in this shard.
    listed: bool,
    /// Another shard that has the tensor, where the index names neither.
    twin: Option<Arc<Path>>,
}

/// The tensors of the shards that an index names. The copy that the index names counts, and else the only one there is.
fn sharded(root: &Root, path: &Path) -> Result<Found> {
    root.check(path)?;
    let json = files::read_small(path, LONGEST_INDEX)?;
    let json = json.ok_or_else(|| Error::io("open", path)(io::Error::from_raw_os_error(libc::ENOENT)))?;
    let Index { weight_map } =
        serde_json::from_slice(&json).map_err(|e| Error::checkpoint(path, format!("is no valid index: {e}")))?;
    if let Some((name, shard)) = weight_map.iter().find(|(_, shard)| !is_inside(shard)) {
        return Err(Error::tensor(path, name, format!("its shard {shard:?} is no plain path inside the folder")));
    }
    // Beside the index, wherever in the folder that is.
    let beside = path.parent().unwrap_or(root.folder);
    let (mut copies, mut failed) = (HashMap::<String, Copy>::new(), HashMap::<&str, Arc<Error>>::new());
    for shard in weight_map.values().collect::<BTreeSet<_>>() {
        let shard_path = beside.join(shard);
        match root.check(&shard_path).and_then(|()| header::read(&shard_path)) {
            Ok(tensors) => {
                let listed = |name: &str| weight_map.get(name) == Some(shard);
                collect(&mut copies, tensors, &Arc::from(shard_path), listed);
            }
            Err(error) => _ = failed.insert(shard, Arc::new(error)),
        }
    }
    let (mut tensors, mut unreadable) = (Vec::with_capacity(copies.len()), HashMap::new());
    let mut all_packed = HashMap::new();
    for (name, Copy { tensor, packed, shard, listed, twin }) in copies {
        // An old copy elsewhere must not stand in for one that is there and cannot be read.
        let instead = weight_map.get(&name).and_then(|place| failed.get(place.as_str())).filter(|_| !listed);
        match (instead, twin, tensor) {
            (Some(error), ..) => _ = unreadable.insert(name, Unreadable::Shard(error.clone())),
            (None, Some(twin), _) => _ = unreadable.insert(name, Unreadable::Twice(shard, twin)),
            (None, None, Err(why)) => _ = unreadable.insert(name, why),
            (None, None, Ok(tensor)) => {
                tensors.push(tensor);
                all_packed.extend(packed.map(|description| (name, description)));
            }
        }
    }
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let mut absent = None::<(&str, Arc<Path>)>;
    for (name, shard) in &weight_map {
        if unreadable.contains_key(name) || tensors.binary_search_by(|tensor| tensor.name.cmp(name)).is_ok() {
            continue;
        }
        let why = match failed.get(shard.as_str()) {
            Some(error) => Unreadable::Shard(error.clone()),
            None => {
                let known = absent.take().filter(|(same, _)| same == shard);
                let (_, path) = absent.insert(known.unwrap_or_else(|| (shard, Arc::from(beside.join(shard)))));
                Unreadable::Absent(path.clone())
            }
        };
        unreadable.insert(name.clone(), why);
    }
    Ok(Found { tensors, packed: all_packed, unreadable })
}

/// Adds what a shard has. `listed` says which of its tensors the index places in it.
fn collect(
    copies: &mut HashMap<String, Copy>,
    header::FileTensors { known, unknown, mut packed }: header::FileTensors,
    shard: &Arc<Path>,
    listed: impl Fn(&str) -> bool,
) {
    let known = known.into_iter().map(|tensor| (tensor.name.clone(), Ok(tensor)));
    let unknown = unknown.into_iter().map(|(name, dtype)| (name, Err(Unreadable::Type(shard.clone(), dtype))));
    for (name, tensor) in known.chain(unknown) {
        let listed = listed(&name);
        let copy = Copy { tensor, packed: packed.remove(&name), shard: shard.clone(), listed, twin: None };
        match copies.entry(name) {
            Entry::Vacant(place) => _ = place.insert(copy),
            Entry::Occupied(mut there) if listed => _ = there.insert(copy),
            Entry::Occupied(there) if there.get().listed => {}
            Entry::Occupied(mut there) => there.get_mut().twin = Some(copy.shard),
        }
    }
}

/// The folder, and where else its links may lead.
struct Root<'a> {
    folder: &'a Path,
    /// The folder itself, and `blobs` of the hub's cache if the folder is one of its snapshots; without links.
    allowed: Vec<PathBuf>,
}

impl<'a> Root<'a> {
    fn new(folder: &'a Path) -> Result<Self> {
        let real = fs::canonicalize(folder).map_err(Error::io("open", folder))?;
        // The cache's layout: models--NAME/snapshots/COMMIT/FILE is a link to models--NAME/blobs/HASH.
        let snapshots = real.ancestors().skip(1).find(|above| above.ends_with("snapshots"));
        let blobs = snapshots.map(|snapshots| snapshots.with_file_name("blobs"));
        let blobs = blobs.map_or(Ok(None), |blobs| found(&blobs, fs::canonicalize(&blobs)))?;
        Ok(Self { folder, allowed: [real].into_iter().chain(blobs).collect() })
    }

    /// Whether this is a regular file, and lies where files of the folder may lie.
    fn check(&self, path: &Path) -> Result<()> {
        if let Ok(target) = fs::read_link(path)
            && matches!(path.try_exists(), Ok(false))
        {
            let none = "there is nothing (No such file or directory); download the file again";
            return Err(Error::checkpoint(path, format!("is a link to {}, where {none}", target.display())));
        }
        if !fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
            return Err(Error::checkpoint(path, "is no regular file"));
        }
        let real = fs::canonicalize(path).map_err(Error::io("open", path))?;
        if self.allowed.iter().any(|allowed| real.starts_with(allowed)) {
            return Ok(());
        }
        let cause = format!("leads out of the folder, to {}; put the file itself into the folder", real.display());
        Err(Error::checkpoint(path, cause))
    }
}

/// Of a folder without the files that count: what it has instead, and what to do.
fn files_instead(folder: &Path) -> String {
    // Whoever has more files than these has no model there.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().take(10_000);
    let names: BTreeSet<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let with = |suits: &dyn Fn(&str) -> bool| names.iter().find(|name| suits(name));
    let ends = |name: &str, ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let weights = |name: &str| ends(name, &[".safetensors"]);
    let holds = format!("holds neither {INDEX} nor {SINGLE}");
    if let Some(name) = with(&|name| weights(name) && name.contains("-of-")) {
        format!("{holds}, but {name}: download {INDEX} too, which says what the shards hold")
    } else if let Some(name) = with(&|name| weights(name) && name.starts_with("adapter_model")) {
        format!("{holds}, but {name}, an adapter without its model: merge it into the model first")
    } else if let Some(name) = with(&|name| weights(name) && name.starts_with("consolidated")) {
        format!("{holds}, but {name}, whose tensors have other names: download the model's other safetensors files")
    } else if let Some(name) = with(&weights) {
        format!("{holds}, but {name}: if that is the model, give it the name {SINGLE}")
    } else if let Some(name) = with(&|name| ends(name, &[".gguf", ".ggml"])) {
        format!("{holds}, but {name}, a GGUF file: name the file itself, or take the model's safetensors version")
    } else if let Some(name) = with(&|name| ends(name, &[".bin", ".bin.index.json", ".pth", ".pt", ".ckpt"])) {
        format!("{holds}, but {name}, which is PyTorch's: take the safetensors version, or save the model as such")
    } else if let Some(name) = with(&|name| ends(name, &[".h5", ".msgpack", ".onnx", ".npz"])) {
        format!("{holds}, but {name}, which is not read: take the model's safetensors version")
    } else if let Some(name) = with(&|name| ends(name, &[".incomplete", ".part", ".aria2", ".crdownload"])) {
        format!("{holds}, but {name}: the download was not finished, download it again")
    } else if names.contains("snapshots") && names.contains("blobs") {
        format!("{holds}; it is a folder of the hub's cache: name one of those in its folder snapshots")
    } else {
        format!("{holds}; name the folder that a model was saved to")
    }
}
