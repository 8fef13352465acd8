//! The decoder, run in every way on the CPU, against what was computed elsewhere for the same checkpoints.

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use std::{collections::BTreeSet, fs};

use layer_streamer::device::Cpu;
use oracle::{REFERENCES, ROWS, SMOLLM2, hold, rings};

#[test]
fn every_model_gives_the_stored_logits_and_tokens_in_every_way() {
    hold(&Cpu, &REFERENCES, &ROWS);
}

#[test]
fn the_speller_gives_them_with_every_combination_of_stages_and_batches() {
    let [.., speller] = REFERENCES;
    hold(&Cpu, &[speller], &rings());
}

#[test]
fn whatever_is_stored_is_held_against_a_model() {
    let folders = fs::read_dir(support::data("")).unwrap().map(|entry| entry.unwrap().path());
    let stored = folders.filter(|folder| folder.join("expected.safetensors").exists());
    let stored: BTreeSet<_> = stored.map(|folder| folder.file_name().unwrap().to_owned()).collect();
    let held = REFERENCES.iter().chain([&SMOLLM2]).map(|reference| reference.name.into()).collect();
    assert_eq!(stored, held);
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; ci/full runs it"]
fn a_real_language_model_gives_them_in_every_way() {
    hold(&Cpu, &[SMOLLM2], &ROWS);
}
