//! Models by their names on the hub of Hugging Face: `ORG/NAME[@REVISION]`.
//!
//! ```no_run
//! let name = layer_streamer_hub::Name::parse("Qwen/Qwen2.5-0.5B-Instruct").expect("a name has an owner");
//! let folder = name.folder(false)?; // for `layer_streamer::Checkpoint::open`
//! # Ok::<_, layer_streamer_hub::Error>(())
//! ```
//!
//! What a run needs, and nothing else, is downloaded into the cache that Python's huggingface_hub uses too. What is there is used
//! without a question to the network. `docs/models.md` has the rules, and the variables of the environment that count.
//!
//! | file | what |
//! | --- | --- |
//! | `lib.rs` | what is a name, which files a model needs, and in which order they come |
//! | `cache.rs` | where files lie on the disk, and what is known of them there |
//! | `fetch.rs` | questions to the hub: redirects, the token, errors, patience |
//! | `download.rs` | one file, from its first byte to its place in the cache |
#![deny(missing_docs)]

mod cache;
mod download;
mod error;
mod fetch;

use std::{env, fmt, path::PathBuf, time::Instant};

use cache::{Cache, is_plain};
pub use error::Error;
use error::Result;
use fetch::{Hub, Listing};
use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A model of the hub, at a branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq)]
pub struct Name {
    /// `ORG/NAME`.
    repository: String,
    revision: String,
}

impl Name {
    /// `ORG/NAME` or `ORG/NAME@REVISION`, in characters that the hub allows.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        let is_part = |part: &str| {
            let ends = |end: char| part.starts_with(end) || part.ends_with(end);
            is_plain(part) && part.len() <= 96 && !ends('-') && !ends('.') && !part.contains("--")
        };
        let is_name = is_part(owner) && is_part(name) && !name.ends_with(".git") && !revision.starts_with('-');
        let of = |text: &str| text.to_owned();
        (is_name && is_plain(revision)).then(|| Self { repository: of(repository), revision: of(revision) })
    }

    /// The folder with its files, which are downloaded if they are not there yet. What is done is shown on stderr, unless `quiet`.
    ///
    /// # Errors
    /// Where the hub does not give the model, the disk does not take it, or it has no weights that can be run.
    pub fn folder(&self, quiet: bool) -> Result<PathBuf> {
        let cache = Cache::of(&self.repository)?;
        let commit = cache.commit(&self.revision);
        let held = commit.as_deref().map_or(Held::Part, |commit| held(&cache, commit));
        let runs = commit.filter(|_| held != Held::Part);
        match runs.as_deref().map(|commit| cache.snapshot(commit)) {
            Some(folder) if held == Held::All || is_offline() => return Ok(folder),
            None if is_offline() => {
                return Err(Error::Offline { name: self.clone(), folder: cache.folder().to_owned() });
            }
            _ => {}
        }
        let hub = Hub::new(&self.repository, quiet)?;
        // What runs already is completed, though its branch may have moved on.
        let listing = match hub.listing(runs.as_deref().unwrap_or(&self.revision)) {
            Ok(listing) => listing,
            Err(error) => {
                let Some(commit) = runs else { return Err(error) };
                hub.say(&format!("{error}\ntaking {self} as it is in the cache; HF_HUB_OFFLINE=1 asks no more"));
                return Ok(cache.snapshot(&commit));
            }
        };
        let weights = needed(&listing, &self.repository)?;
        let get = |file: &str| {
            let meta = hub.meta(&listing.commit, file)?;
            cache.check_space(meta.length.saturating_sub(cache.there(&meta)))?;
            download::file(&hub, &cache, &listing.commit, file, &meta)
        };
        for file in SMALL.iter().filter(|file| listing.has(file) && !cache.has(&listing.commit, file)) {
            get(file)?;
        }
        let shards = match weights {
            INDEX => shards(&cache, &listing.commit)?,
            single => vec![single.to_owned()],
        };
        if let Some(shard) = shards.iter().find(|shard| !listing.has(shard)) {
            let cause = format!("{}: {INDEX} names {shard}, which the hub does not have", self.repository);
            return Err(Error::NoModel(format!("{cause}; name another repository of this model")));
        }
        self.download(hub, &cache, &listing.commit, &shards)?;
        for file in SMALL.iter().filter(|file| !listing.has(file)) {
            cache.note_absent(&listing.commit, file)?;
        }
        // Last, so that a model that was whole before stays what the name means until this one is whole too.
        if self.revision != listing.commit && runs.is_none() {
            cache.note_commit(&self.revision, &listing.commit)?;
        }
        Ok(cache.snapshot(&listing.commit))
    }

    /// Downloads the weights that are not there, and shows how far it is.
    fn download(&self, mut hub: Hub, cache: &Cache, commit: &str, files: &[String]) -> Result<()> {
        let missing: Vec<_> = files.iter().filter(|file| !cache.has(commit, file)).collect();
        let metas = missing.iter().map(|file| hub.meta(commit, file)).collect::<Result<Vec<_>>>()?;
        let there: u64 = metas.iter().map(|meta| cache.there(meta)).sum();
        let total: u64 = metas.iter().map(|meta| meta.length).sum();
        cache.check_space(total.saturating_sub(there))?;
        hub.bar.finish_and_clear();
        if missing.is_empty() {
            return Ok(());
        }
        let (start, amount) = (Instant::now(), DecimalBytes(total - there));
        let (files, to) = (counted(missing.len()), cache.folder().display());
        hub.say(&format!("downloading {self}: {files} of weights, {amount}, to {to}"));
        let template = "{wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let target = if hub.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        hub.bar = ProgressBar::with_draw_target(Some(total), target).with_style(style);
        let done =
            missing.iter().zip(&metas).try_for_each(|(file, meta)| download::file(&hub, cache, commit, file, meta));
        hub.bar.finish_and_clear();
        done?;
        let seconds = start.elapsed().as_secs_f64();
        let rate = DecimalBytes((amount.0 as f64 / seconds) as u64);
        hub.say(&format!("downloaded {self}: {amount} in {seconds:.2} s, {rate}/s"));
        Ok(())
    }
}

/// As [`Name::parse`] takes it, without the branch `main`.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

fn counted(files: usize) -> String {
    format!("{files} file{}", if files == 1 { "" } else { "s" })
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// What a model may have besides its weights.
const SMALL: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
];

/// How much of a model the cache has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    /// Not enough to run it.
    Part,
    /// Configuration and weights. The hub may have more, such as a chat template: whoever downloaded these did not note it.
    Enough,
    All,
}

fn held(cache: &Cache, commit: &str) -> Held {
    let has = |file: &str| cache.has(commit, file);
    let weights = if has(INDEX) { shards(cache, commit).unwrap_or_default() } else { vec![SINGLE.to_owned()] };
    if !has("config.json") || weights.is_empty() || !weights.iter().all(|file| has(file)) {
        return Held::Part;
    }
    let is_known = |file: &&str| has(file) || cache.is_absent(commit, file);
    if SMALL.iter().all(is_known) { Held::All } else { Held::Enough }
}

/// Bytes of an index, which has a line for each tensor: those of the largest models have some ten million.
const LONGEST_INDEX: u64 = 100 << 20;

/// The files that the index in the cache names.
fn shards(cache: &Cache, commit: &str) -> Result<Vec<String>> {
    let path = cache.snapshot(commit).join(INDEX);
    let malformed = |cause: &str| Error::Answer(format!("{}: is no valid index: {cause}", path.display()));
    let json = layer_streamer::files::read_small(&path, LONGEST_INDEX)?.ok_or_else(|| malformed("it is not there"))?;
    let index: serde_json::Value = serde_json::from_slice(&json).map_err(|error| malformed(&error.to_string()))?;
    let map = index["weight_map"].as_object().ok_or_else(|| malformed("it has no weight_map"))?;
    let mut shards = Vec::new();
    for shard in map.values() {
        let shard = shard.as_str().filter(|shard| is_plain(shard));
        shards.push(shard.ok_or_else(|| malformed("a shard is no plain file name"))?.to_owned());
    }
    shards.sort();
    shards.dedup();
    if shards.is_empty() { Err(malformed("its weight_map is empty")) } else { Ok(shards) }
}

/// The file that says which weights there are: the index or, where there is none, the weights themselves.
///
/// # Errors
/// Where the model has no weights that can be run, or no configuration.
fn needed(listing: &Listing, repository: &str) -> Result<&'static str> {
    let weights = [INDEX, SINGLE].into_iter().find(|file| listing.has(file));
    let Some(weights) = weights else {
        const OTHER: [&str; 9] = [".safetensors", ".bin", ".gguf", ".pth", ".pt", ".onnx", ".h5", ".msgpack", ".ckpt"];
        let mut others = listing.files.iter().filter(|file| OTHER.iter().any(|end| file.ends_with(end)));
        let mut has = others.by_ref().take(4).cloned().collect::<Vec<_>>().join(", ");
        match others.count() {
            _ if has.is_empty() => has.push_str("no weights at all"),
            0 => {}
            more => has.push_str(&format!(" and {more} more")),
        }
        let remedy = "name a repository of this model that has safetensors, or convert it (transformers writes them) and \
                      give the folder";
        return Err(Error::NoModel(format!("{repository} has neither {INDEX} nor {SINGLE}, but {has}; {remedy}")));
    };
    if !listing.has("config.json") {
        let cause = format!("{repository} has no config.json, so it is no model that can be run");
        return Err(Error::NoModel(format!("{cause}; name another")));
    }
    Ok(weights)
}

fn is_offline() -> bool {
    let value = env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_an_owner_and_the_hubs_characters() {
        let name =
            |repository: &str, revision: &str| Some(Name { repository: repository.into(), revision: revision.into() });
        assert_eq!(Name::parse("Qwen/Qwen2.5-7B"), name("Qwen/Qwen2.5-7B", "main"));
        assert_eq!(Name::parse("a/b_c@v1.0"), name("a/b_c", "v1.0"));
        for folder in [
            "b", "./a/b", "/a/b", "~/b", "../b", "a/b/c", "a/", "/b", "a/b@", "a/b@c/d", "a/b@..", "a/b@-c", "a/ b",
            "a/b--c", "a/b..c", "-a/b", "a/b.", "a/b.git", "a/b@c@d", "",
        ] {
            assert_eq!(Name::parse(folder), None, "{folder}");
        }
        assert_eq!(Name::parse(&format!("a/{}", "b".repeat(97))), None);
    }
}
