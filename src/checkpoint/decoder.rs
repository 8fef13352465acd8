//! Where in a checkpoint the decoder is: what its tensors' names begin with, and its layers as units.

use std::collections::{BTreeSet, HashSet};

use super::{Checkpoint, Unreadable};
use crate::{
    error::{Error, Result},
    unit::Unit,
};

/// What most checkpoints' names begin with.
const USUAL: &str = "model.";

/// Words in the names of parts that hear or see. They may be decoders by their names, but are not the one of the text.
const SENSES: [&str; 7] = ["vision", "visual", "image", "video", "audio", "speech", "sound"];

impl Checkpoint {
    /// One unit per transformer layer: all tensors under `model.layers.N.`, named by what follows that. In place of `model.` the
    /// names may begin with something else, or with nothing: with whatever `embed_tokens.weight` and `layers.0.` have in common.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no such tensor, or several parts of the checkpoint could be meant; if a number between 0
    /// and the highest is missing, or one has leading zeros. And what [`unreadable`](Self::unreadable) says of a layer's tensor.
    pub fn layers(&self) -> Result<Vec<Unit>> {
        let prefix = format!("{}layers.", self.decoder_prefix()?);
        let (mut units, mut numbered) = (Vec::<Unit>::new(), Vec::new());
        for name in self.0.entries.keys().chain(self.0.unreadable.keys()) {
            let Some((number, rest)) = name.strip_prefix(&prefix).and_then(|tail| tail.split_once('.')) else {
                continue;
            };
            match number.parse::<usize>() {
                // One spelling for each number, or two tensors could claim one place in a layer.
                Ok(parsed) if parsed.to_string() == number => numbered.push((parsed, rest, name)),
                _ if number.bytes().all(|digit| digit.is_ascii_digit()) => {
                    let cause = format!("{number:?} is no layer number; write it without leading zeros");
                    return Err(Error::tensor(&self.0.source, name, cause));
                }
                _ => {}
            }
        }
        numbered.sort_unstable();
        for (number, rest, name) in numbered {
            if number > units.len() {
                let cause = format!("has tensors of layer {number} but none of layer {}", units.len());
                return Err(Error::checkpoint(&self.0.source, cause));
            }
            if number == units.len() {
                units.push(Unit::new(format!("{prefix}{number}")));
            }
            self.entry(name)?;
            units[number].keep(rest, name);
        }
        if units.is_empty() {
            return Err(Error::checkpoint(&self.0.source, format!("has no tensor under {prefix}N.")));
        }
        Ok(units)
    }

    /// What the decoder's names begin with: `model.` as a rule, nothing, or whatever else comes before both
    /// `embed_tokens.weight` and `layers.0.` (`norm.weight` where there is no embedding). `model.` if nothing does.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if several parts of the checkpoint have such names, and not all but one hear or see.
    pub(crate) fn decoder_prefix(&self) -> Result<&str> {
        let begins: HashSet<&str> = self.stored_names().flat_map(before_first_layer).collect();
        let with = |last: &str| -> BTreeSet<&str> {
            self.stored_names()
                .filter_map(|name| name.strip_suffix(last))
                .filter(|name| begins.contains(name))
                .collect()
        };
        let mut found = with("embed_tokens.weight");
        if found.is_empty() {
            found = with("norm.weight");
        }
        // Names without any beginning stand for the usual ones, so that the two together would be one decoder twice.
        if found.is_empty() || found.contains(USUAL) && !found.contains("") {
            return Ok(USUAL);
        }
        let mut texts = found.iter().copied().filter(|name| !SENSES.iter().any(|word| name.contains(word)));
        let chosen = match (found.len(), texts.next(), texts.next()) {
            (1, ..) => found.first().copied(),
            (_, text, None) => text,
            _ => None,
        };
        chosen.ok_or_else(|| {
            let names: Vec<_> = found.iter().map(|begin| format!("{begin}layers.0")).collect();
            let cause = format!("has several decoders: {}; take a checkpoint of one", names.join(", "));
            Error::checkpoint(&self.0.source, cause)
        })
    }

    /// Whether a file has this tensor, even if it cannot be read.
    pub(crate) fn stores(&self, name: &str) -> bool {
        let stored = |why: &Unreadable| !matches!(why, Unreadable::Absent(_));
        self.0.entries.contains_key(name) || self.0.unreadable.get(name).is_some_and(stored)
    }

    /// The names of all tensors that files have, in no order: of those that cannot be read too.
    pub(crate) fn stored_names(&self) -> impl Iterator<Item = &str> {
        let all = self.0.entries.keys().chain(self.0.unreadable.keys());
        all.map(String::as_str).filter(|name| self.stores(name))
    }
}

/// What may come before `layers.0.` in a name: as often as it has that.
fn before_first_layer(name: &str) -> impl Iterator<Item = &str> {
    let begins = name.match_indices("layers.0.").map(|(at, _)| &name[..at]);
    begins.filter(|begin| begin.is_empty() || begin.ends_with('.'))
}
