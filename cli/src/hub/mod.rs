//! Models by their names on the hub of Hugging Face: `--model ORG/NAME[@REVISION]`.
//!
//! What a run needs, and nothing else, is downloaded into the cache that Python's huggingface_hub uses too. What is there is used
//! without a question to the network.
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | what is a name, which files a model needs, and in which order they come |
//! | `cache.rs` | where files lie on the disk, and what is known of them there |
//! | `fetch.rs` | questions to the hub: redirects, the token, errors, patience |
//! | `download.rs` | one file, from its first byte to its place in the cache |

mod cache;
mod download;
mod fetch;

use std::{
    env,
    ffi::OsString,
    ops::Deref,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Instant,
};

use cache::{Cache, is_plain};
use clap::builder::{PathBufValueParser, TypedValueParser};
use fetch::{Hub, Listing};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{Failure, called, units, waiting::Waiting};

/// A model as the command line names it. It is the path of its folder, once [`Self::fetch`] has been called.
#[derive(Clone)]
pub struct ModelFolder {
    said: PathBuf,
    /// The folder in the cache, for a model of the hub.
    cached: OnceLock<PathBuf>,
}

impl ModelFolder {
    /// Makes sure that a model of the hub is in the cache. A folder is left to whoever opens it.
    ///
    /// # Errors
    /// Where the hub does not give the model, or the disk does not take it; and for a name without an owner that is no folder.
    pub fn fetch(&self, quiet: bool) -> Result<(), Failure> {
        if self.cached.get().is_some() || self.said.exists() {
            return Ok(());
        }
        let said = self.said.display().to_string();
        if let Some(name) = Name::parse(&said) {
            let folder = name.folder(quiet)?;
            self.cached.get_or_init(|| folder);
        } else if !said.contains('/') && said != "~" {
            let online = command(&format!("ORG/{said}"));
            let error =
                format!("{said}: there is no such folder; a model of the hub is named with its owner: {online}");
            return Err(error.into());
        }
        Ok(())
    }

    /// Its name, if it is a model of the hub.
    pub fn hub_name(&self) -> Option<&Path> {
        self.cached.get().map(|_| self.said.as_path())
    }

    /// The words of a command line in which the model is its folder, so that whoever gets them need not look for it.
    pub fn resolved(&self, words: impl Iterator<Item = OsString>) -> Vec<OsString> {
        let Some(folder) = self.cached.get() else { return words.collect() };
        let joined = |path: &Path| [OsString::from("--model="), path.into()].into_iter().collect::<OsString>();
        let mut is_next = false;
        words
            .map(|word| match (std::mem::replace(&mut is_next, word == "--model"), word) {
                (true, _) => folder.into(),
                (_, word) if word == joined(&self.said) => joined(folder),
                (_, word) => word,
            })
            .collect()
    }
}

/// Parses `--model`.
pub fn parser() -> impl TypedValueParser<Value = ModelFolder> {
    PathBufValueParser::new().map(ModelFolder::from)
}

impl Deref for ModelFolder {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.cached.get().unwrap_or(&self.said)
    }
}

impl AsRef<Path> for ModelFolder {
    fn as_ref(&self) -> &Path {
        self
    }
}

impl From<PathBuf> for ModelFolder {
    fn from(said: PathBuf) -> Self {
        Self { said, cached: OnceLock::new() }
    }
}

impl From<ModelFolder> for OsString {
    fn from(model: ModelFolder) -> Self {
        model.said.into()
    }
}

/// This program's command with another model.
fn command(model: &str) -> String {
    let subcommand = env::args_os().nth(1).unwrap_or_else(|| "generate".into());
    format!("{} {} --model {model} …", called().display(), subcommand.display())
}

/// A model of the hub, at a branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq)]
struct Name {
    /// `ORG/NAME`.
    repository: String,
    revision: String,
}

impl Name {
    /// `ORG/NAME` or `ORG/NAME@REVISION`, in characters that the hub allows.
    fn parse(text: &str) -> Option<Self> {
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

    /// Where its files lie, which are downloaded if they are not there yet.
    fn folder(&self, quiet: bool) -> Result<PathBuf, Failure> {
        let cache = Cache::of(&self.repository)?;
        let commit = cache.commit(&self.revision);
        let held = commit.as_deref().map_or(Held::Part, |commit| held(&cache, commit));
        let runs = commit.filter(|_| held != Held::Part);
        match runs.as_deref().map(|commit| cache.snapshot(commit)) {
            Some(folder) if held == Held::All || is_offline() => return Ok(folder),
            None if is_offline() => {
                let (folder, said) = (cache.folder().display(), self.said());
                let online = command(&said);
                let cause =
                    format!("{said} is not in the cache, or not all of it ({folder}), and HF_HUB_OFFLINE is set");
                return Err(format!("{cause}; download it with: HF_HUB_OFFLINE=0 {online}").into());
            }
            _ => {}
        }
        let hub = Hub::new(&self.repository, quiet)?;
        let waiting = Waiting::on("asking the hub for the model's files", quiet);
        // What runs already is completed, though its branch may have moved on.
        let listing = match hub.listing(runs.as_deref().unwrap_or(&self.revision)) {
            Ok(listing) => listing,
            Err(error) => {
                let commit = runs.ok_or(error.to_string())?;
                if !quiet {
                    say!("{error}\ntaking {} as it is in the cache; HF_HUB_OFFLINE=1 asks no more", self.said());
                }
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
            return Err(format!("{}: {INDEX} names {shard}, which the hub does not have", self.repository).into());
        }
        drop(waiting);
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
    fn download(&self, mut hub: Hub, cache: &Cache, commit: &str, files: &[String]) -> Result<(), Failure> {
        let missing: Vec<_> = files.iter().filter(|file| !cache.has(commit, file)).collect();
        let metas = missing.iter().map(|file| hub.meta(commit, file)).collect::<Result<Vec<_>, _>>()?;
        let there: u64 = metas.iter().map(|meta| cache.there(meta)).sum();
        let total: u64 = metas.iter().map(|meta| meta.length).sum();
        cache.check_space(total.saturating_sub(there))?;
        let (start, tell) = (Instant::now(), !hub.quiet && !missing.is_empty());
        if tell {
            let (files, amount, to) = (missing.len(), units::bytes(total - there), cache.folder().display());
            say!("downloading {}: {files} of weights, {amount}, to {to}", self.said(), files = counted(files));
        }
        let target = if hub.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let template = "{wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template)?;
        hub.bar = ProgressBar::with_draw_target(Some(total), target).with_style(style);
        let done =
            missing.iter().zip(&metas).try_for_each(|(file, meta)| download::file(&hub, cache, commit, file, meta));
        hub.bar.finish_and_clear();
        done?;
        if tell {
            let (amount, seconds) = (total - there, start.elapsed().as_secs_f64());
            let (rate, amount) = (units::rate(amount as f64 / seconds), units::bytes(amount));
            say!("downloaded {}: {amount} in {}, {rate}", self.said(), units::seconds(seconds));
        }
        Ok(())
    }

    /// As the command line says it.
    fn said(&self) -> String {
        match self.revision.as_str() {
            "main" => self.repository.clone(),
            revision => format!("{}@{revision}", self.repository),
        }
    }
}

fn counted(files: usize) -> String {
    format!("{files} file{}", if files == 1 { "" } else { "s" })
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// What a model may have besides its weights.
const SMALL: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
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
fn shards(cache: &Cache, commit: &str) -> Result<Vec<String>, Failure> {
    let path = cache.snapshot(commit).join(INDEX);
    let malformed = |cause: &str| Failure::from(format!("{}: is no valid index: {cause}", path.display()));
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
fn needed(listing: &Listing, repository: &str) -> Result<&'static str, Failure> {
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
        return Err(format!("{repository} has neither {INDEX} nor {SINGLE}, but {has}; {remedy}").into());
    };
    if !listing.has("config.json") {
        return Err(format!("{repository} has no config.json, so it is no model that can be run; name another").into());
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

    #[test]
    fn words_for_another_process_have_the_folder_in_place_of_the_name() {
        let model = ModelFolder::from(PathBuf::from("a/b"));
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let said = words(&["tune", "--model", "a/b", "--json", "a/b", "--model=a/b"]);
        assert_eq!(model.resolved(said.clone().into_iter()), said);
        model.cached.set("/cache".into()).unwrap();
        let resolved = words(&["tune", "--model", "/cache", "--json", "a/b", "--model=/cache"]);
        assert_eq!(model.resolved(said.into_iter()), resolved);
    }
}
