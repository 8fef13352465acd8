//! Random small models of all families against what Hugging Face transformers computes with them, on the CPU, in F32.

mod common;
#[path = "common/families.rs"]
mod families;

use std::{collections::BTreeSet, fs};

use families::{drawings, hold, stored};
use layer_streamer::{Error, device::Cpu, model::Model};
use serde_json::json;

/// How far off logits may be: ‖Δ‖ / ‖expected‖.
const TOLERANCE: f64 = 1e-4;

#[test]
fn every_drawing_gives_what_transformers_computes() {
    hold(&Cpu, TOLERANCE, |_| true);
}

#[test]
fn drawings_of_every_model_type_are_stored() {
    let folder = support::folder();
    fs::write(folder.path().join("config.json"), json!({ "model_type": "of no family" }).to_string()).unwrap();
    let Err(Error::Unsupported { remedy, .. }) = Model::open(folder.path()) else { panic!("it is of no family") };
    let known = remedy.strip_prefix("the model types known are ").expect("the remedy is a list");
    let known: BTreeSet<_> = known.split(", ").map(str::to_owned).collect();
    let drawn =
        drawings(&stored()).into_iter().map(|(_, drawing)| drawing.config["model_type"].as_str().unwrap().into());
    let missing: Vec<_> = known.difference(&drawn.collect()).cloned().collect();
    assert!(missing.is_empty(), "tests/families has no drawings of {missing:?}");
}
