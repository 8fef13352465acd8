//! What an output was begun with. It lies beside the output until that is complete: with another model or other options no run
//! goes on with it.
//!
//! Which prompts are answered is not in here but in the answers: whatever ends the process, there is one file to look at.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    hash::Hasher,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use layer_streamer::files::{self, NewFile};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use twox_hash::XxHash3_64;

use crate::Failure;

/// Journals are smaller, in bytes.
const LARGEST: u64 = 16 << 20;

/// Of a file up to this size every byte counts, of a larger one of weights samples.
const SMALL: u64 = 64 << 20;

/// How many samples, and of how many bytes.
const SAMPLES: u64 = 16;
const SAMPLE: usize = 4096;

/// All that answers depend on, beside the input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Where the model is, for people.
    pub model: String,
    /// By which it is known again.
    pub model_digest: String,
    /// Of which kind the device is: another one computes other bits.
    pub device: String,
    /// Options by their names.
    pub options: BTreeMap<String, Value>,
}

/// The file of a journal.
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    pub fn of(output: &Path) -> Self {
        let mut path = OsString::from(output);
        path.push(".journal");
        Self { path: path.into() }
    }

    /// Notes that an output is begun, durably.
    pub fn begin(&self, work: &Work) -> Result<(), Failure> {
        let failed = |error: io::Error| format!("cannot write {}: {error}", self.path.display());
        let file = NewFile::create(&self.path).map_err(failed)?;
        let text = format!("{}\n", serde_json::to_string_pretty(work)?);
        file.file().write_all(text.as_bytes()).and_then(|()| file.file().sync_all()).map_err(failed)?;
        file.keep().map_err(failed)?;
        sync_folder(&self.path).map_err(failed)?;
        Ok(())
    }

    /// Whether this is the work that the output was begun with.
    ///
    /// # Errors
    /// A message that names what is another; or that there is no journal.
    pub fn check(&self, work: &Work, output: &Path) -> Result<(), Failure> {
        let output = output.display();
        let Some(bytes) = files::read_small(&self.path, LARGEST)? else {
            return Err(format!(
                "{output} is there already, and complete or of another program ({} is missing); remove it, or give another --output",
                self.path.display()
            )
            .into());
        };
        let then: Work = serde_json::from_slice(&bytes)
            .map_err(|error| format!("{} is damaged ({error}); remove both and begin anew", self.path.display()))?;
        if then.model_digest != work.model_digest {
            return Err(format!(
                "{output} was begun with the model {}, and {} has other weights, tokenizer or configuration; give that model, \
                 or another --output",
                then.model, work.model
            )
            .into());
        }
        if then.device != work.device {
            return Err(format!(
                "{output} was begun on the device {}, and {} may compute other answers; go on there, by --device, or give another \
                 --output",
                then.device, work.device
            )
            .into());
        }
        let names = then.options.keys().chain(work.options.keys());
        let of = |options: &BTreeMap<String, Value>, name: &str| options.get(name).cloned().unwrap_or_default();
        let mut changed = names.map(|name| (name, of(&then.options, name), of(&work.options, name)));
        let Some((name, then, now)) = changed.find(|(_, then, now)| then != now) else { return Ok(()) };
        let shown = |value: Value| if value.is_null() { "not given".into() } else { value.to_string() };
        let (then, now) = (shown(then), shown(now));
        Err(format!("{output} was begun with {name} {then}, which is {now} now; give the same, or another --output")
            .into())
    }

    /// The output is complete.
    pub fn remove(&self) -> Result<(), Failure> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(format!("cannot remove {}: {error}", self.path.display()).into())
            }
            _ => Ok(()),
        }
    }
}

/// Makes names in a file's folder durable.
pub fn sync_folder(file: &Path) -> io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// By which a model is known again wherever it lies: the names of its files, all of the small ones, and samples of the weights.
pub fn digest(model: &Path) -> Result<String, Failure> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| Failure::from(format!("cannot read {path}: {error}"))
    };
    let mut files = Vec::new();
    if model.is_file() {
        files.push(model.to_owned());
    } else {
        for entry in fs::read_dir(model).map_err(failed(model))? {
            let path = entry.map_err(failed(model))?.path();
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            if ["json", "jinja", "safetensors", "model", "txt"].contains(&ending) && path.is_file() {
                files.push(path);
            }
        }
        files.sort();
    }
    let mut digest = XxHash3_64::new();
    for path in &files {
        if !model.is_file() {
            digest.write(path.file_name().unwrap_or_default().as_encoded_bytes());
        }
        add(&mut digest, path).map_err(failed(path))?;
    }
    Ok(format!("{:016x}", digest.finish()))
}

fn add(digest: &mut XxHash3_64, path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    digest.write_u64(length);
    let is_weights = path.extension().is_some_and(|ending| ending == "safetensors" || ending == "gguf");
    if length <= SMALL && !is_weights {
        digest.write(&fs::read(path)?);
        return Ok(());
    }
    let mut sample = [0; SAMPLE];
    let last = length.saturating_sub(SAMPLE as u64);
    for number in 0..SAMPLES {
        // The first one is the header's, the last one the file's end.
        let at = (u128::from(last) * u128::from(number) / u128::from(SAMPLES - 1)) as u64;
        let count = file.read_at(&mut sample, at)?;
        digest.write(&sample[..count]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use support::{copy_of, speller};

    use super::*;

    #[test]
    fn a_model_is_known_wherever_it_lies_and_by_its_weights_and_files() {
        let copy = copy_of(&speller());
        let first = digest(&speller()).unwrap();
        assert_eq!(digest(copy.path()).unwrap(), first);
        fs::write(copy.path().join("notes.md"), "nothing").unwrap();
        assert_eq!(digest(copy.path()).unwrap(), first);
        let shard = copy.path().join("model-00002-of-00002.safetensors");
        let weights = fs::read(&shard).unwrap();
        let other: Vec<_> = weights.iter().map(|byte| byte ^ 1).collect();
        fs::write(&shard, other).unwrap();
        assert_ne!(digest(copy.path()).unwrap(), first);
        fs::write(&shard, weights).unwrap();
        assert_eq!(digest(copy.path()).unwrap(), first);
        fs::write(copy.path().join("generation_config.json"), "{}").unwrap();
        assert_ne!(digest(copy.path()).unwrap(), first);
    }

    #[test]
    fn other_work_is_refused_by_the_name_of_what_is_another() {
        let folder = support::folder();
        let output = folder.path().join("out");
        let journal = Journal::of(&output);
        let options = BTreeMap::from([("--stop".to_owned(), json!(["a"])), ("--seed".to_owned(), json!(null))]);
        let work = Work { model: "here".into(), model_digest: "1".into(), device: "cpu".into(), options };
        let refused = |work: &Work| journal.check(work, &output).unwrap_err().to_string();
        assert!(refused(&work).contains("out.journal is missing"), "{}", refused(&work));
        journal.begin(&work).unwrap();
        journal.check(&work, &output).unwrap();
        journal.check(&Work { model: "there".into(), ..work.clone() }, &output).unwrap();
        let other = Work { model_digest: "2".into(), ..work.clone() };
        assert!(
            refused(&other).contains("was begun with the model here, and here has other weights"),
            "{}",
            refused(&other)
        );
        let other = Work { device: "gpu".into(), ..work.clone() };
        assert!(
            refused(&other).contains("was begun on the device cpu, and gpu may compute other answers"),
            "{}",
            refused(&other)
        );
        let mut other = work.clone();
        other.options.insert("--seed".into(), json!(5));
        assert!(refused(&other).contains("was begun with --seed not given, which is 5 now"), "{}", refused(&other));
        other = work.clone();
        other.options.remove("--stop");
        assert!(
            refused(&other).contains("was begun with --stop [\"a\"], which is not given now"),
            "{}",
            refused(&other)
        );
        fs::write(&journal.path, "{").unwrap();
        assert!(refused(&work).contains("is damaged"));
        journal.remove().unwrap();
        journal.remove().unwrap();
    }
}
