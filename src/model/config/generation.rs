//! What `generation_config.json` of a Hugging Face folder says: which tokens end a text, and what it suggests to those who sample.

use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{Keys, parse};
use crate::{
    error::{Error, Result},
    files,
    model::sampling::Sampling,
};

/// How a model's makers would have its tokens chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SuggestedSampling {
    /// They sample. If not, the most likely token is what they take, and what is said of sampling is for those who want it.
    pub do_sample: bool,
    /// `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`; what the file leaves out has no effect. (transformers
    /// takes a `top_k` of 50 where the file has none.)
    pub sampling: Sampling,
}

/// The tokens that end a text, if the folder's file names any, and what it suggests; without the file it is nothing.
///
/// # Errors
/// [`Error::Checkpoint`] that names the file and the key at fault, or [`Error::Io`].
pub(super) fn read(folder: &Path) -> Result<(Option<Vec<u32>>, SuggestedSampling)> {
    let path = folder.join("generation_config.json");
    let Some(text) = files::read_small(&path, files::LONGEST_CONFIG)? else { return Ok(Default::default()) };
    let file = parse(&path, &text)?;
    let stop = Keys::new(&file, &[]).stop().map_err(|fault| fault.at(&path))?;
    Ok((stop, suggested(&file).map_err(|cause| Error::checkpoint(&path, cause))?))
}

fn suggested(file: &Map<String, Value>) -> Result<SuggestedSampling, String> {
    let mut found = SuggestedSampling::default();
    let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, .. } = &mut found.sampling;
    take(file, "do_sample", "true or false", Value::as_bool, &mut found.do_sample)?;
    take(file, "temperature", "a number", Value::as_f64, temperature)?;
    take(file, "top_k", "a number of tokens", |value| value.as_u64()?.try_into().ok(), top_k)?;
    take(file, "top_p", "a number", Value::as_f64, top_p)?;
    take(file, "min_p", "a number", Value::as_f64, min_p)?;
    take(file, "repetition_penalty", "a number", Value::as_f64, repetition_penalty)?;
    found.sampling.check().map_err(|error| error.to_string())?;
    Ok(found)
}

/// Puts a key's value there, if the file has one.
fn take<T>(
    file: &Map<String, Value>,
    key: &str,
    kind: &str,
    read: impl Fn(&Value) -> Option<T>,
    to: &mut T,
) -> Result<(), String> {
    if let Some(value) = file.get(key).filter(|value| !value.is_null()) {
        *to = read(value).ok_or_else(|| format!("{key}: is {value}, must be {kind}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_file_says_is_suggested_and_what_it_leaves_out_has_no_effect() {
        let qwen = json!({ "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
            "eos_token_id": [1, 2], "transformers_version": "4.37.0" });
        let expected =
            Sampling { temperature: 0.7, top_k: 20, top_p: 0.8, repetition_penalty: 1.05, ..Sampling::default() };
        let of = |file: &Value| suggested(file.as_object().unwrap()).unwrap();
        assert_eq!(of(&qwen), SuggestedSampling { do_sample: true, sampling: expected });
        let nulls = json!({ "do_sample": null, "temperature": null, "top_k": null, "min_p": 0.1, "top_p": 1 });
        let expected = Sampling { min_p: 0.1, ..Sampling::default() };
        assert_eq!(of(&nulls), SuggestedSampling { do_sample: false, sampling: expected });
        assert_eq!(read(Path::new("examples/speller")).unwrap(), (Some(vec![0]), SuggestedSampling::default()));
        assert_eq!(read(Path::new("tests")).unwrap(), (None, SuggestedSampling::default()), "there is no such file");
    }

    #[test]
    fn a_value_that_cannot_be_is_refused_with_file_and_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        for (key, value, part) in [
            ("do_sample", json!(1), "true or false"),
            ("temperature", json!(-0.5), "0 or more"),
            ("temperature", json!("hot"), "a number"),
            ("top_k", json!(-1), "a number of tokens"),
            ("top_k", json!(2.5), "a number of tokens"),
            ("top_p", json!(1.5), "from 0 to 1"),
            ("min_p", json!(-0.1), "from 0 to 1"),
            ("repetition_penalty", json!(0), "more than 0"),
            ("repetition_penalty", json!([1.1]), "a number"),
        ] {
            std::fs::write(&path, json!({ key: value }).to_string()).unwrap();
            let said = read(folder.path()).unwrap_err().to_string();
            assert!(said.contains(&format!("generation_config.json: {key}: is {value}")), "{said}");
            assert!(said.contains(part), "{said}");
        }
        std::fs::write(&path, "{").unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("generation_config.json: is no valid"));
    }
}
