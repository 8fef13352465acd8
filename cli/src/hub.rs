//! A model: a folder, a GGUF file, or the name of one on the Hugging Face hub.

use std::{
    env,
    ffi::OsString,
    ops::Deref,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use clap::builder::{PathBufValueParser, TypedValueParser};
use layer_streamer_hub::{Error, Name};

use crate::{Failure, called, pack};

/// A model as the command line names it. It is the path of its folder, once [`Self::fetch`] has been called.
#[derive(Clone)]
pub struct ModelFolder {
    said: PathBuf,
    /// The folder in the cache, for a model of the hub.
    cached: OnceLock<PathBuf>,
}

impl ModelFolder {
    /// Makes sure that a model of the hub is in the cache. A folder is left to whoever opens it, if it is finished.
    ///
    /// # Errors
    /// Where the hub does not give the model, or the disk does not take it; for a name without an owner that is no folder; and for a
    /// folder that `pack` or `unpack` have not finished.
    pub fn fetch(&self, quiet: bool) -> Result<(), Failure> {
        if self.cached.get().is_some() || self.said.exists() {
            return pack::check_complete(self);
        }
        let said = self.said.display().to_string();
        // A file, which whoever opens it misses.
        if said.ends_with(".gguf") {
            return Ok(());
        }
        if let Some(name) = Name::parse(&said) {
            let folder = name.folder(quiet).map_err(|error| match error {
                Error::Offline { .. } => format!("{error} {}", command(&said)).into(),
                _ => Failure::from(error),
            })?;
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

/// Parses `--model`, and the argument of `pack` and `unpack`.
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
    // Those that take it as an argument.
    let option = if subcommand == "pack" || subcommand == "unpack" { "" } else { "--model " };
    format!("{} {} {option}{model} …", called().display(), subcommand.display())
}

#[cfg(test)]
mod tests {
    use super::*;

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
