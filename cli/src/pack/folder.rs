//! Which files of a model's folder are taken, and what may lie where they are written.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirEntry},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use layer_streamer::{
    Checkpoint,
    files::{self, NewFile},
};
use serde_json::{Value, json};

use super::{
    Failure, cannot,
    journal::{self, Work},
};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The longest configuration and index that are read, in bytes.
const LONGEST: u64 = 100 << 20;

/// How files end that hold weights, in whatever format.
const WEIGHTS: [&str; 13] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "onnx", "onnx_data", "h5", "msgpack", "npz", "partial"];

/// A model's folder. All paths begin in it.
pub struct Source {
    pub folder: PathBuf,
    /// The files whose tensors count.
    pub weights: Vec<PathBuf>,
    /// What says which of them has which tensor, if anything does.
    index: Option<PathBuf>,
    /// What belongs to the model besides; the configuration last, since a folder that has it is complete.
    pub others: Vec<PathBuf>,
}

impl Source {
    /// # Errors
    /// Where the folder holds no safetensors model.
    pub fn read(folder: &Path) -> Result<Self, Failure> {
        if folder.is_file() {
            return Err(format!("{} is no folder; name one with a model's safetensors files", folder.display()).into());
        }
        // It refuses what no model is, and says what lies there instead.
        Checkpoint::open(folder)?;
        let config = files::read_small(&folder.join("config.json"), LONGEST).ok().flatten();
        let config: Value = config.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let main = match config["transformers_weights"].as_str() {
            Some(named) => named,
            None if folder.join(SINGLE).is_file() => SINGLE,
            None => INDEX,
        };
        let (mut weights, mut index) = (vec![PathBuf::from(main)], None);
        if main.ends_with(".json") {
            let path = PathBuf::from(main);
            let beside = path.parent().unwrap_or(Path::new(""));
            let map = read_index(&folder.join(main))?.weight_map;
            weights = BTreeSet::from_iter(map.into_values()).iter().map(|shard| beside.join(shard)).collect();
            index = Some(path);
        }
        check_inside(folder, weights.iter().chain(&index))?;
        let mut others = Vec::new();
        find_others(folder, Path::new(""), &mut others)?;
        others.sort_by_key(|path| (path == Path::new("config.json"), path.clone()));
        Ok(Self { folder: folder.to_owned(), weights, index, others })
    }

    /// All files that are written.
    fn planned(&self) -> impl Iterator<Item = &Path> {
        self.weights.iter().chain(&self.index).chain(&self.others).map(PathBuf::as_path)
    }

    /// Bytes of the files that are copied, and of the index.
    pub fn bytes_beside(&self) -> Result<u64, Failure> {
        let length = |name: &PathBuf| {
            let path = self.folder.join(name);
            fs::metadata(&path).map(|metadata| metadata.len()).map_err(cannot("examine", &path))
        };
        self.others.iter().chain(&self.index).map(length).sum()
    }

    /// Refuses a folder that holds anything but a part of this work.
    pub fn check_destination(&self, folder: &Path, work: &Work) -> Result<(), Failure> {
        let own = fs::canonicalize(&self.folder).map_err(cannot("find", &self.folder))?;
        let (real, shown) = (real(folder)?, folder.display());
        if real.starts_with(&own) {
            return Err(format!("{shown} lies in the model's own folder, {}; name another", own.display()).into());
        }
        if !real.exists() {
            return Ok(());
        }
        if !real.is_dir() {
            return Err(format!("{shown} is no folder; name another").into());
        }
        let begun = journal::work_in(&real)?;
        if let Some(other) = begun.as_ref().filter(|other| *other != work) {
            let other = other.again(folder);
            return Err(
                format!("{shown} holds a part of other work; finish that (`{other}`), or name another folder").into()
            );
        }
        let mut there = Vec::new();
        find(&real, Path::new(""), &mut there)?;
        let planned: BTreeSet<_> = self.planned().collect();
        let is_ours = |path: &Path| {
            let whole = |path: &str| path.split_once(".partial").map(|(whole, _)| PathBuf::from(whole));
            let whole = path.to_str().and_then(whole);
            planned.contains(path) || whole.is_some_and(|whole| planned.contains(whole.as_path()))
        };
        let foreign = |path: &&PathBuf| *path != Path::new(journal::NAME) && !(begun.is_some() && is_ours(path));
        match there.iter().find(foreign).map(|path| path.display()) {
            None => Ok(()),
            Some(name) if begun.is_some() => {
                Err(format!("{shown} holds {name}, which is no part of this work; move it to another folder").into())
            }
            Some(name) => Err(format!("{shown} already holds {name}; name another folder or remove it").into()),
        }
    }

    /// Writes the index, for tensors that take so many bytes, and copies what belongs to the model besides its weights.
    pub fn write_beside(&self, to: &Path, bytes: u64) -> Result<(), Failure> {
        if let Some(name) = &self.index {
            let mut index = read_index(&self.folder.join(name))?;
            index.metadata.insert("total_size".into(), bytes.into());
            let text = format!("{:#}\n", json!({ "metadata": index.metadata, "weight_map": index.weight_map }));
            create(&to.join(name), &mut text.as_bytes())?;
        }
        self.others.iter().try_for_each(|name| {
            let path = self.folder.join(name);
            let mut from = fs::File::open(&path).map_err(cannot("open", &path))?;
            create(&to.join(name), &mut from)
        })
    }
}

/// Refuses a folder that `pack` or `unpack` have begun to write, and not finished.
pub fn check_complete(folder: &Path) -> Result<(), Failure> {
    if !folder.join(journal::NAME).exists() {
        return Ok(());
    }
    let begun = journal::work_in(folder)?;
    let command = begun.map_or("the command that began it".into(), |work| format!("`{}`", work.again(folder)));
    Err(format!("{} is not complete; finish it with {command}, then use it", folder.display()).into())
}

/// Refuses what is no regular file, and links that lead out of the folder, but for those of the hub's cache to its blobs.
fn check_inside<'a>(folder: &Path, names: impl Iterator<Item = &'a PathBuf>) -> Result<(), Failure> {
    let real = fs::canonicalize(folder).map_err(cannot("find", folder))?;
    let snapshots = real.ancestors().skip(1).find(|above| above.ends_with("snapshots"));
    let blobs = snapshots.and_then(|snapshots| fs::canonicalize(snapshots.with_file_name("blobs")).ok());
    for path in names.map(|name| folder.join(name)) {
        if !fs::metadata(&path).map_err(cannot("open", &path))?.is_file() {
            return Err(format!("{} is no regular file", path.display()).into());
        }
        let leads = fs::canonicalize(&path).map_err(cannot("find", &path))?;
        if !leads.starts_with(&real) && !blobs.as_ref().is_some_and(|blobs| leads.starts_with(blobs)) {
            let (path, leads) = (path.display(), leads.display());
            return Err(
                format!("{path} leads out of the folder, to {leads}; put the file itself into the folder").into()
            );
        }
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, Value>,
    weight_map: BTreeMap<String, String>,
}

fn read_index(path: &Path) -> Result<Index, Failure> {
    let text = files::read_small(path, LONGEST)?.unwrap_or_default();
    serde_json::from_slice(&text).map_err(|error| format!("{}: is no valid index: {error}", path.display()).into())
}

fn create(path: &Path, from: &mut impl io::Read) -> Result<(), Failure> {
    let mut write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let new = NewFile::create(path)?;
        io::copy(from, &mut new.file())?;
        new.file().flush()?;
        new.keep()
    };
    write().map_err(cannot("write", path))
}

/// A path without links, of which the last parts need not exist.
fn real(path: &Path) -> Result<PathBuf, Failure> {
    let mut above = std::path::absolute(path).map_err(cannot("find", path))?;
    let mut missing = Vec::new();
    while !above.exists()
        && let Some(name) = above.file_name()
    {
        missing.push(name.to_owned());
        above.pop();
    }
    let real = fs::canonicalize(&above).map_err(cannot("find", &above))?;
    Ok(missing.iter().rev().fold(real, |real, name| real.join(name)))
}

/// What there is to write to: a folder, or the one that it will be made in.
pub fn existing(folder: &Path) -> Result<PathBuf, Failure> {
    let real = real(folder)?;
    Ok(real.ancestors().find(|above| above.exists()).unwrap_or(&real).to_owned())
}

fn entries(folder: &Path) -> Result<Vec<DirEntry>, Failure> {
    fs::read_dir(folder).and_then(Iterator::collect).map_err(cannot("list", folder))
}

/// All that is no folder below `folder/within`.
fn find(folder: &Path, within: &Path, found: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in entries(&folder.join(within))? {
        let path = within.join(entry.file_name());
        if entry.file_type().map_err(cannot("examine", &entry.path()))?.is_dir() {
            find(folder, &path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// The regular files below `folder/within` that are neither hidden nor weights; links to files are followed.
fn find_others(folder: &Path, within: &Path, found: &mut Vec<PathBuf>) -> Result<(), Failure> {
    for entry in entries(&folder.join(within))? {
        let (name, path) = (entry.file_name(), within.join(entry.file_name()));
        let name = name.to_string_lossy();
        let is_weights = path.extension().is_some_and(|end| WEIGHTS.iter().any(|weights| end == *weights));
        if name.starts_with('.') || is_weights || name.ends_with(".index.json") {
            continue;
        }
        if entry.file_type().map_err(cannot("examine", &entry.path()))?.is_dir() {
            find_others(folder, &path, found)?;
        } else if fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
            found.push(path);
        }
    }
    Ok(())
}
