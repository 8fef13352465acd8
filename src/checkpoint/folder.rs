//! A Hugging Face folder: which files hold the tensors, and whether index and shards agree.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs,
    path::Path,
};

use serde::Deserialize;

use crate::{
    checkpoint::{StoredTensor, header},
    error::{Error, Result},
    files,
};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Bytes of an index, which has a line for each tensor: those of the largest models have some ten million.
const LONGEST_INDEX: u64 = 100 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// All tensors of the folder.
pub(super) fn read(folder: &Path) -> Result<Vec<StoredTensor>> {
    if !fs::metadata(folder).map_err(Error::io("open", folder))?.is_dir() {
        return Err(Error::checkpoint(folder, "is no folder; name the folder that a model was saved to"));
    }
    let path = folder.join(INDEX);
    let Some(json) = files::read_small(&path, LONGEST_INDEX)? else {
        let single = folder.join(SINGLE);
        if !single.exists() {
            let cause = format!("holds neither {INDEX} nor {SINGLE}; name the folder that a model was saved to");
            return Err(Error::checkpoint(folder, cause));
        }
        return header::read(&single);
    };
    let Index { weight_map } =
        serde_json::from_slice(&json).map_err(|e| Error::checkpoint(&path, format!("is no valid index: {e}")))?;

    let mut shards = BTreeMap::<&str, Vec<&str>>::new();
    for (name, shard) in &weight_map {
        if Path::new(shard).file_name() != Some(OsStr::new(shard)) {
            return Err(Error::tensor(&path, name, format!("its shard {shard:?} is no plain file name in the folder")));
        }
        shards.entry(shard).or_default().push(name);
    }
    let mut all = Vec::with_capacity(weight_map.len());
    for (shard, names) in shards {
        let shard_path = folder.join(shard);
        let tensors = header::read(&shard_path)?;
        for StoredTensor { name, .. } in &tensors {
            let cause = match weight_map.get(name) {
                Some(at) if at == shard => continue,
                Some(at) => format!("is in this file, but {INDEX} places it in {at}"),
                None => format!("is in this file, but {INDEX} does not list it"),
            };
            return Err(Error::tensor(&shard_path, name, cause));
        }
        let held: HashSet<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        if let Some(missing) = names.into_iter().find(|name| !held.contains(name)) {
            return Err(Error::tensor(&shard_path, missing, format!("is not in this file, where {INDEX} places it")));
        }
        all.extend(tensors);
    }
    Ok(all)
}
